//! How the commands find a domain's helper and talk to it.

use std::io;
use std::time::Duration;

use anyhow::{anyhow, bail, Context as _};

use crate::config::Config;
use crate::helper::attach;
use crate::helper::protocol::{Line, Reply, Request};
use crate::libvirt::connection::{Connection, Mode};
use crate::libvirt::run_dir::RunDir;
use crate::libvirt::xml::DomainXml;

use super::{hook, out, Context};

/// For a helper that was just started to listen.
const START_LIMIT: Duration = Duration::from_secs(5);
/// Without a word from the helper for so long, something is wrong with it.
const PATIENCE: Duration = Duration::from_secs(180);

/// Asks the helper of a running domain, and gives its final answer. Progress
/// goes to standard error. Where no helper runs, one is started.
pub(super) fn ask(
    context: &Context,
    config: &Config,
    domain: &DomainXml,
    request: &Request,
) -> anyhow::Result<Reply> {
    let mut line = connect(context, config, domain)?;
    line.patience(Some(PATIENCE))?;
    match line.send(request) {
        // What it said before it ended is still to be read.
        Err(error) if is_end(&error) => {}
        sent => sent.context("asking the domain's helper")?,
    }
    loop {
        match receive(&mut line, domain)? {
            Some(Reply::Progress { text }) => out::message(&text),
            Some(Reply::Error { text }) => bail!("domain '{}': {text}", name(domain)),
            Some(reply) => return Ok(reply),
            None => {
                let how = format!(
                    "the helper of domain '{}' ended without an answer",
                    name(domain)
                );
                return Err(ended(config, domain, how));
            }
        }
    }
}

/// Receives a reply of a domain's helper; `None` where that has ended.
pub(super) fn receive(line: &mut Line, domain: &DomainXml) -> anyhow::Result<Option<Reply>> {
    let kill = line.peer().map_or_else(
        || "Kill its process".to_owned(),
        |pid| format!("Type `kill -KILL {pid}`"),
    );
    let received = match line.receive() {
        // A connection is reset where the helper ended before it had read the question.
        Err(error) if is_end(&error) => Ok(None),
        received => received,
    };
    received.map_err(|error| match error.kind() {
        // What a read that timed out gives, socket(7).
        io::ErrorKind::WouldBlock => anyhow!(
            "the helper of domain '{}' does not answer: it is stopped, or hangs. The domain is \
             not concerned. {kill}; the next `xftrace on` starts another \
             helper, which goes on with the trace",
            name(domain)
        ),
        _ => anyhow!(error).context("waiting for the domain's helper"),
    })
}

/// Whether a connection fails because the other end is there no more.
pub(super) fn is_end(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
    )
}

/// What is wrong with a helper that is gone. The guest's memory, more often than not.
fn ended(config: &Config, domain: &DomainXml, how: String) -> anyhow::Error {
    match attach(domain, config) {
        Err(error) => error.context(how),
        Ok(_) => anyhow!(
            "{how}; see the system log, or run 'xftrace doctor {}'",
            name(domain)
        ),
    }
}

/// Connects to a domain's helper, if one runs.
pub(super) fn connect_running(config: &Config, domain: &DomainXml) -> anyhow::Result<Option<Line>> {
    match Line::connect(&RunDir::at(&config.paths.run), domain.uuid) {
        Ok(line) => Ok(Some(line)),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
            ) =>
        {
            Ok(None)
        }
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Err(anyhow!(
            "no permission to talk to the helper of domain '{}' in {}: run xftrace as root",
            name(domain),
            config.paths.run.display()
        )),
        Err(error) => Err(error)
            .with_context(|| format!("cannot reach the helper of domain '{}'", name(domain))),
    }
}

fn connect(context: &Context, config: &Config, domain: &DomainXml) -> anyhow::Result<Line> {
    if let Some(line) = connect_running(config, domain)? {
        return Ok(line);
    }
    start_helper(context, config, domain)?;
    let started = std::time::Instant::now();
    while started.elapsed() < START_LIMIT {
        if let Some(line) = connect_running(config, domain)? {
            return Ok(line);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let how = format!(
        "no helper runs for domain '{}', and the one that was started did not stay",
        name(domain)
    );
    Err(ended(config, domain, how))
}

/// Starts a helper as the hook would have: the domain ran before the hook was
/// there, or its helper was killed.
fn start_helper(context: &Context, config: &Config, domain: &DomainXml) -> anyhow::Result<()> {
    let connection = Connection::open(context.global.connect.as_deref(), Mode::ReadOnly)?;
    let xml = connection.domain(&domain.uuid.to_string())?.live_xml()?;
    let run_dir = RunDir::at(&config.paths.run);
    hook::start(context, &run_dir, xml.as_bytes(), domain)?;
    Ok(())
}

/// A domain's name for a message.
pub(super) fn name(domain: &DomainXml) -> String {
    domain.name.escape_debug().to_string()
}
