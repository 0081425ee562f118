//! Whatever a guest is and its memory is made of, it is traced with the same
//! result, and QEMU goes on running all the while.

use std::fs;
use std::time::{Duration, Instant};

use predicates::prelude::*;
use xftrace::callflow::{events, Kernels, Limits};
use xftrace::kernel::{has_banner, probe, Symbols};
use xftrace::ram::{Access, FileRam, Layout, MachineKind};
use xftrace::session::{list, Session};
use xftrace_lab::{wait_for, Backing, Domain, HugePages, Meanwhile, Row};

use crate::integrity::memory_is_clean;
use crate::lab::TestGuest;
use crate::watch::unstopped;

/// How many times the guest opens, reads and closes: nine megabytes of records.
const LOOPS: u64 = 1000;
/// Room for all of them in the ring of one CPU, so that nothing is lost on a
/// machine that is busy, however late it is read.
const BUFFER: &str = "16M";
const LOOP_TIME: Duration = Duration::from_secs(120);
const SOON: Duration = Duration::from_secs(30);
/// How long it may take to find the kernel of a guest of this size.
const LARGE: (u64, Duration) = (64 << 10, Duration::from_millis(100));
/// The module that is plugged in, and what of it the rings have to take.
const DIMM_MIB: u64 = 128;
const RINGS_MIB: u64 = 48;

/// Starts the domain of a row as it is, enrols it while it runs, and traces
/// the program in it.
pub(crate) fn every_call(row: &Row) {
    let _pages = match row.backing {
        Backing::Huge | Backing::HugeRetained => Some(HugePages::for_guest(row.memory).unwrap()),
        _ => None,
    };
    let guest = TestGuest::define_alone(&row.domain(""));
    let dir = tempfile::tempdir().expect("a directory");
    let name = row.name.as_str();
    let xftrace = |arguments: &[&str]| {
        let mut command = guest.xftrace(dir.path());
        let done = command.args(arguments).assert().success();
        String::from_utf8(done.get_output().stdout.clone()).expect("text")
    };
    guest.start().unwrap();
    let map = &guest.lab().artifacts(guest.kernel()).unwrap().system_map;
    let (enrolled, output, status) = unstopped(&guest, || {
        // Its helper starts with this, and looks for the guest's memory and kernel.
        let enrolled = xftrace(&["enroll", name, "--symbols", map.to_str().unwrap()]);
        let mut on = vec!["on", "-d", name, "--interval", "20ms"];
        if row.meanwhile != Meanwhile::Dimm {
            on.extend(["--buffer-size", BUFFER]);
        }
        xftrace(&[&on[..], &["sys_openat", "sys_read"]].concat());
        if row.meanwhile == Meanwhile::Dimm {
            plug_in(&guest);
            // New pages of a ring are taken from the highest memory there is.
            let grow = "echo 32768 >/sys/kernel/tracing/buffer_size_kb";
            guest.run(grow).unwrap().success().unwrap();
            let left = free_above_4g(&guest);
            assert!(left < (DIMM_MIB - RINGS_MIB) << 8, "{left} pages are free");
        }
        let mut run = guest.spawn(&format!("rwloop {LOOPS}")).unwrap();
        if row.meanwhile == Meanwhile::Balloon {
            balloon(&guest, row.memory);
        }
        let output = run.wait(LOOP_TIME).unwrap().success().unwrap();
        let kernel = guest.lab().artifacts(guest.kernel()).unwrap().bzimage;
        memory_is_clean(&guest, &kernel);
        let status = xftrace(&["status", "-d", name]);
        xftrace(&["off", "-d", name]);
        (enrolled, output, status)
    });

    let pid = output.lines().find_map(|line| line.strip_prefix("pid "));
    let pid: i32 = pid.expect("a pid").parse().expect("a number");
    let sessions = list(&guest.lab().sessions(name));
    let session = Session::open(&sessions[0]).expect("a session");
    let names = Kernels::of(&session).expect("its symbols");
    let mut flow = events(session.items(), &names, Limits::default());
    for event in flow.by_ref() {
        event.expect("an event");
    }
    let tally = flow.tally();
    let counters = session.meta.counters;
    let roots = ["__x64_sys_read", "__x64_sys_openat"].map(|root| tally.roots_of(root, Some(pid)));
    // One more open: the program makes its file first.
    let findings = fs::read_to_string(sessions[0].join("findings.jsonl"));
    assert_eq!(roots, [LOOPS, LOOPS + 1], "{counters:?}, {findings:?}");
    assert_eq!((tally.forged.total(), tally.lost_places.total()), (0, 0));
    assert_eq!((counters.tampered, counters.damaged), (0, 0));
    let levels: Vec<u8> = session.meta.boots.iter().map(|boot| boot.levels).collect();
    let four = row.cpu == "max,-la57";
    assert_eq!(levels, [if four { 4 } else { 5 }]);

    tells_what_it_is(row, &enrolled, &status);
    if row.backing == Backing::Anon {
        holes_stay_holes(&guest);
    }
    if row.memory >= LARGE.0 {
        found_at_once(&status, map, row.memory);
    }
    let linked = match row.backing {
        Backing::HugeRetained => "640\n",
        _ => "",
    };
    assert_eq!(left_linked(&guest), linked);
    guest.shutdown().unwrap();
    assert_eq!(left_linked(&guest), "");
}

/// What `enroll` and `status` say of the memory.
fn tells_what_it_is(row: &Row, enrolled: &str, status: &str) {
    assert!(
        enrolled.contains("at once, without a restart"),
        "{enrolled}"
    );
    let one = row.cells == 0 && row.meanwhile != Meanwhile::Dimm;
    let (parts, restart): (&[&str], _) = match row.backing {
        Backing::File if one => (&["/pc.ram\n"], false),
        Backing::File => (&["/ram-node0\n"], false),
        Backing::Memfd => (&["/memfd:memory-backend-memfd"], false),
        Backing::Anon => (&["/mem\n"], true),
        // Stock QEMU unlinks the file at once.
        Backing::Huge => (&["qemu_back_mem.", "(deleted)"], false),
        Backing::HugeRetained => (&["qemu_back_mem."], false),
        Backing::Private => panic!("that is refused"),
    };
    for part in parts {
        assert!(status.contains(part), "no {part:?} in: {status}");
    }
    let deleted = matches!(row.backing, Backing::Huge | Backing::Memfd);
    assert_eq!(status.contains("(deleted)"), deleted, "{status}");
    for (number, of) in [
        ("node1", row.cells == 2),
        ("dimm0", row.meanwhile == Meanwhile::Dimm),
    ] {
        let of = of && row.backing == Backing::File;
        assert_eq!(status.contains(&format!("{number}\n")), of, "{status}");
    }
    if row.backing == Backing::Memfd {
        let modules = usize::from(row.meanwhile == Meanwhile::Dimm);
        assert_eq!(status.matches("/memfd:").count(), 1 + modules, "{status}");
    }
    assert_eq!(enrolled.contains("its memory is anonymous"), restart);
    let says = enrolled.contains(&format!("virsh shutdown {}", row.name));
    assert_eq!(says, restart, "{enrolled}");
}

/// Its memory did not become a file, and no page more was used for holes.
fn holes_stay_holes(guest: &TestGuest) {
    let pid = guest.qemu_pid().unwrap();
    let memory = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let used = memory
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"));
    let used = used.unwrap().trim().trim_end_matches(" kB").parse::<u64>();
    assert!(used.unwrap() < 2 << 20, "{memory}");
}

/// The kernel is found quickly in a guest of which most was never touched.
fn found_at_once(status: &str, map: &std::path::Path, mib: u64) {
    let file = status
        .split_whitespace()
        .find(|word| word.ends_with("/pc.ram"));
    let layout = Layout::pc(mib << 20, MachineKind::Q35).expect("a layout");
    let ram = FileRam::open(file.unwrap().as_ref(), Access::ReadOnly, layout).expect("mapped");
    let symbols = Symbols::load(map).expect("symbols");
    let offset = symbols.banner_offset().expect("a banner");
    let once = || {
        let started = Instant::now();
        // As is asked first of each kernel that is known, and then of the one that fits.
        assert!(has_banner(&ram, offset, None).expect("a search"));
        assert_eq!(probe(&ram, &symbols).expect("a search").len(), 1);
        started.elapsed()
    };
    let took = (0..5).map(|_| once()).min().expect("five times");
    println!("found in {took:?}");
    assert!(took < LARGE.1, "{took:?}");
}

/// Plugs a memory module in and has the guest use it, for its kernel too.
fn plug_in(guest: &TestGuest) {
    let xml = guest.lab().dir().join("boot/dimm.xml");
    let text = format!(
        "<memory model='dimm'><target><size unit='MiB'>{DIMM_MIB}</size><node>0</node></target>\
         </memory>"
    );
    fs::write(&xml, text).unwrap();
    let lab = guest.lab();
    lab.virsh(&[
        "attach-device",
        guest.name(),
        xml.to_str().unwrap(),
        "--live",
    ])
    .unwrap();
    let online = "cd /sys/devices/system/memory; for block in memory*/state; do \
                  grep -q offline $block && echo online_kernel >$block; done; \
                  ! grep -q offline memory*/state";
    wait_for(SOON, || {
        // Its kernel may be about to add it.
        let all = guest.run(online)?.status == 0;
        Ok((all && free_above_4g(guest) > 0).then_some(()))
    })
    .unwrap();
}

/// How many pages are free in the zone above 4 GiB.
fn free_above_4g(guest: &TestGuest) -> u64 {
    let zone = "sed -n '/zone *Normal/,/nr_free_pages/s/.*nr_free_pages *//p' /proc/zoneinfo";
    let said = guest.run(zone).unwrap().success().unwrap();
    said.trim().parse().unwrap_or(0)
}

/// Takes memory away from the guest, and gives it back.
fn balloon(guest: &TestGuest, mib: u64) {
    let total = || -> anyhow::Result<u64> {
        let total = "sed -n 's/MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo";
        Ok(guest.run(total)?.success()?.trim().parse()?)
    };
    let whole = total().unwrap();
    let taken = mib << 10 >> 2;
    let left = (mib << 10) - taken;
    for (size, is) in [(left, whole - taken), (mib << 10, whole)] {
        guest
            .lab()
            .virsh(&["setmem", guest.name(), &size.to_string(), "--live"])
            .unwrap();
        wait_for(SOON, || Ok((total()? == is).then_some(()))).unwrap();
    }
}

/// The modes of the memory files in the directory of huge pages.
fn left_linked(guest: &TestGuest) -> String {
    let mut find = guest.lab().command("/".as_ref(), "find").unwrap();
    find.arg(guest.lab().dir().join("hugepages")).args([
        "-name",
        "qemu_back_mem.*",
        "-printf",
        "%m\\n",
    ]);
    String::from_utf8(find.output().unwrap().stdout).unwrap()
}

#[test]
fn a_private_file_is_refused_with_the_way_out() {
    let guest = TestGuest::define(&Domain {
        backing: Backing::Private,
        ..Domain::new("back-private")
    });
    let dir = tempfile::tempdir().expect("a directory");
    guest.start().unwrap();
    let mut enroll = guest.xftrace(dir.path());
    enroll
        .args(["enroll", "back-private"])
        .assert()
        .success()
        .stdout(
            predicate::str::contains("the guest's writes never reach it")
                .and(predicate::str::contains("virsh start back-private")),
        );
    let mut on = guest.xftrace(dir.path());
    on.args(["on", "-d", "back-private", "sys_read"])
        .assert()
        .code(2);
}

/// Nothing tells which of them is which, and what a guest has in them could lie.
#[test]
fn cells_in_memfds_of_one_size_are_refused_with_the_way_out() {
    let guest = TestGuest::define(&Domain {
        backing: Backing::Memfd,
        cells: 2,
        ..Domain::new("back-cells")
    });
    let dir = tempfile::tempdir().expect("a directory");
    guest.start().unwrap();
    let run = |arguments: &[&str]| {
        let mut xftrace = guest.xftrace(dir.path());
        xftrace.args(arguments).assert()
    };
    let said = predicate::str::contains("As it runs now, it cannot be traced: QEMU has 2 mappings");
    run(&["enroll", "back-cells"]).success().stdout(said);
    let wanted = || {
        let two = predicate::str::contains("QEMU has 2 mappings that could be ram-node0");
        two.and(predicate::str::contains("make that 'file'"))
    };
    run(&["doctor", "back-cells"]).code(2).stdout(wanted());
    run(&["on", "-d", "back-cells", "sys_read"])
        .code(2)
        .stderr(wanted());
}
