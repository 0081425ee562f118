//! The time that it takes grows as the trace does, and no faster: a trace of a
//! busy host has many millions of records.

use std::io;
use std::time::Duration;

use xftrace::callflow::{events, Limits};
use xftrace::output::{Format, TimeColumn, Weight};
use xftrace::ring::record::Item;

use crate::dsl::{Story, Table};
use crate::time::cpu_time;
use crate::{heading, readable, Clock};

/// Records of `turns` system calls, by eight tasks on two CPUs.
fn items(turns: u32) -> Vec<Item> {
    let mut story = Story::new();
    for turn in 0..turns {
        story.on((turn % 2) as u16, 100 + (turn % 8) as i32, "worker");
        story
            .call("__x64_sys_openat")
            .leaf("getname")
            .call("do_sys_openat2")
            .ret()
            .ret()
            .read();
    }
    story.items
}

/// A work, and what it is called.
type Work<'a> = (&'a str, &'a dyn Fn(&[Item]));

/// The processor's time that it takes, at best of three: what else the machine
/// does meanwhile does not count.
fn time(items: &[Item], work: &dyn Fn(&[Item])) -> Duration {
    (0..3)
        .map(|_| {
            let start = cpu_time();
            work(items);
            cpu_time() - start
        })
        .min()
        .expect("three times")
}

#[test]
fn a_trace_eight_times_as_long_takes_about_eight_times_as_long() {
    let (short, long) = (items(500), items(4_000));
    let count = |items: &[Item]| {
        let mut all = events(readable(items), &Table, Limits::default());
        all.by_ref().for_each(drop);
        assert_eq!(all.tally().calls, all.tally().closed);
    };
    let write = |format: Format| {
        move |items: &[Item]| {
            let all = || readable(items);
            let tally = format.write(io::sink(), &heading(), &Clock, &Table, all);
            tally.expect("a sink takes all");
        }
    };
    let folded = Format::Folded {
        weight: Weight::OwnTime,
        by_pid: false,
    };
    let works: [Work<'_>; 4] = [
        ("counted", &count),
        ("as text", &write(Format::Text(TimeColumn::Wall))),
        ("as JSON", &write(Format::Json)),
        ("folded", &write(folded)),
    ];
    for (what, work) in works {
        let (short_time, long_time) = (time(&short, work), time(&long, work));
        let ratio = long_time.as_secs_f64() / short_time.as_secs_f64();
        println!("{what}: {short_time:?} and {long_time:?}, a ratio of {ratio:.1}");
        // Time that grew with the square would be 64 times as long.
        assert!(ratio < 24.0, "{what}: {ratio:.1} times as long");
    }
}
