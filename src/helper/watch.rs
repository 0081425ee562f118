//! Which kernel runs in the guest now, and does it live?
//!
//! After a reboot inside the same QEMU, the old kernel's image may still lie
//! in memory, whole; and a hostile guest can plant as many as it likes. What
//! tells the one that runs is that its heart beats: the count in its control
//! block grows, or, in a kernel without the patch, its count of ticks. So a
//! kernel is taken only once two looks at it differ; see [`super::candidates`]
//! for when more than one of them lives.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::kernel::control::Heartbeat;
use crate::kernel::{find_all, Kernel, Symbols};
use crate::ram::{Gpa, GuestRam, RamError};
use crate::session::ClockPair;

use super::candidates::Candidates;
use super::clocks::Clocks;
use super::link::{Link, Pulse};
use super::sources::{Fitting, Sources};

/// How often memory is searched for a kernel; less often where that takes
/// longer, so that a guest cannot make it our only work.
const SEARCH_EVERY: Duration = Duration::from_millis(250);
/// A heart that stands still for longer may have stopped: search again.
const SILENT: Duration = Duration::from_secs(2);
/// A heart that beat within this time is alive: guest memory may be written.
const FRESH: Duration = Duration::from_millis(400);

/// A kernel that lives.
#[derive(Clone, Debug)]
pub(super) struct Guest {
    pub(super) kernel: Kernel,
    pub(super) link: Link,
    pub(super) symbols: Arc<Symbols>,
    pub(super) symbols_path: PathBuf,
}

/// Whether guest memory is the found kernel's now; asked by everyone who
/// writes there, from any thread.
#[derive(Debug)]
pub(super) struct Liveness {
    started: Instant,
    /// When the heart last beat, nanoseconds after `started`, plus 1; 0 while
    /// there is no kernel.
    beat: AtomicU64,
}

impl Liveness {
    pub(super) fn new() -> Self {
        Self {
            started: Instant::now(),
            beat: AtomicU64::new(0),
        }
    }

    fn beaten(&self) {
        self.beat.store(
            self.started.elapsed().as_nanos() as u64 + 1,
            Ordering::Release,
        );
    }

    fn gone(&self) {
        self.beat.store(0, Ordering::Release);
    }

    /// Whether the heart beat a moment ago, and it is still that boot.
    pub(super) fn is_fresh(&self, ram: &dyn GuestRam, link: &Link) -> bool {
        let beat = self.beat.load(Ordering::Acquire);
        let now = self.started.elapsed().as_nanos() as u64 + 1;
        beat != 0
            && now.saturating_sub(beat) < FRESH.as_nanos() as u64
            && link.is_there(ram).unwrap_or(false)
    }
}

/// What a look came to.
#[derive(Debug)]
pub(super) enum Seen {
    /// Nothing new.
    Same,
    /// A kernel was found, where there was none or another one.
    Booted,
    /// The kernel has gone: the guest was reset.
    Gone,
}

/// Keeps an eye on the guest's kernel.
#[derive(Debug)]
pub(super) struct Watch {
    sources: Sources,
    /// How many CPUs the guest can have, whatever its kernel claims.
    pub(super) max_cpus: u32,
    pub(super) guest: Option<Guest>,
    pub(super) liveness: Arc<Liveness>,
    /// Why there is no kernel.
    pub(super) why: String,
    last: Option<Pulse>,
    beat_at: Instant,
    /// When memory may be searched again.
    search_at: Instant,
    candidates: Candidates,
    /// Whether it was told that more than one lives.
    pub(super) rivals_told: bool,
    clocks: Clocks,
}

impl Watch {
    /// With the files that symbols may be in, or directories of them.
    /// The guest has no more CPUs than `max_cpus`.
    pub(super) fn new(sources: Vec<PathBuf>, max_cpus: u32) -> Self {
        Self {
            sources: Sources::new(sources),
            max_cpus,
            guest: None,
            liveness: Arc::new(Liveness::new()),
            why: "not looked yet".to_owned(),
            last: None,
            beat_at: Instant::now(),
            search_at: Instant::now(),
            candidates: Candidates::default(),
            rivals_told: false,
            clocks: Clocks::default(),
        }
    }

    /// The heartbeat seen last; a kernel without the patch has none.
    pub(super) fn heartbeat(&self) -> Option<Heartbeat> {
        self.last?.heartbeat
    }

    /// Since the heart last beat.
    pub(super) fn silent(&self) -> Duration {
        self.beat_at.elapsed()
    }

    /// The first and the last good pair of clocks of this boot.
    pub(super) fn clocks(&self) -> Option<(ClockPair, ClockPair)> {
        self.clocks.pairs()
    }

    /// Whether the guest's kernel is at a command: it does not beat then.
    pub(super) fn busy(&self) -> bool {
        self.heartbeat()
            .is_some_and(|beat| beat.seen_seq != beat.ack_seq)
    }

    /// Looks at the guest.
    pub(super) fn look(&mut self, ram: &dyn GuestRam) -> Result<Seen, RamError> {
        let Some(guest) = &self.guest else {
            return self.search(ram);
        };
        if !guest.link.is_there(ram)? {
            self.guest = None;
            self.liveness.gone();
            self.why = "the guest was reset and has not come up again yet".to_owned();
            return Ok(Seen::Gone);
        }
        let pulse = guest.link.pulse(ram)?;
        if self.last.is_none_or(|last| last.beats != pulse.beats) {
            self.beat_at = Instant::now();
            self.liveness.beaten();
            if let Some(beat) = pulse.heartbeat {
                self.clocks.note(beat.clock);
            }
        }
        self.last = Some(pulse);
        if self.silent() > SILENT {
            return self.search(ram);
        }
        self.candidates.clear();
        Ok(Seen::Same)
    }

    /// Looks for a kernel that lives, now and then.
    fn search(&mut self, ram: &dyn GuestRam) -> Result<Seen, RamError> {
        let begun = Instant::now();
        if begun < self.search_at {
            return Ok(Seen::Same);
        }
        let seen = self.search_now(ram);
        let rest = begun.elapsed().max(SEARCH_EVERY);
        self.search_at = Instant::now() + rest;
        seen
    }

    fn search_now(&mut self, ram: &dyn GuestRam) -> Result<Seen, RamError> {
        let Fitting { mut found, mut why } = self.sources.fitting(ram)?;
        found.sort_by_key(|(_, symbols)| symbols.address("kallsyms_offsets").is_none());
        let mut there = Vec::new();
        for (path, symbols) in found {
            let kernels = match find_all(ram, &symbols) {
                Ok(kernels) => kernels,
                Err(error) => {
                    why = format!("{:#}", anyhow::Error::from(error));
                    continue;
                }
            };
            for kernel in kernels {
                if let Some((boot, beats)) = Link::vitals(ram, &kernel, &symbols)? {
                    self.candidates.note(kernel.phys_text, boot, beats);
                }
                there.push((kernel, Arc::clone(&symbols), path.clone()));
            }
        }
        let living = self.candidates.living(self.guest.is_some());
        // Where none lives, what is wrong with one of them may tell why.
        let first = there.first().filter(|_| self.guest.is_none());
        let first = first.map(|(kernel, ..)| kernel.phys_text);
        let looked_at = if living.is_empty() {
            first.as_slice()
        } else {
            &living
        };
        let current = self.guest.as_ref().map(|guest| guest.link.boot_id());
        for place in looked_at {
            for (kernel, symbols, path) in there.iter().filter(|at| at.0.phys_text == *place) {
                let link = match Link::attach(ram, kernel, symbols) {
                    Ok(link) => link,
                    Err(error) => {
                        why = error
                            .into_ram()
                            .map_or_else(|e| Ok(format!("{:#}", anyhow::Error::from(e))), Err)?;
                        continue;
                    }
                };
                if living.is_empty() {
                    "a kernel is there, and its heart has not beaten yet".clone_into(&mut why);
                } else if Some(link.boot_id()) != current {
                    self.tell_of_rivals(&living);
                    self.take(Guest {
                        kernel: kernel.clone(),
                        link,
                        symbols: Arc::clone(symbols),
                        symbols_path: path.clone(),
                    });
                    return Ok(Seen::Booted);
                }
            }
        }
        if self.guest.is_none() {
            self.why = why;
        }
        Ok(Seen::Same)
    }

    /// Says once what it means that more than one lives.
    fn tell_of_rivals(&mut self, living: &[Gpa]) {
        if let ([taken, _, ..], false) = (living, self.rivals_told) {
            self.rivals_told = true;
            log::warn!(
                "{} kernels seem to live in the guest's memory: somebody who controls its kernel \
                 keeps copies of it alive; took the one at {taken}, and what it tells may be \
                 false (told once)",
                living.len()
            );
        }
    }

    /// Where the guest's kernel was when somebody else followed it.
    pub(super) fn known_at(&mut self, place: Gpa) {
        self.candidates.known_at(place);
    }

    /// Guest memory could not be followed: what is known of the guest no longer
    /// holds.
    pub(super) fn lost(&mut self, why: &str) {
        self.guest = None;
        self.liveness.gone();
        why.clone_into(&mut self.why);
    }

    fn take(&mut self, guest: Guest) {
        self.candidates.known_at(guest.kernel.phys_text);
        self.guest = Some(guest);
        self.last = None;
        self.beat_at = Instant::now();
        self.clocks = Clocks::default();
        self.candidates.clear();
        self.why.clear();
    }
}

/// The host's wall clock, nanoseconds since 1970.
pub(super) fn wall_ns() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |time| time.as_nanos() as u64)
}
