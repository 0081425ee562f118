//! What was read, until the guest's kernel is seen to have lived after that.
//!
//! After a reset, memory is written to by firmware and by the next kernel, and what is
//! read meanwhile in the places of the last one's ring is nobody's record. That it was
//! reset is known only some time later. What tells that a chunk was read before is a heart
//! that beat after it.

use std::collections::{HashSet, VecDeque};
use std::time::Instant;

use crate::ring::record::What;
use crate::ring::Chunk;
use crate::session::GuestCode;

use super::super::watch::wall_ns;
use super::Trace;

/// What is held at most, bytes: what comes on top is taken as it is.
const LIMIT: usize = 64 << 20;

/// A chunk, and when it was read.
pub(super) struct Read {
    pub(super) chunk: Chunk,
    at: Instant,
    /// The same by the host's wall clock, nanoseconds since 1970.
    pub(super) wall_ns: u64,
}

/// Chunks in the order in which they were read.
#[derive(Default)]
pub(super) struct Held {
    reads: VecDeque<Read>,
    bytes: usize,
}

impl Held {
    /// Holds what was read up to now.
    pub(super) fn push(&mut self, chunks: Vec<Chunk>) {
        let (at, wall_ns) = (Instant::now(), wall_ns());
        for chunk in chunks {
            self.bytes += chunk.bytes.len();
            self.reads.push_back(Read { chunk, at, wall_ns });
        }
    }

    /// The oldest, if it was read before the kernel was `alive`, or there are too many.
    fn good(&mut self, alive: Instant) -> Option<Read> {
        let is_good = |read: &Read| read.at <= alive || self.bytes > LIMIT;
        self.reads
            .front()
            .is_some_and(is_good)
            .then(|| self.any())?
    }

    fn any(&mut self) -> Option<Read> {
        let read = self.reads.pop_front()?;
        self.bytes -= read.chunk.bytes.len();
        Some(read)
    }
}

impl Trace {
    /// Takes what was read before the kernel was seen `alive`.
    pub(super) fn take_good(&mut self, alive: Instant) {
        while let Some(read) = self.held.good(alive) {
            self.take(&read);
        }
    }

    /// Takes all: the guest is gone for good, or the trace ends.
    pub(super) fn take_all(&mut self) {
        while let Some(read) = self.held.any() {
            self.take(&read);
        }
    }

    /// Takes what is whole: the guest was reset. Of each CPU, that ends with the first
    /// chunk that is not what a kernel writes, or does not follow what came before it.
    pub(super) fn take_whole(&mut self) {
        let mut spoilt = HashSet::new();
        while let Some(read) = self.held.any() {
            if !spoilt.contains(&read.chunk.cpu) && self.is_whole(&read.chunk) {
                self.take(&read);
            } else {
                spoilt.insert(read.chunk.cpu);
                let counters = &mut self.writer.meta.counters;
                counters.after_reset_bytes += read.chunk.bytes.len() as u64;
            }
        }
    }

    fn is_whole(&self, chunk: &Chunk) -> bool {
        let Some(live) = &self.live else {
            return false;
        };
        let code = GuestCode {
            symbols: &live.guest.symbols,
            slide: live.guest.kernel.slide,
        };
        let mut whole = chunk.gap.is_none();
        let mut decoder = live.decoder.clone();
        self.keys.with_history(|history| {
            decoder.chunk(chunk, history, &code, &mut |item| {
                whole &= !matches!(item.what, What::Forged(_) | What::Lost(_));
            });
        });
        whole
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn chunk(length: usize) -> Chunk {
        Chunk {
            cpu: 0,
            page_time: 0,
            offset: 0,
            bytes: vec![0; length],
            gap: None,
        }
    }

    #[test]
    fn what_was_read_after_the_last_beat_waits_for_the_next_one() {
        let mut held = Held::default();
        let before = Instant::now();
        std::thread::sleep(Duration::from_millis(2));
        held.push(vec![chunk(1), chunk(2)]);
        assert!(held.good(before).is_none());
        let beat = Instant::now();
        std::thread::sleep(Duration::from_millis(2));
        held.push(vec![chunk(3)]);
        let mut lengths = || held.good(beat).map(|read| read.chunk.bytes.len());
        assert_eq!([lengths(), lengths(), lengths()], [Some(1), Some(2), None]);
        assert_eq!(held.bytes, 3);
    }

    #[test]
    fn more_than_can_be_held_is_taken() {
        let mut held = Held::default();
        let before = Instant::now();
        for _ in 0..9 {
            held.push(vec![chunk(LIMIT / 8)]);
        }
        assert!(held.good(before).is_some());
        assert!(held.good(before).is_none());
    }
}
