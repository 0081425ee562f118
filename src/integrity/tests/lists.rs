//! Whose code is whose, and what lies in tables and variables.

use super::super::finding::Report;
use super::super::view::Obstacle;
use super::super::{code, data, files, interrupts, Image};
use super::{found, module, Fake, DATA, HEAP, MODULES, NOBODYS, TEXT, THEIRS};

/// Where the list of BPF programs and that of their memory begin.
const PROGRAMS: u64 = DATA;
const PACKS: u64 = DATA + 0x10;

/// A kernel whose lists have these BPF programs, and this memory for them.
fn bpf(programs: &[(u64, u64)], packs: &[u64]) -> Fake {
    let mut guest = Fake::new();
    guest.symbol(PROGRAMS, 'd', "bpf_kallsyms");
    guest.symbol(PACKS, 'd', "pack_list");
    guest.layout(
        "bpf_ksym",
        &[("start", 0), ("end", 8), ("name", 16), ("lnode", 64)],
    );
    guest.layout("bpf_prog_pack", &[("list", 0), ("ptr", 16)]);
    let chain = |head: u64, nodes: &[u64]| {
        let mut last = head;
        for &node in nodes {
            guest.put(last, node);
            last = node;
        }
        guest.put(last, head);
    };
    let at = |n: usize| HEAP + 0x100 * (n as u64 + 1);
    let nodes: Vec<u64> = (0..programs.len()).map(|n| at(n) + 64).collect();
    chain(PROGRAMS, &nodes);
    for (n, &(start, end)) in programs.iter().enumerate() {
        guest.put(at(n), start);
        guest.put(at(n) + 8, end);
        guest.put(at(n) + 16, u64::from(b'p'));
    }
    let nodes: Vec<u64> = (0..packs.len()).map(|n| at(n) + 0x8000).collect();
    chain(PACKS, &nodes);
    for (node, &pack) in nodes.iter().zip(packs) {
        guest.put(node + 16, pack);
    }
    guest
}

/// Which pages of the module area nobody owns.
fn unowned(guest: &Fake) -> Vec<u64> {
    let report = guest.check(code::unowned);
    let pieces = report.findings.iter().filter(|one| one.address >= MODULES);
    let pages = pieces.flat_map(|one| {
        let kib = one.found.strip_prefix("code, ").expect("code");
        let kib: u64 = kib
            .strip_suffix(" KiB")
            .expect("KiB")
            .parse()
            .expect("a number");
        let first = (one.address - MODULES) >> 12;
        first..first + kib / 4
    });
    pages.collect()
}

#[test]
fn an_entry_of_a_list_has_what_a_kernel_can_make_and_no_more() {
    // A module that is on the list has the first page; nobody has the others.
    let page = |n: u64| MODULES + (n << 12);
    assert_eq!(unowned(&bpf(&[], &[])), [1, 2, 3]);
    assert_eq!(unowned(&bpf(&[(page(1), page(2))], &[])), [2, 3]);
    assert_eq!(unowned(&bpf(&[], &[page(1)])), [0; 0]);
    // Across what cannot be executed: page 4 and on.
    let mut guest = bpf(&[(page(1), page(9))], &[]);
    assert_eq!(unowned(&guest), [0; 0]);
    guest.forbid(2);
    assert_eq!(unowned(&guest), [3]);
    // Larger than any program.
    assert_eq!(unowned(&bpf(&[(page(1), page(8192))], &[])), [1, 2, 3]);
    // Over the module that is there.
    assert_eq!(unowned(&bpf(&[(page(0), page(4))], &[])), [1, 2, 3]);
    assert_eq!(unowned(&bpf(&[], &[page(0)])), [1, 2, 3]);
    // Two that claim the same; one that is told of twice is one.
    assert_eq!(
        unowned(&bpf(&[(page(1), page(3)), (page(2), page(4))], &[])),
        [1, 2, 3]
    );
    assert_eq!(
        unowned(&bpf(&[(page(1), page(2)), (page(1), page(2))], &[])),
        [2, 3]
    );
    // Where no code is allocated.
    let elsewhere = bpf(&[(HEAP, HEAP + 4096)], &[]);
    let report = elsewhere.check(|view, owners, report| {
        report.note(owners.owner(view, crate::kernel::Gva(HEAP)).to_string());
    });
    assert_eq!(report.notes, ["nobody in the guest's lists"]);
}

#[test]
fn a_modules_code_ends_where_it_cannot_be_executed() {
    let mut guest = bpf(&[], &[]);
    guest.modules = vec![super::module("hook", 0, 4)];
    guest.modules[0].code[0].end = crate::kernel::Gva(MODULES + 0x8000);
    assert_eq!(unowned(&guest), [0; 0]);
    guest.forbid(1);
    assert_eq!(unowned(&guest), [2, 3]);
}

#[test]
fn what_is_behind_the_kernels_text_in_its_page_is_nothing() {
    let mut guest = Fake::new();
    guest.text_ends(TEXT + 0xf00);
    let look = |guest: &Fake| guest.check(code::unowned);
    let behind = |report: &Report| {
        let all = report.findings.iter();
        all.filter(|one| one.address < MODULES).count()
    };
    let usual = behind(&look(&guest));
    guest.bytes(TEXT + 0xf00, &[0xcc; 16]);
    assert_eq!(behind(&look(&guest)), usual);
    guest.bytes(TEXT + 0xfff, &[0xc3]);
    let report = look(&guest);
    assert_eq!(behind(&report), usual + 1);
    assert!(found(&report).iter().any(|(_, is, _)| *is == "c3"));
}

#[test]
fn pages_of_thunks_are_the_kernels_by_what_is_in_them() {
    let mut guest = bpf(&[], &[]);
    let mut page = [0xcc; 4096];
    page[32..36].copy_from_slice(&[0x41, 0xff, 0xe3, 0xcc]);
    guest.bytes(MODULES + 0x1000, &page);
    // Of a kernel that makes none.
    assert_eq!(unowned(&guest), [1, 2, 3]);
    guest.symbol(TEXT + 0x300, 't', "__x86_indirect_its_thunk_array");
    assert_eq!(unowned(&guest), [2, 3]);
    let thunk = |guest: &Fake, at: u64, register: u8| {
        let report = guest.check(|view, owners, report| {
            let have = owners.have_thunk(view, crate::kernel::Gva(at), register);
            report.note(have.to_string());
        });
        report.notes == ["true"]
    };
    assert!(thunk(&guest, MODULES + 0x1020, 11));
    assert!(!thunk(&guest, MODULES + 0x1020, 3));
    assert!(!thunk(&guest, MODULES + 0x1024, 11));
    // The same code elsewhere, and amid other code.
    guest.bytes(MODULES + 0x100, &page[32..36]);
    assert!(!thunk(&guest, MODULES + 0x100, 11));
    guest.bytes(MODULES + 0x1800, &[0xc3]);
    assert_eq!(unowned(&guest), [1, 2, 3]);
    assert!(!thunk(&guest, MODULES + 0x1020, 11));
}

/// A gate of the kernel's code, for the kernel.
fn gate(to: u64) -> [u8; 16] {
    let low = to & 0xffff | 0x10 << 16 | 0x8e << 40 | (to & 0xffff_0000) << 32;
    let mut gate = [0; 16];
    gate[..8].copy_from_slice(&low.to_le_bytes());
    gate[8..12].copy_from_slice(&((to >> 32) as u32).to_le_bytes());
    gate
}

#[test]
fn an_exception_that_the_kernel_has_an_entry_for_does_not_lead_to_the_start() {
    let mut guest = Fake::new();
    let table = DATA + 0x1000;
    guest.symbol(table, 'd', "idt_table");
    let early = TEXT + 0x2000;
    guest.symbol(early, 't', "early_idt_handler_array");
    let fault = guest.function("asm_exc_page_fault");
    let look = |guest: &Fake| {
        let report = guest.check(interrupts::gates);
        let gates = report.findings.into_iter();
        let gates = gates.filter(|one| one.place.starts_with("interrupt gate"));
        gates.map(|one| one.place).collect::<Vec<_>>()
    };
    let put = |vector: u64, to: u64| guest.bytes(table + 16 * vector, &gate(to));
    put(14, fault);
    // Virtualization exceptions: the kernel has no entry.
    put(20, early + 20 * 9);
    assert_eq!(look(&guest), [""; 0]);
    put(14, early + 14 * 9);
    assert_eq!(look(&guest), ["interrupt gate 0x0e"]);
}

#[test]
fn int_80_leads_to_system_calls_or_is_a_gate_of_devices() {
    let mut guest = Fake::new();
    let table = DATA + 0x1000;
    guest.symbol(table, 'd', "idt_table");
    let stubs = TEXT + 0x400;
    guest.symbol(stubs, 't', "irq_entries_start");
    guest.symbol(TEXT + 0x800, 't', "asm_int80_emulation");
    let look = |kind: u8, to: u64| {
        let mut gate = gate(to);
        gate[5] = kind;
        guest.bytes(table + 16 * 0x80, &gate);
        let report = guest.check(interrupts::gates);
        let mut all = report.findings.iter();
        !all.any(|one| one.place == "interrupt gate 0x80")
    };
    assert!(look(0xee, TEXT + 0x800));
    assert!(look(0x8e, stubs + 8 * 0x60));
    assert!(!look(0xee, stubs + 8 * 0x60));
    assert!(!look(0x8e, stubs + 8 * 0x60 + 1));
    assert!(!look(0x8e, THEIRS));
    assert!(!look(0xee, THEIRS));
}

/// A kernel with a mounted file system whose type is at `kind`, and the operations of
/// its super block at `table`.
fn mounted(kind: u64, table: u64) -> Fake {
    let mut guest = Fake::new();
    guest.symbol(DATA, 'd', "super_blocks");
    guest.symbol(DATA + 0x10, 'R', "__start_rodata");
    guest.symbol(DATA + 0x100, 'R', "__end_rodata");
    let block = [("s_list", 0), ("s_type", 16), ("s_op", 24), ("s_root", 32)];
    guest.layout("super_block", &block);
    guest.layout("file_system_type", &[("name", 0), ("owner", 8)]);
    guest.layout("dentry", &[("d_inode", 0), ("d_op", 8)]);
    guest.layout("inode", &[("i_op", 0), ("i_fop", 8)]);
    let block = HEAP;
    guest.put(DATA, block);
    guest.put(block, DATA);
    guest.put(block + 16, kind);
    guest.put(block + 24, table);
    guest.put(kind, HEAP + 0x800);
    // The module says that it is its own.
    guest.put(kind + 8, MODULES + 0x4000);
    guest.bytes(HEAP + 0x800, b"proc\0");
    guest
}

#[test]
fn a_file_system_is_from_where_its_type_lies() {
    let look = |guest: &Fake| {
        let report = guest.check(files::operations);
        found(&report).len()
    };
    let (kernels, modules) = (DATA + 0x20, MODULES + 0x4100);
    assert_eq!(look(&mounted(DATA + 0x200, kernels)), 0);
    assert_eq!(look(&mounted(MODULES + 0x4200, modules)), 0);
    assert_eq!(look(&mounted(MODULES + 0x4200, kernels)), 0);
    assert_eq!(look(&mounted(DATA + 0x200, modules)), 1);
    assert_eq!(look(&mounted(HEAP + 0x900, modules)), 1);
}

#[test]
fn a_file_system_may_be_from_two_modules() {
    let mut guest = mounted(MODULES + 0x4200, MODULES + 0x5100);
    let mut look = |names: [&str; 2]| {
        // The youngest comes first.
        guest.modules = vec![module(names[0], 0, 4), module(names[1], 1, 5)];
        let before = found(&guest.check(files::operations)).len();
        guest.modules.reverse();
        (before, found(&guest.check(files::operations)).len())
    };
    // What the type's module is built on, and what came after it.
    assert_eq!(look(["vfat", "fat"]), (0, 1));
    assert_eq!(look(["nfs", "nfsv4"]), (0, 0));
    assert_eq!(look(["nfs", "nfsv5"]), (0, 1));
    assert_eq!(look(["vfat", "nfsv4"]), (0, 1));
}

/// A kernel with a pointer in a variable of this name that was built to lead to `built`.
fn pointing(guest: &mut Fake, built: u64, name: &str) -> Image {
    for (at, kind, name) in [
        (DATA + 0x100, 'R', "__start_rodata"),
        (DATA + 0x400, 'R', "__end_rodata"),
        (DATA + 0x300, 'R', "__start_ro_after_init"),
        (DATA + 0x300, 'R', "__end_ro_after_init"),
        (DATA + 0x500, 'D', name),
    ] {
        guest.symbol(at, kind, name);
    }
    Image::made_of(
        &[
            (".rodata", DATA + 0x200, &(TEXT + 0x10).to_le_bytes()),
            (".rodata2", DATA + 0x240, &(TEXT + 0x10).to_le_bytes()),
            (".data", DATA + 0x500, &built.to_le_bytes()),
        ],
        &[
            (DATA + 0x200, true),
            (DATA + 0x240, true),
            (DATA + 0x500, true),
        ],
    )
}

#[test]
fn a_pointer_leads_to_what_is_of_the_kind_that_it_was_built_for() {
    let mut guest = Fake::new();
    let (first, second) = (guest.function("first"), guest.function("second"));
    guest.symbol(DATA + 0x200, 'r', "one_ops");
    guest.symbol(DATA + 0x240, 'r', "other_ops");
    guest.symbol(DATA + 0x280, 'r', "a_text");
    let image = pointing(&mut guest, first, "variable");
    let look = |guest: &Fake, image: &Image, to: u64| {
        guest.put(DATA + 0x500, to);
        let report =
            guest.check(|view, owners, report| data::pointers(view, image, owners, report));
        assert_eq!(report.outcomes[0].looked_at, 1);
        found(&report).len()
    };
    for (to, count) in [
        (first, 0),
        (second, 0),
        (0, 0),
        // Within a function, to data, and out of the kernel.
        (second + 1, 1),
        (DATA + 0x200, 1),
        (DATA + 0x600, 1),
        (THEIRS, 1),
        (NOBODYS, 1),
    ] {
        assert_eq!(look(&guest, &image, to), count, "{to:#x}");
    }
    let image = pointing(&mut guest, DATA + 0x200, "variable");
    for (to, count) in [
        (DATA + 0x200, 0),
        (DATA + 0x240, 0),
        (0, 0),
        (DATA + 0x280, 1),
        (DATA + 0x600, 1),
        (first, 1),
        (MODULES + 0x4000, 1),
    ] {
        assert_eq!(look(&guest, &image, to), count, "{to:#x}");
    }
}

#[test]
fn a_pointer_that_others_may_set_leads_to_them() {
    let (program, other) = (MODULES + 0x2000, MODULES + 0x3000);
    let check = |name: &str, owner: &str, to: u64| {
        let mut guest = bpf(
            &[(program, program + 0x800), (other, other + 0x100)],
            &[program],
        );
        guest.bytes(HEAP + 0x110, b"bpf_dispatcher_xdp\0");
        guest.modules = vec![module(owner, 0, 4), module("other", 1, 5)];
        let dummy = guest.function("dummy");
        let image = pointing(&mut guest, dummy, name);
        guest.put(DATA + 0x500, to);
        let report =
            guest.check(|view, owners, report| data::pointers(view, &image, owners, report));
        assert_eq!(report.findings.len() + report.notes.len(), 1);
        report.findings.is_empty()
    };
    let guest_state = "__SCK____perf_guest_state";
    let wakeup = "kvm_posted_intr_wakeup_handler";
    assert!(check(guest_state, "kvm", THEIRS));
    assert!(check(wakeup, "kvm_intel", THEIRS));
    // Another module, its data, or nobody; and another pointer.
    assert!(!check(guest_state, "kvm_hook", THEIRS));
    assert!(!check(guest_state, "kvm", THEIRS + 0x1000));
    assert!(!check(guest_state, "kvm", MODULES + 0x4100));
    assert!(!check(wakeup, "kvm", THEIRS));
    assert!(!check(wakeup, "kvm_intel", NOBODYS));
    assert!(!check("variable", "kvm", THEIRS));
    let dispatcher = "__SCK__bpf_dispatcher_xdp_call";
    assert!(check(dispatcher, "kvm", program));
    assert!(!check(dispatcher, "kvm", other));
    assert!(!check("variable", "kvm", program));
}

#[test]
fn what_there_is_too_much_of_is_a_doubt() {
    let mut guest = Fake::new();
    let first = guest.function("first");
    let image = pointing(&mut guest, first, "variable");
    guest.put(DATA + 0x500, THEIRS);
    let report = guest.check(|view, owners, report| {
        view.exhaust();
        data::pointers(view, &image, owners, report);
    });
    let doubt = report.outcomes[0].doubt.as_deref().expect("a doubt");
    assert_eq!(doubt, Obstacle::TooMuch("a pointer").to_string());
}
