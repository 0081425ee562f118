//! One domain of a lab: its life, its console, and commands run in it.

use std::path::PathBuf;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use anyhow::{bail, Context, Result};

use crate::agent::{Agent, Job, Output};
use crate::lab::Lab;
use crate::wait_for;

/// How long a guest may take from its start to its agent's answer. It takes
/// two seconds; the rest is for a machine that is busy.
const BOOT_TIMEOUT: Duration = Duration::from_secs(90);

/// How long a command may take where the caller does not say.
const RUN_TIMEOUT: Duration = Duration::from_secs(60);

/// How much of the console an error shows, in lines.
const CONSOLE_TAIL: usize = 30;

/// A domain, by name. Any number of handles may be had; they share one
/// connection to the guest's agent.
#[derive(Debug, Clone)]
pub struct Guest<'a> {
    lab: &'a Lab,
    name: String,
}

impl<'a> Guest<'a> {
    pub(crate) fn new(lab: &'a Lab, name: &str) -> Guest<'a> {
        Guest {
            lab,
            name: name.to_owned(),
        }
    }

    /// The domain's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Starts the domain and waits until commands can be run in it.
    ///
    /// # Errors
    /// Where libvirt does not start it, or the guest does not come up.
    pub fn start(&self) -> Result<()> {
        self.start_only()?;
        self.wait_until_ready()
    }

    /// Starts the domain and returns when libvirt says that it runs.
    ///
    /// # Errors
    /// Where libvirt does not start it.
    pub fn start_only(&self) -> Result<()> {
        self.forget_agent();
        self.lab.virsh(&["start", &self.name]).map(drop)
    }

    /// Waits until commands can be run in the guest.
    ///
    /// # Errors
    /// Where they cannot within 90 s; the error has the console's end.
    pub fn wait_until_ready(&self) -> Result<()> {
        self.agent()
            .and_then(|agent| agent.wait_until_it_answers(BOOT_TIMEOUT))
            .map(drop)
            .map_err(|error| self.explain(error))
    }

    /// Stops the domain at once, as by pulling the plug.
    ///
    /// # Errors
    /// Where libvirt refuses, as when it does not run.
    pub fn destroy(&self) -> Result<()> {
        self.forget_agent();
        self.lab.virsh(&["destroy", &self.name]).map(drop)
    }

    /// Presses the power button and waits until the domain is off.
    ///
    /// # Errors
    /// Where it does not go off within 60 s.
    pub fn shutdown(&self) -> Result<()> {
        self.lab.virsh(&["shutdown", &self.name])?;
        self.wait_until_off(Duration::from_secs(60))
    }

    /// Waits until the domain is off.
    ///
    /// # Errors
    /// Where it still runs after the time.
    pub fn wait_until_off(&self, timeout: Duration) -> Result<()> {
        wait_for(timeout, || Ok((!self.is_running()?).then_some(())))
            .map_err(|error| self.explain(error.context("the domain still runs")))?;
        self.forget_agent();
        Ok(())
    }

    /// Reboots the guest inside the same QEMU and waits until it is up again.
    ///
    /// # Errors
    /// Where it does not come up as another boot within 90 s.
    pub fn reboot(&self) -> Result<()> {
        let before = self.boot_id()?;
        // The command's end never comes: the boot that ran it is over.
        self.spawn("reboot -f")?;
        let agent = self.agent()?;
        wait_for(BOOT_TIMEOUT, || {
            let now = agent.boot_id();
            Ok(now.filter(|now| *now != before).map(drop))
        })
        .map_err(|error| self.explain(error.context("the guest did not reboot")))
    }

    /// The guest's boot identifier, another one each time it boots.
    ///
    /// # Errors
    /// Where the agent does not answer.
    pub fn boot_id(&self) -> Result<String> {
        self.agent()?
            .wait_until_it_answers(RUN_TIMEOUT)
            .map_err(|error| self.explain(error))
    }

    /// Whether libvirt says that the domain runs.
    ///
    /// # Errors
    /// Where there is no such domain.
    pub fn is_running(&self) -> Result<bool> {
        Ok(self.state()? == "running")
    }

    /// The domain's state as virsh names it.
    ///
    /// # Errors
    /// Where there is no such domain.
    pub fn state(&self) -> Result<String> {
        let state = self.lab.virsh(&["domstate", &self.name])?;
        Ok(state.trim().to_owned())
    }

    /// The domain's UUID.
    ///
    /// # Errors
    /// Where there is no such domain.
    pub fn uuid(&self) -> Result<String> {
        let uuid = self.lab.virsh(&["domuuid", &self.name])?;
        Ok(uuid.trim().to_owned())
    }

    /// Runs a shell command of one line in the guest, for up to a minute.
    ///
    /// # Errors
    /// Where it does not end in time or the guest goes; a status other than 0
    /// is no error.
    pub fn run(&self, command: &str) -> Result<Output> {
        self.run_for(command, RUN_TIMEOUT)
    }

    /// Runs a shell command of one line in the guest.
    ///
    /// # Errors
    /// As [`Guest::run`].
    pub fn run_for(&self, command: &str, timeout: Duration) -> Result<Output> {
        self.spawn(command)?
            .wait(timeout)
            .map_err(|error| self.explain(error))
    }

    /// Starts a shell command of one line in the guest.
    ///
    /// # Errors
    /// Where the guest does not start it.
    pub fn spawn(&self, command: &str) -> Result<Job> {
        self.agent()?
            .spawn(command)
            .map_err(|error| self.explain(error))
    }

    fn agent(&self) -> Result<Arc<Agent>> {
        let mut agents = self
            .lab
            .agents
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(agent) = agents.get(&self.name).filter(|agent| !agent.is_closed()) {
            return Ok(Arc::clone(agent));
        }
        let agent = Agent::connect(&self.agent_path())?;
        agents.insert(self.name.clone(), Arc::clone(&agent));
        Ok(agent)
    }

    fn forget_agent(&self) {
        let mut agents = self
            .lab
            .agents
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        agents.remove(&self.name);
    }

    /// The domain's part of the agent's port.
    pub(crate) fn agent_path(&self) -> PathBuf {
        self.lab.dir().join(format!("agent/{}.sock", self.name))
    }

    /// The file the guest's console is written to, anew with each start.
    #[must_use]
    pub fn console_path(&self) -> PathBuf {
        self.lab.dir().join(format!("console/{}.log", self.name))
    }

    /// What the guest's kernel has said since the domain started.
    ///
    /// # Errors
    /// Where the domain never ran.
    pub fn console(&self) -> Result<String> {
        let path = self.console_path();
        let bytes =
            std::fs::read(&path).with_context(|| format!("no console {}", path.display()))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Adds the console's end to an error.
    fn explain(&self, error: anyhow::Error) -> anyhow::Error {
        let console = self.console().unwrap_or_default();
        let lines: Vec<&str> = console.lines().collect();
        let tail = lines[lines.len().saturating_sub(CONSOLE_TAIL)..].join("\n");
        error.context(format!(
            "guest '{}'; the end of its console:\n{tail}\n",
            self.name
        ))
    }

    /// The process ID of the domain's QEMU as seen from outside the lab.
    ///
    /// # Errors
    /// Where the domain does not run.
    pub fn qemu_pid(&self) -> Result<u32> {
        let inner = self.qemu_pid_inside()?;
        self.lab.outer_pid(inner)
    }

    /// The process ID of the domain's QEMU as commands inside the lab see it.
    ///
    /// # Errors
    /// Where the domain does not run.
    pub fn qemu_pid_inside(&self) -> Result<u32> {
        let path = self
            .lab
            .dir()
            .join(format!("run/libvirt/qemu/{}.pid", self.name));
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("the domain '{}' does not run", self.name))?;
        match text.trim().parse() {
            Ok(pid) => Ok(pid),
            Err(_) => bail!("{} holds no process ID: {text:?}", path.display()),
        }
    }
}
