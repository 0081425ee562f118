//! The guest's own list of modules, as it was while the guest was traced.
//!
//! The helper reads the list out of guest memory a few times a second
//! ([`crate::kernel::ModuleList`]), and writes it down whenever it has changed,
//! with the guest's time: `modules.jsonl`, a line each. From that, code in the
//! module area can be told apart: a module of the list, or something that the
//! list does not show.
//!
//! It is the guest's word, and worth what that is worth. A module that stays on
//! the list is on it; one that takes itself off the list is what this shows.
//!
//! **Around a change nothing is told.** A module that starts has code that is
//! gone when it has started, which no look may have seen, and looks come some
//! time after what they tell. So for [`UNSURE_NS`] before and behind a change,
//! code that is on neither list is neither listed nor unlisted. Nor is it where
//! nobody looked for longer than that, as on a host that is overloaded: a module may
//! have come and gone ([`ModuleLook::unseen_since`]).
//!
//! What the functions of a module are called is read once for each time that it
//! was loaded, and noted beside the list: `module-symbols.jsonl`, which [`names`]
//! gives names by. The two files are put together by the number of the load.

mod lines;
mod names;

pub use lines::ModulesReader;
pub use names::{GuestName, ModuleNames, ModuleSymbols};

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{SessionError, MODULES_FILE};
use crate::kernel::{Gva, Module};
use lines::LineReader;

/// How large the file may become, bytes: a guest can change its list as often as
/// it likes.
pub(super) const MODULES_LIMIT: u64 = 4 << 20;
/// The same of the file with their symbols. All modules of a machine that has many
/// take a few MiB.
pub(super) const SYMBOLS_LIMIT: u64 = 32 << 20;
/// How long before and behind a change nothing is told, of the guest's clock.
pub const UNSURE_NS: u64 = 1_000_000_000;
/// The most looks that are gone through for one address. Ten a second are made; more
/// of them come together only where the guest's clock stands still.
const MOST_LOOKS: usize = 64;

/// A module of the list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listed {
    /// Its name, escaped.
    pub name: String,
    /// Where its code lies: runtime addresses, each from and to.
    pub code: Vec<(u64, u64)>,
    /// Which load of a module it is: a number that each has to itself in its
    /// session, from 1. Sessions of before there were numbers have 0.
    #[serde(default)]
    pub load: u32,
}

impl Listed {
    fn has(&self, at: Gva) -> bool {
        self.code.iter().any(|&(from, to)| {
            Range {
                start: from,
                end: to,
            }
            .contains(&at.0)
        })
    }
}

impl Listed {
    /// A module that was read out of the guest's memory, by the number of its load.
    pub fn new(module: &Module, load: u32) -> Self {
        let code = module.code.iter();
        Self {
            name: module.name.clone(),
            code: code.map(|range| (range.start.0, range.end.0)).collect(),
            load,
        }
    }
}

/// The list from some time on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModuleLook {
    /// The guest's boot, from 1.
    pub boot: u32,
    /// Since when it is known, guest trace clock, nanoseconds.
    pub since: u64,
    /// Where the look before was more than [`UNSURE_NS`] ago, when that was, guest
    /// trace clock: the list may have changed since, more than once, and be what it
    /// was again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unseen_since: Option<u64>,
    /// The modules; none where the list could not be read any more.
    pub modules: Option<Vec<Listed>>,
}

impl ModuleLook {
    /// From when on what it tells may have come to pass.
    fn after(&self) -> u64 {
        self.unseen_since
            .map_or(self.since, |seen| seen.min(self.since))
    }
}

/// What the lists tell of code at a runtime address, at a time of the guest's clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ListTells {
    /// Whether it was a listed module's; `None` where that cannot be told.
    pub listed: Option<bool>,
    /// Whether it is told of any code then: the list stood still around that time.
    pub of_all: bool,
}

/// The lists of a session, in their order.
#[derive(Clone, Debug, Default)]
pub struct ModuleHistory(BTreeMap<u32, Vec<ModuleLook>>);

impl ModuleHistory {
    /// Adds the list as it is from now on. A guest whose clock goes back changes
    /// nothing of what was noted before.
    pub fn push(&mut self, mut look: ModuleLook) {
        let looks = self.0.entry(look.boot).or_default();
        if let Some(last) = looks.last() {
            look.since = look.since.max(last.since);
            look.unseen_since = look.unseen_since.map(|seen| seen.max(last.since));
        }
        looks.push(look);
    }

    /// Whether there is no list at all: none that could be read.
    pub fn is_empty(&self) -> bool {
        let mut looks = self.0.values().flatten();
        !looks.any(|look| look.modules.is_some())
    }

    /// What is told of code at a runtime address, at that time of the guest's clock.
    pub fn tells(&self, boot: u32, at: Gva, time: u64) -> ListTells {
        let from = time.saturating_sub(UNSURE_NS);
        let held = self.held(boot, from, time.saturating_add(UNSURE_NS));
        let of_all = matches!(held, [only] if only.since <= from && only.modules.is_some());
        let has = |look: &ModuleLook| look.modules.iter().flatten().any(|module| module.has(at));
        let listed = match held.iter().any(has) {
            true => Some(true),
            false => of_all.then_some(false),
        };
        ListTells { listed, of_all }
    }

    /// The look that held at the beginning of a time, and all that came until its end;
    /// none where these are too many to go through.
    fn held(&self, boot: u32, from: u64, to: u64) -> &[ModuleLook] {
        let looks = self.0.get(&boot).map_or(&[][..], Vec::as_slice);
        let first = looks.partition_point(|look| look.since <= from);
        let end = looks.partition_point(|look| look.after() <= to);
        let held = looks.get(first.saturating_sub(1)..end);
        held.filter(|held| held.len() <= MOST_LOOKS).unwrap_or(&[])
    }

    /// Those of the session in this directory. A last line that is not finished is
    /// left out.
    pub(super) fn load(dir: &Path) -> Result<Self, SessionError> {
        let mut history = Self::default();
        LineReader::new(dir, MODULES_FILE, MODULES_LIMIT).read_on(|look| history.push(look))?;
        Ok(history)
    }

    /// The highest number that a load has.
    pub(super) fn last_load(&self) -> u32 {
        let looks = self.0.values().flatten();
        let listed = looks.flat_map(|look| look.modules.iter().flatten());
        listed.map(|module| module.load).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = UNSURE_NS;
    const EXT4: u64 = 0xffff_ffff_c010_0040;
    const OTHER: u64 = 0xffff_ffff_c020_0000;

    fn look(since: u64, names: Option<&[(&str, u64)]>) -> ModuleLook {
        let listed = |&(name, at): &(&str, u64)| Listed {
            name: name.to_owned(),
            code: vec![(at & !0xfff, at | 0xfff)],
            load: 0,
        };
        ModuleLook {
            boot: 1,
            since: since * SECOND,
            unseen_since: None,
            modules: names.map(|names| names.iter().map(listed).collect()),
        }
    }

    #[test]
    fn code_is_listed_while_its_module_is() {
        let mut history = ModuleHistory::default();
        history.push(look(10, Some(&[("ext4", EXT4)])));
        history.push(look(20, Some(&[("ext4", EXT4), ("other", OTHER)])));
        history.push(look(30, Some(&[("ext4", EXT4)])));
        history.push(look(40, None));
        let listed = |at, second: u64| history.tells(1, Gva(at), second * SECOND).listed;
        for (second, ext4, other) in [
            // Before the first look nothing is known of what is not on it.
            (5, None, None),
            (10, Some(true), None),
            (15, Some(true), Some(false)),
            // Around a change, a module may be on its way.
            (19, Some(true), Some(true)),
            (25, Some(true), Some(true)),
            (30, Some(true), Some(true)),
            (35, Some(true), Some(false)),
            // Nor is anything known once it could not be read.
            (45, None, None),
        ] {
            let told = (listed(EXT4, second), listed(OTHER, second));
            assert_eq!(told, (ext4, other), "after {second} s");
        }
        // What is listed is told of all the while, and yet nothing of what is not.
        for (second, of_all) in [(5, false), (15, true), (20, false), (25, true), (45, false)] {
            let told = history.tells(1, Gva(EXT4), second * SECOND);
            assert_eq!(told.of_all, of_all, "after {second} s");
        }
        // What starts is on no list, and gone when the list has changed.
        let init = OTHER + 0x5000;
        assert_eq!(listed(init, 18), Some(false));
        assert_eq!(listed(init, 19), None);
        assert_eq!(listed(init, 20), None);
        assert_eq!(listed(init, 22), Some(false));
        assert_eq!(
            history.tells(2, Gva(EXT4), 15 * SECOND),
            ListTells::default()
        );
    }

    #[test]
    fn nothing_is_told_of_a_time_when_nobody_looked() {
        let mut history = ModuleHistory::default();
        history.push(look(10, Some(&[("ext4", EXT4)])));
        history.push(ModuleLook {
            unseen_since: Some(20 * SECOND),
            ..look(25, Some(&[("ext4", EXT4)]))
        });
        for (second, ext4, other) in [
            (18, Some(true), Some(false)),
            (19, Some(true), None),
            (22, Some(true), None),
            (25, Some(true), None),
            (26, Some(true), Some(false)),
        ] {
            let listed = |at| history.tells(1, Gva(at), second * SECOND).listed;
            let told = (listed(EXT4), listed(OTHER));
            assert_eq!(told, (ext4, other), "after {second} s");
        }
    }

    #[test]
    fn a_clock_that_stands_still_makes_no_work() {
        let mut history = ModuleHistory::default();
        let listed = |history: &ModuleHistory| history.tells(1, Gva(EXT4), 20 * SECOND).listed;
        for _ in 0..MOST_LOOKS {
            history.push(look(20, Some(&[("ext4", EXT4)])));
        }
        assert_eq!(listed(&history), Some(true));
        assert!(!history.tells(1, Gva(EXT4), 20 * SECOND).of_all);
        history.push(look(20, Some(&[("ext4", EXT4)])));
        assert_eq!(listed(&history), None);
    }

    #[test]
    fn a_list_that_could_never_be_read_is_none() {
        let mut history = ModuleHistory::default();
        assert!(history.is_empty());
        history.push(look(10, None));
        assert!(history.is_empty());
        history.push(look(20, Some(&[])));
        history.push(look(30, None));
        assert!(!history.is_empty());
    }

    #[test]
    fn a_clock_that_goes_back_and_made_up_ranges_break_nothing() {
        let mut history = ModuleHistory::default();
        history.push(look(20, Some(&[("ext4", EXT4)])));
        history.push(look(10, Some(&[])));
        let mut odd = look(30, Some(&[("odd", EXT4)]));
        odd.unseen_since = Some(u64::MAX);
        odd.modules.iter_mut().flatten().for_each(|module| {
            module.code = vec![(u64::MAX, 0), (5, 5)];
        });
        history.push(odd);
        for time in [0, 15 * SECOND, 20 * SECOND, u64::MAX] {
            history.tells(1, Gva(EXT4), time);
        }
        let told = history.tells(1, Gva(EXT4), 25 * SECOND).listed;
        assert_eq!(told, Some(false));
    }
}
