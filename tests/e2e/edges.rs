//! The host's trace against the guest's own: two records of the same program
//! have to tell of the same calls.

use std::collections::BTreeMap;
use std::time::Duration;

use xftrace::callflow::{events, Edge, Edges, Happening, Kernels, Limits};
use xftrace::session::Session;
use xftrace_lab::Job;

use crate::traced::Traced;

/// How often the program opens, reads and closes.
const ROUNDS: u64 = 1_000;
/// What a program comes to by chance, each with why: calls of these, and what
/// they call, are left out of both traces.
const CHANCE: [(&str, &str); 8] = [
    (
        "__cond_resched",
        "gives the CPU away, where a task waits for it",
    ),
    (
        "__traceiter_sched_switch",
        "has what set_ftrace_pid hangs there",
    ),
    ("__mark_inode_dirty", "does less where it is dirty already"),
    ("folio_activate", "is for pages that are on a list by then"),
    (
        "___slab_alloc",
        "gets new objects, when the CPU's own are used up",
    ),
    (
        "__slab_free",
        "gives objects back to another slab than the CPU's",
    ),
    (
        "rmqueue_bulk",
        "gets new pages, when the CPU's own are used up",
    ),
    (
        "free_pcppages_bulk",
        "gives pages back, when the CPU has many",
    ),
];
/// Longer than the program, or the guest's look through its trace, can take.
const SOON: Duration = Duration::from_secs(120);

/// What the guest does to trace one process itself. The buffer holds all of it.
const SET_UP: &str = "cd /sys/kernel/tracing && echo 65536 > per_cpu/cpu0/buffer_size_kb && \
    echo __x64_sys_openat __x64_sys_read > set_graph_function && \
    echo $PID > set_ftrace_pid && echo function_graph > current_tracer";

/// What the guest makes of its trace: a line for each edge, with its count.
/// Nesting shows in it by two blanks a level. What an interrupt calls is left
/// out, from the functions that interrupt entry code calls (which is not
/// traced itself, see run_sysvec_on_irqstack_cond() in
/// arch/x86/include/asm/irq_stack.h) down to all below them; and so is what is
/// a matter of [`CHANCE`].
const COUNT: &str = r#"cd /sys/kernel/tracing && echo 0 > tracing_on &&
    { grep -q '^overrun: 0$' per_cpu/cpu0/stats || { cat per_cpu/cpu0/stats; exit 1; }; } && awk -F'[|]' '
    /^#/ || NF < 2 { next }
    { match($2, /[^ ]/); depth = (RSTART - 3) / 2; name = substr($2, RSTART) }
    name !~ /^[A-Za-z_]/ { next }
    { sub(/\(.*/, "", name); path[depth] = name }
    irq != "" && depth <= irq { irq = "" }
    irq == "" && name ~ /^(irq_enter_rcu|irq_exit_rcu|__sysvec_|__common_interrupt)/ { irq = depth }
    irq == "" && name ~ /^($CHANCE)$/ { irq = depth }
    irq == "" && depth > 0 { count[path[depth - 1] " " name]++ }
    END { for (edge in count) print count[edge], edge }' trace"#;

/// Compared are the edges of the program's own calls, those of interrupts and
/// what is named in [`CHANCE`] apart: all of them are in both traces, and what
/// the program does in each round it does equally often in both.
#[test]
fn the_guests_own_trace_has_the_same_edges() {
    let guest = Traced::start_alone("edges");

    let mut program = start(&guest);
    let pid = program.pid();
    guest.on(&["sys_openat", "sys_read"]);
    finish(&mut program);
    let keyed = edges_of(&guest.off(), pid);

    let mut program = start(&guest);
    let set_up = SET_UP.replace("$PID", &program.pid().to_string());
    guest.run(&set_up).unwrap().success().unwrap();
    finish(&mut program);
    let chance: Vec<&str> = CHANCE.iter().map(|(name, _)| *name).collect();
    let count = COUNT
        .replace('\n', " ")
        .replace("$CHANCE", &chance.join("|"));
    let lines = guest.run_for(&count, SOON).unwrap();
    let own = parse(&lines.success().unwrap());

    let each_round = |edges: &BTreeMap<Edge, u64>| -> BTreeMap<Edge, u64> {
        // To the nearest: a preemption takes the place of a call now and then.
        let times = |(edge, count): (&Edge, &u64)| (edge.clone(), (count + ROUNDS / 2) / ROUNDS);
        let every = edges.iter().map(times).filter(|&(_, times)| times > 0);
        every.collect()
    };
    let rounds = each_round(&keyed);
    assert_eq!(rounds, each_round(&own));
    for edge in ["ksys_read vfs_read", "do_sys_openat2 do_filp_open"] {
        let (from, to) = edge.split_once(' ').expect("two names");
        assert_eq!(rounds.get(&(from.to_owned(), to.to_owned())), Some(&1));
    }
    let only = |one: &BTreeMap<Edge, u64>, other: &BTreeMap<Edge, u64>| -> Vec<String> {
        let edges = one.iter().filter(|(edge, _)| !other.contains_key(edge));
        let line = |((from, to), count): (&Edge, &u64)| format!("{from} -> {to}, {count} times");
        edges.map(line).collect()
    };
    println!(
        "{} edges in ours, {} in the guest's",
        keyed.len(),
        own.len()
    );
    let (ours, theirs) = (only(&keyed, &own), only(&own, &keyed));
    assert!(
        ours.is_empty() && theirs.is_empty(),
        "only in ours {ours:#?}, only in the guest's {theirs:#?}"
    );
}

/// The program, waiting for its start. It stays on one CPU: what the guest
/// shows as its trace is merged by the clocks of all of them.
fn start(guest: &Traced) -> Job {
    let command = format!("exec taskset 1 rwloop -w {ROUNDS}");
    let mut program = guest.spawn(&command).unwrap();
    let pid = program.line(SOON).unwrap();
    assert_eq!(pid, Some(format!("pid {}", program.pid())));
    program
}

fn finish(program: &mut Job) {
    program.send_line("go").unwrap();
    program.wait(SOON).unwrap().success().unwrap();
}

/// The edges of a task's calls in a session.
fn edges_of(session: &Session, pid: u32) -> BTreeMap<Edge, u64> {
    let names = Kernels::of(session).expect("its symbols");
    let mut edges = Edges::new(&names, 100_000);
    // How deep the call lies whose doing is chance.
    let mut chance: Option<u16> = None;
    for event in events(session.items(), &names, Limits::default()) {
        let event = event.expect("an event");
        let (Happening::Open(call) | Happening::Leaf(call, _)) = &event.what else {
            continue;
        };
        if call.task.pid != pid as i32 {
            continue;
        }
        chance = chance.filter(|&depth| call.depth > depth);
        let name = call.func.entered();
        if chance.is_none() && CHANCE.iter().any(|(chance, _)| name == Some(*chance)) {
            chance = Some(call.depth);
        }
        if chance.is_none() {
            edges.note(&event);
        }
    }
    assert_eq!(edges.dropped(), 0);
    edges.tasks()
}

/// The edges in the lines that [`COUNT`] prints.
fn parse(lines: &str) -> BTreeMap<Edge, u64> {
    let edge = |line: &str| {
        let mut words = line.split(' ').map(str::to_owned);
        let count = words.next()?.parse().ok()?;
        Some(((words.next()?, words.next()?), count))
    };
    let edges = lines.lines().map(edge).collect::<Option<_>>();
    edges.unwrap_or_else(|| panic!("no edges with their counts:\n{lines}"))
}
