//! The domain's lifecycle with the hook installed: whatever happens to the
//! guest, to the helper or to libvirt's daemon, the VM goes on, the trace is
//! as complete as it can be, and what it lacks is told.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use xftrace::callflow::{Kernels, Names};
use xftrace::helper::protocol::{GuestStatus, Status};
use xftrace::kernel::Symbols;
use xftrace::ring::record::{LostWhy, What};
use xftrace::session::{EndReason, Meta, Session, State};
use xftrace_lab::{wait_for, Backing, Domain, Guest};

use crate::lab::TestGuest;
use crate::traced::Traced;

/// Longer than anything here takes on a busy machine.
const SOON: Duration = Duration::from_secs(60);

fn file_backed(name: &str) -> Domain {
    Domain {
        backing: Backing::File,
        ..Domain::new(name)
    }
}

/// What a program has done that ran in the guest: `rwloop`, its process id
/// there.
pub(crate) fn reads_of(guest: &TestGuest, loops: u64) -> i32 {
    let said = guest.run_for(&format!("rwloop {loops}"), SOON).unwrap();
    pid_of(&said.success().unwrap())
}

pub(crate) fn pid_of(said: &str) -> i32 {
    let pid = said.lines().find_map(|line| line.strip_prefix("pid "));
    pid.expect("a pid").parse().expect("a number")
}

/// How often the session has that process of that boot call `read`.
pub(crate) fn recorded_reads(session: &Session, boot: u32, pid: i32) -> u64 {
    let names = Kernels::of(session).expect("its symbols");
    let mut reads = 0;
    for item in session.items() {
        let item = item.expect("a record");
        if let What::Call(call) = item.what {
            let function = names.function(item.boot, call.func).symbol;
            let is_read = function.is_some_and(|(name, _)| name == "__x64_sys_read");
            let ours = item.boot == boot && call.task.pid == pid && call.depth == 0;
            reads += u64::from(is_read && ours);
        }
    }
    reads
}

/// The records that are missing for a reason, and the places where they are.
pub(crate) fn lost(session: &Session, why: LostWhy) -> (u64, u64) {
    let (mut records, mut places) = (0, 0);
    for item in session.items() {
        if let What::Lost(lost) = item.expect("a record").what {
            if lost.why == why {
                records += lost.records.unwrap_or(0);
                places += 1;
            }
        }
    }
    (records, places)
}

fn graph(session: &Session) -> String {
    std::fs::read_to_string(session.dir().join("trace_graph.txt")).expect("a call flow")
}

/// Whether the process is there and has not ended.
fn is_running(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(") ").map(|(_, rest)| rest.as_bytes()[0]);
    state.is_some_and(|state| state != b'Z')
}

pub(crate) fn signal(pid: u32, signal: Signal) {
    kill(Pid::from_raw(i32::try_from(pid).unwrap()), signal).unwrap();
}

impl Traced {
    pub(crate) fn status(&self) -> Option<Status> {
        let output = self.command(&["status", "--json"]).output().unwrap();
        let mut all: Vec<Status> = serde_json::from_slice(&output.stdout).ok()?;
        all.pop()
    }

    /// Waits until the status is as it should be.
    pub(crate) fn until(&self, what: &str, condition: impl Fn(&Status) -> bool) -> Status {
        wait_for(SOON, || Ok(self.status().filter(&condition)))
            .unwrap_or_else(|_| panic!("{what}: {:#?}\n{}", self.status(), self.log()))
    }

    /// The helper's process as seen from here.
    pub(crate) fn helper(&self) -> u32 {
        let status = self.until("a helper", |_| true);
        self.lab().outer_pid(status.helper_pid).unwrap()
    }

    /// Waits until the newest session is closed.
    fn closed(&self) -> Session {
        let dir = self.session().dir().to_owned();
        let closed = |dir: &Path| Meta::load(dir).is_ok_and(|meta| meta.state == State::Closed);
        let graph = dir.join("trace_graph.txt");
        wait_for(SOON, || Ok((closed(&dir) && graph.exists()).then_some(())))
            .unwrap_or_else(|_| panic!("the session stays open: {}", self.log()));
        Session::open(&dir).unwrap()
    }

    /// The XML that the hook saved.
    fn saved(&self) -> PathBuf {
        let name = format!("run/xftrace/{}.xml", self.uuid().unwrap());
        self.lab().dir().join(name)
    }
}

/// Whether a process holds nothing of whoever started it.
fn assert_detached(pid: u32) {
    let link = |name: &str| std::fs::read_link(format!("/proc/{pid}/{name}")).unwrap();
    for fd in ["fd/0", "fd/1", "fd/2"] {
        assert_eq!(link(fd), Path::new("/dev/null"), "{fd}");
    }
    for fd in std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .flatten()
    {
        let to = std::fs::read_link(fd.path()).unwrap_or_default();
        assert!(!to.to_string_lossy().starts_with("pipe:"), "{to:?}");
    }
    assert_eq!(link("cwd"), Path::new("/"));
    // /proc/PID/stat from the third field on, proc(5): state, parent, process
    // group, session, terminal, ..
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let (_, rest) = stat.rsplit_once(") ").unwrap();
    let fields: Vec<&str> = rest.split(' ').collect();
    let own = pid.to_string();
    assert_eq!(fields[2..5], [own.as_str(), own.as_str(), "0"], "{stat}");
    let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap();
    assert!(environment.starts_with(b"PATH="));
    assert_eq!(environment.iter().filter(|byte| **byte == 0).count(), 1);
}

#[test]
fn a_guest_is_traced_from_its_start_until_it_shuts_down() {
    let guest = TestGuest::define(&file_backed("at-start"));
    let traced = Traced::start_with(guest, &["--at-start", "--functions", "sys_read"]);
    traced.until("tracing at start", |status| {
        status
            .trace
            .as_ref()
            .is_some_and(|trace| !trace.functions.is_empty())
    });
    let helper = traced.helper();
    assert_detached(helper);
    assert!(traced.saved().exists());

    let pid = reads_of(&traced, 2000);
    traced.shutdown().unwrap();
    let session = traced.closed();
    assert_eq!(session.meta.end, Some(EndReason::VmEnded));
    assert_eq!(recorded_reads(&session, 1, pid), 2000);
    assert_eq!(
        (session.meta.counters.lost, session.meta.counters.forged),
        (0, 0)
    );
    assert!(graph(&session).contains("# functions:  __x64_sys_read\n"));
    wait_for(SOON, || Ok((!is_running(helper)).then_some(()))).expect("the helper ends");
    assert!(
        !traced.saved().exists(),
        "what the hook saved is left behind"
    );
}

#[test]
fn a_guest_enrolled_by_its_name_is_traced_until_it_is_destroyed_and_again() {
    let guest = TestGuest::define(&file_backed("by-name-1"));
    let map = &guest.lab().artifacts(guest.kernel()).unwrap().system_map;
    let symbols = guest.lab().dir().join("xftrace/symbols/lab");
    std::fs::copy(map, &symbols).unwrap();
    let traced = Traced::adopt(guest);
    traced.on(&["sys_read"]);
    let pid = reads_of(&traced, 2000);
    traced.destroy().unwrap();
    // At once: its helper may still write the last call flow.
    Guest::start(&traced).unwrap();
    let qemu = traced.qemu_pid_inside().unwrap();
    traced.until("a helper for the second life", |status| {
        status.qemu.pid.cast_unsigned() == qemu && matches!(status.guest, GuestStatus::Alive { .. })
    });
    let first = traced.closed();
    assert_eq!(first.meta.end, Some(EndReason::VmEnded));
    assert_eq!(recorded_reads(&first, 1, pid), 2000);
    assert_eq!(first.meta.counters.lost, 0);

    traced.on(&["sys_read"]);
    let pid = reads_of(&traced, 1000);
    let second = traced.off();
    assert_ne!(second.dir(), first.dir());
    assert_eq!(recorded_reads(&second, 1, pid), 1000);
    // The directory is the whole lab's.
    std::fs::remove_file(symbols).unwrap();
}

#[test]
fn a_reboot_is_the_next_boot_of_the_same_session() {
    let traced = Traced::start(TestGuest::define(&file_backed("rebooted")));
    let qemu = traced.qemu_pid().unwrap();
    let map = Symbols::load(&traced.lab().artifacts(traced.kernel()).unwrap().system_map).unwrap();
    let link = map.address("_text").unwrap().0;
    // Where the guest itself says that its kernel is.
    let slide = || {
        let line = traced.run("grep ' _text$' /proc/kallsyms").unwrap().text;
        let at = u64::from_str_radix(line.split(' ').next().unwrap(), 16).unwrap();
        at.wrapping_sub(link)
    };
    traced.on(&["sys_read"]);
    let session = traced.session().dir().to_owned();
    let before = (reads_of(&traced, 2000), slide());
    traced.reboot().unwrap();
    assert_eq!(traced.qemu_pid().unwrap(), qemu);
    wait_for(SOON, || {
        Ok(Meta::load(&session)
            .ok()
            .filter(|meta| meta.switches.len() == 2))
    })
    .unwrap_or_else(|_| panic!("tracing does not go on: {}", traced.log()));
    let after = (reads_of(&traced, 3000), slide());
    let session = traced.off();

    let boots: Vec<_> = session.meta.boots.iter().map(|boot| boot.slide).collect();
    assert_eq!(boots, [before.1, after.1]);
    assert_ne!(session.meta.boots[0].boot_id, session.meta.boots[1].boot_id);
    assert_eq!(recorded_reads(&session, 1, before.0), 2000);
    assert_eq!(recorded_reads(&session, 2, after.0), 3000);
    let graph = graph(&session);
    for part in ["# boot 1: ", "# boot 2: ", " 2 boots\n"] {
        assert!(graph.contains(part), "no {part:?}: {}", &graph[..4000]);
    }
}

#[test]
fn a_killed_helper_costs_what_the_guest_overwrites_until_the_next_one() {
    let traced = Traced::start(TestGuest::define(&file_backed("killed")));
    let qemu = traced.qemu_pid().unwrap();
    traced.on(&["sys_read"]);
    let first = reads_of(&traced, 1000);
    let helper = traced.helper();
    let keys = traced
        .until("keys", |status| status.trace.is_some())
        .trace
        .unwrap()
        .epoch
        .expect("keys");
    signal(helper, Signal::SIGKILL);
    wait_for(SOON, || Ok((!is_running(helper)).then_some(()))).unwrap();
    // More than the ring buffer holds, read by nobody.
    reads_of(&traced, 10_000);
    assert_eq!(traced.qemu_pid().unwrap(), qemu);
    let status = traced
        .command(&["status"])
        .assert()
        .code(2)
        .get_output()
        .stderr
        .clone();
    let status = String::from_utf8(status).unwrap();
    assert!(
        status.contains("no helper runs for domain 'killed'"),
        "{status}"
    );

    traced.on(&["sys_read"]);
    let last = reads_of(&traced, 1000);
    let session = traced.off();
    assert_eq!(traced.qemu_pid().unwrap(), qemu);
    assert_eq!(
        xftrace::session::list(&traced.lab().sessions("killed")).len(),
        1
    );
    let counters = session.meta.counters;
    assert_eq!(
        (counters.resumed, counters.forged, counters.tampered),
        (1, 0, 0)
    );
    assert!(session.keys.len() as u64 > keys, "the Klog does not go on");
    assert_eq!(recorded_reads(&session, 1, first), 1000);
    assert_eq!(recorded_reads(&session, 1, last), 1000);
    let (records, places) = lost(&session, LostWhy::HelperAbsent);
    assert!(places >= 1, "no hole where nobody read");
    assert_eq!(records, counters.lost, "{counters:?}");
    assert!(graph(&session).contains("helper absent: "));
}

#[test]
fn libvirts_daemon_may_come_and_go() {
    let traced = Traced::start(TestGuest::define_alone(&file_backed("restarted")));
    let (qemu, helper) = (traced.qemu_pid().unwrap(), traced.helper());
    traced.on(&["sys_read"]);
    let mut job = traced.spawn("exec rwloop 20000").unwrap();
    traced.lab().restart_libvirtd().unwrap();
    let said = job.wait(SOON).unwrap().success().unwrap();
    assert_eq!(
        (traced.qemu_pid().unwrap(), traced.helper()),
        (qemu, helper)
    );

    // A helper that has gone is there again when the daemon is.
    signal(helper, Signal::SIGKILL);
    wait_for(SOON, || Ok((!is_running(helper)).then_some(()))).unwrap();
    traced.lab().restart_libvirtd().unwrap();
    traced.until("the session goes on", |status| status.trace.is_some());
    assert_ne!(traced.helper(), helper);
    let last = reads_of(&traced, 1000);
    let session = traced.off();
    assert_eq!(traced.qemu_pid().unwrap(), qemu);
    assert_eq!(recorded_reads(&session, 1, pid_of(&said)), 20_000);
    assert_eq!(recorded_reads(&session, 1, last), 1000);
    let counters = session.meta.counters;
    assert_eq!(
        (counters.resumed, counters.lost, counters.forged),
        (1, 0, 0)
    );
    assert!(traced.is_running().unwrap());
}

#[test]
fn a_helper_that_hangs_holds_up_nobody() {
    let traced = Traced::start(TestGuest::define_alone(&file_backed("hangs-helper")));
    let timed = |what: &str, run: &dyn Fn()| {
        let start = Instant::now();
        run();
        println!("{what}: {:?}", start.elapsed());
        start.elapsed()
    };
    let cycle = || {
        traced.destroy().unwrap();
        traced.start_only().unwrap();
    };
    let usual = timed("destroy and start", &cycle);
    traced.wait_until_ready().unwrap();
    let inside = traced.until("a helper", |_| true).helper_pid;
    let helper = traced.helper();
    signal(helper, Signal::SIGSTOP);
    let output = traced.command(&["status"]).output().unwrap();
    let held_up = timed("the same with a hung helper", &cycle);
    signal(helper, Signal::SIGCONT);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(
        said.contains("does not answer") && said.contains(&format!("`kill -KILL {inside}`")),
        "{said}"
    );
    assert!(
        held_up < usual * 3 + Duration::from_secs(1),
        "{held_up:?}, {usual:?}"
    );

    // Once it goes on, it looks after the domain as it runs now.
    traced.wait_until_ready().unwrap();
    let qemu = traced.qemu_pid_inside().unwrap();
    traced.until("it serves the new QEMU", |status| {
        status.qemu.pid.cast_unsigned() == qemu
    });
    traced.on(&["sys_read"]);
    let pid = reads_of(&traced, 500);
    assert_eq!(recorded_reads(&traced.off(), 1, pid), 500);
}
