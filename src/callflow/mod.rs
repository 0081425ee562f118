//! Log_Maker: from what the ring buffers yielded to who called what.
//!
//! The reader gives one stream of [`Item`]s, merged
//! over the CPUs by time. [`Flow`] takes them one by one, keeps a stack of open
//! calls for each task, resolves addresses through [`Names`], and tells the
//! call flow as a stream of [`Event`]s, in the order of time: calls, leaf
//! calls, returns, task switches, interrupts, and everything that does not
//! fit, each in its place. [`Tally`] is what they add up to; [`Edges`]
//! counts pairs of caller and callee. What an event looks like on paper is
//! decided in [`output`](crate::output).
//!
//! A stack belongs to a task, not to a CPU: a call opened on one CPU may be
//! closed on another. Only the idle tasks, which share pid 0, have one a CPU.
//!
//! **Nothing is lost in silence.** Each call is told of once, and ended once:
//! closed by a return, or cut, for a reason that is told. Each return ends a
//! call or is told of as one that found none. A loss of records does not empty
//! the stacks: the next record of each task says by its depth what is still
//! open, and whatever then does not fit is put down to the loss.
//!
//! **Items are hostile.** A pid is any number, a depth any number, times run
//! backwards, and the function that returns is not the one that was called.
//! None of it can panic or take memory beyond what [`Limits`] allows: the stack
//! of the least used task gives way to a new one, and that is counted. This
//! room never reads guest memory, keeps no item, and never collects a trace:
//! it uses `ring::record` for its input, `kernel` for names, and `session` for
//! nothing but to find these two and what the guest says of its modules.

mod edges;
mod event;
mod flow;
mod irq;
mod kernels;
mod names;
mod pending;
mod tally;
mod tasks;

pub use edges::{Edge, Edges};
pub use event::{
    Closed, Cut, CutWhy, Event, Fit, Happening, Loss, Opened, Origin, Spent, UncalledWhy,
};
pub use flow::Flow;
pub use kernels::Kernels;
pub use names::{Kind, Name, Names, Place};
pub use tally::{Counts, Epochs, Reason, RootCount, Tally};

use crate::ring::record::Item;

/// What a [`Flow`] may keep. The defaults come to about 150 MiB if a hostile
/// guest uses up all of it, and to a few hundred KiB for an ordinary one.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Tasks whose stacks are kept.
    pub tasks: usize,
    /// Open calls that are kept for each: at least as many as any kernel keeps,
    /// which is 50 up to Linux 6.10 and fewer than 128 later.
    pub depth: u16,
    /// Events that may wait until it shows whether a call is a leaf.
    pub pending: usize,
    /// Pairs of function and pid for which roots are counted.
    pub roots: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            tasks: 8_192,
            depth: 128,
            pending: 4_096,
            roots: 65_536,
        }
    }
}

/// The events of a trace whose items are all there. An item that could not be
/// read gives its error in its place; the others go on.
pub fn events<'n, N, I, E>(items: I, names: &'n N, limits: Limits) -> Events<'n, N, I::IntoIter>
where
    N: Names + ?Sized,
    I: IntoIterator<Item = Result<Item, E>>,
{
    Events {
        items: items.into_iter(),
        flow: Flow::new(names, limits),
        finished: false,
    }
}

/// What [`events`] gives.
pub struct Events<'n, N: ?Sized, I> {
    items: I,
    flow: Flow<'n, N>,
    finished: bool,
}

impl<'n, N: Names + ?Sized, I> Events<'n, N, I> {
    /// What the items taken so far add up to.
    pub fn tally(&mut self) -> Tally {
        self.flow.tally()
    }
}

impl<'n, N, I, E> Iterator for Events<'n, N, I>
where
    N: Names + ?Sized,
    I: Iterator<Item = Result<Item, E>>,
{
    type Item = Result<Event<'n>, E>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(event) = self.flow.pop() {
                return Some(Ok(event));
            }
            if self.finished {
                return None;
            }
            match self.items.next() {
                Some(Ok(item)) => self.flow.push(&item),
                Some(Err(error)) => return Some(Err(error)),
                None => {
                    self.finished = true;
                    self.flow.finish();
                }
            }
        }
    }
}
