//! `xftrace follow` as a process, with a helper of the test's own: how it
//! begins, and each way in which it ends.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use tempfile::TempDir;
use uuid::Uuid;
use xftrace::helper::protocol::{GuestStatus, Line, Reply, Request, Status, TraceStatus};
use xftrace::libvirt::run_dir::RunDir;
use xftrace::session::{Counters, Meta, Mode, QemuProcess, GRAPH_FILE};

use crate::growing::{Growing, Record, PAIRED};

const UUID: Uuid = Uuid::from_u128(0x1111_2222_3333_4444_5555_6666_7777_8888);
/// More than any ending takes on a machine that is busy.
const PATIENCE: Duration = Duration::from_secs(30);

/// A host of libvirt's test driver: web1 is enrolled by its name and runs,
/// plain is not enrolled.
pub(crate) struct Host {
    dir: TempDir,
}

impl Host {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let domain = |name: &str, uuid: Uuid| {
            format!(
                "<domain type='test'><name>{name}</name><uuid>{uuid}</uuid><memory>8192</memory>\
                 <memoryBacking><source type='file'/><access mode='shared'/></memoryBacking>\
                 <os><type>hvm</type></os></domain>"
            )
        };
        let node = format!(
            "<node>{}{}</node>",
            domain("web1", UUID),
            domain("plain", Uuid::from_u128(2))
        );
        let shown = dir.path().display();
        let config = format!(
            "auto_enroll = [\"web*\"]\n[paths]\nrun = \"{shown}/run\"\nsessions = \"{shown}\"\n"
        );
        fs::write(dir.path().join("node.xml"), node).expect("a file");
        fs::write(dir.path().join("xftrace.toml"), config).expect("a file");
        // As the hook saves it when the domain starts.
        let saved = domain("web1", UUID);
        RunDir::at(&dir.path().join("run"))
            .save(UUID, saved.as_bytes())
            .expect("a file");
        Self { dir }
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// `xftrace` with the options that name this host, for a shell.
    pub(crate) fn shell(&self) -> String {
        let (binary, dir) = (
            assert_cmd::cargo::cargo_bin!("xftrace"),
            self.dir.path().display(),
        );
        format!(
            "{} -c test://{dir}/node.xml --config {dir}/xftrace.toml",
            binary.display()
        )
    }

    /// `xftrace follow`, with its output in pipes.
    fn follow(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(assert_cmd::cargo::cargo_bin!("xftrace"));
        let node = self.dir.path().join("node.xml");
        command
            .env_remove("LIBVIRT_DEFAULT_URI")
            .env_remove("XFTRACE_CONFIG")
            .args(["-c", &format!("test://{}", node.display()), "--config"])
            .arg(self.dir.path().join("xftrace.toml"))
            .arg("follow")
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// A helper that says of `session` that it is on, or ends it.
    pub(crate) fn helper(&self, session: Option<&Path>) -> Helper {
        self.answering(session, Ok(true))
    }

    /// One that ends `session` and cannot write its call flow.
    pub(crate) fn helper_that_could_not_write(&self, session: &Path, why: &str) -> Helper {
        self.answering(Some(session), Err(why.to_owned()))
    }

    /// One that ends a session whose call flow is cut short.
    pub(crate) fn helper_that_wrote_a_part(&self, session: &Path) -> Helper {
        self.answering(Some(session), Ok(false))
    }

    fn answering(&self, session: Option<&Path>, written: Result<bool, String>) -> Helper {
        let socket = RunDir::at(&self.dir.path().join("run")).socket_path(UUID);
        let listener = UnixListener::bind(&socket).expect("a socket");
        let status = status(session.map(Path::to_owned));
        let ended = session.map(|dir| Reply::Off {
            session: dir.to_owned(),
            graph: dir.join(GRAPH_FILE),
            is_whole: written == Ok(true),
            unwritten: written.clone().err(),
            counters: Counters::default(),
            left: None,
        });
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if told.load(Ordering::Relaxed) {
                    break;
                }
                let mut line = Line::new(stream.expect("a connection"));
                let reply = match (line.receive(), &ended) {
                    (Ok(Some(Request::Status)), _) => Reply::Status(Box::new(status.clone())),
                    (Ok(Some(Request::Off)), Some(ended)) => ended.clone(),
                    _ => continue,
                };
                line.send(&reply).expect("an answer");
            }
        });
        Helper {
            socket,
            stop,
            thread: Some(thread),
        }
    }
}

pub(crate) struct Helper {
    socket: PathBuf,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Helper {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = UnixStream::connect(&self.socket);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let _ = fs::remove_file(&self.socket);
    }
}

fn status(session: Option<PathBuf>) -> Status {
    let trace = |session: PathBuf| TraceStatus {
        mode: Mode::Keyed,
        functions: vec!["__x64_sys_read".into()],
        since_ns: 0,
        interval_ns: 1,
        epoch: Some(1),
        boot: 1,
        stored: 0,
        counters: session_counters(&session),
        judged: None,
        session,
    };
    Status {
        domain: "web1".into(),
        uuid: UUID,
        helper_pid: 1,
        qemu: QemuProcess {
            pid: 1,
            start_time: 1,
        },
        memory: Vec::new(),
        guest: GuestStatus::Searching { why: "test".into() },
        integrity: None,
        awaited: None,
        trace: session.map(trace),
        last_session: None,
    }
}

/// What a session that is there has counted.
fn session_counters(dir: &Path) -> Counters {
    Meta::load(dir).map_or_else(|_| Counters::default(), |meta| meta.counters)
}

/// A command that follows, and what it has said so far.
struct Following {
    child: Child,
    /// None where it was closed.
    out: Option<BufReader<ChildStdout>>,
}

impl Following {
    fn start(mut command: Command) -> Self {
        let mut child = command.spawn().expect("the command");
        let out = child.stdout.take().map(BufReader::new);
        Self { child, out }
    }

    /// Reads until a line that has `text`.
    fn until(&mut self, text: &str) {
        let out = self.out.as_mut().expect("its output");
        let mut line = String::new();
        while !line.contains(text) {
            line.clear();
            let bytes = out.read_line(&mut line).expect("output");
            assert!(bytes > 0, "no line with {text}");
        }
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).expect("a process");
    }

    /// The exit status, the rest of the output, and what it said beside.
    fn end(mut self) -> (Option<i32>, String, String) {
        // What these tests have it write fits into a pipe.
        let status = exit(&mut self.child);
        let (mut out, mut said) = (String::new(), String::new());
        if let Some(rest) = &mut self.out {
            rest.read_to_string(&mut out).expect("output");
        }
        let mut stderr = self.child.stderr.take().expect("its messages");
        stderr.read_to_string(&mut said).expect("messages");
        (status, out, said)
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn exit(child: &mut Child) -> Option<i32> {
    let started = Instant::now();
    while started.elapsed() < PATIENCE {
        if let Some(status) = child.try_wait().expect("a process") {
            return status.code();
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("it does not end");
}

/// A session with a read in it.
fn session() -> Growing {
    let mut growing = Growing::new(1);
    growing.pair();
    growing.add_all(
        0,
        &[
            (PAIRED, Record::Root),
            (PAIRED + 1000, Record::Call),
            (PAIRED + 2000, Record::Return),
            (PAIRED + 3000, Record::RootReturn),
        ],
    );
    growing
}

/// The last line of that read.
const READ: &str = "} /* __x64_sys_read */";

#[test]
fn says_why_there_is_nothing_to_follow() {
    let host = Host::new();
    let refused = |arguments: &[&str], why: &str| {
        let output = host.follow(arguments).output().expect("the command");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(
            said.starts_with("xftrace: error: ") && said.contains(why),
            "{said}"
        );
        assert_eq!(output.stdout, b"");
    };
    refused(&["-d", "none"], "no domain 'none'");
    refused(
        &["-d", "plain"],
        "domain 'plain' is not enrolled: type `xftrace enroll plain`",
    );
    // No helper, and one that has nothing on.
    let off = "no trace is on for domain 'web1': begin one with `xftrace on -d web1`";
    refused(&[], off);
    let helper = host.helper(None);
    refused(&[], off);
    drop(helper);
    let helper = host.helper(Some(Path::new("/nonexistent/session")));
    refused(&[], "/nonexistent/session");
    drop(helper);
}

#[test]
fn ends_with_the_trace() {
    let host = Host::new();
    let mut growing = session();
    let _helper = host.helper(Some(growing.dir()));
    let mut text = Following::start(host.follow(&[]));
    let mut json = Following::start(host.follow(&["--format", "json"]));
    text.until(READ);
    json.until("\"type\":\"leaf\"");
    growing.close();
    assert_eq!(text.end(), (Some(0), String::new(), String::new()));
    let (status, out, said) = json.end();
    assert_eq!((status, said.as_str()), (Some(0), ""));
    assert!(
        out.lines()
            .next_back()
            .is_some_and(|line| line.contains("summary")),
        "{out}"
    );
}

#[test]
fn a_signal_ends_it_well() {
    let host = Host::new();
    let growing = session();
    let _helper = host.helper(Some(growing.dir()));
    let mut quickest = PATIENCE;
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGINT] {
        let mut following = Following::start(host.follow(&["-d", "web1"]));
        following.until(READ);
        let sent = Instant::now();
        following.signal(signal);
        assert_eq!(following.end(), (Some(0), String::new(), String::new()));
        quickest = quickest.min(sent.elapsed());
    }
    // By itself, and not because its time is over.
    assert!(quickest < Duration::from_millis(900), "{quickest:?}");
}

#[test]
fn a_signal_ends_it_where_nobody_reads_what_it_writes() {
    let host = Host::new();
    let mut growing = session();
    // More than a pipe holds.
    for n in 1..5000 {
        growing.add(0, PAIRED + n * 10_000, Record::Root);
    }
    let _helper = host.helper(Some(growing.dir()));
    let mut following = Following::start(host.follow(&[]));
    following.until(READ);
    std::thread::sleep(Duration::from_millis(500));
    following.signal(Signal::SIGINT);
    assert_eq!(exit(&mut following.child), Some(0));
}

#[test]
fn a_reader_that_goes_away_ends_it_quietly() {
    let host = Host::new();
    let growing = session();
    let _helper = host.helper(Some(growing.dir()));
    let mut following = Following::start(host.follow(&[]));
    following.until(READ);
    // Nothing more is written, so that no write can fail.
    following.out = None;
    assert_eq!(following.end(), (Some(0), String::new(), String::new()));
}

#[test]
fn says_that_the_helper_is_gone_and_shows_what_it_left() {
    let host = Host::new();
    let mut growing = session();
    let helper = host.helper(Some(growing.dir()));
    let mut following = Following::start(host.follow(&[]));
    following.until(READ);
    drop(helper);
    growing.add(0, PAIRED + 9000, Record::Root);
    let (status, out, said) = following.end();
    assert_eq!(status, Some(2), "{said}");
    assert!(out.contains("__x64_sys_read() {"), "{out}");
    assert!(
        said.contains("the helper of domain 'web1' is gone")
            && said.contains("`xftrace on -d web1`"),
        "{said}"
    );
}
