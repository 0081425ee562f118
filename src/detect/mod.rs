//! Whether the guest's kernel control flow is hooked, judged by the call flow.
//!
//! ```text
//! events -Profiler-> Profile -+-> Baseline            (a clean guest: learn)
//!                             `-Judge + Baseline-> Findings -> Verdict   (check)
//! ```
//!
//! A [`Profile`] is what a call flow adds up to: who called what from where, in
//! which order, how often, how long. [`Baseline`] keeps, by names that outlive a
//! boot, what profiles of a clean guest showed. A [`Finding`] is what a profile
//! shows that it should not, with the rule that says so, how sure that is, and
//! the call path at which it was seen first. A [`Verdict`] is all findings of a
//! session, and what could not be told.
//!
//! **Noise is not a finding.** What interrupts called, calls around which others
//! were not seen, calls that were cut, and calls amid which records were lost
//! have no part in a profile. A path that is new but rare is a notice, which
//! does not make a guest count as hooked; see `judge.rs`.
//!
//! **Memory is bounded.** All is counted by symbols, of which there are only as
//! many as the symbol file has, and in tables whose sizes are fixed
//! ([`ProfileLimits`]); what finds no room is counted.
//!
//! This room uses `callflow` and `session`. It reads no guest memory: checks of
//! memory are another matter. docs/detection.md says what each rule sees, and
//! what none of them can see.

mod baseline;
mod finding;
mod histogram;
mod judge;
mod profile;
mod profiler;
mod rules;
mod silences;
mod site;
mod verdict;

pub use baseline::{
    differences, Band, Baseline, Difference, Function, LearnError, Learned, Learnt, Root, Silence,
    Store, StoreError, TwoKernels,
};
pub use finding::{Evidence, Finding, Mark, PathStep};
pub use judge::judge;
pub use profile::{InModules, Profile, ProfileLimits, Skipped};
pub use profiler::Profiler;
pub use rules::{Rule, Severity};
pub use verdict::{check, Conclusion, Verdict};

use crate::callflow::{events, Kernels, Limits, Names, Tally};
use crate::ring::record::Item;
use crate::session::{Session, SessionError, State};

/// What a function does is judged only from so many calls on.
pub const MIN_CALLS: u64 = 100;
/// What is new is a habit only from so many times on,
pub const MIN_SEEN: u64 = 20;
/// and only if it is so much of all: one in this many.
pub const MIN_SHARE: u64 = 50;
/// How often and how long is judged by a baseline of so many sessions only: how far such
/// numbers lie apart from one session to another, fewer do not tell.
pub const MIN_SESSIONS: usize = 3;

/// How long it may take until what the guest did to its list of modules is in a
/// session that is still written: the helper looks ten times a second.
const LISTED: std::time::Duration = std::time::Duration::from_millis(300);

/// What a session adds up to, its addresses resolved by `names`.
///
/// # Errors
/// If its records cannot be read.
pub fn profile_of<'n>(
    session: &Session,
    names: &'n Kernels<'_>,
    limits: ProfileLimits,
) -> Result<(Profile<'n>, Tally), SessionError> {
    let cpus = session.meta.boots.last().map_or(0, |boot| boot.nr_cpus);
    let cpus: Vec<u16> = (0..cpus.min(u32::from(u16::MAX)) as u16).collect();
    if session.meta.state == State::Open {
        std::thread::sleep(LISTED);
    }
    let mut profiler = Profiler::new(limits);
    *profiler.modules() = session.modules()?;
    profile_with(profiler, session.items(), names, &cpus)
}

/// What items add up to, merged over the CPUs by time. `cpus` are those that
/// the guest has.
///
/// # Errors
/// The first that `items` gives.
pub fn profile_items<'n, N, I, E>(
    items: I,
    names: &'n N,
    limits: ProfileLimits,
    cpus: &[u16],
) -> Result<(Profile<'n>, Tally), E>
where
    N: Names + ?Sized,
    I: IntoIterator<Item = Result<Item, E>>,
{
    profile_with(Profiler::new(limits), items, names, cpus)
}

/// The same, by a profiler that knows of the guest's modules.
///
/// # Errors
/// The first that `items` gives.
pub fn profile_with<'n, N, I, E>(
    mut profiler: Profiler<'n>,
    items: I,
    names: &'n N,
    cpus: &[u16],
) -> Result<(Profile<'n>, Tally), E>
where
    N: Names + ?Sized,
    I: IntoIterator<Item = Result<Item, E>>,
{
    let mut events = events(items, names, Limits::default());
    for event in events.by_ref() {
        profiler.event(&event?);
    }
    Ok((profiler.finish(cpus), events.tally()))
}
