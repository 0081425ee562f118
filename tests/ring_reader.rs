//! The passive reader against a writer that follows the steps of
//! kernel/trace/ring_buffer.c, one store at a time, while the reader reads:
//! whatever the interleaving, each record comes out once and in order, or is
//! told as lost.

mod support;

use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use support::guest::{Guest, Plan, DIRECT_MAP};
use support::ring::{keys, layout, Code, Writer, BUFFERS, PAGES, TYPES};
use xftrace::kernel::{Gva, Kernel};
use xftrace::ram::{Gpa, Layout, VecRam};
use xftrace::ring::record::What;
use xftrace::ring::{events, Chunk, Clock, Decoder, Gap, RingReader};

/// What came out: the numbers of the records, the records told as lost, and
/// what should not be there.
#[derive(Debug, Default)]
struct Out {
    seqs: Vec<u64>,
    lost: u64,
    wrong: Vec<What>,
}

fn decode(chunks: &[Chunk]) -> Out {
    let keys = keys();
    let mut decoder = Decoder::new(TYPES, 1);
    let mut out = Out::default();
    for chunk in chunks {
        decoder.chunk(chunk, &keys, &Code, &mut |item| match item.what {
            What::Call(call) => out.seqs.push(call.seq),
            What::Lost(lost) => out.lost += lost.records.expect("a number"),
            what => out.wrong.push(what),
        });
    }
    out
}

/// Records without numbers tell of no hole: for them, each must have a gap
/// noted in front of it.
fn hole_without_a_gap(chunks: &[Chunk]) -> Option<&Chunk> {
    let mut next = None;
    chunks.iter().find(|chunk| {
        let events = events(&chunk.bytes, Clock(0)).filter_map(Result::ok);
        let seq = |payload: &[u8]| Some(u32::from_le_bytes(*payload.get(28..)?.first_chunk()?));
        let mut hole = false;
        for (at, seq) in events.filter_map(|event| seq(event.payload)).enumerate() {
            let expected = next.replace(seq + 1);
            hole |= expected.is_some_and(|next| next != seq) && (at > 0 || chunk.gap.is_none());
        }
        hole
    })
}

fn kernel() -> Kernel {
    Guest::new().kernel()
}

/// A guest whose memory changes by some stores before each read.
fn guest(writer: Arc<Mutex<Writer>>, pace: Vec<u8>) -> Guest {
    let turn = Mutex::new(0usize);
    let ram = VecRam::new(Layout::flat(Plan::default().ram).expect("a layout"));
    let ram = ram.with_hook(move |ram, _, _| {
        let mut turn = turn.lock().expect("a turn");
        *turn += 1;
        let steps = pace.get(*turn % pace.len().max(1)).copied().unwrap_or(0);
        let mut writer = writer.lock().expect("the writer");
        (0..steps).for_each(|_| writer.step(ram));
    });
    Guest::load(Plan::default(), ram)
}

#[test]
fn what_was_written_is_read_once_and_in_order() {
    let writer = Arc::new(Mutex::new(Writer::new(8)));
    let guest = guest(Arc::clone(&writer), Vec::new());
    let mut reader = RingReader::new(kernel(), layout(), 1, 0);
    let mut chunks = Vec::new();
    for round in 0..60 {
        let mut writer = writer.lock().expect("the writer");
        (0..round * 7 % 300).for_each(|i| writer.record(if i % 40 < 20 { 0 } else { 700 }));
        writer.settle(&guest.ram);
        drop(writer);
        reader
            .drain(&guest.ram, &mut |chunk| chunks.push(chunk))
            .expect("a round");
    }
    let out = decode(&chunks);
    let written = u64::from(writer.lock().expect("the writer").seq);
    assert!(
        written > 5000,
        "the ring of some 700 records went round often"
    );
    assert_eq!((out.seqs, out.lost), ((0..written).collect::<Vec<_>>(), 0));
    assert!(out.wrong.is_empty());
}

#[test]
fn a_reader_that_begins_later_takes_nothing_older_and_knows_the_time() {
    let writer = Arc::new(Mutex::new(Writer::new(8)));
    let guest = guest(Arc::clone(&writer), Vec::new());
    let write = |records: u32| {
        let mut writer = writer.lock().expect("the writer");
        (0..records).for_each(|_| writer.record(700));
        writer.settle(&guest.ram);
        writer.time
    };
    // Once around, so that what begins later begins in the middle of a page.
    let begun = write(1000);
    let mut reader = RingReader::new(kernel(), layout(), 1, 0);
    let mut chunks = Vec::new();
    let mut keep = |chunk| chunks.push(chunk);
    reader.begin_here(&guest.ram, &mut keep).expect("a round");
    write(100);
    reader.drain(&guest.ram, &mut keep).expect("a round");
    assert_eq!(chunks[0].gap, Some(Gap::Earlier));
    assert!(chunks[1].offset > 0 && chunks[1..].iter().all(|chunk| chunk.gap.is_none()));

    let keys = keys();
    let mut decoder = Decoder::new(TYPES, 1);
    let mut calls = Vec::new();
    for chunk in &chunks {
        decoder.chunk(chunk, &keys, &Code, &mut |item| {
            if let What::Call(call) = item.what {
                calls.push((call.seq, item.time));
            }
        });
    }
    let expected: Vec<_> = (0..100)
        .map(|n| (1000 + n, begun + 700 * (n + 1)))
        .collect();
    assert_eq!(calls, expected);
}

#[test]
fn a_page_that_is_taken_between_two_looks_is_a_gap() {
    let mut writer = Writer::new(2);
    let ram = VecRam::new(Layout::flat(Plan::default().ram).expect("a layout"));
    (0..150).for_each(|_| writer.record(700));
    while !writer.stores.is_empty() {
        writer.step(&ram);
    }
    // The second look at the first page is the one before it is copied.
    (0..60).for_each(|_| writer.record(700));
    let (writer, looks) = (Mutex::new(writer), Mutex::new(0));
    let ram = ram.with_hook(move |ram, gpa, _| {
        let mut looks = looks.lock().expect("a count");
        *looks += u32::from(gpa == Gpa(PAGES));
        let mut writer = writer.lock().expect("the writer");
        while *looks == 2 && !writer.stores.is_empty() {
            writer.step(ram);
        }
    });
    let guest = Guest::load(Plan::default(), ram);
    let mut reader = RingReader::new(kernel(), layout(), 1, 0);
    let mut chunks = Vec::new();
    for _ in 0..2 {
        reader
            .drain(&guest.ram, &mut |chunk| chunks.push(chunk))
            .expect("a round");
    }
    let gaps: Vec<_> = chunks.iter().map(|chunk| chunk.gap).collect();
    assert_eq!(gaps, [Some(Gap::Overrun), None]);
    let out = decode(&chunks);
    assert_eq!((out.seqs.first(), out.seqs.last()), (Some(&92), Some(&209)));
}

#[test]
fn a_ring_of_the_same_time_all_round_is_still_read_in_order() {
    // The guest's clock stands still for the whole test.
    let writer = Arc::new(Mutex::new(Writer::new(4)));
    let guest = guest(Arc::clone(&writer), Vec::new());
    let mut reader = RingReader::new(kernel(), layout(), 1, 0);
    let mut chunks = Vec::new();
    for _ in 0..50 {
        let mut writer = writer.lock().expect("the writer");
        (0..150).for_each(|_| writer.record(0));
        writer.settle(&guest.ram);
        drop(writer);
        reader
            .drain(&guest.ram, &mut |chunk| chunks.push(chunk))
            .expect("a round");
    }
    let out = decode(&chunks);
    assert!(out.wrong.is_empty(), "{:?}", out.wrong.first());
    assert_eq!(out.seqs, (0..7500).collect::<Vec<_>>());
}

#[test]
fn a_guest_that_took_every_page_once_has_moved_them_all() {
    // The page outside the ring is then the one that it was.
    for pages in 3..9 {
        let writer = Arc::new(Mutex::new(Writer::new(pages)));
        let guest = guest(Arc::clone(&writer), Vec::new());
        let mut reader = RingReader::new(kernel(), layout(), 1, 0);
        let mut chunks = Vec::new();
        for round in 0..40 {
            let mut writer = writer.lock().expect("the writer");
            for part in 0..=pages {
                (0..200).for_each(|_| writer.record(300));
                if round % 3 == 2 || part == 0 {
                    writer.take_page();
                }
            }
            writer.settle(&guest.ram);
            drop(writer);
            reader
                .drain(&guest.ram, &mut |chunk| chunks.push(chunk))
                .expect("a round");
        }
        let out = decode(&chunks);
        let written = u64::from(writer.lock().expect("the writer").seq);
        assert!(out.wrong.is_empty(), "{pages}: {:?}", out.wrong.first());
        assert_eq!(out.seqs.len() as u64 + out.lost, written);
    }
}

/// `echo 1 > snapshot`, again and again.
#[test]
fn a_buffer_that_is_swapped_for_another_and_back_is_read_on() {
    const SPARE: u64 = 0x10_0000;
    let idle = Arc::new(Mutex::new(Writer::new(8)));
    let guest = guest(Arc::clone(&idle), Vec::new());
    let mut used = [Writer::at(0, 8), Writer::at(SPARE, 8)];
    let settle = |writer: &mut Writer| {
        writer.settle(&guest.ram);
    };
    used.iter_mut().for_each(settle);
    let mut reader = RingReader::new(kernel(), layout(), 1, 0);
    let (mut chunks, mut swapped) = (Vec::new(), 0);
    reader.drain(&guest.ram, &mut drop).expect("a round");
    for round in 0..30 {
        let [now, _] = &mut used;
        (0..250).for_each(|_| now.record(300));
        settle(now);
        // Every other time, all that was written is read before the swap.
        if round % 4 > 1 {
            let drained = reader.drain(&guest.ram, &mut |chunk| chunks.push(chunk));
            swapped += drained.expect("a round").swapped;
        }
        let (seq, time) = (now.seq, now.time);
        used.swap(0, 1);
        let [now, _] = &mut used;
        (now.seq, now.time) = (seq, time);
        (0..50).for_each(|_| now.record(300));
        settle(now);
        reader.look_in(Gva(DIRECT_MAP + now.base + BUFFERS));
        let drained = reader.drain(&guest.ram, &mut |chunk| chunks.push(chunk));
        swapped += drained.expect("a round").swapped;
    }
    let out = decode(&chunks);
    assert!(out.wrong.is_empty(), "{:?}", out.wrong.first());
    assert_eq!(out.seqs, (0..30 * 300).collect::<Vec<_>>());
    assert_eq!(swapped, 30);
}

/// Records so many, then one after the clock has gone on by `tick`, then so many more while
/// the reader reads at this pace.
fn late(pace: Vec<u8>, bursts: Vec<(u32, u32)>, tick: u64) -> Result<(), TestCaseError> {
    let writer = Arc::new(Mutex::new(Writer::new(64)));
    let guest = guest(Arc::clone(&writer), pace);
    let settle = |writer: &Mutex<Writer>| {
        let mut writer = writer.lock().expect("the writer");
        writer.settle(&guest.ram);
    };
    settle(&writer);
    let mut reader = RingReader::new(kernel(), layout(), 1, 0);
    let mut chunks = Vec::new();
    let mut drain = || {
        reader
            .drain(&guest.ram, &mut |chunk| chunks.push(chunk))
            .expect("a round");
    };
    for (before, meanwhile) in bursts {
        (0..before).for_each(|_| writer.lock().expect("the writer").record(0));
        writer.lock().expect("the writer").record(tick);
        settle(&writer);
        (0..meanwhile).for_each(|_| writer.lock().expect("the writer").record(0));
        (0..3).for_each(|_| drain());
    }
    settle(&writer);
    (0..2).for_each(|_| drain());
    let out = decode(&chunks);
    let written = u64::from(writer.lock().expect("the writer").seq);
    prop_assert!(out.wrong.is_empty(), "{:?}", out.wrong.first());
    prop_assert!(
        hole_without_a_gap(&chunks).is_none(),
        "{:?}",
        hole_without_a_gap(&chunks)
    );
    prop_assert!(
        out.seqs.windows(2).all(|pair| pair[0] < pair[1]),
        "out of order or twice"
    );
    prop_assert_eq!(out.seqs.len() as u64 + out.lost, written);
    prop_assert_eq!(out.seqs.last().copied(), written.checked_sub(1));
    Ok(())
}

/// Padding is what it was before the page was taken: a page that was filled as far as
/// before ends in the same bytes.
#[test]
fn a_page_that_ends_as_it_did_is_another_one() {
    let bursts = vec![(12708, 285), (10403, 249), (6000, 100)];
    late(vec![1], bursts, 0).expect("in order");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// The writer goes on while the reader reads, at any pace, and laps it as
    /// often as it likes. (Its clock moves here: a ring that is lapped within
    /// one reading of a clock gives no two pages that can be told apart.)
    #[test]
    fn nothing_comes_out_wrong_whatever_the_interleaving(
        nr_pages in 2u64..7,
        pace in prop::collection::vec(0u8..20, 1..30),
        bursts in prop::collection::vec((0u32..400, prop::sample::select(vec![1u64, 3, 900])), 1..12),
    ) {
        let writer = Arc::new(Mutex::new(Writer::new(nr_pages)));
        let guest = guest(Arc::clone(&writer), pace);
        {
            let mut writer = writer.lock().expect("the writer");
            writer.settle(&guest.ram);
        }
        let mut reader = RingReader::new(kernel(), layout(), 1, 0);
        let mut chunks = Vec::new();
        for (records, advance) in bursts {
            {
                let mut writer = writer.lock().expect("the writer");
                (0..records).for_each(|_| writer.record(advance));
            }
            for _ in 0..3 {
                reader.drain(&guest.ram, &mut |chunk| chunks.push(chunk)).expect("a round");
            }
        }
        // The writer comes to rest; the reader reads what is left.
        {
            let mut writer = writer.lock().expect("the writer");
            writer.settle(&guest.ram);
        }
        for _ in 0..2 {
            reader.drain(&guest.ram, &mut |chunk| chunks.push(chunk)).expect("a round");
        }
        let out = decode(&chunks);
        let written = u64::from(writer.lock().expect("the writer").seq);
        prop_assert!(out.wrong.is_empty(), "{:?}", out.wrong.first());
        prop_assert!(hole_without_a_gap(&chunks).is_none(), "{:?}", hole_without_a_gap(&chunks));
        prop_assert!(out.seqs.windows(2).all(|pair| pair[0] < pair[1]), "out of order or twice");
        prop_assert_eq!(out.seqs.len() as u64 + out.lost, written);
        prop_assert_eq!(out.seqs.last().copied(), written.checked_sub(1));
    }

    /// The writer's clock stands still, and the writer goes on while the reader
    /// looks, from page to page but not all the way round: the pages that it
    /// takes meanwhile bear the same time as all others.
    #[test]
    fn pages_taken_during_the_look_are_not_read_out_of_their_order(
        pace in prop::collection::vec(0u8..24, 1..30),
        bursts in prop::collection::vec(100u32..900, 2..10),
    ) {
        let writer = Arc::new(Mutex::new(Writer::new(64)));
        let guest = guest(Arc::clone(&writer), pace);
        let settle = |writer: &Mutex<Writer>| {
            let mut writer = writer.lock().expect("the writer");
            writer.settle(&guest.ram);
        };
        settle(&writer);
        let mut reader = RingReader::new(kernel(), layout(), 1, 0);
        let mut chunks = Vec::new();
        // Once all the way round, so that no page is empty.
        for _ in 0..8 {
            (0..1000).for_each(|_| writer.lock().expect("the writer").record(0));
            settle(&writer);
            reader.drain(&guest.ram, &mut |chunk| chunks.push(chunk)).expect("a round");
        }
        for records in bursts {
            (0..records).for_each(|_| writer.lock().expect("the writer").record(0));
            reader.drain(&guest.ram, &mut |chunk| chunks.push(chunk)).expect("a round");
        }
        settle(&writer);
        for _ in 0..2 {
            reader.drain(&guest.ram, &mut |chunk| chunks.push(chunk)).expect("a round");
        }
        let out = decode(&chunks);
        let written = u64::from(writer.lock().expect("the writer").seq);
        prop_assert!(out.wrong.is_empty(), "{:?}", out.wrong.first());
        prop_assert_eq!(out.seqs.len() as u64 + out.lost, written);
    }

    /// The same, where the reader comes too late: the pages that the writer takes meanwhile
    /// are those that would be read first.
    #[test]
    fn pages_taken_after_a_late_look_are_not_read_out_of_their_order(
        pace in prop::collection::vec(0u8..40, 1..30),
        bursts in prop::collection::vec((6000u32..20_000, 100u32..900), 2..6),
        tick in 0u64..2,
    ) {
        late(pace, bursts, tick)?;
    }

    /// Somebody in the guest reads the ring as well, page by page
    /// (`trace_pipe`), while it is written and we read it.
    #[test]
    fn readers_in_the_guest_do_not_mix_up_the_order(
        nr_pages in 3u64..9,
        pace in prop::collection::vec(0u8..6, 1..30),
        bursts in prop::collection::vec((20u32..400, 0usize..4), 4..30),
    ) {
        let writer = Arc::new(Mutex::new(Writer::new(nr_pages)));
        let guest = guest(Arc::clone(&writer), pace);
        let settle = || {
            let mut writer = writer.lock().expect("the writer");
            writer.settle(&guest.ram);
        };
        settle();
        let mut reader = RingReader::new(kernel(), layout(), 1, 0);
        let mut chunks = Vec::new();
        for (records, taken) in bursts {
            {
                let mut writer = writer.lock().expect("the writer");
                for part in 0..=taken {
                    (0..records / 4).for_each(|_| writer.record(300));
                    if part < taken {
                        writer.take_page();
                    }
                }
            }
            for _ in 0..4 {
                reader.drain(&guest.ram, &mut |chunk| chunks.push(chunk)).expect("a round");
            }
        }
        settle();
        for _ in 0..2 {
            reader.drain(&guest.ram, &mut |chunk| chunks.push(chunk)).expect("a round");
        }
        let out = decode(&chunks);
        let written = u64::from(writer.lock().expect("the writer").seq);
        prop_assert!(out.wrong.is_empty(), "{:?}", out.wrong.first());
        prop_assert_eq!(out.seqs.len() as u64 + out.lost, written);
        prop_assert_eq!(out.seqs.last().copied(), written.checked_sub(1));
    }
}
