//! What the engine does when it has found a kernel: the next boot of the
//! session that is open, or of one that another helper left open (`left`), or what the
//! domain is to be traced for from its start. A kernel that is not ready for that is
//! waited for (`awaited`).

use std::time::Instant;

use crate::kernel::stock::StockError;
use crate::libvirt::run_dir::RunDir;
use crate::session::{EndReason, Meta};

use super::awaited::Due;
use super::engine::{Engine, Refusal};
use super::left::is_of;
use super::place;
use super::trace::TraceError;
use super::watch::{Guest, FRESH};

/// The most boots of one session: a guest can say that it has booted twice a
/// second, and each of them stays in `session.json`.
pub(super) const MAX_BOOTS: usize = 256;

impl Engine {
    /// Sees to a kernel that was found since this was called last, or that was to be
    /// waited for.
    pub(super) fn attend_boot(&mut self) -> anyhow::Result<()> {
        if std::mem::take(&mut self.boot_due) {
            return self.booted();
        }
        match &self.awaited {
            Some(awaited) if awaited.is_due(Instant::now()) => {
                self.go_on(Some(awaited.due.clone()))
            }
            _ => Ok(()),
        }
    }

    /// A kernel was found that lives.
    fn booted(&mut self) -> anyhow::Result<()> {
        // Nothing is done on a guess. This is called again when it is none any more.
        let Some(guest) = self.watch.known_guest().cloned() else {
            return Ok(());
        };
        if let Some(again) = self.boots_said.say() {
            log::info!(
                "found the guest's kernel: {} (slide {:#x}, {}-level paging){again}",
                guest.kernel.banner.trim_end().escape_debug(),
                guest.kernel.slide,
                guest.kernel.levels
            );
        }
        let place = guest.kernel.phys_text;
        let run_dir = RunDir::at(&self.config.paths.run);
        if let Err(error) = place::note(&run_dir, self.domain.uuid, self.attached.qemu, place) {
            if let Some(again) = self.boots_said.say() {
                log::warn!(
                    "where the guest's kernel lies is not noted for the next helper: \
                     {error:#}{again}"
                );
            }
        }
        // The first look, for the clock.
        self.look()?;
        if let Some(trace) = &mut self.trace {
            trace.guest_gone();
            let mode = guest.link.mode();
            anyhow::ensure!(
                trace.writer.meta.mode == mode,
                "the guest has booted a kernel whose records are {}: that is no part of this session",
                mode.text()
            );
            if trace.boots >= MAX_BOOTS {
                log::warn!("the guest has booted {MAX_BOOTS} times: the trace ends");
                self.end_trace(EndReason::TooManyBoots);
                return Ok(());
            }
            trace.boots += 1;
        }
        let due = self.due(&guest);
        self.go_on(due)
    }

    /// Goes on with what the kernel that was found is to be traced for, or begins it: at
    /// once, or as soon as that can be.
    fn go_on(&mut self, due: Option<Due>) -> anyhow::Result<()> {
        let Some(guest) = self.watch.known_guest().cloned() else {
            return Ok(());
        };
        if let Some(due) = &due {
            if !self.is_ready(&guest, due) {
                return Ok(());
            }
        }
        if self.trace.is_some() {
            return match (self.boot_again(&guest), due) {
                // Somebody took away again what it is traced by.
                (Err(error), Some(due)) if self.trace.is_some() && is_stock(&error) => {
                    self.wait(due, &error);
                    Ok(())
                }
                (result, _) => result,
            };
        }
        if self.start_done {
            return Ok(());
        }
        match (self.resume(&guest), due) {
            (Err(error), Some(due)) if self.trace.is_none() && is_stock(&error) => {
                self.wait(due, &error);
                Ok(())
            }
            (Ok(false), due) => {
                self.begin_at_start(due);
                Ok(())
            }
            (Ok(true), _) => {
                self.start_done = true;
                Ok(())
            }
            (Err(error), _) => Err(error),
        }
    }

    /// The trace goes on in the kernel that was found.
    fn boot_again(&mut self, guest: &Guest) -> anyhow::Result<()> {
        match self.trace.as_mut().filter(|trace| trace.is_down()) {
            Some(trace) => trace.boot(guest, &self.watch)?,
            None => return Ok(()),
        }
        self.go_on_tracing()
    }

    /// The guest that has booted traces what it did before.
    pub(super) fn go_on_tracing(&mut self) -> anyhow::Result<()> {
        match self.switch_again() {
            // It was reset once more meanwhile: the next boot is told of.
            Err(error) if self.trace.is_some() && (self.boot_due || self.watch.guest.is_none()) => {
                log::warn!("{error:#}");
                Ok(())
            }
            result => {
                result?;
                self.untraced = None;
                self.boot_look.forget();
                Ok(())
            }
        }
    }

    /// There is nothing to go on with: begins what is to begin with the domain.
    fn begin_at_start(&mut self, due: Option<Due>) {
        if !self.is_traced_at_start() {
            self.start_done = true;
            return;
        }
        // Another helper may have read what its ring buffer has of its boot.
        let since_boot = !self
            .metas()
            .any(|(_, meta)| meta.qemu == self.attached.qemu);
        let Err(error) = self.begin(Vec::new(), None, None, since_boot, &|_| ()) else {
            return;
        };
        match due {
            _ if self.boot_due || self.watch.guest.is_none() => {
                log::warn!(
                    "tracing from the start of the domain waits for its next boot: {error:#}"
                );
            }
            Some(due) if is_stock(&error) || self.watch.silent() > FRESH => self.wait(due, &error),
            _ => {
                log::error!("tracing from the start of the domain failed: {error:#}");
                self.start_done = true;
                self.untraced = None;
            }
        }
    }

    /// What the guest is to be traced for without being asked; `None` if it is not to be.
    fn due(&self, guest: &Guest) -> Option<Due> {
        let anew = |functions| Due {
            functions,
            same_boot: false,
        };
        if self.trace.is_some() {
            return self.wanted.clone().map(anew);
        }
        if self.start_done {
            return None;
        }
        let due = match self.left().find(|(_, meta)| is_of(meta, guest)) {
            Some((_, meta)) => Due {
                functions: meta.functions().to_vec(),
                same_boot: meta.boots.last().map(|boot| boot.boot_id) == Some(guest.link.boot_id()),
            },
            None if self.is_traced_at_start() => anew(self.enrolment.as_ref()?.functions.clone()),
            None => return None,
        };
        // What had not begun yet is ended.
        Some(due).filter(|due| !due.functions.is_empty())
    }

    /// Whether the domain is to be traced from its start, and that has not been done yet:
    /// it is done where somebody has ended it.
    pub(super) fn is_traced_at_start(&self) -> bool {
        use EndReason::{Off, SizeLimit, TooManyBoots};
        let is_done = |meta: &Meta| matches!(meta.end, Some(Off | SizeLimit | TooManyBoots));
        let wanted = self.enrolment.as_ref();
        !self.start_done
            && wanted.is_some_and(|wanted| wanted.at_start)
            && !self
                .metas()
                .any(|(_, meta)| meta.qemu == self.attached.qemu && is_done(&meta))
    }
}

/// Whether it fails for what a guest without the patch says of itself, which may be
/// otherwise at the next look.
fn is_stock(error: &Refusal) -> bool {
    error.is::<StockError>() || error.downcast_ref().is_some_and(TraceError::is_stock)
}
