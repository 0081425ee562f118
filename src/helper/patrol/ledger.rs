//! What was found in the guest's memory so far, and what of it has been told.
//!
//! A hook stays where it is, and is found again in each look: it is told of once,
//! then every few minutes with a count, and once more when it has gone. What makes it
//! the same is check, place and address. What is found there may be another thing each
//! time, and it may come and go: that is news, of which there is so much for each place
//! in a while, and then one line with the count. So one place that changes at each look
//! takes neither the room in the files nor the turn of another.
//!
//! A look in which a check could not be made says nothing about what that check found
//! before. Nor does a boot: that there was one is the guest's word, and the first look
//! behind it says what is there.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use crate::integrity::{Check, Finding, Report};
use crate::session::{FindingKind, Integrity};

/// How long until a finding is told of again.
const AGAIN: Duration = Duration::from_secs(300);
/// How often one place is told of in that time.
const LINES: u32 = 4;
/// Different findings that are told apart.
const FINDINGS: usize = 1024;

/// What is known of a guest's memory.
#[derive(Default)]
pub(super) struct Ledger(BTreeMap<Key, Known>);

type Key = (Check, String, u64);

/// Something to tell.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct News {
    pub(super) kind: FindingKind,
    /// Whether it was told of before.
    pub(super) again: bool,
}

struct Known {
    /// What was found there last.
    finding: Finding,
    /// Whether it is there, and whether that was told.
    there: bool,
    told_there: bool,
    /// When it was last told of.
    at: Instant,
    /// Since when lines are counted, and how many there were.
    window: Instant,
    lines: u32,
    /// In how many looks it was seen since it was told of, in how many since it was
    /// told to be there, and how often it had changed or come back since.
    since: u64,
    looks: u64,
    changes: u64,
}

impl Known {
    fn new(finding: &Finding, now: Instant) -> Self {
        Self {
            finding: finding.clone(),
            there: true,
            told_there: false,
            at: now,
            window: now,
            lines: 0,
            since: 1,
            looks: 1,
            changes: 0,
        }
    }

    /// It was found in this look too.
    fn seen(&mut self, finding: &Finding) {
        if !self.there || self.finding != *finding {
            self.changes += 1;
            self.finding.clone_from(finding);
        }
        self.there = true;
        self.looks += 1;
        self.since += 1;
    }

    /// What is to be told of it now.
    fn news(&mut self, now: Instant) -> Option<FindingKind> {
        if now.saturating_duration_since(self.window) >= AGAIN {
            self.window = now;
            self.lines = 0;
        }
        let due = now.saturating_duration_since(self.at) >= AGAIN;
        let news = self.there != self.told_there || self.changes > 0;
        if !(news || (self.there && due)) || self.lines >= LINES {
            return None;
        }
        self.lines += 1;
        self.at = now;
        self.told_there = self.there;
        let since = std::mem::take(&mut self.since);
        let mut told = Box::new(Integrity {
            change: self.finding.clone(),
            count: since,
            changes: std::mem::take(&mut self.changes),
        });
        if self.there {
            return Some(FindingKind::Integrity(told));
        }
        told.count = std::mem::take(&mut self.looks);
        Some(FindingKind::IntegrityGone(told))
    }

    /// Whether all has been told of what is gone for long enough.
    fn is_over(&self, now: Instant) -> bool {
        let told = !self.told_there && self.changes == 0;
        !self.there && told && now.saturating_duration_since(self.at) >= AGAIN
    }
}

impl Ledger {
    /// Takes a look at the guest; what of it is to be told now, the newest first.
    pub(super) fn take(&mut self, report: &Report, now: Instant) -> Vec<News> {
        self.0.retain(|_, known| !known.is_over(now));
        let mut new = Vec::new();
        let mut listed = BTreeSet::new();
        for finding in &report.findings {
            let (check, place, address) = finding.key();
            let key = (check, place.to_owned(), address);
            if listed.contains(&key) {
                continue;
            }
            if let Some(known) = self.0.get_mut(&key) {
                known.seen(finding);
            } else if self.has_room() {
                let mut known = Known::new(finding, now);
                let told = known.news(now);
                new.extend(told.map(|kind| News { kind, again: false }));
                self.0.insert(key.clone(), known);
            } else {
                continue;
            }
            listed.insert(key);
        }
        for (key, known) in &mut self.0 {
            if !listed.contains(key) && is_clear(report, key.0) {
                known.there = false;
            }
            let told = known.news(now);
            new.extend(told.map(|kind| News { kind, again: true }));
        }
        new
    }

    /// Whether another place can be told apart from those that are known, of which one
    /// that has gone is forgotten for it.
    fn has_room(&mut self) -> bool {
        if self.0.len() < FINDINGS {
            return true;
        }
        let gone = self.0.iter().find(|(_, known)| !known.there);
        let gone = gone.map(|(key, _)| key.clone());
        gone.and_then(|key| self.0.remove(&key)).is_some()
    }
}

/// Whether what a look does not list of this check is not there.
fn is_clear(report: &Report, check: Check) -> bool {
    let mut outcomes = report.outcomes.iter();
    let made = outcomes.any(|one| one.check == check && one.doubt.is_none());
    report.not_listed == 0 && made
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::integrity::Outcome;

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
    fn news(news: Vec<News>) -> Vec<(bool, String, u64)> {
        let one = |news: News| match news.kind {
            FindingKind::Integrity(one) => (false, one.change.place, one.count),
            FindingKind::IntegrityGone(one) => (true, one.change.place, one.count),
            other => panic!("{other:?}"),
        };
        news.into_iter().map(one).collect()
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
    fn a_place_that_changes_at_each_look_is_told_of_so_often_and_with_its_count() {
        let start = Instant::now();
        let leads_to = |number: u64| Finding {
            found: format!("f{number}"),
            ..finding(Check::KernelText, "vfs_read")
        };
        // It changes, and it comes and goes.
        for coming in [false, true] {
            let mut ledger = Ledger::default();
            let mut lines = Vec::new();
            for second in 0..=700 {
                let gone = coming && second % 2 == 1;
                let hooks = if gone { vec![] } else { vec![leads_to(second)] };
                let now = start + Duration::from_secs(second);
                lines.extend(ledger.take(&report(hooks), now));
            }
            assert!(lines.len() <= 3 * LINES as usize, "{lines:#?}");
            let counted = lines.iter().map(|news| match &news.kind {
                FindingKind::Integrity(one) => one.changes,
                _ => 0,
            });
            let most = counted.max().expect("lines");
            assert!(most > 100, "{most}");
            assert!(lines[1..].iter().all(|news| news.again));
            // Another place is told of at once, and first.
            let both = report(vec![leads_to(0), finding(Check::Files, "/proc")]);
            let now = start + Duration::from_secs(701);
            let first = ledger.take(&both, now).remove(0);
            assert!(!first.again, "{first:?}");
            assert_eq!(news(vec![first]), [told(false, "/proc", 1)]);
        }
    }

    #[test]
    fn what_was_told_last_is_how_it_ended() {
        let mut ledger = Ledger::default();
        let start = Instant::now();
        let mut last = Vec::new();
        for second in 0..=600 {
            let hook = finding(Check::KernelText, "vfs_read");
            let there = second < 100 && second % 2 == 0;
            let hooks = if there { vec![hook] } else { vec![] };
            let now = start + Duration::from_secs(second);
            last.extend(news(ledger.take(&report(hooks), now)));
        }
        assert!(last.last().expect("told").0, "{last:?}");
        assert!(ledger.0.is_empty());
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
    fn there_is_room_for_so_many_and_what_has_gone_makes_room() {
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
        assert_eq!(ledger.take(&report(Vec::new()), now).len(), FINDINGS);
        assert_eq!(ledger.take(&many(FINDINGS), now).len(), FINDINGS);
    }
}
