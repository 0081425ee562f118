//! What a domain needs.

use std::time::Duration;

use nix::sys::statfs::{fstatfs, TMPFS_MAGIC};

use super::Report;
use crate::cli::client;
use crate::config::Config;
use crate::helper::protocol::{GuestStatus, Reply, Request, Status};
use crate::libvirt::connection::{Connection, ConnectionError, Domain};
use crate::libvirt::enrolment::{untraceable, By, Enrolment};
use crate::libvirt::memory::find_backing;
use crate::libvirt::shell_word;
use crate::libvirt::xml::DomainXml;
use crate::session::Mode;

/// How long a helper may take to say how things stand.
const PATIENCE: Duration = Duration::from_secs(5);

/// Checks a domain.
pub(super) fn check(
    config: &Config,
    connection: &Connection,
    typed: &str,
    report: &mut Report,
) -> anyhow::Result<()> {
    let domain = match connection.domain(typed) {
        Ok(domain) => domain,
        Err(error @ ConnectionError::NoDomain { .. }) => {
            report.missing(
                format!("the domain: {error}"),
                format!("virsh -c {} list --all", shell_word(connection.uri())),
            );
            return Ok(());
        }
        Err(error) => return Err(error.into()),
    };
    let name = shell_word(domain.name());
    report.ok(format!("domain '{}' exists", domain.name()));
    let next = match domain.is_persistent()? {
        true => {
            report.ok("it is persistent");
            let next = domain.persistent()??;
            definition(config, &next, &name, report);
            Some(next)
        }
        false => {
            report.missing(
                "a persistent definition: it is transient, and can be traced only by its name \
                 (auto_enroll)",
                format!("virsh dumpxml {name} > {name}.xml\nvirsh define {name}.xml"),
            );
            None
        }
    };
    match domain.is_active()? {
        true => running(config, &domain, next.as_ref(), &name, report),
        false => {
            report.missing("a running guest", format!("virsh start {name}"));
            Ok(())
        }
    }
}

/// What the domain will start with.
fn definition(config: &Config, xml: &DomainXml, name: &str, report: &mut Report) {
    let enroll = format!("xftrace enroll {name}");
    match Enrolment::of(xml, config) {
        Some(enrolment) => {
            let by = match enrolment.by {
                By::Metadata => "by its metadata",
                By::Name => "by its name (auto_enroll)",
            };
            report.ok(format!("it is enrolled {by}"));
        }
        None => report.missing("its enrolment", enroll.clone()),
    }
    for problem in xml.trace.iter().flat_map(|trace| &trace.problems) {
        report.missing(format!("sense in its metadata: {problem}"), enroll.clone());
    }
    match untraceable(xml) {
        None => report.ok("its memory is defined as a shared file"),
        Some(why) => report.missing(format!("shared file memory: as defined, {why}"), enroll),
    }
}

/// The domain as it runs.
fn running(
    config: &Config,
    domain: &Domain,
    next: Option<&DomainXml>,
    name: &str,
    report: &mut Report,
) -> anyhow::Result<()> {
    report.ok(format!("it is {}", domain.state()));
    let live = domain.live()??;
    let restart = format!("virsh shutdown {name}\nvirsh start {name}");
    if let Some(why) = untraceable(&live) {
        let mend = match next.is_some_and(|next| untraceable(next).is_none()) {
            true => restart,
            false => format!("xftrace enroll {name}\n{restart}"),
        };
        report.missing(format!("a restart: as it runs, {why}"), mend);
        return Ok(());
    }
    match find_backing(&live, &config.paths.libvirt_run) {
        Err(error) => {
            report.missing(
                format!("its memory file: {:#}", anyhow::Error::new(error)),
                restart,
            );
            return Ok(());
        }
        Ok(backing) => {
            for file in &backing.files {
                report.ok(format!(
                    "memory {} is {} (QEMU process {})",
                    file.id,
                    file.path.display(),
                    backing.qemu.pid
                ));
                let memory = fstatfs(&file.file).map(|found| found.filesystem_type());
                if memory != Ok(TMPFS_MAGIC) {
                    report.advice(
                        "that file is on a disk, to which what the guest writes is written",
                        "set memory_backing_dir as above, then restart the domain",
                    );
                }
            }
        }
    }
    match status(config, &live)? {
        Some(status) => kernel(&status, report),
        None => {
            report.missing(
                "its helper",
                format!(
                    "xftrace on -d {name} sys_read    (starts one; the log, and `xftrace status`, \
                     say why it does not stay)"
                ),
            );
            symbols(config, &live, report);
        }
    }
    Ok(())
}

/// What the domain's helper says; None where none runs.
fn status(config: &Config, live: &DomainXml) -> anyhow::Result<Option<Status>> {
    let Some(mut line) = client::connect_running(config, live)? else {
        return Ok(None);
    };
    line.patience(Some(PATIENCE))?;
    line.send(&Request::Status)?;
    match line.receive()? {
        Some(Reply::Status(status)) => Ok(Some(*status)),
        _ => Ok(None),
    }
}

/// What the helper says of the guest's kernel.
fn kernel(status: &Status, report: &mut Report) {
    report.ok(format!("its helper runs (process {})", status.helper_pid));
    match &status.guest {
        GuestStatus::Alive {
            banner,
            symbols,
            mode: Mode::Keyed,
            ..
        } => {
            report.ok(format!("symbols {}", symbols.display()));
            report.ok(format!("its kernel has xftrace's patch: {banner}"));
        }
        GuestStatus::Alive {
            banner,
            symbols,
            mode: Mode::Plain,
            cannot,
            command_line,
            ..
        } => {
            report.ok(format!("symbols {}", symbols.display()));
            report.ok(format!(
                "its kernel has no xftrace patch, mode {}: {banner}",
                Mode::Plain.text()
            ));
            let needs = command_line.clone().unwrap_or_default();
            match cannot {
                Some(why) => report.missing(
                    format!("what a kernel without the patch is booted with: {why}"),
                    format!("boot the guest with this on its kernel command line:\n{needs}"),
                ),
                None => report.ok(format!("it is booted with what that takes: {needs}")),
            }
        }
        GuestStatus::Searching { why } => report.missing(
            format!("the guest's kernel: {why}"),
            "a guest kernel with xftrace's patch (guest-kernel-patches/) or with BTF, and its \
             symbols (xftrace symbols add)",
        ),
    }
}

/// Whether there are symbols at all. Which ones belong to the guest's
/// kernel, only the helper can tell.
fn symbols(config: &Config, live: &DomainXml, report: &mut Report) {
    let named = live.trace.as_ref().and_then(|trace| trace.symbols.clone());
    let dir = &config.paths.symbols;
    match named {
        Some(file) if file.is_file() => report.ok(format!("symbols {}", file.display())),
        Some(file) => report.missing(
            format!("the symbols that its metadata names, {}", file.display()),
            format!(
                "copy the vmlinuz or System.map of the guest's kernel to {}",
                file.display()
            ),
        ),
        None => {
            let files = std::fs::read_dir(dir).into_iter().flatten().flatten();
            match files.filter(|entry| entry.path().is_file()).count() {
                0 => report.missing(
                    format!("symbols: {} has none", dir.display()),
                    "xftrace symbols add FILE    (the vmlinuz, vmlinux, System.map or .deb of \
                     the guest's kernel)",
                ),
                n => report.ok(format!("{n} file(s) of symbols in {}", dir.display())),
            }
        }
    }
}
