//! The memory's part of `xftrace check`.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::cli::args::CheckArgs;
use crate::cli::image::Image as Saved;
use crate::cli::out;
use crate::config::Config;
use crate::detect::Conclusion;
use crate::helper::{attach, find_living, trusted};
use crate::integrity::{self, Finding, Report};
use crate::kernel::{Kernel, Symbols};
use crate::libvirt::xml::DomainXml;
use crate::ram::GuestRam;
use crate::session::QemuProcess;

/// What to say where there is nothing to compare with.
pub(super) const NO_IMAGE: &str =
    "the guest's memory was not looked at: the kernel that it boots is not in the store; add it \
     with 'xftrace symbols add FILE' (its vmlinuz or linux-image package), or name it with --kernel";

/// How long a kernel has to show that it lives.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long a kernel is believed that it is starting, as the helper believes it, and how
/// often it is asked.
const STARTING: Duration = Duration::from_secs(120);
const ASK: Duration = Duration::from_millis(500);
/// What there is to say of what is found then.
const NOT_STARTED: &str =
    "the guest's kernel says that it has not started: a kernel that starts patches itself, and \
     what is found may be no more than that; one that has run for minutes and says so is lying";

/// What came of it.
#[derive(Debug, Serialize)]
pub(super) struct Memory {
    pub(super) conclusion: Conclusion,
    kernel: String,
    #[serde(flatten)]
    report: Report,
}

impl Memory {
    fn of(kernel: &Kernel, report: Report) -> Self {
        Self {
            conclusion: conclude(&report),
            kernel: kernel.banner.clone(),
            report,
        }
    }
}

fn conclude(report: &Report) -> Conclusion {
    // What is not listed may have been seen in one look only.
    let doubtful = report.not_listed > 0 || report.outcomes.iter().any(|one| one.doubt.is_some());
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
    let qemu = attached.qemu;
    Ok(match find_living(domain, config, &attached, PATIENCE) {
        Ok(living) => Looked {
            qemu,
            boot_id: living.boot_id,
            lives: living.lives,
            memory: look(
                config,
                args,
                &*attached.ram,
                &living.kernel,
                &living.symbols,
                true,
            ),
        },
        Err(error) => Looked {
            qemu,
            boot_id: None,
            lives: false,
            memory: Err(error),
        },
    })
}

/// Looks at a saved image.
pub(super) fn of_image(
    config: &Config,
    args: &CheckArgs,
    path: &Path,
) -> anyhow::Result<Option<Memory>> {
    let image = Saved::open(config, &args.image, path)?;
    let symbols = Arc::clone(&image.symbols);
    look(config, args, &image.ram, &image.kernel, &symbols, false)
}

fn look(
    config: &Config,
    args: &CheckArgs,
    ram: &dyn GuestRam,
    kernel: &Kernel,
    symbols: &Symbols,
    live: bool,
) -> anyhow::Result<Option<Memory>> {
    let named = args.kernel.as_deref();
    let Some(trusted) = trusted(&config.paths.symbols, named, kernel, symbols)? else {
        return Ok(None);
    };
    let patience = if live { STARTING } else { Duration::ZERO };
    let is_starting = !starts(
        || integrity::has_started(ram, kernel, symbols, &trusted),
        patience,
    );
    let report = if live {
        let mut wait = |time| {
            std::thread::sleep(time);
            true
        };
        integrity::check_running(ram, kernel, symbols, &trusted, &mut wait)?
    } else {
        Some(integrity::check(ram, kernel, symbols, &trusted)?)
    };
    let note = |mut report: Report| {
        if is_starting {
            report.notes.insert(0, NOT_STARTED.to_owned());
        }
        report
    };
    Ok(report.map(|report| Memory::of(kernel, note(report))))
}

/// Waits until a kernel has started that says that it has not yet. It is the guest's
/// word: who controls it may say so for ever.
fn starts(has_started: impl Fn() -> bool, patience: Duration) -> bool {
    let since = Instant::now();
    let mut told = false;
    while !has_started() {
        if since.elapsed() >= patience {
            return false;
        }
        if !told {
            told = true;
            out::message(&format!(
                "the guest's kernel says that it is still starting: waiting for it, for {} at most",
                humantime::format_duration(patience)
            ));
        }
        std::thread::sleep(ASK.min(patience));
    }
    true
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
        let short = Duration::from_millis(20);
        assert!(starts(from(1), Duration::ZERO));
        assert!(starts(from(3), Duration::from_secs(60)));
        assert!(!starts(from(1000), short));
        // An image does not go on.
        assert!(!starts(from(2), Duration::ZERO));
        assert_eq!(asked.get(), 1);
    }

    #[test]
    fn nothing_listed_is_clean_only_where_all_was_looked_at_and_all_is_listed() {
        let mut report = Report::default();
        assert_eq!(conclude(&report), Conclusion::Clean);
        report.not_listed = 1;
        assert_eq!(conclude(&report), Conclusion::CouldNotTell);
        assert_eq!(conclude(&full().report), Conclusion::Findings);
        let mut report = full().report;
        report.findings.clear();
        assert_eq!(conclude(&report), Conclusion::CouldNotTell);
        report.outcomes[0].doubt = None;
        assert_eq!(conclude(&report), Conclusion::Clean);
    }
}
