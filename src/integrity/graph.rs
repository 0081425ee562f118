//! function_graph's own callbacks: whom it calls where a function begins and where
//! it returns.
//!
//! ```text
//! up to 6.10     ftrace_graph_entry, ftrace_graph_return       (variables)
//! from 6.11 on   fgraph_array -> fgraph_ops.entryfunc, .retfunc, .saved_func
//!                static calls fgraph_func, fgraph_retfunc      (where there is only one)
//! ```
//!
//! Whoever is called there may change what the kernel says of itself, so that it is a
//! function of the kernel's is not enough: one that ends at once has a kernel report
//! nothing. It must be one of those few that kernels have for it.

use super::dispatch;
use super::finding::{Check, Finding, Report};
use super::owner::Owners;
use super::text::jump;
use super::view::{Obstacle, View};
use crate::kernel::Gva;

/// FGRAPH_ARRAY_SIZE, kernel/trace/fgraph.c from 6.11 on.
const GRAPHS: u64 = 16;
const WHAT: &str = "a callback of function_graph's";
/// What kernels have function_graph call at the beginning (kernel/trace/fgraph.c,
/// ftrace.c, trace_functions_graph.c, trace_irqsoff.c, trace_sched_wakeup.c, and the
/// tests in trace_selftest.c),
const ENTRIES: [&str; 12] = [
    "ftrace_graph_entry_stub",
    "ftrace_graph_entry_test",
    "trace_graph_entry",
    "trace_graph_entry_watchdog",
    "profile_graph_entry",
    "irqsoff_graph_entry",
    "wakeup_graph_entry",
    "entry_run",
    "fgraph_pid_func",
    "store_entry",
    "fprobe_entry",
    "fprobe_fgraph_entry",
];
/// and at the end.
const RETURNS: [&str; 11] = [
    "ftrace_stub",
    "ftrace_stub_graph",
    "ftrace_graph_ret_stub",
    "trace_graph_return",
    "trace_graph_thresh_return",
    "profile_graph_return",
    "irqsoff_graph_return",
    "wakeup_graph_return",
    "return_run",
    "store_return",
    "fprobe_return",
];
/// The variables and static calls, and which of the two each is for.
const VARIABLES: [(&str, &[&str]); 5] = [
    ("ftrace_graph_entry", &ENTRIES),
    ("__ftrace_graph_entry", &ENTRIES),
    ("ftrace_graph_return", &RETURNS),
    ("__SCK__fgraph_func", &ENTRIES),
    ("__SCK__fgraph_retfunc", &RETURNS),
];
/// Where static calls go that are not made where they stand.
const TRAMPOLINES: [(&str, &[&str]); 2] = [
    ("__SCT__fgraph_func", &ENTRIES),
    ("__SCT__fgraph_retfunc", &RETURNS),
];

/// Looks at whom function_graph calls.
pub(super) fn callbacks(
    view: &View<'_>,
    owners: &Owners,
    report: &mut Report,
    looked_at: &mut u64,
) -> Result<(), Obstacle> {
    let mut all = Vec::new();
    for (name, known) in VARIABLES {
        if let Ok(at) = view.address(name) {
            all.push((name.to_owned(), at, view.pointer(at, WHAT)?, known));
        }
    }
    for (name, known) in TRAMPOLINES {
        if let Ok(at) = view.address(name) {
            let code = view.bytes(at, 5, WHAT)?;
            let to = jump(at.0, &code).map(|jump| Gva(jump.target));
            all.extend(to.map(|to| (name.to_owned(), at, to, known)));
        }
    }
    if let Ok(array) = view.address("fgraph_array") {
        let layout = view.btf()?.structure("fgraph_ops")?;
        let (entry, exit) = (layout.field("entryfunc")?, layout.field("retfunc")?);
        // Whom `fgraph_pid_func` calls on (fgraph_update_pid_func(), kernel/trace/fgraph.c),
        // which each has from its registration on.
        let saved = layout.field("saved_func").ok();
        for index in 0..GRAPHS {
            let ops = view.pointer(array.wrapping_add(8 * index), WHAT)?;
            if ops.0 == 0 {
                continue;
            }
            let both: [(_, &[&str]); 2] = [(entry, &ENTRIES), (exit, &RETURNS)];
            let saved = saved.map(|saved| (saved, &ENTRIES[..]));
            for (field, known) in both.into_iter().chain(saved) {
                let at = ops.wrapping_add(field.offset.into());
                all.push((view.name(ops), at, view.pointer(at, WHAT)?, known));
            }
        }
    }
    let mut hidden = None;
    for (name, at, function, known) in all {
        *looked_at += 1;
        if dispatch::hides_fprobes(view, function) {
            hidden = Some(Obstacle::Unfollowed("fprobes of function_graph's"));
        }
        if function.0 == 0 || view.is_one_of(function, known) {
            continue;
        }
        report.add(Finding {
            check: Check::Ftrace,
            place: format!("function_graph's callback {name}"),
            address: at.0,
            expected: "one of the kernel's own for function_graph".to_owned(),
            found: view.name(function),
            owner: Some(owners.owner(view, function).to_string()),
        });
    }
    hidden.map_or(Ok(()), Err)
}
