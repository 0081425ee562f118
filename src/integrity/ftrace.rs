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
//! can change where any function goes (`FTRACE_OPS_FL_IPMODIFY`).

use super::finding::{Check, Finding, Report};
use super::owner::{ftrace_ops, Owner, Owners};
use super::text::{jump, TextReport, CALL};
use super::view::{Obstacle, View};
use crate::kernel::Gva;

/// `FTRACE_OPS_FL_IPMODIFY`, include/linux/ftrace.h.
const IPMODIFY: u64 = 1 << 13;
/// FGRAPH_ARRAY_SIZE, kernel/trace/fgraph.c from 6.11 on.
const GRAPHS: u64 = 16;
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
    let done = registered(view, owners, report, &mut looked_at)
        .and_then(|()| graphs(view, owners, report, &mut looked_at));
    let mut doubt = done.err().map(|error| error.to_string());
    match text {
        Some(text) => called(view, owners, text, report),
        None => doubt = doubt.or_else(|| Some("the kernel's text was not compared".to_owned())),
    }
    report.done(Check::Ftrace, looked_at, doubt);
}

/// A callback that is not the kernel's.
fn judge(
    view: &View<'_>,
    owners: &Owners,
    report: &mut Report,
    place: String,
    address: Gva,
    function: Gva,
) -> bool {
    let owner = owners.owner(view, function);
    if function.0 == 0 || matches!(owner, Owner::Kernel(_)) {
        return true;
    }
    report.add(Finding {
        check: Check::Ftrace,
        place,
        address: address.0,
        expected: "a function of the kernel's".to_owned(),
        found: view.name(function),
        owner: Some(owner.to_string()),
    });
    false
}

/// The registered callbacks, and what their trampolines call.
fn registered(
    view: &View<'_>,
    owners: &Owners,
    report: &mut Report,
    looked_at: &mut u64,
) -> Result<(), Obstacle> {
    let layout = view.btf()?.structure("ftrace_ops")?;
    let [func, flags, trampoline, size] = ["func", "flags", "trampoline", "trampoline_size"]
        .map(|name| layout.field(name).map(|field| u64::from(field.offset)));
    let (func, flags, trampoline, size) = (func?, flags?, trampoline?, size?);
    for ops in ftrace_ops(view)? {
        *looked_at += 1;
        let function = view.pointer(ops.wrapping_add(func), WHAT)?;
        let flags = view.pointer(ops.wrapping_add(flags), WHAT)?.0;
        let name = view.name(ops);
        let modifies = match flags & IPMODIFY {
            0 => "",
            _ => ", which may send functions elsewhere (IPMODIFY)",
        };
        let place = format!("Ftrace's callback {name}{modifies}");
        if judge(view, owners, report, place, ops, function) {
            report.note(format!("Ftrace calls {} ({name})", view.name(function)));
        }
        let start = view.pointer(ops.wrapping_add(trampoline), WHAT)?;
        let length = view.pointer(ops.wrapping_add(size), WHAT)?.0;
        if start.0 != 0 && length != 0 {
            through(view, owners, report, start, function)?;
        }
    }
    Ok(())
}

/// What a trampoline calls. It is a copy of `ftrace_caller` or of
/// `ftrace_regs_caller` (create_trampoline(), arch/x86/kernel/ftrace.c), so the
/// call stands where theirs does.
fn through(
    view: &View<'_>,
    owners: &Owners,
    report: &mut Report,
    start: Gva,
    function: Gva,
) -> Result<(), Obstacle> {
    let of = |caller, call| {
        Some(
            view.address(call)
                .ok()?
                .wrapping_sub(view.address(caller).ok()?),
        )
    };
    let places = [
        of("ftrace_caller", "ftrace_call"),
        of("ftrace_regs_caller", "ftrace_regs_call"),
    ];
    for place in places.into_iter().flatten() {
        let at = start.wrapping_add(place);
        let code = view.bytes(at, 5, "a trampoline of Ftrace's")?;
        // Only one of the two has a call there.
        let Some(call) = jump(at.0, &code).filter(|jump| jump.opcode == CALL) else {
            continue;
        };
        let target = Gva(call.target);
        if target != function {
            let place = format!("the trampoline of Ftrace's at {start}");
            judge(view, owners, report, place, at, target);
        }
    }
    Ok(())
}

/// Of function_graph from 6.11 on: `fgraph_array`. Before, the two pointers are
/// variables that the kernel was built with (`data.rs`).
fn graphs(
    view: &View<'_>,
    owners: &Owners,
    report: &mut Report,
    looked_at: &mut u64,
) -> Result<(), Obstacle> {
    let Ok(array) = view.address("fgraph_array") else {
        return Ok(());
    };
    let layout = view.btf()?.structure("fgraph_ops")?;
    let (entry, exit) = (
        layout.field("entryfunc")?.offset,
        layout.field("retfunc")?.offset,
    );
    for index in 0..GRAPHS {
        let ops = view.pointer(array.wrapping_add(8 * index), WHAT)?;
        if ops.0 == 0 {
            continue;
        }
        *looked_at += 1;
        for offset in [entry, exit] {
            let at = ops.wrapping_add(offset.into());
            let function = view.pointer(at, WHAT)?;
            let place = format!("function_graph's callback {}", view.name(ops));
            judge(view, owners, report, place, at, function);
        }
    }
    Ok(())
}

/// Where functions call.
fn called(view: &View<'_>, owners: &Owners, text: &TextReport, report: &mut Report) {
    for (&target, &(count, first)) in &text.trampolines {
        let target = view.kernel.runtime(Gva(target));
        let first = view.kernel.runtime(Gva(first));
        let owner = owners.owner(view, target);
        if owner == Owner::Made(super::owner::FTRACE.to_owned()) {
            continue;
        }
        let more = match count {
            1 => String::new(),
            _ => format!(" and {} other functions", count - 1),
        };
        report.add(Finding {
            check: Check::Ftrace,
            place: format!("the call of Ftrace's in {}{more}", view.name(first)),
            address: first.0,
            expected: "a trampoline of registered callbacks".to_owned(),
            found: view.name(target),
            owner: Some(owner.to_string()),
        });
    }
}
