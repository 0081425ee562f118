//! The helper looks at the guest's memory by itself, at an interval: what it finds is
//! told in all the places where findings are told, once, and told to be gone when it
//! is; and the guest is none the slower.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use serde_json::Value;
use xftrace::kernel::{find_all, Symbols};
use xftrace::ram::{Access, Gpa, GuestRam as _};
use xftrace::session::FINDINGS_FILE;
use xftrace_lab::{wait_for, Backing, Domain};

use crate::keys::memory_for;
use crate::lab::{StoredKernel, TestGuest, CONFIG};
use crate::traced::Traced;

const SOON: Duration = Duration::from_secs(90);
const INTERVAL: &str = "2s";
/// What a look at a guest of 1 GiB may take of the host's processors.
const COST: f64 = 1.0;
/// What a guest has to get done while it is looked at every second, by what it does
/// without. Of a guest with a hook a look lasts more than a fifth of a second: one that
/// held the guest up would take that from it.
const PACE: f64 = 0.85;
/// Looks at the clean guest, for what they take.
const LOOKS: usize = 5;
/// Pairs of windows, one with looks and one without.
const PAIRS: usize = 7;
const WINDOW: Duration = Duration::from_secs(4);

/// A guest that is enrolled, and whose kernel the store does not have.
struct Watched {
    traced: Traced,
    dir: tempfile::TempDir,
    /// Its kernel in the store, once it is there.
    stored: Option<StoredKernel>,
}

impl Watched {
    fn start(domain: &Domain, interval: &str) -> Watched {
        let guest = TestGuest::define_alone(domain);
        let dir = tempfile::tempdir().expect("a directory");
        let own = format!(
            "{CONFIG}on_finding = [\"/bin/sh\", \"-c\", \"cat >> $0; echo >> $0\", {:?}]\n",
            dir.path().join("told")
        );
        let own = own.replace("auto_enroll", "integrity_interval = \"off\"\nauto_enroll");
        guest.lab().write_config(&own).expect("a configuration");
        let traced = Traced::start_with(guest, &["--integrity-interval", interval]);
        Watched {
            traced,
            dir,
            stored: None,
        }
    }

    /// Gives the store the kernel that the guest boots.
    fn add_kernel(&mut self) {
        self.stored = Some(self.traced.store_kernel());
    }

    fn remove_kernel(&mut self) {
        self.stored = None;
    }

    /// `xftrace status`, as text and as JSON.
    fn status(&self) -> (String, Value) {
        let shown = |args: &[&str]| {
            let output = self.traced.command(args).output().expect("xftrace ran");
            String::from_utf8(output.stdout).expect("text")
        };
        let all: Value = serde_json::from_str(&shown(&["status", "--json"])).expect("JSON");
        (shown(&["status"]), all[0].clone())
    }

    /// What `status` says of the looks, once it is as it should be.
    fn until(&self, what: &str, is_so: impl Fn(&Value) -> bool) -> Value {
        let status = wait_for(SOON, || {
            let now = self.status().1["integrity"].take();
            Ok(is_so(&now).then_some(now))
        });
        status.unwrap_or_else(|error| panic!("{what}: {error:#}: {:#}", self.status().1))
    }

    /// Waits for so many looks more.
    fn looks(&self, more: u64) -> Value {
        let now = |status: &Value| status["looks"].as_u64().expect("a count");
        let from = now(&self.status().1["integrity"]);
        self.until("looks", |status| now(status) >= from + more)
    }

    fn findings_path(&self) -> PathBuf {
        let sessions = self.traced.lab().sessions(self.traced.name());
        sessions.join(FINDINGS_FILE)
    }

    /// What is in the domain's file of findings.
    fn findings(&self) -> Vec<Value> {
        lines(&self.findings_path())
    }

    /// What the command for findings was given.
    fn told(&self) -> Vec<Value> {
        lines(&self.dir.path().join("told"))
    }

    /// The findings that the log was told of.
    fn logged(&self) -> Vec<Value> {
        let begin = format!("domain {}: {{", self.traced.name());
        let log = self.traced.log();
        let told = log.lines().filter_map(|line| {
            let at = line.find(&begin)? + begin.len() - 1;
            serde_json::from_str(line.get(at..)?).ok()
        });
        told.collect()
    }

    /// How many times its helper, which the log names by its process, said so.
    fn logs(&self, words: &str) -> usize {
        let status = self.status().1;
        let helper = format!("xftrace[{}]", status["helper_pid"]);
        let log = self.traced.log();
        let lines = log.lines().filter(|line| line.contains(&helper));
        lines.filter(|line| line.contains(words)).count()
    }

    /// The helper's process, as seen from here.
    fn helper(&self) -> Pid {
        let inside = self.status().1["helper_pid"].as_u64().expect("a process");
        let outside = self.traced.lab().outer_pid(inside as u32).unwrap();
        Pid::from_raw(outside as i32)
    }
}

impl Drop for Watched {
    /// The configuration as it was, for the tests after this one.
    fn drop(&mut self) {
        let _ = self.traced.lab().write_config(CONFIG);
        if std::thread::panicking() {
            eprintln!("--- log:\n{}---", self.traced.log());
        }
    }
}

fn lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let lines = text.lines().filter(|line| !line.is_empty());
    lines
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect()
}

/// Of findings: which, and where.
fn brief(findings: &[Value]) -> Vec<(&str, &str)> {
    let pairs = findings.iter().map(|one| [&one["finding"], &one["place"]]);
    pairs
        .map(|pair| pair.map(|value| value.as_str().unwrap_or_default()))
        .map(|[finding, place]| (finding, place))
        .collect()
}

#[test]
fn the_helper_finds_a_hook_by_itself_and_says_when_it_has_gone() {
    const HOOK: (&str, &str) = ("integrity", "sys_call_table[217]");
    const GONE: (&str, &str) = ("integrity-gone", "sys_call_table[217]");
    let mut watched = Watched::start(
        &Domain {
            backing: Backing::File,
            ..Domain::new("watching")
        },
        INTERVAL,
    );
    let name = watched.traced.name().to_owned();
    let run =
        |watched: &Watched, command: &str| watched.traced.run(command).unwrap().success().unwrap();

    // It says why it does not look, once, and looks as soon as it can.
    let why = |status: &Value| status["cannot"].as_str().unwrap_or_default().to_owned();
    watched.until("a reason", |status| why(status).contains("symbols add"));
    let (text, _) = watched.status();
    assert!(
        text.contains("  checked  every 2s; no look yet\n"),
        "{text}"
    );
    assert!(
        text.contains("not now: the kernel that the guest boots"),
        "{text}"
    );
    std::thread::sleep(Duration::from_secs(5));
    assert_eq!(
        watched.logs("not checked: the kernel that the guest boots"),
        1
    );
    watched.add_kernel();
    watched.until("a look", |status| status["looks"] != 0);

    // A clean guest is clean, traced or not.
    let clean = watched.looks(3);
    let is_clean = |status: &Value| {
        assert_eq!(status["cannot"], Value::Null, "{status:#}");
        assert_eq!(
            status["last"]["findings"],
            Value::Array(Vec::new()),
            "{status:#}"
        );
        assert_eq!(
            status["last"]["doubts"],
            Value::Array(Vec::new()),
            "{status:#}"
        );
    };
    is_clean(&clean);
    watched.traced.on(&["sys_getdents64"]);
    is_clean(&watched.looks(3));
    watched.traced.off();
    assert!(watched.status().0.contains("of processor time: clean\n"));
    assert_eq!(
        (watched.findings(), watched.told(), watched.logged()),
        Default::default()
    );

    // A hook is found, and told of once.
    run(&watched, "insmod /lib/modules/hook_syscall_table.ko");
    watched.until("a finding", |status| {
        status["last"]["findings"] != Value::Array(Vec::new())
    });
    let found = watched.looks(3);
    assert_eq!(found["last"]["findings"][0]["check"], "read-only-data");
    for told in [watched.findings(), watched.told(), watched.logged()] {
        assert_eq!(brief(&told), [HOOK], "{told:#?}");
        let owner = told[0]["owner"].as_str().expect("an owner");
        assert!(owner.contains("hook_syscall_table"), "{owner}");
        assert_eq!(
            (&told[0]["check"], &told[0]["count"]),
            (&"read-only-data".into(), &1.into())
        );
    }
    let told = &watched.told()[0];
    assert_eq!(
        (&told["domain"], &told["session"]),
        (&name.clone().into(), &Value::Null)
    );
    let (text, _) = watched.status();
    assert!(text.contains(": findings: 1\n"), "{text}");
    assert!(
        text.contains("read-only-data: sys_call_table[217]: the module hook_syscall_table"),
        "{text}"
    );

    // A guest that stands still is not looked at, and nothing is lost of what is known.
    watched.traced.lab().virsh(&["suspend", &name]).unwrap();
    watched.until("a pause", |status| why(status).contains("stands still"));
    watched.traced.lab().virsh(&["resume", &name]).unwrap();
    watched.looks(1);
    assert_eq!(brief(&watched.findings()), [HOOK]);

    // It goes, and that is told too.
    run(&watched, "rmmod hook_syscall_table");
    watched.until("clean", |status| {
        status["last"]["findings"] == Value::Array(Vec::new())
    });
    is_clean(&watched.looks(2));
    for told in [watched.findings(), watched.told(), watched.logged()] {
        assert_eq!(brief(&told), [HOOK, GONE], "{told:#?}");
    }

    // With a reboot, whatever there was has gone; and a kernel that starts is no finding.
    run(&watched, "insmod /lib/modules/hook_syscall_table.ko");
    watched.until("a finding", |status| {
        status["last"]["findings"] != Value::Array(Vec::new())
    });
    watched.traced.reboot().unwrap();
    wait_for(SOON, || Ok((watched.findings().len() == 4).then_some(()))).unwrap();
    watched.until("a look", |status| status["last"] != Value::Null);
    is_clean(&watched.looks(3));
    assert_eq!(brief(&watched.findings()), [HOOK, GONE, HOOK, GONE]);

    // The session is of the boot before, and says nothing of this one.
    let check = |watched: &Watched| {
        let output = watched.traced.command(&["check", "--json"]).output();
        let output = output.expect("xftrace ran");
        let said: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        assert_eq!(output.status.code(), Some(2), "{said:#}");
        assert_eq!(said["conclusion"], "could-not-tell", "{said:#}");
        said
    };
    let stale = check(&watched);
    assert_eq!(stale["memory"]["conclusion"], "clean", "{stale:#}");
    let doubts = stale["flow"]["doubts"].to_string();
    assert!(doubts.contains("an earlier boot of the guest"), "{stale:#}");
    // Nor does it, where memory cannot be looked at.
    watched.remove_kernel();
    let unseen = check(&watched);
    assert_eq!(unseen["memory"], Value::Null);
    let doubts = unseen["doubts"].to_string();
    assert!(doubts.contains("xftrace symbols add"), "{unseen:#}");

    // The looks do not keep the helper from ending.
    let helper = watched.helper();
    watched.traced.destroy().unwrap();
    let begun = Instant::now();
    wait_for(SOON, || Ok(kill(helper, None).is_err().then_some(()))).unwrap();
    println!("the helper ended {:?} after its domain", begun.elapsed());
    assert!(
        begun.elapsed() < Duration::from_secs(5),
        "{:?}",
        begun.elapsed()
    );
}

/// Where `struct xftrace_control` has the boot id (include/linux/xftrace.h).
const BOOT_ID: u64 = 0x10;
/// Longer than libvirt may take to note a reset.
const A_WHILE: Duration = Duration::from_secs(7);

#[test]
fn a_boot_that_the_guest_only_claims_is_told_and_lets_nothing_go() {
    let told = [
        ("integrity", "sys_call_table[217]"),
        ("boot-without-reset", ""),
    ];
    let mut watched = Watched::start(
        &Domain {
            backing: Backing::File,
            ..Domain::new("claims")
        },
        INTERVAL,
    );
    watched.add_kernel();
    watched.until("a look", |status| status["looks"] != 0);
    let hook = "insmod /lib/modules/hook_syscall_table.ko";
    watched.traced.run(hook).unwrap().success().unwrap();
    watched.until("a finding", |status| {
        status["last"]["findings"][0].is_object()
    });
    std::thread::sleep(A_WHILE);
    assert_eq!(brief(&watched.findings()), told[..1]);

    // As somebody in the guest would do it.
    let ram = memory_for(&watched.traced, Access::ReadWrite);
    let artifacts = watched.traced.lab().artifacts(watched.traced.kernel());
    let symbols = Symbols::load(&artifacts.unwrap().system_map).expect("symbols");
    let kernel = find_all(&ram, &symbols).expect("a kernel").remove(0);
    let control = symbols.address("xftrace_control").expect("its place");
    let boot_id = Gpa(kernel.image_gpa(control).0 + BOOT_ID);
    let was = ram.read_u64(boot_id).expect("a boot id");
    ram.write_u64(boot_id, was ^ 1).expect("written");
    wait_for(SOON, || Ok((watched.findings().len() > 1).then_some(()))).unwrap();
    let last = watched.looks(2)["last"].take();
    assert_eq!(last["findings"][0]["place"], told[0].1, "{last:#}");
    for all in [watched.findings(), watched.told(), watched.logged()] {
        assert_eq!(brief(&all), told, "{all:#?}");
    }
}

/// What a process does between two looks at it: how much of it is done each second.
fn pace(watched: &Watched) -> f64 {
    let done = || {
        let count = watched
            .traced
            .run("wc -c < /tmp/done")
            .unwrap()
            .success()
            .unwrap();
        count.trim().parse::<f64>().expect("a number")
    };
    let (from, begun) = (done(), Instant::now());
    std::thread::sleep(WINDOW);
    (done() - from) / begun.elapsed().as_secs_f64()
}

#[test]
fn looks_cost_little_and_do_not_slow_the_guest() {
    let mut watched = Watched::start(
        &Domain {
            backing: Backing::File,
            memory: 1024,
            ..Domain::new("pace")
        },
        "1s",
    );
    watched.add_kernel();
    watched.until("a look", |status| status["looks"] != 0);
    let cost = |watched: &Watched, findings: usize| {
        let last = watched.looks(1)["last"].take();
        assert_eq!(last["findings"].as_array().map(Vec::len), Some(findings));
        last["cpu_ns"].as_f64().expect("a time") / 1e9
    };
    let mut costs: Vec<f64> = (0..LOOKS).map(|_| cost(&watched, 0)).collect();
    let run = |command: &str| watched.traced.run(command).unwrap().success().unwrap();
    run("insmod /lib/modules/hook_seq.ko");
    watched.until("a finding", |status| {
        status["last"]["findings"][0].is_object()
    });
    // Work that is counted: so many openings, and a byte.
    let work = "while :; do rwloop 500 >/dev/null; printf x >>/tmp/done; done";
    let work = watched.traced.spawn(work).unwrap();
    run("until [ -s /tmp/done ]; do sleep 0.1; done");
    let helper = watched.helper();
    let lowest = std::fs::read_dir(format!("/proc/{helper}/task"))
        .expect("threads")
        .flatten();
    let lowest = lowest.filter_map(|task| {
        let stat = std::fs::read_to_string(task.path().join("stat")).ok()?;
        let (name, rest) = stat.split_once(") ")?;
        // Field 19 of proc(5)'s stat, of which the third comes first here.
        let nice = rest.split(' ').nth(16)?.to_owned();
        Some((name.split_once('(')?.1.to_owned(), nice))
    });
    let nice: Vec<(String, String)> = lowest.collect();
    for (thread, nice) in &nice {
        assert_eq!(nice == "19", thread == "patrol", "{thread}: {nice}");
    }
    assert!(
        nice.iter().any(|(thread, _)| thread == "patrol"),
        "{nice:?}"
    );

    let mut ratios = Vec::new();
    for pair in 0..PAIRS {
        let looks = |watched: &Watched| watched.status().1["integrity"]["looks"].as_u64();
        let with = |watched: &Watched| {
            let before = looks(watched);
            let pace = pace(watched);
            assert!(looks(watched) > before, "there was no look");
            pace
        };
        // A helper that stands still looks at nothing.
        let without = |watched: &Watched| {
            kill(helper, Signal::SIGSTOP).expect("stopped");
            let pace = pace(watched);
            kill(helper, Signal::SIGCONT).expect("goes on");
            pace
        };
        let (with, without) = if pair % 2 == 0 {
            let with = with(&watched);
            (with, without(&watched))
        } else {
            let without = without(&watched);
            (with(&watched), without)
        };
        let cost = cost(&watched, 1);
        println!("with {with:.1}, without {without:.1} a second; a look took {cost:.3} s");
        ratios.push(with / without);
    }
    work.kill(9).unwrap();
    ratios.sort_by(f64::total_cmp);
    costs.sort_by(f64::total_cmp);
    let (pace, cost) = (ratios[PAIRS / 2], costs[LOOKS / 2]);
    println!(
        "with looks, the guest does {pace:.3} of what it does without; a look at the clean guest \
         takes {cost:.3} s of processor time"
    );
    assert!(pace > PACE, "{ratios:?}");
    assert!(cost < COST, "{costs:?}");
}
