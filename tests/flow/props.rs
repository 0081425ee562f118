//! What holds for any input at all.

use std::collections::{HashMap, HashSet};

use proptest::prelude::*;
use xftrace::callflow::{events, Event, Fit, Flow, Happening, Limits, Tally};
use xftrace::kernel::Gva;
use xftrace::output::{Format, TimeColumn, Weight};
use xftrace::ring::record::{
    Call, Comm, Forged, ForgedWhy, Item, Lost, LostWhy, Return, Task, TraceFlags, What,
};

use crate::dsl::{address, Table, IN_MODULE, NOWHERE};
use crate::{readable, write};

/// So small that hostile items run into all of them.
const SMALL: Limits = Limits {
    tasks: 3,
    depth: 4,
    pending: 5,
    roots: 4,
};

/// Mostly one of `few`, so that items meet; now and then anything.
fn mostly<T>(
    few: impl Strategy<Value = T>,
    any: impl Strategy<Value = T>,
) -> impl Strategy<Value = T>
where
    T: std::fmt::Debug,
{
    prop_oneof![8 => few, 1 => any]
}

fn func() -> impl Strategy<Value = Gva> {
    let names = [
        "__x64_sys_read",
        "ksys_read",
        "vfs_read",
        "sysvec_apic_timer_interrupt",
    ];
    let few = prop::sample::select(names.map(address).to_vec());
    mostly(
        few,
        prop_oneof![Just(IN_MODULE), Just(NOWHERE), any::<u64>().prop_map(Gva)],
    )
}

fn task() -> impl Strategy<Value = Task> {
    let comm = prop::option::of(any::<[u8; 16]>().prop_map(Comm));
    (mostly(0..4i32, any::<i32>()), comm).prop_map(|(pid, comm)| Task { pid, comm })
}

fn depth() -> impl Strategy<Value = u16> {
    mostly(0..6u16, any::<u16>())
}

fn flags() -> impl Strategy<Value = TraceFlags> {
    mostly(Just(0u8), any::<u8>()).prop_map(TraceFlags)
}

fn epoch() -> impl Strategy<Value = u64> {
    mostly(0..70u64, any::<u64>())
}

fn call() -> impl Strategy<Value = What> {
    (task(), flags(), func(), func(), depth(), epoch()).prop_map(
        |(task, flags, func, caller, depth, epoch)| {
            What::Call(Call {
                task,
                flags,
                func,
                caller,
                depth,
                epoch,
                seq: 0,
            })
        },
    )
}

fn ret() -> impl Strategy<Value = What> {
    let times = (
        any::<u32>(),
        mostly(0..500u64, any::<u64>()),
        mostly(0..500u64, any::<u64>()),
    );
    (task(), flags(), func(), func(), depth(), epoch(), times).prop_map(
        |(task, flags, func, caller, depth, epoch, (overrun, calltime, rettime))| {
            let seq = 0;
            What::Return(Return {
                task,
                flags,
                func,
                caller,
                depth,
                epoch,
                seq,
                overrun,
                calltime,
                rettime,
            })
        },
    )
}

fn other() -> impl Strategy<Value = What> {
    let lost = (
        prop::option::of(any::<u64>()),
        prop::sample::select(&LostWhy::ALL[..]),
    );
    let forged = (
        prop::sample::select(&ForgedWhy::ALL[..]),
        prop::option::of(any::<u64>()),
        any::<i32>(),
        any::<u64>(),
        any::<i32>(),
    );
    prop_oneof![
        lost.prop_map(|(records, why)| What::Lost(Lost { records, why })),
        forged.prop_map(|(why, epoch, pid, raw_func, depth)| {
            What::Forged(Forged {
                why,
                epoch,
                pid,
                raw_func,
                depth,
            })
        }),
        any::<u16>().prop_map(|type_id| What::Other { type_id }),
    ]
}

fn item() -> impl Strategy<Value = Item> {
    let what = prop_oneof![6 => call(), 6 => ret(), 1 => other()];
    let boot = mostly(Just(1u32), prop_oneof![0..4u32, any::<u32>()]);
    (
        mostly(0..3u16, any::<u16>()),
        boot,
        mostly(0..500u64, any::<u64>()),
        what,
    )
        .prop_map(|(cpu, boot, time, what)| Item {
            cpu,
            boot,
            time,
            what,
        })
}

/// That every call is told of once and ended once, those of a task nested, and
/// that the counters agree with the events.
pub(crate) fn check_accounts(items: &[Item], events: &[Event<'_>], tally: &Tally) {
    let mut seen = HashSet::new();
    let mut stacks: HashMap<(i32, u16), Vec<u64>> = HashMap::new();
    let (mut closed, mut cut, mut leaves, mut uncalled) = (0, 0, 0, 0);
    let key = |task: &Task, cpu| (task.pid, if task.pid == 0 { cpu } else { 0 });
    for event in events {
        match &event.what {
            Happening::Open(call) => {
                assert!(seen.insert(call.id), "call {} is told of twice", call.id);
                stacks
                    .entry(key(&call.task, event.cpu))
                    .or_default()
                    .push(call.id);
            }
            Happening::Leaf(call, _) => {
                assert!(seen.insert(call.id), "call {} is told of twice", call.id);
                leaves += 1;
            }
            Happening::Close(close) => match (close.id, close.fit) {
                (None, Fit::Uncalled(_)) => uncalled += 1,
                (Some(id), Fit::Matched | Fit::OtherFunction(_) | Fit::OtherCaller(_)) => {
                    let stack = stacks.get_mut(&key(&close.task, event.cpu));
                    assert_eq!(stack.and_then(Vec::pop), Some(id), "calls of a task nest");
                    closed += 1;
                }
                other => panic!("{other:?} do not go together"),
            },
            Happening::Cut(call) => {
                let stack = stacks.get_mut(&key(&call.task, event.cpu));
                assert_eq!(
                    stack.and_then(Vec::pop),
                    Some(call.id),
                    "calls of a task nest"
                );
                cut += 1;
            }
            _ => {}
        }
    }
    assert!(stacks.values().all(Vec::is_empty), "calls are left open");
    let count = |which: fn(&What) -> bool| items.iter().filter(|i| which(&i.what)).count() as u64;
    assert_eq!(tally.calls, count(|what| matches!(what, What::Call(_))));
    assert_eq!(tally.calls, seen.len() as u64);
    assert_eq!(tally.calls, tally.closed + tally.cut.total());
    assert_eq!(tally.returns, count(|what| matches!(what, What::Return(_))));
    assert_eq!(tally.returns, tally.closed + tally.uncalled.total());
    assert_eq!(
        tally.forged.total(),
        count(|what| matches!(what, What::Forged(_)))
    );
    assert_eq!(
        tally.lost_places.total(),
        count(|what| matches!(what, What::Lost(_)))
    );
    assert_eq!(
        tally.other,
        count(|what| matches!(what, What::Other { .. }))
    );
    assert_eq!(tally.items, items.len() as u64);
    assert_eq!((tally.closed, tally.leaves), (closed + leaves, leaves));
    assert_eq!((tally.cut.total(), tally.uncalled.total()), (cut, uncalled));
    let listed: u64 = tally.roots_by.iter().map(|root| root.count).sum();
    assert_eq!(tally.roots, listed + tally.roots_not_listed);
}

pub(crate) fn run(items: &[Item], limits: Limits) -> (Vec<Event<'static>>, Tally) {
    let mut all = events(readable(items), &Table, limits);
    let told = all
        .by_ref()
        .map(|event| event.unwrap_or_else(|never| match never {}))
        .collect();
    (told, all.tally())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn every_call_of_any_items_is_accounted_for_once(items in prop::collection::vec(item(), 0..200)) {
        for limits in [SMALL, Limits::default()] {
            let (told, tally) = run(&items, limits);
            check_accounts(&items, &told, &tally);
        }
    }

    #[test]
    fn no_items_bring_control_characters_into_the_output(
        items in prop::collection::vec(item(), 0..60),
    ) {
        let folded = |weight, by_pid| Format::Folded { weight, by_pid };
        for format in [
            Format::Text(TimeColumn::Wall),
            Format::Text(TimeColumn::Guest),
            Format::Json,
            folded(Weight::OwnTime, false),
            folded(Weight::Calls, true),
        ] {
            let (text, _) = write(format, &items);
            for line in text.lines() {
                prop_assert!(!line.chars().any(char::is_control), "{line:?}");
                prop_assert!(line.len() < 4096, "{line:?}");
                if format == Format::Json {
                    let object: serde_json::Value = serde_json::from_str(line).expect("JSON");
                    prop_assert!(object["type"].is_string());
                }
            }
        }
    }

    /// Who watches live has calls settled at any time.
    #[test]
    fn settling_early_only_turns_leaves_into_calls(
        items in prop::collection::vec(item(), 0..100),
        pause in 1..5usize,
    ) {
        let mut flow = Flow::new(&Table, SMALL);
        let mut told = Vec::new();
        for (number, item) in items.iter().enumerate() {
            flow.push(item);
            if number % pause == 0 {
                flow.settle();
            }
            told.extend(std::iter::from_fn(|| flow.pop()));
        }
        flow.finish();
        told.extend(std::iter::from_fn(|| flow.pop()));
        check_accounts(&items, &told, &flow.tally());
        let (plain, _) = run(&items, SMALL);
        let unleafed = |told: &[Event<'_>]| told.iter().filter(|event| {
            !matches!(event.what, Happening::Close(_))
        }).count();
        prop_assert_eq!(unleafed(&plain), unleafed(&told));
    }
}
