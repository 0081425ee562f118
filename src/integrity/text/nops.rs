//! Code that does nothing, as x86 kernels write it.

/// Those of each length from 1 (arch/x86/include/asm/nops.h); the kernel writes
/// others only in front of code, where its image has them too.
const NOPS: [&[u8]; 11] = [
    &[0x90],
    &[0x66, 0x90],
    &[0x0f, 0x1f, 0x00],
    &[0x0f, 0x1f, 0x40, 0x00],
    &[0x0f, 0x1f, 0x44, 0x00, 0x00],
    &[0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00],
    &[0x0f, 0x1f, 0x80, 0x00, 0x00, 0x00, 0x00],
    &[0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00],
    &[0x2e, 0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00],
    &[0x66, 0x2e, 0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00],
    &[
        0x66, 0x66, 0x2e, 0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00,
    ],
];

/// The length of the NOP that `code` begins with.
pub(super) fn first(code: &[u8]) -> Option<usize> {
    let known = NOPS.iter().rev().find(|nop| code.starts_with(nop))?;
    Some(known.len())
}

/// Whether all of `code` does nothing: NOPs, or a jump over what is never run.
pub(super) fn are(mut code: &[u8]) -> bool {
    while let Some(length) = first(code) {
        code = code.get(length..).unwrap_or_default();
    }
    match *code {
        [] => true,
        [0xeb, offset, ref rest @ ..] => {
            usize::from(offset) == rest.len() && rest.iter().all(|byte| *byte == 0xcc)
        }
        _ => false,
    }
}

/// Whether two pieces of code are the same, but for how each does nothing for so many
/// bytes: what the compiler wrote is replaced by fewer, longer NOPs as a kernel starts.
pub(in crate::integrity) fn same(one: &[u8], other: &[u8]) -> bool {
    let mut at = 0;
    while let (Some(here), Some(there)) = (one.get(at..), other.get(at..)) {
        if here == there {
            return true;
        }
        let length = run(here);
        let both = here.get(..length).zip(there.get(..length));
        at += match both {
            Some((nops, others)) if length > 0 && run(others) == nops.len() => length,
            _ if here.first() == there.first() => 1,
            _ => return false,
        };
    }
    false
}

/// How many bytes of `code` are NOPs from its beginning on.
pub(super) fn run(code: &[u8]) -> usize {
    let mut length = 0;
    while let Some(more) = code.get(length..).and_then(first) {
        length += more;
    }
    length
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nops_of_any_length_and_a_jump_over_the_rest_do_nothing() {
        for (index, nop) in NOPS.iter().enumerate() {
            assert_eq!(nop.len(), first(nop).unwrap_or(0), "{nop:02x?}");
            assert!(index == 0 || nop.len() >= NOPS[index - 1].len());
        }
        assert!(are(&[]) && are(&[0x90, 0x66, 0x90, 0x0f, 0x1f, 0x00]));
        assert!(are(&[0x90, 0xeb, 2, 0xcc, 0xcc]));
        for some in [
            &[0x90, 0xeb, 2, 0xcc][..],
            &[0xeb, 1, 0x90],
            &[0xc3],
            &[0x0f, 0x1f],
        ] {
            assert!(!are(some), "{some:02x?}");
        }
        assert_eq!(run(&[0x66, 0x90, 0x90, 0xc3, 0x90]), 3);
        let code = |nops: &[u8]| [&[0x55][..], nops, &[0xc3]].concat();
        let one = code(&[0x90; 5]);
        for (other, is_same) in [
            (code(&[0x90; 5]), true),
            (code(&[0x0f, 0x1f, 0x44, 0, 0]), true),
            (code(&[0x66, 0x90, 0x0f, 0x1f, 0]), true),
            // Shorter or longer, or another instruction in there.
            (code(&[0x90; 4]), false),
            (code(&[0x90; 6]), false),
            (code(&[0x90, 0x90, 0x0f, 0x1f, 0x44]), false),
            (code(&[0x0f, 0x1f, 0x44, 0, 0x90]), false),
            (code(&[0xe8, 0, 0, 0, 0]), false),
        ] {
            assert_eq!(same(&one, &other), is_same, "{other:02x?}");
            assert_eq!(same(&other, &one), is_same, "{other:02x?}");
        }
    }
}
