//! Address kinds as types, so that a guest physical address is never taken
//! for an offset in a file.

use std::fmt;

/// A guest physical address: what the guest's page tables hold.
///
/// Not an offset in the memory file: RAM above the PCI hole lies elsewhere
/// there. Only [`super::Layout`] converts.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gpa(pub u64);

/// A byte offset from the start of one backing (a file).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RamOffset(pub u64);

impl Gpa {
    /// The address `bytes` further on, or `None` past the end of the 64-bit
    /// space.
    pub fn checked_add(self, bytes: u64) -> Option<Self> {
        self.0.checked_add(bytes).map(Self)
    }

    /// Whether the address is a multiple of `align`, a power of two.
    pub fn is_aligned(self, align: u64) -> bool {
        self.0 & align.wrapping_sub(1) == 0
    }
}

impl RamOffset {
    /// The offset `bytes` further on, or `None` on overflow.
    pub fn checked_add(self, bytes: u64) -> Option<Self> {
        self.0.checked_add(bytes).map(Self)
    }
}

/// `Debug` and `Display` of both kinds: hexadecimal, as every tool that deals
/// in addresses prints them.
macro_rules! hex {
    ($type:ident) => {
        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($type), "({:#x})"), self.0)
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

hex!(Gpa);
hex!(RamOffset);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_print_in_hex() {
        assert_eq!(format!("{}", Gpa(4096)), "0x1000");
        assert_eq!(format!("{:?}", RamOffset(4096)), "RamOffset(0x1000)");
    }

    #[test]
    fn sums_do_not_wrap() {
        assert_eq!(Gpa(u64::MAX).checked_add(1), None);
        assert_eq!(Gpa(8).checked_add(8), Some(Gpa(16)));
    }
}
