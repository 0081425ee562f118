//! The files in which a running QEMU has its guest's RAM.
//!
//! libvirt puts them at `<memory_backing_dir>/<id>-<name>/pc.ram` by default,
//! but that is a rule with exceptions (another directory, NUMA nodes, long
//! names, other versions), and a wrong file that is written to is a disaster.
//! So no path is built here. QEMU's command line says which of its memory
//! backends are the guest's RAM and what files they have; /proc says whether
//! the process really has that very file mapped, shared and whole; and only a
//! file of which both hold is opened and handed out.
//!
//! Everything read from /proc is about the process that the pidfd stands for:
//! that is opened first, and asked last whether the process still lives.

mod arguments;
mod files;
mod maps;
mod process;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::shell_word;
use super::xml::DomainXml;

/// Where a running domain's RAM is.
#[derive(Debug)]
pub struct Backing {
    /// The QEMU process.
    pub qemu: Qemu,
    /// The files of the RAM that the guest boots with: one, or one a NUMA
    /// node in the order of the nodes.
    pub files: Vec<MemoryFile>,
    /// The files of memory modules (DIMMs and the like), which lie above the
    /// RAM.
    pub modules: Vec<MemoryFile>,
    /// The machine as QEMU has it (`pc-q35-7.2`), whatever alias the XML has.
    pub machine: Option<String>,
    /// `max-ram-below-4g` of the machine, in bytes, where it is set: it moves
    /// the split of the RAM at 4 GiB.
    pub max_ram_below_4g: Option<u64>,
}

/// A QEMU process.
#[derive(Debug)]
pub struct Qemu {
    /// The process id.
    pub pid: i32,
    /// When it started, in clock ticks since boot: field 22 of
    /// /proc/PID/stat, proc(5). With the process id, it tells a process from
    /// every other until the next boot.
    pub start_time: u64,
    /// Becomes readable when the process ends.
    pub pidfd: OwnedFd,
}

/// A file that QEMU has mapped as guest RAM.
#[derive(Debug)]
pub struct MemoryFile {
    /// QEMU's name for the memory backend: `pc.ram`, `ram-node0`, ..
    pub id: String,
    /// The path as QEMU knows it, in its own mount namespace.
    pub path: PathBuf,
    /// The file, open for reading and writing.
    pub file: File,
    /// The size of the memory, in bytes. The file is at least as large.
    pub size: u64,
}

/// Why a domain's memory was not found.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// No process.
    #[error(
        "no QEMU process of domain '{name}' ({uuid}) was found: start the domain with \
         `virsh start {}`",
        shell_word(name)
    )]
    NotRunning {
        /// The domain.
        name: String,
        /// The domain.
        uuid: Uuid,
    },
    /// More than one process that could be it.
    #[error(
        "several QEMU processes say that they are domain '{name}' ({pids:?}), and libvirt's PID \
         file does not tell which: end those that are not libvirt's"
    )]
    Several {
        /// The domain.
        name: String,
        /// The processes.
        pids: Vec<i32>,
    },
    /// RAM without a file.
    #[error(
        "the memory of domain '{name}' is not file-backed ({what}): type `xftrace enroll {}`, \
         then shut the domain down and start it again",
        shell_word(name)
    )]
    NotFileBacked {
        /// The domain.
        name: String,
        /// What it is.
        what: String,
    },
    /// A file that does not get to see what the guest writes.
    #[error(
        "QEMU has {} mapped privately (access mode='private'), so that the guest's writes never \
         reach it: type `xftrace enroll {}`, then shut the domain down and start it again",
        path.display(),
        shell_word(name)
    )]
    Private {
        /// The domain.
        name: String,
        /// The file.
        path: PathBuf,
    },
    /// A file without a name.
    #[error(
        "the memory file {} was unlinked{}: shut the domain down and start it again to get a \
         new one",
        path.display(),
        if *another { ", and another file has its name" } else { "" }
    )]
    Unlinked {
        /// What its name was.
        path: PathBuf,
        /// Whether there is another file of that name.
        another: bool,
    },
    /// QEMU does not have the whole file mapped.
    #[error("QEMU has {mapped} bytes of the {expected} of {} mapped", path.display())]
    NotMapped {
        /// The file.
        path: PathBuf,
        /// Its size as QEMU was told, in bytes.
        expected: u64,
        /// What is mapped of it.
        mapped: u64,
    },
    /// A file that is smaller than the memory.
    #[error(
        "the memory file {} was truncated: it has {actual} bytes and should have {expected}. \
         The guest will crash where it is missing; shut it down and start it again",
        path.display()
    )]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Its size as QEMU was told, in bytes.
        expected: u64,
        /// Its size now.
        actual: u64,
    },
    /// A command line that cannot be understood.
    #[error("QEMU's command line (process {pid}) cannot be understood: {what}")]
    Arguments {
        /// The process.
        pid: i32,
        /// What is wrong.
        what: String,
    },
    /// The system refused.
    #[error("cannot {what} {}{}", path.display(), hint(source))]
    Io {
        /// What it was asked for.
        what: &'static str,
        /// Of which file.
        path: PathBuf,
        /// Its answer.
        source: io::Error,
    },
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => " (this needs root)",
        _ => "",
    }
}

impl MemoryError {
    fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> MemoryError {
        let path = path.to_owned();
        move |source| MemoryError::Io { what, path, source }
    }
}

/// Finds and opens the memory of a running domain. `libvirt_run` is where
/// libvirt keeps its PID files (/run/libvirt/qemu).
///
/// # Errors
/// Where the domain does not run, or its memory is no file that shares what
/// the guest writes.
pub fn find_backing(domain: &DomainXml, libvirt_run: &Path) -> Result<Backing, MemoryError> {
    find_in(Path::new("/proc"), domain, libvirt_run)
}

fn find_in(proc: &Path, domain: &DomainXml, libvirt_run: &Path) -> Result<Backing, MemoryError> {
    let found = process::find(proc, domain, libvirt_run)?;
    let told =
        arguments::Arguments::of(&found.arguments).map_err(|what| MemoryError::Arguments {
            pid: found.qemu.pid,
            what,
        })?;
    let name = &domain.name;
    let ram = told.ram().map_err(|what| MemoryError::NotFileBacked {
        name: name.clone(),
        what,
    })?;
    let dir = proc.join(found.qemu.pid.to_string());
    let mapped = maps::Maps::read(&dir)?;
    let open = |files: &[arguments::FileBackend]| -> Result<Vec<MemoryFile>, MemoryError> {
        let opened = files
            .iter()
            .map(|file| files::open(&dir, &mapped, file, name));
        opened.collect()
    };
    let backing = Backing {
        files: open(&ram)?,
        modules: open(&told.modules())?,
        machine: told.machine(),
        max_ram_below_4g: told.max_ram_below_4g(),
        qemu: found.qemu,
    };
    if !process::lives(&backing.qemu) {
        return Err(process::not_running(domain));
    }
    Ok(backing)
}
