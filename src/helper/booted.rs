//! What a guest without the patch records as it is booted, and what it would have to
//! be booted with: for `status` and `doctor`.
//!
//! The guest's tables are walked for it, which may be as long as the guest likes, and
//! nobody waits for news of them. So they are looked at once a second, and not at all
//! while a trace is on, which the ring buffers need the time for.

use std::time::{Duration, Instant};

use crate::kernel::stock::{command_line, reserved_command_line, set_tracer, Stock, StockError};
use crate::kernel::FtraceNameError;
use crate::ram::GuestRam;

use super::link::Link;
use super::protocol::{PlainBoot, PlainRing};
use super::watch::Guest;

/// Between two looks.
const EVERY: Duration = Duration::from_secs(1);

/// What was seen last.
#[derive(Default)]
pub(super) struct BootLook {
    last: Option<Last>,
}

struct Last {
    at: Instant,
    boot_id: u64,
    functions: Vec<String>,
    told: PlainBoot,
}

impl BootLook {
    /// What was seen holds no more.
    pub(super) fn forget(&mut self) {
        self.last = None;
    }

    /// How a guest is booted, in plain mode, for functions as they are typed.
    pub(super) fn told(
        &mut self,
        ram: &dyn GuestRam,
        guest: &Guest,
        functions: &[String],
        traced: bool,
    ) -> Option<PlainBoot> {
        let Link::Plain(stock) = &guest.link else {
            self.last = None;
            return None;
        };
        let look = || look(ram, guest, stock, functions);
        let now = Instant::now();
        Some(self.kept(stock.boot_id, functions, traced, now, look))
    }

    /// What was seen last, or what is seen now where that is another boot, or is for
    /// other functions, or is old.
    fn kept(
        &mut self,
        boot_id: u64,
        functions: &[String],
        traced: bool,
        now: Instant,
        look: impl FnOnce() -> PlainBoot,
    ) -> PlainBoot {
        let still = self.last.as_ref().filter(|last| {
            let same = last.boot_id == boot_id && last.functions == functions;
            // What is traced can be, whatever was seen just before.
            let stands = traced && last.told.cannot.is_none();
            same && (stands || now.saturating_duration_since(last.at) < EVERY)
        });
        if let Some(last) = still {
            return last.told.clone();
        }
        let told = look();
        self.last = Some(Last {
            at: now,
            boot_id,
            functions: functions.to_vec(),
            told: told.clone(),
        });
        told
    }
}

fn look(ram: &dyn GuestRam, guest: &Guest, stock: &Stock, functions: &[String]) -> PlainBoot {
    let full = |name: &String| guest.symbols.ftrace_name(name);
    let known: Result<Vec<String>, FtraceNameError> = functions.iter().map(full).collect();
    // With a name that it does not have, a kernel would record every function.
    let unknown = known.is_err();
    let functions = known.as_deref().unwrap_or_default();
    let seen = || {
        if let Err(why) = &known {
            anyhow::bail!("{why}");
        }
        let array = stock.tracing(ram, functions)?;
        let booted = stock.functions(ram, &guest.symbols)?;
        booted.require(&guest.symbols, functions)?;
        Ok(PlainRing {
            instance: array.name,
            reserved: array.boot_mapped,
            kb: array.kb,
            functions: booted.to_string(),
        })
    };
    let (ring, why) = match seen() {
        Ok(ring) => (Some(ring), None),
        Err(why) => (None, Some(why)),
    };
    let stock_why = why.as_ref().and_then(|why| why.downcast_ref());
    let to_type = match stock_why {
        Some(StockError::TracerNotSet { instance }) => Some(set_tracer(instance)),
        _ => None,
    };
    PlainBoot {
        ring,
        cannot: why.map(|why| format!("{why:#}")),
        command_line: command_line(functions),
        unknown,
        reserved: stock.can_reserve.then(|| reserved_command_line(functions)),
        to_type,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_is_looked_at_once_a_second_and_not_while_it_is_traced() {
        let mut boot_look = BootLook::default();
        let begun = Instant::now();
        let mut looked = |boot_id, functions: &[&str], traced, after: u64| {
            let functions: Vec<String> = functions.iter().map(|&name| name.to_owned()).collect();
            let now = begun + Duration::from_millis(after);
            let mut looked = false;
            boot_look.kept(boot_id, &functions, traced, now, || {
                looked = true;
                PlainBoot {
                    ring: None,
                    cannot: None,
                    command_line: command_line(&functions),
                    unknown: false,
                    reserved: None,
                    to_type: None,
                }
            });
            looked
        };
        assert!(looked(1, &["f"], false, 0));
        assert!(!looked(1, &["f"], false, 200));
        assert!(!looked(1, &["f"], false, 999));
        assert!(looked(1, &["f"], false, 1000));
        assert!(!looked(1, &["f"], true, 60_000));
        // Of what is not known yet, something is told at once.
        assert!(looked(1, &["g"], true, 60_000));
        assert!(looked(2, &["g"], true, 60_000));
        assert!(looked(2, &["g"], false, 61_000));
    }
}
