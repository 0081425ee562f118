//! The passive reader, and what it hands out.

use crate::kernel::control::RingLayout;
use crate::kernel::{Gva, Kernel};
use crate::ram::{Gpa, GuestRam, RamError};

use super::pages::{Claims, Pages};
use super::round::Round;
use super::structs::{offset, Head, Structs};

/// How many rounds it takes at most to come to the end of what was there
/// before: 3 GiB of it.
const ROUNDS: usize = 100;

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
    NotStored,
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
    /// CPUs whose buffer was swapped for another.
    pub swapped: u64,
    /// The round ended before all CPUs had their turn.
    pub cut: bool,
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
    claims: Claims,
    /// Whose turn it is first in the next round.
    turn: usize,
}

/// What was read of one CPU.
#[derive(Debug, Default)]
pub(super) struct Cpu {
    /// The buffers that it has had, the present one last.
    pub(super) buffers: Vec<Buffer>,
    /// Where an earlier reader stopped, until a buffer is found.
    pub(super) resumed: Option<Cursor>,
    pub(super) gap: Option<Gap>,
}

/// One CPU's buffer, and how far it was read.
#[derive(Debug)]
pub(super) struct Buffer {
    /// Its `struct ring_buffer_per_cpu`.
    pub(super) at: Gva,
    pub(super) pages: Option<Pages>,
    pub(super) cursor: Option<Cursor>,
}

/// How far a CPU's buffer was read.
#[derive(Clone, Debug)]
pub(super) struct Cursor {
    pub(super) time: u64,
    pub(super) offset: u32,
    /// Not known after [`RingReader::resume`].
    pub(super) place: Option<Place>,
}

/// The page that was read last.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub(super) page: Gpa,
    /// What was read of it last, up to where reading stopped.
    pub(super) bytes: Vec<u8>,
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
            claims: Claims::default(),
            turn: 0,
        }
    }

    /// Reads from that `struct trace_buffer` from now on: the guest's kernel
    /// says that it is the one that is recorded into.
    pub fn look_in(&mut self, buffer: Gva) {
        self.layout.buffer = buffer;
    }

    /// How many CPUs it reads the buffers of.
    pub fn nr_cpus(&self) -> u32 {
        self.cpus.len() as u32
    }

    /// Reads the buffers of no more CPUs than that: QEMU knows how many there
    /// can be, and a guest may claim any number.
    pub fn limit_cpus(&mut self, most: u32) {
        self.cpus.truncate(most as usize);
    }

    /// Goes on where an earlier reader of the same boot stopped: on `cpu`, at
    /// `offset` of the page with that time stamp.
    pub fn resume(&mut self, cpu: u16, page_time: u64, offset: u32) {
        if let Some(cpu) = self.cpus.get_mut(usize::from(cpu)) {
            cpu.resumed = Some(Cursor {
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
        for _ in 0..ROUNDS {
            let drained = self.drain(ram, &mut |chunk| {
                if let Some(slot) = newest.get_mut(usize::from(chunk.cpu)) {
                    *slot = Some(chunk);
                }
            })?;
            if !drained.cut {
                break;
            }
        }
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
        let structs = self.structs(ram);
        let of = |cpu: &Cpu| {
            let (buffer, layout) = (cpu.buffers.last()?.at, &self.layout);
            let count = |field| structs.load(offset(buffer, field)).ok();
            Some(Written {
                entries: count(layout.entries)?,
                overrun: count(layout.overrun)?,
                dropped: count(layout.commit_overrun)?.wrapping_add(count(layout.dropped)?),
            })
        };
        let cpus = self.cpus.iter();
        cpus.map(|cpu| of(cpu).unwrap_or_default()).collect()
    }

    /// Reads what every CPU has that is new, oldest first within a CPU, and
    /// gives it to `sink`: all there is, or as much as a round may take
    /// ([`Drained::cut`]).
    ///
    /// # Errors
    /// If the buffer cannot be found at all. A CPU whose lists are damaged is
    /// counted in [`Drained::damaged`] and passed over.
    pub fn drain(
        &mut self,
        ram: &dyn GuestRam,
        sink: &mut dyn FnMut(Chunk),
    ) -> Result<Drained, RingError> {
        let structs = Structs {
            ram,
            kernel: &self.kernel,
            layout: &self.layout,
        };
        let mut round = Round::begin(structs, self.since, &mut self.claims, sink)?;
        let count = self.cpus.len();
        for index in (self.turn..count).chain(0..self.turn) {
            if round.is_over() {
                self.turn = index;
                break;
            }
            if let (Some(cpu), Ok(number)) = (self.cpus.get_mut(index), u16::try_from(index)) {
                round.cpu(number, cpu)?;
            }
        }
        let drained = round.end();
        ram.check()?;
        Ok(drained)
    }

    fn structs<'a>(&'a self, ram: &'a dyn GuestRam) -> Structs<'a> {
        Structs {
            ram,
            kernel: &self.kernel,
            layout: &self.layout,
        }
    }
}

impl Cursor {
    /// Whether the page that looks like `head` is the one that was read last.
    pub(super) fn is_at(&self, page: Gpa, head: Head) -> bool {
        head.time == self.time
            && head.commit >= self.offset
            && self.place.as_ref().is_none_or(|place| place.page == page)
    }
}
