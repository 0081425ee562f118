//! Which kernel runs in the guest now, and does it live?
//!
//! After a reboot inside the same QEMU, the old kernel's image may still lie
//! in memory, whole; and a hostile guest can plant as many as it likes. What
//! tells the one that runs is that its heart beats: the count in its control
//! block grows, or, in a kernel without the patch, its count of ticks. So a
//! kernel is taken only once two looks at it differ; see [`super::candidates`]
//! for when more than one of them lives.

use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::kernel::control::Heartbeat;
use crate::kernel::{find_all_beside, Kernel, Symbols};
use crate::ram::{Gpa, GuestRam, RamError};
use crate::session::ClockPair;

use super::candidates::Candidates;
use super::clocks::Clocks;
use super::link::{Link, Pulse};
use super::sources::{Fitting, Sources};
use super::turn::WORK_LIMIT;

/// How often memory is searched for a kernel; less often where that takes
/// longer, so that a guest cannot make it our only work.
const SEARCH_EVERY: Duration = Duration::from_millis(250);
/// A heart that stands still for longer may have stopped: search again.
const SILENT: Duration = Duration::from_secs(2);
/// At how many searches in a row no other kernel may be seen to live before there
/// is none.
const RIVALS_GONE: u32 = 8;
/// How many places of others are listed.
const RIVALS_SHOWN: usize = 4;
/// A heart that beat within this time is alive: guest memory may be written.
pub(super) const FRESH: Duration = Duration::from_millis(400);

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

/// A kernel in memory, its symbols, and where these are from.
type Candidate = (Kernel, Arc<Symbols>, PathBuf);

/// More kernels than one that live.
#[derive(Debug)]
pub(super) struct Rivals {
    places: Vec<Gpa>,
    /// At how many searches in a row there was no other.
    unseen: u32,
}

impl fmt::Display for Rivals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} kernels seem to live in the guest's memory, and nothing tells which of them it \
             runs: somebody who controls its kernel keeps copies of it alive (at",
            self.places.len()
        )?;
        for (index, place) in self.places.iter().take(RIVALS_SHOWN).enumerate() {
            write!(f, "{} {place}", if index == 0 { "" } else { "," })?;
        }
        let more = if self.places.len() > RIVALS_SHOWN {
            ", ..."
        } else {
            ""
        };
        write!(
            f,
            "{more}); a reboot ends them, and xftrace knows the kernel from then on"
        )
    }
}

/// What a look came to.
#[derive(Debug)]
pub(super) enum Seen {
    /// Nothing new.
    Same,
    /// A kernel was found, where there was none or another one, or where several
    /// lived.
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
    /// When the heart was looked at last.
    looked_at: Option<Instant>,
    /// A moment after which it has beaten.
    alive_at: Instant,
    /// When memory may be searched again.
    search_at: Instant,
    candidates: Candidates,
    /// Others that live as well, where nothing tells which of them runs.
    rivals: Option<Rivals>,
    /// Whether it was told that more than one lives.
    rivals_told: bool,
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
            looked_at: None,
            alive_at: Instant::now(),
            search_at: Instant::now(),
            candidates: Candidates::default(),
            rivals: None,
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

    /// A moment after which the heart has beaten, the last that is known.
    pub(super) fn alive_at(&self) -> Instant {
        self.alive_at
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
            return self.now_and_then(ram, Self::search);
        };
        if !guest.link.is_there(ram)? {
            self.guest = None;
            self.rivals = None;
            self.liveness.gone();
            self.why = "the guest was reset and has not come up again yet".to_owned();
            return Ok(Seen::Gone);
        }
        let begun = Instant::now();
        let pulse = guest.link.pulse(ram)?;
        let looked_at = self.looked_at.replace(begun);
        if self.last.is_none_or(|last| last.beats != pulse.beats) {
            self.beat_at = Instant::now();
            // Some time after the look before this one.
            self.alive_at = looked_at.unwrap_or(self.alive_at);
            self.liveness.beaten();
            if let Some(beat) = pulse.heartbeat {
                self.clocks.note(beat.clock, wall_ns());
            }
        }
        self.last = Some(pulse);
        // It patches thousands of places for a command, and a slow host is slow at it.
        let patience = if self.busy() { WORK_LIMIT } else { SILENT };
        if self.silent() > patience {
            return self.now_and_then(ram, Self::search);
        }
        if self.rivals.is_some() {
            return self.now_and_then(ram, Self::look_for_rivals);
        }
        self.candidates.clear();
        Ok(Seen::Same)
    }

    /// Whether the others still live.
    fn look_for_rivals(&mut self, ram: &dyn GuestRam) -> Result<Seen, RamError> {
        self.kernels(ram)?;
        let living = self.candidates.living(true);
        if let Some(rivals) = &mut self.rivals {
            if living.len() > 1 {
                *rivals = Rivals {
                    places: living,
                    unseen: 0,
                };
            } else if rivals.unseen < RIVALS_GONE {
                rivals.unseen += 1;
            } else {
                log::info!("no other kernel seems to live in the guest's memory any more");
                self.rivals = None;
                self.note_place();
                return Ok(Seen::Booted);
            }
        }
        Ok(Seen::Same)
    }

    /// The kernel, where it is no guess.
    pub(super) fn known_guest(&self) -> Option<&Guest> {
        self.guest.as_ref().filter(|_| self.rivals.is_none())
    }

    /// Why the kernel that was taken may not be the one that runs.
    pub(super) fn rivals(&self) -> Option<&Rivals> {
        self.rivals.as_ref()
    }

    /// Goes through memory for this, if it is time to again.
    fn now_and_then(
        &mut self,
        ram: &dyn GuestRam,
        what: fn(&mut Self, &dyn GuestRam) -> Result<Seen, RamError>,
    ) -> Result<Seen, RamError> {
        let begun = Instant::now();
        if begun < self.search_at {
            return Ok(Seen::Same);
        }
        let seen = what(self, ram);
        let rest = begun.elapsed().max(SEARCH_EVERY);
        self.search_at = Instant::now() + rest;
        seen
    }

    /// All kernels in memory that the symbols fit, which the candidates are told
    /// of; and why there may be none.
    fn kernels(&mut self, ram: &dyn GuestRam) -> Result<(Vec<Candidate>, String), RamError> {
        let Fitting { mut found, mut why } = self.sources.fitting(ram)?;
        found.sort_by_key(|(_, symbols)| !symbols.tell_of_kallsyms());
        let mut there = Vec::new();
        for (path, symbols) in found {
            let known = self.candidates.known();
            let kernels = match find_all_beside(ram, &symbols, known) {
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
        Ok((there, why))
    }

    /// Looks for a kernel that lives.
    fn search(&mut self, ram: &dyn GuestRam) -> Result<Seen, RamError> {
        let (there, mut why) = self.kernels(ram)?;
        let living = self.candidates.living(self.guest.is_some());
        // Where none lives, what is wrong with one of them may tell why.
        let first = there.first().filter(|_| self.guest.is_none());
        let first = first.map(|(kernel, ..)| kernel.phys_text);
        let looked_at = if living.is_empty() {
            first.as_slice()
        } else {
            &living
        };
        // A copy has the boot id of what it was copied from.
        let which = |kernel: &Kernel, link: &Link| (link.boot_id(), kernel.phys_text);
        let current = self.guest.as_ref();
        let current = current.map(|guest| which(&guest.kernel, &guest.link));
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
                } else if Some(which(kernel, &link)) != current {
                    self.meet_rivals(&living, *place);
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

    /// What it means that more than one lives, of which the one at `taken` is.
    fn meet_rivals(&mut self, living: &[Gpa], taken: Gpa) {
        self.rivals = None;
        if living.len() < 2 {
            return;
        }
        let is_known = self.candidates.is_known(taken);
        if !is_known {
            self.rivals = Some(Rivals {
                places: living.to_vec(),
                unseen: 0,
            });
        }
        if !self.rivals_told {
            self.rivals_told = true;
            let which = if is_known {
                "where it was before, which is the true one's place"
            } else {
                "the first that can be met, and nothing is traced while that is a guess"
            };
            log::warn!(
                "{} kernels seem to live in the guest's memory: somebody who controls its kernel \
                 keeps copies of it alive; took the one at {taken}, {which} (told once)",
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
        self.rivals = None;
        self.liveness.gone();
        why.clone_into(&mut self.why);
    }

    /// From now on the kernel is known to be where it is, unless that is a guess.
    fn note_place(&mut self) {
        let place = self.known_guest().map(|guest| guest.kernel.phys_text);
        if let Some(place) = place {
            self.candidates.known_at(place);
        }
    }

    fn take(&mut self, guest: Guest) {
        self.guest = Some(guest);
        self.note_place();
        self.last = None;
        self.beat_at = Instant::now();
        self.looked_at = None;
        self.alive_at = Instant::now();
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
