//! The objects that events are written as.

use std::borrow::Cow;

use serde::Serialize;

use super::super::escape::{guest, symbol};
use crate::callflow::{CutWhy, Fit, Happening, Kind, Opened, Origin, Place, Spent, UncalledWhy};
use crate::kernel::Gva;
use crate::ring::record::{ForgedWhy, LostWhy, Task};

/// An event, as its object shows it beside CPU and time.
#[derive(Serialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub(super) enum What<'a> {
    Call {
        #[serde(flatten)]
        call: Call<'a>,
    },
    Leaf {
        #[serde(flatten)]
        call: Call<'a>,
        #[serde(flatten)]
        spent: Times,
    },
    Return {
        #[serde(flatten)]
        who: Who,
        id: Option<u64>,
        depth: u16,
        #[serde(flatten)]
        func: Func<'a>,
        #[serde(flatten)]
        spent: Times,
        #[serde(skip_serializing_if = "Option::is_none")]
        opened_as: Option<Func<'a>>,
        #[serde(skip_serializing_if = "Option::is_none")]
        returned_to: Option<Address<'a>>,
        #[serde(skip_serializing_if = "Option::is_none")]
        uncalled: Option<UncalledWhy>,
        #[serde(skip_serializing_if = "is_false")]
        over_loss: bool,
    },
    Cut {
        #[serde(flatten)]
        who: Who,
        id: u64,
        depth: u16,
        #[serde(flatten)]
        func: Func<'a>,
        since_guest_ns: u64,
        why: CutWhy,
    },
    Switch {
        from: Who,
        to: Who,
    },
    IrqEnter {
        #[serde(flatten)]
        who: Who,
    },
    IrqLeave {
        #[serde(flatten)]
        who: Who,
    },
    Forged {
        why: ForgedWhy,
        epoch: Option<u64>,
        claimed_pid: i32,
        claimed_depth: i32,
        raw_func: Hex,
    },
    Lost {
        why: LostWhy,
        records: Option<u64>,
        task: Option<Who>,
        open: Vec<Func<'a>>,
    },
    Boot,
}

impl<'a> What<'a> {
    pub(super) fn new(what: &Happening<'a>) -> Self {
        match what {
            Happening::Open(call) => Self::Call {
                call: Call::new(call),
            },
            Happening::Leaf(call, spent) => Self::Leaf {
                call: Call::new(call),
                spent: Times::new(*spent),
            },
            Happening::Close(closed) => {
                let (mut opened_as, mut returned_to, mut uncalled) = (None, None, None);
                match closed.fit {
                    Fit::Matched => {}
                    Fit::OtherFunction(open) => opened_as = Some(Func::new(&open)),
                    Fit::OtherCaller(to) => returned_to = Some(Address::new(&to)),
                    Fit::Uncalled(why) => uncalled = Some(why),
                }
                Self::Return {
                    who: Who::new(&closed.task),
                    id: closed.id,
                    depth: closed.depth,
                    func: Func::new(&closed.func),
                    spent: Times::new(closed.spent),
                    opened_as,
                    returned_to,
                    uncalled,
                    over_loss: closed.over_loss,
                }
            }
            Happening::Cut(cut) => Self::Cut {
                who: Who::new(&cut.task),
                id: cut.id,
                depth: cut.depth,
                func: Func::new(&cut.func),
                since_guest_ns: cut.since,
                why: cut.why,
            },
            Happening::Switch { from, to } => Self::Switch {
                from: Who::new(from),
                to: Who::new(to),
            },
            Happening::IrqEnter(task) => Self::IrqEnter {
                who: Who::new(task),
            },
            Happening::IrqLeave(task) => Self::IrqLeave {
                who: Who::new(task),
            },
            Happening::Forged(forged) => Self::Forged {
                why: forged.why,
                epoch: forged.epoch,
                claimed_pid: forged.pid,
                claimed_depth: forged.depth,
                raw_func: Hex(forged.raw_func),
            },
            Happening::Lost(loss) => Self::Lost {
                why: loss.lost.why,
                records: loss.lost.records,
                task: loss.task.as_ref().map(Who::new),
                open: loss.open.iter().map(Func::new).collect(),
            },
            Happening::Boot => Self::Boot,
        }
    }
}

#[derive(Serialize)]
pub(super) struct Call<'a> {
    #[serde(flatten)]
    who: Who,
    id: u64,
    depth: u16,
    #[serde(flatten)]
    func: Func<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    caller: Option<Address<'a>>,
    origin: Origin,
    #[serde(skip_serializing_if = "is_false")]
    interrupt: bool,
    #[serde(skip_serializing_if = "is_false")]
    gap: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    epoch: Option<u64>,
}

impl<'a> Call<'a> {
    fn new(call: &Opened<'a>) -> Self {
        Self {
            who: Who::new(&call.task),
            id: call.id,
            depth: call.depth,
            func: Func::new(&call.func),
            caller: (call.origin != Origin::Untold).then(|| Address::new(&call.caller)),
            origin: call.origin,
            interrupt: call.interrupt,
            gap: call.gap,
            epoch: (call.epoch != 0).then_some(call.epoch),
        }
    }
}

#[derive(Serialize)]
pub(super) struct Who {
    pid: i32,
    #[serde(skip_serializing_if = "Option::is_none")]
    comm: Option<String>,
}

impl Who {
    fn new(task: &Task) -> Self {
        Self {
            pid: task.pid,
            comm: task.comm.map(|comm| guest(comm.bytes(), 64)),
        }
    }
}

#[derive(Serialize)]
pub(super) struct Func<'a> {
    func: Option<Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    module: Option<Cow<'a, str>>,
    addr: Hex,
    #[serde(skip_serializing_if = "Option::is_none")]
    area: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    guest_says: Option<GuestSays<'a>>,
}

/// What the guest says of an address that the host knows no symbol for.
#[derive(Serialize)]
struct GuestSays<'a> {
    module: Cow<'a, str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    symbol: Option<Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    offset: Option<u64>,
}

impl<'a> GuestSays<'a> {
    fn new(place: &Place<'a>) -> Option<Self> {
        let told = place.name.told?;
        let (name, offset) = told.symbol.unzip();
        Some(Self {
            module: symbol(told.module),
            symbol: name.map(symbol),
            offset,
        })
    }
}

impl<'a> Func<'a> {
    fn new(place: &Place<'a>) -> Self {
        Self {
            func: place.entered().map(symbol),
            module: place.name.module.map(symbol),
            addr: Hex::from(place.address),
            area: area(place),
            guest_says: GuestSays::new(place),
        }
    }
}

#[derive(Serialize)]
pub(super) struct Address<'a> {
    symbol: Option<Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    offset: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    module: Option<Cow<'a, str>>,
    addr: Hex,
    #[serde(skip_serializing_if = "Option::is_none")]
    area: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    guest_says: Option<GuestSays<'a>>,
}

impl<'a> Address<'a> {
    fn new(place: &Place<'a>) -> Self {
        let (name, offset) = place.name.symbol.unzip();
        Self {
            symbol: name.map(symbol),
            offset,
            module: place.name.module.map(symbol),
            addr: Hex::from(place.address),
            area: area(place),
            guest_says: GuestSays::new(place),
        }
    }
}

/// The area of an address that is not in the kernel's text.
fn area(place: &Place<'_>) -> Option<&'static str> {
    match place.name.kind {
        Kind::Kernel => None,
        Kind::Module => Some("module"),
        Kind::Outside => Some("outside"),
    }
}

#[derive(Serialize)]
pub(super) struct Times {
    ns: Option<u64>,
    own_ns: Option<u64>,
}

impl Times {
    fn new(spent: Spent) -> Self {
        Self {
            ns: spent.total,
            own_ns: spent.own,
        }
    }
}

/// A number in hexadecimal: a string, for many readers of JSON keep 53 bits of
/// a number.
pub(super) struct Hex(pub(super) u64);

impl From<Gva> for Hex {
    fn from(address: Gva) -> Self {
        Self(address.0)
    }
}

impl Serialize for Hex {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{:#x}", self.0))
    }
}

fn is_false(flag: &bool) -> bool {
    !flag
}
