//! The call flow as it happens, of a guest that works meanwhile.

use std::fs::{self, File};
use std::process::Child;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::traced::Traced;

/// How many times the guest opens, reads and closes.
const LOOPS: usize = 20_000;
/// And another program before it.
const FEW: usize = 100;
/// Some 20 µs a call under emulation, and a machine that may be busy.
const LOOP_TIME: Duration = Duration::from_secs(120);
/// For what is recorded to be shown, and for a trace that is off to be shown to
/// its end, on a machine that may be busy.
const PATIENCE: Duration = Duration::from_secs(60);

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let started = Instant::now();
    while !done() {
        assert!(started.elapsed() < PATIENCE, "not within a minute: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// How many roots `__x64_sys_read` of this pid there are in JSON lines, of which
/// the last may not be whole yet.
fn reads(shown: &str, pid: i32) -> usize {
    let events = shown
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    events
        .filter(|event| event["pid"] == pid && event["depth"] == 0)
        .filter(|event| event["type"] == "call" || event["type"] == "leaf")
        .filter(|event| event["func"] == "__x64_sys_read")
        .count()
}

/// A command that ends with the test, whatever becomes of that.
struct Background(Child);

impl Drop for Background {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn what_a_program_does_is_shown_while_it_does_it() {
    let guest = Traced::start_alone("follow");
    guest.on(&["sys_read"]);
    let path = guest.dir().join("followed");
    let out = File::create(&path).expect("a file");
    let mut follow = guest.lab().xftrace(guest.dir()).expect("an xftrace");
    follow
        .args(["follow", "--format", "json", "-d", guest.name()])
        .stdout(out);
    let mut follow = Background(follow.spawn().expect("a process"));
    let shown = || fs::read_to_string(&path).expect("what was shown");

    let pid = |output: &str| -> i32 {
        let pid = output.lines().find_map(|line| line.strip_prefix("pid "));
        pid.expect("a pid").parse().expect("a number")
    };
    let output = guest.run_for(&format!("rwloop {FEW}"), LOOP_TIME);
    let first = pid(&output.unwrap().success().unwrap());
    wait_until("the first program is shown", || {
        reads(&shown(), first) == FEW
    });
    // The trace is on and stays on.
    assert_eq!(follow.0.try_wait().expect("a process"), None);

    let output = guest.run_for(&format!("rwloop {LOOPS}"), LOOP_TIME);
    let second = pid(&output.unwrap().success().unwrap());
    guest.off();
    wait_until("the command ends", || {
        follow.0.try_wait().expect("a process").is_some()
    });
    let status = follow.0.wait().expect("a process");
    assert_eq!(status.code(), Some(0));

    let shown = shown();
    assert_eq!(reads(&shown, first), FEW);
    assert_eq!(reads(&shown, second), LOOPS);
    let last = shown.lines().next_back().expect("a line");
    assert!(last.contains("\"type\":\"summary\""), "{last}");
}
