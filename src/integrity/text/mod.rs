//! The kernel's text in memory, compared with how it was built.

mod nops;
mod patched;
mod sites;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;

use super::image::{Image, ImageFault};
use crate::kernel::{Gva, Symbols};

use patched::Patcher;
use sites::Alternative;

pub(super) use nops::same as same_but_nops;
pub(super) use patched::{fill, jump, Guest, CALL, ENDBR64, INT3, JUMP, NO_ENDBR, RETURN};
pub(super) use sites::Sites;

/// The most places that are told of.
const MAX_CHANGES: usize = 256;
/// Changed bytes that are so close belong together.
const CLOSE: u64 = 8;
/// The longest place of an alternative.
const MAX_PLACE: u64 = 255;

/// What a comparison came to.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct TextReport {
    /// Where text is not what the kernel may have made of it: link-time
    /// addresses, in order.
    pub(in crate::integrity) changes: Vec<Change>,
    /// Changes that there was no room for.
    pub(in crate::integrity) more: u64,
    /// Where Ftrace calls other code than its own: how many places call each,
    /// and the first of them.
    pub(in crate::integrity) trampolines: BTreeMap<u64, (u64, u64)>,
    /// Bytes that were compared.
    pub(in crate::integrity) compared: u64,
}

/// A piece of text that is not what it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Change {
    /// Its first byte, as linked.
    pub(in crate::integrity) at: Gva,
    /// What was built, moved to where it runs.
    pub(in crate::integrity) built: Vec<u8>,
    /// What is there.
    pub(in crate::integrity) memory: Vec<u8>,
}

impl Change {
    /// Where the first branch leads that is there now and was not built, as
    /// linked.
    pub(super) fn leads_to(&self) -> Option<Gva> {
        let places = (self.at.0..).zip(0..self.memory.len());
        let branches = places.filter_map(|(at, index)| {
            let now = jump(at, self.memory.get(index..)?)?;
            let was = self.built.get(index..).and_then(|code| jump(at, code));
            (was != Some(now)).then_some(Gva(now.target))
        });
        branches.into_iter().next()
    }
}

/// Compares `memory`, all of the text from `_stext` to `_etext` of a kernel that
/// runs `slide` from where it was linked.
///
/// # Errors
/// If the image is not one that text can be compared with.
pub(super) fn compare(
    image: &Image,
    sites: &Sites,
    symbols: &Symbols,
    slide: u64,
    memory: &[u8],
    guest: &dyn Guest,
) -> Result<TextReport, ImageFault> {
    let start = symbols.text().start;
    let built = image
        .moved(start, memory.len(), slide)
        .ok_or(ImageFault::Missing("text"))?;
    let trampolines = RefCell::new(BTreeMap::new());
    let note = |at: u64, target: u64| {
        let mut all = trampolines.borrow_mut();
        all.entry(target).or_insert((0u64, at)).0 += 1;
    };
    let text = Text {
        start: start.0,
        built: &built,
        memory,
        image,
        slide,
        sites,
        patcher: Patcher {
            symbols,
            slide,
            guest,
            trampoline: &note,
        },
    };
    let mut report = text.compare();
    report.trampolines = trampolines.into_inner();
    Ok(report)
}

struct Text<'a> {
    start: u64,
    built: &'a [u8],
    memory: &'a [u8],
    image: &'a Image,
    slide: u64,
    sites: &'a Sites,
    patcher: Patcher<'a>,
}

/// Code that may stand somewhere, and where each byte of it is from.
struct Version {
    code: Vec<u8>,
    from: Vec<u64>,
}

impl Text<'_> {
    fn compare(&self) -> TextReport {
        let mut report = TextReport {
            compared: self.memory.len() as u64,
            ..TextReport::default()
        };
        let mut at = 0;
        while let Some(found) = self.next_difference(at) {
            let address = self.start.saturating_add(found as u64);
            let place = self.place(address);
            let end = match place {
                Some(place) => {
                    if !self.explains(&place) {
                        self.change(&place, &mut report);
                    }
                    place.end
                }
                None => {
                    let piece = self.piece(found);
                    self.change(&piece, &mut report);
                    piece.end
                }
            };
            at = usize::try_from(end.saturating_sub(self.start)).unwrap_or(usize::MAX);
        }
        report
    }

    fn next_difference(&self, from: usize) -> Option<usize> {
        let pairs = self.built.get(from..)?.iter().zip(self.memory.get(from..)?);
        let within = pairs
            .into_iter()
            .position(|(built, memory)| built != memory)?;
        from.checked_add(within)
    }

    /// The piece around an address that patches may have changed together: one
    /// place, and those that overlap it.
    fn place(&self, address: u64) -> Option<Range<u64>> {
        let mut whole = self.overlapping(&(address..address.saturating_add(1)))?;
        while let Some(wider) = self.overlapping(&whole).filter(|wider| *wider != whole) {
            whole = wider;
        }
        Some(whole)
    }

    /// The places that overlap a piece, and what lies between.
    fn overlapping(&self, piece: &Range<u64>) -> Option<Range<u64>> {
        let before = piece.start.saturating_sub(MAX_PLACE);
        let alternatives = self.sites.alternatives.range(before..piece.end);
        let alternatives = alternatives.flat_map(|(&at, all)| {
            let lengths = all.iter().map(|one| u64::from(one.length));
            lengths.map(move |length| at..at.saturating_add(length))
        });
        let patches = self.sites.patches.range(before..piece.end);
        let patches = patches.map(|(&at, patch)| at..at.saturating_add(patch.reach()));
        alternatives
            .chain(patches)
            .filter(|place| place.end > piece.start)
            .reduce(|one, other| one.start.min(other.start)..one.end.max(other.end))
    }

    /// Whether what is in memory at a place is one of the versions of it.
    fn explains(&self, place: &Range<u64>) -> bool {
        let Some(memory) = self.slice(self.memory, place) else {
            return false;
        };
        let Some(built) = self.slice(self.built, place) else {
            return false;
        };
        let first = Version {
            code: built.to_vec(),
            from: place.clone().collect(),
        };
        if self.is(&first, place.start, memory) {
            return true;
        }
        let alternatives = self.sites.alternatives.range(place.clone());
        let mut all = alternatives.flat_map(|(&at, all)| all.iter().map(move |one| (at, one)));
        all.any(|(at, one)| {
            self.replaced(&first, place.start, at, one)
                .is_some_and(|version| self.is(&version, place.start, memory))
        })
    }

    fn slice<'b>(&self, of: &'b [u8], place: &Range<u64>) -> Option<&'b [u8]> {
        let start = usize::try_from(place.start.checked_sub(self.start)?).ok()?;
        let length = usize::try_from(place.end.checked_sub(place.start)?).ok()?;
        of.get(start..start.checked_add(length)?)
    }

    /// A version with an alternative put in.
    fn replaced(
        &self,
        version: &Version,
        start: u64,
        at: u64,
        one: &Alternative,
    ) -> Option<Version> {
        let length = usize::from(one.replacement_length);
        let code = self.image.moved(Gva(one.replacement), length, self.slide)?;
        let mut replaced = Version {
            code: version.code.clone(),
            from: version.from.clone(),
        };
        let place = usize::try_from(at.checked_sub(start)?).ok()?;
        let end = place.checked_add(usize::from(one.length))?;
        let (to, from) = (
            replaced.code.get_mut(place..end)?,
            replaced.from.get_mut(place..end)?,
        );
        to.fill(0x90);
        for (index, byte) in code.iter().enumerate() {
            *to.get_mut(index)? = *byte;
            *from.get_mut(index)? = one.replacement.checked_add(index as u64)?;
        }
        Some(replaced)
    }

    /// Whether memory is this version, with what is patched in it, and with NOPs
    /// that are as long but others.
    fn is(&self, version: &Version, start: u64, memory: &[u8]) -> bool {
        let mut index = 0;
        while index < memory.len() {
            let Some(step) = self.step(version, start, memory, index) else {
                return false;
            };
            index += step.max(1);
        }
        true
    }

    fn step(&self, version: &Version, start: u64, memory: &[u8], index: usize) -> Option<usize> {
        let code = version.code.get(index..)?;
        let from = *version.from.get(index)?;
        let here = memory.get(index..)?;
        let at = start.checked_add(index as u64)?;
        // A branch of a replacement leads where it led from there.
        if let (Some(built), Some(moved)) = (jump(from, code), jump(at, here)) {
            let same = built.opcode == moved.opcode && built.length == moved.length;
            let shorter = built.opcode == 0xe9 && moved.opcode == 0xeb;
            let rest = here.get(moved.length..built.length).unwrap_or_default();
            // What follows a jump is never run.
            let idle = nops::are(rest) || rest.iter().all(|byte| *byte == INT3);
            if built.target == moved.target && (same || (shorter && idle)) {
                return Some(built.length);
            }
        }
        if let Some(patch) = self.sites.patches.get(&from) {
            if let Some(length) = self.patcher.patched(*patch, at, code, here) {
                return Some(length);
            }
        }
        if code.first() == here.first() {
            return Some(1);
        }
        if let Some(length) = moved_operand(version, start, memory, index) {
            return Some(length);
        }
        let run = nops::run(code);
        let same = here.get(..run).filter(|_| run > 0)?;
        nops::are(same).then_some(run)
    }

    /// The differences from `found` on that belong together, where nothing is
    /// patched.
    fn piece(&self, found: usize) -> Range<u64> {
        let mut begin = self.start.saturating_add(found as u64);
        let mut end = begin.saturating_add(1);
        if let Some(branch) = self.bent(found) {
            begin = branch.start;
            end = branch.end;
        }
        let mut next = usize::try_from(end.saturating_sub(self.start)).unwrap_or(usize::MAX);
        while let Some(more) = self.next_difference(next) {
            let at = self.start.saturating_add(more as u64);
            if at.saturating_sub(end) >= CLOSE || self.place(at).is_some() {
                break;
            }
            end = at.saturating_add(1);
            next = more.saturating_add(1);
        }
        begin..end
    }

    /// The branch whose operand was changed at `found`: one that led to a
    /// function of the kernel's, and still is a branch.
    fn bent(&self, found: usize) -> Option<Range<u64>> {
        (1..=4).find_map(|back| {
            let first = found.checked_sub(back)?;
            let at = self.start.checked_add(first as u64)?;
            let built = jump(at, self.built.get(first..)?)?;
            let now = jump(at, self.memory.get(first..)?)?;
            let function = self.patcher.symbols.is_function_start(Gva(built.target));
            let same = function && built.opcode == now.opcode && built.length > back;
            same.then_some(at..at.checked_add(built.length as u64)?)
        })
    }

    /// Notes a change.
    fn change(&self, place: &Range<u64>, report: &mut TextReport) {
        let pieces = self
            .slice(self.built, place)
            .zip(self.slice(self.memory, place));
        match pieces {
            Some((built, memory)) if report.changes.len() < MAX_CHANGES => {
                report.changes.push(Change {
                    at: Gva(place.start),
                    built: built.to_vec(),
                    memory: memory.to_vec(),
                });
            }
            _ => report.more += 1,
        }
    }
}

/// How much is left of an operand around `index` that is relative to where its
/// instruction is, and was moved with it from the replacement to its place.
fn moved_operand(version: &Version, start: u64, memory: &[u8], index: usize) -> Option<usize> {
    let word = |bytes: &[u8], at: usize| {
        let word = bytes.get(at..at.checked_add(4)?)?.try_into().ok()?;
        Some(u32::from_le_bytes(word))
    };
    (0..4).find_map(|back| {
        let first = index.checked_sub(back)?;
        let from = *version.from.get(first)?;
        let moved = from.wrapping_sub(start.wrapping_add(first as u64)) as u32;
        let (built, memory) = (word(&version.code, first)?, word(memory, first)?);
        (moved != 0 && built.wrapping_add(moved) == memory).then_some(4 - back)
    })
}

#[cfg(test)]
mod tests;
