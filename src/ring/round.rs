//! Reads each CPU's pages while the guest writes them.
//!
//! What makes this safe without a lock is the order in which the guest's
//! kernel writes (kernel/trace/ring_buffer.c, and x86 keeps that order): a
//! page that is taken for new records first has its `commit` set to 0
//! (rb_tail_page_update()), then gets its new `time_stamp`, and `commit` only
//! grows once the records below it are whole (rb_set_commit_to_write()). So a
//! copy of the bytes below `commit` is good if, after the copy, `time_stamp`
//! is what it was before and `commit` did not shrink. And a page on which
//! nothing more will be written is known by the commit page being another.
//!
//! Pages come in the order of the guest's ring, which ends at the commit page.
//! Their time stamps alone would not do: where the guest's clock is not steady
//! (emulation, an unstable TSC), sched_clock_local() holds it at the end of a
//! tick until the next one comes, and many pages have the same time. So what
//! was read last is known again by its page, its time, and what was read of it (its last
//! bytes would not do: padding is what it was before the page was taken); and which pages the guest takes
//! meanwhile is known by how far its commit page has come (`taken`).
//!
//! The buffer itself may be another than before: a snapshot in the guest swaps
//! it for a spare one (update_max_tr()). The old one is then read to its end,
//! and known again where it comes back.
//!
//! What a guest can have its host do is bounded: no page is read for two CPUs,
//! and a round ends after so many bytes and so long, wherever it is.

use std::time::{Duration, Instant};

use crate::kernel::Gva;
use crate::ram::{Gpa, RamError};

use super::pages::{Claims, Pages};
use super::reader::{Buffer, Cpu, Cursor, Place};
use super::structs::{Head, Structs};
use super::taken::Taken;
use super::{Chunk, Drained, Gap, RingError, TRIES};

/// What one round hands out and takes at most, over all CPUs; it may go past
/// this by one CPU's list of pages. The next round goes on with the next CPU.
const ROUND_BYTES: u64 = 32 << 20;
const ROUND_TIME: Duration = Duration::from_millis(200);
/// How many buffers of one CPU are known again: its own, and those that it was
/// swapped for.
const BUFFERS: usize = 4;

/// How much of what was read of a page tells it from the same page of another round of
/// the ring: all of it, where a sub-buffer is a page of memory.
const KNOWN: usize = 4096;

/// One round over the CPUs.
pub(super) struct Round<'a> {
    structs: Structs<'a>,
    /// The pointers to the CPUs' buffers.
    buffers: Gva,
    since: u64,
    claims: &'a mut Claims,
    sink: &'a mut dyn FnMut(Chunk),
    drained: Drained,
    until: Instant,
}

/// The pages of a CPU that may have something new.
struct Fresh {
    /// Oldest first.
    pages: Vec<Seen>,
    /// Whether they go on where reading stopped.
    whole: bool,
    /// Which of them the guest takes meanwhile.
    taken: Taken,
}

/// A page as it looked.
#[derive(Clone, Copy)]
struct Seen {
    /// Its place in the ring; none for the one outside.
    place: Option<usize>,
    data: Gpa,
    head: Head,
}

/// The buffer of which a page is read.
#[derive(Clone, Copy)]
struct Of<'a> {
    cpu: u16,
    at: Gva,
    pages: &'a Pages,
}

impl<'a> Round<'a> {
    /// Begins a round, for pages that are not older than `since`.
    ///
    /// # Errors
    /// If there is no ring buffer where it should be.
    pub(super) fn begin(
        structs: Structs<'a>,
        since: u64,
        claims: &'a mut Claims,
        sink: &'a mut dyn FnMut(Chunk),
    ) -> Result<Self, RingError> {
        let layout = structs.layout;
        Ok(Self {
            structs,
            buffers: structs.pointer(layout.buffer, layout.buffers)?,
            since,
            claims,
            sink,
            drained: Drained::default(),
            until: Instant::now() + ROUND_TIME,
        })
    }

    /// Whether it has taken all that it may.
    pub(super) fn is_over(&mut self) -> bool {
        self.drained.cut |= self.drained.bytes >= ROUND_BYTES || Instant::now() >= self.until;
        self.drained.cut
    }

    /// What it came to.
    pub(super) fn end(self) -> Drained {
        self.drained
    }

    /// One CPU's turn.
    ///
    /// # Errors
    /// If guest memory is no more. Lists that lead nowhere are counted.
    pub(super) fn cpu(&mut self, number: u16, cpu: &mut Cpu) -> Result<(), RingError> {
        let done = self.read_cpu(number, cpu);
        self.pass_over_damage(done)
    }

    fn pass_over_damage(&mut self, done: Result<(), RingError>) -> Result<(), RingError> {
        match done {
            Err(RingError::Lost { .. } | RingError::Ram(RamError::Unmapped { .. })) => {
                self.drained.damaged += 1;
                Ok(())
            }
            done => done,
        }
    }

    fn read_cpu(&mut self, number: u16, cpu: &mut Cpu) -> Result<(), RingError> {
        let slot = Gva(self.buffers.0.wrapping_add(8 * u64::from(number)));
        let now = Gva(self.structs.load(slot)?);
        if now.0 == 0 {
            return Ok(());
        }
        let last = cpu.buffers.last().map(|buffer| buffer.at);
        if last.is_some_and(|last| last != now) {
            // What the old one still has; it may be gone altogether.
            let done = self.cpu_buffer(number, cpu);
            self.pass_over_damage(done)?;
            if self.is_over() {
                return Ok(());
            }
            self.drained.swapped += 1;
            cpu.gap.get_or_insert(Gap::Overrun);
        }
        if last != Some(now) {
            let known = cpu.buffers.iter().position(|buffer| buffer.at == now);
            let buffer = match known {
                Some(known) => cpu.buffers.remove(known),
                None => Buffer {
                    at: now,
                    pages: None,
                    cursor: cpu.resumed.take(),
                },
            };
            cpu.buffers.push(buffer);
            if cpu.buffers.len() > BUFFERS {
                if let Some(pages) = cpu.buffers.remove(0).pages {
                    self.claims.release(number, pages);
                }
            }
        }
        self.cpu_buffer(number, cpu)
    }

    /// Reads the last of a CPU's buffers.
    fn cpu_buffer(&mut self, number: u16, cpu: &mut Cpu) -> Result<(), RingError> {
        let Some(buffer) = cpu.buffers.last_mut() else {
            return Ok(());
        };
        for _ in 0..TRIES {
            self.list(number, buffer)?;
            let Some(listed) = &buffer.pages else {
                return Ok(());
            };
            let fresh = self.fresh(buffer.at, listed, buffer.cursor.as_ref())?;
            if !listed.stand(self.structs, buffer.at)? {
                continue;
            }
            let Some(Fresh {
                pages,
                whole,
                mut taken,
            }) = fresh
            else {
                continue;
            };
            if !whole {
                cpu.gap.get_or_insert(Gap::Overrun);
            }
            let of = Of {
                cpu: number,
                at: buffer.at,
                pages: listed,
            };
            for seen in pages {
                if self.is_over() || taken.is_unsure() {
                    break;
                }
                self.page(of, &mut taken, &mut buffer.cursor, &mut cpu.gap, seen)?;
            }
            return Ok(());
        }
        // A guest that reads its own buffer, or writes it, that fast is tried again next
        // time.
        Ok(())
    }

    /// Brings the list of a buffer's pages up to date.
    fn list(&mut self, number: u16, buffer: &mut Buffer) -> Result<(), RingError> {
        if let Some(pages) = &buffer.pages {
            if pages.hold(self.structs, buffer.at)? {
                return Ok(());
            }
        }
        if let Some(old) = buffer.pages.take() {
            self.claims.release(number, old);
        }
        buffer.pages = Pages::list(self.structs, number, buffer.at, self.claims)?;
        Ok(())
    }

    /// What may have something new. None where the guest writes so fast that the order
    /// of its pages cannot be told.
    fn fresh(
        &self,
        buffer: Gva,
        listed: &Pages,
        cursor: Option<&Cursor>,
    ) -> Result<Option<Fresh>, RingError> {
        let (mut taken, commit_page) = Taken::begin(self.structs, buffer, listed)?;
        let ring = &listed.ring[..];
        // What the guest's own readers took out is older than what is left,
        // unless it is the page that is being written.
        let outside = Some(listed.standing.outside)
            .filter(|outside| ring.iter().all(|page| page.data != outside.data))
            .map(|outside| (None, outside));
        let reader = outside.filter(|(_, outside)| outside.holder != commit_page);
        let last = outside.filter(|(_, outside)| outside.holder == commit_page);
        let commit = ring.iter().position(|page| page.holder == commit_page);
        let first = commit.map_or(0, |at| at + 1);
        let places = (first..ring.len()).chain(0..first);
        let in_ring = places.filter_map(|place| Some((Some(place), *ring.get(place)?)));
        let mut pages = Vec::new();
        for (place, page) in reader.into_iter().chain(in_ring).chain(last) {
            let (data, head) = (page.data, self.structs.head(page.data)?);
            if head.commit > 0 {
                pages.push(Seen { place, data, head });
            }
        }
        // Pages that were taken for new records since the commit page was
        // looked up stand first, though they are the newest: next time.
        let newest = pages.last().map_or(0, |seen| seen.head.time);
        pages.retain(|seen| seen.head.time <= newest);
        let tied = pages.iter().filter(|seen| taken.asks(seen.head.time));
        if tied.count() > 1 {
            taken.look(self.structs, buffer, listed)?;
            if taken.is_unsure() {
                return Ok(None);
            }
            let is_taken = |place| taken.has(place, ring.len());
            pages.retain(|seen| !taken.asks(seen.head.time) || !seen.place.is_some_and(is_taken));
        }
        let Some(cursor) = cursor else {
            pages.retain(|seen| seen.head.time >= self.since);
            // Looked at last, for what was on these pages to be in it.
            let overrun = self.structs.pointer(buffer, self.structs.layout.overrun)?;
            return Ok(Some(Fresh {
                pages,
                whole: overrun.0 == 0,
                taken,
            }));
        };
        let mut at = None;
        for (index, seen) in pages.iter().enumerate() {
            if cursor.is_at(seen.data, seen.head) && self.is_same_place(cursor)? {
                at = Some(index);
                break;
            }
        }
        match at {
            Some(at) => drop(pages.drain(..at)),
            None => pages.retain(|seen| seen.head.time >= cursor.time),
        }
        // A ring with nothing in it was emptied: what comes next says so.
        let whole = at.is_some() || pages.is_empty();
        Ok(Some(Fresh {
            pages,
            whole,
            taken,
        }))
    }

    /// Whether what was read last is where it was.
    fn is_same_place(&self, cursor: &Cursor) -> Result<bool, RingError> {
        let Some(Place { page, bytes: known }) = &cursor.place else {
            return Ok(true);
        };
        let end = u64::from(self.structs.layout.data) + u64::from(cursor.offset);
        let mut bytes = vec![0; known.len()];
        let at = page.0 + end.saturating_sub(known.len() as u64);
        self.structs.ram.read(Gpa(at), &mut bytes)?;
        Ok(bytes == *known)
    }

    /// Copies what is new on one page that looked like `seen`, and moves the
    /// cursor behind it.
    fn page(
        &mut self,
        of: Of<'_>,
        taken: &mut Taken,
        cursor: &mut Option<Cursor>,
        gap: &mut Option<Gap>,
        seen: Seen,
    ) -> Result<(), RingError> {
        let (page, head) = (seen.data, seen.head);
        let old = cursor.as_ref().filter(|cursor| cursor.is_at(page, head));
        let from = old.map_or(0, |cursor| cursor.offset);
        for _ in 0..TRIES {
            let before = self.structs.head(page)?;
            if before.time != head.time || before.commit < head.commit {
                // Taken for new records meanwhile, which come with the next
                // round. Before that, more may have been written here than was
                // seen.
                gap.get_or_insert(Gap::Overrun);
                return Ok(());
            }
            if before.commit <= from {
                return Ok(());
            }
            // What is in front of what is new, to know the place by.
            let place = cursor.as_ref().and_then(|cursor| cursor.place.as_ref());
            let known = place.filter(|_| from > 0).map(|place| &place.bytes[..]);
            let known = known.unwrap_or_default();
            let start = from as usize - known.len().min(from as usize);
            let mut bytes = vec![0; before.commit as usize - start];
            let data = u64::from(self.structs.layout.data);
            self.structs
                .ram
                .read(Gpa(page.0 + data + start as u64), &mut bytes)?;
            let after = self.structs.head(page)?;
            if after.time != before.time || after.commit < before.commit {
                continue;
            }
            if let Some(place) = seen.place.filter(|_| taken.asks(head.time)) {
                taken.look(self.structs, of.at, of.pages)?;
                if taken.is_unsure() {
                    // What is left here comes with the next round.
                    return Ok(());
                }
                if taken.has(place, of.pages.ring.len()) {
                    gap.get_or_insert(Gap::Overrun);
                    return Ok(());
                }
            }
            let skip = from as usize - start;
            let same_place = bytes.starts_with(known);
            if !same_place || (from == 0 && before.missed) {
                gap.get_or_insert(Gap::Overrun);
            }
            let (from, bytes) = if same_place {
                (from, bytes.split_off(skip))
            } else if start == 0 {
                (0, bytes)
            } else {
                // Another round of the ring, at the same time of a clock that
                // stands still: all of it is new.
                if let Some(cursor) = cursor {
                    cursor.place = None;
                    cursor.offset = 0;
                }
                return self.page(of, taken, cursor, gap, seen);
            };
            let mut read = if from == 0 {
                Vec::new()
            } else {
                known.to_vec()
            };
            read.extend(&bytes);
            read.drain(..read.len().saturating_sub(KNOWN));
            *cursor = Some(Cursor {
                time: before.time,
                offset: before.commit,
                place: Some(Place { page, bytes: read }),
            });
            self.drained.pages += 1;
            self.drained.bytes += bytes.len() as u64;
            (self.sink)(Chunk {
                cpu: of.cpu,
                page_time: before.time,
                offset: from,
                bytes,
                gap: gap.take(),
            });
            return Ok(());
        }
        self.drained.torn += 1;
        *gap = Some(Gap::Torn);
        Ok(())
    }
}
