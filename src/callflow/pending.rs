//! Events on their way out, in order, of which some wait to be settled.
//!
//! Whether a call is a leaf shows only with the next record of its CPU, while
//! records of other CPUs come in between. Their events wait behind it, so that
//! the order of times is kept, but never more than a fixed number of them: a
//! call whose CPU stays silent for longer is settled as one that is not a leaf.

use std::collections::VecDeque;

use super::event::{Event, Happening, Spent};

/// The queue of events.
#[derive(Debug)]
pub(super) struct Pending<'n> {
    queue: VecDeque<(Event<'n>, bool)>,
    /// The number of the event at the front.
    front: u64,
    limit: usize,
}

impl<'n> Pending<'n> {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            queue: VecDeque::new(),
            front: 0,
            limit,
        }
    }

    /// Adds an event that is as it is.
    pub(super) fn push(&mut self, event: Event<'n>) {
        self.queue.push_back((event, false));
    }

    /// Adds an `Open` that may become a leaf, and returns its number.
    pub(super) fn push_waiting(&mut self, event: Event<'n>) -> u64 {
        self.queue.push_back((event, true));
        self.front + self.queue.len() as u64 - 1
    }

    fn waiting(&mut self, number: u64) -> Option<&mut (Event<'n>, bool)> {
        let at = usize::try_from(number.checked_sub(self.front)?).ok()?;
        self.queue.get_mut(at).filter(|(_, waiting)| *waiting)
    }

    /// The event of this number is not a leaf.
    pub(super) fn settle(&mut self, number: u64) {
        if let Some((_, waiting)) = self.waiting(number) {
            *waiting = false;
        }
    }

    /// The event of this number is a leaf; false if that comes too late.
    pub(super) fn settle_as_leaf(&mut self, number: u64, spent: Spent) -> bool {
        let Some((event, waiting)) = self.waiting(number) else {
            return false;
        };
        *waiting = false;
        if let Happening::Open(call) = event.what {
            event.what = Happening::Leaf(call, spent);
        }
        true
    }

    /// No event that is here now is a leaf, unless it is known to be one.
    pub(super) fn settle_all(&mut self) {
        for (_, waiting) in &mut self.queue {
            *waiting = false;
        }
    }

    /// How many events there are.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.queue.len()
    }

    /// The next event that is settled.
    pub(super) fn pop(&mut self) -> Option<Event<'n>> {
        let &(_, waiting) = self.queue.front()?;
        if waiting && self.queue.len() <= self.limit {
            return None;
        }
        self.front += 1;
        self.queue.pop_front().map(|(event, _)| event)
    }
}
