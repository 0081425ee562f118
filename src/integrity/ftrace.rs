//! Ftrace: whom it calls where functions begin, and through what.
//!
//! ```text
//! function --call--> trampoline --call--> ftrace_ops.func
//!                    (the kernel's own, or one made for these ops)
//! ```
//!
//! Where functions call is known from the comparison of the text. It must be one
//! of the kernel's own entries, the trampoline of registered ops, or that of a BPF
//! program; what a trampoline calls, and every registered callback, must be the
//! kernel's own. A callback in a module is a finding whoever's module it is: it
//! can change where any function goes (`FTRACE_OPS_FL_IPMODIFY`). So is one of the
//! kernel's that it does not register itself (`known.rs`) a doubt. Where the
//! callback is a function of the kernel's that calls others (`dispatch.rs`), the
//! same holds for these.

use std::collections::{HashMap, HashSet};

use super::dispatch::{self, Callee};
use super::finding::{Check, Finding, Report};
use super::known::{self, Role};
use super::owner::{ftrace_ops, ftrace_trampolines, Owner, Owners, Trampoline};
use super::text::{jump, TextReport, CALL};
use super::trampoline;
use super::view::{go_on, Obstacle, View};
use crate::kernel::Gva;

/// `FTRACE_OPS_FL_IPMODIFY`, include/linux/ftrace.h.
const IPMODIFY: u64 = 1 << 13;
/// Where the kernel's own entries of Ftrace call (arch/x86/kernel/ftrace_64.S).
const CALLS: [&str; 2] = ["ftrace_call", "ftrace_regs_call"];
const WHAT: &str = "a callback of Ftrace's";

/// Looks at Ftrace; `text` is what the comparison of the kernel's text came to.
pub(super) fn callbacks(
    view: &View<'_>,
    owners: &Owners,
    text: Option<&TextReport>,
    report: &mut Report,
) {
    if view.symbols.address("ftrace_ops_list").is_none() {
        report.done(Check::Ftrace, 0, None);
        return;
    }
    let mut looked_at = 0;
    let mut doubts = Vec::new();
    if let Err(error) = registered(view, owners, report, &mut looked_at, &mut doubts) {
        doubts.push(error.to_string());
    }
    match super::graph::callbacks(view) {
        Ok((all, doubt)) => {
            doubts.extend(doubt.map(|doubt| doubt.to_string()));
            for callback in all {
                looked_at += 1;
                judge(view, owners, report, &mut doubts, callback);
            }
        }
        Err(error) => doubts.push(error.to_string()),
    }
    match text {
        Some(text) => called(view, owners, text, report),
        None => doubts.push("the kernel's text was not compared".to_owned()),
    }
    report.done(Check::Ftrace, looked_at, doubts.into_iter().next());
}

/// A function that is called back.
pub(super) struct Callback {
    /// What is told of it.
    pub(super) place: String,
    /// Where it stands.
    pub(super) at: Gva,
    pub(super) function: Gva,
    /// What else is to be said of the function.
    pub(super) how: &'static str,
    pub(super) role: Role,
}

/// Judges a callback by whose it is, and the kernel's own by its name. Without a
/// function, nothing is called.
fn judge(
    view: &View<'_>,
    owners: &Owners,
    report: &mut Report,
    doubts: &mut Vec<String>,
    callback: Callback,
) {
    let Callback {
        place,
        function,
        how,
        ..
    } = callback;
    if function.0 == 0 {
        return;
    }
    let owner = owners.owner(view, function);
    let own = matches!(owner, Owner::Kernel(_));
    let bpf = dispatch::runs_bpf(view, function);
    if own && callback.role.has(view, function) {
        report.note(format!("{place} calls {}{how}", view.name(function)));
        return;
    }
    // Of these all are known.
    let certain = matches!(
        callback.role,
        Role::AllFunctions | Role::GraphEntry | Role::GraphReturn | Role::Return
    );
    if own && !bpf && !certain {
        doubts.push(known::unknown(view, &place, function));
        return;
    }
    let expected = match callback.role {
        Role::AllFunctions => "a registered callback, or what calls all of them",
        Role::GraphEntry | Role::GraphReturn => "one of the kernel's own for function_graph",
        Role::Return => "what the kernel has fprobes called by",
        _ => "a function of the kernel's",
    };
    let owner = if bpf {
        "a BPF program".to_owned()
    } else {
        owner.to_string()
    };
    report.add(Finding {
        check: Check::Ftrace,
        place,
        address: callback.at.0,
        expected: expected.to_owned(),
        found: format!("{}{how}", view.name(function)),
        owner: Some(owner),
    });
}

/// The registered callbacks, whom these call further on, and what their trampolines
/// call. One that cannot be followed leaves the others.
fn registered(
    view: &View<'_>,
    owners: &Owners,
    report: &mut Report,
    looked_at: &mut u64,
    doubts: &mut Vec<String>,
) -> Result<(), Obstacle> {
    let layout = view.btf()?.structure("ftrace_ops")?;
    let [func, flags] =
        ["func", "flags"].map(|name| layout.field(name).map(|field| u64::from(field.offset)));
    let (func, flags) = (func?, flags?);
    // By the ops that they are of.
    let mut functions = HashMap::new();
    let mut direct = Vec::new();
    let table = dispatch::direct(view, &mut direct);
    go_on(table, &mut |doubt| doubts.push(doubt))?;
    let in_table: HashSet<(Gva, Gva)> = direct.iter().map(|call| (call.from, call.to)).collect();
    for ops in ftrace_ops(view)? {
        *looked_at += 1;
        let function = view.pointer(ops.wrapping_add(func), WHAT)?;
        functions.insert(ops, function);
        let flags = view.pointer(ops.wrapping_add(flags), WHAT)?.0;
        let name = view.name(ops);
        let modifies = match flags & IPMODIFY {
            0 => "",
            _ => ", which may send functions elsewhere (IPMODIFY)",
        };
        let callback = Callback {
            place: format!("Ftrace's callback {name}"),
            at: ops,
            function,
            how: modifies,
            role: Role::Function,
        };
        judge(view, owners, report, doubts, callback);
        follow(view, owners, report, doubts, &in_table, (ops, function))?;
    }
    for trampoline in ftrace_trampolines(view)? {
        let func = functions.get(&trampoline.ops).copied();
        let done = through(view, owners, report, doubts, &in_table, trampoline, func);
        go_on(done, &mut |doubt| doubts.push(doubt))?;
    }
    for call in direct {
        let owner = owners.owner(view, call.to);
        if is_of_lsm(view, &owner, call.from) {
            report.note(format!("{} calls {owner}", view.name(call.from)));
        } else {
            let callee = ("direct call", call.at, call.to);
            further(view, owners, report, doubts, "direct_functions", &[callee]);
        }
    }
    entries(view, owners, report, doubts, &functions)
}

/// Whom the function of a callback calls further on.
fn follow(
    view: &View<'_>,
    owners: &Owners,
    report: &mut Report,
    doubts: &mut Vec<String>,
    in_table: &HashSet<(Gva, Gva)>,
    (ops, function): (Gva, Gva),
) -> Result<(), Obstacle> {
    let name = view.name(ops);
    let mut all = Vec::new();
    let done = dispatch::of_callback(view, ops, function, &mut all);
    all.retain(|callee| !is_in_table(view, ops, callee, in_table));
    further(view, owners, report, doubts, &name, &all);
    match done {
        Ok(()) => Ok(()),
        Err(error @ Obstacle::TooMuch(_)) => Err(error),
        Err(error) => {
            doubts.push(format!(
                "whom {} ({name}) calls cannot be told: {error}",
                view.name(function)
            ));
            Ok(())
        }
    }
}

/// Whom the kernel's own functions call that callbacks are attached through.
fn further(
    view: &View<'_>,
    owners: &Owners,
    report: &mut Report,
    doubts: &mut Vec<String>,
    of: &str,
    all: &[Callee],
) {
    for &(what, at, function) in all {
        let role = match what {
            dispatch::SAVED => Role::Function,
            dispatch::RETURNS => Role::Return,
            _ => Role::Attached,
        };
        let callback = Callback {
            place: format!("Ftrace's callback {of}: {what}"),
            at,
            function,
            how: "",
            role,
        };
        judge(view, owners, report, doubts, callback);
    }
}

/// What the kernel's own entries of Ftrace call: one of the registered functions, or
/// what calls all of them.
fn entries(
    view: &View<'_>,
    owners: &Owners,
    report: &mut Report,
    doubts: &mut Vec<String>,
    registered: &HashMap<Gva, Gva>,
) -> Result<(), Obstacle> {
    let mut all = Vec::new();
    if let Ok(at) = view.address("ftrace_trace_function") {
        all.push(("ftrace_trace_function", at, view.pointer(at, WHAT)?));
    }
    for name in CALLS {
        if let Ok(at) = view.address(name) {
            let code = view.bytes(at, 5, WHAT)?;
            let call = jump(at.0, &code).filter(|jump| jump.opcode == CALL);
            all.extend(call.map(|call| (name, at, Gva(call.target))));
        }
    }
    for (name, at, function) in all {
        if !registered.values().any(|&one| one == function) {
            let callback = Callback {
                place: format!("{name}, whom Ftrace calls"),
                at,
                function,
                how: "",
                role: Role::AllFunctions,
            };
            judge(view, owners, report, doubts, callback);
        }
    }
    Ok(())
}

/// Whether a direct call of a callback is one that the table of them has, for each
/// function that the callback is called for: it is judged there.
fn is_in_table(view: &View<'_>, ops: Gva, callee: &Callee, table: &HashSet<(Gva, Gva)>) -> bool {
    let &(what, _, to) = callee;
    if what != dispatch::CALLED_DIRECTLY {
        return false;
    }
    let has = |from: &Gva| table.contains(&(*from, to));
    let functions = dispatch::called_for(view, ops);
    functions.is_ok_and(|functions| !functions.is_empty() && functions.iter().all(has))
}

/// What a trampoline is, and calls. `registered` is the function of its callback, where
/// that is registered.
fn through(
    view: &View<'_>,
    owners: &Owners,
    report: &mut Report,
    doubts: &mut Vec<String>,
    in_table: &HashSet<(Gva, Gva)>,
    trampoline: Trampoline,
    registered: Option<Gva>,
) -> Result<(), Obstacle> {
    let Trampoline { ops, start, length } = trampoline;
    let place = format!("the trampoline of Ftrace's at {start}");
    let Some(function) = trampoline::calls(view, ops, start, length)? else {
        report.add(Finding {
            check: Check::Ftrace,
            place,
            address: start.0,
            expected: "a copy of ftrace_caller or ftrace_regs_caller, of its callback".to_owned(),
            found: "other code".to_owned(),
            owner: Some(owners.owner(view, start).to_string()),
        });
        return Ok(());
    };
    if registered == Some(function) {
        return Ok(());
    }
    // One that is not registered is called all the same where a function calls its
    // trampoline; of the kernel's own the function is another by then.
    let role = match registered.is_some() || Role::AllFunctions.has(view, function) {
        true => Role::AllFunctions,
        false => Role::Function,
    };
    let callback = Callback {
        place,
        at: start,
        function,
        how: "",
        role,
    };
    judge(view, owners, report, doubts, callback);
    match registered {
        Some(_) => Ok(()),
        None => follow(view, owners, report, doubts, in_table, (ops, function)),
    }
}

/// Whether it is a BPF program that is called from one of those functions that do
/// nothing and are there for that (`bpf_lsm_*`, kernel/bpf/bpf_lsm.c): policy, which
/// systemd has too (`RestrictFileSystems=`).
fn is_of_lsm(view: &View<'_>, owner: &Owner, from: Gva) -> bool {
    let program = super::owner::bpf_program("bpf_trampoline_");
    let is_bpf = matches!(owner, Owner::Made(kind) if kind.starts_with(&program));
    is_bpf && view.in_text(from) && view.name(from).starts_with("bpf_lsm_")
}

/// Where functions call.
fn called(view: &View<'_>, owners: &Owners, text: &TextReport, report: &mut Report) {
    for (&target, &(count, first)) in &text.trampolines {
        let target = view.kernel.runtime(Gva(target));
        let first = view.kernel.runtime(Gva(first));
        let owner = owners.owner(view, target);
        if owners.begins_trampoline(target) {
            continue;
        }
        // It has a trampoline for each function.
        if count == 1 && is_of_lsm(view, &owner, first) {
            report.note(format!("{} calls {owner}", view.name(first)));
            continue;
        }
        let more = match count {
            1 => String::new(),
            _ => format!(", from {} other functions too", count - 1),
        };
        report.add(Finding {
            check: Check::Ftrace,
            place: format!("the call of Ftrace's in {}", view.name(first)),
            address: first.0,
            expected: "a trampoline of registered callbacks".to_owned(),
            found: format!("{}{more}", view.name(target)),
            owner: Some(owner.to_string()),
        });
    }
}
