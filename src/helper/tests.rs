//! What the engine does with a guest that does not go along.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::Duration;

use crate::config::AutoEnroll;
use crate::detect::{Baseline, Store};
use crate::keys::Tamper;
use crate::libvirt::enrolment::Enrolment;
use crate::session::{EndReason, Meta, State, FINDINGS_FILE};

use super::boots::MAX_BOOTS;
use super::engine::lock;
use super::fake::{Setting, OFF, ON, PLANTED, STOPPED, TRUE};
use super::protocol::{GuestStatus, JudgedStatus, Reply, Request};

mod left;
mod planted;

/// The domain's sessions, newest first.
fn sessions(setting: &Setting) -> Vec<Meta> {
    let dirs = crate::session::list(&setting.engine.sessions_dir());
    dirs.iter()
        .map(|dir| Meta::load(dir).expect("a session"))
        .collect()
}

#[test]
fn a_tracer_that_cannot_be_set_to_nop_is_told_and_set_as_soon_as_it_can() {
    let mut setting = Setting::new();
    assert!(matches!(setting.on(), Reply::On { .. }));
    setting.knobs.pipe_is_open.store(true, Ordering::Release);
    match setting.ask(Request::Off) {
        Reply::Off { left, .. } => {
            let left = left.expect("a reason");
            assert!(left.contains("trace_pipe"), "{left}");
        }
        reply => panic!("{reply:?}"),
    }
    assert_eq!(sessions(&setting)[0].state, State::Closed);
    assert_eq!(setting.state(), STOPPED);
    // A trace that cannot begin says why, and leaves no session.
    match setting.on() {
        Reply::Error { text } => assert!(text.contains("trace_pipe"), "{text}"),
        reply => panic!("{reply:?}"),
    }
    assert_eq!(sessions(&setting).len(), 1);
    setting.knobs.pipe_is_open.store(false, Ordering::Release);
    setting.until("nop", |setting| setting.state() == OFF);
}

#[test]
fn a_trace_begins_though_the_last_one_was_never_switched_off() {
    // 1: it still records. 2: it was stopped.
    for last in [1, 2] {
        let mut setting = Setting::new();
        setting.command(1);
        setting.command(last);
        assert_ne!(setting.state(), OFF);
        assert!(matches!(setting.on(), Reply::On { .. }));
        assert_eq!(setting.state(), ON);
        // From off: so the guest counts its records from 0 on.
        assert_eq!(setting.knobs.begun.load(Ordering::Acquire), 2);
    }
}

#[test]
fn what_an_error_leaves_traced_is_switched_off() {
    let mut setting = Setting::new();
    assert!(matches!(setting.on(), Reply::On { .. }));
    setting.engine.failed("a test");
    assert_eq!(
        sessions(&setting)[0].end,
        Some(EndReason::Error("a test".to_owned()))
    );
    setting.until("nop", |setting| setting.state() == OFF);
    assert!(matches!(setting.on(), Reply::On { .. }));
    assert_eq!(setting.knobs.begun.load(Ordering::Acquire), 2);
}

#[test]
fn off_without_a_trace_switches_the_guest_off_all_the_same() {
    let mut setting = Setting::new();
    for (begun, says) in [(true, "is nop now"), (false, "begins one")] {
        if begun {
            setting.command(1);
        }
        match setting.ask(Request::Off) {
            Reply::Error { text } => assert!(text.contains(says), "{text}"),
            reply => panic!("{reply:?}"),
        }
        assert_eq!(setting.state(), OFF);
    }
}

#[test]
fn a_command_that_was_given_up_is_not_done_later() {
    let mut setting = Setting::new();
    setting.knobs.deaf.store(true, Ordering::Release);
    match setting.on() {
        Reply::Error { text } => assert!(text.contains("did not take the command up"), "{text}"),
        reply => panic!("{reply:?}"),
    }
    setting.knobs.deaf.store(false, Ordering::Release);
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert_eq!(setting.knobs.begun.load(Ordering::Acquire), 0);
    assert!(sessions(&setting).is_empty());
}

#[test]
fn a_trace_ends_though_the_guest_takes_no_command() {
    let mut setting = Setting::new();
    assert!(matches!(setting.on(), Reply::On { .. }));
    setting.knobs.deaf.store(true, Ordering::Release);
    let reply = setting.ask(Request::Off);
    assert!(
        matches!(reply, Reply::Off { left: Some(_), .. }),
        "{reply:?}"
    );
    assert_eq!(sessions(&setting)[0].end, Some(EndReason::Off));
    assert_eq!(setting.state(), ON);
    setting.knobs.deaf.store(false, Ordering::Release);
    setting.until("nop", |setting| setting.state() == OFF);
}

#[test]
fn a_guest_that_stops_of_its_own_is_told_of() {
    let mut setting = Setting::new();
    assert!(matches!(setting.on(), Reply::On { .. }));
    let findings = crate::session::list(&setting.engine.sessions_dir())
        .remove(0)
        .join(FINDINGS_FILE);
    let found = |what: &str| {
        let text = std::fs::read_to_string(&findings).expect("findings");
        text.contains(what)
    };
    for _ in 0..20 {
        setting.engine.round().expect("a round");
    }
    assert!(!found("-off"));
    setting.command(2);
    setting.until("a finding", |_| found("recording-off"));
    assert!(!found("tracer-off"));
    setting.command(3);
    setting.until("a finding", |_| found("tracer-off"));
}

#[test]
fn a_disk_that_takes_nothing_ends_no_trace() {
    let mut setting = Setting::new();
    assert!(matches!(setting.on(), Reply::On { .. }));
    let dir = crate::session::list(&setting.engine.sessions_dir()).remove(0);
    let away = dir.with_extension("away");
    let saved = |dir: &std::path::Path| Meta::load(dir).expect("a session").counters.tampered;
    // What keeps it from being saved does not matter.
    std::fs::rename(&dir, &away).expect("renamed");
    let begun = std::time::Instant::now();
    setting.until("some saves", |_| begun.elapsed().as_secs() >= 3);
    assert!(setting.engine.trace.is_some());
    std::fs::rename(&away, &dir).expect("renamed");
    setting.change_key();
    setting.until("a save", |_| saved(&dir) > 0);

    std::fs::rename(&dir, &away).expect("renamed");
    let reply = setting.ask(Request::Off);
    assert!(matches!(reply, Reply::Off { left: None, .. }), "{reply:?}");
    assert_eq!(setting.state(), OFF);
    std::fs::rename(&away, &dir).expect("renamed");
    assert_eq!(Meta::load(&dir).expect("a session").state, State::Open);
    setting.until("a save", |_| {
        Meta::load(&dir).expect("a session").state == State::Closed
    });
}

#[test]
fn what_off_counts_is_what_the_session_says() {
    let mut setting = Setting::new();
    assert!(matches!(setting.on(), Reply::On { .. }));
    let trace = setting.engine.trace.as_ref().expect("a trace");
    let keys = std::sync::Arc::clone(&trace.keys.thread().expect("keys").shared);
    let last = move || keys.found(vec![Tamper::Key { epoch: 1 }]);
    *setting.knobs.at_off.lock().expect("no panic") = Some(Box::new(last));
    match setting.ask(Request::Off) {
        Reply::Off { counters, .. } => {
            assert_eq!(counters, sessions(&setting)[0].counters);
            assert!(counters.tampered == 1);
        }
        reply => panic!("{reply:?}"),
    }
}

#[test]
fn a_guest_that_boots_without_end_ends_the_trace() {
    let mut setting = Setting::new();
    assert!(matches!(setting.on(), Reply::On { .. }));
    let trace = setting.engine.trace.as_mut().expect("a trace");
    let boot = trace.writer.meta.boots[0].clone();
    trace.writer.meta.boots = vec![boot; MAX_BOOTS - 1];
    // Those too of which nothing came.
    trace.boots = MAX_BOOTS - 1;
    setting.change_boot_id(2);
    setting.until("one boot more", |setting| {
        let trace = setting.engine.trace.as_ref().expect("a trace");
        trace.writer.meta.boots.len() == MAX_BOOTS
    });
    setting.change_boot_id(3);
    setting.until("the end", |setting| setting.engine.trace.is_none());
    let meta = &sessions(&setting)[0];
    assert_eq!(meta.end, Some(EndReason::TooManyBoots));
    assert_eq!(meta.boots.len(), MAX_BOOTS);
    setting.until("nop", |setting| setting.state() == OFF);
}

#[test]
fn a_session_of_its_full_size_ends_the_trace() {
    let mut setting = Setting::with(|config| config.limits.session_size.0 = 4096);
    assert!(matches!(setting.on(), Reply::On { .. }));
    let trace = setting.engine.trace.as_mut().expect("a trace");
    trace.writer.meta.domain = "x".repeat(5000);
    setting.until("the end", |setting| setting.engine.trace.is_none());
    assert_eq!(sessions(&setting)[0].end, Some(EndReason::SizeLimit));
    assert_eq!(setting.state(), OFF);
}

/// However often it boots meanwhile.
#[test]
fn a_guest_that_is_not_traced_for_long_is_told_of() {
    let mut setting = Setting::new();
    assert!(matches!(setting.on(), Reply::On { .. }));
    let dir = crate::session::list(&setting.engine.sessions_dir()).remove(0);
    let told = |setting: &mut Setting, seconds| {
        let later = std::time::Instant::now() + Duration::from_secs(seconds);
        setting.engine.tell_untraced(later);
        let trace = setting.engine.trace.as_mut().expect("a trace");
        trace.writer.sync().expect("a disk");
        let found = std::fs::read_to_string(dir.join(FINDINGS_FILE)).unwrap_or_default();
        found.matches("not-traced").count()
    };
    assert_eq!(told(&mut setting, 1000), 0);
    setting.knobs.dead.store(true, Ordering::Release);
    for boot in 2..4 {
        setting.change_boot_id(boot);
        setting.until("the reset", |setting| setting.engine.watch.guest.is_none());
        assert_eq!(told(&mut setting, 60), 0);
    }
    assert_eq!(told(&mut setting, 130), 1);
    assert_eq!(told(&mut setting, 1000), 1);
    let verdict = crate::detect::check(&crate::session::Session::open(&dir).expect("it"), None);
    let doubts = verdict.expect("a verdict").doubts;
    assert!(
        doubts.iter().any(|doubt| doubt.contains("was reset")),
        "{doubts:?}"
    );
    setting.knobs.dead.store(false, Ordering::Release);
    setting.until("it is up", |setting| {
        let trace = setting.engine.trace.as_ref();
        trace.is_some_and(|trace| !trace.is_down())
    });
    assert_eq!(told(&mut setting, 1000), 1);
}

#[test]
fn a_guest_that_is_gone_is_not_waited_for() {
    let mut setting = Setting::new();
    assert!(matches!(setting.on(), Reply::On { .. }));
    setting.knobs.dead.store(true, Ordering::Release);
    setting.change_boot_id(2);
    setting.until("the reset", |setting| setting.engine.watch.guest.is_none());
    let begun = std::time::Instant::now();
    let reply = setting.ask(Request::Off);
    assert!(matches!(reply, Reply::Off { left: None, .. }), "{reply:?}");
    assert!(begun.elapsed().as_secs() < 4, "{:?}", begun.elapsed());
}

#[test]
fn the_status_says_how_often_the_memory_is_checked_and_why_it_cannot_be() {
    let mut setting = Setting::with(|config| {
        config.integrity_interval = "2s".parse().expect("an interval");
    });
    let integrity = |setting: &mut Setting| {
        setting.engine.publish();
        let status = lock(&setting.engine.status()).integrity.clone();
        status.expect("a status")
    };
    let why = |setting: &mut Setting| integrity(setting).cannot.unwrap_or_default();
    setting.until("a reason", |setting| why(setting).contains("symbols add"));
    let status = integrity(&mut setting);
    assert_eq!((status.interval_ns, status.looks), (2_000_000_000, 0));
    // The guest is reset, and its kernel is gone until it has booted again.
    setting.change_boot_id(9);
    setting.engine.round().expect("a round");
    assert!(setting.engine.watch.guest.is_none());
    setting.engine.round().expect("a round");
    let begun = std::time::Instant::now();
    while !why(&mut setting).contains("not known which kernel") {
        assert!(begun.elapsed() < Duration::from_secs(30));
        std::thread::sleep(Duration::from_millis(3));
    }
    setting.until("a reason", |setting| why(setting).contains("symbols add"));

    let mut off = Setting::with(|config| {
        config.integrity_interval = "off".parse().expect("an interval");
    });
    off.engine.publish();
    assert_eq!(lock(&off.engine.status()).integrity, None);
}

#[test]
fn the_status_says_by_what_a_trace_is_judged_and_why_it_is_not() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut setting = Setting::with(|config| {
        config.baseline = "web".to_owned();
        config.paths.baselines = dir.path().to_owned();
    });
    let mut judged = || {
        assert!(matches!(setting.on(), Reply::On { .. }));
        setting.engine.publish();
        let status = lock(&setting.engine.status()).trace.clone();
        assert!(matches!(setting.ask(Request::Off), Reply::Off { .. }));
        let banner = sessions(&setting)[0].boots[0].banner.clone();
        (status.expect("a trace").judged.expect("a baseline"), banner)
    };
    let learn = |kernel: &str| {
        let baseline = Baseline::new(kernel);
        Store::at(dir.path()).save("web", &baseline).expect("saved");
    };
    let (missing, banner) = judged();
    let why = missing.cannot.expect("a reason");
    assert!(why.contains("no baseline \"web\""), "{why}");
    learn("Linux version 0.01");
    let why = judged().0.cannot.expect("a reason");
    assert!(why.contains("another kernel (Linux version 0.01)"), "{why}");
    learn(&banner);
    let told = JudgedStatus {
        baseline: "web".to_owned(),
        cannot: None,
        findings: 0,
    };
    assert_eq!(judged().0, told);
}
