//! What a domain needs.

use std::path::Path;
use std::time::Duration;

use nix::sys::statfs::{fstatfs, HUGETLBFS_MAGIC, TMPFS_MAGIC};

use super::host::{into_memory, room};
use super::{restart, Report};
use crate::cli::client;
use crate::cli::enroll_command::enroll_command;
use crate::cli::status::NOT_COMPARED;
use crate::config::Config;
use crate::helper::protocol::{GuestStatus, Reply, Request, Status};
use crate::libvirt::connection::{Connection, ConnectionError, Domain};
use crate::libvirt::enrolment::{advice, memory, untraceable, By, Enrolment};
use crate::libvirt::memory::{find_backing, Held, MemoryError};
use crate::libvirt::shell_word;
use crate::libvirt::xml::{DomainXml, Source, Trace};
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
        true => running(config, connection, &domain, next.as_ref(), &name, report),
        false => {
            if let Some(next) = next.filter(|next| memory(next) == "shared file") {
                room(config, next.memory, report);
            }
            report.missing("a running guest", format!("virsh start {name}"));
            Ok(())
        }
    }
}

/// What the domain will start with.
fn definition(config: &Config, xml: &DomainXml, name: &str, report: &mut Report) {
    let enroll = enrolling(xml, name);
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
        None => {
            report.ok(format!("its memory is defined as {}", memory(xml)));
            if let Some(why) = advice(xml) {
                report.advice(format!("as defined, {why}"), enroll);
            }
        }
        Some(why) => report.missing(format!("shared memory: as defined, {why}"), enroll),
    }
}

/// Enrols the domain as it is, or for the first time.
fn enrolling(xml: &DomainXml, name: &str) -> String {
    enroll_command(name, xml.trace.as_ref().unwrap_or(&Trace::default()))
}

/// What helps where a running domain's memory was not found.
fn find_again(error: &MemoryError, live: &DomainXml, name: &str) -> String {
    match error {
        MemoryError::NotRunning { .. } => format!("virsh start {name}"),
        MemoryError::Several { .. } => format!("pgrep -af guest={name}"),
        MemoryError::Io { source, .. } if source.kind() == std::io::ErrorKind::PermissionDenied => {
            format!("sudo xftrace doctor {name}")
        }
        MemoryError::Ambiguous { .. } if live.backing.source == Some(Source::Memfd) => format!(
            "virsh edit {name}    (in its <memoryBacking>, make <source type='memfd'/> \
             <source type='file'/>)\n{}\n{}",
            enrolling(live, name),
            restart(name)
        ),
        MemoryError::UnknownKind { .. }
        | MemoryError::Missing { .. }
        | MemoryError::Ambiguous { .. }
        | MemoryError::Private { .. } => {
            format!("{}\n{}", enrolling(live, name), restart(name))
        }
        MemoryError::Unlinked { .. }
        | MemoryError::NoPlace { .. }
        | MemoryError::NotMapped { .. }
        | MemoryError::Truncated { .. }
        | MemoryError::Arguments { .. }
        | MemoryError::Io { .. } => restart(name),
    }
}

/// The domain as it runs.
fn running(
    config: &Config,
    connection: &Connection,
    domain: &Domain,
    next: Option<&DomainXml>,
    name: &str,
    report: &mut Report,
) -> anyhow::Result<()> {
    report.ok(format!("it is {}", domain.state()));
    let live = domain.live()??;
    let restart = restart(name);
    if let Some(why) = untraceable(&live) {
        let mend = match next.is_some_and(|next| untraceable(next).is_none()) {
            true => restart,
            false => format!("{}\n{restart}", enrolling(&live, name)),
        };
        report.missing(format!("a restart: as it runs, {why}"), mend);
        return Ok(());
    }
    match find_backing(&live, &config.paths.libvirt_run) {
        Err(error) => {
            let mend = find_again(&error, &live, name);
            report.missing(format!("its memory: {:#}", anyhow::Error::new(error)), mend);
            return Ok(());
        }
        Ok(backing) => {
            let modules = backing.modules.iter().map(|(part, _)| part);
            for part in backing.ram.iter().chain(modules) {
                let pid = backing.qemu.pid;
                match &part.held {
                    Held::File { path, file } => {
                        let path = path.display();
                        report.ok(format!("memory {} is {path} (QEMU process {pid})", part.id));
                        let memory = fstatfs(file).map(|found| found.filesystem_type());
                        if !matches!(memory, Ok(TMPFS_MAGIC | HUGETLBFS_MAGIC)) {
                            report.advice(
                                "that file is on a disk, to which what the guest writes is written",
                                format!("{}\n{restart}", into_memory(&config.paths.qemu_conf)),
                            );
                        }
                    }
                    Held::Anonymous => report.ok(format!(
                        "memory {} is anonymous memory of QEMU process {pid}, at {:#x}",
                        part.id, part.address
                    )),
                }
            }
            for error in &backing.left_out {
                let mend = find_again(error, &live, name);
                report.advice(format!("a memory module is not read: {error}"), mend);
            }
            if let Some(why) = advice(&live) {
                report.advice(format!("as it runs, {why}"), restart);
            }
        }
    }
    match status(config, &live)? {
        Some(status) => kernel(&status, &live, name, report),
        None => {
            report.missing(
                "its helper",
                format!(
                    "virsh -c {} dumpxml {name} | xftrace hook {name} started begin -    (starts \
                     one as libvirt does; the system log says why it does not stay)",
                    shell_word(connection.uri())
                ),
            );
            symbols(config, &live, name, report);
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
    let reply = line.send(&Request::Status).and_then(|()| line.receive());
    match reply {
        Ok(Some(Reply::Status(status))) => Ok(Some(*status)),
        Err(error) if !client::is_end(&error) => Err(error.into()),
        // It is just ending.
        _ => Ok(None),
    }
}

/// What the helper says of the guest's kernel.
fn kernel(status: &Status, live: &DomainXml, name: &str, report: &mut Report) {
    report.ok(format!("its helper runs (process {})", status.helper_pid));
    match &status.guest {
        GuestStatus::Alive {
            banner,
            symbols,
            compared,
            mode: Mode::Keyed,
            rivals,
            ..
        } => {
            trusted(rivals.as_deref(), name, report);
            fitting(symbols, *compared, live, name, report);
            report.ok(format!("its kernel has xftrace's patch: {banner}"));
        }
        GuestStatus::Alive {
            banner,
            symbols,
            compared,
            mode: Mode::Plain,
            rivals,
            plain,
            ..
        } => {
            trusted(rivals.as_deref(), name, report);
            fitting(symbols, *compared, live, name, report);
            report.ok(format!(
                "its kernel has no xftrace patch, mode {}: {banner}",
                Mode::Plain.text()
            ));
            if let Some(boot) = plain {
                super::plain::check(boot, live, name, report);
            }
        }
        GuestStatus::Searching { why } => report.missing(
            format!("the guest's kernel: {why}"),
            format!(
                "xftrace doctor {name}    (again, where the guest has only just been started)\n\
                 {}\nvirsh reboot {name}    (into a kernel with xftrace's patch or with BTF, where \
                 it runs neither; guest-kernel-patches/README.md has the commands that build one)",
                take_symbols(live, name)
            ),
        ),
    }
}

/// Whether it is known which kernel the guest runs.
fn trusted(rivals: Option<&str>, name: &str, report: &mut Report) {
    if let Some(why) = rivals {
        report.missing(why.to_owned(), format!("virsh reset {name}"));
    }
}

/// The symbols by which the guest's kernel was found.
fn fitting(path: &Path, compared: bool, live: &DomainXml, name: &str, report: &mut Report) {
    report.ok(format!("symbols {}", path.display()));
    if !compared {
        let mut mend = take_symbols(live, name);
        let named = live
            .trace
            .as_ref()
            .is_some_and(|trace| trace.symbols.is_some());
        if !named {
            mend.push_str(&format!(
                "\nvirsh reboot {name}    (its helper takes them when the guest boots next)"
            ));
        }
        report.advice(NOT_COMPARED, mend);
    }
}

/// Whether there are symbols at all. Which ones belong to the guest's
/// kernel, only the helper can tell.
fn symbols(config: &Config, live: &DomainXml, name: &str, report: &mut Report) {
    let named = live.trace.as_ref().and_then(|trace| trace.symbols.clone());
    let dir = &config.paths.symbols;
    match named {
        Some(file) if file.is_file() => report.ok(format!("symbols {}", file.display())),
        Some(file) => report.missing(
            format!("the symbols that its metadata names, {}", file.display()),
            take_symbols(live, name),
        ),
        None => {
            let files = std::fs::read_dir(dir).into_iter().flatten().flatten();
            match files.filter(|entry| entry.path().is_file()).count() {
                0 => report.missing(
                    format!("symbols: {} has none", dir.display()),
                    take_symbols(live, name),
                ),
                n => report.ok(format!("{n} file(s) of symbols in {}", dir.display())),
            }
        }
    }
}

/// Has xftrace know the guest's kernel. A domain whose metadata names a file
/// has no other one tried.
fn take_symbols(live: &DomainXml, name: &str) -> String {
    let what = "(the vmlinuz, vmlinux, System.map or .deb of the kernel that the guest runs)";
    match &live.trace {
        Some(trace) if trace.symbols.is_some() => {
            let mut wanted = trace.clone();
            wanted.symbols = Some("FILE".into());
            let enroll = enroll_command(name, &wanted);
            format!("{enroll}    {what}\n{}", restart(name))
        }
        _ => format!("xftrace symbols add FILE    {what}"),
    }
}
