//! The memory's part of `xftrace check`.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde::Serialize;

use crate::cli::args::CheckArgs;
use crate::cli::image::Image as Saved;
use crate::cli::out;
use crate::config::Config;
use crate::detect::Conclusion;
use crate::helper::{attach, find_living, trusted, Attached, START_LIMIT};
use crate::integrity::{self, Finding, Report};
use crate::kernel::{Kernel, Symbols};
use crate::libvirt::live::{doing, Doing};
use crate::libvirt::xml::DomainXml;
use crate::ram::GuestRam;
use crate::session::QemuProcess;

/// What to say where there is nothing to compare with.
pub(super) const NO_IMAGE: &str =
    "the guest's memory was not looked at: the kernel that it boots is not in the store; add it \
     with 'xftrace symbols add FILE' (its vmlinuz or linux-image package), or name it with --kernel";

/// How long a kernel has to show that it lives.
const PATIENCE: Duration = Duration::from_secs(5);

/// How often a kernel is asked that says that it is starting.
const ASK: Duration = Duration::from_millis(500);
/// What there is to say of one that cannot be waited for, and of one that was.
const NOT_STARTED: &str =
    "the guest's kernel says that it is still starting, and a kernel that starts patches itself: \
     what is found may be no more than that; check again when it has started, and do not believe \
     one that has run for minutes";
const NEVER_STARTS: &str =
    "the guest's kernel says that it is still starting, and was waited for in vain: it is not \
     believed, and what is found counts; that nothing is found means nothing while it says so";

/// What came of it.
#[derive(Debug, Serialize)]
pub(super) struct Memory {
    pub(super) conclusion: Conclusion,
    kernel: String,
    #[serde(flatten)]
    report: Report,
    /// Why all of it may mean nothing.
    #[serde(skip)]
    pub(super) doubt: Option<&'static str>,
}

impl Memory {
    fn of(kernel: &Kernel, report: Report, doubt: Option<&'static str>) -> Self {
        Self {
            conclusion: conclude(&report, doubt),
            kernel: kernel.banner.clone(),
            report,
            doubt,
        }
    }
}

fn conclude(report: &Report, doubt: Option<&str>) -> Conclusion {
    // What is not listed may have been seen in one look only.
    let doubtful = doubt.is_some()
        || report.not_listed > 0
        || report.outcomes.iter().any(|one| one.doubt.is_some());
    match (report.findings.is_empty(), doubtful) {
        (false, _) => Conclusion::Findings,
        (true, true) => Conclusion::CouldNotTell,
        (true, false) => Conclusion::Clean,
    }
}

/// What a look at a running domain came to.
pub(super) struct Looked {
    /// What runs now.
    pub(super) qemu: QemuProcess,
    /// What its kernel calls this boot, as far as that is known.
    pub(super) boot_id: Option<u64>,
    /// Whether the kernel that was found was seen to live.
    pub(super) lives: bool,
    /// What is in its memory; none where there is nothing to compare it with.
    pub(super) memory: anyhow::Result<Option<Memory>>,
}

/// Looks at a running domain.
pub(super) fn of_domain(
    config: &Config,
    args: &CheckArgs,
    domain: &DomainXml,
) -> anyhow::Result<Looked> {
    let attached = attach(domain, config)?;
    let until = Instant::now() + START_LIMIT;
    loop {
        if let Some(looked) = of_attached(config, args, domain, &attached, until) {
            return Ok(looked);
        }
    }
}

/// Looks at a running domain, whose kernel is waited for until then if it is starting.
/// `None` if it has started meanwhile: it is to be found anew, since who starts may have
/// been reset, and be at another place.
fn of_attached(
    config: &Config,
    args: &CheckArgs,
    domain: &DomainXml,
    attached: &Attached,
    until: Instant,
) -> Option<Looked> {
    let mut looked = Looked {
        qemu: attached.qemu,
        boot_id: None,
        lives: false,
        memory: Ok(None),
    };
    let named = args.kernel.as_deref();
    looked.memory = match find_living(domain, config, named, attached, PATIENCE) {
        Ok(living) => {
            looked.boot_id = living.boot_id;
            looked.lives = living.lives;
            let does = doing(&config.paths.libvirt_run, domain);
            let patience = patience(living.lives, does, until);
            let how = How::Runs { patience };
            let (kernel, symbols) = (&living.kernel, &living.symbols);
            match look(config, args, &*attached.ram, kernel, symbols, how) {
                Ok(Look::Made(memory)) => Ok(Some(memory)),
                Ok(Look::NoImage) => Ok(None),
                Ok(Look::HasStarted) => return None,
                Err(error) => Err(error),
            }
        }
        Err(error) => Err(error),
    };
    Some(looked)
}

/// How long a kernel is waited for, that shows a sign of life or does not, of a domain that
/// does this. One that stands still does not go on starting.
fn patience(lives: bool, does: Option<Doing>, until: Instant) -> Option<Duration> {
    let goes_on = lives || does != Some(Doing::StandsStill);
    goes_on.then(|| until.saturating_duration_since(Instant::now()))
}

/// Looks at a saved image. What there is, and why that may mean nothing.
pub(super) fn of_image(
    config: &Config,
    args: &CheckArgs,
    path: &Path,
) -> anyhow::Result<Option<(Memory, Option<String>)>> {
    let mut option = args.image.clone();
    // It has symbols too.
    option.symbols = option.symbols.or_else(|| args.kernel.clone());
    let image = Saved::open(config, &option, path)?;
    let symbols = Arc::clone(&image.symbols);
    let looked = look(
        config,
        args,
        &image.ram,
        &image.kernel,
        &symbols,
        How::Image,
    )?;
    Ok(match looked {
        Look::Made(memory) => Some((memory, image.doubt())),
        Look::NoImage | Look::HasStarted => None,
    })
}

/// What is looked at.
#[derive(Clone, Copy)]
enum How {
    Image,
    /// A domain that has a process. Its kernel is waited for so long if it is starting;
    /// not at all where it stands still.
    Runs {
        patience: Option<Duration>,
    },
}

/// What became of a look.
enum Look {
    /// There is nothing to compare with.
    NoImage,
    /// There was none yet: the kernel has just started.
    HasStarted,
    Made(Memory),
}

fn look(
    config: &Config,
    args: &CheckArgs,
    ram: &dyn GuestRam,
    kernel: &Kernel,
    symbols: &Symbols,
    how: How,
) -> anyhow::Result<Look> {
    let named = args.kernel.as_deref();
    let Some(trusted) = trusted(&config.paths.symbols, named, kernel, symbols)? else {
        return Ok(Look::NoImage);
    };
    let has_started = || integrity::has_started(ram, kernel, symbols, &trusted);
    let patience = match how {
        How::Image => None,
        How::Runs { patience } => patience,
    };
    let doubt = match starts(has_started, patience) {
        Start::Had => None,
        Start::Waited => return Ok(Look::HasStarted),
        Start::Not(why) => Some(why),
    };
    let report = match how {
        How::Image => integrity::check(ram, kernel, symbols, &trusted)?,
        How::Runs { .. } => {
            let mut wait = |time| {
                std::thread::sleep(time);
                true
            };
            let report = integrity::check_running(ram, kernel, symbols, &trusted, &mut wait)?;
            report.context("the look was broken off")?
        }
    };
    Ok(Look::Made(Memory::of(kernel, report, doubt)))
}

/// Whether a kernel has started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Start {
    Had,
    /// It did while it was waited for.
    Waited,
    /// It says that it has not. What is found is told all the same, and this with it.
    Not(&'static str),
}

/// Waits until a kernel has started that says that it has not yet, if it can be waited
/// for. It is the guest's word: who controls it may say so for ever.
fn starts(has_started: impl Fn() -> bool, patience: Option<Duration>) -> Start {
    if has_started() {
        return Start::Had;
    }
    let Some(patience) = patience else {
        return Start::Not(NOT_STARTED);
    };
    if !patience.is_zero() {
        out::message(&format!(
            "the guest's kernel says that it is still starting: waiting for it, for {} at most",
            humantime::format_duration(Duration::from_secs(patience.as_secs()))
        ));
    }
    let until = Instant::now() + patience;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Start::Not(NEVER_STARTS);
        }
        std::thread::sleep(ASK.min(left));
        if has_started() {
            return Start::Waited;
        }
    }
}

/// How many notes are listed for people.
const NOTES: usize = 10;

/// Writes it for people.
pub(super) fn print(out: &mut impl Write, memory: &Memory) -> std::io::Result<()> {
    let report = &memory.report;
    writeln!(out, "memory of: {}", memory.kernel)?;
    writeln!(out, "\nLOOKED AT            HOW MUCH   FINDINGS")?;
    for outcome in &report.outcomes {
        let found = report.findings.iter();
        let count = found
            .filter(|finding| finding.check == outcome.check)
            .count();
        writeln!(
            out,
            "{:<17} {:>11}   {count}",
            outcome.check, outcome.looked_at
        )?;
        if let Some(doubt) = &outcome.doubt {
            writeln!(out, "                    could not tell: {doubt}")?;
        }
    }
    for finding in &report.findings {
        print_finding(out, finding)?;
    }
    if report.not_listed > 0 {
        let left_out = match report.findings.is_empty() {
            false => "more findings",
            true => "findings, too many to tell which of them lasted",
        };
        writeln!(out, "\nand {} {left_out}", report.not_listed)?;
    }
    for note in report.notes.iter().take(NOTES) {
        writeln!(out, "\nnote: {note}")?;
    }
    if report.notes.len() > NOTES {
        writeln!(out, "  ... all of them are in --json")?;
    }
    let conclusion = super::flow::conclusion(memory.conclusion);
    writeln!(out, "\nmemory: {conclusion}")
}

fn print_finding(out: &mut impl Write, finding: &Finding) -> std::io::Result<()> {
    writeln!(
        out,
        "\n{}: {} ({:#x})",
        finding.check, finding.place, finding.address
    )?;
    writeln!(out, "          should be: {}", finding.expected)?;
    writeln!(out, "          is:        {}", finding.found)?;
    if let Some(owner) = &finding.owner {
        writeln!(out, "          whose:     {owner}")?;
    }
    writeln!(out, "          why:       {}", finding.check.reason())
}

/// One with all that there can be in it.
#[cfg(test)]
pub(super) fn full() -> Memory {
    use crate::integrity::{Check, Outcome};
    Memory {
        conclusion: Conclusion::Findings,
        kernel: "Linux version 6.1.0".to_owned(),
        report: Report {
            findings: vec![Finding {
                check: Check::KernelText,
                place: "vfs_read".to_owned(),
                address: 1,
                expected: "90".to_owned(),
                found: "cc".to_owned(),
                owner: Some("nobody".to_owned()),
            }],
            not_listed: 0,
            notes: Vec::new(),
            outcomes: vec![Outcome {
                check: Check::KernelText,
                looked_at: 1,
                doubt: Some("why".to_owned()),
            }],
        },
        doubt: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_that_starts_is_waited_for_and_not_for_ever() {
        let asked = std::cell::Cell::new(0);
        let from = |number: u32| {
            asked.set(0);
            let asked = &asked;
            move || {
                asked.set(asked.get() + 1);
                asked.get() >= number
            }
        };
        let some = |millis| Some(Duration::from_millis(millis));
        assert_eq!(starts(from(1), None), Start::Had);
        assert_eq!(starts(from(1), some(0)), Start::Had);
        assert_eq!(starts(from(3), some(60_000)), Start::Waited);
        assert_eq!(starts(from(1000), some(20)), Start::Not(NEVER_STARTS));
        // All its time is over.
        assert_eq!(starts(from(2), some(0)), Start::Not(NEVER_STARTS));
        assert_eq!(asked.get(), 1);
        // An image does not go on, nor does a domain that stands still.
        assert_eq!(starts(from(2), None), Start::Not(NOT_STARTED));
        assert_eq!(asked.get(), 1);
    }

    #[test]
    fn a_domain_that_stands_still_is_not_waited_for() {
        let until = Instant::now() + START_LIMIT;
        for (lives, does, is_waited_for) in [
            (true, Some(Doing::Runs), true),
            // It is not far enough yet to show a sign of life.
            (false, Some(Doing::Runs), true),
            (false, None, true),
            (false, Some(Doing::StandsStill), false),
            // It goes on again.
            (true, Some(Doing::StandsStill), true),
        ] {
            let patience = patience(lives, does, until);
            assert_eq!(patience.is_some(), is_waited_for, "{lives} {does:?}");
            assert!(patience.is_none_or(|time| time <= START_LIMIT && time > START_LIMIT / 2));
        }
        // However often it starts.
        assert_eq!(patience(true, None, Instant::now()), Some(Duration::ZERO));
    }

    /// Its word hides nothing.
    #[test]
    fn of_a_kernel_that_says_it_is_starting_findings_are_told_and_nothing_found_is_not_clean() {
        let found = full().report;
        assert_eq!(conclude(&found, Some(NOT_STARTED)), Conclusion::Findings);
        let nothing = Report::default();
        assert_eq!(
            conclude(&nothing, Some(NEVER_STARTS)),
            Conclusion::CouldNotTell
        );
    }

    #[test]
    fn nothing_listed_is_clean_only_where_all_was_looked_at_and_all_is_listed() {
        let mut report = Report::default();
        assert_eq!(conclude(&report, None), Conclusion::Clean);
        report.not_listed = 1;
        assert_eq!(conclude(&report, None), Conclusion::CouldNotTell);
        assert_eq!(conclude(&full().report, None), Conclusion::Findings);
        let mut report = full().report;
        report.findings.clear();
        assert_eq!(conclude(&report, None), Conclusion::CouldNotTell);
        report.outcomes[0].doubt = None;
        assert_eq!(conclude(&report, None), Conclusion::Clean);
    }
}
