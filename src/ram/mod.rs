//! Guest RAM, seen from the host.
//!
//! This room turns "the files that back a domain's memory" into one question:
//! *what lies at this guest physical address right now?* A [`Layout`] says
//! which piece of which backing holds which [`Gpa`]; a [`GuestRam`] reads and
//! writes there. There are four:
//!
//! | | the guest's memory is | words whole | needs |
//! | --- | --- | --- | --- |
//! | [`FileRam`] | a file that QEMU has mapped shared: libvirt's `pc.ram`, a memfd, huge pages | yes | the file, or QEMU's descriptor of it |
//! | [`ProcessRam`] | plain anonymous memory of QEMU | no, see there | the right to trace QEMU |
//! | [`ImageRam`] | a saved image, ELF or raw; read only | yes | the file |
//! | [`VecRam`] | our own, for tests: with holes, write protection, and a hook that changes it while somebody reads | yes | |
//!
//! What holds here, and what every layer above relies on:
//!
//! * Guest memory is hostile and moves. There is never a `&[u8]` or a `&T`
//!   into it: bytes leave through volatile or atomic access into memory of
//!   our own. A bulk [`GuestRam::read`] may tear (the guest writes while we
//!   copy); an aligned word does not (but see [`ProcessRam`]). Whoever reads
//!   copies once and validates the copy.
//! * An address from the guest cannot make us leave a mapping: every access
//!   goes through [`Layout::resolve`], which knows no address outside RAM.
//! * A backing that shrinks under us does not kill us: the `SIGBUS` is
//!   caught, the mapping becomes zeros, and [`GuestRam::check`] says so. A
//!   reader therefore asks `check` after a batch, before it believes it.
//! * Looking does not grow the guest: a hole in a shared file would be
//!   allocated by reading through the mapping, so scanners ask
//!   [`GuestRam::next_populated`] first.
//!
//! This is the only module with `unsafe` code. It knows nothing of kernels,
//! of libvirt, or of how the files were found.

#![allow(unsafe_code)]

mod addr;
mod error;
mod file;
mod image;
mod layout;
mod process;
mod sigbus;
mod vec;
mod volatile;

pub use addr::{Gpa, RamOffset};
pub use error::{Access, RamError};
pub use file::{BackingFile, FileId, FileRam};
pub use image::{ImageError, ImageRam};
pub use layout::{Layout, LayoutError, MachineKind, Place, Range};
pub use process::ProcessRam;
pub use vec::VecRam;

/// Size of the pages that layouts, holes and x86-64 page tables count in.
pub const PAGE_SIZE: u64 = 4096;

/// Memory of a guest that somebody else (QEMU, the guest) may be writing.
///
/// Object-safe, so that live guests, saved images and test memory go through
/// the same code.
pub trait GuestRam: Send + Sync {
    /// Which guest physical addresses are RAM.
    fn layout(&self) -> &Layout;

    /// Copies `buf.len()` bytes from `gpa` on into `buf`.
    ///
    /// The copy is volatile and may tear: where the guest writes meanwhile,
    /// old and new bytes mix (aligned 8-byte words stay whole where the
    /// source is aligned). May cross from one range of the layout into an
    /// adjacent one. On an error the content of `buf` is unspecified.
    ///
    /// # Errors
    /// [`RamError::Unmapped`] if any byte of the range is not RAM.
    fn read(&self, gpa: Gpa, buf: &mut [u8]) -> Result<(), RamError>;

    /// Loads one little-endian 64-bit word, whole and with acquire ordering.
    /// What [`ProcessRam`] does instead is said there, for each of these four.
    ///
    /// # Errors
    /// [`RamError::Misaligned`] if `gpa` is not a multiple of 8,
    /// [`RamError::Unmapped`] if it is not RAM.
    fn read_u64(&self, gpa: Gpa) -> Result<u64, RamError>;

    /// Loads one little-endian 32-bit word, whole and with acquire ordering.
    ///
    /// # Errors
    /// As [`GuestRam::read_u64`], with alignment 4.
    fn read_u32(&self, gpa: Gpa) -> Result<u32, RamError>;

    /// Stores one little-endian 64-bit word, whole and with release ordering.
    ///
    /// # Errors
    /// As [`GuestRam::read_u64`], and [`RamError::ReadOnly`] for an image or
    /// a mapping that was opened read-only.
    fn write_u64(&self, gpa: Gpa, value: u64) -> Result<(), RamError>;

    /// Stores one little-endian 32-bit word, whole and with release ordering.
    ///
    /// # Errors
    /// As [`GuestRam::write_u64`], with alignment 4.
    fn write_u32(&self, gpa: Gpa, value: u32) -> Result<(), RamError>;

    /// Sets the bits of `mask` in one little-endian 32-bit word, or clears
    /// them, and returns what the word was before. One atomic instruction, so
    /// that nothing is lost of what the guest does to the word meanwhile;
    /// [`ProcessRam`] has none, and promises that for the word's other bytes.
    ///
    /// # Errors
    /// As [`GuestRam::write_u32`], and [`RamError::NotAtomic`] for bits that a
    /// backing cannot change like this.
    fn change_bits(&self, gpa: Gpa, mask: u32, set: bool) -> Result<u32, RamError>;

    /// The first address at or after `gpa` that has something behind it, or
    /// `None` if there is nothing up to the end of RAM. It is `gpa` itself or
    /// the first of a page.
    ///
    /// What lies before it was never touched by the guest: it reads as zeros,
    /// and reading it through a shared mapping would allocate it on the host.
    /// A backing that cannot tell (a file system without `SEEK_DATA`) counts
    /// as populated.
    fn next_populated(&self, gpa: Gpa) -> Option<Gpa>;

    /// Whether all of `[gpa, gpa + len)` is populated, so that reading it
    /// allocates nothing (see [`GuestRam::next_populated`]). An empty range
    /// is populated; one that leaves RAM is not. Costs a question for each
    /// page.
    fn populated(&self, gpa: Gpa, len: u64) -> bool {
        let Some(end) = gpa.checked_add(len) else {
            return false;
        };
        let mut at = gpa;
        while at < end {
            if self.next_populated(at) != Some(at) {
                return false;
            }
            // On to the next page; the last page of the address space ends
            // after every `end`.
            at = match (at.0 - at.0 % PAGE_SIZE).checked_add(PAGE_SIZE) {
                Some(next) => Gpa(next),
                None => break,
            };
        }
        true
    }

    /// Whether what was read so far came from the guest.
    ///
    /// # Errors
    /// [`RamError::Gone`] after a backing was truncated, [`RamError::Ended`]
    /// after its process has gone: reads give zeros from then on (or from
    /// some moment before), and writes reach nobody.
    fn check(&self) -> Result<(), RamError>;
}
