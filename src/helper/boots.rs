//! What the engine does when it has found a kernel: the next boot of the
//! session that is open, or of one that another helper left open, or what the
//! domain is to be traced for from its start. A kernel that is not ready for that is
//! waited for (`awaited`).

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Instant, UNIX_EPOCH};

use crate::kernel::control::SwitchState;
use crate::kernel::stock::StockError;
use crate::libvirt::run_dir::RunDir;
use crate::session::{EndReason, Meta, Mode, State, META_FILE};

use super::awaited::Due;
use super::engine::{Engine, Refusal};
use super::place;
use super::trace::{Trace, TraceError};
use super::watch::{Guest, FRESH};

/// How often it is tried to go on with a session before it is closed.
const RESUME_TRIES: u32 = 3;
/// The most boots of one session: a guest can say that it has booted twice a
/// second, and each of them stays in `session.json`.
pub(super) const MAX_BOOTS: usize = 256;

/// What a session was at when its helper went.
enum Resumed {
    /// Tracing, and the guest still does.
    Tracing,
    /// Tracing; the guest has booted since, or is one that does not tell.
    ToSwitchOn,
    /// It had not begun, or was being ended.
    Ending,
}

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
    fn go_on_tracing(&mut self) -> anyhow::Result<()> {
        match self.switch_again() {
            // It was reset once more meanwhile: the next boot is told of.
            Err(error) if self.trace.is_some() && (self.boot_due || self.watch.guest.is_none()) => {
                log::warn!("{error:#}");
                Ok(())
            }
            result => {
                result?;
                self.untraced = None;
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

    /// The domain's sessions, newest first, with what is said of them.
    fn metas(&self) -> impl Iterator<Item = (PathBuf, Meta)> + '_ {
        let dirs = self.sessions().into_iter();
        let metas = dirs.filter_map(|dir| Meta::load(&dir).ok().map(|meta| (dir, meta)));
        metas.filter(|(_, meta)| meta.uuid == self.domain.uuid)
    }

    /// Those that helpers of this QEMU process left open, while that is not seen to.
    pub(super) fn left(&self) -> impl Iterator<Item = (PathBuf, Meta)> + '_ {
        let metas = self
            .metas()
            .filter(|_| self.trace.is_none() && !self.start_done);
        metas.filter(|(_, meta)| meta.state == State::Open && meta.qemu == self.attached.qemu)
    }

    /// Nothing that was to be done at the start is done any more: what was left open is
    /// closed, of which this gives the newest. The call flows of the others are written.
    pub(super) fn close_left(&mut self, end: &EndReason) -> Option<(PathBuf, Meta)> {
        let left: Vec<_> = self.left().collect();
        self.awaited = None;
        self.untraced = None;
        self.start_done = true;
        let mut newest = None;
        for (dir, meta) in left {
            let meta = self.abandoned(&dir, meta, end.clone());
            match newest {
                None => newest = Some((dir, meta)),
                Some(_) => self.graphs.write(dir),
            }
        }
        newest
    }

    /// Closes the sessions that helpers of other QEMU processes left open.
    pub(super) fn close_others(&mut self) {
        for (dir, meta) in self.metas().collect::<Vec<_>>() {
            if meta.state == State::Open && meta.qemu != self.attached.qemu {
                self.abandoned(&dir, meta, EndReason::HelperGone);
                self.graphs.write(dir);
            }
        }
    }

    /// Goes on with a session that a helper of this same QEMU process left
    /// open. Sessions that others left open are closed.
    fn resume(&mut self, guest: &Guest) -> anyhow::Result<bool> {
        let mut resumed = false;
        self.close_others();
        for (dir, meta) in self.left().collect::<Vec<_>>() {
            if resumed || !is_of(&meta, guest) {
                self.abandoned(&dir, meta, EndReason::HelperGone);
                self.graphs.write(dir);
                continue;
            }
            let ram = Arc::clone(&self.attached.ram);
            let trace = match Trace::resume(&dir, guest, &self.watch, ram) {
                Ok(trace) => trace,
                Err(error) if error.is_stock() => return Err(error.into()),
                // It may be better when the guest is found again.
                Err(error) if self.resume_failed < RESUME_TRIES => {
                    self.resume_failed += 1;
                    return Err(error.into());
                }
                Err(error) => {
                    let why = format!("it could not be gone on with: {error}");
                    log::error!("the session in {dir:?} is closed: {why}");
                    self.abandoned(&dir, meta, EndReason::Error(why));
                    self.graphs.write(dir);
                    continue;
                }
            };
            let at = self.was_at(&meta, guest);
            // A name stands there as often as the kernel has functions that bear it.
            let mut wanted = trace.writer.meta.functions().to_vec();
            wanted.dedup();
            self.begun(trace);
            resumed = true;
            match at {
                Resumed::Tracing => self.wanted = Some(wanted),
                Resumed::ToSwitchOn => {
                    self.wanted = Some(wanted);
                    self.go_on_tracing()?;
                }
                Resumed::Ending => {
                    log::warn!("the session in {dir:?}, whose helper has gone, was being ended");
                    self.end(EndReason::Off)?;
                    continue;
                }
            }
            log::warn!("going on with the session in {dir:?}, whose helper has gone");
        }
        Ok(resumed)
    }

    /// Closes a session whose helper has gone. All that is known of its end is
    /// when it was saved last.
    pub(super) fn abandoned(&mut self, dir: &Path, mut meta: Meta, end: EndReason) -> Meta {
        let saved = std::fs::metadata(dir.join(META_FILE)).and_then(|file| file.modified());
        meta.ended_ns = saved
            .ok()
            .and_then(|at| at.duration_since(UNIX_EPOCH).ok())
            .map(|since| since.as_nanos() as u64);
        meta.state = State::Closed;
        meta.end = Some(end);
        if let Err(error) = meta.save(dir) {
            log::error!("the session in {dir:?} cannot be closed yet: {error}; it is tried again");
            self.unsaved.push((dir.to_owned(), meta.clone()));
        }
        meta
    }

    /// What a session was at whose helper has gone.
    fn was_at(&self, meta: &Meta, guest: &Guest) -> Resumed {
        let last = meta.boots.last().map(|boot| boot.boot_id);
        let state = self.watch.heartbeat().map(|beat| beat.state);
        // Of no function the guest would make all of its kernel's.
        if meta.functions().is_empty() {
            Resumed::Ending
        } else if meta.mode == Mode::Plain || last != Some(guest.link.boot_id()) {
            Resumed::ToSwitchOn
        } else if state == Some(SwitchState::On) {
            Resumed::Tracing
        } else {
            Resumed::Ending
        }
    }
}

/// Whether a session that was left open is of a kernel like that which the guest runs.
fn is_of(meta: &Meta, guest: &Guest) -> bool {
    meta.mode == guest.link.mode()
}

/// Whether it fails for what a guest without the patch says of itself, which may be
/// otherwise at the next look.
fn is_stock(error: &Refusal) -> bool {
    error.is::<StockError>() || error.downcast_ref().is_some_and(TraceError::is_stock)
}
