//! What a call flow adds up to, for a baseline to be made of and to be compared
//! with one.

use std::collections::HashMap;
use std::hash::Hash;

use super::histogram::Histogram;
use super::site::{Label, Labels, Site};
use super::MIN_CALLS;
use crate::callflow::Place;
use crate::ring::record::{Comm, Task};
use crate::session::ListTells;

/// What a [`Profile`] may keep. A guest's own kernel has a few thousand
/// functions under a few roots; a hostile one has what these numbers allow,
/// some 50 MiB.
#[derive(Clone, Copy, Debug)]
pub struct ProfileLimits {
    /// Callees, orders of callees and return addresses, of all functions
    /// together.
    pub edges: usize,
    /// Tasks whose system calls are followed.
    pub tasks: usize,
    /// Process names, and sequences of system calls, of all together.
    pub sequences: usize,
    /// Different callees, or orders of callees, that are told apart below one
    /// call.
    pub below: usize,
}

impl Default for ProfileLimits {
    fn default() -> Self {
        Self {
            edges: 65_536,
            tasks: 8_192,
            sequences: 65_536,
            below: 64,
        }
    }
}

/// A call on the way to something that was seen.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Step<'n> {
    pub(crate) func: Place<'n>,
    /// None where its record does not tell (plain).
    pub(crate) caller: Option<Place<'n>>,
}

/// Where and when something was seen first.
#[derive(Clone, Debug)]
pub(crate) struct Example<'n> {
    pub(crate) boot: u32,
    pub(crate) time: u64,
    pub(crate) cpu: u16,
    pub(crate) task: Task,
    /// The calls around it, outermost first, and itself.
    pub(crate) path: Vec<Step<'n>>,
}

/// How often something was seen, and where first.
#[derive(Clone, Debug)]
pub(crate) struct Seen<'n> {
    pub(crate) count: u64,
    pub(crate) first: Example<'n>,
}

/// Things seen, by what they are.
pub(crate) type Sightings<'n, K> = HashMap<K, Seen<'n>>;

/// All calls of one function that were seen from beginning to end.
#[derive(Debug, Default)]
pub(crate) struct Function<'n> {
    /// How many.
    pub(crate) calls: u64,
    /// In how many of them each callee was called.
    pub(crate) callees: Sightings<'n, Label>,
    /// In how many of them one callee directly followed another.
    pub(crate) orders: Sightings<'n, (Label, Label)>,
    /// In how many of them it was below a call of its own.
    pub(crate) nested: Option<Seen<'n>>,
    /// Of all calls, complete or not: how many came from which code in the module
    /// area, [`Site::Module`] or [`Site::Unlisted`].
    pub(crate) from_modules: Sightings<'n, Site<'n>>,
    /// How many came from where no kernel code belongs.
    pub(crate) from_outside: Option<Seen<'n>>,
    /// Of the complete ones, the first, to show what is missing in.
    pub(crate) first: Option<Example<'n>>,
}

/// All calls of a function as a root.
#[derive(Debug, Default)]
pub(crate) struct Root<'n> {
    /// How many, by return address.
    pub(crate) callers: Sightings<'n, Site<'n>>,
    /// Of the complete ones: how many calls were below each.
    pub(crate) calls: Histogram,
    /// How long each took, nanoseconds.
    pub(crate) spent: Histogram,
    /// The first complete one.
    pub(crate) first: Option<Example<'n>>,
}

/// The system calls of all processes of one name.
#[derive(Debug, Default)]
pub(crate) struct Process<'n> {
    /// How many sequences.
    pub(crate) total: u64,
    /// Each three that followed each other in a task.
    pub(crate) sequences: Sightings<'n, [Label; 3]>,
}

/// The longest time that a CPU gave no record while others went on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Silence {
    pub(crate) cpu: u16,
    pub(crate) boot: u32,
    /// When it began and ended, guest trace clock.
    pub(crate) from: u64,
    pub(crate) until: u64,
    /// How many records others gave meanwhile.
    pub(crate) others: u64,
    /// Whether that was the whole boot, as far as it was traced.
    pub(crate) whole: bool,
}

impl Profile<'_> {
    /// Notes silences of CPUs, of which so many are kept.
    pub(super) fn note_silences(&mut self, silences: Vec<Silence>) {
        const KEPT: usize = 1024;
        self.silences.extend(silences);
        self.silences
            .sort_by_key(|silence| (silence.boot, silence.cpu));
        self.silences.truncate(KEPT);
    }
}

impl Silence {
    pub(crate) fn nanos(&self) -> u64 {
        self.until.saturating_sub(self.from)
    }
}

/// What a call flow adds up to. Interrupts, calls with a gap around them and
/// calls that were cut or had records lost amid them have no part in it.
#[derive(Debug)]
pub struct Profile<'n> {
    pub(crate) labels: Labels<'n>,
    pub(crate) functions: HashMap<Label, Function<'n>>,
    pub(crate) roots: HashMap<Label, Root<'n>>,
    pub(crate) processes: HashMap<Comm, Process<'n>>,
    /// How long calls took that have none below them: what the tracing of one
    /// call costs, and so a measure of how fast the guest ran.
    pub(crate) leaves: Histogram,
    pub(crate) silences: Vec<Silence>,
    /// What was left out.
    pub skipped: Skipped,
    /// Calls looked at.
    pub calls: u64,
    /// How far the guest's list of modules tells of code in the module area.
    pub in_modules: InModules,
    pub(crate) limits: ProfileLimits,
    pub(crate) edges: usize,
    pub(crate) sequences: usize,
}

/// Code in the module area that was called, or called, but for that of modules that set
/// themselves up: how far the guest's list of modules tells of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InModules {
    /// How often.
    pub all: u64,
    /// Of that, how often at a time when the list told only of what was on it: it changed
    /// around then, or nobody looked.
    pub in_doubt: u64,
    /// Of that, how often the code was on no list.
    pub not_told: u64,
    /// How often beside that code in the module area was called, or called, which was not
    /// judged, since it was not seen whether it lies below what sets a module up.
    pub excused: u64,
}

impl InModules {
    pub(super) fn add(&mut self, told: ListTells) {
        self.all += 1;
        self.in_doubt += u64::from(!told.of_all);
        self.not_told += u64::from(told.listed.is_none());
    }

    /// Whether most of what code of modules did is excused, so that no rule that goes by
    /// such code says much.
    pub fn are_excused(&self) -> bool {
        self.excused >= MIN_CALLS && self.excused > self.all
    }

    /// Whether the list told too little for `unlisted-module` to be judged. It goes by the
    /// times at which modules did anything, those too that are listed: they are always told
    /// of, do most of what modules do, and would outweigh what hides.
    pub fn tell_little(&self) -> bool {
        self.all >= MIN_CALLS && self.in_doubt > self.all / 2 && self.not_told > 0
    }
}

/// What a profile leaves out, and why.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Skipped {
    /// Calls that interrupts made.
    pub interrupts: u64,
    /// Calls around which others were not seen.
    pub gaps: u64,
    /// Calls whose return was not seen, or was of another call.
    pub cut: u64,
    /// Calls amid which records were lost, or calls were not seen.
    pub incomplete: u64,
    /// Sightings for which the profile had no room.
    pub no_room: u64,
}

impl<'n> Profile<'n> {
    pub(crate) fn new(limits: ProfileLimits) -> Self {
        Self {
            labels: Labels::new(),
            functions: HashMap::new(),
            roots: HashMap::new(),
            processes: HashMap::new(),
            leaves: Histogram::default(),
            silences: Vec::new(),
            skipped: Skipped::default(),
            calls: 0,
            in_modules: InModules::default(),
            limits,
            edges: 0,
            sequences: 0,
        }
    }

    /// Whether there was room for all that was seen.
    pub fn is_whole(&self) -> bool {
        self.skipped.no_room == 0
    }
}

/// Counts a sighting of `what`. One that is new takes a place of `room`, which
/// counts down from `limit`; without one it is dropped, and false returned.
pub(crate) fn note<'n, K: Hash + Eq>(
    seen: &mut Sightings<'n, K>,
    used: &mut usize,
    limit: usize,
    what: K,
    example: impl FnOnce() -> Example<'n>,
) -> bool {
    if let Some(known) = seen.get_mut(&what) {
        known.count += 1;
        return true;
    }
    if *used >= limit {
        return false;
    }
    *used += 1;
    let first = example();
    seen.insert(what, Seen { count: 1, first });
    true
}
