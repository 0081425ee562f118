//! Which pages a CPU's buffer has, and in which order.
//!
//! The list is the guest's, and changes when somebody there reads the buffer
//! page by page, resizes it or swaps it for another. What tells of that is
//! looked at in each round ([`Standing`]), and the list itself is walked anew
//! where it changed, or was not walked for a while.
//!
//! A guest could name the same pages for every CPU that it claims to have, and
//! have them read for each. A page belongs to the CPU that named it first
//! ([`Claims`]); so there are never more than its RAM has.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use crate::kernel::Gva;
use crate::ram::Gpa;

use super::structs::{Page, Structs};
use super::{RingError, TRIES};

/// How long a list of pages is believed if nothing tells that it changed. A
/// list that takes long to walk is believed longer, for that to take no more
/// than a fiftieth of the time.
const BELIEVED: Duration = Duration::from_millis(250);
const BELIEVED_WALKS: u32 = 50;
/// The most pages of one CPU that are read, and of all: 1 GiB and 4 GiB of
/// them, where a sub-buffer is one page of memory.
const PAGES_OF_A_CPU: usize = 1 << 18;
const PAGES_OF_ALL: usize = 1 << 20;
/// The low bits of `list.next` are flags: RB_PAGE_HEAD, RB_PAGE_UPDATE.
const LIST_FLAGS: u64 = 3;

/// The pages of one CPU's buffer.
#[derive(Debug)]
pub(super) struct Pages {
    /// In the order of the ring.
    pub(super) ring: Vec<Page>,
    /// How the buffer stood when they were listed.
    pub(super) standing: Standing,
    listed: Instant,
    believed: Duration,
}

/// What changes whenever a reader in the guest takes a page out of the ring
/// and puts the one that it had in its place (rb_get_reader_page()), or reads
/// a page as a whole and leaves another for it (ring_buffer_read_page()), or
/// the ring gets another size.
///
/// The page outside alone would do only until as many pages were taken as
/// there are: then it is what it was, and all others have other places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Standing {
    /// Where the list of pages begins: behind the last page that was taken.
    first: Gva,
    /// How many there are, by the guest's count.
    nr_pages: u64,
    /// The page outside the ring: the one taken last, or the spare one when
    /// there was nothing more to take.
    pub(super) outside: Page,
    /// The time of what is on it: newer once it has been round the ring.
    time: u64,
}

/// Which CPU each sub-buffer is read for.
#[derive(Debug, Default)]
pub(super) struct Claims(HashMap<Gpa, u16>);

impl Claims {
    /// Takes all of these for `cpu`, or none where one is another's, or they
    /// are too many.
    fn take<'a>(&mut self, cpu: u16, pages: impl Iterator<Item = &'a Page>) -> bool {
        let mut taken = Vec::new();
        for page in pages {
            let room = self.0.len() < PAGES_OF_ALL;
            match self.0.entry(page.data) {
                Entry::Occupied(entry) if *entry.get() == cpu => {}
                Entry::Vacant(entry) if room => {
                    entry.insert(cpu);
                    taken.push(page.data);
                }
                _ => {
                    taken.iter().for_each(|page| {
                        self.0.remove(page);
                    });
                    return false;
                }
            }
        }
        true
    }

    /// Gives back what a list of `cpu`'s had.
    pub(super) fn release(&mut self, cpu: u16, pages: Pages) {
        for page in pages.all() {
            if let Entry::Occupied(entry) = self.0.entry(page.data) {
                if *entry.get() == cpu {
                    entry.remove();
                }
            }
        }
    }
}

impl Pages {
    /// Lists the pages of `cpu`'s buffer. None where the guest takes them
    /// faster than they can be listed.
    ///
    /// # Errors
    /// If the list leads nowhere, or to what was listed for another CPU.
    pub(super) fn list(
        structs: Structs<'_>,
        cpu: u16,
        buffer: Gva,
        claims: &mut Claims,
    ) -> Result<Option<Self>, RingError> {
        for _ in 0..TRIES {
            let begun = Instant::now();
            let standing = Standing::of(structs, buffer)?;
            let ring = walk(structs, standing)?;
            let pages = Pages {
                ring,
                standing,
                listed: Instant::now(),
                believed: BELIEVED.max(begun.elapsed() * BELIEVED_WALKS),
            };
            if Standing::of(structs, buffer)? != standing {
                continue;
            }
            if !claims.take(cpu, pages.all()) {
                return Err(RingError::Lost {
                    what: "the list of a CPU's pages",
                    at: buffer,
                });
            }
            return Ok(Some(pages));
        }
        Ok(None)
    }

    fn all(&self) -> impl Iterator<Item = &Page> {
        self.ring.iter().chain([&self.standing.outside])
    }

    /// Whether they still are the pages of that buffer, as far as it tells.
    pub(super) fn hold(&self, structs: Structs<'_>, buffer: Gva) -> Result<bool, RingError> {
        Ok(self.listed.elapsed() < self.believed && self.stand(structs, buffer)?)
    }

    /// Whether the buffer stands as it did when they were listed.
    pub(super) fn stand(&self, structs: Structs<'_>, buffer: Gva) -> Result<bool, RingError> {
        Ok(Standing::of(structs, buffer)? == self.standing)
    }
}

impl Standing {
    fn of(structs: Structs<'_>, buffer: Gva) -> Result<Self, RingError> {
        let layout = structs.layout;
        let outside = structs.page(structs.pointer(buffer, layout.reader_page)?)?;
        Ok(Self {
            first: structs.pointer(buffer, layout.pages)?,
            nr_pages: structs.pointer(buffer, layout.nr_pages)?.0,
            outside,
            time: structs.head(outside.data)?.time,
        })
    }
}

/// The pages in a ring, in its order.
fn walk(structs: Structs<'_>, standing: Standing) -> Result<Vec<Page>, RingError> {
    let limit = standing.nr_pages.min(PAGES_OF_A_CPU as u64) as usize;
    let mut seen = HashSet::new();
    let mut ring = Vec::new();
    let mut node = standing.first;
    for _ in 0..limit {
        let holder = Gva(node.0.wrapping_sub(structs.layout.list.into()));
        let page = structs.page(holder)?;
        if seen.insert(page.data) {
            ring.push(page);
        }
        node = Gva(structs.load(node)? & !LIST_FLAGS);
        if node == standing.first {
            break;
        }
    }
    Ok(ring)
}
