//! What runs in place of the instructions that a kprobe took out of the text: a copy
//! of them elsewhere, or a function that does the same.
//!
//! ```text
//! breakpoint  ainsn.insn           copy of the instruction, then a breakpoint or a jump
//!                                  back
//!             ainsn.emulate_op     a function of the kernel's, for some instructions;
//!                                  where they lead is in ainsn.rel32
//! jump        optinsn.insn         template, which calls the handlers;
//!                                  copies of the instructions; a jump back
//! ```
//!
//! (arch/x86/kernel/kprobes/core.c and opt.c.) Nothing else compares that memory, and
//! who changes it leads the kernel elsewhere under the name of a tracer of its own. So
//! it has to be what the kernel would have made of the instructions.
//!
//! Which of the two runs, the kernel decides by a bit of its own (`ainsn.boostable`), so
//! both have to be right. How long the instruction is, its bytes say ([`lengths`]): a
//! shorter one than it is would run the rest of them as another.

use super::{lengths, WHAT};
use crate::integrity::owner::{Owner, Owners, KPROBE};
use crate::integrity::text::{fill, jump, CALL, INT3, JUMP};
use crate::integrity::view::{Obstacle, View};
use crate::kernel::btf::Structure;
use crate::kernel::Gva;

/// `MAX_INSN_SIZE`, arch/x86/include/asm/kprobes.h: of a place for a copy.
const SLOT: usize = 16;
/// The longest instruction.
pub(super) const LONGEST: usize = 15;
/// The least and the most that a jump takes the place of: up to four bytes, and an
/// instruction.
const JUMPED: std::ops::RangeInclusive<u64> = 5..=19;
/// `clac`, which the template has where the processor knows it.
const CLAC: [u8; 3] = [0x0f, 0x01, 0xca];
/// `movabs $.., %rdi`.
const ARGUMENT: [u8; 2] = [0x48, 0xbf];
/// A template is a few hundred bytes.
const MAX_TEMPLATE: u64 = 4096;

/// Where a structure has a field.
fn offset(structure: &Structure<'_>, path: &str) -> Result<u64, Obstacle> {
    Ok(structure.field(path)?.offset.into())
}

/// Where `struct arch_specific_insn` has what [`Moved`] has, from its kprobe on.
pub(super) struct MovedAt {
    insn: u64,
    size: u64,
    detail: u64,
    rel32: u64,
    emulate: u64,
}

impl MovedAt {
    pub(super) fn of(kprobe: &Structure<'_>) -> Result<Self, Obstacle> {
        Ok(Self {
            insn: offset(kprobe, "ainsn.insn")?,
            size: offset(kprobe, "ainsn.size")?,
            detail: offset(kprobe, "ainsn.opcode")?,
            rel32: offset(kprobe, "ainsn.rel32")?,
            emulate: offset(kprobe, "ainsn.emulate_op")?,
        })
    }
}

/// An instruction under a breakpoint.
#[derive(Debug)]
pub(super) struct Moved {
    /// Where its copy is, and that.
    copy: Gva,
    code: Option<[u8; SLOT]>,
    size: u8,
    /// The function in its place, if that is not 0, and what that goes by.
    emulate: Gva,
    detail: u8,
    rel32: i32,
}

impl Moved {
    pub(super) fn read(view: &View<'_>, at: &MovedAt, kprobe: Gva) -> Result<Self, Obstacle> {
        let from = |offset| kprobe.wrapping_add(offset);
        let copy = view.pointer(from(at.insn), WHAT)?;
        let [size] = view.array(from(at.size), WHAT)?;
        let [detail] = view.array(from(at.detail), WHAT)?;
        Ok(Self {
            copy,
            // There is none where Ftrace calls the kprobe.
            code: view.array(copy, WHAT).ok(),
            size,
            emulate: view.pointer(from(at.emulate), WHAT)?,
            detail,
            rel32: view.half(from(at.rel32), WHAT)? as i32,
        })
    }

    /// Whether this does what the instruction does that `original` begins with, at `at`.
    pub(super) fn stands_for(
        &self,
        view: &View<'_>,
        owners: &Owners,
        at: Gva,
        original: &[u8],
    ) -> bool {
        let is_right = match Emulated::of(original) {
            Some(emulated) => emulated.is_by(view, self),
            None => self.emulate.0 == 0,
        };
        let size = usize::from(self.size);
        let parts = self
            .code
            .as_ref()
            .and_then(|code| code.split_at_checked(size));
        let (Some((copy, behind)), Some(taken)) = (parts, original.get(..size)) else {
            return false;
        };
        let goes_on = match behind {
            [INT3, ..] => true,
            _ => jumps(self.copy.wrapping_add(size as u64), behind, at, size as u64),
        };
        is_right
            && lengths::is_one(original, size)
            && goes_on
            && is_copy(copy, taken, self.copy.wrapping_sub(at))
            && owners.owner(view, self.copy) == Owner::Made(KPROBE.to_owned())
    }
}

/// How the kernel does what an instruction does that it lets run nowhere else.
#[derive(Debug, PartialEq, Eq)]
struct Emulated {
    by: &'static str,
    size: u8,
    /// Which of several such instructions it is, or the register that it goes by.
    detail: Option<u8>,
    rel32: Option<i32>,
}

impl Emulated {
    /// Of the instruction that `code` begins with; as `prepare_emulation` does it.
    fn of(code: &[u8]) -> Option<Self> {
        let is_prefix =
            |byte: &&u8| matches!(byte, 0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 | 0xf2 | 0xf3);
        let prefixes = code.iter().take(LONGEST).take_while(is_prefix).count();
        let mut code = code.get(prefixes..)?;
        let mut size = u8::try_from(prefixes).ok()?;
        let mut rex = 0;
        if let [byte @ 0x40..=0x4f, rest @ ..] = code {
            (rex, code) = (*byte, rest);
            size += 1;
        }
        let byte = |offset: u8| Some(i32::from(offset as i8));
        let word = |from: &[u8]| Some(i32::from_le_bytes(*from.first_chunk()?));
        let (by, length, detail, rel32) = match *code {
            [opcode @ (0xfa | 0xfb | 0x9c | 0x9d), ..] => {
                ("kprobe_emulate_ifmodifiers", 1, Some(opcode), None)
            }
            [0xc3 | 0xcb, ..] => ("kprobe_emulate_ret", 1, None, None),
            [0xc2 | 0xca, ..] => ("kprobe_emulate_ret", 3, None, None),
            [CALL, ref to @ ..] => ("kprobe_emulate_call", 5, None, Some(word(to)?)),
            [JUMP, ref to @ ..] => ("kprobe_emulate_jmp", 5, None, Some(word(to)?)),
            [0xeb, to, ..] => ("kprobe_emulate_jmp", 2, None, byte(to)),
            [opcode @ 0x70..=0x7f, to, ..] => {
                ("kprobe_emulate_jcc", 2, Some(opcode & 15), byte(to))
            }
            [0x0f, opcode @ 0x80..=0x8f, ref to @ ..] => {
                ("kprobe_emulate_jcc", 6, Some(opcode & 15), Some(word(to)?))
            }
            [opcode @ 0xe0..=0xe3, to, ..] => {
                ("kprobe_emulate_loop", 2, Some(opcode & 3), byte(to))
            }
            // By a register alone: others are not probed.
            [0xff, how @ (0xd0..=0xd7 | 0xe0..=0xe7), ..] => {
                let by = if how < 0xe0 {
                    "kprobe_emulate_call_indirect"
                } else {
                    "kprobe_emulate_jmp_indirect"
                };
                (by, 2, Some((how & 7) | (rex & 1) << 3), None)
            }
            _ => return None,
        };
        Some(Self {
            by,
            size: size + length,
            detail,
            rel32,
        })
    }

    /// Whether it is as the kernel has been told to.
    fn is_by(&self, view: &View<'_>, moved: &Moved) -> bool {
        view.is_one_of(moved.emulate, &[self.by])
            && moved.size == self.size
            && self.detail.is_none_or(|detail| detail == moved.detail)
            && self.rel32.is_none_or(|rel32| rel32 == moved.rel32)
    }
}

/// Where `struct optimized_kprobe` has what [`Detour`] has, and its own beginning, from
/// its kprobe on.
pub(super) struct DetourAt {
    start: u64,
    kept: u64,
    code: u64,
    size: u64,
}

impl DetourAt {
    pub(super) fn of(optimized: &Structure<'_>) -> Result<Self, Obstacle> {
        let start = offset(optimized, "kp")?;
        let after = |path| Ok::<_, Obstacle>(offset(optimized, path)?.wrapping_sub(start));
        Ok(Self {
            start,
            kept: after("optinsn.copied_insn")?,
            code: after("optinsn.insn")?,
            size: after("optinsn.size")?,
        })
    }
}

/// Of a kprobe that is a jump.
#[derive(Debug)]
pub(super) struct Detour {
    /// Its `struct optimized_kprobe`.
    optimized: Gva,
    /// What the text had behind the first byte, where the jump is.
    pub(super) kept: [u8; 4],
    /// Where it leads.
    pub(super) to: Gva,
    /// The size of all instructions that have been copied there.
    size: u64,
}

impl Detour {
    pub(super) fn read(view: &View<'_>, at: &DetourAt, kprobe: Gva) -> Result<Self, Obstacle> {
        let from = |offset| kprobe.wrapping_add(offset);
        Ok(Self {
            optimized: Gva(kprobe.0.wrapping_sub(at.start)),
            kept: view.array(from(at.kept), WHAT)?,
            to: view.pointer(from(at.code), WHAT)?,
            size: view.pointer(from(at.size), WHAT)?.0,
        })
    }

    /// Whether it does what the instructions do that `original` begins with, at `at`,
    /// and calls the kernel's own function for kprobes before.
    pub(super) fn stands_for(
        &self,
        view: &View<'_>,
        owners: &Owners,
        at: Gva,
        original: &[u8],
    ) -> bool {
        self.try_stands_for(view, owners, at, original)
            .unwrap_or(false)
    }

    fn try_stands_for(
        &self,
        view: &View<'_>,
        owners: &Owners,
        at: Gva,
        original: &[u8],
    ) -> Result<bool, Obstacle> {
        let entry = view.address("optprobe_template_entry")?;
        let within = |name| Ok::<_, Obstacle>(view.address(name)?.wrapping_sub(entry));
        let length = within("optprobe_template_end")?;
        let jumped = JUMPED.contains(&self.size) && lengths::ends(original, self.size as usize);
        if length > MAX_TEMPLATE || !jumped {
            return Ok(false);
        }
        let read = |from, length: u64| view.bytes(from, length as usize, WHAT);
        let mut template = read(entry, length)?;
        let code = read(self.to, length)?;
        let call_at = within("optprobe_template_call")?;
        // What the kernel fills in.
        let mut argument = ARGUMENT.to_vec();
        argument.extend(self.optimized.0.to_le_bytes());
        let mut call = code.get(call_at as usize..).unwrap_or_default().to_vec();
        call.truncate(5);
        let calls = jump(self.to.wrapping_add(call_at).0, &call).is_some_and(|jump| {
            jump.opcode == CALL && view.is_one_of(Gva(jump.target), &["optimized_callback"])
        });
        for (at, bytes) in [
            (within("optprobe_template_val")?, &*argument),
            (call_at, &*call),
        ] {
            fill(&mut template, at, bytes);
        }
        let same = code == template || {
            fill(&mut template, within("optprobe_template_clac")?, &CLAC);
            code == template
        };
        let copies_at = self.to.wrapping_add(length);
        let copies = read(copies_at, self.size)?;
        let back = copies_at.wrapping_add(self.size);
        let original = original.get(..self.size as usize);
        Ok(same
            && calls
            && original
                .is_some_and(|original| is_copy(&copies, original, copies_at.wrapping_sub(at)))
            && jumps(back, &view.array::<5>(back, WHAT)?, at, self.size)
            && owners.owner(view, self.to) == Owner::Made(KPROBE.to_owned()))
    }
}

/// Whether `code`, which lies at `from`, jumps back behind what was `size` bytes at
/// `at`.
fn jumps(from: Gva, code: &[u8], at: Gva, size: u64) -> bool {
    jump(from.0, code)
        .is_some_and(|jump| jump.opcode == JUMP && jump.target == at.wrapping_add(size).0)
}

/// Whether these are the same instructions, but for distances to what they refer to,
/// each less by how far they were moved (`__copy_instruction()`: those of operands alone,
/// for what jumps by a distance is not copied).
fn is_copy(copy: &[u8], original: &[u8], moved: u64) -> bool {
    let mut expected = original.to_vec();
    for at in lengths::distances(original) {
        let field = expected
            .get_mut(at..)
            .and_then(|from| from.first_chunk_mut());
        let Some(field) = field else { return false };
        *field = u32::from_le_bytes(*field)
            .wrapping_sub(moved as u32)
            .to_le_bytes();
    }
    copy == expected
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_that_are_not_copied_are_known() {
        let of =
            |code: &[u8]| Emulated::of(code).map(|one| (one.by, one.size, one.detail, one.rel32));
        for (code, expected) in [
            (
                &[0xfa][..],
                ("kprobe_emulate_ifmodifiers", 1, Some(0xfa), None),
            ),
            (&[0xf3, 0xc3], ("kprobe_emulate_ret", 2, None, None)),
            (&[0xc2, 8, 0], ("kprobe_emulate_ret", 3, None, None)),
            (
                &[0xe8, 0xfe, 0xff, 0xff, 0xff],
                ("kprobe_emulate_call", 5, None, Some(-2)),
            ),
            // Through the thunk for returns, aligned by a prefix.
            (
                &[0x2e, 0xe9, 0, 1, 0, 0],
                ("kprobe_emulate_jmp", 6, None, Some(0x100)),
            ),
            (&[0xeb, 0x80], ("kprobe_emulate_jmp", 2, None, Some(-128))),
            (&[0x75, 5], ("kprobe_emulate_jcc", 2, Some(5), Some(5))),
            (
                &[0x0f, 0x84, 1, 0, 0, 0x80],
                ("kprobe_emulate_jcc", 6, Some(4), Some(i32::MIN + 1)),
            ),
            (&[0xe3, 0xff], ("kprobe_emulate_loop", 2, Some(3), Some(-1))),
            (
                &[0xff, 0xd0],
                ("kprobe_emulate_call_indirect", 2, Some(0), None),
            ),
            (
                &[0x41, 0xff, 0xe3],
                ("kprobe_emulate_jmp_indirect", 3, Some(11), None),
            ),
        ] {
            assert_eq!(of(code), Some(expected), "{code:x?}");
        }
        for code in [
            &[][..],
            &[0x55],
            &[0xe8, 1, 2, 3],
            &[0xf3, 0x0f, 0x1e, 0xfa],
            &[0xff, 0x25, 0, 0, 0, 0],
            &[0x2e; 40],
        ] {
            assert_eq!(of(code), None, "{code:x?}");
        }
    }

    #[test]
    fn a_copy_differs_in_distances_and_only_by_how_far_it_was_moved() {
        let original = [0x48, 0x8b, 0x05, 0x34, 0x12, 0, 0, 0x90];
        let moved = 0x1000_0000u64;
        let mut copy = original;
        copy[3..7].copy_from_slice(&0x1234u32.wrapping_sub(moved as u32).to_le_bytes());
        assert!(!is_copy(&original, &original, moved));
        assert!(is_copy(&copy, &original, moved));
        // What an instruction has of its own, no move changes: mov $0x1234, %rdi.
        let immediate = [0x48, 0xc7, 0xc7, 0x34, 0x12, 0, 0];
        let mut other = immediate;
        other[3..].copy_from_slice(&copy[3..7]);
        assert!(is_copy(&immediate, &immediate, moved));
        assert!(!is_copy(&other, &immediate, moved));
        assert!(!is_copy(&copy, &original, moved + 1));
        assert!(!is_copy(&copy[..7], &original, moved));
        for at in 0..copy.len() {
            let mut other = copy;
            other[at] ^= 1;
            assert!(!is_copy(&other, &original, moved), "{at}");
        }
    }
}
