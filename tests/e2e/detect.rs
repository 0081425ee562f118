//! Detection on a real guest: what a clean guest does is learnt, a clean guest
//! is clean, and each benign hook in tests/lab/modules/ is found by the call
//! flow.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;
use xftrace::detect::{Conclusion, Rule, Severity, Verdict};
use xftrace::session::{list, FindingKind, Session};
use xftrace_lab::{Backing, Domain};

use crate::lab::{TestGuest, CONFIG};
use crate::traced::Traced;

/// Under emulation, on a machine that may be busy.
const WORK_TIME: Duration = Duration::from_secs(120);

/// Modules that hook the kernel's control flow, and a rule that must find each.
const HOOKS: [(&str, Rule); 5] = [
    ("hook_procroot", Rule::UnknownModule),
    ("hook_ftrace", Rule::NestedInItself),
    ("hook_dispatch", Rule::WrongCaller),
    ("hook_kretprobe", Rule::UnknownModule),
    ("hook_kprobe", Rule::UnknownModule),
];

/// A guest that is judged by the baseline `clean`, also while it is traced.
struct Watched {
    traced: Traced,
    told: tempfile::TempDir,
}

impl Watched {
    fn start(name: &str) -> Watched {
        let guest = TestGuest::define_alone(&Domain {
            backing: Backing::File,
            ..Domain::new(name)
        });
        let told = tempfile::tempdir().expect("a directory");
        let own = format!(
            "paths.baselines = {:?}\n\
             on_finding = [\"/bin/sh\", \"-c\", \"cat >> $0; echo >> $0\", {:?}]\n",
            told.path().join("baselines"),
            told.path().join("told")
        );
        guest.lab().write_config(&own).expect("a configuration");
        let traced = Traced::start_with(guest, &["--baseline", "clean"]);
        Watched { traced, told }
    }

    fn xftrace(&self, args: &[&str]) -> assert_cmd::Command {
        let mut command = self.traced.xftrace(self.traced.dir());
        command.args(args);
        command
    }

    fn told_path(&self) -> PathBuf {
        self.told.path().join("told")
    }

    /// What the command for findings was told since the last time: the rules.
    fn told(&self) -> Vec<String> {
        let path = self.told_path();
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        let _ = std::fs::remove_file(&path);
        let lines = text.lines().filter(|line| !line.is_empty());
        lines
            .map(|line| {
                let told: serde_json::Value = serde_json::from_str(line).expect("JSON");
                assert_eq!(told["domain"], self.traced.name());
                assert_eq!(told["finding"], "control-flow", "{told}");
                told["rule"].as_str().expect("a rule").to_owned()
            })
            .collect()
    }

    /// Traces while the guest works, and gives the session.
    fn session(&self) -> PathBuf {
        let on = ["on", "sys_getdents64", "sys_openat", "sys_read"];
        self.traced.command(&on).assert().success();
        let script = "work & listproc 300; kill $!; wait";
        let output = self.traced.run_for(script, WORK_TIME).unwrap();
        assert!(output.text.contains("listed 300"), "{}", output.text);
        self.traced
            .command(&["off", "--no-copy"])
            .assert()
            .success();
        list(&self.traced.lab().sessions(self.traced.name()))
            .into_iter()
            .next()
            .expect("a session")
    }

    /// What the newest session is judged by the domain's own baseline.
    fn check(&self) -> (i32, Verdict) {
        let output = self
            .traced
            .command(&["check", "--json"])
            .output()
            .expect("xftrace ran");
        let text = String::from_utf8(output.stdout).expect("text");
        let all = serde_json::from_str(&text).map(|mut all: Value| all["flow"].take());
        let verdict = all
            .and_then(serde_json::from_value)
            .unwrap_or_else(|error| {
                let said = String::from_utf8_lossy(&output.stderr);
                panic!("{error}: {text}{said}")
            });
        (output.status.code().expect("a status"), verdict)
    }
}

impl Drop for Watched {
    /// The lab's own configuration again, for the tests after this one.
    fn drop(&mut self) {
        self.traced
            .lab()
            .write_config(CONFIG)
            .expect("a configuration");
    }
}

/// The rules by which something was found while the trace was on.
fn live(session: &Path) -> Vec<String> {
    let session = Session::open(session).expect("a session");
    let findings = session.findings().expect("findings");
    let rules = findings.into_iter().map(|finding| match finding.kind {
        FindingKind::ControlFlow(found) => found.rule,
        other => panic!("{other:?}"),
    });
    rules.collect()
}

#[test]
fn a_clean_guest_is_clean_and_each_hook_is_found() {
    let watched = Watched::start("hooks");
    let (first, second) = (watched.session(), watched.session());
    watched
        .xftrace(&["baseline", "learn", "clean"])
        .args([&first, &second])
        .assert()
        .success();

    let session = watched.session();
    let (status, verdict) = watched.check();
    assert_eq!(
        (status, verdict.conclusion),
        (0, Conclusion::Clean),
        "{verdict:#?}"
    );
    assert!(verdict.calls > 10_000, "{verdict:#?}");
    assert_eq!(live(&session), Vec::<String>::new(), "of a clean guest");
    assert_eq!(watched.told(), Vec::<String>::new(), "of a clean guest");

    for (number, (module, rule)) in HOOKS.into_iter().enumerate() {
        let run = |command: &str| watched.traced.run(command).unwrap().success().unwrap();
        run(&format!("insmod /lib/modules/{module}.ko"));
        let session = watched.session();
        let found_live = live(&session);
        let unknown = |found: &[String]| found.iter().any(|rule| rule == "unknown-module");
        assert!(unknown(&found_live), "{module}: {found_live:?}");
        if number == 0 {
            // Of the first only: the command is run so often a minute.
            std::thread::sleep(Duration::from_secs(1));
            let told = watched.told();
            assert!(unknown(&told), "{module}: {told:?}");
        }
        run(&format!("rmmod {module}"));
        let (status, verdict) = watched.check();
        let found = verdict
            .findings
            .iter()
            .filter(|finding| finding.severity > Severity::Notice);
        let rules: Vec<Rule> = found.map(|finding| finding.rule).collect();
        println!("{module}: {rules:?}; live: {found_live:?}");
        // It is on the guest's list.
        let of_list = found_live.iter().filter(|rule| *rule == "unlisted-module");
        if module == "hook_procroot" {
            assert!(!rules.contains(&Rule::UnlistedModule), "{verdict:#?}");
            assert_eq!(of_list.count(), 0, "{found_live:?}");
        }
        assert!(rules.contains(&rule), "{module}: {verdict:#?}");
        assert_eq!(
            (status, verdict.conclusion),
            (1, Conclusion::Findings),
            "{module}"
        );
    }

    // One that takes itself off the guest's list of modules is found as such,
    // though it does what others on the list were found for.
    let run = |command: &str| watched.traced.run(command).unwrap().success().unwrap();
    run("insmod /lib/modules/hook_procroot.ko hide=1");
    let listed = watched.traced.run("lsmod").unwrap().text;
    assert!(!listed.contains("hook_procroot"), "{listed}");
    let session = watched.session();
    let found_live = live(&session);
    run("echo 0 > /sys/module/hook_procroot/parameters/hide");
    run("rmmod hook_procroot");
    let (status, verdict) = watched.check();
    let rules: Vec<Rule> = verdict.findings.iter().map(|found| found.rule).collect();
    println!("hidden: {rules:?}; live: {found_live:?}");
    assert_eq!(status, 1, "{verdict:#?}");
    assert!(rules.contains(&Rule::UnlistedModule), "{verdict:#?}");
    assert!(!rules.contains(&Rule::UnknownModule), "{verdict:#?}");
    assert!(
        found_live.iter().any(|rule| rule == "unlisted-module"),
        "{found_live:?}"
    );

    // With the hooks gone, so are the findings.
    watched.session();
    let (status, verdict) = watched.check();
    assert_eq!(
        (status, verdict.conclusion),
        (0, Conclusion::Clean),
        "{verdict:#?}"
    );
}
