//! Code in the module area: whether it was learnt, and whether the guest's own list
//! of modules shows it.

use xftrace::callflow::Names;
use xftrace::detect::{profile_with, InModules, Profiler};
use xftrace::ring::record::LostWhy;
use xftrace::session::{Listed, ModuleHistory, ModuleLook, UNSURE_NS};

use super::*;
use crate::dsl::Saying;

#[test]
fn a_call_from_a_module_is_found_unless_it_was_learnt() {
    let hooked = guest(2, |story, _| {
        read_with(story, |story| {
            story.call_from("getname", IN_MODULE).ret();
        });
    });
    let found = check(&hooked, Some(&learn(&clean())));
    assert_eq!(alarms(&found), [Rule::UnknownModule]);
    assert_eq!(
        by(&found, Rule::UnknownModule)[0].severity,
        Severity::Critical
    );
    // Without a baseline nobody knows which modules are the guest's own.
    assert_eq!(
        by(&check(&hooked, None), Rule::UnknownModule)[0].severity,
        Severity::Notice
    );
    assert_eq!(check(&hooked, Some(&learn(&hooked))), []);
}

#[test]
fn a_function_in_a_module_is_found_as_a_callee() {
    let hooked = guest(2, |story, _| {
        read_with(story, |story| {
            story
                .call_at(IN_MODULE, xftrace::kernel::Gva(address("vfs_read").0 + 9))
                .ret();
        });
    });
    let found = check(&hooked, Some(&learn(&clean())));
    assert_eq!(alarms(&found), [Rule::UnknownModule]);
    assert_eq!(alarms(&check(&hooked, None)), []);
}

/// A module that sets itself up `often` times: it calls `vfs_read`, which calls it.
fn loads(often: u64) -> Vec<Item> {
    guest(often, |story, _| {
        story
            .call("__x64_sys_finit_module")
            .call("do_init_module")
            .call("do_one_initcall")
            .call_at(IN_MODULE, Gva(address("do_one_initcall").0 + 9))
            .call_from("vfs_read", IN_MODULE)
            .call_at(IN_MODULE, Gva(address("vfs_read").0 + 9))
            .ret()
            .ret()
            .ret()
            .ret()
            .ret()
            .ret();
    })
}

#[test]
fn a_module_that_sets_itself_up_is_no_hook() {
    let mut known = learn(&clean());
    // Whether or not the guest has loaded one while it was learnt: such a guest loads
    // modules now and then, and others than these.
    let without = loads(1);
    assert_eq!(alarms(&check(&without, Some(&known))), []);
    known.merge(&learn(&loads(1))).expect("one kernel");
    for loaded in [without, loads(MIN_CALLS / 2)] {
        assert_eq!(alarms(&check(&loaded, Some(&known))), []);
        // It may come and go between two looks at the list.
        let hidden = judge(&with_list(&loaded, &[]), Some(&known), &Clock);
        assert_eq!(alarms(&hidden), []);
    }
    // What it leaves behind has no such leave, and to have learnt the one is to have
    // learnt nothing of the other.
    let left = guest(1, |story, _| {
        read_with(story, |story| {
            story
                .call_at(IN_MODULE, Gva(address("vfs_read").0 + 9))
                .ret();
        });
    });
    assert_eq!(alarms(&check(&left, Some(&known))), [Rule::UnknownModule]);
}

/// What was lost may have been that a module is loaded.
#[test]
fn behind_a_loss_a_module_may_be_one_that_sets_itself_up() {
    let known = learn(&clean());
    let found = |before: fn(&mut Story), hidden: fn(&mut Story), is_lost: bool| {
        let items = guest(2, |story, _| {
            before(story);
            story.unseen(|story| {
                hidden(story);
                story
            });
            if is_lost {
                story.lost(None, LostWhy::Overrun);
            }
            story
                .call("vfs_read")
                .call_at(IN_MODULE, Gva(address("vfs_read").0 + 9))
                .ret()
                .ret();
            while story.depth() > 0 {
                story.ret();
            }
        });
        alarms(&check(&items, Some(&known)))
    };
    let loads = |story: &mut Story| {
        story.call("__x64_sys_finit_module").call("do_init_module");
    };
    let reads = |story: &mut Story| {
        story.call("__x64_sys_read");
    };
    // All around it is lost, or stands on what was there before, or may seem to.
    assert_eq!(found(|_| {}, loads, true), []);
    let stands = |story: &mut Story| {
        story
            .ret()
            .call("__x64_sys_finit_module")
            .call("do_init_module");
    };
    assert_eq!(found(reads, stands, true), []);
    let seems = |story: &mut Story| {
        story.ret().call("do_init_module");
    };
    assert_eq!(found(reads, seems, true), []);
    // Records that were refused are missing too.
    assert_eq!(found(reads, loads, false), []);
    // How often that was, is counted.
    let items = guest(7, |story, _| {
        story
            .unseen(|story| story.call("__x64_sys_read"))
            .lost(None, LostWhy::Overrun)
            .call("vfs_read")
            .call_at(IN_MODULE, Gva(address("vfs_read").0 + 9))
            .ret()
            .ret()
            .ret();
    });
    assert_eq!((told(&items, []).excused, told(&items, []).all), (7, 0));
    // Where nothing is lost of what it lies below, nothing is excused.
    let root = |story: &mut Story| {
        story.ret();
    };
    assert_eq!(found(reads, root, true), [Rule::UnknownModule]);
}

#[test]
fn a_function_that_was_not_learnt_counts_once_it_has_a_habit() {
    // A guest whose modules do something, and one where none ever did.
    let calm = learn(&guest(2 * MIN_CALLS, |_, _| {}));
    let known = learn(&guest(2 * MIN_CALLS, |story, _| {
        story
            .call("__x64_sys_openat")
            .call_from("getname", IN_MODULE)
            .ret()
            .call_at(IN_MODULE, Gva(address("__x64_sys_openat").0 + 9))
            .ret()
            .ret();
    }));
    let read = |story: &mut Story| {
        read_with(story, |story| {
            story.call_from("getname", IN_MODULE).ret();
            story
                .call_at(IN_MODULE, Gva(address("vfs_read").0 + 9))
                .ret();
        });
    };
    let judged_by = |known, often| check(&guest(often, |story, _| read(story)), Some(known));
    let judged = |often| judged_by(&known, often);
    let rare = judged(MIN_CALLS / 2);
    let of_vfs_read = |found: &[Finding]| {
        let found = by(found, Rule::UnknownModule);
        let of = found.iter().find(|found| found.subject == "vfs_read");
        of.expect("a finding").severity
    };
    assert_eq!(of_vfs_read(&rare), Severity::Notice);
    assert_eq!(of_vfs_read(&judged(2 * MIN_CALLS)), Severity::Warning);
    let never = judged_by(&calm, 1);
    assert_eq!(of_vfs_read(&never), Severity::Critical);
    let all = by(&never, Rule::UnknownModule);
    assert!(all.iter().all(|found| found.severity == Severity::Critical));
}

/// A guest with a list of modules from the beginning on. Its records begin when
/// the list is old enough to tell.
fn with_list(items: &[Item], code: &[(u64, u64)]) -> Profile<'static> {
    with_list_and_names(items, code, &Table)
}

/// The same where the addresses have these names.
fn with_list_and_names<'n>(
    items: &[Item],
    code: &[(u64, u64)],
    names: &'n impl Names,
) -> Profile<'n> {
    let listed = |&range| Listed {
        name: "ext4".to_owned(),
        code: vec![range],
        load: 1,
    };
    let mut history = ModuleHistory::default();
    history.push(ModuleLook {
        boot: 1,
        since: 0,
        unseen_since: None,
        modules: Some(code.iter().map(listed).collect()),
    });
    let mut profiler = Profiler::new(ProfileLimits::default());
    *profiler.modules() = history;
    let mut items = items.to_vec();
    items.iter_mut().for_each(|item| item.time += 2 * UNSURE_NS);
    let all = profile_with(profiler, readable(&items), names, &[0, 1]);
    all.unwrap_or_else(|never| match never {}).0
}

/// A module calls `getname` in the first read, and `vfs_read` calls it in the
/// second.
fn hooked() -> Vec<Item> {
    guest(2, |story, number| {
        read_with(story, |story| match number {
            0 => {
                story.call_from("getname", IN_MODULE).ret();
            }
            _ => {
                story
                    .call_at(IN_MODULE, Gva(address("vfs_read").0 + 9))
                    .ret();
            }
        });
    })
}

#[test]
fn code_that_the_guest_does_not_list_is_found_as_that() {
    let known = learn(&clean());
    let around = [(IN_MODULE.0 - 0x100, IN_MODULE.0 + 0x100)];
    let judged = |code: &[(u64, u64)], known| judge(&with_list(&hooked(), code), known, &Clock);

    let listed = judged(&around, Some(&known));
    assert_eq!(alarms(&listed), [Rule::UnknownModule]);
    let hidden = judged(&[], Some(&known));
    assert_eq!(alarms(&hidden), [Rule::UnlistedModule]);
    let unlisted = by(&hidden, Rule::UnlistedModule);
    let whats: Vec<&str> = unlisted.iter().map(|found| found.what.as_str()).collect();
    assert_eq!(
        whats,
        [
            "getname was called from code that is in no module of the guest's list",
            "vfs_read calls (unlisted code)"
        ]
    );
    // What the kernel makes as it runs is on no list either: without a baseline,
    // nobody knows whether the guest has such.
    assert_eq!(alarms(&judged(&[], None)), []);
    assert_eq!(by(&judged(&[], None), Rule::UnlistedModule).len(), 2);
}

/// What the list told of code in the module area, where it was read like this.
fn told(items: &[Item], looks: impl IntoIterator<Item = ModuleLook>) -> InModules {
    let mut profiler = Profiler::new(ProfileLimits::default());
    for look in looks {
        profiler.modules().push(look);
    }
    let all = profile_with(profiler, readable(items), &Table, &[0, 1]);
    let (profile, _) = all.unwrap_or_else(|never| match never {});
    profile.in_modules
}

/// The list with one module, or with a second one beside it.
fn list(since: u64, is_longer: bool) -> ModuleLook {
    let listed = |at: u64, load| Listed {
        name: "ext4".to_owned(),
        code: vec![(at - 0x100, at + 0x100)],
        load,
    };
    let mut modules = vec![listed(IN_MODULE.0, 1)];
    if is_longer {
        modules.push(listed(IN_MODULE.0 + 0x10_0000, 2));
    }
    ModuleLook {
        boot: 1,
        since,
        unseen_since: None,
        modules: Some(modules),
    }
}

/// Reads, each a tenth of a second after the one before. In each a module that is listed
/// makes so many calls, and code that hides one.
fn reads(often: u64, calls: usize, hidden: bool) -> Vec<Item> {
    const STEP: u64 = UNSURE_NS / 10;
    let mut items = guest(often, |story, _| {
        read_with(story, |story| {
            for _ in 0..calls {
                story.call_from("getname", IN_MODULE).ret();
            }
            if hidden {
                let hidden = Gva(IN_MODULE.0 + 0x5000);
                story.call_from("getname", hidden).ret();
            }
        });
    });
    let each = items.len() as u64 / often;
    for (number, item) in (0..).zip(&mut items) {
        item.time += 2 * UNSURE_NS + number / each * STEP;
    }
    items
}

#[test]
fn it_is_counted_where_the_list_tells_nothing() {
    let counts = |all, in_doubt, not_told| InModules {
        all,
        in_doubt,
        not_told,
        excused: 0,
    };
    // Each of two is called, or calls, and one of them calls what it is called by.
    assert_eq!(told(&hooked(), []), counts(2, 2, 2));
    for code in [&[(IN_MODULE.0 - 0x100, IN_MODULE.0 + 0x100)][..], &[]] {
        assert_eq!(with_list(&hooked(), code).in_modules, counts(2, 0, 0));
    }
    // Code that a list shows is told of also while that changes.
    let around = [list(0, false), list(UNSURE_NS / 2, true)];
    assert_eq!(told(&hooked(), around), counts(2, 2, 0));
    // What loads is excused, whatever is told of it.
    assert_eq!(told(&loads(5), []), counts(0, 0, 0));
}

/// Who changes the list all the time keeps it from telling anything, however much the
/// modules do that are on it.
#[test]
fn a_list_that_always_changes_tells_little_and_one_that_does_now_and_then_enough() {
    let changes = |every: u64| {
        let times = (0..20).map(move |number| number * every);
        times.enumerate().map(|(n, since)| list(since, n % 2 == 1))
    };
    let seconds = 10;
    let often = 10 * seconds;
    for calls in [1, 9] {
        let hidden = reads(often, calls, true);
        let all = often * (calls as u64 + 1);
        let of = told(&hidden, changes(UNSURE_NS));
        let counts = InModules {
            all,
            in_doubt: all,
            not_told: often,
            excused: 0,
        };
        assert_eq!(of, counts, "{calls}");
        assert!(of.tell_little(), "{of:?}");
        let of = told(&hidden, changes(6 * UNSURE_NS));
        assert!(of.not_told > 0 && !of.tell_little(), "{of:?}");
        assert!(!told(&hidden, changes(100 * UNSURE_NS)).tell_little());
    }
    // Nobody hides.
    let of = told(&reads(often, 9, false), changes(UNSURE_NS));
    assert!(of.in_doubt == of.all && !of.tell_little(), "{of:?}");
}

#[test]
fn a_learnt_module_is_no_leave_for_code_that_is_not_listed() {
    let around = [(IN_MODULE.0 - 0x100, IN_MODULE.0 + 0x100)];
    let learnt = |code: &[(u64, u64)]| {
        let profile = with_list(&hooked(), code);
        Baseline::from_profile(KERNEL, &profile, &Default::default()).expect("a clean guest")
    };
    let judged = |code: &[(u64, u64)], known: &Baseline| {
        alarms(&judge(&with_list(&hooked(), code), Some(known), &Clock))
    };
    let module = learnt(&around);
    assert_eq!(judged(&around, &module), []);
    assert_eq!(judged(&[], &module), [Rule::UnlistedModule]);
    // As a guest with BPF programs is learnt.
    assert_eq!(judged(&[], &learnt(&[])), []);
}

/// A module may call itself and its functions what it likes: like a function of the
/// kernel, like what Ftrace puts on the stack, like a module that was learnt.
#[test]
fn what_the_guest_calls_a_module_changes_no_verdict() {
    let around = [(IN_MODULE.0 - 0x100, IN_MODULE.0 + 0x100)];
    let calm = learn(&clean());
    let mut learnt = Vec::new();
    for function in ["vfs_read", "return_to_handler", "x64_sys_call", "f"] {
        for module in ["ext4", "evil"] {
            let names = Saying { module, function };
            let shown = |found: &[Finding]| -> Vec<String> {
                let lines = found.iter().map(|found| {
                    let Finding {
                        rule,
                        severity,
                        what,
                        count,
                        ..
                    } = found;
                    format!("{rule:?} {severity:?} {} {what} {count}", found.subject)
                });
                lines.collect()
            };
            for code in [&around[..], &[]] {
                let nameless = with_list(&hooked(), code);
                let named = with_list_and_names(&hooked(), code, &names);
                for known in [None, Some(&calm)] {
                    assert_eq!(
                        shown(&judge(&named, known, &Clock)),
                        shown(&judge(&nameless, known, &Clock)),
                        "{function} [{module}]"
                    );
                }
                let found = judge(&named, Some(&calm), &Clock);
                let paths = found.iter().filter_map(|found| found.evidence.as_ref());
                let marked = Some(format!("{function}+0x0 [{module}?]"));
                let steps: Vec<_> = paths.flat_map(|evidence| &evidence.path).collect();
                assert!(steps.iter().any(|step| step.caller == marked), "{steps:?}");
            }
            let named = with_list_and_names(&hooked(), &around, &names);
            learnt.push(
                Baseline::from_profile(KERNEL, &named, &Default::default()).expect("a baseline"),
            );
        }
    }
    let nameless = with_list(&hooked(), &around);
    let nameless = Baseline::from_profile(KERNEL, &nameless, &Default::default());
    assert_eq!(learnt, vec![nameless.expect("a baseline"); learnt.len()]);
}
