//! Items for tests, written down the way one would tell the story.

use xftrace::callflow::{Kind, Name, Names};
use xftrace::kernel::Gva;
use xftrace::ring::record::{
    Call, Comm, Forged, ForgedWhy, Item, Lost, LostWhy, Return, Task, TraceFlags, What,
};
use xftrace::session::GuestName;

/// The functions of the test kernel, 4 KiB each, from [`BASE`] on.
const FUNCTIONS: &[&str] = &[
    "x64_sys_call",
    "__x64_sys_read",
    "ksys_read",
    "vfs_read",
    "rw_verify_area",
    "vfs_read.cold",
    "__x64_sys_openat",
    "do_sys_openat2",
    "getname",
    "do_exit",
    "return_to_handler",
    "irq_enter_rcu",
    "sysvec_apic_timer_interrupt",
    "handle_irq",
    "tick_handle",
    "nasty\u{1b}[2Jsymbol\u{9b}",
    "__x64_sys_finit_module",
    "do_init_module",
    "do_one_initcall",
];
/// The one in interrupt entry text.
const IRQ_ENTRY: &str = "sysvec_apic_timer_interrupt";
const BASE: u64 = 0xffff_ffff_8100_0000;
const SIZE: u64 = 0x1000;

/// Boot n of the test kernel is slid by this much for each boot before it.
pub(crate) const SLIDE: u64 = 0x100_0000;

/// An address in the module area.
pub(crate) const IN_MODULE: Gva = Gva(0xffff_ffff_c012_3456);
/// An address where no kernel code belongs.
pub(crate) const NOWHERE: Gva = Gva(0x5555_0000_1234);

/// The symbols of the test kernel.
pub(crate) struct Table;

impl Names for Table {
    fn function(&self, boot: u32, runtime: Gva) -> Name<'_> {
        let slide = u64::from(boot.saturating_sub(1)).wrapping_mul(SLIDE);
        let at = runtime.0.wrapping_sub(slide).wrapping_sub(BASE);
        let symbol = usize::try_from(at / SIZE)
            .ok()
            .and_then(|number| FUNCTIONS.get(number));
        let kind = match (symbol, runtime.0) {
            (Some(_), _) => Kind::Kernel,
            (None, 0xffff_ffff_c000_0000..=0xffff_ffff_feff_ffff) => Kind::Module,
            (None, _) => Kind::Outside,
        };
        let irq_entry = symbol == Some(&IRQ_ENTRY);
        Name {
            symbol: symbol.map(|symbol| (*symbol, at % SIZE)),
            module: None,
            kind,
            irq_entry,
            told: None,
        }
    }
}

/// The same kernel in a guest that says of all its module area: here is `module`,
/// and what stands at [`IN_MODULE`] is its `function`.
#[derive(Clone, Copy)]
pub(crate) struct Saying {
    pub(crate) module: &'static str,
    pub(crate) function: &'static str,
}

impl Names for Saying {
    fn function(&self, boot: u32, runtime: Gva) -> Name<'_> {
        Table.function(boot, runtime)
    }

    fn told(&self, _: u32, runtime: Gva, _: u64) -> Option<GuestName<'_>> {
        Some(GuestName {
            module: self.module,
            symbol: runtime
                .0
                .checked_sub(IN_MODULE.0)
                .map(|offset| (self.function, offset)),
        })
    }
}

/// Where a function of the test kernel is linked.
pub(crate) fn address(name: &str) -> Gva {
    let number = FUNCTIONS.iter().position(|function| *function == name);
    Gva(BASE + number.unwrap_or_else(|| panic!("no function {name}")) as u64 * SIZE)
}

/// Writes items. Time passes by 100 ns before each.
pub(crate) struct Story {
    pub(crate) items: Vec<Item>,
    time: u64,
    cpu: u16,
    boot: u32,
    pid: i32,
    comm: &'static str,
    flags: u8,
    epoch: u64,
    open: Vec<Open>,
}

/// A call that the story has opened.
struct Open {
    pid: i32,
    cpu: u16,
    func: Gva,
    caller: Gva,
    time: u64,
}

impl Story {
    pub(crate) fn new() -> Self {
        Self {
            items: Vec::new(),
            time: 1_000_000_000,
            cpu: 0,
            boot: 1,
            pid: 1,
            comm: "init",
            flags: 0,
            epoch: 1,
            open: Vec::new(),
        }
    }

    /// What follows comes from this CPU and task.
    pub(crate) fn on(&mut self, cpu: u16, pid: i32, comm: &'static str) -> &mut Self {
        (self.cpu, self.pid, self.comm) = (cpu, pid, comm);
        self
    }

    /// What follows has these flags.
    pub(crate) fn flags(&mut self, flags: u8) -> &mut Self {
        self.flags = flags;
        self
    }

    /// What follows is made under this key epoch.
    pub(crate) fn epoch(&mut self, epoch: u64) -> &mut Self {
        self.epoch = epoch;
        self
    }

    /// So many nanoseconds pass.
    pub(crate) fn after(&mut self, nanos: u64) -> &mut Self {
        self.time += nanos;
        self
    }

    /// The guest reboots: its clock starts again, and nothing is open any more.
    pub(crate) fn reboot(&mut self) -> &mut Self {
        self.boot += 1;
        self.time = 500_000_000;
        self.open.clear();
        self
    }

    fn is_mine(&self, open: &Open) -> bool {
        open.pid == self.pid && (self.pid != 0 || open.cpu == self.cpu)
    }

    /// How many calls the task is in.
    pub(crate) fn depth(&self) -> u16 {
        self.open.iter().filter(|open| self.is_mine(open)).count() as u16
    }

    fn slid(&self, address: Gva) -> Gva {
        Gva(address.0.wrapping_add(u64::from(self.boot - 1) * SLIDE))
    }

    fn task(&self, depth: u16) -> Task {
        Task {
            pid: self.pid,
            comm: (depth == 0).then(|| Comm::from(self.comm)),
        }
    }

    pub(crate) fn put(&mut self, what: What) -> &mut Self {
        self.time += 100;
        self.items.push(Item {
            cpu: self.cpu,
            boot: self.boot,
            time: self.time,
            what,
        });
        self
    }

    /// Calls `func` from the function around, or, as a root, from the dispatcher.
    pub(crate) fn call(&mut self, func: &str) -> &mut Self {
        let around = self.open.iter().rev().find(|open| self.is_mine(open));
        let caller = around.map_or(self.slid(address("x64_sys_call")), |open| open.func);
        self.call_from(func, Gva(caller.0 + 0x1c2))
    }

    /// Calls `func` from somewhere.
    pub(crate) fn call_from(&mut self, func: &str, caller: Gva) -> &mut Self {
        let func = self.slid(address(func));
        self.call_at(func, caller)
    }

    /// Calls an address from somewhere.
    pub(crate) fn call_at(&mut self, func: Gva, caller: Gva) -> &mut Self {
        let open = self.record_call(func, caller, self.depth(), self.flags);
        self.open.push(open);
        self
    }

    fn record_call(&mut self, func: Gva, caller: Gva, depth: u16, flags: u8) -> Open {
        let call = Call {
            task: self.task(depth),
            flags: TraceFlags(flags),
            func,
            caller,
            depth,
            epoch: self.epoch,
            seq: self.items.len() as u64,
        };
        self.put(What::Call(call));
        let (pid, cpu, time) = (self.pid, self.cpu, self.time);
        Open {
            pid,
            cpu,
            func,
            caller,
            time,
        }
    }

    /// The task's innermost call returns.
    pub(crate) fn ret(&mut self) -> &mut Self {
        self.ret_as(|_| {})
    }

    /// The same, with its record changed.
    pub(crate) fn ret_as(&mut self, change: impl FnOnce(&mut Return)) -> &mut Self {
        let at = self.open.iter().rposition(|open| self.is_mine(open));
        let open = self.open.remove(at.expect("the task has an open call"));
        self.record_return(&open, self.depth(), self.flags, change)
    }

    fn record_return(
        &mut self,
        open: &Open,
        depth: u16,
        flags: u8,
        change: impl FnOnce(&mut Return),
    ) -> &mut Self {
        let mut ret = Return {
            task: Task {
                pid: self.pid,
                comm: None,
            },
            flags: TraceFlags(flags),
            func: open.func,
            caller: open.caller,
            depth,
            epoch: self.epoch,
            seq: self.items.len() as u64,
            overrun: 0,
            calltime: open.time - 10,
            rettime: self.time + 90,
        };
        change(&mut ret);
        self.put(What::Return(ret))
    }

    /// A call that returns at once.
    pub(crate) fn leaf(&mut self, func: &str) -> &mut Self {
        self.call(func).ret()
    }

    /// An interrupt comes while the kernel has begun to record the next thing
    /// but has not written it yet, the task's depth being `depth` there: its
    /// calls are written first.
    pub(crate) fn interrupt_at(&mut self, depth: u16) -> &mut Self {
        const OFF: u8 = TraceFlags::IRQS_OFF;
        const IRQ: u8 = TraceFlags::IRQS_OFF | TraceFlags::HARDIRQ;
        let entry = Gva(self.slid(address(IRQ_ENTRY)).0 + 0x39);
        self.leaf_at("irq_enter_rcu", entry, depth, OFF);
        let handler = self.slid(address("handle_irq"));
        let open = self.record_call(handler, entry, depth, IRQ);
        self.leaf_at("tick_handle", Gva(handler.0 + 8), depth + 1, IRQ);
        self.record_return(&open, depth, IRQ, |_| {})
    }

    fn leaf_at(&mut self, func: &str, caller: Gva, depth: u16, flags: u8) -> &mut Self {
        let open = self.record_call(self.slid(address(func)), caller, depth, flags);
        self.record_return(&open, depth, flags, |_| {})
    }

    /// The whole of a read, with a leaf in it.
    pub(crate) fn read(&mut self) -> &mut Self {
        self.call("__x64_sys_read")
            .call("ksys_read")
            .leaf("vfs_read")
            .ret()
            .ret()
    }

    pub(crate) fn lost(&mut self, records: Option<u64>, why: LostWhy) -> &mut Self {
        self.put(What::Lost(Lost { records, why }))
    }

    pub(crate) fn forged(&mut self, why: ForgedWhy, epoch: Option<u64>) -> &mut Self {
        let pid = self.pid;
        self.put(What::Forged(Forged {
            why,
            epoch,
            pid,
            raw_func: 0xdead_beef,
            depth: -3,
        }))
    }

    /// Leaves out what `lost` writes: its records never reached the host.
    pub(crate) fn unseen(&mut self, lost: impl FnOnce(&mut Self) -> &mut Self) -> &mut Self {
        let seen = self.items.len();
        lost(self);
        self.items.truncate(seen);
        self
    }
}
