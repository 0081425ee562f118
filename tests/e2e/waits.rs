//! Guests without the patch that are not ready to be traced when their kernel is found:
//! they are traced as soon as they are, from their start and after a reboot.

use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use std::time::Duration;
use xftrace::callflow::{Kernels, Names};
use xftrace::helper::protocol::{GuestStatus, Status};
use xftrace::kernel::stock::{command_line, reserved_command_line};
use xftrace::ring::record::What;
use xftrace::session::{list, Meta, Mode, Session, State};
use xftrace_lab::{wait_for, Backing, Domain, Guest};

use crate::lab::TestGuest;
use crate::lifecycle::{reads_of, recorded_reads};
use crate::traced::Traced;

const SOON: Duration = Duration::from_secs(60);
/// What doctor, `status` and `on` say of a reserved ring without a tracer.
const TO_TYPE: &str = "type inside the guest, as root: echo function_graph";

fn start(name: &str, kernel: &str, ring: &str) -> Traced {
    let guest = TestGuest::define(&Domain {
        kernel: kernel.to_owned(),
        backing: Backing::File,
        memory: 384,
        ..Domain::new(name)
    });
    let at_start = ["--at-start", "--functions", "sys_read", ring];
    Traced::start_with(guest, &at_start)
}

/// Whether boot `number` of the session is being recorded.
fn is_traced(status: &Status, number: u32) -> bool {
    let trace = status.trace.as_ref();
    status.awaited.is_none()
        && trace.is_some_and(|trace| trace.boot == number && !trace.functions.is_empty())
}

/// Waits until the guest's tracer has to be set, which somebody does.
fn awaited(traced: &Traced, is_open: bool) {
    traced.until("a guest that is waited for", |status| {
        let waits = |why: &String| why.contains(TO_TYPE);
        status.awaited.as_ref().is_some_and(waits) && status.trace.is_some() == is_open
    });
}

fn set_tracer(traced: &Traced) {
    traced.sh(&reserved_command_line(&["__x64_sys_read"]).1);
}

/// Ends the trace, in which a process of each of two boots has read so often.
fn both_boots_are_whole(traced: &Traced, pids: [i32; 2], helpers: u64) {
    // What kept it from being traced is over.
    let status = traced.command(&["status"]).output().unwrap();
    let status = String::from_utf8_lossy(&status.stdout).into_owned();
    assert!(!status.contains("cannot be traced"), "{status}");
    let session = traced.off();
    let meta = &session.meta;
    assert_eq!((meta.mode, meta.boots.len()), (Mode::Plain, 2));
    assert_ne!(meta.boots[0].boot_id, meta.boots[1].boot_id);
    assert_eq!(recorded_reads(&session, 1, pids[0]), 2000);
    assert_eq!(recorded_reads(&session, 2, pids[1]), 1000);
    // What the first boot left in memory is no part of the second one, in which another
    // process of that number reads a few times.
    if pids[0] != pids[1] {
        let reads = recorded_reads(&session, 2, pids[0]);
        assert!(reads < 500, "{reads}");
    }
    let counters = meta.counters;
    let wrong = wrong_items(&session);
    assert!(wrong.is_empty(), "{counters:?}: {wrong:#?}");
    assert_eq!((counters.forged, counters.lost_places), (0, 0));
    assert_eq!(counters.resumed, helpers);
    assert_eq!(list(&traced.lab().sessions(traced.name())).len(), 1);
}

/// What is forged or lost, with the boot, the CPU and the time that it stands at.
fn wrong_items(session: &Session) -> Vec<(u32, u16, u64, What)> {
    let mut wrong = Vec::new();
    for item in session.items() {
        let item = item.expect("an item");
        if matches!(item.what, What::Forged(_) | What::Lost(_)) {
            wrong.push((item.boot, item.cpu, item.time, item.what));
        }
    }
    wrong
}

#[test]
fn a_plain_guest_is_traced_from_its_start_and_after_a_reboot() {
    let traced = start("plain-boots", "stock-6.1-cloud", "--plain");
    traced.until("a trace", |status| is_traced(status, 1));
    let first = reads_of(&traced, 2000);
    traced.reboot().unwrap();
    traced.until("its next boot", |status| is_traced(status, 2));
    let second = reads_of(&traced, 1000);
    both_boots_are_whole(&traced, [first, second], 0);
}

/// Its body lies where its entry does, and Ftrace goes by one name for each place: by
/// another one, the kernel would record every function.
#[test]
fn a_system_call_without_arguments_is_booted_by_the_name_that_ftrace_has() {
    let guest = TestGuest::define(&Domain {
        kernel: "stock-6.1-cloud".to_owned(),
        backing: Backing::File,
        memory: 384,
        ..Domain::new("getpid")
    });
    let options = ["--at-start", "--functions", "sys_getpid", "--plain"];
    let traced = Traced::start_with(guest, &options);
    traced.until("a trace", |status| is_traced(status, 1));
    let filter = traced.run("cat /sys/kernel/tracing/set_graph_function");
    assert_eq!(filter.unwrap().success().unwrap().trim(), "__do_sys_getpid");
    // Each shell asks for its own.
    for _ in 0..10 {
        traced.sh("true");
    }
    let session = traced.off();
    assert_eq!(session.meta.functions(), ["__x64_sys_getpid"]);
    let names = Kernels::of(&session).expect("its symbols");
    let mut calls = 0;
    for item in session.items() {
        let item = item.expect("an item");
        if let What::Call(call) = item.what {
            let function = names.function(item.boot, call.func).symbol;
            let name = function.map(|(name, _)| name);
            assert!(
                call.depth > 0 || name == Some("__x64_sys_getpid"),
                "{name:?}"
            );
            calls += usize::from(call.depth == 0);
        }
    }
    assert!(calls >= 10, "{calls}");
}

/// What was booted for other functions than those that it is to be traced for: whoever
/// asks for what there is, has that, once.
#[test]
fn what_is_asked_for_goes_before_what_is_waited_for() {
    let guest = TestGuest::define(&Domain {
        kernel: "stock-6.1-cloud".to_owned(),
        backing: Backing::File,
        memory: 384,
        append: command_line(&["__x64_sys_read"]),
        ..Domain::new("asked-for")
    });
    let options = ["--at-start", "--functions", "sys_openat"];
    let traced = Traced::start_with(guest, &options);
    traced.until("a guest that is waited for", |status| {
        let other = |why: &String| why.contains("booted with, which are __x64_sys_read");
        status.awaited.as_ref().is_some_and(other) && status.trace.is_none()
    });
    traced.on(&["sys_read"]);
    let pid = reads_of(&traced, 500);
    // It is looked at ten times a second, whether what is waited for has come.
    std::thread::sleep(Duration::from_secs(1));
    let session = traced.off();
    assert_eq!(session.meta.boots.len(), 1);
    assert_eq!(recorded_reads(&session, 1, pid), 500);
    // And that was it.
    traced.reboot().unwrap();
    traced.until("its next boot", |status| {
        assert!(status.awaited.is_none() && status.trace.is_none());
        matches!(status.guest, GuestStatus::Alive { .. })
    });
    let off = traced.command(&["off"]).assert().code(2);
    let said = String::from_utf8_lossy(&off.get_output().stderr).into_owned();
    assert!(said.contains("no trace is on"), "{said}");
    assert_eq!(list(&traced.lab().sessions(traced.name())).len(), 1);
}

/// One that nobody wants traced is waited for by nobody.
#[test]
fn a_plain_guest_that_is_not_to_be_traced_is_not_waited_for() {
    let guest = TestGuest::define(&Domain {
        kernel: "stock-6.1-cloud".to_owned(),
        backing: Backing::File,
        memory: 384,
        ..Domain::new("not-asked-for")
    });
    let traced = Traced::start_with(guest, &["--functions", "sys_openat"]);
    traced.until("why it cannot be traced", |status| {
        assert!(status.awaited.is_none());
        let GuestStatus::Alive { plain, .. } = &status.guest else {
            return false;
        };
        plain.as_ref().is_some_and(|plain| plain.cannot.is_some())
    });
    let status = traced.command(&["status"]).output().unwrap();
    let status = String::from_utf8_lossy(&status.stdout).into_owned();
    assert!(status.contains("cannot be traced as it is: "), "{status}");
    assert!(!status.contains("  waits "), "{status}");
}

#[test]
fn a_reserved_ring_is_traced_as_soon_as_its_tracer_is_set_in_each_boot() {
    let traced = start("reserved-boots", "stock-6.12-cloud", "--plain=reserved");
    awaited(&traced, false);
    let status = traced.command(&["status"]).output().unwrap();
    let status = String::from_utf8_lossy(&status.stdout).into_owned();
    assert_eq!(status.matches(TO_TYPE).count(), 1, "{status}");
    set_tracer(&traced);
    traced.until("a trace", |status| is_traced(status, 1));
    let first = reads_of(&traced, 2000);

    traced.reboot().unwrap();
    awaited(&traced, true);
    // The next helper waits too.
    let helper = traced.helper();
    kill(Pid::from_raw(helper.cast_signed()), Signal::SIGKILL).unwrap();
    wait_for(SOON, || {
        let on = traced.command(&["on"]).output()?;
        let said = String::from_utf8_lossy(&on.stderr).into_owned();
        assert!(!on.status.success(), "{said}");
        Ok(said.contains(TO_TYPE).then_some(()))
    })
    .unwrap();
    awaited(&traced, false);
    set_tracer(&traced);
    traced.until("its next boot", |status| is_traced(status, 2));
    let second = reads_of(&traced, 1000);
    both_boots_are_whole(&traced, [first, second], 1);

    // `off` takes back what was to be done at the start.
    traced.destroy().unwrap();
    Guest::start(&traced).unwrap();
    awaited(&traced, false);
    let off = traced.command(&["off"]).assert().success();
    let said = String::from_utf8_lossy(&off.get_output().stderr).into_owned();
    assert!(said.contains("is called off"), "{said}");
    set_tracer(&traced);
    traced.until("a guest that can be traced", |status| {
        assert!(status.trace.is_none() && status.awaited.is_none());
        let GuestStatus::Alive { plain, .. } = &status.guest else {
            return false;
        };
        plain.as_ref().is_some_and(|plain| plain.ring.is_some())
    });
    let sessions = list(&traced.lab().sessions(traced.name()));
    let states = sessions.iter().map(|dir| Meta::load(dir).unwrap().state);
    assert_eq!(states.collect::<Vec<_>>(), [State::Closed]);
}
