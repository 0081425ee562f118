//! Opening a memory file, and making sure that it is the one QEMU has.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;

use super::arguments::FileBackend;
use super::maps::Maps;
use super::{MemoryError, MemoryFile};

/// Opens the file of a memory backend of the process with this directory in
/// /proc, where it is the very file that the process has mapped.
pub(super) fn open(
    dir: &Path,
    maps: &Maps,
    backend: &FileBackend,
    domain: &str,
) -> Result<MemoryFile, MemoryError> {
    let path = PathBuf::from(&backend.path);
    // QEMU may live in a mount namespace of its own (libvirt gives it one by
    // default), so that its path means something else here.
    let there = dir.join("root").join(backend.path.trim_start_matches('/'));
    let file = match open_regular(&there) {
        Ok(file) => file,
        Err(error) if is_gone(&error) => {
            return Err(MemoryError::Unlinked {
                path,
                another: false,
            })
        }
        // QEMU makes a nameless file in a directory.
        Err(_) if maps.has_deleted(&backend.path) && there.is_dir() => {
            return Err(MemoryError::Unlinked {
                path,
                another: false,
            })
        }
        Err(error) => return Err(MemoryError::io("open", &there)(error)),
    };
    let metadata = file
        .metadata()
        .map_err(MemoryError::io("look at", &there))?;
    let mapped = maps.of(&metadata, dir);
    if mapped.private || !backend.shared {
        return Err(MemoryError::Private {
            name: domain.to_owned(),
            path,
        });
    }
    if mapped.shared == 0 && maps.has_deleted(&backend.path) {
        return Err(MemoryError::Unlinked {
            path,
            another: true,
        });
    }
    if mapped.shared < backend.size {
        return Err(MemoryError::NotMapped {
            path,
            expected: backend.size,
            mapped: mapped.shared,
        });
    }
    if metadata.len() < backend.size {
        return Err(MemoryError::Truncated {
            path,
            expected: backend.size,
            actual: metadata.len(),
        });
    }
    Ok(MemoryFile {
        id: backend.id.clone(),
        path,
        file,
        size: backend.size,
    })
}

/// Opens a regular file for reading and writing. Anything else that lies there
/// must neither block nor take notice of being opened.
fn open_regular(path: &Path) -> io::Result<File> {
    let flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_NOFOLLOW;
    let refuse = || io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file");
    if !fs::symlink_metadata(path)?.is_file() {
        return Err(refuse());
    }
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(flags.bits())
        .open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(refuse()),
    }
}

fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}
