//! The guest is never paused, and never waits for the host.
//!
//! Three witnesses: QEMU's own events, the state of its threads in /proc, and a
//! loop in the guest that wakes up a thousand times a second. Others may load
//! the machine, so times are only compared within one run, in turns of three
//! kinds: with xftrace; with the guest's tracer and without xftrace; and with
//! neither, where no helper runs and nothing is traced.

use std::time::Duration;

use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use xftrace_lab::{wait_for, Job};

use crate::lab::TestGuest;
use crate::traced::Traced;
use crate::watch::Watch;

/// Longer than anything here takes on a busy machine.
const SOON: Duration = Duration::from_secs(60);
/// How long a turn of draining lasts.
const TURN: Duration = Duration::from_secs(2);
/// How many turns there are of each kind.
const TURNS: usize = 5;
/// How many times the switch is turned on and off, each way.
const SWITCHES: usize = 3;
const FUNCTIONS: [&str; 2] = ["sys_openat", "sys_read"];
/// One reading of a time is another one's on a machine that others use too, but
/// for this much, microseconds: the host's scheduler may let another process run
/// for some milliseconds before it is the guest's turn. So twice the time and
/// this much more is allowed, of the median as of the longest gap. What that
/// lets pass: draining comes every 3 ms and keys every 10 ms, so that a pause by
/// one of them is in a tenth of all gaps or more. Their 90 % may grow by some
/// 5 ms. Shorter pauses, if they came so often, the other two witnesses see: one
/// that looks at QEMU's threads each millisecond, and QEMU's own events. At on
/// and off, which come once in a turn, it is the longest gap that counts.
const NOISE_US: u64 = 3_000;

/// What the guest's loop saw in one turn, microseconds.
#[derive(Clone, Copy, Debug)]
struct Gaps {
    p50: u64,
    p90: u64,
    p99: u64,
    p999: u64,
    max: u64,
}

impl Gaps {
    fn of(text: &str) -> Gaps {
        let after = |words: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(words));
            let number = line.unwrap_or_else(|| panic!("no {words} in:\n{text}"));
            number.parse().expect("a number")
        };
        Gaps {
            p50: after("quantile 500 "),
            p90: after("quantile 900 "),
            p99: after("quantile 990 "),
            p999: after("quantile 999 "),
            max: after("max "),
        }
    }
}

/// What the guest's loop sees while something is done.
fn gaps_during(guest: &Traced, work: impl FnOnce()) -> Gaps {
    let mut timer = guest.spawn("exec timerloop -p 0 300").unwrap();
    work();
    ended(&mut timer)
}

/// The same, and what a loop sees on the other CPU.
fn gaps_on_both(guest: &Traced, work: impl FnOnce()) -> (Gaps, Gaps) {
    let mut other = guest.spawn("exec timerloop -p 1 300").unwrap();
    let gaps = gaps_during(guest, work);
    (gaps, ended(&mut other))
}

fn ended(timer: &mut Job) -> Gaps {
    timer.kill(15).unwrap();
    Gaps::of(&timer.wait(SOON).unwrap().success().unwrap())
}

/// Refuses turns with xftrace whose gaps are longer than those without. Of
/// each number the middle one of all turns is taken: what others do to the
/// machine meets both kinds alike, and a few turns of each not at all.
fn compare(what: &str, without: &[Gaps], with: &[Gaps]) {
    println!("{what}\n  without {without:?}\n  with {with:?}");
    let middle = |turns: &[Gaps], of: fn(&Gaps) -> u64| {
        let mut all: Vec<u64> = turns.iter().map(of).collect();
        all.sort_unstable();
        all[all.len() / 2]
    };
    type Number = fn(&Gaps) -> u64;
    let numbers: [(&str, Number); 5] = [
        ("median", |gaps| gaps.p50),
        ("90 %", |gaps| gaps.p90),
        ("99 %", |gaps| gaps.p99),
        ("99.9 %", |gaps| gaps.p999),
        ("longest", |gaps| gaps.max),
    ];
    for (name, number) in numbers {
        let (without, with) = (middle(without, number), middle(with, number));
        assert!(
            with <= 2 * without + NOISE_US,
            "{what}: {name} gap of {with} us with xftrace, {without} us without"
        );
    }
}

fn helper_pid(guest: &TestGuest) -> u32 {
    let mut status = guest.xftrace("/".as_ref());
    status.args(["status", "--json", "-d", guest.name()]);
    let output = status.assert().success();
    let all: serde_json::Value = serde_json::from_slice(&output.get_output().stdout).unwrap();
    let inside = all[0]["helper_pid"].as_u64().expect("a pid");
    guest.lab().outer_pid(inside as u32).unwrap()
}

/// Kills the helper of a guest, and sees it gone.
pub(crate) fn kill_helper(guest: &TestGuest) {
    let pid = helper_pid(guest);
    kill(Pid::from_raw(pid as i32), Signal::SIGKILL).unwrap();
    wait_for(SOON, || {
        let state = std::fs::read_to_string(format!("/proc/{pid}/stat"));
        Ok(state
            .map_or(true, |text| text.contains(") Z "))
            .then_some(()))
    })
    .unwrap();
}

/// What the tests below rely on: a pause is seen.
#[test]
fn the_watch_sees_a_pause() {
    let guest = Traced::start_alone("watched");
    let watch = Watch::start(&guest);
    assert_eq!(watch.events(), [""; 0]);
    guest.lab().virsh(&["suspend", "watched"]).unwrap();
    guest.lab().virsh(&["resume", "watched"]).unwrap();
    assert_eq!(watch.events().len(), 2, "STOP and RESUME");
    assert_eq!(watch.stopped(), 0, "QEMU's own pause stops no thread");
    let qemu = Pid::from_raw(guest.qemu_pid().unwrap() as i32);
    for _ in 0..200 {
        kill(qemu, Signal::SIGSTOP).unwrap();
        std::thread::sleep(Duration::from_millis(1));
        kill(qemu, Signal::SIGCONT).unwrap();
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(watch.stopped() > 0, "200 stops, none seen");
}

#[test]
fn the_guest_is_never_paused() {
    let guest = Traced::start_alone("unpaused");
    let watch = Watch::start(&guest);
    let mut work = guest
        .spawn("exec taskset 2 sh -c 'while :; do read x < /proc/uptime; sleep 0.02; done'")
        .unwrap();

    // On and off: the guest's kernel patches its call sites, with xftrace or
    // without. It gives its CPU to nobody meanwhile, so that is not the loop's;
    // what a loop there sees is shown beside: the patching, with either.
    let pinned = guest.run("taskset -p 2 $(pidof xftrace)").unwrap();
    pinned.success().unwrap();
    let (mut own_on, mut own_off, mut on, mut off) = (vec![], vec![], vec![], vec![]);
    let mut idle = vec![];
    let sh = |line: &str| {
        let line = format!("cd /sys/kernel/tracing; taskset 2 sh -c '{line}'");
        guest.run(&line).unwrap().success().unwrap();
    };
    for _ in 0..SWITCHES {
        kill_helper(&guest);
        idle.push(gaps_on_both(&guest, || std::thread::sleep(TURN)));
        sh("echo __x64_sys_openat > set_graph_function");
        sh("echo __x64_sys_read >> set_graph_function");
        own_on.push(gaps_on_both(&guest, || {
            sh("echo function_graph > current_tracer")
        }));
        own_off.push(gaps_on_both(&guest, || sh("echo nop > current_tracer")));
        sh("echo > set_graph_function");
        on.push(gaps_on_both(&guest, || {
            guest.on(&["--interval=10ms", FUNCTIONS[0], FUNCTIONS[1]])
        }));
        off.push(gaps_on_both(&guest, || drop(guest.off())));
    }
    let (idle, idle_there): (Vec<_>, Vec<_>) = idle.into_iter().unzip();
    println!("nothing switched, the CPU that would switch\n  {idle_there:?}");
    for (what, own, with) in [("on", own_on, on), ("off", own_off, off)] {
        let (own, own_there): (Vec<_>, Vec<_>) = own.into_iter().unzip();
        let (with, with_there): (Vec<_>, Vec<_>) = with.into_iter().unzip();
        println!(
            "switching {what}, the CPU that does\n  without {own_there:?}\n  with {with_there:?}"
        );
        compare(
            &format!("switching {what}, and the guest's own"),
            &own,
            &with,
        );
        compare(&format!("switching {what}, and no xftrace"), &idle, &with);
    }

    // Draining, and a new key every 10 ms. The guest does the same in each turn.
    // In one nothing is traced and no helper runs; in one it traces, and nobody
    // reads.
    let (mut absent, mut alone, mut drained) = (vec![], vec![], vec![]);
    for _ in 0..TURNS {
        kill_helper(&guest);
        absent.push(gaps_during(&guest, || std::thread::sleep(TURN)));
        guest.on(&["--interval=10ms", FUNCTIONS[0], FUNCTIONS[1]]);
        drained.push(gaps_during(&guest, || std::thread::sleep(TURN)));
        kill_helper(&guest);
        alone.push(gaps_during(&guest, || std::thread::sleep(TURN)));
        // Starts a helper, which goes on with the session.
        guest.on(&FUNCTIONS);
        let counters = guest.off().meta.counters;
        assert_eq!(counters.resumed, 1);
        assert!(counters.records > 200, "nothing to drain");
    }
    work.kill(9).unwrap();
    work.wait(SOON).unwrap();
    compare("draining, and nobody who reads", &alone, &drained);
    compare("draining, and no xftrace", &absent, &drained);

    watch.saw_nothing();
}
