//! Walking x86-64 page tables that a guest may fill as it likes.
//!
//! Follows Intel SDM vol. 3A, 4.5 "4-level paging and 5-level paging": each
//! level consumes nine bits of the address, at most five entries are read,
//! and each is loaded once. Nothing but "present", "large" and the physical
//! address is looked at: whether the guest itself may write a page is no
//! concern of a reader outside.

use crate::ram::{Gpa, GuestRam, RamError};

use super::Gva;

/// Bit 0 of an entry: it is in use.
pub(super) const PRESENT: u64 = 1 << 0;
/// Bit 7 of a level 2 or 3 entry: it maps a large page, not a table.
pub(super) const LARGE: u64 = 1 << 7;
/// Bits 12 to 51: where the table or page lies. Whatever else the guest sets
/// (protection keys, no-execute, software bits) is masked away.
pub(super) const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// Bytes of a table.
pub(super) const TABLE: u64 = 4096;

/// Why a guest virtual address has no guest physical one.
#[derive(Debug, thiserror::Error)]
pub enum WalkError {
    /// The upper bits are not copies of the highest one that is translated.
    #[error("{gva} is not a canonical address with {levels}-level paging")]
    NotCanonical {
        /// The address asked for.
        gva: Gva,
        /// 4 or 5.
        levels: u8,
    },
    /// The guest has not mapped it (now).
    #[error("the guest's page tables do not map {gva} (level {level} entry not present)")]
    NotPresent {
        /// The address asked for.
        gva: Gva,
        /// The level of the entry, 5 (root of 5-level paging) to 1.
        level: u8,
    },
    /// An entry leads to what is not RAM.
    #[error("the guest's page tables lead from {gva} to {gpa} (level {level}), which is not RAM")]
    OutsideRam {
        /// The address asked for.
        gva: Gva,
        /// The level of the entry that leads there; one more than the number
        /// of levels for the root table itself.
        level: u8,
        /// Where it leads.
        gpa: Gpa,
    },
    /// A large page where the processor knows none.
    #[error("the guest's page tables hold an entry for {gva} that no processor accepts (level {level}: {entry:#x})")]
    BadEntry {
        /// The address asked for.
        gva: Gva,
        /// The level of the entry.
        level: u8,
        /// What it holds.
        entry: u64,
    },
    /// The memory layer failed.
    #[error(transparent)]
    Ram(#[from] RamError),
}

/// Where a guest virtual address leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapped {
    /// The guest physical address; one byte of RAM is there for sure.
    pub gpa: Gpa,
    /// Bytes from `gpa` to the end of the page, at least 1. The page may be
    /// longer than the RAM behind it.
    pub contiguous: u64,
}

/// A set of page tables in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageTables {
    /// The root table, 4096 bytes, page-aligned.
    pub root: Gpa,
    /// 4 or 5 levels.
    pub levels: u8,
}

impl PageTables {
    /// Translates one address.
    ///
    /// # Errors
    /// A [`WalkError`] for whatever the tables hold that leads nowhere.
    pub fn walk(&self, ram: &dyn GuestRam, gva: Gva) -> Result<Mapped, WalkError> {
        let levels = self.levels;
        if !is_canonical(gva, levels) {
            return Err(WalkError::NotCanonical { gva, levels });
        }
        let mut table = Gpa(self.root.0 & ADDRESS);
        let mut from = levels.saturating_add(1);
        for level in (1..=levels).rev() {
            let outside = WalkError::OutsideRam {
                gva,
                level: from,
                gpa: table,
            };
            if ram.layout().resolve(table, TABLE).is_err() {
                return Err(outside);
            }
            // Bits that this level and those below it do not translate.
            let shift = 12 + 9 * (u32::from(level) - 1);
            let index = (gva.0 >> shift) & 0x1ff;
            let entry = ram.read_u64(Gpa(table.0 + index * 8))?;
            if entry & PRESENT == 0 {
                return Err(WalkError::NotPresent { gva, level });
            }
            let large = entry & LARGE != 0;
            if level == 1 || (large && level <= 3) {
                let inside = (1u64 << shift) - 1;
                let gpa = Gpa((entry & ADDRESS & !inside) | (gva.0 & inside));
                if ram.layout().place(gpa).is_none() {
                    return Err(WalkError::OutsideRam { gva, level, gpa });
                }
                let contiguous = inside + 1 - (gva.0 & inside);
                return Ok(Mapped { gpa, contiguous });
            }
            if large {
                return Err(WalkError::BadEntry { gva, level, entry });
            }
            table = Gpa(entry & ADDRESS);
            from = level;
        }
        // Only for a number of levels that does not exist.
        Err(WalkError::NotCanonical { gva, levels })
    }

    /// Copies `buf.len()` bytes from `gva` on, page by page: at most one walk
    /// for every 4096 bytes and one more. The copy may tear, as
    /// [`GuestRam::read`] says, and pages may be remapped between walks.
    ///
    /// # Errors
    /// A [`WalkError`] if any page of it is not mapped to RAM; `buf` is then
    /// unspecified.
    pub fn read(&self, ram: &dyn GuestRam, gva: Gva, buf: &mut [u8]) -> Result<(), WalkError> {
        let mut at = gva;
        let mut rest = buf;
        while !rest.is_empty() {
            let mapped = self.walk(ram, at)?;
            let len = mapped.contiguous.min(rest.len() as u64);
            let (now, later) = rest.split_at_mut(len as usize);
            ram.read(mapped.gpa, now)?;
            rest = later;
            at = at.wrapping_add(len);
        }
        Ok(())
    }
}

/// Whether all bits from the highest translated one upwards are the same.
fn is_canonical(gva: Gva, levels: u8) -> bool {
    let translated = match levels {
        4 => 48,
        5 => 57,
        _ => return false,
    };
    let unused = 64 - translated;
    (((gva.0 << unused) as i64) >> unused) as u64 == gva.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ram::{Layout, VecRam};
    use proptest::prelude::*;

    const TEXT: Gva = Gva(0xffff_ffff_8123_4567);

    /// 16 MiB of RAM whose tables, from 0x1000 on, map `TEXT` at the level
    /// given, to the page of that size that holds `gpa`.
    fn mapped(levels: u8, leaf: u8, gpa: u64) -> (VecRam, PageTables) {
        let ram = VecRam::new(Layout::flat(16 << 20).unwrap());
        for level in (leaf..=levels).rev() {
            let table = 0x1000 * u64::from(levels - level + 1);
            let index = TEXT.0 >> (12 + 9 * (level - 1)) & 0x1ff;
            let entry = match () {
                () if level == leaf && level > 1 => gpa | PRESENT | LARGE,
                () if level == leaf => gpa | PRESENT,
                () => (table + 0x1000) | PRESENT,
            };
            // Bits a kernel sets besides: writable, accessed, dirty, NX.
            ram.poke_u64(Gpa(table + index * 8), entry | 0x8000_0000_0000_0062);
        }
        let root = Gpa(0x1000);
        (ram, PageTables { root, levels })
    }

    #[test]
    fn pages_of_all_sizes_in_both_depths() {
        for levels in [4, 5] {
            for (leaf, page) in [(1, 0x9000), (2, 0x20_0000), (3, 0)] {
                let (ram, tables) = mapped(levels, leaf, page);
                let inside = (1u64 << (12 + 9 * (leaf - 1))) - 1;
                // A 1 GiB page in 16 MiB of RAM: only its start is RAM.
                let gva = if leaf == 3 {
                    Gva(TEXT.0 & !inside | 0x777)
                } else {
                    TEXT
                };
                let found = tables.walk(&ram, gva).unwrap();
                assert_eq!(found.gpa, Gpa(page | gva.0 & inside), "{levels} {leaf}");
                assert_eq!(found.contiguous, inside + 1 - (gva.0 & inside));
            }
        }
    }

    #[test]
    fn the_pat_bit_of_a_large_page_is_no_address() {
        let (ram, tables) = mapped(4, 2, 0x20_0000 | 1 << 12);
        assert_eq!(
            tables.walk(&ram, TEXT).unwrap().gpa,
            Gpa(0x20_0000 | TEXT.0 & 0x1f_ffff)
        );
    }

    #[test]
    fn what_leads_nowhere_is_an_error_of_its_kind() {
        let (ram, tables) = mapped(4, 1, 0x9000);
        let walk = |gva| tables.walk(&ram, Gva(gva)).unwrap_err();
        assert!(matches!(
            walk(0x8000_0000_0000),
            WalkError::NotCanonical { .. }
        ));
        assert!(matches!(
            walk(TEXT.0 + 0x1000),
            WalkError::NotPresent { level: 1, .. }
        ));
        assert!(matches!(walk(0), WalkError::NotPresent { level: 4, .. }));

        let (ram, tables) = mapped(4, 1, 1 << 40);
        let far = tables.walk(&ram, TEXT).unwrap_err();
        assert!(
            matches!(far, WalkError::OutsideRam { level: 1, .. }),
            "{far}"
        );

        let (ram, tables) = mapped(4, 4, 0x9000);
        let bad = tables.walk(&ram, TEXT).unwrap_err();
        assert!(matches!(bad, WalkError::BadEntry { level: 4, .. }), "{bad}");

        let nowhere = PageTables {
            root: Gpa(1 << 40),
            levels: 4,
        };
        let root = nowhere.walk(&ram, TEXT).unwrap_err();
        assert!(
            matches!(root, WalkError::OutsideRam { level: 5, .. }),
            "{root}"
        );
    }

    #[test]
    fn a_read_goes_from_page_to_page() {
        let (ram, tables) = mapped(4, 1, 0x9000);
        let index = (TEXT.0 >> 12 & 0x1ff) + 1;
        ram.poke_u64(Gpa(0x4000 + index * 8), 0x3_0000 | PRESENT);
        ram.poke(Gpa(0x9ffd), b"abc");
        ram.poke(Gpa(0x3_0000), b"def");
        let mut buf = [0; 6];
        tables
            .read(&ram, Gva((TEXT.0 & !0xfff) + 0xffd), &mut buf)
            .unwrap();
        assert_eq!(&buf, b"abcdef");
        let mut long = vec![0; 0x2000];
        assert!(tables.read(&ram, TEXT, &mut long).is_err());
    }

    #[test]
    fn a_table_that_points_to_itself_ends_after_its_levels() {
        let ram = VecRam::from_bytes(&[0; 0x2000]);
        for index in 0..512 {
            ram.poke_u64(Gpa(0x1000 + index * 8), 0x1000 | PRESENT);
        }
        let tables = PageTables {
            root: Gpa(0x1000),
            levels: 5,
        };
        assert_eq!(tables.walk(&ram, TEXT).unwrap().gpa, Gpa(0x1567));
    }

    proptest! {
        /// Tables of random words: an answer lies in RAM, and nothing panics.
        #[test]
        fn random_tables_never_lead_outside(
            words in prop::collection::vec(any::<u64>(), 512..1536),
            near in prop::collection::vec((0usize..1536, 0u64..4, any::<u8>()), 0..64),
            gva: u64, root in 0u64..0x4000, levels in 3u8..7, extend: bool,
        ) {
            let ram = VecRam::from_bytes(&vec![0; 0x3000]);
            for (i, word) in words.iter().enumerate() {
                ram.poke_u64(Gpa(i as u64 * 8), *word);
            }
            // Some entries that lead on inside these few pages.
            for (i, page, bits) in near {
                ram.poke_u64(Gpa(i as u64 * 8), page << 12 | u64::from(bits));
            }
            let gva = if extend { Gva(gva | 0xffff_8000_0000_0000) } else { Gva(gva) };
            let tables = PageTables { root: Gpa(root), levels };
            if let Ok(mapped) = tables.walk(&ram, gva) {
                prop_assert!(ram.layout().place(mapped.gpa).is_some());
                prop_assert!(mapped.contiguous >= 1);
            }
            let _ = tables.read(&ram, gva, &mut [0; 100]);
        }
    }
}
