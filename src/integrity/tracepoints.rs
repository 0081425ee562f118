//! What is attached to tracepoints: functions that are called where the kernel marks
//! an event.
//!
//! ```text
//! tracepoint.funcs       -> functions                     (perf, tracefs, BPF, modules)
//! tracepoint.static_call_key.func -> the only one of them, or what calls each
//! trace_event_call       -> prog_array: BPF programs      (through perf)
//! ```
//!
//! The kernel's own tracers attach functions of the kernel's: that is noted. A
//! function of a module, or of nobody, is found; and so is a BPF program, which
//! cannot be told from a hook by where it is attached. Where perf runs one, the
//! function at the tracepoint is the kernel's, and only the event has the program.
//!
//! **No module has leave to attach functions**, as those of [`super::lent`] have to set a
//! pointer: some of Linux's own do (`drop_monitor`), but what a module is called is the
//! guest's word, and what is attached to `kfree_skb` is handed packets. docs/detection.md
//! says what to do about tracers.

use super::dispatch;
use super::finding::{Check, Finding, Report};
use super::known::{self, Role};
use super::owner::{Owner, Owners};
use super::view::{go_on, Obstacle, View};
use crate::kernel::btf::Structure;
use crate::kernel::Gva;

/// More functions than are ever attached to one tracepoint.
const MAX_FUNCTIONS: u64 = 256;

/// Looks at tracepoints.
pub(super) fn attached(
    view: &View<'_>,
    owners: &Owners,
    image: &super::Image,
    report: &mut Report,
) {
    let mut looked_at = 0;
    let mut doubt = None;
    let done = functions(view, owners, image, report, &mut looked_at, &mut doubt)
        .and_then(|()| events(view, image, report, &mut looked_at, &mut doubt));
    let doubt = doubt.or_else(|| done.err().map(|error| error.to_string()));
    report.done(Check::Tracepoints, looked_at, doubt);
}

/// `__tracepoints_ptrs`: offsets to each `struct tracepoint`, each from its own
/// place. They are constants, and so taken from the image.
fn functions(
    view: &View<'_>,
    owners: &Owners,
    image: &super::Image,
    report: &mut Report,
    looked_at: &mut u64,
    doubt: &mut Option<String>,
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
    let call = StaticCall::of(&point);
    let mut look = |link: Gva| {
        let point = view.kernel.runtime(link);
        let text = view.pointer(point.wrapping_add(name.into()), WHAT)?;
        let name = view.text(text);
        let array = view.pointer(point.wrapping_add(funcs.into()), WHAT)?;
        let mut attached = Vec::new();
        let mut list = || {
            // An array that is not there is one of none.
            let most = if array.0 == 0 { 0 } else { MAX_FUNCTIONS };
            for index in 0..most {
                let slot = array.wrapping_add(index.wrapping_mul(each));
                let function = view.pointer(slot, WHAT)?;
                if function.0 == 0 {
                    return Ok(());
                }
                attached.push((slot, function));
            }
            match most {
                0 => Ok(()),
                _ => Err(Obstacle::Endless("the functions at a tracepoint")),
            }
        };
        // Those that can be read are judged, whatever is wrong with what follows.
        let listed = list();
        for &(slot, function) in &attached {
            if let Some(other) = judge(view, owners, report, &name, slot, function) {
                doubt.get_or_insert(other);
            }
        }
        let called = call.as_ref().map_or(Ok(()), |call| {
            let attached = listed.is_ok().then_some(&attached[..]);
            call.check((view, owners, image), report, (link, &name), attached)
        });
        listed.and(called)
    };
    let mut damaged = None;
    for (offset, at) in super::image::records::<4>(list).zip((start.0..).step_by(4)) {
        *looked_at += 1;
        let link = at.wrapping_add_signed(i64::from(i32::from_le_bytes(offset)));
        let done = look(Gva(link));
        go_on(done, &mut |why| damaged = Some(why))?;
    }
    if let Some(damaged) = damaged {
        doubt.get_or_insert(damaged);
    }
    Ok(())
}

/// The static call that a tracepoint is called through, where the kernel has them. What
/// it leads to was set by tracepoint_update_call() (kernel/tracepoint.c). The text of its
/// sites is compared with that in [`super::text`].
struct StaticCall {
    /// Where a `struct tracepoint` has its `static_call_key` and its `iterator`.
    key: u32,
    iterator: u32,
}

impl StaticCall {
    fn of(point: &Structure<'_>) -> Option<Self> {
        Some(Self {
            key: point.field("static_call_key").ok()?.offset,
            iterator: point.field("iterator").ok()?.offset,
        })
    }

    /// Checks that of the tracepoint that was linked at `link`, to which these are
    /// attached; where that is not known, any function of the kernel's may be. Which key and which iterator it has is the image's word.
    fn check(
        &self,
        (view, owners, image): (&View<'_>, &Owners, &super::Image),
        report: &mut Report,
        (link, name): (Gva, &str),
        attached: Option<&[(Gva, Gva)]>,
    ) -> Result<(), Obstacle> {
        let built = |field: u32| {
            let word = image.at(link.wrapping_add(field.into()), 8)?;
            let to = Gva(u64::from_le_bytes(word.try_into().ok()?));
            (to.0 != 0).then(|| view.kernel.runtime(to))
        };
        // One without sites has no key.
        let (Some(key), Some(iterator)) = (built(self.key), built(self.iterator)) else {
            return Ok(());
        };
        // `struct static_call_key` begins with the function.
        let function = view.pointer(key, "a static call")?;
        let only = match attached {
            Some([(_, only)]) => *only,
            None if view.in_text(function) => function,
            _ => iterator,
        };
        if function == iterator || function == only {
            return Ok(());
        }
        let mut expected = view.name(iterator);
        if only != iterator {
            expected = format!("{expected}, or {}", view.name(only));
        }
        report.add(Finding {
            check: Check::Tracepoints,
            place: format!("tracepoint {name}, its static call"),
            address: key.0,
            expected,
            found: view.name(function),
            owner: Some(owners.owner(view, function).to_string()),
        });
        Ok(())
    }
}

/// Judges a function at a tracepoint, and says what is not known of it.
fn judge(
    view: &View<'_>,
    owners: &Owners,
    report: &mut Report,
    name: &str,
    slot: Gva,
    function: Gva,
) -> Option<String> {
    let place = format!("tracepoint {name}");
    let owner = match owners.owner(view, function) {
        Owner::Kernel(own) if !own.starts_with("__bpf_trace_") => {
            report.note(format!("{place} calls the kernel's own {own}"));
            let known = Role::Tracepoint.has(view, function);
            return (!known).then(|| known::unknown(view, &place, function));
        }
        Owner::Kernel(_) => "a BPF program".to_owned(),
        owner => owner.to_string(),
    };
    report.add(Finding {
        check: Check::Tracepoints,
        place,
        address: slot.0,
        expected: "a function of the kernel's".to_owned(),
        found: view.name(function),
        owner: Some(owner),
    });
    None
}

/// `__start_ftrace_events`: pointers to each event of the kernel's
/// (`struct trace_event_call`), system calls' among them. The kernel frees the list
/// once it has started, so it is the image's.
fn events(
    view: &View<'_>,
    image: &super::Image,
    report: &mut Report,
    looked_at: &mut u64,
    doubt: &mut Option<String>,
) -> Result<(), Obstacle> {
    let bounds = ["__start_ftrace_events", "__stop_ftrace_events"];
    let [Some(start), Some(stop)] = bounds.map(|name| view.symbols.address(name)) else {
        return Ok(());
    };
    let all = image
        .pointers()
        .filter(|(at, _)| (start..stop).contains(at));
    for (_, event) in all {
        *looked_at += 1;
        let event = view.kernel.runtime(event);
        let runs_bpf = dispatch::event_runs_bpf(view, event);
        if go_on(runs_bpf, &mut |why| {
            doubt.get_or_insert(why);
        })? {
            report.add(Finding {
                check: Check::Tracepoints,
                place: format!("event {}", view.name(event)),
                address: event.0,
                expected: "no program".to_owned(),
                found: "a BPF program, run by perf".to_owned(),
                owner: Some("a BPF program".to_owned()),
            });
        }
    }
    Ok(())
}
