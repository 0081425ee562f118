//! Thunks for indirect branches that a kernel makes for itself (`CONFIG_MITIGATION_ITS`,
//! arch/x86/kernel/alternative.c: `its_alloc`, `its_allocate_thunk`, `its_init_thunk`).
//!
//! On an Intel processor with the flaw, an indirect branch may not end in the lower half
//! of a cache line. One that would is led through `jmp *%register; int3` in an upper half:
//! in a page of its own from where modules are allocated, filled with `int3`.
//!
//! The kernel has no list of these pages that all versions keep. None is needed: a page
//! that has nothing but thunks and filling can do no more than go on where a register
//! says already.

use super::text::INT3;
use super::view::View;
use crate::kernel::Gva;

/// What such pages are called.
pub(super) const THUNKS: &str = "thunks of the kernel's for indirect branches";
/// In a kernel that is built with it (arch/x86/lib/retpoline.S).
pub(super) const SYMBOL: &str = "__x86_indirect_its_thunk_array";
pub(super) const PAGE: u64 = 4096;
/// More pages than kernels need: some 15 for the kernel itself, and one for most modules.
pub(super) const MAX_PAGES: usize = 4096;
/// Half a cache line.
const HALF: usize = 32;
/// `REX.B`: the register is one of the upper eight.
const UPPER: u8 = 0x41;
/// The register that no branch goes by: the stack's.
const STACK: u8 = 4;
const WHAT: &str = "a page of thunks";

/// The register's number that the thunk has which `code` begins with, and its length.
fn first(code: &[u8]) -> Option<(u8, usize)> {
    let (upper, code) = match code.strip_prefix(&[UPPER]) {
        Some(code) => (8, code),
        None => (0, code),
    };
    let [0xff, operand @ 0xe0..=0xe7, INT3, ..] = *code else {
        return None;
    };
    let register = upper | (operand & 7);
    (register != STACK).then_some((register, 3 + usize::from(upper >> 3)))
}

/// Whether there is nothing but thunks in a page, and at least one.
fn are_thunks(page: &[u8]) -> bool {
    let mut count = 0;
    for line in page.chunks_exact(2 * HALF) {
        let (lower, mut rest) = line.split_at(HALF);
        while let Some((_, length)) = first(rest) {
            rest = rest.get(length..).unwrap_or_default();
            count += 1;
        }
        if lower.iter().chain(rest).any(|&byte| byte != INT3) {
            return false;
        }
    }
    count > 0
}

/// Whether the page at `at` has nothing but thunks.
pub(super) fn is_page(view: &View<'_>, at: Gva) -> bool {
    let page = view.bytes(at, PAGE as usize, WHAT);
    page.is_ok_and(|page| are_thunks(&page))
}

/// Whether there is a thunk for this register at `at`.
pub(super) fn is_thunk(view: &View<'_>, at: Gva, register: u8) -> bool {
    let code = view.array::<4>(at, WHAT);
    code.is_ok_and(|code| first(&code).is_some_and(|(there, _)| there == register))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_of_thunks_has_nothing_else() {
        let mut page = vec![INT3; PAGE as usize];
        assert!(!are_thunks(&page));
        // The first two one behind the other, the last one at the end of its line.
        page[32..39].copy_from_slice(&[0x41, 0xff, 0xe3, INT3, 0xff, 0xe0, INT3]);
        page[125..128].copy_from_slice(&[0xff, 0xe7, INT3]);
        assert!(!are_thunks(&page), "between them is a gap");
        page[96..125].copy_from_slice(&[0xff, 0xe1, INT3].repeat(10)[..29]);
        assert!(!are_thunks(&page), "one is cut");
        page[96..126].copy_from_slice(&[0xff, 0xe1, INT3].repeat(10));
        page[126..128].fill(INT3);
        assert!(are_thunks(&page));
        for at in 0..page.len() {
            let mut changed = page.clone();
            changed[at] ^= 0x55;
            assert!(!are_thunks(&changed), "{at:#x}");
        }
        // In the lower half of a line, and by the stack pointer.
        let mut low = page.clone();
        low[64..67].copy_from_slice(&[0xff, 0xe0, INT3]);
        assert!(!are_thunks(&low));
        page[32..36].copy_from_slice(&[INT3; 4]);
        page[32..35].copy_from_slice(&[0xff, 0xe4, INT3]);
        page[35..39].fill(INT3);
        assert!(!are_thunks(&page));
        assert_eq!(first(&[0x41, 0xff, 0xe4, INT3]), Some((12, 4)));
        assert_eq!(first(&[0xff, 0xd0, INT3]), None);
    }
}
