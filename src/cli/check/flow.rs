//! The call flow's part of `xftrace check`.

use std::io::Write;
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use crate::config::Config;
use crate::detect::{self, Conclusion, Evidence, Finding, Severity, Store, StoreError, Verdict};
use crate::session::Session;

/// The baseline that a session is compared with, by its name.
#[derive(Clone, Copy)]
pub(super) enum Name<'a> {
    /// Who asks for the verdict named it: it has to be there.
    Asked(&'a str),
    /// The domain's, or the configuration's: it may be one that is yet to be
    /// learnt, and all else can be judged.
    Own(&'a str),
}

/// Judges a session.
pub(super) fn judge(
    config: &Config,
    dir: &Path,
    name: Option<Name<'_>>,
) -> anyhow::Result<Verdict> {
    let store = Store::at(&config.paths.baselines);
    let mut missing = None;
    let baseline = match name {
        None => None,
        Some(Name::Asked(name)) => Some((name, store.load(name)?)),
        Some(Name::Own(name)) => match store.load(name) {
            Ok(baseline) => Some((name, baseline)),
            Err(error @ StoreError::None { .. }) => {
                missing = Some(error.to_string());
                None
            }
            Err(error) => return Err(error.into()),
        },
    };
    let session = Session::open(dir)?;
    let known = baseline.as_ref().map(|(name, baseline)| (*name, baseline));
    let mut verdict = detect::check(&session, known)?;
    if let Some(missing) = missing {
        verdict.doubt(missing);
    }
    Ok(verdict)
}

/// How many notices are listed for people.
const NOTICES: usize = 10;

/// Writes a verdict for people.
pub(super) fn print(out: &mut impl Write, verdict: &Verdict) -> std::io::Result<()> {
    writeln!(out, "domain:    {}", verdict.domain)?;
    writeln!(out, "session:   {}", verdict.session)?;
    if let Some(kernel) = &verdict.kernel {
        writeln!(out, "kernel:    {kernel}")?;
    }
    match &verdict.baseline {
        None => writeln!(out, "baseline:  none")?,
        Some(baseline) => writeln!(
            out,
            "baseline:  {} ({} sessions, {})",
            baseline.name,
            baseline.sessions,
            if baseline.converged {
                "converged"
            } else {
                "not converged"
            }
        )?,
    }
    writeln!(
        out,
        "calls:     {} looked at; left out: {} of interrupts, {} with a gap, {} cut, {} incomplete; \
         {} records lost",
        verdict.calls,
        verdict.skipped.interrupts,
        verdict.skipped.gaps,
        verdict.skipped.cut,
        verdict.skipped.incomplete,
        verdict.lost
    )?;
    let (notices, alarms): (Vec<&Finding>, Vec<&Finding>) = verdict
        .findings
        .iter()
        .partition(|finding| finding.severity == Severity::Notice);
    if !alarms.is_empty() {
        writeln!(out, "\nSEVERITY  RULE               TIMES  WHAT")?;
    }
    for finding in &alarms {
        print_finding(out, finding)?;
    }
    if !notices.is_empty() {
        writeln!(
            out,
            "\n{} notices, which are too rare, or too little known, to tell a hook from a path that \
             a clean kernel seldom takes:",
            notices.len() as u64 + verdict.not_listed
        )?;
    }
    for finding in notices.iter().take(NOTICES) {
        writeln!(
            out,
            "  {:<17} {} ({})",
            finding.rule.name(),
            finding.what,
            times(finding)
        )?;
    }
    if notices.len() > NOTICES {
        writeln!(out, "  ... all of them are in --json")?;
    }
    for remark in &verdict.remarks {
        writeln!(out, "\nnote: {remark}")?;
    }
    if !verdict.not_judged.is_empty() {
        let names: Vec<&str> = verdict.not_judged.iter().map(|rule| rule.name()).collect();
        writeln!(out, "\nnot judged: {}", names.join(", "))?;
    }
    for doubt in &verdict.doubts {
        writeln!(out, "\ndoubt: {doubt}")?;
    }
    writeln!(out, "\nverdict: {}", conclusion(verdict.conclusion))
}

/// A conclusion in words.
pub(super) fn conclusion(conclusion: Conclusion) -> &'static str {
    match conclusion {
        Conclusion::Clean => "clean, as far as the rules can see",
        Conclusion::Findings => "findings",
        Conclusion::CouldNotTell => "could not tell",
    }
}

fn times(finding: &Finding) -> String {
    match finding.of {
        Some(of) => format!("{} of {of}", finding.count),
        None => finding.count.to_string(),
    }
}

fn print_finding(out: &mut impl Write, finding: &Finding) -> std::io::Result<()> {
    writeln!(
        out,
        "{:<9} {:<17} {:>6}  {}",
        finding.severity.text(),
        finding.rule.name(),
        finding.count,
        finding.what
    )?;
    if let Some(of) = finding.of {
        writeln!(out, "          {} of {of} times", finding.count)?;
    }
    writeln!(out, "          why: {}", finding.rule.reason())?;
    if let Some(evidence) = &finding.evidence {
        print_evidence(out, evidence)?;
    }
    Ok(())
}

fn print_evidence(out: &mut impl Write, evidence: &Evidence) -> std::io::Result<()> {
    let time = match evidence.wall_ns {
        Some(wall) => {
            humantime::format_rfc3339_micros(UNIX_EPOCH + Duration::from_nanos(wall)).to_string()
        }
        None => format!("guest clock {} ns", evidence.guest_ns),
    };
    writeln!(
        out,
        "          first: {time}, boot {}, CPU {}, {}-{}",
        evidence.boot,
        evidence.cpu,
        evidence.task.as_deref().unwrap_or("?"),
        evidence.pid
    )?;
    for (depth, step) in evidence.path.iter().enumerate() {
        let mark = step
            .mark
            .map_or(String::new(), |mark| format!("  <== {}", mark.text()));
        let from = step.caller.as_ref().map_or(String::new(), |caller| {
            format!(" /* called from {caller} */")
        });
        writeln!(
            out,
            "          {:indent$}{}(){from}{mark}",
            "",
            step.function,
            indent = 2 * depth.min(40)
        )?;
    }
    Ok(())
}
