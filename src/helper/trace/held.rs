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

/// What is held at most, bytes of memory: what comes on top is taken as it is.
const LIMIT: usize = 64 << 20;
/// What is taken at once, at most: nothing is read meanwhile.
const TURN: usize = 1 << 20;
/// What a chunk takes besides its bytes: a guest may make as many as it has bytes.
const CHUNK: usize = std::mem::size_of::<Read>() + 64;

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
    /// What they take.
    size: usize,
    /// When the kernel was seen to live last.
    alive: Option<Instant>,
}

impl Read {
    fn size(&self) -> usize {
        CHUNK + self.chunk.bytes.len()
    }
}

impl Held {
    /// Holds what was read up to now.
    pub(super) fn push(&mut self, chunks: Vec<Chunk>) {
        let (at, wall_ns) = (Instant::now(), wall_ns());
        for chunk in chunks {
            let read = Read { chunk, at, wall_ns };
            self.size += read.size();
            self.reads.push_back(read);
        }
    }

    /// The oldest, if it was read before the kernel was `alive`, or there are too many.
    fn good(&mut self, alive: Instant) -> Option<Read> {
        let is_good = |read: &Read| read.at <= alive || self.size > LIMIT;
        let is_good = self.reads.front().is_some_and(is_good);
        is_good.then(|| self.oldest())?
    }

    fn oldest(&mut self) -> Option<Read> {
        let read = self.reads.pop_front()?;
        self.size -= read.size();
        Some(read)
    }
}

impl Trace {
    /// Takes what was read before the kernel was seen `alive`, or a part of it.
    pub(super) fn take_good(&mut self, alive: Instant) {
        self.held.alive = Some(alive);
        let mut taken = 0;
        // Never more than can be held, however much comes.
        while taken < TURN || self.held.size > LIMIT {
            let Some(read) = self.held.good(alive) else {
                break;
            };
            taken += read.size();
            self.take(&read);
        }
    }

    /// Takes all: the guest is gone for good, or the trace ends.
    pub(super) fn take_all(&mut self) {
        while let Some(read) = self.held.oldest() {
            self.take(&read);
        }
    }

    /// Takes what is good, and what is whole: the guest was reset. Of each CPU, that ends
    /// with the first chunk that is not what its kernel writes. A kernel without the patch has no keys
    /// to tell that by: there it ends also with the first that does not follow what came
    /// before it.
    pub(super) fn take_whole(&mut self) {
        let mut spoilt = HashSet::new();
        let alive = self.held.alive;
        while let Some(read) = self.held.oldest() {
            let is_good = Some(read.at) <= alive;
            if is_good || (!spoilt.contains(&read.chunk.cpu) && self.is_whole(&read.chunk)) {
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
        let has_keys = self.keys.thread().is_some();
        let mut whole = has_keys || chunk.gap.is_none();
        let mut decoder = live.decoder.clone();
        self.keys.with_history(|history| {
            decoder.chunk(chunk, history, &code, &mut |item| {
                whole &= match item.what {
                    What::Forged(_) => false,
                    What::Lost(_) => has_keys,
                    _ => true,
                };
            });
        });
        whole
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::fake::Setting;
    use super::super::super::protocol::Reply;
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
        assert_eq!(held.size, CHUNK + 3);
    }

    #[test]
    fn more_than_can_be_held_is_taken() {
        let mut held = Held::default();
        let before = Instant::now();
        for _ in 0..8 {
            held.push(vec![chunk(LIMIT / 8)]);
        }
        assert!(held.good(before).is_some());
        assert!(held.good(before).is_none());
        // However little is on each page.
        let mut held = Held::default();
        held.push((0..LIMIT / CHUNK).map(|_| chunk(1)).collect());
        assert!(held.good(before).is_some());
    }

    /// A record of a call as the guest makes it, with the key of `epoch`.
    fn record(key: u64, epoch: u64, seq: u32, function: u64) -> Vec<u8> {
        let mut record = 21u16.to_le_bytes().to_vec();
        record.extend([0, 0]);
        record.extend(77i32.to_le_bytes());
        record.extend((function ^ key).to_le_bytes());
        record.extend((function ^ key).to_le_bytes());
        record.extend((epoch as u32).to_le_bytes());
        record.extend(seq.to_le_bytes());
        record.extend(1i32.to_le_bytes());
        record.extend(77i32.to_le_bytes());
        let head = (record.len() as u32 / 4) | (1 << 5);
        [&head.to_le_bytes()[..], &record].concat()
    }

    #[test]
    fn of_what_a_reset_left_the_whole_part_is_taken() {
        let mut setting = Setting::new();
        assert!(matches!(setting.on(), Reply::On { .. }));
        let trace = setting.engine.trace.as_mut().expect("a trace");
        let (epoch, key) = trace.keys.with_history(|history| {
            let epoch = history.last_epoch();
            (epoch, history.key(epoch).expect("a key"))
        });
        let guest = &trace.live.as_ref().expect("a guest").guest;
        let function = guest.symbols.address("vfs_read").expect("a symbol");
        let function = function.0.wrapping_add(guest.kernel.slide);
        let read = |cpu, page_time, seq, function| Chunk {
            cpu,
            page_time,
            bytes: record(key, epoch, seq, function),
            ..chunk(0)
        };
        let torn = Chunk {
            gap: Some(crate::ring::Gap::Torn),
            ..read(2, 5, 0, function)
        };
        trace.held.push(vec![
            read(0, 5, 0, function),
            // Written over by whatever runs now.
            read(0, 6, 1, function + 1),
            read(1, 5, 0, function),
            // Good, and behind what is not.
            read(0, 7, 1, function),
            // What is missing before these is told, and their keys are good.
            read(1, 6, 7, function),
            torn,
        ]);
        trace.guest_gone();
        let counters = trace.writer.meta.counters;
        assert_eq!((counters.records, counters.forged), (4, 0));
        assert_eq!((counters.lost, counters.after_reset_bytes), (6, 2 * 44));
        assert!(trace.held.reads.is_empty());
    }
}
