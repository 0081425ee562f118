//! Where the guest does not go along, or the disk: a trace ends when it is told
//! to and not before, and the guest's tracer is nop again as soon as it can be.

use std::process::Command;
use std::time::Duration;

use xftrace::ring::record::LostWhy;
use xftrace::session::{EndReason, Session};
use xftrace_lab::wait_for;

use crate::lifecycle::{lost, pid_of, recorded_reads};
use crate::traced::Traced;

/// Longer than anything here takes on a busy machine.
const SOON: Duration = Duration::from_secs(60);

impl Traced {
    fn tracer(&self) -> String {
        let output = self.run("cat /sys/kernel/tracing/current_tracer").unwrap();
        output.success().unwrap().trim().to_owned()
    }
}

#[test]
fn a_guest_that_holds_its_trace_pipe_ends_no_later_trace() {
    let traced = Traced::start_alone("pipe");
    traced.on(&["sys_read"]);
    assert_eq!(traced.tracer(), "function_graph");
    // One that reads gets the file's end when recording stops.
    let mut holder = traced
        .spawn("exec 9</sys/kernel/tracing/trace_pipe; exec sleep 300")
        .unwrap();
    std::thread::sleep(Duration::from_secs(1));
    let off = traced.command(&["off"]).assert().code(2);
    let said = String::from_utf8_lossy(&off.get_output().stderr).into_owned();
    assert!(
        said.contains("is off: ") && said.contains("not nop yet") && said.contains("trace_pipe"),
        "{said}"
    );
    assert_eq!(traced.tracer(), "function_graph");
    assert!(traced.dir().join("trace_graph.txt").exists());
    let on = traced.command(&["on", "sys_read"]).assert().code(2);
    let said = String::from_utf8_lossy(&on.get_output().stderr).into_owned();
    assert!(said.contains("trace_pipe"), "{said}");

    holder.kill(9).unwrap();
    holder.wait(SOON).unwrap();
    wait_for(SOON, || Ok((traced.tracer() == "nop").then_some(())))
        .unwrap_or_else(|_| panic!("the tracer stays: {}", traced.log()));
    traced.on(&["sys_read"]);
    traced.run_for("rwloop 500", SOON).unwrap();
    let session = traced.off();
    assert_eq!(traced.tracer(), "nop");
    let counters = session.meta.counters;
    assert!(counters.records >= 1000, "{counters:?}");
    assert_eq!((counters.lost, counters.forged), (0, 0), "{counters:?}");
}

#[test]
fn a_full_disk_ends_no_trace() {
    let traced = Traced::start_alone("full");
    let lab = traced.lab();
    let inside = |program: &str, arguments: &[&str]| {
        let mut command = lab.command(traced.dir(), program).unwrap();
        assert!(command.args(arguments).status().unwrap().success());
    };
    let map = lab.artifacts(traced.kernel()).unwrap().system_map;
    let map = std::fs::metadata(map).unwrap().len();
    let sessions = "/var/log/libvirt/qemu/full.xftrace";
    let ballast = format!("{sessions}/ballast");
    let size = format!("size={}", (map + (8 << 20)).next_multiple_of(4096));
    inside("mkdir", &["-m", "700", "-p", sessions]);
    inside("mount", &["-t", "tmpfs", "-o", &size, "none", sessions]);
    inside("truncate", &["-s", "0", &ballast]);
    traced.on(&["sys_read"]);
    traced.run_for("rwloop 200", SOON).unwrap();
    // As much as there is room for.
    inside(
        "sh",
        &["-c", &format!("cat /dev/zero >{ballast} 2>/dev/null; true")],
    );
    traced.run_for("rwloop 20000", SOON).unwrap();
    std::thread::sleep(Duration::from_secs(3));
    let status = traced.status().unwrap();
    let trace = status.trace.expect("the trace goes on");
    assert!(trace.counters.unstored_bytes > 0, "{:?}", trace.counters);
    inside("rm", &[&ballast]);
    std::thread::sleep(Duration::from_secs(1));
    let last = traced.run_for("rwloop 300", SOON).unwrap();
    let last = last.success().unwrap();
    traced.command(&["off"]).assert().success();

    let copy = traced.dir().join("copy");
    inside("cp", &["-a", sessions, copy.to_str().unwrap()]);
    inside("umount", &[sessions]);
    let session = Session::open(&xftrace::session::list(&copy)[0]).unwrap();
    assert_eq!(session.meta.end, Some(EndReason::Off));
    let pid = pid_of(&last);
    assert_eq!(recorded_reads(&session, 1, pid), 300);
    let (_, places) = lost(&session, LostWhy::NotStored);
    assert!(places > 0, "no hole where nothing could be stored");
}

/// A block device of a file.
struct LoopDevice(String);

impl LoopDevice {
    fn of(file: &str) -> Self {
        let mut losetup = Command::new("losetup");
        let output = losetup.args(["--find", "--show", file]).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        Self(String::from_utf8(output.stdout).unwrap().trim().to_owned())
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // At once, or once nobody has it mounted.
        let detached = Command::new("losetup").args(["--detach", &self.0]).status();
        assert!(detached.is_ok_and(|status| status.success()) || std::thread::panicking());
    }
}

/// Whoever writes to a file system that is frozen waits, as for any storage that stalls.
/// The guest meanwhile records several times what its ring buffers hold.
#[test]
fn a_disk_that_stalls_costs_no_record() {
    const RINGS: u64 = 2 * (8 << 20);
    const READS: u64 = 20_000;
    let traced = Traced::start_alone("stalled");
    let lab = traced.lab();
    let inside = |program: &str, arguments: &[&str]| {
        let mut command = lab.command(traced.dir(), program).unwrap();
        let output = command.args(arguments).output().unwrap();
        assert!(
            output.status.success(),
            "{program} {arguments:?}: {output:?}"
        );
    };
    let sessions = "/var/log/libvirt/qemu/stalled.xftrace";
    let disk = traced.dir().join("disk");
    let disk = disk.to_str().unwrap();
    inside("mkdir", &["-m", "700", "-p", sessions]);
    inside("truncate", &["-s", "600M", disk]);
    inside("mkfs.ext4", &["-q", disk]);
    // The lab has a /dev of its own, without such devices.
    let device = LoopDevice::of(disk);
    let node = traced.dir().join("loop");
    let mut copy = Command::new("cp");
    let copied = copy.args(["-a", &device.0]).arg(&node).status();
    assert!(copied.unwrap().success());
    inside("mount", &[node.to_str().unwrap(), sessions]);
    traced.on(&["--buffer-size=8M", "--interval=100ms", "sys_read"]);
    traced.run_for("rwloop 200", SOON).unwrap();

    let bytes = |status: xftrace::helper::protocol::Status| status.trace.unwrap().counters.bytes;
    let before = bytes(traced.status().unwrap());
    // The mount is the lab's own.
    let stored = || {
        let mut command = lab.command(traced.dir(), "sh").unwrap();
        let sizes = format!("stat -c %s {sessions}/*/ring/*");
        let output = command.args(["-c", &sizes]).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    inside("fsfreeze", &["-f", sessions]);
    // Not to be left frozen, whatever comes of this.
    let frozen = stored();
    let run = traced.run_for(&format!("rwloop {READS}"), SOON);
    let (status, thawed) = (traced.status(), stored());
    inside("fsfreeze", &["-u", sessions]);
    let run = run.unwrap().success().unwrap();
    let meanwhile = bytes(status.unwrap()) - before;
    assert!(meanwhile > 2 * RINGS, "only {meanwhile} bytes came");
    assert_eq!(thawed, frozen, "the disk did not stall");

    let pid = pid_of(&run);
    traced.command(&["off"]).assert().success();
    let copy = traced.dir().join("copy");
    inside("cp", &["-a", sessions, copy.to_str().unwrap()]);
    inside("umount", &[sessions]);
    let session = Session::open(&xftrace::session::list(&copy)[0]).unwrap();
    let counters = session.meta.counters;
    assert_eq!(
        (counters.lost, counters.forged, counters.unstored_bytes),
        (0, 0, 0),
        "{counters:?}"
    );
    // A key is noted before it is handed out, so none was meanwhile.
    assert!(counters.late_keys > 0, "{counters:?}");
    assert_eq!(recorded_reads(&session, 1, pid), READS);
}
