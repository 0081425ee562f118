//! Where a running QEMU has its guest's RAM: in files, or in memory of its own.
//!
//! libvirt puts them at `<memory_backing_dir>/<id>-<name>/pc.ram` by default,
//! but that is a rule with exceptions (another directory, NUMA nodes, long
//! names, other versions), and a wrong file that is written to is a disaster.
//! So no path is built here. QEMU's command line says which of its memory
//! backends are the guest's RAM and what they are made of; /proc says whether
//! the process really has that very file mapped, shared and whole; and only a
//! file of which both hold is opened and handed out.
//!
//! Memory of no file is an address in the process, found by its size (`files`).
//! QEMU's monitor would tell it too (`info mtree -f`, `gpa2hva`), but every use
//! of it through libvirt marks the domain as tainted, takes the domain's lock,
//! and is not to be had without libvirt. What makes up for the weaker proof:
//! nothing is written before a kernel that fits the symbols was found there,
//! whose page tables lead to itself and whose heart beats.
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
use super::xml::{DomainXml, MemoryDevice};

/// Where a running domain's RAM is.
#[derive(Debug)]
pub struct Backing {
    /// The QEMU process.
    pub qemu: Qemu,
    /// The RAM that the guest boots with: one part, or one a NUMA node in the
    /// order of the nodes.
    pub ram: Vec<MemoryPart>,
    /// Memory modules (DIMMs and the like), and the guest physical address of
    /// each. One whose place is not known is left out.
    pub modules: Vec<(MemoryPart, u64)>,
    /// Why others cannot be read.
    pub left_out: Vec<MemoryError>,
    /// The machine as QEMU has it (`pc-q35-7.2`), whatever alias the XML has.
    pub machine: Option<String>,
    /// `max-ram-below-4g` of the machine, in bytes, where it is set: it moves
    /// the split of the RAM at 4 GiB.
    pub max_ram_below_4g: Option<u64>,
    /// The most CPUs that the guest can have, where QEMU is told.
    pub max_cpus: Option<u32>,
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

/// A part of the guest's memory.
#[derive(Debug)]
pub struct MemoryPart {
    /// QEMU's name for the memory backend: `pc.ram`, `ram-node0`, ..
    pub id: String,
    /// Its size, in bytes. A file is at least as large.
    pub size: u64,
    /// What it is.
    pub held: Held,
    /// Where QEMU has it in its own memory.
    pub address: u64,
}

/// What a part of the guest's memory is.
#[derive(Debug)]
pub enum Held {
    /// A file that QEMU has mapped shared.
    File {
        /// The path as QEMU or the kernel knows it, in QEMU's mount namespace;
        /// ` (deleted)` behind it where there is no such name.
        path: PathBuf,
        /// The file, open for reading and writing.
        file: File,
    },
    /// QEMU's own memory, of no file.
    Anonymous,
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
    /// Memory of a kind that is not known.
    #[error(
        "the memory of domain '{name}' cannot be read: {what}. Memory that is one shared file \
         can: type `xftrace enroll {}`, then shut the domain down and start it again",
        shell_word(name)
    )]
    UnknownKind {
        /// The domain.
        name: String,
        /// What it is.
        what: String,
    },
    /// A memory module of which it is not known where the guest has it.
    #[error(
        "where the guest has its {model} '{alias}' of {size} bytes is not known: libvirt tells it \
         of DIMMs, and of NVDIMMs that are there when the domain starts"
    )]
    NoPlace {
        /// libvirt's name for it.
        alias: String,
        /// Its kind.
        model: String,
        /// Its size, in bytes.
        size: u64,
    },
    /// No mapping that could be it.
    #[error(
        "QEMU has nothing of {size} bytes mapped that could be {id} of domain '{name}' (what it \
         has may be cut in pieces): type `xftrace enroll {}`, then shut the domain down and start \
         it again; a file can be told",
        shell_word(name)
    )]
    Missing {
        /// The domain.
        name: String,
        /// The backend.
        id: String,
        /// Its size, in bytes.
        size: u64,
    },
    /// More than one mapping that could be it.
    #[error(
        "QEMU has {count} mappings that could be {id} of domain '{name}' ({size} bytes), and one \
         is needed: type `xftrace enroll {}`, then shut the domain down and start it again; a \
         file can be told (a memfd cannot: where <memoryBacking> has <source type='memfd'/>, \
         make that 'file')",
        shell_word(name)
    )]
    Ambiguous {
        /// The domain.
        name: String,
        /// The backend.
        id: String,
        /// Its size, in bytes.
        size: u64,
        /// How many fit.
        count: usize,
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
    #[error(
        "QEMU has {mapped} bytes of the {expected} of {} mapped: shut the domain down and start \
         it again, and report it with `virsh version` if it is so then too",
        path.display()
    )]
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
    #[error(
        "QEMU's command line (process {pid}) cannot be understood: {what}; report it with \
         `virsh version`"
    )]
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
/// Where the domain does not run, or its memory cannot be told or does not
/// share what the guest writes.
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
    let ram = told.ram().map_err(|what| MemoryError::UnknownKind {
        name: name.clone(),
        what,
    })?;
    let dir = proc.join(found.qemu.pid.to_string());
    let mapped = maps::Maps::read(&dir)?;
    let open = |backend: &arguments::Backend| files::open(&dir, &mapped, backend, name);
    let ram = ram.iter().map(open).collect::<Result<_, _>>()?;
    let modules = modules(domain, &told, open)?;
    let backing = Backing {
        ram,
        modules: modules.found,
        left_out: modules.left_out,
        machine: told.machine(),
        max_ram_below_4g: told.max_ram_below_4g(),
        max_cpus: told.max_cpus(),
        qemu: found.qemu,
    };
    if !backing.qemu.lives() {
        return Err(process::not_running(domain));
    }
    Ok(backing)
}

/// The memory modules of a guest.
struct Modules {
    /// Each with its guest physical address.
    found: Vec<(MemoryPart, u64)>,
    /// Why others cannot be read.
    left_out: Vec<MemoryError>,
}

/// The memory modules whose place in the guest is known: QEMU was told, or
/// libvirt has asked QEMU since, and says it in the XML of the running domain.
/// Those that were plugged in since QEMU started are in that XML alone, and
/// those that were taken out again are there no more. And why others of these
/// cannot be read: an NVDIMM may be a private file, and the guest can be traced
/// without.
fn modules(
    domain: &DomainXml,
    told: &arguments::Arguments,
    open: impl Fn(&arguments::Backend) -> Result<MemoryPart, MemoryError>,
) -> Result<Modules, MemoryError> {
    let told_of = told.modules();
    let (mut found, mut left_out, mut placeless) = (Vec::new(), Vec::new(), Vec::new());
    let mut take = |module: &MemoryDevice, backend: &arguments::Backend, base| {
        match open(backend) {
            Ok(part) => found.push((part, base)),
            // The guest's kernel may lie in a DIMM: it is RAM as any other.
            Err(error) if module.model == "dimm" => return Err(error),
            Err(error) => left_out.push(error),
        }
        Ok(())
    };
    for (backend, address) in &told_of {
        let module = domain.modules.iter().find(|module| is_of(module, backend));
        match module.map(|module| (module, module.base.or(*address))) {
            Some((module, Some(base))) => take(module, backend, base)?,
            Some((module, None)) => placeless.push(module),
            // It was taken out again.
            None => {}
        }
    }
    for module in &domain.modules {
        let known = told_of.iter().any(|(backend, _)| is_of(module, backend));
        // Other kinds are no RAM.
        let is_ram = ["dimm", "nvdimm", "virtio-mem"].contains(&&module.model[..]);
        let (Some(alias), false, true) = (&module.alias, known, is_ram) else {
            continue;
        };
        let plugged = told.plugged(alias, module.size);
        match (plugged.filter(|_| module.model == "dimm"), module.base) {
            (Some(backend), Some(base)) => take(module, &backend, base)?,
            _ => placeless.push(module),
        }
    }
    left_out.extend(placeless.into_iter().map(|module| MemoryError::NoPlace {
        alias: module.alias.clone().unwrap_or_default(),
        model: module.model.clone(),
        size: module.size,
    }));
    Ok(Modules { found, left_out })
}

/// Whether this is the module's memory, by libvirt's name for that
/// (qemuBuildMemoryDimmBackendStr, src/qemu/qemu_command.c).
fn is_of(module: &MemoryDevice, backend: &arguments::Backend) -> bool {
    let named = backend.id.strip_prefix("mem");
    named.is_some() && named == module.alias.as_deref()
}
