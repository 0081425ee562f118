//! What the engine does when it has found a kernel: the next boot of the
//! session that is open, or of one that another helper left open, or what the
//! domain is to be traced for from its start. A kernel that is not ready for that is
//! waited for (`awaited`).

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Instant, UNIX_EPOCH};

use crate::kernel::control::SwitchState;
use crate::libvirt::run_dir::RunDir;
use crate::session::{EndReason, Meta, Mode, State, META_FILE};

use super::engine::Engine;
use super::place;
use super::trace::Trace;
use super::watch::Guest;

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
        let due = self
            .awaited
            .as_ref()
            .filter(|one| one.is_due(Instant::now()));
        match due.map(|awaited| awaited.functions.clone()) {
            Some(functions) => self.go_on(Some(functions)),
            None => Ok(()),
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
            log::warn!("where the guest's kernel lies is not noted for the next helper: {error:#}");
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
    fn go_on(&mut self, due: Option<Vec<String>>) -> anyhow::Result<()> {
        let Some(guest) = self.watch.known_guest().cloned() else {
            return Ok(());
        };
        if !due.is_none_or(|functions| self.is_ready(&guest, functions)) {
            return Ok(());
        }
        if let Some(trace) = self.trace.as_mut().filter(|trace| trace.is_down()) {
            trace.boot(&guest, &self.watch)?;
            self.untraced = None;
            return match self.switch_again() {
                // It was reset once more meanwhile: the next boot is told of.
                Err(error) if self.boot_due || self.watch.guest.is_none() => {
                    log::warn!("{error:#}");
                    Ok(())
                }
                result => result,
            };
        }
        if self.trace.is_some() || self.start_done {
            return Ok(());
        }
        let at_start = self.is_traced_at_start();
        let resumed = self.resume(&guest)?;
        self.start_done = true;
        if at_start && !resumed {
            if let Err(error) = self.begin(Vec::new(), None, None, true, &|_| ()) {
                log::error!("tracing from the start of the domain failed: {error:#}");
            }
        }
        Ok(())
    }

    /// The functions that the guest is to be traced for without being asked; `None` if it
    /// is not to be.
    fn due(&self, guest: &Guest) -> Option<Vec<String>> {
        if self.trace.is_some() {
            return self.wanted.clone();
        }
        if self.start_done {
            return None;
        }
        let functions = match self.left().find(|(_, meta)| is_of(meta, guest)) {
            Some((_, meta)) => meta.functions().to_vec(),
            None if self.is_traced_at_start() => self.enrolment.as_ref()?.functions.clone(),
            None => return None,
        };
        // What had not begun yet is ended.
        Some(functions).filter(|functions| !functions.is_empty())
    }

    /// Whether the domain is to be traced from its start, and that has not been done yet.
    pub(super) fn is_traced_at_start(&self) -> bool {
        let wanted = self.enrolment.as_ref();
        !self.start_done
            && wanted.is_some_and(|wanted| wanted.at_start)
            && !self
                .metas()
                .any(|(_, meta)| meta.qemu == self.attached.qemu)
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

    /// Sees to what was to be done at the start by closing what was left open, of which
    /// it gives the newest. Nothing is waited for any more.
    pub(super) fn close_left(&mut self, end: &EndReason) -> Option<(PathBuf, Meta)> {
        self.awaited = None;
        self.untraced = None;
        let left: Vec<_> = self.left().collect();
        self.start_done = true;
        let closed = left.into_iter().map(|(dir, meta)| {
            let meta = self.abandoned(&dir, meta, end.clone());
            (dir, meta)
        });
        let closed: Vec<_> = closed.collect();
        closed.into_iter().next()
    }

    /// Closes the sessions that helpers of other QEMU processes left open.
    pub(super) fn close_others(&self) {
        for (dir, meta) in self.metas() {
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
            let wanted = trace.writer.meta.functions().to_vec();
            self.begun(trace);
            resumed = true;
            match at {
                Resumed::Tracing => self.wanted = Some(wanted),
                Resumed::ToSwitchOn => {
                    self.wanted = Some(wanted);
                    self.switch_again()?;
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
    fn abandoned(&self, dir: &Path, mut meta: Meta, end: EndReason) -> Meta {
        let saved = std::fs::metadata(dir.join(META_FILE)).and_then(|file| file.modified());
        meta.ended_ns = saved
            .ok()
            .and_then(|at| at.duration_since(UNIX_EPOCH).ok())
            .map(|since| since.as_nanos() as u64);
        meta.state = State::Closed;
        meta.end = Some(end);
        if let Err(error) = meta.save(dir) {
            log::error!("the session in {dir:?} cannot be closed: {error}");
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
