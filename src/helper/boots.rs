//! What the engine does when it has found a kernel: the next boot of the
//! session that is open, or of one that another helper left open, or what the
//! domain is to be traced for from its start. A kernel that is not ready for that is
//! waited for (`awaited`).

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Instant, UNIX_EPOCH};

use crate::kernel::control::SwitchState;
use crate::libvirt::run_dir::RunDir;
use crate::session::{EndReason, Finding, FindingKind, Meta, Mode, State, META_FILE};

use super::engine::Engine;
use super::place;
use super::trace::Trace;
use super::watch::{wall_ns, Guest};

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
        let now = Instant::now();
        if std::mem::take(&mut self.boot_due) {
            return self.booted();
        }
        match &mut self.awaited {
            Some(awaited) if awaited.is_due(now) => {
                let long = awaited.is_to_be_told(now);
                if let (true, Some(trace)) = (long, &mut self.trace) {
                    trace.finding(Finding {
                        wall_ns: wall_ns(),
                        kind: FindingKind::TracerOff,
                    });
                }
                self.go_on()
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
            log::warn!("where the guest's kernel lies is not noted for the next helper: {error:#}");
        }
        // The first look, for the clock.
        self.look()?;
        if let Some(trace) = &mut self.trace {
            let mode = guest.link.mode();
            anyhow::ensure!(
                trace.writer.meta.mode == mode,
                "the guest has booted a kernel whose records are {}: that is no part of this session",
                mode.text()
            );
            trace.guest_gone();
            if trace.writer.meta.boots.len() >= MAX_BOOTS {
                log::warn!("the guest has booted {MAX_BOOTS} times: the trace ends");
                self.end_trace(EndReason::TooManyBoots);
                return Ok(());
            }
        }
        self.go_on()
    }

    /// Goes on with what the kernel that was found is to be traced for, or begins it: at
    /// once, or as soon as that can be.
    fn go_on(&mut self) -> anyhow::Result<()> {
        let Some(guest) = self.watch.known_guest().cloned() else {
            return Ok(());
        };
        let due = self.due(&guest);
        if self.has_to_wait(&guest, &due) {
            return Ok(());
        }
        if let Some(trace) = &mut self.trace {
            trace.boot(&guest, &self.watch)?;
            return match self.switch_again() {
                // It was reset once more meanwhile: the next boot is told of.
                Err(error) if self.boot_due || self.watch.guest.is_none() => {
                    log::warn!("{error:#}");
                    Ok(())
                }
                result => result,
            };
        }
        if self.start_done {
            return Ok(());
        }
        let resumed = self.resume(&guest)?;
        self.start_done = true;
        if !resumed && self.is_traced_at_start() {
            if let Err(error) = self.on(Vec::new(), None, None, &|_| ()) {
                log::error!("tracing from the start of the domain failed: {error:#}");
            }
        }
        Ok(())
    }

    /// The functions that the guest is to be traced for without being asked; none if it
    /// is not to be.
    fn due(&self, guest: &Guest) -> Vec<String> {
        if self.trace.is_some() {
            return self.wanted.clone().unwrap_or_default();
        }
        if self.start_done {
            return Vec::new();
        }
        let sessions = self.sessions();
        let mut left = sessions.iter().filter_map(|dir| Meta::load(dir).ok());
        match (left.find(|meta| self.is_left(meta, guest)), &self.enrolment) {
            (Some(meta), _) => meta.functions().to_vec(),
            (None, Some(wanted)) if wanted.at_start => wanted.functions.clone(),
            (None, _) => Vec::new(),
        }
    }

    /// What was to be traced as soon as it can be is not any more. Whether there was
    /// such a thing.
    pub(super) fn call_off(&mut self) -> bool {
        let guest = self.watch.known_guest().cloned();
        let (Some(_), Some(guest)) = (self.awaited.take(), guest) else {
            return false;
        };
        self.start_done = true;
        for dir in self.sessions() {
            if let Some(meta) = Meta::load(&dir).ok().filter(|at| self.is_left(at, &guest)) {
                self.abandoned(dir, meta, EndReason::Off);
            }
        }
        true
    }

    fn is_traced_at_start(&self) -> bool {
        let wanted = self.enrolment.as_ref();
        wanted.is_some_and(|wanted| wanted.at_start)
    }

    /// Whether a session is one that a helper of this QEMU process left open, which this
    /// guest can go on with.
    fn is_left(&self, meta: &Meta, guest: &Guest) -> bool {
        meta.state == State::Open
            && meta.uuid == self.domain.uuid
            && meta.qemu == self.attached.qemu
            && meta.mode == guest.link.mode()
    }

    /// Goes on with a session that a helper of this same QEMU process left
    /// open. Sessions that others left open are closed.
    fn resume(&mut self, guest: &Guest) -> anyhow::Result<bool> {
        let mut resumed = false;
        for dir in self.sessions() {
            let Ok(meta) = Meta::load(&dir) else {
                continue;
            };
            if meta.state == State::Closed || meta.uuid != self.domain.uuid {
                continue;
            }
            if resumed || !self.is_left(&meta, guest) {
                self.abandoned(dir, meta, EndReason::HelperGone);
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
                    self.abandoned(dir, meta, EndReason::Error(why));
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
    fn abandoned(&self, dir: PathBuf, mut meta: Meta, end: EndReason) {
        let saved = std::fs::metadata(dir.join(META_FILE)).and_then(|file| file.modified());
        meta.ended_ns = saved
            .ok()
            .and_then(|at| at.duration_since(UNIX_EPOCH).ok())
            .map(|since| since.as_nanos() as u64);
        meta.state = State::Closed;
        meta.end = Some(end);
        if let Err(error) = meta.save(&dir) {
            log::error!("the session in {dir:?} cannot be closed: {error}");
        }
        self.graphs.write(dir);
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
