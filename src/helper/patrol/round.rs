//! The thread's end: what it is told, when it looks, and what counts.

use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::time::{clock_gettime, ClockId};

use crate::integrity::{check_running, has_started, IntegrityError, Report, Trusted};
use crate::ram::RamError;
use crate::session::{Finding, FindingKind};

use super::super::engine::lock;
use super::super::notify::{log_limit, Told};
use super::super::protocol::{IntegrityStatus, LookStatus};
use super::super::ratelimit::{Budget, RateLimit};
use super::super::trusted::trusted;
use super::super::watch::{wall_ns, Guest};
use super::ledger::{Ledger, News};
use super::notices::Notices;
use super::patience::Patience;
use super::{boot, Boot, Host, Orders, Subject, NO_KERNEL};

/// What cannot be done is tried again after this time, or the interval if that is less.
pub(super) const RETRY: Duration = Duration::from_secs(10);
/// Between two questions whether the kernel has started.
const STARTING: Duration = Duration::from_secs(1);
/// Between two looks at the heart, and how long it is waited for: a kernel that works on
/// a command does not beat.
const PULSE: Duration = Duration::from_millis(20);
const PATIENCE: Duration = Duration::from_secs(10);
/// Where looks come as often as this, what they compare with is kept.
const KEEP: Duration = Duration::from_secs(10);

const NO_IMAGE: &str =
    "the kernel that the guest boots is not in the store; add it with 'xftrace symbols add FILE' \
     (its vmlinuz or linux-image package)";
const STILL_STARTING: &str = "the guest's kernel is still starting";
const SILENT: &str = "the guest's kernel shows no sign of life";
const PAUSED: &str = "the domain stands still, as libvirt says";
const FAILED: &str = "a look has failed for a fault of xftrace's own; the log has more";

/// What looks at a kernel. There is one in use, and one for tests.
pub(super) trait Eye: Send {
    /// Whether the kernel says that it has started.
    fn has_started(&self, subject: &Subject) -> bool;

    /// Looks at it: see [`check_running`].
    fn check(
        &self,
        subject: &Subject,
        wait: &mut dyn FnMut(Duration) -> bool,
    ) -> Result<Option<Report>, IntegrityError>;
}

impl Eye for Trusted {
    fn has_started(&self, Subject { guest, ram, .. }: &Subject) -> bool {
        has_started(&**ram, &guest.kernel, &guest.symbols, self)
    }

    fn check(
        &self,
        Subject { guest, ram, .. }: &Subject,
        wait: &mut dyn FnMut(Duration) -> bool,
    ) -> Result<Option<Report>, IntegrityError> {
        check_running(&**ram, &guest.kernel, &guest.symbols, self, wait)
    }
}

/// Where an eye for a kernel comes from: the store, which may not have it.
pub(super) type Open = Box<dyn Fn(&Path, &Guest) -> anyhow::Result<Option<Box<dyn Eye>>> + Send>;

/// The eye for a kernel that the store has.
pub(super) fn of_store(store: &Path, guest: &Guest) -> anyhow::Result<Option<Box<dyn Eye>>> {
    let found = trusted(store, None, &guest.kernel, &guest.symbols)?;
    Ok(found.map(|found| Box::new(found) as Box<dyn Eye>))
}

/// What the engine tells. Nobody else writes to it.
pub(super) struct Inbox {
    pub(super) from: Receiver<Option<Arc<Subject>>>,
    pub(super) next: Option<Heard>,
}

pub(super) enum Heard {
    Subject(Option<Arc<Subject>>),
    /// The engine has gone.
    End,
}

impl Inbox {
    /// Waits so long; whether nothing has come meanwhile, or before.
    pub(super) fn quiet(&mut self, time: Duration) -> bool {
        if self.next.is_none() {
            self.next = match self.from.recv_timeout(time) {
                Ok(subject) => Some(Heard::Subject(subject)),
                Err(RecvTimeoutError::Disconnected) => Some(Heard::End),
                Err(RecvTimeoutError::Timeout) => None,
            };
        }
        self.next.is_none()
    }

    /// Waits so long whatever is said meanwhile, of which the last counts; whether the
    /// engine is still there.
    pub(super) fn pause(&mut self, time: Duration) -> bool {
        let until = Instant::now() + time;
        loop {
            if let Some(Heard::End) = self.next {
                return false;
            }
            let left = until.saturating_duration_since(Instant::now());
            match self.from.recv_timeout(left) {
                Ok(subject) => self.next = Some(Heard::Subject(subject)),
                Err(RecvTimeoutError::Disconnected) => self.next = Some(Heard::End),
                Err(RecvTimeoutError::Timeout) => return true,
            }
        }
    }

    fn wait(&mut self, time: Duration, insist: bool) -> bool {
        if insist {
            self.pause(time)
        } else {
            self.quiet(time)
        }
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
pub(super) struct Round {
    pub(super) orders: Orders,
    open: Open,
    host: Arc<Host>,
    status: Arc<Mutex<IntegrityStatus>>,
    ledger: Ledger,
    notices: Notices,
    /// The kernel that runs, or did when it was known last.
    subject: Option<Arc<Subject>>,
    is_known: bool,
    boot: Option<Boot>,
    patience: Patience,
    /// How long the heart is waited for.
    heart: Duration,
    trusted: Option<Box<dyn Eye>>,
    said: Budget,
    why_said: RateLimit,
    disk_said: RateLimit,
}

impl Round {
    pub(super) fn new(
        orders: Orders,
        open: Open,
        host: Arc<Host>,
        status: Arc<Mutex<IntegrityStatus>>,
    ) -> Self {
        Self {
            patience: Patience::new(orders.interval, Instant::now()),
            orders,
            open,
            host,
            status,
            ledger: Ledger::default(),
            notices: Notices::default(),
            subject: None,
            is_known: false,
            boot: None,
            heart: PATIENCE,
            trusted: None,
            said: log_limit(),
            why_said: RateLimit::new(3, Duration::from_secs(60)),
            disk_said: RateLimit::new(1, Duration::from_secs(60)),
        }
    }

    /// Looks, and follows what the engine says, until that has gone.
    pub(super) fn run(&mut self, inbox: &mut Inbox) {
        let mut rest = Duration::ZERO;
        loop {
            if inbox.quiet(rest) {
                rest = self.turn(inbox);
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

    /// It panicked: a fault of ours, which must not pass for a look.
    pub(super) fn failed(&mut self) {
        self.trusted = None;
        lock(&self.status).cannot = Some(FAILED.to_owned());
        if let Some(again) = self.why_said.say() {
            log::error!("the guest's memory is not checked: {FAILED}{again}");
        }
    }

    /// The guest runs this from now on; of `None` it is not known what it runs.
    fn follow(&mut self, subject: Option<Arc<Subject>>) {
        self.is_known = subject.is_some();
        let Some(now) = subject else {
            return self.cannot(NO_KERNEL, false);
        };
        let is = boot(&now.guest);
        if self.boot.replace(is) != Some(is) {
            self.trusted = None;
            if !now.noted {
                let told = self.notices.boot(Instant::now());
                self.notice(told);
            }
        }
        if self.subject.replace(now).is_none() {
            // Until then there was nothing to look at.
            self.patience.renew(Instant::now());
        }
    }

    /// Looks, if there is something to look at. How long until the next time.
    fn turn(&mut self, inbox: &mut Inbox) -> Duration {
        let interval = self.orders.interval;
        let begun = Instant::now();
        if self.host.stands_still.load(Ordering::Relaxed) {
            self.patience.renew(begun);
            self.cannot(PAUSED, false);
            return STARTING.min(interval);
        }
        let overdue = self.patience.is_over(begun);
        if let Some(time) = overdue {
            let why = lock(&self.status).cannot.clone();
            let why = why.unwrap_or_else(|| "it was never quiet for long enough".to_owned());
            let told = self.notices.unseen(&why, time, begun);
            self.notice(told);
        } else if !self.is_known {
            self.cannot(NO_KERNEL, false);
            return RETRY.min(interval);
        }
        // There never was one, and so no place to look at.
        let Some(subject) = self.subject.clone() else {
            return RETRY.min(interval);
        };
        let look = self
            .look(&subject, inbox, overdue.is_some())
            .unwrap_or_else(|error| Look::Not {
                why: format!("{error:#}"),
                again: RETRY,
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
                again.min(interval)
            }
        }
    }

    /// A look that counts. One that is overdue is not put off: not by what the engine
    /// says, nor by the guest, as long as what it looks at can be its kernel.
    fn look(
        &mut self,
        subject: &Subject,
        inbox: &mut Inbox,
        overdue: bool,
    ) -> anyhow::Result<Look> {
        let not = |why: &str, again| {
            Ok(Look::Not {
                why: why.to_owned(),
                again,
            })
        };
        let before = processor_time();
        let (link, ram) = (&subject.guest.link, &*subject.ram);
        let mut silent = false;
        match self.beats(subject, inbox, overdue)? {
            Heart::Beats => {}
            // Its memory is still its own, as far as it tells.
            Heart::Silent if overdue && link.is_there(ram)? => silent = true,
            Heart::Silent if self.is_known => return not(SILENT, RETRY),
            Heart::Silent => return not(NO_KERNEL, RETRY),
            Heart::Unknown => return Ok(Look::Interrupted),
        }
        if self.trusted.is_none() {
            self.trusted = (self.open)(&self.orders.symbols, &subject.guest)?;
        }
        let Some(eye) = &self.trusted else {
            self.patience.renew(Instant::now());
            return not(NO_IMAGE, RETRY);
        };
        if eye.has_started(subject) {
            self.patience.runs(Instant::now());
        } else if silent || self.patience.starts(Instant::now()) || !overdue {
            return not(STILL_STARTING, STARTING);
        }
        let report = eye.check(subject, &mut |time| inbox.wait(time, overdue))?;
        let Some(report) = report else {
            return Ok(Look::Interrupted);
        };
        if !silent {
            match self.beats(subject, inbox, overdue)? {
                Heart::Beats => {}
                Heart::Silent => return not(SILENT, RETRY),
                Heart::Unknown => return Ok(Look::Interrupted),
            }
        }
        if self.orders.interval > KEEP {
            self.trusted = None;
        }
        let odd = [(silent, SILENT), (!self.is_known, NO_KERNEL)];
        let odd = odd.iter().find(|(is_so, _)| *is_so).map(|(_, why)| *why);
        self.made(&report, processor_time().saturating_sub(before), odd);
        Ok(Look::Made)
    }

    /// Waits for the heart to beat. Where a look is overdue, it is this kernel's whatever
    /// it calls its boot: nobody else makes it beat there.
    fn beats(
        &self,
        subject: &Subject,
        inbox: &mut Inbox,
        overdue: bool,
    ) -> Result<Heart, RamError> {
        let (link, ram) = (&subject.guest.link, &*subject.ram);
        let first = link.pulse(ram)?.beats;
        let begun = Instant::now();
        loop {
            if !inbox.wait(PULSE, overdue) || !(overdue || link.is_there(ram)?) {
                return Ok(Heart::Unknown);
            }
            if link.pulse(ram)?.beats != first {
                return Ok(Heart::Beats);
            }
            if begun.elapsed() > self.heart {
                return Ok(Heart::Silent);
            }
        }
    }

    /// There was a look; `odd` is why there should have been none.
    fn made(&mut self, report: &Report, cpu: Duration, odd: Option<&str>) {
        let now = Instant::now();
        self.patience.renew(now);
        let news = self.ledger.take(report, now);
        self.tell(news);
        let told = self.notices.look(report, now);
        self.notice(told);
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
        status.cannot = odd.map(|why| format!("{why}; looked all the same"));
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

    fn notice(&mut self, kinds: impl IntoIterator<Item = FindingKind>) {
        let news = kinds.into_iter().map(|kind| News { kind, again: true });
        self.tell(news);
    }

    fn tell(&mut self, news: impl IntoIterator<Item = News>) {
        for News { kind, again } in news {
            let finding = Finding {
                wall_ns: wall_ns(),
                kind,
            };
            let told = Told {
                domain: &self.orders.domain,
                uuid: self.orders.uuid,
                session: None,
                finding: &finding,
                again,
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

/// What this thread has taken of the processors so far.
fn processor_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

#[cfg(test)]
mod tests;
