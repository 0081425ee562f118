//! What a user can ask of the engine: `on`, `off`, `status`.

use std::path::PathBuf;
use std::sync::mpsc::Sender;
use std::sync::Arc;
use std::time::Duration;

use crate::session::{Counters, EndReason, Meta, Mode, State, GRAPH_FILE};
use crate::switch::Command;

use super::engine::{lock, Engine, Job, Refusal};
use super::protocol::{Reply, Request};
use super::trace::Trace;
use super::watch::wall_ns;

/// A trace that ended.
struct Off {
    /// Its session's directory.
    session: PathBuf,
    counters: Counters,
    /// Why the guest's tracer is not nop, where it is not.
    left: Option<String>,
}

/// What `off` has ended.
enum Ended {
    Session(Off),
    /// What was to be traced from the domain's start, and had not begun.
    CalledOff,
}

impl Engine {
    pub(super) fn job(&mut self, job: Job) {
        // Whoever asked may be gone; the work is done all the same.
        let progress = |text: String| {
            let _ = job.reply.send(Reply::Progress { text });
        };
        let result = match job.request {
            Request::Status => {
                self.publish();
                Ok(Reply::Status(Box::new(lock(&self.status).clone())))
            }
            Request::On {
                functions,
                interval_ns,
                buffer_kb,
            } => self.on(functions, interval_ns, buffer_kb, &progress),
            Request::Off => match self.off(EndReason::Off, &progress) {
                Ok(Ended::Session(off)) => return self.answer_off(off, job.reply),
                Ok(Ended::CalledOff) => Ok(Reply::CalledOff),
                Err(error) => Err(error),
            },
        };
        self.publish();
        let reply = result.unwrap_or_else(|error| Reply::Error {
            text: format!("{error:#}"),
        });
        let _ = job.reply.send(reply);
    }

    /// Has the call flow written, and then answers whoever asked for `off`.
    fn answer_off(&mut self, off: Off, reply: Sender<Reply>) {
        self.publish();
        let progress = {
            let reply = reply.clone();
            move |text| drop(reply.send(Reply::Progress { text }))
        };
        let dir = off.session;
        self.graphs
            .write_for(dir.clone(), progress, move |written| {
                let _ = reply.send(Reply::Off {
                    graph: dir.join(GRAPH_FILE),
                    session: dir,
                    is_whole: written.as_ref().is_ok_and(|whole| *whole),
                    unwritten: written.err(),
                    counters: off.counters,
                    left: off.left,
                });
            });
    }

    /// Ends the trace, where nobody waits for its call flow.
    pub(super) fn end(&mut self, end: EndReason) -> Result<(), Refusal> {
        if let Ended::Session(off) = self.off(end, &|_| ())? {
            self.graphs.write(off.session);
        }
        Ok(())
    }

    /// Begins a trace, or has the one that runs trace other functions.
    fn on(
        &mut self,
        functions: Vec<String>,
        interval_ns: Option<u64>,
        buffer_kb: Option<u32>,
        progress: &dyn Fn(String),
    ) -> Result<Reply, Refusal> {
        // What was to be waited for may be there by now.
        if let Some(awaited) = &mut self.awaited {
            awaited.hurry();
        }
        self.begin(functions, interval_ns, buffer_kb, false, progress)
    }

    /// The same. What is `since_boot` has in mode plain what the guest has recorded since
    /// it was booted, too.
    pub(super) fn begin(
        &mut self,
        functions: Vec<String>,
        interval_ns: Option<u64>,
        buffer_kb: Option<u32>,
        since_boot: bool,
        progress: &dyn Fn(String),
    ) -> Result<Reply, Refusal> {
        let wanted = self.enrolment.as_ref();
        let functions = match wanted {
            Some(wanted) if functions.is_empty() => wanted.functions.clone(),
            _ => functions,
        };
        let own_interval = wanted.map_or(self.config.interval, |wanted| wanted.interval);
        if functions.is_empty() {
            anyhow::bail!(
                "no function to trace: name one, as in 'xftrace on sys_openat', \
                 or enroll the domain with --functions"
            );
        }
        let (names, addresses) = self.resolve(&functions)?;
        let guest = self.alive()?;
        if let Some(rivals) = self.watch.rivals() {
            anyhow::bail!("{rivals}");
        }
        let mode = guest.link.mode();
        if let Some(why) = guest
            .link
            .refuses(&*self.attached.ram, &guest.symbols, &names)
        {
            return Err(why.into());
        }
        if mode == Mode::Plain && (interval_ns.is_some() || buffer_kb.is_some()) {
            anyhow::bail!(
                "--interval and --buffer-size need a guest with the xftrace patch: this one has \
                 no keys, and its buffer's size is set at its boot (trace_buf_size=)"
            );
        }
        let goes_on = self.trace.as_ref().is_some_and(Trace::is_down);
        if let Some(trace) = self.trace.as_mut().filter(|_| goes_on) {
            trace.boot(&guest, &self.watch)?;
        }
        let left: Vec<_> = self.left().collect();
        let fresh = self.trace.is_none();
        if fresh {
            self.settle(progress)?;
            let interval = interval_ns.map_or(own_interval, Duration::from_nanos);
            let dir = crate::session::new_dir(&self.sessions_dir(), wall_ns())?;
            let meta = Meta {
                version: 1,
                domain: self.domain.name.clone(),
                uuid: self.domain.uuid,
                mode,
                state: State::Open,
                qemu: self.attached.qemu,
                started_ns: wall_ns(),
                ended_ns: None,
                end: None,
                interval_ns: interval.as_nanos() as u64,
                switches: Vec::new(),
                boots: Vec::new(),
                counters: Default::default(),
                guest_counts: (mode == Mode::Plain).then(Default::default),
            };
            let ram = Arc::clone(&self.attached.ram);
            let trace = Trace::begin(&dir, meta, &guest, &self.watch, ram, since_boot)?;
            self.begun(trace);
            self.buffer_kb = buffer_kb.unwrap_or(0);
        } else if interval_ns.is_some() || buffer_kb.is_some() {
            anyhow::bail!(
                "--interval and --buffer-size cannot be changed while the trace is on; \
                 'xftrace off' first"
            );
        }
        let command = Command::On {
            functions: addresses,
            buffer_kb: self.buffer_kb,
        };
        let turn = match self.command(&command, &names, progress) {
            Ok(turn) => turn,
            Err(error) => {
                if fresh {
                    self.discard();
                }
                // What was waited for still is.
                if let Some(trace) = self.trace.as_mut().filter(|_| goes_on) {
                    trace.guest_gone();
                }
                return Err(error);
            }
        };
        self.wanted = Some(functions);
        // What was waited for gives way to what is traced now.
        self.awaited = None;
        self.untraced = None;
        self.start_done = true;
        for (dir, meta) in left {
            self.give_up(dir, meta, EndReason::HelperGone);
        }
        let trace = self
            .trace
            .as_mut()
            .ok_or_else(|| anyhow::anyhow!("the session was ended"))?;
        let reply = Reply::On {
            functions: turn.functions.clone(),
            session: trace.writer.dir().to_owned(),
            pickup_ns: turn.pickup_ns,
            worked_ns: turn.worked_ns,
            mode,
        };
        trace.switched(turn);
        Ok(reply)
    }

    /// Ends the trace: stop recording, read what is left, tracer nop, close.
    /// It ends also where the guest does not go along: `settle` sees to that.
    /// The call flow is yet to be written.
    fn off(&mut self, end: EndReason, progress: &dyn Fn(String)) -> Result<Ended, Refusal> {
        // A session that another helper left open may be gone on with first.
        let left = self.left().next().map(|(dir, _)| dir);
        let answer = match left {
            Some(_) => self.alive().map(drop),
            None => Ok(()),
        };
        if self.trace.is_none() {
            let at_start = self.is_traced_at_start();
            self.close_left(&end);
            if let Some(session) = left {
                return self.ended(session, answer.err());
            }
            if at_start {
                return Ok(Ended::CalledOff);
            }
            return Err(match self.settle(progress) {
                Ok(true) => anyhow::anyhow!(
                    "no trace is on; the guest's tracer was, from a trace that ended without it, \
                     and is nop now"
                ),
                Ok(false) => {
                    anyhow::anyhow!("no trace is on; 'xftrace on FUNCTION..' begins one")
                }
                Err(error) => error.context("no trace is on, but the guest's tracer is not nop"),
            });
        }
        let switched = match self.watch.guest {
            Some(_) => self.switch_off(progress),
            None => Err(anyhow::anyhow!("{}", self.watch.why)),
        };
        let left = match switched {
            Ok(()) => None,
            Err(error) => self.left_in_guest(&error).or_else(|| {
                progress(format!("ending the session without the guest: {error:#}"));
                None
            }),
        };
        if let Some(left) = &left {
            log::warn!("the trace ends, but {left}");
        }
        progress("writing the call flow".to_owned());
        let Some(trace) = self.trace.take() else {
            // Something failed, and that has ended it.
            let session = self.last_session.clone();
            let session = session.ok_or_else(|| anyhow::anyhow!("the session was ended"))?;
            return self.ended(session, None);
        };
        self.wanted = None;
        self.awaited = None;
        self.untraced = None;
        let closed = trace.close(end, &self.watch);
        let counters = closed.meta.counters;
        let dir = self.closed(closed);
        Ok(Ended::Session(Off {
            session: dir,
            counters,
            left,
        }))
    }

    /// What is left to be done in a guest that did not go along, if there is one.
    fn left_in_guest(&self, error: &Refusal) -> Option<String> {
        let guest = self.watch.guest.as_ref().filter(|_| !self.boot_due)?;
        Some(match guest.link.mode() {
            Mode::Keyed => format!(
                "the guest's tracer is not nop yet: {error:#}; it is tried again every few seconds"
            ),
            Mode::Plain => format!(
                "the guest's ring buffer may go on taking records, which nobody reads: {error:#}"
            ),
        })
    }

    /// A session that was closed otherwise.
    fn ended(&mut self, session: PathBuf, error: Option<Refusal>) -> Result<Ended, Refusal> {
        let meta = Meta::load(&session)?;
        self.last_session = Some(session.clone());
        Ok(Ended::Session(Off {
            session,
            counters: meta.counters,
            left: error.and_then(|error| self.left_in_guest(&error)),
        }))
    }

    /// Has the guest record no more, reads the rest, and has it go back to
    /// tracer nop.
    fn switch_off(&mut self, progress: &dyn Fn(String)) -> anyhow::Result<()> {
        let stopped = self.command(&Command::Stop, &[], progress);
        // What cannot be read now, cannot be read later.
        if let Err(error) = self.drain_rest() {
            log::error!("the rest of the guest's records could not be read: {error}");
        }
        stopped?;
        let turn = self.command(&Command::Off, &[], progress)?;
        if let Some(trace) = &mut self.trace {
            trace.switched(turn);
        }
        Ok(())
    }

    /// Drops a session in which nothing was traced yet.
    fn discard(&mut self) {
        if let Some(trace) = self.trace.take() {
            let dir = trace.writer.dir().to_owned();
            drop(trace);
            if let Err(error) = std::fs::remove_dir_all(&dir) {
                log::warn!("cannot remove the empty session {dir:?}: {error}");
            }
        }
    }
}
