//! Which domain a command means.

use std::path::PathBuf;

use anyhow::{bail, Context as _};
use uuid::Uuid;

use super::{out, Context};
use crate::config::Config;
use crate::libvirt::connection::{Connection, ConnectionError, Mode};
use crate::libvirt::enrolment::{untraceable, Enrolment};
use crate::libvirt::run_dir::RunDir;
use crate::libvirt::shell_word;
use crate::libvirt::xml::DomainXml;
use crate::session;

/// The running and enrolled domain that a command is about: the one that was
/// typed, else the only one there is.
///
/// libvirt is asked. Where its daemon does not answer, the XML that the hook
/// saved of each running domain tells as well, so that a trace can be stopped
/// while the daemon is down.
///
/// # Errors
/// Where there is no such domain, it does not run, it is not enrolled, its
/// memory cannot be traced, or there are several and none was named; with what
/// to do about it.
pub fn running(
    context: &Context,
    config: &Config,
    typed: Option<&str>,
) -> anyhow::Result<DomainXml> {
    let domain = match Connection::open(context.global.connect.as_deref(), Mode::ReadOnly) {
        Ok(connection) => match typed {
            Some(typed) => one(&connection, typed)?,
            None => only(enrolled(&connection, config)?)?,
        },
        Err(error @ ConnectionError::NoDaemon { .. }) => {
            let saved = RunDir::at(&config.paths.run).domains();
            if saved.is_empty() {
                return Err(error.into());
            }
            out::message(&format!("{error}; going by {}", config.paths.run.display()));
            match typed {
                Some(typed) => saved
                    .into_iter()
                    .find(|domain| is_called(domain, typed))
                    .with_context(|| format!("no traced domain '{}'", typed.escape_debug()))?,
                None => only(saved)?,
            }
        }
        Err(error) => return Err(error.into()),
    };
    let name = shell_word(&domain.name);
    if Enrolment::of(&domain, config).is_none() {
        bail!(
            "domain '{}' is not enrolled: type `xftrace enroll {name}`, then shut it down and \
             start it again if it says so",
            domain.name
        );
    }
    if let Some(why) = untraceable(&domain) {
        bail!(
            "domain '{}' cannot be traced: {why}. Type `xftrace enroll {name}`, then shut it \
             down and start it again",
            domain.name
        );
    }
    Ok(domain)
}

/// The domain that was typed, as it runs or else as it is defined; `None` where
/// libvirt does not know it (any more), or is not there to be asked.
pub fn known(context: &Context, typed: &str) -> Option<DomainXml> {
    let connection = Connection::open(context.global.connect.as_deref(), Mode::ReadOnly).ok()?;
    let domain = connection.domain(typed).ok()?;
    let xml = match domain.is_active() {
        Ok(true) => domain.live(),
        _ => domain.persistent(),
    };
    xml.ok()?.ok()
}

/// The newest session of the domain of this name, which libvirt need not know
/// any more.
///
/// # Errors
/// Where it has none.
pub fn newest_session(config: &Config, name: &str) -> anyhow::Result<PathBuf> {
    let dir = session::domain_dir(&config.paths.sessions, name);
    session::list(&dir).into_iter().next().with_context(|| {
        format!(
            "domain '{}' has no session below {}; 'xftrace on' begins one",
            name.escape_debug(),
            session::domain_dir(&config.paths.sessions, name).display()
        )
    })
}

/// The domain that was typed, as it runs.
fn one(connection: &Connection, typed: &str) -> anyhow::Result<DomainXml> {
    let domain = connection.domain(typed)?;
    if !domain.is_active()? {
        bail!(
            "domain '{}' is not running: start it with `virsh start {}`",
            domain.name(),
            shell_word(domain.name())
        );
    }
    Ok(domain.live()??)
}

/// The enrolled domains that run.
fn enrolled(connection: &Connection, config: &Config) -> anyhow::Result<Vec<DomainXml>> {
    let mut found = Vec::new();
    for domain in connection.domains()? {
        // One that ends or cannot be read while we look is none to choose.
        if let (Ok(true), Ok(Ok(xml))) = (domain.is_active(), domain.live()) {
            if Enrolment::of(&xml, config).is_some() {
                found.push(xml);
            }
        }
    }
    Ok(found)
}

fn only(mut found: Vec<DomainXml>) -> anyhow::Result<DomainXml> {
    match (found.pop(), found.len()) {
        (Some(domain), 0) => Ok(domain),
        (None, _) => bail!(
            "no enrolled domain is running; `xftrace list` shows all, `xftrace enroll DOMAIN` \
             makes one traceable"
        ),
        (Some(last), _) => {
            let names: Vec<_> = found
                .iter()
                .chain([&last])
                .map(|d| d.name.as_str())
                .collect();
            bail!(
                "several enrolled domains are running ({}): say which with -d DOMAIN",
                names.join(", ")
            )
        }
    }
}

fn is_called(domain: &DomainXml, typed: &str) -> bool {
    domain.id.is_some_and(|id| id.to_string() == typed)
        || Uuid::try_parse(typed) == Ok(domain.uuid)
        || domain.name == typed
}
