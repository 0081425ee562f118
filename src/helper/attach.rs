//! From a running domain to its memory, mapped.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context as _;

use crate::config::Config;
use crate::libvirt::memory::find_backing;
use crate::libvirt::xml::{DomainXml, MachineFamily};
use crate::ram::{Access, BackingFile, FileRam, GuestRam, Layout, MachineKind};
use crate::session::QemuProcess;

/// A running domain that the helper holds on to.
pub struct Attached {
    /// The guest's RAM.
    pub ram: Arc<dyn GuestRam>,
    /// The files it lies in, as QEMU calls them.
    pub files: Vec<PathBuf>,
    /// The QEMU process.
    pub qemu: QemuProcess,
    /// Becomes readable when that process ends.
    pub pidfd: OwnedFd,
}

/// Finds the QEMU process of a running domain and maps its memory.
///
/// # Errors
/// If the domain does not run, its memory is not in files that both QEMU and
/// we can map, or its layout is one that is not known.
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
    // Where memory is split is not for us to guess.
    if let Some(below) = backing.max_ram_below_4g {
        anyhow::bail!(
            "QEMU was started with max-ram-below-4g={below}, which moves guest memory; \
             take it out of the domain's <qemu:commandline>"
        );
    }
    let sizes: Vec<u64> = backing.files.iter().map(|file| file.size).collect();
    let total: u64 = sizes.iter().sum();
    let limit = config.limits.guest_memory.0;
    anyhow::ensure!(
        total <= limit,
        "the guest has {total} bytes of memory, more than limits.guest_memory ({limit}) allows"
    );
    let layout = Layout::pc_nodes(&sizes, kind).context("the guest's memory layout")?;
    let mut paths = Vec::new();
    let mut files = Vec::new();
    for file in backing.files {
        files.push(BackingFile::from_fd(
            file.file.into(),
            &file.path,
            Access::ReadWrite,
        )?);
        paths.push(file.path);
    }
    Ok(Attached {
        ram: Arc::new(FileRam::map(files, layout)?),
        files: paths,
        qemu: QemuProcess {
            pid: backing.qemu.pid,
            start_time: backing.qemu.start_time,
        },
        pidfd: backing.qemu.pidfd,
    })
}
