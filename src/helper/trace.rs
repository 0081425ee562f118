//! One open session: from the first key to the closed directory.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use crate::keys::{KeyError, KeyHistory, Klog};
use crate::ram::GuestRam;
use crate::ring::record::What;
use crate::ring::{Chunk, Decoder, Drained, Gap, RingError, RingReader};
use crate::session::{
    Boot, EndReason, Finding, FindingKind, GuestCode, Meta, SessionError, SessionWriter, State,
    SwitchChange, FINDINGS_FILE, KLOG_FILE,
};

use super::keyring::KeyThread;
use super::ratelimit::{RateLimit, Verdict};
use super::watch::{wall_ns, Guest, Watch};

/// How often `session.json` is brought up to date.
const SAVE_EVERY: Duration = Duration::from_secs(1);
/// A heart silent for longer may mean a reset: what is read meanwhile is held
/// back until it is known.
const HOLD_AFTER: Duration = Duration::from_millis(1000);
/// By how much the trace clocks of two CPUs may differ: two ticks at HZ=100.
const CLOCKS_APART_NS: u64 = 20_000_000;
/// What is held back at most, bytes.
const HOLD_LIMIT: usize = 64 << 20;

/// Why a session cannot go on.
#[derive(Debug, thiserror::Error)]
pub(super) enum TraceError {
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error(transparent)]
    Keys(#[from] KeyError),
    #[error(transparent)]
    Ring(#[from] RingError),
}

/// A session that is open.
pub(super) struct Trace {
    pub(super) writer: SessionWriter,
    pub(super) keys: KeyThread,
    ram: Arc<dyn GuestRam>,
    /// None while the guest is down.
    live: Option<Live>,
    held: Vec<Chunk>,
    held_bytes: usize,
    saved: Instant,
    forged_told: u64,
    store_failed: bool,
    said: RateLimit,
}

/// What belongs to one boot of the guest.
struct Live {
    guest: Guest,
    reader: RingReader,
    decoder: Decoder,
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
    ) -> Result<Self, TraceError> {
        let interval = Duration::from_nanos(meta.interval_ns);
        let writer = SessionWriter::create(dir, meta, &guest.symbols, guest.kernel.slide)?;
        let klog = Klog::create(&dir.join(KLOG_FILE)).map_err(SessionError::from)?;
        let keys = KeyThread::start(
            klog,
            KeyHistory::default(),
            0,
            interval,
            guest.control,
            Arc::clone(&ram),
            Arc::clone(&watch.liveness),
        )?;
        let mut trace = Self::new(writer, keys, ram);
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
        let (klog, history) = Klog::resume(&dir.join(KLOG_FILE)).map_err(SessionError::from)?;
        let keys = KeyThread::start(
            klog,
            history,
            writer.meta.counters.late_keys,
            Duration::from_nanos(writer.meta.interval_ns),
            guest.control,
            Arc::clone(&ram),
            Arc::clone(&watch.liveness),
        )?;
        let mut trace = Self::new(writer, keys, ram);
        let last = trace.writer.meta.boots.last();
        match last.filter(|boot| boot.boot_id == guest.control.ident.boot_id) {
            Some(boot) => {
                let mut decoder = Decoder::new(boot.types, boot.number);
                let mut reader = reader(guest, 0);
                let code = GuestCode {
                    symbols: &guest.symbols,
                    slide: guest.kernel.slide,
                };
                let history = trace.keys.shared.history.read();
                let history = history.unwrap_or_else(PoisonError::into_inner);
                for chunk in trace.writer.last_chunks()? {
                    let end = chunk.offset + chunk.bytes.len() as u32;
                    reader.resume(chunk.cpu, chunk.page_time, end);
                    decoder.resume_after(&chunk, &history, &code);
                }
                drop(history);
                trace.live = Some(Live {
                    guest: guest.clone(),
                    reader,
                    decoder,
                });
            }
            None => trace.boot(guest, watch)?,
        }
        Ok(trace)
    }

    fn new(writer: SessionWriter, keys: KeyThread, ram: Arc<dyn GuestRam>) -> Self {
        Self {
            writer,
            keys,
            ram,
            live: None,
            held: Vec::new(),
            held_bytes: 0,
            saved: Instant::now(),
            forged_told: 0,
            store_failed: false,
            said: RateLimit::new(10, Duration::from_secs(60)),
        }
    }

    /// The guest has booted, into this kernel: its first records, if there
    /// will be any, are the session's next boot.
    pub(super) fn boot(&mut self, guest: &Guest, watch: &Watch) -> Result<(), TraceError> {
        self.writer.next_boot()?;
        let number = self.writer.meta.boots.len() as u32 + 1;
        let ident = guest.control.ident;
        self.writer.meta.boots.push(Boot {
            number,
            boot_id: ident.boot_id,
            banner: guest.kernel.banner.clone(),
            slide: guest.kernel.slide,
            phys_text: guest.kernel.phys_text.0,
            levels: guest.kernel.levels,
            nr_cpus: ident.nr_cpus,
            types: ident.types,
            found_ns: wall_ns(),
            clocks: watch.clocks(),
        });
        // Pages from before this moment belong to an earlier trace; `on` will
        // empty them. CPUs' clocks differ by a tick or two.
        let since = watch
            .heartbeat()
            .map_or(0, |beat| beat.clock.saturating_sub(CLOCKS_APART_NS));
        self.live = Some(Live {
            guest: guest.clone(),
            reader: reader(guest, since),
            decoder: Decoder::new(ident.types, number),
        });
        if number > 1 {
            self.keys.retarget(Some(guest.control));
        }
        self.writer.save()?;
        Ok(())
    }

    /// The guest was reset: what was held back was read from memory that is
    /// no longer its kernel's.
    pub(super) fn guest_gone(&mut self) {
        self.keys.retarget(None);
        self.live = None;
        self.writer.meta.counters.after_reset_bytes += self.held_bytes as u64;
        self.held.clear();
        self.held_bytes = 0;
    }

    /// Reads what is new, stores it, and looks at it.
    pub(super) fn drain(&mut self, watch: &Watch) -> Result<Drained, TraceError> {
        let Some(live) = &mut self.live else {
            return Ok(Drained::default());
        };
        let mut chunks = Vec::new();
        let drained = live
            .reader
            .drain(&*self.ram, &mut |chunk| chunks.push(chunk))?;
        self.writer.meta.counters.torn_pages += drained.torn;
        self.writer.meta.counters.damaged += drained.damaged;
        let doubtful = watch.silent() > HOLD_AFTER && !watch.busy();
        if doubtful && self.held_bytes < HOLD_LIMIT {
            self.held_bytes += chunks.iter().map(|chunk| chunk.bytes.len()).sum::<usize>();
            self.held.append(&mut chunks);
            return Ok(drained);
        }
        self.held_bytes = 0;
        for chunk in std::mem::take(&mut self.held).into_iter().chain(chunks) {
            self.take(&chunk);
        }
        // At once: a helper that is killed takes what it still holds with it.
        if drained.bytes > 0 {
            if let Err(error) = self.writer.flush() {
                self.cannot_store(&error);
            }
        }
        Ok(drained)
    }

    /// The guest is gone for good, or the trace ends: what was held back is
    /// as good as the rest.
    fn release(&mut self) {
        self.held_bytes = 0;
        for chunk in std::mem::take(&mut self.held) {
            self.take(&chunk);
        }
    }

    fn take(&mut self, chunk: &Chunk) {
        let Some(live) = &mut self.live else {
            return;
        };
        let counters = &mut self.writer.meta.counters;
        counters.bytes += chunk.bytes.len() as u64;
        let code = GuestCode {
            symbols: &live.guest.symbols,
            slide: live.guest.kernel.slide,
        };
        let history = self
            .keys
            .shared
            .history
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        live.decoder
            .chunk(chunk, &history, &code, &mut |item| match item.what {
                What::Call(_) | What::Return(_) => counters.records += 1,
                What::Forged(_) => counters.forged += 1,
                What::Lost(lost) => {
                    counters.lost += lost.records.unwrap_or(0);
                    counters.lost_places += 1;
                }
                What::Other { .. } => counters.other += 1,
            });
        drop(history);
        if let Err(error) = self.writer.append(chunk) {
            live.reader.note_gap(chunk.cpu, Gap::DiskFull);
            self.cannot_store(&error);
        }
    }

    /// Says so once: a disk that is full stays full for a while.
    fn cannot_store(&mut self, error: &SessionError) {
        if !std::mem::replace(&mut self.store_failed, true) {
            log::error!("{error}; what cannot be stored is lost to the trace, not to the guest");
        }
    }

    /// Notes what the guest was caught at since the last time, and brings the
    /// session's files up to date now and then.
    pub(super) fn attend(&mut self, watch: &Watch) -> Result<(), TraceError> {
        for (wall_ns, tamper) in self.keys.take_found() {
            self.writer.meta.counters.tampered += 1;
            self.finding(Finding {
                wall_ns,
                kind: FindingKind::KeyChanged(tamper),
            })?;
        }
        if self.saved.elapsed() < SAVE_EVERY {
            return Ok(());
        }
        self.saved = Instant::now();
        let forged = self.writer.meta.counters.forged;
        if forged > self.forged_told {
            let records = forged - self.forged_told;
            self.forged_told = forged;
            self.finding(Finding {
                wall_ns: wall_ns(),
                kind: FindingKind::ForgedRecords { records },
            })?;
        }
        if let Some(trouble) = self.keys.take_trouble() {
            log::error!("no new key could be handed out: {trouble}; the last one stays in use");
        }
        self.note_clocks(watch);
        self.writer.meta.counters.late_keys = self.keys.late();
        self.writer.save()?;
        Ok(())
    }

    /// Notes, and logs, what the guest was caught at.
    pub(super) fn finding(&mut self, finding: Finding) -> Result<(), TraceError> {
        if let Verdict::Say { dropped } = self.said.ask() {
            log::warn!(
                "domain {}: {}{}",
                self.writer.meta.domain.escape_debug(),
                serde_json::to_string(&finding.kind).unwrap_or_default(),
                if dropped > 0 {
                    format!(" ({dropped} findings before it are in {FINDINGS_FILE} only)")
                } else {
                    String::new()
                }
            );
        }
        Ok(self.writer.finding(&finding)?)
    }

    fn note_clocks(&mut self, watch: &Watch) {
        if let (Some(boot), Some(guest)) = (self.writer.meta.boots.last_mut(), &watch.guest) {
            if guest.control.ident.boot_id == boot.boot_id {
                boot.clocks = match (boot.clocks, watch.clocks()) {
                    (Some((first, _)), Some((_, last))) => Some((first, last)),
                    (_, clocks) => clocks,
                };
            }
        }
    }

    /// Notes a turn of the switch.
    pub(super) fn switched(&mut self, change: SwitchChange) -> Result<(), TraceError> {
        self.writer.meta.switches.push(change);
        self.writer.save()?;
        Ok(())
    }

    /// Ends the session: stops the keys, and closes its files. Gives its
    /// directory.
    pub(super) fn close(mut self, end: EndReason, watch: &Watch) -> Result<PathBuf, TraceError> {
        self.release();
        self.attend(watch)?;
        let forged = self.writer.meta.counters.forged - self.forged_told;
        if forged > 0 {
            let kind = FindingKind::ForgedRecords { records: forged };
            self.finding(Finding {
                wall_ns: wall_ns(),
                kind,
            })?;
        }
        self.note_clocks(watch);
        self.writer.flush()?;
        let meta = &mut self.writer.meta;
        meta.counters.late_keys = self.keys.late();
        meta.state = State::Closed;
        meta.ended_ns = Some(wall_ns());
        meta.end = Some(end);
        self.writer.save()?;
        Ok(self.writer.dir().to_owned())
    }
}

fn reader(guest: &Guest, since: u64) -> RingReader {
    RingReader::new(
        guest.kernel.clone(),
        guest.control.ring,
        guest.control.ident.nr_cpus,
        since,
    )
}
