//! A kernel that was found in guest RAM.

use crate::ram::{Gpa, GuestRam, RamError};

use super::{Gva, PageTables, WalkError};

/// Where a running (or once running) kernel lies: what [`super::find_all`]
/// found and cross-checked.
///
/// A snapshot: after a reboot inside the same QEMU the kernel lies elsewhere,
/// while its old image may go on passing every check until it is overwritten.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// Where the image begins (the symbol `_text`).
    pub phys_text: Gpa,
    /// Runtime minus link-time address of everything in the image, modulo
    /// 2^64: what KASLR added.
    pub slide: u64,
    /// `linux_banner` without its newline, printable ASCII (anything else is
    /// escaped).
    pub banner: String,
    /// Levels of the page tables, 4 or 5.
    pub levels: u8,
    /// The kernel's own page tables (`init_top_pgt`).
    pub tables: PageTables,
    /// Link-time address of `_text`.
    pub(super) link_text: Gva,
    /// Bytes from `_text` to `_end`.
    pub(super) span: u64,
}

impl Kernel {
    /// The runtime address of what System.map says is at `link`.
    pub fn runtime(&self, link: Gva) -> Gva {
        link.wrapping_add(self.slide)
    }

    /// The System.map address of what runs at `runtime`.
    pub fn link(&self, runtime: Gva) -> Gva {
        Gva(runtime.0.wrapping_sub(self.slide))
    }

    /// Whether a link-time address lies in the kernel's image, so that
    /// [`Kernel::image_gpa`] means something for it. Per-CPU and module
    /// symbols do not.
    pub fn in_image(&self, link: Gva) -> bool {
        link.wrapping_sub(self.link_text) < self.span
    }

    /// The guest physical address of a symbol in the kernel's image, without
    /// asking the guest's page tables: the image is one piece of RAM.
    ///
    /// For an address outside the image (see [`Kernel::in_image`]) the result
    /// means nothing; it may or may not be RAM.
    pub fn image_gpa(&self, link: Gva) -> Gpa {
        Gpa(self
            .phys_text
            .0
            .wrapping_add(link.wrapping_sub(self.link_text)))
    }

    /// The release, such as `6.1.0-37-cloud-amd64`: the third word of the
    /// banner. The guest says so; it is text for people.
    pub fn release(&self) -> &str {
        self.banner.split(' ').nth(2).unwrap_or("")
    }

    /// The guest physical address behind a runtime address, by the guest's
    /// page tables.
    ///
    /// # Errors
    /// A [`WalkError`] if it is not mapped to RAM.
    pub fn translate(&self, ram: &dyn GuestRam, runtime: Gva) -> Result<Gpa, WalkError> {
        Ok(self.tables.walk(ram, runtime)?.gpa)
    }

    /// Copies bytes from a runtime address on; may tear.
    ///
    /// # Errors
    /// As [`PageTables::read`].
    pub fn read(&self, ram: &dyn GuestRam, runtime: Gva, buf: &mut [u8]) -> Result<(), WalkError> {
        self.tables.read(ram, runtime, buf)
    }

    /// Loads an aligned word from a runtime address, whole.
    ///
    /// # Errors
    /// A [`WalkError`]; [`RamError::Misaligned`] inside it if the address is
    /// not a multiple of 8.
    pub fn read_u64(&self, ram: &dyn GuestRam, runtime: Gva) -> Result<u64, WalkError> {
        Ok(ram.read_u64(self.aligned(ram, runtime, 8)?)?)
    }

    /// Loads an aligned half word from a runtime address, whole.
    ///
    /// # Errors
    /// As [`Kernel::read_u64`], with alignment 4.
    pub fn read_u32(&self, ram: &dyn GuestRam, runtime: Gva) -> Result<u32, WalkError> {
        Ok(ram.read_u32(self.aligned(ram, runtime, 4)?)?)
    }

    /// Translates the address of a word, which must not cross pages.
    fn aligned(&self, ram: &dyn GuestRam, runtime: Gva, align: u64) -> Result<Gpa, WalkError> {
        let gpa = self.translate(ram, runtime)?;
        if !runtime.is_aligned(align) {
            return Err(RamError::Misaligned { gpa, align }.into());
        }
        Ok(gpa)
    }
}

#[cfg(test)]
impl Kernel {
    /// One that runs where it was linked, with its image in one piece.
    pub(crate) fn made_up(text: Gpa, link_text: Gva, span: u64, tables: PageTables) -> Self {
        Self {
            phys_text: text,
            slide: 0,
            banner: "Linux version 6.1".to_owned(),
            levels: tables.levels,
            tables,
            link_text,
            span,
        }
    }
}
