//! What is in the memory of a real guest of which nothing is traced: a clean kernel
//! is clean, which costs little to tell, a module that is on no list is found, and
//! the guest's saved memory is judged as the guest is. That each class of hooks is
//! found is for `detect.rs`.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use nix::sys::resource::{getrusage, UsageWho};
use nix::sys::time::TimeValLike;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::Value;
use xftrace::kernel::{find_all, Gva, Symbols};
use xftrace::ram::{ImageRam, Layout};
use xftrace_lab::{wait_for, Backing, Domain};

use crate::lab::{StoredKernel, TestGuest};

/// Bytes that are changed in a saved image, one in each piece of text.
const FLIPS: u64 = 200;
/// What a look at a clean guest of 1 GiB may take of the host's processors.
const COST: Duration = Duration::from_secs(1);

/// A guest whose kernel the store knows, vmlinuz and all.
struct Checked {
    guest: TestGuest,
    dir: tempfile::TempDir,
    _stored: StoredKernel,
}

impl Checked {
    fn start(name: &str, kernel: &str) -> Checked {
        let guest = TestGuest::define_alone(&Domain {
            kernel: kernel.to_owned(),
            backing: Backing::File,
            memory: 1024,
            ..Domain::new(name)
        });
        let dir = tempfile::tempdir().expect("a directory");
        let checked = Checked {
            _stored: guest.store_kernel(),
            guest,
            dir,
        };
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

/// A guest whose kernel is clean is found clean, whatever traces it just then.
/// `kernel` is the file that it boots.
pub(crate) fn memory_is_clean(guest: &TestGuest, kernel: &Path) {
    let dir = tempfile::tempdir().expect("a directory");
    let mut check = guest.xftrace(dir.path());
    check.args(["check", "--json", "-d", guest.name(), "--kernel"]);
    let output = check.arg(kernel).output().expect("xftrace ran");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let verdict: Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {said}"));
    let memory = &verdict["memory"];
    assert_eq!(memory["conclusion"], "clean", "{memory:#}");
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

fn memory_is_judged(name: &str, kernel: &str) {
    let checked = Checked::start(name, kernel);
    let before = children();
    let clean = checked.live();
    let cost = children().saturating_sub(before);
    checked.is_clean(clean);
    println!("{kernel}: a check took {cost:?} of processor time");
    assert!(cost < COST, "{cost:?}");

    file_of_proc_is_found(&checked);
    // It stays: nobody can unload it. It does nothing, so that there is no other way
    // to find it.
    let load = "insmod /lib/modules/hook_hidden.ko";
    checked.guest.run(load).unwrap().success().unwrap();
    let (status, verdict) = checked.live();
    let all = found(&verdict);
    let hidden = |(check, _, owner): &(String, String, String)| {
        check == "unowned-code" && owner.contains("nobody")
    };
    assert!(all.iter().any(hidden), "{verdict:#}");
    assert_eq!(
        (status, verdict["conclusion"].as_str()),
        (1, Some("findings"))
    );
    saved_agrees(&checked, &all);
}

/// A file of the kernel's in /proc with a module's operations is found, and no other.
fn file_of_proc_is_found(checked: &Checked) {
    let run = |command: &str| checked.guest.run(command).unwrap().success().unwrap();
    run("insmod /lib/modules/hook_procfile.ko && cat /proc/stat > /dev/null");
    let (_, verdict) = checked.live();
    let all = found(&verdict);
    let [(check, place, owner)] = all.as_slice() else {
        panic!("{verdict:#}");
    };
    assert_eq!((&**check, &**place), ("files", "proc_ops of /proc/stat"));
    assert!(owner.contains("hook_procfile"), "{owner}");
    run("rmmod hook_procfile");
    checked.is_clean(checked.live());
}

/// Commands of the guest's that put probes of tracefs where Ftrace has no site: at as
/// many instructions as there are where one function begins, at one of some others, which
/// become jumps, and where a function returns.
const PROBES: &str = "cd /sys/kernel/tracing && \
    { for at in $(seq 5 24); do echo p:p$at vfs_read+$at >> kprobe_events; done; \
    for f in ksys_read ksys_write vfs_statx do_sys_openat2 do_filp_open kernel_wait4; do \
        for at in $(seq 5 16); do echo p:$f $f+$at >> kprobe_events && break; done; \
    done; } 2>/dev/null; \
    echo r:back vfs_write >> kprobe_events && echo 1 > events/kprobes/enable && \
    echo function > current_tracer";

/// What the guest's own tracers do to the kernel is no finding, and a BPF program that
/// they run is one.
fn tracers_are_told_from_hooks(name: &str, kernel: &str) {
    let checked = Checked::start(name, kernel);
    let run = |command: &str| checked.guest.run(command).unwrap().success().unwrap();
    run(PROBES);
    // Optional: not every kernel has them.
    let fprobes = "cd /sys/kernel/tracing && echo f:fp vfs_open >> dynamic_events && \
        echo 1 > events/fprobes/enable";
    let fprobes = checked.guest.run(fprobes).unwrap().success().is_ok();
    // A kprobe is a jump once nobody can be in its instructions.
    let jumps = || {
        let list = checked.guest.run("cat /sys/kernel/debug/kprobes/list")?;
        Ok(list.text.contains("OPTIMIZED").then_some(()))
    };
    wait_for(Duration::from_secs(30), jumps).expect("a jump");
    let (status, verdict) = checked.live();
    let notes = verdict["memory"]["notes"].as_array().expect("notes");
    let noted = |what: &str| notes.iter().any(|note| note.to_string().contains(what));
    assert!(noted("kprobe at vfs_read+") && noted("function_trace_call"));
    assert_eq!(noted("fentry_dispatcher"), fprobes, "{notes:#?}");
    checked.is_clean((status, verdict));
    // Its trampoline stays, and calls what it did.
    run("echo nop > /sys/kernel/tracing/current_tracer");
    checked.is_clean(checked.live());

    for (event, check, place) in [
        ("kprobes/back", "kprobes", "kretprobe at vfs_write"),
        (
            "sched/sched_process_exec",
            "tracepoints",
            "event event_sched_process_exec",
        ),
    ] {
        run(&format!("bpfprobe {event}"));
        let (_, verdict) = checked.live();
        let all = found(&verdict);
        let is = |(of, at, owner): &(String, String, String)| {
            of == check && at.starts_with(place) && owner == "a BPF program"
        };
        assert!(
            !all.is_empty() && all.iter().all(is),
            "{event}: {verdict:#}"
        );
        run("killall bpfprobe");
        let clean = || Ok((found(&checked.live().1).is_empty()).then_some(()));
        wait_for(Duration::from_secs(30), clean).expect("a clean guest");
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
    assert_eq!(status, 1, "{verdict:#}");
    assert_eq!(found(&verdict), live);
    each_flipped_byte_is_found(checked, &path, live.len());
    std::fs::remove_file(path).expect("a dump");
}

/// The processor time of the commands that were run.
fn children() -> Duration {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).expect("usage");
    let used = usage.user_time() + usage.system_time();
    Duration::from_micros(used.num_microseconds().unsigned_abs())
}

/// Flips a bit in a byte of each piece of the kernel's text in a saved image, and
/// looks for each in what is found then.
fn each_flipped_byte_is_found(checked: &Checked, path: &Path, before: usize) {
    let map = &checked
        .guest
        .lab()
        .artifacts(checked.guest.kernel())
        .unwrap()
        .system_map;
    let symbols = Symbols::load(map).expect("symbols");
    let ram = ImageRam::open(path, Layout::flat).expect("an image");
    let kernel = find_all(&ram, &symbols).expect("a kernel").remove(0);
    drop(ram);
    let text = symbols.text();
    let piece = text.end.wrapping_sub(text.start) / FLIPS;
    let file = File::options()
        .read(true)
        .write(true)
        .open(path)
        .expect("a dump");
    let mut random = StdRng::seed_from_u64(1);
    let mut flipped = Vec::new();
    for number in 0..FLIPS {
        let within = number * piece + random.random_range(0..piece);
        let link = Gva(text.start.0 + within);
        let at = offset(&file, kernel.image_gpa(link).0);
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).expect("a byte");
        byte[0] ^= 1 << random.random_range(0..8);
        file.write_all_at(&byte, at).expect("a byte");
        flipped.push(kernel.runtime(link).0);
    }
    let (status, verdict) = checked.check(&["--memory", path.to_str().expect("a path")]);
    assert_eq!(status, 1);
    let findings = verdict["memory"]["findings"].as_array().expect("findings");
    // A change is told of from the beginning of the place that may be patched.
    let near = |at: u64| {
        let told = findings.iter().filter_map(|one| one["address"].as_u64());
        told.into_iter()
            .any(|address| address <= at && at - address < 256)
    };
    let missed: Vec<String> = flipped
        .into_iter()
        .filter(|&at| !near(at))
        .map(|at| format!("{:?}", symbols.lookup(kernel.link(Gva(at)))))
        .collect();
    assert_eq!(missed, Vec::<String>::new());
    assert!(
        findings.len() >= FLIPS as usize + before,
        "{}",
        findings.len()
    );
}

/// Where a guest physical address lies in an ELF dump of a guest's memory.
fn offset(file: &File, gpa: u64) -> u64 {
    let mut head = [0; 64];
    file.read_exact_at(&mut head, 0).expect("a head");
    let word = |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    let count = u64::from(u16::from_le_bytes([head[56], head[57]]));
    for number in 0..count {
        let mut part = [0; 56];
        let at = word(&head, 32) + number * part.len() as u64;
        file.read_exact_at(&mut part, at).expect("a program header");
        let (from, start, length) = (word(&part, 8), word(&part, 24), word(&part, 32));
        let load = part[0] == 1;
        if load && (start..start + length).contains(&gpa) {
            return from + (gpa - start);
        }
    }
    panic!("{gpa:#x} is not in the dump");
}

#[test]
fn the_memory_of_linux_6_1_is_judged() {
    memory_is_judged("memory61", "6.1");
}

#[test]
fn the_memory_of_linux_6_12_is_judged() {
    memory_is_judged("memory612", "6.12");
}

#[test]
fn tracers_of_linux_6_1_are_told_from_hooks() {
    tracers_are_told_from_hooks("tracers61", "6.1");
}

#[test]
fn tracers_of_a_stock_6_12_are_told_from_hooks() {
    tracers_are_told_from_hooks("tracers612", "stock-6.12-cloud");
}

/// An empty file system of FAT12, 32 KiB, and what mkfs.fat writes of it that the kernel
/// goes by (Documentation/filesystems/vfat.rst; the fields are those of struct
/// fat_boot_sector).
fn fat() -> Vec<u8> {
    let mut disk = vec![0; 32 << 10];
    let mut put = |at: usize, bytes: &[u8]| disk[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &[0xeb, 0x3c, 0x90]);
    // Sectors of 512 bytes, one a cluster, one reserved; one table; 16 entries in the
    // root; 64 sectors; a fixed disk; one sector a table.
    put(0x0b, &[0, 2, 1, 1, 0, 1, 16, 0, 64, 0, 0xf8, 1, 0]);
    put(0x1fe, &[0x55, 0xaa]);
    put(0x200, &[0xf8, 0xff, 0xff]);
    disk
}

/// The operations of a vfat are in fat.ko, and its type is in vfat.ko.
#[test]
fn a_file_system_of_two_modules_is_clean() {
    let checked = Checked::start("vfat", "stock-6.12-cloud");
    let guest = &checked.guest;
    let run = |command: &str| guest.run(command).unwrap().success().unwrap();
    for module in [
        "drivers/block/loop",
        "fs/nls/nls_cp437",
        "fs/nls/nls_ascii",
        "fs/fat/fat",
        "fs/fat/vfat",
    ] {
        run(&format!("insmod {}", guest.put_module(module)));
    }
    // Most of it is zeros.
    guest.put("/tmp/disk", &fat()[..1024]);
    run("dd if=/dev/zero of=/tmp/disk bs=512 seek=2 count=62 && mkdir /tmp/mounted");
    run("losetup /dev/loop0 /tmp/disk && mount -t vfat /dev/loop0 /tmp/mounted");
    run("echo x > /tmp/mounted/file && cat /tmp/mounted/file");
    checked.is_clean(checked.live());
}

/// What hosts of guests and of containers have their kernels do is clean: KVM, file
/// systems in layers, compressed memory, and BPF programs that are policies and filters.
/// One that a function of the kernel's calls is found.
#[test]
fn what_hosts_of_guests_and_containers_do_is_clean() {
    let checked = Checked::start("host", "stock-6.12-generic");
    let guest = &checked.guest;
    let run = |command: &str| guest.run(command).unwrap().success().unwrap();
    for module in [
        "virt/lib/irqbypass",
        "drivers/crypto/ccp/ccp",
        "arch/x86/kvm/kvm",
        "arch/x86/kvm/kvm-amd",
        "fs/overlayfs/overlay",
        "lib/lz4/lz4_compress",
        "lib/lz4/lz4hc_compress",
        "drivers/block/zram/zram",
    ] {
        run(&format!("insmod {}", guest.put_module(module)));
    }
    run("test -c /dev/kvm");
    run(
        "mkdir /tmp/disk && mount -t tmpfs none /tmp/disk && cd /tmp/disk && \
         mkdir lower upper work all && echo x > lower/file && mount -t overlay \
         -o lowerdir=lower,upperdir=upper,workdir=work none all && echo y >> all/file",
    );
    run("echo 16M > /sys/block/zram0/disksize && mkswap /dev/zram0 && swapon /dev/zram0");
    run("mount -t cgroup2 none /sys/fs/cgroup && ip link set lo up");
    run("bpfprobe cgroup /sys/fs/cgroup && bpfprobe xdp 1 && bpfprobe lsm bpf_lsm_file_open");
    run("ping -c 3 127.0.0.1");
    let (status, verdict) = checked.live();
    let notes = verdict["memory"]["notes"].to_string();
    for what in ["kvm", "bpf_lsm_file_open"] {
        assert!(notes.contains(what), "{notes}");
    }
    checked.is_clean((status, verdict));

    run("bpfprobe fentry vfs_read");
    let (_, verdict) = checked.live();
    let all = found(&verdict);
    let is = |(check, place, owner): &(String, String, String)| {
        println!("{check}: {place}: {owner}");
        check == "ftrace" && owner.contains("BPF")
    };
    assert!(!all.is_empty() && all.iter().all(is), "{verdict:#}");
    run("killall bpfprobe");
    let clean = || Ok(found(&checked.live().1).is_empty().then_some(()));
    wait_for(Duration::from_secs(30), clean).expect("a clean guest");
}

/// Its trampoline is made before the kernel has put its processor's NOPs into its own code.
#[test]
fn a_tracer_of_the_command_line_is_no_finding() {
    for kernel in ["stock-6.1-cloud", "stock-6.12-cloud"] {
        let guest = TestGuest::define(&Domain {
            kernel: kernel.to_owned(),
            memory: 384,
            append: "ftrace=function ftrace_filter=vfs_read".to_owned(),
            ..Domain::new("early-tracer")
        });
        guest.start().unwrap();
        let tracer = guest.run("cat /sys/kernel/tracing/current_tracer").unwrap();
        assert_eq!(tracer.text, "function\n");
        let symbols = guest.lab().artifacts(kernel).unwrap().bzimage;
        memory_is_clean(&guest, &symbols);
    }
}
