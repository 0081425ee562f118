//! How fast it is. Not a test that can fail by itself, so it is not run with
//! the others:
//! `cargo test --release --test flow -- --ignored --nocapture speed`

use std::io;
use std::time::Instant;

use xftrace::callflow::{events, Limits};
use xftrace::output::{Format, TimeColumn, Weight};
use xftrace::ring::record::Item;

use crate::dsl::{Story, Table};
use crate::{heading, readable, Clock};

fn items() -> Vec<Item> {
    let mut story = Story::new();
    for turn in 0..100_000u32 {
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

#[test]
#[ignore = "a measurement"]
fn speed() {
    let items = items();
    let rate = |what: &str, work: &mut dyn FnMut()| {
        let start = Instant::now();
        work();
        let rate = items.len() as f64 / start.elapsed().as_secs_f64() / 1e6;
        println!("{what}: {rate:.2} M records/s ({} records)", items.len());
    };
    rate("count only", &mut || {
        let mut all = events(readable(&items), &Table, Limits::default());
        all.by_ref().for_each(drop);
        let tally = all.tally();
        assert_eq!(tally.calls, tally.closed);
    });
    for (what, format) in [
        ("text, both passes", Format::Text(TimeColumn::Wall)),
        ("json", Format::Json),
        (
            "folded",
            Format::Folded {
                weight: Weight::OwnTime,
                by_pid: false,
            },
        ),
    ] {
        rate(what, &mut || {
            let all = || readable(&items);
            let tally = format.write(io::sink(), &heading(), &Clock, &Table, all);
            tally.expect("a sink takes all");
        });
    }
}
