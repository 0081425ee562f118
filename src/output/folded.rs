//! Folded stacks, for flame graphs: `sh;__x64_sys_read;ksys_read;vfs_read 1234`.

use std::collections::HashMap;
use std::io::{self, Write};

use super::escape::{guest, symbol};
use super::Sink;
use crate::callflow::{Event, Happening, Opened, Place, Tally};
use crate::ring::record::Task;

/// What the number behind a stack counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Weight {
    /// Nanoseconds between entry and return, without those of traced calls
    /// below. Calls whose return was not seen have none.
    #[default]
    OwnTime,
    /// Calls, those whose return was not seen too.
    Calls,
}

/// How many different stacks are told apart. What comes up when there are as
/// many adds to the one stack [`MORE`].
const STACKS: usize = 1 << 18;

/// Stands for all stacks that found no room, as the node numbered 0.
const MORE: &str = "[more stacks]";

/// Adds up stacks, and writes them when it is finished.
pub struct Folded<W> {
    out: W,
    weight: Weight,
    by_pid: bool,
    limit: usize,
    nodes: Vec<Node>,
    /// Nodes by the one above and the number of their name.
    index: HashMap<(Option<usize>, usize), usize>,
    names: Vec<String>,
    name_numbers: HashMap<String, usize>,
    /// The stack that each task is in. The idle tasks have one a CPU.
    tasks: HashMap<(i32, u16), Vec<usize>>,
}

/// A stack: a frame on top of another stack.
#[derive(Default)]
struct Node {
    name: usize,
    weight: u64,
    /// The stacks with one frame more.
    above: Vec<usize>,
}

impl<W: Write> Folded<W> {
    /// Starts with nothing. `by_pid`: tasks of one name are told apart. `out`
    /// should be buffered.
    pub fn new(out: W, weight: Weight, by_pid: bool) -> Self {
        Self {
            out,
            weight,
            by_pid,
            limit: STACKS,
            nodes: vec![Node::default()],
            index: HashMap::new(),
            names: vec![MORE.to_owned()],
            name_numbers: HashMap::new(),
            tasks: HashMap::new(),
        }
    }

    /// The node of the frame `name` on top of `below`; `None`: on nothing.
    fn node(&mut self, below: Option<usize>, name: &str) -> usize {
        const FULL: usize = 0;
        if below == Some(FULL) {
            return FULL;
        }
        let known = self.name_numbers.get(name).copied();
        if let Some(&node) = known.and_then(|number| self.index.get(&(below, number))) {
            return node;
        }
        if self.nodes.len() > self.limit {
            return FULL;
        }
        let number = known.unwrap_or_else(|| {
            self.names.push(name.to_owned());
            self.name_numbers
                .insert(name.to_owned(), self.names.len() - 1);
            self.names.len() - 1
        });
        let node = self.nodes.len();
        self.nodes.push(Node {
            name: number,
            ..Node::default()
        });
        self.index.insert((below, number), node);
        if let Some(below) = below.and_then(|below| self.nodes.get_mut(below)) {
            below.above.push(node);
        }
        node
    }

    fn open(&mut self, cpu: u16, call: &Opened<'_>) -> usize {
        let key = task_key(&call.task, cpu);
        let around = self.tasks.get(&key).and_then(|stack| stack.last().copied());
        let around = around.unwrap_or_else(|| {
            let task = frame(&task_name(&call.task, self.by_pid));
            self.node(None, &task)
        });
        let name = function_name(&call.func);
        let node = self.node(Some(around), &name);
        self.tasks.entry(key).or_default().push(node);
        if self.weight == Weight::Calls {
            self.add(node, 1);
        }
        node
    }

    fn close(&mut self, cpu: u16, task: &Task, own: Option<u64>) {
        let key = task_key(task, cpu);
        let Some(stack) = self.tasks.get_mut(&key) else {
            return;
        };
        let node = stack.pop();
        if stack.is_empty() {
            self.tasks.remove(&key);
        }
        if let (Some(node), Some(own), Weight::OwnTime) = (node, own, self.weight) {
            self.add(node, own);
        }
    }

    fn add(&mut self, node: usize, weight: u64) {
        if let Some(node) = self.nodes.get_mut(node) {
            node.weight = node.weight.saturating_add(weight);
        }
    }

    /// The given nodes, by name, last first.
    fn sorted(&self, mut nodes: Vec<usize>) -> Vec<usize> {
        nodes.sort_by(|a, b| self.name(*b).cmp(self.name(*a)));
        nodes
    }

    fn name(&self, node: usize) -> &str {
        let name = self
            .nodes
            .get(node)
            .and_then(|node| self.names.get(node.name));
        name.map_or(MORE, String::as_str)
    }
}

impl<W: Write> Sink for Folded<W> {
    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }

    fn event(&mut self, event: &Event<'_>) -> io::Result<()> {
        match &event.what {
            Happening::Open(call) => {
                self.open(event.cpu, call);
            }
            Happening::Leaf(call, spent) => {
                self.open(event.cpu, call);
                self.close(event.cpu, &call.task, spent.own);
            }
            Happening::Close(closed) if closed.id.is_some() => {
                self.close(event.cpu, &closed.task, closed.spent.own);
            }
            Happening::Cut(cut) => self.close(event.cpu, &cut.task, None),
            _ => {}
        }
        Ok(())
    }

    fn finish(&mut self, _: &Tally) -> io::Result<()> {
        let roots = self.index.iter().filter(|((below, _), _)| below.is_none());
        let mut roots: Vec<usize> = roots.map(|(_, &node)| node).collect();
        roots.push(0);
        // Nodes still to be written, each with the length of the path below it.
        let mut left: Vec<(usize, usize)> = self
            .sorted(roots)
            .into_iter()
            .map(|node| (node, 0))
            .collect();
        let mut path = String::new();
        while let Some((at, below)) = left.pop() {
            path.truncate(below);
            if below > 0 {
                path.push(';');
            }
            path.push_str(self.name(at));
            let Some(node) = self.nodes.get(at) else {
                continue;
            };
            if node.weight > 0 {
                writeln!(self.out, "{path} {}", node.weight)?;
            }
            let above = self.sorted(node.above.clone());
            left.extend(above.into_iter().map(|node| (node, path.len())));
        }
        self.out.flush()
    }
}

fn task_key(task: &Task, cpu: u16) -> (i32, u16) {
    (task.pid, if task.pid == 0 { cpu } else { 0 })
}

fn task_name(task: &Task, by_pid: bool) -> String {
    let name = match task.comm {
        _ if task.pid == 0 => "<idle>".to_owned(),
        Some(comm) => guest(comm.bytes(), 64),
        None => "<...>".to_owned(),
    };
    if by_pid {
        return format!("{name}-{}", task.pid);
    }
    name
}

fn function_name(func: &Place<'_>) -> String {
    let name = match (func.entered(), func.name.symbol) {
        (Some(name), _) => frame(&symbol(name)),
        (None, Some((name, offset))) => format!("{}+{offset:#x}", frame(&symbol(name))),
        (None, None) => return told_name(func),
    };
    match func.name.module {
        Some(module) => format!("{name} [{}]", frame(&symbol(module))),
        None => name,
    }
}

/// A function that the host knows no symbol for, by the guest's word if it has one.
fn told_name(func: &Place<'_>) -> String {
    match (func.told_entered(), func.name.told) {
        (Some((name, module)), _) => {
            format!("{} [{}?]", frame(&symbol(name)), frame(&symbol(module)))
        }
        (None, Some(told)) => match told.symbol {
            Some(_) => frame(&symbol(&told.to_string())),
            None => format!("{} {told}", func.address),
        },
        (None, None) => func.address.to_string(),
    }
}

/// A name without the character that stands between frames.
fn frame(name: &str) -> String {
    name.replace(';', ":")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::callflow::{events, Kind, Limits, Name, Names};
    use crate::kernel::Gva;
    use crate::ring::record::{Call, Item, TraceFlags, What};

    struct Nameless;

    impl Names for Nameless {
        fn function(&self, _: u32, _: Gva) -> Name<'_> {
            Name {
                symbol: None,
                module: None,
                kind: Kind::Kernel,
                irq_entry: false,
                told: None,
            }
        }
    }

    #[test]
    fn stacks_beyond_the_limit_are_taken_together() {
        let items = (0..1_000).map(|number| {
            let call = Call {
                task: Task {
                    pid: 1,
                    comm: Some("sh".into()),
                },
                flags: TraceFlags(0),
                func: Gva(number),
                caller: Gva(0),
                depth: number as u16 % 2,
                epoch: 1,
                seq: number,
            };
            Ok::<_, io::Error>(Item {
                cpu: 0,
                boot: 1,
                time: number,
                what: What::Call(call),
            })
        });
        let mut out = Vec::new();
        let mut folded = Folded::new(&mut out, Weight::Calls, false);
        folded.limit = 5;
        for event in events(items, &Nameless, Limits::default()) {
            folded
                .event(&event.expect("an event"))
                .expect("memory takes all");
        }
        assert_eq!(
            (folded.nodes.len(), folded.names.len(), folded.tasks.len()),
            (6, 6, 0)
        );
        folded.finish(&Tally::default()).expect("memory takes all");
        let text = String::from_utf8(out).expect("ASCII");
        let shown = "[more stacks] 996\nsh;0x0 1\nsh;0x0;0x1 1\nsh;0x2 1\nsh;0x2;0x3 1\n";
        assert_eq!(text, shown);
    }
}
