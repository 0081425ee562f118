//! What a user can ask of the engine: `on`, `off`, `status`.

use std::sync::Arc;
use std::time::Duration;

use crate::session::{EndReason, Meta, Mode, State, GRAPH_FILE};
use crate::switch::Command;

use super::engine::{lock, write_graph, Engine, Job, Refusal};
use super::protocol::{Reply, Request};
use super::trace::Trace;
use super::watch::wall_ns;

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
            Request::Off => self.off(EndReason::Off, &progress),
        };
        self.publish();
        let reply = result.unwrap_or_else(|error| Reply::Error {
            text: format!("{error:#}"),
        });
        let _ = job.reply.send(reply);
    }

    /// Begins a trace, or has the one that runs trace other functions.
    pub(super) fn on(
        &mut self,
        functions: Vec<String>,
        interval_ns: Option<u64>,
        buffer_kb: Option<u32>,
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
        let fresh = self.trace.is_none();
        if fresh {
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
            self.trace = Some(Trace::begin(&dir, meta, &guest, &self.watch, ram)?);
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
                return Err(error);
            }
        };
        self.wanted = Some(functions);
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
        trace.switched(turn)?;
        Ok(reply)
    }

    /// Ends the trace: stop recording, read what is left, tracer nop, close.
    pub(super) fn off(
        &mut self,
        end: EndReason,
        progress: &dyn Fn(String),
    ) -> Result<Reply, Refusal> {
        if self.trace.is_none() {
            anyhow::bail!("no trace is on; 'xftrace on FUNCTION..' begins one");
        }
        self.wanted = None;
        let guest_is_there = self.watch.guest.is_some() && self.alive().is_ok();
        if guest_is_there {
            self.command(&Command::Stop, &[], progress)?;
            self.drain_rest()?;
            match self.command(&Command::Off, &[], progress) {
                Ok(turn) => {
                    if let Some(trace) = &mut self.trace {
                        trace.switched(turn)?;
                    }
                }
                // Nothing is recorded any more: the session is complete.
                Err(error) => progress(format!("the guest's tracer is not nop again: {error:#}")),
            }
        } else {
            progress("the guest's kernel does not answer; ending the session without it".into());
        }
        progress("writing the call flow".to_owned());
        let Some(trace) = self.trace.take() else {
            anyhow::bail!("the session was ended");
        };
        let counters = trace.writer.meta.counters;
        let dir = trace.close(end, &self.watch)?;
        let unwritten = write_graph(&dir);
        self.last_session = Some(dir.clone());
        Ok(Reply::Off {
            graph: dir.join(GRAPH_FILE),
            session: dir,
            unwritten,
            counters,
        })
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
