//! Detection while a trace is on: the records that the engine drains, judged
//! against a baseline within seconds.
//!
//! A thread of its own, since draining must not wait for judging. The engine
//! hands it each round's records through a channel that holds a few rounds;
//! where that is full, the round is left out and counted as a loss, of which
//! detection makes no finding. What comes back is folded: a finding is told of
//! once, and then with its count every few minutes.
//!
//! **Order.** A round brings each CPU's records in order, one CPU after the other,
//! and the next one may bring older ones of another CPU: they are put in order as
//! those of a session that is followed are ([`Settling`]). While more is held than
//! that is good for, the thread takes no round, the channel fills, and the engine
//! leaves rounds out.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::mpsc::{sync_channel, Receiver, RecvTimeoutError, SyncSender, TrySendError};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::callflow::{Flow, Kernels, Limits};
use crate::detect::{judge, Baseline, Finding, ProfileLimits, Profiler, Severity};
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

/// A boot of the guest.
#[derive(Clone, Debug)]
pub(super) struct Kernel {
    pub(super) boot: u32,
    pub(super) symbols: Arc<Symbols>,
    pub(super) slide: u64,
    pub(super) banner: String,
}

/// What the engine tells the thread.
enum Message {
    Boot(Kernel),
    Modules(OfModules),
    Round(Vec<Item>),
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
    /// What was said of modules and found no place yet.
    modules: VecDeque<OfModules>,
    /// How many records of which CPU were left out since the last one of it
    /// that was taken.
    missed: BTreeMap<u16, u64>,
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
            modules: VecDeque::new(),
            missed: BTreeMap::new(),
            thread: Some(thread),
        })
    }

    /// The guest runs this kernel from now on.
    pub(super) fn boot(&mut self, kernel: Kernel) {
        self.round.clear();
        self.modules.clear();
        self.missed.clear();
        // Waits for a place: a boot is rare, and must not be missed.
        if let Some(to) = &self.to {
            let _ = to.send(Message::Boot(kernel));
        }
    }

    /// The guest says this of its modules.
    pub(super) fn modules(&mut self, told: OfModules) {
        self.modules.push_back(told);
        self.hand_over_modules();
    }

    /// Never waits: what finds no place is handed over with the next round.
    fn hand_over_modules(&mut self) {
        let Some(to) = &self.to else { return };
        while let Some(told) = self.modules.pop_front() {
            match to.try_send(Message::Modules(told)) {
                Ok(()) => {}
                Err(TrySendError::Full(Message::Modules(told))) => {
                    self.modules.push_front(told);
                    return;
                }
                Err(_) => return,
            }
        }
    }

    /// Takes a record of the round.
    pub(super) fn take(&mut self, item: Item) {
        if self.round.len() >= ROUND_RECORDS {
            self.leave_out(&item);
            return;
        }
        if let Some(records) = self.missed.remove(&item.cpu) {
            let lost = Lost {
                records: Some(records),
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
        *missed = missed.saturating_add(records);
    }

    /// The round is over. Never waits.
    pub(super) fn end_round(&mut self) {
        self.hand_over_modules();
        let Some(to) = self.to.as_ref().filter(|_| !self.round.is_empty()) else {
            return;
        };
        let sent = to.try_send(Message::Round(std::mem::take(&mut self.round)));
        if let Err(TrySendError::Full(Message::Round(round))) = sent {
            round.iter().for_each(|item| self.leave_out(item));
        }
    }

    /// What was found since the last time.
    pub(super) fn found(&self) -> Vec<Finding> {
        self.from.try_iter().collect()
    }

    /// Has the thread judge what it has, and ends it. What it still finds is
    /// the result.
    pub(super) fn finish(mut self) -> Vec<Finding> {
        // Waits for a place: the last round ends what the thread has.
        if let Some(to) = self.to.take() {
            let _ = to.send(Message::Round(std::mem::take(&mut self.round)));
        }
        let mut found = Vec::new();
        // Ends when the thread does, and with it its end of the channel.
        while let Ok(finding) = self.from.recv() {
            found.push(finding);
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
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
                round.into_iter().for_each(|item| items.push(item));
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
            let found = judge(&profiler.window(), Some(baseline), &NoClock);
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
struct Folded(HashMap<(crate::detect::Rule, String), Told>);

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
mod tests {
    use super::*;
    use crate::detect::Rule;
    use crate::kernel::Gva;
    use crate::ring::record::{Call, Comm, Return, Task, TraceFlags};
    use crate::session::{Listed, UNSURE_NS};

    const MAP: &str = "ffffffff81000000 T _text\nffffffff81000000 T _stext\n\
        ffffffff81000040 T __x64_sys_read\nffffffff81000080 T do_syscall_64\n\
        ffffffff81001000 T _etext\nffffffff81003000 B _end\n";
    const BANNER: &str = "Linux version 6.1";
    const READ: Gva = Gva(0xffff_ffff_8100_0040);
    const DISPATCHER: Gva = Gva(0xffff_ffff_8100_0099);
    const MODULE: Gva = Gva(0xffff_ffff_c000_1234);

    fn kernel() -> Kernel {
        Kernel {
            boot: 1,
            symbols: Arc::new(Symbols::parse(MAP.into()).expect("symbols")),
            slide: 0,
            banner: format!("{BANNER}\n"),
        }
    }

    /// A read by a task: its call and its return.
    fn read(cpu: u16, time: u64, caller: Gva) -> [Item; 2] {
        let task = Task {
            pid: 7,
            comm: Some(Comm::from("cat")),
        };
        let flags = TraceFlags(0);
        let item = |time, what| Item {
            cpu,
            boot: 1,
            time,
            what,
        };
        let call = Call {
            task,
            flags,
            func: READ,
            caller,
            depth: 0,
            epoch: 1,
            seq: 0,
        };
        let ret = Return {
            task,
            flags,
            func: READ,
            caller,
            depth: 0,
            epoch: 1,
            seq: 1,
            overrun: 0,
            calltime: time,
            rettime: time + 5,
        };
        [
            item(time, What::Call(call)),
            item(time + 5, What::Return(ret)),
        ]
    }

    #[test]
    fn a_hook_is_found_live_and_told_of_once() {
        let mut sentry = Sentry::start(Baseline::new(BANNER)).expect("a thread");
        sentry.boot(kernel());
        for round in 0..5 {
            for item in read(0, 100 * round, MODULE) {
                sentry.take(item);
            }
            sentry.end_round();
        }
        let found = sentry.finish();
        let rules: Vec<Rule> = found.iter().map(|finding| finding.rule).collect();
        assert_eq!(rules, [Rule::UnknownModule, Rule::WrongCaller], "{found:?}");
        assert_eq!(found[1].count, 5);
    }

    #[test]
    fn code_that_the_guest_does_not_list_is_found_live() {
        let mut sentry = Sentry::start(Baseline::new(BANNER)).expect("a thread");
        sentry.boot(kernel());
        sentry.modules(OfModules::List(ModuleLook {
            boot: 1,
            since: 1,
            modules: Some(Vec::new()),
        }));
        read(0, 5 * UNSURE_NS, MODULE)
            .into_iter()
            .for_each(|item| sentry.take(item));
        let found = sentry.finish();
        let rules: Vec<Rule> = found.iter().map(|finding| finding.rule).collect();
        assert_eq!(
            rules,
            [Rule::UnlistedModule, Rule::WrongCaller],
            "{found:?}"
        );
    }

    #[test]
    fn a_finding_has_the_names_that_the_guest_gives_by_then() {
        let mut sentry = Sentry::start(Baseline::new(BANNER)).expect("a thread");
        sentry.boot(kernel());
        sentry.modules(OfModules::List(ModuleLook {
            boot: 1,
            since: 1,
            modules: Some(vec![Listed {
                name: "hook".to_owned(),
                code: vec![(MODULE.0 - 0x234, MODULE.0 + 0x100)],
                load: 1,
            }]),
        }));
        sentry.modules(OfModules::Symbols(ModuleSymbols {
            load: 1,
            name: "hook".to_owned(),
            functions: vec![(MODULE.0 - 0x34, "passed_on".to_owned())],
            refused: 0,
            unread: None,
        }));
        read(0, 5 * UNSURE_NS, MODULE)
            .into_iter()
            .for_each(|item| sentry.take(item));
        let found = sentry.finish();
        assert_eq!(found[0].rule, Rule::UnknownModule, "{found:?}");
        let path = found[0].evidence.as_ref().map(|evidence| &evidence.path);
        let caller = path.and_then(|path| path[0].caller.as_deref());
        assert_eq!(caller, Some("passed_on+0x34 [hook?]"));
        // The module area all the same: what judges does not go by names.
        assert!(found[0].what.contains("(module area)"), "{found:?}");
    }

    #[test]
    fn a_clean_guest_and_another_kernel_give_nothing() {
        for (banner, caller) in [(BANNER, DISPATCHER), ("Linux version 6.2", MODULE)] {
            let mut sentry = Sentry::start(Baseline::new(banner)).expect("a thread");
            sentry.boot(kernel());
            read(0, 1, caller)
                .into_iter()
                .for_each(|item| sentry.take(item));
            assert_eq!(sentry.finish(), []);
        }
    }

    #[test]
    fn a_round_has_so_many_records_and_the_rest_is_a_loss() {
        let mut sentry = Sentry::start(Baseline::new(BANNER)).expect("a thread");
        sentry.boot(kernel());
        for time in 0..ROUND_RECORDS as u64 {
            read(0, 10 * time, DISPATCHER)
                .into_iter()
                .for_each(|item| sentry.take(item));
        }
        let missed = BTreeMap::from([(0, ROUND_RECORDS as u64)]);
        assert_eq!(
            (sentry.round.len(), &sentry.missed),
            (ROUND_RECORDS, &missed)
        );
        // The next round tells of it where it begins, on that CPU alone.
        sentry.round.clear();
        for cpu in [1, 0] {
            read(cpu, u64::MAX / 2, DISPATCHER)
                .into_iter()
                .for_each(|item| sentry.take(item));
        }
        let losses: Vec<(usize, Option<u64>)> = (sentry.round.iter().enumerate())
            .filter_map(|(at, item)| match item.what {
                What::Lost(lost) => Some((at, lost.records)),
                _ => None,
            })
            .collect();
        assert_eq!(losses, [(2, Some(ROUND_RECORDS as u64))]);
        assert!(sentry.missed.is_empty());
        assert_eq!(sentry.finish(), []);
    }

    #[test]
    fn a_round_that_finds_no_place_is_a_loss() {
        let (to, _stopped) = sync_channel(1);
        let (_told, from) = sync_channel(1);
        let mut sentry = Sentry {
            to: Some(to),
            from,
            round: Vec::new(),
            modules: VecDeque::new(),
            missed: BTreeMap::new(),
            thread: None,
        };
        for _ in 0..3 {
            read(3, 1, DISPATCHER)
                .into_iter()
                .for_each(|item| sentry.take(item));
            sentry.end_round();
        }
        // The third has a mark of the second's loss, which counts for its records.
        assert_eq!(sentry.missed, BTreeMap::from([(3, 4)]));
    }

    #[test]
    fn a_finding_is_told_again_only_after_a_while_with_its_count() {
        let finding = |subject: &str, severity| Finding {
            rule: Rule::OutsideText,
            severity,
            subject: subject.to_owned(),
            what: "w".to_owned(),
            count: 3,
            of: None,
            evidence: None,
        };
        let critical = || vec![finding("f", Severity::Critical)];
        let mut folded = Folded::default();
        let start = Instant::now();
        let counts = |news: Vec<Finding>| news.iter().map(|news| news.count).collect::<Vec<_>>();
        assert_eq!(counts(folded.news(critical(), start)), [3]);
        assert!(folded.news(critical(), start + WINDOW).is_empty());
        assert_eq!(counts(folded.news(critical(), start + AGAIN)), [6]);
        assert!(folded
            .news(vec![finding("g", Severity::Notice)], start)
            .is_empty());
        for number in 0..2 * FINDINGS {
            folded.news(vec![finding(&number.to_string(), Severity::Warning)], start);
        }
        assert_eq!(folded.0.len(), FINDINGS);
    }
}
