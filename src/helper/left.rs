//! Sessions that other helpers left open: of this QEMU process, whose trace is gone on
//! with or ended, and of others, which are closed as what is known of them.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use crate::kernel::control::SwitchState;
use crate::session::{EndReason, Meta, Mode, State, META_FILE};

use super::engine::Engine;
use super::trace::Trace;
use super::watch::Guest;

/// How often it is tried to go on with a session before it is closed.
const RESUME_TRIES: u32 = 3;

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
    /// The domain's sessions, newest first, with what is said of them.
    pub(super) fn metas(&self) -> impl Iterator<Item = (PathBuf, Meta)> + '_ {
        let dirs = self.sessions().into_iter();
        let metas = dirs.filter_map(|dir| Meta::load(&dir).ok().map(|meta| (dir, meta)));
        metas.filter(|(_, meta)| meta.uuid == self.domain.uuid)
    }

    /// Those that helpers of this QEMU process left open, while that is not seen to.
    pub(super) fn left(&self) -> impl Iterator<Item = (PathBuf, Meta)> + '_ {
        let unseen = self.trace.is_none() && !self.start_done;
        let metas = unseen.then(|| self.metas()).into_iter().flatten();
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
            match newest {
                None => newest = Some((dir.clone(), self.abandoned(&dir, meta, end.clone()))),
                Some(_) => self.give_up(dir, meta, end.clone()),
            }
        }
        newest
    }

    /// Closes the sessions that helpers of other QEMU processes left open.
    pub(super) fn close_others(&mut self) {
        for (dir, meta) in self.metas().collect::<Vec<_>>() {
            if meta.state == State::Open && meta.qemu != self.attached.qemu {
                self.give_up(dir, meta, EndReason::HelperGone);
            }
        }
    }

    /// Goes on with a session that a helper of this same QEMU process left
    /// open. Sessions that others left open are closed.
    pub(super) fn resume(&mut self, guest: &Guest) -> anyhow::Result<bool> {
        let mut resumed = false;
        self.close_others();
        for (dir, meta) in self.left().collect::<Vec<_>>() {
            if resumed || !is_of(&meta, guest) {
                self.give_up(dir, meta, EndReason::HelperGone);
                continue;
            }
            let ram = Arc::clone(&self.attached.ram);
            let trace = match Trace::resume(&dir, guest, &self.watch, ram) {
                Ok(trace) => trace,
                // What had not begun is not waited for.
                Err(error) if error.is_stock() && !meta.functions().is_empty() => {
                    return Err(error.into());
                }
                // It may be better when the guest is found again.
                Err(error) if self.resume_failed < RESUME_TRIES => {
                    self.resume_failed += 1;
                    return Err(error.into());
                }
                Err(error) => {
                    let why = format!("it could not be gone on with: {error}");
                    log::error!("the session in {dir:?} is closed: {why}");
                    self.give_up(dir, meta, EndReason::Error(why));
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

    /// Closes a session whose helper has gone, and has its call flow written.
    pub(super) fn give_up(&mut self, dir: PathBuf, meta: Meta, end: EndReason) {
        self.abandoned(&dir, meta, end);
        self.graphs.write(dir);
    }

    /// Closes a session whose helper has gone. All that is known of its end is
    /// when it was saved last.
    fn abandoned(&mut self, dir: &Path, mut meta: Meta, end: EndReason) -> Meta {
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
pub(super) fn is_of(meta: &Meta, guest: &Guest) -> bool {
    meta.mode == guest.link.mode()
}
