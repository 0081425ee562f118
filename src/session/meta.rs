//! `session.json`: what a session is.

use std::fs;
use std::io::Write;
use std::path::Path;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::ring::{RecordFormat, Written};

use super::{MapId, SessionError};

/// The name of the file in the session's directory.
pub const META_FILE: &str = "session.json";

/// How far a record can be trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Records carry addresses under the host's keys.
    Keyed,
    /// The kernel's own records, without keys: whoever is root in the guest
    /// can have written them.
    Plain,
}

impl Mode {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Keyed => "keyed",
            Self::Plain => "plain",
        }
    }

    /// Its name, and what it means for what is shown.
    pub fn text(self) -> &'static str {
        match self {
            Self::Keyed => "keyed",
            Self::Plain => "plain (not keyed: proves nothing against root in the guest)",
        }
    }
}

/// Whether a session still grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// A helper writes it, or did until it was killed.
    Open,
    /// It is complete.
    Closed,
}

/// Why a session ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EndReason {
    /// `xftrace off`.
    Off,
    /// The VM ended.
    VmEnded,
    /// The helper was told to stop.
    HelperStopped,
    /// Its helper was killed, and no other went on with it: `ended_ns` is when
    /// it last wrote, and what came after is not known.
    HelperGone,
    /// The session reached the size that the configuration allows.
    SizeLimit,
    /// The guest booted more often than one session has room for.
    TooManyBoots,
    /// Something failed.
    Error(String),
}

/// A moment on the guest's trace clock and on the host's wall clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockPair {
    /// Guest trace clock, nanoseconds.
    pub guest_ns: u64,
    /// Host wall clock, nanoseconds since 1970, UTC.
    pub host_ns: u64,
}

/// The QEMU process that runs the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QemuProcess {
    /// Its process id.
    pub pid: i32,
    /// Field 22 of /proc/PID/stat, clock ticks since boot: tells it from a
    /// later process with the same id.
    pub start_time: u64,
}

/// One boot of the guest within the session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Boot {
    /// 1 for the first.
    pub number: u32,
    /// What the guest's kernel calls this boot.
    pub boot_id: u64,
    /// `linux_banner` as it stands in guest memory.
    pub banner: String,
    /// Which of the session's symbols are its kernel's.
    pub symbols: MapId,
    /// Run-time address minus link-time address, wrapping.
    pub slide: u64,
    /// Where the image lies, guest physical.
    pub phys_text: u64,
    /// Levels of the guest's page tables, 4 or 5.
    pub levels: u8,
    /// CPUs the guest's kernel can have.
    pub nr_cpus: u32,
    /// The record types of its kernel; in plain mode, how its own records are
    /// laid out.
    pub types: RecordFormat,
    /// When the helper found it, host wall clock, nanoseconds since 1970.
    pub found_ns: u64,
    /// The first and the last pair of clocks, each the best of its second.
    pub clocks: Option<(ClockPair, ClockPair)>,
}

impl Boot {
    /// The host's wall clock at a moment of the guest's trace clock.
    pub fn wall_ns(&self, guest_ns: u64) -> Option<u64> {
        let (first, last) = self.clocks?;
        let since = i128::from(guest_ns) - i128::from(first.guest_ns);
        let guest_span = i128::from(last.guest_ns) - i128::from(first.guest_ns);
        let host_span = i128::from(last.host_ns) - i128::from(first.host_ns);
        // Below a minute the clocks' own drift is less than the error of a
        // pair.
        let elapsed = if guest_span < 60_000_000_000 || host_span <= 0 {
            since
        } else {
            since * host_span / guest_span
        };
        u64::try_from(i128::from(first.host_ns) + elapsed).ok()
    }
}

/// One turn of the switch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SwitchChange {
    /// When the guest was done, host wall clock, nanoseconds since 1970.
    pub wall_ns: u64,
    /// What was traced from then on; none after off.
    pub functions: Vec<String>,
    /// From the command to its being taken up, nanoseconds.
    pub pickup_ns: u64,
    /// How long the guest's kernel worked on it, nanoseconds.
    pub worked_ns: u64,
}

/// What was counted. All of it is written out, also where it is 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Counters {
    /// Bytes of events read from the guest.
    pub bytes: u64,
    /// Calls and returns that decoded.
    pub records: u64,
    /// Records that decoded under no key.
    pub forged: u64,
    /// Records known to be missing.
    pub lost: u64,
    /// Places where records are missing.
    pub lost_places: u64,
    /// Records of other tracers.
    pub other: u64,
    /// Pages that changed under each copy.
    pub torn_pages: u64,
    /// Rounds in which a CPU's buffer could not be followed.
    pub damaged: u64,
    /// Bytes read about when the guest was reset, and set aside.
    pub after_reset_bytes: u64,
    /// Keys and epochs that the guest changed.
    pub tampered: u64,
    /// Bytes read that could not be stored: the disk was full, or too slow, or the
    /// session as large as it may become.
    pub unstored_bytes: u64,
    /// Times a helper took the session over from one that had gone.
    pub resumed: u64,
    /// Key intervals that passed without a key of their own, since the disk,
    /// the host or the guest's heart was slow: the key before lasted on.
    pub late_keys: u64,
}

/// What the guest's kernel says of its own ring buffer since the trace began.
/// Where records have no numbers, this is the one count of what is missing,
/// and it is the guest's word.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestCounts {
    /// Records that it wrote.
    pub written: u64,
    /// Of these: written over before the guest itself read them. Most were
    /// read from outside before.
    pub overwritten: u64,
    /// Records that it dropped.
    pub dropped: u64,
    /// How the counts stood when they were looked at last, CPU by CPU.
    #[serde(skip)]
    last: Vec<Written>,
}

impl GuestCounts {
    /// Begins to count from here.
    pub fn begin(&mut self, now: Vec<Written>) {
        self.last = now;
    }

    /// Adds what was counted since the last look. A count that has fallen was
    /// set back to 0 in between (the guest emptied its ring).
    pub fn look(&mut self, now: Vec<Written>) {
        let since = |now: u64, last: u64| if now >= last { now - last } else { now };
        for (cpu, now) in now.iter().enumerate() {
            let last = self.last.get(cpu).copied().unwrap_or_default();
            let written = since(now.entries, last.entries);
            self.written = self.written.saturating_add(written);
            let overwritten = since(now.overrun, last.overrun);
            self.overwritten = self.overwritten.saturating_add(overwritten);
            let dropped = since(now.dropped, last.dropped);
            self.dropped = self.dropped.saturating_add(dropped);
        }
        self.last = now;
    }
}

/// What `session.json` holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meta {
    /// Version of this file's form: 1.
    pub version: u32,
    /// The domain's name.
    pub domain: String,
    /// The domain's UUID.
    pub uuid: Uuid,
    /// How far its records can be trusted.
    pub mode: Mode,
    /// Whether it still grows.
    pub state: State,
    /// The QEMU process.
    pub qemu: QemuProcess,
    /// When it began, host wall clock, nanoseconds since 1970.
    pub started_ns: u64,
    /// When it ended.
    pub ended_ns: Option<u64>,
    /// Why it ended.
    pub end: Option<EndReason>,
    /// How long a key lasts, nanoseconds.
    pub interval_ns: u64,
    /// The turns of the switch.
    pub switches: Vec<SwitchChange>,
    /// The guest's boots.
    pub boots: Vec<Boot>,
    /// What was counted.
    pub counters: Counters,
    /// What the guest says it wrote; in plain mode only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_counts: Option<GuestCounts>,
}

impl Meta {
    /// The functions traced last.
    pub fn functions(&self) -> &[String] {
        self.switches
            .iter()
            .rev()
            .find(|change| !change.functions.is_empty())
            .map_or(&[], |change| &change.functions)
    }

    /// Reads the `session.json` of a session's directory.
    ///
    /// # Errors
    /// If it is not there or cannot be understood.
    pub fn load(dir: &Path) -> Result<Self, SessionError> {
        let path = dir.join(META_FILE);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error)
                if matches!(
                    error.kind(),
                    std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory
                ) && dir.exists() =>
            {
                return Err(SessionError::NotASession(dir.to_owned()));
            }
            Err(error) => return Err(SessionError::io("read", path)(error)),
        };
        serde_json::from_slice(&text).map_err(|cause| SessionError::Meta { path, cause })
    }

    /// Writes the `session.json` of a session's directory, whole or not at all.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn save(&self, dir: &Path) -> Result<(), SessionError> {
        replace(dir, &self.text(dir)?)
    }

    /// What is in the `session.json` of the directory.
    pub(super) fn text(&self, dir: &Path) -> Result<Vec<u8>, SessionError> {
        let mut text = serde_json::to_vec_pretty(self)
            .map_err(std::io::Error::from)
            .map_err(SessionError::io("write", dir.join(META_FILE)))?;
        text.push(b'\n');
        Ok(text)
    }
}

/// Puts this text in the place of a session's `session.json`, whole or not at all.
pub(super) fn replace(dir: &Path, text: &[u8]) -> Result<(), SessionError> {
    let path = dir.join(META_FILE);
    let io = || SessionError::io("write", &path);
    let mut file = tempfile::NamedTempFile::new_in(dir).map_err(io())?;
    file.write_all(text).map_err(io())?;
    file.as_file().sync_data().map_err(io())?;
    file.persist(&path)
        .map_err(|error| error.error)
        .map_err(io())?;
    Ok(())
}
