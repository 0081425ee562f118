//! Whatever a guest's memory is made of, it is traced with the same result, and
//! QEMU goes on running all the while.

use std::fs;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use predicates::prelude::*;
use xftrace::callflow::{events, Kernels, Limits};
use xftrace::session::{list, Session};
use xftrace_lab::{Backing, Domain, HugePages};

use crate::lab::TestGuest;

/// How many times the guest opens, reads and closes.
const LOOPS: u64 = 3000;
const LOOP_TIME: Duration = Duration::from_secs(120);

/// Starts a domain as it is, enrols it while it runs, and traces the program
/// in it. Gives what `xftrace enroll` and `xftrace status` said.
fn trace(domain: &Domain) -> (String, String, TestGuest) {
    let guest = TestGuest::define_alone(domain);
    let dir = tempfile::tempdir().expect("a directory");
    let name = domain.name.as_str();
    let xftrace = |arguments: &[&str]| {
        let mut command = guest.xftrace(dir.path());
        let done = command.args(arguments).assert().success();
        String::from_utf8(done.get_output().stdout.clone()).expect("text")
    };
    guest.start().unwrap();
    let map = &guest.lab().artifacts(guest.kernel()).unwrap().system_map;
    let enrolled = xftrace(&["enroll", name, "--symbols", map.to_str().unwrap()]);

    let qemu = guest.qemu_pid().unwrap();
    let (done, looks) = (AtomicBool::new(false), AtomicU64::new(0));
    let (output, status) = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Acquire) {
                never_stopped(qemu);
                looks.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        let _end = End(&done);
        xftrace(&[
            "on",
            "-d",
            name,
            "--interval",
            "20ms",
            "sys_openat",
            "sys_read",
        ]);
        let run = guest.run_for(&format!("rwloop {LOOPS}"), LOOP_TIME);
        let output = run.unwrap().success().unwrap();
        let status = xftrace(&["status", "-d", name]);
        xftrace(&["off", "-d", name]);
        (output, status)
    });
    assert!(looks.into_inner() > 100, "QEMU was hardly looked at");

    let pid = output.lines().find_map(|line| line.strip_prefix("pid "));
    let pid: i32 = pid.expect("a pid").parse().expect("a number");
    let sessions = list(&guest.lab().sessions(name));
    let session = Session::open(&sessions[0]).expect("a session");
    let names = Kernels::of(&session).expect("its symbols");
    let mut flow = events(session.items(), &names, Limits::default());
    for event in flow.by_ref() {
        event.expect("an event");
    }
    let tally = flow.tally();
    let counters = session.meta.counters;
    let roots = ["__x64_sys_read", "__x64_sys_openat"].map(|root| tally.roots_of(root, Some(pid)));
    // One more open: the program makes its file first.
    let findings = fs::read_to_string(sessions[0].join("findings.jsonl"));
    assert_eq!(
        roots,
        [LOOPS, LOOPS + 1],
        "{:?}: {counters:?}, {findings:?}",
        domain.backing
    );
    assert_eq!((tally.forged.total(), tally.lost_places.total()), (0, 0));
    assert_eq!(counters.tampered, 0);
    (enrolled, status, guest)
}

/// Ends the watching thread, also where the test fails.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// No thread of the process is stopped, by a signal or by a tracer.
fn never_stopped(pid: u32) {
    for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten() {
        // One that has just ended has none.
        let Ok(stat) = fs::read_to_string(task.path().join("stat")) else {
            continue;
        };
        let (_, state) = stat.rsplit_once(") ").unwrap();
        assert!(!state.starts_with(['T', 't']), "QEMU was stopped: {stat}");
    }
}

fn domain(name: &str, backing: Backing) -> Domain {
    Domain {
        backing,
        ..Domain::new(name)
    }
}

#[test]
fn a_shared_file_is_traced() {
    let (enrolled, status, _guest) = trace(&domain("back-file", Backing::File));
    assert!(
        enrolled.contains("at once, without a restart"),
        "{enrolled}"
    );
    assert!(!enrolled.contains("virsh shutdown"), "{enrolled}");
    assert!(status.contains("/pc.ram\n"), "{status}");
}

#[test]
fn a_memfd_is_traced() {
    let (enrolled, status, _guest) = trace(&domain("back-memfd", Backing::Memfd));
    assert!(
        enrolled.contains("at once, without a restart"),
        "{enrolled}"
    );
    assert!(status.contains("/memfd:memory-backend-memfd"), "{status}");
}

/// A domain that was never prepared, on a machine with more to its memory: two
/// pieces, one of them above 4 GiB.
#[test]
fn anonymous_memory_of_a_running_domain_is_traced() {
    let (enrolled, status, guest) = trace(&Domain {
        machine: "q35".to_owned(),
        memory: 5 << 10,
        vcpus: 4,
        ..domain("back-anon", Backing::Anon)
    });
    assert!(
        enrolled.contains("at once, without a restart"),
        "{enrolled}"
    );
    assert!(enrolled.contains("its memory is anonymous"), "{enrolled}");
    assert!(enrolled.contains("virsh shutdown back-anon"), "{enrolled}");
    assert!(status.contains("/mem\n"), "{status}");
    // Its memory did not become a file, and no page more was used for holes.
    let pid = guest.qemu_pid().unwrap();
    let memory = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let used = memory
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"));
    let used = used.unwrap().trim().trim_end_matches(" kB").parse::<u64>();
    assert!(used.unwrap() < 2 << 20, "{memory}");
}

#[test]
fn huge_pages_are_traced() {
    let _pages = HugePages::for_guest(256).unwrap();
    let (enrolled, status, guest) = trace(&domain("back-huge", Backing::Huge));
    assert!(
        enrolled.contains("at once, without a restart"),
        "{enrolled}"
    );
    // Stock QEMU unlinks the file at once.
    assert!(
        status.contains("qemu_back_mem.") && status.contains("(deleted)"),
        "{status}"
    );
    assert_eq!(left_linked(&guest), "");
}

/// The patched QEMU leaves the file in its directory, with the mode asked for,
/// and takes it away in the end.
#[test]
fn huge_pages_that_stay_linked_are_traced_by_name() {
    let _pages = HugePages::for_guest(256).unwrap();
    let (_, status, guest) = trace(&domain("back-retained", Backing::HugeRetained));
    assert!(status.contains("qemu_back_mem."), "{status}");
    assert!(!status.contains("(deleted)"), "{status}");
    assert_eq!(left_linked(&guest), "640\n");
    guest.shutdown().unwrap();
    assert_eq!(left_linked(&guest), "");
}

/// The modes of the memory files in the directory of huge pages.
fn left_linked(guest: &TestGuest) -> String {
    let mut find = guest.lab().command("/".as_ref(), "find").unwrap();
    find.arg(guest.lab().dir().join("hugepages")).args([
        "-name",
        "qemu_back_mem.*",
        "-printf",
        "%m\\n",
    ]);
    String::from_utf8(find.output().unwrap().stdout).unwrap()
}

#[test]
fn a_private_file_is_refused_with_the_way_out() {
    let guest = TestGuest::define(&domain("back-private", Backing::Private));
    let dir = tempfile::tempdir().expect("a directory");
    guest.start().unwrap();
    let mut enroll = guest.xftrace(dir.path());
    enroll
        .args(["enroll", "back-private"])
        .assert()
        .success()
        .stdout(
            predicate::str::contains("the guest's writes never reach it")
                .and(predicate::str::contains("virsh start back-private")),
        );
    let mut on = guest.xftrace(dir.path());
    on.args(["on", "-d", "back-private", "sys_read"])
        .assert()
        .code(2);
}
