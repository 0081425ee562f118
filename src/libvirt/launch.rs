//! Starting a domain's helper from the hook.
//!
//! libvirt runs the hook with pipes for its output and waits until they are
//! closed, so that a child which keeps one open hangs the domain's start. With
//! systemd, the helper is no child at all: systemd starts it. Without, the
//! hook starts it, like this:
//!
//! - The helper calls [`own_session`] first of all, so that no signal of a
//!   terminal or of the daemon's process group reaches it. It can, since it is
//!   started without leading a process group. Between fork and exec nothing of
//!   ours runs: `pre_exec` would need `unsafe`, the `setsid` program would be
//!   one more thing to find. It opens no terminal, so that it needs no second
//!   fork to never get one.
//! - Standard input, output and error are /dev/null. Every descriptor that
//!   Rust opens is close-on-exec, and libvirt closes all others before it runs
//!   a hook (virCommandMassClose, src/util/vircommand.c); the hook's script
//!   closes 3 to 9 once more.
//! - The working directory is `/`, the environment is empty but for PATH.
//!
//! Nobody waits for it: when the hook ends, init inherits it. `xftrace on`
//! starts one in the same way where the hook did not.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::config::DEFAULT_CONFIG_PATH;

/// How a helper was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Started {
    /// systemd was asked for `xftrace@UUID.service`.
    Systemd,
    /// As a process of its own, with this number.
    Process(u32),
}

/// A helper could not be started.
#[derive(Debug, thiserror::Error)]
#[error("cannot start the helper {}", program.display())]
pub struct LaunchError {
    program: PathBuf,
    source: io::Error,
}

/// What a helper is started with.
#[derive(Debug, Clone)]
pub struct Launch<'a> {
    /// The domain.
    pub uuid: Uuid,
    /// Its XML, as saved in the run directory.
    pub xml: &'a Path,
    /// The configuration file, where it is not the default one.
    pub config: Option<&'a Path>,
}

/// Puts this process into a session of its own, where it can be: not where it
/// leads a process group already, as a service of systemd or a command that
/// someone typed does. Then it has what it needs, or is meant to end with the
/// terminal.
pub fn own_session() {
    let _ = nix::unistd::setsid();
}

/// Where systemd keeps units, in its own order (systemd.unit(5)).
const UNIT_DIRECTORIES: [&str; 5] = [
    "/etc/systemd/system",
    "/run/systemd/system",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
    "/lib/systemd/system",
];

/// How long systemctl may take to hand a job over.
const SYSTEMCTL_TIME: Duration = Duration::from_millis(500);

impl Launch<'_> {
    /// Starts the helper and does not wait for it.
    ///
    /// # Errors
    /// Where there is no systemd to start it and no process could be made.
    pub fn start(&self) -> Result<Started, LaunchError> {
        if self.is_for_systemd() && self.by_systemd() {
            return Ok(Started::Systemd);
        }
        self.by_ourselves().map(Started::Process)
    }

    /// Whether systemd runs here and knows how to start a helper. Its unit
    /// reads the default configuration, so that a private lab with another
    /// one starts its helpers itself.
    fn is_for_systemd(&self) -> bool {
        let default = match self.config {
            Some(path) => path == Path::new(DEFAULT_CONFIG_PATH),
            None => true,
        };
        // What sd_booted(3) looks at.
        default
            && Path::new("/run/systemd/system").is_dir()
            && UNIT_DIRECTORIES
                .iter()
                .any(|dir| Path::new(dir).join("xftrace@.service").exists())
    }

    fn by_systemd(&self) -> bool {
        let asked = Command::new("systemctl")
            .args(["start", "--no-block"])
            .arg(format!("xftrace@{}.service", self.uuid))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let Ok(mut child) = asked else { return false };
        let start = Instant::now();
        while start.elapsed() < SYSTEMCTL_TIME {
            match child.try_wait() {
                Ok(Some(status)) => return status.success(),
                Ok(None) => std::thread::sleep(Duration::from_millis(2)),
                Err(_) => return false,
            }
        }
        // It may yet succeed, and a second helper would find the lock taken.
        false
    }

    fn by_ourselves(&self) -> Result<u32, LaunchError> {
        let program = std::env::current_exe().map_err(|source| LaunchError {
            program: PathBuf::from("xftrace"),
            source,
        })?;
        let mut command = Command::new(&program);
        if let Some(config) = self.config {
            // The helper's working directory is another one.
            let absolute = std::path::absolute(config);
            command
                .arg("--config")
                .arg(absolute.as_deref().unwrap_or(config));
        }
        command
            .arg("helper")
            .arg("--uuid")
            .arg(self.uuid.to_string())
            .arg("--xml")
            .arg(self.xml)
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        match command.spawn() {
            Ok(child) => Ok(child.id()),
            Err(source) => Err(LaunchError { program, source }),
        }
    }
}
