//! Looks at a guest that runs, until two of them agree.
//!
//! Code and lists are in an in-between state for as long as the kernel works on them,
//! and what is read meanwhile is neither a hook nor a reason to doubt: it has gone a
//! moment later. A hook is there in two looks, one behind the other. One that is
//! elsewhere in each of them has no two looks agree, and that is a doubt.

use std::collections::BTreeSet;
use std::time::Duration;

use super::finding::{Check, Finding, Report};

/// Between two looks. Longer than the kernel takes to patch its own code.
const AGAIN: Duration = Duration::from_millis(200);
/// The most looks. A kernel that works on itself in all of them is a rare one.
const LOOKS: usize = 5;
const UNSETTLED: &str = "no two looks, one behind the other, found the same";

/// What looks come to: `look` makes one, and `wait` waits so long and says whether to
/// go on; `None` where it was not to.
///
/// # Errors
/// If a look fails.
pub(super) fn looks<E>(
    look: &mut dyn FnMut() -> Result<Report, E>,
    wait: &mut dyn FnMut(Duration) -> bool,
) -> Result<Option<Report>, E> {
    let mut last = look()?;
    if last.findings.is_empty() && last.not_listed == 0 && doubtful(&last).is_empty() {
        return Ok(Some(last));
    }
    let mut lasting: Vec<Finding> = Vec::new();
    let mut unsettled = BTreeSet::new();
    for _ in 1..LOOKS {
        if !wait(AGAIN) {
            return Ok(None);
        }
        let before = std::mem::replace(&mut last, look()?);
        let (then, now) = (keys(&before), keys(&last));
        lasting.retain(|one| !now.contains(&one.key()));
        let found = last.findings.iter();
        lasting.extend(found.filter(|one| then.contains(&one.key())).cloned());
        let doubts = &doubtful(&before) ^ &doubtful(&last);
        let moved = then.symmetric_difference(&now).map(|key| key.0);
        unsettled = moved.chain(doubts).collect();
        last.notes.retain(|note| before.notes.contains(note));
        if unsettled.is_empty() {
            break;
        }
    }
    last.findings.clear();
    lasting.into_iter().for_each(|one| last.add(one));
    for outcome in &mut last.outcomes {
        if unsettled.contains(&outcome.check) {
            outcome.doubt.get_or_insert_with(|| UNSETTLED.to_owned());
        }
    }
    Ok(Some(last))
}

fn keys(report: &Report) -> BTreeSet<(Check, &str, u64)> {
    report.findings.iter().map(Finding::key).collect()
}

fn doubtful(report: &Report) -> BTreeSet<Check> {
    let outcomes = report.outcomes.iter();
    let doubtful = outcomes.filter(|outcome| outcome.doubt.is_some());
    doubtful.map(|outcome| outcome.check).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(place: u64, leads_to: &str) -> Finding {
        Finding {
            check: Check::ReadOnlyData,
            place: format!("sys_call_table[{place}]"),
            address: place,
            expected: "the kernel's".to_owned(),
            found: leads_to.to_owned(),
            owner: Some(format!("the module {leads_to}")),
        }
    }

    /// A look that finds these, and doubts.
    fn report(findings: &[Finding], doubt: Option<&str>) -> Report {
        let mut report = Report::default();
        findings.iter().cloned().for_each(|one| report.add(one));
        report.done(Check::ReadOnlyData, 1, doubt.map(str::to_owned));
        report
    }

    /// What looks come to of which each is the next of these, the last one for ever,
    /// and how many there were.
    fn come_to(all: &[Report]) -> (Report, usize) {
        let mut count = 0;
        let mut look = || {
            count += 1;
            let one = all.get(count - 1).or(all.last()).expect("a look");
            Ok::<_, ()>(one.clone())
        };
        let report = looks(&mut look, &mut |_| true).expect("looks");
        (report.expect("no order to stop"), count)
    }

    fn at(places: &[u64]) -> Vec<Report> {
        let places = places.iter();
        let looks = places.map(|&place| match place {
            0 => report(&[], None),
            place => report(&[finding(place, "a")], None),
        });
        looks.collect()
    }

    #[test]
    fn a_hook_that_stays_is_found_wherever_it_leads() {
        let looks = [
            report(&[finding(1, "a")], None),
            report(&[finding(1, "b")], None),
        ];
        assert_eq!(come_to(&looks), (looks[1].clone(), 2));
        // Also next to one that moves, which is a doubt.
        let both = |place| report(&[finding(1, "a"), finding(place, "a")], None);
        let (report, _) = come_to(&[2, 3, 4, 5, 6].map(both));
        assert_eq!(report.findings, [finding(1, "a")]);
        assert_eq!(report.outcomes[0].doubt.as_deref(), Some(UNSETTLED));
    }

    #[test]
    fn a_hook_that_moves_between_looks_is_a_doubt() {
        for places in [
            [1, 2, 3, 4, 5],
            [1, 2, 1, 2, 1],
            [1, 0, 1, 0, 1],
            [1, 2, 3, 4, 0],
        ] {
            let (report, count) = come_to(&at(&places));
            assert_eq!((report.findings.len(), count), (0, LOOKS), "{places:?}");
            assert_eq!(report.outcomes[0].doubt.as_deref(), Some(UNSETTLED));
        }
    }

    #[test]
    fn what_has_gone_in_two_looks_was_no_hook() {
        let clean = report(&[], None);
        assert_eq!(come_to(&at(&[0])), (clean.clone(), 1));
        assert_eq!(come_to(&at(&[1, 0, 0])), (clean.clone(), 3));
        assert_eq!(come_to(&at(&[1, 2, 0, 0])), (clean, 4));
        // It was not seen in one of three.
        assert_eq!(come_to(&at(&[1, 0, 1, 1])).0.findings, [finding(1, "a")]);
    }

    #[test]
    fn a_doubt_that_has_gone_is_none_and_one_that_stays_is() {
        let doubt = report(&[], Some("it changed"));
        assert_eq!(
            come_to(&[doubt.clone(), report(&[], None)]).0,
            report(&[], None)
        );
        assert_eq!(come_to(&[doubt.clone(), doubt.clone()]), (doubt.clone(), 2));
        // One that comes and goes has not gone.
        let hook = report(&[finding(1, "a")], None);
        let clean = report(&[], None);
        let blinks = [&hook, &doubt, &clean, &doubt, &clean].map(Clone::clone);
        let (told, count) = come_to(&blinks);
        assert_eq!(told.outcomes[0].doubt.as_deref(), Some(UNSETTLED));
        assert_eq!(count, LOOKS);
        let goes = [&hook, &doubt, &clean].map(Clone::clone);
        assert_eq!(come_to(&goes), (clean, 4));
    }

    #[test]
    fn no_more_is_listed_than_a_look_lists() {
        let many = |from: u64| {
            let all: Vec<Finding> = (from..from + 200).map(|at| finding(at, "a")).collect();
            report(&all, None)
        };
        // Each look shares half of what it finds with the one before.
        let looks: Vec<Report> = (0..5).map(|look| many(100 * look)).collect();
        let (report, _) = come_to(&looks);
        assert_eq!((report.findings.len(), report.not_listed), (256, 144));
    }

    #[test]
    fn an_order_to_stop_ends_it() {
        let mut look = || Ok::<_, ()>(report(&[finding(1, "a")], None));
        assert_eq!(looks(&mut look, &mut |_| false), Ok(None));
    }
}
