//! The kernel's constants and the pointers in its variables, compared with how
//! it was built.
//!
//! Constants do not change: `__start_rodata` to `__end_rodata` is compared byte
//! by byte, but for the variables in it that may be written until the kernel has
//! started (`__ro_after_init`). So every table of functions that a kernel was
//! built with, of system calls, files or protocols, is covered without its type
//! being known.
//!
//! Of variables, only pointers can be judged. The image lists where addresses lie
//! in them, for KASLR has to move those. A pointer that was built to lead to code may
//! be set to the beginning of another function of the kernel's; one to a constant that
//! itself leads to code (a table of functions), to another such constant; and each may
//! be cleared. One that leads elsewhere, into a module, into nothing, or to some other
//! place of the kernel's, was bent; but for the few that are there for others to set
//! (`lent.rs`).

use std::ops::Range;

use super::finding::{Check, Finding, Report};
use super::image::Image;
use super::lent;
use super::owner::Owners;
use super::view::{Obstacle, View};
use crate::kernel::Gva;

/// Compares the constants.
pub(super) fn constants(view: &View<'_>, image: &Image, owners: &Owners, report: &mut Report) {
    let mut looked_at = 0;
    let doubt = compare(view, image, owners, report, &mut looked_at);
    let doubt = doubt.err().map(|error| error.to_string());
    report.done(Check::ReadOnlyData, looked_at, doubt);
}

/// What lies between two symbols, as linked.
fn between(
    view: &View<'_>,
    start: &'static str,
    end: &'static str,
) -> Result<Range<Gva>, Obstacle> {
    let link = |name| view.symbols.address(name).ok_or(Obstacle::Symbol(name));
    Ok(link(start)?..link(end)?)
}

/// The constants, and those variables among them that are written until the kernel
/// has started.
fn read_only(view: &View<'_>) -> Result<(Range<Gva>, Range<Gva>), Obstacle> {
    let all = between(view, "__start_rodata", "__end_rodata")?;
    let written = between(view, "__start_ro_after_init", "__end_ro_after_init")?;
    Ok((all, written))
}

fn compare(
    view: &View<'_>,
    image: &Image,
    owners: &Owners,
    report: &mut Report,
    looked_at: &mut u64,
) -> Result<(), Obstacle> {
    const WHAT: &str = "the kernel's read-only data";
    let (all, written) = read_only(view)?;
    for (_, start, bytes) in image.sections("") {
        if !all.contains(&start) {
            continue;
        }
        let built = image.moved(start, bytes.len(), view.kernel.slide);
        let built = built.ok_or(Obstacle::Lost("the image's section", start))?;
        let memory = view.bytes(view.kernel.runtime(start), bytes.len(), WHAT)?;
        *looked_at += bytes.len() as u64;
        // Word by word, as pointers lie: sections begin at multiples of 4 and
        // most of 8.
        let words = built.chunks(8).zip(memory.chunks(8));
        for ((built, memory), at) in words.zip((start.0..).step_by(8)) {
            if built == memory || written.contains(&Gva(at)) {
                continue;
            }
            changed(view, owners, report, Gva(at), built, memory);
        }
    }
    if *looked_at == 0 {
        return Err(Obstacle::Lost("read-only data of the image", all.start));
    }
    Ok(())
}

/// A word of the constants that was changed.
fn changed(
    view: &View<'_>,
    owners: &Owners,
    report: &mut Report,
    at: Gva,
    built: &[u8],
    memory: &[u8],
) {
    let runtime = view.kernel.runtime(at);
    let word = |bytes: &[u8]| Some(Gva(u64::from_le_bytes(bytes.try_into().ok()?)));
    let pointer =
        |bytes: &[u8]| word(bytes).filter(|&to| view.in_text(to) || view.in_constants(to));
    let (expected, found, owner) = match (pointer(built), word(memory)) {
        (Some(was), Some(is)) => (view.name(was), view.name(is), Some(owners.owner(view, is))),
        _ => (hex(built), hex(memory), None),
    };
    report.add(Finding {
        check: Check::ReadOnlyData,
        place: entry_of(view, runtime),
        address: runtime.0,
        expected,
        found,
        owner: owner.map(|owner| owner.to_string()),
    });
}

/// A place in constants; of the table of system calls, with the call's number.
fn entry_of(view: &View<'_>, at: Gva) -> String {
    let name = view.name(at);
    for table in [
        "sys_call_table",
        "ia32_sys_call_table",
        "x32_sys_call_table",
    ] {
        let offset = match name.strip_prefix(table) {
            Some("") => Some(0),
            Some(rest) => rest
                .strip_prefix("+0x")
                .and_then(|offset| u64::from_str_radix(offset, 16).ok()),
            None => None,
        };
        if let Some(offset) = offset {
            return format!("{table}[{}]", offset / 8);
        }
    }
    name
}

/// Bytes in hex.
pub(super) fn hex(bytes: &[u8]) -> String {
    const SHOWN: usize = 16;
    let shown = bytes.iter().take(SHOWN).map(|byte| format!("{byte:02x}"));
    let mut text = shown.collect::<Vec<_>>().join(" ");
    if bytes.len() > SHOWN {
        text.push_str(" ...");
    }
    text
}

/// Compares the pointers in variables.
pub(super) fn pointers(view: &View<'_>, image: &Image, owners: &Owners, report: &mut Report) {
    let mut looked_at = 0;
    let doubt = follow(view, image, owners, report, &mut looked_at);
    let doubt = doubt.err().map(|error| error.to_string());
    report.done(Check::DataPointers, looked_at, doubt);
}

fn follow(
    view: &View<'_>,
    image: &Image,
    owners: &Owners,
    report: &mut Report,
    looked_at: &mut u64,
) -> Result<(), Obstacle> {
    let text = view.symbols.text();
    let (constants, written) = read_only(view)?;
    let variables = between(view, "_sdata", "_edata")?;
    let functions = Functions::of(view, image, &constants);
    for (at, built) in image.pointers() {
        let here = variables.contains(&at) || written.contains(&at);
        let table = || constants.contains(&built) && functions.are_in(view, built);
        if !here || !(text.contains(&built) || table()) {
            continue;
        }
        let runtime = view.kernel.runtime(at);
        let now = match view.pointer(runtime, "a pointer") {
            Ok(now) => now,
            Err(error @ Obstacle::TooMuch(_)) => return Err(error),
            // Part of what was freed.
            Err(_) => continue,
        };
        *looked_at += 1;
        let to = view.kernel.link(now);
        let same_kind = if text.contains(&built) {
            view.symbols.is_function_start(to)
        } else {
            constants.contains(&to) && functions.are_in(view, to)
        };
        // Cleared, or another of the kernel's own.
        if now.0 == 0 || to == built || same_kind {
            continue;
        }
        let (place, owner) = (view.name(runtime), owners.owner(view, now));
        if lent::may_lead(view, owners, &place, now) {
            report.note(format!("{place} leads to {}: {owner}", view.name(now)));
            continue;
        }
        report.add(Finding {
            check: Check::DataPointers,
            place,
            address: runtime.0,
            expected: view.name(view.kernel.runtime(built)),
            found: view.name(now),
            owner: Some(owner.to_string()),
        });
    }
    Ok(())
}

/// Where functions are named in the constants, in order.
struct Functions(Vec<Gva>);

impl Functions {
    fn of(view: &View<'_>, image: &Image, constants: &Range<Gva>) -> Self {
        let text = view.symbols.text();
        let pointers = image.pointers();
        let named = pointers.filter(|(at, to)| constants.contains(at) && text.contains(to));
        Self(named.map(|(at, _)| at).collect())
    }

    /// Whether the constant at `at`, up to the next symbol, names any.
    fn are_in(&self, view: &View<'_>, at: Gva) -> bool {
        let next = self.0.partition_point(|place| *place < at);
        let symbol = |at: Gva| Some(at.0 - view.symbols.symbol_before(at)?.1);
        let place = self.0.get(next);
        place.is_some_and(|place| symbol(*place) == symbol(at))
    }
}
