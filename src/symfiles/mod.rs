//! From what people have of a guest's kernel to its symbols, and the store
//! that keeps them.
//!
//! People have a System.map, a vmlinux, the vmlinuz that boots, the package it
//! came in, or what the guest's /proc/kallsyms said. [`Known::load`] takes any
//! of them and tells which it is by its content, never by its name:
//!
//! ```text
//! .deb -package-> vmlinuz -bzimage, unpack-> ELF -elf-> .symtab, or kallsyms
//!                              System.map, saved /proc/kallsyms -> kernel::Symbols
//! ```
//!
//! [`Store`] keeps what was read, as an *index* a kernel: a head, with which a
//! kernel is told from all others without reading the rest, and a table that
//! loads in some ten milliseconds.
//!
//! Any of these files may be a guest's own, made to do harm. So lengths are
//! checked against what is there, what is unpacked has a limit, searches have
//! a bound, and names are printable ASCII before anybody sees them. Symbols
//! that lie are another matter: nobody can tell, until they are compared with
//! the kernel in a guest's memory (`kernel::find_all`).
//!
//! Uses `kernel` alone. Never writes but into the store.

mod bytes;
mod bzimage;
mod elf;
mod index;
mod kallsyms;
mod known;
mod package;
mod store;
mod unpack;

#[cfg(test)]
mod tests;

pub use index::{Head, IndexFault};
pub use known::{Kind, Known};
pub use store::{Added, Store, Stored};

use std::io;
use std::path::{Path, PathBuf};

use crate::kernel::SymbolsFault;

/// The largest file that is read: a vmlinux with debug information has some
/// 800 MiB.
const MAX_FILE: u64 = 2 << 30;

/// The largest kernel that is unpacked; a distribution's has 40 to 80 MiB.
const MAX_IMAGE: u64 = 512 << 20;

/// Why a file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SymfileError {
    /// A file or directory cannot be read or written.
    #[error("cannot {action} {path:?}: {why}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// With which file.
        path: PathBuf,
        /// What the operating system said.
        why: io::Error,
    },
    /// It can be read, but has no symbols that could be used.
    #[error("{path:?} cannot be used as the guest kernel's symbols: {fault}")]
    Content {
        /// The path as given.
        path: PathBuf,
        /// What is wrong with it.
        fault: Fault,
    },
    /// Nothing in the store is called that, or several are.
    #[error("{0}")]
    Id(String),
}

impl SymfileError {
    /// For `map_err` on what was tried with a file.
    fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |why| Self::Io { action, path, why }
    }
}

/// What is wrong with a file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// Not a regular file.
    #[error("it is not a file")]
    NotAFile,
    /// More than 2 GiB.
    #[error("it, or the kernel in it, has more than {} GiB", MAX_FILE >> 30)]
    TooLarge,
    /// Text that is no list of symbols, or symbols that are no kernel's.
    #[error(transparent)]
    Symbols(#[from] SymbolsFault),
    /// A boot image that ends too soon.
    #[error("the boot image is cut short")]
    Cut,
    /// A boot image of before 2008, which does not say where the kernel is.
    #[error(
        "the boot image is of a kernel before 2.6.26; take the System.map that was made with it"
    )]
    OldImage,
    /// The kernel in a boot image is packed in a way that is not known.
    #[error(
        "the kernel in it is compressed in a way that is not known here (known are gzip, xz, \
         lzma, bzip2, lz4 and zstd); take its System.map or vmlinux"
    )]
    Compression,
    /// It cannot be unpacked.
    #[error("the kernel in it cannot be unpacked: {0}")]
    Unpack(String),
    /// A package that cannot be read.
    #[error("the package cannot be read: {0}")]
    Package(String),
    /// A package without a kernel.
    #[error(
        "the package has no kernel in it; take linux-image-RELEASE (not a meta-package such as \
         linux-image-amd64, and not linux-headers)"
    )]
    NoKernel,
    /// An ELF file that cannot be read.
    #[error("it is an ELF file that cannot be read: {0}")]
    Elf(String),
    /// An ELF file for another processor.
    #[error("it is not for x86-64")]
    Machine,
    /// Symbols, or names of them, that no kernel has.
    #[error("it has more symbols, or longer names of them, than any kernel has")]
    TooManySymbols,
    /// Neither a symbol table nor the kernel's own list.
    #[error(
        "it has no symbol table, and the kernel's own list of symbols (kallsyms) is not in it as \
         expected: {0}; take its System.map or an unstripped vmlinux"
    )]
    NoKallsyms(&'static str),
    /// An index of the store.
    #[error(transparent)]
    Index(#[from] IndexFault),
}

impl Fault {
    /// As what is wrong with this file.
    fn of(self, path: &Path) -> SymfileError {
        SymfileError::Content {
            path: path.to_owned(),
            fault: self,
        }
    }
}
