//! From a session to a baseline.

use std::collections::BTreeSet;

use super::{Band, Baseline, Function, Learnt, Root, Silence, Skipped, TwoKernels};
use crate::callflow::{Kernels, Tally};
use crate::detect::histogram::Histogram;
use crate::detect::judge::judge;
use crate::detect::profile::{Profile, Silence as Silent};
use crate::detect::site::{is_dispatcher, is_system_call, Label, Labels, Site};
use crate::detect::{profile_of, ProfileLimits, Severity, MIN_CALLS, MIN_SEEN};
use crate::kernel::escape;
use crate::session::{ControlFlow, FindingKind, Session, SessionError, State};

/// Why nothing is learnt from a session.
#[derive(Debug, thiserror::Error)]
pub enum LearnError {
    /// It cannot be read.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// It is still written.
    #[error("the session is not closed: 'xftrace off' first, so that all of it is there")]
    Open,
    /// It is not clean.
    #[error(
        "the session is not of a clean guest: {0}; a baseline made of it would let the same pass"
    )]
    NotClean(String),
    /// A baseline found something in it while it was traced.
    #[error(
        "the session is not of a clean guest by the baseline that judged it while it was traced: \
         {0}. Where that is the guest's own all the same, which the baseline has yet to see, \
         learn sessions that no baseline judges (enroll the domain without --baseline for them)"
    )]
    Judged(String),
    /// It has no calls.
    #[error("the session has no calls to learn from; trace a guest that works")]
    Empty,
    /// It is of a kernel of its own.
    #[error(transparent)]
    Kernel(#[from] TwoKernels),
    /// It was learnt before.
    #[error("the session was learnt before")]
    Again,
}

/// What a session taught.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Learned {
    /// Calls in it.
    pub calls: u64,
    /// Edges that the baseline did not know.
    pub new_edges: usize,
    /// Sequences of system calls that it did not know.
    pub new_sequences: usize,
    /// What was left out.
    pub skipped: Skipped,
    /// What the session was warned of while it was traced, by the rule's name and what was
    /// seen: the baseline takes it for the guest's own from now on.
    pub warnings: BTreeSet<(String, String)>,
}

/// Whether it is a finding that only warns.
fn warns(flow: &ControlFlow) -> bool {
    flow.severity == Severity::Warning.text()
}

impl Baseline {
    /// Learns from a session, in which nothing may be wrong.
    ///
    /// # Errors
    /// See [`LearnError`]. The baseline is as before then.
    pub fn learn(&mut self, session: &Session) -> Result<Learned, LearnError> {
        // What it has yet to see is found by a baseline too, while that is learnt.
        let other = Self::taught(session, self.has_converged())?;
        if other
            .sessions
            .keys()
            .any(|id| self.sessions.contains_key(id))
        {
            return Err(LearnError::Again);
        }
        let warned = session
            .findings()?
            .into_iter()
            .filter_map(|one| match one.kind {
                FindingKind::ControlFlow(flow) if warns(&flow) => Some((flow.rule, flow.what)),
                _ => None,
            });
        let warnings = warned.collect();
        let (edges, sequences) = (self.edges(), self.sequences());
        self.merge(&other)?;
        let learnt = other.sessions.values().next();
        Ok(Learned {
            calls: learnt.map_or(0, |learnt| learnt.calls),
            new_edges: self.edges() - edges,
            new_sequences: self.sequences() - sequences,
            skipped: learnt.map(|learnt| learnt.skipped).unwrap_or_default(),
            warnings,
        })
    }

    /// How many sequences of system calls it knows.
    pub fn sequences(&self) -> usize {
        self.processes.values().map(BTreeSet::len).sum()
    }

    /// What one session teaches.
    ///
    /// # Errors
    /// See [`LearnError`].
    pub fn of(session: &Session) -> Result<Self, LearnError> {
        Self::taught(session, false)
    }

    /// The same; `strictly` if warnings count too of what the guest was caught at.
    fn taught(session: &Session, strictly: bool) -> Result<Self, LearnError> {
        if session.meta.state == State::Open {
            return Err(LearnError::Open);
        }
        let is_warning =
            |kind: &FindingKind| matches!(kind, FindingKind::ControlFlow(flow) if warns(flow));
        let caught = session.findings()?;
        // A guest that was down for long is none that was caught.
        let is_caught = |kind: &&FindingKind| !matches!(kind, FindingKind::NotTraced { .. });
        let mut counts = caught.iter().map(|finding| &finding.kind).filter(is_caught);
        if let Some(kind) = counts.find(|kind| strictly || !is_warning(kind)) {
            let text = serde_json::to_string(kind).unwrap_or_default();
            let text = format!("it was caught at {text}");
            return Err(match kind {
                FindingKind::ControlFlow(_) => LearnError::Judged(text),
                _ => LearnError::NotClean(text),
            });
        }
        let mut banners = session.meta.boots.iter().map(|boot| boot.banner.trim_end());
        let banner = banners.next().ok_or(LearnError::Empty)?;
        if let Some(other) = banners.find(|other| *other != banner) {
            return Err(TwoKernels(banner.to_owned(), other.to_owned()).into());
        }
        let names = Kernels::of(session)?;
        let (profile, tally) = profile_of(session, &names, ProfileLimits::default())?;
        // What no kernel does is not learnt, whether or not somebody judged it.
        let found = judge(&profile, None, session);
        if let Some(sure) = found.iter().find(|one| one.severity == Severity::Critical) {
            let what = format!("{}: {}", sure.rule.name(), sure.what);
            return Err(LearnError::NotClean(what));
        }
        let mut baseline = Self::from_profile(banner, &profile, &tally)?;
        let learnt = Learnt {
            calls: tally.calls,
            lost: tally.lost_records.total(),
            skipped: profile.skipped,
        };
        let id = format!("{} {}", session.meta.uuid, session.meta.started_ns);
        baseline.sessions.insert(id, learnt);
        Ok(baseline)
    }

    /// What a call flow teaches.
    ///
    /// # Errors
    /// If it is not clean, or empty.
    pub fn from_profile(
        kernel: &str,
        profile: &Profile<'_>,
        tally: &Tally,
    ) -> Result<Self, LearnError> {
        if tally.forged.total() > 0 {
            let forged = format!("{} forged records", tally.forged.total());
            return Err(LearnError::NotClean(forged));
        }
        if profile.calls == 0 {
            return Err(LearnError::Empty);
        }
        let labels = &profile.labels;
        let mut baseline = Self::new(kernel);
        for (&label, function) in &profile.functions {
            let strange = function.from_outside.is_some() || label == Label::OUTSIDE;
            if strange {
                let what = format!(
                    "{} was called from where no kernel code belongs",
                    labels.name(label)
                );
                return Err(LearnError::NotClean(what));
            }
            let known = baseline.functions.entry(name(labels, label)).or_default();
            known.merge(&Function::of(labels, function));
        }
        let pace = Pace::of(profile);
        for (&label, root) in &profile.roots {
            let known = baseline.roots.entry(name(labels, label)).or_default();
            known.merge(&Root {
                callers: root
                    .callers
                    .keys()
                    .map(|site| escape(site.to_string().as_bytes()))
                    .collect(),
                system_call: is_system_call(labels.name(label))
                    || root.callers.keys().any(is_dispatcher),
                calls: Band::of(&root.calls, |calls| calls),
                duration: pace
                    .and_then(|pace| Band::of(&root.spent, |nanos| pace.hundredths(nanos))),
            });
        }
        for (comm, process) in &profile.processes {
            let known = baseline.processes.entry(escape(comm.bytes())).or_default();
            known.extend(process.sequences.keys().map(|of| sequence(labels, of)));
        }
        baseline.silence = Silence {
            longest_ns: profile
                .silences
                .iter()
                .map(Silent::nanos)
                .max()
                .unwrap_or(0),
            whole: profile.silences.iter().any(|silence| silence.whole),
        };
        Ok(baseline)
    }
}

/// A function's name, fit for a file.
pub(in crate::detect) fn name(labels: &Labels<'_>, label: Label) -> String {
    escape(labels.name(label).as_bytes())
}

/// Three system calls, without what all their names begin with.
pub(in crate::detect) fn sequence(labels: &Labels<'_>, of: &[Label; 3]) -> String {
    let short = |label: &Label| {
        let name = labels.name(*label);
        escape(name.strip_prefix("__x64_").unwrap_or(name).as_bytes())
    };
    of.iter().map(short).collect::<Vec<_>>().join(" ")
}

/// One callee directly behind another.
pub(in crate::detect) fn order(labels: &Labels<'_>, (first, second): (Label, Label)) -> String {
    format!("{} {}", name(labels, first), name(labels, second))
}

/// Code in the module area: a module's name, or what stands for one without.
pub(in crate::detect) fn module(site: &Site<'_>) -> String {
    match site {
        Site::Module(Some(module)) => escape(module.as_bytes()),
        site => site.to_string(),
    }
}

impl Function {
    fn of(labels: &Labels<'_>, function: &crate::detect::profile::Function<'_>) -> Self {
        let named = |label: &Label| name(labels, *label);
        let always = function
            .callees
            .iter()
            .filter(|(_, seen)| seen.count == function.calls)
            .map(|(label, _)| named(label));
        Self {
            callees: function
                .callees
                .keys()
                .map(|label| (named(label), 1))
                .collect(),
            always: (function.calls >= MIN_CALLS).then(|| always.collect()),
            order: function
                .orders
                .keys()
                .map(|pair| order(labels, *pair))
                .collect(),
            nested: function.nested.is_some(),
            from_modules: function.from_modules.keys().map(module).collect(),
        }
    }
}

impl Band {
    fn of(values: &Histogram, scale: impl Fn(u64) -> u64) -> Option<Self> {
        let median = scale(values.median()?);
        let (low, high) = values.without_extremes(MIN_SEEN - 1)?;
        Some(Self {
            low: scale(low),
            lowest_median: median,
            highest_median: median,
            high: scale(high),
        })
    }
}

/// How long a call takes that calls nothing: the unit of durations.
#[derive(Clone, Copy, Debug)]
pub(in crate::detect) struct Pace(u64);

impl Pace {
    /// That of a profile; `None` if it has too few of them to tell.
    pub(in crate::detect) fn of(profile: &Profile<'_>) -> Option<Self> {
        let median = profile.leaves.median().filter(|median| *median > 0)?;
        (profile.leaves.total() >= MIN_CALLS).then_some(Self(median))
    }

    /// A time in hundredths of it.
    pub(in crate::detect) fn hundredths(self, nanos: u64) -> u64 {
        u64::try_from(u128::from(nanos) * 100 / u128::from(self.0)).unwrap_or(u64::MAX)
    }
}
