//! Symbols as a table: what is kept of a file once it has been read, so that
//! neither lines nor tables of the kernel are taken apart again.
//!
//! ```text
//! u32 symbols of the image   u32 of modules   u64 1 + the modules' slide, or 0
//! for each of the image      u64 address   u32, u16 name in the text   u8 kind   u8 0
//! for each of a module       the same, then u32, u32 module's name in the text
//! the rest                   the text: all names, one after the other
//! ```
//!
//! All numbers little-endian, symbols in the order of their addresses. A table
//! is checked as it is read, so that a damaged one gives an error or wrong
//! names, never a panic; telling wrong names is up to whoever stores it, with
//! a checksum.

use std::collections::HashMap;
use std::io::{self, Write};
use std::ops::Range;

use super::{Symbol, Symbols, SymbolsFault};
use crate::kernel::Gva;

/// Where a kernel is linked to: __START_KERNEL, that is __START_KERNEL_map and
/// CONFIG_PHYSICAL_START, which is 16 MiB unless somebody changes it
/// (arch/x86/include/asm/page_types.h).
const LINKED: Gva = Gva(0xffff_ffff_8100_0000);

/// What KASLR adds to that is a multiple of 2 MiB, below 1 GiB.
const SLIDE_STEP: u64 = 2 << 20;
const MAX_SLIDE: u64 = 1 << 30;

/// Bytes before the records, and of a record of the image and of a module.
const HEAD: usize = 16;
const SYMBOL: usize = 16;
const MODULE_SYMBOL: usize = 24;

/// Why bytes are no table.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TableFault {
    /// It is shorter than it says.
    #[error("it is cut short")]
    Cut,
    /// A record cannot be right.
    #[error("symbol {0} of it is damaged")]
    Record(usize),
    /// The addresses go up and down.
    #[error("its symbols are not in order")]
    Order,
    /// The names are not plain text.
    #[error("its names are not text")]
    Names,
    /// It is no list of a kernel's symbols.
    #[error(transparent)]
    Symbols(#[from] SymbolsFault),
}

impl Symbols {
    /// Takes off the slide that KASLR added in the boot that the file is of,
    /// so that the addresses are those that the kernel was linked with. What
    /// is not in the kernel's image (per-CPU offsets, modules) stays, and
    /// modules are then known in a boot with that slide only.
    ///
    /// # Errors
    /// As [`Symbols::parse`]; none for what loaded before.
    pub fn normalise(mut self) -> Result<Self, SymbolsFault> {
        let Some(text) = self.address("_text") else {
            return Err(SymbolsFault::NoText("_text"));
        };
        let slide = text.wrapping_sub(LINKED);
        if !self.modules.is_empty() && self.modules_slide.is_none() {
            self.modules_slide = Some(0);
        }
        if slide == 0 || slide >= MAX_SLIDE || slide % SLIDE_STEP != 0 {
            return Ok(self);
        }
        // All of one stretch, so that the order stays.
        for symbol in &mut self.image {
            if symbol.address >= text.0 {
                symbol.address -= slide;
            }
        }
        self.modules_slide = self.modules_slide.map(|_| slide);
        self.image.sort_by_key(|symbol| symbol.address);
        let modules_slide = self.modules_slide;
        let mut symbols = Self::indexed(self.text, self.image, self.modules)?;
        symbols.modules_slide = modules_slide;
        Ok(symbols)
    }

    /// The table.
    pub fn to_table(&self) -> Vec<u8> {
        let mut text = String::new();
        // Positions fit: the names are part of a text that does.
        let mut add = |name: &str| {
            let start = text.len() as u32;
            text.push_str(name);
            start
        };
        let mut table = Vec::new();
        table.extend((self.image.len() as u32).to_le_bytes());
        table.extend((self.modules.len() as u32).to_le_bytes());
        let slide = self.modules_slide.map_or(0, |slide| slide.wrapping_add(1));
        table.extend(slide.to_le_bytes());
        let put = |table: &mut Vec<u8>, symbol: &Symbol, name: u32| {
            table.extend(symbol.address.to_le_bytes());
            table.extend(name.to_le_bytes());
            table.extend(symbol.len.to_le_bytes());
            table.extend([symbol.kind, 0]);
        };
        for symbol in &self.image {
            put(&mut table, symbol, add(self.name_of(symbol)));
        }
        // A module has many symbols: its name once.
        let mut modules: HashMap<&str, u32> = HashMap::new();
        for (symbol, module) in &self.modules {
            put(&mut table, symbol, add(self.name_of(symbol)));
            let name = self.part(module);
            let start = *modules.entry(name).or_insert_with(|| add(name));
            table.extend(start.to_le_bytes());
            table.extend((name.len() as u32).to_le_bytes());
        }
        table.extend(text.as_bytes());
        table
    }

    /// Reads a table.
    ///
    /// # Errors
    /// A [`TableFault`] that says what is wrong with it.
    pub fn from_table(table: &[u8]) -> Result<Self, TableFault> {
        let head: &[u8; HEAD] = table.first_chunk().ok_or(TableFault::Cut)?;
        let [image, modules] = [word(head, 0), word(head, 4)].map(|count| count as usize);
        let slide = (u64::from(word(head, 12)) << 32 | u64::from(word(head, 8))).checked_sub(1);
        let rest = table.get(HEAD..).ok_or(TableFault::Cut)?;
        let (image, rest) = split(rest, image, SYMBOL)?;
        let (modules, names) = split(rest, modules, MODULE_SYMBOL)?;
        if !names.iter().all(u8::is_ascii_graphic) {
            return Err(TableFault::Names);
        }
        let inside = |start: u32, len: u32| {
            len > 0 && u64::from(start) + u64::from(len) <= names.len() as u64
        };
        let symbol = |record: &[u8; SYMBOL]| {
            let symbol = Symbol {
                address: u64::from(word(record, 4)) << 32 | u64::from(word(record, 0)),
                name: word(record, 8),
                len: word(record, 12) as u16,
                kind: record[14],
            };
            let good = inside(symbol.name, symbol.len.into()) && symbol.kind.is_ascii_graphic();
            good.then_some(symbol)
        };
        let image = image
            .chunks_exact(SYMBOL)
            .enumerate()
            .map(|(number, record)| {
                let symbol = record.first_chunk().and_then(symbol);
                symbol.ok_or(TableFault::Record(number))
            })
            .collect::<Result<Vec<_>, _>>()?;
        let modules = modules
            .chunks_exact(MODULE_SYMBOL)
            .enumerate()
            .map(|(number, record)| {
                let module = || {
                    let record: &[u8; MODULE_SYMBOL] = record.first_chunk()?;
                    let (start, len) = (word(record, 16), word(record, 20));
                    let name = inside(start, len).then(|| start..start.saturating_add(len))?;
                    Some((symbol(record.first_chunk()?)?, name))
                };
                module().ok_or(TableFault::Record(image.len().saturating_add(number)))
            })
            .collect::<Result<Vec<_>, _>>()?;
        let in_order = image.is_sorted_by_key(|symbol| symbol.address)
            && modules.is_sorted_by_key(|(symbol, _)| symbol.address);
        if !in_order {
            return Err(TableFault::Order);
        }
        let text = String::from_utf8(names.to_vec()).map_err(|_| TableFault::Names)?;
        let mut symbols = Self::indexed(text, image, modules)?;
        symbols.modules_slide = slide;
        Ok(symbols)
    }

    /// Writes them as a System.map for a boot with this slide: a saved
    /// /proc/kallsyms, if there are modules that are known in that boot.
    ///
    /// # Errors
    /// What `out` says.
    pub fn write_map(&self, mut out: impl Write, slide: u64) -> io::Result<()> {
        for symbol in &self.image {
            let kind = char::from(symbol.kind);
            writeln!(
                out,
                "{:016x} {kind} {}",
                symbol.address,
                self.name_of(symbol)
            )?;
        }
        if self.modules_slide.is_some_and(|known| known != slide) {
            return Ok(());
        }
        for (symbol, module) in &self.modules {
            let (kind, module) = (char::from(symbol.kind), self.part(module));
            let name = self.name_of(symbol);
            writeln!(out, "{:016x} {kind} {name}\t[{module}]", symbol.address)?;
        }
        Ok(())
    }

    /// A piece of the text.
    pub(super) fn part(&self, range: &Range<u32>) -> &str {
        let range = range.start as usize..range.end as usize;
        self.text.get(range).unwrap_or("")
    }
}

/// The little-endian word at `at`, which is well inside.
fn word<const N: usize>(record: &[u8; N], at: usize) -> u32 {
    u32::from_le_bytes([record[at], record[at + 1], record[at + 2], record[at + 3]])
}

/// Divides after `count` records of `size` bytes.
fn split(bytes: &[u8], count: usize, size: usize) -> Result<(&[u8], &[u8]), TableFault> {
    let len = count.checked_mul(size).ok_or(TableFault::Cut)?;
    bytes.split_at_checked(len).ok_or(TableFault::Cut)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SAVED: &str = "0000000000001000 A percpu\nffffffff8a000000 T _text\n\
        ffffffff8a000000 T _stext\nffffffff8a000040 t foo\nffffffff8a001000 T _etext\n\
        ffffffffc0000000 t one\t[ext4]\nffffffffc0000040 T two\t[ext4]\n\
        ffffffffc0100000 t three\t[xfs]\n";

    fn saved() -> Symbols {
        Symbols::parse(SAVED.into()).unwrap()
    }

    fn map(symbols: &Symbols, slide: u64) -> String {
        let mut out = Vec::new();
        symbols.write_map(&mut out, slide).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_table_gives_the_same_symbols_again() {
        let again = Symbols::from_table(&saved().to_table()).unwrap();
        assert_eq!(map(&again, 0), SAVED);
        let normal = saved().normalise().unwrap();
        let again = Symbols::from_table(&normal.to_table()).unwrap();
        assert_eq!(again.modules_slide, Some(0x900_0000));
        assert_eq!(map(&again, 0x900_0000), map(&normal, 0x900_0000));
    }

    #[test]
    fn the_slide_is_taken_off_the_image_only() {
        let normal = saved().normalise().unwrap();
        let address = |name| normal.address(name).map(|at| at.0);
        assert_eq!(address("foo"), Some(0xffff_ffff_8100_0040));
        assert_eq!(address("percpu"), Some(0x1000));
        let one = Gva(0xffff_ffff_c000_0000);
        let named = |slide| normal.lookup_module(one, slide).map(|found| found.name);
        assert_eq!((named(0x900_0000), named(0)), (Some("one"), None));
        assert!(map(&normal, 0x900_0000).contains("[xfs]"));
        assert!(!map(&normal, 0).contains('['));
        // Once more changes nothing.
        let again = normal.normalise().unwrap();
        assert_eq!(again.address("foo"), Some(Gva(0xffff_ffff_8100_0040)));
        assert!(again.lookup_module(one, 0x900_0000).is_some());
    }

    #[test]
    fn what_is_no_table_is_refused() {
        let good = saved().to_table();
        let fault = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut table = good.clone();
            change(&mut table);
            Symbols::from_table(&table).expect_err("refused")
        };
        assert_eq!(fault(&|table| table.truncate(15)), TableFault::Cut);
        assert_eq!(fault(&|table| table.truncate(60)), TableFault::Cut);
        assert_eq!(fault(&|table| table[3] = 0xff), TableFault::Cut);
        assert_eq!(
            fault(&|table| table[HEAD + 8 + 3] = 1),
            TableFault::Record(0)
        );
        assert_eq!(fault(&|table| table[HEAD + 14] = 7), TableFault::Record(0));
        assert_eq!(
            fault(&|table| table[HEAD + 2 * SYMBOL + 7] = 0),
            TableFault::Order
        );
        let last = good.len() - 1;
        assert_eq!(fault(&|table| table[last] = 0xe4), TableFault::Names);
        let module = HEAD + 5 * SYMBOL + 20;
        assert_eq!(fault(&|table| table[module] = 0xff), TableFault::Record(5));
    }

    proptest! {
        #[test]
        fn mutated_tables_never_panic(
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
            cut in any::<prop::sample::Index>(),
            address: u64,
        ) {
            let mut table = saved().to_table();
            for (at, byte) in changes {
                let at = at.index(table.len());
                table[at] = byte;
            }
            let len = table.len();
            table.truncate(len - cut.index(8).min(len));
            if let Ok(symbols) = Symbols::from_table(&table) {
                let _ = symbols.lookup(Gva(address));
                let _ = symbols.lookup_module(Gva(address), 0);
                let _ = map(&symbols, 0);
                let _ = symbols.normalise();
            }
        }
    }
}
