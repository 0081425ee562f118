//! Guests that root fills with false kernels after their boot: banners, page
//! tables, lists of functions, control blocks whose hearts beat, headers of
//! ring buffers (tests/lab/guest/plant.c). xftrace stays with the true kernel,
//! and a new helper goes on with it.

use std::time::Duration;

use nix::sys::signal::Signal;
use xftrace::helper::protocol::GuestStatus;
use xftrace::kernel::stock::reserved_command_line;
use xftrace::kernel::{probe, Symbols};
use xftrace::session::{Mode, Session};
use xftrace::symfiles::Known;
use xftrace_lab::{wait_for, Backing, Domain, Job};

use crate::keys::memory;
use crate::lab::TestGuest;
use crate::lifecycle::{reads_of, recorded_reads, signal};
use crate::traced::Traced;

/// Longer than anything here takes on a busy machine.
const SOON: Duration = Duration::from_secs(60);
/// It goes over all of the guest's memory.
const PLANTED: Duration = Duration::from_secs(240);
/// As many false kernels at least pass all checks.
const WHOLE: u64 = 5;
const READS: u64 = 1_000;
/// Has the kernel booted with a ring in memory that is reserved at boot.
const RESERVED: &str = "--plain=reserved";

impl Traced {
    /// Fills the guest's memory. It is false kernels until the job is killed.
    fn plant(&self, arguments: &str) -> Job {
        let mut job = self.spawn(&format!("exec plant {arguments}")).unwrap();
        let said = job.line(PLANTED).unwrap().unwrap_or_default();
        println!("{said}");
        let words: Vec<&str> = said.split(' ').collect();
        let ["whole", whole, "banners", banners, "other", other] = words[..] else {
            panic!("{said:?}: {}", self.console().unwrap());
        };
        let [whole, banners, other] =
            [whole, banners, other].map(|number| number.parse::<u64>().expect("a number"));
        assert!(
            whole >= WHOLE && banners >= 3 * WHOLE && other > 20_000,
            "{said}"
        );
        job
    }

    /// Kills the helper; the next command starts another one.
    fn kill_helper(&self) {
        signal(self.helper(), Signal::SIGKILL);
        let gone = || {
            let status = self.command(&["status"]).output()?;
            let said = String::from_utf8_lossy(&status.stderr).into_owned();
            Ok(said.contains("no helper runs").then_some(()))
        };
        wait_for(SOON, gone).unwrap();
    }

    /// Traces a program before the plants, beside them, and with another
    /// helper; all of it is one boot of one session. Gives the job that plants,
    /// and that session.
    fn trace_beside_plants(
        &self,
        symbols: &Symbols,
        functions: &[&str],
        options: &[&str],
    ) -> (Job, Session) {
        self.on(&[functions, options].concat());
        let mut pids = vec![reads_of(self, READS)];
        let planted = self.plant(&left_out(symbols));
        // They pass all that the finder checks.
        let found = probe(&memory(self), symbols).expect("a search");
        assert!(found.len() as u64 > WHOLE, "{} kernels", found.len());
        pids.push(reads_of(self, READS));
        self.kill_helper();
        self.on(functions);
        pids.push(reads_of(self, READS));
        let session = self.off();
        let boots: Vec<_> = session
            .meta
            .boots
            .iter()
            .map(|boot| boot.phys_text)
            .collect();
        assert_eq!(boots.len(), 1, "{boots:x?}: {}", self.log());
        for pid in pids {
            assert_eq!(recorded_reads(&session, 1, pid), READS);
        }
        let counters = session.meta.counters;
        assert_eq!((counters.forged, counters.lost), (0, 0), "{counters:?}");
        assert_eq!(counters.resumed, 1);
        (planted, session)
    }
}

/// What /proc/kallsyms leaves out, for those who plant a kernel: where it lies behind
/// the kernel's beginning.
fn left_out(symbols: &Symbols) -> String {
    let text = symbols.address("_text").unwrap();
    let offset = |name: &&str| {
        let offset = symbols.address(name).expect("a symbol").wrapping_sub(text);
        format!("{name}={offset:#x} ")
    };
    let names = [
        "kallsyms_num_syms",
        "kallsyms_relative_base",
        "kallsyms_offsets",
    ];
    names.iter().map(offset).collect()
}

#[test]
fn false_kernels_that_live_do_not_move_a_keyed_trace() {
    let traced = Traced::start(TestGuest::define(&Domain {
        backing: Backing::File,
        ..Domain::new("planted")
    }));
    let map = traced.lab().artifacts(traced.kernel()).unwrap().system_map;
    let symbols = Symbols::load(&map).unwrap();
    let options = ["--buffer-size=16M"];
    let (planted, session) = traced.trace_beside_plants(&symbols, &["sys_read"], &options);
    assert_eq!(session.meta.mode, Mode::Keyed);

    // More than one lives.
    let found = probe(&memory(&traced), &symbols).expect("a search");
    let lowest = found.iter().map(|kernel| kernel.phys_text.0).min();
    assert!(lowest < Some(session.meta.boots[0].phys_text), "{found:x?}");

    // A helper that takes nothing over knows the true one too.
    traced.kill_helper();
    traced.on(&["sys_read"]);
    let pid = reads_of(&traced, READS);
    let beside = traced.off();
    assert_eq!(
        beside.meta.boots[0].phys_text,
        session.meta.boots[0].phys_text
    );
    assert_eq!(recorded_reads(&beside, 1, pid), READS);

    // One to which nobody has told where the kernel was cannot tell them apart. It
    // says so, and traces none.
    traced.kill_helper();
    let run = traced.lab().dir().join("run/xftrace");
    let place = format!("{}.kernel", traced.uuid().unwrap());
    std::fs::remove_file(run.join(place)).expect("a place");
    wait_for(SOON, || {
        let on = traced.command(&["on", "sys_read"]).output()?;
        let said = String::from_utf8_lossy(&on.stderr).into_owned();
        println!("{said}");
        assert_eq!(on.status.code(), Some(2), "{said}");
        Ok(said
            .contains("kernels seem to live in the guest's memory")
            .then_some(()))
    })
    .unwrap();
    let status = traced.command(&["status"]).output().unwrap();
    let status = String::from_utf8_lossy(&status.stdout).into_owned();
    assert!(status.contains("not trusted: "), "{status}");

    // Once they live no more, the true one is found.
    planted.kill(9).unwrap();
    let on = || {
        let on = traced.command(&["on", "sys_read"]).output().unwrap();
        Ok(on.status.success().then_some(()))
    };
    wait_for(SOON, on).unwrap_or_else(|error| panic!("{error:#}: {}", traced.log()));
    let pid = reads_of(&traced, READS);
    let session = traced.off();
    let last = session.meta.boots.last().expect("a boot").number;
    assert_eq!(recorded_reads(&session, last, pid), READS);
}

/// The ring is found through BTF and the kernel's own pointers.
#[test]
fn false_kernels_do_not_move_a_plain_trace() {
    plain("planted61", "stock-6.1-cloud", "--plain");
}

/// The ring is at a fixed place in memory, from its boot on.
#[test]
fn false_headers_do_not_move_a_trace_of_a_boot_mapped_ring() {
    plain("planted612", "stock-6.12-cloud", RESERVED);
}

fn plain(name: &str, kernel: &str, ring: &str) {
    let guest = TestGuest::define(&Domain {
        kernel: kernel.to_owned(),
        backing: Backing::File,
        memory: 384,
        ..Domain::new(name)
    });
    let traced = Traced::start_with(guest, &["--functions", "sys_read", ring]);
    if ring == RESERVED {
        traced.sh(&reserved_command_line(&["__x64_sys_read"]).1);
    }
    let ready = |status: &xftrace::helper::protocol::Status| {
        matches!(status.guest, GuestStatus::Alive { .. })
    };
    traced.until("a kernel", ready);
    traced.on_soon();
    let kernel = traced.lab().artifacts(traced.kernel()).unwrap().bzimage;
    let symbols = Known::load(&kernel).unwrap().symbols;
    let (_planted, session) = traced.trace_beside_plants(&symbols, &[], &[]);
    assert_eq!(session.meta.mode, Mode::Plain);
}
