//! What functions of the kernel's own call that others are attached through.
//!
//! ```text
//! ftrace_ops.func   fprobe_handler            -> fprobe.entry_handler, .exit_handler
//!                   klp_ftrace_handler        -> klp_ops.func_stack -> klp_func.new_func
//!                   function_trace_probe_call -> ftrace_func_probe.probe_ops -> func
//!                   call_direct_funcs         -> ftrace_ops.direct_call, direct_functions
//!                   ftrace_pid_func           -> ftrace_ops.saved_func
//! kprobe            kprobe_dispatcher         -> trace_kprobe.tp.event -> prog_array
//! kretprobe.rh, fprobe.rethook                -> rethook.handler, of rethook.data
//! ```
//!
//! That the function of a callback is the kernel's says nothing where it does no
//! more than call another one: a module that registers an fprobe, or a live patch,
//! never gives Ftrace a function of its own. So these are followed one step further,
//! each by the structure that the kernel keeps its callback in.
//!
//! A dispatcher whose structure is not described cannot be followed, and then it is
//! not known whom the kernel calls: that is a doubt, never nothing.

use super::view::{Obstacle, View, MAX_ENTRIES};
use crate::kernel::Gva;

/// What else is reached from a callback: what it is, where it stands, and the
/// function.
pub(super) type Callee = (&'static str, Gva, Gva);

/// What a callback calls that is to be limited to some tasks.
pub(super) const SAVED: &str = "saved function";
/// What is called instead of a callback.
pub(super) const CALLED_DIRECTLY: &str = "direct call";
/// What is called where functions return.
pub(super) const RETURNS: &str = "where functions return";
/// The functions of Ftrace's callbacks that call others.
const FPROBES: [&str; 2] = ["fprobe_handler", "fprobe_kprobe_handler"];
const LIVE_PATCH: &str = "klp_ftrace_handler";
const COMMAND: &str = "function_trace_probe_call";
const DIRECT: &str = "call_direct_funcs";
/// Callbacks of function_graph that call what is attached to fprobes
/// (kernel/trace/fprobe.c from 6.14 on), by lists that are not followed here.
const GRAPH_FPROBES: [&str; 3] = ["fprobe_entry", "fprobe_fgraph_entry", "fprobe_return"];
/// The functions of fprobes that run BPF programs (kernel/trace/bpf_trace.c).
const BPF_FPROBES: [&str; 2] = [
    "kprobe_multi_link_handler",
    "kprobe_multi_link_exit_handler",
];
/// Those of kprobes that belong to an event (kernel/trace/trace_kprobe.c), which BPF
/// programs can be attached to.
const KPROBE_EVENTS: [&str; 2] = ["kprobe_dispatcher", "kretprobe_dispatcher"];
/// Buckets of a table of Ftrace's: `FTRACE_HASH_MAX_BITS` is 12.
const MAX_BITS: u64 = 16;

/// Whom a callback of Ftrace's calls besides its function, which is `function`: `all` has
/// those that can be told, whatever is wrong with others.
pub(super) fn of_callback(
    view: &View<'_>,
    ops: Gva,
    function: Gva,
    all: &mut Vec<Callee>,
) -> Result<(), Obstacle> {
    let done = callees(view, ops, function, all);
    all.retain(|(_, _, to)| to.0 != 0 && *to != function);
    done
}

fn callees(
    view: &View<'_>,
    ops: Gva,
    function: Gva,
    all: &mut Vec<Callee>,
) -> Result<(), Obstacle> {
    let is = |name: &str| view.is_one_of(function, &[name]);
    // What it is called with once it is to be limited to some tasks.
    let saved = field(view, "ftrace_ops", "saved_func")?;
    all.push(callee(view, SAVED, ops, saved)?);
    if view.is_one_of(function, &FPROBES) {
        let fprobe = Gva(ops.0.wrapping_sub(field(view, "fprobe", "ops")?));
        for (what, name) in [
            ("entry of an fprobe", "entry_handler"),
            ("return of an fprobe", "exit_handler"),
        ] {
            all.push(callee(view, what, fprobe, field(view, "fprobe", name)?)?);
        }
        // Where functions return to that it waits for: its own handler, through this.
        if let Ok(rethook) = field(view, "fprobe", "rethook") {
            let exit = field(view, "fprobe", "exit_handler")?;
            let (_, _, rethook) = callee(view, "", fprobe, rethook)?;
            let returns = (fprobe, exit, "fprobe_exit_handler");
            all.extend(led_astray(view, rethook, returns)?);
        }
    } else if is(LIVE_PATCH) {
        let klp = Gva(ops.0.wrapping_sub(field(view, "klp_ops", "fops")?));
        let stack = klp.wrapping_add(field(view, "klp_ops", "func_stack")?);
        let node = view.btf()?.structure("klp_func")?.field("stack_node")?;
        let function = field(view, "klp_func", "new_func")?;
        view.each(stack, node.offset, "a live patch", |patch| {
            all.push(callee(view, "live patch", patch, function)?);
            Ok(())
        })?;
    } else if is(COMMAND) {
        let probe = Gva(ops.0.wrapping_sub(field(view, "ftrace_func_probe", "ops")?));
        let at = field(view, "ftrace_func_probe", "probe_ops")?;
        let (_, _, command) = callee(view, "", probe, at)?;
        let function = field(view, "ftrace_probe_ops", "func")?;
        all.push(callee(view, "command", command, function)?);
    } else if is(DIRECT) {
        // Before 6.4 only the table says it.
        if let Ok(at) = field(view, "ftrace_ops", "direct_call") {
            all.push(callee(view, CALLED_DIRECTLY, ops, at)?);
        }
    }
    Ok(())
}

/// Whom a `struct rethook` calls where functions return, but for what it is to call:
/// `handler`, for `of`, whose own function stands at `offset`
/// (kernel/trace/rethook.c).
pub(super) fn led_astray(
    view: &View<'_>,
    rethook: Gva,
    (of, offset, handler): (Gva, u64, &str),
) -> Result<Vec<Callee>, Obstacle> {
    let mut all = Vec::new();
    if rethook.0 == 0 {
        return Ok(all);
    }
    let called = callee(view, RETURNS, rethook, field(view, "rethook", "handler")?)?;
    // It has none once it is to be freed.
    if called.2 .0 == 0 {
        return Ok(all);
    }
    if !view.is_one_of(called.2, &[handler]) {
        all.push(called);
    }
    let (_, _, data) = callee(view, "", rethook, field(view, "rethook", "data")?)?;
    if data != of {
        all.push(callee(view, "return of another probe", data, offset)?);
    }
    Ok(all)
}

/// A function that is called where another one begins.
pub(super) struct DirectCall {
    /// Where that one calls.
    pub(super) from: Gva,
    /// Where the table has the function.
    pub(super) at: Gva,
    /// The function.
    pub(super) to: Gva,
}

/// The functions that are called directly where other functions begin
/// (`direct_functions`, kernel/trace/ftrace.c), as far as they can be read.
pub(super) fn direct(view: &View<'_>, all: &mut Vec<DirectCall>) -> Result<(), Obstacle> {
    const WHAT: &str = "the table of Ftrace's direct calls";
    let Ok(table) = view.address("direct_functions") else {
        return Ok(());
    };
    let table = view.pointer(table, WHAT)?;
    let (ip, direct) = (
        field(view, "ftrace_func_entry", "ip")?,
        field(view, "ftrace_func_entry", "direct")?,
    );
    entries(view, table, WHAT, &mut |entry| {
        let (_, at, to) = callee(view, "", entry, direct)?;
        let from = view.pointer(entry.wrapping_add(ip), WHAT)?;
        all.push(DirectCall { from, at, to });
        Ok(())
    })
}

/// Where the functions begin that a callback is called for: those of its
/// `func_hash->filter_hash`. Without any, it is called for all.
pub(super) fn called_for(view: &View<'_>, ops: Gva) -> Result<Vec<Gva>, Obstacle> {
    const WHAT: &str = "the functions of a callback of Ftrace's";
    let hash = view.pointer(
        ops.wrapping_add(field(view, "ftrace_ops", "func_hash")?),
        WHAT,
    )?;
    let filter = field(view, "ftrace_ops_hash", "filter_hash")?;
    let table = view.pointer(hash.wrapping_add(filter), WHAT)?;
    let ip = field(view, "ftrace_func_entry", "ip")?;
    let mut all = Vec::new();
    entries(view, table, WHAT, &mut |entry| {
        all.push(view.pointer(entry.wrapping_add(ip), WHAT)?);
        Ok(())
    })?;
    Ok(all)
}

/// Gives each entry of a `struct ftrace_hash`.
fn entries(
    view: &View<'_>,
    table: Gva,
    what: &'static str,
    each: &mut dyn FnMut(Gva) -> Result<(), Obstacle>,
) -> Result<(), Obstacle> {
    let bits = field(view, "ftrace_hash", "size_bits")?;
    let bits = view.pointer(table.wrapping_add(bits), what)?.0;
    let buckets = field(view, "ftrace_hash", "buckets")?;
    let buckets = view.pointer(table.wrapping_add(buckets), what)?;
    let node = field(view, "ftrace_func_entry", "hlist")?;
    if bits > MAX_BITS {
        return Err(Obstacle::Endless(what));
    }
    let mut seen = 0;
    // The empty one has no buckets.
    let count = if buckets.0 == 0 { 0 } else { 1 << bits };
    for bucket in 0..count {
        let mut at = view.pointer(buckets.wrapping_add(8 * bucket), what)?;
        while at.0 != 0 {
            if seen >= MAX_ENTRIES {
                return Err(Obstacle::Endless(what));
            }
            seen += 1;
            each(Gva(at.0.wrapping_sub(node)))?;
            at = view.pointer(at, what)?;
        }
    }
    Ok(())
}

/// Whether a function of an fprobe's runs BPF programs.
pub(super) fn runs_bpf(view: &View<'_>, function: Gva) -> bool {
    view.is_one_of(function, &BPF_FPROBES)
}

/// Whether a callback of function_graph's calls others that are not followed.
pub(super) fn hides_fprobes(view: &View<'_>, function: Gva) -> bool {
    view.is_one_of(function, &GRAPH_FPROBES)
}

/// Whether a BPF program is attached to the event that a kprobe belongs to. `kprobe`
/// is its `struct kprobe`, and `handler` one of its functions.
pub(super) fn kprobe_runs_bpf(
    view: &View<'_>,
    kprobe: Gva,
    handler: Gva,
) -> Result<bool, Obstacle> {
    const WHAT: &str = "the event of a kprobe";
    if !view.is_one_of(handler, &KPROBE_EVENTS) {
        return Ok(false);
    }
    let within = field(view, "trace_kprobe", "rp.kp")?;
    let event = field(view, "trace_kprobe", "tp.event")?;
    let at = Gva(kprobe.0.wrapping_sub(within)).wrapping_add(event);
    let event = view.pointer(at, WHAT)?;
    event_runs_bpf(
        view,
        event.wrapping_add(field(view, "trace_probe_event", "call")?),
    )
}

/// The same of an event, a `struct trace_event_call`: the first of its programs.
pub(super) fn event_runs_bpf(view: &View<'_>, call: Gva) -> Result<bool, Obstacle> {
    const WHAT: &str = "the BPF programs of an event";
    // Of a kernel without perf or BPF.
    let Ok(programs) = field(view, "trace_event_call", "prog_array") else {
        return Ok(false);
    };
    let programs = view.pointer(call.wrapping_add(programs), WHAT)?;
    if programs.0 == 0 {
        return Ok(false);
    }
    let first = field(view, "bpf_prog_array", "items")?;
    Ok(view.pointer(programs.wrapping_add(first), WHAT)?.0 != 0)
}

fn field(view: &View<'_>, structure: &str, path: &str) -> Result<u64, Obstacle> {
    let field = view.btf()?.structure(structure)?.field(path)?;
    Ok(field.offset.into())
}

fn callee(view: &View<'_>, what: &'static str, of: Gva, offset: u64) -> Result<Callee, Obstacle> {
    let at = of.wrapping_add(offset);
    Ok((what, at, view.pointer(at, "what a callback calls")?))
}
