//! What each kind of record does to the stacks.

use super::super::event::{
    Closed, Cut, CutWhy, Fit, Happening, Loss, Opened, Origin, Spent, UncalledWhy,
};
use super::super::irq::{Irq, Record};
use super::super::names::{Names, Place};
use super::super::tally::Epochs;
use super::super::tasks::{Frame, Stack};
use super::{At, Flow};
use crate::ring::record::{Call, Lost, Return, TraceFlags};

impl<'n, N: Names + ?Sized> Flow<'n, N> {
    pub(super) fn call(&mut self, at: At, call: &Call) {
        let stack = self.arrive(at, &call.task);
        self.tally.calls += 1;
        Epochs::note(&mut self.tally.epochs, call.epoch);
        let func = self.names.place(at.boot, call.func, at.time);
        let caller = self.names.place(at.boot, call.caller, at.time);
        self.unwind(stack, at, call.depth.saturating_add(1), None);
        let interrupts = call.flags.irqs_off() || call.flags.hardirq() || call.flags.nmi();
        if !(interrupts && self.tasks.at(stack).may_be_returning(call.depth)) {
            self.unwind(stack, at, call.depth, None);
        }
        let (of_entry, from_entry) = (func.name.irq_entry, caller.name.irq_entry);
        let record = Record::Call {
            of_entry,
            from_entry,
        };
        self.irq_before(stack, at, call.depth, call.flags, record);

        let task = self.tasks.at(stack);
        let next = task
            .below(call.depth)
            .map_or(0, |frame| frame.depth.saturating_add(1));
        let parent = task.around(call.depth).map(|frame| frame.func);
        let around = parent.map(|func| self.names.place(at.boot, func, at.time));
        // As with returns, the kernel counts a call's depth some time before it
        // writes the record of the call (function_graph_enter): the calls of an
        // interrupt that comes in between are one deeper than those told of.
        let missing = call.depth.saturating_sub(next);
        let missing = missing > u16::from(interrupts) && call.depth <= self.limits.depth;
        let gap = missing && task.blind.is_none();
        if call.depth == 0 {
            task.blind = None;
            self.tally.roots += 1;
            self.roots.add(at.boot, &func, call.task.pid);
        }
        let origin = Origin::judge(&caller, call.depth, around.as_ref());
        self.tally.gaps += u64::from(gap);
        let name = &func.name;
        let told = name.told.is_some_and(|told| told.symbol.is_some());
        self.tally.told_by_guest += u64::from(told);
        self.tally.unresolved += u64::from(name.symbol.is_none() && !told);
        self.tally.from_modules += u64::from(origin == Origin::Module);
        self.tally.from_outside += u64::from(origin == Origin::Outside);

        let opened = Opened {
            id: self.tally.calls,
            task: task.task(),
            func,
            caller,
            origin,
            depth: call.depth,
            parent,
            interrupt: task.irq.is_some(),
            gap,
            epoch: call.epoch,
        };
        let frame = Frame {
            id: opened.id,
            func: call.func,
            caller: call.caller,
            time: at.time,
            losses: self.losses,
            below: 0,
            depth: call.depth,
            cpu: at.cpu,
            interrupt: opened.interrupt,
        };
        let event = at.event(Happening::Open(opened));
        if call.depth >= self.limits.depth {
            let why = CutWhy::TooDeep;
            self.tally.cut.add(why, 1);
            let cut = cut(task, &frame, func, why);
            self.out.push(event);
            self.out.push(at.event(Happening::Cut(cut)));
            return;
        }
        task.frames.push(frame);
        task.newest = Some(frame.id);
        let number = self.out.push_waiting(event);
        if let Some(cpu) = self.cpus.get_mut(usize::from(at.cpu)) {
            cpu.waiting = Some((opened.id, number));
        }
    }

    /// A return. True if it made the call `waiting` a leaf.
    pub(super) fn ret(&mut self, at: At, ret: &Return, waiting: Option<(u64, u64)>) -> bool {
        let stack = self.arrive(at, &ret.task);
        self.tally.returns += 1;
        Epochs::note(&mut self.tally.epochs, ret.epoch);
        let func = self.names.place(at.boot, ret.func, at.time);
        self.unwind(stack, at, ret.depth.saturating_add(1), None);
        if self.tasks.at(stack).stands_on(ret.func) {
            self.cut_innermost(stack, at, ret.depth, None);
        }
        let ended = self
            .tasks
            .at(stack)
            .frames
            .last()
            .filter(|frame| frame.depth == ret.depth);
        let of_interrupt = ended.map(|frame| frame.interrupt);
        self.irq_before(
            stack,
            at,
            ret.depth,
            ret.flags,
            Record::Return { of_interrupt },
        );

        let total = ret.rettime.checked_sub(ret.calltime);
        self.tally.bad_durations += u64::from(total.is_none());
        let task = self.tasks.at(stack);
        self.tally.overruns += u64::from(note_overrun(task, ret.overrun));

        // Below a call on this CPU there may have been calls on another.
        let newest = task.newest.take();
        let losses = self.losses;
        // Behind a loss it can be a later call, of the same function even: the
        // kernel took `calltime` before it wrote the record of its call.
        let stale = task.frames.last().is_some_and(|frame| {
            frame.depth == ret.depth
                && frame.losses != losses
                && (frame.func != ret.func || ret.calltime > frame.time)
        });
        if stale {
            self.cut_innermost(stack, at, ret.depth, None);
        }
        let task = self.tasks.at(stack);
        let open = task.pop_if(|frame| frame.depth == ret.depth && !stale);
        let mut closed = Closed {
            id: None,
            task: task.task(),
            func,
            depth: ret.depth,
            spent: Spent { total, own: None },
            fit: Fit::Matched,
            over_loss: open.is_some_and(|frame| frame.losses != losses),
        };
        let mut leaf = false;
        match open {
            Some(frame) => {
                closed.id = Some(frame.id);
                closed.spent.own = total.map(|total| total.saturating_sub(frame.below));
                if frame.func != ret.func {
                    closed.fit =
                        Fit::OtherFunction(self.names.place(at.boot, frame.func, frame.time));
                    self.tally.other_function += 1;
                } else if frame.caller != ret.caller && ret.caller.0 != 0 {
                    closed.fit = Fit::OtherCaller(self.names.place(at.boot, ret.caller, at.time));
                    self.tally.other_caller += 1;
                }
                self.tally.closed += 1;
                leaf = closed.fit == Fit::Matched
                    && newest == Some(frame.id)
                    && waiting.is_some_and(|(id, number)| {
                        id == frame.id && self.out.settle_as_leaf(number, closed.spent)
                    });
                self.tally.leaves += u64::from(leaf);
            }
            None if stale => closed.fit = Fit::Uncalled(UncalledWhy::Lost),
            None if ret.depth >= self.limits.depth => {
                closed.fit = Fit::Uncalled(UncalledWhy::TooDeep);
            }
            None => {
                closed.fit = Fit::Uncalled(task.blind.unwrap_or(UncalledWhy::Unexplained));
            }
        }
        if let Fit::Uncalled(why) = closed.fit {
            self.tally.uncalled.add(why, 1);
        }
        if let Some(around) = task.around(ret.depth) {
            around.below = around.below.saturating_add(total.unwrap_or(0));
        }
        if ret.depth == 0 {
            task.blind = None;
        }
        if !leaf {
            self.out.push(at.event(Happening::Close(closed)));
        }
        self.irq_after(stack, at, ret.depth);
        leaf
    }

    pub(super) fn lost(&mut self, at: At, lost: Lost) {
        self.tally.lost(lost);
        self.losses += 1;
        let current = self
            .cpus
            .get(usize::from(at.cpu))
            .and_then(|cpu| cpu.current);
        let stack = current.and_then(|(key, hint)| self.tasks.find(key, Some(hint)));
        let mut loss = Loss {
            lost,
            task: current.map(|(key, _)| key.task()),
            open: Vec::new(),
        };
        if let Some(stack) = stack {
            let task = self.tasks.at(stack);
            loss.task = Some(task.task());
            let names = &mut self.names;
            loss.open = task
                .frames
                .iter()
                .map(|frame| names.place(at.boot, frame.func, frame.time))
                .collect();
        }
        self.out.push(at.event(Happening::Lost(Box::new(loss))));
    }

    /// Tells of interrupts that begin or end with a record at `depth`.
    fn irq_before(&mut self, stack: usize, at: At, depth: u16, flags: TraceFlags, record: Record) {
        let task = self.tasks.at(stack);
        let change = Irq::before(&mut task.irq, depth, flags, record);
        let task = task.task();
        if change.left {
            self.out.push(at.event(Happening::IrqLeave(task)));
        }
        if change.entered {
            self.tally.interrupts += 1;
            self.out.push(at.event(Happening::IrqEnter(task)));
        }
    }

    /// Tells of an interrupt that ends with the return from `depth`.
    fn irq_after(&mut self, stack: usize, at: At, depth: u16) {
        let task = self.tasks.at(stack);
        if Irq::after(&mut task.irq, depth) {
            let task = task.task();
            self.out.push(at.event(Happening::IrqLeave(task)));
        }
    }
}

pub(super) fn cut<'n>(stack: &Stack, frame: &Frame, func: Place<'n>, why: CutWhy) -> Cut<'n> {
    let Frame {
        id,
        depth,
        time: since,
        ..
    } = *frame;
    Cut {
        id,
        task: stack.task(),
        func,
        depth,
        since,
        why,
    }
}

/// By how much a task's count of untraceable calls has grown since its return
/// before. The first one only says where it stands: it counts from the task's
/// start, not from the trace's.
fn note_overrun(stack: &mut Stack, overrun: u32) -> u32 {
    let before = stack.overrun.replace(overrun).unwrap_or(overrun);
    overrun.saturating_sub(before)
}
