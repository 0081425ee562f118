//! The helper's main loop: look, drain, keep the books. What is asked of it is
//! in `requests`, the switch in `turn`.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};

use crate::config::Config;
use crate::detect::Store;
use crate::libvirt::enrolment::Enrolment;
use crate::libvirt::live::LiveXml;
use crate::libvirt::run_dir::RunDir;
use crate::libvirt::xml::DomainXml;
use crate::session::{domain_dir, DomainFindings, EndReason, Finding, FindingKind, Meta};

use super::awaited::{Awaited, Untraced};
use super::booted::BootLook;
use super::graphs::Graphs;
use super::notify::Notifier;
use super::patrol::{Orders, Patrol};
use super::place;
use super::protocol::{GuestStatus, Reply, Request, Status, TraceStatus};
use super::ratelimit::RateLimit;
use super::settle::Settling;
use super::trace::{Closed, Trace, TraceError};
use super::watch::{wall_ns, Seen, Watch};
use super::Attached;

/// Between two rounds of draining while a trace is on. At 100 MB of records a
/// second, 1.4 MiB of buffer (the kernel's default) lasts 14 ms.
pub(super) const TICK_TRACING: Duration = Duration::from_millis(3);
/// Between two looks at a guest that is not traced.
const TICK_IDLE: Duration = Duration::from_millis(50);
/// How often the status is brought up to date.
const STATUS_EVERY: Duration = Duration::from_millis(200);
/// For reading what is left when a trace ends. A guest that has not stopped
/// may have something new for ever.
const REST_LIMIT: Duration = Duration::from_secs(10);
/// How often it is tried to save what a full disk did not take.
const SAVE_AGAIN_EVERY: Duration = Duration::from_secs(2);
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
    /// its call flow perhaps not yet written.
    Vm,
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
    /// Where memory modules that come and go are told of.
    pub(super) live: LiveXml,
    pub(super) watch: Watch,
    pub(super) trace: Option<Trace>,
    /// What the switch is to be set to: the functions as resolved by name.
    pub(super) wanted: Option<Vec<String>>,
    pub(super) buffer_kb: u32,
    pub(super) status: Arc<Mutex<Status>>,
    pub(super) status_at: Instant,
    /// When it was last told that the tracer is off; none while it is on.
    told_off: Option<Instant>,
    pub(super) start_done: bool,
    /// A kernel was found and not yet seen to.
    pub(super) boot_due: bool,
    /// What keeps the kernel that was found from being traced as it is to be.
    pub(super) awaited: Option<Awaited>,
    /// Since when the guest has not been traced that is to be.
    pub(super) untraced: Option<Untraced>,
    pub(super) boot_look: BootLook,
    pub(super) last_session: Option<PathBuf>,
    pub(super) said: RateLimit,
    /// For what is said of a guest that comes and goes.
    pub(super) boots_said: RateLimit,
    pub(super) settling: Settling,
    pub(super) graphs: Graphs,
    /// How often going on with a session that was left open has failed.
    pub(super) resume_failed: u32,
    /// Sessions that are closed, which could not be noted in their directories.
    pub(super) unsaved: Vec<(PathBuf, Meta)>,
    unsaved_at: Instant,
    notifier: Option<Arc<Notifier>>,
    /// Who looks at the guest's memory, where that is wanted.
    patrol: Option<Patrol>,
}

/// Why a request could not be carried out; its text goes to the user.
pub(super) type Refusal = anyhow::Error;

impl Engine {
    pub(super) fn new(
        domain: DomainXml,
        config: Config,
        attached: Attached,
        graphs: Graphs,
    ) -> Self {
        let enrolment = Enrolment::of(&domain, &config);
        let sources = super::living::places(enrolment.as_ref(), &config);
        let status = Status {
            domain: domain.name.clone(),
            uuid: domain.uuid,
            helper_pid: std::process::id(),
            qemu: attached.qemu,
            memory: attached.files.clone(),
            guest: GuestStatus::Searching {
                why: "not looked yet".to_owned(),
            },
            integrity: None,
            awaited: None,
            trace: None,
            last_session: None,
        };
        let notifier = start_notifier(&config.on_finding);
        let interval = enrolment
            .as_ref()
            .map_or(config.integrity_interval, |wanted| {
                wanted.integrity_interval
            });
        let patrol = interval.0.and_then(|interval| {
            let patrol = Patrol::start(Orders {
                interval,
                domain: domain.name.clone(),
                uuid: domain.uuid,
                symbols: config.paths.symbols.clone(),
                findings: DomainFindings::at(&domain_dir(&config.paths.sessions, &domain.name)),
                notifier: notifier.as_ref().map_or_else(Weak::new, Arc::downgrade),
            });
            patrol
                .inspect_err(|error| log::error!("the guest's memory is not checked: {error}"))
                .ok()
        });
        let mut engine = Self {
            live: LiveXml::new(&config.paths.libvirt_run, &domain),
            domain,
            config,
            enrolment,
            watch: Watch::new(sources, attached.max_cpus),
            attached,
            trace: None,
            wanted: None,
            buffer_kb: 0,
            status: Arc::new(Mutex::new(status)),
            status_at: Instant::now(),
            told_off: None,
            start_done: false,
            boot_due: false,
            awaited: None,
            untraced: None,
            boot_look: BootLook::default(),
            last_session: None,
            said: RateLimit::new(3, Duration::from_secs(60)),
            boots_said: RateLimit::new(10, Duration::from_secs(60)),
            settling: Settling::new(),
            graphs,
            resume_failed: 0,
            unsaved: Vec::new(),
            unsaved_at: Instant::now(),
            notifier,
            patrol,
        };
        let run_dir = RunDir::at(&engine.config.paths.run);
        if let Some(place) = place::noted(&run_dir, engine.domain.uuid, engine.attached.qemu) {
            engine.watch.known_at(place);
        }
        engine
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
        self.close_others();
        if self.left().next().is_some() || self.is_traced_at_start() {
            self.untraced = Some(Untraced::new(Instant::now()));
        }
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
                if let Some((dir, _)) = self.close_left(&EndReason::VmEnded) {
                    self.graphs.write(dir);
                }
                self.end_trace(EndReason::VmEnded);
                return Ended::Vm;
            }
            if stopped {
                log::info!("told to stop");
                if let Some((dir, _)) = self.close_left(&EndReason::HelperStopped) {
                    self.graphs.write(dir);
                }
                if self.trace.is_some() {
                    if let Err(error) = self.end(EndReason::HelperStopped) {
                        log::error!("the trace could not be ended in order: {error:#}");
                        self.end_trace(EndReason::HelperStopped);
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
    /// pass, and what is wrong for long is not told at every look. The guest is
    /// switched off once it is found again, as any that nobody traces.
    pub(super) fn failed(&mut self, why: &str) {
        if let Some(again) = self.said.say() {
            log::error!("{why}{again}");
        }
        self.end_trace(EndReason::Error(why.to_owned()));
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
    pub(super) fn round(&mut self) -> anyhow::Result<()> {
        self.attend_modules();
        self.look()?;
        self.attend_boot()?;
        self.tell_untraced(Instant::now());
        if let Some(patrol) = &mut self.patrol {
            patrol.follow(&self.watch, &self.attached.ram, &self.live);
        }
        if let Some(trace) = &mut self.trace {
            trace.drain(&self.watch)?;
            trace.attend(&self.watch);
            if trace.writer.is_full() {
                log::warn!("the session has reached the size that the configuration allows");
                self.end(EndReason::SizeLimit)?;
            }
        } else {
            self.settle_meanwhile()?;
        }
        self.notice_tracer_off();
        self.save_closed();
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
                if let Some(again) = self.boots_said.say() {
                    log::warn!("the guest was reset{again}");
                }
                self.awaited = None;
                if let Some(trace) = &mut self.trace {
                    trace.guest_gone();
                    self.untraced.get_or_insert(Untraced::new(Instant::now()));
                }
            }
            Seen::Booted => {
                self.awaited = None;
                self.boot_due = true;
                // Another kernel may live than the one that was followed, without a reset.
                if let Some(trace) = &mut self.trace {
                    trace.guest_gone();
                    self.untraced.get_or_insert(Untraced::new(Instant::now()));
                }
            }
        }
        Ok(seen)
    }

    /// The domain's sessions, newest first.
    pub(super) fn sessions(&self) -> Vec<PathBuf> {
        crate::session::list(&self.sessions_dir())
    }

    pub(super) fn sessions_dir(&self) -> PathBuf {
        domain_dir(&self.config.paths.sessions, &self.domain.name)
    }

    /// Has the trace judged, where the domain or the configuration names a
    /// baseline.
    fn guard(&mut self) {
        let Some(trace) = &mut self.trace else { return };
        trace.tell(self.notifier.clone());
        let name = match &self.enrolment {
            Some(wanted) => wanted.baseline.clone(),
            None => Enrolment::baseline_of(None, &self.config),
        };
        if let Some(name) = name {
            trace.judge_by(name, &Store::at(&self.config.paths.baselines));
        }
    }

    /// Tells when somebody in the guest switched the tracer off or keeps records out of
    /// the ring, or its kernel says that its switch is no longer on.
    fn notice_tracer_off(&mut self) {
        let (Some(trace), Some(_)) = (&mut self.trace, &self.wanted) else {
            return;
        };
        let is_on = trace.tracing(&self.watch);
        let says_on = is_on.map(|(_, recording)| recording);
        let recording = trace.recording_off(&self.watch, says_on);
        let soon = |at: Instant| at.elapsed() <= TELL_EVERY;
        let tracer = match is_on {
            Some((true, _)) => {
                self.told_off = None;
                None
            }
            Some((false, _)) if !self.told_off.is_some_and(soon) => {
                self.told_off = Some(Instant::now());
                Some(FindingKind::TracerOff)
            }
            _ => None,
        };
        for kind in recording.into_iter().chain(tracer) {
            trace.finding(Finding {
                wall_ns: wall_ns(),
                kind,
            });
        }
    }

    /// Closes the session as it is, without the guest's help.
    pub(super) fn end_trace(&mut self, end: EndReason) {
        self.wanted = None;
        self.awaited = None;
        self.untraced = None;
        let _ = self.drain_rest();
        if let Some(trace) = self.trace.take() {
            let closed = trace.close(end, &self.watch);
            let dir = self.closed(closed);
            self.graphs.write(dir);
        }
    }

    /// A session is open.
    pub(super) fn begun(&mut self, mut trace: Trace) {
        let limits = &self.config.limits;
        trace
            .writer
            .set_limits(limits.session_size.0, limits.unwritten.0.max(1 << 20));
        self.untraced = None;
        self.boot_look.forget();
        self.trace = Some(trace);
        self.guard();
    }

    /// Notes a session that was closed. Its directory.
    pub(super) fn closed(&mut self, closed: Closed) -> PathBuf {
        self.last_session = Some(closed.dir.clone());
        if !closed.saved {
            self.unsaved.push((closed.dir.clone(), closed.meta));
        }
        closed.dir
    }

    /// Tries again to note on disk which sessions are closed.
    fn save_closed(&mut self) {
        if self.unsaved.is_empty() || self.unsaved_at.elapsed() < SAVE_AGAIN_EVERY {
            return;
        }
        self.unsaved_at = Instant::now();
        self.unsaved.retain(|(dir, meta)| meta.save(dir).is_err());
    }

    pub(super) fn drain_rest(&mut self) -> Result<(), TraceError> {
        // What was written before recording stopped is all there; a second
        // round that finds nothing says that the first had it all.
        let deadline = Instant::now() + REST_LIMIT;
        while let Some(trace) = &mut self.trace {
            let drained = trace.drain(&self.watch)?;
            if (drained.bytes == 0 && !drained.cut) || Instant::now() > deadline {
                break;
            }
        }
        Ok(())
    }

    pub(super) fn publish(&mut self) {
        self.status_at = Instant::now();
        let functions = self.enrolment.as_ref().map(|wanted| &*wanted.functions);
        let guest = match &self.watch.guest {
            Some(guest) => {
                let plain = functions.and_then(|functions| {
                    let traced = self.trace.as_ref().is_some_and(|trace| !trace.is_down());
                    let ram = &*self.attached.ram;
                    let told = self.boot_look.told(ram, guest, functions, traced);
                    told.map(Box::new)
                });
                GuestStatus::Alive {
                    banner: guest.kernel.banner.trim_end().escape_debug().to_string(),
                    symbols: guest.symbols_path.clone(),
                    compared: guest.symbols.tell_of_kallsyms(),
                    slide: guest.kernel.slide,
                    levels: guest.kernel.levels,
                    silent_ms: self.watch.silent().as_millis() as u64,
                    mode: guest.link.mode(),
                    rivals: self.watch.rivals().map(ToString::to_string),
                    plain,
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
                judged: trace.judged(),
            }
        });
        let mut status = lock(&self.status);
        status.memory.clone_from(&self.attached.files);
        status.guest = guest;
        status.integrity = self.patrol.as_mut().map(Patrol::status);
        let awaited = self.awaited.as_ref();
        status.awaited = awaited.map(|awaited| awaited.why.clone());
        status.trace = trace;
        status.last_session.clone_from(&self.last_session);
    }
}

/// Starts what runs the command for findings, if one is wanted.
fn start_notifier(command: &[String]) -> Option<Arc<Notifier>> {
    if command.is_empty() {
        return None;
    }
    Notifier::start(command)
        .map(Arc::new)
        .inspect_err(|error| log::error!("on_finding: {error}"))
        .ok()
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
