//! The rules: what each looks for, why that matters, and how sure it is.

use serde::{Deserialize, Serialize};

/// How sure a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// Worth a look; no reason to call the guest hooked.
    Notice,
    /// The guest does what the baseline never did, often enough that chance
    /// does not explain it. Another use of the guest may.
    Warning,
    /// No clean kernel does this.
    Critical,
}

impl Severity {
    /// In a word.
    pub fn text(self) -> &'static str {
        match self {
            Self::Notice => "notice",
            Self::Warning => "warning",
            Self::Critical => "critical",
        }
    }
}

/// What a finding was found by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)]
pub enum Rule {
    OutsideText,
    UnknownModule,
    UnlistedModule,
    WrongCaller,
    NestedInItself,
    UnexpectedCallee,
    MissingCallee,
    UnexpectedOrder,
    CallCount,
    Duration,
    UnknownSequence,
    SilentCpu,
    ForgedRecord,
    KeyTouched,
    TracerOff,
    RecordingOff,
    BufferSwapped,
}

impl Rule {
    /// All rules, in the order in which they are listed.
    pub const ALL: [Self; 17] = [
        Self::OutsideText,
        Self::UnknownModule,
        Self::UnlistedModule,
        Self::WrongCaller,
        Self::NestedInItself,
        Self::UnexpectedCallee,
        Self::MissingCallee,
        Self::UnexpectedOrder,
        Self::CallCount,
        Self::Duration,
        Self::UnknownSequence,
        Self::SilentCpu,
        Self::ForgedRecord,
        Self::KeyTouched,
        Self::TracerOff,
        Self::RecordingOff,
        Self::BufferSwapped,
    ];

    /// Its name, as output and JSON have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::OutsideText => "outside-text",
            Self::UnknownModule => "unknown-module",
            Self::UnlistedModule => "unlisted-module",
            Self::WrongCaller => "wrong-caller",
            Self::NestedInItself => "nested-in-itself",
            Self::UnexpectedCallee => "unexpected-callee",
            Self::MissingCallee => "missing-callee",
            Self::UnexpectedOrder => "unexpected-order",
            Self::CallCount => "call-count",
            Self::Duration => "duration",
            Self::UnknownSequence => "unknown-sequence",
            Self::SilentCpu => "silent-cpu",
            Self::ForgedRecord => "forged-record",
            Self::KeyTouched => "key-touched",
            Self::TracerOff => "tracer-off",
            Self::RecordingOff => "recording-off",
            Self::BufferSwapped => "buffer-swapped",
        }
    }

    /// Whether records of mode plain, which have no key, no return address and
    /// no name of a task, leave nothing to judge.
    pub fn needs_keyed(self) -> bool {
        matches!(
            self,
            Self::WrongCaller | Self::UnknownSequence | Self::ForgedRecord | Self::KeyTouched
        )
    }

    /// Why what it finds matters.
    pub fn reason(self) -> &'static str {
        match self {
            Self::OutsideText => {
                "a function was entered at, or called from, an address where neither the kernel's \
                 text nor a module lies: code that nobody loaded runs in the kernel"
            }
            Self::UnknownModule => {
                "code in the module area takes part that no known module accounts for: a module's \
                 hook, a probe's handler or a trampoline stands in the way of the call"
            }
            Self::UnlistedModule => {
                "code in the module area takes part that is in no module of the guest's own list: \
                 a module that took itself off the list, or code that the kernel made as it ran"
            }
            Self::WrongCaller => {
                "the return address is none that this function is called from in a clean kernel: \
                 somebody else calls it, as one does who replaced a pointer to it"
            }
            Self::NestedInItself => {
                "the function runs inside itself, as it does when a hook that replaced it calls \
                 the original"
            }
            Self::UnexpectedCallee => {
                "the function calls one that it never calls in the baseline: something was put in \
                 its way, or the guest is used in a way that the baseline has not seen"
            }
            Self::MissingCallee => {
                "the function does not call one that it always calls in the baseline: something \
                 that should happen is left out"
            }
            Self::UnexpectedOrder => {
                "two callees follow each other as they never do in the baseline"
            }
            Self::CallCount => {
                "more than half of its calls make more calls, or fewer, than all but the extremes \
                 of the baseline"
            }
            Self::Duration => {
                "more than half of its calls take longer, or shorter, than all but the extremes \
                 of the baseline, measured by what the tracing of one call takes"
            }
            Self::UnknownSequence => {
                "a process makes system calls in an order that no process of its name does in the \
                 baseline"
            }
            Self::SilentCpu => {
                "a CPU gave no records for longer than any does in the baseline, while the guest \
                 ran and others gave them"
            }
            Self::ForgedRecord => {
                "a record in the trace buffer decodes under no key of the host: somebody in the \
                 guest wrote it"
            }
            Self::KeyTouched => {
                "the guest changed the key, or its epoch, that the host had handed out"
            }
            Self::TracerOff => "somebody in the guest switched the tracer off",
            Self::RecordingOff => "somebody in the guest stopped the trace buffer from recording",
            Self::BufferSwapped => {
                "somebody in the guest took a snapshot of the trace buffer: what was recorded \
                 between two of them may never have been read"
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_is_called_in_json_as_it_is_in_text() {
        for rule in Rule::ALL {
            let json = serde_json::to_value(rule).unwrap();
            assert_eq!(json, rule.name());
            assert!(!rule.reason().contains("  "), "{}", rule.name());
        }
        for severity in [Severity::Notice, Severity::Warning, Severity::Critical] {
            assert_eq!(serde_json::to_value(severity).unwrap(), severity.text());
        }
    }
}
