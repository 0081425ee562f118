//! Single things that the formats and the counters have to get right.

use std::collections::BTreeMap;

use xftrace::callflow::{CutWhy, Edges, Flow, Happening, Limits, UncalledWhy};
use xftrace::kernel::Gva;
use xftrace::output::{Format, Sink, Text, TimeColumn, Weight};
use xftrace::ring::record::{LostWhy, What};

use crate::dsl::{address, Story, Table};
use crate::props::run;
use crate::{write, Clock};

#[test]
fn roots_are_counted_by_function_and_pid_over_boots() {
    let mut story = Story::new();
    for _ in 0..3 {
        story
            .on(0, 10, "a")
            .read()
            .on(1, 11, "b")
            .leaf("__x64_sys_openat")
            .read();
    }
    story.reboot().on(0, 10, "a").read();
    let (_, tally) = write(Format::Json, &story.items);
    assert_eq!(tally.roots_of("__x64_sys_read", Some(10)), 4);
    assert_eq!(tally.roots_of("__x64_sys_read", None), 7);
    assert_eq!(tally.roots_of("__x64_sys_openat", Some(11)), 3);
    assert_eq!(tally.roots_of("__x64_sys_openat", Some(10)), 0);
    assert_eq!((tally.boots, tally.tasks), (2, 3));
}

#[test]
fn plain_records_show_no_caller_and_no_epoch_rather_than_wrong_ones() {
    let mut story = Story::new();
    story.on(0, 10, "a").read().leaf("__x64_sys_openat");
    for item in &mut story.items {
        match &mut item.what {
            What::Call(call) => (call.caller, call.epoch, call.task.comm) = (Gva(0), 0, None),
            What::Return(ret) => (ret.caller, ret.epoch) = (Gva(0), 0),
            _ => {}
        }
    }
    let (text, tally) = write(Format::Text(TimeColumn::Wall), &story.items);
    assert_eq!((tally.from_outside, tally.other_caller), (0, 0));
    assert!(text.contains("# key epochs: none"), "{text}");
    let lines: Vec<_> = text.lines().filter(|line| !line.starts_with('#')).collect();
    assert!(lines.iter().any(|line| line.contains("<...>-10")));
    for line in lines {
        assert!(
            !line.contains("called from") && !line.contains("!!"),
            "{line}"
        );
    }
    let (json, _) = write(Format::Json, &story.items);
    let calls = json.lines().filter(|line| line.contains(r#""origin""#));
    assert_eq!(calls.clone().count(), 4);
    for call in calls {
        assert!(call.contains(r#""origin":"untold""#), "{call}");
        assert!(
            !call.contains("caller") && !call.contains("epoch"),
            "{call}"
        );
    }
}

#[test]
fn edges_are_those_of_the_tree_interrupts_apart() {
    let mut story = Story::new();
    story.on(0, 10, "a").read().read();
    story
        .call("__x64_sys_read")
        .call("ksys_read")
        .flags(0x08)
        .leaf("tick_handle")
        .flags(0);
    story.call("getname").ret().ret().ret();
    let mut edges = Edges::new(&Table, 100);
    let mut few = Edges::new(&Table, 2);
    for event in run(&story.items, Limits::default()).0 {
        edges.note(&event);
        few.note(&event);
    }
    let edge = |from: &str, to: &str, count| ((from.to_owned(), to.to_owned()), count);
    let tasks = BTreeMap::from([
        edge("__x64_sys_read", "ksys_read", 3),
        edge("ksys_read", "vfs_read", 2),
        edge("ksys_read", "getname", 1),
    ]);
    assert_eq!((edges.tasks(), edges.dropped()), (tasks, 0));
    assert_eq!(
        edges.interrupts(),
        BTreeMap::from([edge("ksys_read", "tick_handle", 1)])
    );
    assert_eq!((few.tasks().len(), few.dropped()), (2, 2));
}

#[test]
fn a_call_whose_cpu_stays_silent_holds_up_only_so_many_events() {
    let limits = Limits {
        pending: 50,
        ..Limits::default()
    };
    let mut story = Story::new();
    story
        .on(1, 11, "still")
        .call("__x64_sys_read")
        .on(0, 10, "busy");
    for _ in 0..100 {
        story.read();
    }
    story.on(1, 11, "still").ret();
    let (told, _) = run(&story.items, limits);
    assert!(matches!(told[0].what, Happening::Open(call) if call.task.pid == 11));
    assert!(matches!(told.last().map(|event| &event.what),
        Some(Happening::Close(closed)) if closed.id == Some(1)));
}

#[test]
fn what_no_room_is_left_for_is_counted() {
    let limits = Limits {
        tasks: 2,
        depth: 3,
        ..Limits::default()
    };
    let mut story = Story::new();
    for pid in 1..=4 {
        story.on(0, pid, "many").call("__x64_sys_read");
    }
    for pid in 1..=4 {
        story.on(0, pid, "many").ret();
    }
    let (_, tally) = run(&story.items, limits);
    assert_eq!(tally.calls, 4);
    assert_eq!(tally.evictions, tally.tasks - 2);
    assert!(tally.cut.get(CutWhy::Evicted) >= 2);
    assert_eq!(
        tally.uncalled.get(UncalledWhy::Evicted),
        tally.uncalled.total()
    );

    let mut story = Story::new();
    for _ in 0..5 {
        story.call("ksys_read");
    }
    for _ in 0..5 {
        story.ret();
    }
    let (_, tally) = run(&story.items, limits);
    assert_eq!((tally.closed, tally.cut.get(CutWhy::TooDeep)), (3, 2));
    assert_eq!(
        (tally.uncalled.get(UncalledWhy::TooDeep), tally.gaps),
        (2, 0)
    );
}

/// For those who watch live: what can be told is not held back.
#[test]
fn a_call_is_told_of_as_soon_as_its_cpu_goes_on() {
    let mut story = Story::new();
    story.call("__x64_sys_read").call("ksys_read").ret();
    let mut flow = Flow::new(&Table, Limits::default());
    let mut told = Vec::new();
    for item in &story.items {
        flow.push(item);
        told.push(std::iter::from_fn(|| flow.pop()).count());
    }
    assert_eq!(told, [0, 1, 1]);

    story.call("vfs_read");
    flow.push(story.items.last().expect("a call"));
    assert_eq!(flow.pop(), None);
    flow.settle();
    assert!(matches!(
        flow.pop().map(|event| event.what),
        Some(Happening::Open(_))
    ));
}

#[test]
fn a_return_behind_a_loss_is_put_down_to_it() {
    let mut story = Story::new();
    story.on(0, 10, "a").call("__x64_sys_read");
    story.unseen(|story| story.call("ksys_read"));
    story.lost(Some(1), LostWhy::Overrun).ret().ret();
    let (_, tally) = write(Format::Json, &story.items);
    assert_eq!(tally.uncalled.get(UncalledWhy::Lost), 1);
    assert_eq!((tally.uncalled.total(), tally.closed), (1, 1));
    // The next root is known from its beginning again.
    story
        .call("__x64_sys_read")
        .unseen(|story| story.call("ksys_read"))
        .ret()
        .ret();
    let (_, tally) = write(Format::Json, &story.items);
    assert_eq!(tally.uncalled.get(UncalledWhy::Unexplained), 1);
}

/// The next call of the same function at the same depth is another call.
#[test]
fn a_loss_does_not_join_two_calls_of_one_function() {
    let mut story = Story::new();
    story.on(0, 10, "a").call("__x64_sys_read");
    story.unseen(|story| story.after(1000).ret().call("__x64_sys_read"));
    story.lost(Some(2), LostWhy::Overrun).ret();
    let (_, tally) = write(Format::Json, &story.items);
    assert_eq!(tally.closed, 0);
    assert_eq!(tally.cut.get(CutWhy::Lost), 1);
    assert_eq!(tally.uncalled.get(UncalledWhy::Lost), 1);
    assert_eq!(tally.lost_records.get(LostWhy::Overrun), 2);

    let mut story = Story::new();
    story
        .on(0, 10, "a")
        .call("__x64_sys_read")
        .lost(Some(0), LostWhy::Overrun)
        .ret();
    let (_, tally) = write(Format::Json, &story.items);
    assert_eq!((tally.closed, tally.cut.total()), (1, 0));
}

#[test]
fn untraceable_calls_are_counted_from_where_the_trace_found_them() {
    let mut story = Story::new();
    for overrun in [7, 7, 9, 12] {
        story
            .on(0, 10, "a")
            .call("__x64_sys_read")
            .ret_as(|ret| ret.overrun = overrun);
    }
    assert_eq!(write(Format::Json, &story.items).1.overruns, 5);
}

#[test]
fn a_live_trace_has_titles_but_no_head() {
    let mut story = Story::new();
    story.on(3, 10, "a").leaf("getname");
    let mut out = Vec::new();
    let mut text = Text::live(&mut out, Clock, 100, TimeColumn::Wall).expect("memory takes all");
    for event in run(&story.items, Limits::default()).0 {
        text.event(&event).expect("memory takes all");
    }
    let shown = String::from_utf8(out).expect("ASCII");
    let lines: Vec<&str> = shown.lines().collect();
    assert!(lines[0].starts_with("#      TIME"), "{shown}");
    assert!(
        lines[3].contains(" |    3) ") && lines[3].contains("|  getname();"),
        "{shown}"
    );
}

#[test]
fn the_cpu_column_is_as_wide_as_the_last_cpu_needs() {
    let mut story = Story::new();
    story
        .on(0, 10, "a")
        .leaf("getname")
        .on(127, 11, "b")
        .leaf("getname");
    let (text, _) = write(Format::Text(TimeColumn::Guest), &story.items);
    assert!(text.contains(" |    0)"), "{text}");
    assert!(text.contains(" |  127)"), "{text}");
}

#[test]
fn frames_of_folded_stacks_keep_their_separators() {
    let mut story = Story::new();
    story
        .on(0, 10, "a;b c")
        .call_from("getname", address("x64_sys_call"))
        .ret();
    let format = Format::Folded {
        weight: Weight::Calls,
        by_pid: false,
    };
    assert_eq!(write(format, &story.items).0, "a:b c;getname 1\n");
}

/// A loss that is told of, and a moment of which the host's time is not known.
#[test]
fn json_tells_of_losses_and_leaves_out_times_it_does_not_know() {
    let mut story = Story::new();
    story
        .on(0, 10, "a")
        .call("__x64_sys_read")
        .lost(None, LostWhy::Torn)
        .ret();
    let (text, _) = write(Format::Json, &story.items);
    let lines: Vec<serde_json::Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    let lost = &lines[2];
    assert_eq!(
        (&lost["type"], &lost["why"]),
        (&"lost".into(), &"torn".into())
    );
    assert!(lost["records"].is_null());
    assert_eq!(lost["open"][0]["func"], "__x64_sys_read");
    assert_eq!(lines[3]["over_loss"], true);

    let mut story = Story::new();
    story.reboot().reboot().leaf("getname");
    let (text, _) = write(Format::Json, &story.items);
    let leaf: serde_json::Value =
        serde_json::from_str(text.lines().nth(1).expect("an event")).expect("JSON");
    assert!(leaf.get("time").is_none() && leaf["guest_ns"].is_u64());
}
