//! The numbers in a record, and which of them a kernel can have written.

use crate::kernel::Gva;

/// No kernel follows deeper nesting. Up to 6.10 that is `FTRACE_RETFUNC_DEPTH`, 50
/// (include/linux/ftrace.h). Later ones have a page of words for it, of which a
/// call takes four at least (`SHADOW_STACK_SIZE`, kernel/trace/fgraph.c): Linux
/// 6.12 on x86 comes to 98.
pub(super) const DEPTH_LIMIT: i32 = 128;

/// Whether an address lies in the kernel's half of the address space, with 4
/// or 5 levels of page tables. 0 does not: a record that tells no caller is
/// none of those that are asked this.
pub(super) fn is_kernel_half(at: Gva) -> bool {
    at.0 >= 0xff00_0000_0000_0000
}

/// Little-endian fields of one record.
#[derive(Clone, Copy)]
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl Fields<'_> {
    pub(super) fn u8(&self, at: usize) -> Option<u8> {
        self.0.get(at).copied()
    }

    pub(super) fn u16(&self, at: usize) -> Option<u16> {
        self.bytes(at).map(u16::from_le_bytes)
    }

    pub(super) fn u32(&self, at: usize) -> Option<u32> {
        self.bytes(at).map(u32::from_le_bytes)
    }

    pub(super) fn i32(&self, at: usize) -> Option<i32> {
        self.bytes(at).map(i32::from_le_bytes)
    }

    pub(super) fn u64(&self, at: usize) -> Option<u64> {
        self.bytes(at).map(u64::from_le_bytes)
    }

    pub(super) fn bytes<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        self.0.get(at..)?.first_chunk().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_no_address_of_the_kernel() {
        let told = [0, 0x7fff_ffff_ffff, 0xff00_0000_0000_0000, u64::MAX];
        assert_eq!(
            told.map(|at| is_kernel_half(Gva(at))),
            [false, false, true, true]
        );
    }
}
