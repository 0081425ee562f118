//! Which load of a module is which, and whose symbols are to be read.
//!
//! A load is what a module is from one look at the list to the next, as long as
//! nothing of it changes: not where it lies, nor where its table of symbols is. Its
//! symbols are read once. A module that starts is two loads, of which the second
//! has the smaller table that stays.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use crate::kernel::{Gva, KallsymsError, Module, ModuleFunctions};
use crate::session::{Listed, ModuleSymbols};

use super::super::rest::Rest;

/// How often a module's symbols are tried where they cannot be read,
const TRIES: u32 = 5;
/// and how long after the last time. A module that starts, or goes, is soon done.
const AGAIN: Duration = Duration::from_millis(100);
/// The loads of one boot's modules.
#[derive(Default)]
pub(super) struct Loads {
    /// The modules that were on the list last, with the numbers of their loads, by
    /// where their structures are.
    known: HashMap<Gva, (Module, u32)>,
    /// Those whose symbols are to be read.
    unread: VecDeque<Unread>,
    /// Until when no symbols are read, for others to have their share.
    rest: Rest,
    /// No symbols are read: the kernel has none, or the session no room.
    nameless: bool,
}

/// A load whose symbols are to be read.
pub(super) struct Unread {
    pub(super) module: Module,
    load: u32,
    tries: u32,
    after: Option<Instant>,
}

impl Loads {
    /// From now on, no symbols are read.
    pub(super) fn read_no_symbols(&mut self) {
        self.nameless = true;
        self.unread.clear();
    }

    /// Gives each module of a list the number of its load; `number` gives those
    /// that are new.
    pub(super) fn numbered(
        &mut self,
        modules: Vec<Module>,
        mut number: impl FnMut() -> u32,
    ) -> Vec<Listed> {
        let mut before = std::mem::take(&mut self.known);
        let mut listed = Vec::with_capacity(modules.len());
        for module in modules {
            let known = before.remove(&module.at);
            let load = match known.filter(|(known, _)| *known == module) {
                Some((_, load)) => load,
                None => {
                    let load = number();
                    if !self.nameless {
                        self.unread.push_back(Unread {
                            module: module.clone(),
                            load,
                            tries: 0,
                            after: None,
                        });
                    }
                    load
                }
            };
            listed.push(Listed::new(&module, load));
            self.known.insert(module.at, (module, load));
        }
        // What has gone, or has changed, is not read any more.
        let known = &self.known;
        self.unread.retain(|unread| {
            let now = known.get(&unread.module.at);
            now.is_some_and(|(_, load)| *load == unread.load)
        });
        listed
    }

    /// The load whose turn it is to have its symbols read, if it is time to.
    pub(super) fn turn(&mut self, now: Instant) -> Option<Unread> {
        if !self.rest.is_over(now) {
            return None;
        }
        let unread = self.unread.pop_front()?;
        if unread.after.is_some_and(|after| now < after) {
            self.unread.push_back(unread);
            return None;
        }
        Some(unread)
    }

    /// What came of that, in the time from `begun` to `now`: the load's line, unless
    /// it is to be tried again.
    pub(super) fn done(
        &mut self,
        mut unread: Unread,
        read: Result<ModuleFunctions, KallsymsError>,
        (begun, now): (Instant, Instant),
    ) -> Option<ModuleSymbols> {
        self.rest.after((begun, now));
        unread.tries += 1;
        let (load, name) = (unread.load, unread.module.name.as_str());
        match read {
            Ok(read) => Some(ModuleSymbols::read(load, name, read)),
            Err(why) if why.may_pass() && unread.tries < TRIES => {
                unread.after = now.checked_add(AGAIN);
                self.unread.push_back(unread);
                None
            }
            Err(why) => Some(ModuleSymbols::unread(load, name, why.to_string())),
        }
    }

    /// Nobody else has to have a share any more: all that is left may be read at
    /// once. Whether anything is.
    pub(super) fn hurry(&mut self) -> bool {
        self.rest.end();
        self.unread
            .iter_mut()
            .for_each(|unread| unread.after = None);
        !self.unread.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(at: u64, name: &str, code: u64) -> Module {
        Module {
            name: name.to_owned(),
            at: Gva(at),
            code: vec![Gva(code)..Gva(code + 0x1000)],
            memory: Vec::new(),
            kallsyms: None,
        }
    }

    /// The numbers of these modules' loads.
    fn numbers(loads: &mut Loads, last: &mut u32, modules: &[Module]) -> Vec<u32> {
        let listed = loads.numbered(modules.to_vec(), || {
            *last += 1;
            *last
        });
        listed.iter().map(|listed| listed.load).collect()
    }

    fn read(unread: &Unread) -> Result<ModuleFunctions, KallsymsError> {
        Ok(ModuleFunctions {
            functions: vec![(unread.module.code[0].start, "f".to_owned())],
            refused: 0,
        })
    }

    #[test]
    fn a_load_keeps_its_number_until_it_changes_and_is_read_once() {
        let (mut loads, mut last) = (Loads::default(), 0);
        let (one, two) = (module(1, "one", 0x1000), module(2, "two", 0x8000));
        assert_eq!(
            numbers(&mut loads, &mut last, &[two.clone(), one.clone()]),
            [1, 2]
        );
        assert_eq!(
            numbers(&mut loads, &mut last, &[two.clone(), one.clone()]),
            [1, 2]
        );
        let now = Instant::now();
        let mut names = Vec::new();
        while let Some(unread) = loads.turn(now) {
            let functions = read(&unread);
            names.extend(loads.done(unread, functions, (now, now)));
        }
        let names: Vec<_> = names
            .iter()
            .map(|read| (read.load, read.name.as_str()))
            .collect();
        assert_eq!(names, [(1, "two"), (2, "one")]);

        // Other code at the same place, and what was gone in between.
        let moved = module(1, "one", 0x2000);
        assert_eq!(
            numbers(&mut loads, &mut last, &[two.clone(), moved.clone()]),
            [1, 3]
        );
        assert_eq!(numbers(&mut loads, &mut last, &[moved]), [3]);
        assert_eq!(numbers(&mut loads, &mut last, &[two, one]), [4, 5]);
        // The second had not been read when it had gone again.
        let left: Vec<u32> = loads.unread.iter().map(|unread| unread.load).collect();
        assert_eq!(left, [4, 5]);

        loads.read_no_symbols();
        assert_eq!(numbers(&mut loads, &mut last, &[module(9, "x", 0)]), [6]);
        assert!(loads.turn(now).is_none() && !loads.hurry());
    }

    #[test]
    fn reading_rests_nine_times_as_long_as_it_takes() {
        let (mut loads, mut last) = (Loads::default(), 0);
        let modules = [module(1, "one", 0x1000), module(2, "two", 0x8000)];
        numbers(&mut loads, &mut last, &modules);
        let begun = Instant::now();
        let took = Duration::from_millis(20);
        let unread = loads.turn(begun).expect("the first");
        let functions = read(&unread);
        let done = begun + took;
        assert!(loads.done(unread, functions, (begun, done)).is_some());
        assert!(loads.turn(done).is_none());
        assert!(loads.turn(done + took * 8).is_none());
        let second = loads.turn(done + took * 9).expect("the second");
        assert_eq!(second.load, 2);
        // At the end of the trace nothing rests.
        loads.done(
            second,
            Err(KallsymsError::Changed(String::new())),
            (begun, done),
        );
        assert!(loads.turn(done).is_none());
        assert!(loads.hurry());
        assert!(loads.turn(done).is_some());
    }

    #[test]
    fn what_cannot_be_read_is_tried_again_for_a_while_and_then_told() {
        let (mut loads, mut last) = (Loads::default(), 0);
        numbers(&mut loads, &mut last, &[module(1, "one", 0x1000)]);
        let mut now = Instant::now();
        for _ in 1..TRIES {
            let unread = loads.turn(now).expect("a try");
            let none = Err(KallsymsError::None("one".to_owned()));
            assert_eq!(loads.done(unread, none, (now, now)), None);
            assert!(loads.turn(now + AGAIN / 2).is_none());
            now += AGAIN;
        }
        let unread = loads.turn(now).expect("the last try");
        let none = Err(KallsymsError::None("one".to_owned()));
        let told = loads.done(unread, none, (now, now)).expect("a line");
        assert_eq!((told.load, told.functions), (1, Vec::new()));
        assert!(told.unread.is_some_and(|why| why.contains("one")));
        assert!(!loads.hurry());

        // What will not pass is told at once.
        numbers(&mut loads, &mut last, &[module(2, "two", 0x1000)]);
        let unread = loads.turn(now).expect("a try");
        let spread = Err(KallsymsError::Spread("two".to_owned()));
        assert!(loads.done(unread, spread, (now, now)).is_some());
    }
}
