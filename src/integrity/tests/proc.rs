//! Files of /proc, the kernel's and modules'.

use super::super::files;
use super::super::finding::Report;
use super::{found, module, Fake, DATA, HEAP, MODULES, NOBODYS, THEIRS};

const ROOT: u64 = DATA + 0x1000;
const FILE: u64 = HEAP + 0x1000;
/// The kernel's constants, and what of them calls a table or a function.
const OPS: u64 = DATA + 0x800;
const SEQUENCE: u64 = DATA + 0x840;
const SINGLE: u64 = DATA + 0x880;
const TABLE: u64 = DATA + 0x8c0;
/// Data of the module `hook`.
const HOOK: u64 = MODULES + 0x4100;

/// A kernel with one file in /proc.
fn with_file(name: &str) -> Fake {
    let mut guest = Fake::new();
    let symbols = [
        (DATA + 0x800, 'R', "__start_rodata"),
        (DATA + 0x900, 'R', "__end_rodata"),
        (DATA, 'd', "super_blocks"),
        (ROOT, 'D', "proc_root"),
        (OPS, 'r', "stat_proc_ops"),
        (SEQUENCE, 'r', "proc_seq_ops"),
        (SINGLE, 'r', "proc_single_ops"),
        (TABLE, 'r', "vmstat_op"),
    ];
    for (at, kind, name) in symbols {
        guest.symbol(at, kind, name);
    }
    guest.put(DATA, DATA);
    for name in ["super_block", "dentry", "inode"] {
        let fields = [
            ("s_list", 0),
            ("s_type", 8),
            ("s_op", 16),
            ("s_root", 24),
            ("d_inode", 32),
            ("d_op", 40),
            ("i_op", 48),
            ("i_fop", 56),
        ];
        guest.layout(name, &fields);
    }
    guest.layout("file_system_type", &[("name", 0)]);
    let entry = [
        ("proc_iops", 0),
        ("proc_ops", 8),
        ("proc_dops", 16),
        ("seq_ops", 24),
        ("write", 32),
        ("mode", 40),
        ("subdir", 48),
        ("subdir_node", 56),
        ("name", 80),
    ];
    guest.layout("proc_dir_entry", &entry);
    guest.sized("proc_ops", 40);
    guest.sized("seq_operations", 32);
    guest.put(ROOT + 40, 0o040_555);
    guest.put(ROOT + 48, FILE + 56);
    guest.put(FILE + 40, 0o100_444);
    guest.put(FILE + 80, FILE + 0x100);
    guest.bytes(FILE + 0x100, name.as_bytes());
    guest
}

fn look(guest: &Fake) -> Report {
    let report = guest.check(files::operations);
    let doubts: Vec<_> = report
        .outcomes
        .iter()
        .filter_map(|one| one.doubt.clone())
        .collect();
    assert_eq!(doubts, [""; 0]);
    report
}

/// The places of what is found once the file's operations, and what these call, are
/// set.
fn places(guest: &Fake, ops: u64, called: u64) -> Vec<String> {
    guest.put(FILE + 8, ops);
    guest.put(FILE + 24, called);
    let report = look(guest);
    let all = found(&report).into_iter();
    all.map(|(place, ..)| place.to_owned()).collect()
}

const NONE: [&str; 0] = [];

#[test]
fn a_file_of_the_kernels_has_what_the_kernel_gives_it() {
    let guest = with_file("stat");
    assert_eq!(places(&guest, OPS, 0), NONE);
    assert_eq!(places(&guest, HOOK, 0), ["proc_ops of /proc/stat"]);
    // Another of the kernel's own is not its own.
    assert_eq!(places(&guest, SINGLE, TABLE), ["single_show of /proc/stat"]);
    let guest = with_file("vmstat");
    assert_eq!(places(&guest, SEQUENCE, TABLE), NONE);
    assert_eq!(places(&guest, SEQUENCE, HOOK), ["seq_ops of /proc/vmstat"]);
    assert_eq!(places(&guest, HOOK, TABLE), ["proc_ops of /proc/vmstat"]);
    guest.put(FILE + 32, THEIRS);
    assert_eq!(places(&guest, SEQUENCE, TABLE), ["write of /proc/vmstat"]);
}

#[test]
fn a_modules_file_leads_to_that_module_and_to_those_before_it() {
    let mut guest = with_file("theirs");
    guest.modules = vec![
        module("young", 1, 5),
        module("hook", 0, 4),
        module("old", 2, 6),
    ];
    let noted = |guest: &Fake| look(guest).notes;
    // proc_ops, whose first word is no function, and seq_operations.
    for (ops, called, first, place) in [
        (HOOK, 0, 1, "proc_ops of /proc/theirs"),
        (SEQUENCE, HOOK, 0, "seq_ops of /proc/theirs"),
    ] {
        guest.put(HOOK, if first == 1 { u64::MAX } else { 0 });
        let word = HOOK + 8 * 3;
        for (to, is_fine) in [
            (0, true),
            (THEIRS, true),
            (MODULES + 0x2100, true),
            (MODULES + 0x1100, false),
            (NOBODYS + 0x1000, false),
        ] {
            guest.put(word, to);
            let expected: &[&str] = if is_fine { &[] } else { &[place] };
            assert_eq!(places(&guest, ops, called), expected, "{to:#x}");
            assert_eq!(noted(&guest), ["/proc/theirs is a file of the module hook"]);
        }
        guest.put(word, 0);
    }
    // One function, and what is written by.
    assert_eq!(places(&guest, SINGLE, THEIRS), NONE);
    guest.put(FILE + 32, THEIRS + 8);
    assert_eq!(places(&guest, SINGLE, THEIRS), NONE);
    assert_eq!(
        places(&guest, SINGLE, MODULES + 0x2100),
        ["write of /proc/theirs"]
    );
    guest.put(FILE + 32, 0);
    for bent in [NOBODYS + 0x1000, HEAP] {
        assert_eq!(
            places(&guest, SINGLE, bent),
            ["single_show of /proc/theirs"]
        );
        assert_eq!(places(&guest, SEQUENCE, bent), ["seq_ops of /proc/theirs"]);
        assert_eq!(places(&guest, bent, 0), ["proc_ops of /proc/theirs"]);
    }
}

#[test]
fn what_no_module_is_given_is_the_kernels() {
    let guest = with_file("theirs");
    for (offset, what) in [(0, "proc_iops"), (16, "proc_dops")] {
        guest.put(FILE + offset, TABLE);
        assert_eq!(places(&guest, HOOK, 0), NONE);
        guest.put(FILE + offset, HOOK);
        assert_eq!(places(&guest, HOOK, 0), [format!("{what} of /proc/theirs")]);
        guest.put(FILE + offset, 0);
    }
    guest.put(FILE + 40, 0o040_555);
    assert_eq!(places(&guest, HOOK, 0), ["proc_dir_ops of /proc/theirs"]);
    assert_eq!(places(&guest, OPS, 0), NONE);
}
