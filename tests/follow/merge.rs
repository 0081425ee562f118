//! The items of all CPUs in the order of their times, while more may come.

use std::fs;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use xftrace::ring::record::{Item, What};
use xftrace::session::{Follow, Look, Session, KLOG_FILE, SETTLE};

use crate::growing::{Growing, Record};

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn open(growing: &Growing) -> Session {
    Session::open(growing.dir()).expect("a session")
}

/// What comes of one look.
fn look(follow: &mut Follow<'_>, now: Instant) -> (Look, Vec<Item>) {
    let mut items = Vec::new();
    follow.refresh().expect("session.json");
    let look = follow.look(now, &mut |item| items.push(item));
    (look.expect("the session's files"), items)
}

fn times(items: &[Item]) -> Vec<u64> {
    items.iter().map(|item| item.time).collect()
}

/// What looks give until there is no more.
fn rest(follow: &mut Follow<'_>, now: Instant) -> Vec<Item> {
    let mut items = Vec::new();
    for _ in 0..100_000 {
        let (look, more) = look(follow, now);
        items.extend(more);
        match look {
            Look::Ended => return items,
            Look::More => {}
            Look::Waiting => panic!("waits for a session that is closed"),
        }
    }
    panic!("no end");
}

fn report(session: &Session) -> Vec<Item> {
    let items: Result<_, _> = session.items().collect();
    items.expect("the session's files")
}

#[test]
fn what_comes_late_is_in_its_place() {
    let mut growing = Growing::new(2);
    let session = open(&growing);
    let mut follow = Follow::new(&session).expect("keys");
    let start = Instant::now();
    growing.add(0, 10, Record::Other(1000));
    growing.add(0, 30, Record::Other(1001));
    assert_eq!(look(&mut follow, start), (Look::Waiting, vec![]));
    // Within the time that it may take, the other CPU's file gets what is older.
    growing.add(1, 20, Record::Other(1002));
    growing.add(1, 40, Record::Other(1003));
    let (waiting, none) = look(&mut follow, start + SETTLE - ms(1));
    assert_eq!((waiting, none), (Look::Waiting, vec![]));
    let (_, items) = look(&mut follow, start + SETTLE);
    assert_eq!(times(&items), [10, 20, 30]);
    // What was seen first just before settles as long after that.
    let (_, items) = look(&mut follow, start + 2 * SETTLE - ms(2));
    assert_eq!(times(&items), [] as [u64; 0]);
    let (_, items) = look(&mut follow, start + 2 * SETTLE);
    assert_eq!(times(&items), [40]);
    // Later than it may: not in its place, but there, and at once.
    growing.add(1, 41, Record::Other(1004));
    growing.add(0, 35, Record::Other(1005));
    let (_, items) = look(&mut follow, start + 3 * SETTLE);
    assert_eq!(times(&items), [35]);
    growing.close();
    let now = start + 3 * SETTLE + ms(1);
    assert_eq!(times(&rest(&mut follow, now)), [41]);
}

#[test]
fn a_silent_cpu_holds_nothing_back() {
    let mut growing = Growing::new(4);
    let session = open(&growing);
    let mut follow = Follow::new(&session).expect("keys");
    let start = Instant::now();
    growing.add(3, 1, Record::Other(1000));
    look(&mut follow, start);
    for n in 1..50u64 {
        growing.add(0, 10 * n, Record::Other(1000));
        let (_, items) = look(&mut follow, start + SETTLE * n as u32);
        let before = if n == 1 { 1 } else { 10 * (n - 1) };
        assert_eq!(times(&items), [before]);
    }
}

/// A guest writes what it likes on its pages, times too.
#[test]
fn a_time_that_is_made_up_holds_nothing_back() {
    for made_up in [0, u64::MAX] {
        let mut growing = Growing::new(2);
        let session = open(&growing);
        let mut follow = Follow::new(&session).expect("keys").holding(8);
        let start = Instant::now();
        growing.add(1, made_up, Record::Other(1001));
        let mut given = Vec::new();
        for n in 1..100u64 {
            growing.add(0, 10 * n, Record::Other(1000));
            growing.add(1, 10 * n + 1, Record::Other(1001));
            given.extend(look(&mut follow, start + SETTLE * n as u32).1);
        }
        assert!(given.len() > 190, "{made_up}: {} items", given.len());
        growing.close();
        given.extend(rest(&mut follow, start + 100 * SETTLE));
        assert_eq!(given.len(), 199, "{made_up}");
    }
}

/// Else it could be read no faster than its share each time that items settle.
#[test]
fn half_of_the_room_is_for_one_busy_cpu_of_many() {
    let mut growing = Growing::new(8);
    for n in 0..100 {
        growing.add(5, n, Record::Other(1000));
    }
    let session = open(&growing);
    let mut follow = Follow::new(&session).expect("keys").holding(64);
    look(&mut follow, Instant::now());
    assert_eq!(follow.held(), 32);
}

/// A key is in the file before what was made with it.
#[test]
fn keys_are_read_as_they_are_handed_out() {
    let mut growing = Growing::new(1);
    let session = open(&growing);
    let mut follow = Follow::new(&session).expect("keys");
    let start = Instant::now();
    growing.add(0, 10, Record::Root);
    look(&mut follow, start);
    growing.rotate();
    growing.add(0, 20, Record::RootReturn);
    look(&mut follow, start);
    growing.close();
    let items = rest(&mut follow, start);
    let forged = items
        .iter()
        .filter(|item| matches!(item.what, What::Forged(_)));
    assert_eq!((items.len(), forged.count()), (2, 0));
}

#[test]
fn no_more_is_held_than_there_is_room_for() {
    const ROOM: usize = 64;
    const CHUNK: u64 = 5;
    const CPUS: u16 = 8;
    let mut growing = Growing::new(CPUS.into());
    let session = open(&growing);
    let mut follow = Follow::new(&session).expect("keys").holding(ROOM);
    let start = Instant::now();
    let fill = |growing: &mut Growing, cpu: u16| {
        for n in 0..200 {
            let records: Vec<_> = (0..CHUNK)
                .map(|k| ((n * CHUNK + k) * 100 + u64::from(cpu), Record::Other(1000)))
                .collect();
            growing.add_all(cpu, &records);
        }
    };
    // Half of the room for who comes first, and a share for each other; what is
    // in a chunk comes on top.
    let most = ROOM + (usize::from(CPUS) + 1) * (CHUNK as usize - 1);
    let (mut given, mut seen) = (Vec::new(), Vec::new());
    for cpu in 0..CPUS {
        // One CPU more each time.
        fill(&mut growing, cpu);
        for _ in 0..3 {
            given.extend(look(&mut follow, start + SETTLE * u32::from(cpu)).1);
            seen.push(follow.held());
        }
    }
    let peak = seen.iter().max().copied();
    assert!(
        peak.is_some_and(|peak| (ROOM / 2..=most).contains(&peak)),
        "{seen:?}"
    );
    growing.close();
    given.extend(rest(&mut follow, start + SETTLE * 9));
    assert_eq!(given.len(), 200 * CHUNK as usize * usize::from(CPUS));
}

/// Whoever joins late goes through what there is without a pause at each room.
#[test]
fn a_backlog_is_in_order_though_it_does_not_fit() {
    let mut growing = Growing::new(3);
    for n in 0..300u64 {
        growing.add((n % 3 / 2) as u16, n, Record::Other(1000));
    }
    let session = open(&growing);
    let mut follow = Follow::new(&session).expect("keys").holding(16);
    growing.close();
    let items = rest(&mut follow, Instant::now());
    assert_eq!(items, report(&session));
    assert_eq!(times(&items), (0..300).collect::<Vec<_>>());
}

#[test]
fn a_boot_is_told_of_to_its_end_before_the_next() {
    let mut growing = Growing::new(2);
    let session = open(&growing);
    let mut follow = Follow::new(&session).expect("keys");
    let start = Instant::now();
    growing.add(0, 1_000_000, Record::Other(1000));
    look(&mut follow, start);
    growing.add(1, 999_999, Record::Other(1001));
    growing.boot(3);
    // Its clock begins anew, and it has a CPU more.
    growing.add(2, 5, Record::Other(1002));
    let (more, items) = look(&mut follow, start + ms(1));
    assert_eq!(
        (more, times(&items)),
        (Look::More, vec![999_999, 1_000_000])
    );
    let (waiting, items) = look(&mut follow, start + ms(2));
    assert_eq!((waiting, items), (Look::Waiting, vec![]));
    let (_, items) = look(&mut follow, start + ms(2) + SETTLE);
    assert_eq!(
        items.iter().map(|i| (i.boot, i.time)).collect::<Vec<_>>(),
        [(2, 5)]
    );
    growing.add(0, 4, Record::Other(1003));
    growing.close();
    let last = rest(&mut follow, start + ms(3) + SETTLE);
    assert_eq!(times(&last), [4]);
}

#[test]
fn a_session_that_is_left_is_told_of_as_far_as_it_goes() {
    let mut growing = Growing::new(1);
    let session = open(&growing);
    let mut follow = Follow::new(&session).expect("keys");
    growing.add(0, 10, Record::Other(1000));
    let now = Instant::now();
    assert_eq!(look(&mut follow, now), (Look::Waiting, vec![]));
    follow.leave();
    assert_eq!(times(&rest(&mut follow, now)), [10]);
}

/// Files are read while they are written: to the middle of a frame, of a line.
#[test]
fn what_is_cut_is_read_once_it_is_whole() {
    let mut growing = Growing::new(1);
    let session = open(&growing);
    let klog = growing.dir().join(KLOG_FILE);
    let before = fs::read(&klog).expect("a key log");
    growing.rotate();
    growing.add(0, 10, Record::Root);
    growing.rotate();
    growing.add(0, 20, Record::RootReturn);
    let ring = growing.ring(1, 0);
    let (frames, keys) = (
        fs::read(&ring).expect("frames"),
        fs::read(&klog).expect("keys"),
    );
    fs::remove_file(&ring).expect("the ring file");

    let mut follow = Follow::new(&session).expect("keys");
    let start = Instant::now();
    let mut given = Vec::new();
    for length in before.len()..keys.len() {
        fs::write(&klog, &keys[..length]).expect("half a line");
        given.extend(look(&mut follow, start).1);
    }
    fs::write(&klog, &keys).expect("the line");
    // The magic of 8 bytes, then two frames.
    let first = 8 + 32 + 4 + 56;
    for length in 0..=frames.len() {
        fs::write(&ring, &frames[..length]).expect("half a frame");
        given.extend(look(&mut follow, start + SETTLE * length as u32).1);
        let held = usize::from(length >= first) + usize::from(length >= frames.len());
        assert_eq!(given.len() + follow.held(), held, "{length} bytes");
    }
    growing.close();
    given.extend(rest(&mut follow, start));
    assert!(
        matches!(
            given.iter().map(|item| item.what).collect::<Vec<_>>()[..],
            [What::Call(call), What::Return(ret)] if (call.epoch, ret.epoch) == (2, 3)
        ),
        "{given:?}"
    );
}

/// A record of the guest: on which CPU, how many ns after the one before it, and
/// how many ms later it is in its file.
fn record() -> impl Strategy<Value = (u16, u64, u64)> {
    (0u16..4, 1u64..40_000_000, 0u64..SETTLE.as_millis() as u64)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever comes in when, as long as it comes in time, is given as a report
    /// gives it: all of it, in the same order.
    #[test]
    fn what_is_followed_is_what_is_reported(
        boots in prop::collection::vec(prop::collection::vec(record(), 1..60), 1..3),
        pauses in prop::collection::vec(1u64..200, 1..20),
        room in 1usize..200,
    ) {
        let mut growing = Growing::new(4);
        let session = open(&growing);
        let mut follow = Follow::new(&session).expect("keys").holding(room);
        let start = Instant::now();
        let mut pauses = pauses.iter().cycle();
        let mut given = Vec::new();
        let mut now = 0u64;
        for (number, records) in boots.iter().enumerate() {
            if number > 0 {
                growing.boot(4);
            }
            // When each is in its file, ms; never before one that its CPU wrote
            // before it.
            let (booted, mut time, mut in_file) = (now, 0, [now; 4]);
            let mut arrivals = Vec::new();
            for &(cpu, gap, lag) in records {
                time += gap;
                let in_file = &mut in_file[usize::from(cpu)];
                *in_file = (*in_file).max(booted + time / 1_000_000 + lag);
                arrivals.push((*in_file, cpu, time));
            }
            arrivals.sort_unstable();
            let mut arrivals = arrivals.into_iter().peekable();
            while arrivals.peek().is_some() {
                now += pauses.next().expect("a pause");
                while let Some((_, cpu, time)) = arrivals.next_if(|(when, ..)| *when <= now) {
                    growing.add(cpu, time, Record::Other(1000 + cpu));
                }
                given.extend(look(&mut follow, start + ms(now)).1);
                prop_assert!(follow.held() <= room.max(8), "{} held", follow.held());
            }
        }
        growing.close();
        given.extend(rest(&mut follow, start + ms(now)));
        drop(session);
        prop_assert_eq!(given, report(&open(&growing)));
    }
}

/// What comes later may have keys that are not known to whoever opened it.
#[test]
fn a_session_that_is_still_written_is_read_as_it_was_when_it_was_opened() {
    let mut growing = Growing::new(2);
    growing.add(0, 10, Record::Root);
    // Of another CPU the file was just made.
    fs::write(growing.ring(1, 1), b"XF").expect("a file");
    let session = open(&growing);
    fs::remove_file(growing.ring(1, 1)).expect("the file");
    growing.rotate();
    growing.add(0, 20, Record::RootReturn);
    growing.add(1, 15, Record::Root);
    assert_eq!(times(&report(&session)), [10]);
    let all = report(&open(&growing));
    assert_eq!(times(&all), [10, 15, 20]);
    let is_forged = |item: &Item| matches!(item.what, What::Forged(_));
    assert!(!all.iter().any(is_forged), "{all:?}");
    // Where the helper has left, that is all there is.
    growing.close();
    assert_eq!(times(&report(&open(&growing))), [10, 15, 20]);
}
