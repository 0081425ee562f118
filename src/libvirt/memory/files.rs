//! Opening a part of the guest's memory, and making sure that it is what QEMU
//! has.
//!
//! A file that QEMU names is opened by that name. One without a name (a memfd,
//! a file in a directory of huge pages, which QEMU unlinks at once) is found
//! among the mappings by its size and by what the kernel calls it, and opened
//! through `/proc/PID/map_files`. Memory of no file is found by its size
//! alone. Where more than one mapping fits, none is taken: whether it was the
//! right one, a guest's content could pretend.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;

use super::arguments::{Backend, Kind};
use super::maps::{Mapping, Maps};
use super::{Held, MemoryError, MemoryPart};

/// Finds a backend's memory in the process with this directory in /proc, and
/// opens its file where it has one.
pub(super) fn open(
    dir: &Path,
    maps: &Maps,
    backend: &Backend,
    domain: &str,
) -> Result<MemoryPart, MemoryError> {
    let part = |held, address| MemoryPart {
        id: backend.id.clone(),
        size: backend.size,
        held,
        address,
    };
    match &backend.kind {
        Kind::Ram if !backend.shared => {
            let found = only(maps.anonymous(backend.size), backend, domain)?;
            Ok(part(Held::Anonymous, found.start))
        }
        // memory-backend-ram with share=on: the kernel's own file for shared
        // memory of no file.
        Kind::Ram => nameless(dir, maps, backend, domain, |name| {
            name.starts_with("/dev/zero")
        }),
        Kind::Memfd => nameless(dir, maps, backend, domain, |name| {
            name.starts_with("/memfd:memory-backend-memfd")
        }),
        Kind::File(path) => {
            let there = dir.join("root").join(path.trim_start_matches('/'));
            if there.is_dir() {
                return nameless(dir, maps, backend, domain, |name| {
                    name.strip_prefix(path.trim_end_matches('/'))
                        .is_some_and(|name| is_made_for(&backend.id, name))
                });
            }
            named(dir, maps, backend, path, domain)
        }
    }
}

/// Whether QEMU makes a file of this name for a backend: `/qemu_back_mem.NAME.`
/// and six characters of mkstemp's, none of them a dot (file_ram_open,
/// softmmu/physmem.c). The name is the backend's id, with `/objects/` before it
/// where the machine has it so (host_memory_backend_get_name,
/// backends/hostmem.c), and `_` for `/`.
fn is_made_for(id: &str, name: &str) -> bool {
    let name = name.strip_suffix(" (deleted)").unwrap_or(name);
    let made = name.strip_prefix("/qemu_back_mem.");
    let Some((made, _)) = made.and_then(|made| made.rsplit_once('.')) else {
        return false;
    };
    made.strip_prefix("_objects_").unwrap_or(made) == id.replace('/', "_")
}

/// The one mapping there is.
fn only<'m>(
    found: Vec<&'m Mapping>,
    backend: &Backend,
    domain: &str,
) -> Result<&'m Mapping, MemoryError> {
    match found[..] {
        [only] => Ok(only),
        [] => Err(MemoryError::Missing {
            name: domain.to_owned(),
            id: backend.id.clone(),
            size: backend.size,
        }),
        _ => Err(MemoryError::Ambiguous {
            name: domain.to_owned(),
            id: backend.id.clone(),
            size: backend.size,
            count: found.len(),
        }),
    }
}

/// Opens a file that has no name, or one that QEMU made up.
fn nameless(
    dir: &Path,
    maps: &Maps,
    backend: &Backend,
    domain: &str,
    is_named: impl Fn(&str) -> bool,
) -> Result<MemoryPart, MemoryError> {
    if !backend.shared {
        return Err(MemoryError::Private {
            name: domain.to_owned(),
            path: PathBuf::from(&backend.id),
        });
    }
    let found = only(maps.shared(backend.size, is_named), backend, domain)?;
    let link = found.link(dir);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&link)
        .map_err(MemoryError::io("open", &link))?;
    let path = PathBuf::from(&found.path);
    let address = check(&file, &link, dir, maps, backend, &path, domain)?;
    Ok(MemoryPart {
        id: backend.id.clone(),
        size: backend.size,
        held: Held::File { path, file },
        address,
    })
}

/// Opens a file by the path that QEMU was given.
fn named(
    dir: &Path,
    maps: &Maps,
    backend: &Backend,
    path: &str,
    domain: &str,
) -> Result<MemoryPart, MemoryError> {
    // QEMU may live in a mount namespace of its own (libvirt gives it one by
    // default), so that its path means something else here.
    let there = dir.join("root").join(path.trim_start_matches('/'));
    let path = PathBuf::from(path);
    let file = match open_regular(&there) {
        Ok(file) => file,
        Err(error) if is_gone(&error) => {
            return Err(MemoryError::Unlinked {
                path,
                another: false,
            })
        }
        Err(error) => return Err(MemoryError::io("open", &there)(error)),
    };
    let address = check(&file, &there, dir, maps, backend, &path, domain)?;
    Ok(MemoryPart {
        id: backend.id.clone(),
        size: backend.size,
        held: Held::File { path, file },
        address,
    })
}

/// Whether the process has this very file mapped, shared and whole, and where.
fn check(
    file: &File,
    opened: &Path,
    dir: &Path,
    maps: &Maps,
    backend: &Backend,
    path: &Path,
    domain: &str,
) -> Result<u64, MemoryError> {
    let metadata = file
        .metadata()
        .map_err(MemoryError::io("look at", opened))?;
    let mapped = maps.of(&metadata, dir);
    let path = path.to_owned();
    if mapped.private || !backend.shared {
        return Err(MemoryError::Private {
            name: domain.to_owned(),
            path,
        });
    }
    if mapped.shared == 0 && maps.has_deleted(&path.to_string_lossy()) {
        return Err(MemoryError::Unlinked {
            path,
            another: true,
        });
    }
    if metadata.len() < backend.size {
        return Err(MemoryError::Truncated {
            path,
            expected: backend.size,
            actual: metadata.len(),
        });
    }
    match mapped.address.filter(|_| mapped.shared >= backend.size) {
        Some(address) => Ok(address),
        None => Err(MemoryError::NotMapped {
            path,
            expected: backend.size,
            mapped: mapped.shared,
        }),
    }
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
