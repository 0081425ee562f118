//! Detection while a trace is on: the records that the engine drains, judged
//! against a baseline within seconds.
//!
//! A thread of its own, since draining must not wait for judging. The engine
//! hands it each round's records through a channel that holds a few rounds;
//! where that is full, the round is left out and counted as a loss, of which
//! detection makes no finding: a CPU whose records were left out was not silent, nor is
//! one that the guest has switched off. A boot that finds no place is handed over later, and
//! nothing overtakes it. What comes back is folded: a finding is told of
//! once, and then with its count every few minutes.
//!
//! **Order.** A round brings each CPU's records in order, one CPU after the other,
//! and the next one may bring older ones of another CPU: they are put in order as
//! those of a session that is followed are ([`Settling`]). While more is held than
//! that is good for, the thread takes no round, the channel fills, and the engine
//! leaves rounds out.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::mpsc::{sync_channel, Receiver, RecvTimeoutError, SyncSender, TrySendError};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::callflow::{Flow, Kernels, Limits};
use crate::detect::{judge, Baseline, Finding, ProfileLimits, Profiler, Rule, Severity};
use crate::kernel::Symbols;
use crate::output::WallClock;
use crate::ring::record::{Item, Lost, LostWhy, What};
use crate::session::{ModuleLook, ModuleSymbols, Settling, HELD, SETTLE};

/// After how long what was seen is judged.
const WINDOW: Duration = Duration::from_secs(5);
/// How long until a finding is told of again.
const AGAIN: Duration = Duration::from_secs(300);
/// How long until there may be room, where too much is held.
const ROOM: Duration = Duration::from_millis(20);
/// Rounds that may wait for the thread.
const ROUNDS: usize = 8;
/// Records of one round that are taken, some 5 MB.
const ROUND_RECORDS: usize = 50_000;
/// Different findings that are told apart.
const FINDINGS: usize = 1024;
/// Findings that may wait for the engine.
const TOLD: usize = 256;
/// What was said of modules and may wait for a place: a guest may change its list of them
/// ten times a second.
const MODULES: usize = 1024;
/// How long the engine waits for the last findings of a trace.
const REST: Duration = Duration::from_secs(10);

/// A boot of the guest.
#[derive(Clone, Debug)]
pub(super) struct Kernel {
    pub(super) boot: u32,
    pub(super) symbols: Arc<Symbols>,
    pub(super) slide: u64,
    pub(super) banner: String,
    /// Whether it is known which CPUs the guest has switched off: else none that is silent
    /// means anything.
    pub(super) tells_offline: bool,
}

/// What the engine tells the thread.
enum Message {
    Boot(Kernel),
    Modules(OfModules),
    Round(Round),
}

/// What came in one round.
#[derive(Default)]
struct Round {
    items: Vec<Item>,
    /// CPUs that are silent for no fault of theirs, and until when (guest trace clock,
    /// nanoseconds).
    excused: Vec<(u16, u64)>,
}

/// Records of one CPU that were left out.
#[derive(Default)]
struct Missed {
    records: u64,
    /// When the last one was made.
    until: u64,
}

/// What the guest says of its modules.
#[derive(Clone, Debug)]
pub(super) enum OfModules {
    /// Its list, as it is from now on.
    List(ModuleLook),
    /// The names of a module's functions.
    Symbols(ModuleSymbols),
}

/// The engine's end.
pub(super) struct Sentry {
    to: Option<SyncSender<Message>>,
    from: Receiver<Finding>,
    round: Vec<Item>,
    /// What found no place yet, in order: a boot, and what was said of modules.
    waiting: VecDeque<Message>,
    /// Records that were left out, by CPU, since the last one of it that was taken.
    missed: BTreeMap<u16, Missed>,
    /// CPUs that the guest has switched off.
    offline: BTreeSet<u16>,
    thread: Option<JoinHandle<()>>,
}

impl Sentry {
    /// Starts the thread. A boot of another kernel than the baseline's is not
    /// judged; saying so is for the caller.
    ///
    /// # Errors
    /// If there can be no thread.
    pub(super) fn start(baseline: Baseline) -> std::io::Result<Self> {
        let (to, messages) = sync_channel(ROUNDS);
        let (findings, from) = sync_channel(TOLD);
        let thread = std::thread::Builder::new()
            .name("sentry".to_owned())
            .spawn(move || run(&baseline, &messages, &findings))?;
        Ok(Self {
            to: Some(to),
            from,
            round: Vec::new(),
            waiting: VecDeque::new(),
            missed: BTreeMap::new(),
            offline: BTreeSet::new(),
            thread: Some(thread),
        })
    }

    /// The guest runs this kernel from now on. Never waits: a boot that finds no place
    /// is handed over with a later round.
    pub(super) fn boot(&mut self, kernel: Kernel) {
        self.round.clear();
        self.missed.clear();
        self.offline.clear();
        // What waits is of a boot that is over.
        self.waiting.clear();
        self.waiting.push_back(Message::Boot(kernel));
        self.hand_over();
    }

    /// The guest says this of its modules.
    pub(super) fn modules(&mut self, told: OfModules) {
        if self.waiting.len() >= MODULES {
            // The first may be a boot.
            self.waiting.remove(1);
        }
        self.waiting.push_back(Message::Modules(told));
        self.hand_over();
    }

    /// Hands over what waits. Whether nothing does any more.
    fn hand_over(&mut self) -> bool {
        let Some(to) = &self.to else { return false };
        while let Some(message) = self.waiting.pop_front() {
            if let Err(TrySendError::Full(message)) = to.try_send(message) {
                self.waiting.push_front(message);
                return false;
            }
        }
        true
    }

    /// The guest has these CPUs switched off now.
    pub(super) fn offline(&mut self, cpus: BTreeSet<u16>) {
        self.offline = cpus;
    }

    /// Takes a record of the round.
    pub(super) fn take(&mut self, item: Item) {
        if self.round.len() >= ROUND_RECORDS {
            self.leave_out(&item);
            return;
        }
        if let Some(missed) = self.missed.remove(&item.cpu) {
            let lost = Lost {
                records: Some(missed.records),
                why: LostWhy::Dropped,
            };
            self.round.push(Item {
                what: What::Lost(lost),
                ..item
            });
        }
        self.round.push(item);
    }

    fn leave_out(&mut self, item: &Item) {
        let records = match item.what {
            What::Lost(lost) => lost.records.unwrap_or(0),
            _ => 1,
        };
        let missed = self.missed.entry(item.cpu).or_default();
        missed.records = missed.records.saturating_add(records);
        missed.until = missed.until.max(item.time);
    }

    /// The round is over. Never waits.
    pub(super) fn end_round(&mut self) {
        if let Err(round) = self.hand_over_round() {
            round.iter().for_each(|item| self.leave_out(item));
        }
    }

    /// Hands over what waits and then the round, which is the error where it finds no
    /// place.
    fn hand_over_round(&mut self) -> Result<(), Vec<Item>> {
        let ready = self.hand_over();
        let items = std::mem::take(&mut self.round);
        let Some(to) = self.to.as_ref().filter(|_| ready) else {
            return Err(items);
        };
        let Some(now) = items.iter().map(|item| item.time).max() else {
            return Ok(());
        };
        let missed = self.missed.iter().map(|(&cpu, missed)| (cpu, missed.until));
        let offline = self.offline.iter().map(|&cpu| (cpu, now));
        let excused = missed.chain(offline).collect();
        match to.try_send(Message::Round(Round { items, excused })) {
            Err(TrySendError::Full(Message::Round(round))) => Err(round.items),
            _ => Ok(()),
        }
    }

    /// What was found since the last time.
    pub(super) fn found(&self) -> Vec<Finding> {
        self.from.try_iter().collect()
    }

    /// Whether the thread has ended before it was told to: it has panicked.
    pub(super) fn has_failed(&self) -> bool {
        self.thread.as_ref().is_some_and(JoinHandle::is_finished)
    }

    /// Has the thread judge what it has, and ends it. What it still finds is
    /// the result, as far as it comes in time.
    pub(super) fn finish(self) -> Vec<Finding> {
        self.finish_within(REST)
    }

    fn finish_within(mut self, time: Duration) -> Vec<Finding> {
        let until = Instant::now() + time;
        let mut whole = true;
        // The last round ends what the thread has.
        while let Err(round) = self.hand_over_round() {
            if Instant::now() >= until {
                whole = false;
                break;
            }
            self.round = round;
            std::thread::sleep(ROOM);
        }
        self.to = None;
        let mut found = Vec::new();
        // Ends when the thread does, and with it its end of the channel.
        loop {
            match (self.from).recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(finding) => found.push(finding),
                Err(RecvTimeoutError::Timeout) => {
                    whole = false;
                    break;
                }
                Err(RecvTimeoutError::Disconnected) => {
                    self.thread.take().map(JoinHandle::join);
                    break;
                }
            }
        }
        if !whole {
            log::warn!(
                "what the trace showed last is not judged by now, after {time:?}; 'xftrace check' \
                 judges the session"
            );
        }
        found
    }
}

/// Guests' clocks are mapped to the host's when a session is read; live, a
/// finding has the time at which it was noticed.
struct NoClock;

impl WallClock for NoClock {
    fn wall(&self, _: u32, _: u64) -> Option<u64> {
        None
    }
}

/// The thread: one boot after another.
fn run(baseline: &Baseline, messages: &Receiver<Message>, findings: &SyncSender<Finding>) {
    let mut folded = Folded::default();
    let mut next = next_boot(messages);
    while let Some(kernel) = next {
        next = if kernel.banner.trim_end() == baseline.kernel {
            watch(&kernel, baseline, messages, findings, &mut folded)
        } else {
            next_boot(messages)
        };
    }
}

/// Waits for a boot; `None` at the end.
fn next_boot(messages: &Receiver<Message>) -> Option<Kernel> {
    messages.iter().find_map(|message| match message {
        Message::Boot(kernel) => Some(kernel),
        Message::Modules(_) | Message::Round(_) => None,
    })
}

/// Judges one boot until another one, which it returns, or the end.
fn watch(
    kernel: &Kernel,
    baseline: &Baseline,
    messages: &Receiver<Message>,
    findings: &SyncSender<Finding>,
    folded: &mut Folded,
) -> Option<Kernel> {
    let names = Kernels::new([(kernel.boot, &*kernel.symbols, kernel.slide)]);
    let mut flow = Flow::new(&names, Limits::default());
    let mut profiler = Profiler::new(ProfileLimits::default());
    let mut items = Settling::default();
    let mut judged = Instant::now();
    loop {
        let message = if items.held() < HELD {
            messages.recv_timeout(SETTLE)
        } else {
            std::thread::sleep(ROOM);
            Err(RecvTimeoutError::Timeout)
        };
        let ended = match message {
            Ok(Message::Round(round)) => {
                round.items.into_iter().for_each(|item| items.push(item));
                for (cpu, until) in round.excused {
                    profiler.excuse(cpu, until);
                }
                None
            }
            Ok(Message::Modules(OfModules::List(look))) => {
                names.modules().list(&look);
                profiler.modules().push(look);
                None
            }
            Ok(Message::Modules(OfModules::Symbols(symbols))) => {
                names.modules().symbols(symbols);
                None
            }
            Ok(Message::Boot(next)) => Some(Some(next)),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => Some(None),
        };
        items.mark(Instant::now());
        items.give(ended.is_some(), &mut |item| {
            flow.push(&item);
            while let Some(event) = flow.pop() {
                profiler.event(&event);
            }
        });
        if ended.is_some() {
            flow.finish();
            while let Some(event) = flow.pop() {
                profiler.event(&event);
            }
        }
        if ended.is_some() || judged.elapsed() >= WINDOW {
            judged = Instant::now();
            let mut found = judge(&profiler.window(), Some(baseline), &NoClock);
            found.retain(|one| one.rule != Rule::SilentCpu || kernel.tells_offline);
            for finding in folded.news(found, judged) {
                // The engine takes them every few milliseconds; what it has no
                // room for comes again with the next count.
                let _ = findings.try_send(finding);
            }
        }
        if let Some(next) = ended {
            return next;
        }
    }
}

/// What was told of, and when.
#[derive(Default)]
struct Folded(HashMap<(Rule, String), Told>);

struct Told {
    at: Instant,
    since: u64,
}

impl Folded {
    /// Of these findings, those to be told of now, with how often they came
    /// since they were told of last.
    fn news(&mut self, found: Vec<Finding>, now: Instant) -> Vec<Finding> {
        let mut news = Vec::new();
        for mut finding in found {
            if finding.severity == Severity::Notice {
                continue;
            }
            // Bands tell their numbers in `what`: the subject is what folds.
            let key = (finding.rule, finding.subject.clone());
            let room = self.0.len() < FINDINGS;
            match self.0.get_mut(&key) {
                Some(told) if now.saturating_duration_since(told.at) < AGAIN => {
                    told.since = told.since.saturating_add(finding.count);
                }
                Some(told) => {
                    finding.count = finding
                        .count
                        .saturating_add(std::mem::take(&mut told.since));
                    told.at = now;
                    news.push(finding);
                }
                None if room => {
                    self.0.insert(key, Told { at: now, since: 0 });
                    news.push(finding);
                }
                None => {}
            }
        }
        news
    }
}

#[cfg(test)]
mod tests;
