//! The verdict on a session: what was found, and what could not be told.

use serde::{Deserialize, Serialize};

use super::baseline::Baseline;
use super::finding::Finding;
use super::judge::judge;
use super::profile::{InModules, Profile, ProfileLimits, Skipped};
use super::rules::{Rule, Severity};
use super::{profile_of, MIN_SEEN, MIN_SESSIONS};
use crate::callflow::{Kernels, Tally};
use crate::session::{FindingKind, Meta, Mode, Session, SessionError, State};

/// What the `format` of a verdict says.
const FORMAT: &str = "xftrace-verdict";
/// The version of the verdict's form.
const VERSION: u32 = 1;
/// Where one record in so many is lost, the rest is not enough to call a guest
/// clean.
const LOSSY: u64 = 10;
/// The most findings that a verdict lists.
const MOST: usize = 1000;

/// What comes out of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Conclusion {
    /// Nothing is wrong, as far as the rules can see.
    Clean,
    /// Something is wrong.
    Findings,
    /// Nothing was found, and `doubts` says why that means nothing.
    CouldNotTell,
}

/// The verdict on a session. All text in it is fit for a terminal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Verdict {
    /// `xftrace-verdict`.
    pub format: String,
    /// 1.
    pub version: u32,
    /// What comes out of it.
    pub conclusion: Conclusion,
    /// The domain.
    pub domain: String,
    /// The session's directory.
    pub session: String,
    /// The kernel's banner.
    pub kernel: Option<String>,
    /// What it was compared with.
    pub baseline: Option<Compared>,
    /// Calls that were looked at.
    pub calls: u64,
    /// Records that were lost.
    pub lost: u64,
    /// What was left out, and why.
    pub skipped: Skipped,
    /// Rules that could not be judged by what the session has.
    pub not_judged: Vec<Rule>,
    /// Why an absence of findings means nothing.
    pub doubts: Vec<String>,
    /// What weakens the verdict without undoing it.
    pub remarks: Vec<String>,
    /// What was found, notices too; the surest first.
    pub findings: Vec<Finding>,
    /// Findings that are not listed, since there are too many.
    pub not_listed: u64,
}

/// The baseline that a session was compared with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Compared {
    /// Its name.
    pub name: String,
    /// How many sessions it has learnt.
    pub sessions: usize,
    /// Whether it has seen enough for a further session to bring little new.
    pub converged: bool,
}

impl Verdict {
    /// Adds why an absence of findings means nothing.
    pub fn doubt(&mut self, why: String) {
        self.doubts.push(why);
        if self.conclusion == Conclusion::Clean {
            self.conclusion = Conclusion::CouldNotTell;
        }
    }
}

/// Judges a session by itself and, if there is one, by a baseline and its name.
///
/// # Errors
/// If the session cannot be read.
pub fn check(
    session: &Session,
    baseline: Option<(&str, &Baseline)>,
) -> Result<Verdict, SessionError> {
    let names = Kernels::of(session)?;
    let (profile, tally) = profile_of(session, &names, ProfileLimits::default())?;
    let mut doubts = Vec::new();
    let mut remarks = Vec::new();
    let known = baseline.map(|(_, baseline)| baseline);
    let fits = match known {
        Some(known) => {
            compare_kernels(session, known, &mut doubts) && {
                compare_roots(
                    session,
                    &profile_roots(&profile),
                    known,
                    &mut doubts,
                    &mut remarks,
                );
                true
            }
        }
        None => {
            remarks.push(
                "without a baseline (--baseline NAME) only what no kernel does is found".to_owned(),
            );
            false
        }
    };
    let mut findings = judge(&profile, known.filter(|_| fits), session);
    findings.extend(caught(session, &tally)?);
    doubts.extend(untraced(session)?);
    findings.sort_by_key(|finding| std::cmp::Reverse(finding.severity));

    let not_judged = not_judged(session, &profile, &mut doubts, &mut remarks)?;
    let lost = tally.lost_records.total().max(unread(session));
    if tally.calls == 0 {
        doubts.push("the session has no calls; a trace of nothing proves nothing".to_owned());
    } else if profile.roots.is_empty() {
        doubts.push(
            "none of the session's calls was seen from its beginning, as if the guest had traced \
             no function that it was asked to: no rule can judge such calls"
                .to_owned(),
        );
    } else if lost.saturating_mul(LOSSY) > tally.calls.saturating_mul(2).saturating_add(lost) {
        doubts.push(format!(
            "{lost} records are lost, more than one in {LOSSY}: trace less, or with a larger \
             --buffer-size"
        ));
    }
    if tally.lost_uncounted > 0 {
        remarks.push(format!(
            "at {} places it is not known how many records are lost",
            tally.lost_uncounted
        ));
    }
    if !profile.is_whole() {
        remarks.push(format!(
            "{} sightings found no room and were not judged",
            profile.skipped.no_room
        ));
    }
    if session.meta.state == State::Open {
        remarks.push("the session is still written; this is what there was by now".to_owned());
    }
    let alarm = findings
        .iter()
        .any(|finding| finding.severity > Severity::Notice);
    let conclusion = match (alarm, doubts.is_empty()) {
        (true, _) => Conclusion::Findings,
        (false, false) => Conclusion::CouldNotTell,
        (false, true) => Conclusion::Clean,
    };
    let not_listed = findings.len().saturating_sub(MOST) as u64;
    findings.truncate(MOST);
    Ok(Verdict {
        format: FORMAT.to_owned(),
        version: VERSION,
        conclusion,
        domain: session.meta.domain.escape_debug().to_string(),
        session: session
            .dir()
            .display()
            .to_string()
            .escape_debug()
            .to_string(),
        kernel: session
            .meta
            .boots
            .last()
            .map(|boot| boot.banner.trim_end().to_owned()),
        baseline: baseline.map(|(name, baseline)| Compared {
            name: name.to_owned(),
            sessions: baseline.sessions.len(),
            converged: baseline.has_converged(),
        }),
        calls: profile.calls,
        lost,
        skipped: profile.skipped,
        not_judged,
        doubts,
        remarks,
        findings,
        not_listed,
    })
}

/// The rules that the session's records cannot be judged by.
fn not_judged(
    session: &Session,
    profile: &Profile<'_>,
    doubts: &mut Vec<String>,
    remarks: &mut Vec<String>,
) -> Result<Vec<Rule>, SessionError> {
    let mut rules = Vec::new();
    let InModules {
        all,
        in_doubt,
        not_told,
        excused,
    } = profile.in_modules;
    if excused >= MIN_SEEN {
        remarks.push(format!(
            "{excused} times code in the module area was called, or called, where not all was seen \
             that this lies below (records are lost, or their depths are not those of a whole \
             trace): it may have been a module that sets itself up, and is not judged"
        ));
    }
    if session.modules()?.is_empty() {
        rules.push(Rule::UnlistedModule);
    } else if profile.in_modules.tell_little() {
        rules.push(Rule::UnlistedModule);
        doubts.push(format!(
            "of {all} times that code in the module area was called, or called, {in_doubt} lie \
             around changes of the guest's list of modules, or where nobody looked at it, and \
             {not_told} of these were of code that is on no list: whoever changes it all the time \
             may have something to hide"
        ));
    }
    if profile.in_modules.are_excused() {
        doubts.push(
            "most of what code in the module area did is excused by that, so that a hook may be \
             behind it: trace less, or with a larger --buffer-size, and see whether it stays so"
                .to_owned(),
        );
        rules.extend([Rule::UnlistedModule, Rule::UnknownModule]);
        rules.sort();
        rules.dedup();
    }
    if session.meta.mode == Mode::Keyed {
        return Ok(rules);
    }
    doubts.push(
        "the records are plain: they have no key, so that root in the guest can make up a trace \
         that looks clean, and no return address, so that the rules of who calls cannot be \
         judged; trace a guest whose kernel has the patch"
            .to_owned(),
    );
    rules.extend(Rule::ALL.into_iter().filter(|rule| rule.needs_keyed()));
    Ok(rules)
}

/// How many records the guest wrote by its own count, and nobody read. Only in
/// mode plain are losses not numbered in the records themselves.
fn unread(session: &Session) -> u64 {
    let Meta {
        guest_counts,
        counters,
        ..
    } = &session.meta;
    let read = counters
        .records
        .saturating_add(counters.forged)
        .saturating_add(counters.other);
    guest_counts
        .as_ref()
        .map_or(0, |counts| counts.written.saturating_sub(read))
}

fn profile_roots(profile: &super::Profile<'_>) -> Vec<String> {
    let labels = &profile.labels;
    let mut roots: Vec<String> = profile
        .roots
        .keys()
        .map(|label| super::baseline::name(labels, *label))
        .collect();
    roots.sort();
    roots
}

/// Whether the baseline is of the session's kernel.
fn compare_kernels(session: &Session, known: &Baseline, doubts: &mut Vec<String>) -> bool {
    let other = session
        .meta
        .boots
        .iter()
        .find(|boot| boot.banner.trim_end() != known.kernel);
    if let Some(boot) = other {
        doubts.push(format!(
            "the baseline is of another kernel ({}) than boot {} of the session ({}): learn one \
             for it",
            known.kernel,
            boot.number,
            boot.banner.trim_end()
        ));
    }
    other.is_none()
}

/// Tells which roots the baseline does not know.
fn compare_roots(
    session: &Session,
    roots: &[String],
    known: &Baseline,
    doubts: &mut Vec<String>,
    remarks: &mut Vec<String>,
) {
    let unknown: Vec<&str> = roots
        .iter()
        .map(String::as_str)
        .filter(|root| !known.roots.contains_key(*root))
        .collect();
    let all = !roots.is_empty() && unknown.len() == roots.len();
    if all {
        doubts.push(format!(
            "the baseline knows none of the functions that were traced ({}): learn sessions of \
             them",
            session.meta.functions().join(" ")
        ));
    } else if !unknown.is_empty() {
        remarks.push(format!(
            "the baseline does not know {}: what they call is judged as far as other functions \
             showed it",
            unknown.join(", ")
        ));
    }
    let asked = session.meta.functions();
    let is_silent = |root: &&String| known.roots.contains_key(*root) && !roots.contains(root);
    let silent: Vec<&str> = asked.iter().filter(is_silent).map(String::as_str).collect();
    if !silent.is_empty() {
        remarks.push(format!(
            "{} was to be traced, is in the baseline, and was never called: nobody did in the \
             guest, or somebody in it narrowed what is traced",
            silent.join(", ")
        ));
    }
    if known.sessions.len() < MIN_SESSIONS {
        remarks.push(format!(
            "the baseline has learnt {} sessions: how many calls there are and how long they take \
             is judged from {MIN_SESSIONS} on",
            known.sessions.len()
        ));
    }
    if !known.has_converged() {
        remarks.push(match known.expected_new() {
            Some(new) => format!(
                "the baseline has not converged: a session like those learnt is likely to bring \
                 {new:.0} edges that it does not know"
            ),
            None => "the baseline has learnt one session; two tell whether it has seen enough"
                .to_owned(),
        });
    }
}

/// How often the guest was not traced for long while the trace was on, and why it was not
/// at first.
fn untraced(session: &Session) -> Result<Option<String>, SessionError> {
    let findings = session.findings()?;
    let mut whys = findings.iter().filter_map(|finding| match &finding.kind {
        FindingKind::NotTraced { why } => Some(why),
        _ => None,
    });
    let Some(first) = whys.next() else {
        return Ok(None);
    };
    let times = 1 + whys.count();
    Ok(Some(format!(
        "the guest was not traced for two minutes and more while the trace was on ({times} times; \
         the first time: {first})"
    )))
}

/// In how many ways the guest was caught at one thing that are told apart: it may shut any
/// gates it likes.
const WAYS: usize = 16;

/// What the helper caught the guest at while it was traced, and forged records.
fn caught(session: &Session, tally: &Tally) -> Result<Vec<Finding>, SessionError> {
    let mut all: Vec<Finding> = Vec::new();
    let forged = tally.forged.total();
    if forged > 0 {
        let reasons = tally.forged.iter().filter(|(_, count)| *count > 0);
        let shown: Vec<String> = reasons
            .map(|(why, count)| format!("{count} {why}"))
            .collect();
        all.push(bare(
            Rule::ForgedRecord,
            "trace buffer",
            format!("records decode under no key: {}", shown.join(", ")),
            forged,
        ));
    }
    for finding in session.findings()? {
        let kept_out;
        let (rule, subject, what) = match finding.kind {
            FindingKind::KeyChanged(tamper) => (
                Rule::KeyTouched,
                "global_key",
                match tamper {
                    crate::keys::Tamper::Epoch { .. } => "the guest changed the epoch",
                    crate::keys::Tamper::Key { .. } => "the guest changed a key",
                },
            ),
            // Counted above, from the records themselves.
            FindingKind::ForgedRecords { .. } => continue,
            // More was found, and is not told.
            FindingKind::Full => continue,
            // Judged above, with all that the session holds.
            FindingKind::ControlFlow(_) => continue,
            // Of the domain, and no matter of its call flow.
            FindingKind::Integrity(_)
            | FindingKind::IntegrityGone(_)
            | FindingKind::IntegrityDoubt(_)
            | FindingKind::NotLookedAt { .. }
            | FindingKind::BootWithoutReset { .. } => continue,
            // See `untraced`.
            FindingKind::NotTraced { .. } => continue,
            FindingKind::TracerOff => (
                Rule::TracerOff,
                "tracer",
                "the tracer was off while the trace was on",
            ),
            FindingKind::RecordingOff { gate } => {
                let by = gate.map_or_else(String::new, |gate| format!(", by {gate}"));
                kept_out = format!("recording was off while the trace was on{by}");
                (Rule::RecordingOff, "trace buffer", &*kept_out)
            }
            FindingKind::BufferSwapped => (
                Rule::BufferSwapped,
                "trace buffer",
                "the trace buffer was swapped for another while the trace was on",
            ),
        };
        let of_rule = all.iter().filter(|known| known.rule == rule).count();
        match all
            .iter_mut()
            .find(|known| known.rule == rule && (known.what == what || of_rule >= WAYS))
        {
            Some(known) => known.count += 1,
            None => all.push(bare(rule, subject, what.to_owned(), 1)),
        }
    }
    Ok(all)
}

fn bare(rule: Rule, subject: &str, what: String, count: u64) -> Finding {
    Finding {
        rule,
        severity: Severity::Critical,
        subject: subject.to_owned(),
        what,
        count,
        of: None,
        evidence: None,
    }
}

#[cfg(test)]
mod tests;
