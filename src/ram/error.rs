//! What can go wrong with guest memory.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use nix::libc;

use super::{Gpa, ImageError, LayoutError};

/// How a memory file is opened and mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// For a saved image, or to look without ever writing.
    ReadOnly,
    /// For a live guest, whose control block and key slots we write.
    ReadWrite,
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ReadOnly => "reading",
            Self::ReadWrite => "reading and writing",
        })
    }
}

/// An error of the memory layer.
///
/// Paths are shown escaped ([`Path::display`] through `{:?}`), since a file
/// name may hold control characters.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// The address, or a part of the stretch, is not RAM of this guest.
    #[error("guest physical address {gpa} (+{len} bytes) is not RAM of this guest")]
    Unmapped {
        /// First byte asked for.
        gpa: Gpa,
        /// Bytes asked for.
        len: u64,
    },
    /// A word was asked for at an address that is not a multiple of its size.
    #[error("guest physical address {gpa} is not a multiple of {align}")]
    Misaligned {
        /// The address asked for.
        gpa: Gpa,
        /// The size of the word in bytes.
        align: u64,
    },
    /// A write to memory that was opened read-only.
    #[error("cannot write guest memory at {gpa}: it was opened read-only")]
    ReadOnly {
        /// The address that was to be written.
        gpa: Gpa,
    },
    /// A word was to be changed that the guest changes too, through a backing
    /// that is not mapped.
    #[error(
        "cannot change bits in several bytes of the word at {gpa} while the guest may change it \
         too: this guest's memory is no file that could be mapped; give it a shared file \
         ('xftrace enroll', then a start of the domain)"
    )]
    NotAtomic {
        /// The word's address.
        gpa: Gpa,
    },
    /// The file shrank under the mapping; what it held is lost.
    #[error(
        "the memory file {path:?} was truncated or its pages vanished while it was in use; \
         what was read last cannot be trusted (has QEMU ended, or has somebody resized the file?)"
    )]
    Gone {
        /// The file.
        path: PathBuf,
    },
    /// The process whose memory it is has ended, or has unmapped it.
    #[error(
        "the guest's memory cannot be read through {path:?} any more; what was read last cannot \
         be trusted (QEMU has ended, or gave the memory up)"
    )]
    Ended {
        /// The file in /proc.
        path: PathBuf,
    },
    /// There is no such saved image.
    #[error(
        "there is no file {path:?}; name an image that `virsh dump --memory-only --format elf \
         DOMAIN FILE` has saved"
    )]
    NoImage {
        /// The path as given.
        path: PathBuf,
    },
    /// A saved image that cannot be read.
    #[error("cannot read the memory image {path:?}: {error}")]
    Image {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        error: ImageError,
    },
    /// The file is smaller than the guest's RAM.
    #[error(
        "the memory file {path:?} is truncated: it has {have} bytes, the guest's RAM needs {need}; \
         restart the domain so that QEMU makes the file anew, or name the right file"
    )]
    TooShort {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        have: u64,
        /// The bytes that the layout needs.
        need: u64,
    },
    /// There is no such file.
    #[error(
        "the memory file {path:?} does not exist; is the domain running, \
         and is its memory file-backed (<source type='file'/> in <memoryBacking>)?"
    )]
    NotFound {
        /// The path as given.
        path: PathBuf,
    },
    /// The file may not be opened.
    #[error("no permission for {access} the memory file {path:?}; run as root or as the user that owns it")]
    NoPermission {
        /// The path as given.
        path: PathBuf,
        /// What it was opened for.
        access: Access,
    },
    /// The path does not lead to a regular file.
    #[error("{path:?} is {what}, not a memory file; name the file that backs the guest's RAM")]
    NotAFile {
        /// The path as given.
        path: PathBuf,
        /// What it is instead.
        what: &'static str,
    },
    /// Any other failure of the operating system.
    #[error("cannot {doing} the memory file {path:?}")]
    Io {
        /// The path as given.
        path: PathBuf,
        /// What was tried: a verb.
        doing: &'static str,
        /// What the operating system said.
        source: io::Error,
    },
    /// The number of files is not what the layout speaks of.
    #[error("the guest's memory layout needs {need} memory files, {have} were given")]
    BackingCount {
        /// Files given.
        have: usize,
        /// Files that the layout names.
        need: usize,
    },
    /// The layout itself is not possible.
    #[error(transparent)]
    Layout(#[from] LayoutError),
}

impl RamError {
    /// Sorts a failure to open `path` by what the user can do about it.
    pub(super) fn from_open(path: &Path, access: Access, source: io::Error) -> Self {
        let path = path.to_path_buf();
        // What O_NOFOLLOW gives on a symbolic link.
        if source.raw_os_error() == Some(libc::ELOOP) {
            return Self::NotAFile {
                path,
                what: "a symbolic link",
            };
        }
        match source.kind() {
            io::ErrorKind::NotFound => Self::NotFound { path },
            io::ErrorKind::PermissionDenied => Self::NoPermission { path, access },
            io::ErrorKind::IsADirectory => Self::NotAFile {
                path,
                what: "a directory",
            },
            _ => Self::Io {
                path,
                doing: "open",
                source,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_open_error_says_the_path_and_what_to_do() {
        let path = Path::new("/var/ram\n1");
        for (kind, expected) in [
            (io::ErrorKind::NotFound, "is the domain running"),
            (io::ErrorKind::PermissionDenied, "run as root"),
            (io::ErrorKind::IsADirectory, "a directory"),
        ] {
            let shown = RamError::from_open(path, Access::ReadWrite, kind.into()).to_string();
            assert!(shown.contains(expected), "{shown}");
            // Escaped: the newline of the name must not reach a terminal.
            assert!(shown.contains("\"/var/ram\\n1\""), "{shown}");
        }
    }
}
