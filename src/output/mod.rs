//! What a call flow looks like in a file: `trace_graph.txt` in the layout of
//! function_graph, JSON lines, and folded stacks.
//!
//! Each format is a [`Sink`] for the events of
//! [`callflow`](crate::callflow): it is handed one at a time and keeps none,
//! so that a trace of any length takes the same memory. (Folded stacks are
//! sums; the number of different ones is bounded.)
//!
//! **Two passes.** The head of `trace_graph.txt` tells the totals, which are
//! known only at the end. [`Format::write`] therefore goes over the items twice: once
//! only to count, then to write. The records of a session lie on disk and do
//! not change, so both passes see the same. The other way, a body in a
//! temporary file that is copied behind the head, needs twice the space on a
//! disk that may be full just then (that is one of the losses to be told of),
//! and a place to put it when the output is a pipe; the first pass costs less
//! than the second, since it formats nothing.
//!
//! **What comes from the guest is escaped**: task names, kernel banners, and
//! symbols, for a symbol file can be a guest's. No byte of it reaches the output
//! as a control character, and its width is bounded.
//!
//! This room writes to the `Write` it is given; it opens no file, and takes from
//! a [`Session`] only what a [`Heading`] holds, its clocks and its items.

mod escape;
mod folded;
mod heading;
mod json;
mod text;
mod wall;

use std::io::{self, Write};

pub use folded::{Folded, Weight};
pub use heading::{BootHeading, Heading};
pub use json::Json;
pub use text::{Text, TimeColumn};
pub use wall::WallClock;

use crate::callflow::{events, Event, Kernels, Limits, Names, Tally};
use crate::ring::record::Item;
use crate::session::{Session, SessionError};

/// A format that events are written in.
pub trait Sink {
    /// Writes the next event.
    fn event(&mut self, event: &Event<'_>) -> io::Result<()>;

    /// Whether it takes another event. Where it does not, the trace is longer than
    /// what is written of it.
    fn takes_more(&mut self) -> io::Result<bool> {
        Ok(true)
    }

    /// Flushes what can be written so far, for those who watch.
    fn flush(&mut self) -> io::Result<()>;

    /// Writes what comes last, and flushes. `tally` is what all events add up to.
    fn finish(&mut self, tally: &Tally) -> io::Result<()>;
}

/// The formats that a trace is written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `trace_graph.txt`.
    Text(TimeColumn),
    /// JSON lines.
    Json,
    /// Folded stacks.
    Folded {
        /// What is added up.
        weight: Weight,
        /// Whether tasks of one name are told apart.
        by_pid: bool,
    },
}

/// Why a trace could not be written.
#[derive(Debug, thiserror::Error)]
pub enum ReportError<E: std::error::Error + 'static> {
    /// Its items could not be read.
    #[error(transparent)]
    Read(E),
    /// The output could not be written.
    #[error("cannot write the call flow")]
    Write(#[from] io::Error),
}

impl Format {
    /// Writes a session in this format to `out`, which should be buffered.
    /// Returns what it adds up to.
    ///
    /// # Errors
    /// If the session's records cannot be read, or `out` does not take it.
    pub fn session(
        self,
        session: &Session,
        out: impl Write,
    ) -> Result<Tally, ReportError<SessionError>> {
        let names = Kernels::of(session).map_err(ReportError::Read)?;
        self.write(out, &Heading::of(session), session, &names, || {
            session.items()
        })
    }

    /// Writes a session's `trace_graph.txt` to `out`, which should be buffered: at most
    /// `limit` bytes of calls, a line more, and one that says so where these are not
    /// all. Returns whether they are.
    ///
    /// # Errors
    /// Like [`Format::session`].
    pub fn graph(
        session: &Session,
        out: impl Write,
        limit: u64,
    ) -> Result<bool, ReportError<SessionError>> {
        let names = Kernels::of(session).map_err(ReportError::Read)?;
        let (heading, time) = (Heading::of(session), TimeColumn::Wall);
        let items = || session.items();
        let (_, whole) = text(out, &heading, session, &names, items, time, limit)?;
        Ok(whole)
    }

    /// Writes a whole trace to `out`, which should be buffered. `items` gives
    /// the trace's items from their beginning, each time it is called, merged
    /// over CPUs by time. Returns what they add up to.
    ///
    /// # Errors
    /// The first that `items` gives, or if `out` does not take it.
    pub fn write<N, I, E>(
        self,
        out: impl Write,
        heading: &Heading,
        clock: &impl WallClock,
        names: &N,
        mut items: impl FnMut() -> I,
    ) -> Result<Tally, ReportError<E>>
    where
        N: Names + ?Sized,
        I: IntoIterator<Item = Result<Item, E>>,
        E: std::error::Error + 'static,
    {
        match self {
            Self::Text(time) => {
                let (tally, _) = text(out, heading, clock, names, items, time, u64::MAX)?;
                Ok(tally)
            }
            Self::Json => pass(&mut Json::new(out, clock, heading)?, items(), names),
            Self::Folded { weight, by_pid } => {
                pass(&mut Folded::new(out, weight, by_pid), items(), names)
            }
        }
    }
}

/// Both passes of the text format: what all items add up to, and whether all calls were
/// written that they give.
fn text<N, I, E>(
    out: impl Write,
    heading: &Heading,
    clock: &impl WallClock,
    names: &N,
    mut items: impl FnMut() -> I,
    time: TimeColumn,
    limit: u64,
) -> Result<(Tally, bool), ReportError<E>>
where
    N: Names + ?Sized,
    I: IntoIterator<Item = Result<Item, E>>,
    E: std::error::Error + 'static,
{
    let tally = pass(&mut Nowhere, items(), names)?;
    let mut text = Text::new(out, clock, heading, &tally, time)?.up_to(limit);
    pass(&mut text, items(), names)?;
    Ok((tally, text.is_whole()))
}

/// The sink of the pass that only counts.
struct Nowhere;

impl Sink for Nowhere {
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn event(&mut self, _: &Event<'_>) -> io::Result<()> {
        Ok(())
    }

    fn finish(&mut self, _: &Tally) -> io::Result<()> {
        Ok(())
    }
}

fn pass<N, E>(
    sink: &mut impl Sink,
    items: impl IntoIterator<Item = Result<Item, E>>,
    names: &N,
) -> Result<Tally, ReportError<E>>
where
    N: Names + ?Sized,
    E: std::error::Error + 'static,
{
    let mut events = events(items, names, Limits::default());
    for event in events.by_ref() {
        let event = event.map_err(ReportError::Read)?;
        if !sink.takes_more()? {
            break;
        }
        sink.event(&event)?;
    }
    let tally = events.tally();
    sink.finish(&tally)?;
    Ok(tally)
}
