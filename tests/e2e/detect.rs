//! Detection on real guests: what a clean guest does is learnt, a clean guest is
//! clean, and each class of hooks is found by the call flow and in memory, as
//! `classes.rs` says. docs/detection.md has a table of it.

use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::Value;
use xftrace::detect::{Conclusion, Rule, Severity, Verdict};
use xftrace::session::{list, FindingKind, Session};
use xftrace_lab::{wait_for, Backing, Domain, Lab};

use crate::classes::{Class, Place, Shows, CLASSES, FUNCTIONS, KERNELS, PREPARE};
use crate::detection_table::{self, Found, OfKernel};
use crate::lab::{TestGuest, CONFIG};
use crate::traced::Traced;

/// What a guest does while it is learnt, and found clean: enough for the rules, which
/// judge a function from a hundred calls on.
const CLEAN_WORK: &str = "work & uses 120; kill $!; wait";
/// Under emulation, on a machine that may be busy.
const WORK_TIME: Duration = Duration::from_secs(120);
/// How long a hook is looked for.
const SOON: Duration = Duration::from_secs(60);
/// How long one is given that is not to be seen: longer than the helper takes to
/// judge.
const LONG_ENOUGH: Duration = Duration::from_secs(8);
/// Between two looks.
const AGAIN: Duration = Duration::from_millis(500);

/// The lab's configuration while guests are judged by baselines. All others have
/// to wait meanwhile.
struct Judging {
    lab: &'static Lab,
    dir: tempfile::TempDir,
}

impl Judging {
    fn begin(lab: &'static Lab) -> Judging {
        let dir = tempfile::tempdir().expect("a directory");
        let (baselines, told) = (dir.path().join("baselines"), dir.path().join("told"));
        std::fs::create_dir(&told).expect("a directory");
        let own = format!(
            "paths.baselines = {baselines:?}\n\
             on_finding = [\"/bin/sh\", \"-c\", \"cat > $(mktemp $0/XXXXXXXX)\", {told:?}]\n"
        );
        lab.write_config(&own).expect("a configuration");
        Judging { lab, dir }
    }

    /// What the command for findings was told of a domain: the rules of what was found
    /// in the call flow.
    fn told(&self, domain: &str) -> Vec<String> {
        let files = std::fs::read_dir(self.dir.path().join("told")).expect("a directory");
        let told = files.map(|file| {
            let text = std::fs::read(file.expect("a file").path()).expect("text");
            serde_json::from_slice::<Value>(&text).expect("JSON")
        });
        told.filter(|told| told["domain"] == domain && told["finding"] == "control-flow")
            .map(|told| told["rule"].as_str().expect("a rule").to_owned())
            .collect()
    }
}

impl Drop for Judging {
    /// The lab's own configuration again, for the tests after this one.
    fn drop(&mut self) {
        self.lab.write_config(CONFIG).expect("a configuration");
    }
}

/// A guest that is judged by a baseline of its own, also while it is traced.
struct Watched {
    traced: Traced,
    baseline: String,
    kernel: PathBuf,
}

impl Watched {
    fn start(guest: TestGuest) -> Watched {
        let baseline = guest.name().to_owned();
        let kernel = guest.lab().artifacts(guest.kernel()).unwrap().bzimage;
        let traced = Traced::start_with(guest, &["--baseline", &baseline]);
        Watched {
            traced,
            baseline,
            kernel,
        }
    }

    fn sh(&self, command: &str) {
        self.traced.run(command).unwrap().success().unwrap();
    }

    fn on(&self) {
        self.traced.on(&FUNCTIONS);
    }

    fn off(&self) {
        let off = ["off", "--no-copy"];
        self.traced.command(&off).assert().success();
    }

    /// The newest session's directory.
    fn session(&self) -> PathBuf {
        let sessions = list(&self.traced.lab().sessions(self.traced.name()));
        sessions.into_iter().next().expect("a session")
    }

    /// Traces the guest while it works, and gives the session.
    fn clean_session(&self) -> PathBuf {
        self.on();
        let output = self.traced.run_for(CLEAN_WORK, WORK_TIME).unwrap();
        assert!(output.text.contains("used 120"), "{}", output.text);
        self.off();
        self.session()
    }

    /// `xftrace check` of both its memory and its newest session.
    fn check(&self) -> Checked {
        let kernel = self.kernel.to_str().expect("a path");
        let check = ["check", "--json", "--kernel", kernel];
        let output = self.traced.command(&check).output().expect("xftrace ran");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let mut all: Value = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("{error}: {said}"));
        let memory = all["memory"].take();
        let flow = serde_json::from_value(all["flow"].take());
        Checked {
            status: output.status.code().expect("a status"),
            flow: flow.unwrap_or_else(|error| panic!("{error}: {all:#} {said}")),
            memory,
        }
    }

    fn is_clean(&self) {
        let session = self.clean_session();
        let Checked {
            status,
            flow,
            memory,
        } = self.check();
        assert_eq!(flow.conclusion, Conclusion::Clean, "{flow:#?}");
        assert_eq!(memory["conclusion"], "clean", "{memory:#}");
        assert_eq!(status, 0);
        assert!(flow.calls > 10_000, "{flow:#?}");
        assert_eq!(live(&session), [], "of a clean guest");
    }

    /// Puts a hook into the guest while it is traced, has it used, and looks for it
    /// in all ways until each has found what it is to find.
    fn attack(&self, class: &Class) -> Found {
        self.on();
        let (session, began) = (self.session(), Instant::now());
        let began_wall = SystemTime::now().duration_since(UNIX_EPOCH).expect("now");
        self.sh(&class.by.plant());
        let work = self.traced.spawn("work & exec uses").unwrap();
        let mut found = Found::default();
        let checked = loop {
            let checked = self.check();
            let now = began.elapsed();
            found.note(class, &checked.rules(), &checked.places(), now);
            if let Shows::It(rule) = class.flow {
                let live = live(&session).into_iter().find(|(by, _)| by == rule.name());
                found.live = live.map(|(_, at)| at.saturating_sub(began_wall));
            }
            let enough = now > LONG_ENOUGH || !class.has_blind_side();
            if (enough && found.is_whole(class)) || now > SOON {
                break checked;
            }
            std::thread::sleep(AGAIN);
        };
        work.kill(9).unwrap();
        self.sh(&class.by.remove());
        self.off();
        let (rules, places) = (checked.rules(), checked.places());
        let live = live(&session);
        println!(
            "{} {}: {found:?}: {rules:?}; live: {live:?}; memory: {places:?}",
            self.baseline, class.name
        );
        assert_eq!(checked.status, 1, "{}", class.name);
        assert!(found.is_whole(class), "{}: {:#?}", class.name, checked.flow);
        // Such a module is on the guest's list.
        let unlisted = rules.contains(&Rule::UnlistedModule);
        let listed = matches!(class.flow, Shows::It(Rule::UnknownModule));
        assert!(!(listed && unlisted), "{}: {:#?}", class.name, checked.flow);
        if let Shows::Nothing(_) = class.flow {
            assert!(rules.is_empty() && live.is_empty(), "{}", class.name);
        }
        if let Shows::Nothing(_) = class.memory {
            assert!(places.is_empty(), "{}: {places:?}", class.name);
        }
        // With the hook gone, so is what memory shows of it: some of it later, when
        // the kernel has nobody left who may use it.
        let clean = || Ok((self.check().memory["conclusion"] == "clean").then_some(()));
        wait_for(SOON, clean).unwrap_or_else(|error| panic!("{}: {error:#}", class.name));
        found
    }

    /// Learns what the clean guest does, and tries all classes on it.
    fn try_all(&self, judging: &Judging) -> OfKernel {
        let kernel = self.traced.kernel();
        self.sh(PREPARE);
        let (first, second) = (self.clean_session(), self.clean_session());
        let mut learn = self.traced.xftrace(self.traced.dir());
        learn.args(["baseline", "learn", &self.baseline]);
        learn.args([first, second]).assert().success();
        self.is_clean();
        assert_eq!(
            judging.told(self.traced.name()),
            [""; 0],
            "of a clean guest"
        );
        let of_it = || {
            CLASSES
                .iter()
                .filter(|class| class.kernels.contains(&kernel))
        };
        let found = of_it().map(|class| (class.name, self.attack(class)));
        let found: Vec<(&'static str, Found)> = found.collect();
        // It is run only so often a minute: of the first it was.
        let told = judging.told(self.traced.name());
        let first = of_it().find_map(|class| match class.flow {
            Shows::It(rule) => Some(rule),
            Shows::Nothing(_) => None,
        });
        let first = first.expect("a class").name();
        assert!(told.iter().any(|rule| rule == first), "{told:?}");
        self.is_clean();
        (kernel.to_owned(), found)
    }
}

/// What `xftrace check` printed.
struct Checked {
    status: i32,
    flow: Verdict,
    memory: Value,
}

impl Checked {
    /// The rules of the call flow by which something was found.
    fn rules(&self) -> Vec<Rule> {
        let found = self.flow.findings.iter();
        let mut rules: Vec<Rule> = found
            .filter(|finding| finding.severity > Severity::Notice)
            .map(|finding| finding.rule)
            .collect();
        rules.dedup();
        rules
    }

    /// What was found in memory: check, place, owner.
    fn places(&self) -> Vec<[String; 3]> {
        let found = self.memory["findings"].as_array().expect("findings");
        let text = |one: &Value, what: &str| one[what].as_str().unwrap_or_default().to_owned();
        let parts = |one: &Value| ["check", "place", "owner"].map(|what| text(one, what));
        found.iter().map(parts).collect()
    }
}

impl Place {
    fn is_in(&self, places: &[[String; 3]]) -> bool {
        places.iter().any(|[check, at, owner]| {
            check == self.check && at.starts_with(self.at) && owner.contains(self.owner)
        })
    }
}

impl Class {
    /// One of the two ways to look shows nothing of it.
    fn has_blind_side(&self) -> bool {
        let memory = matches!(self.memory, Shows::Nothing(_));
        memory || matches!(self.flow, Shows::Nothing(_))
    }
}

impl Found {
    /// Notes what a look showed that ended after so long.
    fn note(&mut self, class: &Class, rules: &[Rule], places: &[[String; 3]], now: Duration) {
        if matches!(class.flow, Shows::It(rule) if rules.contains(&rule)) {
            self.flow.get_or_insert(now);
        }
        if matches!(&class.memory, Shows::It(place) if place.is_in(places)) {
            self.memory.get_or_insert(now);
        }
    }

    /// Whether all was found that the class says.
    fn is_whole(&self, class: &Class) -> bool {
        let by_flow = matches!(class.flow, Shows::It(_));
        let by_memory = matches!(class.memory, Shows::It(_));
        let flow = self.live.is_some() && self.flow.is_some();
        (!by_flow || flow) && (!by_memory || self.memory.is_some())
    }
}

/// The rules by which something was found while the trace was on, and the host's
/// time when it was told of.
fn live(session: &std::path::Path) -> Vec<(String, Duration)> {
    let session = Session::open(session).expect("a session");
    let findings = session.findings().expect("findings");
    let rule = |kind| match kind {
        FindingKind::ControlFlow(found) => found.rule,
        FindingKind::ForgedRecords { .. } => Rule::ForgedRecord.name().to_owned(),
        FindingKind::RecordingOff { .. } => Rule::RecordingOff.name().to_owned(),
        other => panic!("{other:?}"),
    };
    let found = findings.into_iter();
    found
        .map(|found| (rule(found.kind), Duration::from_nanos(found.wall_ns)))
        .collect()
}

/// A guest of each kernel. The configuration goes first, while it is still the turn of
/// this test.
struct Guests {
    judging: Judging,
    watched: Vec<Watched>,
}

impl Guests {
    fn start() -> Guests {
        let domain = |kernel: &str| Domain {
            kernel: kernel.to_owned(),
            backing: Backing::File,
            ..Domain::new(&format!("detect-{}", kernel.replace('.', "-")))
        };
        let first = TestGuest::define_alone(&domain(KERNELS[0]));
        let others = KERNELS[1..].iter();
        let mut all: Vec<TestGuest> = others.map(|kernel| first.beside(&domain(kernel))).collect();
        let judging = Judging::begin(first.lab());
        // Its turn ends with it.
        all.push(first);
        Guests {
            judging,
            watched: all.into_iter().map(Watched::start).collect(),
        }
    }
}

/// All guests at once, each by itself.
#[test]
fn each_class_is_found_as_the_table_says() {
    let guests = Guests::start();
    let found: Vec<OfKernel> = std::thread::scope(|threads| {
        let judging = &guests.judging;
        let each = guests.watched.iter();
        let each: Vec<_> = each
            .map(|guest| threads.spawn(move || guest.try_all(judging)))
            .collect();
        let each = each.into_iter().map(|thread| thread.join());
        each.map(|found| found.expect("see above")).collect()
    });
    drop(guests);
    detection_table::agrees_or_is_written(&found);
}
