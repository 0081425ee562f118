//! Which kernel runs in the guest now, and does it live?
//!
//! After a reboot inside the same QEMU, the old kernel's image may still lie
//! in memory, whole; and a hostile guest can plant as many as it likes. What
//! tells the one that runs is that its heart beats: the count in its control
//! block grows, or, in a kernel without the patch, its count of ticks. So a
//! kernel is taken only once two looks at it differ.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::kernel::control::Heartbeat;
use crate::kernel::{find_all, Kernel, Symbols};
use crate::ram::{Gpa, GuestRam, RamError};
use crate::session::ClockPair;

use super::clocks::Clocks;
use super::link::{Link, Pulse};
use super::sources::{Fitting, Sources};

/// How often memory is searched for a kernel.
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
    searched: Option<Instant>,
    /// Kernels seen, whose hearts did not beat yet: where, boot id, beats.
    candidates: HashMap<(Gpa, u64), u64>,
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
            searched: None,
            candidates: HashMap::new(),
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
        Ok(Seen::Same)
    }

    /// Looks for a kernel that lives, now and then.
    fn search(&mut self, ram: &dyn GuestRam) -> Result<Seen, RamError> {
        if self.searched.is_some_and(|at| at.elapsed() < SEARCH_EVERY) {
            return Ok(Seen::Same);
        }
        self.searched = Some(Instant::now());
        let current = self.guest.as_ref().map(|guest| guest.link.boot_id());
        let Fitting { found, mut why } = self.sources.fitting(ram)?;
        let mut seen = HashMap::new();
        for (path, symbols) in found {
            let kernels = match find_all(ram, &symbols) {
                Ok(kernels) => kernels,
                Err(error) => {
                    why = format!("{:#}", anyhow::Error::from(error));
                    continue;
                }
            };
            for kernel in kernels {
                let link = match Link::attach(ram, &kernel, &symbols) {
                    Ok(link) => link,
                    Err(error) => {
                        why = error
                            .into_ram()
                            .map_or_else(|e| Ok(format!("{:#}", anyhow::Error::from(e))), Err)?;
                        continue;
                    }
                };
                let boot_id = link.boot_id();
                if Some(boot_id) == current {
                    continue;
                }
                let beats = link.pulse(ram)?.beats;
                let place = (link.place(), boot_id);
                if self
                    .candidates
                    .get(&place)
                    .is_some_and(|before| *before != beats)
                {
                    self.take(Guest {
                        kernel,
                        link,
                        symbols,
                        symbols_path: path,
                    });
                    return Ok(Seen::Booted);
                }
                why = "a kernel is there, and its heart has not beaten yet".to_owned();
                seen.insert(place, beats);
            }
        }
        self.candidates = seen;
        if self.guest.is_none() {
            self.why = why;
        }
        Ok(Seen::Same)
    }

    /// Guest memory could not be followed: what is known of the guest no longer
    /// holds.
    pub(super) fn lost(&mut self, why: &str) {
        self.guest = None;
        self.liveness.gone();
        why.clone_into(&mut self.why);
    }

    fn take(&mut self, guest: Guest) {
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
