//! What is no finding and worth telling: that the guest could not be looked at, or not
//! wholly. Much of that is in the guest's hand, so it is folded.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::integrity::{Check, Report};
use crate::session::{Doubt, FindingKind};

/// How long until a notice is told again.
const AGAIN: Duration = Duration::from_secs(3600);
/// A list that the guest changes just now may be hard to follow once. A doubt is told
/// where there was one in so many of so many looks, whichever check it was about.
const DOUBTFUL: u32 = 2;
const OF_LOOKS: u32 = 4;

/// What was told, and when.
#[derive(Default)]
pub(super) struct Notices {
    /// By what could not be checked; where it is all of it, by none.
    doubts: BTreeMap<Option<Check>, Fold>,
    /// Whether there was a doubt in the last looks, a bit each.
    looks: u32,
    unseen: Fold,
    boots: Fold,
}

#[derive(Default)]
struct Fold {
    at: Option<Instant>,
    since: u64,
}

impl Fold {
    /// It has happened. Whether it is to be told now, and how often it had happened
    /// since it was told.
    fn news(&mut self, now: Instant) -> Option<u64> {
        self.since += 1;
        let soon = |at: Instant| now.saturating_duration_since(at) < AGAIN;
        if self.at.is_some_and(soon) {
            return None;
        }
        self.at = Some(now);
        Some(std::mem::take(&mut self.since))
    }
}

impl Notices {
    /// What of a look is to be told.
    pub(super) fn look(&mut self, report: &Report, now: Instant) -> Vec<FindingKind> {
        let all = doubts(report);
        self.looks = (self.looks << 1 | u32::from(!all.is_empty())) & ((1 << OF_LOOKS) - 1);
        if self.looks.count_ones() < DOUBTFUL {
            return Vec::new();
        }
        let told = all.into_iter().filter_map(|(check, doubt)| {
            let count = self.doubts.entry(check).or_default().news(now)?;
            Some(FindingKind::IntegrityDoubt(Doubt {
                check,
                doubt,
                count,
            }))
        });
        told.collect()
    }

    /// There was no look for so long, though the domain runs.
    pub(super) fn unseen(
        &mut self,
        why: &str,
        time: Duration,
        now: Instant,
    ) -> Option<FindingKind> {
        Some(FindingKind::NotLookedAt {
            why: why.to_owned(),
            seconds: time.as_secs(),
            count: self.unseen.news(now)?,
        })
    }

    /// The guest says that it has booted, and the host saw no reset.
    pub(super) fn boot(&mut self, now: Instant) -> Option<FindingKind> {
        Some(FindingKind::BootWithoutReset {
            count: self.boots.news(now)?,
        })
    }
}

/// Why an absence of findings means nothing, and of which check.
fn doubts(report: &Report) -> Vec<(Option<Check>, String)> {
    let doubts = report.outcomes.iter();
    let mut all: Vec<_> = doubts
        .filter_map(|one| Some((Some(one.check), one.doubt.clone()?)))
        .collect();
    if report.not_listed > 0 {
        let why = format!(
            "{} findings were not listed, for there are too many",
            report.not_listed
        );
        all.push((None, why));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::integrity::Outcome;

    fn report(doubtful: &[Check]) -> Report {
        let outcome = |check: Check| Outcome {
            check,
            looked_at: 1,
            doubt: doubtful.contains(&check).then(|| "it is bent".to_owned()),
        };
        Report {
            outcomes: Check::ALL.map(outcome).to_vec(),
            ..Report::default()
        }
    }

    fn doubt(check: Check, count: u64) -> FindingKind {
        FindingKind::IntegrityDoubt(Doubt {
            check: Some(check),
            doubt: "it is bent".to_owned(),
            count,
        })
    }

    #[test]
    fn a_doubt_that_lasts_is_told_and_then_folded() {
        let mut notices = Notices::default();
        let start = Instant::now();
        let mut at = |doubtful: &[Check], seconds| {
            notices.look(&report(doubtful), start + Duration::from_secs(seconds))
        };
        // One that was gone at the next looks is none.
        assert_eq!(at(&[Check::Files], 0), []);
        for second in 1..4 {
            assert_eq!(at(&[], second), []);
        }
        assert_eq!(at(&[Check::Files], 4), []);
        assert_eq!(at(&[Check::Files], 5), [doubt(Check::Files, 1)]);
        for second in 6..100 {
            assert_eq!(at(&[Check::Files], second), []);
        }
        // Another check is another notice.
        assert_eq!(
            at(&[Check::Files, Check::Ftrace], 100),
            [doubt(Check::Ftrace, 1)]
        );
        assert_eq!(at(&[Check::Files], 3605), [doubt(Check::Files, 96)]);
    }

    #[test]
    fn doubts_that_go_round_the_checks_are_told() {
        let mut notices = Notices::default();
        let now = Instant::now();
        let told: Vec<FindingKind> = Check::ALL
            .iter()
            .flat_map(|check| notices.look(&report(&[*check]), now))
            .collect();
        assert_eq!(told.len(), Check::ALL.len() - 1, "{told:?}");
    }

    #[test]
    fn findings_that_are_not_listed_are_a_doubt_of_no_check() {
        let mut notices = Notices::default();
        let now = Instant::now();
        let mut full = report(&[]);
        full.not_listed = 3;
        notices.look(&full, now);
        let told = notices.look(&full, now);
        let [FindingKind::IntegrityDoubt(doubt)] = &told[..] else {
            panic!("{told:?}");
        };
        assert_eq!(doubt.check, None);
        assert!(doubt.doubt.starts_with("3 findings"), "{}", doubt.doubt);
    }
}
