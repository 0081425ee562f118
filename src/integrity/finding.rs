//! What is looked at, and what is found.

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
    /// What it is about: a symbol and an offset, or an entry of a table. Looks are
    /// compared by it, so it has no counts and nothing that a hook may change.
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
