//! What the host needs.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::sys::statfs::{statfs, Statfs, HUGETLBFS_MAGIC, TMPFS_MAGIC};

use super::{daemon, Report};
use crate::cli::Context;
use crate::config::Config;
use crate::libvirt::connection::{Connection, Mode};
use crate::libvirt::run_dir::RunDir;
use crate::libvirt::shell_word;

/// The hook's name in libvirt's qemu.d.
const HOOK: &str = "qemu.d/50-xftrace";

/// Where libvirt puts memory files when nothing else is said
/// (virQEMUDriverConfigNew, src/qemu/qemu_conf.c).
const DEFAULT_BACKING_DIR: &str = "/var/lib/libvirt/qemu/ram";

/// Checks the host; the connection where there is one.
pub(super) fn check(context: &Context, config: &Config, report: &mut Report) -> Option<Connection> {
    let connection = match Connection::open(context.global.connect.as_deref(), Mode::ReadOnly) {
        Ok(connection) => {
            report.ok(format!("libvirt answers at {}", connection.uri()));
            Some(connection)
        }
        Err(error) => {
            report.missing(format!("libvirt: {error}"), daemon("start"));
            None
        }
    };
    hook(config, report);
    run_dir(config, report);
    let sessions = &config.paths.sessions;
    match sessions.is_dir() {
        true => report.ok(format!("sessions go to {}", sessions.display())),
        false => report.missing(
            format!("the directory for sessions, {}", sessions.display()),
            format!("mkdir -p {}", sessions.display()),
        ),
    }
    backing_dir(config, report);
    connection
}

/// The hook's file, and whether the daemon knows of it: it looks for hooks
/// when it starts or reloads, and never calls one that it did not find then
/// (virHookInitialize, src/util/virhook.c).
fn hook(config: &Config, report: &mut Report) {
    let path = config.paths.libvirt_hooks.join(HOOK);
    let found = fs::metadata(&path).ok();
    let Some(hook) = found.filter(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
    else {
        report.missing(
            format!("libvirt's hook {}", path.display()),
            format!(
                "xftrace hook --script | install -D -m 755 /dev/stdin {}\n{}",
                shell_word(&path.to_string_lossy()),
                daemon("reload")
            ),
        );
        return;
    };
    report.ok(format!("hook {} is installed", path.display()));
    let Some(started) = daemon_start() else {
        // No daemon: the next one that starts will find it.
        return;
    };
    let changed = UNIX_EPOCH + Duration::from_secs(u64::try_from(hook.ctime()).unwrap_or(0));
    let called = RunDir::at(&config.paths.run).hook_called();
    if changed <= started || called.is_some_and(|called| called >= started) {
        report.ok("libvirt's daemon knows the hook");
    } else {
        report.missing(
            "the hook in libvirt's daemon: the hook came after the daemon was started, and has \
             not been called yet",
            daemon("reload"),
        );
    }
}

/// When the libvirt daemon that manages QEMU on this host was started.
fn daemon_start() -> Option<SystemTime> {
    let namespace = fs::read_link("/proc/self/ns/mnt").ok()?;
    let of = |dir: PathBuf| {
        let name = fs::read_to_string(dir.join("comm")).ok()?;
        let is_daemon = matches!(name.trim(), "libvirtd" | "virtqemud");
        // A daemon in another mount namespace has other hooks.
        if !is_daemon || fs::read_link(dir.join("ns/mnt")).ok()? != namespace {
            return None;
        }
        // The directory of a process is as old as its first look-up; its
        // start is in its statistics.
        let stat = fs::read_to_string(dir.join("stat")).ok()?;
        let (_, rest) = stat.rsplit_once(')')?;
        let ticks: u64 = rest.split_ascii_whitespace().nth(19)?.parse().ok()?;
        boot_time().map(|boot| boot + Duration::from_millis(ticks * 1000 / ticks_a_second()))
    };
    let processes = fs::read_dir("/proc").ok()?.flatten();
    processes.filter_map(|entry| of(entry.path())).min()
}

/// When the host was booted: `btime` of /proc/stat, proc(5).
fn boot_time() -> Option<SystemTime> {
    let stat = fs::read_to_string("/proc/stat").ok()?;
    let line = stat.lines().find_map(|line| line.strip_prefix("btime "))?;
    Some(UNIX_EPOCH + Duration::from_secs(line.trim().parse().ok()?))
}

fn ticks_a_second() -> u64 {
    let ticks = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK);
    ticks
        .ok()
        .flatten()
        .and_then(|ticks| u64::try_from(ticks).ok())
        .unwrap_or(100)
        .max(1)
}

fn run_dir(config: &Config, report: &mut Report) {
    let path = &config.paths.run;
    let shown = path.display();
    match fs::metadata(path) {
        Err(_) => report.ok(format!("run directory {shown} is made when it is needed")),
        Ok(dir) if !dir.is_dir() => report.missing(
            format!("the run directory: {shown} is no directory"),
            format!("rm {shown}"),
        ),
        Ok(dir) if dir.permissions().mode() & 0o077 != 0 => report.missing(
            format!("a run directory {shown} that is its owner's alone"),
            format!("chmod 700 {shown}"),
        ),
        Ok(_) => report.ok(format!("run directory {shown}")),
    }
}

/// Where libvirt puts memory files. On a disk it works too, with every page
/// that the guest writes going to that disk in the end.
fn backing_dir(config: &Config, report: &mut Report) {
    let conf = &config.paths.qemu_conf;
    let dir = match backing_place(config) {
        Ok(dir) => dir,
        Err(error) => {
            report.advice(
                format!(
                    "cannot read {} to see where memory files go: {error}",
                    conf.display()
                ),
                "sudo xftrace doctor",
            );
            return;
        }
    };
    let held = file_system(Path::new(&dir));
    match held.map(|held| held.filesystem_type()) {
        Some(kind) if kind == TMPFS_MAGIC || kind == HUGETLBFS_MAGIC => {
            report.ok(format!("memory files go to memory, in {dir}"));
        }
        _ => report.advice(
            format!("memory files go to a disk, in {dir}: what a guest writes is written there"),
            into_memory(conf),
        ),
    }
}

/// Where libvirt puts memory files.
fn backing_place(config: &Config) -> std::io::Result<String> {
    let text = match fs::read_to_string(&config.paths.qemu_conf) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        text => text?,
    };
    Ok(setting(&text, "memory_backing_dir").unwrap_or_else(|| DEFAULT_BACKING_DIR.into()))
}

/// Whether a domain that is off finds room for its memory where memory files go. Its
/// QEMU would start all the same, and be killed when the guest touches more than there is.
pub(super) fn room(config: &Config, memory: u64, report: &mut Report) {
    // What cannot be read is told of where the host is checked.
    let Ok(dir) = backing_place(config) else {
        return;
    };
    let Some(held) = file_system(Path::new(&dir)) else {
        return;
    };
    let block = u64::try_from(held.block_size()).unwrap_or(0);
    let free = held.blocks_available().saturating_mul(block);
    // One that is not limited says 0.
    if held.blocks() == 0 || memory <= free {
        return;
    }
    let place = shell_word(&mount_point(Path::new(&dir)).to_string_lossy());
    let mend = match held.filesystem_type() == TMPFS_MAGIC {
        true => format!(
            "mount -o remount,size=90% {place}    (of the host's memory; a line for it in \
             /etc/fstab keeps it so)"
        ),
        false => format!("df -h {place}    (make room there, or name another memory_backing_dir)"),
    };
    report.advice(
        format!(
            "room for its memory in {dir}: it has {} MiB, and {} MiB are free there; a guest that \
             touches more dies",
            memory >> 20,
            free >> 20
        ),
        mend,
    );
}

/// Has libvirt put memory files into memory, whatever the file said before.
pub(super) fn into_memory(conf: &Path) -> String {
    let conf = shell_word(&conf.to_string_lossy());
    format!(
        "sed -i '/^[[:space:]]*memory_backing_dir[[:space:]]*=/d' {conf}\n\
         echo 'memory_backing_dir = \"/dev/shm\"' >> {conf}\n{}",
        daemon("restart")
    )
}

/// Where the file system is mounted in which a path is or would be.
fn mount_point(path: &Path) -> PathBuf {
    let there = path.ancestors().find_map(|dir| dir.canonicalize().ok());
    let path = there.unwrap_or_else(|| path.to_owned());
    let there = path
        .ancestors()
        .filter_map(|dir| Some((dir, fs::metadata(dir).ok()?.dev())));
    let mut there = there.peekable();
    let device = there.peek().map(|(_, device)| *device);
    let within = there.take_while(|(_, of)| Some(*of) == device);
    within
        .last()
        .map_or_else(|| path.clone(), |(dir, _)| dir.to_owned())
}

/// The file system in which a path is or would be.
fn file_system(path: &Path) -> Option<Statfs> {
    path.ancestors().find_map(|dir| statfs(dir).ok())
}

/// A setting of a libvirt configuration file: `name = "value"`.
fn setting(text: &str, name: &str) -> Option<String> {
    text.lines()
        .filter_map(|line| {
            line.trim_start()
                .strip_prefix(name)?
                .trim_start()
                .strip_prefix('=')
        })
        .filter_map(|value| {
            let value = value.trim_start();
            let quote = value.chars().next().filter(|c| matches!(c, '"' | '\''))?;
            let inner = value.get(1..)?;
            inner.split(quote).next().map(str::to_owned)
        })
        .next_back()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_settings_as_libvirt_does() {
        let text = "# memory_backing_dir = \"/commented\"\nmemory_backing_dirs = \"/other\"\n\
                    memory_backing_dir =\t\"/dev/shm\" # note\nuser = 'root'\n";
        assert_eq!(
            setting(text, "memory_backing_dir").as_deref(),
            Some("/dev/shm")
        );
        assert_eq!(setting(text, "user").as_deref(), Some("root"));
        assert_eq!(setting(text, "group"), None);
        assert_eq!(setting("user = root", "user"), None);
    }

    #[test]
    fn tells_memory_from_disk_also_for_what_is_not_there_yet() {
        let kind = |path| file_system(Path::new(path)).map(|held| held.filesystem_type());
        assert_eq!(kind("/dev/shm/a/b/c"), Some(TMPFS_MAGIC));
        assert_ne!(kind("/proc/no/such"), Some(TMPFS_MAGIC));
    }

    #[test]
    fn a_guest_with_more_memory_than_there_is_room_for_is_told_of() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut config = Config::default();
        config.paths.qemu_conf = dir.path().join("qemu.conf");
        let conf = "memory_backing_dir = \"/dev/shm/no/such\"";
        fs::write(&config.paths.qemu_conf, conf).expect("a file");
        let said = |memory| {
            let mut report = Report::default();
            room(&config, memory, &mut report);
            report.checks.pop()
        };
        assert!(said(1 << 20).is_none());
        let advice = said(1 << 60).expect("advice");
        assert!(
            advice.what.contains("it has 1099511627776 MiB"),
            "{}",
            advice.what
        );
        let mend = advice.mend.expect("a command");
        assert!(
            mend.starts_with("mount -o remount,size=90% /dev/shm "),
            "{mend}"
        );
    }
}
