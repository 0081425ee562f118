//! The layout of the guest kernel's structures, as its BTF tells it.
//!
//! A kernel built with CONFIG_DEBUG_INFO_BTF carries a description of its own
//! types in its image, between `__start_BTF` and `__stop_BTF`. With it, no
//! offset has to be known here: a structure is asked for its fields by name,
//! and what kernels call or place differently shows by which fields there are,
//! never by a version number.
//!
//! ```text
//! guest memory --copy--> Btf::parse --> structure("trace_array") --> field("array_buffer.buffer")
//! ```
//!
//! The bytes are the guest's, so they are hostile: they are copied once
//! ([`Btf::of`]), every offset is checked against the copy, and each question
//! has a budget of types it may look at, since types may refer to each other
//! in circles. What comes out is still a claim: an offset is a number below
//! [`SIZE_LIMIT`], and whoever adds it to an address checks that address.
//!
//! The format is that of Documentation/bpf/btf.rst and
//! include/uapi/linux/btf.h.

#[cfg(test)]
pub(crate) mod build;
mod lookup;
pub(super) mod parse;
#[cfg(test)]
mod tests;

use crate::ram::{GuestRam, RamError};

use super::{Kernel, Symbols};

pub use lookup::{Field, Structure};

/// Where the description ends and who must have made it up: Debian's kernels
/// have 4 to 5 MB of it.
const BYTES_LIMIT: u64 = 32 << 20;
/// How many types there are at most, each of which every question looks at: Debian's
/// kernels have 100,000 to 113,000.
const TYPES_LIMIT: usize = 1 << 20;
/// No structure that is asked for here is larger, nor has a field further in.
pub const SIZE_LIMIT: u32 = 1 << 20;

/// Why the layout of a structure is not known.
#[derive(Debug, thiserror::Error)]
pub enum BtfError {
    /// The kernel was built without it.
    #[error(
        "the guest's kernel has no BTF (CONFIG_DEBUG_INFO_BTF), the description of its own \
         structures, or its symbols do not tell where (__start_BTF)"
    )]
    Missing,
    /// The bytes are no BTF, or not all of it.
    #[error("the guest kernel's BTF cannot be read: {what} at offset {at:#x}; memory changed by the guest, or symbols of another kernel")]
    Malformed {
        /// What is wrong.
        what: &'static str,
        /// Where in the bytes.
        at: usize,
    },
    /// There is no such structure, field or constant.
    #[error("the guest's kernel has no {0}: it is built without what xftrace reads there, or has changed it")]
    Unknown(String),
    /// Guest memory could not be read.
    #[error(transparent)]
    Ram(#[from] RamError),
}

/// The types of one kernel.
pub struct Btf {
    bytes: Vec<u8>,
    /// Where in `bytes` each type's record begins; type ids count from 1.
    types: Vec<u32>,
    /// Where in `bytes` the names lie.
    names: std::ops::Range<usize>,
}

impl std::fmt::Debug for Btf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Btf")
            .field("types", &self.types.len())
            .finish_non_exhaustive()
    }
}

impl Btf {
    /// Copies the BTF of `kernel` out of guest memory, and parses the copy.
    ///
    /// # Errors
    /// See [`BtfError`].
    pub fn of(ram: &dyn GuestRam, kernel: &Kernel, symbols: &Symbols) -> Result<Self, BtfError> {
        let address = |name| symbols.address(name).filter(|&at| kernel.in_image(at));
        let (Some(start), Some(stop)) = (address("__start_BTF"), address("__stop_BTF")) else {
            return Err(BtfError::Missing);
        };
        let length = stop.wrapping_sub(start);
        if length == 0 {
            return Err(BtfError::Missing);
        }
        if length > BYTES_LIMIT {
            return Err(BtfError::Malformed {
                what: "it is impossibly long",
                at: 0,
            });
        }
        let mut bytes = vec![0; length as usize];
        ram.read(kernel.image_gpa(start), &mut bytes)?;
        Self::parse(bytes)
    }
}
