//! What `xftrace` and a helper say to each other over the helper's socket:
//! one JSON value a line, a request, then replies until one that is not
//! [`Reply::Progress`].

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use nix::sys::socket::{getsockopt, sockopt};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::integrity;
use crate::libvirt::run_dir::RunDir;
use crate::session::{Counters, Mode, QemuProcess};

/// A line longer than this is not ours.
const LINE_LIMIT: u64 = 1 << 20;

/// What can be asked of a helper.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// How things stand.
    Status,
    /// Begin a trace, or trace other functions.
    On {
        /// As typed; none means the domain's or the configuration's.
        functions: Vec<String>,
        /// How long a key lasts, nanoseconds.
        interval_ns: Option<u64>,
        /// The ring buffer of each CPU, KiB.
        buffer_kb: Option<u32>,
    },
    /// End the trace.
    Off,
}

/// What a helper answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "kebab-case")]
pub enum Reply {
    /// More is to come.
    Progress {
        /// For people.
        text: String,
    },
    /// To [`Request::Status`].
    Status(Box<Status>),
    /// To [`Request::On`]: the trace is on.
    On {
        /// What is traced, as the guest's kernel calls it.
        functions: Vec<String>,
        /// The session.
        session: PathBuf,
        /// Until the guest took the command up, nanoseconds.
        pickup_ns: u64,
        /// How long its kernel worked on it, nanoseconds.
        worked_ns: u64,
        /// How far the records can be trusted.
        mode: Mode,
    },
    /// To [`Request::Off`]: there was no session yet, and the trace that was to begin with
    /// the domain is not begun any more.
    CalledOff,
    /// To [`Request::Off`]: the session is closed.
    Off {
        /// The session.
        session: PathBuf,
        /// Its call flow.
        graph: PathBuf,
        /// Whether that has all calls; `limits.text_size` may have it end before.
        is_whole: bool,
        /// Why that could not be written, if it could not.
        unwritten: Option<String>,
        /// What was counted.
        counters: Counters,
        /// What is still to be done in the guest, and why, where it did not
        /// go along.
        left: Option<String>,
    },
    /// It could not be done.
    Error {
        /// What, why, and what to do.
        text: String,
    },
}

/// How things stand.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The domain's name.
    pub domain: String,
    /// Its UUID.
    pub uuid: Uuid,
    /// The helper's own process id.
    pub helper_pid: u32,
    /// The QEMU process.
    pub qemu: QemuProcess,
    /// The guest's memory file or files.
    pub memory: Vec<PathBuf>,
    /// The guest's kernel.
    pub guest: GuestStatus,
    /// How its memory is checked; none where it is not to be.
    pub integrity: Option<IntegrityStatus>,
    /// Why the guest's kernel is not traced yet that is to be, since its start or since
    /// it was booted again.
    pub awaited: Option<String>,
    /// The trace, where one is on.
    pub trace: Option<TraceStatus>,
    /// The newest session that is closed.
    pub last_session: Option<PathBuf>,
}

/// What is known of the guest's kernel.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum GuestStatus {
    /// None was found yet.
    Searching {
        /// Why not.
        why: String,
    },
    /// It was found, and its heart beats.
    Alive {
        /// Its banner, control characters escaped.
        banner: String,
        /// Where its symbols come from.
        symbols: PathBuf,
        /// Whether they tell where the kernel's own list of symbols is, with which they
        /// were compared then. Otherwise only its banner says that they are its own.
        #[serde(default = "yes")]
        compared: bool,
        /// Run-time address minus link-time address.
        slide: u64,
        /// Levels of its page tables.
        levels: u8,
        /// Since the last sign of life, milliseconds.
        silent_ms: u64,
        /// How far its records can be trusted.
        mode: Mode,
        /// Why it may not be the one that runs.
        rivals: Option<String>,
        /// In plain mode, how it is booted; none in a domain that is not enrolled.
        plain: Option<Box<PlainBoot>>,
    },
}

/// What helpers did before they said it.
fn yes() -> bool {
    true
}

/// How a guest without the patch is booted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlainBoot {
    /// Where it records, if the functions that the domain is enrolled with can be
    /// traced.
    pub ring: Option<PlainRing>,
    /// Why they cannot.
    pub cannot: Option<String>,
    /// What to boot it with for these functions.
    pub command_line: String,
    /// Whether its kernel does not have one of them: none is in the command line then.
    pub unknown: bool,
    /// The same for a ring buffer in memory that is reserved at boot, and what to type
    /// in the guest then; none where its kernel cannot have that.
    pub reserved: Option<(String, String)>,
    /// What to type in the guest now: it was booted with such a ring, which has no
    /// tracer yet.
    pub to_type: Option<String>,
}

/// The ring buffer that a guest without the patch records into.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlainRing {
    /// The name of its instance, escaped; none of the global one.
    pub instance: Option<String>,
    /// Whether it lies in memory that was reserved at boot.
    pub reserved: bool,
    /// The first CPU's size, KiB.
    pub kb: u64,
    /// Which functions it has the calls of, for people.
    pub functions: String,
}

/// How the kernel in the guest's memory is checked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct IntegrityStatus {
    /// How often, nanoseconds.
    pub interval_ns: u64,
    /// Why it cannot be now.
    pub cannot: Option<String>,
    /// How many looks there were.
    pub looks: u64,
    /// The last one.
    pub last: Option<LookStatus>,
}

/// A look at the guest's memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LookStatus {
    /// When it was over, nanoseconds since 1970.
    pub wall_ns: u64,
    /// What it took of the host's processors, nanoseconds.
    pub cpu_ns: u64,
    /// What was found.
    pub findings: Vec<integrity::Finding>,
    /// Findings that there was no room for.
    pub not_listed: u64,
    /// Checks that could not be made, or not wholly, and why.
    pub doubts: Vec<String>,
}

/// A trace that is on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TraceStatus {
    /// The session.
    pub session: PathBuf,
    /// How far its records can be trusted.
    pub mode: Mode,
    /// What is traced.
    pub functions: Vec<String>,
    /// Since when, nanoseconds since 1970.
    pub since_ns: u64,
    /// How long a key lasts, nanoseconds.
    pub interval_ns: u64,
    /// The key in use; none in plain mode.
    pub epoch: Option<u64>,
    /// Which boot of the guest this is, from 1 on.
    pub boot: u32,
    /// Bytes of ring buffer stored.
    pub stored: u64,
    /// What was counted.
    pub counters: Counters,
    /// What it is judged by while it is on; none without a baseline.
    pub judged: Option<JudgedStatus>,
}

/// How a trace is judged while it is on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JudgedStatus {
    /// The baseline's name.
    pub baseline: String,
    /// Why it is not judged after all.
    pub cannot: Option<String>,
    /// How often something was told of.
    pub findings: u64,
}

/// One end of a conversation.
#[derive(Debug)]
pub struct Line {
    stream: BufReader<UnixStream>,
}

impl Line {
    /// Takes over a connected socket.
    pub fn new(stream: UnixStream) -> Self {
        Self {
            stream: BufReader::new(stream),
        }
    }

    /// Connects to the helper of a domain.
    ///
    /// # Errors
    /// If nobody listens there, or it is not ours to ask.
    pub fn connect(run_dir: &RunDir, uuid: Uuid) -> io::Result<Self> {
        UnixStream::connect(run_dir.socket_path(uuid)).map(Self::new)
    }

    /// How long [`Line::receive`] waits; `None` for ever.
    ///
    /// # Errors
    /// If the socket refuses.
    pub fn patience(&self, time: Option<Duration>) -> io::Result<()> {
        self.stream.get_ref().set_read_timeout(time)
    }

    /// The process at the other end: of a helper's socket, the helper.
    pub fn peer(&self) -> Option<i32> {
        getsockopt(self.stream.get_ref(), sockopt::PeerCredentials)
            .ok()
            .map(|peer| peer.pid())
    }

    /// Sends a value.
    ///
    /// # Errors
    /// If the other end has gone.
    pub fn send(&mut self, value: &impl Serialize) -> io::Result<()> {
        let mut line = serde_json::to_vec(value)?;
        line.push(b'\n');
        self.stream.get_mut().write_all(&line)
    }

    /// Receives a value; `None` where the other end has closed.
    ///
    /// # Errors
    /// If it is not one of ours.
    pub fn receive<T: DeserializeOwned>(&mut self) -> io::Result<Option<T>> {
        let mut line = Vec::new();
        (&mut self.stream)
            .take(LINE_LIMIT)
            .read_until(b'\n', &mut line)?;
        if line.is_empty() {
            return Ok(None);
        }
        serde_json::from_slice(&line)
            .map(Some)
            .map_err(io::Error::from)
    }
}
