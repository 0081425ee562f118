//! Which of the kernel's memory can be executed.
//!
//! By the kernel's own page tables (`init_top_pgt`): what they map present and
//! without the no-execute bit at any level, in the upper half of the address
//! space. Tables are a guest's to fill: they may lead to each other, so the
//! number of tables that are read is bounded, and each entry is loaded once.

use std::ops::Range;

use crate::ram::{Gpa, GuestRam};

use super::paging::{ADDRESS, LARGE, PRESENT, TABLE};
use super::{Gva, PageTables};

/// Bit 63 of an entry: what it maps cannot be executed.
const NO_EXECUTE: u64 = 1 << 63;
/// A guest of 64 GiB that maps its memory with small pages throughout has some
/// 33,000; those of the direct map are of larger pages as a rule.
const MAX_TABLES: u32 = 40_000;
/// Where more pieces would be told apart, the guest makes them up.
const MAX_PIECES: usize = 65_536;
const ENTRIES: u64 = TABLE / 8;

/// What can be executed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Executable {
    /// Runtime addresses, in order; pieces next to each other are one.
    pub pieces: Vec<Range<Gva>>,
    /// Whether all tables were read.
    pub complete: bool,
}

impl PageTables {
    /// All that can be executed in the kernel's half.
    pub fn executable(&self, ram: &dyn GuestRam) -> Executable {
        let mut walk = Walk {
            ram,
            found: Executable {
                pieces: Vec::new(),
                complete: true,
            },
            left: MAX_TABLES,
        };
        // The upper half of the root's entries; the address bits above the
        // highest one that is translated are copies of it.
        let levels = self.levels.clamp(4, 5);
        let shift = 12 + 9 * u32::from(levels);
        let start = u64::MAX << (shift - 1);
        walk.table(Gpa(self.root.0 & ADDRESS), levels, start, ENTRIES / 2);
        walk.found
    }
}

struct Walk<'a> {
    ram: &'a dyn GuestRam,
    found: Executable,
    left: u32,
}

impl Walk<'_> {
    /// A table whose entry `first` maps `start`.
    fn table(&mut self, table: Gpa, level: u8, start: u64, first: u64) {
        let Some(left) = self.left.checked_sub(1) else {
            self.found.complete = false;
            return;
        };
        self.left = left;
        let mut bytes = [0; TABLE as usize];
        if self.ram.read(table, &mut bytes).is_err() {
            return;
        }
        let size = 1u64 << (12 + 9 * (u32::from(level) - 1));
        let entries = bytes.chunks_exact(8).skip(first as usize);
        for (entry, at) in entries.zip(0u64..) {
            let entry = entry.try_into().map_or(0, u64::from_le_bytes);
            if entry & PRESENT == 0 || entry & NO_EXECUTE != 0 {
                continue;
            }
            let at = start.wrapping_add(at.wrapping_mul(size));
            if level == 1 || (level <= 3 && entry & LARGE != 0) {
                self.piece(at, size);
            } else {
                self.table(Gpa(entry & ADDRESS), level - 1, at, 0);
            }
        }
    }

    fn piece(&mut self, start: u64, size: u64) {
        let end = Gva(start.saturating_add(size));
        let full = self.found.pieces.len() >= MAX_PIECES;
        match self.found.pieces.last_mut() {
            Some(last) if last.end.0 == start => last.end = end,
            _ if full => self.found.complete = false,
            _ => self.found.pieces.push(Gva(start)..end),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ram::{Layout, VecRam};

    const TEXT: u64 = 0xffff_ffff_8100_0000;

    /// Tables from 0x1000 on that map some pages from `TEXT` on.
    fn tables(levels: u8, pages: &[u64]) -> (VecRam, PageTables) {
        let ram = VecRam::new(Layout::flat(16 << 20).unwrap());
        for level in (2..=levels).rev() {
            let table = 0x1000 * u64::from(levels - level + 1);
            let index = TEXT >> (12 + 9 * (level - 1)) & 0x1ff;
            ram.poke_u64(Gpa(table + index * 8), (table + 0x1000) | PRESENT);
        }
        let last = 0x1000 * u64::from(levels);
        for (at, &page) in pages.iter().enumerate() {
            ram.poke_u64(Gpa(last + at as u64 * 8), page);
        }
        let root = Gpa(0x1000);
        (ram, PageTables { root, levels })
    }

    #[test]
    fn what_is_present_and_not_forbidden_can_be_executed() {
        for levels in [4, 5] {
            let code = 0x9000 | PRESENT;
            let pages = [code, code, code | NO_EXECUTE, code & !PRESENT, code];
            let (ram, tables) = tables(levels, &pages);
            let found = tables.executable(&ram);
            let page = |from: u64, to: u64| Gva(TEXT + from * 4096)..Gva(TEXT + to * 4096);
            assert_eq!(found.pieces, [page(0, 2), page(4, 5)], "{levels}");
            assert!(found.complete);
            // Forbidden above is forbidden below; a large page is one piece.
            let upper = Gpa(0x1000 * u64::from(levels - 1) + (TEXT >> 21 & 0x1ff) * 8);
            let entry = ram.read_u64(upper).unwrap();
            ram.poke_u64(upper, entry | NO_EXECUTE);
            assert_eq!(tables.executable(&ram).pieces, []);
            ram.poke_u64(upper, 0x20_0000 | PRESENT | LARGE);
            assert_eq!(tables.executable(&ram).pieces, [page(0, 512)]);
        }
    }

    #[test]
    fn tables_that_lead_to_each_other_end() {
        let ram = VecRam::from_bytes(&[0; 0x2000]);
        for index in 0..512 {
            ram.poke_u64(Gpa(0x1000 + index * 8), 0x1000 | PRESENT);
        }
        let tables = PageTables {
            root: Gpa(0x1000),
            levels: 5,
        };
        let found = tables.executable(&ram);
        assert!(!found.complete && found.pieces.len() <= MAX_PIECES);
    }
}
