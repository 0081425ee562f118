//! What a kernel may have made of its own code at a place that its image lists.

use super::nops;
use super::sites::Patch;
use crate::kernel::{Gva, Symbols};

/// Where returns go on a processor that needs more than a return
/// (arch/x86/lib/retpoline.S).
const RETURN_THUNKS: [&str; 7] = [
    "__x86_return_thunk",
    "retbleed_return_thunk",
    "zen_untrain_ret",
    "srso_return_thunk",
    "srso_alias_return_thunk",
    "call_depth_return_thunk",
    "its_return_thunk",
];
/// What Ftrace calls where it has no trampoline of a tracer's own.
const FTRACE: [&str; 2] = ["ftrace_caller", "ftrace_regs_caller"];
/// The registers' numbers in the names of thunks.
const REGISTERS: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15",
];

pub(in crate::integrity) const CALL: u8 = 0xe8;
pub(in crate::integrity) const JUMP: u8 = 0xe9;
const SHORT_JUMP: u8 = 0xeb;
pub(in crate::integrity) const RETURN: u8 = 0xc3;
pub(in crate::integrity) const INT3: u8 = 0xcc;
pub(in crate::integrity) const ENDBR64: [u8; 4] = [0xf3, 0x0f, 0x1e, 0xfa];
/// What is put over it (`gen_endbr_poison`), and a NOP of four bytes.
pub(in crate::integrity) const NO_ENDBR: [[u8; 4]; 2] =
    [[0x66, 0x0f, 0x1f, 0x00], [0x0f, 0x1f, 0x40, 0x00]];
/// A prefix that means nothing to a branch.
const CS: u8 = 0x2e;
const LFENCE: [u8; 3] = [0x0f, 0xae, 0xe8];
/// `cs cs cs xor eax, eax`: a static call of a function that returns 0.
const RETURN_0: [u8; 5] = [0x2e, 0x2e, 0x2e, 0x31, 0xc0];

/// A branch to a fixed place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::integrity) struct Jump {
    /// The opcode's last byte.
    pub(in crate::integrity) opcode: u8,
    pub(in crate::integrity) target: u64,
    pub(in crate::integrity) length: usize,
}

/// The branch that `code`, which lies at `at`, begins with.
pub(in crate::integrity) fn jump(at: u64, code: &[u8]) -> Option<Jump> {
    let far = |from: usize| {
        let offset = code.get(from..from.checked_add(4)?)?.try_into().ok()?;
        let end = at.wrapping_add(from as u64 + 4);
        Some(end.wrapping_add_signed(i64::from(i32::from_le_bytes(offset))))
    };
    let (opcode, target, length) = match *code {
        [opcode @ (CALL | JUMP), ..] => (opcode, far(1)?, 5),
        [0x0f, opcode @ 0x80..=0x8f, ..] => (opcode, far(2)?, 6),
        [SHORT_JUMP, offset, ..] => {
            let end = at.wrapping_add(2);
            let target = end.wrapping_add_signed(i64::from(i8::from_le_bytes([offset])));
            (SHORT_JUMP, target, 2)
        }
        _ => return None,
    };
    Some(Jump {
        opcode,
        target,
        length,
    })
}

/// Puts bytes over those at `at`, if there is room.
pub(in crate::integrity) fn fill(code: &mut [u8], at: u64, bytes: &[u8]) {
    let room = code.get_mut(at as usize..).unwrap_or_default();
    if let Some(room) = room.get_mut(..bytes.len()) {
        room.copy_from_slice(bytes);
    }
}

/// What a comparison asks of the guest. All addresses are as linked.
pub(in crate::integrity) trait Guest {
    /// The value of a variable of so many bytes, if it can be read.
    fn variable(&self, at: Gva, width: usize) -> Option<u64>;
    /// Whether the kernel has a thunk there that it made for this register.
    fn is_thunk(&self, at: Gva, register: u8) -> bool;
    /// Whether the static call with this key may lead there, out of the kernel's text.
    fn may_lead(&self, key: &str, to: Gva) -> bool;
}

/// What is known of the kernel that was patched. All addresses are those that
/// it was linked at: what is relative is the same there.
pub(super) struct Patcher<'a> {
    pub(super) symbols: &'a Symbols,
    /// By how much what the guest's pointers hold is more.
    pub(super) slide: u64,
    pub(super) guest: &'a dyn Guest,
    /// Told of each place where Ftrace calls a trampoline, and where that is.
    pub(super) trampoline: &'a dyn Fn(u64, u64),
}

impl Patcher<'_> {
    /// How many bytes of `memory`, at `at`, are what `patch` may make of `built`.
    pub(super) fn patched(
        &self,
        patch: Patch,
        at: u64,
        built: &[u8],
        memory: &[u8],
    ) -> Option<usize> {
        match patch {
            Patch::Lock => {
                (built.first() == Some(&0xf0) && memory.first() == Some(&0x3e)).then_some(1)
            }
            Patch::Endbr => {
                let (built, memory) = (built.first_chunk()?, memory.first_chunk()?);
                (*built == ENDBR64 && NO_ENDBR.contains(memory)).then_some(4)
            }
            Patch::Constant { variable, width } => {
                let value = self.guest.variable(variable, width)?.to_le_bytes();
                memory.starts_with(value.get(..width)?).then_some(width)
            }
            Patch::Branch(target) => {
                let length = match jump(at, built) {
                    Some(jump) => jump.length,
                    None => nops::first(built)?,
                };
                let taken = jump(at, memory).is_some_and(|jump| {
                    jump.opcode != CALL && jump.target == target && jump.length == length
                });
                (taken || nops::first(memory) == Some(length)).then_some(length)
            }
            Patch::StaticCall(key) => self.static_call(key, at, built, memory),
            Patch::Mcount => self.mcount(at, memory),
            Patch::Callback => {
                let call = jump(at, memory).filter(|jump| jump.opcode == CALL)?;
                self.is_function(call.target).then_some(call.length)
            }
            Patch::Return => self.returns(at, built, memory),
            Patch::Retpoline => self.retpoline(at, built, memory),
            Patch::Paravirt(length) => {
                let length = usize::from(length);
                let memory = memory.get(..length)?;
                let named = self.slot(at, built)?;
                let called = match jump(at, memory) {
                    Some(jump) if jump.opcode == CALL && named == jump.target => jump.length,
                    _ => 0,
                };
                nops::are(memory.get(called..)?).then_some(length)
            }
        }
    }

    /// What the slot has that an indirect call goes through.
    fn slot(&self, at: u64, built: &[u8]) -> Option<u64> {
        let [0xff, 0x15, offset @ ..] = built.first_chunk::<6>()? else {
            return None;
        };
        let offset = i64::from(i32::from_le_bytes(*offset));
        let slot = Gva(at.wrapping_add(6).wrapping_add_signed(offset));
        let target = self.guest.variable(slot, 8)?.wrapping_sub(self.slide);
        self.is_function(target).then_some(target)
    }

    fn is_function(&self, at: u64) -> bool {
        matches!(self.symbols.lookup(Gva(at)), Some((_, 0)))
    }

    fn is_one_of(&self, at: u64, names: &[&str]) -> bool {
        names
            .iter()
            .any(|name| self.symbols.address(name) == Some(Gva(at)))
    }

    fn mcount(&self, at: u64, memory: &[u8]) -> Option<usize> {
        if nops::first(memory) == Some(5) {
            return Some(5);
        }
        let jump = jump(at, memory).filter(|jump| jump.opcode == CALL)?;
        if !self.is_one_of(jump.target, &FTRACE) {
            (self.trampoline)(at, jump.target);
        }
        Some(jump.length)
    }

    fn returns(&self, at: u64, built: &[u8], memory: &[u8]) -> Option<usize> {
        jump(at, built).filter(|jump| jump.opcode == JUMP)?;
        let memory = memory.get(..5)?;
        let thunk = jump(at, memory)
            .is_some_and(|jump| jump.opcode == JUMP && self.is_one_of(jump.target, &RETURN_THUNKS));
        (thunk || memory == [RETURN, INT3, INT3, INT3, INT3]).then_some(5)
    }

    /// A static call leads to the function in its key, where that is known.
    fn static_call(&self, key: Option<Gva>, at: u64, built: &[u8], memory: &[u8]) -> Option<usize> {
        // `struct static_call_key` begins with the function.
        let function = key.and_then(|key| self.guest.variable(key, 8));
        let is_null = function.is_none_or(|function| function == 0);
        let is = |to: u64| match function {
            Some(function) if function != 0 => to == function.wrapping_sub(self.slide),
            // A conditional jump of one that is not set is a return.
            Some(_) => self.returns_at(to),
            None => self.is_function(to),
        };
        let built = jump(at, built).or_else(|| {
            // A trampoline of one that is not set yet is a return.
            let target = at.wrapping_add(5);
            built.starts_with(&[RETURN]).then_some(Jump {
                opcode: JUMP,
                target,
                length: 5,
            })
        })?;
        let memory = memory.get(..built.length)?;
        let may_be = |to: u64| {
            let named = key.and_then(|key| self.symbols.symbol_before(key));
            let lent = |(name, within)| within == 0 && self.guest.may_lead(name, Gva(to));
            self.is_function(to) || named.is_some_and(lent)
        };
        let leads = match jump(at, memory) {
            Some(jump) => jump.opcode == built.opcode && is(jump.target) && may_be(jump.target),
            None if memory == RETURN_0 => {
                let zero = self.symbols.address("__static_call_return0");
                built.opcode == CALL && (function.is_none() || zero.is_some_and(|at| is(at.0)))
            }
            None if built.opcode == CALL => is_null && nops::first(memory) == Some(5),
            None => is_null && memory == [RETURN, INT3, INT3, INT3, INT3],
        };
        leads.then_some(built.length)
    }

    /// Whether what is there does no more than return.
    fn returns_at(&self, at: u64) -> bool {
        self.is_one_of(at, &RETURN_THUNKS) || self.is_one_of(at, &["__static_call_return"])
    }

    /// A branch through a thunk made an indirect one, or one through another thunk.
    fn retpoline(&self, at: u64, built: &[u8], memory: &[u8]) -> Option<usize> {
        // Compilers make branches by the upper registers as long as others with it.
        let prefix = usize::from(built.starts_with(&[CS]));
        let branch = |code: &[u8]| jump(at.wrapping_add(prefix as u64), code.get(prefix..)?);
        let thunk = branch(built)?;
        let (name, 0) = self.symbols.lookup(Gva(thunk.target))? else {
            return None;
        };
        let name = name.strip_prefix("__x86_indirect_thunk_")?;
        let register = REGISTERS.iter().position(|known| *known == name)? as u8;
        let length = prefix + thunk.length;
        let memory = memory.get(..length)?;
        if let Some(other) = branch(memory) {
            let same = memory.get(..prefix) == built.get(..prefix)
                && (other.opcode, other.length) == (thunk.opcode, thunk.length);
            let its = format!("__x86_indirect_its_thunk_{name}");
            let is_thunk = self.is_one_of(other.target, &[&its])
                || self.guest.is_thunk(Gva(other.target), register);
            return (same && is_thunk).then_some(length);
        }
        let mut code = memory;
        // A conditional one jumps over the indirect one if it is not to be taken.
        if matches!(thunk.opcode, 0x80..=0x8f) {
            let (head, rest) = code.split_at_checked(2)?;
            if head != [0x70 + ((thunk.opcode & 0xf) ^ 1), 4] {
                return None;
            }
            code = rest;
        }
        code = code.strip_prefix(&LFENCE).unwrap_or(code);
        if register >= 8 {
            code = code.strip_prefix(&[0x41])?;
        }
        let field = if thunk.opcode == CALL { 0xd0 } else { 0xe0 };
        let rest = code.strip_prefix(&[0xff, field | (register & 7)])?;
        let rest = match rest {
            [INT3, rest @ ..] if thunk.opcode != CALL => rest,
            rest => rest,
        };
        nops::are(rest).then_some(length)
    }
}
