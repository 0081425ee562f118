//! Enrolment, the hook and memory files against a real libvirtd with real
//! QEMU processes, in a mount namespace of its own (tests/libvirt). The guests
//! have nothing to boot: what they do does not matter here.
//!
//! These need root, libvirtd and QEMU, and are run by `make test`:
//! `cargo test --test libvirtd -- --ignored`.

use std::collections::HashSet;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{LazyLock, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

struct Daemon {
    process: Child,
    dir: PathBuf,
}

/// One for all tests of this process; it ends with its standard input, that is
/// with this process.
static DAEMON: LazyLock<Daemon> = LazyLock::new(Daemon::start);

/// Held for writing by the test that restarts the daemon.
static STAYS: RwLock<()> = RwLock::new(());

fn stays() -> RwLockReadGuard<'static, ()> {
    STAYS.read().unwrap_or_else(PoisonError::into_inner)
}

impl Daemon {
    fn start() -> Daemon {
        // Where the test run is killed, what is left lies with the build.
        let dir =
            Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("libvirtd-{}", std::process::id()));
        // What an earlier run left, whose process number came round again.
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).unwrap();
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/libvirt/private-libvirtd");
        let mut process = Command::new("unshare")
            .args(["--mount", "--propagation", "private"])
            .arg(script)
            .arg(&dir)
            .arg(assert_cmd::cargo::cargo_bin!("xftrace"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = String::new();
        let stdout = process.stdout.take().unwrap();
        BufReader::new(stdout).read_line(&mut said).unwrap();
        assert_eq!(said, "ready\n", "no private libvirtd (is this root?)");
        Daemon { process, dir }
    }

    /// Runs a command where the daemon is.
    fn run(&self, program: &Path, arguments: &[&str]) -> Output {
        Command::new("nsenter")
            .arg(format!("--mount=/proc/{}/ns/mnt", self.process.id()))
            .arg(program)
            .args(arguments)
            .env("XFTRACE_CONFIG", self.dir.join("xftrace.toml"))
            .env_remove("LIBVIRT_DEFAULT_URI")
            .output()
            .unwrap()
    }

    fn virsh(&self, arguments: &[&str]) -> String {
        let output = self.run(Path::new("virsh"), &[&["-q"], arguments].concat());
        assert!(output.status.success(), "{arguments:?}: {}", err(&output));
        out(&output)
    }

    fn xftrace(&self, arguments: &[&str]) -> Output {
        self.run(assert_cmd::cargo::cargo_bin!("xftrace"), arguments)
    }

    fn define(&self, xml: &str) {
        let file = tempfile::NamedTempFile::new_in(&self.dir).unwrap();
        std::fs::write(file.path(), xml).unwrap();
        self.virsh(&["define", file.path().to_str().unwrap()]);
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    /// The helpers that the hook has started for the domain, the oldest first.
    fn helpers(&self, domain: &str) -> Vec<u32> {
        let start = format!("hook: domain '{domain}': helper started as process ");
        let log = self.log();
        let lines = log.lines().filter_map(|line| line.split_once(&start));
        lines
            .filter_map(|(_, pid)| pid.trim().parse().ok())
            .collect()
    }

    fn restart(&self) {
        let pid = std::fs::read_to_string(self.dir.join("libvirtd.pid")).unwrap();
        let pid = pid.trim();
        assert!(self.run(Path::new("kill"), &[pid]).status.success());
        wait_for("the daemon's end", || !is_running(pid.parse().unwrap()));
        let file = self.dir.join("libvirtd.pid");
        let arguments = ["-d", "-p", file.to_str().unwrap()];
        let output = self.run(Path::new("libvirtd"), &arguments);
        assert!(output.status.success(), "{}", err(&output));
        wait_for("the daemon", || {
            self.run(Path::new("virsh"), &["-q", "list"])
                .status
                .success()
        });
    }
}

fn out(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn err(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn wait_for(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "{what} does not come"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Whether the process is there and has not ended. A child of nobody may stay
/// as a zombie where process 1 does not reap.
fn is_running(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat
        .rsplit_once(") ")
        .and_then(|(_, rest)| rest.chars().next());
    state.is_some_and(|state| state != 'Z')
}

/// A domain that does nothing. `more` goes in after its memory, `devices` to
/// its devices.
fn domain(name: &str, more: &str, devices: &str) -> String {
    format!(
        "<domain type='qemu'><name>{name}</name><memory unit='MiB'>64</memory>{more}\
         <os><type arch='x86_64' machine='q35'>hvm</type></os><features><acpi/></features>\
         <devices><emulator>/usr/bin/qemu-system-x86_64</emulator>\
         <memballoon model='none'/>{devices}</devices></domain>"
    )
}

const SHARED: &str = "<memoryBacking><source type='file'/><access mode='shared'/></memoryBacking>";

#[test]
#[ignore = "needs root, libvirtd and QEMU"]
fn a_definition_that_went_through_libvirt_comes_back_as_it_was() {
    let (daemon, _stays) = (&*DAEMON, stays());
    let graphics = "<graphics type='vnc' port='-1' passwd='secret'/>";
    let cases = [
        ("plain", String::new(), ""),
        ("with a password", String::new(), graphics),
        (
            "described",
            "<title>a &lt; b</title><description>c &amp; d</description>\
             <metadata><o:x xmlns:o='urn:other'><o:y z='1'>text</o:y></o:x></metadata>"
                .to_owned(),
            "",
        ),
        (
            "locked",
            "<memoryBacking><nosharepages/><discard/></memoryBacking>".to_owned(),
            "",
        ),
        (
            "private",
            "<memoryBacking><source type='file'/><access mode='private'/></memoryBacking>"
                .to_owned(),
            "",
        ),
        (
            "anonymous",
            "<memoryBacking><source type='anonymous'/><allocation mode='immediate'/>\
             </memoryBacking>"
                .to_owned(),
            "",
        ),
        ("shared", SHARED.to_owned(), ""),
        (
            "numa",
            "<vcpu>2</vcpu><cpu><numa><cell id='0' cpus='0' memory='32' unit='MiB'/>\
             <cell id='1' cpus='1' memory='32' unit='MiB'/></numa></cpu>"
                .to_owned(),
            "",
        ),
    ];
    for (name, more, devices) in cases {
        let name = format!("xml {name}");
        daemon.define(&domain(&name, &more, devices));
        let dump = || daemon.virsh(&["dumpxml", "--inactive", "--security-info", &name]);
        let before = dump();
        let enroll = || {
            let output = daemon.xftrace(&["enroll", &name, "-f", "sys_read", "-i", "250ms"]);
            assert_eq!(output.status.code(), Some(0), "{name}: {}", err(&output));
            out(&output)
        };
        assert!(enroll().contains("is enrolled"), "{name}");
        let enrolled = dump();
        for part in [
            "<source type='file'/>",
            "<access mode='shared'/>",
            "functions=\"sys_read\" interval=\"250ms\"",
        ] {
            assert!(enrolled.contains(part), "{name}: {enrolled}");
        }
        assert!(enroll().contains("already"), "{name}");
        assert_eq!(dump(), enrolled, "{name}");
        let output = daemon.xftrace(&["unenroll", &name]);
        assert_eq!(output.status.code(), Some(0), "{name}: {}", err(&output));
        assert_eq!(dump(), before, "{name}");
        daemon.virsh(&["undefine", &name]);
    }
}

#[test]
#[ignore = "needs root, libvirtd and QEMU"]
fn a_domain_lives_as_if_its_helper_were_not_there() {
    let daemon = &*DAEMON;
    let _alone = STAYS.write().unwrap_or_else(PoisonError::into_inner);
    let name = "life 1";
    daemon.define(&domain(name, "", ""));
    let output = daemon.xftrace(&["enroll", name]);
    assert_eq!(output.status.code(), Some(0), "{}", err(&output));
    let uuid = daemon.virsh(&["domuuid", name]).trim().to_owned();
    let saved = daemon.dir.join("xftrace").join(format!("{uuid}.xml"));

    let start = Instant::now();
    daemon.virsh(&["start", name]);
    assert!(
        start.elapsed() < Duration::from_secs(10),
        "{:?}",
        start.elapsed()
    );
    let qemu = daemon.run(
        Path::new("cat"),
        &[&format!("/run/libvirt/qemu/{name}.pid")],
    );
    let qemu: u32 = out(&qemu).trim().parse().unwrap();
    let [first] = daemon.helpers(name)[..] else {
        panic!("{}", daemon.log())
    };
    assert!(is_running(first), "{}", daemon.log());
    assert!(saved.exists());
    // It leaves the session it was started in first of all.
    wait_for("its own session", || {
        statistics(first)[3] == first.to_string()
    });
    is_detached(first);

    // A helper that is killed.
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(i32::try_from(first).unwrap()),
        nix::sys::signal::Signal::SIGKILL,
    )
    .unwrap();
    wait_for("the helper's end", || !is_running(first));
    assert!(is_running(qemu));
    let doctor = out(&daemon.xftrace(&["doctor", name]));
    assert!(doctor.contains("missing  its helper"), "{doctor}");
    assert!(doctor.contains("ok       memory pc.ram is "), "{doctor}");
    assert!(
        doctor.contains("ok       libvirt's daemon knows the hook"),
        "{doctor}"
    );

    // A daemon that starts again finds the domain and asks the hook.
    daemon.restart();
    assert!(is_running(qemu));
    wait_for("a new helper", || daemon.helpers(name).len() == 2);
    let second = daemon.helpers(name)[1];
    wait_for("its lock", || {
        out(&daemon.xftrace(&["list"]))
            .lines()
            .any(|line| line.starts_with(name) && line.ends_with("runs"))
    });
    daemon.restart();
    assert!(is_running(qemu) && is_running(second));
    assert_eq!(
        daemon.helpers(name).len(),
        2,
        "a second helper: {}",
        daemon.log()
    );

    // The helper ends with QEMU, and the next start has one again.
    daemon.virsh(&["destroy", name]);
    wait_for("the helper's end", || !is_running(second));
    assert!(!saved.exists());
    for round in 0..3 {
        daemon.virsh(&["start", name]);
        wait_for("its helper", || {
            out(&daemon.xftrace(&["list"]))
                .lines()
                .any(|line| line.starts_with(name) && line.ends_with("runs"))
        });
        let live = daemon.virsh(&["domstate", name]);
        assert_eq!(live.trim(), "running", "round {round}");
        daemon.virsh(&["destroy", name]);
    }
    daemon.virsh(&["undefine", name]);
}

/// /proc/PID/stat from the third field on, proc(5): state, parent, process
/// group, session, terminal, ..
fn statistics(pid: u32) -> Vec<String> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let (_, rest) = stat.rsplit_once(") ").unwrap();
    rest.split(' ').map(str::to_owned).collect()
}

/// Whether a process holds nothing of whoever started it.
fn is_detached(pid: u32) {
    let read = |name: &str| std::fs::read_link(format!("/proc/{pid}/{name}")).unwrap();
    let pipes_of = |pid: u32| -> HashSet<PathBuf> {
        let fds = std::fs::read_dir(format!("/proc/{pid}/fd"))
            .unwrap()
            .flatten();
        let links = fds.filter_map(|fd| std::fs::read_link(fd.path()).ok());
        links
            .filter(|link| link.to_string_lossy().starts_with("pipe:"))
            .collect()
    };
    for fd in ["fd/0", "fd/1", "fd/2"] {
        assert_eq!(read(fd), Path::new("/dev/null"), "{fd}");
    }
    assert_eq!(pipes_of(pid), HashSet::new());
    assert_eq!(read("cwd"), Path::new("/"));
    let [_, _, group, session, terminal, ..] = &statistics(pid)[..] else {
        panic!()
    };
    let own = pid.to_string();
    assert_eq!((group, session, terminal.as_str()), (&own, &own, "0"));
    let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap();
    assert!(environment.starts_with(b"PATH="));
    assert_eq!(environment.iter().filter(|byte| **byte == 0).count(), 1);
}

#[test]
#[ignore = "needs root, libvirtd and QEMU"]
fn a_required_trace_that_cannot_be_keeps_the_domain_from_starting() {
    let (daemon, _stays) = (&*DAEMON, stays());
    let with = |name: &str, required: &str| {
        let metadata = format!(
            "<metadata><x:trace xmlns:x='urn:xftrace:domain:1.0' required='{required}'/>\
             </metadata>"
        );
        daemon.define(&domain(name, &metadata, ""));
    };
    with("required", "yes");
    let output = daemon.run(Path::new("virsh"), &["-q", "start", "required"]);
    assert!(!output.status.success());
    assert!(
        err(&output).contains("xftrace enroll required"),
        "{}",
        err(&output)
    );

    daemon.virsh(&["undefine", "required"]);

    with("desired", "no");
    daemon.virsh(&["start", "desired"]);
    let log = daemon.log();
    assert!(log.contains("domain 'desired' cannot be traced"), "{log}");
    daemon.virsh(&["destroy", "desired"]);
    daemon.virsh(&["undefine", "desired"]);
}

#[test]
#[ignore = "needs root, libvirtd and QEMU"]
fn a_domain_is_enrolled_by_its_name() {
    let (daemon, _stays) = (&*DAEMON, stays());
    daemon.define(&domain("by-name-1", SHARED, ""));
    daemon.define(&domain("by-name-2", "", ""));
    daemon.virsh(&["start", "by-name-1"]);
    daemon.virsh(&["start", "by-name-2"]);
    assert_eq!(daemon.helpers("by-name-1").len(), 1, "{}", daemon.log());
    assert_eq!(daemon.helpers("by-name-2").len(), 0);
    let log = daemon.log();
    assert!(
        log.contains("domain 'by-name-2' cannot be traced, though auto_enroll"),
        "{log}"
    );
    for name in ["by-name-1", "by-name-2"] {
        daemon.virsh(&["destroy", name]);
        daemon.virsh(&["undefine", name]);
    }
}

#[test]
#[ignore = "needs root, libvirtd and QEMU"]
fn the_doctor_knows_every_kind_of_memory() {
    let (daemon, _stays) = (&*DAEMON, stays());
    let numa = "<maxMemory slots='2' unit='MiB'>512</maxMemory><vcpu>2</vcpu><cpu><numa>\
                <cell id='0' cpus='0' memory='32' unit='MiB'/>\
                <cell id='1' cpus='1' memory='32' unit='MiB'/></numa></cpu>";
    let dimm = "<memory model='dimm'><target><size unit='MiB'>128</size><node>0</node></target>\
                </memory>";
    let private = "<memoryBacking><source type='file'/><access mode='private'/></memoryBacking>";
    let memfd = "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>";
    let cases: [(&str, String, &str, &[&str]); 5] = [
        (
            "memory shared",
            SHARED.to_owned(),
            "",
            &["ok       memory pc.ram is "],
        ),
        (
            "memory numa",
            format!("{SHARED}{numa}"),
            dimm,
            &[
                "ok       memory ram-node0 is ",
                "ok       memory ram-node1 is ",
            ],
        ),
        (
            "memory anonymous",
            String::new(),
            "",
            &["missing  a restart: as it runs, its memory is not file-backed"],
        ),
        (
            "memory private",
            private.to_owned(),
            "",
            &["its memory file is private (access mode='private')"],
        ),
        (
            "memory memfd",
            memfd.to_owned(),
            "",
            &["its memory is a memfd"],
        ),
    ];
    for (name, more, devices, says) in cases {
        daemon.define(&domain(name, &more, devices));
        daemon.virsh(&["start", name]);
        let output = daemon.xftrace(&["doctor", name]);
        let doctor = out(&output);
        for part in says {
            assert!(doctor.contains(part), "{name}: {doctor}");
        }
        assert_eq!(output.status.code(), Some(2), "{doctor}");
        daemon.virsh(&["destroy", name]);
        daemon.virsh(&["undefine", name]);
    }
}

#[test]
#[ignore = "needs root, libvirtd and QEMU"]
fn a_memory_file_that_goes_away_under_the_domain_is_told() {
    let (daemon, _stays) = (&*DAEMON, stays());
    let name = "gone";
    daemon.define(&domain(name, SHARED, ""));
    daemon.virsh(&["start", name]);
    let doctor = || out(&daemon.xftrace(&["doctor", name]));
    let said = doctor();
    let line = said
        .lines()
        .find(|line| line.contains("memory pc.ram is "))
        .unwrap();
    let path = line.split("pc.ram is ").nth(1).unwrap();
    let path = Path::new(path.split(" (QEMU").next().unwrap());

    // So that it does not touch what is missing, which would end it.
    daemon.virsh(&["suspend", name]);
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    file.set_len(32 << 20).unwrap();
    let said = doctor();
    assert!(
        said.contains("was truncated: it has 33554432 bytes"),
        "{said}"
    );
    file.set_len(64 << 20).unwrap();
    assert!(doctor().contains("ok       memory pc.ram is "));
    std::fs::remove_file(path).unwrap();
    let said = doctor();
    assert!(said.contains("was unlinked"), "{said}");
    daemon.virsh(&["destroy", name]);
    daemon.virsh(&["undefine", name]);
}

#[test]
#[ignore = "needs root, libvirtd and QEMU"]
fn commands_refuse_domains_that_cannot_be_traced() {
    let (daemon, _stays) = (&*DAEMON, stays());
    daemon.define(&domain("refused", "", ""));
    let on = || {
        let output = daemon.xftrace(&["on", "-d", "refused", "sys_read"]);
        assert_eq!(output.status.code(), Some(2));
        err(&output)
    };
    assert!(on().contains("domain 'refused' is not running: start it with `virsh start refused`"));
    daemon.virsh(&["start", "refused"]);
    assert!(on().contains("is not enrolled: type `xftrace enroll refused`"));
    let output = daemon.xftrace(&["enroll", "refused"]);
    assert!(
        out(&output).contains("virsh shutdown refused"),
        "{}",
        out(&output)
    );
    daemon.virsh(&["destroy", "refused"]);
    daemon.virsh(&["undefine", "refused"]);

    let file = daemon.dir.join("transient.xml");
    std::fs::write(&file, domain("transient", "", "")).unwrap();
    daemon.virsh(&["create", file.to_str().unwrap()]);
    let output = daemon.xftrace(&["enroll", "transient"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(err(&output).contains("is transient"), "{}", err(&output));
    daemon.virsh(&["destroy", "transient"]);
}
