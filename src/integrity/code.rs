//! Code that nobody accounts for.
//!
//! The kernel's page tables say what can be executed. That is the kernel's own
//! text, its modules', and what it makes while it runs (`owner.rs`); anything
//! else is code that came in another way, or a module that took itself off the
//! list and still has to run.

use super::finding::{Check, Finding, Report};
use super::owner::{Owner, Owners};
use super::view::View;
use crate::kernel::Gva;

const PAGE: u64 = 4096;
/// So many pages are looked at: a guest may say that all its memory is code.
const MAX_PAGES: u64 = 1 << 18;

/// Looks at each executable page.
pub(super) fn unowned(view: &View<'_>, owners: &Owners, report: &mut Report) {
    let executable = view.kernel.tables.executable(view.ram);
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
                finding.found = format!("code, {} KiB", (at.0 + PAGE - finding.address) >> 10);
            }
            at = at.wrapping_add(PAGE);
        }
        if let Some(finding) = open {
            report.add(finding);
        }
    }
    report.done(Check::UnownedCode, pages, doubt);
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
