//! The call flow of a session that grows.

use std::time::Duration;

use xftrace::follow::{follow, LiveFormat, Next};
use xftrace::output::{Format, TimeColumn};
use xftrace::session::{Session, SETTLE};

use crate::growing::{Growing, Record, PAIRED};

const TEXT: LiveFormat = LiveFormat::Text(TimeColumn::Wall);

/// A read with a call in it.
fn read(growing: &mut Growing, cpu: u16, time: u64) {
    growing.add_all(
        cpu,
        &[
            (time, Record::Root),
            (time + 1000, Record::Call),
            (time + 2000, Record::Return),
            (time + 3000, Record::RootReturn),
        ],
    );
}

/// Follows a session, and does something to it after each look, until it is
/// told to stop.
fn followed(
    growing: &mut Growing,
    format: LiveFormat,
    mut step: impl FnMut(&mut Growing, usize) -> Next,
) -> String {
    let session = Session::open(growing.dir()).expect("a session");
    let mut out = Vec::new();
    let mut looks = 0;
    follow(&session, format, &mut out, |longest| {
        assert!(looks < 100, "no end");
        std::thread::sleep(longest);
        looks += 1;
        step(growing, looks)
    })
    .expect("a session that can be followed");
    String::from_utf8(out).expect("text")
}

/// Looks until all has settled.
fn settled() -> usize {
    (SETTLE.as_millis() / 100) as usize + 3
}

#[test]
fn a_session_that_is_closed_is_told_of_as_a_report_does() {
    let mut growing = Growing::new(2);
    growing.pair();
    for n in 0..100 {
        read(&mut growing, (n % 2) as u16, PAIRED + n * 10_000);
    }
    growing.boot(2);
    read(&mut growing, 1, 500);
    growing.add(0, 700, Record::Root);
    growing.close();
    let session = Session::open(growing.dir()).expect("a session");
    for (live, format) in [
        (LiveFormat::Json, Format::Json),
        (TEXT, Format::Text(TimeColumn::Wall)),
        (
            LiveFormat::Text(TimeColumn::Guest),
            Format::Text(TimeColumn::Guest),
        ),
    ] {
        let mut reported = Vec::new();
        format.session(&session, &mut reported).expect("a report");
        let reported = String::from_utf8(reported).expect("text");
        let shown = followed(&mut growing, live, |_, _| Next::More);
        if live == LiveFormat::Json {
            assert_eq!(shown, reported);
            continue;
        }
        // The head has totals, and the mark of a boot its banner from there.
        let body = |text: &str| -> Vec<String> {
            let lines = text.lines().filter(|line| !line.starts_with('#'));
            lines.map(str::to_owned).collect()
        };
        assert_eq!(body(&shown), body(&reported));
        assert!(shown.contains("vfs_read();"), "{shown}");
        assert!(shown.contains("# The guest has booted again. Boot 2"));
    }
}

/// A guest may be rebooted into another kernel while it is traced.
#[test]
fn each_boot_has_the_symbols_of_its_own_kernel() {
    let mut growing = Growing::new(1);
    growing.pair();
    read(&mut growing, 0, PAIRED);
    // The second of these two is found only after the session was opened.
    let shown = followed(&mut growing, LiveFormat::Json, |growing, looks| {
        match looks {
            1 => {
                growing.boot_other(1, 0x300);
                read(growing, 0, PAIRED);
                growing.boot_other(1, 0);
                read(growing, 0, PAIRED);
            }
            2 => growing.close(),
            _ => {}
        }
        Next::More
    });
    let named = shown.matches(r#""type":"leaf""#).count();
    let right = shown.matches(r#""func":"vfs_read""#).count();
    assert_eq!((named, right), (3, 3), "{shown}");
    let session = Session::open(growing.dir()).expect("a session");
    let mut reported = Vec::new();
    let tally = Format::Json.session(&session, &mut reported);
    assert_eq!(tally.expect("a report").forged.total(), 0);
    // The header, which is written before there are boots, apart.
    let events = |text: &str| text.lines().skip(1).map(str::to_owned).collect::<Vec<_>>();
    let reported = String::from_utf8(reported).expect("text");
    assert_eq!(events(&shown), events(&reported));
    // Two boots of one kernel have one file.
    let files = std::fs::read_dir(growing.dir()).expect("the session");
    let names = files.map(|file| file.expect("a file").file_name());
    let maps = names.filter(|name| name.to_string_lossy().starts_with("System.map-"));
    assert_eq!(maps.count(), 2);
}

#[test]
fn a_time_that_is_not_known_yet_is_not_shown() {
    let mut growing = Growing::new(1);
    growing.pair();
    // One look more goes to the end of the boot before.
    let known = settled() + 2;
    let shown = followed(&mut growing, TEXT, |growing, looks| {
        match looks {
            1 => {
                growing.boot(1);
                read(growing, 0, PAIRED + 2_000_000);
            }
            looks if looks == known => growing.pair(),
            looks if looks == known + 1 => read(growing, 0, PAIRED + 500_000_000),
            looks if looks == known + settled() => growing.close(),
            _ => {}
        }
        Next::More
    });
    let lines: Vec<_> = shown.lines().filter(|line| line.contains('|')).collect();
    let before = lines.iter().filter(|line| line.starts_with(" ~"));
    let after = lines
        .iter()
        .filter(|line| line.starts_with(" 12:00:01.5000"));
    assert_eq!((before.count(), after.count()), (3, 3), "{shown}");
    assert!(shown.contains(" ~      1.002000 |"), "{shown}");
    // This boot's kernel lies elsewhere, and that is known by then.
    assert_eq!(shown.matches("vfs_read();").count(), 2, "{shown}");
}

/// A call whose CPU writes nothing more: a read that sleeps.
#[test]
fn a_call_that_nothing_follows_is_shown_while_other_cpus_go_on() {
    let mut growing = Growing::new(2);
    growing.pair();
    let shown = followed(&mut growing, TEXT, |growing, looks| {
        if looks == 1 {
            growing.add(0, PAIRED, Record::Root);
        }
        read(growing, 1, PAIRED + 100_000_000 * looks as u64);
        if looks < 20 {
            Next::More
        } else {
            Next::Stop
        }
    });
    assert!(shown.contains("|  0)      cat-100"), "{shown}");
    assert!(shown.matches("101").count() > 20, "{shown}");
}

#[test]
fn what_is_open_is_cut_where_the_trace_ends_only() {
    for (next, cut) in [(Next::Stop, 0), (Next::Rest, 0), (Next::More, 1)] {
        let mut growing = Growing::new(1);
        growing.pair();
        let shown = followed(&mut growing, LiveFormat::Json, |growing, looks| {
            if looks == 1 {
                growing.add(0, PAIRED, Record::Root);
            }
            if looks < settled() + 2 {
                return Next::More;
            }
            if next == Next::More {
                growing.close();
            }
            next
        });
        assert_eq!(shown.matches("\"type\":\"call\"").count(), 1, "{shown}");
        assert_eq!(shown.matches("\"type\":\"cut\"").count(), cut, "{shown}");
        assert_eq!(shown.matches("\"type\":\"summary\"").count(), cut);
    }
}

#[test]
fn it_pauses_only_where_nothing_is_to_be_read() {
    let mut growing = Growing::new(1);
    growing.add(0, 1, Record::Other(1000));
    growing.boot(1);
    let session = Session::open(growing.dir()).expect("a session");
    let mut pauses = Vec::new();
    follow(&session, TEXT, Vec::new(), |longest| {
        pauses.push(longest);
        if pauses.len() == 2 {
            Next::Stop
        } else {
            Next::More
        }
    })
    .expect("a session that can be followed");
    assert_eq!(pauses, [Duration::ZERO, Duration::from_millis(100)]);
}
