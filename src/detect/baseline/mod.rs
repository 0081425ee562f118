//! What a kernel does when nothing is wrong: learnt from sessions of a guest
//! that is known to be clean.
//!
//! A baseline says, by names that mean the same in every boot, which functions
//! each function calls, in which order, which of them always, whether it is
//! ever nested in itself; for each traced root its return addresses, how many
//! calls it makes and how long it takes; and which system calls follow each
//! other in processes of each name. It belongs to one build of one kernel.
//!
//! **Learning more only widens it.** Each part is a set that grows, a set that
//! shrinks where its members are demands (callees that are *always* called), or
//! a band that widens; so the order in which sessions are learnt does not
//! matter, and what one session taught no other can take back. For each callee
//! it counts the sessions that showed it: from those that only one showed
//! follows how many new ones the next session will bring, and so whether it has
//! seen enough ([`Baseline::expected_new`]).
//!
//! The file is JSON with sorted keys, a thing a line, so that `diff` says what
//! changed. [`Store`] keeps baselines by name.

mod diff;
mod learn;
mod store;

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

pub use diff::{differences, Difference};
pub(super) use learn::{module, name, order, sequence, Pace};
pub use learn::{LearnError, Learned};
pub use store::{Store, StoreError};

use super::profile::Skipped;

/// What the `format` of a baseline's file says.
const FORMAT: &str = "xftrace-baseline";
/// The version of the file's form.
const VERSION: u32 = 1;

/// A baseline.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Baseline {
    /// `xftrace-baseline`.
    pub format: String,
    /// 1.
    pub version: u32,
    /// The kernel's banner, `linux_banner`: no two builds have the same.
    pub kernel: String,
    /// The sessions that it was learnt from, by domain and start.
    pub sessions: BTreeMap<String, Learnt>,
    /// The traced functions, by name.
    pub roots: BTreeMap<String, Root>,
    /// All functions, by name.
    pub functions: BTreeMap<String, Function>,
    /// The system calls of processes, by their name: each three that followed
    /// each other in a task.
    pub processes: BTreeMap<String, BTreeSet<String>>,
    /// The longest time that a CPU gave no record while others gave many.
    pub silence: Silence,
}

/// A session that was learnt.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Learnt {
    /// Calls that were seen in it.
    pub calls: u64,
    /// Records of it that were lost.
    pub lost: u64,
    /// What was left out of learning.
    pub skipped: Skipped,
}

/// A function as a root.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Root {
    /// Its return addresses, as symbol and offset.
    pub callers: BTreeSet<String>,
    /// It is called by the dispatcher of system calls.
    pub system_call: bool,
    /// How many calls there are below one of it.
    pub calls: Option<Band>,
    /// How long one of it takes, in hundredths of the time that a call takes
    /// which calls nothing. Such a call is mostly the cost of being traced; in
    /// its terms a slow host and a fast one look alike.
    pub duration: Option<Band>,
}

/// Where values lie.
///
/// The ends are not a share of the values alone: what a guest does seldom over a
/// session may be all that it does for some seconds, and by these a trace is
/// judged while it is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Band {
    /// Fewer than 20 are lower, and one of a hundred at most, in the session where
    /// it is lowest.
    pub low: u64,
    /// The lowest median of a session.
    pub lowest_median: u64,
    /// The highest median of a session.
    pub highest_median: u64,
    /// Fewer than 20 are higher, and one of a hundred at most, in the session
    /// where it is highest.
    pub high: u64,
}

/// A function.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Function {
    /// The functions it calls, each with how many sessions showed it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub callees: BTreeMap<String, u32>,
    /// Those of them that each call of it calls, in each session that showed
    /// it often enough to tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub always: Option<BTreeSet<String>>,
    /// Which callee directly followed which; `-` is the beginning and the end.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub order: BTreeSet<String>,
    /// It was nested in itself.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub nested: bool,
    /// The modules that called it: their names, or one name for all that have
    /// none.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub from_modules: BTreeSet<String>,
}

/// How long a CPU may be silent while others are not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Silence {
    /// The longest time, nanoseconds.
    pub longest_ns: u64,
    /// A CPU was silent from the beginning of a trace to its end.
    pub whole: bool,
}

impl Band {
    /// The smallest band that both lie in.
    #[must_use]
    pub fn join(self, other: Self) -> Self {
        Self {
            low: self.low.min(other.low),
            lowest_median: self.lowest_median.min(other.lowest_median),
            highest_median: self.highest_median.max(other.highest_median),
            high: self.high.max(other.high),
        }
    }
}

/// Two baselines that cannot be one.
#[derive(Debug, thiserror::Error)]
#[error("the baselines are of two kernels: {0:?} and {1:?}; what one build does says nothing of another")]
pub struct TwoKernels(pub String, pub String);

impl Baseline {
    /// Whether code of modules by this name called anything, or was called, at all.
    pub(super) fn knows_code(&self, name: &str) -> bool {
        let takes_part = |function: &Function| {
            function.from_modules.contains(name) || function.callees.contains_key(name)
        };
        self.functions.values().any(takes_part)
    }

    /// One that knows nothing yet.
    pub fn new(kernel: &str) -> Self {
        Self {
            format: FORMAT.to_owned(),
            version: VERSION,
            kernel: kernel.trim_end().to_owned(),
            sessions: BTreeMap::new(),
            roots: BTreeMap::new(),
            functions: BTreeMap::new(),
            processes: BTreeMap::new(),
            silence: Silence::default(),
        }
    }

    /// Learns what another baseline has learnt, from other sessions.
    ///
    /// # Errors
    /// If it is of another kernel.
    pub fn merge(&mut self, other: &Self) -> Result<(), TwoKernels> {
        if self.kernel != other.kernel {
            return Err(TwoKernels(self.kernel.clone(), other.kernel.clone()));
        }
        for (session, learnt) in &other.sessions {
            self.sessions.insert(session.clone(), learnt.clone());
        }
        for (name, root) in &other.roots {
            self.roots.entry(name.clone()).or_default().merge(root);
        }
        for (name, function) in &other.functions {
            let known = self.functions.entry(name.clone()).or_default();
            known.merge(function);
        }
        for (process, sequences) in &other.processes {
            let known = self.processes.entry(process.clone()).or_default();
            known.extend(sequences.iter().cloned());
        }
        self.silence = Silence {
            longest_ns: self.silence.longest_ns.max(other.silence.longest_ns),
            whole: self.silence.whole || other.silence.whole,
        };
        Ok(())
    }

    /// How many edges it has: pairs of a function and one that it calls.
    pub fn edges(&self) -> usize {
        let callees = self
            .functions
            .values()
            .map(|function| function.callees.len());
        callees.sum()
    }

    /// How many edges that it does not know the next session is likely to
    /// bring, if it is like those learnt: as many as only one session showed,
    /// over the number of sessions (Good and Turing's estimate, as Chao put it
    /// for samples). `None` before there are two sessions.
    pub fn expected_new(&self) -> Option<f64> {
        let once = self
            .functions
            .values()
            .flat_map(|function| function.callees.values())
            .filter(|sessions| **sessions == 1)
            .count();
        (self.sessions.len() >= 2).then(|| once as f64 / self.sessions.len() as f64)
    }

    /// Whether a further session is likely to bring nothing new: less than one
    /// edge in a hundred.
    pub fn has_converged(&self) -> bool {
        let most = (self.edges() as f64 / 100.0).max(1.0);
        self.expected_new().is_some_and(|new| new < most)
    }
}

impl Root {
    fn merge(&mut self, other: &Self) {
        self.callers.extend(other.callers.iter().cloned());
        self.system_call |= other.system_call;
        self.calls = join(self.calls, other.calls);
        self.duration = join(self.duration, other.duration);
    }
}

fn join(a: Option<Band>, b: Option<Band>) -> Option<Band> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.join(b)),
        (a, b) => a.or(b),
    }
}

impl Function {
    fn merge(&mut self, other: &Self) {
        for (callee, sessions) in &other.callees {
            let known = self.callees.entry(callee.clone()).or_default();
            *known = known.saturating_add(*sessions);
        }
        self.always = match (self.always.take(), &other.always) {
            (Some(ours), Some(theirs)) => Some(ours.intersection(theirs).cloned().collect()),
            (ours, theirs) => ours.or_else(|| theirs.clone()),
        };
        self.order.extend(other.order.iter().cloned());
        self.nested |= other.nested;
        self.from_modules.extend(other.from_modules.iter().cloned());
    }
}
