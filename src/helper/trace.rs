//! One open session: from the first key to the closed directory.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::kernel::stock::StockError;
use crate::keys::{KeyError, KeyHistory, Klog, KlogError};
use crate::ram::GuestRam;
use crate::ring::record::What;
use crate::ring::{Chunk, Decoder, Drained, Gap, RingError};
use crate::session::{
    Boot, EndReason, Finding, FindingKind, GuestCode, Meta, SessionError, SessionWriter, State,
    SwitchChange, KLOG_FILE,
};

use super::keyring::{KeyThread, Keys};
use super::link::{Link, LinkError};
use super::notify::log_limit;
use super::ratelimit::{Budget, RateLimit, Verdict};
use super::sentry::Sentry;
use super::watch::{wall_ns, Guest, Watch};

mod found;
mod gates;
mod held;
mod live;
mod loads;
mod modules;

use found::Judging;
use held::{Held, Read};
use live::Live;

/// How often `session.json` is brought up to date.
const SAVE_EVERY: Duration = Duration::from_secs(1);
/// A heart silent for longer may mean a reset: what the guest says of itself
/// meanwhile is not looked at.
const SUSPECT_AFTER: Duration = Duration::from_millis(1000);
/// By how much the trace clocks of two CPUs may differ: two ticks at HZ=100.
const CLOCKS_APART_NS: u64 = 20_000_000;

/// Why a session cannot go on.
#[derive(Debug, thiserror::Error)]
pub(super) enum TraceError {
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error(transparent)]
    Keys(#[from] KeyError),
    #[error(transparent)]
    Ring(#[from] RingError),
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(transparent)]
    Stock(#[from] StockError),
}

impl TraceError {
    /// Whether it is what a guest without the patch says of itself.
    pub(super) fn is_stock(&self) -> bool {
        matches!(self, Self::Stock(_) | Self::Link(LinkError::Stock(_)))
    }
}

/// A session that is open.
pub(super) struct Trace {
    pub(super) writer: SessionWriter,
    pub(super) keys: Keys,
    ram: Arc<dyn GuestRam>,
    /// None while the guest is down, or cannot be traced yet.
    live: Option<Live>,
    /// How often the guest has booted, traced or not.
    pub(super) boots: usize,
    /// What was recorded since the first boot is part of it.
    since_boot: bool,
    held: Held,
    saved: Instant,
    forged_told: u64,
    /// The guest swapped its ring buffer for another, and it is yet to be told.
    swapped: bool,
    /// Bytes that could not be stored: by the helpers before this one, and of
    /// those read here such as were not even taken.
    unstored_before: u64,
    refused_bytes: u64,
    /// CPUs whose last chunk could not be stored.
    holes: HashSet<u16>,
    said: Budget,
    disk_said: RateLimit,
    judging: Judging,
}

/// A session that was closed.
pub(super) struct Closed {
    /// Its directory.
    pub(super) dir: PathBuf,
    /// Its `session.json`.
    pub(super) meta: Meta,
    /// Whether that is on disk.
    pub(super) saved: bool,
}

impl Trace {
    /// Begins a session in `dir` for a guest that is not traced yet, and hands
    /// the guest its first key.
    pub(super) fn begin(
        dir: &Path,
        meta: Meta,
        guest: &Guest,
        watch: &Watch,
        ram: Arc<dyn GuestRam>,
        since_boot: bool,
    ) -> Result<Self, TraceError> {
        let interval = Duration::from_nanos(meta.interval_ns);
        let writer = SessionWriter::create(dir, meta)?;
        let keys = keys(guest, watch, &ram, interval, 0, || {
            Ok((Klog::create(&dir.join(KLOG_FILE))?, KeyHistory::default()))
        })?;
        let mut trace = Self::new(writer, keys, ram);
        trace.boots = 1;
        trace.since_boot = since_boot;
        trace.boot(guest, watch)?;
        Ok(trace)
    }

    /// Goes on with the session in `dir`, whose helper has gone. The guest is
    /// either the one of its last boot, or has booted since.
    pub(super) fn resume(
        dir: &Path,
        guest: &Guest,
        watch: &Watch,
        ram: Arc<dyn GuestRam>,
    ) -> Result<Self, TraceError> {
        let mut writer = SessionWriter::resume(dir)?;
        writer.meta.counters.resumed += 1;
        let interval = Duration::from_nanos(writer.meta.interval_ns);
        let late = writer.meta.counters.late_keys;
        let keys = keys(guest, watch, &ram, interval, late, || {
            Klog::resume(&dir.join(KLOG_FILE))
        })?;
        let mut trace = Self::new(writer, keys, ram);
        let last = trace.writer.meta.boots.last();
        match last.filter(|boot| boot.boot_id == guest.link.boot_id()) {
            Some(boot) => {
                let mut decoder = Decoder::new(boot.types, boot.number);
                let code = GuestCode {
                    symbols: &guest.symbols,
                    slide: guest.kernel.slide,
                };
                let functions = guest.symbols.ftrace_names(trace.writer.meta.functions());
                let (mut reader, array) =
                    guest
                        .link
                        .reader(&*trace.ram, &guest.kernel, 0, &functions)?;
                reader.limit_cpus(watch.max_cpus);
                let chunks = trace.writer.last_chunks()?;
                trace.keys.with_history(|history| {
                    for chunk in &chunks {
                        let end = chunk.offset + chunk.bytes.len() as u32;
                        reader.resume(chunk.cpu, chunk.page_time, end);
                        decoder.resume_after(chunk, history, &code);
                    }
                });
                trace.live = Some(Live::new(&*trace.ram, guest, reader, array, decoder));
            }
            None => {
                trace.boots += 1;
                trace.boot(guest, watch)?;
            }
        }
        Ok(trace)
    }

    fn new(writer: SessionWriter, keys: Keys, ram: Arc<dyn GuestRam>) -> Self {
        Self {
            unstored_before: writer.meta.counters.unstored_bytes,
            boots: writer.meta.boots.len(),
            since_boot: false,
            writer,
            keys,
            ram,
            live: None,
            held: Held::default(),
            saved: Instant::now(),
            forged_told: 0,
            swapped: false,
            refused_bytes: 0,
            holes: HashSet::new(),
            said: log_limit(),
            disk_said: RateLimit::new(1, Duration::from_secs(60)),
            judging: Judging::default(),
        }
    }

    /// The guest's memory is this now: what it was, and modules that came or
    /// went. The keys' thread stays with what it has: where they lie is in the
    /// kernel's image, which is in no module.
    pub(super) fn goes_on_in(&mut self, ram: Arc<dyn GuestRam>) {
        self.ram = ram;
    }

    /// The guest has booted, into this kernel: its first records, if there
    /// will be any, are the session's next boot.
    pub(super) fn boot(&mut self, guest: &Guest, watch: &Watch) -> Result<(), TraceError> {
        self.writer.end_boot();
        self.holes.clear();
        let number = self.writer.meta.boots.len() as u32 + 1;
        // Pages from before this moment belong to an earlier trace; `on` will
        // empty them. CPUs' clocks differ by a tick or two.
        let since = watch
            .heartbeat()
            .map_or(0, |beat| beat.clock.saturating_sub(CLOCKS_APART_NS));
        let functions = guest.symbols.ftrace_names(self.writer.meta.functions());
        let (mut reader, array) =
            guest
                .link
                .reader(&*self.ram, &guest.kernel, since, &functions)?;
        reader.limit_cpus(watch.max_cpus);
        let symbols = self
            .writer
            .store_symbols(&guest.symbols, guest.kernel.slide)?;
        self.writer.meta.boots.push(Boot {
            number,
            boot_id: guest.link.boot_id(),
            banner: guest.kernel.banner.clone(),
            symbols,
            slide: guest.kernel.slide,
            phys_text: guest.kernel.phys_text.0,
            levels: guest.kernel.levels,
            nr_cpus: reader.nr_cpus(),
            types: guest.link.format(),
            found_ns: wall_ns(),
            clocks: watch.clocks(),
        });
        let decoder = Decoder::new(guest.link.format(), number);
        self.live = Some(Live::new(&*self.ram, guest, reader, array, decoder));
        self.tell_boot();
        match (&self.keys, &guest.link) {
            (Keys::Handed(keys), Link::Keyed(control)) if number > 1 => {
                keys.retarget(Some(*control));
            }
            (_, Link::Plain(_)) if number == 1 && !self.since_boot => self.begin_plain()?,
            _ => {}
        }
        // Of a session that has just begun, the directory has to be there.
        self.save();
        if number == 1 {
            self.writer.sync()?;
        }
        Ok(())
    }

    /// Whether nothing is read of the guest, since it is down or cannot be traced yet.
    pub(super) fn is_down(&self) -> bool {
        self.live.is_none()
    }

    /// The guest was reset: what is held may have been read from memory that is
    /// no longer its kernel's.
    pub(super) fn guest_gone(&mut self) {
        if let Some(keys) = self.keys.thread() {
            keys.retarget(None);
        }
        self.take_whole();
        self.end_round();
        self.live = None;
    }

    /// Reads what is new, and takes what was read before the guest was last seen to live.
    pub(super) fn drain(&mut self, watch: &Watch) -> Result<Drained, TraceError> {
        // One that works on a command does not beat.
        let now = watch.busy().then(Instant::now);
        self.take_good(now.unwrap_or(watch.alive_at()));
        self.end_round();
        self.writer.flush();
        let Some(live) = &mut self.live else {
            return Ok(Drained::default());
        };
        if let Link::Keyed(control) = &live.guest.link {
            live.reader
                .look_in(control.buffer_now(&*self.ram).map_err(RingError::from)?);
        }
        // No more than a round hands out.
        let mut chunks = Vec::new();
        let drained = live
            .reader
            .drain(&*self.ram, &mut |chunk| chunks.push(chunk));
        let drained = match drained {
            // A guest that was just reset, or that wants no trace of it.
            Err(RingError::Lost { .. }) => Drained {
                damaged: 1,
                ..Drained::default()
            },
            drained => drained?,
        };
        self.writer.meta.counters.torn_pages += drained.torn;
        self.writer.meta.counters.damaged += drained.damaged;
        self.swapped |= drained.swapped > 0;
        self.held.push(chunks);
        Ok(drained)
    }

    fn take(&mut self, read: &Read) {
        let chunk = &read.chunk;
        let Some(live) = &mut self.live else {
            return;
        };
        let counters = &mut self.writer.meta.counters;
        counters.bytes += chunk.bytes.len() as u64;
        let code = GuestCode {
            symbols: &live.guest.symbols,
            slide: live.guest.kernel.slide,
        };
        let mut newest = None;
        let sentry = &mut self.judging.sentry;
        self.keys.with_history(|history| {
            live.decoder.chunk(chunk, history, &code, &mut |item| {
                newest = newest.max(Some(item.time));
                match item.what {
                    What::Call(_) | What::Return(_) => counters.records += 1,
                    What::Forged(_) => counters.forged += 1,
                    What::Lost(lost) => {
                        counters.lost += lost.records.unwrap_or(0);
                        counters.lost_places += 1;
                    }
                    What::Other { .. } => counters.other += 1,
                }
                if let Some(sentry) = sentry {
                    sentry.take(item);
                }
            });
        });
        if newest.is_some() {
            live.gates.gave(chunk.cpu);
        }
        if let (Some(plain), Some(newest)) = (&mut live.plain, newest) {
            plain.clocks.note(newest, read.wall_ns);
        }
        // On the very next chunk: the running numbers show the hole there, and
        // would take it for one of the guest's making.
        let marked = self.holes.remove(&chunk.cpu).then(|| Chunk {
            gap: Some(Gap::NotStored),
            ..chunk.clone()
        });
        let chunk = marked.as_ref().unwrap_or(chunk);
        if let Err(error) = self.writer.append(chunk, read.wall_ns) {
            self.holes.insert(chunk.cpu);
            self.refused_bytes += chunk.bytes.len() as u64;
            // The engine ends the trace at its limit, and says so.
            if !matches!(error, SessionError::Full { .. }) {
                self.cannot_store(&error);
            }
        }
    }

    /// Says so now and then: a disk that is full, or slow, stays so for a while. It
    /// may be given room again, so the trace goes on.
    fn cannot_store(&mut self, error: &SessionError) {
        if let Verdict::Say { .. } = self.disk_said.ask() {
            log::error!("{error}; what cannot be stored is lost to the trace, not to the guest");
        }
    }

    /// Brings `session.json` up to date.
    fn save(&mut self) {
        if let Err(error) = self.writer.save() {
            self.cannot_store(&error);
        }
    }

    /// Notes what the guest was caught at since the last time, and brings the
    /// session's files up to date now and then.
    pub(super) fn attend(&mut self, watch: &Watch) {
        let found = self.keys.thread().map(KeyThread::take_found);
        for (wall_ns, tamper) in found.unwrap_or_default() {
            self.writer.meta.counters.tampered += 1;
            self.finding(Finding {
                wall_ns,
                kind: FindingKind::KeyChanged(tamper),
            });
        }
        if let Some(trouble) = self.writer.take_trouble() {
            self.cannot_store(&trouble);
        }
        self.look_at_modules(watch);
        let found = self.judging.sentry.as_ref().map(Sentry::found);
        self.detected(&found.unwrap_or_default());
        if self.saved.elapsed() < SAVE_EVERY {
            return;
        }
        self.saved = Instant::now();
        let forged = self.writer.meta.counters.forged;
        if forged > self.forged_told {
            let records = forged - self.forged_told;
            self.forged_told = forged;
            self.finding(Finding {
                wall_ns: wall_ns(),
                kind: FindingKind::ForgedRecords { records },
            });
        }
        if std::mem::take(&mut self.swapped) {
            self.finding(Finding {
                wall_ns: wall_ns(),
                kind: FindingKind::BufferSwapped,
            });
        }
        if let Some(trouble) = self.keys.thread().and_then(KeyThread::take_trouble) {
            if let Verdict::Say { .. } = self.disk_said.ask() {
                log::error!("no new key could be handed out: {trouble}; the last one stays in use");
            }
        }
        self.note_clocks(watch);
        self.count();
        // Of a disk that has not taken the last one, no more is asked.
        if !self.writer.is_saving() {
            self.save();
        }
    }

    fn note_clocks(&mut self, watch: &Watch) {
        if let (Some(boot), Some(guest)) = (self.writer.meta.boots.last_mut(), &watch.guest) {
            if guest.link.boot_id() == boot.boot_id {
                let plain = self.live.as_ref().and_then(|live| live.plain.as_ref());
                let clocks = plain.map_or_else(|| watch.clocks(), |plain| plain.clocks.pairs());
                boot.clocks = match (boot.clocks, clocks) {
                    (Some((first, _)), Some((_, last))) => Some((first, last)),
                    (_, clocks) => clocks,
                };
            }
        }
    }

    /// Brings the counts up to date that others keep: the keys' thread, and in
    /// plain mode the guest.
    fn count(&mut self) {
        let unstored = self.refused_bytes + self.writer.unstored();
        let meta = &mut self.writer.meta;
        meta.counters.unstored_bytes = self.unstored_before + unstored;
        if let Some(keys) = self.keys.thread() {
            meta.counters.late_keys = keys.late();
        }
        if let (Some(live), Some(counts)) = (&self.live, &mut meta.guest_counts) {
            counts.look(live.reader.written(&*self.ram));
        }
    }

    /// Whether the guest that booted last has all that it takes to be
    /// switched on.
    pub(super) fn ready(&self) -> bool {
        self.keys.thread().is_none_or(KeyThread::ready)
    }

    /// Notes a turn of the switch.
    pub(super) fn switched(&mut self, change: SwitchChange) {
        self.writer.meta.switches.push(change);
        self.save();
    }

    /// Ends the session: stops the keys, and closes its files.
    pub(super) fn close(mut self, end: EndReason, watch: &Watch) -> Closed {
        self.read_last_symbols(watch);
        // What is still to come is waited for.
        self.writer.wait_for_disk();
        self.take_all();
        let found = self.judging.sentry.take().map(Sentry::finish);
        self.detected(&found.unwrap_or_default());
        self.attend(watch);
        let forged = self.writer.meta.counters.forged - self.forged_told;
        if forged > 0 {
            let kind = FindingKind::ForgedRecords { records: forged };
            self.finding(Finding {
                wall_ns: wall_ns(),
                kind,
            });
        }
        self.note_clocks(watch);
        self.writer.end_boot();
        if let Err(error) = self.writer.sync() {
            self.cannot_store(&error);
        }
        self.count();
        let meta = &mut self.writer.meta;
        meta.state = State::Closed;
        meta.ended_ns = Some(wall_ns());
        meta.end = Some(end);
        let result = self.writer.save().and_then(|()| self.writer.sync());
        if let Err(error) = &result {
            log::error!("{error}; it is tried again");
        }
        Closed {
            dir: self.writer.dir().to_owned(),
            meta: self.writer.meta,
            saved: result.is_ok(),
        }
    }
}

/// The session's keys, handed out to `guest` from the history in its klog;
/// `late` intervals had none so far.
fn keys(
    guest: &Guest,
    watch: &Watch,
    ram: &Arc<dyn GuestRam>,
    interval: Duration,
    late: u64,
    klog: impl FnOnce() -> Result<(Klog, KeyHistory), KlogError>,
) -> Result<Keys, TraceError> {
    let Link::Keyed(control) = guest.link else {
        return Ok(Keys::None);
    };
    let (klog, history) = klog().map_err(SessionError::from)?;
    let liveness = Arc::clone(&watch.liveness);
    let keys = KeyThread::start(
        klog,
        history,
        late,
        interval,
        control,
        Arc::clone(ram),
        liveness,
    )?;
    Ok(Keys::Handed(keys))
}
