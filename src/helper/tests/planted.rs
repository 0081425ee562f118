//! Kernels that somebody keeps alive beside the guest's own.

use super::*;

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
