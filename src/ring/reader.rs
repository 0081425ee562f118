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
//! was read last is known again by its page, its time, and its last bytes,
//! which hold a record's running number or its times.
//!
//! Everything is bounded by what the guest's RAM can hold.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use crate::kernel::control::RingLayout;
use crate::kernel::{Gva, Kernel};
use crate::ram::{Gpa, GuestRam, RamError};

/// How long the list of a CPU's pages is believed. It changes when the guest
/// resizes its buffer or reads it page by page itself.
const PAGES_BELIEVED: Duration = Duration::from_millis(250);
/// How often a page is tried that changes under the copy.
const TRIES: usize = 3;
/// The bits of `commit` that are a length; above are RB_MISSED_*.
const COMMIT_MASK: u64 = (1 << 20) - 1;
/// `RB_MISSED_EVENTS`: the guest's own reader found that records are missing
/// in front of the page.
const MISSED: u64 = 1 << 31;
/// The low bits of `list.next` are flags: RB_PAGE_HEAD, RB_PAGE_UPDATE.
const LIST_FLAGS: u64 = 3;
/// How many bytes in front of a place tell it from the same place of another
/// round of the ring.
const TAIL: usize = 16;

/// New records of one CPU, as they lay on one page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Whose.
    pub cpu: u16,
    /// The time stamp of the page: names it, and is the time of its first
    /// record.
    pub page_time: u64,
    /// Where on the page's data the bytes begin. 0, or where the last chunk
    /// of this page ended.
    pub offset: u32,
    /// Whole events.
    pub bytes: Vec<u8>,
    /// Something is missing in front of these bytes.
    pub gap: Option<Gap>,
}

/// What the reader itself knows of what is in front. (Where records have
/// numbers, these say more.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gap {
    /// The guest wrote over what was not read yet, or emptied its buffer.
    Overrun,
    /// A page changed under each copy of it.
    Torn,
    /// Nobody was reading.
    HelperAbsent,
    /// What was read could not be stored.
    DiskFull,
    /// Nothing is missing, but these bytes are older than the trace: they are
    /// the beginning of the page on which it begins, and give it its times.
    Earlier,
}

/// What a guest says of its own ring buffer, all CPUs together: a claim.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// Records that it wrote.
    pub entries: u64,
    /// Of these: written over before the guest itself read them.
    pub overrun: u64,
    /// Records that it dropped.
    pub dropped: u64,
}

/// What one round over all CPUs came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drained {
    /// Bytes of events.
    pub bytes: u64,
    /// Pages that had something new.
    pub pages: u64,
    /// Pages that changed under each copy.
    pub torn: u64,
    /// Lists in the guest that led nowhere sensible.
    pub damaged: u64,
}

/// Why the ring buffer cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// An address from the guest leads nowhere.
    #[error("the guest's ring buffer cannot be followed: {what} at {at} leads nowhere")]
    Lost {
        /// What was looked for.
        what: &'static str,
        /// The address.
        at: Gva,
    },
    /// Guest memory could not be read.
    #[error(transparent)]
    Ram(#[from] RamError),
}

/// Reads what is new in the ring buffer of one boot of a guest.
#[derive(Debug)]
pub struct RingReader {
    kernel: Kernel,
    layout: RingLayout,
    /// Pages with an older time stamp belong to an earlier trace.
    since: u64,
    cpus: Vec<Cpu>,
}

/// One CPU's buffer, and how far it was read.
#[derive(Debug, Default)]
struct Cpu {
    buffer: Option<Gva>,
    pages: Option<Pages>,
    listed: Option<Instant>,
    cursor: Option<Cursor>,
    gap: Option<Gap>,
}

/// The pages of one CPU.
#[derive(Debug)]
struct Pages {
    /// In the order of the ring.
    ring: Vec<Page>,
    /// How the guest's own readers stood when the list was made.
    guest: GuestReader,
}

/// What changes whenever a reader in the guest takes a page out of the ring
/// and puts the one that it had in its place (rb_get_reader_page()), or reads
/// a page as a whole and leaves another for it (ring_buffer_read_page()).
///
/// One of these alone would do only until as many pages were taken as there
/// are: then it is what it was, and the pages have other places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct GuestReader {
    /// Where the list of pages begins: behind the last page that was taken.
    first: Gva,
    /// The page outside the ring: the one taken last, or the spare one when
    /// there was nothing more to take.
    page: Page,
    /// The time of what is on it: newer once it has been round the ring.
    time: u64,
}

/// A page of the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Page {
    /// Its `struct buffer_page`.
    holder: Gva,
    /// Its sub-buffer.
    data: Gpa,
}

/// How far a CPU's buffer was read.
#[derive(Clone, Debug)]
struct Cursor {
    time: u64,
    offset: u32,
    /// The page, and its last bytes that were read; not known after
    /// [`RingReader::resume`].
    place: Option<(Gpa, Vec<u8>)>,
}

/// One look at the head of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Head {
    time: u64,
    commit: u32,
    missed: bool,
}

/// The pages of a CPU that may have something new.
struct Fresh {
    /// Oldest first, with how they looked.
    pages: Vec<(Gpa, Head)>,
    /// Whether they go on where reading stopped.
    whole: bool,
}

impl RingReader {
    /// A reader for `kernel`'s ring buffer, which has buffers for up to
    /// `nr_cpus` CPUs. Pages from before `since` (trace clock) are not read.
    pub fn new(kernel: Kernel, layout: RingLayout, nr_cpus: u32, since: u64) -> Self {
        let cpus = (0..nr_cpus.min(1 << 16)).map(|_| Cpu::default()).collect();
        Self {
            kernel,
            layout,
            since,
            cpus,
        }
    }

    /// How many CPUs it reads the buffers of.
    pub fn nr_cpus(&self) -> u32 {
        self.cpus.len() as u32
    }

    /// Goes on where an earlier reader of the same boot stopped: on `cpu`, at
    /// `offset` of the page with that time stamp.
    pub fn resume(&mut self, cpu: u16, page_time: u64, offset: u32) {
        if let Some(cpu) = self.cpus.get_mut(usize::from(cpu)) {
            cpu.cursor = Some(Cursor {
                time: page_time,
                offset,
                place: None,
            });
            cpu.gap = Some(Gap::HelperAbsent);
        }
    }

    /// Has the next chunk of `cpu` say that something is missing before it.
    pub fn note_gap(&mut self, cpu: u16, gap: Gap) {
        if let Some(cpu) = self.cpus.get_mut(usize::from(cpu)) {
            cpu.gap = Some(gap);
        }
    }

    /// Has the trace begin here: what is in the ring already is older. Of each
    /// CPU, the page that is being written goes to `sink` as [`Gap::Earlier`].
    ///
    /// # Errors
    /// As [`RingReader::drain`].
    pub fn begin_here(
        &mut self,
        ram: &dyn GuestRam,
        sink: &mut dyn FnMut(Chunk),
    ) -> Result<(), RingError> {
        let mut newest: Vec<Option<Chunk>> = vec![None; self.cpus.len()];
        self.drain(ram, &mut |chunk| {
            if let Some(slot) = newest.get_mut(usize::from(chunk.cpu)) {
                *slot = Some(chunk);
            }
        })?;
        for mut chunk in newest.into_iter().flatten() {
            chunk.gap = Some(Gap::Earlier);
            sink(chunk);
        }
        for cpu in &mut self.cpus {
            cpu.gap = None;
        }
        Ok(())
    }

    /// What the guest says of its ring buffer now, CPU by CPU. A CPU whose
    /// buffer cannot be followed has written nothing.
    pub fn written(&self, ram: &dyn GuestRam) -> Vec<Written> {
        let cpus = self.cpus.iter();
        let of = |cpu: &Cpu| {
            let buffer = cpu.buffer?;
            let layout = &self.layout;
            let count = |field| self.load(ram, offset(buffer, field)).ok();
            Some(Written {
                entries: count(layout.entries)?,
                overrun: count(layout.overrun)?,
                dropped: count(layout.commit_overrun)?.wrapping_add(count(layout.dropped)?),
            })
        };
        cpus.map(|cpu| of(cpu).unwrap_or_default()).collect()
    }

    /// Reads what every CPU has that is new, oldest first within a CPU, and
    /// gives it to `sink`.
    ///
    /// # Errors
    /// If the buffer cannot be found at all. A CPU whose lists are damaged is
    /// counted in [`Drained::damaged`] and passed over.
    pub fn drain(
        &mut self,
        ram: &dyn GuestRam,
        sink: &mut dyn FnMut(Chunk),
    ) -> Result<Drained, RingError> {
        let mut drained = Drained::default();
        let buffers = self.pointer(ram, self.layout.buffer, self.layout.buffers)?;
        for index in 0..self.cpus.len() {
            match self.drain_cpu(ram, buffers, index, sink, &mut drained) {
                Ok(()) => {}
                Err(RingError::Lost { .. } | RingError::Ram(RamError::Unmapped { .. })) => {
                    drained.damaged += 1;
                }
                Err(error) => return Err(error),
            }
        }
        ram.check()?;
        Ok(drained)
    }

    fn drain_cpu(
        &mut self,
        ram: &dyn GuestRam,
        buffers: Gva,
        index: usize,
        sink: &mut dyn FnMut(Chunk),
        drained: &mut Drained,
    ) -> Result<(), RingError> {
        let Ok(number) = u16::try_from(index) else {
            return Ok(());
        };
        for _ in 0..TRIES {
            self.list_pages(ram, buffers, index)?;
            let Some(cpu) = self.cpus.get(index) else {
                return Ok(());
            };
            let (Some(buffer), Some(listed)) = (cpu.buffer, &cpu.pages) else {
                return Ok(());
            };
            let Fresh { pages, whole } = self.fresh(ram, buffer, listed, cpu.cursor.as_ref())?;
            if self.guest_reader(ram, buffer)? != listed.guest {
                continue;
            }
            if !whole {
                self.miss(number, Gap::Overrun);
            }
            for (page, head) in pages {
                self.read_page(ram, number, page, head, sink, drained)?;
            }
            return Ok(());
        }
        // A guest that reads its own buffer that fast is tried again next time.
        Ok(())
    }

    /// What may have something new.
    fn fresh(
        &self,
        ram: &dyn GuestRam,
        buffer: Gva,
        listed: &Pages,
        cursor: Option<&Cursor>,
    ) -> Result<Fresh, RingError> {
        let commit_page = self.pointer(ram, buffer, self.layout.commit_page)?;
        let ring = &listed.ring[..];
        // What the guest's own readers took out is older than what is left,
        // unless it is the page that is being written.
        let outside = Some(listed.guest.page)
            .filter(|outside| ring.iter().all(|page| page.data != outside.data));
        let reader = outside.filter(|outside| outside.holder != commit_page);
        let (up_to, after) = match ring.iter().position(|page| page.holder == commit_page) {
            Some(at) => ring.split_at(at + 1),
            None => (&[][..], ring),
        };
        let last = outside.filter(|outside| outside.holder == commit_page);
        let mut pages = Vec::new();
        for page in reader.iter().chain(after).chain(up_to).chain(last.iter()) {
            let head = self.head(ram, page.data)?;
            if head.commit > 0 {
                pages.push((page.data, head));
            }
        }
        // Pages that were taken for new records since the commit page was
        // looked up stand first, though they are the newest: next time.
        let newest = pages.last().map_or(0, |(_, head)| head.time);
        pages.retain(|(_, head)| head.time <= newest);
        let Some(cursor) = cursor else {
            pages.retain(|(_, head)| head.time >= self.since);
            return Ok(Fresh { pages, whole: true });
        };
        let at = pages
            .iter()
            .position(|(page, head)| cursor.is_at(*page, *head));
        match at {
            Some(at) => drop(pages.drain(..at)),
            None => pages.retain(|(_, head)| head.time >= cursor.time),
        }
        // A ring with nothing in it was emptied: what comes next says so.
        let whole = at.is_some() || pages.is_empty();
        Ok(Fresh { pages, whole })
    }

    /// Has the next chunk of `cpu` say that something is missing before it,
    /// unless it says so already.
    fn miss(&mut self, cpu: u16, gap: Gap) {
        if let Some(cpu) = self.cpus.get_mut(usize::from(cpu)) {
            cpu.gap.get_or_insert(gap);
        }
    }

    /// Copies what is new on one page that looked like `seen`.
    fn read_page(
        &mut self,
        ram: &dyn GuestRam,
        number: u16,
        page: Gpa,
        seen: Head,
        sink: &mut dyn FnMut(Chunk),
        drained: &mut Drained,
    ) -> Result<(), RingError> {
        let Some(cpu) = self.cpus.get(usize::from(number)) else {
            return Ok(());
        };
        let old = cpu
            .cursor
            .as_ref()
            .filter(|cursor| cursor.is_at(page, seen));
        let from = old.map_or(0, |cursor| cursor.offset);
        let tail = old
            .and_then(|cursor| cursor.place.as_ref())
            .map(|(_, tail)| tail.clone());
        for _ in 0..TRIES {
            let before = self.head(ram, page)?;
            if before.time != seen.time || before.commit <= from {
                // Nothing new, or taken for new records meanwhile, which come
                // with the next round.
                if before.time != seen.time && seen.commit > from {
                    self.miss(number, Gap::Overrun);
                }
                return Ok(());
            }
            // A little from in front of what is new, to know the place by.
            let known = tail.as_ref().map_or(0, Vec::len);
            let start = from as usize - known.min(from as usize);
            let mut bytes = vec![0; before.commit as usize - start];
            ram.read(
                Gpa(page.0 + u64::from(self.layout.data) + start as u64),
                &mut bytes,
            )?;
            let after = self.head(ram, page)?;
            if after.time != before.time || after.commit < before.commit {
                continue;
            }
            let skip = from as usize - start;
            let same_place = tail.as_ref().is_none_or(|tail| bytes.starts_with(tail));
            if !same_place || (from == 0 && before.missed) {
                self.miss(number, Gap::Overrun);
            }
            let (from, bytes) = if same_place {
                (from, bytes.split_off(skip))
            } else if start == 0 {
                (0, bytes)
            } else {
                // Another round of the ring, at the same time of a clock that
                // stands still: all of it is new.
                if let Some(Cpu {
                    cursor: Some(cursor),
                    ..
                }) = self.cpus.get_mut(usize::from(number))
                {
                    cursor.place = None;
                    cursor.offset = 0;
                }
                return self.read_page(ram, number, page, seen, sink, drained);
            };
            let Some(cpu) = self.cpus.get_mut(usize::from(number)) else {
                return Ok(());
            };
            let last = bytes.len() - bytes.len().min(TAIL);
            let tail = bytes.get(last..).unwrap_or_default().to_vec();
            cpu.cursor = Some(Cursor {
                time: before.time,
                offset: before.commit,
                place: Some((page, tail)),
            });
            drained.pages += 1;
            drained.bytes += bytes.len() as u64;
            let gap = cpu.gap.take();
            sink(Chunk {
                cpu: number,
                page_time: before.time,
                offset: from,
                bytes,
                gap,
            });
            return Ok(());
        }
        drained.torn += 1;
        self.note_gap(number, Gap::Torn);
        Ok(())
    }

    /// Brings the list of a CPU's pages up to date. There is none where the CPU
    /// has no buffer, or the guest takes pages faster than they can be listed.
    fn list_pages(
        &mut self,
        ram: &dyn GuestRam,
        buffers: Gva,
        index: usize,
    ) -> Result<(), RingError> {
        let Some(cpu) = self.cpus.get(index) else {
            return Ok(());
        };
        let recent = cpu
            .listed
            .is_some_and(|listed| listed.elapsed() < PAGES_BELIEVED);
        if recent {
            match (cpu.buffer, &cpu.pages) {
                (None, _) => return Ok(()),
                (Some(buffer), Some(pages)) => {
                    if self.guest_reader(ram, buffer)? == pages.guest {
                        return Ok(());
                    }
                }
                (Some(_), None) => {}
            }
        }
        let slot = Gva(buffers.0.wrapping_add(8 * index as u64));
        let buffer = Some(self.load(ram, slot)?).filter(|&at| at != 0).map(Gva);
        let mut pages = None;
        if let Some(buffer) = buffer {
            for _ in 0..TRIES {
                let guest = self.guest_reader(ram, buffer)?;
                let ring = self.walk(ram, buffer, guest.first)?;
                if self.guest_reader(ram, buffer)? == guest {
                    pages = Some(Pages { ring, guest });
                    break;
                }
            }
        }
        if let Some(cpu) = self.cpus.get_mut(index) {
            cpu.buffer = buffer;
            cpu.pages = pages;
            cpu.listed = Some(Instant::now());
        }
        Ok(())
    }

    /// How the guest's own readers of a CPU's buffer stand.
    fn guest_reader(&self, ram: &dyn GuestRam, buffer: Gva) -> Result<GuestReader, RingError> {
        let first = self.pointer(ram, buffer, self.layout.pages)?;
        let page = self.page(ram, self.pointer(ram, buffer, self.layout.reader_page)?)?;
        let time = self.head(ram, page.data)?.time;
        Ok(GuestReader { first, page, time })
    }

    /// The pages in the ring of one CPU, in its order.
    fn walk(&self, ram: &dyn GuestRam, buffer: Gva, first: Gva) -> Result<Vec<Page>, RingError> {
        let page_size = u64::from(self.layout.page_size);
        let limit = self.load(ram, offset(buffer, self.layout.nr_pages))?;
        let limit = limit.min(ram.layout().total() / page_size) as usize;
        let mut seen = HashSet::new();
        let mut ring = Vec::with_capacity(limit.min(1 << 16));
        let mut node = first;
        for _ in 0..limit {
            let page = self.page(ram, Gva(node.0.wrapping_sub(self.layout.list.into())))?;
            if seen.insert(page.data) {
                ring.push(page);
            }
            node = Gva(self.load(ram, node)? & !LIST_FLAGS);
            if node == first {
                break;
            }
        }
        Ok(ring)
    }

    /// A `struct buffer_page` and its sub-buffer.
    fn page(&self, ram: &dyn GuestRam, holder: Gva) -> Result<Page, RingError> {
        let at = self.pointer(ram, holder, self.layout.page)?;
        let data = self.translate(ram, at, "a sub-buffer")?;
        let size = u64::from(self.layout.page_size);
        // A sub-buffer is one block of the page allocator.
        if !data.is_aligned(size) || data.checked_add(size).is_none() {
            return Err(RingError::Lost {
                what: "a sub-buffer",
                at,
            });
        }
        Ok(Page { holder, data })
    }

    fn head(&self, ram: &dyn GuestRam, page: Gpa) -> Result<Head, RingError> {
        let time = ram.read_u64(Gpa(page.0 + u64::from(self.layout.time_stamp)))?;
        let word = ram.read_u64(Gpa(page.0 + u64::from(self.layout.commit)))?;
        let (commit, missed) = (word & COMMIT_MASK, word & MISSED != 0);
        let room = u64::from(self.layout.page_size) - u64::from(self.layout.data);
        // A length that the page cannot hold is no length.
        let commit = if commit <= room { commit as u32 } else { 0 };
        Ok(Head {
            time,
            commit,
            missed,
        })
    }

    fn pointer(&self, ram: &dyn GuestRam, base: Gva, field: u16) -> Result<Gva, RingError> {
        self.load(ram, offset(base, field)).map(Gva)
    }

    fn load(&self, ram: &dyn GuestRam, at: Gva) -> Result<u64, RingError> {
        let gpa = self.translate(ram, at, "a pointer")?;
        if !gpa.is_aligned(8) {
            return Err(RingError::Lost {
                what: "a pointer",
                at,
            });
        }
        Ok(ram.read_u64(gpa)?)
    }

    fn translate(&self, ram: &dyn GuestRam, at: Gva, what: &'static str) -> Result<Gpa, RingError> {
        self.kernel
            .translate(ram, at)
            .map_err(|_| RingError::Lost { what, at })
    }
}

impl Cursor {
    /// Whether the page that looks like `head` is the one that was read last.
    fn is_at(&self, page: Gpa, head: Head) -> bool {
        head.time == self.time
            && head.commit >= self.offset
            && self.place.as_ref().is_none_or(|(at, _)| *at == page)
    }
}

fn offset(base: Gva, field: u16) -> Gva {
    Gva(base.0.wrapping_add(field.into()))
}
