//! The places where a kernel patches its own text, as its image lists them.
//!
//! ```text
//! .altinstructions          other code, by what the processor can      (arch/x86/kernel/alternative.c)
//! .parainstructions         calls through pv_ops, made direct
//! .retpoline_sites          indirect branches through a thunk, or not
//! .return_sites             returns through a thunk, or not
//! .smp_locks                lock prefixes, dropped where there is one CPU
//! .ibt_endbr_seal           ENDBR that nothing may jump to
//! runtime_ptr_*, _shift_*   constants known only at boot               (asm/runtime-const.h)
//! __jump_table              static branches                            (kernel/jump_label.c)
//! .static_call_sites        static calls, and their trampolines        (kernel/static_call_inline.c)
//! __mcount_loc              where Ftrace may call                      (kernel/trace/ftrace.c)
//! ```
//!
//! The first group are sections, the last three lie in others, between symbols.
//! What is listed says only where a patch may be; what may stand there is for
//! `patched.rs`.

use std::collections::BTreeMap;

use super::super::image::{records, Image, ImageFault};
use crate::kernel::{Gva, Symbols};

/// `ALT_FLAG_DIRECT_CALL` (arch/x86/include/asm/alternative.h).
const DIRECT_CALL: u8 = 1 << 1;
/// Where the kernel's own entries of Ftrace call the callback, or what calls all
/// of them (ftrace_update_ftrace_func(), arch/x86/kernel/ftrace.c).
const FTRACE_CALLS: [&str; 2] = ["ftrace_call", "ftrace_regs_call"];
/// `STATIC_CALL_SITE_FLAGS` (include/linux/static_call_types.h): in a site's key.
const STATIC_CALL_FLAGS: u64 = 3;
/// What follows the jump of a static call's trampoline
/// (arch/x86/include/asm/static_call.h).
const TRAMPOLINE: [u8; 3] = [0x0f, 0xb9, 0xcc];

/// What may have been done at a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Patch {
    /// A branch through a thunk that holds a register's number made direct.
    Retpoline,
    /// A jump to the return thunk made another, or a return.
    Return,
    /// A call through `pv_ops`, of so many bytes.
    Paravirt(u8),
    /// A lock prefix.
    Lock,
    /// An ENDBR64.
    Endbr,
    /// A static branch to there.
    Branch(u64),
    /// A static call.
    StaticCall(Option<Gva>),
    /// A call of Ftrace's.
    Mcount,
    /// A call of whatever function Ftrace is to call.
    Callback,
    /// The lower bits of what a variable holds, of so many bytes.
    Constant {
        /// Its link-time address.
        variable: Gva,
        /// 1 or 8.
        width: usize,
    },
}

impl Patch {
    /// How many bytes it may change.
    pub(super) fn reach(self) -> u64 {
        match self {
            Self::Retpoline | Self::StaticCall(_) => 6,
            Self::Return | Self::Branch(_) | Self::Mcount | Self::Callback => 5,
            Self::Paravirt(length) => u64::from(length),
            Self::Lock => 1,
            Self::Endbr => 4,
            Self::Constant { width, .. } => width as u64,
        }
    }
}

/// Code that may stand at a place instead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Alternative {
    /// How long the place is.
    pub(super) length: u8,
    /// Where the other code is.
    pub(super) replacement: u64,
    /// How long that is; the rest are NOPs.
    pub(super) replacement_length: u8,
}

/// All of an image, by link-time address.
#[derive(Debug, Default)]
pub(in crate::integrity) struct Sites {
    pub(super) patches: BTreeMap<u64, Patch>,
    pub(super) alternatives: BTreeMap<u64, Vec<Alternative>>,
}

impl Sites {
    /// Those that an image lists.
    pub(in crate::integrity) fn of(image: &Image, symbols: &Symbols) -> Result<Self, ImageFault> {
        let mut sites = Self::default();
        sites.alternatives(image)?;
        for (name, patch) in [
            (".retpoline_sites", Patch::Retpoline),
            (".return_sites", Patch::Return),
            (".smp_locks", Patch::Lock),
            (".ibt_endbr_seal", Patch::Endbr),
        ] {
            if let Some((at, bytes)) = image.section(name) {
                sites.relative(at, bytes, patch);
            }
        }
        if let Some((_, bytes)) = image.section(".parainstructions") {
            for record in records::<16>(bytes) {
                if let (Some(at), [.., length, _, _, _, _, _, _]) = (word64(&record, 0), record) {
                    sites.patches.insert(at, Patch::Paravirt(length));
                }
            }
        }
        for (prefix, width) in [("runtime_ptr_", 8), ("runtime_shift_", 1)] {
            for (name, at, bytes) in image.sections(prefix) {
                if let Some(variable) = symbols.address(name) {
                    sites.relative(at, bytes, Patch::Constant { variable, width });
                }
            }
        }
        sites.between(image, symbols)?;
        Ok(sites)
    }

    /// Lists between symbols.
    fn between(&mut self, image: &Image, symbols: &Symbols) -> Result<(), ImageFault> {
        let list = |start: &'static str, stop: &'static str| {
            let (Some(start), Some(stop)) = (symbols.address(start), symbols.address(stop)) else {
                return Ok(None);
            };
            let length = usize::try_from(stop.0.saturating_sub(start.0)).unwrap_or(usize::MAX);
            let bytes = image
                .at(start, length)
                .ok_or(ImageFault::Missing("list of patches"))?;
            Ok(Some((start, bytes)))
        };
        if let Some((at, bytes)) = list("__start___jump_table", "__stop___jump_table")? {
            for (record, at) in records::<16>(bytes).zip((at.0..).step_by(16)) {
                let code = relative(&record, 0, at);
                let target = relative(&record, 4, at.wrapping_add(4));
                if let (Some(code), Some(target)) = (code, target) {
                    self.patches.insert(code, Patch::Branch(target));
                }
            }
        }
        if let Some((at, bytes)) = list("__start_static_call_sites", "__stop_static_call_sites")? {
            for (record, at) in records::<8>(bytes).zip((at.0..).step_by(8)) {
                if let Some(code) = relative(&record, 0, at) {
                    let key = relative(&record, 4, at.wrapping_add(4));
                    let key = key.map(|key| Gva(key & !STATIC_CALL_FLAGS));
                    self.patches.insert(code, Patch::StaticCall(key));
                }
            }
        }
        if let Some((at, bytes)) = list("__static_call_text_start", "__static_call_text_end")? {
            for (code, at) in records::<8>(bytes).zip((at.0..).step_by(8)) {
                if code.ends_with(&TRAMPOLINE) {
                    let name = symbols.symbol_before(Gva(at)).map(|(name, _)| name);
                    let name = name.and_then(|name| name.strip_prefix("__SCT__"));
                    let key = name.and_then(|name| symbols.address(&format!("__SCK__{name}")));
                    self.patches.insert(at, Patch::StaticCall(key));
                }
            }
        }
        let (_, bytes) = list("__start_mcount_loc", "__stop_mcount_loc")?.ok_or(
            ImageFault::Missing("list of Ftrace's places (__start_mcount_loc)"),
        )?;
        for record in records::<8>(bytes) {
            self.patches
                .insert(u64::from_le_bytes(record), Patch::Mcount);
        }
        for call in FTRACE_CALLS {
            if let Some(at) = symbols.address(call) {
                self.patches.insert(at.0, Patch::Callback);
            }
        }
        Ok(())
    }

    /// A list of offsets, each from its own place.
    fn relative(&mut self, at: Gva, bytes: &[u8], patch: Patch) {
        for (record, at) in records::<4>(bytes).zip((at.0..).step_by(4)) {
            if let Some(code) = relative(&record, 0, at) {
                self.patches.insert(code, patch);
            }
        }
    }

    /// `struct alt_instr` has two bytes of flags more since 6.3: a table is of
    /// the one form of which all entries make sense.
    fn alternatives(&mut self, image: &Image) -> Result<(), ImageFault> {
        let missing = || ImageFault::Missing("list of alternatives (.altinstructions)");
        let (at, bytes) = image.section(".altinstructions").ok_or_else(missing)?;
        let form = [12, 14].into_iter().find_map(|size| {
            let exact = bytes.len() % size == 0;
            let entries = bytes.chunks_exact(size).zip((at.0..).step_by(size));
            let all: Option<Vec<_>> = entries
                .map(|(record, at)| alternative(record, at, image))
                .collect();
            all.filter(|_| exact)
        });
        for (at, alternative, direct) in form.ok_or_else(missing)? {
            if direct {
                self.patches.insert(at, Patch::Paravirt(alternative.length));
            }
            self.alternatives.entry(at).or_default().push(alternative);
        }
        Ok(())
    }
}

/// An entry of `.altinstructions`, if it can be one.
fn alternative(record: &[u8], at: u64, image: &Image) -> Option<(u64, Alternative, bool)> {
    let place = relative(record, 0, at)?;
    let replacement = relative(record, 4, at.wrapping_add(4))?;
    let [.., length, replacement_length] = *record else {
        return None;
    };
    let alternative = Alternative {
        length,
        replacement,
        replacement_length,
    };
    let (code, bytes) = image.section(".altinstr_replacement")?;
    let within = replacement.checked_sub(code.0)?;
    let end = within.checked_add(u64::from(replacement_length))?;
    let fits = replacement_length <= length && end <= bytes.len() as u64;
    // The larger form has flags: a call through pv_ops is made direct.
    let flags = record.get(10).filter(|_| record.len() == 14);
    let direct = flags.is_some_and(|flags| flags & DIRECT_CALL != 0);
    let there = image.at(Gva(place), usize::from(length)).is_some();
    (fits && there).then_some((place, alternative, direct))
}

/// What a record's field at `field` is an offset to, the field itself being at `at`.
fn relative(record: &[u8], field: usize, at: u64) -> Option<u64> {
    let word = record.get(field..field.checked_add(4)?)?.try_into().ok()?;
    Some(at.wrapping_add_signed(i64::from(i32::from_le_bytes(word))))
}

fn word64(record: &[u8], field: usize) -> Option<u64> {
    let word = record.get(field..field.checked_add(8)?)?.try_into().ok()?;
    Some(u64::from_le_bytes(word))
}
