//! `xftrace follow`.

use std::io::{self, BufWriter};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::signal::{SigSet, Signal};

use super::out::Stdout;
use super::{client, target, Context, Exit};
use crate::cli::args::{Clock, FollowArgs, FollowFormat};
use crate::config::Config;
use crate::follow::{follow, LiveFormat, Next};
use crate::helper::protocol::{Reply, Request};
use crate::libvirt::shell_word;
use crate::libvirt::xml::DomainXml;
use crate::output::TimeColumn;
use crate::session::{Meta, Session, State};

/// How often it is asked whether the helper is still there.
const ASK_EVERY: Duration = Duration::from_secs(2);
/// How long after Ctrl-C the process is there at most.
const GRACE: Duration = Duration::from_secs(1);

/// Runs the command.
pub(super) fn run(context: &Context, args: &FollowArgs) -> anyhow::Result<Exit> {
    let config = context.config()?;
    let domain = target::running(context, &config, args.domain.domain.as_deref())?;
    let session = Session::open(&running(&config, &domain)?)?;
    let format = match (args.format, args.clock) {
        (FollowFormat::Json, _) => LiveFormat::Json,
        (FollowFormat::Text, Clock::Host) => LiveFormat::Text(TimeColumn::Wall),
        (FollowFormat::Text, Clock::Guest) => LiveFormat::Text(TimeColumn::Guest),
    };
    let stop = stop_on_signals()?;

    let mut asked = Instant::now();
    let mut left = false;
    follow(&session, format, BufWriter::new(Stdout::new()), |longest| {
        if reader_leaves(longest) || stop.load(Ordering::Relaxed) {
            return Next::Stop;
        }
        if asked.elapsed() < ASK_EVERY {
            return Next::More;
        }
        asked = Instant::now();
        // First the helper, then the session: one that ends closes it first.
        let gone = matches!(client::connect_running(&config, &domain), Ok(None));
        left = gone && Meta::load(session.dir()).is_ok_and(|meta| meta.state == State::Open);
        if left {
            Next::Rest
        } else {
            Next::More
        }
    })?;
    anyhow::ensure!(
        !left,
        "the helper of domain '{}' is gone, and its trace goes on unread: `xftrace on -d {}` \
         starts another, which goes on with the session {}; the system log may say why",
        client::name(&domain),
        shell_word(&domain.name),
        session.dir().display()
    );
    Ok(Exit::Done)
}

/// The session of the trace that is on.
fn running(config: &Config, domain: &DomainXml) -> anyhow::Result<PathBuf> {
    let name = client::name(domain);
    let off = || {
        let word = shell_word(&domain.name);
        anyhow::anyhow!(
            "no trace is on for domain '{name}': begin one with `xftrace on -d {word}`; \
             `xftrace report -d {word}` shows the last one"
        )
    };
    let mut line = client::connect_running(config, domain)?.ok_or_else(off)?;
    line.patience(Some(Duration::from_secs(5)))?;
    line.send(&Request::Status)?;
    match line.receive()? {
        Some(Reply::Status(status)) => Ok(status.trace.ok_or_else(off)?.session),
        _ => anyhow::bail!("the helper of domain '{name}' gave no status"),
    }
}

/// Has Ctrl-C and SIGTERM end the command where a line ends, and well: the flag
/// is true from then on. Where the reader of standard output takes nothing, so
/// that the line cannot be ended, the process ends all the same.
fn stop_on_signals() -> anyhow::Result<Arc<AtomicBool>> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    signals.thread_block()?;
    let stop = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&stop);
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            if signals.wait().is_ok() {
                told.store(true, Ordering::Relaxed);
                std::thread::sleep(GRACE);
                std::process::exit(Exit::Done.status().into());
            }
        })?;
    Ok(stop)
}

/// Waits, `longest` at most, for the reader of standard output to go away.
fn reader_leaves(longest: Duration) -> bool {
    let stdout = io::stdout();
    // No event is asked for: that nobody reads is told always (poll(2)).
    let mut files = [PollFd::new(stdout.as_fd(), PollFlags::empty())];
    let timeout = PollTimeout::try_from(longest).unwrap_or(PollTimeout::ZERO);
    match poll(&mut files, timeout) {
        Ok(told) => told > 0,
        Err(Errno::EINTR) => false,
        Err(_) => {
            std::thread::sleep(longest);
            false
        }
    }
}
