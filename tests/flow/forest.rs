//! Any calls that nest come out as they went in, whichever CPUs they ran on.

use proptest::prelude::*;
use xftrace::callflow::{Event, Fit, Happening, Limits};
use xftrace::kernel::Gva;
use xftrace::output::{Format, TimeColumn, Weight};
use xftrace::ring::record::{Item, What};

use crate::dsl::{address, Story};
use crate::props::{check_accounts, run};
use crate::write;

/// The functions of the forest.
const FUNCTIONS: [&str; 5] = [
    "ksys_read",
    "vfs_read",
    "rw_verify_area",
    "getname",
    "do_sys_openat2",
];

/// A call with the calls below it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Tree {
    func: &'static str,
    below: Vec<Tree>,
}

fn tree() -> impl Strategy<Value = Tree> {
    let func = prop::sample::select(FUNCTIONS.to_vec());
    let leaf = func.clone().prop_map(|func| Tree {
        func,
        below: Vec::new(),
    });
    leaf.prop_recursive(5, 20, 4, move |inner| {
        (func.clone(), prop::collection::vec(inner, 0..4))
            .prop_map(|(func, below)| Tree { func, below })
    })
}

/// What a task does next.
#[derive(Clone, Copy)]
enum Step {
    Call(&'static str),
    Return,
}

fn steps(trees: &[Tree], into: &mut Vec<Step>) {
    for tree in trees {
        into.push(Step::Call(tree.func));
        steps(&tree.below, into);
        into.push(Step::Return);
    }
}

/// Which task runs, where, and for how many steps.
pub(crate) type Turn = (usize, u16, usize);

/// Plays the trees of four tasks on three CPUs; `turns` says which task runs
/// next, where, and for how many steps; `interrupts`, over and over, which of
/// the steps an interrupt delays.
pub(crate) fn play(forest: &[Vec<Tree>], turns: &[Turn], interrupts: &[bool]) -> Vec<Item> {
    const NAMES: [&str; 4] = ["one", "two", "three", "four"];
    let mut left: Vec<_> = forest
        .iter()
        .map(|trees| {
            let mut all = Vec::new();
            steps(trees, &mut all);
            all.into_iter()
        })
        .collect();
    let rest = (0..left.len()).map(|task| (task, task as u16, usize::MAX));
    let mut interrupts = interrupts.iter().copied().cycle();
    let mut story = Story::new();
    for (task, cpu, most) in turns.iter().copied().chain(rest) {
        for step in left[task].by_ref().take(most) {
            story.on(cpu, task as i32 + 1, NAMES[task]);
            let interrupted = interrupts.next().unwrap_or(false);
            match step {
                Step::Call(_) if interrupted => story.interrupt_at(story.depth() + 1),
                Step::Return if interrupted => story.interrupt_at(story.depth() - 1),
                _ => &mut story,
            };
            match step {
                Step::Call(func) => story.call(func),
                Step::Return => story.ret(),
            };
        }
    }
    story.items
}

/// The functions that interrupts call.
const OF_INTERRUPTS: [&str; 3] = ["irq_enter_rcu", "handle_irq", "tick_handle"];

/// Whether this is of what a task did itself.
fn of_task(event: &Event<'_>) -> bool {
    let func = match &event.what {
        Happening::Open(call) | Happening::Leaf(call, _) => call.func,
        Happening::Close(closed) => closed.func,
        Happening::Switch { .. } | Happening::IrqEnter(_) | Happening::IrqLeave(_) => return false,
        other => panic!("{other:?} in a sound trace"),
    };
    let of_interrupt = OF_INTERRUPTS
        .iter()
        .any(|name| address(name) == func.address);
    if let Happening::Open(call) | Happening::Leaf(call, _) = &event.what {
        assert_eq!(call.interrupt, of_interrupt, "{call:?}");
    }
    !of_interrupt
}

/// The trees of each task, put together again from events.
fn rebuild(told: &[Event<'_>], tasks: usize) -> Vec<Vec<Tree>> {
    let mut open: Vec<Vec<Tree>> = vec![
        vec![Tree {
            func: "",
            below: Vec::new()
        }];
        tasks
    ];
    let name = |func: Gva| {
        *FUNCTIONS
            .iter()
            .find(|name| address(name) == func)
            .expect("a function of the forest")
    };
    for event in told.iter().filter(|event| of_task(event)) {
        match &event.what {
            Happening::Open(call) => {
                let func = name(call.func.address);
                open[call.task.pid as usize - 1].push(Tree {
                    func,
                    below: Vec::new(),
                });
            }
            Happening::Leaf(call, _) => {
                let func = name(call.func.address);
                let around = open[call.task.pid as usize - 1]
                    .last_mut()
                    .expect("the bottom");
                around.below.push(Tree {
                    func,
                    below: Vec::new(),
                });
            }
            Happening::Close(closed) => {
                assert_eq!(closed.fit, Fit::Matched);
                let stack = &mut open[closed.task.pid as usize - 1];
                let tree = stack.pop().expect("an open call");
                assert_eq!(address(tree.func), closed.func.address);
                stack.last_mut().expect("the bottom").below.push(tree);
            }
            _ => unreachable!("tasks do nothing else"),
        }
    }
    open.into_iter()
        .map(|mut stack| stack.swap_remove(0).below)
        .collect()
}

/// What the text shows of each task: its calls and returns.
fn read_text(text: &str, task: &str) -> Vec<String> {
    let mine = text
        .lines()
        .filter(|line| !line.starts_with('#') && line.contains(task))
        .filter(|line| {
            !line.contains("=====") && !OF_INTERRUPTS.iter().any(|of| line.contains(of))
        });
    mine.filter_map(|line| line.split_once(" |  ")?.1.rsplit_once("|  "))
        .map(|(_, shown)| {
            shown
                .split(" /* called")
                .next()
                .unwrap_or_default()
                .to_owned()
        })
        .collect()
}

fn expect_text(trees: &[Tree], depth: usize, items: &[String], at: &mut usize) {
    let indent = "  ".repeat(depth);
    for tree in trees {
        let shown = items.get(*at).map_or("nothing", String::as_str);
        *at += 1;
        if shown == format!("{indent}{}();", tree.func) {
            assert!(tree.below.is_empty());
            continue;
        }
        assert_eq!(shown, format!("{indent}{}() {{", tree.func));
        expect_text(&tree.below, depth + 1, items, at);
        let shown = items.get(*at).map_or("nothing", String::as_str);
        *at += 1;
        assert_eq!(shown, format!("{indent}}} /* {} */", tree.func));
    }
}

/// Some calls for each of four tasks, and turns to play them in.
pub(crate) fn forest() -> impl Strategy<Value = (Vec<Vec<Tree>>, Vec<Turn>)> {
    let trees = prop::collection::vec(prop::collection::vec(tree(), 0..5), 4);
    (
        trees,
        prop::collection::vec((0..4usize, 0..3u16, 1..6usize), 0..80),
    )
}

/// Checks what holds with and without interrupts; gives the events.
fn check_forest(forest: &[Vec<Tree>], items: &[Item]) -> Vec<Event<'static>> {
    let (told, tally) = run(items, Limits::default());
    check_accounts(items, &told, &tally);
    assert_eq!(rebuild(&told, 4), forest);
    assert_eq!(
        (tally.cut.total(), tally.uncalled.total(), tally.gaps),
        (0, 0, 0)
    );
    assert_eq!((tally.other_function, tally.other_caller), (0, 0));
    assert!(told.iter().map(|event| event.time).is_sorted());

    // A leaf is a call whose return is next, on its CPU and of its task.
    let pid = |item: &Item| match item.what {
        What::Call(call) => call.task.pid,
        What::Return(ret) => ret.task.pid,
        _ => unreachable!("a forest has nothing else"),
    };
    let leaf = |(at, item): (usize, &Item)| {
        let mut later = items[at + 1..].iter();
        let on_cpu = later.clone().find(|next| next.cpu == item.cpu);
        let of_task = later.find(|next| pid(next) == pid(item));
        matches!(item.what, What::Call(_))
            && on_cpu.is_some_and(|next| matches!(next.what, What::Return(_)))
            && on_cpu.zip(of_task).is_some_and(|(a, b)| std::ptr::eq(a, b))
    };
    let leaves = items.iter().enumerate().filter(|at| leaf(*at)).count() as u64;
    assert_eq!(tally.leaves, leaves);

    let (text, _) = write(Format::Text(TimeColumn::Wall), items);
    for (task, trees) in ["one-1 ", "two-2 ", "three-3 ", "four-4 "]
        .iter()
        .zip(forest)
    {
        let shown = read_text(&text, task);
        let mut at = 0;
        expect_text(trees, 0, &shown, &mut at);
        assert_eq!(at, shown.len());
    }
    told
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn a_forest_comes_out_as_it_went_in((forest, turns) in forest()) {
        let items = play(&forest, &turns, &[]);
        let told = check_forest(&forest, &items);

        // Own times add up to those of the roots.
        let roots: u64 = told.iter().map(|event| match &event.what {
            Happening::Leaf(call, spent) if call.depth == 0 => spent.total.unwrap_or(0),
            Happening::Close(closed) if closed.depth == 0 => closed.spent.total.unwrap_or(0),
            _ => 0,
        }).sum();
        let (folded, _) = write(Format::Folded { weight: Weight::OwnTime, by_pid: true }, &items);
        let own = folded.lines().filter_map(|line| line.rsplit_once(' ')?.1.parse::<u64>().ok());
        prop_assert_eq!(own.sum::<u64>(), roots);
    }

    /// The kernel lets interrupts in between what it does and what it records.
    #[test]
    fn interrupts_amid_recording_do_not_disturb_a_forest(
        (forest, turns) in forest(),
        interrupts in prop::collection::vec(prop::bool::weighted(0.3), 1..20),
    ) {
        check_forest(&forest, &play(&forest, &turns, &interrupts));
    }
}
