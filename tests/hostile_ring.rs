//! The ring reader and the decoder over ring buffers that a guest made up: no
//! panic, no hang, nothing read outside RAM, and no more of it than a round
//! may hand out, whatever the guest claims to have.

mod support;

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use proptest::prelude::*;
use support::guest::{Guest, Plan, DIRECT_MAP};
use support::hostile::{change, changes, Change};
use support::ring::{keys, layout, Code, Writer, BUFFERS, HOLDERS, PAGES, PER_CPU, TYPES};
use support::time::cpu_time;
use xftrace::ram::{Gpa, GuestRam, Layout, VecRam};
use xftrace::ring::{Chunk, Decoder, Drained, RecordFormat, RingReader};

/// Where the synthetic ring lies, where changes hurt most.
const RING: (u64, u64) = (BUFFERS, PAGES + 0x1_0000 - BUFFERS);
/// What a round may hand out, and one page more.
const ROUND_LIMIT: u64 = (32 << 20) + 4096;
/// A round may take 200 ms and one CPU's list of pages; and the code may be not
/// optimised.
const PATIENCE: Duration = Duration::from_secs(10);

/// A guest with a ring of `pages` pages that was filled more than once.
fn filled(ram: VecRam, pages: u64) -> Guest {
    let guest = Guest::load(Plan::default(), ram);
    let mut writer = Writer::new(pages);
    (0..pages * 150).for_each(|_| writer.record(300));
    writer.settle(&guest.ram);
    guest
}

fn ram() -> VecRam {
    VecRam::new(Layout::flat(Plan::default().ram).expect("a layout"))
}

/// One round, which must keep to its bounds; and what it handed out must be
/// decoded, whatever it is.
fn round(reader: &mut RingReader, decoder: &mut Decoder, guest: &Guest) -> Option<Drained> {
    let keys = keys();
    let (start, cpus, mut bytes) = (cpu_time(), reader.nr_cpus(), 0);
    let drained = reader.drain(&guest.ram, &mut |chunk: Chunk| {
        assert!(u32::from(chunk.cpu) < cpus);
        assert!(chunk.offset as usize + chunk.bytes.len() <= 4080);
        bytes += chunk.bytes.len() as u64;
        decoder.chunk(&chunk, &keys, &Code, &mut |_| ());
    });
    assert!(bytes <= ROUND_LIMIT, "{bytes} bytes");
    let taken = cpu_time() - start;
    assert!(taken < PATIENCE, "{taken:?}");
    drained.ok()
}

fn decoder() -> Decoder {
    Decoder::new(RecordFormat::Keyed(TYPES), 1)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn the_reader_stands_changes_to_the_ring(
        changes in changes(RING.0, RING.1),
        again in changes(RING.0, RING.1),
        cpus in prop::sample::select(vec![1u32, 2, 64, 8192]),
    ) {
        let guest = filled(ram(), 6);
        let mut reader = RingReader::new(guest.kernel(), layout(), cpus, 0);
        let mut decoder = decoder();
        for changes in [changes, again] {
            changes.iter().for_each(|change| change.apply(&guest.ram));
            for _ in 0..2 {
                round(&mut reader, &mut decoder, &guest);
            }
        }
    }

    /// Words and only words, at the few places that everything hangs from.
    #[test]
    fn the_reader_stands_changes_to_its_anchors(
        words in prop::collection::vec(
            (0usize..6, prop::sample::select(vec![0u64, 1, 2, 3, 40, 4096, 1 << 18, 1 << 40, u64::MAX]), any::<bool>()),
            1..8,
        ),
    ) {
        let guest = filled(ram(), 6);
        let mut reader = RingReader::new(guest.kernel(), layout(), 2, 0);
        let mut decoder = decoder();
        round(&mut reader, &mut decoder, &guest);
        let anchors = [
            BUFFERS + 64, BUFFERS + 0x100, PER_CPU + 40, PER_CPU + 56, PER_CPU + 88, HOLDERS,
        ];
        for (anchor, value, pointer) in words {
            // Small numbers as they are, or as places among the structures.
            let value = if pointer { DIRECT_MAP + HOLDERS + 64 * (value % 8) } else { value };
            guest.ram.poke(Gpa(anchors[anchor]), &value.to_le_bytes());
            round(&mut reader, &mut decoder, &guest);
        }
    }

    /// The guest changes its ring between any two looks at it.
    #[test]
    fn the_reader_stands_changes_while_it_looks(
        changes in prop::collection::vec(change(RING.0, RING.1), 1..64),
        pace in 1usize..40,
    ) {
        let reads = AtomicUsize::new(0);
        let ram = ram().with_hook(move |ram, _, _| {
            let read = reads.fetch_add(1, Ordering::Relaxed);
            // The guest is made, and its kernel found, before.
            if read > 2000 && read.is_multiple_of(pace) {
                if let Some(change) = changes.get(read / pace % changes.len()) {
                    Change::apply(change, ram);
                }
            }
        });
        let guest = filled(ram, 6);
        let mut reader = RingReader::new(guest.kernel(), layout(), 2, 0);
        let mut decoder = decoder();
        for _ in 0..60 {
            round(&mut reader, &mut decoder, &guest);
        }
    }
}

/// One ring that all of the CPUs have which the guest claims to have.
#[test]
fn a_ring_that_every_cpu_claims_is_read_once() {
    const LONG: u64 = 64;
    const CPUS: u64 = 8192;
    let guest = Guest::load(Plan::default(), ram());
    let gva = |at: u64| DIRECT_MAP + at;
    // Behind the ring that has them.
    let (array, per_cpu) = (PAGES + 0x10_0000, PAGES + 0x20_0000);
    let mut writer = Writer::new(LONG);
    (0..LONG * 92 - 10).for_each(|_| writer.record(300));
    writer.settle(&guest.ram);
    let word = |at: u64, value: u64| guest.ram.poke(Gpa(at), &value.to_le_bytes());
    let mut own = [0; 256];
    guest.ram.read(Gpa(PER_CPU), &mut own).expect("a buffer");
    for cpu in 0..CPUS {
        guest.ram.poke(Gpa(per_cpu + 256 * cpu), &own);
        word(array + 8 * cpu, gva(per_cpu + 256 * cpu));
    }
    word(BUFFERS + 64, gva(array));

    let mut reader = RingReader::new(guest.kernel(), layout(), CPUS as u32, 0);
    let mut read: HashMap<u16, u64> = HashMap::new();
    let start = cpu_time();
    let mut turns = 0;
    while turns < 2 * CPUS {
        let round = cpu_time();
        let drained = reader.drain(&guest.ram, &mut |chunk| {
            *read.entry(chunk.cpu).or_default() += chunk.bytes.len() as u64;
        });
        // All but the first to come are refused in each of their turns.
        turns += drained.expect("a round").damaged + 1;
        let taken = cpu_time() - round;
        assert!(taken < PATIENCE, "{taken:?}");
        assert!(cpu_time() - start < 10 * PATIENCE, "no end");
    }
    let all = u64::from(writer.seq) * 44;
    assert_eq!(read.len(), 1);
    assert!(
        (all..all + LONG * 44).contains(&read[&0]),
        "{read:?}, {all}"
    );
}

/// QEMU knows how many CPUs there can be.
#[test]
fn a_cpu_that_there_cannot_be_is_not_read() {
    let guest = filled(ram(), 6);
    guest
        .ram
        .poke(Gpa(BUFFERS + 0x108), &(DIRECT_MAP + PER_CPU).to_le_bytes());
    guest.ram.poke(Gpa(BUFFERS + 0x100), &0u64.to_le_bytes());
    let mut reader = RingReader::new(guest.kernel(), layout(), 8192, 0);
    reader.limit_cpus(1);
    assert_eq!(reader.nr_cpus(), 1);
    let drained = round(&mut reader, &mut decoder(), &guest);
    assert_eq!(drained, Some(Drained::default()));
}

/// More records than a round may hand out come with the next ones, all of
/// them.
#[test]
fn what_a_round_leaves_comes_with_the_next() {
    const SIZE: u64 = 128 << 20;
    const LONG: u64 = 20_000;
    let plan = Plan {
        ram: SIZE,
        ..Plan::default()
    };
    let guest = Guest::load(plan, VecRam::new(Layout::flat(SIZE).expect("a layout")));
    let word = |at: u64, value: u64| guest.ram.poke(Gpa(at), &value.to_le_bytes());
    let gva = |at: u64| DIRECT_MAP + at;
    let (holders, pages) = (0x200_0000, 0x240_0000);
    word(BUFFERS + 64, gva(BUFFERS + 0x100));
    word(BUFFERS + 0x100, gva(PER_CPU));
    word(PER_CPU + 40, LONG);
    word(PER_CPU + 56, gva(holders));
    word(PER_CPU + 80, gva(holders + 64 * (LONG - 1)));
    word(PER_CPU + 88, gva(holders + 64 * LONG));
    for page in 0..=LONG {
        word(holders + 64 * page, gva(holders + 64 * ((page + 1) % LONG)));
        word(holders + 64 * page + 48, gva(pages + 4096 * page));
        word(pages + 4096 * page, 1_000_000 + page);
        word(pages + 4096 * page + 8, if page == LONG { 0 } else { 4080 });
    }
    let mut reader = RingReader::new(guest.kernel(), layout(), 1, 0);
    let (mut times, mut rounds) = (Vec::new(), 0);
    loop {
        let drained = reader.drain(&guest.ram, &mut |chunk| times.push(chunk.page_time));
        let drained = drained.expect("a round");
        assert!(drained.bytes <= ROUND_LIMIT);
        rounds += 1;
        if !drained.cut {
            break;
        }
    }
    assert!(rounds > 2, "{rounds} rounds");
    assert_eq!(times, (1_000_000..1_000_000 + LONG).collect::<Vec<_>>());
}

/// A word of the ring's structures that leads outside RAM is no reason to stop
/// reading the other CPUs.
#[test]
fn a_cpu_whose_list_is_damaged_is_passed_over() {
    let guest = filled(ram(), 6);
    let gva = DIRECT_MAP + PER_CPU + 0x200;
    guest.ram.poke(Gpa(BUFFERS + 0x108), &gva.to_le_bytes());
    for (at, value) in [(40, 6u64), (56, u64::MAX - 7), (88, DIRECT_MAP + HOLDERS)] {
        guest
            .ram
            .poke(Gpa(PER_CPU + 0x200 + at), &value.to_le_bytes());
    }
    let mut reader = RingReader::new(guest.kernel(), layout(), 2, 0);
    let drained = round(&mut reader, &mut decoder(), &guest).expect("a round");
    assert_eq!(drained.damaged, 1);
    assert!(drained.bytes > 5 * 4000, "{drained:?}");
    assert!(guest.ram.check().is_ok());
}
