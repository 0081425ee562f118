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

/// A clean guest's, which reads.
fn baseline() -> Baseline {
    let mut baseline = Baseline::new(BANNER);
    baseline
        .functions
        .insert("__x64_sys_read".to_owned(), Default::default());
    baseline
}

fn kernel() -> Kernel {
    Kernel {
        boot: 1,
        symbols: Arc::new(Symbols::parse(MAP.into()).expect("symbols")),
        slide: 0,
        banner: format!("{BANNER}\n"),
        tells_offline: true,
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

/// How many records of which CPU were left out.
fn missed(sentry: &Sentry) -> Vec<(u16, u64)> {
    let missed = sentry.missed.iter();
    missed.map(|(&cpu, missed)| (cpu, missed.records)).collect()
}

impl Sentry {
    fn take_all(&mut self, items: impl IntoIterator<Item = Item>) {
        items.into_iter().for_each(|item| self.take(item));
    }
}

#[test]
fn a_hook_is_found_live_and_told_of_once() {
    let mut sentry = Sentry::start(baseline()).expect("a thread");
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
    let mut sentry = Sentry::start(baseline()).expect("a thread");
    sentry.boot(kernel());
    sentry.modules(OfModules::List(ModuleLook {
        boot: 1,
        since: 1,
        unseen_since: None,
        modules: Some(Vec::new()),
    }));
    sentry.take_all(read(0, 5 * UNSURE_NS, MODULE));
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
    let mut sentry = Sentry::start(baseline()).expect("a thread");
    sentry.boot(kernel());
    sentry.modules(OfModules::List(ModuleLook {
        boot: 1,
        since: 1,
        unseen_since: None,
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
    sentry.take_all(read(0, 5 * UNSURE_NS, MODULE));
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
    assert_eq!(sentry.round.len(), ROUND_RECORDS);
    assert_eq!(missed(&sentry), [(0, ROUND_RECORDS as u64)]);
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

/// A CPU works for half a minute, in rounds of a second, while another one has given its
/// last record. What is found; `each` is done in each round.
fn silent(kernel: Kernel, mut each: impl FnMut(&mut Sentry, u64)) -> Vec<Finding> {
    const SECOND: u64 = 1_000_000_000;
    let mut sentry = Sentry::start(Baseline::new(BANNER)).expect("a thread");
    sentry.boot(kernel);
    sentry.take_all(read(1, 1, DISPATCHER));
    for second in 0..30 {
        for number in 0..100 {
            sentry.take_all(read(0, second * SECOND + 10 * number, DISPATCHER));
        }
        each(&mut sentry, second * SECOND + 2000);
        let begun = Instant::now();
        while let Err(round) = sentry.hand_over_round() {
            assert!(begun.elapsed() < Duration::from_secs(30));
            sentry.round = round;
        }
    }
    sentry.finish()
}

#[test]
fn a_cpu_that_goes_silent_is_found_live() {
    let found = silent(kernel(), |_, _| ());
    let rules: Vec<Rule> = found.iter().map(|finding| finding.rule).collect();
    assert_eq!(rules, [Rule::SilentCpu], "{found:?}");
    assert_eq!(found[0].subject, "CPU 1");
}

#[test]
fn a_cpu_that_is_off_or_not_listened_to_is_not_silent() {
    // The guest has switched it off.
    let off = |sentry: &mut Sentry, _: u64| sentry.offline(BTreeSet::from([1]));
    assert_eq!(silent(kernel(), off), []);
    // Another one.
    let other = |sentry: &mut Sentry, _: u64| sentry.offline(BTreeSet::from([2]));
    assert_eq!(silent(kernel(), other).len(), 1);
    // Its records find no place.
    let left_out = |sentry: &mut Sentry, time: u64| {
        for item in read(1, time, DISPATCHER) {
            sentry.leave_out(&item);
        }
    };
    assert_eq!(silent(kernel(), left_out), []);
    // Nobody knows whether it is off.
    let unknown = Kernel {
        tells_offline: false,
        ..kernel()
    };
    assert_eq!(silent(unknown, |_, _| ()), []);
}

/// One whose thread takes nothing: there is room for one message.
fn stopped() -> (Sentry, Receiver<Message>, SyncSender<Finding>) {
    let (to, messages) = sync_channel(1);
    let (findings, from) = sync_channel(1);
    let sentry = Sentry {
        to: Some(to),
        from,
        round: Vec::new(),
        waiting: VecDeque::new(),
        missed: BTreeMap::new(),
        offline: BTreeSet::new(),
        thread: None,
    };
    (sentry, messages, findings)
}

fn one_round(sentry: &mut Sentry) {
    read(3, 1, DISPATCHER)
        .into_iter()
        .for_each(|item| sentry.take(item));
    sentry.end_round();
}

#[test]
fn a_boot_waits_for_a_place_and_the_engine_does_not() {
    let (mut sentry, messages, _findings) = stopped();
    one_round(&mut sentry);
    let begun = Instant::now();
    let list = |since| {
        OfModules::List(ModuleLook {
            boot: 1,
            since,
            unseen_since: None,
            modules: None,
        })
    };
    sentry.boot(kernel());
    (0..2 * MODULES as u64).for_each(|since| sentry.modules(list(since)));
    assert_eq!(sentry.waiting.len(), MODULES);
    assert!(matches!(sentry.waiting[0], Message::Boot(_)));
    // Another boot takes its place, and no round goes before it.
    sentry.boot(kernel());
    one_round(&mut sentry);
    assert_eq!(missed(&sentry), [(3, 2)]);
    assert!(matches!(messages.try_recv(), Ok(Message::Round(_))));
    one_round(&mut sentry);
    assert!(matches!(messages.try_recv(), Ok(Message::Boot(_))));
    one_round(&mut sentry);
    assert!(matches!(messages.try_recv(), Ok(Message::Round(_))));
    assert!(begun.elapsed() < Duration::from_secs(30));
}

#[test]
fn the_last_findings_are_not_waited_for_for_ever() {
    let time = Duration::from_millis(50);
    for full in [true, false] {
        let (mut sentry, _messages, findings) = stopped();
        if full {
            one_round(&mut sentry);
            // The last round, for which there is no place.
            read(3, 1, DISPATCHER)
                .into_iter()
                .for_each(|item| sentry.take(item));
        }
        let finding = Finding {
            rule: Rule::OutsideText,
            severity: Severity::Critical,
            subject: "f".to_owned(),
            what: "w".to_owned(),
            count: 1,
            of: None,
            evidence: None,
        };
        findings.send(finding.clone()).expect("room");
        let begun = Instant::now();
        assert_eq!(sentry.finish_within(time), [finding]);
        assert!(begun.elapsed() >= time);
    }
}

#[test]
fn a_round_that_finds_no_place_is_a_loss() {
    let (mut sentry, _messages, _findings) = stopped();
    for _ in 0..3 {
        read(3, 1, DISPATCHER)
            .into_iter()
            .for_each(|item| sentry.take(item));
        sentry.end_round();
    }
    // The third has a mark of the second's loss, which counts for its records.
    assert_eq!(missed(&sentry), [(3, 4)]);
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
