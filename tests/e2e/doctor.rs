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

    type_on_host(&guest, typed);
    wait_for(SOON, || Ok(doctor().contains(found).then_some(()))).unwrap();
    let status = guest.command(&["status", "--json"]).assert().success();
    let all: serde_json::Value = serde_json::from_slice(&status.get_output().stdout).unwrap();
    assert!(all[0]["trace"].is_null(), "{all}");
    let sessions = guest.lab().sessions("doctored");
    assert!(!sessions.exists(), "a session was begun");
}

/// Types a command in a shell of the host that the lab is.
fn type_on_host(guest: &TestGuest, typed: &str) {
    let lab = guest.lab();
    let path = std::env::var("PATH").unwrap();
    let path = format!("{}:{path}", lab.dir().join("xftrace").display());
    let mut shell = lab.command(lab.dir(), "sh").unwrap();
    let shell = shell.args(["-c", typed]).env("PATH", path);
    let status = shell.env("LIBVIRT_DEFAULT_URI", lab.uri()).status();
    assert!(status.unwrap().success(), "{typed}");
}

/// Types what is to be typed on the host, and waits where it says so. A stock kernel
/// needs modules to see its power button, which the lab's guest does not have: it is
/// switched off inside.
fn type_all(guest: &TestGuest, lines: &[String]) {
    for line in lines {
        let (typed, note) = line.split_once("    (").unwrap_or((line, ""));
        if note.starts_with("once it is off") {
            guest.wait_until_off(SOON).unwrap();
            // As people wait for it: for a moment it is neither.
            let is_off = || Ok((guest.state()? == "shut off").then_some(()));
            wait_for(SOON, is_off).unwrap();
        }
        match typed.starts_with("virsh shutdown ") {
            true => drop(guest.spawn("poweroff -f").unwrap()),
            false => type_on_host(guest, typed),
        }
    }
}

/// A guest without the patch, which nobody booted for that yet: with what `doctor` says
/// it records, into the one ring or the other.
#[test]
fn its_commands_for_a_plain_guest_have_it_record() {
    let guest = Traced::start_with(
        TestGuest::define(&Domain {
            kernel: "stock-6.12-cloud".to_owned(),
            backing: Backing::File,
            memory: 384,
            ..Domain::new("doctored-plain")
        }),
        &["--functions", "sys_read"],
    );
    let doctor = || {
        let mut command = guest.xftrace(guest.dir());
        let output = command.args(["doctor", "doctored-plain"]).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    // What mends what is missing, once that is known.
    let mend = || {
        wait_for(SOON, || {
            let said = doctor();
            let found = said.split_once("missing  what a kernel without the patch is booted with");
            Ok(found.map(|(_, mend)| {
                let lines = mend.lines().skip(1);
                let lines = lines.map_while(|line| line.trim_start().strip_prefix("-> "));
                lines.map(str::to_owned).collect::<Vec<_>>()
            }))
        })
        .unwrap_or_else(|error| panic!("{error:#}: {}", doctor()))
    };
    let records = |into: &str| {
        let found = format!("booted with what that takes: calls of __x64_sys_read go to {into}");
        let found = wait_for(SOON, || Ok(doctor().contains(&found).then_some(())));
        found.unwrap_or_else(|error| panic!("{error:#}: {}", doctor()));
    };
    let first = mend();
    let (other, global) = first.split_last().expect("commands");
    type_all(&guest, global);
    guest.wait_until_ready().unwrap();
    records("the global ring buffer");

    let reserved = other
        .strip_prefix("(or ")
        .and_then(|line| line.split_once(", which"));
    let (enroll, _) = reserved.expect(other);
    let restart = global
        .iter()
        .filter(|line| line.starts_with("virsh"))
        .cloned();
    let all: Vec<String> = std::iter::once(enroll.to_owned()).chain(restart).collect();
    type_all(&guest, &all);
    guest.wait_until_ready().unwrap();
    let inside = mend();
    let [inside] = &inside[..] else {
        panic!("{inside:?}");
    };
    let (typed, note) = inside.split_once("    (").expect("where");
    assert!(note.starts_with("inside the guest"), "{note}");
    guest.run(typed).unwrap().success().unwrap();
    records("the ring buffer of instance 'xf', in memory reserved at boot");
}
