//! The kernel as it was built: what memory is compared with.
//!
//! A vmlinuz holds the kernel as an ELF file, and behind it the list of the
//! places that KASLR adds its slide to (`handle_relocations` in
//! arch/x86/boot/compressed/misc.c): so it says all that the kernel's text is
//! before the kernel patches itself, wherever it was loaded. A vmlinux lacks
//! that list.
//!
//! The file may be anybody's. Every length is checked, and nothing of it is
//! believed but what it says of itself.

use std::ops::Range;

use object::read::elf::{ElfFile64, FileHeader};
use object::{Endianness, Object, ObjectSection};

use crate::kernel::Gva;

/// Relocations name the lower half of an address; the upper half is this.
const UPPER: u64 = 0xffff_ffff_0000_0000;
/// The most sections that are kept.
const MAX_SECTIONS: usize = 1024;

/// What is wrong with a trusted image.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ImageFault {
    /// It is no ELF file for x86-64.
    #[error("the kernel in it is no ELF file that can be read: {0}")]
    Elf(String),
    /// A part that is needed is not there.
    #[error("the kernel in it has no {0}")]
    Missing(&'static str),
    /// Nothing follows the ELF file, or not what should.
    #[error(
        "it does not say what address randomization changes in it; take the vmlinuz that the \
         guest boots, or its linux-image package, not a vmlinux"
    )]
    NoRelocations,
}

/// A kernel as it was built.
#[derive(Debug)]
pub struct Image {
    bytes: Vec<u8>,
    sections: Vec<Section>,
    relocations: Vec<Relocation>,
}

/// A section that is loaded, at its link-time address.
#[derive(Debug)]
struct Section {
    name: String,
    address: u64,
    /// In the file.
    range: Range<usize>,
}

/// A place that the slide changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Relocation {
    address: u64,
    kind: Kind,
}

/// How.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    /// It is added to 32 bits.
    Add32,
    /// It is taken from 32 bits.
    Subtract32,
    /// It is added to 64 bits.
    Add64,
}

impl Image {
    /// Reads what was unpacked from a vmlinuz: the ELF file, and what follows.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(bytes: Vec<u8>) -> Result<Self, ImageFault> {
        let damaged = |error: object::read::Error| ImageFault::Elf(error.to_string());
        let elf = ElfFile64::<Endianness>::parse(&*bytes).map_err(damaged)?;
        let (header, endian) = (elf.elf_header(), elf.endian());
        let heads = u64::from(header.e_shentsize(endian)) * u64::from(header.e_shnum(endian));
        let mut end = header.e_shoff(endian).saturating_add(heads);
        let mut sections = Vec::new();
        for section in elf.sections().take(MAX_SECTIONS) {
            let Some((start, length)) = section.file_range() else {
                continue;
            };
            let stop = start.saturating_add(length);
            end = end.max(stop);
            let range = match (usize::try_from(start), usize::try_from(stop)) {
                (Ok(start), Ok(stop)) if stop <= bytes.len() => start..stop,
                _ => continue,
            };
            if section.address() >= UPPER {
                sections.push(Section {
                    name: section.name().unwrap_or_default().to_owned(),
                    address: section.address(),
                    range,
                });
            }
        }
        let tail = usize::try_from(end).ok().and_then(|end| bytes.get(end..));
        let relocations = tail
            .and_then(relocations)
            .ok_or(ImageFault::NoRelocations)?;
        sections.sort_by_key(|section| section.address);
        Ok(Self {
            sections,
            relocations,
            bytes,
        })
    }

    /// A section's link-time address and content.
    pub(super) fn section(&self, name: &str) -> Option<(Gva, &[u8])> {
        let found = self.sections.iter().find(|section| section.name == name)?;
        Some((Gva(found.address), self.bytes.get(found.range.clone())?))
    }

    /// The sections whose names begin so.
    pub(super) fn sections<'a>(
        &'a self,
        start: &'a str,
    ) -> impl Iterator<Item = (&'a str, Gva, &'a [u8])> + 'a {
        self.sections.iter().filter_map(move |section| {
            let rest = section.name.strip_prefix(start)?;
            let bytes = self.bytes.get(section.range.clone())?;
            Some((rest, Gva(section.address), bytes))
        })
    }

    /// What was linked at `at`, if all of it lies in one section.
    pub(super) fn at(&self, at: Gva, length: usize) -> Option<&[u8]> {
        let bytes = self.from(at)?;
        bytes.get(..length)
    }

    /// What was linked at `at`, up to the section's end but no more than
    /// `length` bytes.
    pub(super) fn up_to(&self, at: Gva, length: usize) -> Option<&[u8]> {
        let bytes = self.from(at)?;
        bytes.get(..length.min(bytes.len()))
    }

    /// From an address to the end of its section.
    fn from(&self, at: Gva) -> Option<&[u8]> {
        let after = self
            .sections
            .partition_point(|section| section.address <= at.0);
        let section = self.sections.get(after.checked_sub(1)?)?;
        let within = usize::try_from(at.0 - section.address).ok()?;
        self.bytes.get(section.range.clone())?.get(within..)
    }

    /// Where addresses lie in the image, and what each is; all as linked.
    pub(super) fn pointers(&self) -> impl Iterator<Item = (Gva, Gva)> + '_ {
        let wide = self
            .relocations
            .iter()
            .filter(|one| one.kind == Kind::Add64);
        wide.filter_map(|relocation| {
            let at = Gva(relocation.address);
            let word = self.at(at, 8)?.try_into().ok()?;
            Some((at, Gva(u64::from_le_bytes(word))))
        })
    }

    /// The same, as it is where the kernel was moved by `slide`.
    pub(super) fn moved(&self, at: Gva, length: usize, slide: u64) -> Option<Vec<u8>> {
        let mut bytes = self.at(at, length)?.to_vec();
        let end = at.0.checked_add(length as u64)?;
        // One may begin before and reach in.
        let first = self
            .relocations
            .partition_point(|relocation| relocation.address < at.0.saturating_sub(7));
        for relocation in self.relocations.get(first..)? {
            if relocation.address >= end {
                break;
            }
            self.relocate(*relocation, at, slide, &mut bytes);
        }
        Some(bytes)
    }

    /// Changes of `bytes`, which begin at `at`, what a relocation has there.
    fn relocate(&self, relocation: Relocation, at: Gva, slide: u64, bytes: &mut [u8]) {
        let width = match relocation.kind {
            Kind::Add32 | Kind::Subtract32 => 4,
            Kind::Add64 => 8,
        };
        let Some(built) = self.at(Gva(relocation.address), width) else {
            return;
        };
        let mut word = [0; 8];
        word.iter_mut()
            .zip(built)
            .for_each(|(to, from)| *to = *from);
        let word = u64::from_le_bytes(word);
        let word = match relocation.kind {
            Kind::Add32 | Kind::Add64 => word.wrapping_add(slide),
            Kind::Subtract32 => word.wrapping_sub(slide),
        };
        for (address, byte) in (relocation.address..).zip(&word.to_le_bytes()[..width]) {
            let place = address
                .checked_sub(at.0)
                .and_then(|within| usize::try_from(within).ok());
            if let Some(place) = place.and_then(|within| bytes.get_mut(within)) {
                *place = *byte;
            }
        }
    }
}

/// The three lists behind the ELF file, each behind a zero: of 64-bit places,
/// of 32-bit places that are subtracted from, and of 32-bit places. The second
/// is not there in later kernels (6.15), which tell per-CPU variables another
/// way. The lists are read from their end, as the kernel does.
fn relocations(tail: &[u8]) -> Option<Vec<Relocation>> {
    if tail.len() % 4 != 0 {
        return None;
    }
    let lists = lists(records(tail).map(u32::from_le_bytes));
    let kinds: &[Kind] = match lists.len() {
        3 => &[Kind::Add64, Kind::Subtract32, Kind::Add32],
        2 => &[Kind::Add64, Kind::Add32],
        _ => return None,
    };
    let mut all: Vec<Relocation> = Vec::new();
    for (list, &kind) in lists.iter().zip(kinds) {
        all.extend(list.iter().map(|&low| Relocation {
            address: UPPER | u64::from(low),
            kind,
        }));
    }
    all.sort();
    Some(all)
}

/// The records of a table, a cut last one left out.
pub(super) fn records<const N: usize>(table: &[u8]) -> impl Iterator<Item = [u8; N]> + '_ {
    let records = table.chunks_exact(N);
    records.filter_map(|record| record.try_into().ok())
}

/// What stands behind each zero; nothing if there is something before the first.
fn lists(words: impl Iterator<Item = u32>) -> Vec<Vec<u32>> {
    let mut lists: Vec<Vec<u32>> = Vec::new();
    for word in words {
        match (word, lists.last_mut()) {
            (0, _) => lists.push(Vec::new()),
            (_, Some(list)) => list.push(word),
            (_, None) => return Vec::new(),
        }
    }
    lists
}

#[cfg(test)]
impl Image {
    /// One with these sections, and these places that the slide changes: 64
    /// bits, or else 32.
    pub(super) fn made_of(sections: &[(&str, u64, &[u8])], places: &[(u64, bool)]) -> Self {
        let mut image = Self {
            bytes: Vec::new(),
            sections: Vec::new(),
            relocations: Vec::new(),
        };
        for (name, address, bytes) in sections {
            let start = image.bytes.len();
            image.bytes.extend_from_slice(bytes);
            image.sections.push(Section {
                name: (*name).to_owned(),
                address: *address,
                range: start..image.bytes.len(),
            });
        }
        let relocation = |&(address, wide): &(u64, bool)| Relocation {
            address,
            kind: if wide { Kind::Add64 } else { Kind::Add32 },
        };
        image.relocations = places.iter().map(relocation).collect();
        image
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tail(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    #[test]
    fn the_places_that_the_slide_changes_are_those_behind_the_zeros() {
        let read = |words: &[u32]| {
            let all = relocations(&tail(words))?;
            let places = all.iter().map(|one| (one.address & !UPPER, one.kind));
            Some(places.collect::<Vec<_>>())
        };
        let three = read(&[0, 8, 0, 0x20, 0, 0x10, 0x30]);
        let expected = vec![
            (8, Kind::Add64),
            (0x10, Kind::Add32),
            (0x20, Kind::Subtract32),
            (0x30, Kind::Add32),
        ];
        assert_eq!(three, Some(expected));
        let two = read(&[0, 8, 0, 0x10]);
        assert_eq!(two, Some(vec![(8, Kind::Add64), (0x10, Kind::Add32)]));
        for none in [&[][..], &[0, 8], &[5, 0, 8, 0, 0], &[0, 0, 0, 0]] {
            assert_eq!(read(none), None, "{none:?}");
        }
        assert_eq!(relocations(&[0; 9]), None);
    }

    #[test]
    fn a_moved_piece_has_the_slide_where_it_belongs_even_at_its_ends() {
        let bytes: Vec<u8> = (0..32).collect();
        let base = UPPER + 0x100;
        let image = Image::made_of(
            &[(".text", base, &bytes)],
            &[(base + 2, false), (base + 8, true)],
        );
        let whole = image.moved(Gva(base), 32, 0x0101_0000).expect("all of it");
        assert_eq!(whole[2..6], [2, 3, 5, 6]);
        assert_eq!(whole[8..16], [8, 9, 11, 12, 12, 13, 14, 15]);
        for start in 0..32 {
            for end in start..32 {
                let piece = image.moved(Gva(base + start as u64), end - start, 0x0101_0000);
                assert_eq!(piece.as_deref(), whole.get(start..end), "{start}..{end}");
            }
        }
        assert_eq!(image.moved(Gva(base + 30), 3, 0), None);
        assert_eq!(image.at(Gva(base - 1), 1), None);
    }

    #[test]
    fn what_is_no_kernel_of_a_boot_image_is_refused() {
        assert!(matches!(Image::parse(vec![0; 64]), Err(ImageFault::Elf(_))));
        let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
        elf.resize(64, 0);
        (elf[16], elf[18], elf[20]) = (2, 62, 1);
        elf[52] = 64;
        assert_eq!(Image::parse(elf).unwrap_err(), ImageFault::NoRelocations);
    }
}
