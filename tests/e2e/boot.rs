//! The lab itself: guests boot, answer, reboot and go.

use std::process::Command;
use std::time::Duration;

use xftrace_lab::{Backing, Domain};

use crate::lab::TestGuest;

/// Longer than anything here takes on a busy machine.
const SOON: Duration = Duration::from_secs(30);

#[test]
fn guest_boots_and_answers() {
    let guest = TestGuest::define(&Domain {
        backing: Backing::File,
        ..Domain::new("boots")
    });
    guest.start().unwrap();

    let output = guest.run("echo one; echo tab'\t'end >&2; exit 3").unwrap();
    assert_eq!(output.text, "one\ntab\tend\n");
    assert_eq!(output.status, 3);

    let release = guest.run("uname -r").unwrap().success().unwrap();
    assert!(
        release.starts_with("6.1.") && release.contains("-xftrace-lab-"),
        "{release}"
    );

    // Two at a time, one of them fed line by line.
    let mut fed = guest.spawn("exec rwloop -w 1000").unwrap();
    let first = fed.line(SOON).unwrap().unwrap();
    assert_eq!(first, format!("pid {}", fed.pid()));
    assert_eq!(guest.run("nproc").unwrap().text, "2\n");
    fed.send_line("go").unwrap();
    let output = fed.wait(SOON).unwrap();
    assert_eq!(output.text, "opens 1000 reads 1000 closes 1000\n");

    let qemu = guest.qemu_pid().unwrap();
    let maps = std::fs::read_to_string(format!("/proc/{qemu}/maps")).unwrap();
    assert!(maps.contains("/pc.ram"), "memory is not a file:\n{maps}");

    guest.destroy().unwrap();
    assert!(!guest.is_running().unwrap());
}

#[test]
fn guest_reboots_and_shuts_down() {
    let guest = TestGuest::define(&Domain {
        machine: "q35".to_owned(),
        cpu: "max,-la57".to_owned(),
        ..Domain::new("reboots")
    });
    guest.start().unwrap();
    let qemu = guest.qemu_pid().unwrap();
    let flags = guest.run("grep -wc la57 /proc/cpuinfo").unwrap();
    assert_eq!(flags.text, "0\n", "the CPU has five-level paging");

    guest.reboot().unwrap();
    assert_eq!(guest.run("echo again").unwrap().text, "again\n");
    assert_eq!(guest.qemu_pid().unwrap(), qemu, "QEMU was started anew");

    guest.shutdown().unwrap();
    assert!(guest.run("true").is_err(), "a guest that is off answers");
}

#[test]
fn a_hung_command_is_an_error_with_its_output() {
    let guest = TestGuest::define(&Domain::new("hangs"));
    guest.start().unwrap();
    let error = guest
        .run_for("echo before; sleep 1000", Duration::from_secs(2))
        .unwrap_err();
    let text = format!("{error:#}");
    assert!(text.contains("before"), "{text}");
    assert!(text.contains("Run /init"), "no console in it: {text}");
}

/// What the tests that look for pauses rely on: a guest that is held up from
/// outside shows it.
#[test]
fn timerloop_sees_a_pause_and_none_where_there_is_none() {
    let guest = TestGuest::define_alone(&Domain::new("timer"));
    guest.start().unwrap();
    let longest = |text: &str| -> u64 {
        let line = text.lines().find_map(|line| line.strip_prefix("max "));
        line.unwrap_or_else(|| panic!("no max in:\n{text}"))
            .parse()
            .unwrap()
    };

    let quiet = guest.run("timerloop 2").unwrap().success().unwrap();
    assert!(longest(&quiet) < 200_000, "{quiet}");

    let mut job = guest.spawn("exec timerloop 2").unwrap();
    let qemu = guest.qemu_pid().unwrap().to_string();
    let held = Command::new("sh")
        .args([
            "-c",
            "sleep 0.5; kill -STOP $0; sleep 0.4; kill -CONT $0",
            &qemu,
        ])
        .status()
        .unwrap();
    assert!(held.success());
    let paused = job.wait(SOON).unwrap().success().unwrap();
    assert!(longest(&paused) >= 350_000, "{paused}");
}

#[test]
fn xftrace_runs_inside_the_lab() {
    let guest = TestGuest::define(&Domain::new("inside"));
    let here = tempfile::tempdir().unwrap();
    let assert = guest.xftrace(here.path()).arg("--version").assert();
    assert
        .success()
        .stdout(predicates::str::starts_with("xftrace "));

    // The lab's libvirt, and nobody else's.
    let mut virsh = guest.lab().command(here.path(), "virsh").unwrap();
    let output = virsh.args(["list", "--all", "--name"]).output().unwrap();
    let names = String::from_utf8(output.stdout).unwrap();
    assert!(names.lines().any(|name| name == "inside"), "{names}");
}

/// Each question costs half a second, and each domain that is defined or
/// started would ask ten times, if libvirt took its answers for outdated.
#[test]
fn libvirt_does_not_ask_qemu_again_what_it_can_do() {
    let guest = TestGuest::define(&Domain::new("asks once"));
    let answers = || {
        let ls = "ls -l --time-style=full-iso /var/cache/libvirt/qemu/capabilities";
        let mut shell = guest.lab().command("/".as_ref(), "sh").unwrap();
        let output = shell.args(["-c", ls]).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let before = answers();
    assert!(before.contains(".xml"), "no answers are kept: {before}");
    guest.start_only().unwrap();
    guest.destroy().unwrap();
    assert_eq!(answers(), before);
}
