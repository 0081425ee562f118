//! Detection by the call flow: for each rule a story that it must tell of, and
//! one beside it of which it must not.

use proptest::prelude::*;
use xftrace::detect::{
    judge, profile_items, Baseline, Finding, Learnt, Profile, ProfileLimits, Rule, Severity,
    MIN_CALLS, MIN_SESSIONS,
};
use xftrace::kernel::Gva;
use xftrace::ring::record::{ForgedWhy, Item, LostWhy, TraceFlags, What};

use crate::dsl::{address, Story, Table, IN_MODULE, NOWHERE};
use crate::forest::{forest, play};
use crate::{readable, Clock};

mod modules;

const KERNEL: &str = "Linux version 6.1.0-xf";

fn profile(items: &[Item]) -> Profile<'static> {
    let all = profile_items(readable(items), &Table, ProfileLimits::default(), &[0, 1]);
    all.unwrap_or_else(|never| match never {}).0
}

fn learn(items: &[Item]) -> Baseline {
    let all = profile_items(readable(items), &Table, ProfileLimits::default(), &[0, 1]);
    let (profile, tally) = all.unwrap_or_else(|never| match never {});
    let mut known = Baseline::from_profile(KERNEL, &profile, &tally).expect("a clean guest");
    sessions(&mut known, MIN_SESSIONS);
    known
}

/// Has a baseline be one of so many sessions.
fn sessions(known: &mut Baseline, number: usize) {
    let learnt = |number: usize| (number.to_string(), Learnt::default());
    known.sessions = (0..number).map(learnt).collect();
}

fn check(items: &[Item], baseline: Option<&Baseline>) -> Vec<Finding> {
    judge(&profile(items), baseline, &Clock)
}

/// What was found by a rule.
fn by(found: &[Finding], rule: Rule) -> Vec<&Finding> {
    found
        .iter()
        .filter(|finding| finding.rule == rule)
        .collect()
}

/// The rules that raise an alarm.
fn alarms(found: &[Finding]) -> Vec<Rule> {
    let alarms = found
        .iter()
        .filter(|finding| finding.severity > Severity::Notice);
    let mut rules: Vec<Rule> = alarms.map(|finding| finding.rule).collect();
    rules.sort();
    rules.dedup();
    rules
}

/// What a guest does over and over: it opens, and then reads as `body` tells.
/// No two in a row take the same time.
fn guest(often: u64, body: impl Fn(&mut Story, u64)) -> Vec<Item> {
    let mut story = Story::new();
    story.on(0, 7, "cat");
    for number in 0..often {
        open(&mut story);
        body(&mut story, number);
    }
    story.items
}

fn open(story: &mut Story) {
    story
        .call("__x64_sys_openat")
        .call("do_sys_openat2")
        .leaf("getname")
        .ret()
        .ret();
}

fn read(story: &mut Story) {
    read_with(story, |_| {});
}

/// A read in which more happens, inside `vfs_read`.
fn read_with(story: &mut Story, more: impl FnOnce(&mut Story)) {
    story
        .call("__x64_sys_read")
        .call("ksys_read")
        .call("vfs_read")
        .leaf("rw_verify_area");
    more(story);
    story.after(8000).ret().ret().ret();
}

/// A guest whose reads have `new` in every `every`th.
fn now_and_then(every: u64, new: impl Fn(&mut Story)) -> Vec<Item> {
    guest(2 * MIN_CALLS, |story, number| {
        read_with(story, |story| {
            if number % every == 0 {
                new(story);
            }
        });
    })
}

fn clean() -> Vec<Item> {
    now_and_then(1, |_| {})
}

#[test]
fn a_clean_guest_is_clean() {
    let known = learn(&clean());
    assert_eq!(check(&clean(), Some(&known)), []);
    assert_eq!(check(&clean(), None), []);
    // Another boot has its kernel elsewhere.
    let mut story = Story::new();
    story.reboot();
    for _ in 0..MIN_CALLS {
        story.on(1, 9, "dog");
        open(&mut story);
        read(&mut story);
    }
    assert_eq!(check(&story.items, Some(&known)), []);
}

/// The same as records of mode plain have it.
fn plain(mut items: Vec<Item>) -> Vec<Item> {
    for item in &mut items {
        match &mut item.what {
            What::Call(call) => (call.caller, call.epoch, call.task.comm) = (Gva(0), 0, None),
            What::Return(ret) => (ret.caller, ret.epoch) = (Gva(0), 0),
            _ => {}
        }
    }
    items
}

#[test]
fn plain_records_without_callers_are_clean_and_what_they_do_tell_is_judged() {
    let known = learn(&plain(clean()));
    assert!(known.roots["__x64_sys_read"].system_call);
    for baseline in [None, Some(&known), Some(&learn(&clean()))] {
        assert_eq!(check(&plain(clean()), baseline), []);
    }
    let hooked = plain(now_and_then(1, |story| {
        story.leaf("getname");
    }));
    let found = check(&hooked, Some(&known));
    assert_eq!(alarms(&found)[0], Rule::UnexpectedCallee);
    let evidence = found[0].evidence.as_ref().expect("evidence");
    assert!(evidence.path.iter().all(|step| step.caller.is_none()));
    let in_module = plain(now_and_then(1, |story| {
        story.call_at(IN_MODULE, Gva(0)).ret();
    }));
    let found = alarms(&check(&in_module, Some(&known)));
    assert_eq!(found, [Rule::UnknownModule, Rule::CallCount]);
}

#[test]
fn address_0_is_no_caller_that_a_record_with_a_key_may_have() {
    let mut story = Story::new();
    story.call_from("__x64_sys_read", Gva(0)).ret();
    let found = alarms(&check(&story.items, None));
    assert_eq!(found, [Rule::OutsideText, Rule::WrongCaller]);
}

#[test]
fn a_call_from_nowhere_is_found_with_its_path() {
    let items = guest(1, |story, _| {
        read_with(story, |story| {
            story.call_from("getname", NOWHERE).ret();
        });
    });
    let found = check(&items, None);
    let [finding] = by(&found, Rule::OutsideText)[..] else {
        panic!("{found:?}");
    };
    assert_eq!((finding.severity, finding.count), (Severity::Critical, 1));
    let evidence = finding.evidence.as_ref().expect("evidence");
    assert_eq!((evidence.pid, evidence.task.as_deref()), (7, Some("cat")));
    let path: Vec<&str> = evidence
        .path
        .iter()
        .map(|step| step.function.as_str())
        .collect();
    assert_eq!(path, ["__x64_sys_read", "ksys_read", "vfs_read", "getname"]);
    let marks: Vec<bool> = evidence
        .path
        .iter()
        .map(|step| step.mark.is_some())
        .collect();
    assert_eq!(marks, [false, false, false, true]);

    // An interrupt calls from where it likes.
    let irq = guest(1, |story, _| {
        read_with(story, |story| {
            story
                .flags(TraceFlags::HARDIRQ | TraceFlags::IRQS_OFF)
                .call_from("getname", NOWHERE)
                .ret()
                .flags(0);
        });
    });
    assert_eq!(check(&irq, None), []);
}

#[test]
fn a_system_call_from_elsewhere_than_the_dispatcher_is_found_without_a_baseline() {
    for caller in [
        IN_MODULE,
        xftrace::kernel::Gva(address("tick_handle").0 + 8),
    ] {
        let hooked = guest(1, |story, _| {
            story.call_from("__x64_sys_read", caller).ret();
        });
        let found = check(&hooked, None);
        assert_eq!(alarms(&found), [Rule::WrongCaller], "{caller}");
        assert_eq!(by(&found, Rule::WrongCaller)[0].count, 1);
        let found = check(&hooked, Some(&learn(&clean())));
        assert!(alarms(&found).contains(&Rule::WrongCaller), "{caller}");
    }
    // Another place in the dispatcher is one that calls system calls too.
    let other = guest(1, |story, _| {
        let site = xftrace::kernel::Gva(address("x64_sys_call").0 + 0x99);
        story
            .call_from("__x64_sys_read", site)
            .leaf("ksys_read")
            .ret();
    });
    assert_eq!(alarms(&check(&other, None)), []);
}

#[test]
fn a_new_callee_is_found_where_it_is_a_habit() {
    let known = learn(&clean());
    let new = |story: &mut Story| {
        story.leaf("getname");
    };
    let found = check(&now_and_then(3, new), Some(&known));
    assert_eq!(alarms(&found), [Rule::UnexpectedCallee]);
    let callee = by(&found, Rule::UnexpectedCallee)[0];
    assert_eq!((callee.count, callee.of), (67, Some(2 * MIN_CALLS)));
    assert_eq!(callee.what, "vfs_read calls getname");

    // A path that is seldom taken is told of, and is no alarm.
    let found = check(&now_and_then(20, new), Some(&known));
    assert_eq!(alarms(&found), []);
    assert_eq!(by(&found, Rule::UnexpectedCallee).len(), 1);
    // Nor does it matter what a function calls that nobody calls often.
    let few = guest(MIN_CALLS / 2 - 1, |story, _| read_with(story, new));
    assert_eq!(alarms(&check(&few, Some(&known))), []);
}

#[test]
fn what_interrupts_call_is_no_new_callee() {
    let known = learn(&clean());
    let irq = now_and_then(1, |story| {
        story.interrupt_at(story.depth());
    });
    assert_eq!(check(&irq, Some(&known)), []);
}

#[test]
fn a_gap_makes_no_new_callee() {
    let known = learn(&clean());
    let gap = now_and_then(1, |story| {
        story
            .unseen(|story| story.call("getname"))
            .leaf("tick_handle")
            .unseen(|story| story.ret());
    });
    assert_eq!(profile(&gap).skipped.gaps, 2 * MIN_CALLS);
    assert_eq!(check(&gap, Some(&known)), []);
}

#[test]
fn a_missing_callee_is_found_and_a_lost_one_is_not() {
    let known = learn(&clean());
    let shortened = |lost: bool| {
        guest(2 * MIN_CALLS, |story, _| {
            story
                .call("__x64_sys_read")
                .call("ksys_read")
                .call("vfs_read");
            if lost {
                story.unseen(|story| story.leaf("rw_verify_area"));

                story.lost(Some(2), LostWhy::Overrun);
            }
            story.after(8000).ret().ret().ret();
        })
    };
    let found = check(&shortened(false), Some(&known));
    assert!(alarms(&found).contains(&Rule::MissingCallee), "{found:?}");
    let missing = by(&found, Rule::MissingCallee)[0];
    assert_eq!(missing.subject, "vfs_read");
    assert_eq!(
        (missing.count, missing.of),
        (2 * MIN_CALLS, Some(2 * MIN_CALLS))
    );
    assert_eq!(check(&shortened(true), Some(&known)), []);
}

#[test]
fn a_function_inside_itself_is_found() {
    let known = learn(&clean());
    let nested = |often: u64| {
        guest(2 * MIN_CALLS, |story, number| {
            story.call("__x64_sys_read").call("ksys_read");
            if number % often == 0 {
                story
                    .call("ksys_read")
                    .call("vfs_read")
                    .leaf("rw_verify_area")
                    .after(8000)
                    .ret()
                    .ret();
            } else {
                story
                    .call("vfs_read")
                    .leaf("rw_verify_area")
                    .after(8000)
                    .ret();
            }
            story.ret().ret();
        })
    };
    assert!(alarms(&check(&nested(1), Some(&known))).contains(&Rule::NestedInItself));
    let found = check(&nested(20), Some(&known));
    assert_eq!(alarms(&found), []);
    assert_eq!(by(&found, Rule::NestedInItself).len(), 1);
}

#[test]
fn another_order_is_found_where_it_is_the_usual_one() {
    let swapped = |swap: fn(u64) -> bool| {
        guest(2 * MIN_CALLS, |story, number| {
            let swap = swap(number);
            story.call("__x64_sys_read").call("ksys_read");
            story.leaf(if swap { "vfs_read" } else { "getname" });
            story.leaf(if swap { "getname" } else { "vfs_read" });
            story.ret().ret();
        })
    };
    let known = learn(&swapped(|_| false));
    let found = check(&swapped(|_| true), Some(&known));
    assert_eq!(alarms(&found), [Rule::UnexpectedOrder]);
    let found = check(&swapped(|number| number % 3 == 0), Some(&known));
    assert_eq!(alarms(&found), []);
    assert!(!by(&found, Rule::UnexpectedOrder).is_empty());
}

/// Reads that make `calls` calls of `vfs_read`, in one of `every` of them, and
/// two else.
fn counted(calls: u64, every: u64) -> Vec<Item> {
    let mut story = Story::new();
    story.on(0, 7, "cat");
    for number in 0..2 * MIN_CALLS {
        story.call("__x64_sys_read").call("ksys_read");
        let calls = if number % every == 0 { calls } else { 2 };
        for _ in 0..calls {
            story.leaf("vfs_read");
        }
        story.ret().ret();
    }
    story.items
}

#[test]
fn more_calls_than_ever_are_found_by_their_median() {
    let known = learn(&counted(2, 1));
    let found = check(&counted(3, 1), Some(&known));
    assert!(alarms(&found).contains(&Rule::CallCount), "{found:?}");
    // Outliers, and be they many, do not move a median.
    assert_eq!(check(&counted(200, 3), Some(&known)), []);
}

/// Reads, each call of which takes `slow` times as long, and `inside` more.
fn timed(slow: u64, inside: u64) -> Vec<Item> {
    let mut story = Story::new();
    story.on(0, 7, "cat");
    for _ in 0..2 * MIN_CALLS {
        story
            .call("__x64_sys_read")
            .call("ksys_read")
            .call("vfs_read")
            .after(1000 * slow);
        story.ret().after(inside).ret().after(1000 * slow).ret();
    }
    story.items
}

#[test]
fn a_longer_time_is_found_and_a_slower_host_is_not() {
    let known = learn(&timed(10, 0));
    let found = check(&timed(10, 90_000), Some(&known));
    assert_eq!(alarms(&found), [Rule::Duration], "{found:?}");
    let mut young = known.clone();
    sessions(&mut young, MIN_SESSIONS - 1);
    assert_eq!(alarms(&check(&timed(10, 90_000), Some(&young))), []);
    assert_eq!(check(&timed(10, 900), Some(&known)), []);
    // Three times slower in everything, as under another's load.
    assert_eq!(check(&timed(30, 0), Some(&known)), []);
}

#[test]
fn system_calls_in_a_new_order_are_found_by_process() {
    let known = learn(&clean());
    let reopened = |comm: &'static str, often: u64| {
        let mut story = Story::new();
        story.on(0, 7, comm);
        for number in 0..2 * MIN_CALLS {
            open(&mut story);
            if number % often == 0 {
                open(&mut story);
            }
            read(&mut story);
        }
        story.items
    };
    let found = check(&reopened("cat", 2), Some(&known));
    assert_eq!(alarms(&found), [Rule::UnknownSequence], "{found:?}");
    assert!(
        found[0].what.contains("sys_openat sys_openat sys_read"),
        "{found:?}"
    );
    assert_eq!(alarms(&check(&reopened("cat", 40), Some(&known))), []);
    // Of a process that was never seen nothing can be said.
    assert_eq!(check(&reopened("dog", 2), Some(&known)), []);
}

#[test]
fn a_cpu_that_falls_silent_is_found() {
    let two = |silent_from: u64| {
        let mut story = Story::new();
        for number in 0..400 {
            story.on(0, 7, "cat");
            open(&mut story);
            read(&mut story);
            if number < silent_from {
                story.on(1, 8, "dog");
                read(&mut story);
            }
            story.after(100_000_000);
        }
        story.items
    };
    let known = learn(&two(400));
    assert_eq!(alarms(&check(&two(100), Some(&known))), [Rule::SilentCpu]);
    assert_eq!(check(&two(370), Some(&known)), []);
    // A guest that leaves a CPU idle does so again.
    assert_eq!(check(&two(100), Some(&learn(&two(0)))), []);
}

#[test]
fn nothing_is_learnt_from_a_guest_that_is_not_clean() {
    let refused = |items: &[Item]| {
        let all = profile_items(readable(items), &Table, ProfileLimits::default(), &[]);
        let (profile, tally) = all.unwrap_or_else(|never| match never {});
        Baseline::from_profile(KERNEL, &profile, &tally)
            .map(|_| ())
            .unwrap_err()
            .to_string()
    };
    let forged = guest(1, |story, _| {
        story.forged(ForgedWhy::NotDecodable, Some(1));
    });
    assert!(refused(&forged).contains("forged"));
    let outside = guest(1, |story, _| {
        story.call_from("ksys_read", NOWHERE).ret();
    });
    assert!(refused(&outside).contains("no kernel code"));
    assert!(refused(&[]).contains("no calls"));
}

#[test]
fn a_profile_has_room_for_so_much_and_says_so() {
    let limits = ProfileLimits {
        edges: 3,
        tasks: 1,
        sequences: 1,
        below: 1,
    };
    let items = clean();
    let all = profile_items(readable(&items), &Table, limits, &[]);
    let (profile, _) = all.unwrap_or_else(|never| match never {});
    assert!(profile.skipped.no_room > 0 && !profile.is_whole());
}

/// So often that what functions always do counts.
fn over_and_over(items: &[Item]) -> Vec<Item> {
    let often = MIN_CALLS as usize;
    items
        .iter()
        .copied()
        .cycle()
        .take(items.len() * often)
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn a_session_is_clean_by_its_own_baseline_and_by_any_that_has_learnt_it(
        (ours, turns) in forest(),
        (theirs, other_turns) in forest(),
        interrupts in prop::collection::vec(prop::bool::weighted(0.3), 1..20),
    ) {
        let (ours, theirs) = (play(&ours, &turns, &interrupts), play(&theirs, &other_turns, &[]));
        prop_assume!(!ours.is_empty() && !theirs.is_empty());
        let (many, theirs) = (over_and_over(&ours), over_and_over(&theirs));
        let mut known = learn(&many);
        prop_assert_eq!(check(&many, Some(&known)), vec![]);
        known.merge(&learn(&theirs)).unwrap();
        prop_assert_eq!(check(&many, Some(&known)), vec![]);
        prop_assert_eq!(alarms(&check(&theirs, Some(&known))), vec![]);
    }

    #[test]
    fn merging_is_in_any_order_and_never_forgets(
        forests in prop::collection::vec(forest(), 3),
    ) {
        let learnt: Vec<Baseline> = forests
            .iter()
            .map(|(forest, turns)| play(forest, turns, &[]))
            .filter(|items| !items.is_empty())
            .map(|items| learn(&over_and_over(&items)))
            .collect();
        let merged = |order: &mut dyn Iterator<Item = &Baseline>| {
            let mut all = Baseline::new(KERNEL);
            order.for_each(|one| all.merge(one).unwrap());
            all
        };
        let all = merged(&mut learnt.iter());
        prop_assert_eq!(&all, &merged(&mut learnt.iter().rev()));
        if let [a, rest @ ..] = &learnt[..] {
            let mut nested = a.clone();
            nested.merge(&merged(&mut rest.iter())).unwrap();
            prop_assert_eq!(&all, &nested);
        }
        for one in &learnt {
            prop_assert!(covers(&all, one));
        }
    }

    #[test]
    fn no_items_make_judging_fail(
        (forest, turns) in forest(),
        (other, other_turns) in forest(),
    ) {
        let known = play(&other, &other_turns, &[]);
        prop_assume!(!known.is_empty());
        let items = play(&forest, &turns, &[]);
        for finding in check(&items, Some(&learn(&known))) {
            prop_assert!(!finding.what.chars().any(char::is_control));
        }
    }
}

/// Whether a baseline lets pass all that another does.
fn covers(wide: &Baseline, narrow: &Baseline) -> bool {
    let roots = narrow.roots.iter().all(|(name, root)| {
        let known = &wide.roots[name];
        let bands = [(known.calls, root.calls), (known.duration, root.duration)];
        root.callers.is_subset(&known.callers)
            && bands.iter().all(|(wide, narrow)| match (wide, narrow) {
                (Some(wide), Some(narrow)) => wide.low <= narrow.low && wide.high >= narrow.high,
                (_, None) => true,
                (None, Some(_)) => false,
            })
    });
    let functions = narrow.functions.iter().all(|(name, function)| {
        let known = &wide.functions[name];
        function
            .callees
            .keys()
            .all(|callee| known.callees.contains_key(callee))
            && function.order.is_subset(&known.order)
            && function.from_modules.is_subset(&known.from_modules)
            && known.nested >= function.nested
            && match (&known.always, &function.always) {
                (Some(wide), Some(narrow)) => wide.is_subset(narrow),
                (_, None) => true,
                (None, Some(_)) => false,
            }
    });
    let processes = narrow
        .processes
        .iter()
        .all(|(name, of)| of.is_subset(&wide.processes[name]));
    let silence = wide.silence.longest_ns >= narrow.silence.longest_ns;
    roots && functions && processes && silence
}
