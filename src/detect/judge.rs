//! What is wrong with a profile: by itself, and against a baseline.
//!
//! Two kinds of rules. Some things no clean kernel does, once is enough: they
//! are [`Severity::Critical`]. Others are only new: the kernel has paths that it
//! takes once in a million calls, and no baseline has seen them all. So what is
//! new counts as a [`Severity::Warning`] only where it is a habit: the function
//! was called [`MIN_CALLS`] times or more, and at least [`MIN_SEEN`] times and
//! one time in [`MIN_SHARE`] it did the new thing. The rest is a notice. Code of
//! modules that takes part is critical; but a baseline that knows such code and does not
//! know the function at all has only not seen all that it does. Bands are compared by
//! medians, which a few outliers do not move.

use std::collections::BTreeMap;

use super::baseline::{self, Baseline, Pace};
use super::finding::{Evidence, Finding};
use super::profile::{Example, Function, Profile, Root, Seen};
use super::rules::{Rule, Severity};
use super::site::{is_dispatcher, is_system_call, Label, Site, LOADING};
use super::{MIN_CALLS, MIN_SEEN, MIN_SESSIONS, MIN_SHARE};
use crate::output::WallClock;

/// What is wrong with a profile, the surest first: by itself and, if there is
/// one, by a baseline of the same kernel.
pub fn judge(
    profile: &Profile<'_>,
    baseline: Option<&Baseline>,
    clock: &dyn WallClock,
) -> Vec<Finding> {
    Judge { baseline, clock }.judge(profile)
}

/// What a profile is judged by.
struct Judge<'a> {
    baseline: Option<&'a Baseline>,
    clock: &'a dyn WallClock,
}

/// Findings as they are made, those of one rule and subject folded.
#[derive(Default)]
struct Findings(BTreeMap<(Rule, String, String), Finding>);

impl Findings {
    fn add(&mut self, finding: Finding) {
        let key = (finding.rule, finding.subject.clone(), finding.what.clone());
        match self.0.get_mut(&key) {
            Some(known) => known.count = known.count.saturating_add(finding.count),
            None => {
                self.0.insert(key, finding);
            }
        }
    }
}

/// How sure it is that `count` of `of` is a habit.
fn habit(count: u64, of: u64) -> Severity {
    let often = count >= MIN_SEEN && count.saturating_mul(MIN_SHARE) >= of;
    if of >= MIN_CALLS && often {
        Severity::Warning
    } else {
        Severity::Notice
    }
}

impl Judge<'_> {
    /// All findings, the surest first.
    fn judge(&self, profile: &Profile<'_>) -> Vec<Finding> {
        let mut found = Findings::default();
        for (&label, function) in &profile.functions {
            self.addresses(profile, label, function, &mut found);
            self.function(profile, label, function, &mut found);
        }
        for (&label, root) in &profile.roots {
            self.callers(profile, label, root, &mut found);
            self.bands(profile, label, root, &mut found);
        }
        self.sequences(profile, &mut found);
        self.silence(profile, &mut found);
        let mut all: Vec<Finding> = found.0.into_values().collect();
        all.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
        all
    }

    /// How much it says that code of modules takes part `seen` times in `all` calls of
    /// a function that the baseline does not know.
    fn unlearnt(&self, code: &str, seen: u64, all: u64) -> Severity {
        match self.baseline {
            Some(baseline) if baseline.knows_code(code) => habit(seen, all),
            _ => Severity::Critical,
        }
    }

    fn evidence(&self, example: &Example<'_>) -> Option<Evidence> {
        Some(Evidence::of(example, self.clock))
    }

    fn of_seen(
        &self,
        rule: Rule,
        severity: Severity,
        (subject, what): (String, String),
        seen: &Seen<'_>,
        of: Option<u64>,
    ) -> Finding {
        Finding {
            rule,
            severity,
            subject,
            what,
            count: seen.count,
            of,
            evidence: self.evidence(&seen.first),
        }
    }

    /// Calls by code that is none of the kernel's.
    fn addresses(
        &self,
        profile: &Profile<'_>,
        label: Label,
        function: &Function<'_>,
        found: &mut Findings,
    ) {
        let name = baseline::name(&profile.labels, label);
        if let Some(seen) = &function.from_outside {
            let what = format!("{name} was called from where no kernel code belongs");
            let rule = Rule::OutsideText;
            found.add(self.of_seen(rule, Severity::Critical, (name.clone(), what), seen, None));
        }
        let known = self.baseline.map(|baseline| baseline.functions.get(&name));
        for (site, seen) in &function.from_modules {
            let by = baseline::module(site);
            let severity = match known {
                Some(Some(known)) if known.from_modules.contains(&by) => continue,
                Some(Some(_)) => Severity::Critical,
                Some(None) => self.unlearnt(&by, seen.count, function.calls),
                None if matches!(site, Site::Module(Some(_))) => continue,
                None => Severity::Notice,
            };
            let (rule, what) = match site {
                Site::Unlisted => (
                    Rule::UnlistedModule,
                    format!("{name} was called from code that is in no module of the guest's list"),
                ),
                _ => (
                    Rule::UnknownModule,
                    format!("{name} was called from {by}, which is not known to call it"),
                ),
            };
            found.add(self.of_seen(rule, severity, (name.clone(), what), seen, None));
        }
    }

    /// Return addresses of roots.
    fn callers(&self, profile: &Profile<'_>, label: Label, root: &Root<'_>, found: &mut Findings) {
        let name = baseline::name(&profile.labels, label);
        let known = self.baseline.and_then(|baseline| baseline.roots.get(&name));
        let system_call = is_system_call(profile.labels.name(label));
        let all: u64 = root.callers.values().map(|seen| seen.count).sum();
        for (site, seen) in &root.callers {
            let shown = crate::kernel::escape(site.to_string().as_bytes());
            let learnt = known.is_some_and(|known| known.callers.contains(&shown));
            if learnt || is_dispatcher(site) {
                continue;
            }
            let severity = match site {
                _ if system_call => Severity::Critical,
                // Told of by the rules for addresses.
                Site::Module(_) | Site::Unlisted | Site::Outside => continue,
                _ if known.is_none() => continue,
                _ => habit(seen.count, all),
            };
            let what = format!("{name} was called from {shown}");
            let rule = Rule::WrongCaller;
            found.add(self.of_seen(rule, severity, (name.clone(), what), seen, Some(all)));
        }
    }

    /// What a function calls.
    fn function(
        &self,
        profile: &Profile<'_>,
        label: Label,
        function: &Function<'_>,
        found: &mut Findings,
    ) {
        let labels = &profile.labels;
        let name = baseline::name(labels, label);
        let known = self
            .baseline
            .and_then(|baseline| baseline.functions.get(&name));
        let calls = function.calls;
        for (&callee, seen) in &function.callees {
            let what = format!("{name} calls {}", baseline::name(labels, callee));
            let text = (name.clone(), what);
            let learnt = known.is_some_and(|known| {
                let callee = baseline::name(labels, callee);
                known.callees.contains_key(&callee)
            });
            let finding = match callee {
                Label::OUTSIDE => self.of_seen(
                    Rule::OutsideText,
                    Severity::Critical,
                    text,
                    seen,
                    Some(calls),
                ),
                // A module does what it likes while it loads, and each another thing.
                Label::LOADING => continue,
                _ if learnt || label == Label::LOADING => continue,
                Label::MODULE | Label::UNLISTED => {
                    let severity = match self.baseline {
                        None => Severity::Notice,
                        Some(_) if label.is_nameless_module() => Severity::Notice,
                        Some(_) if known.is_some() => Severity::Critical,
                        Some(_) => {
                            self.unlearnt(&baseline::name(labels, callee), seen.count, calls)
                        }
                    };
                    let rule = match callee {
                        Label::UNLISTED => Rule::UnlistedModule,
                        _ => Rule::UnknownModule,
                    };
                    self.of_seen(rule, severity, text, seen, Some(calls))
                }
                _ if known.is_none() => continue,
                _ => {
                    let severity = habit(seen.count, calls);
                    self.of_seen(Rule::UnexpectedCallee, severity, text, seen, Some(calls))
                }
            };
            found.add(finding);
        }
        let Some(known) = known.filter(|_| label != Label::LOADING) else {
            return;
        };
        for (&pair, seen) in &function.orders {
            let order = baseline::order(labels, pair);
            let callee_is_new = |label: Label| {
                label != Label::EDGE && !known.callees.contains_key(&baseline::name(labels, label))
            };
            let loads = [pair.0, pair.1].contains(&Label::LOADING);
            if loads
                || known.order.contains(&order)
                || callee_is_new(pair.0)
                || callee_is_new(pair.1)
            {
                continue;
            }
            let (first, second) = order.split_once(' ').unwrap_or((&order, ""));
            let what = format!("in {name}, {second} follows {first}");
            // In what order things are done hangs on what else goes on (a
            // scheduler's above all), so that this must be the usual order.
            let severity = match seen.count.saturating_mul(2) > calls {
                true => habit(seen.count, calls),
                false => Severity::Notice,
            };
            let text = (name.clone(), what);
            found.add(self.of_seen(Rule::UnexpectedOrder, severity, text, seen, Some(calls)));
        }
        if let (Some(seen), false) = (&function.nested, known.nested) {
            let text = (name.clone(), format!("{name} is called inside itself"));
            let severity = habit(seen.count, calls);
            found.add(self.of_seen(Rule::NestedInItself, severity, text, seen, Some(calls)));
        }
        self.missing(&name, known, profile, function, found);
    }

    fn missing(
        &self,
        name: &str,
        known: &baseline::Function,
        profile: &Profile<'_>,
        function: &Function<'_>,
        found: &mut Findings,
    ) {
        let seen: BTreeMap<String, u64> = function
            .callees
            .iter()
            .map(|(&callee, seen)| (baseline::name(&profile.labels, callee), seen.count))
            .collect();
        for callee in known.always.iter().flatten() {
            let with = seen.get(callee).copied().unwrap_or(0);
            let without = function.calls.saturating_sub(with);
            if without == 0 || function.calls < MIN_CALLS || callee == LOADING {
                continue;
            }
            found.add(Finding {
                rule: Rule::MissingCallee,
                severity: habit(without, function.calls),
                subject: name.to_owned(),
                what: format!(
                    "{name} does not call {callee}, which it always does in the baseline"
                ),
                count: without,
                of: Some(function.calls),
                evidence: function
                    .first
                    .as_ref()
                    .and_then(|first| self.evidence(first)),
            });
        }
    }

    /// How many calls a root makes, and how long it takes.
    fn bands(&self, profile: &Profile<'_>, label: Label, root: &Root<'_>, found: &mut Findings) {
        let name = baseline::name(&profile.labels, label);
        let several = |baseline: &&Baseline| baseline.sessions.len() >= MIN_SESSIONS;
        let baseline = self.baseline.filter(several);
        let Some(known) = baseline.and_then(|baseline| baseline.roots.get(&name)) else {
            return;
        };
        let pace = Pace::of(profile);
        let duration = pace.and_then(|pace| Some(pace.hundredths(root.spent.median()?)));
        let compared = [
            (
                Rule::CallCount,
                root.calls.median(),
                known.calls,
                "calls below it",
            ),
            (
                Rule::Duration,
                duration,
                known.duration,
                "hundredths of the time of a call that calls nothing",
            ),
        ];
        let total = root.calls.total();
        for (rule, median, band, unit) in compared {
            let (Some(median), Some(band)) = (median, band) else {
                continue;
            };
            // Both numbers of a duration are floors of buckets an eighth wide, and
            // so is what the baseline has: no closer than this can they be told.
            let blur = |limit: u64| if rule == Rule::Duration { limit / 4 } else { 0 };
            let low = band.low - blur(band.low);
            let high = band.high.saturating_add(blur(band.high));
            if total < MIN_CALLS || (low..=high).contains(&median) {
                continue;
            }
            found.add(Finding {
                rule,
                severity: Severity::Warning,
                subject: name.clone(),
                what: format!(
                    "the median of {name} is {median} {unit}; in the baseline medians are {} to \
                     {}, and all but the extremes {} to {}",
                    band.lowest_median, band.highest_median, band.low, band.high
                ),
                count: total / 2,
                of: Some(total),
                evidence: root.first.as_ref().and_then(|first| self.evidence(first)),
            });
        }
    }

    /// System calls in an order that is new for the process.
    fn sequences(&self, profile: &Profile<'_>, found: &mut Findings) {
        let Some(known) = self.baseline else { return };
        for (comm, process) in &profile.processes {
            let name = crate::kernel::escape(comm.bytes());
            let Some(known) = known.processes.get(&name) else {
                continue;
            };
            for (of, seen) in &process.sequences {
                let sequence = baseline::sequence(&profile.labels, of);
                if known.contains(&sequence) {
                    continue;
                }
                let what = format!("{name} makes these system calls one after another: {sequence}");
                let severity = habit(seen.count, process.total);
                let text = (name.clone(), what);
                let of = Some(process.total);
                found.add(self.of_seen(Rule::UnknownSequence, severity, text, seen, of));
            }
        }
    }

    fn silence(&self, profile: &Profile<'_>, found: &mut Findings) {
        /// So many times longer than the longest one known: silences come as
        /// work does, and the longest of a few sessions is not the longest of
        /// all.
        const LONGER: u64 = 4;
        /// Shorter ones are not told of.
        const SHORTEST_NS: u64 = 5_000_000_000;

        let Some(known) = self.baseline.map(|baseline| baseline.silence) else {
            return;
        };
        let most = known.longest_ns.saturating_mul(LONGER).max(SHORTEST_NS);
        for silence in &profile.silences {
            if known.whole || silence.nanos() <= most {
                continue;
            }
            found.add(Finding {
                rule: Rule::SilentCpu,
                severity: Severity::Warning,
                subject: format!("CPU {}", silence.cpu),
                what: format!(
                    "CPU {} gave no record for {:.1} s, while others gave {}; the longest in the \
                     baseline is {:.1} s",
                    silence.cpu,
                    silence.nanos() as f64 / 1e9,
                    silence.others,
                    known.longest_ns as f64 / 1e9
                ),
                count: 1,
                of: None,
                evidence: None,
            });
        }
    }
}
