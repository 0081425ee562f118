//! A saved image of a guest's memory says what the guest itself would have said.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use predicates::prelude::*;
use serde_json::Value;
use xftrace::kernel::stock::command_line;
use xftrace::ram::Gpa;
use xftrace_lab::{wait_for, Backing, Domain};

use crate::lab::TestGuest;
use crate::traced::Traced;
use crate::watch::Watch;

/// How many times the guest opens, reads and closes.
const LOOPS: usize = 100;
const LOOP_TIME: Duration = Duration::from_secs(120);
const FUNCTIONS: [&str; 2] = ["__x64_sys_read", "__x64_sys_openat"];

/// What a run of xftrace came to: exit status, output and messages.
struct Said {
    code: Option<i32>,
    output: String,
    messages: String,
}

fn xftrace(guest: &TestGuest, dir: &Path, arguments: &[&str]) -> Said {
    let mut command = guest.xftrace(dir);
    let output = command.args(arguments).output().expect("xftrace runs");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Said {
        code: output.status.code(),
        output: text(&output.stdout),
        messages: text(&output.stderr),
    }
}

/// Runs the loop in the guest, and gives its process id.
fn run_loop(guest: &TestGuest) -> u64 {
    let run = guest.run_for(&format!("rwloop {LOOPS}"), LOOP_TIME);
    let output = run.unwrap().success().unwrap();
    let pid = output.lines().find_map(|line| line.strip_prefix("pid "));
    pid.expect("a pid").parse().expect("a number")
}

/// Saves the guest's memory, and removes it in the end.
struct Dump(PathBuf);

impl Dump {
    fn of(guest: &TestGuest, name: &str) -> Self {
        let file = guest.lab().dir().join(format!("{name}.elf"));
        let path = file.to_str().expect("text");
        let arguments = ["dump", "--memory-only", "--format", "elf", name, path];
        guest.lab().virsh(&arguments).unwrap();
        Self(file)
    }

    fn path(&self) -> &str {
        self.0.to_str().expect("text")
    }

    /// Has the ELF file say that so many bytes more of its largest segment, at
    /// that one's end, are not in it (elf(5)). The address where they begin.
    fn leave_out(&self, bytes: u64) -> Gpa {
        let file = fs::File::options().read(true).write(true).open(&self.0);
        let file = file.expect("the dump");
        let word = |at: u64| {
            let mut word = [0; 8];
            file.read_exact_at(&mut word, at).expect("a header");
            u64::from_le_bytes(word)
        };
        let first = word(32);
        let count = word(56) & 0xffff;
        let headers = (0..count).map(|number| first + 56 * number);
        let loads = headers.filter(|&at| word(at) & 0xffff_ffff == 1);
        let largest = loads.max_by_key(|&at| word(at + 40)).expect("a segment");
        let left = word(largest + 32) - bytes;
        file.write_all_at(&left.to_le_bytes(), largest + 32)
            .expect("a header");
        Gpa(word(largest + 24) + left)
    }
}

impl Drop for Dump {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// The reads of a process that were traced, in a call flow as JSON lines.
fn reads(json: &str, pid: u64) -> usize {
    let begins = |line: &&str| {
        let value: Value = serde_json::from_str(line).expect("JSON");
        // Calls and leaves have an origin, nothing else does.
        let root = value["depth"] == 0 && !value["origin"].is_null();
        root && value["pid"] == pid && value["func"] == "__x64_sys_read"
    };
    json.lines().filter(begins).count()
}

/// The kernel is known again, and the calls that lie in its ring buffers are
/// read with the keys of the session that was open.
#[test]
fn a_dump_is_read_as_the_guest_was() {
    let traced = Traced::start_alone("dumped");
    traced.on(&["sys_openat", "sys_read"]);
    let pid = run_loop(&traced);
    // Draining takes nothing out of the guest: its buffers hold all of it still.
    let dump = Dump::of(&traced, "dumped");
    let session = traced.off();
    let klog = session.dir().join("klog");

    let map = &traced.lab().artifacts(traced.kernel()).unwrap().system_map;
    let image = ["--memory", dump.path(), "--symbols", map.to_str().unwrap()];
    let run = |arguments: &[&str]| xftrace(&traced, traced.dir(), arguments);
    let status = run(&[&["status"], &image[..]].concat());
    assert_eq!(status.code, Some(0), "{}", status.messages);
    let banner = session.meta.boots[0].banner.trim_end();
    for part in [banner, "mode     keyed", "switch   On, boot id "] {
        assert!(status.output.contains(part), "{}", status.output);
    }
    // All of it is there.
    assert_eq!(status.messages, "");

    let report = [&["report", "--format", "json"], &image[..]].concat();
    let keys = ["--klog", klog.to_str().unwrap()];
    let flow = run(&[&report[..], &keys].concat());
    assert_eq!(flow.code, Some(0), "{}", flow.messages);
    assert_eq!(reads(&flow.output, pid), LOOPS, "{}", flow.messages);
    assert!(!flow.output.contains("{\"type\":\"lost\""), "it wrapped");

    let flow = run(&report);
    assert_eq!(flow.code, Some(2));
    assert!(flow.messages.contains("--klog"), "{}", flow.messages);

    // A part that is not in the file: told, and in the way only where it is the
    // kernel's.
    let high = dump.leave_out(16 << 12);
    let status = run(&[&["status"], &image[..]].concat());
    assert_eq!(status.code, Some(0), "{}", status.messages);
    let hole = format!("warning: the image has holes: 65536 bytes from {high} on");
    assert!(status.messages.contains(&hole), "{}", status.messages);
    dump.leave_out(200 << 20);
    let status = run(&[&["status"], &image[..]].concat());
    assert_eq!(status.code, Some(2));
    let part = "perhaps for the image's holes (";
    assert!(status.messages.contains(part), "{}", status.messages);

    let file = fs::File::options().write(true).open(&dump.0).unwrap();
    file.set_len(10 << 20).unwrap();
    let status = run(&["status", "--memory", dump.path()]);
    assert_eq!(status.code, Some(2));
    assert!(status.messages.contains("cut short"), "{}", status.messages);
}

/// A kernel without the patch, in memory that no file stands for: it is
/// switched on and off there, and a dump of it is read without keys.
#[test]
fn a_stock_kernel_in_anonymous_memory_is_traced_and_read_in_a_dump() {
    let name = "plain-anon";
    let guest = TestGuest::define_alone(&Domain {
        kernel: "stock-6.1-cloud".to_owned(),
        backing: Backing::Anon,
        memory: 512,
        append: command_line(&FUNCTIONS),
        ..Domain::new(name)
    });
    let dir = tempfile::tempdir().expect("a directory");
    let kernel = guest.lab().artifacts(guest.kernel()).unwrap().bzimage;
    let symbols = ["--symbols", kernel.to_str().unwrap()];
    let run = |arguments: &[&str]| xftrace(&guest, dir.path(), arguments);
    let done = |arguments: &[&str]| {
        let said = run(arguments);
        assert_eq!(said.code, Some(0), "{arguments:?}: {}", said.messages);
        said.output
    };
    let switch = || {
        let state = guest.run("cat /sys/kernel/tracing/tracing_on").unwrap();
        state.success().unwrap()
    };
    guest.start().unwrap();
    let watch = Watch::start(&guest);
    done(&[&["enroll", name], &symbols[..]].concat());
    wait_for(Duration::from_secs(120), || {
        let status = run(&["status", "-d", name]).output;
        let ready =
            predicate::str::contains("mode     plain").and(predicate::str::contains("/mem\n"));
        Ok(ready.eval(&status).then_some(()))
    })
    .unwrap();

    done(&["on", "-d", name, "sys_read", "sys_openat"]);
    assert_eq!(switch(), "1\n");
    let pid = run_loop(&guest);
    done(&["off", "-d", name]);
    assert_eq!(switch(), "0\n");
    let live = done(&["report", "-d", name, "--format", "json"]);
    assert_eq!(reads(&live, pid), LOOPS);
    watch.saw_nothing();

    let dump = Dump::of(&guest, name);
    let image = [&["--memory", dump.path()], &symbols[..]].concat();
    let status = done(&[&["status"], &image[..]].concat());
    for part in ["mode     plain", "switch   function_graph, not recording, "] {
        assert!(status.contains(part), "{status}");
    }
    let report = [&["report", "--format", "json"], &image[..]].concat();
    assert_eq!(reads(&done(&report), pid), LOOPS);
    let flow = run(&[&report[..], &["--klog", "klog"]].concat());
    assert_eq!(flow.code, Some(2));
    assert!(flow.messages.contains("leave out"), "{}", flow.messages);
}

/// A copy of the memory file of a guest that goes on above 4 GiB, which the machine tells
/// where; and one of a guest that does not.
#[test]
fn a_raw_copy_is_read_with_its_machine() {
    for (name, kernel, memory) in [("raw-6g", "6.12", 6144), ("raw-256m", "6.1", 256)] {
        let traced = Traced::start(TestGuest::define(&Domain {
            kernel: kernel.to_owned(),
            backing: Backing::File,
            memory,
            ..Domain::new(name)
        }));
        let status = traced.command(&["status"]).output().expect("a status");
        let status = String::from_utf8_lossy(&status.stdout).into_owned();
        let words = status.split_whitespace();
        let file = words.into_iter().find(|word| word.ends_with("/pc.ram"));
        let copy = traced.lab().dir().join(format!("{name}.raw"));
        let copy = Dump(copy);
        traced.lab().virsh(&["suspend", name]).unwrap();
        // Of the pages that were never touched there is nothing to copy.
        let copied = Command::new("cp")
            .args(["--sparse=always", file.expect("a file"), copy.path()])
            .status();
        assert!(copied.expect("cp").success());
        traced.lab().virsh(&["resume", name]).unwrap();

        let map = traced.lab().artifacts(kernel).unwrap().system_map;
        let image = ["--memory", copy.path(), "--symbols", map.to_str().unwrap()];
        let run = |command: &str, more: &[&str]| {
            let all = [&[command], &image[..], more].concat();
            xftrace(&traced, traced.dir(), &all)
        };
        let status = run("status", &["--machine", "pc"]);
        assert_eq!((status.code, &*status.messages), (Some(0), ""));
        assert!(
            status.output.contains("mode     keyed"),
            "{}",
            status.output
        );
        let switch = "switch   Off, boot id ";
        assert!(status.output.contains(switch), "{}", status.output);
        // Without it, what is told depends on what the kernel needs of the upper half.
        let status = run("status", &[]);
        let warned = status
            .messages
            .contains("type --machine pc or --machine q35");
        assert_eq!(warned, memory > 4096, "{}", status.messages);
        // The check goes through all of it, modules and what the kernel allocated.
        let bzimage = traced.lab().artifacts(kernel).unwrap().bzimage;
        // Which has its symbols too.
        let kernel = ["--kernel", bzimage.to_str().unwrap()];
        let all = [
            &["check", "--machine", "pc", "--memory", copy.path()],
            &kernel[..],
        ]
        .concat();
        let checked = xftrace(&traced, traced.dir(), &all);
        assert_eq!(
            checked.code,
            Some(0),
            "{}{}",
            checked.output,
            checked.messages
        );
    }
}
