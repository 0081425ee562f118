//! The private libvirt: starting it, entering it, asking it.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{bail, Context, Result};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;

use crate::agent::Agent;
use crate::artifacts::{patched_qemu, script, Artifacts};
use crate::domain::{Backing, Domain, Places, EMULATOR};
use crate::guest::Guest;
use crate::wait_for;

/// What a lab may have besides libvirt.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// An xftrace binary: its hook is put in place before libvirtd starts.
    pub xftrace: Option<PathBuf>,
    /// More text for the lab's xftrace.toml.
    pub config: String,
    /// End the lab when this process ends.
    pub owner: Option<u32>,
}

/// A private libvirt in namespaces of its own. See tests/lab/libvirtd for what
/// in it is private.
#[derive(Debug)]
pub struct Lab {
    dir: PathBuf,
    /// By the kernel's name.
    artifacts: Mutex<HashMap<String, Artifacts>>,
    xftrace: Option<PathBuf>,
    /// Connections to guests, by the domain's name.
    pub(crate) agents: Mutex<HashMap<String, Arc<Agent>>>,
    /// The keeper, where this value started it and so is to end it.
    keeper: Option<Child>,
}

impl Lab {
    /// Starts a lab, which ends when the value is dropped, and at the latest
    /// with [`Options::owner`].
    ///
    /// # Errors
    /// Where libvirtd does not start.
    pub fn start(options: &Options) -> Result<Lab> {
        // Not TMPDIR: paths of sockets below it may have 107 bytes.
        let dir = tempfile::Builder::new()
            .prefix("xftrace-lab.")
            .tempdir_in("/tmp")
            .context("cannot make a directory in /tmp")?
            .keep();
        let mut lab = Lab {
            dir,
            artifacts: Mutex::default(),
            xftrace: options.xftrace.clone(),
            agents: Mutex::default(),
            keeper: None,
        };
        if let Err(error) = lab
            .prepare(options)
            .and_then(|()| lab.start_keeper(options))
        {
            // The keeper removes it too, but may never have begun.
            let _ = std::fs::remove_dir_all(&lab.dir);
            return Err(error);
        }
        Ok(lab)
    }

    /// A lab that runs already, by its directory.
    ///
    /// # Errors
    /// Where there is none.
    pub fn attach(dir: &Path) -> Result<Lab> {
        let dir = dir.canonicalize().with_context(|| {
            format!("no lab runs in {}: start one with 'lab up'", dir.display())
        })?;
        let xftrace = dir.join("xftrace/xftrace").canonicalize().ok();
        let lab = Lab {
            dir,
            artifacts: Mutex::default(),
            xftrace,
            agents: Mutex::default(),
            keeper: None,
        };
        lab.init_pid()?;
        Ok(lab)
    }

    fn prepare(&self, options: &Options) -> Result<()> {
        let own = self.dir.join("xftrace");
        std::fs::create_dir_all(own.join("symbols"))?;
        self.write_config(&options.config)?;
        if let Some(xftrace) = &options.xftrace {
            let xftrace = xftrace
                .canonicalize()
                .with_context(|| format!("no xftrace binary {}", xftrace.display()))?;
            std::os::unix::fs::symlink(xftrace, own.join("xftrace"))?;
            self.install_hook()?;
        }
        Ok(())
    }

    /// Installs the project's own hook, but for the one line that says where
    /// xftrace is: libvirtd gives hooks next to nothing of its environment, so
    /// the configuration has to be named there.
    fn install_hook(&self) -> Result<()> {
        const INSTALLED: &str = "\nxftrace=/usr/bin/xftrace\n";
        let own = self.dir.join("xftrace");
        let configured = own.join("configured");
        write_program(
            &configured,
            &format!(
                "#!/bin/sh\nXFTRACE_CONFIG={own}/xftrace.toml exec {own}/xftrace \"$@\"\n",
                own = own.display()
            ),
        )?;
        let source = script("../../libvirt-hooks/50-xftrace");
        let hook = std::fs::read_to_string(&source)
            .with_context(|| format!("cannot read {}", source.display()))?;
        if !hook.contains(INSTALLED) {
            bail!("{} has no line{INSTALLED}", source.display());
        }
        let here = format!("\nxftrace={}\n", configured.display());
        let hooks = self.dir.join("hooks/qemu.d");
        std::fs::create_dir_all(&hooks)?;
        write_program(&hooks.join("50-xftrace"), &hook.replace(INSTALLED, &here))
    }

    /// Writes the lab's xftrace.toml anew: the one path that differs from the
    /// defaults, then `more`, whose own paths are keys `paths.KEY` too.
    ///
    /// # Errors
    /// Where the file cannot be written.
    pub fn write_config(&self, more: &str) -> Result<()> {
        let path = self.config_path();
        let symbols = self.dir.join("xftrace/symbols");
        let text = format!("paths.symbols = \"{}\"\n{more}", symbols.display());
        std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
    }

    /// The lab's xftrace.toml.
    #[must_use]
    pub fn config_path(&self) -> PathBuf {
        self.dir.join("xftrace/xftrace.toml")
    }

    fn start_keeper(&mut self, options: &Options) -> Result<()> {
        let mut command = Command::new(script("libvirtd"));
        command
            .arg(&self.dir)
            .args(options.owner.map(|pid| pid.to_string()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            // Ctrl-C is for the caller; the keeper ends after it, and cleans up.
            .process_group(0);
        let mut keeper = command.spawn().context("cannot run tests/lab/libvirtd")?;
        let ready = self.dir.join("ready");
        let answer = wait_for(Duration::from_secs(90), || {
            Ok(if ready.exists() {
                Some(true)
            } else {
                keeper.try_wait()?.map(|_| false)
            })
        });
        if answer.as_ref().is_ok_and(|ready| *ready) {
            self.keeper = Some(keeper);
            return Ok(());
        }
        let _ = kill(pid(keeper.id()), Signal::SIGTERM);
        let mut said = String::new();
        if let Some(mut stderr) = keeper.stderr.take() {
            let _ = stderr.read_to_string(&mut said);
        }
        let _ = keeper.wait();
        bail!("the private libvirt did not start: {said}");
    }

    /// Lets the lab live on after this value, until [`Lab::stop`].
    pub fn leave_running(mut self) {
        self.keeper = None;
    }

    /// Ends the lab, whoever started it, and waits until nothing is left of it.
    ///
    /// # Errors
    /// Where it does not end within 20 s.
    pub fn stop(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        let keeper = match self.keeper.take() {
            Some(keeper) => keeper.id(),
            None => self.read_pid("keeper.pid")?,
        };
        let _ = kill(pid(keeper), Signal::SIGTERM);
        wait_for(Duration::from_secs(20), || {
            Ok((!self.dir.exists()).then_some(()))
        })
        .with_context(|| format!("the lab in {} did not end", self.dir.display()))
    }

    /// The lab's directory: the namespace's /run is `run` in it,
    /// /var/log/libvirt is `log`, /etc/libvirt `etc`, /var/lib/libvirt `lib`.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the sessions of a domain lie, as seen from outside.
    #[must_use]
    pub fn sessions(&self, domain: &str) -> PathBuf {
        self.dir.join(format!("log/qemu/{domain}.xftrace"))
    }

    /// The files of guests that boot this kernel, see [`Domain::kernel`].
    ///
    /// # Errors
    /// Where they have to be built, and that fails.
    pub fn artifacts(&self, kernel: &str) -> Result<Artifacts> {
        let mut known = self
            .artifacts
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(artifacts) = known.get(kernel) {
            return Ok(artifacts.clone());
        }
        let artifacts = Artifacts::build(kernel)?;
        known.insert(kernel.to_owned(), artifacts.clone());
        Ok(artifacts)
    }

    /// libvirt's URI for the lab from outside its namespaces.
    #[must_use]
    pub fn uri(&self) -> String {
        let socket = self.dir.join("run/libvirt/libvirt-sock");
        format!("qemu:///system?socket={}", socket.display())
    }

    fn read_pid(&self, name: &str) -> Result<u32> {
        let path = self.dir.join(name);
        std::fs::read_to_string(&path)
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .with_context(|| format!("no lab runs in {}: no {name}", self.dir.display()))
    }

    /// The first process of the lab's PID namespace, as seen from outside.
    ///
    /// # Errors
    /// Where the lab is gone.
    pub fn init_pid(&self) -> Result<u32> {
        self.read_pid("init.pid")
    }

    /// The process ID seen from outside of a process inside the lab.
    ///
    /// # Errors
    /// Where there is no such process.
    pub fn outer_pid(&self, inside: u32) -> Result<u32> {
        let namespace = |pid: u32| std::fs::read_link(format!("/proc/{pid}/ns/pid"));
        let ours = namespace(self.init_pid()?).context("the lab is gone")?;
        for entry in std::fs::read_dir("/proc")? {
            let name = entry?.file_name();
            let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            let Ok(status) = std::fs::read_to_string(format!("/proc/{pid}/status")) else {
                continue; // it has just ended
            };
            // proc(5): the last number is that in the innermost namespace.
            let innermost = status
                .lines()
                .find_map(|line| line.strip_prefix("NSpid:"))
                .and_then(|pids| pids.split_whitespace().next_back()?.parse().ok());
            if innermost == Some(inside) && namespace(pid).is_ok_and(|ns| ns == ours) {
                return Ok(pid);
            }
        }
        bail!("no process {inside} in the lab")
    }

    /// A command to be run inside the lab, in `dir`, with the lab's libvirt and
    /// xftrace configuration in its environment. It is run through nsenter,
    /// which passes its exit status on.
    ///
    /// # Errors
    /// Where the lab is gone.
    pub fn command(&self, dir: &Path, program: impl AsRef<OsStr>) -> Result<Command> {
        let mut command = Command::new("nsenter");
        command
            .args(["--mount", "--pid", "--target"])
            .arg(self.init_pid()?.to_string())
            .arg(format!("--wdns={}", dir.display()))
            .arg("--")
            .arg(program)
            .env("LIBVIRT_DEFAULT_URI", "qemu:///system")
            .env("XFTRACE_CONFIG", self.config_path())
            .env("XFTRACE_LAB_DIR", &self.dir);
        Ok(command)
    }

    /// The xftrace command, to be run inside the lab, in `dir`.
    ///
    /// # Errors
    /// Where the lab is gone, or was started without an xftrace.
    pub fn xftrace(&self, dir: &Path) -> Result<Command> {
        match &self.xftrace {
            Some(path) => self.command(dir, path),
            None => bail!("this lab was started without an xftrace binary"),
        }
    }

    /// Runs virsh and returns its output.
    ///
    /// # Errors
    /// Where virsh fails; the error has what it said.
    pub fn virsh(&self, arguments: &[&str]) -> Result<String> {
        let output = Command::new("virsh")
            .arg("--quiet")
            .arg("--connect")
            .arg(self.uri())
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .context("cannot run virsh")?;
        if !output.status.success() {
            bail!(
                "virsh {}: {}",
                arguments.join(" "),
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Defines a domain, or changes one of that name.
    ///
    /// # Errors
    /// Where libvirt refuses it.
    pub fn define(&self, domain: &Domain) -> Result<Guest<'_>> {
        // Copies: QEMU's user cannot read the cache in root's home, and
        // libvirt changes the owner of what a domain boots.
        let boot = self.dir.join("boot");
        std::fs::create_dir_all(&boot)?;
        let kernel = boot.join(format!("{}.bzImage", domain.name));
        let initrd = boot.join(format!("{}.initramfs", domain.name));
        let artifacts = self.artifacts(&domain.kernel)?;
        copy(&artifacts.bzimage, &kernel)?;
        copy(&artifacts.initramfs, &initrd)?;
        let guest = Guest::new(self, &domain.name);
        let emulator = match domain.backing {
            Backing::HugeRetained => {
                let built = patched_qemu()?;
                // The cache's part for libvirt is /var/cache/libvirt in the lab.
                let name = built.file_name().unwrap_or_default().to_string_lossy();
                format!("/var/cache/libvirt/{name}/qemu-retain")
            }
            _ => EMULATOR.to_owned(),
        };
        let xml = domain.xml(&Places {
            emulator: &emulator,
            kernel: &kernel,
            initrd: &initrd,
            console: &guest.console_path(),
            agent: &guest.agent_path(),
        })?;
        self.define_xml(&domain.name, &xml)
    }

    /// Defines a domain by its XML, which names it `name`.
    ///
    /// # Errors
    /// Where libvirt refuses it.
    pub fn define_xml(&self, name: &str, xml: &str) -> Result<Guest<'_>> {
        let boot = self.dir.join("boot");
        std::fs::create_dir_all(&boot)?;
        let path = boot.join(format!("{name}.xml"));
        std::fs::write(&path, xml)?;
        self.virsh(&["define", &path.to_string_lossy()])?;
        Ok(self.guest(name))
    }

    /// A domain that is defined already.
    #[must_use]
    pub fn guest(&self, name: &str) -> Guest<'_> {
        Guest::new(self, name)
    }

    /// Stops a domain if it runs, and forgets it.
    ///
    /// # Errors
    /// Where libvirt refuses.
    pub fn undefine(&self, name: &str) -> Result<()> {
        let guest = self.guest(name);
        if guest.is_running()? {
            guest.destroy()?;
        }
        self.virsh(&["undefine", name]).map(drop)
    }

    /// Ends libvirtd, and not the domains, and starts it again.
    ///
    /// # Errors
    /// Where it does not end, or does not answer again.
    pub fn restart_libvirtd(&self) -> Result<()> {
        // In the namespace the PID file's number is right.
        let script = "pid=$(cat /run/libvirtd.pid); kill $pid; \
             while kill -0 $pid 2>/dev/null; do sleep 0.05; done; \
             exec libvirtd --daemon --pid-file /run/libvirtd.pid";
        let status = self
            .command(Path::new("/"), "sh")?
            .args(["-c", script])
            .status()?;
        if !status.success() {
            bail!("libvirtd could not be started again: {status}");
        }
        wait_for(Duration::from_secs(30), || {
            Ok(self.virsh(&["version"]).ok().map(|_| ()))
        })
        .context("libvirtd does not answer after its restart")
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.keeper.is_some() {
            if let Err(error) = self.end() {
                eprintln!("lab: {error:#}");
            }
        }
    }
}

fn pid(number: u32) -> Pid {
    Pid::from_raw(i32::try_from(number).unwrap_or(i32::MAX))
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    std::fs::copy(from, to)
        .map(|_| ())
        .with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))
}

fn write_program(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755))?;
    Ok(())
}
