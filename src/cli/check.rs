//! `xftrace check`.

use std::io::Write;
use std::time::{Duration, UNIX_EPOCH};

use super::out::Stdout;
use super::{target, Context, Exit};
use crate::cli::args::CheckArgs;
use crate::detect::{self, Conclusion, Evidence, Finding, Severity, Store, Verdict};
use crate::libvirt::enrolment::Enrolment;
use crate::session::Session;

/// Runs the command.
pub(super) fn run(context: &Context, args: &CheckArgs) -> anyhow::Result<Exit> {
    let config = context.config()?;
    let (dir, domain) = match (&args.session, &args.domain) {
        (Some(dir), _) => (dir.clone(), None),
        (None, Some(typed)) => {
            let known = target::known(context, typed);
            let name = known.as_ref().map_or(typed, |domain| &domain.name);
            (target::newest_session(&config, name)?, known)
        }
        (None, None) => {
            let domain = target::running(context, &config, None)?;
            (target::newest_session(&config, &domain.name)?, Some(domain))
        }
    };
    let name = args
        .baseline
        .clone()
        .or_else(|| Enrolment::baseline_of(domain.as_ref(), &config));
    let baseline = match name {
        Some(name) => {
            let baseline = Store::at(&config.paths.baselines).load(&name)?;
            Some((name, baseline))
        }
        None => None,
    };
    let session = Session::open(&dir)?;
    let known = baseline
        .as_ref()
        .map(|(name, baseline)| (name.as_str(), baseline));
    let verdict = detect::check(&session, known)?;
    let mut out = Stdout::new();
    if args.json {
        serde_json::to_writer_pretty(&mut out, &verdict).map_err(std::io::Error::from)?;
        writeln!(out)?;
    } else {
        print(&mut out, &verdict)?;
    }
    Ok(match verdict.conclusion {
        Conclusion::Clean => Exit::Done,
        Conclusion::Findings => Exit::Findings,
        Conclusion::CouldNotTell => Exit::Trouble,
    })
}

/// How many notices are listed for people.
const NOTICES: usize = 10;

/// Writes a verdict for people.
fn print(out: &mut impl Write, verdict: &Verdict) -> std::io::Result<()> {
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
    let conclusion = match verdict.conclusion {
        Conclusion::Clean => "clean, as far as the rules can see".to_owned(),
        Conclusion::Findings => format!("{} findings", alarms.len()),
        Conclusion::CouldNotTell => "could not tell".to_owned(),
    };
    writeln!(out, "\nverdict: {conclusion}")
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
