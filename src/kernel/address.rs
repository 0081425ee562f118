//! The guest's virtual addresses as a type of their own, so that one is never
//! taken for a guest physical address.

use std::fmt;

/// A guest virtual address in the kernel's half: what the guest's registers
/// and pointers hold, and what System.map lists. Whether it is a link-time or
/// a run-time address (they differ by the slide of KASLR), its holder says.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gva(pub u64);

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
        assert_eq!(
            format!("{}", Gva(0xffff_ffff_8100_0000)),
            "0xffffffff81000000"
        );
        assert_eq!(format!("{:?}", Gva(4096)), "Gva(0x1000)");
    }
}
