//! Guest virtual addresses.

use std::fmt;

/// A guest virtual address of the kernel's half.
///
/// Two kinds meet here and both are virtual: the *link-time* addresses of
/// System.map, and the *runtime* ones that a kernel with KASLR uses.
/// [`super::Kernel::runtime`] and [`super::Kernel::link`] convert; parameters
/// are named for the kind they want.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gva(pub u64);

impl Gva {
    /// The address `bytes` further on, wrapping at the end of the 64-bit
    /// space as the processor does.
    pub fn wrapping_add(self, bytes: u64) -> Self {
        Self(self.0.wrapping_add(bytes))
    }

    /// How many bytes this address lies after `base`, modulo 2^64.
    pub fn wrapping_sub(self, base: Self) -> u64 {
        self.0.wrapping_sub(base.0)
    }

    /// Whether the address is a multiple of `align`, a power of two.
    pub fn is_aligned(self, align: u64) -> bool {
        self.0 & align.wrapping_sub(1) == 0
    }
}

impl fmt::Debug for Gva {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gva({:#x})", self.0)
    }
}

impl fmt::Display for Gva {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_print_in_hex() {
        let text = Gva(0xffff_ffff_8100_0000);
        assert_eq!(format!("{text}"), "0xffffffff81000000");
        assert_eq!(format!("{:?}", Gva(4096)), "Gva(0x1000)");
    }

    #[test]
    fn sums_wrap_as_the_processors_do() {
        assert_eq!(Gva(u64::MAX).wrapping_add(2), Gva(1));
        assert_eq!(Gva(1).wrapping_sub(Gva(u64::MAX)), 2);
    }
}
