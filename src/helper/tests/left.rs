//! What other helpers left open, and what is to begin with the domain.

use super::*;

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
