//! Which function calls which: the set of edges of a call flow, to compare it
//! with another trace of the same program.

use std::collections::{BTreeSet, HashSet};

use super::event::{Event, Happening, Opened};
use super::names::Names;
use crate::kernel::Gva;

/// A function and one that it called, by name; without a symbol, by address.
pub type Edge = (String, String);

/// Collects edges: every call with the call it is nested in, where that was
/// seen. Interrupts come when they like, so that their calls differ from run to
/// run: those are kept apart.
pub struct Edges<'n, N: ?Sized> {
    names: &'n N,
    seen: HashSet<(u32, Gva, Gva, bool)>,
    tasks: BTreeSet<Edge>,
    interrupts: BTreeSet<Edge>,
    limit: usize,
    dropped: u64,
}

impl<'n, N: Names + ?Sized> Edges<'n, N> {
    /// Collects at most `limit` edges.
    pub fn new(names: &'n N, limit: usize) -> Self {
        Self {
            names,
            seen: HashSet::new(),
            tasks: BTreeSet::new(),
            interrupts: BTreeSet::new(),
            limit,
            dropped: 0,
        }
    }

    /// Takes the next event.
    pub fn note(&mut self, event: &Event<'_>) {
        let (Happening::Open(call) | Happening::Leaf(call, _)) = &event.what else {
            return;
        };
        let Some(parent) = call.parent else { return };
        let edge = (event.boot, parent, call.func.address, call.interrupt);
        if self.seen.contains(&edge) {
            return;
        }
        if self.seen.len() >= self.limit {
            self.dropped += 1;
            return;
        }
        self.seen.insert(edge);
        self.add(event.boot, parent, call);
    }

    fn add(&mut self, boot: u32, parent: Gva, call: &Opened<'_>) {
        let name = |func| {
            let symbol = self.names.function(boot, func).symbol;
            symbol.map_or_else(|| func.to_string(), |(name, _)| name.to_owned())
        };
        let edge = (name(parent), name(call.func.address));
        if call.interrupt {
            self.interrupts.insert(edge);
        } else {
            self.tasks.insert(edge);
        }
    }

    /// The edges of calls that tasks made.
    pub fn tasks(&self) -> &BTreeSet<Edge> {
        &self.tasks
    }

    /// The edges of calls that interrupts made, those from the interrupted
    /// function included.
    pub fn interrupts(&self) -> &BTreeSet<Edge> {
        &self.interrupts
    }

    /// How many calls had an edge that found no more room.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }
}
