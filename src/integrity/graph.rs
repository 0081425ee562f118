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
use super::ftrace::Callback;
use super::known::Role;
use super::text::jump;
use super::view::{Obstacle, View};
use crate::kernel::Gva;

/// FGRAPH_ARRAY_SIZE, kernel/trace/fgraph.c from 6.11 on.
const GRAPHS: u64 = 16;
const WHAT: &str = "a callback of function_graph's";
/// The variables and static calls, and which of the two each is for.
const VARIABLES: [(&str, Role); 5] = [
    ("ftrace_graph_entry", Role::GraphEntry),
    ("__ftrace_graph_entry", Role::GraphEntry),
    ("ftrace_graph_return", Role::GraphReturn),
    ("__SCK__fgraph_func", Role::GraphEntry),
    ("__SCK__fgraph_retfunc", Role::GraphReturn),
];
/// Where static calls go that are not made where they stand.
const TRAMPOLINES: [(&str, Role); 2] = [
    ("__SCT__fgraph_func", Role::GraphEntry),
    ("__SCT__fgraph_retfunc", Role::GraphReturn),
];

/// Whom function_graph calls, and whether any of them calls others that are not followed.
pub(super) fn callbacks(view: &View<'_>) -> Result<(Vec<Callback>, Option<Obstacle>), Obstacle> {
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
            let both: [(_, Role); 2] = [(entry, Role::GraphEntry), (exit, Role::GraphReturn)];
            let saved = saved.map(|saved| (saved, Role::GraphEntry));
            for (field, known) in both.into_iter().chain(saved) {
                let at = ops.wrapping_add(field.offset.into());
                all.push((view.name(ops), at, view.pointer(at, WHAT)?, known));
            }
        }
    }
    let hides = |(_, _, function, _): &(_, _, Gva, _)| dispatch::hides_fprobes(view, *function);
    let hidden = all.iter().any(hides);
    let hidden = hidden.then_some(Obstacle::Unfollowed("fprobes of function_graph's"));
    let callbacks = all.into_iter().map(|(name, at, function, role)| Callback {
        place: format!("function_graph's callback {name}"),
        at,
        function,
        how: "",
        role,
    });
    Ok((callbacks.collect(), hidden))
}
