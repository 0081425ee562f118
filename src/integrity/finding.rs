//! What is looked at, and what is found.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};

/// What a check looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Check {
    /// The kernel's code, byte by byte.
    KernelText,
    /// The kernel's constants, byte by byte: the tables of system calls, file
    /// operations, sequence operations and all others that it was built with.
    ReadOnlyData,
    /// Pointers in the kernel's variables that it was built with.
    DataPointers,
    /// The interrupt descriptor table.
    Interrupts,
    /// Who Ftrace calls, and what it calls them through.
    Ftrace,
    /// Handlers of kprobes and kretprobes.
    Kprobes,
    /// Functions attached to tracepoints.
    Tracepoints,
    /// The operations of mounted file systems and of the files in /proc.
    Files,
    /// Code that no module and no part of the kernel accounts for.
    UnownedCode,
}

impl Check {
    /// All of them, in the order in which they are made.
    pub const ALL: [Self; 9] = [
        Self::KernelText,
        Self::ReadOnlyData,
        Self::DataPointers,
        Self::Interrupts,
        Self::Ftrace,
        Self::Kprobes,
        Self::Tracepoints,
        Self::Files,
        Self::UnownedCode,
    ];

    /// Its name, as output and JSON have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::KernelText => "kernel-text",
            Self::ReadOnlyData => "read-only-data",
            Self::DataPointers => "data-pointers",
            Self::Interrupts => "interrupts",
            Self::Ftrace => "ftrace",
            Self::Kprobes => "kprobes",
            Self::Tracepoints => "tracepoints",
            Self::Files => "files",
            Self::UnownedCode => "unowned-code",
        }
    }

    /// Why what it finds matters.
    pub fn reason(self) -> &'static str {
        match self {
            Self::KernelText => {
                "the kernel's code differs from its image where the kernel does not patch itself, \
                 or in a way in which it does not"
            }
            Self::ReadOnlyData => {
                "a constant of the kernel differs from its image; no kernel changes those"
            }
            Self::DataPointers => {
                "a pointer that led to the kernel's code or to a table of functions now leads to \
                 something else"
            }
            Self::Interrupts => {
                "an interrupt or exception does not enter the kernel where it should"
            }
            Self::Ftrace => "Ftrace calls code that is none of the kernel's own tracers",
            Self::Kprobes => "code that is not the kernel's own is called where a function begins",
            Self::Tracepoints => "code that is not the kernel's own is called at a tracepoint",
            Self::Files => "operations of a file lead to what is not the kernel's own",
            Self::UnownedCode => {
                "memory can be executed that belongs to no module in the guest's list and to no \
                 part of the kernel: a module that hides, or code without one"
            }
        }
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Something that is not as it should be. All text in it is fit for a terminal.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Finding {
    /// What found it.
    pub check: Check,
    /// What it is about: a symbol and an offset, or an entry of a table.
    pub place: String,
    /// Its runtime address.
    pub address: u64,
    /// What should be there.
    pub expected: String,
    /// What is there.
    pub found: String,
    /// Whose the address is that is found there; none where it is not an
    /// address.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub owner: Option<String>,
}

/// What became of a check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Outcome {
    /// Which one.
    pub check: Check,
    /// How much was looked at: bytes of code and constants, and else things.
    pub looked_at: u64,
    /// Why it could not be made, or not wholly.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub doubt: Option<String>,
}

/// What all checks came to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Report {
    /// What is not as it should be.
    pub findings: Vec<Finding>,
    /// Findings that there was no room for.
    pub not_listed: u64,
    /// What is worth knowing and no finding, such as a kprobe of the kernel's own
    /// tracers.
    pub notes: Vec<String>,
    /// What was looked at.
    pub outcomes: Vec<Outcome>,
}

/// The most findings that are listed, and the most notes.
const MOST: usize = 256;

impl Report {
    pub(super) fn add(&mut self, finding: Finding) {
        if self.findings.len() < MOST {
            self.findings.push(finding);
        } else {
            self.not_listed += 1;
        }
    }

    pub(super) fn note(&mut self, note: String) {
        if self.notes.len() < MOST {
            self.notes.push(note);
        }
    }

    /// Ends a check: how much it looked at, and why not at all or not wholly.
    pub(super) fn done(&mut self, check: Check, looked_at: u64, doubt: Option<String>) {
        self.outcomes.push(Outcome {
            check,
            looked_at,
            doubt,
        });
    }
}

impl Finding {
    /// What makes it the same finding as that of another look. What is found there may
    /// be another thing each time: a hook can change where it leads.
    pub fn key(&self) -> (Check, &str, u64) {
        (self.check, &self.place, self.address)
    }
}

impl Report {
    /// What is in both of two looks at a guest, the later of which is `self`, as that
    /// one saw it. Code and lists are in an in-between state for as long as the kernel
    /// works on them; a hook is there in both.
    ///
    /// What one of them found and the other had no room to list may have been in both:
    /// it counts as not listed.
    #[must_use]
    pub fn lasting(mut self, before: &Self) -> Self {
        let now = self.keys();
        let then = before.keys();
        let new = now.difference(&then).count() as u64;
        let no_more = then.difference(&now).count() as u64;
        let hidden = match (before.not_listed, self.not_listed) {
            (0, 0) => 0,
            (0, more) => more.min(no_more),
            (more, 0) => more.min(new),
            (_, more) => more.saturating_add(new),
        };
        let lasting: Vec<bool> = self
            .findings
            .iter()
            .map(|one| then.contains(&one.key()))
            .collect();
        let mut kept = lasting.into_iter();
        self.findings.retain(|_| kept.next().unwrap_or_default());
        self.not_listed = hidden;
        self.notes.retain(|note| before.notes.contains(note));
        self
    }

    fn keys(&self) -> BTreeSet<(Check, &str, u64)> {
        self.findings.iter().map(Finding::key).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(place: usize, leads_to: &str) -> Finding {
        Finding {
            check: Check::ReadOnlyData,
            place: format!("sys_call_table[{place}]"),
            address: place as u64,
            expected: "the kernel's".to_owned(),
            found: leads_to.to_owned(),
            owner: Some(format!("the module {leads_to}")),
        }
    }

    fn report(places: std::ops::Range<usize>, leads_to: &str) -> Report {
        let mut report = Report::default();
        places.for_each(|place| report.add(finding(place, leads_to)));
        report
    }

    #[test]
    fn a_hook_that_leads_elsewhere_each_time_lasts_and_what_has_gone_does_not() {
        let lasting = report(1..3, "b").lasting(&report(0..2, "a"));
        assert_eq!(lasting.findings, [finding(1, "b")]);
        assert_eq!(lasting.not_listed, 0);
        // Another address under the same name is another place.
        let mut moved = report(0..1, "a");
        moved.findings[0].address = 7;
        assert_eq!(moved.lasting(&report(0..1, "a")).findings, []);
    }

    #[test]
    fn what_there_was_no_room_for_may_have_lasted() {
        let counts = |now: std::ops::Range<usize>, then| {
            let lasting = report(now, "a").lasting(&report(then, "a"));
            (lasting.findings.len(), lasting.not_listed)
        };
        // None of those listed in one look is listed in the other.
        let (many, others) = (0..MOST + 2, MOST + 2..2 * MOST + 5);
        assert_eq!(counts(others.clone(), many.clone()), (0, 3 + MOST as u64));
        // One of the two had room for all.
        assert_eq!(counts(many.clone(), 2 * MOST..2 * MOST + 1), (0, 1));
        assert_eq!(counts(2 * MOST..2 * MOST + 1, many.clone()), (0, 1));
        // The same in both.
        assert_eq!(counts(many.clone(), many), (MOST, 2));
        assert_eq!(counts(0..MOST, 0..MOST), (MOST, 0));
    }
}
