//! Code that nobody accounts for.
//!
//! The kernel's page tables say what can be executed. That is the kernel's own
//! text, its modules', and what it makes while it runs (`owner.rs`); anything
//! else is code that came in another way, or a module that took itself off the
//! list and still has to run.

use super::finding::{Check, Finding, Report};
use super::owner::{Owner, Owners};
use super::view::{Obstacle, View};
use crate::kernel::Gva;

const PAGE: u64 = 4096;
/// What may stand between functions and behind them: zeros, `int3`.
const FILLERS: [u8; 2] = [0, 0xcc];
/// So many pages are looked at: a guest may say that all its memory is code.
const MAX_PAGES: u64 = 1 << 18;

/// Looks at each executable page.
pub(super) fn unowned(view: &View<'_>, owners: &Owners, report: &mut Report) {
    let executable = &owners.executable;
    let mut doubt = (!executable.complete)
        .then(|| "the guest's page tables are larger than those of any kernel".to_owned());
    // Where modules are not known, their code is nobody's.
    if let Some(why) = owners.doubts.first() {
        report.done(Check::UnownedCode, 0, Some(why.clone()));
        return;
    }
    let mut pages = 0;
    for piece in &executable.pieces {
        let mut open: Option<Finding> = None;
        let mut at = piece.start;
        while at < piece.end {
            pages += 1;
            if pages > MAX_PAGES {
                doubt = Some("more memory is executable than in any kernel".to_owned());
                break;
            }
            if owned(view, owners, at) {
                if let Some(finding) = open.take() {
                    report.add(finding);
                }
            } else {
                let finding = open.get_or_insert_with(|| unowned_piece(at));
                let size = at.0.wrapping_sub(finding.address).saturating_add(PAGE);
                finding.found = format!("code, {} KiB", size >> 10);
            }
            let Some(next) = at.0.checked_add(PAGE) else {
                break;
            };
            at = Gva(next);
        }
        if let Some(finding) = open {
            report.add(finding);
        }
    }
    if let Some(end) = behind_text(view) {
        match end {
            Ok(finding) => finding.into_iter().for_each(|finding| report.add(finding)),
            Err(error) => {
                doubt.get_or_insert(error.to_string());
            }
        }
    }
    report.done(Check::UnownedCode, pages, doubt);
}

/// What is behind the kernel's text in its last page, which can be executed with it:
/// nothing, or what linkers fill with. None where the text ends with its page.
fn behind_text(view: &View<'_>) -> Option<Result<Option<Finding>, Obstacle>> {
    let end = view.kernel.runtime(view.symbols.text().end);
    let length = end.0.checked_next_multiple_of(PAGE)?.wrapping_sub(end.0);
    let length = usize::try_from(length).ok().filter(|&length| length > 0)?;
    let rest = match view.bytes(end, length, "the end of the kernel's text") {
        Ok(rest) => rest,
        Err(error) => return Some(Err(error)),
    };
    let used = rest.iter().position(|byte| !FILLERS.contains(byte));
    Some(Ok(used.map(|first| {
        let at = end.wrapping_add(first as u64);
        Finding {
            check: Check::UnownedCode,
            place: view.name(at),
            address: at.0,
            expected: "nothing, behind the kernel's text".to_owned(),
            found: super::data::hex(rest.get(first..).unwrap_or_default()),
            owner: Some(Owner::Nobody.to_string()),
        }
    })))
}

/// Whether any byte of a page is somebody's code: the rest of it is too.
fn owned(view: &View<'_>, owners: &Owners, page: Gva) -> bool {
    let piece = page..Gva(page.0.saturating_add(PAGE));
    let text = view.symbols.text();
    let (start, end) = (
        view.kernel.runtime(text.start),
        view.kernel.runtime(text.end),
    );
    (start < piece.end && end > piece.start) || owners.have(&piece)
}

fn unowned_piece(at: Gva) -> Finding {
    Finding {
        check: Check::UnownedCode,
        place: at.to_string(),
        address: at.0,
        expected: "no code".to_owned(),
        found: String::new(),
        owner: Some(Owner::Nobody.to_string()),
    }
}
