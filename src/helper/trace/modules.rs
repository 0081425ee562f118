//! The guest's own list of modules, looked at while it is traced.
//!
//! The list is read ten times a second. The symbols of a module are read once for
//! each time that it was loaded, a module at a time. How long either takes, the guest
//! has a say in. So neither may take long, lest a ring buffer that waits runs over, and
//! both rest nine times as long: each takes a tenth of the engine's time at most.

use std::time::{Duration, Instant};

use crate::kernel::btf::{Btf, BtfError};
use crate::kernel::{Module, ModuleList, ModulesError};
use crate::ram::GuestRam;
use crate::session::{ModuleLook, ModuleSymbols, SETTLE, UNSURE_NS};

use super::super::ratelimit::RateLimit;
use super::super::rest::{turn, Rest};
use super::super::watch::{Guest, Watch};
use super::loads::Loads;
use super::{Trace, SUSPECT_AFTER};

/// How often the list is looked at: sooner than a record settles, so that a record
/// is judged after a look that is younger than the record.
const LOOK_EVERY: Duration = Duration::from_millis(100);
const _: () = assert!(LOOK_EVERY.as_millis() * 2 < SETTLE.as_millis());
/// How long one look may take, or reading the symbols of one module. As many modules as
/// are read take some milliseconds; memory that the host swapped out takes longer.
const BUDGET: Duration = Duration::from_millis(20);
const _: () = assert!(turn(BUDGET).as_millis() < SETTLE.as_millis());
/// So many looks one after another that fail, and the list is not known any more.
/// One that fails may have met a change.
const FAILURES: u32 = 4;
/// How long the symbols that are left may take when the trace ends.
const LAST: Duration = Duration::from_millis(500);

/// The list of one boot.
pub(super) struct Modules {
    list: ModuleList,
    looks: Looks,
}

/// What is made of looks at it.
struct Looks {
    /// The list as it was written down last.
    last: Option<ModuleLook>,
    /// When it was read last, guest trace clock, nanoseconds.
    seen: Option<u64>,
    looked: Option<Instant>,
    rest: Rest,
    failures: u32,
    loads: Loads,
    /// A guest can spoil and mend its list as often as it likes.
    said: RateLimit,
}

impl Modules {
    /// Of a guest whose kernel tells where the list is. Without it, code in the
    /// module area is told apart by symbols alone.
    pub(super) fn of(guest: &Guest, btf: Result<&Btf, &BtfError>) -> Option<Self> {
        let list = btf.map_err(BtfError::to_string).and_then(|btf| {
            ModuleList::of(&guest.kernel, &guest.symbols, btf).map_err(|error| error.to_string())
        });
        match list {
            Ok(list) => Some(Self::new(list)),
            Err(why) => {
                log::info!("code of the guest's modules is told by symbols alone: {why}");
                None
            }
        }
    }

    fn new(list: ModuleList) -> Self {
        let mut looks = Looks::new();
        if !list.has_symbols() {
            log::info!("the guest's kernel keeps no symbols of its modules (CONFIG_KALLSYMS)");
            looks.loads.read_no_symbols();
        }
        Self { list, looks }
    }
}

impl Looks {
    fn new() -> Self {
        Self {
            last: None,
            seen: None,
            looked: None,
            rest: Rest::default(),
            failures: 0,
            loads: Loads::default(),
            said: RateLimit::new(3, Duration::from_secs(60)),
        }
    }

    /// Looks, if it is time to. The list where it has changed, or may have without
    /// anyone looking; `None` in it where it can be read no more. `number` gives a
    /// number to a load that is new.
    fn look(
        &mut self,
        read: impl FnOnce() -> Result<Vec<Module>, ModulesError>,
        boot: u32,
        since: u64,
        number: impl FnMut() -> u32,
    ) -> Option<ModuleLook> {
        let begun = Instant::now();
        let soon = |at: Instant| begun.saturating_duration_since(at) < LOOK_EVERY;
        if self.looked.is_some_and(soon) || !self.rest.is_over(begun) {
            return None;
        }
        self.looked = Some(begun);
        let read = read();
        self.rest.after((begun, Instant::now()));
        let modules = match read {
            Ok(modules) => {
                self.failures = 0;
                Some(self.loads.numbered(modules, number))
            }
            Err(error) => {
                self.failures = self.failures.saturating_add(1);
                if self.failures < FAILURES {
                    return None;
                }
                if self.failures == FAILURES {
                    if let Some(again) = self.said.say() {
                        log::warn!(
                            "{error}; code of the guest's modules is told by symbols alone for \
                             now{again}"
                        );
                    }
                }
                None
            }
        };
        let known = self.last.as_ref().map(|last| &last.modules);
        let known = known == Some(&modules);
        let seen = modules.as_ref().and_then(|_| self.seen.replace(since));
        let unseen_since = seen.filter(|seen| since.saturating_sub(*seen) > UNSURE_NS);
        if known && unseen_since.is_none() {
            return None;
        }
        let look = ModuleLook {
            boot,
            since,
            unseen_since,
            modules,
        };
        self.last = Some(look.clone());
        Some(look)
    }
}

impl Modules {
    /// Reads the symbols of the module whose turn it is, if it is time to.
    fn symbols(&mut self, ram: &dyn GuestRam) -> Option<ModuleSymbols> {
        let begun = Instant::now();
        let unread = self.looks.loads.turn(begun)?;
        let read = self.list.functions(ram, &unread.module, BUDGET);
        let times = (begun, Instant::now());
        self.looks.loads.done(unread, read, times)
    }
}

impl Trace {
    /// Notes the guest's list of modules where it has changed, and what they say
    /// their functions are called. A guest that has gone silent may be none any
    /// more.
    pub(super) fn look_at_modules(&mut self, watch: &Watch) {
        let Some(live) = &mut self.live else { return };
        if watch.silent() > SUSPECT_AFTER {
            return;
        }
        let clock = match &live.plain {
            Some(plain) => plain.clocks.pairs().map(|(_, last)| last.guest_ns),
            None => watch.heartbeat().map(|beat| beat.clock),
        };
        let boot = self.writer.meta.boots.last().map_or(1, |boot| boot.number);
        let writer = &mut self.writer;
        let look = live
            .modules
            .as_mut()
            .zip(clock)
            .and_then(|(modules, clock)| {
                let Modules { list, looks } = modules;
                let read = || list.read(&*self.ram, BUDGET);
                looks.look(read, boot, clock, || writer.new_load())
            });
        if let Some(look) = look {
            self.note_modules(look);
        }
        self.read_module_symbols();
    }

    fn note_modules(&mut self, look: ModuleLook) {
        match self.writer.modules(&look) {
            Ok(true) => self.judging.modules(look),
            // Nothing is known from here on, to those who judge as little as on disk.
            Ok(false) => {
                if let Some(live) = &mut self.live {
                    live.modules = None;
                }
                self.judging.modules(ModuleLook {
                    modules: None,
                    ..look
                });
            }
            Err(error) => self.cannot_store(&error),
        }
    }

    /// Reads the symbols of one module and notes them, if there is one and it is
    /// time to.
    fn read_module_symbols(&mut self) {
        let Some(modules) = self.live.as_mut().and_then(|live| live.modules.as_mut()) else {
            return;
        };
        let Some(symbols) = modules.symbols(&*self.ram) else {
            return;
        };
        match self.writer.module_symbols(&symbols) {
            Ok(true) => self.judging.module_symbols(symbols),
            Ok(false) => {
                log::warn!(
                    "the session has no room for more symbols of the guest's modules; functions \
                     of those that are loaded from now on are not named"
                );
                modules.looks.loads.read_no_symbols();
            }
            Err(error) => self.cannot_store(&error),
        }
    }

    /// Reads the symbols that are left, now that the trace ends and nothing has to
    /// be drained.
    pub(super) fn read_last_symbols(&mut self, watch: &Watch) {
        let begun = Instant::now();
        while watch.silent() <= SUSPECT_AFTER && begun.elapsed() < LAST {
            let modules = self.live.as_mut().and_then(|live| live.modules.as_mut());
            if !modules.is_some_and(|modules| modules.looks.loads.hurry()) {
                return;
            }
            self.read_module_symbols();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::ratelimit::Verdict;
    use super::*;

    /// Looks at a list that takes so long to read; whether it was read.
    fn looked(looks: &mut Looks, took: Duration, list: Result<(), ModulesError>) -> bool {
        let mut read = false;
        let reading = || {
            read = true;
            std::thread::sleep(took);
            list.map(|()| Vec::new())
        };
        looks.look(reading, 1, 0, || 1);
        read
    }

    #[test]
    fn a_list_that_is_slow_to_read_is_read_less_often() {
        let mut looks = Looks::new();
        let begun = Instant::now();
        let took = Duration::from_millis(40);
        assert!(looked(&mut looks, took, Ok(())));
        let mut reads = 0;
        while begun.elapsed() < Duration::from_millis(390) {
            reads += u32::from(looked(&mut looks, took, Ok(())));
            std::thread::sleep(Duration::from_millis(3));
        }
        assert_eq!(reads, 0);
        let again = Instant::now();
        while !looked(&mut looks, took, Ok(())) {
            assert!(again.elapsed() < Duration::from_secs(10));
            std::thread::sleep(Duration::from_millis(3));
        }
        // One that cannot be read, too.
        assert!(!looks.rest.is_over(Instant::now()));
        looks.rest.end();
        looks.looked = None;
        assert!(looked(&mut looks, took, Err(ModulesError::TooLong)));
        assert!(!looks.rest.is_over(Instant::now() + 8 * took));
    }

    #[test]
    fn a_look_that_comes_late_is_noted() {
        let mut looks = Looks::new();
        let mut look = |clock: u64, list: Result<(), ModulesError>| {
            looks.looked = None;
            looks.rest.end();
            let read = || list.map(|()| Vec::new());
            looks.look(read, 1, clock, || 1)
        };
        let begun = 7 * UNSURE_NS;
        let first = look(begun, Ok(())).expect("a list that is new");
        assert_eq!(first.unseen_since, None);
        let soon = begun + UNSURE_NS;
        assert_eq!(look(soon, Ok(())), None);
        // One that fails has seen nothing.
        assert_eq!(look(soon + UNSURE_NS, Err(ModulesError::TooLong)), None);
        let late = look(soon + UNSURE_NS + 1, Ok(())).expect("a look that is late");
        assert_eq!(late.unseen_since, Some(soon));
        assert_eq!(late.modules, Some(Vec::new()));
    }

    #[test]
    fn a_list_that_is_spoilt_again_and_again_does_not_fill_the_log() {
        let mut looks = Looks::new();
        for turn in 0..10 {
            for _ in 0..FAILURES {
                looks.looked = None;
                looks.rest.end();
                assert!(looked(
                    &mut looks,
                    Duration::ZERO,
                    Err(ModulesError::TooLong)
                ));
            }
            let unknown = looks.last.as_ref().map(|look| look.modules.is_none());
            assert_eq!(unknown, Some(true), "turn {turn}");
            looks.looked = None;
            looks.rest.end();
            assert!(looked(&mut looks, Duration::ZERO, Ok(())));
        }
        // It asked ten times, and was let through three times.
        assert_eq!(looks.said.ask(), Verdict::Drop);
    }
}
