//! What a look at a guest's memory stands: every byte of it may be chosen by an
//! attacker, and change between two reads. The memory of a real guest, saved, is
//! read through something that lies.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use nix::sys::resource::{getrusage, UsageWho};
use nix::sys::time::TimeValLike;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use xftrace::integrity::{check, Check, Image, Report, Trusted};
use xftrace::kernel::{find_all, Kernel, Symbols};
use xftrace::ram::{Gpa, GuestRam, ImageRam, Layout, RamError};
use xftrace::symfiles::Known;
use xftrace_lab::{Backing, Domain};

use crate::lab::TestGuest;

/// What a look may take of the host's processors, whatever it reads.
const MOST: Duration = Duration::from_secs(20);
/// How many times memory lies at random.
const LOOKS: u64 = 60;
/// Pointers that were read, to be given in place of others.
const POOL: usize = 4096;
/// Where addresses of the kernel begin.
const UPPER_HALF: u64 = 0xffff_8000_0000_0000;

/// Memory that is not always what it is.
struct Lying<'a> {
    ram: &'a ImageRam,
    lie: Box<dyn Fn(Gpa, u64) -> u64 + Send + Sync + 'a>,
}

impl GuestRam for Lying<'_> {
    fn layout(&self) -> &Layout {
        self.ram.layout()
    }

    fn read(&self, gpa: Gpa, buf: &mut [u8]) -> Result<(), RamError> {
        self.ram.read(gpa, buf)?;
        let mut at = gpa;
        for part in buf.chunks_mut(8) {
            let mut word = [0; 8];
            word[..part.len()].copy_from_slice(part);
            let word = (self.lie)(at, u64::from_le_bytes(word)).to_le_bytes();
            part.copy_from_slice(&word[..part.len()]);
            at = Gpa(at.0 + 8);
        }
        Ok(())
    }

    fn read_u64(&self, gpa: Gpa) -> Result<u64, RamError> {
        Ok((self.lie)(gpa, self.ram.read_u64(gpa)?))
    }

    fn read_u32(&self, gpa: Gpa) -> Result<u32, RamError> {
        Ok((self.lie)(gpa, self.ram.read_u32(gpa)?.into()) as u32)
    }

    fn write_u64(&self, gpa: Gpa, value: u64) -> Result<(), RamError> {
        self.ram.write_u64(gpa, value)
    }

    fn write_u32(&self, gpa: Gpa, value: u32) -> Result<(), RamError> {
        self.ram.write_u32(gpa, value)
    }

    fn change_bits(&self, gpa: Gpa, mask: u32, set: bool) -> Result<u32, RamError> {
        self.ram.change_bits(gpa, mask, set)
    }

    fn next_populated(&self, gpa: Gpa) -> Option<Gpa> {
        self.ram.next_populated(gpa)
    }

    fn check(&self) -> Result<(), RamError> {
        self.ram.check()
    }
}

/// The saved memory of a clean guest, and what it is compared with.
struct Saved {
    ram: ImageRam,
    kernel: Kernel,
    symbols: Symbols,
    trusted: Trusted,
}

impl Saved {
    fn of(name: &str) -> Saved {
        let guest = TestGuest::define(&Domain {
            backing: Backing::File,
            ..Domain::new(name)
        });
        let artifacts = guest.lab().artifacts(guest.kernel()).unwrap();
        guest.start().unwrap();
        let path = guest.lab().dir().join(format!("{name}.elf"));
        let file = path.to_str().expect("a path");
        let dump = ["dump", "--memory-only", "--format", "elf", name, file];
        guest.lab().virsh(&dump).unwrap();
        let ram = ImageRam::open(&path, Layout::flat).expect("an image");
        std::fs::remove_file(path).expect("a dump");
        let symbols = Symbols::load(&artifacts.system_map).expect("symbols");
        let kernel = find_all(&ram, &symbols).expect("a kernel").remove(0);
        let (_, image) = Known::with_image(&artifacts.bzimage).expect("a kernel");
        let image = Image::parse(image.expect("an image")).expect("an image");
        let trusted = Trusted::new(image, &kernel, &symbols).expect("the kernel's own image");
        Saved {
            ram,
            kernel,
            symbols,
            trusted,
        }
    }

    /// What a look through `lie` comes to; what holds of every look, holds.
    fn look(&self, lie: impl Fn(Gpa, u64) -> u64 + Send + Sync) -> Report {
        let ram = Lying {
            ram: &self.ram,
            lie: Box::new(lie),
        };
        let before = thread_time();
        let report = check(&ram, &self.kernel, &self.symbols, &self.trusted).expect("a report");
        let took = thread_time().saturating_sub(before);
        assert!(took < MOST, "{took:?}");
        let made: Vec<Check> = report.outcomes.iter().map(|made| made.check).collect();
        assert_eq!(made, Check::ALL, "each check is made once");
        assert!(report.findings.len() <= 256 && report.notes.len() <= 256);
        let text = serde_json::to_string(&report).expect("JSON");
        assert!(text.bytes().all(|byte| (b' '..=b'~').contains(&byte)));
        report
    }

    /// The physical address of a symbol in the kernel's image.
    fn gpa(&self, name: &str) -> Gpa {
        let link = self.symbols.address(name);
        self.kernel
            .image_gpa(link.unwrap_or_else(|| panic!("no {name}")))
    }

    /// Its virtual address.
    fn gva(&self, name: &str) -> u64 {
        let link = self.symbols.address(name);
        let link = link.unwrap_or_else(|| panic!("no {name}"));
        self.kernel.runtime(link).0
    }
}

fn is_clean(report: &Report) -> bool {
    report.findings.is_empty() && doubts(report).is_empty()
}

fn doubts(report: &Report) -> Vec<&str> {
    let doubts = report
        .outcomes
        .iter()
        .filter_map(|made| made.doubt.as_deref());
    doubts.collect()
}

fn thread_time() -> Duration {
    let usage = getrusage(UsageWho::RUSAGE_THREAD).expect("usage");
    let used = usage.user_time() + usage.system_time();
    Duration::from_micros(used.num_microseconds().unsigned_abs())
}

/// Lies with one word in `rate`: nothing, everything, anything, a bit, another
/// pointer that was read before.
fn at_random(seed: u64, rate: u32) -> impl Fn(Gpa, u64) -> u64 + Send + Sync {
    let state = Mutex::new((StdRng::seed_from_u64(seed), Vec::new()));
    move |_, word| {
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        let (random, pool) = &mut *state;
        if word >= UPPER_HALF {
            match pool.len() < POOL {
                true => pool.push(word),
                false => pool[random.random_range(0..POOL)] = word,
            }
        }
        if !random.random_ratio(1, rate) {
            return word;
        }
        match random.random_range(0..6) {
            0 => 0,
            1 => u64::MAX,
            2 => random.random(),
            3 => word ^ 1 << random.random_range(0..64),
            _ if pool.is_empty() => word,
            _ => pool[random.random_range(0..pool.len())],
        }
    }
}

#[test]
fn a_look_stands_memory_that_lies() {
    let saved = Saved::of("lying");
    assert!(is_clean(&saved.look(|_, word| word)));
    let mut told = 0;
    for seed in 0..LOOKS {
        let rate = [3, 20, 200, 5_000, 100_000][seed as usize % 5];
        let report = saved.look(at_random(seed, rate));
        told += u64::from(!is_clean(&report));
    }
    // The rarest lies may miss all that is looked at, or stand where a place may
    // be patched.
    assert!(told > LOOKS * 4 / 5, "{told} of {LOOKS}");

    // The same lies at every read of a place: what an attacker wrote once.
    for seed in 0..LOOKS {
        let written: Mutex<HashMap<Gpa, u64>> = Mutex::default();
        let random = at_random(seed, [20, 200, 5_000][seed as usize % 3]);
        saved.look(|gpa, word| {
            let mut written = written.lock().unwrap_or_else(PoisonError::into_inner);
            *written.entry(gpa).or_insert_with(|| random(gpa, word))
        });
    }
}

/// Lists of lists, each as long as is believed: what is read has a bound of its
/// own, and that there was more is told.
#[test]
fn a_look_at_lists_without_end_ends() {
    /// What of a node is read lies in so much.
    const NODE: u64 = 256;
    const NODES: u64 = 60_000;

    let saved = Saved::of("endless");
    // They lie where a look at the clean guest reads nothing.
    let read: Mutex<BTreeSet<u64>> = Mutex::default();
    let clean = saved.look(|gpa, word| {
        let mut read = read.lock().unwrap_or_else(PoisonError::into_inner);
        read.insert(gpa.0);
        word
    });
    assert!(is_clean(&clean));
    let read = read.into_inner().unwrap_or_else(PoisonError::into_inner);
    let gaps = read.iter().zip(read.iter().skip(1));
    let gap = gaps.map(|(&from, &to)| (to - from, from)).max();
    let (room, before) = gap.expect("reads");
    assert!(room > (NODES + 2) * NODE, "{room}");
    let free = (before / NODE + 1) * NODE;

    let direct_map = saved.ram.read_u64(saved.gpa("page_offset_base"));
    let direct_map = direct_map.expect("a direct map");
    // Where each list begins, and what it ends with.
    let heads: HashMap<Gpa, u64> = [
        ("ftrace_ops_list", "ftrace_list_end"),
        ("ftrace_ops_trampoline_list", "ftrace_ops_trampoline_list"),
        ("super_blocks", "super_blocks"),
        ("bpf_kallsyms", "bpf_kallsyms"),
    ]
    .map(|(head, end)| (saved.gpa(head), saved.gva(end)))
    .into();
    let lists = |arena: u64, ends: bool| {
        let node = |number: u64| direct_map + arena + number * NODE;
        let end = Mutex::new(0);
        saved.look(|gpa, word| {
            let mut end = end.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(of) = heads.get(&gpa) {
                *end = *of;
                return node(0);
            }
            match gpa.0.checked_sub(arena).map(|offset| offset / NODE + 1) {
                Some(next) if next < NODES => node(next),
                Some(NODES) if ends => *end,
                Some(NODES) => node(0),
                _ => word,
            }
        })
    };
    let says = |report: &Report, what: &str| {
        let doubts = doubts(report);
        assert!(
            doubts.iter().any(|doubt| doubt.contains(what)),
            "{doubts:?}"
        );
    };
    says(&lists(free, false), "does not end");
    let many = lists(free, true);
    assert!(many.not_listed > 0, "there was room for all");
    // No byte of a pointer is 0 here, so that each name that is read is long.
    says(&lists(free + 8, true), "longer than those of any kernel");
}
