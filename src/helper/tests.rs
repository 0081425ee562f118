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
fn what_a_killed_helper_began_to_end_is_ended() {
    let mut setting = Setting::new();
    assert!(matches!(setting.on(), Reply::On { .. }));
    // It was killed between the two halves of `off`.
    setting.command(2);
    setting.killed_and_started();
    setting.until("nop", |setting| {
        setting.engine.watch.guest.is_some() && setting.state() == OFF
    });
    assert!(setting.engine.trace.is_none());
    assert_eq!(sessions(&setting)[0].state, State::Closed);
    assert!(matches!(setting.on(), Reply::On { .. }));
    assert_eq!(sessions(&setting).len(), 2);
}

#[test]
fn a_killed_helper_s_trace_goes_on() {
    let mut setting = Setting::new();
    assert!(matches!(setting.on(), Reply::On { .. }));
    setting.killed_and_started();
    setting.until("the session", |setting| setting.engine.trace.is_some());
    assert_eq!(setting.knobs.begun.load(Ordering::Acquire), 1);
    let reply = setting.ask(Request::Off);
    assert!(matches!(reply, Reply::Off { left: None, .. }), "{reply:?}");
    let sessions = sessions(&setting);
    assert_eq!(sessions.len(), 1);
    assert_eq!(sessions[0].end, Some(EndReason::Off));
}

#[test]
fn a_session_in_which_nothing_was_traced_yet_is_not_taken_for_all_functions() {
    let mut setting = Setting::new();
    assert!(matches!(setting.on(), Reply::On { .. }));
    // Killed after the guest began, and before it was noted.
    let dir = crate::session::list(&setting.engine.sessions_dir()).remove(0);
    let mut meta = Meta::load(&dir).expect("a session");
    meta.switches.clear();
    setting.killed_and_started();
    meta.save(&dir).expect("saved");
    setting.until("nop", |setting| {
        setting.engine.watch.guest.is_some() && setting.state() == OFF
    });
    assert_eq!(sessions(&setting)[0].state, State::Closed);
    assert_eq!(setting.knobs.all.load(Ordering::Acquire), 0);
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

#[test]
fn a_session_that_others_left_open_is_closed_as_what_is_known_of_it() {
    let mut setting = Setting::new();
    assert!(matches!(setting.on(), Reply::On { .. }));
    let dir = crate::session::list(&setting.engine.sessions_dir()).remove(0);
    setting.killed_and_started();
    let mut meta = Meta::load(&dir).expect("a session");
    // Of another QEMU process.
    meta.qemu.start_time += 1;
    meta.save(&dir).expect("saved");
    let before = crate::helper::watch::wall_ns();
    setting.until("nop", |setting| {
        setting.engine.watch.guest.is_some() && setting.state() == OFF
    });
    let meta = Meta::load(&dir).expect("a session");
    assert_eq!(meta.end, Some(EndReason::HelperGone));
    let ended = meta.ended_ns.expect("a time");
    assert!(before.abs_diff(ended) < 1_000_000_000, "{before} {ended}");
}

/// Whoever asks for the end of a trace right behind a helper's does not end another.
#[test]
fn off_ends_what_a_killed_helper_left_before_the_next_one_has_found_the_kernel() {
    let mut setting = Setting::new();
    assert!(matches!(setting.on(), Reply::On { .. }));
    setting.killed_and_started();
    let reply = setting.ask(Request::Off);
    assert!(matches!(reply, Reply::Off { left: None, .. }), "{reply:?}");
    assert_eq!(sessions(&setting)[0].end, Some(EndReason::Off));
    assert_eq!(setting.state(), OFF);
    // Nor does a kernel that does not live keep it open.
    assert!(matches!(setting.on(), Reply::On { .. }));
    setting.knobs.dead.store(true, Ordering::Release);
    setting.killed_and_started();
    let dir = crate::session::list(&setting.engine.sessions_dir()).remove(0);
    match setting.ask(Request::Off) {
        Reply::Off { session, .. } => assert_eq!(session, dir),
        reply => panic!("{reply:?}"),
    }
    assert_eq!(sessions(&setting)[0].end, Some(EndReason::Off));
    setting.knobs.dead.store(false, Ordering::Release);
    setting.until("nop", |setting| setting.state() == OFF);
    assert!(setting.engine.trace.is_none());
}

/// Nor does the end of the VM.
#[test]
fn what_a_helper_left_open_ends_with_its_vm() {
    let mut setting = Setting::new();
    assert!(matches!(setting.on(), Reply::On { .. }));
    setting.killed_and_started();
    let closed = setting.engine.close_left(&EndReason::VmEnded);
    assert_eq!(closed.expect("a session").1.state, State::Closed);
    assert_eq!(sessions(&setting)[0].end, Some(EndReason::VmEnded));
    // It is not taken up by anyone after that.
    setting.until("nop", |setting| setting.state() == OFF);
    assert!(setting.engine.trace.is_none());
}

#[test]
fn off_takes_back_what_was_to_begin_with_the_domain() {
    let mut setting = Setting::new();
    setting.killed_and_started();
    let at_start = at_start(&setting);
    setting.engine.enrolment = Some(at_start.clone());
    assert_eq!(setting.ask(Request::Off), Reply::CalledOff);
    setting.until("the kernel", |setting| setting.engine.watch.guest.is_some());
    setting.engine.round().expect("a round");
    assert!(setting.engine.trace.is_none());
    assert_eq!(sessions(&setting), []);
    // It begins once in the life of a VM.
    for (sessions_there, is_begun) in [(0, true), (1, false)] {
        setting.killed_and_started();
        setting.engine.enrolment = Some(at_start.clone());
        setting.until("the kernel", |setting| setting.engine.watch.guest.is_some());
        setting.engine.round().expect("a round");
        assert_eq!(setting.engine.trace.is_some(), is_begun);
        assert_eq!(
            sessions(&setting).len(),
            sessions_there + usize::from(is_begun)
        );
        if is_begun {
            assert!(matches!(setting.ask(Request::Off), Reply::Off { .. }));
        }
    }
}

/// A helper that is stopped, for an update of it for instance, does not end what somebody
/// wants.
#[test]
fn what_begins_with_the_domain_begins_again_with_the_next_helper() {
    let mut setting = Setting::new();
    let at_start = at_start(&setting);
    for helpers in 1..4 {
        setting.killed_and_started();
        setting.engine.enrolment = Some(at_start.clone());
        setting.until("a trace", |setting| setting.engine.trace.is_some());
        setting.engine.end(EndReason::HelperStopped).expect("ended");
        assert_eq!(sessions(&setting).len(), helpers);
    }
    // Nor does a reset just as it begins.
    setting.killed_and_started();
    setting.engine.enrolment = Some(at_start);
    setting.knobs.deaf.store(true, Ordering::Release);
    let id = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(1));
    setting.until("a try", |setting| {
        let id = id.fetch_add(1, Ordering::AcqRel);
        setting.change_boot_id(100 + id / 4);
        id > 40
    });
    setting.knobs.deaf.store(false, Ordering::Release);
    setting.until("a trace", |setting| setting.engine.trace.is_some());
}

/// Enrolled to be traced from its start.
fn at_start(setting: &Setting) -> Enrolment {
    let mut config = setting.engine.config.clone();
    config.auto_enroll = AutoEnroll::All;
    let mut enrolment = Enrolment::of(&setting.engine.domain, &config).expect("enrolled");
    enrolment.at_start = true;
    enrolment.functions = vec!["vfs_read".to_owned()];
    enrolment
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
fn a_session_that_cannot_be_gone_on_with_does_not_stop_what_is_asked_for() {
    let mut setting = Setting::new();
    assert!(matches!(setting.on(), Reply::On { .. }));
    let dir = crate::session::list(&setting.engine.sessions_dir()).remove(0);
    setting.killed_and_started();
    let (klog, away) = (dir.join("klog"), dir.join("away"));
    std::fs::rename(&klog, &away).expect("renamed");
    // Once is not for ever.
    let mut failures = 0;
    while failures == 0 {
        failures += u32::from(setting.engine.round().is_err());
        std::thread::sleep(std::time::Duration::from_millis(3));
    }
    setting.engine.failed("a test");
    std::fs::rename(&away, &klog).expect("renamed");
    setting.until("the session", |setting| setting.engine.trace.is_some());
    setting.killed_and_started();
    std::fs::remove_file(&klog).expect("removed");
    for _ in 0..3 {
        while setting.engine.round().is_ok() {
            std::thread::sleep(std::time::Duration::from_millis(3));
        }
        setting.engine.failed("a test");
    }
    setting.until("nop", |setting| setting.state() == OFF);
    let end = Meta::load(&dir).expect("a session").end;
    assert!(
        matches!(&end, Some(EndReason::Error(why)) if why.contains("klog")),
        "{end:?}"
    );
    assert!(matches!(setting.on(), Reply::On { .. }));
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

/// Round after round for a while, in which a planted kernel lives too.
fn with_planted(setting: &mut Setting, time: Duration) {
    let begun = std::time::Instant::now();
    setting.until("the end of it", |setting| {
        setting.beat_planted();
        begun.elapsed() >= time
    });
}

/// All of it is as in a guest that was paused, and the planted kernel is the
/// first one whose heart beats again.
#[test]
fn a_planted_kernel_does_not_win_over_the_attached_one() {
    let mut setting = Setting::new();
    assert_eq!(setting.place(), Some(TRUE));
    setting.plant_another_boot();
    with_planted(&mut setting, Duration::from_millis(700));
    assert_eq!(setting.place(), Some(TRUE));
    setting.knobs.dead.store(true, Ordering::Release);
    let begun = std::time::Instant::now();
    setting.until("some searches", |_| {
        begun.elapsed() > Duration::from_secs(3)
    });
    with_planted(&mut setting, Duration::from_millis(400));
    setting.knobs.dead.store(false, Ordering::Release);
    with_planted(&mut setting, Duration::from_secs(1));
    assert_eq!(setting.place(), Some(TRUE));
    // Where the true one is silent for good, it was a reboot as far as one sees.
    setting.knobs.dead.store(true, Ordering::Release);
    setting.until("the other", |setting| {
        setting.beat_planted();
        setting.place() == Some(PLANTED)
    });
}

#[test]
fn a_kernel_at_work_is_not_left_for_one_that_beats() {
    let mut setting = Setting::new();
    setting.plant_another_boot();
    // Longer than a kernel may be silent otherwise, and some searches more.
    setting.knobs.work.store(4_000, Ordering::Release);
    let (heart, done) = (setting.planted_heart(), Arc::new(AtomicBool::new(false)));
    let beating = {
        let done = Arc::clone(&done);
        std::thread::spawn(move || {
            while !done.load(Ordering::Acquire) {
                heart();
                std::thread::sleep(Duration::from_millis(5));
            }
        })
    };
    let reply = setting.on();
    done.store(true, Ordering::Release);
    beating.join().expect("it ends");
    assert!(matches!(reply, Reply::On { .. }), "{reply:?}");
    assert_eq!(setting.place(), Some(TRUE));
}

#[test]
fn a_helper_that_takes_over_goes_on_with_the_kernel_where_it_was() {
    let mut setting = Setting::new();
    assert!(matches!(setting.on(), Reply::On { .. }));
    setting.killed_and_started();
    assert_eq!(setting.found_beside_planted(), Some(TRUE));
    setting.until("the session", |setting| setting.engine.trace.is_some());
    assert!(matches!(setting.ask(Request::Off), Reply::Off { .. }));

    // Without a session too.
    setting.killed_and_started();
    assert_eq!(setting.found_beside_planted(), Some(TRUE));
    assert!(setting.engine.watch.rivals().is_none());
}

/// A helper that comes to a guest whose kernel nobody has seen before the copy.
#[test]
fn what_may_be_a_copy_is_not_traced() {
    let mut setting = Setting::new();
    setting.forget_place();
    setting.killed_and_started();
    assert_eq!(setting.found_beside_planted(), Some(PLANTED));
    match setting.on() {
        Reply::Error { text } => assert!(text.starts_with("2 kernels seem to live"), "{text}"),
        reply => panic!("{reply:?}"),
    }
    setting.engine.publish();
    let status = lock(&setting.engine.status()).guest.clone();
    let GuestStatus::Alive { rivals, .. } = status else {
        panic!("{status:?}");
    };
    assert!(rivals.expect("a reason").contains("a reboot ends them"));
    // The next helper knows no more.
    setting.killed_and_started();
    setting.until("the same", |setting| {
        setting.beat_planted();
        setting.engine.watch.rivals().is_some()
    });
    // The copy dies: what is left is the guest's kernel.
    setting.until("the true one", |setting| {
        setting.place() == Some(TRUE) && setting.engine.watch.rivals().is_none()
    });
    assert!(matches!(setting.on(), Reply::On { .. }));
}

#[test]
fn a_guess_is_none_once_no_other_lives() {
    let mut setting = Setting::new();
    setting.forget_place();
    setting.killed_and_started();
    setting.until("rivals", |setting| {
        setting.beat_planted();
        setting.engine.watch.rivals().is_some()
    });
    setting.knobs.dead.store(true, Ordering::Release);
    setting.until("no rivals", |setting| {
        setting.beat_planted();
        setting.engine.watch.rivals().is_none()
    });
    assert_eq!(setting.place(), Some(PLANTED));
    // It is known from then on, to other helpers too.
    setting.killed_and_started();
    setting.knobs.dead.store(false, Ordering::Release);
    assert_eq!(setting.found_beside_planted(), Some(PLANTED));
    assert!(setting.engine.watch.rivals().is_none());
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
