//! The main path: a guest is traced from its host, and what comes out is what
//! the guest did.

use std::time::Duration;

use xftrace::callflow::{events, Fit, Happening, Kernels, Limits};
use xftrace_lab::{Backing, Domain};

use crate::lab::TestGuest;
use crate::traced::Traced;

/// How many times the guest opens, reads and closes.
const LOOPS: u64 = 100_000;
/// Some 20 µs a call under emulation, and a machine that may be busy.
const LOOP_TIME: Duration = Duration::from_secs(300);
/// The guest's buffer of each CPU. It holds a third of a second of this, for a
/// machine that is busy with something else meanwhile.
const BUFFER_BYTES: u64 = 8 << 20;

/// Ground truth: a program that makes a known number of system calls.
#[test]
fn every_call_of_a_known_program_is_recorded_once() {
    a_known_program("truth", "6.1");
}

/// The same of the guest patch for the newer kernel.
#[test]
fn every_call_is_recorded_once_on_linux_6_12_too() {
    a_known_program("truth612", "6.12");
}

fn a_known_program(name: &str, kernel: &str) {
    let guest = Traced::start(TestGuest::define_alone(&Domain {
        backing: Backing::File,
        kernel: kernel.to_owned(),
        ..Domain::new(name)
    }));
    guest.on(&["--buffer-size=8M", "sys_openat", "sys_read"]);
    let output = guest.run_for(&format!("rwloop {LOOPS}"), LOOP_TIME);
    let output = output.unwrap().success().unwrap();
    let session = guest.off();

    let (pid, counts) = output.split_once('\n').expect("two lines");
    let pid: i32 = pid.strip_prefix("pid ").unwrap().parse().unwrap();
    assert_eq!(
        counts.trim(),
        format!("opens {LOOPS} reads {LOOPS} closes {LOOPS}")
    );

    let names = Kernels::of(&session).expect("its symbols");
    let mut flow = events(session.items(), &names, Limits::default());
    // The read that is open: its id, and how many calls of vfs_read are below it.
    let mut open = None;
    let mut reads = 0;
    for event in flow.by_ref() {
        match event.expect("an event").what {
            Happening::Open(root) if root.task.pid == pid && root.depth == 0 => {
                assert_eq!(open, None, "a root inside a root");
                let name = root.func.entered();
                open = (name == Some("__x64_sys_read")).then_some((root.id, 0));
            }
            Happening::Open(call) | Happening::Leaf(call, _) if call.task.pid == pid => {
                if let (Some("vfs_read"), Some((_, below))) = (call.func.entered(), &mut open) {
                    *below += 1;
                }
            }
            Happening::Close(closed) if closed.task.pid == pid && closed.depth == 0 => {
                if let Some((id, below)) = open.take() {
                    assert_eq!((closed.id, closed.fit, below), (Some(id), Fit::Matched, 1));
                    reads += 1;
                }
            }
            _ => {}
        }
    }
    let tally = flow.tally();
    let counters = session.meta.counters;
    assert_eq!(
        (counters.lost, counters.lost_places),
        (0, 0),
        "{counters:?}"
    );
    assert_eq!(reads, LOOPS, "reads with one vfs_read below each");
    assert_eq!(tally.roots_of("__x64_sys_read", Some(pid)), LOOPS);
    // One more open: the program makes its file first.
    assert_eq!(tally.roots_of("__x64_sys_openat", Some(pid)), LOOPS + 1);
    assert_eq!((tally.forged.total(), tally.lost_places.total()), (0, 0));

    assert_eq!(counters.records, tally.calls + tally.returns);
    assert_eq!(counters.forged, 0);
    assert!(
        counters.bytes > 10 * 2 * BUFFER_BYTES,
        "both buffers did not wrap often: {counters:?}"
    );

    let graph = std::fs::read_to_string(guest.dir().join("trace_graph.txt"));
    let graph = graph.expect("a call flow");
    assert!(graph.contains("__x64_sys_read() {") && graph.contains("lost: 0\n"));
}
