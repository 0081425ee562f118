//! Which pages the guest takes for new records while they are read.
//!
//! A page that is taken gets another time stamp, and so is seen to be another, as
//! long as the guest's clock moves. Where it stands still (see `round`), a page of
//! which the old records were to be read may be full of the newest ones, and bear the
//! same time: they would come before records that are older, whose numbers would then
//! look like those of copies. What tells is how far the commit page has come
//! meanwhile, from page to page. That it did not come all the way round between two
//! looks is known from how many records were made, of which no page holds less than
//! one (rb_commit() counts a record before it moves the commit page).

use crate::kernel::Gva;

use super::pages::Pages;
use super::structs::{offset, Structs};
use super::RingError;

/// The commit page's way through a ring, since the first look.
#[derive(Debug)]
pub(super) struct Taken {
    /// Where in the ring it was at the first look; none where it was outside.
    begun: Option<usize>,
    /// The same at the last one.
    now: Option<usize>,
    /// Records made before the last look at it, by the guest's count.
    records: u64,
    /// How many pages it has come further.
    further: usize,
    /// It may have come all the way round, or is not where it is looked for.
    unsure: bool,
    /// The time stamp of the commit page at the first look: a page with an older one,
    /// that has it still, was not taken since.
    since: u64,
}

impl Taken {
    /// The first look, before any page is looked at.
    pub(super) fn begin(
        structs: Structs<'_>,
        buffer: Gva,
        pages: &Pages,
    ) -> Result<(Self, Gva), RingError> {
        let records = structs.load(offset(buffer, structs.layout.entries))?;
        let page = structs.pointer(buffer, structs.layout.commit_page)?;
        let now = pages.ring.iter().position(|known| known.holder == page);
        let since = structs.head(structs.page(page)?.data)?.time;
        let taken = Self {
            begun: now,
            now,
            records,
            further: 0,
            unsure: false,
            since,
        };
        Ok((taken, page))
    }

    /// Whether the time of a page cannot tell that it was taken.
    pub(super) fn asks(&self, time: u64) -> bool {
        time >= self.since
    }

    /// Looks how far the commit page has come.
    pub(super) fn look(
        &mut self,
        structs: Structs<'_>,
        buffer: Gva,
        pages: &Pages,
    ) -> Result<(), RingError> {
        let count = || structs.load(offset(buffer, structs.layout.entries));
        let before = count()?;
        let page = structs.pointer(buffer, structs.layout.commit_page)?;
        let made = count()?.wrapping_sub(self.records);
        let places = pages.ring.len();
        let from = self.now.unwrap_or(0);
        // Rarely more than a page or two further.
        let steps = (0..places).find(|steps| {
            let at = pages.ring.get((from + steps) % places);
            at.is_some_and(|at| at.holder == page)
        });
        match (self.now, steps) {
            (Some(_), Some(steps)) => {
                self.further = self.further.saturating_add(steps);
                self.now = Some((from + steps) % places);
            }
            (None, None) => {}
            _ => self.unsure = true,
        }
        self.unsure |= made >= places as u64;
        self.records = before;
        Ok(())
    }

    /// Whether that cannot be told any more.
    pub(super) fn is_unsure(&self) -> bool {
        self.unsure
    }

    /// Whether the page at `place` in a ring of so many was taken.
    pub(super) fn has(&self, place: usize, places: usize) -> bool {
        let Some(begun) = self.begun else {
            return false;
        };
        let ahead = (place + places - begun) % places;
        // Where it began itself: once it is round.
        let ahead = if ahead == 0 { places } else { ahead };
        ahead <= self.further
    }
}
