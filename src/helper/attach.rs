//! From a running domain to its memory, mapped.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context as _;

use crate::config::Config;
use crate::libvirt::memory::{find_backing, Held, MemoryPart};
use crate::libvirt::xml::{DomainXml, MachineFamily};
use crate::ram::{
    Access, BackingFile, FileRam, Gpa, GuestRam, Layout, MachineKind, ProcessRam, RamError,
};
use crate::session::QemuProcess;

/// A running domain that the helper holds on to.
pub struct Attached {
    /// The guest's RAM.
    pub ram: Arc<dyn GuestRam>,
    /// The files it lies in, as QEMU or the kernel calls them; for memory of
    /// no file, the one that it is read through.
    pub files: Vec<PathBuf>,
    /// The QEMU process.
    pub qemu: QemuProcess,
    /// Becomes readable when that process ends.
    pub pidfd: OwnedFd,
    /// The most CPUs that the guest can have, whatever it claims.
    pub max_cpus: u32,
}

/// Finds the QEMU process of a running domain and maps its memory.
///
/// # Errors
/// If the domain does not run, its memory cannot be told or reached, or its
/// layout is one that is not known.
pub fn attach(domain: &DomainXml, config: &Config) -> anyhow::Result<Attached> {
    let backing = find_backing(domain, &config.paths.libvirt_run)?;
    let machine = backing.machine.as_deref().or(domain.machine.as_deref());
    let machine = machine.unwrap_or_default();
    let kind = match MachineFamily::of(machine) {
        MachineFamily::Pc => MachineKind::I440fx,
        MachineFamily::Q35 => MachineKind::Q35,
        MachineFamily::Other => anyhow::bail!(
            "machine type '{}' is none of those whose memory layout is known (pc, q35)",
            machine.escape_debug()
        ),
    };
    let sizes: Vec<u64> = backing.ram.iter().map(|part| part.size).collect();
    let modules: Vec<(Gpa, u64)> = backing
        .modules
        .iter()
        .map(|(part, base)| (Gpa(*base), part.size))
        .collect();
    let layout = Layout::pc_nodes(&sizes, kind, backing.max_ram_below_4g)
        .and_then(|layout| layout.with_modules(&modules))
        .context("the guest's memory layout")?;
    let (total, limit) = (layout.total(), config.limits.guest_memory.0);
    anyhow::ensure!(
        total <= limit,
        "the guest has {total} bytes of memory, more than limits.guest_memory ({limit}) allows"
    );
    for error in &backing.left_out {
        log::warn!("a memory module is not read: {error}");
    }
    let modules = backing.modules.into_iter().map(|(part, _)| part);
    let parts: Vec<MemoryPart> = backing.ram.into_iter().chain(modules).collect();
    let (ram, files) = open(parts, layout, backing.qemu.pid)?;
    // What was opened through /proc is that process's only if it still lives.
    anyhow::ensure!(
        backing.qemu.lives(),
        "the domain's QEMU process has just ended"
    );
    Ok(Attached {
        ram,
        files,
        qemu: QemuProcess {
            pid: backing.qemu.pid,
            start_time: backing.qemu.start_time,
        },
        pidfd: backing.qemu.pidfd,
        max_cpus: backing.max_cpus.unwrap_or(u32::MAX),
    })
}

/// Maps the parts of the memory, where all of them are files, and else opens
/// the process that has them.
fn open(
    parts: Vec<MemoryPart>,
    layout: Layout,
    pid: i32,
) -> Result<(Arc<dyn GuestRam>, Vec<PathBuf>), RamError> {
    let dir = PathBuf::from(format!("/proc/{pid}"));
    let starts = parts.iter().map(|part| part.address).collect();
    let mut files = Vec::new();
    let mut paths = Vec::new();
    for part in parts {
        match part.held {
            Held::File { path, file } => {
                files.push(BackingFile::from_fd(file.into(), &path, Access::ReadWrite)?);
                paths.push(path);
            }
            Held::Anonymous => {
                let ram = ProcessRam::open(&dir, starts, Access::ReadWrite, layout)?;
                return Ok((Arc::new(ram), vec![dir.join("mem")]));
            }
        }
    }
    Ok((Arc::new(FileRam::map(files, layout)?), paths))
}
