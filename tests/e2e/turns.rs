//! Trace_Switch as a user sees it: on, on with other functions, off.

use std::time::Duration;

use xftrace::callflow::{events, Kernels, Limits, Tally};
use xftrace::session::Session;

use crate::traced::Traced;

/// What the guest may take to notice a command.
const PICKUP: Duration = Duration::from_millis(200);
/// Turns of the switch that are timed: of so many the median says what is
/// usual, whatever a busy machine does to one of them.
const TURNS: usize = 7;
/// How often the guest's program opens, reads and closes.
const ROUNDS: u64 = 50;

/// How long the guest took to notice, as `xftrace on` tells it.
fn told_pickup(said: &str) -> Duration {
    let (_, rest) = said.rsplit_once("took it up after ").expect(said);
    let (ms, _) = rest.split_once(" ms").expect(said);
    Duration::from_millis(ms.parse().expect(said))
}

/// Runs the program in the guest, and gives its pid.
fn work(guest: &Traced) -> i32 {
    let output = guest.run(&format!("rwloop {ROUNDS}")).unwrap();
    let output = output.success().unwrap();
    let pid = output
        .lines()
        .next()
        .and_then(|line| line.strip_prefix("pid "));
    pid.expect("its pid").parse().expect("a number")
}

fn tally(session: &Session) -> Tally {
    let names = Kernels::of(session).expect("its symbols");
    let mut flow = events(session.items(), &names, Limits::default());
    for event in flow.by_ref() {
        event.expect("an event");
    }
    flow.tally()
}

fn tracer(guest: &Traced) -> String {
    let tracer = guest.run("cat /sys/kernel/tracing/current_tracer").unwrap();
    tracer.success().unwrap().trim().to_owned()
}

#[test]
fn a_command_is_taken_up_within_200_ms() {
    let guest = Traced::start_alone("prompt");
    let mut times = Vec::new();
    for turn in 0..TURNS {
        let function = ["sys_openat", "sys_read"][turn % 2];
        let assert = guest.command(&["on", function]).assert().success();
        times.push(told_pickup(&String::from_utf8_lossy(
            &assert.get_output().stderr,
        )));
    }
    let session = guest.off();
    let stored: Vec<u64> = session
        .meta
        .switches
        .iter()
        .map(|turn| turn.pickup_ns / 1_000_000)
        .collect();
    times.sort();
    println!("taken up after {times:?}, with that of off {stored:?} ms");
    assert!(times[TURNS / 2] <= PICKUP, "{times:?}");
    assert!(times[0] > Duration::ZERO, "nobody took the time: {times:?}");
    // What is stored is what was told, and `off` is a turn of its own.
    let mut on: Vec<_> = stored[..TURNS]
        .iter()
        .map(|&ms| Duration::from_millis(ms))
        .collect();
    on.sort();
    assert_eq!(on, times);
    assert!(
        stored[TURNS] <= 2 * PICKUP.as_millis() as u64,
        "off: {stored:?}"
    );
}

#[test]
fn on_again_traces_other_functions_in_the_same_session() {
    let guest = Traced::start_alone("again");
    guest.on(&["sys_openat"]);
    let first = work(&guest);
    guest.on(&["sys_read"]);
    let second = work(&guest);
    let session = guest.off();

    let turns: Vec<&[String]> = session
        .meta
        .switches
        .iter()
        .map(|turn| &turn.functions[..])
        .collect();
    assert_eq!(turns, [&["__x64_sys_openat"][..], &["__x64_sys_read"], &[]]);
    let tally = tally(&session);
    let roots = |name, pid| tally.roots_of(name, Some(pid));
    // One more open: the program makes its file first.
    assert_eq!(roots("__x64_sys_openat", first), ROUNDS + 1);
    assert_eq!(roots("__x64_sys_read", first), 0);
    assert_eq!(roots("__x64_sys_openat", second), 0);
    assert_eq!(roots("__x64_sys_read", second), ROUNDS);
    assert_eq!((tally.forged.total(), tally.lost_places.total()), (0, 0));
}

#[test]
fn off_puts_the_guests_tracer_back() {
    let guest = Traced::start_alone("back");
    assert_eq!(tracer(&guest), "nop");
    guest.on(&["sys_openat"]);
    assert_eq!(tracer(&guest), "function_graph");
    guest.off();
    assert_eq!(tracer(&guest), "nop");
}
