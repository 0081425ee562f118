//! The three kinds of access to memory that somebody else is writing.
//!
//! Everything here takes raw pointers, so that no reference to guest memory
//! ever exists: the compiler may then assume nothing about what lies there,
//! and each byte is fetched exactly once.

use std::ptr;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

const WORD: usize = size_of::<u64>();

/// Copies `dst.len()` bytes from `src`, each of them once: byte by byte up to
/// the first multiple of 8 of the source, then in 8-byte words, then the rest.
///
/// # Safety
/// `[src, src + dst.len())` must lie in one live mapping that is readable.
/// It may be written concurrently, by other processes or through atomics.
pub(super) unsafe fn copy(src: *const u8, dst: &mut [u8]) {
    let head = src.align_offset(WORD).min(dst.len());
    let (first, rest) = dst.split_at_mut(head);
    // SAFETY: `head` is at most `dst.len()`, so this stays inside the source.
    unsafe { copy_bytes(src, first) };
    let mut words = rest.chunks_exact_mut(WORD);
    // SAFETY: `head <= dst.len()`: still inside the source, or one past it.
    let mut at = unsafe { src.add(head) };
    for word in &mut words {
        // SAFETY: `at` is a multiple of 8 (`head` made it so: if the slice
        // was too short for that, there is no whole word left), and the chunk
        // stands for 8 bytes that are inside the source.
        let value = unsafe { ptr::read_volatile(at.cast::<u64>()) };
        word.copy_from_slice(&value.to_ne_bytes());
        // SAFETY: those 8 bytes were inside the source.
        at = unsafe { at.add(WORD) };
    }
    // SAFETY: what is left of `dst` has its counterpart at `at`.
    unsafe { copy_bytes(at, words.into_remainder()) };
}

/// Copies byte by byte.
///
/// # Safety
/// As for [`copy`].
unsafe fn copy_bytes(src: *const u8, dst: &mut [u8]) {
    for (i, byte) in dst.iter_mut().enumerate() {
        // SAFETY: `i < dst.len()`, which the caller vouches for.
        *byte = unsafe { ptr::read_volatile(src.add(i)) };
    }
}

/// Loads a word whole, with acquire ordering.
///
/// # Safety
/// `src` must be a multiple of 8 and 8 bytes from it on must lie in one live,
/// readable mapping.
pub(super) unsafe fn load_u64(src: *const u8) -> u64 {
    // SAFETY: aligned and mapped, says the caller. An atomic is the one kind
    // of reference that may look at memory others write: it is an
    // `UnsafeCell`, and it lives for this one load only.
    let word = unsafe { AtomicU64::from_ptr(src.cast_mut().cast()) };
    word.load(Ordering::Acquire)
}

/// Loads a half word whole, with acquire ordering.
///
/// # Safety
/// As for [`load_u64`], with 4 bytes.
pub(super) unsafe fn load_u32(src: *const u8) -> u32 {
    // SAFETY: as in `load_u64`.
    let word = unsafe { AtomicU32::from_ptr(src.cast_mut().cast()) };
    word.load(Ordering::Acquire)
}

/// Stores a word whole, with release ordering.
///
/// # Safety
/// As for [`load_u64`], in a mapping that is writable.
pub(super) unsafe fn store_u64(dst: *mut u8, value: u64) {
    // SAFETY: as in `load_u64`.
    let word = unsafe { AtomicU64::from_ptr(dst.cast()) };
    word.store(value, Ordering::Release);
}

/// Stores a half word whole, with release ordering.
///
/// # Safety
/// As for [`load_u64`], with 4 bytes, in a mapping that is writable.
pub(super) unsafe fn store_u32(dst: *mut u8, value: u32) {
    // SAFETY: as in `load_u64`.
    let word = unsafe { AtomicU32::from_ptr(dst.cast()) };
    word.store(value, Ordering::Release);
}

/// Sets or clears bits of a half word in one instruction, and returns what it
/// was.
///
/// # Safety
/// As for [`store_u32`].
pub(super) unsafe fn change_bits(dst: *mut u8, mask: u32, set: bool) -> u32 {
    // SAFETY: as in `load_u64`.
    let word = unsafe { AtomicU32::from_ptr(dst.cast()) };
    if set {
        word.fetch_or(mask, Ordering::AcqRel)
    } else {
        word.fetch_and(!mask, Ordering::AcqRel)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_exact_at_every_alignment_and_length() {
        let source: Vec<u8> = (0..64).collect();
        for start in 0..16 {
            for len in 0..40 {
                let mut out = vec![0xff; len + 1];
                // SAFETY: start + len < 64.
                unsafe { copy(source.as_ptr().add(start), &mut out[..len]) };
                assert_eq!(out[..len], source[start..start + len]);
                assert_eq!(out[len], 0xff, "wrote past the end");
            }
        }
    }
}
