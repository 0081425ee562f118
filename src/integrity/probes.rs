//! Kprobes, and what is attached to tracepoints.
//!
//! Both are lists of functions that the kernel calls where other functions begin
//! or where it marks an event. The kernel's own tracers use them (perf, tracefs,
//! BPF through them), and then the function is the kernel's: that is noted. A
//! function of a module, or of nobody, is found; and so is a BPF program, which
//! cannot be told from a hook by where it is attached.

use super::finding::{Check, Finding, Report};
use super::owner::{Owner, Owners};
use super::view::{Obstacle, View, MAX_ENTRIES};
use crate::kernel::Gva;

/// `KPROBE_TABLE_SIZE`, kernel/kprobes.c.
const BUCKETS: u64 = 64;
/// More functions than are ever attached to one tracepoint.
const MAX_FUNCTIONS: u64 = 256;

/// Looks at kprobes.
pub(super) fn kprobes(view: &View<'_>, owners: &Owners, report: &mut Report) {
    let mut looked_at = 0;
    let doubt = match view.symbols.address("kprobe_table") {
        // Built without them.
        None => None,
        Some(_) => table(view, owners, report, &mut looked_at).err(),
    };
    let doubt = doubt.map(|error| error.to_string());
    report.done(Check::Kprobes, looked_at, doubt);
}

/// Where things are in `struct kprobe` and `struct kretprobe`.
struct Offsets {
    hlist: u64,
    list: u32,
    addr: u64,
    handlers: [u64; 2],
    /// Of a kretprobe, from its kprobe on.
    returns: [u64; 2],
}

impl Offsets {
    fn of(view: &View<'_>) -> Result<Self, Obstacle> {
        let btf = view.btf()?;
        let (kprobe, kretprobe) = (btf.structure("kprobe")?, btf.structure("kretprobe")?);
        let field = |name| kprobe.field(name).map(|field| u64::from(field.offset));
        let inner = kretprobe.field("kp")?.offset;
        let after = |name| {
            let field = kretprobe.field(name)?;
            Ok::<_, Obstacle>(u64::from(field.offset.saturating_sub(inner)))
        };
        Ok(Self {
            hlist: field("hlist")?,
            list: kprobe.field("list")?.offset,
            addr: field("addr")?,
            handlers: [field("pre_handler")?, field("post_handler")?],
            returns: [after("handler")?, after("entry_handler")?],
        })
    }
}

/// `kprobe_table`: lists of `struct kprobe`, each of which may stand for several
/// at one place (`aggr_pre_handler`).
fn table(
    view: &View<'_>,
    owners: &Owners,
    report: &mut Report,
    looked_at: &mut u64,
) -> Result<(), Obstacle> {
    const WHAT: &str = "the table of kprobes";
    let offsets = Offsets::of(view)?;
    let table = view.address("kprobe_table")?;
    let mut left = MAX_ENTRIES;
    for bucket in 0..BUCKETS {
        let mut node = view.pointer(table.wrapping_add(8 * bucket), WHAT)?;
        while node.0 != 0 {
            left = left.checked_sub(1).ok_or(Obstacle::Endless(WHAT))?;
            let probe = Gva(node.0.wrapping_sub(offsets.hlist));
            kprobe(view, owners, &offsets, probe, report)?;
            for other in view.list(
                probe.wrapping_add(offsets.list.into()),
                offsets.list,
                "the list of kprobes at one place",
            )? {
                kprobe(view, owners, &offsets, other, report)?;
            }
            *looked_at += 1;
            node = view.pointer(node, WHAT)?;
        }
    }
    Ok(())
}

fn kprobe(
    view: &View<'_>,
    owners: &Owners,
    offsets: &Offsets,
    probe: Gva,
    report: &mut Report,
) -> Result<(), Obstacle> {
    const WHAT: &str = "a kprobe";
    let at = view.pointer(probe.wrapping_add(offsets.addr), WHAT)?;
    let mut handlers = Vec::new();
    for offset in offsets.handlers {
        handlers.push(view.pointer(probe.wrapping_add(offset), WHAT)?);
    }
    let returns = view.address("pre_handler_kretprobe").ok();
    let is_kretprobe = returns.is_some_and(|returns| handlers.contains(&returns));
    if is_kretprobe {
        for offset in offsets.returns {
            handlers.push(view.pointer(probe.wrapping_add(offset), WHAT)?);
        }
    }
    let kind = if is_kretprobe { "kretprobe" } else { "kprobe" };
    let mut own = Vec::new();
    for handler in handlers.into_iter().filter(|handler| handler.0 != 0) {
        match owners.owner(view, handler) {
            Owner::Kernel(name) => own.push(name),
            owner => report.add(Finding {
                check: Check::Kprobes,
                place: format!("{kind} at {}", view.name(at)),
                address: at.0,
                expected: "a function of the kernel's".to_owned(),
                found: view.name(handler),
                owner: Some(owner.to_string()),
            }),
        }
    }
    if !own.is_empty() {
        let own = own.join(", ");
        report.note(format!(
            "{kind} at {}, of the kernel's own: {own}",
            view.name(at)
        ));
    }
    Ok(())
}

/// Looks at tracepoints.
pub(super) fn tracepoints(
    view: &View<'_>,
    owners: &Owners,
    image: &super::Image,
    report: &mut Report,
) {
    let mut looked_at = 0;
    let doubt = attached(view, owners, image, report, &mut looked_at).err();
    let doubt = doubt.map(|error| error.to_string());
    report.done(Check::Tracepoints, looked_at, doubt);
}

/// `__tracepoints_ptrs`: offsets to each `struct tracepoint`, each from its own
/// place. They are constants, and so taken from the image.
fn attached(
    view: &View<'_>,
    owners: &Owners,
    image: &super::Image,
    report: &mut Report,
    looked_at: &mut u64,
) -> Result<(), Obstacle> {
    const WHAT: &str = "a tracepoint";
    let bounds = ["__start___tracepoints_ptrs", "__stop___tracepoints_ptrs"];
    let [Some(start), Some(stop)] = bounds.map(|name| view.symbols.address(name)) else {
        return Ok(());
    };
    let length = usize::try_from(stop.wrapping_sub(start)).unwrap_or(usize::MAX);
    let list = image.at(start, length);
    let list = list.ok_or(Obstacle::Lost("the image's list of tracepoints", start))?;
    let point = view.btf()?.structure("tracepoint")?;
    let (name, funcs) = (point.field("name")?.offset, point.field("funcs")?.offset);
    let each = u64::from(view.btf()?.structure("tracepoint_func")?.size()?);
    for (offset, at) in super::image::records::<4>(list).zip((start.0..).step_by(4)) {
        *looked_at += 1;
        let link = at.wrapping_add_signed(i64::from(i32::from_le_bytes(offset)));
        let point = view.kernel.runtime(Gva(link));
        let array = view.pointer(point.wrapping_add(funcs.into()), WHAT)?;
        if array.0 == 0 {
            continue;
        }
        let text = view.pointer(point.wrapping_add(name.into()), WHAT)?;
        let name = view.text(text);
        for index in 0..MAX_FUNCTIONS {
            let slot = array.wrapping_add(index.wrapping_mul(each));
            let function = view.pointer(slot, WHAT)?;
            if function.0 == 0 {
                break;
            }
            let owner = owners.owner(view, function);
            match owner {
                Owner::Kernel(own) if !own.starts_with("__bpf_trace_") => {
                    report.note(format!("tracepoint {name} calls the kernel's own {own}"));
                }
                owner => report.add(Finding {
                    check: Check::Tracepoints,
                    place: format!("tracepoint {name}"),
                    address: slot.0,
                    expected: "a function of the kernel's".to_owned(),
                    found: view.name(function),
                    owner: Some(match owner {
                        Owner::Kernel(_) => "a BPF program".to_owned(),
                        owner => owner.to_string(),
                    }),
                }),
            }
        }
    }
    Ok(())
}
