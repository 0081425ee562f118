//! The command line against libvirt's own test driver: no daemon, no guest.

use std::path::Path;
use std::process::{Command as Process, Stdio};

use assert_cmd::Command;
use predicates::prelude::*;
use predicates::str::{contains, is_empty, starts_with};
use xftrace::ram::{Gpa, GuestRam};

mod support;
use support::guest::{Guest, Plan};

fn xftrace() -> Command {
    let mut command = Command::cargo_bin("xftrace").expect("built");
    for name in ["LIBVIRT_DEFAULT_URI", "XFTRACE_CONFIG"] {
        command.env_remove(name);
    }
    command
}

/// A host of the test driver with a domain of each kind that matters, and a
/// configuration whose paths lie in the directory.
fn host(dir: &Path) -> (String, String) {
    let domain = |name: &str, backing: &str| {
        format!(
            "<domain type='test'><name>{name}</name><memory>8192</memory>\
             <memoryBacking>{backing}</memoryBacking><os><type>hvm</type></os></domain>"
        )
    };
    let node = format!(
        "<node>{}{}{}{}{}</node>",
        domain("plain", "<locked/>"),
        domain("huge", "<hugepages/>"),
        domain("fd", "<source type='memfd'/><access mode='shared'/>"),
        domain("own", "<source type='file'/><access mode='private'/>"),
        domain("web-1", "<source type='file'/><access mode='shared'/>"),
    );
    let node_path = dir.join("node.xml");
    std::fs::write(&node_path, node).unwrap();
    let config = dir.join("xftrace.toml");
    let shown = dir.display();
    std::fs::write(
        &config,
        format!(
            "auto_enroll = [\"web-*\"]\n[paths]\nrun = \"{shown}/run\"\nsessions = \"{shown}\"\n\
             symbols = \"{shown}/symbols\"\nbaselines = \"{shown}/baselines\"\nlibvirt_hooks = \"{shown}/hooks\"\n\
             qemu_conf = \"{shown}/qemu.conf\"\n"
        ),
    )
    .unwrap();
    (
        format!("test://{}", node_path.display()),
        config.display().to_string(),
    )
}

#[test]
fn every_command_has_help_with_examples() {
    for command in [
        "enroll", "unenroll", "on", "off", "status", "list", "report", "check", "baseline",
        "follow", "symbols", "doctor",
    ] {
        for line in [&["help", command][..], &[command, "--help"]] {
            xftrace()
                .args(line)
                .assert()
                .code(0)
                .stdout(contains("Examples:").and(contains(format!("xftrace {command}"))))
                .stderr(is_empty());
        }
    }
    xftrace()
        .arg("--help")
        .assert()
        .code(0)
        .stdout(contains("Exit status:").and(contains("\n  hook ").not()));
    xftrace()
        .arg("--version")
        .assert()
        .code(0)
        .stdout(starts_with("xftrace "));
}

#[test]
fn usage_errors_are_errors_in_our_words() {
    for line in [
        &["of"][..],
        &["on", "--interval", "1"],
        &["enroll"],
        &["report"],
        &["off", "-o", "x", "--no-copy"],
        &["helper", "--uuid", "x"],
    ] {
        xftrace()
            .args(line)
            .assert()
            .code(2)
            .stdout(is_empty())
            .stderr(starts_with("xftrace: error: "));
    }
    xftrace()
        .assert()
        .code(2)
        .stdout(is_empty())
        .stderr(contains("Usage: xftrace"));
}

#[test]
fn an_error_is_one_text_with_its_causes() {
    xftrace()
        .args(["-c", "test:///default", "enroll", "web1"])
        .assert()
        .code(2)
        .stdout(is_empty())
        .stderr(
            "xftrace: error: no domain 'web1'; `virsh -c test:///default list --all` shows those \
             there are\n",
        );
    let dir = tempfile::tempdir().unwrap();
    let (uri, _) = host(dir.path());
    for (domain, memory) in [
        ("huge", "huge pages are private"),
        ("own", "file is private"),
    ] {
        xftrace()
            .args(["-c", &uri, "enroll", domain])
            .assert()
            .code(0)
            .stdout(contains(memory).and(contains(format!("virsh shutdown {domain}"))));
    }
}

#[test]
fn the_connection_is_the_option_else_the_environment() {
    xftrace()
        .env("LIBVIRT_DEFAULT_URI", "test:///default")
        .arg("list")
        .assert()
        .code(0)
        .stdout(contains("test"));
    xftrace()
        .env("LIBVIRT_DEFAULT_URI", "test:///default")
        .args(["-c", "qemu+unix:///system?socket=/nonexistent/sock", "list"])
        .assert()
        .code(2)
        .stderr(contains("does not answer").and(contains("libvirtd")));
}

#[test]
fn a_configuration_that_is_named_must_be_there_and_right() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.toml");
    let list = |path: &Path| {
        let mut command = xftrace();
        command
            .args(["-c", "test:///default", "list", "--config"])
            .arg(path);
        command.assert()
    };
    list(&path).code(2).stderr(contains("x.toml"));
    std::fs::write(&path, "\ninterval = \"1ms\"\n").unwrap();
    list(&path)
        .code(2)
        .stderr(contains("x.toml:2: ").and(contains("10ms")));
    std::fs::write(&path, "interval = \"20ms\"\n").unwrap();
    list(&path).code(0);
}

#[test]
fn enrolling_says_what_is_to_be_done_next() {
    let dir = tempfile::tempdir().unwrap();
    let (uri, config) = host(dir.path());
    xftrace()
        .args(["-c", &uri, "--config", &config, "enroll", "plain"])
        .args(["-f", "sys_openat,sys_read", "-i", "500ms", "--at-start"])
        .args(["--integrity-interval", "10s"])
        .assert()
        .code(0)
        .stdout(
            contains("Domain 'plain' is enrolled: functions sys_openat, sys_read")
                .and(contains("every 500ms"))
                .and(contains("memory checked every 10s"))
                .and(contains("its memory is anonymous"))
                .and(contains("virsh shutdown plain"))
                .and(contains("Undo: xftrace unenroll plain")),
        )
        .stderr(is_empty());
    // Its memory is a shared file already.
    xftrace()
        .args(["-c", &uri, "--config", &config, "enroll", "web-1"])
        .assert()
        .code(0)
        .stdout(contains("virsh shutdown").not());
    xftrace()
        .args(["-c", &uri, "enroll", "plain", "--symbols", "no/such/map"])
        .assert()
        .code(0)
        .stderr(contains("warning").and(contains("/no/such/map")));
    xftrace()
        .args(["-c", &uri, "unenroll", "plain"])
        .assert()
        .code(0)
        .stdout(contains("not enrolled"));
}

/// A domain that boots from its disk: the user is told where the parameters go.
#[test]
fn enrolling_for_a_stock_kernel_tells_what_to_boot_it_with() {
    let dir = tempfile::tempdir().unwrap();
    let (uri, config) = host(dir.path());
    let enroll = |functions: &str, symbols: Option<&Path>| {
        let mut command = xftrace();
        command.args(["-c", &uri, "--config", &config, "enroll", "web-1"]);
        command.args(["--plain", "-f", functions]);
        if let Some(symbols) = symbols {
            command.arg("--symbols").arg(symbols);
        }
        command.assert()
    };
    let parameters = "ftrace=function_graph \
                      ftrace_graph_filter=__x64_sys_openat,vfs_read trace_buf_size=8M";
    let told = || {
        contains("boots no kernel directly")
            .and(contains(format!("\n  {parameters}\n")))
            .and(contains("/etc/default/grub.d/xftrace.cfg"))
    };
    // Nothing tells what the functions are called.
    enroll("sys_openat,vfs_read", None)
        .code(2)
        .stdout(is_empty())
        .stderr(contains("xftrace symbols add"));

    let map = dir.path().join("System.map");
    let text = "ffffffff81000000 T _text\nffffffff81000000 T _stext\n\
                ffffffff81000040 T __x64_sys_openat\nffffffff810000e0 T vfs_read\n\
                ffffffff81001000 T _etext\n";
    std::fs::write(&map, text).unwrap();
    enroll("sys_openat,vfs_read", Some(&map))
        .code(0)
        .stdout(told());
    enroll("sys_openat,vfs_raed", Some(&map))
        .code(2)
        .stderr(contains("no function \"vfs_raed\"").and(contains("vfs_read")));

    xftrace()
        .args(["--config", &config, "symbols", "add"])
        .arg(&map)
        .assert()
        .code(0);
    enroll("sys_openat,vfs_read", None).code(0).stdout(told());
    // What the store made of it is no list of symbols, and can be named as well.
    let files = std::fs::read_dir(dir.path().join("symbols")).unwrap();
    let mut files = files.map(|file| file.unwrap().path());
    let index = files.find(|path| path.extension().is_some_and(|end| end == "xfsyms"));
    std::fs::remove_file(&map).unwrap();
    let index = index.unwrap();
    enroll("sys_openat,vfs_read", Some(&index))
        .code(0)
        .stdout(told());
    enroll("sys_openta", Some(&index))
        .code(2)
        .stdout(is_empty());
    enroll("sys_openta", None).code(2).stdout(is_empty());
}

#[test]
fn a_domain_is_enrolled_with_a_baseline_that_may_be_learnt_later() {
    let dir = tempfile::tempdir().unwrap();
    let (uri, config) = host(dir.path());
    let enroll = |name: &str| {
        let mut command = xftrace();
        command.args(["-c", &uri, "--config", &config, "enroll", "fd"]);
        command.args(["--baseline", name]);
        command.assert()
    };
    enroll("web")
        .code(0)
        .stdout(contains("judged by baseline web"))
        .stderr(contains("warning: there is no baseline \"web\"").and(contains("learn web")));
    enroll("../web")
        .code(2)
        .stderr(contains("no baseline's name"));
    let baselines = dir.path().join("baselines");
    std::fs::create_dir(&baselines).unwrap();
    std::fs::write(baselines.join("web.json"), "{}").unwrap();
    enroll("web").code(2).stderr(contains("web.json"));
}

#[test]
fn lists_the_domains() {
    let dir = tempfile::tempdir().unwrap();
    let (uri, config) = host(dir.path());
    xftrace()
        .args(["-c", &uri, "--config", &config, "list"])
        .assert()
        .code(0)
        .stdout(
            "\
DOMAIN   STATE     ENROLLED   MEMORY          HELPER
fd       running   no         memfd           -
huge     running   no         not traceable   -
own      running   no         not traceable   -
plain    running   no         anonymous       -
web-1    running   by name    shared file     -
",
        );
    xftrace()
        .args(["-c", &uri, "--config", &config, "list", "--name"])
        .assert()
        .code(0)
        .stdout("web-1\n");
}

#[test]
fn the_doctor_names_what_is_missing_and_its_command() {
    let dir = tempfile::tempdir().unwrap();
    let (uri, config) = host(dir.path());
    let doctor = |domain: &str| {
        let mut command = xftrace();
        command.args(["-c", &uri, "--config", &config, "doctor", domain]);
        command.assert()
    };
    doctor("plain").code(2).stdout(
        contains("ok       libvirt answers at test:///")
            .and(contains("missing  libvirt's hook"))
            .and(contains("-> xftrace enroll plain"))
            .and(contains("things are missing.")),
    );
    doctor("none")
        .code(2)
        .stdout(contains("missing  the domain: no domain 'none'"));

    // Each mend is a command, and the hook's one installs it.
    let output = doctor("web-1").get_output().stdout.clone();
    let said = String::from_utf8(output).unwrap();
    let mends: Vec<&str> = said
        .lines()
        .filter_map(|line| line.trim().strip_prefix("-> "))
        .collect();
    assert!(mends.len() > 3, "{said}");
    for mend in &mends {
        let typed = mend.split("    (").next().unwrap();
        let command = typed.split(' ').next().unwrap();
        let known = [
            "xftrace",
            "virsh",
            "install",
            "mkdir",
            "sed",
            "echo",
            "kill",
            "systemctl",
            "virtlogd",
            "virtlogd;",
        ];
        assert!(known.contains(&command), "no command: {mend}");
        let checked = Process::new("sh")
            .args(["-n", "-c", typed])
            .status()
            .unwrap();
        assert!(checked.success(), "no shell takes this: {mend}");
    }
    let install = mends
        .iter()
        .find(|mend| mend.contains("hooks/qemu.d/50-xftrace"))
        .unwrap();
    let binary = assert_cmd::cargo::cargo_bin!("xftrace").parent().unwrap();
    let path = format!("{}:{}", binary.display(), std::env::var("PATH").unwrap());
    let installed = Process::new("sh")
        .args(["-c", install])
        .current_dir(dir.path())
        .env("PATH", path)
        .status()
        .unwrap();
    assert!(installed.success(), "{install}");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("libvirt-hooks/50-xftrace");
    let hook = dir.path().join("hooks/qemu.d/50-xftrace");
    assert_eq!(
        std::fs::read(&hook).unwrap(),
        std::fs::read(source).unwrap()
    );
    host_is_complete(dir.path(), &uri, &config);
}

/// The host alone, with everything in its place but the run directory's mode.
fn host_is_complete(dir: &Path, uri: &str, config: &str) {
    // A daemon that is older than the hook has to be told of it, unless it
    // has called the hook already.
    let run = dir.join("run");
    std::fs::create_dir(&run).unwrap();
    std::fs::write(run.join("hook-called"), "").unwrap();
    let mode = |mode| std::os::unix::fs::PermissionsExt::from_mode(mode);
    std::fs::set_permissions(&run, mode(0o755)).unwrap();
    let host = || {
        let mut command = xftrace();
        command.args(["-c", uri, "--config", config, "doctor"]);
        command.assert()
    };
    host()
        .code(2)
        .stdout(contains(format!("-> chmod 700 {}", run.display())));
    std::fs::set_permissions(&run, mode(0o700)).unwrap();
    host()
        .code(0)
        .stdout(contains("Nothing is missing.").and(contains("missing  ").not()));
}

#[test]
fn a_reader_that_goes_away_ends_it_quietly() {
    let (reader, writer) = nix::unistd::pipe().unwrap();
    drop(reader);
    let output = Process::new(assert_cmd::cargo::cargo_bin!("xftrace"))
        .args(["-c", "test:///default", "list"])
        .stdout(Stdio::from(writer))
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");

    let full = std::fs::OpenOptions::new()
        .write(true)
        .open("/dev/full")
        .unwrap();
    let output = Process::new(assert_cmd::cargo::cargo_bin!("xftrace"))
        .args(["-c", "test:///default", "list"])
        .stdout(Stdio::from(full))
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("standard output"), "{said}");
}

#[test]
fn symbols_are_added_listed_and_removed() {
    let dir = tempfile::tempdir().unwrap();
    let (_, config) = host(dir.path());
    let symbols = |arguments: &[&str]| {
        let mut command = xftrace();
        command.current_dir(dir.path());
        command
            .args(["--config", &config, "symbols"])
            .args(arguments);
        command.assert()
    };
    symbols(&[]).code(2).stderr(contains("remove"));
    symbols(&["list"])
        .code(0)
        .stdout(is_empty())
        .stderr(contains("symbols add FILE"));
    symbols(&["list", "--json"]).code(0).stdout("[]\n");
    let map = "ffffffff81000000 T _text\nffffffff81000000 T _stext\nffffffff81001000 T _etext\n";
    std::fs::write(dir.path().join("System.map-6.1"), map).unwrap();
    let stub = "ffffffffffffffff B The real System.map is in the linux-image-6.1-dbg package\n";
    std::fs::write(dir.path().join("stub"), stub).unwrap();
    // The good one is added, whatever the other is.
    symbols(&["add", "stub", "none", "System.map-6.1"])
        .code(2)
        .stdout(contains("Added").and(contains("System.map-6.1, 3 symbols")))
        .stderr(contains("vmlinuz").and(contains("cannot read \"none\"")));
    symbols(&["add", "System.map-6.1"])
        .code(0)
        .stdout(contains("Replaced"));
    let list = symbols(&["list"])
        .code(0)
        .stdout(contains("System.map-6.1"));
    let list = String::from_utf8(list.get_output().stdout.clone()).unwrap();
    let id = list
        .lines()
        .nth(1)
        .and_then(|line| line.split(' ').next())
        .unwrap();
    symbols(&["remove", "zzz"])
        .code(2)
        .stderr(contains("symbols list"));
    symbols(&["remove", id]).code(0).stdout(contains(id));
    symbols(&["list"]).code(0).stdout(is_empty());
}

#[test]
fn baselines_and_checks_say_what_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("xftrace.toml");
    let baselines = dir.path().join("baselines");
    std::fs::write(&config, format!("[paths]\nbaselines = {baselines:?}\n")).unwrap();
    let xftrace = |args: &[&str]| {
        let mut command = xftrace();
        command.arg("--config").arg(&config).args(args);
        command.assert()
    };
    xftrace(&["baseline", "list"]).code(0).stdout(is_empty());
    for args in [
        &["baseline", "show", "web"][..],
        &["baseline", "remove", "web"],
        &["check", "/nowhere", "--baseline", "web"],
    ] {
        xftrace(args)
            .code(2)
            .stdout(is_empty())
            .stderr(contains("no baseline \"web\"").and(contains("baseline learn web")));
    }
    let empty = dir.path().display().to_string();
    for args in [
        &["check", &empty][..],
        &["baseline", "learn", "web", &empty],
    ] {
        xftrace(args).code(2).stderr(contains("is no session"));
    }
    assert!(
        !baselines.exists(),
        "nothing was learnt, and a baseline is there"
    );
}

#[test]
fn what_is_not_there_is_called_that_with_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let (_, config) = host(dir.path());
    let file = std::fs::File::create(dir.path().join("raw")).unwrap();
    file.set_len(64 << 20).unwrap();
    let check = |memory: &str| {
        let mut command = xftrace();
        command.current_dir(dir.path());
        command.args(["--config", &config, "check", "--memory", memory]);
        command.assert().code(2).stdout(is_empty())
    };
    check("nofile").stderr(
        contains("there is no file \"nofile\"")
            .and(contains("virsh dump --memory-only"))
            .and(contains("running").not()),
    );
    // The store is made with the first kernel that is added.
    let store = format!("{} does not exist", dir.path().join("symbols").display());
    check("raw").stderr(contains(store).and(contains("xftrace symbols add")));
}

/// Of several kernels in an image, nothing tells which one ran.
#[test]
fn which_of_an_images_kernels_it_is_can_be_said() {
    let dir = tempfile::tempdir().unwrap();
    let (_, config) = host(dir.path());
    let (planted, ran) = (0x80_0000, 0x100_0000);
    let at = |phys_text| Plan {
        phys_text,
        ..Plan::default()
    };
    let guest = Guest::load(at(ran), Guest::of(at(planted)).ram);
    let mut memory = vec![0; guest.plan.ram as usize];
    guest.ram.read(Gpa(0), &mut memory).unwrap();
    std::fs::write(dir.path().join("raw"), memory).unwrap();
    std::fs::write(dir.path().join("map"), guest.plan.system_map()).unwrap();
    let status = |more: &[&str]| {
        let mut command = xftrace();
        command.current_dir(dir.path()).args(["--config", &config]);
        command.args(["status", "--memory", "raw", "--symbols", "map"]);
        command.args(more).assert()
    };
    status(&[]).code(0).stdout(
        contains("at 0x800000, slide")
            .and(contains("not trusted: the symbols fit 1 more"))
            .and(contains("(at 0x1000000)").and(contains("--kernel-at"))),
    );
    for place in ["0x1000000", "16777216"] {
        status(&["--kernel-at", place])
            .code(0)
            .stdout(contains("at 0x1000000, slide").and(contains("not trusted").not()));
    }
    status(&["--kernel-at", "0x1200000"])
        .code(2)
        .stderr(contains("no kernel that the symbols fit lies at 0x1200000"));
    status(&["--kernel-at", "low"])
        .code(2)
        .stderr(contains("an address is a number"));

    // Of another kernel than that which its symbols are of, too.
    let mut other = at(ran);
    other.functions.iter_mut().for_each(|(_, at)| *at *= 2);
    let guest = Guest::load(other, Guest::of(at(planted)).ram);
    let mut memory = vec![0; guest.plan.ram as usize];
    guest.ram.read(Gpa(0), &mut memory).unwrap();
    std::fs::write(dir.path().join("raw"), memory).unwrap();
    let store = dir.path().join("symbols");
    std::fs::create_dir(&store).unwrap();
    std::fs::write(store.join("one"), at(planted).system_map()).unwrap();
    std::fs::write(store.join("two"), guest.plan.system_map()).unwrap();
    let mut command = xftrace();
    command.current_dir(dir.path()).args(["--config", &config]);
    command.args(["status", "--memory", "raw"]);
    command.assert().code(0).stdout(
        contains("at 0x800000, slide")
            .and(contains("symbols/one"))
            .and(contains("1 more in the image (at 0x1000000)")),
    );
}

/// Nothing tells whether a raw image has the hole below 4 GiB in it.
#[test]
fn a_large_raw_image_asks_for_its_machine() {
    let dir = tempfile::tempdir().unwrap();
    let (_, config) = host(dir.path());
    let map = "ffffffff81000000 T _text\nffffffff81000000 T _stext\nffffffff81001000 T _etext\n";
    std::fs::write(dir.path().join("map"), map).unwrap();
    let file = std::fs::File::create(dir.path().join("raw")).unwrap();
    let told = |mib: u64, more: &[&str]| {
        file.set_len(mib << 20).unwrap();
        let mut command = xftrace();
        command.current_dir(dir.path());
        command
            .args([
                "--config",
                &config,
                "status",
                "--memory",
                "raw",
                "--symbols",
                "map",
            ])
            .args(more);
        let output = command.assert().code(2).get_output().clone();
        String::from_utf8(output.stderr)
            .unwrap()
            .contains("--machine q35")
    };
    assert!(!told(2815, &[]));
    assert!(told(2816, &[]) && told(8192, &[]));
    assert!(!told(8192, &["--machine", "pc"]));
}
