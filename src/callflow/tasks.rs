//! The stacks of open calls, one a task, in bounded memory.

use std::collections::HashMap;

use super::event::UncalledWhy;
use super::irq::Irq;
use crate::kernel::Gva;
use crate::ring::record::{Comm, Task};

/// Which stack a record belongs to. Calls belong to tasks, which move between
/// CPUs; only the idle tasks share pid 0, and stay on their CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Key {
    pid: i32,
    idle_cpu: u16,
}

impl Key {
    pub(super) fn new(pid: i32, cpu: u16) -> Self {
        Self {
            pid,
            idle_cpu: if pid == 0 { cpu } else { 0 },
        }
    }

    /// The task, of which no more is known.
    pub(super) fn task(self) -> Task {
        Task {
            pid: self.pid,
            comm: None,
        }
    }
}

/// An open call.
#[derive(Clone, Copy, Debug)]
pub(super) struct Frame {
    pub(super) id: u64,
    pub(super) func: Gva,
    pub(super) caller: Gva,
    /// Time of the call's record.
    pub(super) time: u64,
    /// How much loss there had been when it was opened (`Flow::losses`).
    pub(super) losses: u64,
    /// Time spent in the traced calls below it that have returned so far.
    pub(super) below: u64,
    pub(super) depth: u16,
    pub(super) cpu: u16,
    /// It was made by an interrupt.
    pub(super) interrupt: bool,
}

/// A task and its open calls, which nest: depths rise from first to last. Only
/// the call of an interrupt may stand on one of its own depth, see
/// [`may_be_returning`](Self::may_be_returning).
#[derive(Debug)]
pub(super) struct Stack {
    pub(super) key: Key,
    pub(super) comm: Option<Comm>,
    pub(super) frames: Vec<Frame>,
    pub(super) irq: Option<Irq>,
    /// The call of its last record, if that was one: what may be a leaf yet.
    pub(super) newest: Option<u64>,
    /// How much loss there had been at its last record.
    pub(super) losses: u64,
    /// Why calls that are open in the guest may be missing from `frames`.
    pub(super) blind: Option<UncalledWhy>,
    /// The highest `overrun` its returns have told of.
    pub(super) overrun: Option<u32>,
    /// When it was used last, in items.
    used: u64,
}

impl Stack {
    pub(super) fn task(&self) -> Task {
        Task {
            comm: self.comm,
            ..self.key.task()
        }
    }

    /// The innermost call that is not as deep as `depth`.
    pub(super) fn below(&mut self, depth: u16) -> Option<&mut Frame> {
        self.frames
            .iter_mut()
            .rev()
            .find(|frame| frame.depth < depth)
    }

    /// The call that a call at `depth` is nested in.
    pub(super) fn around(&mut self, depth: u16) -> Option<&mut Frame> {
        self.below(depth)
            .filter(|frame| frame.depth.checked_add(1) == Some(depth))
    }

    /// Whether the innermost call, of this depth, may be on its way back.
    ///
    /// The kernel takes a call off its own stack some time before it writes the
    /// record of the return (ftrace_return_to_handler, kernel/trace/fgraph.c),
    /// and lets interrupts come in between: their calls then have the depth of
    /// the call that is still open here. One such call a depth is enough.
    pub(super) fn may_be_returning(&self, depth: u16) -> bool {
        let mut innermost = self.frames.iter().rev().map(|frame| frame.depth);
        innermost.next() == Some(depth) && innermost.next() != Some(depth)
    }

    /// Whether `func` is what the innermost call stands on, at the same depth:
    /// the call that an interrupt delayed, while the interrupt's own return is
    /// missing.
    pub(super) fn stands_on(&self, func: Gva) -> bool {
        match self.frames.as_slice() {
            [.., under, top] => under.depth == top.depth && top.func != func && under.func == func,
            _ => false,
        }
    }

    /// Takes the innermost call off the stack, if `condition` holds for it.
    pub(super) fn pop_if(&mut self, condition: impl FnOnce(&Frame) -> bool) -> Option<Frame> {
        if condition(self.frames.last()?) {
            return self.frames.pop();
        }
        None
    }
}

/// All stacks: at most so many, the least used ones giving way to new ones.
#[derive(Debug)]
pub(super) struct Tasks {
    index: HashMap<Key, usize>,
    stacks: Vec<Stack>,
    limit: usize,
    hand: usize,
    clock: u64,
}

impl Tasks {
    /// How many stacks are looked at to choose the one that gives way.
    const CANDIDATES: usize = 8;

    pub(super) fn new(limit: usize) -> Self {
        Self {
            index: HashMap::new(),
            stacks: Vec::new(),
            limit: limit.max(1),
            hand: 0,
            clock: 0,
        }
    }

    /// Where the stack of `key` is; `hint` is looked at first.
    pub(super) fn find(&mut self, key: Key, hint: Option<usize>) -> Option<usize> {
        let hit = hint.filter(|&at| self.stacks.get(at).is_some_and(|stack| stack.key == key));
        let at = hit.or_else(|| self.index.get(&key).copied())?;
        self.clock += 1;
        self.stacks.get_mut(at)?.used = self.clock;
        Some(at)
    }

    /// The stack that must give way before another can be added, if any: one
    /// with nothing open where there is one near, else the least used near.
    pub(super) fn victim(&mut self) -> Option<usize> {
        if self.stacks.len() < self.limit {
            return None;
        }
        let start = self.hand;
        self.hand = (start + Self::CANDIDATES) % self.stacks.len();
        (start..start + Self::CANDIDATES)
            .map(|at| at % self.stacks.len())
            .min_by_key(|&at| (!self.stacks[at].frames.is_empty(), self.stacks[at].used))
    }

    /// Adds a stack for `key`, in the place of `victim` if there is one, whose
    /// frames the caller has dealt with.
    pub(super) fn add(
        &mut self,
        key: Key,
        victim: Option<usize>,
        losses: u64,
        blind: UncalledWhy,
    ) -> usize {
        self.clock += 1;
        let mut stack = Stack {
            key,
            comm: None,
            frames: Vec::new(),
            irq: None,
            newest: None,
            losses,
            blind: Some(blind),
            overrun: None,
            used: self.clock,
        };
        let at = match victim {
            Some(at) => {
                let old = &mut self.stacks[at];
                self.index.remove(&old.key);
                std::mem::swap(&mut old.frames, &mut stack.frames);
                stack.frames.clear();
                *old = stack;
                at
            }
            None => {
                self.stacks.push(stack);
                self.stacks.len() - 1
            }
        };
        self.index.insert(key, at);
        at
    }

    /// The stack at a place that [`Tasks::find`] or [`Tasks::add`] gave, or
    /// one of [`Tasks::open`]'s.
    pub(super) fn at(&mut self, at: usize) -> &mut Stack {
        &mut self.stacks[at]
    }

    /// The places of all stacks with open calls, ordered by pid.
    pub(super) fn open(&self) -> Vec<usize> {
        let mut open: Vec<usize> = (0..self.stacks.len())
            .filter(|&at| !self.stacks[at].frames.is_empty())
            .collect();
        open.sort_unstable_by_key(|&at| self.stacks[at].key);
        open
    }

    /// How many stacks and how many open calls there is room taken for.
    #[cfg(test)]
    pub(super) fn size(&self) -> (usize, usize) {
        let frames = self
            .stacks
            .iter()
            .map(|stack| stack.frames.capacity())
            .sum();
        (self.stacks.len().max(self.index.len()), frames)
    }

    /// Forgets all stacks.
    pub(super) fn clear(&mut self) {
        self.index.clear();
        self.stacks.clear();
        self.hand = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn add(tasks: &mut Tasks, pid: i32, open: bool) -> usize {
        let victim = tasks.victim();
        let at = tasks.add(Key::new(pid, 0), victim, 0, UncalledWhy::TraceStart);
        if open {
            tasks.at(at).frames.push(Frame {
                id: 1,
                func: Gva(1),
                caller: Gva(2),
                time: 0,
                losses: 0,
                below: 0,
                depth: 0,
                cpu: 0,
                interrupt: false,
            });
        }
        at
    }

    #[test]
    fn idle_tasks_are_one_a_cpu_and_others_are_not() {
        assert_ne!(Key::new(0, 0), Key::new(0, 1));
        assert_eq!(Key::new(7, 0), Key::new(7, 1));
    }

    #[test]
    fn a_stack_with_nothing_open_gives_way_first_then_the_least_used() {
        let mut tasks = Tasks::new(3);
        for (pid, open) in [(1, true), (2, false), (3, true)] {
            add(&mut tasks, pid, open);
        }
        add(&mut tasks, 4, true);
        assert_eq!(tasks.find(Key::new(2, 0), None), None);
        assert!(tasks.find(Key::new(1, 0), None).is_some());
        add(&mut tasks, 5, true);
        assert_eq!(tasks.find(Key::new(3, 0), None), None);
    }

    #[test]
    fn a_hint_to_another_task_is_not_taken() {
        let mut tasks = Tasks::new(3);
        let one = add(&mut tasks, 1, false);
        let two = add(&mut tasks, 2, false);
        assert_eq!(tasks.find(Key::new(2, 0), Some(one)), Some(two));
        assert_eq!(tasks.find(Key::new(3, 0), Some(one)), None);
        assert_eq!(tasks.find(Key::new(1, 0), Some(99)), Some(one));
    }

    #[test]
    fn no_more_stacks_are_kept_than_allowed() {
        let mut tasks = Tasks::new(10);
        for pid in 0..10_000 {
            add(&mut tasks, pid + 1, pid % 3 == 0);
        }
        assert_eq!(tasks.size().0, 10);
    }
}
