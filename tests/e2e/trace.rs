//! The main path: a guest is traced from its host, and what comes out is what
//! the guest did.

use std::time::Duration;

use xftrace::callflow::{Kernels, Names};
use xftrace::ring::record::What;
use xftrace::session::{list, EndReason, Session, State};
use xftrace_lab::{Backing, Domain};

use crate::lab::TestGuest;

/// How many times the guest opens, reads and closes.
const LOOPS: u64 = 100_000;
/// Some 20 µs a call under emulation, and a machine that may be busy.
const LOOP_TIME: Duration = Duration::from_secs(300);

/// Ground truth: a program that makes a known number of system calls.
#[test]
fn every_call_of_a_known_program_is_recorded_once() {
    let guest = TestGuest::define_alone(&Domain {
        backing: Backing::File,
        ..Domain::new("truth")
    });
    let dir = tempfile::tempdir().expect("a directory");
    let map = &guest
        .lab()
        .artifacts(xftrace_lab::KERNEL)
        .expect("a kernel")
        .system_map;
    let mut enroll = guest.xftrace(dir.path());
    enroll.args(["enroll", "truth", "--symbols"]).arg(map);
    enroll.assert().success();
    guest.start().unwrap();

    guest
        .xftrace(dir.path())
        .args(["on", "-d", "truth", "sys_openat", "sys_read"])
        .assert()
        .success();
    let output = guest
        .run_for(&format!("rwloop {LOOPS}"), LOOP_TIME)
        .unwrap()
        .success()
        .unwrap();
    guest
        .xftrace(dir.path())
        .args(["off", "-d", "truth"])
        .assert()
        .success();

    let (pid, rest) = output.split_once('\n').expect("two lines");
    let pid: i32 = pid
        .strip_prefix("pid ")
        .expect("a pid")
        .parse()
        .expect("a number");
    assert_eq!(
        rest.trim(),
        format!("opens {LOOPS} reads {LOOPS} closes {LOOPS}")
    );

    let sessions = list(&guest.lab().sessions("truth"));
    assert_eq!(sessions.len(), 1, "{sessions:?}");
    let session = Session::open(&sessions[0]).expect("a session");
    assert_eq!(
        (session.meta.state, &session.meta.end),
        (State::Closed, &Some(EndReason::Off))
    );
    let names = Kernels::of(&session);
    let (mut reads, mut opens, mut vfs_reads, mut records) = (0, 0, 0, 0u64);
    let mut in_read = false;
    for item in session.items() {
        let item = item.expect("a record");
        match item.what {
            What::Call(call) if call.task.pid == pid && call.depth <= 1 => {
                let name = names
                    .function(item.boot, call.func)
                    .symbol
                    .map(|(symbol, _)| symbol);
                match (call.depth, name) {
                    (0, Some("__x64_sys_read")) => {
                        reads += 1;
                        in_read = true;
                    }
                    (0, Some("__x64_sys_openat")) => {
                        opens += 1;
                        in_read = false;
                    }
                    (1, Some("ksys_read")) if in_read => {}
                    (1, Some("vfs_read")) if in_read => vfs_reads += 1,
                    _ => {}
                }
                records += 1;
            }
            What::Call(call) => {
                let name = names
                    .function(item.boot, call.func)
                    .symbol
                    .map(|(symbol, _)| symbol);
                let below = call.task.pid == pid && call.depth == 2 && in_read;
                vfs_reads += u64::from(below && name == Some("vfs_read"));
                records += 1;
            }
            What::Return(_) => records += 1,
            What::Forged(_) | What::Lost(_) => panic!("{item:?}"),
            What::Other { .. } => {}
        }
    }
    // One more open: the program makes its file first.
    assert_eq!((reads, opens, vfs_reads), (LOOPS, LOOPS + 1, LOOPS));
    // The guest's default buffers hold some 1.4 MiB a CPU.
    assert!(
        session.meta.counters.bytes > 10 * 2 * 1_441_792,
        "the buffers wrapped often"
    );
    assert_eq!(
        session.meta.counters.records, records,
        "the helper counted as the decoder does"
    );

    let graph = std::fs::read_to_string(dir.path().join("trace_graph.txt")).expect("a call flow");
    assert!(graph.contains("__x64_sys_read() {") && graph.contains("lost: 0\n"));
}
