//! From the events of a call flow to a [`Profile`].

use std::collections::HashMap;

use super::profile::{note, Example, Function, Profile, ProfileLimits, Seen, Step};
use super::silences::Silences;
use super::site::{is_system_call, loads_modules, Label, Site};
use crate::callflow::{Closed, Event, Fit, Happening, Kind, Opened, Place, Spent};
use crate::ring::record::{Comm, Task};
use crate::session::{ListTells, ModuleHistory};

/// Takes the events of a call flow, one at a time.
///
/// What it keeps grows with the different things that are seen, up to
/// [`ProfileLimits`], and with the calls that are open, of which a
/// [`Flow`](crate::callflow::Flow) has no more than its own limits allow.
#[derive(Debug)]
pub struct Profiler<'n> {
    profile: Profile<'n>,
    stacks: HashMap<(i32, u16), Vec<Frame<'n>>>,
    sequences: HashMap<i32, Sequence>,
    modules: ModuleHistory,
    silences: Silences,
    /// Losses of records so far.
    losses: u64,
    boot: u32,
}

/// An open call.
#[derive(Debug)]
struct Frame<'n> {
    id: u64,
    label: Label,
    step: Step<'n>,
    /// How many losses there had been when it was opened.
    losses: u64,
    /// Calls below it were not seen.
    holed: bool,
    /// It calls more different functions than are told apart.
    crowded: bool,
    /// How many calls it is nested in; a root in none.
    depth: u16,
    /// It is, or lies below, what sets a module up or ends it.
    loading: bool,
    /// It may do so, as not all was seen of what it lies below.
    may_load: bool,
    below: u64,
    nested: bool,
    callees: Vec<Label>,
    orders: Vec<(Label, Label)>,
    last: Label,
}

/// The system calls that a task made last.
#[derive(Debug)]
struct Sequence {
    comm: Comm,
    last: [Option<Label>; 2],
}

impl<'n> Profiler<'n> {
    /// One that keeps at most so much.
    pub fn new(limits: ProfileLimits) -> Self {
        Self {
            profile: Profile::new(limits),
            stacks: HashMap::new(),
            sequences: HashMap::new(),
            modules: ModuleHistory::default(),
            silences: Silences::default(),
            losses: 0,
            boot: 0,
        }
    }

    /// The guest's own lists of modules, for more to be added as they are read.
    pub fn modules(&mut self) -> &mut ModuleHistory {
        &mut self.modules
    }

    /// Takes the next event.
    pub fn event(&mut self, event: &Event<'n>) {
        if let Happening::Boot = event.what {
            self.end_boot(&[]);
            return;
        }
        self.boot = event.boot;
        match &event.what {
            Happening::Open(call) => self.open(event, call),
            Happening::Leaf(call, spent) => {
                self.open(event, call);
                if !call.interrupt {
                    self.close(event, call.id, &call.task, *spent, true);
                }
            }
            Happening::Close(closed) => self.closed(event, closed),
            Happening::Cut(cut) => {
                if self.pop(&cut.task, event.cpu, cut.id).is_some() {
                    self.profile.skipped.cut += 1;
                    let stack = self.stacks.get_mut(&Self::key(&cut.task, event.cpu));
                    if let Some(around) = stack.and_then(|stack| stack.last_mut()) {
                        around.holed = true;
                    }
                }
                // It stands where the trace ended, not where a record was.
                return;
            }
            Happening::Lost(_) => {
                self.losses += 1;
                self.sequences.clear();
            }
            Happening::Forged(_) => self.sequences.clear(),
            Happening::Switch { .. } | Happening::IrqEnter(_) | Happening::IrqLeave(_) => {}
            Happening::Boot => {}
        }
        self.silences.beat(event.boot, event.cpu, event.time);
    }

    /// That CPU was not silent until then (guest trace clock, nanoseconds): its records
    /// were left out, or the guest had switched it off.
    pub fn excuse(&mut self, cpu: u16, until: u64) {
        self.silences.excuse(cpu, until);
    }

    /// There are no more events. `cpus` are the CPUs that the guest has: one
    /// that gave no record at all was silent all the time.
    pub fn finish(mut self, cpus: &[u16]) -> Profile<'n> {
        self.end_boot(cpus);
        self.profile
    }

    /// What was seen so far, and a fresh profile to go on with. A CPU that is silent
    /// goes on being so.
    pub fn window(&mut self) -> Profile<'n> {
        let limits = self.profile.limits;
        self.profile.note_silences(self.silences.so_far(self.boot));
        let fresh = Profile::new(limits);
        // Open calls carry labels of the old profile.
        self.stacks.clear();
        self.sequences.clear();
        std::mem::replace(&mut self.profile, fresh)
    }

    fn end_boot(&mut self, cpus: &[u16]) {
        let silences = self.silences.end(self.boot, cpus);
        self.profile.note_silences(silences);
        self.stacks.clear();
        self.sequences.clear();
    }

    fn key(task: &Task, cpu: u16) -> (i32, u16) {
        (task.pid, if task.pid == 0 { cpu } else { 0 })
    }

    fn pop(&mut self, task: &Task, cpu: u16, id: u64) -> Option<Frame<'n>> {
        let key = Self::key(task, cpu);
        let stack = self.stacks.get_mut(&key)?;
        let frame = if stack.last()?.id == id {
            stack.pop()
        } else {
            None
        };
        if stack.is_empty() {
            self.stacks.remove(&key);
        }
        frame
    }

    fn open(&mut self, event: &Event<'n>, call: &Opened<'n>) {
        if call.interrupt {
            self.profile.skipped.interrupts += 1;
            return;
        }
        self.profile.calls += 1;
        let of_name = self.profile.labels.of(&call.func);
        let of_func = self.in_module(event, &call.func);
        let unlisted = is_unlisted(of_func);
        let caller = told(call);
        let of_caller = caller.and_then(|caller| self.in_module(event, &caller));
        let site = caller.map(|caller| match is_unlisted(of_caller) {
            true => Site::Unlisted,
            false => Site::of(&caller),
        });
        let stack = self
            .stacks
            .entry(Self::key(&call.task, event.cpu))
            .or_default();
        // Behind a loss, or the start of the trace, what is around is not all seen.
        let (is_loading, may_load) = match stack.last() {
            Some(around) => (
                around.loading,
                around.may_load || around.losses != self.losses,
            ),
            None => (false, call.depth > 0),
        };
        let loading = is_loading || may_load;
        let asked = [of_func, of_caller].into_iter().flatten();
        match (is_loading, may_load) {
            (false, false) => asked.for_each(|told| self.profile.in_modules.add(told)),
            (false, true) => self.profile.in_modules.excused += asked.count() as u64,
            (true, _) => {}
        }
        let label = match of_name {
            Label::MODULE if loading => Label::LOADING,
            _ if unlisted && loading => Label::LOADING,
            _ if unlisted => Label::UNLISTED,
            of_name => of_name,
        };
        let mut frame = Frame {
            id: call.id,
            label,
            step: Step {
                func: call.func,
                caller,
            },
            losses: self.losses,
            holed: false,
            crowded: false,
            depth: call.depth,
            loading: is_loading || loads_modules(self.profile.labels.name(label)),
            may_load,
            below: 0,
            nested: false,
            callees: Vec::new(),
            orders: Vec::new(),
            last: Label::EDGE,
        };
        let around = stack.last().map(|around| around.step.func.address);
        if call.gap || around != call.parent {
            self.profile.skipped.gaps += 1;
            stack.iter_mut().for_each(|frame| frame.holed = true);
            frame.holed = true;
            stack.push(frame);
            return;
        }
        let losses = self.losses;
        frame.nested = !label.is_nameless_module()
            && stack
                .iter()
                .any(|around| around.label == label && around.losses == losses);
        if let Some(around) = stack.last_mut() {
            around.called(label, self.profile.limits.below);
        }
        stack.push(frame);
        let stack = &*stack;

        let example = || example(event, &call.task, stack);
        let profile = &mut self.profile;
        let (edges, limit) = (&mut profile.edges, profile.limits.edges);
        let mut room = true;
        if call.depth == 0 {
            let root = profile.roots.entry(label).or_default();
            if let Some(site) = site {
                room = note(&mut root.callers, edges, limit, site, example);
            }
        }
        match site {
            // A module that sets itself up calls what it likes, for the first time ever
            // too, and may be gone before anyone sees it on the list. What it leaves
            // behind is judged.
            Some(Site::Module(_) | Site::Unlisted) if loading => {}
            Some(site @ (Site::Module(_) | Site::Unlisted)) => {
                let function = profile.functions.entry(label).or_default();
                room &= note(&mut function.from_modules, edges, limit, site, example);
            }
            Some(Site::Outside) => {
                let function = profile.functions.entry(label).or_default();
                once_more(&mut function.from_outside, example);
            }
            _ => {}
        }
        profile.skipped.no_room += u64::from(!room);
        if call.depth == 0 {
            self.system_call(event, call, label);
        }
    }

    /// What the guest's list of modules tells of code; `None` where it does not lie in
    /// the module area.
    fn in_module(&self, event: &Event<'n>, place: &Place<'n>) -> Option<ListTells> {
        let tells = || self.modules.tells(event.boot, place.address, event.time);
        (place.name.kind == Kind::Module).then(tells)
    }

    /// Follows the system calls of each task.
    fn system_call(&mut self, event: &Event<'n>, call: &Opened<'n>, label: Label) {
        let Some(comm) = call.task.comm else { return };
        if !is_system_call(self.profile.labels.name(label)) {
            return;
        }
        if self.sequences.len() >= self.profile.limits.tasks {
            self.sequences.clear();
        }
        let fresh = Sequence {
            comm,
            last: [None, None],
        };
        let known = self.sequences.entry(call.task.pid).or_insert(fresh);
        if known.comm != comm {
            *known = Sequence {
                comm,
                last: [None, None],
            };
        }
        let [first, second] = known.last;
        known.last = [second, Some(label)];
        let (Some(first), Some(second)) = (first, second) else {
            return;
        };
        let profile = &mut self.profile;
        let limit = profile.limits.sequences;
        if profile.processes.len() >= limit && !profile.processes.contains_key(&comm) {
            profile.skipped.no_room += 1;
            return;
        }
        let process = profile.processes.entry(comm).or_default();
        process.total += 1;
        let step = Step {
            func: call.func,
            caller: told(call),
        };
        let example = || Example {
            boot: event.boot,
            time: event.time,
            cpu: event.cpu,
            task: call.task,
            path: vec![step],
        };
        let what = [first, second, label];
        let room = note(
            &mut process.sequences,
            &mut profile.sequences,
            limit,
            what,
            example,
        );
        profile.skipped.no_room += u64::from(!room);
    }

    fn closed(&mut self, event: &Event<'n>, closed: &Closed<'n>) {
        let Some(id) = closed.id else { return };
        let fits = closed.fit == Fit::Matched && !closed.over_loss;
        self.close(event, id, &closed.task, closed.spent, fits);
    }

    fn close(&mut self, event: &Event<'n>, id: u64, task: &Task, spent: Spent, fits: bool) {
        let Some(mut frame) = self.pop(task, event.cpu, id) else {
            return;
        };
        let key = Self::key(task, event.cpu);
        let stack = self.stacks.get_mut(&key);
        let whole = fits && !frame.holed;
        let mut none = Vec::new();
        let around: &mut Vec<Frame<'n>> = stack.unwrap_or(&mut none);
        if let Some(around) = around.last_mut() {
            around.below = around.below.saturating_add(frame.below + 1);
            around.holed |= !whole;
        }
        if !whole || frame.crowded {
            self.profile.skipped.incomplete += 1;
            return;
        }
        frame.ended(self.profile.limits.below);
        self.profile.complete(event, task, around, &frame, spent);
    }
}

impl Frame<'_> {
    /// It calls `callee`.
    fn called(&mut self, callee: Label, limit: usize) {
        self.follows(callee, limit);
        if !self.callees.contains(&callee) {
            if self.callees.len() < limit {
                self.callees.push(callee);
            } else {
                self.crowded = true;
            }
        }
    }

    fn ended(&mut self, limit: usize) {
        self.follows(Label::EDGE, limit);
    }

    fn follows(&mut self, next: Label, limit: usize) {
        let order = (self.last, next);
        self.last = next;
        if !self.orders.contains(&order) && self.orders.len() < limit {
            self.orders.push(order);
        }
    }
}

impl<'n> Profile<'n> {
    /// A call was seen from its beginning to its end. `around` are the calls
    /// that it is nested in.
    fn complete(
        &mut self,
        event: &Event<'n>,
        task: &Task,
        around: &[Frame<'n>],
        frame: &Frame<'n>,
        spent: Spent,
    ) {
        let itself = || {
            let mut example = example(event, task, around);
            example.path.push(frame.step);
            example
        };
        if frame.depth == 0 {
            let root = self.roots.entry(frame.label).or_default();
            root.calls.add(frame.below);
            if let Some(spent) = spent.total {
                root.spent.add(spent);
            }
            root.first.get_or_insert_with(itself);
        }
        if frame.callees.is_empty() {
            if let Some(spent) = spent.total {
                self.leaves.add(spent);
            }
        }
        let (edges, limit) = (&mut self.edges, self.limits.edges);
        if !self.functions.contains_key(&frame.label) && *edges >= limit {
            self.skipped.no_room += 1;
            return;
        }
        let function: &mut Function<'n> = self.functions.entry(frame.label).or_default();
        function.calls += 1;
        function.first.get_or_insert_with(itself);
        if frame.nested {
            once_more(&mut function.nested, itself);
        }
        let mut room = true;
        for &callee in &frame.callees {
            room &= note(&mut function.callees, edges, limit, callee, itself);
        }
        for &order in &frame.orders {
            room &= note(&mut function.orders, edges, limit, order, itself);
        }
        self.skipped.no_room += u64::from(!room);
    }
}

/// Whether code lies in the module area, in no module that the guest listed at the
/// time.
fn is_unlisted(told: Option<ListTells>) -> bool {
    told.is_some_and(|told| told.listed == Some(false))
}

/// Where a call was made from, if its record tells. One with a key always does:
/// there, 0 is no less strange than any other address outside.
fn told<'n>(call: &Opened<'n>) -> Option<Place<'n>> {
    (call.epoch != 0 || call.caller.address.0 != 0).then_some(call.caller)
}

fn once_more<'n>(seen: &mut Option<Seen<'n>>, example: impl FnOnce() -> Example<'n>) {
    match seen {
        Some(seen) => seen.count += 1,
        None => {
            *seen = Some(Seen {
                count: 1,
                first: example(),
            })
        }
    }
}

fn example<'n>(event: &Event<'n>, task: &Task, stack: &[Frame<'n>]) -> Example<'n> {
    Example {
        boot: event.boot,
        time: event.time,
        cpu: event.cpu,
        task: *task,
        path: stack.iter().map(|frame| frame.step).collect(),
    }
}
