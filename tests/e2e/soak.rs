//! No false findings: clean guests that do varied work, boot after boot, are
//! found clean by a baseline that other boots taught and by what is in memory.
//!
//! A few short boots here, for each run of the tests. `make soak` is the long
//! form: it sets [`BOOTS`] and [`MINUTES`].

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;
use xftrace::session::{Session, FINDINGS_FILE};
use xftrace_lab::{Backing, Domain};

use crate::lab::{StoredKernel, TestGuest};
use crate::traced::Traced;

/// Boots of each kernel that are judged.
const BOOTS: &str = "XFTRACE_SOAK_BOOTS";
/// How many minutes each kernel works in these, all in all.
const MINUTES: &str = "XFTRACE_SOAK_MINUTES";

/// The longest that the guest works in one session, seconds.
const SESSION: u32 = 40;
/// Boots that a baseline takes to converge, where the guest works for a short time.
const LEARN: u32 = 6;
/// How often the helper looks at the guest's memory by itself.
const INTERVAL: &str = "1s";
/// What the guest does, see there.
const CHORES: &str = include_str!("chores.sh");
/// One round of it, under emulation, traced, beside other guests.
const ROUND: Duration = Duration::from_secs(300);
const FUNCTIONS: [&str; 8] = [
    "sys_read",
    "sys_write",
    "sys_openat",
    "sys_getdents64",
    "sys_newfstatat",
    "sys_connect",
    "sys_execve",
    "sys_finit_module",
];

/// How much is done.
struct Plan {
    /// Boots that are learnt from at most: no more once the baseline has converged, as
    /// docs/detection.md has people do it.
    learn: u32,
    /// Boots that are judged.
    judge: u32,
    /// How many sessions a boot has, for none to become too large: the functions
    /// give 20 MB a second.
    sessions: u32,
    /// For how long the guest works in each of these.
    work: Duration,
}

impl Plan {
    fn named() -> Plan {
        let number = |name: &str| {
            std::env::var(name).ok().map(|text| {
                let number = text.parse::<u32>();
                number.unwrap_or_else(|_| panic!("{name} is '{text}', which is no number"))
            })
        };
        let judge = number(BOOTS).unwrap_or(1).max(1);
        let boot = number(MINUTES).map_or(20, |minutes| 60 * minutes / judge);
        let sessions = boot.div_ceil(SESSION).max(1);
        Plan {
            learn: (judge / 2).max(LEARN),
            judge,
            sessions,
            work: Duration::from_secs(boot.div_ceil(sessions).into()),
        }
    }
}

/// A guest that is booted, traced and judged again and again.
struct Soaked {
    traced: Traced,
    baseline: String,
    keyed: bool,
    /// Whether there is a baseline by now.
    learnt: Cell<bool>,
    /// A module that hooks nothing, of the kernel's own where the guest's initramfs
    /// has none.
    module: Option<&'static str>,
    _stored: StoredKernel,
}

impl Soaked {
    fn enrol(name: &str, kernel: &str) -> Soaked {
        let guest = TestGuest::define(&Domain {
            kernel: kernel.to_owned(),
            backing: Backing::File,
            ..Domain::new(name)
        });
        let keyed = !kernel.starts_with("stock-");
        let baseline = format!("soak-{kernel}");
        let functions = FUNCTIONS.join(",");
        let mut options = vec!["--baseline", &baseline, "--functions", &functions];
        options.extend(["--integrity-interval", INTERVAL]);
        if !keyed {
            options.push("--plain");
        }
        let module = (!keyed).then_some("drivers/net/dummy");
        let stored = guest.store_kernel();
        let traced = Traced::start_with(guest, &options);
        Soaked {
            traced,
            _stored: stored,
            baseline,
            keyed,
            learnt: Cell::new(false),
            module,
        }
    }

    /// One boot's work, traced: what is to be done with each session of it, which
    /// is removed then.
    fn boot(&self, plan: &Plan, seed: u32, mut each: impl FnMut(&Path)) {
        let guest = &self.traced;
        if !guest.is_running().unwrap() {
            guest.start().unwrap();
        }
        guest.put("/bin/chores", CHORES.as_bytes());
        guest
            .run("chmod 755 /bin/chores")
            .unwrap()
            .success()
            .unwrap();
        let module = match &self.module {
            Some(file) => guest.put_module(file),
            None => "/lib/modules/calm.ko".to_owned(),
        };
        for part in 0..plan.sessions {
            let session = self.session(plan, seed * plan.sessions + part, &module);
            each(&session);
            std::fs::remove_dir_all(&session).expect("a session");
        }
        guest.destroy().unwrap();
    }

    /// Traced work, and the session of it.
    fn session(&self, plan: &Plan, seed: u32, module: &str) -> PathBuf {
        let guest = &self.traced;
        let looked = self.looks();
        guest.on(&[]);
        let seconds = plan.work.as_secs();
        let command = format!("chores {seconds} {seed} {module} 2>&1");
        let output = guest.run_for(&command, plan.work + ROUND).unwrap();
        assert!(output.text.contains("done "), "{}", output.text);
        self.memory_is_clean();
        let looks = self.looks() - looked;
        println!("{}: {looks} looks at its memory", guest.name());
        // A look may be put off, on a machine that is loaded; most are not.
        assert!(looks > plan.work.as_secs() / 4, "{looks}");
        // Its text is a gigabyte or more, and nobody reads it.
        guest.command(&["off", "--no-copy"]).assert().success();
        let session = guest.session().dir().to_owned();
        std::fs::remove_file(session.join("trace_graph.txt")).expect("a call flow");
        session
    }

    /// How many looks the helper has taken at the guest's memory in this boot.
    fn looks(&self) -> u64 {
        let status = self.traced.command(&["status", "--json"]).output();
        let status: Value =
            serde_json::from_slice(&status.expect("xftrace ran").stdout).expect("JSON");
        let looks = &status[0]["integrity"]["looks"];
        looks.as_u64().unwrap_or_else(|| panic!("{status:#}"))
    }

    fn check(&self, args: &[&str]) -> Value {
        let mut check = self.traced.xftrace(self.traced.dir());
        let output = check.args(["check", "--json"]).args(args).output();
        let output = output.expect("xftrace ran");
        let said = String::from_utf8_lossy(&output.stderr);
        let verdict = serde_json::from_slice(&output.stdout);
        verdict.unwrap_or_else(|error| panic!("{error}: {said}"))
    }

    /// Nothing is found in the memory of the guest: not now, and not in all the
    /// looks that the helper took while the guest worked.
    fn memory_is_clean(&self) {
        let verdict = self.check(&["-d", self.traced.name()]);
        let memory = &verdict["memory"];
        assert_eq!(memory["conclusion"], "clean", "{memory:#}");
        let found = self.traced.lab().sessions(self.traced.name());
        let found = std::fs::read_to_string(found.join(FINDINGS_FILE));
        assert_eq!(found.unwrap_or_default(), "", "while it worked");
        // That is told also where the domain's baseline is yet to be learnt.
        if !self.learnt.get() {
            let flow = &verdict["flow"];
            assert_eq!(flow["conclusion"], "could-not-tell", "{flow:#}");
            let doubts = flow["doubts"].to_string();
            assert!(doubts.contains("baseline learn soak-"), "{doubts}");
        }
    }

    /// Nothing is found in a session, neither now nor while it was traced. Gives
    /// the number of its calls.
    fn is_clean(&self, session: &Path) -> u64 {
        let path = session.to_str().expect("a path");
        let verdict = self.check(&[path, "--baseline", &self.baseline]);
        let flow = &verdict["flow"];
        let findings = flow["findings"].as_array().expect("findings");
        let counted: Vec<&Value> = findings
            .iter()
            .filter(|one| one["severity"] != "notice")
            .collect();
        assert!(counted.is_empty(), "{counted:#?}");
        // That plain records are clean is never said.
        let conclusion = if self.keyed {
            "clean"
        } else {
            "could-not-tell"
        };
        assert_eq!(flow["conclusion"], conclusion, "{flow:#}");
        // All rules had their say.
        let not_judged = flow["not_judged"].as_array().expect("rules");
        assert!(not_judged.is_empty() || !self.keyed, "{not_judged:?}");
        let live = Session::open(session).expect("a session").findings();
        assert_eq!(live.expect("findings"), [], "while it was traced");
        flow["calls"].as_u64().expect("calls")
    }
}

fn stays_clean(name: &str, kernel: &str) {
    let plan = Plan::named();
    let soaked = Soaked::enrol(name, kernel);
    let converged = Cell::new(false);
    for boot in 0..plan.learn {
        if converged.get() {
            break;
        }
        soaked.boot(&plan, boot, |session| {
            let mut learn = soaked.traced.xftrace(soaked.traced.dir());
            learn
                .args(["baseline", "learn", &soaked.baseline])
                .arg(session);
            let learn = learn.assert().success();
            let said = String::from_utf8_lossy(&learn.get_output().stdout);
            println!("{said}");
            converged.set(said.contains("; converged: "));
            soaked.learnt.set(true);
        });
    }
    let started = Instant::now();
    let mut calls = 0;
    for boot in 0..plan.judge {
        soaked.boot(&plan, 1000 + boot, |session| {
            calls += soaked.is_clean(session)
        });
        println!(
            "{kernel}: boot {} of {}: clean; {calls} calls so far, {:?}",
            boot + 1,
            plan.judge,
            started.elapsed()
        );
    }
    assert!(calls > 10_000, "{calls}");
}

#[test]
fn a_clean_guest_stays_clean_on_linux_6_1() {
    stays_clean("soak61", "6.1");
}

#[test]
fn a_clean_guest_stays_clean_on_linux_6_12() {
    stays_clean("soak612", "6.12");
}

#[test]
fn a_clean_guest_stays_clean_on_stock_linux_6_12() {
    stays_clean("soak612stock", "stock-6.12-cloud");
}
