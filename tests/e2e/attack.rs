//! A guest that lies: it forges records, changes keys, switches the tracer off
//! and reads what it can. docs/threat-model.md says what comes of each.

use std::time::Duration;

use serde_json::Value;
use xftrace::callflow::{events, Kernels, Limits, Tally};
use xftrace::ring::record::{ForgedWhy, LostWhy};
use xftrace::session::{Session, FINDINGS_FILE};
use xftrace_lab::{wait_for, Backing, Domain};

use crate::lab::TestGuest;
use crate::traced::Traced;

/// Longer than anything here takes on a busy machine.
const SOON: Duration = Duration::from_secs(60);

/// Records that tests/lab/modules/xf_forge.c makes, and what is wrong with each.
const FORGERIES: [(&str, ForgedWhy); 7] = [
    ("plain", ForgedWhy::Unkeyed),
    ("nokey", ForgedWhy::NotDecodable),
    ("unknown", ForgedWhy::UnknownEpoch),
    ("stale", ForgedWhy::StaleEpoch),
    ("replayed", ForgedWhy::Replayed),
    ("depth", ForgedWhy::BadShape),
    ("cut", ForgedWhy::BadShape),
];

/// What a kernel says when something is wrong in it.
const ALARMS: [&str; 6] = [
    "WARNING",
    "BUG",
    "Oops",
    "Call Trace",
    "general protection",
    "rcu_sched",
];

fn start(name: &str) -> Traced {
    Traced::start(TestGuest::define(&Domain {
        backing: Backing::File,
        ..Domain::new(name)
    }))
}

impl Traced {
    pub(crate) fn sh(&self, command: &str) -> String {
        self.run(command).unwrap().success().unwrap()
    }

    /// Loads a module on CPU `cpu` of the guest, tells it where the kernel's
    /// symbols are that it asks for, and takes it out again.
    fn load(&self, cpu: u32, module: &str, parameters: &str, symbols: &[(&str, &str)]) {
        let mut line = String::new();
        for (parameter, symbol) in symbols {
            line += &format!(" {parameter}=0x$(grep -w {symbol} /proc/kallsyms | cut -d' ' -f1)");
        }
        let mask = 1 << cpu;
        self.sh(&format!(
            "taskset {mask} insmod /lib/modules/{module}.ko {parameters}{line} && rmmod {module}"
        ));
    }

    fn forge(&self, cpu: u32, how: &str) {
        let symbols = [("control", "xftrace_control"), ("seq", "xftrace_seq")];
        self.load(cpu, "xf_forge", &format!("how={how}"), &symbols);
    }

    /// The open session as `xftrace status` has it.
    fn status_json(&self) -> Value {
        let output = self.command(&["status", "--json"]).assert().success();
        let all: Value = serde_json::from_slice(&output.get_output().stdout).unwrap();
        all[0]["trace"].clone()
    }

    fn wait_for_epoch(&self, epoch: u64) {
        wait_for(SOON, || {
            Ok((self.status_json()["epoch"].as_u64() >= Some(epoch)).then_some(()))
        })
        .unwrap();
    }

    fn alarms(&self) -> Vec<String> {
        let console = self.console().unwrap();
        console
            .lines()
            .filter(|line| ALARMS.iter().any(|alarm| line.contains(alarm)))
            .map(str::to_owned)
            .collect()
    }
}

fn tally(session: &Session) -> Tally {
    let names = Kernels::of(session).expect("its symbols");
    let mut flow = events(session.items(), &names, Limits::default());
    for event in flow.by_ref() {
        event.expect("an event");
    }
    flow.tally()
}

fn findings(session: &Session) -> Vec<Value> {
    let text = std::fs::read_to_string(session.dir().join(FINDINGS_FILE)).unwrap_or_default();
    text.lines()
        .map(|line| serde_json::from_str(line).expect("JSON lines"))
        .collect()
}

/// The "pid N" that rwloop prints first.
fn pid(output: &str) -> i32 {
    let line = output.lines().find_map(|line| line.strip_prefix("pid "));
    line.expect("a pid").parse().expect("a number")
}

#[test]
fn a_record_made_without_the_key_is_told_with_its_reason() {
    const LOOPS: u64 = 10_000;
    let guest = start("forges");
    guest.on(&[
        "--interval=100ms",
        "--buffer-size=16M",
        "sys_openat",
        "sys_read",
    ]);
    // A key that is stale needs some that are newer.
    guest.wait_for_epoch(40);
    let mut genuine = guest.spawn(&format!("exec rwloop {LOOPS}")).unwrap();
    for (how, _) in FORGERIES {
        guest.forge(0, how);
        guest.forge(1, how);
    }
    let output = genuine.wait(SOON).unwrap().success().unwrap();
    let made = 2 * FORGERIES.len() as u64;
    wait_for(SOON, || {
        Ok((guest.status_json()["counters"]["forged"].as_u64() >= Some(made)).then_some(()))
    })
    .unwrap();
    let status = guest.command(&["status"]).assert().success();
    let status = String::from_utf8_lossy(&status.get_output().stdout).into_owned();
    assert!(status.contains(&format!("forged {made};")), "{status}");

    let session = guest.off();
    let tally = tally(&session);
    let graph = std::fs::read_to_string(guest.dir().join("trace_graph.txt")).unwrap();
    for why in ForgedWhy::ALL {
        let made = 2 * FORGERIES.iter().filter(|(_, of)| *of == why).count();
        assert_eq!(tally.forged.get(why), made as u64, "{why}");
        let mark = format!("/* !! forged: {why}");
        assert_eq!(
            graph.matches(&mark).count(),
            made,
            "{mark} in the call flow"
        );
    }
    assert!(
        graph.contains(&format!("# forged: {made}")),
        "no sum in the head"
    );
    let told: u64 = findings(&session)
        .iter()
        .filter(|finding| finding["finding"] == "forged-records")
        .filter_map(|finding| finding["records"].as_u64())
        .sum();
    assert_eq!((told, session.meta.counters.forged), (made, made));

    // What the kernel itself recorded is all there.
    let pid = Some(pid(&output));
    assert_eq!(tally.roots_of("__x64_sys_read", pid), LOOPS);
    assert_eq!(tally.roots_of("__x64_sys_openat", pid), LOOPS + 1);
    assert_eq!(tally.lost_places.total(), 0);
    assert_eq!(session.meta.counters.records, tally.calls + tally.returns);
    assert_eq!(guest.alarms(), [""; 0]);
}

/// What the threat model says of a forger who has the key: a number that is
/// ahead shows, and a record that is right in all does not.
#[test]
fn a_record_made_with_the_key_shows_if_its_number_is_wrong() {
    let guest = start("keyed");
    guest.on(&["--buffer-size=16M", "sys_openat", "sys_read"]);
    guest.forge(0, "good");
    guest.forge(1, "ahead");
    // More records of that CPU than the forged number is ahead.
    guest.sh("taskset 2 rwloop 500");
    let session = guest.off();
    let tally = tally(&session);
    // 1000 are missing before it, and it and those are then in the past.
    assert_eq!(tally.lost_records.get(LostWhy::Overrun), 1000);
    assert_eq!(tally.lost_places.total(), 1);
    assert_eq!(tally.forged.get(ForgedWhy::Replayed), 1001);
    assert_eq!(tally.forged.total(), 1001);
}

#[test]
fn a_changed_key_is_noticed_within_an_interval_and_put_right() {
    const INTERVAL_MS: u64 = 500;
    /// What a busy host's disk may take to note the key that is due.
    const DISK_MS: u64 = 1000;
    const LOOPS: u64 = 500;
    let guest = start("changes");
    guest.on(&[
        "--interval=500ms",
        "--buffer-size=16M",
        "sys_openat",
        "sys_read",
    ]);
    guest.wait_for_epoch(5);
    let work = guest.spawn("exec work").unwrap();
    let symbols = [("control", "xftrace_control")];
    for (done, what) in ["now", "past", "epoch", "back"].into_iter().enumerate() {
        guest.load(0, "xf_key", &format!("what={what}"), &symbols);
        wait_for(SOON, || {
            let noticed = guest.status_json()["counters"]["tampered"].as_u64();
            Ok((noticed > Some(done as u64)).then_some(()))
        })
        .unwrap();
    }
    work.kill(9).unwrap();
    let status = guest.command(&["status"]).assert().success();
    let status = String::from_utf8_lossy(&status.get_output().stdout).into_owned();
    assert!(status.contains("; 4 changed by the guest"), "{status}");

    // Each was put right: what is recorded now decodes.
    let forged = || guest.status_json()["counters"]["forged"].as_u64().unwrap();
    let wrong = forged();
    let output = guest.sh(&format!("rwloop {LOOPS}"));
    let session = guest.off();
    let tally = tally(&session);
    let pid = Some(pid(&output));
    assert_eq!(tally.roots_of("__x64_sys_read", pid), LOOPS);
    assert_eq!(tally.roots_of("__x64_sys_openat", pid), LOOPS + 1);
    assert_eq!(
        session.meta.counters.forged, wrong,
        "forged after all was right"
    );
    // And what was recorded meanwhile did not.
    assert!(
        tally.forged.get(ForgedWhy::NotDecodable) > 0,
        "under a wrong key"
    );
    assert!(
        tally.forged.get(ForgedWhy::UnknownEpoch) > 0,
        "under no epoch"
    );
    assert!(
        tally.forged.get(ForgedWhy::StaleEpoch) > 0,
        "under an old epoch"
    );

    // The guest itself measured how long each change stood.
    let mut changes = Vec::new();
    for line in guest
        .sh("dmesg | grep -o 'xf_key: .* was put right .*'")
        .lines()
    {
        let words: Vec<&str> = line.split(' ').collect();
        let [_, what, _, _, epoch, _, _, _, _, us, _] = words[..] else {
            panic!("{line}");
        };
        let us: u64 = us.parse().unwrap();
        assert!(us < (INTERVAL_MS + DISK_MS) * 1000, "{line}");
        changes.push((what.to_owned(), epoch.parse::<u64>().unwrap()));
    }
    let told: Vec<Value> = findings(&session)
        .into_iter()
        .filter(|finding| finding["finding"] == "key-changed")
        .collect();
    assert_eq!((changes.len(), told.len()), (4, 4), "{changes:?} {told:?}");
    for ((what, epoch), told) in changes.iter().zip(&told) {
        match what.as_str() {
            "now" | "past" => assert_eq!(
                (&told["what"], told["epoch"].as_u64()),
                (&Value::from("key"), Some(*epoch))
            ),
            _ => {
                let found = if what == "epoch" {
                    epoch + (1 << 20)
                } else {
                    epoch - 3
                };
                assert_eq!(
                    (&told["what"], told["found"].as_u64()),
                    (&Value::from("epoch"), Some(found))
                );
            }
        }
    }
}

#[test]
fn a_tracer_switched_off_in_the_guest_is_told() {
    let guest = start("switched");
    guest.on(&["sys_openat", "sys_read"]);
    let told = |kind: &str| {
        let told = findings(&guest.session());
        told.iter().filter(|told| told["finding"] == kind).count()
    };
    assert_eq!((told("tracer-off"), told("recording-off")), (0, 0));
    let wait_until_told = |kind: &str| {
        wait_for(SOON, || Ok((told(kind) > 0).then_some(())))
            .unwrap_or_else(|error| panic!("no {kind}: {error:#}"));
    };
    // The second while the first still stands.
    guest.sh("echo 0 > /sys/kernel/tracing/tracing_on");
    wait_until_told("recording-off");
    assert_eq!(told("tracer-off"), 0);
    guest.sh("echo nop > /sys/kernel/tracing/current_tracer");
    wait_until_told("tracer-off");
    // Named once each, and the session ends in order.
    let session = guest.off();
    let kinds: Vec<Value> = findings(&session)
        .into_iter()
        .map(|told| told["finding"].clone())
        .collect();
    assert_eq!(kinds, ["recording-off", "tracer-off"]);
}

/// Records can be kept out by more than the buffer's switch. Each way is named within
/// seconds, and what the guest's users may do to its buffer without keeping records out
/// is none.
fn records_kept_out_by_a_count_are_told(name: &str, kernel: &str) {
    let guest = Traced::start(TestGuest::define(&Domain {
        backing: Backing::File,
        kernel: kernel.to_owned(),
        ..Domain::new(name)
    }));
    guest.on(&["sys_openat", "sys_read"]);
    let gates = || -> Vec<String> {
        let told = findings(&guest.session()).into_iter();
        told.filter(|told| told["finding"] == "recording-off")
            .map(|told| told["gate"].as_str().unwrap_or("none").to_owned())
            .collect()
    };
    // For as long as it takes to find a gate that stays shut, and somewhat longer.
    let work = guest.spawn("exec work").unwrap();
    guest.sh(
        "cd /sys/kernel/tracing; for i in 1 2 3 4 5 6; do echo > trace; \
         echo $((500 + 20 * i)) > buffer_size_kb; head -n 50 trace > /dev/null; \
         sleep 1; done",
    );
    assert_eq!(gates(), [""; 0]);
    work.kill(9).unwrap();

    let control = "control=0x$(grep -w xftrace_control /proc/kallsyms | cut -d' ' -f1)";
    let off = |how: &str| format!("insmod /lib/modules/xf_off.ko {control} {how}");
    let ways = [
        (
            off("how=count"),
            "rmmod xf_off",
            "the count of those who want it off (record_disabled of struct trace_buffer)",
        ),
        (
            off("how=cpu cpu=1"),
            "rmmod xf_off",
            "part off (record_disabled of struct ring_buffer_per_cpu): CPU 1",
        ),
        (
            "echo 1 > /sys/kernel/tracing/tracing_cpumask".to_owned(),
            "echo 3 > /sys/kernel/tracing/tracing_cpumask",
            "in the trace array (disabled of struct trace_array_cpu): CPU 1",
        ),
    ];
    for (number, (shut, open, what)) in ways.iter().enumerate() {
        guest.sh(shut);
        let told = wait_for(SOON, || Ok(gates().get(number).cloned()));
        let told = told.unwrap_or_else(|error| panic!("not told of {shut}: {error:#}"));
        assert!(told.contains(what), "{told}");
        guest.sh(open);
        // Longer than between two looks, of which one has to see it open.
        std::thread::sleep(Duration::from_secs(2));
    }
    assert_eq!(gates().len(), ways.len(), "{:?}", gates());
    let session = guest.off();
    let others: Vec<Value> = findings(&session)
        .into_iter()
        .filter(|told| told["finding"] != "recording-off")
        .collect();
    assert_eq!(others, [Value::Null; 0]);
}

#[test]
fn records_kept_out_by_a_count_are_told_on_linux_6_1() {
    records_kept_out_by_a_count_are_told("kept61", "6.1");
}

#[test]
fn records_kept_out_by_a_count_are_told_on_linux_6_12() {
    records_kept_out_by_a_count_are_told("kept612", "6.12");
}

/// A snapshot swaps the guest's ring buffer for another: both are read.
#[test]
fn a_snapshot_in_the_guest_takes_nothing_from_the_trace() {
    const LOOPS: u64 = 1_000;
    const SNAPSHOTS: u64 = 4;
    let guest = start("snapshot");
    guest.on(&["sys_read"]);
    let mut pids = Vec::new();
    for _ in 0..=SNAPSHOTS {
        let said = guest.sh(&format!("rwloop {LOOPS}"));
        let pid = said.split_whitespace().nth(1).expect("a pid");
        pids.push(pid.parse().expect("a number"));
        guest.sh("echo 1 > /sys/kernel/tracing/snapshot");
    }
    let session = guest.off();
    let tally = tally(&session);
    for pid in pids {
        assert_eq!(tally.roots_of("__x64_sys_read", Some(pid)), LOOPS);
    }
    let counters = session.meta.counters;
    assert_eq!((counters.forged, counters.lost), (0, 0), "{counters:?}");
    let kinds: Vec<Value> = findings(&session)
        .into_iter()
        .map(|told| told["finding"].clone())
        .collect();
    assert!(
        !kinds.is_empty() && kinds.iter().all(|kind| kind == "buffer-swapped"),
        "{kinds:?}"
    );
}

/// Everything in tracefs may be read while a keyed trace is on. It shows no
/// addresses, does no harm, and the trace goes on.
#[test]
fn reading_tracefs_shows_nothing_and_breaks_nothing() {
    const LOOPS: u64 = 2_000;
    let guest = start("reads");
    guest.on(&[
        "--interval=100ms",
        "--buffer-size=8M",
        "sys_openat",
        "sys_read",
    ]);
    let work = guest.spawn("exec work").unwrap();
    let read = guest.sh("readtracefs");
    let files: u64 = read
        .lines()
        .find_map(|line| line.strip_prefix("files ")?.split(' ').next())
        .expect("a sum")
        .parse()
        .unwrap();
    assert!(files > 100, "{read}");

    // As text, and in each other form that there is.
    let text = guest.sh("cd /sys/kernel/tracing; head -n 300 trace");
    assert_keyed(&text);
    let text = guest.sh("cd /sys/kernel/tracing; head -n 200 trace_pipe");
    assert_keyed(&text);
    for form in ["raw", "hex", "bin", "verbose", "sym-addr", "latency-format"] {
        let text = guest.sh(&format!(
            "cd /sys/kernel/tracing; echo {form} > trace_options; \
             head -n 100 trace | head -c 20000 | od -An -c -v -w64 | head -n 200; \
             echo no{form} > trace_options"
        ));
        assert!(!text.is_empty(), "nothing in form {form}");
    }
    let raw = guest.sh(
        "cd /sys/kernel/tracing/per_cpu/cpu0; head -c 4096 trace_pipe_raw | od -An -v -tx1 -w1",
    );
    let bytes: Vec<u8> = raw
        .split_whitespace()
        .map(|byte| u8::from_str_radix(byte, 16).expect("hex"))
        .collect();
    assert_eq!(bytes.len(), 4096, "a page of the ring");
    // Behind the page's own time and length.
    let plain = |at: usize| {
        let word = bytes[at..at + 8].try_into().map(u64::from_le_bytes);
        word.is_ok_and(|word| word >> 32 == 0xffff_ffff)
    };
    assert_eq!(
        (16..4088).step_by(4).find(|at| plain(*at)),
        None,
        "an address"
    );
    guest.sh("echo one > /sys/kernel/tracing/trace_marker");
    work.kill(9).unwrap();

    let output = guest.sh(&format!("rwloop {LOOPS}"));
    let session = guest.off();
    let tally = tally(&session);
    assert_eq!(tally.forged.total(), 0, "forged: {:?}", tally.forged);
    assert_eq!(tally.other, 1, "the marker, and no other");
    assert_eq!(tally.roots_of("__x64_sys_read", Some(pid(&output))), LOOPS);
    assert_eq!(guest.alarms(), [""; 0]);
    // And an alarm would have been seen.
    guest.sh("insmod /lib/modules/xf_forge.ko how=warn");
    wait_for(SOON, || Ok((!guest.alarms().is_empty()).then_some(()))).unwrap();
}

/// The guest's own tracefs shows that there are records, and not of what.
fn assert_keyed(text: &str) {
    let records = text.matches("xftrace: keyed ").count();
    assert!(records > 50, "{text}");
    for plain in ["ffff", "sys_", "vfs_", "()"] {
        let shown = text
            .lines()
            .find(|line| !line.starts_with('#') && line.contains(plain));
        assert_eq!(shown, None, "in the guest's own trace");
    }
}
