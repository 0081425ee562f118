//! Turning the guest's switch, and waiting for what comes of it while the
//! draining goes on.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::kernel::Gva;
use crate::session::{Mode, SwitchChange};
use crate::switch::{self, Command, Progress, SwitchError};

use super::engine::{Engine, Refusal, TICK_TRACING};
use super::link::Link;
use super::watch::{wall_ns, Guest, Seen};

/// For the guest to take a command up: it looks every 100 ms or sooner.
const PICKUP_LIMIT: Duration = Duration::from_secs(10);
/// For the guest's kernel to patch its call sites, under emulation.
pub(super) const WORK_LIMIT: Duration = Duration::from_secs(120);
/// For the guest's heart to beat: the ticks of a kernel that is idle stand
/// still for a second and more.
const ALIVE_LIMIT: Duration = Duration::from_secs(5);
/// How often a user who waits is told of it.
const PROGRESS_EVERY: Duration = Duration::from_secs(2);

impl Engine {
    /// After a reboot: the switch as it was before.
    pub(super) fn switch_again(&mut self) -> anyhow::Result<()> {
        let Some(functions) = self.wanted.clone() else {
            return Ok(());
        };
        let deadline = Instant::now() + PICKUP_LIMIT;
        while self.trace.as_ref().is_some_and(|trace| !trace.ready()) {
            if Instant::now() > deadline {
                anyhow::bail!("the guest that booted could not be given a key");
            }
            self.look()?;
            std::thread::sleep(TICK_TRACING);
        }
        let guest = self.watch.known_guest();
        let plain = guest.filter(|guest| guest.link.mode() == Mode::Plain);
        let turn = match plain.map(|guest| guest.symbols.full_names(&functions)) {
            // Nobody has to answer for it, and that it lives was seen just now.
            Some(names) => self.plain_record(true, &names?)?,
            None => {
                let (names, addresses) = self.resolve(&functions)?;
                let command = Command::On {
                    functions: addresses,
                    buffer_kb: self.buffer_kb,
                };
                self.command(&command, &names, &|_| ())?
            }
        };
        if let Some(trace) = &mut self.trace {
            trace.switched(turn);
        }
        Ok(())
    }

    /// Has the guest carry out a command, and goes on draining meanwhile.
    pub(super) fn command(
        &mut self,
        command: &Command,
        names: &[String],
        progress: &dyn Fn(String),
    ) -> Result<SwitchChange, Refusal> {
        let ram = Arc::clone(&self.attached.ram);
        let control = match self.alive()?.link {
            Link::Keyed(control) => control,
            Link::Plain(_) => return self.plain_turn(command, names),
        };
        let sent = Instant::now();
        let pending = switch::send(&*ram, &control, command)?;
        let mut picked_up = None;
        let mut withdrawn = false;
        let mut told = sent;
        loop {
            let progress_now = pending.poll(&*ram, &control);
            if picked_up.is_none() && !matches!(progress_now, Ok(Progress::Waiting)) {
                picked_up = Some(sent.elapsed());
            }
            match progress_now {
                Ok(Progress::Done { worked, .. }) => {
                    return Ok(SwitchChange {
                        wall_ns: wall_ns(),
                        functions: names.to_vec(),
                        pickup_ns: picked_up.unwrap_or_default().as_nanos() as u64,
                        worked_ns: worked.as_nanos() as u64,
                    });
                }
                Err(SwitchError::Guest(error)) => {
                    let named = error.function.and_then(|index| names.get(index as usize));
                    return Err(match named {
                        Some(name) => anyhow::anyhow!(
                            "{name} is a function of the guest's kernel, but {error}"
                        ),
                        None => anyhow::anyhow!("{error}"),
                    });
                }
                Err(error) => return Err(error.into()),
                // Nobody is to find it later, when nobody waits for it; and it
                // may have been taken up just now.
                Ok(Progress::Waiting) if sent.elapsed() > PICKUP_LIMIT && !withdrawn => {
                    withdrawn = true;
                    pending.withdraw(&*ram, &control)?;
                }
                Ok(Progress::Waiting) if withdrawn => anyhow::bail!(
                    "the guest's kernel did not take the command up within {} s; \
                     its last heartbeat was {} ms ago: is the guest paused, or overloaded?",
                    PICKUP_LIMIT.as_secs(),
                    self.watch.silent().as_millis()
                ),
                Ok(Progress::Working) if sent.elapsed() > WORK_LIMIT => anyhow::bail!(
                    "the guest's kernel took the command up and did not finish it within {} s; \
                     see the guest's kernel log",
                    WORK_LIMIT.as_secs()
                ),
                Ok(_) => {}
            }
            if let (Some(pickup), true) = (picked_up, told.elapsed() > PROGRESS_EVERY) {
                told = Instant::now();
                progress(format!(
                    "the guest took it up after {} ms, and patches its call sites since {} s",
                    pickup.as_millis(),
                    (sent.elapsed() - pickup).as_secs()
                ));
            }
            if matches!(self.look()?, Seen::Gone | Seen::Booted) {
                anyhow::bail!("the guest was reset meanwhile");
            }
            if let Some(trace) = &mut self.trace {
                trace.drain(&self.watch)?;
                trace.attend(&self.watch);
            }
            std::thread::sleep(TICK_TRACING);
        }
    }

    /// The same in a kernel without the patch, which nobody has to answer for.
    fn plain_turn(&mut self, command: &Command, names: &[String]) -> Result<SwitchChange, Refusal> {
        // Its tracer stays what the guest was booted with.
        let on = matches!(command, Command::On { .. });
        self.plain_record(on, names)
    }

    /// Such a kernel takes records from the next one on, or none any more.
    fn plain_record(&mut self, on: bool, names: &[String]) -> Result<SwitchChange, Refusal> {
        if let Some(trace) = &mut self.trace {
            anyhow::ensure!(!(on && trace.is_down()), "the guest was reset meanwhile");
            trace.record(on)?;
        }
        Ok(SwitchChange {
            wall_ns: wall_ns(),
            functions: names.to_vec(),
            pickup_ns: 0,
            worked_ns: 0,
        })
    }

    /// The guest's kernel, if it was seen to live a moment ago.
    pub(super) fn alive(&mut self) -> Result<Guest, Refusal> {
        let ram = Arc::clone(&self.attached.ram);
        let deadline = Instant::now() + ALIVE_LIMIT;
        loop {
            // A session that another helper left open comes before anything
            // that is asked of this one.
            if let Err(error) = self.attend_boot() {
                self.failed(&format!("{error:#}"));
                return Err(error);
            }
            if let Some(guest) = &self.watch.guest {
                if self.watch.liveness.is_fresh(&*ram, &guest.link) {
                    return Ok(guest.clone());
                }
            }
            if Instant::now() > deadline {
                break;
            }
            self.look()?;
            std::thread::sleep(TICK_TRACING);
        }
        if self.watch.guest.is_some() {
            anyhow::bail!(
                "the guest's kernel has shown no sign of life for {} ms; is the domain paused?",
                self.watch.silent().as_millis()
            );
        }
        anyhow::bail!("no kernel of the guest can be traced: {}", self.watch.why)
    }

    /// The functions' full names and run-time addresses.
    pub(super) fn resolve(
        &mut self,
        functions: &[String],
    ) -> Result<(Vec<String>, Vec<Gva>), Refusal> {
        let guest = self.alive()?;
        let mut names = Vec::new();
        let mut addresses = Vec::new();
        for function in functions {
            let found = guest.symbols.resolve_function(function)?;
            for address in found.addresses {
                names.push(found.name.clone());
                addresses.push(guest.kernel.runtime(address));
            }
        }
        Ok((names, addresses))
    }
}
