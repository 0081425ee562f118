//! What is in the memory of a real guest: a clean kernel is clean, and each
//! benign hook in tests/lab/modules/ is found in it, without anything being
//! traced.

use std::path::Path;

use serde_json::Value;
use xftrace_lab::{Backing, Domain};

use crate::lab::TestGuest;

/// Modules that hook the kernel, what finds each, and what it says of where.
const HOOKS: [(&str, &str, &str); 11] = [
    (
        "hook_syscall_table",
        "read-only-data",
        "sys_call_table[217]",
    ),
    ("hook_seq", "read-only-data", "tcp4_seq_ops+"),
    (
        "hook_procroot",
        "files",
        "i_fop of the root of a mounted proc",
    ),
    ("hook_idt", "interrupts", "interrupt gate 0x80"),
    ("hook_ftrace", "ftrace", "Ftrace's callback"),
    ("hook_kprobe", "kprobes", "kprobe at iterate_dir"),
    ("hook_kretprobe", "kprobes", "kretprobe at "),
    ("hook_inline", "kernel-text", "__x64_sys_newuname"),
    ("hook_dispatch", "kernel-text", "x64_sys_call+"),
    (
        "hook_tracepoint",
        "tracepoints",
        "tracepoint sched_process_exec",
    ),
    // Stays: nobody can unload it.
    ("hook_hidden", "unowned-code", "0xffffffff"),
];

/// A guest whose kernel the store knows, vmlinuz and all.
struct Checked {
    guest: TestGuest,
    dir: tempfile::TempDir,
    /// What the store calls its kernel.
    id: String,
}

impl Checked {
    fn start(name: &str, kernel: &str) -> Checked {
        let guest = TestGuest::define_alone(&Domain {
            kernel: kernel.to_owned(),
            backing: Backing::File,
            ..Domain::new(name)
        });
        let dir = tempfile::tempdir().expect("a directory");
        let boots = guest.lab().artifacts(kernel).unwrap().bzimage.clone();
        let mut add = guest.xftrace(dir.path());
        add.args(["symbols", "add", boots.to_str().unwrap()]);
        let added = add.assert().success().get_output().stdout.clone();
        let added = String::from_utf8(added).expect("text");
        let id = added.split([' ', ':']).nth(1).expect("an id").to_owned();
        let checked = Checked { guest, dir, id };
        checked.guest.start().unwrap();
        checked
    }

    fn xftrace(&self, args: &[&str]) -> assert_cmd::Command {
        let mut command = self.guest.xftrace(self.dir.path());
        command.args(args);
        command
    }

    fn check(&self, args: &[&str]) -> (i32, Value) {
        let output = self.xftrace(&["check", "--json"]).args(args).output();
        let output = output.expect("xftrace ran");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let json = serde_json::from_slice(&output.stdout);
        let json = json.unwrap_or_else(|error| panic!("{error}: {said}"));
        (output.status.code().expect("a status"), json)
    }

    fn live(&self) -> (i32, Value) {
        self.check(&["-d", self.guest.name()])
    }

    fn is_clean(&self, (status, verdict): (i32, Value)) {
        assert_eq!(
            (status, verdict["memory"]["conclusion"].as_str()),
            (0, Some("clean")),
            "{verdict:#}"
        );
        let looked = verdict["memory"]["outcomes"].as_array().expect("outcomes");
        assert_eq!(looked.len(), 9);
        assert_eq!(
            verdict["memory"]["findings"].as_array().map(Vec::len),
            Some(0)
        );
    }
}

impl Drop for Checked {
    /// The store as it was, for the tests after this one.
    fn drop(&mut self) {
        let removed = self.xftrace(&["symbols", "remove", &self.id]).output();
        drop(removed);
    }
}

/// What was found, in the order in which it is listed: check, place, owner.
fn found(verdict: &Value) -> Vec<(String, String, String)> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let all = verdict["memory"]["findings"].as_array().expect("findings");
    let parts = |one: &Value| {
        (
            text(&one["check"]),
            text(&one["place"]),
            text(&one["owner"]),
        )
    };
    all.iter().map(parts).collect()
}

fn each_hook_is_found(name: &str, kernel: &str) {
    let checked = Checked::start(name, kernel);
    let run = |command: &str| checked.guest.run(command).unwrap().success().unwrap();
    checked.is_clean(checked.live());
    for (module, check, place) in HOOKS {
        run(&format!("insmod /lib/modules/{module}.ko"));
        let (status, verdict) = checked.live();
        let all = found(&verdict);
        println!("{module}: {all:?}");
        let hook = all
            .iter()
            .find(|(by, at, _)| by == check && at.starts_with(place));
        let (_, _, owner) = hook.unwrap_or_else(|| panic!("{module}: {verdict:#}"));
        let whose = match module {
            "hook_hidden" => "nobody",
            module => module,
        };
        assert!(owner.contains(whose), "{module}: {owner}");
        assert_eq!(
            (status, verdict["conclusion"].as_str()),
            (1, Some("findings"))
        );
        if module == "hook_hidden" {
            saved_agrees(&checked, &all);
            continue;
        }
        run(&format!("rmmod {module}"));
        checked.is_clean(checked.live());
    }
}

/// The verdict on the guest's saved memory is that on the guest.
fn saved_agrees(checked: &Checked, live: &[(String, String, String)]) {
    let path = checked.guest.lab().dir().join("checked.elf");
    let file = path.to_str().expect("a path");
    let dump = [
        "dump",
        "--memory-only",
        "--format",
        "elf",
        checked.guest.name(),
        file,
    ];
    checked.guest.lab().virsh(&dump).unwrap();
    let (status, verdict) = checked.check(&["--memory", file]);
    std::fs::remove_file(Path::new(file)).expect("a dump");
    assert_eq!(status, 1, "{verdict:#}");
    assert_eq!(found(&verdict), live);
}

#[test]
fn each_hook_is_found_in_the_memory_of_linux_6_1() {
    each_hook_is_found("memory61", "6.1");
}

#[test]
fn each_hook_is_found_in_the_memory_of_linux_6_12() {
    each_hook_is_found("memory612", "6.12");
}
