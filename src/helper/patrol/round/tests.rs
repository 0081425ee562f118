use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{channel, Sender};
use std::sync::Weak;

use uuid::Uuid;

use super::super::Patrol;
use super::*;
use crate::helper::fake::Setting;
use crate::integrity::{Check, Outcome};
use crate::libvirt::live::LiveXml;
use crate::libvirt::xml::DomainXml;
use crate::session::{DomainFindings, FINDINGS_FILE};

/// Longer than anything here takes on a busy machine.
const SOON: Duration = Duration::from_secs(30);

/// What a look at the guest comes to.
#[derive(Default)]
struct Sight {
    starting: AtomicBool,
    panics: AtomicBool,
    report: Mutex<Report>,
}

struct Fake(Arc<Sight>);

impl Eye for Fake {
    fn has_started(&self, _: &Subject) -> bool {
        !self.0.starting.load(Ordering::Relaxed)
    }

    fn check(
        &self,
        _: &Subject,
        wait: &mut dyn FnMut(Duration) -> bool,
    ) -> Result<Option<Report>, IntegrityError> {
        assert!(!self.0.panics.load(Ordering::Relaxed), "a fault of ours");
        let report = lock(&self.0.report).clone();
        Ok(wait(Duration::ZERO).then_some(report))
    }
}

fn hook() -> Report {
    let outcome = |check| Outcome {
        check,
        looked_at: 1,
        doubt: None,
    };
    Report {
        findings: vec![crate::integrity::Finding {
            check: Check::KernelText,
            place: "vfs_read".to_owned(),
            address: 1,
            expected: "a".to_owned(),
            found: "b".to_owned(),
            owner: None,
        }],
        outcomes: Check::ALL.map(outcome).to_vec(),
        ..Report::default()
    }
}

fn clean() -> Report {
    Report {
        findings: Vec::new(),
        ..hook()
    }
}

/// The patrol of a guest, turn by turn.
struct Watched {
    setting: Setting,
    sight: Arc<Sight>,
    dir: tempfile::TempDir,
    round: Round,
    inbox: Inbox,
    _engine: Sender<Option<Arc<Subject>>>,
}

impl Watched {
    fn new() -> Self {
        let mut watched = Self::before();
        watched.boots(true);
        watched
    }

    /// Before the engine has told of any kernel.
    fn before() -> Self {
        let sight = Arc::new(Sight::default());
        let dir = tempfile::tempdir().expect("a directory");
        let status = IntegrityStatus {
            interval_ns: 0,
            cannot: None,
            looks: 0,
            last: None,
        };
        let mut round = Round::new(
            orders(&dir),
            open(&sight),
            Arc::default(),
            Arc::new(Mutex::new(status)),
        );
        round.heart = Duration::from_millis(200);
        let (engine, from) = channel();
        Self {
            setting: Setting::new(),
            sight,
            dir,
            round,
            inbox: Inbox { from, next: None },
            _engine: engine,
        }
    }

    /// The engine tells of the kernel as it is now.
    fn boots(&mut self, noted: bool) {
        let guest = self.setting.engine.watch.guest.clone().expect("a kernel");
        let ram = Arc::clone(&self.setting.ram) as Arc<dyn crate::ram::GuestRam>;
        self.round
            .follow(Some(Arc::new(Subject { guest, ram, noted })));
    }

    fn sees(&self, report: Report) {
        *lock(&self.sight.report) = report;
    }

    /// A turn. How many looks there were by then, and why there is none.
    fn turn(&mut self) -> (u64, String) {
        self.round.turn(&mut self.inbox);
        let status = lock(&self.round.status);
        (status.looks, status.cannot.clone().unwrap_or_default())
    }

    /// The kinds of what was told.
    fn told(&self) -> Vec<String> {
        let text = std::fs::read_to_string(self.dir.path().join(FINDINGS_FILE));
        let text = text.unwrap_or_default();
        let lines = text.lines().map(|line| {
            let line: serde_json::Value = serde_json::from_str(line).expect("JSON");
            line["finding"].as_str().expect("a kind").to_owned()
        });
        lines.collect()
    }
}

fn orders(dir: &tempfile::TempDir) -> Orders {
    Orders {
        interval: Duration::from_millis(10),
        domain: "web1".to_owned(),
        uuid: Uuid::nil(),
        symbols: PathBuf::new(),
        findings: DomainFindings::at(dir.path()),
        notifier: Weak::new(),
    }
}

fn open(sight: &Arc<Sight>) -> Open {
    let sight = Arc::clone(sight);
    Box::new(move |_, _| Ok(Some(Box::new(Fake(Arc::clone(&sight))))))
}

#[test]
fn a_guest_that_says_that_it_has_booted_makes_nothing_be_forgotten() {
    let mut watched = Watched::new();
    watched.sees(hook());
    assert_eq!(watched.turn(), (1, String::new()));
    assert_eq!(watched.told(), ["integrity"]);
    watched.setting.change_boot_id(9);
    watched.setting.until("the kernel", |setting| {
        let guest = &setting.engine.watch.guest;
        guest
            .as_ref()
            .is_some_and(|guest| guest.link.boot_id() == 9)
    });
    watched.boots(false);
    assert_eq!(watched.told(), ["integrity", "boot-without-reset"]);
    watched.sight.starting.store(true, Ordering::Relaxed);
    assert_eq!(watched.turn(), (1, STILL_STARTING.to_owned()));
    assert!(lock(&watched.round.status).last.is_some());
    // The hook is there as it was.
    watched.sight.starting.store(false, Ordering::Relaxed);
    assert_eq!(watched.turn(), (2, String::new()));
    assert_eq!(watched.told().len(), 2);
    watched.sees(clean());
    watched.turn();
    assert_eq!(
        watched.told(),
        ["integrity", "boot-without-reset", "integrity-gone"]
    );
    // One whose reset was seen is nothing to tell of.
    watched.round.boot = None;
    watched.boots(true);
    assert_eq!(watched.told().len(), 3);
}

#[test]
fn a_heart_that_is_silent_for_long_does_not_keep_the_guest_from_being_looked_at() {
    let mut watched = Watched::new();
    watched.setting.knobs.dead.store(true, Ordering::Release);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(watched.turn(), (0, SILENT.to_owned()));
    assert_eq!(watched.told(), [""; 0]);
    watched.sees(hook());
    watched.round.patience.set_limit(Duration::ZERO);
    // A paused one is left alone.
    watched
        .round
        .host
        .stands_still
        .store(true, Ordering::Relaxed);
    assert_eq!(watched.turn(), (0, PAUSED.to_owned()));
    assert_eq!(watched.told(), [""; 0]);
    watched
        .round
        .host
        .stands_still
        .store(false, Ordering::Relaxed);
    // One that has not started is none to look at.
    watched.sight.starting.store(true, Ordering::Relaxed);
    assert_eq!(watched.turn(), (0, STILL_STARTING.to_owned()));
    watched.sight.starting.store(false, Ordering::Relaxed);
    let all_the_same = format!("{SILENT}; looked all the same");
    assert_eq!(watched.turn(), (1, all_the_same.clone()));
    assert_eq!(watched.told(), ["not-looked-at", "integrity"]);
    // It is told once.
    assert_eq!(watched.turn(), (2, all_the_same));
    assert_eq!(watched.told().len(), 2);
}

#[test]
fn a_guest_that_changes_its_boot_id_all_the_time_is_looked_at_where_it_lives() {
    let mut watched = Watched::new();
    watched.setting.change_boot_id(9);
    watched.round.follow(None);
    watched.turn();
    assert_eq!(watched.turn(), (0, NO_KERNEL.to_owned()));
    watched.sees(hook());
    watched.round.patience.set_limit(Duration::ZERO);
    let all_the_same = format!("{NO_KERNEL}; looked all the same");
    assert_eq!(watched.turn(), (1, all_the_same));
    assert_eq!(watched.told(), ["not-looked-at", "integrity"]);
    // Where no heart beats either, it may be anything that lies there.
    watched.setting.knobs.dead.store(true, Ordering::Release);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(watched.turn(), (1, NO_KERNEL.to_owned()));
}

#[test]
fn a_kernel_that_starts_for_ever_is_looked_at_in_the_end() {
    let mut watched = Watched::new();
    watched.sees(hook());
    watched.sight.starting.store(true, Ordering::Relaxed);
    watched.round.patience.set_limit(Duration::ZERO);
    // While it is believed, it is given the time.
    assert_eq!(watched.turn(), (0, STILL_STARTING.to_owned()));
    let now = Instant::now();
    assert!(!watched
        .round
        .patience
        .starts(now + 2 * Duration::from_secs(120)));
    assert_eq!(watched.turn(), (1, String::new()));
}

#[test]
fn a_guest_in_which_no_kernel_is_ever_found_is_told() {
    let mut watched = Watched::before();
    let pause = |watched: &Watched, still| {
        let host = &watched.round.host.stands_still;
        host.store(still, Ordering::Relaxed);
    };
    assert_eq!(watched.turn(), (0, NO_KERNEL.to_owned()));
    pause(&watched, true);
    assert_eq!(watched.turn(), (0, PAUSED.to_owned()));
    pause(&watched, false);
    assert_eq!(watched.turn(), (0, NO_KERNEL.to_owned()));
    assert_eq!(watched.told(), [""; 0]);
    watched.round.patience.set_limit(Duration::ZERO);
    // A paused one is given the time.
    pause(&watched, true);
    watched.turn();
    assert_eq!(watched.told(), [""; 0]);
    pause(&watched, false);
    watched.round.cannot(NO_KERNEL, false);
    for _ in 0..3 {
        assert_eq!(watched.turn(), (0, NO_KERNEL.to_owned()));
        assert_eq!(watched.told(), ["not-looked-at"]);
    }
    // And it is asked again soon.
    let rest = watched.round.turn(&mut watched.inbox);
    assert!(rest <= RETRY, "{rest:?}");
    watched.boots(true);
    assert_eq!(watched.turn(), (1, String::new()));
}

#[test]
fn a_kernel_that_is_found_late_was_not_waited_for() {
    let mut watched = Watched::before();
    let limit = Duration::from_secs(1);
    watched.round.patience.set_limit(limit);
    std::thread::sleep(limit / 2);
    watched.turn();
    watched.boots(true);
    std::thread::sleep(limit / 2);
    assert_eq!(watched.turn().0, 1);
    assert_eq!(watched.told(), [""; 0]);
}

#[test]
fn doubts_of_looks_are_told() {
    let mut watched = Watched::new();
    let mut bent = clean();
    bent.outcomes[0].doubt = Some("it is bent".to_owned());
    watched.sees(bent);
    watched.turn();
    watched.turn();
    assert_eq!(watched.turn().0, 3);
    assert_eq!(watched.told(), ["integrity-doubt"]);
}

#[test]
fn a_look_that_panics_is_told_and_the_next_one_is_made() {
    let dir = tempfile::tempdir().expect("a directory");
    let sight = Arc::new(Sight::default());
    sight.panics.store(true, Ordering::Relaxed);
    let mut patrol = Patrol::start_with(orders(&dir), open(&sight)).expect("a thread");
    let setting = Setting::new();
    let domain = "<domain id='1'><name>web1</name>\
        <uuid>9a3f1c50-7f1e-4f0e-8f5e-0123456789ab</uuid><memory>1</memory></domain>";
    let domain = DomainXml::parse_bytes(domain.as_bytes()).expect("a domain");
    let live = LiveXml::new(dir.path(), &domain);
    let ram = Arc::clone(&setting.ram) as Arc<dyn crate::ram::GuestRam>;
    patrol.follow(&setting.engine.watch, &ram, &live);
    let until = |patrol: &mut Patrol, is_so: &dyn Fn(&IntegrityStatus) -> bool| {
        let begun = Instant::now();
        while !is_so(&patrol.status()) {
            assert!(begun.elapsed() < SOON, "{:?}", patrol.status());
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    until(&mut patrol, &|now| now.cannot.as_deref() == Some(FAILED));
    assert_eq!(patrol.status().looks, 0);
    sight.panics.store(false, Ordering::Relaxed);
    until(&mut patrol, &|now| now.looks > 1 && now.cannot.is_none());
    // And where the thread has ended after all, that is said for ever.
    patrol.to = channel().0;
    until(&mut patrol, &|now| {
        now.cannot.as_deref() == Some(super::super::ENDED)
    });
}

#[test]
fn a_boot_is_noted_where_libvirt_wrote_since_the_heart_beat_last() {
    let dir = tempfile::tempdir().expect("a directory");
    let text = "<domain id='1'><name>web1</name>\
        <uuid>9a3f1c50-7f1e-4f0e-8f5e-0123456789ab</uuid><memory>1</memory></domain>";
    let domain = DomainXml::parse_bytes(text.as_bytes()).expect("a domain");
    let mut live = LiveXml::new(dir.path(), &domain);
    let sight = Arc::new(Sight::default());
    let mut patrol = Patrol::start_with(orders(&dir), open(&sight)).expect("a thread");
    let (first, second) = ((1, crate::ram::Gpa(1)), (2, crate::ram::Gpa(1)));
    let write = || {
        let path = dir.path().join("web1.xml");
        let status = format!("<domstatus state='running' reason='booted'>{text}</domstatus>");
        std::fs::write(dir.path().join("new"), status).expect("written");
        std::fs::rename(dir.path().join("new"), path).expect("renamed");
    };
    let read = |live: &mut LiveXml| {
        std::thread::sleep(Duration::from_millis(110));
        let _ = live.changed();
    };
    // The first boot that is known, and a domain of which nothing is noted at all.
    assert!(patrol.noted(first, &live));
    patrol.last = Some((first, Instant::now()));
    assert!(patrol.noted(second, &live));
    write();
    read(&mut live);
    assert!(patrol.noted(first, &live), "it is the same boot");
    assert!(!patrol.noted(second, &live));
    write();
    read(&mut live);
    assert!(patrol.noted(second, &live));
    // Too long ago to have been it.
    patrol.last = Some((first, Instant::now() + 2 * super::super::SLACK));
    assert!(!patrol.noted(second, &live));
}
