//! What the reader of the ring buffer hands to everything above it.
//!
//! An [`Item`] is one thing that one CPU's buffer yielded, decoded and with
//! the key removed, in the order in which the guest wrote it. Nothing in it is
//! proof against a hostile guest beyond what its type says: a pid is any
//! `i32`, a depth any `u16`, a time any `u64`, an address any `u64`, and times
//! may run backwards. What could not be read or decoded is an item too
//! ([`What::Lost`], [`What::Forged`]), so that it stands in its place.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::kernel::Gva;

/// What one CPU's buffer yielded, in the order in which it was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Item {
    /// The guest CPU whose buffer it comes from.
    pub cpu: u16,
    /// The boot of the guest it belongs to; 1 is the first one of the session.
    pub boot: u32,
    /// The guest's trace clock, in nanoseconds. It starts again at each boot.
    pub time: u64,
    /// What it was.
    pub what: What,
}

/// The kinds of [`Item`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// A traced function was entered.
    Call(Call),
    /// A traced function returned.
    Return(Return),
    /// A function-graph record that decodes under no key.
    Forged(Forged),
    /// A place where records are missing.
    Lost(Lost),
    /// Another tracer's record (trace_printk, events): not ours, only counted.
    Other {
        /// The type number in its `struct trace_entry`.
        type_id: u16,
    },
}

impl What {
    /// Whether it is a record of function_graph that was understood.
    pub fn is_call_or_return(&self) -> bool {
        matches!(self, Self::Call(_) | Self::Return(_))
    }
}

/// The entry of a traced function, its addresses as the guest's kernel had
/// them at run time (key removed, slide not).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// The task that called.
    pub task: Task,
    /// The context it called in.
    pub flags: TraceFlags,
    /// Where the function is entered: the address of its ftrace call site,
    /// which is the function's own or, behind an `endbr64`, 4 bytes more.
    pub func: Gva,
    /// The return address: the instruction behind the call; `Gva(0)` if the
    /// record does not tell (plain).
    pub caller: Gva,
    /// How many traced calls the task was in already: 0 is a root, one of the
    /// functions asked for, entered from outside any traced call.
    pub depth: u16,
    /// The key epoch that the record names, and decoded under; 0, which is no
    /// epoch, if it names none (plain).
    pub epoch: u64,
    /// The record's running number on its CPU: the guest's in a keyed record,
    /// the reader's own count in a plain one.
    pub seq: u64,
}

/// The return of a traced function. Fields as in [`Call`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Return {
    /// The task that returned.
    pub task: Task,
    /// The context it returned in.
    pub flags: TraceFlags,
    /// The function that returned, as in [`Call::func`].
    pub func: Gva,
    /// Where it returned to; `Gva(0)` if the record does not tell.
    pub caller: Gva,
    /// The depth it was called at.
    pub depth: u16,
    /// The key epoch that the record names, and decoded under.
    pub epoch: u64,
    /// The record's running number on its CPU.
    pub seq: u64,
    /// How many calls of this task ftrace could not trace so far, because
    /// they were nested too deeply (`trace_overrun` of `struct task_struct`).
    pub overrun: u32,
    /// When the function was entered, guest trace clock, nanoseconds.
    pub calltime: u64,
    /// When it returned, guest trace clock, nanoseconds.
    pub rettime: u64,
}

/// A guest task (thread) as a record names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Task {
    /// Thread id in the guest's first pid namespace; 0 is the idle task, of
    /// which each CPU has its own.
    pub pid: i32,
    /// Its name, on calls of depth 0 only.
    pub comm: Option<Comm>,
}

/// A task's name as the guest wrote it: `comm` of `struct task_struct`,
/// TASK_COMM_LEN bytes, whatever the guest put there. Escape it before it is
/// shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Comm(pub [u8; 16]);

impl Comm {
    /// The bytes before the first NUL.
    pub fn bytes(&self) -> &[u8] {
        self.0.split(|&byte| byte == 0).next().unwrap_or(&[])
    }
}

impl From<&str> for Comm {
    /// The first 15 bytes of `name`, as the kernel would keep them.
    fn from(name: &str) -> Self {
        let mut bytes = [0; 16];
        for (to, from) in bytes.iter_mut().take(15).zip(name.bytes()) {
            *to = from;
        }
        Self(bytes)
    }
}

/// The context flags of a record: `flags` of `struct trace_entry`
/// (enum trace_flag_type, include/linux/trace_events.h).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TraceFlags(pub u8);

impl TraceFlags {
    /// TRACE_FLAG_IRQS_OFF.
    pub const IRQS_OFF: u8 = 0x01;
    /// TRACE_FLAG_HARDIRQ.
    pub const HARDIRQ: u8 = 0x08;
    /// TRACE_FLAG_SOFTIRQ.
    pub const SOFTIRQ: u8 = 0x10;
    /// TRACE_FLAG_NMI.
    pub const NMI: u8 = 0x40;

    /// Written with interrupts off, as the code is that serves one.
    pub fn irqs_off(self) -> bool {
        self.0 & Self::IRQS_OFF != 0
    }

    /// Written while a hardware interrupt was being served.
    pub fn hardirq(self) -> bool {
        self.0 & Self::HARDIRQ != 0
    }

    /// Written while a software interrupt was being served.
    pub fn softirq(self) -> bool {
        self.0 & Self::SOFTIRQ != 0
    }

    /// Written while a non-maskable interrupt was being served.
    pub fn nmi(self) -> bool {
        self.0 & Self::NMI != 0
    }
}

/// A function-graph record that decodes under no key, as it lay in the buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forged {
    /// What is wrong with it.
    pub why: ForgedWhy,
    /// The key epoch it names, where it has room for one.
    pub epoch: Option<u64>,
    /// The pid it names.
    pub pid: i32,
    /// Its function field, as it lay there.
    pub raw_func: u64,
    /// The depth it names.
    pub depth: i32,
}

/// What is wrong with a [`Forged`] record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ForgedWhy {
    /// It names an epoch that the host never handed out.
    UnknownEpoch,
    /// Under the key of the epoch it names it does not give a kernel address.
    NotDecodable,
    /// It names an epoch lower than one that its CPU has already used.
    StaleEpoch,
    /// Its running number was used before: it is a copy.
    Replayed,
    /// It is a plain function-graph record, in a keyed trace.
    Unkeyed,
    /// Its size or its fields are impossible.
    BadShape,
}

impl ForgedWhy {
    /// All of them, in the order in which they are listed.
    pub const ALL: [Self; 6] = [
        Self::UnknownEpoch,
        Self::NotDecodable,
        Self::StaleEpoch,
        Self::Replayed,
        Self::Unkeyed,
        Self::BadShape,
    ];

    /// In a few words.
    pub fn text(self) -> &'static str {
        match self {
            Self::UnknownEpoch => "unknown epoch",
            Self::NotDecodable => "not decodable under its epoch",
            Self::StaleEpoch => "stale epoch",
            Self::Replayed => "replayed",
            Self::Unkeyed => "not keyed",
            Self::BadShape => "bad shape",
        }
    }
}

impl fmt::Display for ForgedWhy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.text())
    }
}

/// A place in one CPU's stream where records are missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lost {
    /// How many; exact where the sequence numbers tell, else `None`.
    pub records: Option<u64>,
    /// What became of them.
    pub why: LostWhy,
}

/// What became of [`Lost`] records.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LostWhy {
    /// The guest wrote over them before they were read.
    Overrun,
    /// Their page changed under the copy, each time it was tried.
    Torn,
    /// The helper was not running.
    HelperAbsent,
    /// The guest's ring buffer itself dropped them.
    Dropped,
    /// The guest reset its ring buffer, or rebooted, before they were read.
    GuestReset,
    /// The host could not store them.
    NotStored,
}

impl LostWhy {
    /// All of them, in the order in which they are listed.
    pub const ALL: [Self; 6] = [
        Self::Overrun,
        Self::Torn,
        Self::HelperAbsent,
        Self::Dropped,
        Self::GuestReset,
        Self::NotStored,
    ];

    /// In a few words.
    pub fn text(self) -> &'static str {
        match self {
            Self::Overrun => "overrun",
            Self::Torn => "torn page",
            Self::HelperAbsent => "helper absent",
            Self::Dropped => "dropped by the guest",
            Self::GuestReset => "guest reset",
            Self::NotStored => "not stored",
        }
    }
}

impl fmt::Display for LostWhy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.text())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_comm_ends_at_its_first_nul() {
        assert_eq!(Comm(*b"sh\0stale bytes\0\0").bytes(), b"sh");
        assert_eq!(Comm(*b"sixteen bytes ok").bytes(), b"sixteen bytes ok");
        assert_eq!(Comm([0; 16]).bytes(), b"");
    }

    #[test]
    fn a_comm_is_cut_as_the_kernel_cuts_it() {
        assert_eq!(
            Comm::from("a-name-of-twenty-char").bytes(),
            b"a-name-of-twent"
        );
    }

    #[test]
    fn flags_are_those_of_the_kernel() {
        let irq = TraceFlags(0x08 | 0x01);
        assert!(irq.irqs_off() && irq.hardirq() && !irq.softirq() && !irq.nmi());
        assert!(TraceFlags(0x10).softirq() && TraceFlags(0x40).nmi());
    }

    #[test]
    fn every_reason_is_listed_once() {
        let forged: std::collections::HashSet<_> =
            ForgedWhy::ALL.iter().map(|w| w.text()).collect();
        let lost: std::collections::HashSet<_> = LostWhy::ALL.iter().map(|w| w.text()).collect();
        assert_eq!(
            (forged.len(), lost.len()),
            (ForgedWhy::ALL.len(), LostWhy::ALL.len())
        );
    }
}
