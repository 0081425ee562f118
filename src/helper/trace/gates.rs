//! Whether the guest's ring takes records while a trace is on: its gates, looked at ten
//! times a second.
//!
//! **The kernel shuts gates itself**, for a moment: the buffer's count while it empties or
//! resizes the buffer (tracing_reset_online_cpus(), kernel/trace/trace.c, waits for a grace
//! period of RCU meanwhile), that of a CPU's part while a snapshot swaps it. A grace period
//! ends within some tens of milliseconds, under load within a few hundred; no record is made
//! meanwhile, and no hook is hidden for long. So a gate has to be shut at each look for
//! [`STAYS`], while the guest's heart beats. The switch is another matter: the kernel
//! turns it for nobody but who asks for it.
//!
//! What a CPU shuts for each record that it makes says nothing as long as records of it
//! come in.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::time::{Duration, Instant};

use crate::kernel::btf::{Btf, BtfError};
use crate::kernel::gates::{self, describe, Gate, GateKind, GatesError};
use crate::kernel::stock::TraceArray;
use crate::ram::GuestRam;
use crate::session::FindingKind;

use super::super::ratelimit::RateLimit;
use super::super::rest::Rest;
use super::super::watch::{Guest, Watch};
use super::{Trace, SUSPECT_AFTER};

/// How often they are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How long one look may take. Two CPUs take some microseconds.
const BUDGET: Duration = Duration::from_millis(20);
/// How long a gate has to be shut, and at how many looks in a row at least.
const STAYS: Duration = Duration::from_secs(3);
const LOOKS: u32 = 10;
/// Looks that are further apart say nothing of the time between them.
const APART: Duration = Duration::from_secs(1);
/// So many looks one after another that fail, and nothing is known of the gates.
const FAILURES: u32 = 10;
/// How long it goes untold again; what is new, and what has come again.
const TELL_EVERY: Duration = Duration::from_secs(60);
const TELL_NEW: Duration = Duration::from_secs(1);

/// A gate that is shut.
struct Shut {
    since: Instant,
    looks: u32,
}

/// The gates of one boot.
pub(super) struct Gates {
    /// Where they are, if that is known.
    at: Option<gates::Gates>,
    /// Those that were shut at each look so far, since when.
    shut: BTreeMap<Gate, Shut>,
    /// CPUs that gave records since the last look.
    gave: HashSet<u16>,
    looked: Option<Instant>,
    seen: Option<Instant>,
    rest: Rest,
    failures: u32,
    /// Since when the guest says that its ring takes no records.
    says_off: Option<Instant>,
    /// What was told since it last took records.
    told: Option<BTreeSet<Gate>>,
    told_at: Option<Instant>,
    said: RateLimit,
}

impl Gates {
    /// Of the trace array that is traced; in mode keyed that is the global one. What
    /// cannot be looked at, the log names.
    pub(super) fn of(
        guest: &Guest,
        btf: Result<&Btf, &BtfError>,
        array: Option<&TraceArray>,
    ) -> Self {
        let at = match btf {
            Ok(btf) => {
                let array = array.map(TraceArray::address);
                gates::Gates::of(&guest.kernel, &guest.symbols, btf, array)
                    .map_err(|error| error.to_string())
            }
            Err(error) => Err(error.to_string()),
        };
        match &at {
            Ok(at) => {
                for unseen in at.unseen() {
                    log::warn!(
                        "the guest can keep records out of its trace buffer unseen: {unseen}"
                    );
                }
            }
            Err(why) => log::warn!(
                "whether the guest's trace buffer takes records is known by the guest's word \
                 alone: {why}"
            ),
        }
        Self::at(at.ok())
    }

    fn at(at: Option<gates::Gates>) -> Self {
        Self {
            at,
            shut: BTreeMap::new(),
            gave: HashSet::new(),
            looked: None,
            seen: None,
            rest: Rest::default(),
            failures: 0,
            says_off: None,
            told: None,
            told_at: None,
            said: RateLimit::new(3, Duration::from_secs(60)),
        }
    }

    /// That CPU gave records.
    pub(super) fn gave(&mut self, cpu: u16) {
        self.gave.insert(cpu);
    }

    /// What was seen says nothing of what comes: the guest is at a command, or silent.
    pub(super) fn forget(&mut self) {
        self.shut.clear();
        self.says_off = None;
    }

    /// Looks, if it is time to.
    fn look(&mut self, ram: &dyn GuestRam, cpus: u32) {
        let begun = Instant::now();
        let soon = |at: Instant| begun.saturating_duration_since(at) < LOOK_EVERY;
        let Some(at) = &self.at else { return };
        if self.looked.is_some_and(soon) || !self.rest.is_over(begun) {
            return;
        }
        self.looked = Some(begun);
        let shut = at.shut(ram, cpus, BUDGET);
        self.rest.after((begun, Instant::now()));
        self.note(shut, begun);
    }

    /// Notes what a look came to.
    fn note(&mut self, shut: Result<BTreeSet<Gate>, GatesError>, now: Instant) {
        let shut = match shut {
            Ok(shut) => shut,
            Err(error) => {
                self.failures = self.failures.saturating_add(1);
                if self.failures == FAILURES {
                    if let Some(again) = self.said.say() {
                        log::warn!(
                            "{error}; whether it takes records is known by the guest's word \
                             alone for now{again}"
                        );
                    }
                }
                return;
            }
        };
        self.failures = 0;
        let apart = |seen| now.saturating_duration_since(seen) > APART;
        if self.seen.replace(now).is_some_and(apart) {
            self.shut.clear();
        }
        let gave = std::mem::take(&mut self.gave);
        let works = |gate: &Gate| {
            gate.kind.shuts_for_records() && gate.cpu.is_some_and(|cpu| gave.contains(&cpu))
        };
        self.shut.retain(|gate, _| shut.contains(gate));
        for gate in shut {
            if works(&gate) {
                self.shut.remove(&gate);
                continue;
            }
            let known = self.shut.entry(gate).or_insert(Shut {
                since: now,
                looks: 0,
            });
            known.looks = known.looks.saturating_add(1);
        }
    }

    /// What keeps the ring from taking records now, where that is more than a moment; an
    /// empty set where nothing tells what. `says_on` is what the guest says.
    fn off(&mut self, says_on: bool, now: Instant) -> Option<BTreeSet<Gate>> {
        let stays = |since: Instant, time| now.saturating_duration_since(since) >= time;
        let lasts = |shut: &Shut, time| shut.looks >= LOOKS && stays(shut.since, time);
        let any = self.shut.values().any(|shut| lasts(shut, STAYS));
        let lasting = self.shut.iter().filter(|(gate, shut)| {
            // What was shut with it is told with it, though it was seen somewhat later.
            gate.kind == GateKind::Switch || (any && lasts(shut, STAYS / 2))
        });
        let lasting: BTreeSet<Gate> = lasting.map(|(gate, _)| *gate).collect();
        if says_on {
            self.says_off = None;
        }
        // The guest may say so before a look shows why, which is to be told with it.
        let said = !says_on && stays(*self.says_off.get_or_insert(now), 2 * STAYS);
        let blind = self.at.is_none() || self.failures >= FAILURES;
        let off = !lasting.is_empty() || said || (!says_on && blind);
        off.then_some(lasting)
    }

    /// What is to be told now.
    fn news(&mut self, says_on: bool, now: Instant) -> Option<FindingKind> {
        let Some(off) = self.off(says_on, now) else {
            self.told = None;
            return None;
        };
        let known = self.told.as_ref();
        let is_new = known.is_none_or(|told| !off.is_subset(told));
        let wait = if is_new { TELL_NEW } else { TELL_EVERY };
        let soon = |at| now.saturating_duration_since(at) < wait;
        if self.told_at.is_some_and(soon) {
            return None;
        }
        self.told_at = Some(now);
        let gate = (!off.is_empty()).then(|| describe(&off));
        self.told = Some(off);
        Some(FindingKind::RecordingOff { gate })
    }
}

impl Trace {
    /// Looks at what keeps records out of the guest's ring, if it is time to, and tells
    /// what is to be told of it now. `says_on` is what the guest says; none while that
    /// cannot be told.
    pub(in crate::helper) fn recording_off(
        &mut self,
        watch: &Watch,
        says_on: Option<bool>,
    ) -> Option<FindingKind> {
        let live = self.live.as_mut()?;
        let Some(says_on) = says_on.filter(|_| watch.silent() <= SUSPECT_AFTER) else {
            live.gates.forget();
            return None;
        };
        live.gates.look(&*self.ram, live.reader.nr_cpus());
        live.gates.news(says_on, Instant::now())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COUNT: Gate = Gate {
        kind: GateKind::Count,
        cpu: None,
    };
    const SWITCH: Gate = Gate {
        kind: GateKind::Switch,
        cpu: None,
    };
    const DISABLED: Gate = Gate {
        kind: GateKind::Disabled,
        cpu: Some(1),
    };

    /// Looks so long at gates of which these are shut, ten times a second. What was told,
    /// and after which time.
    fn looks(
        gates: &mut Gates,
        now: &mut Instant,
        time: Duration,
        shut: &[Gate],
        says_on: bool,
    ) -> Vec<(Duration, Option<String>)> {
        let begun = *now;
        let mut told = Vec::new();
        while *now < begun + time {
            gates.note(Ok(shut.iter().copied().collect()), *now);
            if let Some(FindingKind::RecordingOff { gate }) = gates.news(says_on, *now) {
                told.push((*now - begun, gate));
            }
            *now += LOOK_EVERY;
        }
        told
    }

    /// Gates that can be looked at: nothing here reads memory.
    fn known() -> Gates {
        let mut btf = crate::kernel::btf::build::Builder::new();
        let members = [("buffer", 0, 8), ("data", 8, 8)];
        let inner = btf.words("array_buffer", 16, &members);
        btf.structure("trace_array", 16, &[("array_buffer", inner, 0)]);
        btf.words(
            "trace_buffer",
            16,
            &[("record_disabled", 0, 4), ("buffers", 8, 8)],
        );
        let tables = crate::kernel::PageTables {
            root: crate::ram::Gpa(0),
            levels: 4,
        };
        let text = crate::kernel::Gva(0xffff_ffff_8100_0000);
        let kernel = crate::kernel::Kernel::made_up(crate::ram::Gpa(0), text, 1 << 20, tables);
        let symbols = format!(
            "{0:x} T _text\n{0:x} T _stext\n{1:x} T _etext\n",
            text.0,
            text.0 + 8
        );
        let symbols = crate::kernel::Symbols::parse(symbols.into_bytes()).expect("symbols");
        let found = gates::Gates::of(&kernel, &symbols, &btf.parse(), Some(text));
        Gates::at(Some(found.expect("gates")))
    }

    #[test]
    fn a_gate_that_is_shut_for_a_moment_is_none_that_is_told() {
        let (mut gates, mut now) = (known(), Instant::now());
        for _ in 0..20 {
            let moment = Duration::from_millis(2900);
            assert_eq!(looks(&mut gates, &mut now, moment, &[COUNT], false), []);
            let open = looks(&mut gates, &mut now, LOOK_EVERY, &[], true);
            assert_eq!(open, []);
        }
        // Two looks at it say nothing of the time between them.
        for _ in 0..20 {
            now += APART;
            assert_eq!(looks(&mut gates, &mut now, LOOK_EVERY, &[COUNT], true), []);
        }
        // Nor do those before the guest was at a command.
        for _ in 0..5 {
            gates.forget();
            let moment = Duration::from_millis(2900);
            assert_eq!(looks(&mut gates, &mut now, moment, &[COUNT], false), []);
        }
    }

    #[test]
    fn a_gate_that_stays_shut_is_told_with_its_name_and_again_each_minute() {
        let (mut gates, mut now) = (known(), Instant::now());
        let time = Duration::from_secs(70);
        let told = looks(&mut gates, &mut now, time, &[COUNT], true);
        let at: Vec<u64> = told.iter().map(|(at, _)| at.as_secs()).collect();
        assert_eq!(at, [3, 63]);
        let gate = told[0].1.as_deref().expect("its name");
        assert!(gate.contains("count of those who want it off"), "{gate}");
        // Also where the guest says so before a look shows it.
        let mut early = known();
        assert_eq!(early.news(false, now), None);
        let told = looks(
            &mut early,
            &mut now,
            Duration::from_secs(5),
            &[COUNT],
            false,
        );
        let [(at, Some(_))] = &told[..] else {
            panic!("{told:?}");
        };
        assert_eq!(*at, STAYS);
        // Another one besides.
        let both = [COUNT, DISABLED];
        let told = looks(&mut gates, &mut now, Duration::from_secs(5), &both, true);
        let [(_, Some(gate))] = &told[..] else {
            panic!("{told:?}");
        };
        assert!(gate.contains("trace_array_cpu): CPU 1"), "{gate}");
    }

    #[test]
    fn a_cpu_that_gives_records_is_not_kept_from_it() {
        let (mut gates, mut now) = (known(), Instant::now());
        for _ in 0..100 {
            gates.gave(1);
            let told = looks(&mut gates, &mut now, LOOK_EVERY, &[DISABLED], true);
            assert_eq!(told, []);
        }
        // Shut at the moment of its last record, with another one.
        let part = Gate {
            kind: GateKind::CpuCount,
            ..DISABLED
        };
        let mut both = known();
        both.gave(1);
        let time = Duration::from_secs(10);
        let told = looks(&mut both, &mut now, time, &[part, DISABLED], true);
        let [(_, Some(gate))] = &told[..] else {
            panic!("{told:?}");
        };
        assert!(gate.contains("trace_array_cpu"), "{gate}");
        gates.gave(0);
        let time = Duration::from_secs(4);
        assert_eq!(
            looks(&mut gates, &mut now, time, &[DISABLED], true).len(),
            1
        );
        // What no record shuts means what it says.
        let mut told = 0;
        for _ in 0..40 {
            gates.gave(1);
            told += looks(&mut gates, &mut now, LOOK_EVERY, &[part], true).len();
        }
        assert_eq!(told, 1);
    }

    #[test]
    fn the_switch_is_told_at_once_and_not_as_often_as_it_is_turned() {
        let (mut gates, mut now) = (known(), Instant::now());
        let time = Duration::from_secs(2);
        let told = looks(&mut gates, &mut now, time, &[SWITCH], false);
        assert_eq!(told.len(), 1, "{told:?}");
        assert_eq!(told[0].0, Duration::ZERO);
        let mut told = 0;
        for _ in 0..50 {
            told += looks(&mut gates, &mut now, LOOK_EVERY, &[SWITCH], true).len();
            told += looks(&mut gates, &mut now, LOOK_EVERY, &[], true).len();
        }
        assert!((9..=10).contains(&told), "{told}");
    }

    #[test]
    fn the_guest_s_word_counts_at_once_where_nothing_else_is_known() {
        let time = Duration::from_secs(4);
        let (mut blind, mut now) = (Gates::at(None), Instant::now());
        let told = looks(&mut blind, &mut now, time, &[], false);
        assert_eq!(told, [(Duration::ZERO, None)]);
        // Where all gates are open, it may be a moment that has passed.
        let (mut gates, mut now) = (known(), Instant::now());
        let told = looks(&mut gates, &mut now, time, &[], false);
        assert_eq!(told, []);
        let told = looks(&mut gates, &mut now, time, &[], false);
        assert_eq!(told, [(2 * STAYS - time, None)]);
        // A guest that spoils the way to its gates is as good as one without.
        let mut gates = known();
        for _ in 0..FAILURES {
            assert_eq!(gates.news(false, now), None);
            gates.note(Err(GatesError::Symbol("x")), now);
        }
        let told = gates.news(false, now);
        assert_eq!(told, Some(FindingKind::RecordingOff { gate: None }));
    }
}
