//! What was found in the guest's memory so far, and what of it has been told.
//!
//! A hook stays where it is, and is found again in each look: it is told of once,
//! then every few minutes with a count, and once more when it has gone. A look in
//! which a check could not be made says nothing about what that check found before.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::integrity::{Finding, Report};
use crate::session::{FindingKind, Integrity};

/// How long until a finding is told of again.
const AGAIN: Duration = Duration::from_secs(300);
/// Different findings that are told apart.
const FINDINGS: usize = 1024;

/// What is known of the memory of one boot.
#[derive(Default)]
pub(super) struct Ledger(BTreeMap<Finding, Known>);

struct Known {
    /// When it was last told of.
    at: Instant,
    /// In how many looks it was seen since, and in how many in all.
    since: u64,
    looks: u64,
}

impl Ledger {
    /// Takes a look at the guest; what of it is to be told now.
    pub(super) fn take(&mut self, report: &Report, now: Instant) -> Vec<FindingKind> {
        let mut news = Vec::new();
        for finding in &report.findings {
            let room = self.0.len() < FINDINGS;
            match self.0.get_mut(finding) {
                Some(known) => {
                    known.looks += 1;
                    known.since += 1;
                    if now.saturating_duration_since(known.at) >= AGAIN {
                        known.at = now;
                        news.push(found(finding, std::mem::take(&mut known.since)));
                    }
                }
                None if room => {
                    let known = Known {
                        at: now,
                        since: 0,
                        looks: 1,
                    };
                    self.0.insert(finding.clone(), known);
                    news.push(found(finding, 1));
                }
                None => {}
            }
        }
        self.0.retain(|finding, known| {
            let there = report.findings.contains(finding) || !is_clear(report, finding);
            if !there {
                news.push(gone(finding, known));
            }
            there
        });
        news
    }

    /// The boot is over, and all that was in its memory with it.
    pub(super) fn void(&mut self) -> Vec<FindingKind> {
        let all = std::mem::take(&mut self.0);
        let gone = all.iter().map(|(finding, known)| gone(finding, known));
        gone.collect()
    }
}

/// Whether a look that does not list this finding says that it is not there.
fn is_clear(report: &Report, finding: &Finding) -> bool {
    let mut outcomes = report.outcomes.iter();
    let made = outcomes.any(|one| one.check == finding.check && one.doubt.is_none());
    report.not_listed == 0 && made
}

fn found(finding: &Finding, count: u64) -> FindingKind {
    FindingKind::Integrity(Box::new(Integrity {
        change: finding.clone(),
        count,
    }))
}

fn gone(finding: &Finding, known: &Known) -> FindingKind {
    FindingKind::IntegrityGone(Box::new(Integrity {
        change: finding.clone(),
        count: known.looks,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::integrity::{Check, Outcome};

    fn finding(check: Check, place: &str) -> Finding {
        Finding {
            check,
            place: place.to_owned(),
            address: 1,
            expected: "a".to_owned(),
            found: "b".to_owned(),
            owner: None,
        }
    }

    /// A look in which all checks were made.
    fn report(findings: Vec<Finding>) -> Report {
        let outcome = |check| Outcome {
            check,
            looked_at: 1,
            doubt: None,
        };
        Report {
            findings,
            outcomes: Check::ALL.map(outcome).to_vec(),
            ..Report::default()
        }
    }

    /// Whether it is gone, where, and how often it was seen.
    fn news(kinds: Vec<FindingKind>) -> Vec<(bool, String, u64)> {
        let one = |kind| match kind {
            FindingKind::Integrity(one) => (false, one.change.place, one.count),
            FindingKind::IntegrityGone(one) => (true, one.change.place, one.count),
            other => panic!("{other:?}"),
        };
        kinds.into_iter().map(one).collect()
    }

    fn told(gone: bool, place: &str, count: u64) -> (bool, String, u64) {
        (gone, place.to_owned(), count)
    }

    #[test]
    fn a_finding_is_told_once_then_with_its_count_and_when_it_has_gone() {
        let mut ledger = Ledger::default();
        let start = Instant::now();
        let hook = || report(vec![finding(Check::KernelText, "vfs_read")]);
        let mut at = |report: &Report, seconds| {
            news(ledger.take(report, start + Duration::from_secs(seconds)))
        };
        assert_eq!(at(&report(Vec::new()), 0), []);
        assert_eq!(at(&hook(), 1), [told(false, "vfs_read", 1)]);
        assert_eq!(at(&hook(), 2), []);
        assert_eq!(at(&hook(), 300), []);
        assert_eq!(at(&hook(), 301), [told(false, "vfs_read", 3)]);
        assert_eq!(at(&hook(), 302), []);
        assert_eq!(at(&report(Vec::new()), 303), [told(true, "vfs_read", 5)]);
        assert_eq!(at(&report(Vec::new()), 304), []);
        assert_eq!(at(&hook(), 305), [told(false, "vfs_read", 1)]);
    }

    #[test]
    fn another_content_of_the_same_place_is_another_finding() {
        let mut ledger = Ledger::default();
        let now = Instant::now();
        let one = finding(Check::KernelText, "vfs_read");
        let other = Finding {
            found: "c".to_owned(),
            ..one.clone()
        };
        ledger.take(&report(vec![one]), now);
        assert_eq!(
            news(ledger.take(&report(vec![other]), now)),
            [told(false, "vfs_read", 1), told(true, "vfs_read", 1)]
        );
    }

    #[test]
    fn what_a_check_found_is_not_gone_where_it_could_not_be_made_again() {
        let now = Instant::now();
        let text = || finding(Check::KernelText, "vfs_read");
        let files = || finding(Check::Files, "/proc");
        let doubtful = |check, doubt: Option<&str>| {
            let mut report = report(Vec::new());
            report.outcomes.retain(|one| one.check != check);
            if let Some(doubt) = doubt {
                report.outcomes.push(Outcome {
                    check,
                    looked_at: 0,
                    doubt: Some(doubt.to_owned()),
                });
            }
            report
        };
        for unclear in [
            doubtful(Check::Files, Some("no BTF")),
            doubtful(Check::Files, None),
        ] {
            let mut ledger = Ledger::default();
            ledger.take(&report(vec![text(), files()]), now);
            assert_eq!(
                news(ledger.take(&unclear, now)),
                [told(true, "vfs_read", 1)]
            );
            let clear = report(Vec::new());
            assert_eq!(news(ledger.take(&clear, now)), [told(true, "/proc", 1)]);
        }
        // Nor where there are more findings than are listed.
        let mut ledger = Ledger::default();
        ledger.take(&report(vec![text()]), now);
        let mut full = report(vec![files()]);
        full.not_listed = 1;
        assert_eq!(news(ledger.take(&full, now)), [told(false, "/proc", 1)]);
    }

    #[test]
    fn with_the_boot_all_of_it_has_gone_and_there_is_room_for_so_many() {
        let mut ledger = Ledger::default();
        let now = Instant::now();
        let many = |from: usize| {
            let places = from..from + FINDINGS;
            let all = places.map(|place| finding(Check::Files, &place.to_string()));
            let mut report = report(all.collect());
            // None of them is told to be gone.
            report.not_listed = 1;
            report
        };
        assert_eq!(ledger.take(&many(0), now).len(), FINDINGS);
        assert_eq!(ledger.take(&many(FINDINGS), now), []);
        assert_eq!(ledger.void().len(), FINDINGS);
        assert_eq!(ledger.void(), []);
    }
}
