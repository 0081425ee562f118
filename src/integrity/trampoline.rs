//! Ftrace's trampolines: code that the kernel makes for a callback of its own.
//!
//! ```text
//! ftrace_caller, or ftrace_regs_caller, as it is up to its end; but
//!     ..op_ptr   movq ops(%rip), %rdx      the word behind the code
//!     ..call     call the function of the callback
//!     ..jmp      (of the second) a NOP: nobody is called directly
//! ret, or a jump to what the kernel returns by
//! ops            where the callback is
//! ```
//!
//! (`create_trampoline()`, arch/x86/kernel/ftrace.c.) Functions call it at their
//! beginning, and nothing else compares that memory: who changes it has all of them.
//! So it has to be what the kernel would have made.

use super::text::{fill, jump, same_but_nops, CALL, ENDBR64, INT3, JUMP, NO_ENDBR, RETURN};
use super::view::{Obstacle, View};
use crate::kernel::Gva;

const WHAT: &str = "a trampoline of Ftrace's";
/// `movq offset(%rip), %rdx`.
const TAKES_OPS: [u8; 3] = [0x48, 0x8b, 0x15];
/// A `jnz` of two bytes, and what is made of it.
const JNZ: u8 = 0x75;
const NOP: [u8; 2] = [0x66, 0x90];
/// What functions begin with that may be called indirectly, and what the kernel makes of
/// it where none does: it may have done so after it made the trampoline.
const BEGINS: [[u8; 4]; 2] = [ENDBR64, NO_ENDBR[0]];
/// `RET_SIZE`, as kernels are configured.
const ENDS: [u64; 3] = [1, 2, 5];
/// The word at the end.
const WORD: u64 = 8;
/// None is longer.
const MOST: u64 = 4096;

/// What a trampoline is a copy of, by the symbols of places in it.
struct Original {
    entry: &'static str,
    end: &'static str,
    takes_ops: &'static str,
    call: &'static str,
    branch: Option<&'static str>,
}

const ORIGINALS: [Original; 2] = [
    Original {
        entry: "ftrace_caller",
        end: "ftrace_caller_end",
        takes_ops: "ftrace_caller_op_ptr",
        call: "ftrace_call",
        branch: None,
    },
    Original {
        entry: "ftrace_regs_caller",
        end: "ftrace_regs_caller_end",
        takes_ops: "ftrace_regs_caller_op_ptr",
        call: "ftrace_regs_call",
        branch: Some("ftrace_regs_caller_jmp"),
    },
];

/// The function that the trampoline of `ops` calls, which has `length` bytes from
/// `start` on; `None` where the kernel never made it like that.
pub(super) fn calls(
    view: &View<'_>,
    ops: Gva,
    start: Gva,
    length: u64,
) -> Result<Option<Gva>, Obstacle> {
    if length > MOST {
        return Ok(None);
    }
    let code = view.bytes(start, length as usize, WHAT)?;
    for original in &ORIGINALS {
        if let Some(called) = copy_of(view, original, ops, start, &code)? {
            return Ok(Some(called));
        }
    }
    Ok(None)
}

/// The function that it calls, if it was made of this.
fn copy_of(
    view: &View<'_>,
    original: &Original,
    ops: Gva,
    start: Gva,
    code: &[u8],
) -> Result<Option<Gva>, Obstacle> {
    let entry = view.address(original.entry)?;
    let within = |name| Ok::<_, Obstacle>(view.address(name)?.wrapping_sub(entry));
    let (size, takes_ops) = (within(original.end)?, within(original.takes_ops)?);
    let call = within(original.call)?;
    let ends = (code.len() as u64).wrapping_sub(size).wrapping_sub(WORD);
    let inside = takes_ops < size && call < size;
    if size > MOST || !ENDS.contains(&ends) || !inside {
        return Ok(None);
    }
    let mut made = view.bytes(entry, size as usize, WHAT)?;
    if let (Some(begins), Some(begin)) = (made.first_chunk_mut(), code.first_chunk()) {
        if BEGINS.contains(begins) && BEGINS.contains(begin) {
            *begins = *begin;
        }
    }
    let offset = (size + ends).wrapping_sub(takes_ops + 7) as u32;
    fill(&mut made, takes_ops, &TAKES_OPS);
    fill(&mut made, takes_ops + 3, &offset.to_le_bytes());
    if let Some(branch) = original.branch {
        let branch = within(branch)?;
        if made.get(branch as usize) != Some(&JNZ) {
            return Ok(None);
        }
        fill(&mut made, branch, &NOP);
    }
    let bytes = code
        .get(call as usize..)
        .and_then(|code| code.first_chunk::<5>());
    let Some(bytes) = bytes else { return Ok(None) };
    let calls = jump(start.wrapping_add(call).0, bytes).filter(|jump| jump.opcode == CALL);
    let Some(calls) = calls else { return Ok(None) };
    fill(&mut made, call, bytes);
    let Some((copied, behind)) = code.split_at_checked(size as usize) else {
        return Ok(None);
    };
    let Some((returns, word)) = behind.split_at_checked(ends as usize) else {
        return Ok(None);
    };
    let returns = match returns {
        [RETURN] | [RETURN, INT3, ..] => true,
        _ => jump(start.wrapping_add(size).0, returns).is_some_and(|jump| {
            let to = Gva(jump.target);
            jump.opcode == JUMP && view.in_text(to) && view.name(to).ends_with("return_thunk")
        }),
    };
    // One for the tracer on the command line is made before the kernel has put the NOPs of
    // its processor into its own code.
    let is_it = same_but_nops(copied, &made) && returns && word == ops.0.to_le_bytes();
    Ok(is_it.then_some(Gva(calls.target)))
}
