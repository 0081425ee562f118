//! Which functions a guest without the patch was booted to follow.

use std::collections::BTreeSet;
use std::fmt;
use std::time::Instant;

use crate::ram::GuestRam;

use super::super::{Gva, Symbols};
use super::rings::{plus, BUDGET};
use super::{command_line, Stock, StockError};

/// How many buckets and functions are looked at. FTRACE_HASH_MAX_BITS is 12.
const MAX_BUCKETS: u64 = 1 << 12;
const MAX_FUNCTIONS: usize = 4096;
/// How many functions are named to people.
const SHOWN: usize = 10;

/// The functions that function_graph follows, as `set_graph_function` has them;
/// none means all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Booted {
    /// Their names, in order, and where they begin, as linked.
    pub functions: BTreeSet<(String, Gva)>,
    /// Whether these are all of them.
    pub whole: bool,
}

impl fmt::Display for Booted {
    /// As people can take it in.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.functions.is_empty() {
            return f.write_str("all of them");
        }
        let names: BTreeSet<&String> = self.functions.iter().map(|(name, _)| name).collect();
        for (number, name) in names.iter().take(SHOWN).enumerate() {
            let comma = if number == 0 { "" } else { ", " };
            write!(f, "{comma}{name}")?;
        }
        match (names.len().saturating_sub(SHOWN), self.whole) {
            (0, true) => Ok(()),
            (more, true) => write!(f, " and {more} more"),
            (more, false) => write!(f, " and more than {more} others"),
        }
    }
}

impl Booted {
    /// Refuses functions other than those the guest was booted with, by whichever of
    /// their names. Where none are asked for yet, only all of them are refused.
    ///
    /// # Errors
    /// [`StockError::OtherFunctions`], with what to boot it with.
    pub fn require(&self, symbols: &Symbols, functions: &[String]) -> Result<(), StockError> {
        let places = |name: &String| {
            let found = symbols.resolve_function(name);
            found.map_or_else(|_| Vec::new(), |found| found.addresses)
        };
        let wanted: Vec<_> = functions.iter().map(|name| (name, places(name))).collect();
        let is = |(name, places): &(&String, Vec<Gva>), (booted, at): &(String, Gva)| {
            *name == booted || places.contains(at)
        };
        let has = |wanted| self.functions.iter().any(|booted| is(wanted, booted));
        let asked = |booted| wanted.iter().any(|wanted| is(wanted, booted));
        let same = self.whole && wanted.iter().all(has) && self.functions.iter().all(asked);
        if !self.functions.is_empty() && (functions.is_empty() || same) {
            return Ok(());
        }
        Err(StockError::OtherFunctions {
            booted: self.to_string(),
            command_line: command_line(&symbols.ftrace_names(functions)),
        })
    }
}

impl Stock {
    /// The functions that function_graph follows.
    ///
    /// # Errors
    /// If the kernel's table of them cannot be followed, or not soon.
    pub fn functions(&self, ram: &dyn GuestRam, symbols: &Symbols) -> Result<Booted, StockError> {
        const WHAT: &str = "the table of functions to trace";
        let begun = Instant::now();
        let offsets = &self.offsets.hash;
        let hash = Gva(self.load(ram, self.filter, WHAT)?);
        let bits = self.load(ram, plus(hash, offsets.size_bits), WHAT)?;
        let buckets = Gva(self.load(ram, plus(hash, offsets.buckets), WHAT)?);
        let count = 1u64.checked_shl(bits.min(64) as u32).unwrap_or(u64::MAX);
        let mut booted = Booted {
            functions: BTreeSet::new(),
            whole: count <= MAX_BUCKETS,
        };
        if buckets.0 == 0 {
            return Ok(Booted {
                whole: true,
                ..booted
            });
        }
        let mut left = MAX_FUNCTIONS;
        for bucket in 0..count.min(MAX_BUCKETS) {
            let slot = Gva(buckets.0.wrapping_add(8 * bucket));
            let mut entry = Gva(self.load(ram, slot, WHAT)?);
            while entry.0 != 0 {
                if begun.elapsed() > BUDGET {
                    return Err(StockError::TooSlow { what: WHAT });
                }
                let Some(after) = left.checked_sub(1) else {
                    booted.whole = false;
                    return Ok(booted);
                };
                left = after;
                let ip = Gva(self.load(ram, plus(entry, offsets.ip), WHAT)?);
                let link = self.kernel.link(ip);
                // Its call site, which may not be its very beginning.
                let found = symbols.lookup(link);
                let found = found.map(|(name, within)| (name.to_owned(), Gva(link.0 - within)));
                let function = found.unwrap_or_else(|| (ip.to_string(), link));
                booted.functions.insert(function);
                entry = Gva(self.load(ram, plus(entry, offsets.next), WHAT)?);
            }
        }
        Ok(booted)
    }
}
