//! The guest's own list of modules, looked at while it is traced.

use std::time::{Duration, Instant};

use crate::kernel::btf::Btf;
use crate::kernel::{ModuleList, ModulesError};
use crate::ram::GuestRam;
use crate::session::{Listed, ModuleLook, SETTLE};

use super::super::watch::{Guest, Watch};
use super::{Trace, HOLD_AFTER};

/// How often the list is looked at: sooner than a record settles, so that a record
/// is judged after a look that is younger than the record.
const LOOK_EVERY: Duration = Duration::from_millis(100);
const _: () = assert!(LOOK_EVERY.as_millis() * 2 < SETTLE.as_millis());
/// So many looks one after another that fail, and the list is not known any more.
/// One that fails may have met a change.
const FAILURES: u32 = 4;

/// The list of one boot.
pub(super) struct Modules {
    list: ModuleList,
    /// As it was written down last.
    last: Option<ModuleLook>,
    looked: Option<Instant>,
    failures: u32,
}

impl Modules {
    /// Of a guest whose kernel tells where the list is. Without it, code in the
    /// module area is told apart by symbols alone.
    pub(super) fn of(ram: &dyn GuestRam, guest: &Guest) -> Option<Self> {
        let list = Btf::of(ram, &guest.kernel, &guest.symbols)
            .map_err(ModulesError::from)
            .and_then(|btf| ModuleList::of(&guest.kernel, &guest.symbols, &btf));
        match list {
            Ok(list) => Some(Self {
                list,
                last: None,
                looked: None,
                failures: 0,
            }),
            Err(why) => {
                log::info!("code of the guest's modules is told by symbols alone: {why}");
                None
            }
        }
    }

    /// Looks, if it is time to. The list where it has changed, `None` in it where it
    /// can be read no more.
    fn look(&mut self, ram: &dyn GuestRam, boot: u32, since: u64) -> Option<ModuleLook> {
        if self.looked.is_some_and(|at| at.elapsed() < LOOK_EVERY) {
            return None;
        }
        self.looked = Some(Instant::now());
        let modules = match self.list.read(ram) {
            Ok(modules) => {
                self.failures = 0;
                Some(modules.iter().map(Listed::from).collect())
            }
            Err(error) => {
                self.failures = self.failures.saturating_add(1);
                if self.failures < FAILURES {
                    return None;
                }
                if self.failures == FAILURES {
                    log::warn!("{error}");
                }
                None
            }
        };
        let known = self.last.as_ref().map(|last| &last.modules);
        if known == Some(&modules) {
            return None;
        }
        let look = ModuleLook {
            boot,
            since,
            modules,
        };
        self.last = Some(look.clone());
        Some(look)
    }
}

impl Trace {
    /// Notes the guest's list of modules where it has changed. A guest that has
    /// gone silent may be none any more.
    pub(super) fn look_at_modules(&mut self, watch: &Watch) {
        let Some(live) = &mut self.live else { return };
        if watch.silent() > HOLD_AFTER {
            return;
        }
        let clock = match &live.plain {
            Some(plain) => plain.clocks.pairs().map(|(_, last)| last.guest_ns),
            None => watch.heartbeat().map(|beat| beat.clock),
        };
        let boot = self.writer.meta.boots.last().map_or(1, |boot| boot.number);
        let look = live
            .modules
            .as_mut()
            .zip(clock)
            .and_then(|(modules, clock)| modules.look(&*self.ram, boot, clock));
        let Some(look) = look else { return };
        match self.writer.modules(&look) {
            Ok(true) => self.judging.modules(look),
            // Nothing is known from here on, to those who judge as little as on disk.
            Ok(false) => {
                live.modules = None;
                self.judging.modules(ModuleLook {
                    modules: None,
                    ..look
                });
            }
            Err(error) => self.cannot_store(&error),
        }
    }
}
