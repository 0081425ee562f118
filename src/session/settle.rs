//! Puts the items of several CPUs in the order of their times while more come.
//!
//! Of items that are all there, the oldest of all is the next one. While more
//! come, a CPU that has none now may have one at any moment, older than those
//! that other CPUs already have. Nobody can wait for the slowest CPU: one without
//! work records nothing for hours.
//!
//! So items wait for a time of the host's. What the guest records has come at
//! most [`SETTLE`] later than what other CPUs recorded then (the helper drains every few
//! milliseconds, and holds what it read of all CPUs alike; the trace clocks of a guest's
//! CPUs differ by less than the rest). At each look the newest
//! guest time that was seen is noted, with the moment of the look; an item goes
//! when it is not newer than what was noted `SETTLE` ago, for by then what is
//! older had come from every CPU. No clock of the guest is compared with the
//! host's. Should a CPU's items be later than that all the same (a host out of
//! breath), they come late, and nothing is lost. Nor can a guest that makes times
//! up hold anything back: what it claims is the newest time too, and settles as
//! any other. Each CPU's items stay in their order, whatever their times say.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::time::{Duration, Instant};

use crate::ring::record::Item;

/// How long after it was recorded a record has come at the latest.
pub const SETTLE: Duration = Duration::from_millis(250);

/// The items of one boot that have come and not gone yet.
#[derive(Debug, Default)]
pub(crate) struct Settling {
    /// By CPU.
    queues: BTreeMap<u16, Queue>,
    /// (time, CPU) of the first item of each queue that has one.
    heads: BinaryHeap<Reverse<(u64, u16)>>,
    held: usize,
    /// The newest guest time.
    newest: Option<u64>,
    /// When which guest time was the newest, oldest first.
    marks: VecDeque<(Instant, u64)>,
    /// Not newer than this may go.
    settled: Option<u64>,
}

/// The items of one CPU.
#[derive(Debug, Default)]
struct Queue {
    items: VecDeque<Item>,
    /// There is more of this CPU than was pushed.
    more: bool,
}

impl Settling {
    /// How many items are held.
    pub(crate) fn held(&self) -> usize {
        self.held
    }

    /// How many items of this CPU are held.
    pub(crate) fn held_of(&self, cpu: u16) -> usize {
        self.queues.get(&cpu).map_or(0, |queue| queue.items.len())
    }

    /// The next item of its CPU.
    pub(crate) fn push(&mut self, item: Item) {
        let queue = self.queues.entry(item.cpu).or_default();
        if queue.items.is_empty() {
            self.heads.push(Reverse((item.time, item.cpu)));
        }
        self.newest = self.newest.max(Some(item.time));
        self.held += 1;
        queue.items.push_back(item);
    }

    /// Whether there is more of this CPU than was pushed: what is newer than the
    /// last of it that is held then waits for what comes next.
    pub(crate) fn expect_more(&mut self, cpu: u16, more: bool) {
        self.queues.entry(cpu).or_default().more = more;
    }

    /// Notes how far things are, and what has settled.
    pub(crate) fn mark(&mut self, now: Instant) {
        let noted = self.marks.back().map(|&(_, newest)| newest);
        if let Some(newest) = self.newest.filter(|_| self.newest > noted.or(self.settled)) {
            self.marks.push_back((now, newest));
        }
        while let Some(&(when, newest)) = self.marks.front() {
            if now.saturating_duration_since(when) < SETTLE {
                break;
            }
            self.settled = Some(newest);
            self.marks.pop_front();
        }
    }

    /// Gives what has settled; with `complete`, where no more will come, all that
    /// is known to be in order. Returns how many went.
    pub(crate) fn give(&mut self, complete: bool, give: &mut impl FnMut(Item)) -> usize {
        let before = self.held;
        while let Some(&Reverse((time, cpu))) = self.heads.peek() {
            if !complete && Some(time) > self.settled {
                break;
            }
            self.heads.pop();
            let Some(queue) = self.queues.get_mut(&cpu) else {
                continue;
            };
            if let Some(item) = queue.items.pop_front() {
                self.held -= 1;
                give(item);
            }
            match queue.items.front() {
                Some(next) => self.heads.push(Reverse((next.time, cpu))),
                // What comes next of this CPU may be the next of all.
                None if queue.more => break,
                None => {}
            }
        }
        before - self.held
    }
}
