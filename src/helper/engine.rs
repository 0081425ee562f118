//! The helper's main loop, and what it does with requests.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::config::Config;
use crate::kernel::control::SwitchState;
use crate::kernel::Gva;
use crate::libvirt::enrolment::Enrolment;
use crate::libvirt::run_dir::RunDir;
use crate::libvirt::xml::DomainXml;
use crate::session::{
    EndReason, Finding, FindingKind, Meta, Mode, State, SwitchChange, GRAPH_FILE,
};
use crate::switch::{self, Command, Progress, SwitchError};

use super::protocol::{GuestStatus, Reply, Request, Status, TraceStatus};
use super::server::Server;
use super::trace::{Trace, TraceError};
use super::watch::{wall_ns, Seen, Watch};
use super::Attached;

/// Between two rounds of draining while a trace is on. At 100 MB of records a
/// second, 1.4 MiB of buffer (the kernel's default) lasts 14 ms.
const TICK_TRACING: Duration = Duration::from_millis(3);
/// Between two looks at a guest that is not traced.
const TICK_IDLE: Duration = Duration::from_millis(50);
/// For the guest to take a command up: it looks every 100 ms or sooner.
const PICKUP_LIMIT: Duration = Duration::from_secs(10);
/// For the guest's kernel to patch its call sites, under emulation.
const WORK_LIMIT: Duration = Duration::from_secs(120);
/// How often a user who waits is told of it.
const PROGRESS_EVERY: Duration = Duration::from_secs(2);
/// How often the status is brought up to date.
const STATUS_EVERY: Duration = Duration::from_millis(200);
/// How long a tracer that somebody in the guest switched off goes untold
/// again.
const TELL_EVERY: Duration = Duration::from_secs(60);

/// What a helper is started with.
#[derive(Debug)]
pub struct Options {
    /// The domain, as the hook got it.
    pub domain: DomainXml,
    /// The configuration.
    pub config: Config,
}

/// A request, and where its replies go.
pub(super) struct Job {
    pub(super) request: Request,
    pub(super) reply: Sender<Reply>,
}

/// Runs the helper of one domain until its QEMU process ends, or until it is
/// told to stop (SIGTERM, SIGINT).
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

    let run_dir = RunDir::at(&options.config.paths.run);
    let uuid = options.domain.uuid;
    let server = Server::bind(&run_dir, uuid)?;
    let attached = super::attach(&options.domain, &options.config)?;
    log::info!(
        "attached to domain {} (QEMU process {}), memory {:?}",
        options.domain.name.escape_debug(),
        attached.qemu.pid,
        attached.files
    );
    let mut engine = Engine::new(options, attached);
    let jobs = server.serve(Arc::clone(&engine.status))?;
    engine.run(&jobs, server.wake(), signals.as_fd());
    Ok(())
}

struct Engine {
    domain: DomainXml,
    config: Config,
    /// What its metadata and the configuration want; none after unenroll.
    enrolment: Option<Enrolment>,
    attached: Attached,
    watch: Watch,
    trace: Option<Trace>,
    /// What the switch is to be set to: the functions as resolved by name.
    wanted: Option<Vec<String>>,
    buffer_kb: u32,
    status: Arc<Mutex<Status>>,
    status_at: Instant,
    told_off: Option<Instant>,
    start_done: bool,
    last_session: Option<PathBuf>,
}

/// Why a request could not be carried out; its text goes to the user.
type Refusal = anyhow::Error;

impl Engine {
    fn new(options: Options, attached: Attached) -> Self {
        let Options { domain, config } = options;
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
            told_off: None,
            start_done: false,
            last_session: None,
        }
    }

    fn run(&mut self, jobs: &Receiver<Job>, wake: BorrowedFd<'_>, signals: BorrowedFd<'_>) {
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
                self.end_trace(EndReason::VmEnded);
                return;
            }
            if stopped {
                log::info!("told to stop");
                if self.trace.is_some() {
                    if let Err(error) = self.off(EndReason::HelperStopped, &|_| ()) {
                        log::error!("the trace could not be ended in order: {error:#}");
                        self.end_trace(EndReason::HelperStopped);
                    }
                }
                return;
            }
            if let Err(error) = self.round() {
                log::error!("{error:#}");
                self.end_trace(EndReason::Error(format!("{error:#}")));
            }
            while let Ok(job) = jobs.try_recv() {
                self.job(job);
            }
        }
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
        let ram = Arc::clone(&self.attached.ram);
        match self.watch.look(&*ram)? {
            Seen::Same => {}
            Seen::Gone => {
                log::warn!("the guest was reset");
                if let Some(trace) = &mut self.trace {
                    trace.guest_gone();
                }
            }
            Seen::Booted => self.booted()?,
        }
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
        self.watch.look(&*self.attached.ram)?;
        if let Some(trace) = &mut self.trace {
            trace.guest_gone();
            trace.boot(&guest, &self.watch)?;
            return self.switch_again();
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
            if meta.qemu != self.attached.qemu || resumed {
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

    fn sessions_dir(&self) -> PathBuf {
        crate::session::domain_dir(&self.config.paths.sessions, &self.domain.name)
    }

    /// After a reboot: the switch as it was before.
    fn switch_again(&mut self) -> anyhow::Result<()> {
        let Some(functions) = self.wanted.clone() else {
            return Ok(());
        };
        let deadline = Instant::now() + PICKUP_LIMIT;
        while self.trace.as_ref().is_some_and(|trace| !trace.keys.ready()) {
            if Instant::now() > deadline {
                anyhow::bail!("the guest that booted could not be given a key");
            }
            self.watch.look(&*self.attached.ram)?;
            std::thread::sleep(TICK_TRACING);
        }
        let (names, addresses) = self.resolve(&functions)?;
        let command = Command::On {
            functions: addresses,
            buffer_kb: self.buffer_kb,
        };
        let turn = self.command(&command, &names, &|_| ())?;
        if let Some(trace) = &mut self.trace {
            trace.switched(turn)?;
        }
        Ok(())
    }

    /// Tells when somebody in the guest switched the tracer off.
    fn notice_tracer_off(&mut self) -> anyhow::Result<()> {
        let (Some(trace), Some(beat)) = (&mut self.trace, self.watch.heartbeat()) else {
            return Ok(());
        };
        let kind = if beat.state != SwitchState::On || self.watch.busy() {
            return Ok(());
        } else if !beat.tracer {
            FindingKind::TracerOff
        } else if !beat.recording {
            FindingKind::RecordingOff
        } else {
            self.told_off = None;
            return Ok(());
        };
        if self.told_off.is_none_or(|at| at.elapsed() > TELL_EVERY) {
            self.told_off = Some(Instant::now());
            trace.finding(Finding {
                wall_ns: wall_ns(),
                kind,
            })?;
        }
        Ok(())
    }

    fn job(&mut self, job: Job) {
        // Whoever asked may be gone; the work is done all the same.
        let progress = |text: String| {
            let _ = job.reply.send(Reply::Progress { text });
        };
        let result = match job.request {
            Request::Status => {
                self.publish();
                Ok(Reply::Status(Box::new(lock(&self.status).clone())))
            }
            Request::On {
                functions,
                interval_ns,
                buffer_kb,
            } => self.on(functions, interval_ns, buffer_kb, &progress),
            Request::Off => self.off(EndReason::Off, &progress),
        };
        self.publish();
        let reply = result.unwrap_or_else(|error| Reply::Error {
            text: format!("{error:#}"),
        });
        let _ = job.reply.send(reply);
    }

    /// Begins a trace, or has the one that runs trace other functions.
    fn on(
        &mut self,
        functions: Vec<String>,
        interval_ns: Option<u64>,
        buffer_kb: Option<u32>,
        progress: &dyn Fn(String),
    ) -> Result<Reply, Refusal> {
        let wanted = self.enrolment.as_ref();
        let functions = match wanted {
            Some(wanted) if functions.is_empty() => wanted.functions.clone(),
            _ => functions,
        };
        let own_interval = wanted.map_or(self.config.interval, |wanted| wanted.interval);
        if functions.is_empty() {
            anyhow::bail!(
                "no function to trace: name one, as in 'xftrace on sys_openat', \
                 or enroll the domain with --functions"
            );
        }
        let (names, addresses) = self.resolve(&functions)?;
        let guest = self.alive()?;
        let fresh = self.trace.is_none();
        if fresh {
            let interval = interval_ns.map_or(own_interval, Duration::from_nanos);
            let dir = crate::session::new_dir(&self.sessions_dir(), wall_ns())?;
            let meta = Meta {
                version: 1,
                domain: self.domain.name.clone(),
                uuid: self.domain.uuid,
                mode: Mode::Keyed,
                state: State::Open,
                qemu: self.attached.qemu,
                started_ns: wall_ns(),
                ended_ns: None,
                end: None,
                interval_ns: interval.as_nanos() as u64,
                switches: Vec::new(),
                boots: Vec::new(),
                counters: Default::default(),
            };
            let ram = Arc::clone(&self.attached.ram);
            self.trace = Some(Trace::begin(&dir, meta, &guest, &self.watch, ram)?);
            self.buffer_kb = buffer_kb.unwrap_or(0);
        } else if interval_ns.is_some() || buffer_kb.is_some() {
            anyhow::bail!(
                "--interval and --buffer-size cannot be changed while the trace is on; \
                 'xftrace off' first"
            );
        }
        let command = Command::On {
            functions: addresses,
            buffer_kb: self.buffer_kb,
        };
        let turn = match self.command(&command, &names, progress) {
            Ok(turn) => turn,
            Err(error) => {
                if fresh {
                    self.discard();
                }
                return Err(error);
            }
        };
        self.wanted = Some(functions);
        let trace = self
            .trace
            .as_mut()
            .ok_or_else(|| anyhow::anyhow!("the session was ended"))?;
        let reply = Reply::On {
            functions: turn.functions.clone(),
            session: trace.writer.dir().to_owned(),
            pickup_ns: turn.pickup_ns,
            worked_ns: turn.worked_ns,
        };
        trace.switched(turn)?;
        Ok(reply)
    }

    /// Ends the trace: stop recording, read what is left, tracer nop, close.
    fn off(&mut self, end: EndReason, progress: &dyn Fn(String)) -> Result<Reply, Refusal> {
        if self.trace.is_none() {
            anyhow::bail!("no trace is on; 'xftrace on FUNCTION..' begins one");
        }
        self.wanted = None;
        let guest_is_there = self.watch.guest.is_some() && self.alive().is_ok();
        if guest_is_there {
            self.command(&Command::Stop, &[], progress)?;
            self.drain_rest()?;
            match self.command(&Command::Off, &[], progress) {
                Ok(turn) => {
                    if let Some(trace) = &mut self.trace {
                        trace.switched(turn)?;
                    }
                }
                // Nothing is recorded any more: the session is complete.
                Err(error) => progress(format!("the guest's tracer is not nop again: {error:#}")),
            }
        } else {
            progress("the guest's kernel does not answer; ending the session without it".into());
        }
        progress("writing the call flow".to_owned());
        let Some(trace) = self.trace.take() else {
            anyhow::bail!("the session was ended");
        };
        let counters = trace.writer.meta.counters;
        let dir = trace.close(end, &self.watch)?;
        write_graph(&dir);
        self.last_session = Some(dir.clone());
        Ok(Reply::Off {
            graph: dir.join(GRAPH_FILE),
            session: dir,
            counters,
        })
    }

    /// Ends the session as it is, without the guest's help.
    fn end_trace(&mut self, end: EndReason) {
        self.wanted = None;
        let _ = self.drain_rest();
        let Some(trace) = self.trace.take() else {
            return;
        };
        match trace.close(end, &self.watch) {
            Ok(dir) => {
                write_graph(&dir);
                self.last_session = Some(dir);
            }
            Err(error) => log::error!("the session could not be closed: {error}"),
        }
    }

    /// Drops a session in which nothing was traced yet.
    fn discard(&mut self) {
        if let Some(trace) = self.trace.take() {
            let dir = trace.writer.dir().to_owned();
            drop(trace);
            if let Err(error) = std::fs::remove_dir_all(&dir) {
                log::warn!("cannot remove the empty session {dir:?}: {error}");
            }
        }
    }

    fn drain_rest(&mut self) -> Result<(), TraceError> {
        // What was written before recording stopped is all there; a second
        // round that finds nothing says that the first had it all.
        for _ in 0..1000 {
            let Some(trace) = &mut self.trace else {
                return Ok(());
            };
            if trace.drain(&self.watch)?.bytes == 0 {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Has the guest carry out a command, and goes on draining meanwhile.
    fn command(
        &mut self,
        command: &Command,
        names: &[String],
        progress: &dyn Fn(String),
    ) -> Result<SwitchChange, Refusal> {
        let ram = Arc::clone(&self.attached.ram);
        let control = self.alive()?.control;
        let sent = Instant::now();
        let pending = switch::send(&*ram, &control, command)?;
        let mut picked_up = None;
        let mut told = sent;
        loop {
            let progress_now = pending.poll(&*ram, &control);
            if picked_up.is_none() && !matches!(progress_now, Ok(Progress::Waiting)) {
                picked_up = Some(sent.elapsed());
            }
            match progress_now {
                Ok(Progress::Done { worked, .. }) => {
                    return Ok(SwitchChange {
                        wall_ns: wall_ns(),
                        functions: names.to_vec(),
                        pickup_ns: picked_up.unwrap_or_default().as_nanos() as u64,
                        worked_ns: worked.as_nanos() as u64,
                    });
                }
                Err(SwitchError::Guest(error)) => {
                    let named = error.function.and_then(|index| names.get(index as usize));
                    return Err(match named {
                        Some(name) => anyhow::anyhow!(
                            "{name} is a function of the guest's kernel, but {error}"
                        ),
                        None => anyhow::anyhow!("{error}"),
                    });
                }
                Err(error) => return Err(error.into()),
                Ok(Progress::Waiting) if sent.elapsed() > PICKUP_LIMIT => anyhow::bail!(
                    "the guest's kernel did not take the command up within {} s; \
                     its last heartbeat was {} ms ago: is the guest paused, or overloaded?",
                    PICKUP_LIMIT.as_secs(),
                    self.watch.silent().as_millis()
                ),
                Ok(Progress::Working) if sent.elapsed() > WORK_LIMIT => anyhow::bail!(
                    "the guest's kernel took the command up and did not finish it within {} s; \
                     see the guest's kernel log",
                    WORK_LIMIT.as_secs()
                ),
                Ok(_) => {}
            }
            if let (Some(pickup), true) = (picked_up, told.elapsed() > PROGRESS_EVERY) {
                told = Instant::now();
                progress(format!(
                    "the guest took it up after {} ms, and patches its call sites since {} s",
                    pickup.as_millis(),
                    (sent.elapsed() - pickup).as_secs()
                ));
            }
            if matches!(self.watch.look(&*ram)?, Seen::Gone | Seen::Booted) {
                anyhow::bail!("the guest was reset meanwhile");
            }
            if let Some(trace) = &mut self.trace {
                trace.drain(&self.watch)?;
                trace.attend(&self.watch)?;
            }
            std::thread::sleep(TICK_TRACING);
        }
    }

    /// The guest's kernel, if it was seen to live a moment ago.
    fn alive(&mut self) -> Result<super::watch::Guest, Refusal> {
        let ram = Arc::clone(&self.attached.ram);
        let deadline = Instant::now() + Duration::from_secs(3);
        loop {
            if let Some(guest) = &self.watch.guest {
                if self.watch.liveness.is_fresh(&*ram, &guest.control) {
                    return Ok(guest.clone());
                }
            }
            if Instant::now() > deadline {
                break;
            }
            self.watch.look(&*ram)?;
            std::thread::sleep(TICK_TRACING);
        }
        if self.watch.guest.is_some() {
            anyhow::bail!(
                "the guest's kernel has shown no sign of life for {} ms; is the domain paused?",
                self.watch.silent().as_millis()
            );
        }
        anyhow::bail!("the guest's kernel was not found: {}", self.watch.why)
    }

    /// The functions' full names and run-time addresses.
    fn resolve(&mut self, functions: &[String]) -> Result<(Vec<String>, Vec<Gva>), Refusal> {
        let guest = self.alive()?;
        let mut names = Vec::new();
        let mut addresses = Vec::new();
        for function in functions {
            let found = guest.symbols.resolve_function(function)?;
            for address in found.addresses {
                names.push(found.name.clone());
                addresses.push(guest.kernel.runtime(address));
            }
        }
        Ok((names, addresses))
    }

    fn publish(&mut self) {
        self.status_at = Instant::now();
        let guest = match &self.watch.guest {
            Some(guest) => GuestStatus::Alive {
                banner: guest.kernel.banner.trim_end().escape_debug().to_string(),
                symbols: guest.symbols_path.clone(),
                slide: guest.kernel.slide,
                levels: guest.kernel.levels,
                silent_ms: self.watch.silent().as_millis() as u64,
            },
            None => GuestStatus::Searching {
                why: self.watch.why.clone(),
            },
        };
        let trace = self.trace.as_ref().map(|trace| {
            let meta = &trace.writer.meta;
            TraceStatus {
                session: trace.writer.dir().to_owned(),
                mode: "keyed".to_owned(),
                functions: meta.functions().to_vec(),
                since_ns: meta.started_ns,
                interval_ns: meta.interval_ns,
                epoch: trace.keys.epoch(),
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

/// Writes the call flow of a closed session. What goes wrong is logged: the
/// records are safe, and `xftrace report` can be asked again.
fn write_graph(dir: &std::path::Path) {
    if let Err(error) = crate::report::write_graph(dir) {
        log::error!("the call flow of {dir:?} could not be written: {error:#}");
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
