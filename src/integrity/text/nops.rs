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
    }
}
