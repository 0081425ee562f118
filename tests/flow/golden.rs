//! Whole files, compared with those in tests/golden.

use std::path::Path;

use xftrace::kernel::Gva;
use xftrace::output::{Format, TimeColumn, Weight};
use xftrace::ring::record::{ForgedWhy, Item, LostWhy, What};

use crate::dsl::{address, Saying, Story, IN_MODULE, NOWHERE};
use crate::{write, write_named};

const TEXT: Format = Format::Text(TimeColumn::Wall);

/// The file as `format` shows `items`, compared with the golden one.
fn check(name: &str, format: Format, items: &[Item]) {
    compare(name, &write(format, items).0);
}

/// The same for the lines below the head of the text format.
fn check_body(name: &str, items: &[Item]) {
    let text = write(TEXT, items).0;
    let titles = text.find("#      TIME").expect("there are titles");
    compare(name, &text[titles..]);
}

fn compare(name: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, text).expect("the golden file can be written");
    }
    let golden = std::fs::read_to_string(&path).expect("there is a golden file");
    for (number, (is, should)) in text.lines().zip(golden.lines()).enumerate() {
        assert_eq!(is, should, "{name}, line {}", number + 1);
    }
    assert_eq!(
        text.len(),
        golden.len(),
        "{name} has other lines at its end"
    );
}

/// Two tasks on two CPUs, one of which moves; the day changes amid it.
fn calls() -> Vec<Item> {
    let mut story = Story::new();
    story.on(0, 123, "sh").read();
    story
        .after(400_000_000)
        .on(1, 7, "kworker/1:0")
        .call("__x64_sys_openat");
    story.after(25_000).leaf("getname");
    story
        .on(0, 123, "sh")
        .call("__x64_sys_read")
        .call("ksys_read");
    story
        .epoch(2)
        .on(1, 7, "kworker/1:0")
        .after(200_000)
        .call("do_sys_openat2")
        .ret()
        .ret();
    // sh sleeps on CPU 0 and wakes on CPU 1.
    story.on(0, 0, "swapper/0").read();
    story
        .after(2_000_000_000)
        .on(1, 123, "sh")
        .leaf("vfs_read")
        .ret()
        .ret();
    story.items
}

#[test]
fn calls_of_tasks_on_two_cpus() {
    check("calls.txt", TEXT, &calls());
    check(
        "calls-guest-time.txt",
        Format::Text(TimeColumn::Guest),
        &calls(),
    );
    check("calls.jsonl", Format::Json, &calls());
    let folded = |weight, by_pid| Format::Folded { weight, by_pid };
    check("calls.folded", folded(Weight::OwnTime, false), &calls());
    check("calls-by-pid.folded", folded(Weight::Calls, true), &calls());
}

/// What the guest says of its modules is shown with a mark, and what it calls like
/// the kernel's own is no function of that.
#[test]
fn functions_that_the_guest_alone_names() {
    let mut story = Story::new();
    story.on(0, 66, "sh").call("__x64_sys_read");
    story.call_at(IN_MODULE, Gva(address("__x64_sys_read").0 + 9));
    story.call_from("getname", Gva(IN_MODULE.0 + 0x1c)).ret();
    story.call_from("getname", Gva(IN_MODULE.0 + 0x8000)).ret();
    story.ret();
    story.call_at(Gva(IN_MODULE.0 + 8), Gva(address("__x64_sys_read").0 + 9));
    story.ret();
    story.call_at(Gva(IN_MODULE.0 - 8), NOWHERE).ret().ret();
    let names = Saying {
        module: "ext4",
        function: "vfs_read",
    };
    let folded = Format::Folded {
        weight: Weight::Calls,
        by_pid: false,
    };
    for (name, format) in [
        ("modules.txt", TEXT),
        ("modules.jsonl", Format::Json),
        ("modules.folded", folded),
    ] {
        let text = write_named(format, &story.items, &names).0;
        let titles = text.find("#      TIME").unwrap_or(0);
        compare(name, &text[titles..]);
    }
}

#[test]
fn interrupts_by_address_and_by_flag() {
    let mut story = Story::new();
    story.on(0, 5, "cat").call("__x64_sys_read");
    story.call_from("sysvec_apic_timer_interrupt", address("x64_sys_call"));
    story.flags(0x08).leaf("tick_handle").flags(0).ret();
    story.call("ksys_read");
    story
        .call_from("irq_enter_rcu", address("handle_irq"))
        .ret();
    story
        .flags(0x08)
        .call_from("tick_handle", address("handle_irq"))
        .leaf("getname")
        .ret();
    story.flags(0).leaf("vfs_read").ret().ret();
    // A traced function that an interrupt called, as a root.
    story
        .on(0, 0, "swapper/0")
        .flags(0x08)
        .leaf("tick_handle")
        .flags(0)
        .read();
    check_body("interrupts.txt", &story.items);
}

/// Interrupts come between what the kernel does and what it records of it.
#[test]
fn interrupts_amid_recording() {
    let mut story = Story::new();
    story
        .on(0, 5, "cat")
        .call("__x64_sys_read")
        .interrupt_at(2)
        .call("ksys_read");
    story.call("vfs_read").interrupt_at(2).ret();
    story
        .interrupt_at(3)
        .call("vfs_read")
        .leaf("getname")
        .interrupt_at(2)
        .ret();
    story.interrupt_at(1).ret().interrupt_at(0).ret();
    // Here the record of the interrupt's return is missing.
    story.call("__x64_sys_read").call("ksys_read");
    story.interrupt_at(1).items.pop();
    story.ret().ret().read();
    check_body("interrupts-amid.txt", &story.items);
    let (_, tally) = write(TEXT, &story.items);
    assert_eq!(
        (tally.cut.total(), tally.uncalled.total(), tally.gaps),
        (1, 0, 0)
    );
    assert_eq!((tally.other_function, tally.interrupts), (0, 8));
}

#[test]
fn callers_and_functions_without_symbols() {
    let mut story = Story::new();
    story
        .on(0, 66, "victim")
        .call_from("__x64_sys_read", IN_MODULE)
        .call("ksys_read");
    story.call_from("vfs_read", NOWHERE).ret();
    story
        .call_from("rw_verify_area", address("return_to_handler"))
        .ret();
    story
        .call("vfs_read")
        .call_from("getname", address("vfs_read.cold"))
        .ret()
        .ret();
    story
        .call_at(IN_MODULE, address("ksys_read"))
        .leaf("getname")
        .ret();
    story.call_at(NOWHERE, NOWHERE).ret().ret().ret();
    story.leaf("nasty\u{1b}[2Jsymbol\u{9b}");
    check_body("callers.txt", &story.items);
    check("callers.jsonl", Format::Json, &story.items);
}

#[test]
fn cut_by_start_end_and_loss() {
    let mut story = Story::new();
    story
        .on(0, 10, "early")
        .unseen(|story| story.call("__x64_sys_read").call("ksys_read"));
    story.leaf("vfs_read").ret().ret().read();
    // Records are lost amid a read: of the next, whole ones, and its children.
    story
        .on(1, 11, "busy")
        .call("__x64_sys_read")
        .leaf("getname")
        .call("ksys_read");
    story.call("vfs_read");
    story.unseen(|story| {
        story
            .ret()
            .ret()
            .ret()
            .call("__x64_sys_read")
            .call("ksys_read")
    });
    story.lost(Some(5), LostWhy::Overrun);
    story.leaf("vfs_read").ret().ret().read();
    // Lost, but what was open goes on as it should.
    story.call("__x64_sys_read").lost(None, LostWhy::Torn).ret();
    // A task that never comes back, and its pid taken by another.
    story
        .on(0, 12, "gone")
        .call("__x64_sys_read")
        .call("do_exit");
    story.unseen(|story| story.ret().ret());
    story.on(0, 12, "new").read();
    story
        .on(0, 10, "early")
        .call("__x64_sys_openat")
        .call("do_sys_openat2");
    story
        .on(1, 11, "busy")
        .after(1_500_000_000)
        .call("__x64_sys_read");
    check_body("cuts.txt", &story.items);
    check("cuts.jsonl", Format::Json, &story.items);
}

#[test]
fn what_cannot_be_right() {
    let mut story = Story::new();
    story.forged(ForgedWhy::Unkeyed, None);
    story.on(0, 20, "\u{1b}[2J\n").call("__x64_sys_read");
    story.forged(ForgedWhy::UnknownEpoch, Some(u64::MAX));
    story
        .call("ksys_read")
        .ret_as(|ret| ret.func = address("vfs_read"));
    story
        .leaf("getname")
        .call("ksys_read")
        .ret_as(|ret| ret.caller = NOWHERE);
    story
        .call("vfs_read")
        .leaf("getname")
        .ret_as(|ret| ret.rettime = 0)
        .ret();
    // Depths that nothing accounts for.
    story.read().unseen(|story| story.call("__x64_sys_read"));
    story.call("ksys_read").ret().ret();
    story.put(What::Other { type_id: 5 });
    story.call("__x64_sys_read").ret_as(|ret| ret.rettime = 1);
    let last = story.items.len() - 1;
    story.items[last].time = 3;
    check("wrong.txt", TEXT, &story.items);
    check("wrong.jsonl", Format::Json, &story.items);
}

#[test]
fn reboots() {
    let mut story = Story::new();
    story
        .on(0, 30, "init")
        .read()
        .call("__x64_sys_read")
        .call("ksys_read");
    story.lost(None, LostWhy::GuestReset).reboot();
    story.on(0, 30, "init").read().call("__x64_sys_read");
    story.reboot().on(1, 31, "sh").read();
    check_body("reboots.txt", &story.items);
}

#[test]
fn nothing_at_all() {
    check("empty.txt", TEXT, &[]);
    check("empty.jsonl", Format::Json, &[]);
}
