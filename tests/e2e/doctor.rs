//! What `xftrace doctor` says to type, typed.

use std::time::Duration;

use xftrace_lab::{wait_for, Backing, Domain};

use crate::lab::TestGuest;
use crate::pause::kill_helper;
use crate::traced::Traced;

const SOON: Duration = Duration::from_secs(30);

/// A helper looks after the domain again, and no trace has begun by that.
#[test]
fn its_command_for_a_missing_helper_starts_one_and_no_trace() {
    let guest = Traced::start(TestGuest::define(&Domain {
        backing: Backing::File,
        ..Domain::new("doctored")
    }));
    let doctor = || {
        let mut command = guest.xftrace(guest.dir());
        let output = command.args(["doctor", "doctored"]).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let found = "ok       its kernel has xftrace's patch";
    wait_for(SOON, || Ok(doctor().contains(found).then_some(()))).unwrap();
    kill_helper(&guest);
    let said = doctor();
    let (_, mend) = said.split_once("missing  its helper\n").expect(&said);
    let mend = mend.lines().next().and_then(|line| line.split_once("-> "));
    let (typed, _) = mend
        .and_then(|(_, mend)| mend.split_once("    ("))
        .expect(&said);

    let lab = guest.lab();
    let path = std::env::var("PATH").unwrap();
    let path = format!("{}:{path}", lab.dir().join("xftrace").display());
    let mut shell = lab.command(guest.dir(), "sh").unwrap();
    let status = shell
        .args(["-c", typed])
        .env("PATH", path)
        .status()
        .unwrap();
    assert!(status.success(), "{typed}");
    wait_for(SOON, || Ok(doctor().contains(found).then_some(()))).unwrap();
    let status = guest.command(&["status", "--json"]).assert().success();
    let all: serde_json::Value = serde_json::from_slice(&status.get_output().stdout).unwrap();
    assert!(all[0]["trace"].is_null(), "{all}");
    assert!(!lab.sessions("doctored").exists(), "a session was begun");
}
