//! The helper's life: one turn for each start of its domain.
//!
//! A domain may be started anew while its helper still writes the call flow
//! of the last trace, which takes seconds for a large one. The helper has given
//! its lock back by then, so that the hook starts another one. But where
//! helpers are services of systemd, this one's is still active, and starting it
//! again does nothing. So the helper looks for a new XML, as
//! [`crate::libvirt::run_dir`] says, until it ends, and serves that domain too
//! if nobody else does.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::config::Config;
use crate::libvirt::run_dir::RunDir;
use crate::libvirt::xml::DomainXml;

use super::engine::{Ended, Engine};
use super::graphs::Graphs;
use super::server::Server;

/// Between two looks for a domain that was started anew.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// How long a helper that the hook started has to take the domain.
const OTHERS_FIRST: Duration = Duration::from_secs(1);

/// What a helper is started with.
#[derive(Debug)]
pub struct Options {
    /// The domain, as the hook got it.
    pub domain: DomainXml,
    /// The configuration.
    pub config: Config,
}

/// Runs the helper of one domain until its QEMU process has ended and it was
/// not started anew, or until it is told to stop (SIGTERM, SIGINT).
///
/// # Errors
/// If it cannot attach to the domain, or another helper has it.
pub fn run(options: Options) -> anyhow::Result<()> {
    // Before any thread is started, so that all of them leave signals to us.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block()?;
    let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;

    let Options { mut domain, config } = options;
    let run_dir = RunDir::at(&config.paths.run);
    let graphs = Graphs::up_to(config.limits.text_size.0);
    let mut server = Server::bind(&run_dir, domain.uuid)?;
    // Whatever comes of it, a call flow is not left half written.
    loop {
        match serve(&domain, &config, server, signals.as_fd(), &graphs) {
            Ok(Ended::Stopped) => return Ok(()),
            Ok(Ended::Vm) => {}
            Err(error) => return Err(error),
        }
        let Some((next, bound)) = next_start(&run_dir, &domain, &graphs) else {
            return Ok(());
        };
        (domain, server) = (next, bound);
    }
}

/// Serves one start of the domain. When this returns, the lock is free.
fn serve(
    domain: &DomainXml,
    config: &Config,
    server: Server,
    signals: BorrowedFd<'_>,
    graphs: &Graphs,
) -> anyhow::Result<Ended> {
    let attached = super::attach(domain, config)?;
    log::info!(
        "attached to domain {} (QEMU process {}), memory {:?}",
        domain.name.escape_debug(),
        attached.qemu.pid,
        attached.files
    );
    let mut engine = Engine::new(domain.clone(), config.clone(), attached, graphs.clone());
    let jobs = server.serve(engine.status())?;
    Ok(engine.run(&jobs, server.wake(), signals))
}

/// Waits until the call flows are written. If the domain is started anew
/// meanwhile and no other helper takes it, that start, and its lock.
fn next_start(
    run_dir: &RunDir,
    domain: &DomainXml,
    graphs: &Graphs,
) -> Option<(DomainXml, Server)> {
    let mut since = None;
    loop {
        // In this order: what comes after the last look, the hook's own helper
        // takes, since no service is active then.
        let written = graphs.are_written();
        let next = started_anew(run_dir, domain).filter(|_| !run_dir.has_helper(domain.uuid));
        match next {
            None if written => return None,
            None => since = None,
            Some(next) => {
                if since.get_or_insert_with(Instant::now).elapsed() > OTHERS_FIRST {
                    match Server::bind(run_dir, domain.uuid) {
                        Ok(server) => return Some((next, server)),
                        Err(error) => log::info!("{error:#}"),
                    }
                }
            }
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// The domain's XML of another start than this one, where the hook has saved
/// one.
fn started_anew(run_dir: &RunDir, domain: &DomainXml) -> Option<DomainXml> {
    run_dir
        .saved(domain.uuid)
        .filter(|saved| saved.id.is_some() && saved.id != domain.id)
}

#[cfg(test)]
mod tests {
    use super::*;

    const UUID: &str = "9a3f1c50-7f1e-4f0e-8f5e-0123456789ab";

    fn xml(id: u32) -> String {
        format!("<domain id='{id}'><name>web1</name><uuid>{UUID}</uuid><memory>1</memory></domain>")
    }

    fn setting() -> (tempfile::TempDir, RunDir, DomainXml) {
        let dir = tempfile::tempdir().expect("a directory");
        let run_dir = RunDir::at(dir.path());
        let domain = DomainXml::parse_bytes(xml(4).as_bytes()).expect("a domain");
        run_dir.save(domain.uuid, xml(4).as_bytes()).expect("saved");
        (dir, run_dir, domain)
    }

    /// Call flows that are not written before a time has passed.
    fn slow(time: Duration) -> Graphs {
        let graphs = Graphs::up_to(u64::MAX);
        graphs.spawn(move || std::thread::sleep(time));
        graphs
    }

    #[test]
    fn a_domain_started_anew_while_its_call_flow_is_written_is_served() {
        let (_dir, run_dir, domain) = setting();
        run_dir.save(domain.uuid, xml(5).as_bytes()).expect("saved");
        let graphs = slow(OTHERS_FIRST * 3);
        let (next, server) = next_start(&run_dir, &domain, &graphs).expect("a start");
        assert_eq!(next.id, Some(5));
        assert!(run_dir.has_helper(domain.uuid));
        assert!(!graphs.are_written(), "the old call flow was waited for");
        drop(server);
        assert!(!run_dir.has_helper(domain.uuid));
    }

    #[test]
    fn one_that_another_helper_took_is_left_to_it() {
        let (_dir, run_dir, domain) = setting();
        run_dir.save(domain.uuid, xml(5).as_bytes()).expect("saved");
        let _other = Server::bind(&run_dir, domain.uuid).expect("a helper");
        assert!(next_start(&run_dir, &domain, &slow(OTHERS_FIRST * 2)).is_none());
    }

    #[test]
    fn the_same_start_is_not_served_twice() {
        let (_dir, run_dir, domain) = setting();
        assert!(next_start(&run_dir, &domain, &slow(OTHERS_FIRST * 2)).is_none());
    }
}
