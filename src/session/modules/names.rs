//! What the guest calls the functions of its modules, by address and time.
//!
//! A name is told of code that a listed module has, and by nothing but that very
//! module's symbols. Where lists within [`UNSURE_NS`] of a record differ in whose
//! the code is, or two modules of one list have it, no name is told: a look comes
//! some time after what it shows, and a wrong name is worse than none.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;

use elsa::FrozenMap;
use serde::{Deserialize, Serialize};

use super::{ModuleLook, UNSURE_NS};
use crate::kernel::{is_name, Gva, ModuleFunctions};

/// More lists than this around one moment tell nothing: the helper looks ten times
/// a second.
const AROUND: usize = 64;

/// What a module says of its functions: a line of `module-symbols.jsonl`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModuleSymbols {
    /// The load of the module that this is of; see [`super::Listed::load`].
    pub load: u32,
    /// The module's name, escaped.
    pub name: String,
    /// Where each function begins, a runtime address, and its name.
    pub functions: Vec<(u64, String)>,
    /// How many functions were left out, as they lie outside the module's code,
    /// have a name that is none, or found no room.
    pub refused: u64,
    /// Why there are none, where they could not be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unread: Option<String>,
}

impl ModuleSymbols {
    /// Those that were read of a load.
    pub fn read(load: u32, name: &str, read: ModuleFunctions) -> Self {
        let functions = read.functions.into_iter();
        Self {
            load,
            name: name.to_owned(),
            functions: functions.map(|(at, name)| (at.0, name)).collect(),
            refused: read.refused,
            unread: None,
        }
    }

    /// A load whose symbols are not known.
    pub fn unread(load: u32, name: &str, why: String) -> Self {
        Self {
            load,
            name: name.to_owned(),
            functions: Vec::new(),
            refused: 0,
            unread: Some(why),
        }
    }

    /// The last line of a file that may not grow further.
    pub(in crate::session) fn full() -> Self {
        Self::unread(0, "", "the file is full".to_owned())
    }
}

/// What the guest says of an address. No more than that: whoever has the guest's
/// kernel can say anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GuestName<'a> {
    /// The module whose code it is.
    pub module: &'a str,
    /// The function at or before the address, and how many bytes before it; none
    /// where the module does not say.
    pub symbol: Option<(&'a str, u64)>,
}

/// As `symbol+0x1c [module?]`; without a symbol the module alone.
impl fmt::Display for GuestName<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((symbol, offset)) = self.symbol {
            write!(f, "{symbol}+{offset:#x} ")?;
        }
        write!(f, "[{}?]", self.module)
    }
}

/// The names that the guest's modules had, list after list. More can be added
/// while names of it are in use, for who follows a guest.
#[derive(Default)]
pub struct ModuleNames {
    /// By boot, in the order of time.
    lists: RefCell<BTreeMap<u32, Vec<List>>>,
    /// The names of modules, by their loads.
    modules: FrozenMap<u32, Box<str>>,
    /// Functions in the order of their addresses, by loads.
    functions: FrozenMap<u32, Box<[(u64, String)]>>,
}

/// Whose the code of modules is, from some time on.
#[derive(Debug)]
struct List {
    since: u64,
    /// In order, none over another.
    spans: Vec<Span>,
}

/// Code of one load of a module.
#[derive(Clone, Copy, Debug)]
struct Span {
    from: u64,
    to: u64,
    /// None where several say that it is theirs.
    load: Option<u32>,
}

impl fmt::Debug for ModuleNames {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ModuleNames")
            .field("modules", &self.modules.len())
            .field("functions", &self.functions.len())
            .finish_non_exhaustive()
    }
}

impl ModuleNames {
    /// Adds the list as it is from its time on. A guest whose clock goes back
    /// changes nothing of what was noted before.
    pub fn list(&self, look: &ModuleLook) {
        let mut spans = Vec::new();
        // A module without a number, or whose name is none, is not named.
        let named = |load: u32, name: &str| load > 0 && is_name(name);
        for module in look.modules.iter().flatten() {
            let load = named(module.load, &module.name).then_some(module.load);
            if let Some(load) = load.filter(|load| self.modules.get(load).is_none()) {
                self.modules.insert(load, module.name.as_str().into());
            }
            let code = module.code.iter().filter(|(from, to)| from < to);
            spans.extend(code.map(|&(from, to)| Span { from, to, load }));
        }
        let mut lists = self.lists.borrow_mut();
        let lists = lists.entry(look.boot).or_default();
        let before = lists.last().map_or(0, |list| list.since);
        lists.push(List {
            since: look.since.max(before),
            spans: apart(spans),
        });
    }

    /// Adds what a module says of its functions. What it said first stands.
    pub fn symbols(&self, symbols: ModuleSymbols) {
        let mut functions = symbols.functions;
        functions.retain(|(_, name)| is_name(name));
        functions.sort_by_key(|&(at, _)| at);
        // Of a load that is there, the map keeps what it has.
        self.functions.insert(symbols.load, functions.into());
    }

    /// What the guest says of a runtime address at some time of its trace clock.
    pub fn told(&self, boot: u32, at: Gva, time: u64) -> Option<GuestName<'_>> {
        let lists = self.lists.borrow();
        let lists = lists.get(&boot)?;
        let (from, to) = (
            time.saturating_sub(UNSURE_NS),
            time.saturating_add(UNSURE_NS),
        );
        // As with ModuleHistory::listed.
        let first = lists.partition_point(|list| list.since <= from);
        let end = lists.partition_point(|list| list.since <= to);
        let held = lists.get(first.saturating_sub(1)..end)?;
        if held.len() > AROUND {
            return None;
        }
        let mut told: Option<GuestName<'_>> = None;
        for span in held.iter().filter_map(|list| list.span(at.0)) {
            let name = self.name(span, at.0)?;
            match &mut told {
                None => told = Some(name),
                Some(other) if other.module != name.module => return None,
                // Of one load the symbols are known, of the other they are not.
                Some(other) if other.symbol.is_none() => *other = name,
                Some(other) => {
                    if name.symbol.is_some_and(|_| name.symbol != other.symbol) {
                        return None;
                    }
                }
            }
        }
        told
    }

    fn name(&self, span: Span, at: u64) -> Option<GuestName<'_>> {
        let module = self.modules.get(&span.load?)?;
        let functions = self.functions.get(&span.load?).unwrap_or_default();
        let after = functions.partition_point(|&(function, _)| function <= at);
        let before = functions.get(..after).and_then(<[_]>::last);
        Some(GuestName {
            module,
            symbol: before
                .filter(|&&(function, _)| function >= span.from)
                .map(|(function, name)| (name.as_str(), at - function)),
        })
    }
}

impl List {
    fn span(&self, at: u64) -> Option<Span> {
        let after = self.spans.partition_point(|span| span.from <= at);
        let span = self.spans.get(..after)?.last()?;
        (at < span.to).then_some(*span)
    }
}

/// In order, with those that lie over each other made one that is nobody's.
fn apart(mut spans: Vec<Span>) -> Vec<Span> {
    spans.sort_by_key(|span| (span.from, span.to));
    let mut apart: Vec<Span> = Vec::with_capacity(spans.len());
    for span in spans {
        match apart.last_mut() {
            Some(last) if span.from < last.to => {
                last.to = last.to.max(span.to);
                last.load = None;
            }
            _ => apart.push(span),
        }
    }
    apart
}

#[cfg(test)]
mod tests;
