//! `xftrace check`: what the guest's memory holds, and what its call flow did.
//!
//! * `memory`: the kernel of a running domain, or of a saved image, against how
//!   it was built
//! * `flow`: a session, against a baseline
//! * `domain`: both, of one domain
//!
//! Of a domain, both are looked at, as far as there is something to look at; each
//! part that there is not is said. The conclusion is that of the worse part. A domain
//! that runs and could not be looked at is never clean, whatever a session of it says.

mod domain;
mod flow;
mod memory;

use std::io::Write;

use anyhow::bail;
use serde::Serialize;

use super::out::Stdout;
use super::{Context, Exit};
use crate::cli::args::CheckArgs;
use crate::detect::{Conclusion, Verdict};
use crate::libvirt::enrolment::Enrolment;

use flow::Name;
use memory::Memory;

/// What `--json` prints; docs/verdict.schema.json describes it.
#[derive(Debug, Serialize)]
struct Checked {
    format: &'static str,
    version: u32,
    conclusion: Conclusion,
    domain: Option<String>,
    memory: Option<Memory>,
    flow: Option<Verdict>,
    doubts: Vec<String>,
    remarks: Vec<String>,
}

impl Checked {
    /// Nothing was looked at yet.
    fn nothing() -> Self {
        Self {
            format: "xftrace-check",
            version: 1,
            conclusion: Conclusion::CouldNotTell,
            domain: None,
            memory: None,
            flow: None,
            doubts: Vec::new(),
            remarks: Vec::new(),
        }
    }

    /// Takes what is in memory, and why that may mean nothing.
    fn found(&mut self, memory: Memory) {
        self.doubts.extend(memory.doubt.map(str::to_owned));
        self.memory = Some(memory);
    }

    /// The worse of the two; with a doubt, not clean.
    fn conclude(&mut self) {
        let memory = self.memory.as_ref().map(|memory| memory.conclusion);
        let flow = self.flow.as_ref().map(|flow| flow.conclusion);
        let all = [memory, flow];
        self.conclusion = if all.contains(&Some(Conclusion::Findings)) {
            Conclusion::Findings
        } else if all.contains(&Some(Conclusion::CouldNotTell))
            || all == [None, None]
            || !self.doubts.is_empty()
        {
            Conclusion::CouldNotTell
        } else {
            Conclusion::Clean
        };
    }
}

/// Runs the command.
pub(super) fn run(context: &Context, args: &CheckArgs) -> anyhow::Result<Exit> {
    let config = context.config()?;
    let mut checked = Checked::nothing();
    if let Some(image) = &args.image.memory {
        let known = memory::of_image(&config, args, image)?;
        let Some((found, doubt)) = known else {
            bail!("{}", memory::NO_IMAGE);
        };
        checked.found(found);
        checked.doubts.extend(doubt);
    } else if let Some(dir) = &args.session {
        let own = Enrolment::baseline_of(None, &config);
        checked.flow = Some(flow::judge(&config, dir, baseline(args, own.as_deref()))?);
    } else {
        domain::check(context, &config, args, &mut checked)?;
    }
    checked.conclude();
    let mut out = Stdout::new();
    if args.json {
        serde_json::to_writer_pretty(&mut out, &checked).map_err(std::io::Error::from)?;
        writeln!(out)?;
    } else {
        print(&mut out, &checked)?;
    }
    Ok(match checked.conclusion {
        Conclusion::Clean => Exit::Done,
        Conclusion::Findings => Exit::Findings,
        Conclusion::CouldNotTell => Exit::Trouble,
    })
}

/// The baseline to compare with: the one that is named goes before the domain's own.
fn baseline<'a>(args: &'a CheckArgs, own: Option<&'a str>) -> Option<Name<'a>> {
    let asked = args.baseline.as_deref().map(Name::Asked);
    asked.or(own.map(Name::Own))
}

/// Writes all of it for people.
fn print(out: &mut impl Write, checked: &Checked) -> std::io::Result<()> {
    if let Some(memory) = &checked.memory {
        memory::print(out, memory)?;
    }
    if let Some(verdict) = &checked.flow {
        if checked.memory.is_some() {
            writeln!(out)?;
        }
        flow::print(out, verdict)?;
    }
    for remark in &checked.remarks {
        writeln!(out, "\nnote: {remark}")?;
    }
    for doubt in &checked.doubts {
        writeln!(out, "\ndoubt: {doubt}")?;
    }
    let conclusion = flow::conclusion(checked.conclusion);
    if checked.memory.is_some() && checked.flow.is_some() {
        writeln!(out, "\nboth: {conclusion}")?;
    } else if !checked.doubts.is_empty() {
        writeln!(out, "\nin all: {conclusion}")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::{json, Value};

    use super::*;
    use crate::test_schema::has_the_fields;

    #[test]
    fn the_schema_describes_what_is_printed() {
        let schema = include_str!("../../../docs/verdict.schema.json");
        let schema: Value = serde_json::from_str(schema).expect("a schema");
        let mut checked = Checked::nothing();
        checked.memory = Some(memory::full());
        checked.conclude();
        let printed = serde_json::to_value(&checked).expect("JSON");
        let memory = &printed["memory"];
        let parts = &schema["$defs"];
        for (object, described) in [
            (&printed, &schema),
            (memory, &parts["memory"]),
            (&memory["findings"][0], &parts["change"]),
            (&memory["outcomes"][0], &parts["outcome"]),
        ] {
            has_the_fields(object, described);
        }
        let checks: Vec<Value> = crate::integrity::Check::ALL
            .iter()
            .map(|check| json!(check.name()))
            .collect();
        assert_eq!(
            parts["change"]["properties"]["check"]["enum"],
            json!(checks)
        );
        assert_eq!(printed["conclusion"], "findings");
    }

    #[test]
    fn why_what_is_in_memory_may_mean_nothing_is_told_and_undoes_no_finding() {
        for (conclusion, in_all) in [
            (Conclusion::Findings, Conclusion::Findings),
            (Conclusion::Clean, Conclusion::CouldNotTell),
        ] {
            for doubt in [None, Some("it is starting")] {
                let mut checked = Checked::nothing();
                let mut memory = memory::full();
                (memory.conclusion, memory.doubt) = (conclusion, doubt);
                checked.found(memory);
                checked.conclude();
                assert_eq!(checked.doubts, Vec::from_iter(doubt));
                let expected = doubt.map_or(conclusion, |_| in_all);
                assert_eq!(checked.conclusion, expected);
                let mut text = Vec::new();
                print(&mut text, &checked).expect("text");
                let text = String::from_utf8(text).expect("text");
                assert_eq!(text.contains("doubt: it is starting"), doubt.is_some());
            }
        }
    }

    #[test]
    fn the_worse_part_decides() {
        let mut checked = Checked::nothing();
        checked.conclude();
        assert_eq!(
            checked.conclusion,
            Conclusion::CouldNotTell,
            "nothing was looked at"
        );
        for conclusion in [
            Conclusion::Clean,
            Conclusion::CouldNotTell,
            Conclusion::Findings,
        ] {
            let mut memory = memory::full();
            memory.conclusion = conclusion;
            checked.memory = Some(memory);
            checked.doubts.clear();
            checked.conclude();
            assert_eq!(checked.conclusion, conclusion);
            checked.doubts.push("not all was looked at".to_owned());
            checked.conclude();
            let doubtful = match conclusion {
                Conclusion::Clean => Conclusion::CouldNotTell,
                other => other,
            };
            assert_eq!(checked.conclusion, doubtful);
        }
    }
}
