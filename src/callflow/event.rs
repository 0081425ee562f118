//! The events that the call flow consists of.

use serde::{Deserialize, Serialize};

use super::names::{Kind, Place};
use crate::kernel::Gva;
use crate::ring::record::{Forged, Lost, Task};

/// Something to be shown at its place in the call flow.
#[derive(Clone, Debug, PartialEq)]
pub struct Event<'n> {
    /// The guest CPU.
    pub cpu: u16,
    /// The boot of the guest.
    pub boot: u32,
    /// The guest's trace clock, in nanoseconds.
    pub time: u64,
    /// What happened.
    pub what: Happening<'n>,
}

/// The kinds of [`Event`]. Each call is told of once by `Open` or `Leaf`, and
/// each `Open` is followed by exactly one `Close` or `Cut` of the same id; the
/// calls of one task nest.
#[derive(Clone, Debug, PartialEq)]
pub enum Happening<'n> {
    /// A call that something follows.
    Open(Opened<'n>),
    /// A call directly followed, on its CPU, by its own return.
    Leaf(Opened<'n>, Spent),
    /// A return.
    Close(Closed<'n>),
    /// An open call that will not be closed any more.
    Cut(Cut<'n>),
    /// The CPU's records go on with another task.
    Switch {
        /// The task that they came from so far.
        from: Task,
        /// The task that they come from now.
        to: Task,
    },
    /// An interrupt interrupts the task.
    IrqEnter(Task),
    /// The task goes on where it was interrupted.
    IrqLeave(Task),
    /// A record that decodes under no key.
    Forged(Forged),
    /// Records are missing here.
    Lost(Box<Loss<'n>>),
    /// The guest has booted again; no call goes on over it.
    Boot,
}

/// A call.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Opened<'n> {
    /// Its running number in this trace, from 1.
    pub id: u64,
    /// The task that called.
    pub task: Task,
    /// The function entered.
    pub func: Place<'n>,
    /// Where it was called from; address 0 where that is [`Origin::Untold`].
    pub caller: Place<'n>,
    /// How that fits.
    pub origin: Origin,
    /// How many calls it is nested in.
    pub depth: u16,
    /// The call it is nested in, as far as it was seen: the function's address.
    pub parent: Option<Gva>,
    /// It was made by an interrupt.
    pub interrupt: bool,
    /// Calls around it were not seen, and no loss or start of the trace
    /// accounts for them.
    pub gap: bool,
    /// The key epoch of its record; 0 if it has none (plain).
    pub epoch: u64,
}

/// How a call's return address fits with where the call stands in the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Origin {
    /// In the function around it: as it should be, nothing to say.
    Inside,
    /// A root, called from the kernel's own text.
    Root,
    /// In other kernel text than the function around it: an untraced function
    /// or an interrupt's entry lies between, or the call around was not seen.
    Elsewhere,
    /// The function around it jumped here instead of calling.
    TailCall,
    /// In the module area, and not in the function around it.
    Module,
    /// Where no kernel code belongs.
    Outside,
    /// Its record does not tell (plain).
    Untold,
}

impl Origin {
    /// Judges the return address `caller` of a call at `depth`, the function
    /// around which is `parent`, if it was seen.
    pub(super) fn judge(caller: &Place<'_>, depth: u16, parent: Option<&Place<'_>>) -> Self {
        match (caller.name.kind, parent) {
            _ if caller.address.0 == 0 => Self::Untold,
            (Kind::Outside, _) => Self::Outside,
            (_, Some(_)) if caller.is_return_handler() => Self::TailCall,
            (_, Some(parent)) if Self::lies_in(caller, parent) => Self::Inside,
            (Kind::Module, _) => Self::Module,
            (Kind::Kernel, _) if depth == 0 => Self::Root,
            (Kind::Kernel, _) => Self::Elsewhere,
        }
    }

    fn lies_in(caller: &Place<'_>, parent: &Place<'_>) -> bool {
        /// A module's functions have no symbols here, so that their lengths
        /// are not known: a caller this close behind the entry counts as in it.
        const MODULE_FUNCTION: u64 = 16 << 10;

        if caller.name.symbol.is_some() && parent.name.symbol.is_some() {
            return caller.start() == parent.start() || caller.owner() == parent.owner();
        }
        caller.name.kind == Kind::Module
            && parent.name.kind == Kind::Module
            && caller.address.0.wrapping_sub(parent.address.0) < MODULE_FUNCTION
    }
}

/// How long a call took, in nanoseconds of the guest's trace clock. Sleeping
/// counts, as it does in ftrace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spent {
    /// From entry to return; `None` if the record says it returned before it
    /// was entered.
    pub total: Option<u64>,
    /// The same without the traced calls below it, as far as they were seen.
    pub own: Option<u64>,
}

/// A return.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Closed<'n> {
    /// The call that it ends, if that was seen.
    pub id: Option<u64>,
    /// The task that returned.
    pub task: Task,
    /// The function that its record names.
    pub func: Place<'n>,
    /// How many calls it is nested in.
    pub depth: u16,
    /// How long it took.
    pub spent: Spent,
    /// How it fits with the call that was open.
    pub fit: Fit<'n>,
    /// Records were lost since the call was opened, so that calls below it
    /// may be missing.
    pub over_loss: bool,
}

/// How a return fits with the call that was open.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fit<'n> {
    /// It is that call's return.
    Matched,
    /// Another function was open at this depth.
    OtherFunction(Place<'n>),
    /// The function is right, but it did not return to where it was called
    /// from: here is where it went.
    OtherCaller(Place<'n>),
    /// No call was open at this depth.
    Uncalled(UncalledWhy),
}

/// Why no call was open that a return could end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum UncalledWhy {
    /// The task's records begin with it: it was called before the trace began.
    TraceStart,
    /// Records were lost that may have held the call.
    Lost,
    /// The task, or some task, was forgotten because there were too many.
    Evicted,
    /// It lies deeper than stacks are kept.
    TooDeep,
    /// Nothing accounts for it.
    Unexplained,
}

/// An open call that will not be closed any more.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cut<'n> {
    /// The call.
    pub id: u64,
    /// The task that called.
    pub task: Task,
    /// The function that was entered.
    pub func: Place<'n>,
    /// How many calls it is nested in.
    pub depth: u16,
    /// When it was entered, guest trace clock, nanoseconds.
    pub since: u64,
    /// Why it is given up.
    pub why: CutWhy,
}

/// Why an open call was given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CutWhy {
    /// It was open when the trace ended.
    TraceEnd,
    /// Its return may be among lost records.
    Lost,
    /// The guest booted again.
    Reboot,
    /// The task went on as if it had returned. A call that never returns
    /// (`do_exit`) and a reused pid look like this, and so do removed records.
    Unreturned,
    /// The task was forgotten because there were too many.
    Evicted,
    /// It lies deeper than stacks are kept.
    TooDeep,
}

/// A place where records are missing, and what that may have touched.
#[derive(Clone, Debug, PartialEq)]
pub struct Loss<'n> {
    /// How many records are missing, and why.
    pub lost: Lost,
    /// The task that the CPU's records came from last.
    pub task: Option<Task>,
    /// That task's open calls, outermost first: their returns, or calls below
    /// them, may be among the lost records.
    pub open: Vec<Place<'n>>,
}
