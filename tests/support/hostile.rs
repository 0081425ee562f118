//! Ways in which a guest may fill its memory, as proptest strategies: what
//! every reader of guest memory is put before.

use proptest::prelude::*;
use xftrace::ram::{Gpa, GuestRam, VecRam};

/// One change that a hostile guest makes to its memory.
#[derive(Clone, Debug)]
pub enum Change {
    /// A word of any value.
    Word(u64, u64),
    /// Some bytes of any value.
    Bytes(u64, Vec<u8>),
    /// One bit turned over.
    Flip(u64, u8),
    /// A page filled with one word, such as a table of entries that all lead
    /// to one place.
    Fill(u64, u64),
    /// The content of one page over another.
    Copy(u64, u64),
}

/// Words that do damage: the ends of ranges, small numbers, and addresses.
pub fn word(ram: u64) -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        Just(0),
        Just(u64::MAX),
        Just(i64::MAX as u64),
        0u64..4096,
        // Page table entries that lead to RAM, some of large pages.
        (0..ram, 0u64..0x200).prop_map(|(gpa, bits)| gpa & !0xfff | bits | 1),
        // Addresses in the kernel's half.
        any::<u32>().prop_map(|low| 0xffff_ffff_0000_0000 | u64::from(low)),
        (0..ram).prop_map(|gpa| 0xffff_8880_0000_0000 | gpa),
    ]
}

/// A change somewhere in `[from, from + len)`, which is RAM.
pub fn change(from: u64, len: u64) -> impl Strategy<Value = Change> {
    let place = from..from + len;
    let aligned = place.clone().prop_map(|at| at & !7);
    let page = place.clone().prop_map(|at| at & !0xfff);
    prop_oneof![
        4 => (aligned, word(from + len)).prop_map(|(at, value)| Change::Word(at, value)),
        2 => (place.clone(), prop::collection::vec(any::<u8>(), 1..64))
            .prop_map(|(at, bytes)| Change::Bytes(at, bytes)),
        2 => (place, 0u8..8).prop_map(|(at, bit)| Change::Flip(at, bit)),
        1 => (page.clone(), word(from + len)).prop_map(|(at, value)| Change::Fill(at, value)),
        1 => (page.clone(), page).prop_map(|(to, from)| Change::Copy(to, from)),
    ]
}

/// Several of them.
pub fn changes(from: u64, len: u64) -> impl Strategy<Value = Vec<Change>> {
    prop::collection::vec(change(from, len), 0..32)
}

impl Change {
    /// Makes the change; what would lie outside RAM is left out.
    pub fn apply(&self, ram: &VecRam) {
        let poke = |at: u64, bytes: &[u8]| {
            for (&byte, i) in bytes.iter().zip(0..) {
                if ram.layout().place(Gpa(at + i)).is_some() {
                    ram.poke(Gpa(at + i), &[byte]);
                }
            }
        };
        match self {
            Self::Word(at, value) => poke(*at, &value.to_le_bytes()),
            Self::Bytes(at, bytes) => poke(*at, bytes),
            Self::Flip(at, bit) => {
                let mut byte = [0];
                if ram.read(Gpa(*at), &mut byte).is_ok() {
                    poke(*at, &[byte[0] ^ 1 << bit]);
                }
            }
            Self::Fill(at, value) => poke(*at, &value.to_le_bytes().repeat(512)),
            Self::Copy(to, from) => {
                let mut page = vec![0; 4096];
                if ram.read(Gpa(*from), &mut page).is_ok() {
                    poke(*to, &page);
                }
            }
        }
    }
}
