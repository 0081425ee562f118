//! The guest's structures, as they are read: one load at a time, each address
//! checked, for every byte may be the guest's lie.

use crate::kernel::control::RingLayout;
use crate::kernel::{Gva, Kernel};
use crate::ram::{Gpa, GuestRam};

use super::RingError;

/// The bits of `commit` that are a length; above are RB_MISSED_*.
const COMMIT_MASK: u64 = (1 << 20) - 1;
/// `RB_MISSED_EVENTS`: the guest's own reader found that records are missing
/// in front of the page.
const MISSED: u64 = 1 << 31;

/// The structures of one ring buffer in one guest's memory.
#[derive(Clone, Copy)]
pub(super) struct Structs<'a> {
    pub(super) ram: &'a dyn GuestRam,
    pub(super) kernel: &'a Kernel,
    pub(super) layout: &'a RingLayout,
}

/// A page of the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Page {
    /// Its `struct buffer_page`.
    pub(super) holder: Gva,
    /// Its sub-buffer.
    pub(super) data: Gpa,
}

/// One look at the head of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) time: u64,
    pub(super) commit: u32,
    pub(super) missed: bool,
}

impl Structs<'_> {
    /// The page that a `struct buffer_page` stands for.
    pub(super) fn page(self, holder: Gva) -> Result<Page, RingError> {
        let at = self.pointer(holder, self.layout.page)?;
        let data = self.translate(at, "a sub-buffer")?;
        let size = u64::from(self.layout.page_size);
        // A sub-buffer is one block of the page allocator.
        if !data.is_aligned(size) || data.checked_add(size).is_none() {
            return Err(RingError::Lost {
                what: "a sub-buffer",
                at,
            });
        }
        Ok(Page { holder, data })
    }

    pub(super) fn head(self, page: Gpa) -> Result<Head, RingError> {
        let at = |field: u16| Gpa(page.0 + u64::from(field));
        let time = self.ram.read_u64(at(self.layout.time_stamp))?;
        let word = self.ram.read_u64(at(self.layout.commit))?;
        let (commit, missed) = (word & COMMIT_MASK, word & MISSED != 0);
        let room = u64::from(self.layout.page_size) - u64::from(self.layout.data);
        // A length that the page cannot hold is no length.
        let commit = if commit <= room { commit as u32 } else { 0 };
        Ok(Head {
            time,
            commit,
            missed,
        })
    }

    /// The pointer in that field of the structure at `base`.
    pub(super) fn pointer(self, base: Gva, field: u16) -> Result<Gva, RingError> {
        self.load(offset(base, field)).map(Gva)
    }

    pub(super) fn load(self, at: Gva) -> Result<u64, RingError> {
        let gpa = self.translate(at, "a pointer")?;
        if !gpa.is_aligned(8) {
            return Err(RingError::Lost {
                what: "a pointer",
                at,
            });
        }
        Ok(self.ram.read_u64(gpa)?)
    }

    fn translate(self, at: Gva, what: &'static str) -> Result<Gpa, RingError> {
        self.kernel
            .translate(self.ram, at)
            .map_err(|_| RingError::Lost { what, at })
    }
}

pub(super) fn offset(base: Gva, field: u16) -> Gva {
    Gva(base.0.wrapping_add(field.into()))
}
