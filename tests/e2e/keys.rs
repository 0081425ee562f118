//! The keys: no address is to be seen without one, and each record decodes under
//! its own.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use xftrace::kernel::control::{Control, RecordTypes};
use xftrace::kernel::{find_all, Gva, Kernel};
use xftrace::ram::{Access, BackingFile, FileRam, GuestRam, Layout, MachineKind};
use xftrace::ring::{events, Clock, CodeMap, RecordFormat, RingReader};
use xftrace::session::{ChunkReader, GuestCode, Session, KLOG_FILE};

use crate::traced::Traced;

/// A load that goes on for as long as a test needs it.
const LOAD: &str = "exec rwloop 1000000000";

/// A keyed record as it lies in the ring buffer. Corresponds to what the three
/// keyed records of the guest patch have in common (trace_entries.h).
struct Raw {
    cpu: u16,
    func: u64,
    caller: u64,
    epoch: u64,
    seq: u64,
}

impl Raw {
    /// What is in a record of this type; `None` where it is not keyed.
    fn new(cpu: u16, types: RecordTypes, payload: &[u8]) -> Option<Raw> {
        let field = |at: usize| u64::from_le_bytes(payload[at..at + 8].try_into().unwrap());
        let kind = u16::from_le_bytes(payload[..2].try_into().unwrap());
        [types.root, types.call, types.ret]
            .contains(&kind)
            .then(|| Raw {
                cpu,
                func: field(8),
                caller: field(16),
                epoch: field(24) & 0xffff_ffff,
                seq: field(24) >> 32,
            })
    }
}

/// A line of a session's key log.
struct Key {
    epoch: u64,
    key: u64,
    /// When it was handed out, on the host's monotonic clock.
    since: Duration,
}

/// The key log of a session, read by its form (ARCHITECTURE.md).
fn klog(session: &Session) -> Vec<Key> {
    let text = fs::read_to_string(session.dir().join(KLOG_FILE)).expect("a key log");
    let key = |line: &str| {
        let words: Vec<_> = line.split(' ').collect();
        Key {
            epoch: words[0].parse().expect("an epoch"),
            key: u64::from_str_radix(words[1], 16).expect("a key"),
            since: Duration::from_nanos(words[3].parse().expect("a time")),
        }
    };
    text.lines().skip(1).map(key).collect()
}

/// Each keyed record of a session's one boot, a CPU after the other, and all
/// that the records are made of.
fn raw_records(session: &Session, record: &mut dyn FnMut(Raw), bytes: &mut dyn FnMut(&[u8])) {
    let [boot] = &session.meta.boots[..] else {
        panic!("not one boot: {:?}", session.meta.boots);
    };
    let RecordFormat::Keyed(types) = boot.types else {
        panic!("not keyed: {:?}", boot.types);
    };
    for cpu in 0..boot.nr_cpus as u16 {
        let chunks = ChunkReader::open(session.dir(), boot.number, cpu).expect("a ring file");
        let mut chunks = chunks.expect("a ring file of each CPU");
        while let Some(chunk) = chunks.next_chunk().expect("a chunk") {
            bytes(&chunk.bytes);
            for event in events(&chunk.bytes, Clock(0)) {
                let payload = event.expect("an event").payload;
                Raw::new(cpu, types, payload).map(&mut *record);
            }
        }
    }
}

/// How many times a plain address of the kernel's text stands in `bytes`, at
/// whatever alignment.
fn plain_addresses(code: &GuestCode<'_>, bytes: &[u8]) -> usize {
    let text = code.symbols.text();
    let words = bytes.windows(8).map(|word| {
        let value = u64::from_le_bytes(word.try_into().expect("eight bytes"));
        Gva(value.wrapping_sub(code.slide))
    });
    words.filter(|link| text.contains(link)).count()
}

/// The guest's memory, as the helper sees it.
pub(crate) fn memory(guest: &Traced) -> FileRam {
    memory_for(guest, Access::ReadOnly)
}

/// The same, perhaps to write to.
pub(crate) fn memory_for(guest: &Traced, access: Access) -> FileRam {
    let qemu = guest.qemu_pid().unwrap();
    let maps = fs::read_to_string(format!("/proc/{qemu}/maps")).expect("its mappings");
    let ram = maps.lines().find(|line| line.contains("/pc.ram"));
    let range = ram.and_then(|line| line.split(' ').next()).expect("a file");
    let path = PathBuf::from(format!("/proc/{qemu}/map_files/{range}"));
    let file = BackingFile::open(&path, access).expect("the memory file");
    let layout = Layout::pc(file.size(), MachineKind::I440fx).expect("its layout");
    FileRam::map(vec![file], layout).expect("the guest's memory")
}

/// What lies in the guest's ring buffer right now.
fn ring_in_memory(ram: &dyn GuestRam, kernel: &Kernel, control: &Control) -> Vec<u8> {
    let nr_cpus = control.ident.nr_cpus;
    let mut reader = RingReader::new(kernel.clone(), control.ring, nr_cpus, 0);
    let mut bytes = Vec::new();
    reader
        .drain(ram, &mut |chunk| bytes.extend(chunk.bytes))
        .expect("the ring buffer");
    bytes
}

/// Neither in the guest nor in the session is an address to be seen, and
/// without the right keys the session says nothing.
#[test]
fn no_record_shows_an_address_without_its_key() {
    let guest = Traced::start_alone("hidden");
    let ram = memory(&guest);

    let mut load = guest.spawn(LOAD).unwrap();
    guest.on(&["sys_openat", "sys_read"]);
    std::thread::sleep(Duration::from_secs(1));
    let open = guest.session();
    let symbols = open.symbols(&open.meta.boots[0]).expect("its symbols");
    let kernel = find_all(&ram, symbols).expect("a kernel").remove(0);
    let control = Control::attach(&ram, &kernel, symbols).expect("its control block");
    let code = GuestCode {
        symbols,
        slide: kernel.slide,
    };
    let keyed = ring_in_memory(&ram, &kernel, &control);
    load.kill(9).unwrap();
    load.wait(Duration::from_secs(60)).unwrap();
    assert!(keyed.len() > 100_000, "{} bytes in the ring", keyed.len());
    assert_eq!(plain_addresses(&code, &keyed), 0, "in guest memory");

    // The same in the session, and record by record.
    let session = guest.off();
    let (mut records, mut plain) = (0, 0);
    let text = symbols.text();
    let is_text = |value: u64| text.contains(&Gva(value.wrapping_sub(code.slide)));
    raw_records(
        &session,
        &mut |raw| {
            records += 1;
            assert!(!is_text(raw.func) && !is_text(raw.caller));
        },
        &mut |bytes| plain += plain_addresses(&code, bytes),
    );
    assert_eq!((records, plain), (session.meta.counters.records, 0));
    assert_eq!(session.meta.counters.forged, 0);

    // With the guest's own trace the same look finds them.
    let own = "cd /sys/kernel/tracing && echo __x64_sys_read > set_graph_function && \
               echo function_graph > current_tracer && rwloop 1000 && echo 0 > tracing_on";
    guest.run(own).unwrap().success().unwrap();
    let unkeyed = ring_in_memory(&ram, &kernel, &control);
    assert!(plain_addresses(&code, &unkeyed) > 1000);

    let right: Vec<u64> = klog(&session).into_iter().map(|key| key.key).collect();
    assert_decodes_nothing(&guest, &session, "keys changed by a bit", |at| {
        right[at] ^ 1 << 40
    });
    let next = |at: usize| right[(at + 1) % right.len()];
    assert_decodes_nothing(&guest, &session, "the keys of the next epochs", next);
    assert_decodes_nothing(&guest, &session, "no keys", |_| 0);
}

/// Gives a copy of a session other keys, and sees that nothing but forged
/// records come out.
fn assert_decodes_nothing(
    guest: &Traced,
    session: &Session,
    which: &str,
    key: impl Fn(usize) -> u64,
) {
    let copy = tempfile::tempdir().expect("a directory");
    copy_dir(session.dir(), copy.path());
    let klog = copy.path().join(KLOG_FILE);
    let text = fs::read_to_string(&klog).expect("a key log");
    let mut lines = text.lines();
    let mut altered = format!("{}\n", lines.next().expect("a first line"));
    for (at, line) in lines.enumerate() {
        let mut words: Vec<_> = line.split(' ').map(str::to_owned).collect();
        words[1] = format!("{:016x}", key(at));
        altered += &(words.join(" ") + "\n");
    }
    fs::write(&klog, altered).expect("another key log");

    let mut report = guest.xftrace(guest.dir());
    report.args(["report", "--format", "json"]).arg(copy.path());
    let output = report.assert().success().get_output().stdout.clone();
    let mut forged = 0;
    for line in String::from_utf8(output).expect("text").lines() {
        let line: serde_json::Value = serde_json::from_str(line).expect("JSON");
        match line["type"].as_str() {
            Some("forged") => forged += 1,
            Some("header" | "summary") => {}
            _ => panic!("{which}: decoded to {line}"),
        }
    }
    assert_eq!(forged, session.meta.counters.records, "{which}");
}

fn copy_dir(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).expect("a session").flatten() {
        let place = to.join(entry.file_name());
        if entry.path().is_dir() {
            fs::create_dir(&place).expect("a directory");
            copy_dir(&entry.path(), &place);
        } else {
            fs::copy(entry.path(), place).expect("a copy");
        }
    }
}

/// How long the load lasts, and how long a key.
const FULL_LOAD: Duration = Duration::from_secs(30);
const KEY_LASTS: Duration = Duration::from_millis(10);

/// Two programs keep both CPUs busy, while the key changes a hundred times
/// a second.
#[test]
fn every_record_decodes_under_the_epoch_it_names_and_no_other() {
    let guest = Traced::start_alone("rotates");
    guest.on(&[
        "sys_openat",
        "sys_read",
        "--interval=10ms",
        "--buffer-size=16M",
    ]);
    let load = format!(
        "timeout {0} {1} & timeout {0} {1} -f /proc/uptime; wait",
        FULL_LOAD.as_secs(),
        "rwloop 1000000000"
    );
    guest.run_for(&load, 4 * FULL_LOAD).unwrap();
    // The call flow would be read by nobody.
    let session = {
        guest.command(&["off", "--no-copy"]).assert().success();
        guest.session()
    };

    let counters = session.meta.counters;
    assert_eq!((counters.forged, counters.tampered), (0, 0), "{counters:?}");
    let code = GuestCode {
        symbols: session
            .symbols(&session.meta.boots[0])
            .expect("its symbols"),
        slide: session.meta.boots[0].slide,
    };
    let klog = klog(&session);
    let keys: BTreeMap<u64, u64> = klog.iter().map(|key| (key.epoch, key.key)).collect();
    let function = |raw: &Raw, epoch: u64| {
        let key = keys.get(&epoch)?;
        Some(code.is_function(Gva(raw.func ^ key)))
    };
    let (mut records, mut lost) = (0, 0);
    // The epoch and the running number that a CPU's next record can have.
    let mut next: BTreeMap<u16, (u64, u64)> = BTreeMap::new();
    let mut used = BTreeSet::new();
    raw_records(
        &session,
        &mut |raw| {
            let epoch = raw.epoch;
            assert_eq!(function(&raw, epoch), Some(true), "under its epoch {epoch}");
            for other in [epoch - 1, epoch + 1] {
                assert_ne!(function(&raw, other), Some(true), "{epoch} under {other}");
            }
            let (least, seq) = next.insert(raw.cpu, (epoch, raw.seq + 1)).unwrap_or((0, 0));
            assert!(
                epoch >= least,
                "CPU {} went from {least} to {epoch}",
                raw.cpu
            );
            lost += raw.seq.checked_sub(seq).expect("numbers that rise");
            records += 1;
            used.insert(epoch);
        },
        &mut |_| {},
    );
    assert_eq!((records, lost), (counters.records, counters.lost));
    assert!(records > 1_000_000, "that was no load: {records} records");

    // A key is not used if QEMU does not run while it is the newest, and fewer
    // are handed out if the helper or the disk is held up: so half of them
    // leaves room for a busy host, and is far from keys that stand still.
    let (first, last) = (used.first().expect("epochs"), used.last().expect("epochs"));
    let span: Vec<_> = klog
        .iter()
        .filter(|key| (first..=last).contains(&&key.epoch))
        .collect();
    let time = span[span.len() - 1].since - span[0].since;
    let intervals = (time.as_nanos() / KEY_LASTS.as_nanos()) as usize;
    assert!(time > FULL_LOAD / 2, "records over {time:?} only");
    assert!(
        2 * span.len() > intervals,
        "{} keys in {intervals} intervals",
        span.len()
    );
    assert!(
        2 * used.len() > span.len(),
        "{} used of {}",
        used.len(),
        span.len()
    );

    // A key is due at the latest an interval after the last one was handed
    // out, and late if it comes another interval after that. (A third is for
    // the moments between the look at the clock and the time in the log.)
    let held_up = klog
        .windows(2)
        .filter(|pair| pair[1].since - pair[0].since > 3 * KEY_LASTS);
    let held_up = held_up.count() as u64;
    assert!(
        counters.late_keys >= held_up,
        "{held_up}, told of {counters:?}"
    );
}
