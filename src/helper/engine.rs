//! The helper's main loop: look, drain, keep the books. What is asked of it is
//! in `requests`, the switch in `turn`.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};

use crate::config::Config;
use crate::kernel::control::SwitchState;
use crate::kernel::stock::command_line;
use crate::libvirt::enrolment::Enrolment;
use crate::libvirt::xml::DomainXml;
use crate::session::{EndReason, Finding, FindingKind, Meta, Mode, State};

use super::protocol::{GuestStatus, Reply, Request, Status, TraceStatus};
use super::ratelimit::{RateLimit, Verdict};
use super::trace::{Trace, TraceError};
use super::watch::{wall_ns, Seen, Watch};
use super::Attached;

/// Between two rounds of draining while a trace is on. At 100 MB of records a
/// second, 1.4 MiB of buffer (the kernel's default) lasts 14 ms.
pub(super) const TICK_TRACING: Duration = Duration::from_millis(3);
/// Between two looks at a guest that is not traced.
const TICK_IDLE: Duration = Duration::from_millis(50);
/// How long what is left at the end of a trace is read at most: a guest that
/// goes on writing has no end.
const DRAIN_REST: Duration = Duration::from_secs(60);
/// How often the status is brought up to date.
const STATUS_EVERY: Duration = Duration::from_millis(200);
/// How long a tracer that somebody in the guest switched off goes untold
/// again.
const TELL_EVERY: Duration = Duration::from_secs(60);

/// A request, and where its replies go.
pub(super) struct Job {
    pub(super) request: Request,
    pub(super) reply: Sender<Reply>,
}

/// How serving a domain ended.
pub(super) enum Ended {
    /// Its QEMU process ended. The session that was open then is closed, and
    /// its call flow not yet written.
    Vm {
        /// Its directory.
        session: Option<PathBuf>,
    },
    /// The helper was told to stop.
    Stopped,
}

/// Serves one domain, from its QEMU's start to its end.
pub(super) struct Engine {
    pub(super) domain: DomainXml,
    pub(super) config: Config,
    /// What its metadata and the configuration want; none after unenroll.
    pub(super) enrolment: Option<Enrolment>,
    pub(super) attached: Attached,
    pub(super) watch: Watch,
    pub(super) trace: Option<Trace>,
    /// What the switch is to be set to: the functions as resolved by name.
    pub(super) wanted: Option<Vec<String>>,
    pub(super) buffer_kb: u32,
    pub(super) status: Arc<Mutex<Status>>,
    pub(super) status_at: Instant,
    /// When it was last told that the tracer, or recording, is off; none while
    /// it is on.
    pub(super) told_off: [Option<Instant>; 2],
    pub(super) start_done: bool,
    /// A kernel was found and not yet seen to.
    pub(super) boot_due: bool,
    pub(super) last_session: Option<PathBuf>,
    pub(super) said: RateLimit,
}

/// Why a request could not be carried out; its text goes to the user.
pub(super) type Refusal = anyhow::Error;

impl Engine {
    pub(super) fn new(domain: DomainXml, config: Config, attached: Attached) -> Self {
        let enrolment = Enrolment::of(&domain, &config);
        let sources = match enrolment.as_ref().and_then(|wanted| wanted.symbols.clone()) {
            Some(named) => vec![named],
            None => vec![config.paths.symbols.clone()],
        };
        let status = Status {
            domain: domain.name.clone(),
            uuid: domain.uuid,
            helper_pid: std::process::id(),
            qemu: attached.qemu,
            memory: attached.files.clone(),
            guest: GuestStatus::Searching {
                why: "not looked yet".to_owned(),
            },
            trace: None,
            last_session: None,
        };
        Self {
            domain,
            config,
            enrolment,
            attached,
            watch: Watch::new(sources),
            trace: None,
            wanted: None,
            buffer_kb: 0,
            status: Arc::new(Mutex::new(status)),
            status_at: Instant::now(),
            told_off: [None; 2],
            start_done: false,
            boot_due: false,
            last_session: None,
            said: RateLimit::new(3, Duration::from_secs(60)),
        }
    }

    /// What is asked of the helper from any thread.
    pub(super) fn status(&self) -> Arc<Mutex<Status>> {
        Arc::clone(&self.status)
    }

    /// Looks after the domain until its QEMU process ends or a signal comes.
    pub(super) fn run(
        &mut self,
        jobs: &Receiver<Job>,
        wake: BorrowedFd<'_>,
        signals: BorrowedFd<'_>,
    ) -> Ended {
        loop {
            let tick = if self.trace.is_some() {
                TICK_TRACING
            } else {
                TICK_IDLE
            };
            let (ended, stopped) = self.sleep(tick, wake, signals);
            super::server::drain_wake(wake);
            if ended {
                log::info!("the domain's QEMU process has ended");
                return Ended::Vm {
                    session: self.end_trace(EndReason::VmEnded),
                };
            }
            if stopped {
                log::info!("told to stop");
                if self.trace.is_some() {
                    if let Err(error) = self.off(EndReason::HelperStopped, &|_| ()) {
                        log::error!("the trace could not be ended in order: {error:#}");
                        if let Some(dir) = self.end_trace(EndReason::HelperStopped) {
                            write_graph(&dir);
                        }
                    }
                }
                return Ended::Stopped;
            }
            if let Err(error) = self.round() {
                self.failed(&format!("{error:#}"));
            }
            while let Ok(job) = jobs.try_recv() {
                self.job(job);
            }
        }
    }

    /// A round failed. The trace ends; looking goes on, for what is wrong may
    /// pass, and what is wrong for long is not told at every look.
    fn failed(&mut self, why: &str) {
        if let Verdict::Say { dropped } = self.said.ask() {
            let again = match dropped {
                0 => String::new(),
                dropped => format!(" ({dropped} times more before)"),
            };
            log::error!("{why}{again}");
        }
        if let Some(dir) = self.end_trace(EndReason::Error(why.to_owned())) {
            write_graph(&dir);
        }
        self.watch.lost(why);
    }

    /// Waits for something to do: whether QEMU has ended, and whether the
    /// helper is to stop.
    fn sleep(&self, tick: Duration, wake: BorrowedFd<'_>, signals: BorrowedFd<'_>) -> (bool, bool) {
        let mut fds = [
            PollFd::new(self.attached.pidfd.as_fd(), PollFlags::POLLIN),
            PollFd::new(signals, PollFlags::POLLIN),
            PollFd::new(wake, PollFlags::POLLIN),
        ];
        let timeout = PollTimeout::try_from(tick).unwrap_or(PollTimeout::ZERO);
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => {
                log::error!("poll: {error}");
                std::thread::sleep(tick);
            }
        }
        let ready = |fd: &PollFd<'_>| fd.revents().is_some_and(|events| !events.is_empty());
        (ready(&fds[0]), ready(&fds[1]))
    }

    /// One round: look at the guest, read what is new, keep the books.
    fn round(&mut self) -> anyhow::Result<()> {
        self.look()?;
        self.attend_boot()?;
        if let Some(trace) = &mut self.trace {
            trace.drain(&self.watch)?;
            trace.attend(&self.watch)?;
            if trace.writer.size() > self.config.limits.session_size.0 {
                log::warn!("the session has reached the size that the configuration allows");
                self.off(EndReason::SizeLimit, &|_| ())?;
            }
        }
        self.notice_tracer_off()?;
        if self.status_at.elapsed() > STATUS_EVERY {
            self.publish();
        }
        Ok(())
    }

    /// Looks at the guest. A reset is seen to at once; a boot is due for
    /// [`Engine::attend_boot`], which turns the switch and so is not for those
    /// who are about to.
    pub(super) fn look(&mut self) -> anyhow::Result<Seen> {
        let seen = self.watch.look(&*self.attached.ram)?;
        match seen {
            Seen::Same => {}
            Seen::Gone => {
                log::warn!("the guest was reset");
                if let Some(trace) = &mut self.trace {
                    trace.guest_gone();
                }
            }
            Seen::Booted => self.boot_due = true,
        }
        Ok(seen)
    }

    /// Sees to a kernel that was found since this was called last.
    pub(super) fn attend_boot(&mut self) -> anyhow::Result<()> {
        match std::mem::take(&mut self.boot_due) {
            true => self.booted(),
            false => Ok(()),
        }
    }

    /// A kernel was found that lives.
    fn booted(&mut self) -> anyhow::Result<()> {
        let Some(guest) = self.watch.guest.clone() else {
            return Ok(());
        };
        log::info!(
            "found the guest's kernel: {} (slide {:#x}, {}-level paging)",
            guest.kernel.banner.trim_end().escape_debug(),
            guest.kernel.slide,
            guest.kernel.levels
        );
        // The first look, for the clock.
        self.look()?;
        if let Some(trace) = &mut self.trace {
            let mode = guest.link.mode();
            anyhow::ensure!(
                trace.writer.meta.mode == mode,
                "the guest has booted a kernel whose records are {}: that is no part of this session",
                mode.text()
            );
            trace.guest_gone();
            trace.boot(&guest, &self.watch)?;
            return match self.switch_again() {
                // It was reset once more meanwhile: the next boot is told of.
                Err(error) if self.boot_due || self.watch.guest.is_none() => {
                    log::warn!("{error:#}");
                    Ok(())
                }
                result => result,
            };
        }
        if self.start_done {
            return Ok(());
        }
        self.start_done = true;
        if self.resume(&guest)? {
            return Ok(());
        }
        if self
            .enrolment
            .as_ref()
            .is_some_and(|wanted| wanted.at_start)
        {
            if let Err(error) = self.on(Vec::new(), None, None, &|_| ()) {
                log::error!("tracing from the start of the domain failed: {error:#}");
            }
        }
        Ok(())
    }

    /// Goes on with a session that a helper of this same QEMU process left
    /// open. Sessions that others left open are closed.
    fn resume(&mut self, guest: &super::watch::Guest) -> anyhow::Result<bool> {
        let mut resumed = false;
        for dir in self.sessions() {
            let Ok(mut meta) = Meta::load(&dir) else {
                continue;
            };
            if meta.state == State::Closed || meta.uuid != self.domain.uuid {
                continue;
            }
            if meta.qemu != self.attached.qemu || meta.mode != guest.link.mode() || resumed {
                meta.state = State::Closed;
                meta.end = Some(EndReason::VmEnded);
                meta.save(&dir)?;
                write_graph(&dir);
                continue;
            }
            let ram = Arc::clone(&self.attached.ram);
            let trace = Trace::resume(&dir, guest, &self.watch, ram)?;
            log::warn!("going on with the session in {dir:?}, whose helper has gone");
            self.wanted = Some(trace.writer.meta.functions().to_vec());
            let state = self.watch.heartbeat().map(|beat| beat.state);
            self.trace = Some(trace);
            resumed = true;
            if state != Some(SwitchState::On) {
                self.switch_again()?;
            }
        }
        Ok(resumed)
    }

    /// The domain's sessions, newest first.
    fn sessions(&self) -> Vec<PathBuf> {
        crate::session::list(&self.sessions_dir())
    }

    pub(super) fn sessions_dir(&self) -> PathBuf {
        crate::session::domain_dir(&self.config.paths.sessions, &self.domain.name)
    }

    /// Tells when somebody in the guest switched the tracer off.
    fn notice_tracer_off(&mut self) -> anyhow::Result<()> {
        let Some(trace) = &mut self.trace else {
            return Ok(());
        };
        let Some((tracer, recording)) = trace.tracing(&self.watch) else {
            return Ok(());
        };
        let looked_at = [
            (tracer, FindingKind::TracerOff),
            (recording, FindingKind::RecordingOff),
        ];
        for ((is_on, kind), told) in looked_at.into_iter().zip(&mut self.told_off) {
            if is_on {
                *told = None;
            } else if told.is_none_or(|at| at.elapsed() > TELL_EVERY) {
                *told = Some(Instant::now());
                trace.finding(Finding {
                    wall_ns: wall_ns(),
                    kind,
                })?;
            }
        }
        Ok(())
    }

    /// Closes the session as it is, without the guest's help. Its directory,
    /// where the call flow is yet to be written.
    pub(super) fn end_trace(&mut self, end: EndReason) -> Option<PathBuf> {
        self.wanted = None;
        let _ = self.drain_rest();
        let closed = self.trace.take()?.close(end, &self.watch);
        let closed = closed.map_err(anyhow::Error::from);
        self.last_session = closed
            .inspect_err(|error| {
                log::error!("the session could not be closed: {error:#}");
            })
            .ok();
        self.last_session.clone()
    }

    pub(super) fn drain_rest(&mut self) -> Result<(), TraceError> {
        // What was written before recording stopped is all there; a second
        // round that finds nothing says that the first had it all.
        let until = Instant::now() + DRAIN_REST;
        while let Some(trace) = &mut self.trace {
            let drained = trace.drain(&self.watch)?;
            if (drained.bytes == 0 && !drained.cut) || Instant::now() > until {
                break;
            }
        }
        Ok(())
    }

    /// What the guest has to be booted with for the functions that the domain
    /// is enrolled with, and why these could not be traced as it is now.
    fn boot_needs(&self, guest: &super::watch::Guest) -> (Option<String>, Option<String>) {
        let (Mode::Plain, Some(enrolment)) = (guest.link.mode(), &self.enrolment) else {
            return (None, None);
        };
        let full = |name: &String| {
            let found = guest.symbols.resolve_function(name);
            found.map_or_else(|_| name.clone(), |found| found.name)
        };
        let functions: Vec<String> = enrolment.functions.iter().map(full).collect();
        let why = match &self.trace {
            Some(_) => None,
            None => guest
                .link
                .refuses(&*self.attached.ram, &guest.symbols, &functions),
        };
        let needs = command_line(&functions);
        (
            Some(needs),
            why.map(|why| format!("{:#}", anyhow::Error::from(why))),
        )
    }

    pub(super) fn publish(&mut self) {
        self.status_at = Instant::now();
        let guest = match &self.watch.guest {
            Some(guest) => {
                let (command_line, cannot) = self.boot_needs(guest);
                GuestStatus::Alive {
                    banner: guest.kernel.banner.trim_end().escape_debug().to_string(),
                    symbols: guest.symbols_path.clone(),
                    slide: guest.kernel.slide,
                    levels: guest.kernel.levels,
                    silent_ms: self.watch.silent().as_millis() as u64,
                    mode: guest.link.mode(),
                    cannot,
                    command_line,
                }
            }
            None => GuestStatus::Searching {
                why: self.watch.why.clone(),
            },
        };
        let trace = self.trace.as_ref().map(|trace| {
            let meta = &trace.writer.meta;
            TraceStatus {
                session: trace.writer.dir().to_owned(),
                mode: meta.mode,
                functions: meta.functions().to_vec(),
                since_ns: meta.started_ns,
                interval_ns: meta.interval_ns,
                epoch: trace.keys.thread().map(super::keyring::KeyThread::epoch),
                boot: meta.boots.last().map_or(0, |boot| boot.number),
                stored: trace.writer.size(),
                counters: meta.counters,
            }
        });
        let mut status = lock(&self.status);
        status.guest = guest;
        status.trace = trace;
        status.last_session.clone_from(&self.last_session);
    }
}

/// Writes the call flow of a closed session. What goes wrong is logged, and
/// given: the records are safe, and `xftrace report` can be asked again.
pub(super) fn write_graph(dir: &std::path::Path) -> Option<String> {
    let error = anyhow::Error::from(crate::report::write_graph(dir).err()?);
    log::error!("the call flow of {dir:?} could not be written: {error:#}");
    Some(format!("{error:#}"))
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
