//! A guest for the engine's tests: a synthetic kernel in memory of our own,
//! and a thread that answers commands as `xftrace_look()` of the guest patch
//! does. Its ring buffer is there, and has no CPU.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::config::Config;
use crate::libvirt::xml::DomainXml;
use crate::ram::{Gpa, GuestRam, VecRam};
use crate::session::QemuProcess;

use super::engine::{Engine, Job};
use super::graphs::Graphs;
use super::protocol::{Reply, Request};
use super::Attached;

#[allow(
    dead_code,
    unreachable_pub,
    reason = "it is a module of the tests below tests/, who use more of it"
)]
#[path = "../../tests/support/guest.rs"]
mod synthetic;

use synthetic::{Guest, Plan};

const UUID: &str = "9a3f1c50-7f1e-4f0e-8f5e-0123456789ab";
/// Longer than anything here takes on a busy machine.
const SOON: Duration = Duration::from_secs(30);

/// Offsets in `struct xftrace_control`, include/linux/xftrace.h.
mod at {
    pub(super) const BOOT_ID: u64 = 0x10;
    pub(super) const BEATS: u64 = 0x80;
    pub(super) const CLOCK: u64 = 0x88;
    pub(super) const SEEN: u64 = 0x90;
    pub(super) const ACK: u64 = 0x94;
    pub(super) const ERROR: u64 = 0x98;
    pub(super) const STATE: u64 = 0xa0;
    pub(super) const FLAGS: u64 = 0xa4;
    pub(super) const HOST_SEQ: u64 = 0x100;
    pub(super) const HOST_COMMAND: u64 = 0x104;
    pub(super) const HOST_NR: u64 = 0x108;
}

pub(super) const OFF: u32 = 0;
pub(super) const ON: u32 = 1;
pub(super) const STOPPED: u32 = 2;

/// What a test does to the guest, and sees of it.
#[derive(Default)]
pub(super) struct Knobs {
    /// Somebody in the guest reads trace_pipe: the tracer cannot be changed.
    pub(super) pipe_is_open: AtomicBool,
    /// It does nothing at all.
    pub(super) dead: AtomicBool,
    /// For how long it works at a command, milliseconds.
    pub(super) work: AtomicU32,
    /// It beats, and takes no command up.
    pub(super) deaf: AtomicBool,
    /// What happens right before it says that it has gone off.
    pub(super) at_off: Mutex<Option<Box<dyn Fn() + Send>>>,
    /// How often tracing began from off.
    pub(super) begun: AtomicU32,
    /// How often it was to trace every function there is.
    pub(super) all: AtomicU32,
    end: AtomicBool,
}

/// The engine and its guest.
pub(super) struct Setting {
    pub(super) engine: Engine,
    pub(super) knobs: Arc<Knobs>,
    pub(super) ram: Arc<VecRam>,
    control: Gpa,
    kernel: Option<JoinHandle<()>>,
    dir: tempfile::TempDir,
}

/// Where the kernel lies, and below it a copy of it that does not run.
pub(super) const TRUE: Gpa = Gpa(0x100_0000);
pub(super) const PLANTED: Gpa = Gpa(0x80_0000);

impl Setting {
    /// A guest whose kernel was found, and is off.
    pub(super) fn new() -> Self {
        Self::with(|_| ())
    }

    /// The same with another configuration.
    pub(super) fn with(change: impl FnOnce(&mut Config)) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let plan = Plan {
            data: vec![
                ("xftrace_control".to_owned(), Guest::SPARE),
                ("global_key".to_owned(), Guest::SPARE + 0x1000),
            ],
            ..Plan::default()
        };
        fs::create_dir(dir.path().join("symbols")).expect("a directory");
        fs::write(dir.path().join("symbols/System.map"), plan.system_map()).expect("a file");
        let planted = Plan {
            phys_text: PLANTED.0,
            ..plan.clone()
        };
        let planted = Guest::of(planted);
        write_control(&planted, planted.gpa(Guest::SPARE));
        let guest = Guest::load(plan, planted.ram);
        let control = guest.gpa(Guest::SPARE);
        write_control(&guest, control);
        let ram = Arc::new(guest.ram);
        let knobs = Arc::new(Knobs::default());
        let kernel = {
            let (ram, knobs) = (Arc::clone(&ram), Arc::clone(&knobs));
            std::thread::spawn(move || run_kernel(&ram, control, &knobs))
        };
        let mut config = Config::default();
        change(&mut config);
        let mut setting = Self {
            engine: engine(dir.path(), &config, Arc::clone(&ram)),
            knobs,
            ram,
            control,
            kernel: Some(kernel),
            dir,
        };
        setting.until("the kernel", |setting| setting.engine.watch.guest.is_some());
        setting
    }

    /// The helper is killed, and another one started.
    pub(super) fn killed_and_started(&mut self) {
        let config = self.engine.config.clone();
        let old = std::mem::replace(
            &mut self.engine,
            engine(self.dir.path(), &config, Arc::clone(&self.ram)),
        );
        drop(old);
    }

    /// Until the helper follows a kernel, while the planted one's heart beats. Where it is.
    pub(super) fn found_beside_planted(&mut self) -> Option<Gpa> {
        self.until("a kernel", |setting| {
            setting.beat_planted();
            setting.place().is_some()
        });
        self.place()
    }

    /// As if no helper had ever seen the guest's kernel.
    pub(super) fn forget_place(&self) {
        fs::remove_dir_all(self.dir.path().join("run")).expect("a directory");
    }

    /// Round after round until it is as it should be.
    pub(super) fn until(&mut self, what: &str, mut is_so: impl FnMut(&mut Self) -> bool) {
        let begun = Instant::now();
        while !is_so(self) {
            assert!(begun.elapsed() < SOON, "not within {SOON:?}: {what}");
            self.engine.round().expect("a round");
            std::thread::sleep(Duration::from_millis(3));
        }
    }

    /// Asks the engine, and gives its last answer.
    pub(super) fn ask(&mut self, request: Request) -> Reply {
        let (reply, replies) = std::sync::mpsc::channel();
        self.engine.job(Job { request, reply });
        let last = replies
            .iter()
            .find(|reply| !matches!(reply, Reply::Progress { .. }));
        last.expect("an answer")
    }

    pub(super) fn on(&mut self) -> Reply {
        self.ask(Request::On {
            functions: vec!["vfs_read".to_owned()],
            interval_ns: None,
            buffer_kb: None,
        })
    }

    /// What the guest's switch is set to.
    pub(super) fn state(&self) -> u32 {
        let at = Gpa(self.control.0 + at::STATE);
        self.ram.read_u32(at).expect("a state")
    }

    /// Makes the planted kernel's heart beat.
    pub(super) fn beat_planted(&self) {
        self.planted_heart()();
    }

    /// What makes it beat, for another thread.
    pub(super) fn planted_heart(&self) -> impl Fn() + Send + 'static {
        let beats = Gpa(PLANTED.0 + (self.control.0 - TRUE.0) + at::BEATS);
        let ram = Arc::clone(&self.ram);
        move || {
            let next = ram.read_u64(beats).expect("RAM") + 1;
            ram.write_u64(beats, next).expect("written");
        }
    }

    /// Gives the planted kernel a boot id of its own.
    pub(super) fn plant_another_boot(&self) {
        let control = PLANTED.0 + (self.control.0 - TRUE.0);
        self.ram
            .write_u64(Gpa(control + at::BOOT_ID), 7)
            .expect("written");
    }

    /// Where the kernel lies that the helper follows.
    pub(super) fn place(&self) -> Option<Gpa> {
        Some(self.engine.watch.guest.as_ref()?.kernel.phys_text)
    }

    /// The guest says that it has booted.
    pub(super) fn change_boot_id(&self, id: u64) {
        let at = Gpa(self.control.0 + at::BOOT_ID);
        self.ram.write_u64(at, id).expect("written");
    }

    /// The guest changes the newest key's epoch.
    pub(super) fn change_key(&self) {
        let at = Gpa(self.control.0 + 0x1000);
        self.ram.write_u64(at, 0xbad).expect("written");
    }

    /// A command of another host, such as a helper before this one.
    pub(super) fn command(&self, command: u32) {
        let word = |offset| Gpa(self.control.0 + offset);
        let seq = self.ram.read_u32(word(at::HOST_SEQ)).expect("a number") + 1;
        let set = |offset, value| self.ram.write_u32(word(offset), value).expect("written");
        set(at::HOST_COMMAND, command);
        set(at::HOST_NR, 1);
        set(at::HOST_SEQ, seq);
        let begun = Instant::now();
        while self.ram.read_u32(word(at::ACK)).expect("a number") != seq {
            assert!(begun.elapsed() < SOON, "the guest does not answer");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        self.knobs.end.store(true, Ordering::Release);
        if let Some(kernel) = self.kernel.take() {
            kernel.join().expect("the kernel ends in order");
        }
    }
}

fn engine(dir: &Path, config: &Config, ram: Arc<VecRam>) -> Engine {
    let mut config = config.clone();
    config.paths.sessions = dir.join("sessions");
    config.paths.symbols = dir.join("symbols");
    config.paths.run = dir.join("run");
    let xml =
        format!("<domain id='1'><name>web1</name><uuid>{UUID}</uuid><memory>1</memory></domain>");
    let domain = DomainXml::parse_bytes(xml.as_bytes()).expect("a domain");
    let attached = Attached {
        ram,
        files: Vec::new(),
        qemu: QemuProcess {
            pid: 1,
            start_time: 1,
        },
        pidfd: OwnedFd::from(UnixStream::pair().expect("a pair").0),
        max_cpus: 4,
    };
    let graphs = Graphs::up_to(config.limits.text_size.0);
    Engine::new(domain, config, attached, graphs)
}

/// The control block after boot: see tests/ring_reader.rs for the layout.
fn write_control(guest: &Guest, control: Gpa) {
    let buffer = guest.runtime(Guest::SPARE + 0x2000).0;
    let buffers = guest.runtime(Guest::SPARE + 0x3000).0;
    let mut page = vec![0u8; 0x80];
    let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x00, &0x3143_5254_4658_5f5f_u64.to_le_bytes());
    put(0x08, &1u32.to_le_bytes());
    put(0x10, &1u64.to_le_bytes());
    put(0x18, &64u32.to_le_bytes());
    put(0x1c, &384u32.to_le_bytes());
    put(0x20, &guest.runtime(Guest::SPARE + 0x1000).0.to_le_bytes());
    put(0x28, &1u32.to_le_bytes());
    for (index, number) in [20u16, 21, 22, 11, 10].into_iter().enumerate() {
        put(0x2c + 2 * index, &number.to_le_bytes());
    }
    put(0x40, &buffer.to_le_bytes());
    put(0x48, &4096u32.to_le_bytes());
    let fields = [64u16, 40, 56, 88, 80, 128, 136, 144, 152, 0, 48, 0, 8, 16];
    for (index, offset) in fields.into_iter().enumerate() {
        put(0x4c + 2 * index, &offset.to_le_bytes());
    }
    guest.ram.poke(control, &page);
    let trace_buffer = guest.gpa(Guest::SPARE + 0x2000);
    guest.ram.poke_u64(Gpa(trace_buffer.0 + 64), buffers);
    // The control page is written from here on without filling holes.
    guest.ram.poke(Gpa(control.0 + 0xfff), &[0]);
}

/// kernel/trace/xftrace.c of guest-kernel-patches, as far as the host sees it.
fn run_kernel(ram: &VecRam, control: Gpa, knobs: &Knobs) {
    let get = |offset| ram.read_u32(Gpa(control.0 + offset)).expect("a word");
    let set = |offset, value| {
        ram.write_u32(Gpa(control.0 + offset), value)
            .expect("written");
    };
    let (mut tracer, mut recording) = (false, true);
    let mut beats = 0u64;
    while !knobs.end.load(Ordering::Acquire) {
        std::thread::sleep(Duration::from_millis(2));
        if knobs.dead.load(Ordering::Acquire) {
            continue;
        }
        beats += 1;
        set(at::FLAGS, u32::from(tracer) | u32::from(recording) << 1);
        ram.write_u64(Gpa(control.0 + at::CLOCK), beats * 2_000_000)
            .expect("written");
        ram.write_u64(Gpa(control.0 + at::BEATS), beats)
            .expect("written");
        let seq = get(at::HOST_SEQ);
        if knobs.deaf.load(Ordering::Acquire) || seq == get(at::ACK) {
            continue;
        }
        let (command, nr) = (get(at::HOST_COMMAND), get(at::HOST_NR));
        set(at::SEEN, seq);
        std::thread::sleep(Duration::from_millis(
            knobs.work.load(Ordering::Acquire).into(),
        ));
        let stop = |recording: &mut bool| {
            if get(at::STATE) == ON {
                *recording = false;
                set(at::STATE, STOPPED);
            }
        };
        let error = match (command, get(at::STATE)) {
            (1, STOPPED) => -114,
            (1, state) => {
                knobs.all.fetch_add(u32::from(nr == 0), Ordering::AcqRel);
                let from_off = u32::from(state == OFF);
                knobs.begun.fetch_add(from_off, Ordering::AcqRel);
                (tracer, recording) = (true, true);
                set(at::STATE, ON);
                0
            }
            (2, _) => {
                stop(&mut recording);
                0
            }
            (_, OFF) => 0,
            _ if knobs.pipe_is_open.load(Ordering::Acquire) => {
                stop(&mut recording);
                -16i32
            }
            _ => {
                (tracer, recording) = (false, true);
                set(at::STATE, OFF);
                if let Some(at_off) = &*knobs.at_off.lock().expect("no panic") {
                    at_off();
                }
                0
            }
        };
        set(at::FLAGS, u32::from(tracer) | u32::from(recording) << 1);
        set(at::ERROR, error as u32);
        set(at::ACK, seq);
    }
}
