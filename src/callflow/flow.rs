//! [`Flow`]: items in, events out.

mod records;

use super::event::{CutWhy, Event, Happening, UncalledWhy};
use super::names::{Names, Resolver};
use super::pending::Pending;
use super::tally::{Roots, Tally};
use super::tasks::{Key, Tasks};
use super::Limits;
use crate::ring::record::{Item, Task, What};
use records::cut;

/// Rebuilds the call flow from merged items, one at a time.
///
/// [`push`](Self::push) takes an item, then [`pop`](Self::pop) is called until
/// it gives nothing more. After the last item [`finish`](Self::finish) gives up
/// the calls that are still open; [`pop`](Self::pop) tells of them too.
/// [`events`](super::events) does all this for items that are all there already.
pub struct Flow<'n, N: ?Sized> {
    names: Resolver<'n, N>,
    tasks: Tasks,
    cpus: Vec<Cpu>,
    out: Pending<'n>,
    tally: Tally,
    roots: Roots<'n>,
    limits: Limits,
    boot: Option<u32>,
    /// How many losses there were.
    losses: u64,
    /// How many there were when the boot began.
    losses_at_boot: u64,
    ending: Option<Ending>,
    /// An item that has to wait until `ending` is done.
    held: Option<Item>,
}

/// What is known of a CPU.
#[derive(Clone, Copy, Debug, Default)]
struct Cpu {
    time: u64,
    /// The task that its records come from, and where its stack was.
    current: Option<(Key, usize)>,
    /// Its last call, if that may be a leaf yet: id, and number in `Flow::out`.
    waiting: Option<(u64, u64)>,
}

/// All open calls being given up, a task at a time.
struct Ending {
    why: CutWhy,
    stacks: std::vec::IntoIter<usize>,
}

/// Where and when an item was recorded.
#[derive(Clone, Copy)]
struct At {
    cpu: u16,
    boot: u32,
    time: u64,
}

impl At {
    fn event<'n>(self, what: Happening<'n>) -> Event<'n> {
        Event {
            cpu: self.cpu,
            boot: self.boot,
            time: self.time,
            what,
        }
    }
}

impl<'n, N: Names + ?Sized> Flow<'n, N> {
    /// A flow that resolves addresses by `names`.
    pub fn new(names: &'n N, limits: Limits) -> Self {
        Self {
            names: Resolver::new(names),
            tasks: Tasks::new(limits.tasks),
            cpus: Vec::new(),
            out: Pending::new(limits.pending),
            tally: Tally::default(),
            roots: Roots::new(limits.roots),
            limits,
            boot: None,
            losses: 0,
            losses_at_boot: 0,
            ending: None,
            held: None,
        }
    }

    /// Takes the next item.
    pub fn push(&mut self, item: &Item) {
        while self.step() {}
        let begun = self.boot.replace(item.boot);
        if begun == Some(item.boot) {
            self.item(item);
            return;
        }
        self.tally.boots += 1;
        if begun.is_none() {
            self.item(item);
            return;
        }
        self.begin_ending(CutWhy::Reboot);
        self.held = Some(*item);
    }

    /// The next event, if there is one that can be told yet.
    pub fn pop(&mut self) -> Option<Event<'n>> {
        loop {
            if let Some(event) = self.out.pop() {
                return Some(event);
            }
            if !self.step() {
                return None;
            }
        }
    }

    /// Lets the calls that wait for their CPU's next record go as they are:
    /// none of them will be told of as a leaf. For those who watch live, when
    /// no item has come for a while.
    pub fn settle(&mut self) {
        self.out.settle_all();
    }

    /// There are no more items: gives up all open calls.
    pub fn finish(&mut self) {
        while self.step() {}
        self.begin_ending(CutWhy::TraceEnd);
    }

    /// What it adds up to so far.
    pub fn tally(&mut self) -> Tally {
        let mut tally = self.tally.clone();
        let names = &mut self.names;
        self.roots.list(&mut tally, |boot, func, told| {
            let mut place = names.lasting(boot, func);
            place.name.told = told;
            place.function()
        });
        tally
    }

    fn begin_ending(&mut self, why: CutWhy) {
        self.out.settle_all();
        self.ending = Some(Ending {
            why,
            stacks: self.tasks.open().into_iter(),
        });
    }

    /// Does a part of what an ending leaves to do, so that its events need not
    /// all be kept at once; false if nothing is left.
    fn step(&mut self) -> bool {
        let Some(ending) = &mut self.ending else {
            return false;
        };
        let why = ending.why;
        if let Some(at) = ending.stacks.next() {
            // That of the last item: of the boot that ends, where another begins.
            let (boot, time) = self.tally.times.map_or((0, 0), |(_, last)| last);
            self.give_up(at, At { cpu: 0, boot, time }, why);
            return true;
        }
        self.ending = None;
        self.tasks.clear();
        self.cpus.clear();
        if let Some(item) = self.held.take() {
            self.losses_at_boot = self.losses;
            let at = At {
                cpu: item.cpu,
                boot: item.boot,
                time: item.time,
            };
            self.out.push(at.event(Happening::Boot));
            self.item(&item);
        }
        true
    }

    fn item(&mut self, item: &Item) {
        let at = At {
            cpu: item.cpu,
            boot: item.boot,
            time: item.time,
        };
        self.tally.items += 1;
        let stamp = (item.boot, item.time);
        self.tally.times = Some(
            self.tally
                .times
                .map_or((stamp, stamp), |(first, _)| (first, stamp)),
        );

        let number = usize::from(item.cpu);
        if self.cpus.len() <= number {
            self.cpus.resize(number + 1, Cpu::default());
        }
        let Some(cpu) = self.cpus.get_mut(number) else {
            return;
        };
        let waiting = cpu.waiting.take();
        if item.time < cpu.time {
            self.tally.time_backwards += 1;
        }
        if cpu.time == 0 {
            self.tally.cpus.insert(item.cpu);
        }
        cpu.time = item.time;

        let mut leaf = false;
        match &item.what {
            What::Call(call) => self.call(at, call),
            What::Return(ret) => leaf = self.ret(at, ret, waiting),
            What::Forged(forged) => {
                self.tally.forged.add(forged.why, 1);
                self.out.push(at.event(Happening::Forged(*forged)));
            }
            What::Lost(lost) => self.lost(at, *lost),
            What::Other { .. } => self.tally.other += 1,
        }
        if let (Some((_, number)), false) = (waiting, leaf) {
            self.out.settle(number);
        }
    }

    /// The stack of the task that a record comes from, which becomes the
    /// current one of the CPU. Learns the task's name, if the record tells it.
    fn arrive(&mut self, at: At, task: &Task) -> usize {
        let key = Key::new(task.pid, at.cpu);
        let before = self
            .cpus
            .get(usize::from(at.cpu))
            .and_then(|cpu| cpu.current);
        let found = self.tasks.find(key, before.map(|(_, hint)| hint));
        let stack = found.unwrap_or_else(|| self.admit(at, key));
        if task.comm.is_some() {
            self.tasks.at(stack).comm = task.comm;
        }
        match before {
            Some((last, hint)) if last != key => {
                let from = match self.tasks.find(last, Some(hint)) {
                    Some(at) => self.tasks.at(at).task(),
                    None => last.task(),
                };
                let to = self.tasks.at(stack).task();
                self.tally.switches += 1;
                self.out.push(at.event(Happening::Switch { from, to }));
            }
            _ => {}
        }
        if let Some(cpu) = self.cpus.get_mut(usize::from(at.cpu)) {
            cpu.current = Some((key, stack));
        }
        let losses = self.losses;
        let task = self.tasks.at(stack);
        if task.losses != losses {
            task.losses = losses;
            task.blind = Some(UncalledWhy::Lost);
        }
        stack
    }

    /// Makes a stack for a task that has none.
    fn admit(&mut self, at: At, key: Key) -> usize {
        let victim = self.tasks.victim();
        if let Some(victim) = victim {
            self.give_up(victim, at, CutWhy::Evicted);
            self.tally.evictions += 1;
        }
        self.tally.tasks += 1;
        let blind = if self.tally.evictions > 0 {
            UncalledWhy::Evicted
        } else if self.losses > self.losses_at_boot {
            UncalledWhy::Lost
        } else {
            UncalledWhy::TraceStart
        };
        self.tasks.add(key, victim, self.losses, blind)
    }

    /// Gives up all open calls of a task, on the CPU that it was last seen to
    /// call on: the record that makes it give way came from another.
    fn give_up(&mut self, stack: usize, at: At, why: CutWhy) {
        let cpu = self
            .tasks
            .at(stack)
            .frames
            .last()
            .map_or(at.cpu, |frame| frame.cpu);
        self.unwind(stack, At { cpu, ..at }, 0, Some(why));
    }

    /// Gives up the open calls of a task at `depth` and deeper: because of
    /// `why`, or, if that is not known, because their returns did not come.
    fn unwind(&mut self, stack: usize, at: At, depth: u16, why: Option<CutWhy>) {
        while self.cut_innermost(stack, at, depth, why) {}
    }

    /// The same with the innermost call only. False if there is none so deep.
    fn cut_innermost(&mut self, stack: usize, at: At, depth: u16, why: Option<CutWhy>) -> bool {
        let stack = self.tasks.at(stack);
        let Some(frame) = stack.pop_if(|frame| frame.depth >= depth) else {
            return false;
        };
        let lost = frame.losses != self.losses;
        let unseen = if lost {
            CutWhy::Lost
        } else {
            CutWhy::Unreturned
        };
        let why = why.unwrap_or(unseen);
        let func = self.names.place(at.boot, frame.func, frame.time);
        self.tally.cut.add(why, 1);
        let cut = cut(stack, &frame, func, why);
        self.out.push(at.event(Happening::Cut(cut)));
        true
    }
}

#[cfg(test)]
mod tests;
