//! A finding, and the evidence for it.

use serde::{Deserialize, Serialize};

use super::profile::{Example, Step};
use super::rules::{Rule, Severity};
use super::site::Site;
use crate::callflow::{Kind, Place};
use crate::kernel::escape;
use crate::output::WallClock;
use crate::session::ControlFlow;

/// Something that should not be. All text in it is fit for a terminal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Finding {
    /// The rule that found it.
    pub rule: Rule,
    /// How sure it is.
    pub severity: Severity,
    /// What it is about: a function, a process, a CPU.
    pub subject: String,
    /// What was seen, in a sentence.
    pub what: String,
    /// How often it was seen.
    pub count: u64,
    /// Of how many times that it could have been.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub of: Option<u64>,
    /// The first time it was seen, if it was at one moment.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub evidence: Option<Evidence>,
}

/// What was seen, where and when.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Evidence {
    /// The host's wall clock, nanoseconds since 1970, if it is known.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub wall_ns: Option<u64>,
    /// The guest's trace clock, nanoseconds.
    pub guest_ns: u64,
    /// The guest's boot, from 1.
    pub boot: u32,
    /// The guest's CPU.
    pub cpu: u16,
    /// The task's thread id in the guest.
    pub pid: i32,
    /// The task's name, if its records tell it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub task: Option<String>,
    /// The calls, outermost first.
    pub path: Vec<PathStep>,
}

/// A call of a path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PathStep {
    /// The function; where no symbol is known, its address. One that the guest
    /// alone names is `name [module?]`.
    pub function: String,
    /// The return address: symbol and offset, or the address itself; none where
    /// records do not tell it (plain). Symbols of the guest's word have `[module?]`
    /// behind them.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub caller: Option<String>,
    /// Where code runs, or is returned to, that is none of the kernel's.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub mark: Option<Mark>,
}

/// What is strange about a call of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mark {
    /// It was called from the module area.
    FromModule,
    /// The function itself lies in the module area.
    InModule,
    /// It was called from where no kernel code belongs, or lies there.
    Outside,
}

impl Mark {
    /// In a few words.
    pub fn text(self) -> &'static str {
        match self {
            Self::FromModule => "called from the module area",
            Self::InModule => "in the module area",
            Self::Outside => "no kernel code belongs there",
        }
    }
}

impl From<&Finding> for ControlFlow {
    fn from(finding: &Finding) -> Self {
        Self {
            rule: finding.rule.name().to_owned(),
            severity: finding.severity.text().to_owned(),
            subject: finding.subject.clone(),
            what: finding.what.clone(),
            count: finding.count,
            evidence: serde_json::to_value(&finding.evidence).unwrap_or_default(),
        }
    }
}

impl Evidence {
    pub(crate) fn of(example: &Example<'_>, clock: &dyn WallClock) -> Self {
        Self {
            wall_ns: clock.wall(example.boot, example.time),
            guest_ns: example.time,
            boot: example.boot,
            cpu: example.cpu,
            pid: example.task.pid,
            task: example.task.comm.map(|comm| escape(comm.bytes())),
            path: example.path.iter().map(PathStep::of).collect(),
        }
    }
}

impl PathStep {
    pub(crate) fn of(step: &Step<'_>) -> Self {
        let (func, caller) = (&step.func, step.caller.as_ref());
        let mark = match (func.name.kind, caller.map(|caller| caller.name.kind)) {
            (Kind::Outside, _) | (_, Some(Kind::Outside)) => Some(Mark::Outside),
            (Kind::Module, _) => Some(Mark::InModule),
            (_, Some(Kind::Module)) => Some(Mark::FromModule),
            (Kind::Kernel, Some(Kind::Kernel) | None) => None,
        };
        let function = func.function();
        Self {
            function: escape(function.as_bytes()),
            caller: caller.map(site),
            mark,
        }
    }
}

/// A return address in full: where no symbol is known, the address itself, with
/// what the guest says of it.
pub(crate) fn site(place: &Place<'_>) -> String {
    let text = match (Site::of(place), place.name.told) {
        (site @ Site::In(..), _) => site.to_string(),
        (Site::Module(Some(module)), _) => format!("{} [{module}]", place.address),
        (_, Some(told)) if told.symbol.is_some() => told.to_string(),
        (_, Some(told)) => format!("{} {told}", place.address),
        _ => place.address.to_string(),
    };
    escape(text.as_bytes())
}
