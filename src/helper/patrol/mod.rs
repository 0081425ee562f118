//! The patrol: looks at the kernel in the guest's memory at an interval, as `xftrace
//! check` does, as long as the domain runs, traced or not.
//!
//! A thread of its own, with the lowest priority, for a look takes a fraction of a
//! second: draining and the keys do not wait for it. The engine tells it which kernel
//! the guest runs, and where its memory is, and never waits for an answer. What is found
//! goes from here to the log, to the domain's `findings.jsonl` and to the command that is
//! wanted for findings, folded ([`ledger`]).
//!
//! **A look counts if the kernel lived before and after it.** Memory of a guest that was
//! just reset belongs to firmware, and differs from any kernel. So the heart has to beat
//! before a look, and once more behind it, in the same boot; and a kernel that is still
//! starting is given time. A paused guest costs nothing, and changes nothing.
//!
//! **What it is compared with is as large as the kernel**, unpacked. So it is not kept
//! from one look to the next, unless they are close together.
//!
//! The thread ends by itself once the engine has gone; nobody waits for that either.

mod ledger;

use std::path::PathBuf;
use std::sync::mpsc::{channel, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use nix::time::{clock_gettime, ClockId};
use rustix::process::setpriority_process;
use uuid::Uuid;

use crate::integrity::{check_running, has_started, Report, Trusted};
use crate::ram::{Gpa, GuestRam, RamError};
use crate::session::{DomainFindings, Finding, FindingKind};

use super::engine::lock;
use super::notify::{log_limit, Notifier, Told};
use super::protocol::{IntegrityStatus, LookStatus};
use super::ratelimit::RateLimit;
use super::trusted::trusted;
use super::watch::{wall_ns, Guest, Watch};

use ledger::Ledger;

/// The nice value of the thread: the last that gets a processor.
const NICE: i32 = 19;
/// What cannot be done is tried again after this time, or the interval if that is less.
const RETRY: Duration = Duration::from_secs(10);
/// Between two questions whether the kernel has started, and how long it is given. That
/// it starts is the guest's word.
const STARTING: Duration = Duration::from_secs(1);
const START_LIMIT: Duration = Duration::from_secs(120);
/// Between two looks at the heart, and how long it is waited for: a kernel that works on
/// a command does not beat.
const PULSE: Duration = Duration::from_millis(20);
const PATIENCE: Duration = Duration::from_secs(10);
/// Where looks come as often as this, what they compare with is kept.
const KEEP: Duration = Duration::from_secs(10);
/// While there is nothing to look at.
const IDLE: Duration = Duration::from_secs(3600);

const NO_IMAGE: &str =
    "the kernel that the guest boots is not in the store; add it with 'xftrace symbols add FILE' \
     (its vmlinuz or linux-image package)";
const NO_KERNEL: &str = "it is not known which kernel the guest runs";
const STILL_STARTING: &str = "the guest's kernel is still starting";
const SILENT: &str = "the guest's kernel shows no sign of life; is the domain paused?";

/// What the patrol is to do, and for whom.
pub(super) struct Orders {
    pub(super) interval: Duration,
    pub(super) domain: String,
    pub(super) uuid: Uuid,
    /// The store, which has the kernels that guests boot.
    pub(super) symbols: PathBuf,
    pub(super) findings: DomainFindings,
    /// The engine's: it ends with that.
    pub(super) notifier: Weak<Notifier>,
}

/// A kernel that the guest runs, and the memory it runs in.
struct Subject {
    guest: Guest,
    ram: Arc<dyn GuestRam>,
}

/// What is another at each boot.
type Boot = (u64, Gpa);

fn boot(guest: &Guest) -> Boot {
    (guest.link.boot_id(), guest.kernel.phys_text)
}

/// The engine's end.
pub(super) struct Patrol {
    to: Sender<Option<Arc<Subject>>>,
    /// What the thread was told last: the boot, and its memory.
    told: Option<(Boot, Arc<dyn GuestRam>)>,
    status: Arc<Mutex<IntegrityStatus>>,
    /// What it was when it could be had last.
    known: IntegrityStatus,
}

impl Patrol {
    /// Starts the thread.
    ///
    /// # Errors
    /// If there can be none.
    pub(super) fn start(orders: Orders) -> std::io::Result<Self> {
        let (to, from) = channel();
        let known = IntegrityStatus {
            interval_ns: orders.interval.as_nanos() as u64,
            cannot: Some(NO_KERNEL.to_owned()),
            looks: 0,
            last: None,
        };
        let status = Arc::new(Mutex::new(known.clone()));
        let mut round = Round {
            orders,
            status: Arc::clone(&status),
            ledger: Ledger::default(),
            subject: None,
            boot: None,
            since: Instant::now(),
            trusted: None,
            said: log_limit(),
            why_said: RateLimit::new(3, Duration::from_secs(60)),
            disk_said: RateLimit::new(1, Duration::from_secs(60)),
        };
        let inbox = Inbox { from, next: None };
        std::thread::Builder::new()
            .name("patrol".to_owned())
            .spawn(move || round.run(inbox))?;
        Ok(Self {
            to,
            told: None,
            status,
            known,
        })
    }

    /// Tells the thread where the guest's kernel is now, if that has changed. Never
    /// waits.
    pub(super) fn follow(&mut self, watch: &Watch, ram: &Arc<dyn GuestRam>) {
        let same = match (&self.told, &watch.guest) {
            (Some((told, at)), Some(guest)) => *told == boot(guest) && Arc::ptr_eq(at, ram),
            (None, None) => true,
            _ => false,
        };
        if same {
            return;
        }
        let subject = watch.guest.as_ref().map(|guest| {
            Arc::new(Subject {
                guest: guest.clone(),
                ram: Arc::clone(ram),
            })
        });
        self.told = watch
            .guest
            .as_ref()
            .map(|guest| (boot(guest), Arc::clone(ram)));
        let _ = self.to.send(subject);
    }

    /// How things stand. Does not wait for a thread of the lowest priority that is at
    /// it just now: then it is what was known last.
    pub(super) fn status(&mut self) -> IntegrityStatus {
        if let Ok(now) = self.status.try_lock() {
            self.known.clone_from(&now);
        }
        self.known.clone()
    }
}

/// What the engine tells. Nobody else writes to it.
struct Inbox {
    from: Receiver<Option<Arc<Subject>>>,
    next: Option<Heard>,
}

enum Heard {
    Subject(Option<Arc<Subject>>),
    /// The engine has gone.
    End,
}

impl Inbox {
    /// Waits so long; whether nothing has come meanwhile, or before.
    fn quiet(&mut self, time: Duration) -> bool {
        if self.next.is_none() {
            self.next = match self.from.recv_timeout(time) {
                Ok(subject) => Some(Heard::Subject(subject)),
                Err(RecvTimeoutError::Disconnected) => Some(Heard::End),
                Err(RecvTimeoutError::Timeout) => None,
            };
        }
        self.next.is_none()
    }
}

/// What a look came to.
enum Look {
    Made,
    /// The engine has something to say.
    Interrupted,
    /// It could not be made.
    Not {
        why: String,
        again: Duration,
    },
}

/// The thread's end.
struct Round {
    orders: Orders,
    status: Arc<Mutex<IntegrityStatus>>,
    ledger: Ledger,
    subject: Option<Arc<Subject>>,
    /// The boot that the ledger is of, and since when it is known.
    boot: Option<Boot>,
    since: Instant,
    trusted: Option<Trusted>,
    said: RateLimit,
    why_said: RateLimit,
    disk_said: RateLimit,
}

impl Round {
    fn run(&mut self, mut inbox: Inbox) {
        // Of this thread alone, on Linux.
        if let Err(error) = setpriority_process(None, NICE) {
            log::info!("looks at the guest's memory have the priority of all else: {error}");
        }
        let mut rest = IDLE;
        loop {
            if inbox.quiet(rest) {
                rest = self.turn(&mut inbox);
                continue;
            }
            match inbox.next.take() {
                Some(Heard::Subject(subject)) => self.follow(subject),
                Some(Heard::End) => return,
                None => {}
            }
            rest = Duration::ZERO;
        }
    }

    /// The guest runs this from now on.
    fn follow(&mut self, subject: Option<Arc<Subject>>) {
        match &subject {
            None => self.cannot(NO_KERNEL, false),
            Some(now) if self.boot != Some(boot(&now.guest)) => {
                let gone = self.ledger.void();
                self.tell(gone);
                self.boot = Some(boot(&now.guest));
                self.since = Instant::now();
                self.trusted = None;
                lock(&self.status).last = None;
            }
            Some(_) => {}
        }
        self.subject = subject;
    }

    /// Looks, if there is something to look at. How long until the next time.
    fn turn(&mut self, inbox: &mut Inbox) -> Duration {
        let Some(subject) = self.subject.clone() else {
            return IDLE;
        };
        let interval = self.orders.interval;
        let begun = Instant::now();
        let look = self
            .look(&subject, inbox)
            .unwrap_or_else(|error| Look::Not {
                why: format!("{error:#}"),
                again: RETRY.min(interval),
            });
        match look {
            // Not most of the time, however long looks take.
            Look::Made => {
                let took = begun.elapsed();
                interval.saturating_sub(took).max(took)
            }
            Look::Interrupted => Duration::ZERO,
            Look::Not { why, again } => {
                self.cannot(&why, why != STILL_STARTING);
                again
            }
        }
    }

    fn look(&mut self, subject: &Subject, inbox: &mut Inbox) -> anyhow::Result<Look> {
        let Subject { guest, ram } = subject;
        let (ram, kernel, symbols) = (&**ram, &guest.kernel, &guest.symbols);
        let not = |why: &str, again: Duration| {
            Ok(Look::Not {
                why: why.to_owned(),
                again: again.min(self.orders.interval),
            })
        };
        let before = processor_time();
        match beats(subject, inbox)? {
            Heart::Beats => {}
            Heart::Silent => return not(SILENT, RETRY),
            Heart::Unknown => return Ok(Look::Interrupted),
        }
        if self.trusted.is_none() {
            self.trusted = trusted(&self.orders.symbols, None, kernel, symbols)?;
        }
        let Some(trusted) = &self.trusted else {
            return not(NO_IMAGE, RETRY);
        };
        if !has_started(ram, kernel, symbols, trusted) && self.since.elapsed() < START_LIMIT {
            return not(STILL_STARTING, STARTING);
        }
        let report = check_running(ram, kernel, symbols, trusted, &mut |time| inbox.quiet(time))?;
        let Some(report) = report else {
            return Ok(Look::Interrupted);
        };
        match beats(subject, inbox)? {
            Heart::Beats => {}
            Heart::Silent => return not(SILENT, RETRY),
            Heart::Unknown => return Ok(Look::Interrupted),
        }
        if self.orders.interval > KEEP {
            self.trusted = None;
        }
        self.made(&report, processor_time().saturating_sub(before));
        Ok(Look::Made)
    }

    fn made(&mut self, report: &Report, cpu: Duration) {
        let news = self.ledger.take(report, Instant::now());
        self.tell(news);
        let doubts = report.outcomes.iter().filter_map(|one| {
            let doubt = one.doubt.as_ref()?;
            Some(format!("{}: {doubt}", one.check))
        });
        let look = LookStatus {
            wall_ns: wall_ns(),
            cpu_ns: cpu.as_nanos() as u64,
            findings: report.findings.clone(),
            not_listed: report.not_listed,
            doubts: doubts.collect(),
        };
        let mut status = lock(&self.status);
        status.cannot = None;
        status.looks += 1;
        status.last = Some(look);
    }

    /// Says why there is no look: once, until there is another reason, or a look.
    fn cannot(&mut self, why: &str, log: bool) {
        let mut status = lock(&self.status);
        if status.cannot.as_deref() == Some(why) {
            return;
        }
        status.cannot = Some(why.to_owned());
        drop(status);
        if let Some(again) = self.why_said.say().filter(|_| log) {
            log::info!("the guest's memory is not checked: {why}{again}");
        }
    }

    fn tell(&mut self, kinds: Vec<FindingKind>) {
        for kind in kinds {
            let finding = Finding {
                wall_ns: wall_ns(),
                kind,
            };
            let told = Told {
                domain: &self.orders.domain,
                uuid: self.orders.uuid,
                session: None,
                finding: &finding,
            };
            let notifier = self.orders.notifier.upgrade();
            told.tell(&mut self.said, notifier.as_deref());
            if let Err(error) = self.orders.findings.note(&finding) {
                if let Some(again) = self.disk_said.say() {
                    log::error!("{error}; a finding is in the log alone{again}");
                }
            }
        }
    }
}

/// Whether a kernel lives.
enum Heart {
    Beats,
    /// It does not, for all that can be seen.
    Silent,
    /// The engine has something to say, or soon will.
    Unknown,
}

/// Waits for the heart to beat.
fn beats(subject: &Subject, inbox: &mut Inbox) -> Result<Heart, RamError> {
    let (link, ram) = (&subject.guest.link, &*subject.ram);
    let first = link.pulse(ram)?.beats;
    let begun = Instant::now();
    loop {
        if !inbox.quiet(PULSE) || !link.is_there(ram)? {
            return Ok(Heart::Unknown);
        }
        if link.pulse(ram)?.beats != first {
            return Ok(Heart::Beats);
        }
        if begun.elapsed() > PATIENCE {
            return Ok(Heart::Silent);
        }
    }
}

/// What this thread has taken of the processors so far.
fn processor_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}
