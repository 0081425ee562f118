//! Which function calls which: the edges of a call flow, to compare it with
//! another trace of the same program.

use std::collections::{BTreeMap, HashMap};

use super::event::{Event, Happening};
use super::names::Names;
use crate::kernel::Gva;

/// A function and one that it called, by name; without a symbol, by address.
pub type Edge = (String, String);

/// Counts edges: every call with the call it is nested in, where that was
/// seen. Interrupts come when they like, so that their calls differ from run to
/// run: those are kept apart.
pub struct Edges<'n, N: ?Sized> {
    names: &'n N,
    /// By boot, caller, callee, and whether an interrupt called.
    counts: HashMap<(u32, Gva, Gva, bool), u64>,
    limit: usize,
    dropped: u64,
}

impl<'n, N: Names + ?Sized> Edges<'n, N> {
    /// Keeps at most `limit` edges.
    pub fn new(names: &'n N, limit: usize) -> Self {
        Self {
            names,
            counts: HashMap::new(),
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
        let full = self.counts.len() >= self.limit;
        match self.counts.get_mut(&edge) {
            Some(count) => *count += 1,
            None if full => self.dropped += 1,
            None => {
                self.counts.insert(edge, 1);
            }
        }
    }

    /// The edges of calls that tasks made, and how often each was taken.
    pub fn tasks(&self) -> BTreeMap<Edge, u64> {
        self.list(false)
    }

    /// The same for calls that interrupts made, those from the interrupted
    /// function included.
    pub fn interrupts(&self) -> BTreeMap<Edge, u64> {
        self.list(true)
    }

    /// How many calls had an edge that found no more room.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    fn list(&self, of_interrupts: bool) -> BTreeMap<Edge, u64> {
        let mut list = BTreeMap::new();
        for (&(boot, parent, func, interrupt), count) in &self.counts {
            if interrupt == of_interrupts {
                let edge = (self.name(boot, parent), self.name(boot, func));
                *list.entry(edge).or_default() += count;
            }
        }
        list
    }

    fn name(&self, boot: u32, func: Gva) -> String {
        let symbol = self.names.function(boot, func).symbol;
        symbol.map_or_else(|| func.to_string(), |(name, _)| name.to_owned())
    }
}
