//! The list of symbols that a kernel carries in its image, for its own use.
//!
//! Nothing says where its tables are in an image without .symtab. But one of
//! them gives itself away: `kallsyms_token_table` holds what each byte of a
//! packed name stands for, and digits stand for themselves. From there on,
//! every table is checked against another one before it is believed:
//!
//! ```text
//! up to 6.4    offsets, relative_base, num_syms, names, markers, [seqs,] token_table, token_index
//! from 6.5 on  num_syms, names, markers, token_table, token_index, offsets, relative_base, seqs
//! ```
//!
//! (scripts/kallsyms.c, `write_src()`; each begins at a multiple of 8.) The
//! tokens must be where `token_index` says, each 256th name where `markers`
//! says, and the addresses in order.
//!
//! The image may be a guest's: each read is bounded by it, and so is the work.

use memchr::memmem;

use super::bytes::{u16_at, u32_at, u64_at};
use super::Fault;

/// What the tables are aligned to.
const ALIGN: usize = 8;

/// How many bytes a name can be made of: each stands for one of these.
const TOKENS: usize = 256;

/// A token is a part of a name, and a name has 512 bytes at most
/// (KSYM_NAME_LEN, include/linux/kallsyms.h).
const MAX_TOKEN: usize = 512;
const MAX_NAME: usize = 1024;

/// A marker for each block of so many names.
const BLOCK: usize = 256;

/// Fewer and more symbols than any kernel has.
const MIN_SYMBOLS: usize = 64;
pub(super) const MAX_SYMBOLS: usize = 4 << 20;

/// The most bytes that all names together have. A kernel's have some 10 MiB; a
/// few bytes of an image can stand for a thousand.
pub(super) const MAX_TEXT: usize = 256 << 20;

/// How far before the tokens the names may begin.
const MAX_NAMES: usize = 128 << 20;

/// How many names are walked through, all tries together.
const MAX_STEPS: usize = 64 << 20;

/// How many places are looked at that have the digits in a row.
const MAX_HITS: usize = 64;

/// Where kernels are linked: __START_KERNEL_map and a GiB from there on
/// (arch/x86/include/asm/page_64_types.h).
const IMAGE: std::ops::Range<u64> = 0xffff_ffff_8000_0000..0xffff_ffff_c000_0000;

/// One symbol: address, kind and name.
pub(super) type Entry = (u64, u8, String);

/// What was found.
#[derive(Debug)]
pub(super) struct Kallsyms {
    /// In the order of their addresses.
    pub(super) symbols: Vec<Entry>,
    /// Where the tables are in the image that list addresses, by the symbol
    /// that each has, which kallsyms itself leaves out.
    pub(super) places: [(&'static str, usize); 3],
}

/// Finds and reads the tables in the image of a kernel.
pub(super) fn read(image: &[u8]) -> Result<Kallsyms, Fault> {
    let mut steps = MAX_STEPS;
    let mut why = Fault::NoKallsyms("no table of tokens");
    for tokens in token_tables(image) {
        why = Fault::NoKallsyms("no list of names");
        let Some(names) = find_names(image, &tokens, &mut steps) else {
            continue;
        };
        why = Fault::NoKallsyms("no list of addresses in order");
        let Some(addresses) = find_addresses(image, &tokens, &names) else {
            continue;
        };
        if text_len(image, &tokens, &names).is_none_or(|len| len > MAX_TEXT) {
            return Err(Fault::TooManySymbols);
        }
        let symbols = names
            .ranges
            .iter()
            .zip(&addresses.list)
            .map(|(range, &address)| expand(image.get(range.clone())?, &tokens, address))
            .collect::<Option<Vec<_>>>()
            .ok_or(Fault::NoKallsyms("a name that cannot be one"))?;
        return Ok(Kallsyms {
            symbols,
            places: [
                ("kallsyms_num_syms", names.count_at),
                ("kallsyms_offsets", addresses.offsets_at),
                ("kallsyms_relative_base", addresses.base_at),
            ],
        });
    }
    Err(why)
}

/// The table of tokens and the index behind it.
struct Tokens<'a> {
    at: usize,
    /// Just after the index.
    end: usize,
    list: Vec<&'a [u8]>,
}

/// Every place that passes as the two tables; hardly ever more than one.
fn token_tables(image: &[u8]) -> impl Iterator<Item = Tokens<'_>> {
    const DIGITS: &[u8; 20] = b"0\x001\x002\x003\x004\x005\x006\x007\x008\x009\0";
    memmem::find_iter(image, DIGITS)
        .take(MAX_HITS)
        .filter_map(|zero| {
            // Somewhere before, 48 tokens away.
            let furthest = zero.saturating_sub(usize::from(b'0') * 64);
            (furthest..=zero)
                .rev()
                .filter(|at| at % ALIGN == 0)
                .find_map(|at| tokens_at(image, at, zero))
        })
}

fn tokens_at(image: &[u8], at: usize, zero: usize) -> Option<Tokens<'_>> {
    let mut list = Vec::with_capacity(TOKENS);
    let mut starts = Vec::with_capacity(TOKENS);
    let mut next = at;
    while list.len() < TOKENS {
        if list.len() == usize::from(b'0') && next != zero {
            return None;
        }
        let rest = image.get(next..)?;
        let len = memchr::memchr(0, rest.get(..MAX_TOKEN.min(rest.len()))?)?;
        starts.push(u16::try_from(next - at).ok()?);
        list.push(rest.get(..len)?);
        next += len + 1;
    }
    let index = next.checked_next_multiple_of(ALIGN)?;
    let same = |(number, start): (usize, &u16)| u16_at(image, index + 2 * number) == Some(*start);
    let end = index + 2 * TOKENS;
    starts
        .iter()
        .enumerate()
        .all(same)
        .then_some(Tokens { at, end, list })
}

/// The list of packed names.
struct Names {
    /// Where the number of symbols is, just before them.
    count_at: usize,
    /// The packed bytes of each.
    ranges: Vec<std::ops::Range<usize>>,
}

/// Looks for the number of symbols, which comes before their names: backwards
/// from the tokens, a number after which that many names follow, which end
/// where markers begin that agree with them.
fn find_names(image: &[u8], tokens: &Tokens<'_>, steps: &mut usize) -> Option<Names> {
    let furthest = tokens.at.saturating_sub(MAX_NAMES);
    let mut count_at = tokens.at;
    while count_at >= furthest + ALIGN {
        count_at -= ALIGN;
        let word = u64_at(image, count_at)?;
        // Padded with zeros to the next table.
        let count = usize::try_from(word).unwrap_or(usize::MAX);
        if !(MIN_SYMBOLS..=MAX_SYMBOLS).contains(&count) {
            continue;
        }
        for encoding in [Length::Long, Length::Byte] {
            let start = count_at + ALIGN;
            if let Some(ranges) = names_at(image, start, count, tokens.at, encoding, steps) {
                return Some(Names { count_at, ranges });
            }
        }
    }
    None
}

/// How the length of a packed name is written.
///
/// Up to 6.0 in one byte. Since 6.1 (73bbb94466fd, "kallsyms: support big
/// kernel symbols") a byte from 0x80 on is the low seven bits, and another
/// byte has the higher ones. They differ for lengths of 128 to 255 only, and
/// the markers tell which it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Length {
    Byte,
    Long,
}

impl Length {
    /// The length written at `at`, and how many bytes it takes.
    fn read(self, image: &[u8], at: usize) -> Option<(usize, usize)> {
        let low = usize::from(*image.get(at)?);
        if self == Self::Byte || low < 0x80 {
            return Some((low, 1));
        }
        let high = usize::from(*image.get(at.checked_add(1)?)?);
        Some((low & 0x7f | high << 7, 2))
    }
}

fn names_at(
    image: &[u8],
    start: usize,
    count: usize,
    limit: usize,
    encoding: Length,
    steps: &mut usize,
) -> Option<Vec<std::ops::Range<usize>>> {
    let mut ranges = Vec::new();
    let mut markers = Vec::new();
    let mut at = start;
    for number in 0..count {
        *steps = steps.checked_sub(1)?;
        if number % BLOCK == 0 {
            markers.push(u32::try_from(at - start).ok()?);
        }
        let (len, taken) = encoding.read(image, at)?;
        let name = at + taken;
        at = name.checked_add(len)?;
        // A name has its kind at least.
        if len == 0 || at > limit {
            return None;
        }
        ranges.push(name..at);
    }
    let there = at.checked_next_multiple_of(ALIGN)?;
    let same = |(number, offset): (usize, &u32)| u32_at(image, there + 4 * number) == Some(*offset);
    markers.iter().enumerate().all(same).then_some(ranges)
}

/// The addresses of all symbols, and where they were.
struct Addresses {
    offsets_at: usize,
    base_at: usize,
    list: Vec<u64>,
}

/// The addresses are before the names or after the tokens: where they come
/// out in order.
fn find_addresses(image: &[u8], tokens: &Tokens<'_>, names: &Names) -> Option<Addresses> {
    let count = names.ranges.len();
    let size = (4 * count).next_multiple_of(ALIGN);
    let before = names.count_at.checked_sub(ALIGN);
    let before = before.and_then(|base| Some((base.checked_sub(size)?, base)));
    let after = tokens.end.next_multiple_of(ALIGN);
    let places = [before, Some((after, after + size))];
    places
        .into_iter()
        .flatten()
        .find_map(|(offsets_at, base_at)| {
            let base = u64_at(image, base_at).filter(|base| IMAGE.contains(base))?;
            let bytes = image.get(offsets_at..offsets_at + 4 * count)?;
            let words = bytes
                .chunks_exact(4)
                .filter_map(|word| word.try_into().ok());
            let offsets: Vec<i32> = words.map(i32::from_le_bytes).collect();
            let list = addresses(&offsets, base);
            list.is_sorted().then_some(Addresses {
                offsets_at,
                base_at,
                list,
            })
        })
}

/// From offsets to addresses, `kallsyms_sym_address()` in kernel/kallsyms.c.
///
/// With CONFIG_KALLSYMS_ABSOLUTE_PERCPU (x86 up to 6.14) what is below 0 stands
/// for `base - 1 - offset`, and all else for itself. Without, each is added to
/// the base; none is negative then, for no image has 2 GiB.
fn addresses(offsets: &[i32], base: u64) -> Vec<u64> {
    let percpu = offsets.iter().any(|&offset| offset < 0);
    let address = |&offset: &i32| match (percpu, u64::from(offset.unsigned_abs())) {
        (true, absolute) if offset >= 0 => absolute,
        (true, negative) => base.wrapping_sub(1).wrapping_add(negative),
        (false, offset) => base.wrapping_add(offset),
    };
    offsets.iter().map(address).collect()
}

/// How many bytes all names together stand for.
fn text_len(image: &[u8], tokens: &Tokens<'_>, names: &Names) -> Option<usize> {
    let packed = names.ranges.iter().map(|range| image.get(range.clone()));
    let mut all = 0usize;
    for name in packed {
        for &byte in name? {
            all = all.checked_add(tokens.list.get(usize::from(byte))?.len())?;
        }
    }
    Some(all)
}

/// The name that packed bytes stand for; its first letter is the kind.
fn expand(packed: &[u8], tokens: &Tokens<'_>, address: u64) -> Option<Entry> {
    let mut name = Vec::new();
    for &byte in packed {
        name.extend_from_slice(tokens.list.get(usize::from(byte))?);
        if name.len() > MAX_NAME {
            return None;
        }
    }
    let (&kind, name) = name.split_first()?;
    let text = kind.is_ascii_graphic() && name.iter().all(u8::is_ascii_graphic);
    if !text || name.is_empty() {
        return None;
    }
    Some((address, kind, String::from_utf8(name.to_vec()).ok()?))
}

#[cfg(test)]
#[path = "kallsyms/tests.rs"]
pub(super) mod tests;
