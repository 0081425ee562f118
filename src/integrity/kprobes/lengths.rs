//! Where instructions begin and end.
//!
//! A kprobe says at which address it is and how long the instruction is that it took
//! out. That is the guest's word; the instructions themselves, from the function's
//! beginning on, say it better.

use iced_x86::{Decoder, DecoderOptions};

/// Whether so many bytes of `code` are one instruction.
pub(super) fn is_one(code: &[u8], length: usize) -> bool {
    length != 0 && decode(code).next() == Some(length)
}

/// Whether so many bytes of `code` are whole instructions: behind them one begins.
pub(super) fn ends(code: &[u8], length: usize) -> bool {
    let reached = |end: &usize| *end >= length;
    length == 0 || decode(code).find(reached) == Some(length)
}

/// Where instructions have distances, of four bytes, to what they refer to: how far that
/// lies from where the next one begins.
pub(super) fn distances(code: &[u8]) -> Vec<usize> {
    let mut decoder = Decoder::new(64, code, DecoderOptions::NONE);
    let mut all = Vec::new();
    while decoder.can_decode() {
        let begin = decoder.position();
        let instruction = decoder.decode();
        if instruction.is_invalid() {
            break;
        }
        if instruction.is_ip_rel_memory_operand() {
            let fields = decoder.get_constant_offsets(&instruction);
            all.push(begin + fields.displacement_offset());
        }
    }
    all
}

/// Where each instruction ends, as far as they can be told.
fn decode(code: &[u8]) -> impl Iterator<Item = usize> + '_ {
    let mut decoder = Decoder::new(64, code, DecoderOptions::NONE);
    std::iter::from_fn(move || {
        let next = decoder.can_decode().then(|| decoder.decode())?;
        (!next.is_invalid()).then(|| decoder.position())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_are_as_long_as_processors_have_them() {
        // endbr64; push %rbp; movq 0x1234(%rip), %rax; gs add; call; ret
        let code = [
            0xf3, 0x0f, 0x1e, 0xfa, 0x55, 0x48, 0x8b, 0x05, 0x34, 0x12, 0, 0, 0x65, 0x48, 0x03,
            0x05, 0, 0, 0, 0, 0xe8, 1, 2, 3, 4, 0xc3,
        ];
        let places = [0, 4, 5, 12, 20, 25, 26];
        for at in 0..=code.len() + 1 {
            assert_eq!(ends(&code, at), places.contains(&at), "{at}");
            assert_eq!(is_one(&code, at), at == 4, "{at}");
        }
        // Of the load and the addition; not of the call, nor where there are none.
        assert_eq!(distances(&code), [8, 16]);
        // movabs $.., %rax; mov $imm, %rdi; cmpl $imm, disp(%rip)
        let code = [
            0x48, 0xb8, 1, 2, 3, 4, 5, 6, 7, 8, 0x48, 0xc7, 0xc7, 1, 2, 3, 4, 0x81, 0x3d, 5, 6, 7,
            8, 1, 2, 3, 4,
        ];
        assert_eq!(distances(&code), [19]);
        assert!(distances(&[0x06]).is_empty());
        // Behind what is none, and where one is cut off, nothing is told.
        assert!(!ends(&[0x06, 0x90], 1));
        assert!(!ends(&[0xe8, 1, 2, 3], 4));
        assert!(!is_one(&[], 0));
    }
}
