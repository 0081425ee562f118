//! From a session that grows to its call flow, as it happens.

use std::cell::RefCell;
use std::io::{self, Write};
use std::time::{Duration, Instant};

use crate::callflow::{Flow, Kernels, Limits};
use crate::output::{Heading, Json, Sink, Text, TimeColumn, WallClock};
use crate::session::{Boot, Follow, Look, ModulesReader, Session, SessionError};

/// How often the session is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// What a trace that is followed is written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LiveFormat {
    /// As `trace_graph.txt`, without its head, whose totals nobody knows yet.
    Text(TimeColumn),
    /// JSON lines.
    Json,
}

/// What whoever waits for more wants next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// What comes.
    More,
    /// What is there, and no more: nobody writes the session now.
    Rest,
    /// Nothing.
    Stop,
}

/// Why a trace cannot be followed further.
#[derive(Debug, thiserror::Error)]
pub enum FollowError {
    /// A file of the session.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The output could not be written.
    #[error("cannot write the call flow")]
    Write(#[from] io::Error),
}

/// The clocks of a session's boots, as they become known.
#[derive(Debug)]
struct Clocks(RefCell<Vec<Boot>>);

impl WallClock for Clocks {
    fn wall(&self, boot: u32, guest: u64) -> Option<u64> {
        let boots = self.0.borrow();
        let known = boots.iter().find(|known| known.number == boot)?;
        known.wall_ns(guest)
    }
}

/// Writes the call flow of `session` to `out` as it grows, from its beginning
/// until it is closed. Between two looks at it `wait` is called, with the time
/// that it may take; where there is nothing more to be written now, `out` was
/// flushed before.
///
/// # Errors
/// If a file of the session cannot be read, or `out` cannot be written.
pub fn follow(
    session: &Session,
    format: LiveFormat,
    mut out: impl Write,
    mut wait: impl FnMut(Duration) -> Next,
) -> Result<(), FollowError> {
    let clocks = Clocks(RefCell::new(session.meta.boots.clone()));
    let kernels = Kernels::default();
    for boot in &session.meta.boots {
        kernels.add(boot.number, session.symbols(boot)?, boot.slide);
    }
    let mut modules = ModulesReader::new(session.dir());
    let mut flow = Flow::new(&kernels, Limits::default());
    let mut follow = Follow::new(session)?;
    let last_cpu = session.meta.boots.last().map_or(0, |boot| boot.nr_cpus);
    let last_cpu = u16::try_from(last_cpu.saturating_sub(1)).unwrap_or(u16::MAX);
    let mut sink: Box<dyn Sink + '_> = match format {
        LiveFormat::Text(time) => Box::new(Text::live(&mut out, &clocks, last_cpu, time)?),
        LiveFormat::Json => Box::new(Json::new(&mut out, &clocks, &Heading::of(session))?),
    };
    // Whether, since the last pause, items came and events were shown; and for
    // how many pauses items came and none of them could be shown.
    let (mut came, mut shown, mut stalled) = (false, false, 0);
    let mut left = false;
    loop {
        learn(&follow.refresh()?.boots, session, &kernels, &clocks)?;
        modules.read_on(kernels.modules())?;
        let mut written = Ok(());
        let look = follow.look(Instant::now(), &mut |item| {
            came = true;
            flow.push(&item);
            while let (true, Some(event)) = (written.is_ok(), flow.pop()) {
                shown = true;
                written = sink.event(&event);
            }
        })?;
        written?;
        let pause = match look {
            Look::More => Duration::ZERO,
            Look::Ended => break,
            Look::Waiting => {
                let quiet = !std::mem::take(&mut came);
                stalled = if std::mem::take(&mut shown) {
                    0
                } else {
                    stalled + 1
                };
                if stalled > 1 || quiet && stalled > 0 {
                    // Whether a call is a leaf cannot be waited for: its CPU
                    // may say nothing for hours, and holds the others back.
                    stalled = 0;
                    flow.settle();
                    show(&mut flow, &mut *sink)?;
                }
                sink.flush()?;
                LOOK_EVERY
            }
        };
        match wait(pause) {
            Next::More => {}
            Next::Rest => {
                left = true;
                follow.leave();
            }
            Next::Stop => return Ok(sink.flush()?),
        }
    }
    if left {
        // The trace has not ended, so no call of it was cut by that.
        flow.settle();
        show(&mut flow, &mut *sink)?;
        return Ok(sink.flush()?);
    }
    flow.finish();
    show(&mut flow, &mut *sink)?;
    let tally = flow.tally();
    Ok(sink.finish(&tally)?)
}

/// Writes the events that can be told.
fn show<'n>(flow: &mut Flow<'n, Kernels<'_>>, sink: &mut dyn Sink) -> io::Result<()> {
    while let Some(event) = flow.pop() {
        sink.event(&event)?;
    }
    Ok(())
}

/// Takes note of boots that are new, and of clocks that are better known.
fn learn<'a>(
    boots: &[Boot],
    session: &'a Session,
    kernels: &Kernels<'a>,
    clocks: &Clocks,
) -> Result<(), SessionError> {
    let mut known = clocks.0.borrow_mut();
    for boot in boots.iter().skip(known.len()) {
        kernels.add(boot.number, session.symbols(boot)?, boot.slide);
    }
    boots.clone_into(&mut known);
    Ok(())
}
