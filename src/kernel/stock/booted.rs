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
    /// Their names, in order.
    pub names: BTreeSet<String>,
    /// Whether these are all of them.
    pub whole: bool,
}

impl fmt::Display for Booted {
    /// As people can take it in.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.names.is_empty() {
            return f.write_str("all of them");
        }
        for (number, name) in self.names.iter().take(SHOWN).enumerate() {
            let comma = if number == 0 { "" } else { ", " };
            write!(f, "{comma}{name}")?;
        }
        match (self.names.len().saturating_sub(SHOWN), self.whole) {
            (0, true) => Ok(()),
            (more, true) => write!(f, " and {more} more"),
            (more, false) => write!(f, " and more than {more} others"),
        }
    }
}

impl Booted {
    /// Refuses functions other than those the guest was booted with. Where none are
    /// asked for yet, only all of them are refused.
    ///
    /// # Errors
    /// [`StockError::OtherFunctions`], with what to boot it with.
    pub fn require(&self, functions: &[String]) -> Result<(), StockError> {
        let wanted: BTreeSet<&String> = functions.iter().collect();
        let same = self.whole && self.names.iter().eq(wanted);
        if !self.names.is_empty() && (functions.is_empty() || same) {
            return Ok(());
        }
        Err(StockError::OtherFunctions {
            booted: self.to_string(),
            command_line: command_line(functions),
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
            names: BTreeSet::new(),
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
                let name = symbols.lookup(self.kernel.link(ip));
                let name = name.map_or_else(|| ip.to_string(), |(name, _)| name.to_owned());
                booted.names.insert(name);
                entry = Gva(self.load(ram, plus(entry, offsets.next), WHAT)?);
            }
        }
        Ok(booted)
    }
}
