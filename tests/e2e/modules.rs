//! Functions of modules bear the names that the guest gives them, at the time of
//! each record.

use std::time::Duration;

use serde_json::Value;
use xftrace::kernel::stock::command_line;
use xftrace::kernel::Gva;
use xftrace::session::Mode;
use xftrace_lab::{Backing, Domain};

use crate::lab::TestGuest;
use crate::traced::Traced;

/// Longer than a list of modules may be off around a change, on a busy machine.
const SETTLED: Duration = Duration::from_secs(3);

/// Where each of the guest's modules has a function of this name, by the guest's own
/// /proc/kallsyms.
fn kallsyms(guest: &Traced, function: &str, module: &str) -> Gva {
    let command = format!("grep '\\[{module}\\]' /proc/kallsyms");
    let text = guest.run(&command).unwrap().success().unwrap();
    let line = text
        .lines()
        .find(|line| line.split_whitespace().nth(2) == Some(function));
    let address = line.and_then(|line| line.split(' ').next());
    let address = address.unwrap_or_else(|| panic!("no {function}: {text}"));
    Gva(u64::from_str_radix(address, 16).expect("an address"))
}

/// Loads a module, does what it hooks, and takes it out again. Where its
/// `passed_on` was, as the guest has it.
fn hooked(guest: &Traced, module: &str, work: &str) -> Gva {
    let run = |command: &str| guest.run(command).unwrap().success().unwrap();
    run(&format!("insmod /lib/modules/{module}.ko"));
    std::thread::sleep(SETTLED);
    run(work);
    let at = kallsyms(guest, "passed_on", module);
    std::thread::sleep(SETTLED);
    run(&format!("rmmod {module}"));
    std::thread::sleep(SETTLED);
    at
}

#[test]
fn functions_of_modules_are_named_as_the_guest_names_them_at_the_time() {
    functions_of_modules("modules", "6.1", Backing::File);
}

/// Whose `struct module` is another one.
#[test]
fn functions_of_modules_are_named_on_linux_6_12_too() {
    functions_of_modules("modules612", "6.12", Backing::Memfd);
}

fn functions_of_modules(name: &str, kernel: &str, backing: Backing) {
    let guest = Traced::start(TestGuest::define_alone(&Domain {
        kernel: kernel.to_owned(),
        backing,
        ..Domain::new(name)
    }));
    guest.on(&["sys_getdents64", "sys_read"]);
    let root = hooked(&guest, "hook_procroot", "ls /proc");
    let tcp = hooked(&guest, "hook_seq", "cat /proc/net/tcp");
    let session = guest.off();

    let graph = std::fs::read_to_string(guest.dir().join("trace_graph.txt"));
    let graph = graph.expect("a call flow");
    let lines = |what: &str| -> Vec<usize> {
        let lines = graph.lines().enumerate();
        let lines = lines.filter(|(_, line)| !line.starts_with('#') && line.contains(what));
        lines.map(|(number, _)| number).collect()
    };
    let of_root = lines(" passed_on [hook_procroot?]() {");
    let of_tcp = lines(" passed_on [hook_seq?]() {");
    println!("{root} {of_root:?}, {tcp} {of_tcp:?}");
    assert!(!of_root.is_empty() && !of_tcp.is_empty(), "{graph:.4000}");
    assert!(of_root.last() < of_tcp.first());
    assert!(lines("passed_on").len() >= 2 * (of_root.len() + of_tcp.len()));
    assert!(lines("passed_on()").is_empty(), "as if the host knew it");
    assert!(graph.contains("calls of functions that the guest alone names: "));

    // Where the guest itself has them; Ftrace's call site may be behind an endbr64.
    let report = |format: &str| {
        let mut xftrace = guest.lab().xftrace(guest.dir()).expect("an xftrace");
        xftrace.args(["report", "--format", format]);
        let output = xftrace.arg(session.dir()).output().expect("a report");
        assert!(output.status.success());
        String::from_utf8(output.stdout).expect("text")
    };
    let mut named = 0;
    for line in report("json").lines() {
        let event: Value = serde_json::from_str(line).expect("JSON");
        let says = &event["guest_says"];
        if event["type"] != "call" || says["symbol"] != "passed_on" {
            continue;
        }
        let address = event["addr"].as_str().expect("an address");
        let address = u64::from_str_radix(address.trim_start_matches("0x"), 16).expect("hex");
        let own = if says["module"] == "hook_seq" {
            tcp
        } else {
            root
        };
        assert!((own.0..=own.0 + 4).contains(&address), "{event}");
        assert_eq!(
            (&event["func"], &event["area"]),
            (&Value::Null, &"module".into())
        );
        named += 1;
    }
    assert_eq!(named, of_root.len() + of_tcp.len());
    // Of the saved session the same as when the trace ended. Its directory, which the
    // head names, the lab's libvirt sees elsewhere.
    let calls = |text: &str| text[text.find("#      TIME").expect("titles")..].to_owned();
    assert!(calls(&report("text")) == calls(&graph), "other names now");
    let folded = report("folded");
    assert!(folded.contains(";passed_on [hook_procroot?];"), "{folded}");
    assert!(folded.contains(";passed_on [hook_seq?];"), "{folded}");
}

/// In a kernel without the patch, in memory that is no file.
#[test]
fn functions_of_a_stock_kernels_modules_are_named() {
    let guest = Traced::start_with(
        TestGuest::define_alone(&Domain {
            kernel: "stock-6.12-cloud".to_owned(),
            backing: Backing::Anon,
            memory: 384,
            append: command_line(&["__x64_sys_read"]),
            ..Domain::new("modules-stock")
        }),
        &["--functions", "sys_read"],
    );
    let module = guest.put_module("fs/binfmt_misc");
    guest.on_soon();
    let run = |command: &str| guest.run(command).unwrap().success().unwrap();
    run(&format!(
        "insmod {module} && mkdir -p /mnt && mount -t binfmt_misc none /mnt"
    ));
    std::thread::sleep(SETTLED);
    run("cat /mnt/status");
    let session = guest.off();
    assert_eq!(session.meta.mode, Mode::Plain);

    let graph = std::fs::read_to_string(guest.dir().join("trace_graph.txt"));
    let graph = graph.expect("a call flow");
    let name = " bm_status_read [binfmt_misc?]";
    assert!(graph.contains(name), "{graph:.4000}");
    assert!(
        !graph.contains("bm_status_read()"),
        "as if the host knew it"
    );
}
