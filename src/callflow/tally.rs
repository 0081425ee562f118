//! What a call flow adds up to: the counters of `trace_graph.txt`'s head and
//! of `xftrace status`.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

use super::event::{CutWhy, UncalledWhy};
use super::names::Place;
use crate::kernel::Gva;
use crate::ring::record::{ForgedWhy, Lost, LostWhy};
use crate::session::GuestName;

/// A reason that things are counted by.
pub trait Reason: Copy + 'static {
    /// All reasons, in the order in which they are listed.
    const ALL: &'static [Self];

    /// The reason in a few words.
    fn text(self) -> &'static str;

    /// Its place in [`Reason::ALL`].
    fn index(self) -> usize;
}

macro_rules! reason {
    ($type:ident, $all:expr, |$self:ident| $text:expr) => {
        impl Reason for $type {
            const ALL: &'static [Self] = &$all;

            fn text(self) -> &'static str {
                let $self = self;
                $text
            }

            fn index(self) -> usize {
                self as usize
            }
        }
    };
}

reason!(ForgedWhy, ForgedWhy::ALL, |why| ForgedWhy::text(why));
reason!(LostWhy, LostWhy::ALL, |why| LostWhy::text(why));
reason!(
    CutWhy,
    [
        Self::TraceEnd,
        Self::Lost,
        Self::Reboot,
        Self::Unreturned,
        Self::Evicted,
        Self::TooDeep
    ],
    |why| match why {
        Self::TraceEnd => "open at the end of the trace",
        Self::Lost => "records lost",
        Self::Reboot => "guest rebooted",
        Self::Unreturned => "went on without returning",
        Self::Evicted => "too many tasks",
        Self::TooDeep => "too deep",
    }
);
reason!(
    UncalledWhy,
    [
        Self::TraceStart,
        Self::Lost,
        Self::Evicted,
        Self::TooDeep,
        Self::Unexplained
    ],
    |why| match why {
        Self::TraceStart => "called before the trace began",
        Self::Lost => "records lost",
        Self::Evicted => "too many tasks",
        Self::TooDeep => "too deep",
        Self::Unexplained => "unexplained",
    }
);

/// A counter for each reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counts<R>(Vec<u64>, std::marker::PhantomData<R>);

impl<R: Reason> Default for Counts<R> {
    fn default() -> Self {
        Self(vec![0; R::ALL.len()], std::marker::PhantomData)
    }
}

impl<R: Reason> Counts<R> {
    /// Counts `by` more for `reason`.
    pub fn add(&mut self, reason: R, by: u64) {
        if let Some(count) = self.0.get_mut(reason.index()) {
            *count = count.saturating_add(by);
        }
    }

    /// The count for `reason`.
    pub fn get(&self, reason: R) -> u64 {
        self.0.get(reason.index()).copied().unwrap_or(0)
    }

    /// The sum over all reasons.
    pub fn total(&self) -> u64 {
        self.0
            .iter()
            .fold(0, |sum, &count| sum.saturating_add(count))
    }

    /// Every reason with its count, those that are zero too.
    pub fn iter(&self) -> impl Iterator<Item = (R, u64)> + '_ {
        R::ALL.iter().map(|&reason| (reason, self.get(reason)))
    }
}

impl<R: Reason + Serialize> Serialize for Counts<R> {
    /// A map from each reason to its count.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(R::ALL.len()))?;
        for (reason, count) in self.iter() {
            map.serialize_entry(&reason, &count)?;
        }
        map.end()
    }
}

/// What a call flow adds up to. `calls` = `closed` + `cut` once it is finished,
/// and `returns` = `closed` + `uncalled` always.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Tally {
    /// Items of any kind.
    pub items: u64,
    /// Calls.
    pub calls: u64,
    /// Of these: of depth 0, made by a traced function from outside any.
    pub roots: u64,
    /// Of these: directly followed by their own return.
    pub leaves: u64,
    /// Returns.
    pub returns: u64,
    /// Calls that a return has ended, one that fits or one that does not.
    pub closed: u64,
    /// Of these: by the return of another function.
    pub other_function: u64,
    /// Of these: by a return to somewhere else than where the call came from.
    pub other_caller: u64,
    /// Calls that were given up, by reason.
    pub cut: Counts<CutWhy>,
    /// Returns that found no call to end, by reason.
    pub uncalled: Counts<UncalledWhy>,
    /// Calls around which calls are missing that nothing accounts for.
    pub gaps: u64,
    /// Records that decode under no key, by reason.
    pub forged: Counts<ForgedWhy>,
    /// Places where records are missing, by reason.
    pub lost_places: Counts<LostWhy>,
    /// Records missing there, as far as they could be counted, by reason.
    pub lost_records: Counts<LostWhy>,
    /// Places where it is not known how many are missing.
    pub lost_uncounted: u64,
    /// Other tracers' records.
    pub other: u64,
    /// Calls that ftrace could not trace because they were nested too deeply.
    pub overruns: u64,
    /// Calls of functions for which there is no symbol.
    pub unresolved: u64,
    /// Calls of functions whose names are the guest's word alone.
    pub told_by_guest: u64,
    /// Calls from the module area that do not come from the function around.
    pub from_modules: u64,
    /// Calls from where no kernel code belongs.
    pub from_outside: u64,
    /// Interrupts that interrupted traced calls.
    pub interrupts: u64,
    /// Task switches.
    pub switches: u64,
    /// Records older than the one before them on their CPU.
    pub time_backwards: u64,
    /// Returns that say they came before their call.
    pub bad_durations: u64,
    /// Tasks; one that was forgotten and came again counts again.
    pub tasks: u64,
    /// Tasks that were forgotten because there were too many.
    pub evictions: u64,
    /// Boots of the guest.
    pub boots: u64,
    /// The CPUs that records came from.
    pub cpus: BTreeSet<u16>,
    /// The key epochs of the records.
    pub epochs: Option<Epochs>,
    /// Time of the first record, and of the last: boot, and trace clock in
    /// nanoseconds.
    pub times: Option<((u32, u64), (u32, u64))>,
    /// Roots by function and pid, by name and then pid.
    pub roots_by: Vec<RootCount>,
    /// Roots that are not in `roots_by` because it had grown too long.
    pub roots_not_listed: u64,
}

impl Tally {
    /// How many roots were calls of `function`, by the task `pid` or by any.
    pub fn roots_of(&self, function: &str, pid: Option<i32>) -> u64 {
        self.roots_by
            .iter()
            .filter(|root| root.function == function && pid.is_none_or(|pid| root.pid == pid))
            .map(|root| root.count)
            .sum()
    }

    pub(super) fn lost(&mut self, lost: Lost) {
        self.lost_places.add(lost.why, 1);
        match lost.records {
            Some(records) => self.lost_records.add(lost.why, records),
            None => self.lost_uncounted += 1,
        }
    }
}

/// How many roots one task made of one function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RootCount {
    /// The function's name; without a symbol its address.
    pub function: String,
    /// The task.
    pub pid: i32,
    /// How many.
    pub count: u64,
}

/// Counts roots by boot, function and pid: at most so many of them.
#[derive(Debug)]
pub(super) struct Roots<'n> {
    counts: HashMap<Root<'n>, u64>,
    limit: usize,
    not_listed: u64,
}

/// By boot, function, what the guest calls it, and pid.
type Root<'n> = (u32, Gva, Option<GuestName<'n>>, i32);

impl<'n> Roots<'n> {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            counts: HashMap::new(),
            limit,
            not_listed: 0,
        }
    }

    pub(super) fn add(&mut self, boot: u32, func: &Place<'n>, pid: i32) {
        let full = self.counts.len() >= self.limit;
        let root = (boot, func.address, func.name.told, pid);
        match self.counts.get_mut(&root) {
            Some(count) => *count += 1,
            None if full => self.not_listed += 1,
            None => {
                self.counts.insert(root, 1);
            }
        }
    }

    /// How many pairs of function and pid are kept.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.counts.len()
    }

    /// Writes them into `tally`, named by `name`, boots taken together.
    pub(super) fn list(
        &self,
        tally: &mut Tally,
        mut name: impl FnMut(u32, Gva, Option<GuestName<'n>>) -> String,
    ) {
        let mut by: BTreeMap<(String, i32), u64> = BTreeMap::new();
        for (&(boot, func, told, pid), count) in &self.counts {
            *by.entry((name(boot, func, told), pid)).or_default() += count;
        }
        tally.roots_by = by
            .into_iter()
            .map(|((function, pid), count)| RootCount {
                function,
                pid,
                count,
            })
            .collect();
        tally.roots_not_listed = self.not_listed;
    }
}

/// Which key epochs a trace's records name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Epochs {
    /// The lowest.
    pub first: u64,
    /// The highest.
    pub last: u64,
    /// How many different ones. One that comes up first when another 64 above
    /// it has been seen already is missed.
    pub count: u64,
    /// Bit n: epoch `last - n` was seen.
    #[serde(skip)]
    seen: u64,
}

impl Epochs {
    /// Notes a record's epoch; 0 is that of a record without one.
    pub(super) fn note(epochs: &mut Option<Self>, epoch: u64) {
        if epoch == 0 {
            return;
        }
        let Some(all) = epochs else {
            *epochs = Some(Self {
                first: epoch,
                last: epoch,
                count: 1,
                seen: 1,
            });
            return;
        };
        if epoch == all.last {
            return;
        }
        let distance = u32::try_from(epoch.abs_diff(all.last)).unwrap_or(u32::MAX);
        if epoch > all.last {
            all.seen = all.seen.checked_shl(distance).unwrap_or(0) | 1;
            all.last = epoch;
            all.count += 1;
        } else {
            let bit = 1u64.checked_shl(distance).unwrap_or(0);
            if all.seen & bit != bit {
                all.seen |= bit;
                all.count += 1;
            }
            all.first = all.first.min(epoch);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::names::{Kind, Name};
    use super::*;

    fn epochs(of: &[u64]) -> (u64, u64, u64) {
        let mut all = None;
        for &epoch in of {
            Epochs::note(&mut all, epoch);
        }
        all.map_or((0, 0, 0), |all| (all.first, all.last, all.count))
    }

    #[test]
    fn epochs_are_counted_once_in_whatever_order_cpus_use_them() {
        assert_eq!(epochs(&[3, 4, 3, 4, 6, 5, 6, 5]), (3, 6, 4));
        assert_eq!(epochs(&[100, 36, 100, 37, 37]), (36, 100, 2));
        assert_eq!(epochs(&[1, u64::MAX, 1]), (1, u64::MAX, 2));
        assert_eq!(epochs(&[0, 7, 0]), (7, 7, 1), "0 is none");
    }

    #[test]
    fn reasons_stand_where_their_index_says() {
        fn check<R: Reason + PartialEq + std::fmt::Debug>() {
            for (at, reason) in R::ALL.iter().enumerate() {
                assert_eq!(reason.index(), at, "{reason:?}");
            }
        }
        check::<ForgedWhy>();
        check::<LostWhy>();
        check::<CutWhy>();
        check::<UncalledWhy>();
    }

    #[test]
    fn roots_beyond_the_limit_are_counted_though_not_listed() {
        let mut roots = Roots::new(2);
        for pid in [1, 2, 3, 1, 3] {
            roots.add(1, &place(None), pid);
        }
        roots.add(2, &place(None), 1);
        let mut tally = Tally::default();
        roots.list(&mut tally, |_, func, _| func.to_string());
        assert_eq!(tally.roots_of("0x7", Some(1)), 2);
        assert_eq!(tally.roots_of("0x7", None), 3);
        assert_eq!(tally.roots_not_listed, 3);
    }

    fn place(told: Option<GuestName<'_>>) -> Place<'_> {
        Place {
            address: Gva(7),
            name: Name {
                symbol: None,
                module: None,
                kind: Kind::Module,
                irq_entry: false,
                told,
            },
        }
    }

    #[test]
    fn roots_at_one_place_are_told_apart_by_what_the_guest_calls_it() {
        let named = |module| {
            Some(GuestName {
                module,
                symbol: None,
            })
        };
        let mut roots = Roots::new(9);
        for told in [named("one"), named("two"), named("two")] {
            roots.add(1, &place(told), 1);
        }
        let mut tally = Tally::default();
        roots.list(&mut tally, |_, _, told| {
            told.map_or(String::new(), |told| told.to_string())
        });
        assert_eq!(tally.roots_of("[one?]", None), 1);
        assert_eq!(tally.roots_of("[two?]", None), 2);
    }
}
