//! Kernels without the patch, mode plain: what the host reads is what the
//! guest itself shows.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use xftrace::kernel::stock::command_line;
use xftrace::kernel::Symbols;
use xftrace::session::{list, Mode, Session};
use xftrace::symfiles::Known;
use xftrace_lab::{wait_for, Ring, Row};

use crate::integrity::memory_is_clean;
use crate::lab::TestGuest;
use crate::watch::Watch;

/// How many times the guest opens, reads and closes.
const LOOPS: u64 = 600;
/// So many function calls at least are to be compared.
const CALLS: usize = 50_000;
/// What a guest may take to write its trace out, on a busy machine.
const LISTING: Duration = Duration::from_secs(400);
const FUNCTIONS: [&str; 2] = ["__x64_sys_read", "__x64_sys_openat"];
const TRACING: &str = "/sys/kernel/tracing";

/// A line of a call flow: how deep it is, and what it says (`f() {`, `f();`
/// or `} f`).
type Line = (usize, String);

/// How a row is enrolled, and where its ring is in the guest's tracefs.
fn ring(row: &Row) -> (&str, String) {
    match row.ring {
        Ring::Global => ("--plain", TRACING.to_owned()),
        Ring::BootMapped => ("--plain=reserved", format!("{TRACING}/instances/xf")),
    }
}

/// What `enroll` has people type inside the guest after each boot.
fn to_type(enrolled: &str) -> Option<&str> {
    let (_, after) = enrolled.split_once("type inside the guest, as root:\n")?;
    after.lines().next()
}

/// Traces the guest of a row, and compares the trace with its own.
pub(crate) fn same_lines(row: &Row) {
    let (plain, tracing) = ring(row);
    let guest = TestGuest::define_alone(&row.domain(""));
    let name = row.name.as_str();
    let dir = tempfile::tempdir().expect("a directory");
    // That its symbols are those of the kernel that runs, `symbols` shows.
    let symbols = guest.lab().artifacts(&row.kernel).unwrap().bzimage;
    let xftrace = |arguments: &[&str]| {
        let mut command = guest.xftrace(dir.path());
        command.args(arguments);
        command
    };
    let defined = guest.lab().virsh(&["dumpxml", "--inactive", name]).unwrap();
    let enrolled = xftrace(&["enroll", name, "--functions", "sys_read,sys_openat", plain])
        .arg("--symbols")
        .arg(&symbols)
        .assert()
        .success();
    let enrolled = String::from_utf8_lossy(&enrolled.get_output().stdout).into_owned();
    guest.start().unwrap();
    let watch = Watch::start(&guest);
    assert_eq!(to_type(&enrolled).is_some(), row.ring == Ring::BootMapped);
    if let Some(set_tracer) = to_type(&enrolled) {
        guest.run(set_tracer).unwrap().success().unwrap();
    }

    // What was recorded since the boot is no part of it. Of what the guest
    // shows, times are most and are not compared, and it writes slowly.
    let options = "echo 0 >options/funcgraph-duration; echo 1 >options/funcgraph-tail";
    let quiet = format!(
        "cd {tracing}; echo 0 >tracing_on; echo >trace; {options}; cd {TRACING}; {options}; true"
    );
    guest.run(&quiet).unwrap().success().unwrap();
    let mut status = String::new();
    let found = wait_for(Duration::from_secs(120), || {
        let output = xftrace(&["status", "-d", name]).output()?;
        status = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        // It is brought up to date a few times a second.
        let ready = status.contains("mode     plain") && !status.contains("cannot be traced");
        Ok(ready.then_some(()))
    });
    found.unwrap_or_else(|error| panic!("{error:#}: {status}"));
    assert!(status.contains("not keyed"), "{status}");

    let doctor = xftrace(&["doctor", name])
        .output()
        .expect("what is missing");
    let doctor = String::from_utf8_lossy(&doctor.stdout).into_owned();
    let traced = match row.ring {
        Ring::Global => "the global ring buffer (",
        Ring::BootMapped => "the ring buffer of instance 'xf', in memory reserved at boot (",
    };
    let traced = format!(
        "booted with what that takes: calls of {}, {} go to {traced}",
        FUNCTIONS[1], FUNCTIONS[0]
    );
    assert!(doctor.contains(&traced), "{doctor}");

    // What plain mode cannot do, it refuses with what to do instead.
    let other = xftrace(&["on", "-d", name, "sys_write"]).assert().failure();
    let said = String::from_utf8_lossy(&other.get_output().stderr).into_owned();
    let wanted = command_line(&["__x64_sys_write"]);
    assert!(said.contains(&wanted), "{said}");
    xftrace(&["on", "-d", name, "--buffer-size", "32M"])
        .assert()
        .failure()
        .stderr(predicates::str::contains("trace_buf_size="));

    xftrace(&["on", "-d", name])
        .assert()
        .success()
        .stderr(predicates::str::contains("plain (not keyed"));
    let run = guest.run_for(&format!("rwloop {LOOPS}"), LISTING);
    run.unwrap().success().unwrap();
    memory_is_clean(&guest, &symbols);
    xftrace(&["off", "-d", name]).assert().success();
    watch.saw_nothing();
    let switch = guest.run(&format!("cat {tracing}/tracing_on")).unwrap();
    assert_eq!(switch.text, "0\n", "the guest's own switch");

    let sessions = list(&guest.lab().sessions(name));
    let session = Session::open(&sessions[0]).expect("a session");
    let counters = session.meta.counters;
    let theirs = session.meta.guest_counts.clone().expect("their counts");
    assert_eq!(session.meta.mode, Mode::Plain);
    assert_eq!((counters.forged, counters.lost_places), (0, 0));
    assert_eq!(counters.records + counters.other, theirs.written);
    assert_eq!((theirs.overwritten, theirs.dropped), (0, 0));

    let graph = std::fs::read_to_string(dir.path().join("trace_graph.txt")).expect("a call flow");
    assert!(
        graph.contains("# mode:       plain (not keyed"),
        "{graph:.2000}"
    );
    let theirs = unpacked(&guest, &format!("gzip -c {tracing}/trace | base64"));
    let theirs = String::from_utf8(theirs).expect("text");
    let names = Known::load(&symbols).expect("symbols").symbols;
    compare(
        &flow(&graph, (3, '|', 2)),
        &flow(&theirs, (1, ')', 1)),
        &names,
    );

    xftrace(&["unenroll", name]).assert().success();
    let after = guest.lab().virsh(&["dumpxml", "--inactive", name]).unwrap();
    assert_eq!(after, defined, "nothing of it is left");
}

/// Both flows, CPU by CPU and line by line.
fn compare(ours: &BTreeMap<u32, Vec<Line>>, theirs: &BTreeMap<u32, Vec<Line>>, names: &Symbols) {
    // Of several names for one address, each may have chosen another.
    let address = |line: &str| {
        let name = line.trim_start_matches("} ").split('(').next();
        name.and_then(|name| names.address(name))
    };
    let same = |ours: &Line, theirs: &Line| {
        let both = (address(&ours.1), address(&theirs.1));
        ours == theirs || (ours.0 == theirs.0 && matches!(both, (Some(a), Some(b)) if a == b))
    };
    let mut calls = 0;
    assert_eq!(
        ours.keys().collect::<Vec<_>>(),
        theirs.keys().collect::<Vec<_>>()
    );
    for (cpu, ours) in ours {
        let theirs = &theirs[cpu];
        for (at, (one, other)) in ours.iter().zip(theirs).enumerate() {
            assert!(
                same(one, other),
                "CPU {cpu}, line {at}: {one:?} here, {other:?} in the guest, after {:?}",
                &ours[at.saturating_sub(5)..at]
            );
            calls += usize::from(one.1.contains('('));
        }
        assert_eq!(ours.len(), theirs.len(), "CPU {cpu}");
    }
    assert!(calls >= CALLS, "{calls} calls");
}

/// The lines of a function_graph, whose calls stand behind so many of a mark
/// and some space.
fn flow(text: &str, (count, mark, space): (usize, char, usize)) -> BTreeMap<u32, Vec<Line>> {
    let mut cpus: BTreeMap<u32, Vec<Line>> = BTreeMap::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (call, note) = line.split_once(" /* ").unwrap_or((line, ""));
        let (Some(call), Some((cpu, _))) = (
            call.splitn(count + 1, mark).nth(count),
            line.split_once(')'),
        ) else {
            continue;
        };
        let what = call.trim();
        // Nothing else is a call: not the marks of interrupts, nor a change
        // of tasks. One that is open at the end, the guest says nothing of.
        let is_call = what.ends_with(['{', ';']) || what == "}";
        if !is_call || note.contains("return not seen") {
            continue;
        }
        let Some(cpu) = cpu.rsplit(' ').next().and_then(|cpu| cpu.parse().ok()) else {
            continue;
        };
        let depth = call.len() - call.trim_start().len() - space;
        let what = match what {
            "}" => format!("}} {}", note.split([',', ' ']).next().unwrap_or("")),
            what => what.to_owned(),
        };
        cpus.entry(cpu).or_default().push((depth, what));
    }
    cpus
}

/// What a command in the guest wrote, which ends with base64 of gzip.
pub(crate) fn unpacked(guest: &TestGuest, command: &str) -> Vec<u8> {
    let packed = guest.run_for(command, LISTING).unwrap();
    let mut child = Command::new("sh")
        .args(["-c", "base64 -d | gzip -dc"])
        .current_dir(Path::new("/"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("a shell");
    let mut input = child.stdin.take().expect("its input");
    let text = packed.success().unwrap();
    let feed = std::thread::spawn(move || input.write_all(text.as_bytes()));
    let output = child.wait_with_output().expect("what it wrote");
    feed.join().expect("a thread").expect("all was taken");
    assert!(output.status.success() && !output.stdout.is_empty());
    output.stdout
}
