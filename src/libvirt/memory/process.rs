//! The QEMU process of a domain.

use std::fs;
use std::io;
use std::path::Path;

use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::unistd::{Uid, User};
use rustix::process::{pidfd_open, Pid, PidfdFlags};
use std::os::fd::{AsFd, OwnedFd};
use uuid::Uuid;

use super::{MemoryError, Qemu};
use crate::libvirt::xml::DomainXml;

/// A process, and what it was started with.
pub(super) struct Found {
    pub(super) qemu: Qemu,
    /// The command line, the program first.
    pub(super) arguments: Vec<String>,
}

/// Whom libvirt's packages run QEMU as: Debian's and Ubuntu's, and Fedora's.
const USERS: [&str; 2] = ["libvirt-qemu", "qemu"];

/// Finds the QEMU process of a domain: the one that libvirt's PID file names,
/// else the only one that was started with the domain's UUID.
///
/// A command line proves nothing: everybody can give a process any. The PID file
/// is libvirt's own, and may be older than the process that has the number now. So
/// only processes of users count that libvirt may have started QEMU as: nobody else
/// can pass one off for a domain's, or keep a domain's from being found.
pub(super) fn find(
    proc: &Path,
    domain: &DomainXml,
    libvirt_run: &Path,
) -> Result<Found, MemoryError> {
    let pid_file = libvirt_run.join(format!("{}.pid", domain.name));
    let named = fs::read_to_string(pid_file).ok();
    if let Some(pid) = named.and_then(|text| text.trim().parse().ok()) {
        // It may be stale, or another domain's after a rename.
        if let Some(found) = look(proc, pid, domain)? {
            return Ok(found);
        }
    }
    let mut all = Vec::new();
    let entries = fs::read_dir(proc).map_err(MemoryError::io("list", proc))?;
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        all.extend(look(proc, pid, domain)?);
    }
    match (all.pop(), all.len()) {
        (Some(only), 0) => Ok(only),
        (None, _) => Err(not_running(domain)),
        (Some(last), _) => {
            let mut pids: Vec<i32> = all.iter().chain([&last]).map(|f| f.qemu.pid).collect();
            pids.sort_unstable();
            Err(MemoryError::Several {
                name: domain.name.clone(),
                pids,
            })
        }
    }
}

pub(super) fn not_running(domain: &DomainXml) -> MemoryError {
    MemoryError::NotRunning {
        name: domain.name.clone(),
        uuid: domain.uuid,
    }
}

impl Qemu {
    /// Whether the process has not ended.
    pub fn lives(&self) -> bool {
        let mut ended = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        matches!(poll(&mut ended, PollTimeout::ZERO), Ok(0))
    }
}

/// The process of this number, where it is a QEMU of this domain. None also
/// where it ends while we look.
fn look(proc: &Path, pid: i32, domain: &DomainXml) -> Result<Option<Found>, MemoryError> {
    let dir = proc.join(pid.to_string());
    let uuid = domain.uuid;
    // Most processes are not it: a cheap look first, without a descriptor.
    if !is_qemu_of(&command_line(&dir), uuid) {
        return Ok(None);
    }
    let Some(pidfd) = open_pidfd(pid)? else {
        return Ok(None);
    };
    // From here on, all that is read is of the process that the descriptor
    // stands for, as long as that lives in the end.
    let arguments = command_line(&dir);
    let Some(start_time) = start_time(&dir) else {
        return Ok(None);
    };
    let qemu = Qemu {
        pid,
        start_time,
        pidfd,
    };
    let is_it = is_qemu_of(&arguments, uuid) && may_be_libvirts(&dir, domain);
    if !is_it || !qemu.lives() {
        return Ok(None);
    }
    Ok(Some(Found { qemu, arguments }))
}

fn open_pidfd(pid: i32) -> Result<Option<OwnedFd>, MemoryError> {
    let Some(pid) = Pid::from_raw(pid) else {
        return Ok(None);
    };
    match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(fd) => Ok(Some(fd)),
        // Also for a thread's number, which is no process.
        Err(rustix::io::Errno::SRCH | rustix::io::Errno::INVAL) => Ok(None),
        Err(errno) => Err(MemoryError::Io {
            what: "watch",
            path: format!("/proc/{}", pid.as_raw_nonzero()).into(),
            source: io::Error::from(errno),
        }),
    }
}

/// The command line of a process; empty where there is none to read.
fn command_line(dir: &Path) -> Vec<String> {
    let bytes = fs::read(dir.join("cmdline")).unwrap_or_default();
    let bytes = bytes.strip_suffix(b"\0").unwrap_or(&bytes);
    bytes
        .split(|byte| *byte == 0)
        .map(|argument| String::from_utf8_lossy(argument).into_owned())
        .collect()
}

/// Whether this is the command line of a QEMU that libvirt started for the
/// domain (`-uuid`, qemuBuildCommandLine in src/qemu/qemu_command.c).
fn is_qemu_of(arguments: &[String], uuid: Uuid) -> bool {
    let program = arguments.first().map_or("", String::as_str);
    let program = program.rsplit('/').next().unwrap_or_default();
    let mut pairs = arguments.iter().zip(arguments.iter().skip(1));
    (program.contains("qemu") || program.contains("kvm"))
        && pairs.any(|(option, value)| option == "-uuid" && Uuid::try_parse(value) == Ok(uuid))
}

/// Whether libvirt may have started this process: root, or whoever runs this,
/// owns it, or the user that runs the domain's QEMU.
///
/// Every user id counts but that of the file system: a setuid program has its
/// caller's as the real one.
fn may_be_libvirts(dir: &Path, domain: &DomainXml) -> bool {
    let status = fs::read_to_string(dir.join("status")).unwrap_or_default();
    let Some(ids) = status.lines().find_map(|line| line.strip_prefix("Uid:")) else {
        return false;
    };
    let mut ids = ids.split_ascii_whitespace().take(3).peekable();
    let known = users(domain);
    let is_known = |id: &str| id.parse().is_ok_and(|id| known.contains(&id));
    ids.peek().is_some() && ids.all(is_known)
}

/// The users that a domain's QEMU may run as.
fn users(domain: &DomainXml) -> Vec<u32> {
    let by_name = |name: &str| Some(User::from_name(name).ok()??.uid.as_raw());
    let mut all = vec![0, Uid::effective().as_raw()];
    match domain.qemu_user.as_deref() {
        // `+` keeps a number from being taken for a name (virGetUserID,
        // src/util/virutil.c).
        Some(user) => all.extend(match user.strip_prefix('+') {
            Some(id) => id.parse().ok(),
            None => by_name(user).or_else(|| user.parse().ok()),
        }),
        None => all.extend(USERS.iter().filter_map(|name| by_name(name))),
    }
    all
}

/// Field 22 of /proc/PID/stat. The second field, the command's name in
/// parentheses, may have anything in it, parentheses too.
fn start_time(dir: &Path) -> Option<u64> {
    let stat = fs::read_to_string(dir.join("stat")).ok()?;
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_ascii_whitespace().nth(22 - 3)?.parse().ok()
}
