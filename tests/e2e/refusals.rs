//! Bad input that only a real guest shows: each is refused with what is wrong,
//! why, and what to do; and the guest is left as it was.

use std::path::Path;
use std::time::Duration;

use xftrace::session::{EndReason, State};
use xftrace_lab::{wait_for, Backing, Domain};

use crate::lab::TestGuest;
use crate::traced::Traced;

const SOON: Duration = Duration::from_secs(30);

fn running(name: &str) -> Traced {
    Traced::start(TestGuest::define(&Domain {
        backing: Backing::File,
        ..Domain::new(name)
    }))
}

impl Traced {
    /// Has a command fail, and gives what it says.
    fn refused(&self, command: &[&str]) -> String {
        let output = self.command(command).assert().code(2).stdout("");
        String::from_utf8(output.get_output().stderr.clone()).unwrap()
    }
}

fn says(said: &str, parts: &[&str]) {
    for part in parts {
        assert!(said.contains(part), "no {part:?} in: {said}");
    }
}

/// The symbols of a build of the same version in which one function, in the
/// middle, is longer: sections are padded, so that data stays where it was.
fn of_another_build(map: &str) -> String {
    let moved = |line: &str| {
        let (address, rest) = line.split_once(' ').unwrap();
        let address = u64::from_str_radix(address, 16).unwrap();
        format!("{:016x} {rest}", address + 16)
    };
    let mut behind = false;
    let mut text = String::new();
    for line in map.lines() {
        let code = line.contains(" t ") || line.contains(" T ");
        behind = (behind || line.ends_with(" vfs_read")) && !line.ends_with(" _etext");
        text += &if behind && code {
            moved(line)
        } else {
            line.to_owned()
        };
        text.push('\n');
    }
    assert_ne!(text, map);
    text
}

#[test]
fn symbols_that_are_not_the_guests_are_refused() {
    let traced = running("symbols");
    let lab = traced.lab();
    let right =
        std::fs::read_to_string(&lab.artifacts(traced.kernel()).unwrap().system_map).unwrap();
    let path = lab.dir().join("xftrace/of-symbols.map");
    let path = path.to_str().unwrap();
    let unpatched: String = right
        .lines()
        .filter(|line| !line.ends_with(" xftrace_control"))
        .flat_map(|line| [line, "\n"])
        .collect();
    let another_build = of_another_build(&right);
    let stub = "ffffffffffffffff B The real System.map is in the linux-image-<version>-dbg \
                package\n";
    let enroll = || {
        let mut command = traced.xftrace(traced.dir());
        command
            .args(["enroll", "symbols", "--symbols", path])
            .assert()
            .success();
    };
    // The options of a running helper are those of its start.
    let start_anew = || {
        traced.destroy().unwrap();
        xftrace_lab::Guest::start(&traced).unwrap();
    };
    std::fs::write(path, &right).unwrap();
    enroll();
    let wrong: [(&str, &[u8], &[&str]); 4] = [
        (
            "without what the patch brings",
            unpatched.as_bytes(),
            &["has the xftrace patch", "have no xftrace_control"],
        ),
        (
            "of another build of this version",
            another_build.as_bytes(),
            &[
                "another build",
                "take the one that was made together with: Linux version 6.1",
            ],
        ),
        (
            "a distribution's stub",
            stub.as_bytes(),
            &["the real System.map is in"],
        ),
        (
            "the beginning of something packed",
            b"\x1f\x8b\x08\x00\x00",
            &["of-symbols.map", "cannot be unpacked"],
        ),
    ];
    for (what, map, parts) in wrong {
        std::fs::write(path, map).unwrap();
        start_anew();
        let said = traced.refused(&["on", "sys_read"]);
        println!("{what}: {said}");
        says(&said, parts);
        assert!(traced.run("true").is_ok(), "{what}");
    }
    std::fs::write(path, &right).unwrap();
    start_anew();
    traced.on(&["sys_read"]);
    traced.off();
}

/// A guest that runs a kernel without the patch, and cannot be traced: what
/// `on` says of it.
fn of_a_guest_that_lacks(domain: Domain, parts: &[&str]) -> Traced {
    let traced = Traced::start(TestGuest::define(&Domain {
        backing: Backing::File,
        ..domain
    }));
    let said = traced.refused(&["on", "sys_read"]);
    println!("{}: {said}", traced.name());
    says(&said, parts);
    assert!(traced.run("true").is_ok());
    let sessions = xftrace::session::list(&traced.lab().sessions(traced.name()));
    assert_eq!(sessions.len(), 0, "a refusal leaves a session behind");
    traced
}

#[test]
fn a_kernel_without_btf_is_refused() {
    let domain = Domain {
        kernel: "6.1-no-btf".to_owned(),
        append: "ftrace=function_graph".to_owned(),
        ..Domain::new("no-btf")
    };
    let neither = "can be traced: the guest's kernel has neither the xftrace patch nor BTF";
    of_a_guest_that_lacks(domain, &[neither, "boot a kernel that"]);
}

#[test]
fn a_kernel_without_the_tracer_is_refused() {
    let domain = Domain {
        kernel: "6.1-no-tracer".to_owned(),
        ..Domain::new("no-tracer")
    };
    let built = "can be traced: the guest's kernel was built without CONFIG_FUNCTION_GRAPH_TRACER";
    of_a_guest_that_lacks(domain, &[built, "boot a kernel that"]);
}

#[test]
fn a_ring_that_is_written_over_before_it_is_read_is_refused() {
    let domain = Domain {
        kernel: "stock-6.1-cloud".to_owned(),
        memory: 512,
        append: "ftrace=function_graph ftrace_graph_filter=__x64_sys_read trace_buf_size=16K"
            .to_owned(),
        ..Domain::new("small-ring")
    };
    let parts = [
        "has 20 KiB for each CPU",
        "64 KiB are the least",
        "'ftrace=function_graph ftrace_graph_filter=__x64_sys_read trace_buf_size=8M'",
        "(or make buffer_size_kb larger inside the guest)",
    ];
    let traced = of_a_guest_that_lacks(domain, &parts);
    let larger = "echo 8192 >/sys/kernel/tracing/buffer_size_kb";
    traced.run(larger).unwrap().success().unwrap();
    traced.on(&["sys_read"]);
    traced.off();
}

#[test]
fn functions_that_cannot_be_traced_and_users_who_may_not_are_refused() {
    let traced = running("refuses");
    let sessions = || xftrace::session::list(&traced.lab().sessions("refuses")).len();
    says(
        &traced.refused(&["on", "sys_opennat"]),
        &[
            "has no function \"sys_opennat\"",
            "similar names: __x64_sys_open",
        ],
    );
    says(
        &traced.refused(&["on", "sys_read", "do_syscall_64"]),
        &[
            "do_syscall_64 is a function of the guest's kernel, but Ftrace",
            "cannot trace",
        ],
    );
    says(
        &traced.refused(&["on", "start_kernel"]),
        &["exists only while"],
    );
    says(&traced.refused(&["on", "jiffies"]), &["is not a function"]);
    says(
        &traced.refused(&["off"]),
        &["no trace is on", "xftrace on FUNCTION"],
    );

    let tracer = |name: &str| {
        let command = format!("echo {name} >/sys/kernel/tracing/current_tracer");
        traced.run(&command).unwrap().success().unwrap();
    };
    tracer("function");
    says(
        &traced.refused(&["on", "sys_read"]),
        &[
            "in use by the guest itself",
            "stop that inside the guest first",
        ],
    );
    tracer("nop");
    assert_eq!(sessions(), 0, "a refusal leaves a session behind");

    let xftrace = Path::new(env!("CARGO_BIN_EXE_xftrace"));
    let copy = traced.lab().dir().join("for-nobody");
    std::fs::copy(xftrace, &copy).unwrap();
    for command in ["on", "off", "status"] {
        let mut setpriv = traced.lab().command("/".as_ref(), "setpriv").unwrap();
        setpriv.args(["--reuid", "nobody", "--regid", "nogroup", "--clear-groups"]);
        setpriv.arg(&copy).args([command, "-d", "refuses"]);
        let output = setpriv.output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{command}: {said}");
        println!("{command} as nobody: {said}");
        says(&said, &["ermission", "root"]);
    }

    // None of this is in the way of what is right.
    traced.on(&["sys_read"]);
    traced.off();
}

#[test]
fn a_memory_file_that_is_truncated_ends_the_trace_and_not_the_helper() {
    let traced = running("truncated");
    traced.on(&["sys_read"]);
    let status = traced.status().expect("a status");
    // So that the guest, and QEMU with it, does not die of it first.
    traced.lab().virsh(&["suspend", "truncated"]).unwrap();
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(&status.memory[0])
        .unwrap();
    file.set_len(1 << 20).unwrap();
    let session = wait_for(SOON, || {
        Ok(Some(traced.session()).filter(|session| session.meta.state == State::Closed))
    })
    .unwrap_or_else(|_| panic!("the trace goes on: {}", traced.log()));
    let Some(EndReason::Error(why)) = &session.meta.end else {
        panic!("{:?}", session.meta.end);
    };
    says(why, &["was truncated or its pages vanished"]);
    let now = traced.status().expect("the helper still answers");
    assert_eq!(now.helper_pid, status.helper_pid);
    let said = traced.refused(&["on", "sys_read"]);
    says(&said, &["truncated"]);
    // What it said of this, it did not say twenty times a second.
    let log = traced.log();
    let lines = log.lines().filter(|line| line.contains("pages vanished"));
    assert!((1..10).contains(&lines.count()), "{log}");
    traced.destroy().unwrap();
}
