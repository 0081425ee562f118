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
//! **All of that is the guest's word**, and who controls its kernel would say it to be
//! left alone. So it has a bound ([`patience`]): where there was no look for too long and
//! libvirt does not say that the domain stands still, that is told, and the kernel is
//! looked at where it was last, if its heart beats there or it has its own boot id there
//! still. Nothing is forgotten at a boot, and one without a reset that libvirt noted is
//! told of.
//!
//! **What it is compared with is as large as the kernel**, unpacked. So it is not kept
//! from one look to the next, unless they are close together.
//!
//! The thread ends by itself once the engine has gone; nobody waits for that either.

mod ledger;
mod notices;
mod patience;
mod round;

pub(crate) use patience::START_LIMIT;

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{channel, Sender};
use std::sync::{Arc, Mutex, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::setpriority_process;
use uuid::Uuid;

use crate::libvirt::live::{Doing, LiveXml};
use crate::ram::{Gpa, GuestRam};
use crate::session::DomainFindings;

use super::notify::Notifier;
use super::protocol::IntegrityStatus;
use super::watch::{Guest, Watch};

use round::{of_store, Inbox, Open, Round, RETRY};

/// The nice value of the thread: the last that gets a processor.
const NICE: i32 = 19;
/// A heart that beat within this time beats.
const BEATING: Duration = Duration::from_secs(1);
/// So long before the last beat that was seen libvirt may have noted the reset.
const SLACK: Duration = Duration::from_secs(5);

const NO_KERNEL: &str = "it is not known which kernel the guest runs";
const ENDED: &str = "the thread that looks has ended for a fault of xftrace's own; restart the \
                     helper, and see the log";

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
    /// Whether libvirt noted something that can have been a reset, where it is another
    /// boot than the one before.
    noted: bool,
}

/// What the host knows of the domain by itself.
#[derive(Default)]
struct Host {
    stands_still: AtomicBool,
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
    /// The boot that was known last, and when its heart was last seen to beat.
    last: Option<(Boot, Instant)>,
    host: Arc<Host>,
    status: Arc<Mutex<IntegrityStatus>>,
    /// What it was when it could be had last.
    known: IntegrityStatus,
    thread: JoinHandle<()>,
}

impl Patrol {
    /// Starts the thread.
    ///
    /// # Errors
    /// If there can be none.
    pub(super) fn start(orders: Orders) -> std::io::Result<Self> {
        Self::start_with(orders, Box::new(of_store))
    }

    fn start_with(orders: Orders, open: Open) -> std::io::Result<Self> {
        let (to, from) = channel();
        let known = IntegrityStatus {
            interval_ns: orders.interval.as_nanos() as u64,
            cannot: Some(NO_KERNEL.to_owned()),
            looks: 0,
            last: None,
        };
        let status = Arc::new(Mutex::new(known.clone()));
        let host = Arc::new(Host::default());
        let mut round = Round::new(orders, open, Arc::clone(&host), Arc::clone(&status));
        let mut inbox = Inbox { from, next: None };
        let thread = std::thread::Builder::new()
            .name("patrol".to_owned())
            .spawn(move || run(&mut round, &mut inbox))?;
        Ok(Self {
            to,
            told: None,
            last: None,
            host,
            status,
            known,
            thread,
        })
    }

    /// Tells the thread where the guest's kernel is now, if that has changed. Never
    /// waits.
    pub(super) fn follow(&mut self, watch: &Watch, ram: &Arc<dyn GuestRam>, live: &LiveXml) {
        let stands_still = live.doing() == Some(Doing::StandsStill);
        self.host
            .stands_still
            .store(stands_still, Ordering::Relaxed);
        let same = match (&self.told, watch.known_guest()) {
            (Some((told, at)), Some(guest)) => *told == boot(guest) && Arc::ptr_eq(at, ram),
            (None, None) => true,
            _ => false,
        };
        if let (true, Some((_, beat))) = (same && self.told.is_some(), &mut self.last) {
            if watch.silent() < BEATING {
                *beat = Instant::now();
            }
        }
        if same {
            return;
        }
        let subject = watch.known_guest().map(|guest| {
            let noted = self.noted(boot(guest), live);
            self.last = Some((boot(guest), Instant::now()));
            Arc::new(Subject {
                guest: guest.clone(),
                ram: Arc::clone(ram),
                noted,
            })
        });
        self.told = watch
            .known_guest()
            .map(|guest| (boot(guest), Arc::clone(ram)));
        let _ = self.to.send(subject);
    }

    /// Whether libvirt noted what can have been the reset before this boot. It writes
    /// its file for other reasons too. Where it has none, that cannot be told.
    fn noted(&self, now: Boot, live: &LiveXml) -> bool {
        match self.last {
            Some((last, beat)) if last != now && live.doing().is_some() => {
                live.written().is_some_and(|at| at + SLACK > beat)
            }
            _ => true,
        }
    }

    /// How things stand. Does not wait for a thread of the lowest priority that is at
    /// it just now: then it is what was known last.
    pub(super) fn status(&mut self) -> IntegrityStatus {
        if let Ok(now) = self.status.try_lock() {
            self.known.clone_from(&now);
        }
        if self.thread.is_finished() {
            self.known.cannot = Some(ENDED.to_owned());
        }
        self.known.clone()
    }
}

/// The thread. A panic ends a look, and not the patrol.
fn run(round: &mut Round, inbox: &mut Inbox) {
    // Of this thread alone, on Linux.
    if let Err(error) = setpriority_process(None, NICE) {
        log::info!("looks at the guest's memory have the priority of all else: {error}");
    }
    let retry = RETRY.min(round.orders.interval);
    while catch_unwind(AssertUnwindSafe(|| round.run(inbox))).is_err() {
        round.failed();
        if !inbox.pause(retry) {
            return;
        }
    }
}
