//! What is called through functions of the kernel's own.

use std::cell::Cell;

use super::super::finding::Report;
use super::super::kprobes::{self, Probes};
use super::super::text::TextReport;
use super::super::{ftrace, tracepoints, Image};
use super::{found, Fake, DATA, HEAP, MODULES, NOBODYS, TEXT, THEIRS};

const OPS: u64 = HEAP + 0x100;
const MODULE: &str = "the module hook (+0x100)";
const NOBODY: &str = "nobody in the guest's lists";

/// A kernel with one callback of Ftrace's, whose function has this name.
fn callback(function: &str) -> (Fake, u64) {
    let mut guest = Fake::new();
    let function = guest.function(function);
    guest.symbol(DATA, 'D', "ftrace_ops_list");
    guest.symbol(DATA + 8, 'D', "ftrace_list_end");
    guest.layout(
        "ftrace_ops",
        &[
            ("func", 0),
            ("next", 8),
            ("flags", 16),
            ("saved_func", 24),
            ("trampoline", 32),
            ("trampoline_size", 40),
            ("direct_call", 48),
            ("func_hash", 56),
            ("list", 64),
        ],
    );
    guest.put(DATA, OPS);
    guest.put(OPS + 8, DATA + 8);
    guest.put(OPS, function);
    (guest, function)
}

fn look(guest: &Fake) -> Report {
    guest.check(|view, owners, report| {
        ftrace::callbacks(view, owners, Some(&TextReport::default()), report);
    })
}

fn doubt(report: &Report) -> Option<&str> {
    report.outcomes.first()?.doubt.as_deref()
}

#[test]
fn what_an_fprobe_calls_is_looked_at() {
    let (mut guest, _) = callback("fprobe_handler");
    // Where an fprobe has its callback is described nowhere: it is not known.
    let report = look(&guest);
    assert_eq!(found(&report), []);
    let why = doubt(&report).expect("a doubt");
    assert!(why.contains("fprobe_handler"), "{why}");

    let fields = [
        ("ops", 8),
        ("entry_handler", 0x80),
        ("exit_handler", 0x88),
        ("rethook", 0x90),
    ];
    guest.layout("fprobe", &fields);
    let (own, bpf) = (
        guest.function("fentry_dispatcher"),
        guest.function("kprobe_multi_link_handler"),
    );
    let (entry, exit) = (OPS - 8 + 0x80, OPS - 8 + 0x88);
    guest.put(entry, own);
    let report = look(&guest);
    assert_eq!((found(&report), doubt(&report)), (vec![], None));
    assert!(report
        .notes
        .iter()
        .any(|note| note.contains("fentry_dispatcher")));

    guest.put(exit, THEIRS);
    let report = look(&guest);
    let place = format!("Ftrace's callback {OPS:#x}: return of an fprobe");
    assert_eq!(found(&report), [(&*place, "0xffffffffc0000100", MODULE)]);

    // Where functions return to that it waits for.
    guest.put(exit, own);
    guest.layout("rethook", &[("data", 0), ("handler", 8)]);
    let (fprobe, rethook) = (OPS - 8, HEAP + 0x700);
    let handler = guest.function("fprobe_exit_handler");
    guest.put(fprobe + 0x90, rethook);
    let returns = |data: u64, handler: u64| {
        guest.put(rethook, data);
        guest.put(rethook + 8, handler);
        let report = look(&guest);
        (report.findings.len(), doubt(&report).is_some())
    };
    assert_eq!(returns(fprobe, handler), (0, false));
    assert_eq!(returns(HEAP + 0x1800, 0), (0, false));
    assert_eq!(returns(fprobe, own), (1, false));
    assert_eq!(returns(fprobe, bpf), (1, false));
    assert_eq!(returns(fprobe, THEIRS), (1, false));
    // Another one's, whose handler that is.
    guest.put(HEAP + 0x1800 + 0x88, THEIRS);
    assert_eq!(returns(HEAP + 0x1800, handler), (1, false));
    returns(fprobe, handler);

    guest.put(exit, 0);
    guest.put(entry, bpf);
    let report = look(&guest);
    let place = format!("Ftrace's callback {OPS:#x}: entry of an fprobe");
    assert_eq!(
        found(&report),
        [(&*place, "kprobe_multi_link_handler", "a BPF program")]
    );
}

#[test]
fn a_live_patch_is_looked_at_whatever_lies_on_it() {
    let (mut guest, _) = callback("klp_ftrace_handler");
    guest.layout("klp_ops", &[("node", 0), ("func_stack", 16), ("fops", 32)]);
    guest.layout("klp_func", &[("new_func", 8), ("stack_node", 64)]);
    let stack = OPS - 32 + 16;
    let (upper, lower) = (HEAP + 0x400, HEAP + 0x500);
    for (at, to) in [(stack, upper), (upper, lower), (lower, stack)] {
        guest.put(at, to);
    }
    let own = guest.function("patched");
    guest.put(upper - 64 + 8, own);
    assert_eq!(found(&look(&guest)), []);
    guest.put(lower - 64 + 8, NOBODYS);
    let place = format!("Ftrace's callback {OPS:#x}: live patch");
    let report = look(&guest);
    assert_eq!(found(&report), [(&*place, "0xffffffffc0002100", NOBODY)]);
}

#[test]
fn commands_and_saved_functions_are_looked_at() {
    let (mut guest, _) = callback("function_trace_probe_call");
    guest.layout("ftrace_func_probe", &[("probe_ops", 0), ("ops", 8)]);
    guest.layout("ftrace_probe_ops", &[("func", 0)]);
    let own = guest.function("ftrace_traceon");
    guest.put(OPS - 8, HEAP + 0x800);
    guest.put(HEAP + 0x800, own);
    assert_eq!(found(&look(&guest)), []);
    guest.put(HEAP + 0x800, THEIRS);
    let place = format!("Ftrace's callback {OPS:#x}: command");
    assert_eq!(found(&look(&guest))[0].0, place);

    let (guest, _) = callback("ftrace_pid_func");
    guest.put(OPS + 24, THEIRS);
    let place = format!("Ftrace's callback {OPS:#x}: saved function");
    assert_eq!(found(&look(&guest))[0].0, place);
}

#[test]
fn a_callback_that_the_kernel_does_not_register_is_a_doubt() {
    for (function, is_known) in [
        ("function_trace_call", true),
        ("perf_ftrace_function_call", true),
        ("irq_work_single", false),
        ("kprobe_dispatcher", false),
    ] {
        let (mut guest, at) = callback(function);
        let saved = guest.function("other");
        let known = |guest: &Fake| {
            let report = look(guest);
            assert_eq!(found(&report), []);
            assert_eq!(doubt(&report).is_some(), report.notes.is_empty());
            doubt(&report).is_none()
        };
        assert_eq!(known(&guest), is_known, "{function}");
        guest.put(OPS, at + 1);
        assert!(!known(&guest), "{function}");
        guest.put(OPS, at);
        guest.put(OPS + 24, saved);
        assert!(doubt(&look(&guest)).is_some(), "{function}");
    }
}

#[test]
fn direct_calls_are_looked_at_in_the_callback_and_in_the_table() {
    let (mut guest, _) = callback("call_direct_funcs");
    guest.put(OPS + 48, THEIRS);
    let place = format!("Ftrace's callback {OPS:#x}: direct call");
    assert_eq!(found(&look(&guest))[0].0, place);
    guest.put(OPS + 48, 0);

    guest.symbol(DATA + 16, 'd', "direct_functions");
    guest.layout("ftrace_hash", &[("size_bits", 0), ("buckets", 8)]);
    guest.layout(
        "ftrace_func_entry",
        &[("hlist", 8), ("ip", 24), ("direct", 32)],
    );
    let (hash, buckets, entry) = (HEAP + 0x900, HEAP + 0xa00, HEAP + 0xb00);
    guest.put(DATA + 16, hash);
    guest.put(hash, 1);
    assert_eq!((found(&look(&guest)), doubt(&look(&guest))), (vec![], None));
    guest.put(hash + 8, buckets);
    guest.put(buckets + 8, entry + 8);
    guest.put(entry + 32, THEIRS);
    let report = look(&guest);
    assert_eq!(
        found(&report),
        [(
            "Ftrace's callback direct_functions: direct call",
            "0xffffffffc0000100",
            MODULE
        )]
    );
    // One that is not to be believed.
    guest.put(hash, 60);
    assert!(doubt(&look(&guest)).is_some());
}

#[test]
fn a_bpf_program_at_a_function_of_the_lsm_is_policy() {
    let (mut guest, _) = callback("call_direct_funcs");
    guest.symbol(DATA + 16, 'd', "direct_functions");
    guest.symbol(DATA + 32, 'd', "bpf_kallsyms");
    guest.layout("ftrace_hash", &[("size_bits", 0), ("buckets", 8)]);
    let entry = [("hlist", 0), ("ip", 16), ("direct", 32)];
    guest.layout("ftrace_func_entry", &entry);
    let ksym = [("start", 0), ("end", 8), ("name", 16), ("lnode", 64)];
    guest.layout("bpf_ksym", &ksym);
    guest.layout("ftrace_ops_hash", &[("filter_hash", 8)]);
    let (lsm, other) = (guest.function("bpf_lsm_file_open"), guest.function("open"));
    let (hash, buckets, entry, image) = (HEAP + 0x900, HEAP + 0xa00, HEAP + 0xb00, HEAP + 0xc00);
    // What the callback is called for, which is a table of the same kind.
    let (hashes, filter, called_for) = (HEAP + 0xd00, HEAP + 0xd80, HEAP + 0xe00);
    let trampoline = MODULES + 0x2000;
    for (at, value) in [
        (DATA + 16, hash),
        (hash + 8, buckets),
        (buckets, entry),
        (entry + 32, trampoline),
        (OPS + 48, trampoline),
        (OPS + 56, hashes),
        (hashes + 8, filter),
        (filter + 8, filter + 0x20),
        (filter + 0x20, called_for),
        (DATA + 32, image + 64),
        (image + 64, DATA + 32),
        (image, trampoline),
        (image + 8, trampoline + 0x100),
    ] {
        guest.put(at, value);
    }
    let look = |name: &[u8], from: u64, called: u64| {
        guest.bytes(image + 16, name);
        guest.put(entry + 16, from);
        guest.put(called_for + 16, from);
        guest.put(entry + 32, called);
        guest.put(OPS + 48, called);
        let report = guest.check(|view, owners, report| {
            let text = TextReport {
                trampolines: [(called, (1, from))].into(),
                ..TextReport::default()
            };
            ftrace::callbacks(view, owners, Some(&text), report);
        });
        let noted = report.notes.iter().filter(|note| note.contains("bpf_lsm"));
        (report.findings.len(), noted.count())
    };
    assert_eq!(look(b"bpf_trampoline_1\0", lsm, trampoline), (0, 2));
    assert_eq!(look(b"bpf_trampoline_1\0", lsm + 4, trampoline), (0, 2));
    // Elsewhere, of another kind, or another's code.
    assert_eq!(look(b"bpf_trampoline_1\0", other, trampoline), (2, 0));
    assert_eq!(look(b"bpf_prog_1\0", lsm, trampoline), (2, 0));
    assert_eq!(look(b"bpf_trampoline_1\0", lsm, THEIRS), (2, 0));
    // For another function besides, for all there are, or for what cannot be told.
    guest.put(called_for, called_for + 0x40);
    guest.put(called_for + 0x40 + 16, lsm);
    assert_eq!(look(b"bpf_trampoline_1\0", lsm, trampoline), (0, 2));
    guest.put(called_for + 0x40 + 16, other);
    assert_eq!(look(b"bpf_trampoline_1\0", lsm, trampoline), (1, 2));
    for nothing in [0, u64::MAX] {
        guest.put(filter + 0x20, nothing);
        assert_eq!(look(b"bpf_trampoline_1\0", lsm, trampoline), (1, 2));
    }
}

/// Where `ftrace_caller` and `ftrace_regs_caller` are, and what they have behind their
/// beginning: the callback, the call, a branch, and the end.
const CALLERS: [(u64, [&str; 4], &str, u64); 2] = [
    (
        TEXT + 0x900,
        [
            "ftrace_caller",
            "ftrace_caller_op_ptr",
            "ftrace_call",
            "ftrace_caller_end",
        ],
        "",
        0,
    ),
    (
        TEXT + 0xa00,
        [
            "ftrace_regs_caller",
            "ftrace_regs_caller_op_ptr",
            "ftrace_regs_call",
            "ftrace_regs_caller_end",
        ],
        "ftrace_regs_caller_jmp",
        4,
    ),
];

#[test]
fn a_trampoline_is_as_the_kernel_makes_them() {
    let (mut guest, function) = callback("function_trace_call");
    let all = guest.function("arch_ftrace_ops_list_func");
    let stub = guest.function("ftrace_stub");
    let (returns, other) = (guest.function("srso_return_thunk"), guest.function("open"));
    for (at, names, branch, more) in CALLERS {
        for (within, name) in [0, 8, 20, 32 + more].into_iter().zip(names) {
            guest.symbol(at + within, 't', name);
        }
        let mut code = vec![0x90; 32 + more as usize];
        code[..4].copy_from_slice(&[0xf3, 0x0f, 0x1e, 0xfa]);
        code[8..11].copy_from_slice(&[0x48, 0x8b, 0x15]);
        code[20..25].copy_from_slice(&branch_to(at + 20, stub));
        if more > 0 {
            guest.symbol(at + 28, 't', branch);
            code[28..30].copy_from_slice(&[0x75, 0x31]);
        }
        guest.bytes(at, &code);
    }
    let start = MODULES + 0x1000;
    for (at, _, _, more) in CALLERS {
        let size = 32 + more;
        for end in [
            vec![0xc3],
            vec![0xc3, 0xcc],
            vec![0xc3, 0xcc, 0, 0, 0],
            branch(0xe9, start + size, returns).to_vec(),
        ] {
            let length = size + end.len() as u64 + 8;
            let mut code = vec![0x90; size as usize];
            code[..4].copy_from_slice(&[0xf3, 0x0f, 0x1e, 0xfa]);
            code[8..11].copy_from_slice(&[0x48, 0x8b, 0x15]);
            code[11..15].copy_from_slice(&((length - 8 - 15) as u32).to_le_bytes());
            code[20..25].copy_from_slice(&branch_to(start + 20, function));
            if more > 0 {
                code[28..30].copy_from_slice(&[0x66, 0x90]);
            }
            code.extend(&end);
            code.extend(OPS.to_le_bytes());
            guest.put(OPS + 32, start);
            guest.put(OPS + 40, length);
            let is_right = |code: &[u8]| {
                guest.bytes(start, code);
                let report = look(&guest);
                assert_eq!(doubt(&report), None, "{at:x} {code:x?}");
                found(&report).is_empty()
            };
            assert!(is_right(&code), "{at:x} {code:x?}");
            // Whatever calls all callbacks may be called as well.
            let mut other_call = code.clone();
            other_call[20..25].copy_from_slice(&branch_to(start + 20, all));
            assert!(is_right(&other_call));
            other_call[20..25].copy_from_slice(&branch_to(start + 20, other));
            assert!(!is_right(&other_call));
            // The kernel has taken this out of its own code since.
            let mut sealed = code.clone();
            sealed[..4].copy_from_slice(&[0x66, 0x0f, 0x1f, 0x00]);
            assert!(is_right(&sealed));
            let spare = size as usize + 2..size as usize + end.len().max(2);
            for byte in 0..code.len() {
                let mut changed = code.clone();
                changed[byte] ^= 0x10;
                // Behind a return nothing runs.
                let matters = end[0] != 0xc3 || !spare.contains(&byte);
                assert_eq!(is_right(&changed), !matters, "{at:x} {byte} {end:x?}");
            }
            guest.bytes(start, &code);
            guest.put(OPS + 40, length + 1);
            assert!(!found(&look(&guest)).is_empty());
        }
    }
    // That of a callback which is not registered: what it calls is called, whatever the
    // callback says by now.
    guest.symbol(DATA + 16, 'd', "ftrace_ops_trampoline_list");
    guest.put(DATA + 16, OPS + 64);
    guest.put(OPS + 64, DATA + 16);
    guest.put(DATA, DATA + 8);
    guest.put(OPS, stub);
    let kept = |calls: u64| {
        let (_, _, _, more) = CALLERS[1];
        let mut code = vec![0x90; 32 + more as usize];
        code[..4].copy_from_slice(&[0xf3, 0x0f, 0x1e, 0xfa]);
        code[8..11].copy_from_slice(&[0x48, 0x8b, 0x15]);
        code[11..15].copy_from_slice(&(32 + more as u32 + 1 - 15).to_le_bytes());
        code[20..25].copy_from_slice(&branch_to(start + 20, calls));
        code[28..30].copy_from_slice(&[0x66, 0x90]);
        code.push(0xc3);
        code.extend(OPS.to_le_bytes());
        guest.put(OPS + 32, start);
        guest.put(OPS + 40, code.len() as u64);
        guest.bytes(start, &code);
        let report = look(&guest);
        (report.findings.len(), doubt(&report).is_some())
    };
    assert_eq!(kept(function), (0, false));
    assert_eq!(kept(all), (0, false));
    assert_eq!(kept(THEIRS), (1, false));
    assert_eq!(kept(other), (0, true));
    kept(function);
    // Functions may call its beginning, and nothing else of it.
    let calls = |to: u64| {
        let report = guest.check(|view, owners, report| {
            let text = TextReport {
                trampolines: [(to, (1, other))].into(),
                ..TextReport::default()
            };
            ftrace::callbacks(view, owners, Some(&text), report);
        });
        let place = "the call of Ftrace's in open";
        report.findings.iter().any(|found| found.place == place)
    };
    assert!(!calls(start));
    for to in [start + 1, start + 20, start + 0x800] {
        assert!(calls(to), "{to:x}");
    }
}

fn branch_to(at: u64, to: u64) -> [u8; 5] {
    branch(0xe8, at, to)
}

#[test]
fn ftrace_calls_what_is_registered_or_what_calls_all_of_it() {
    let (mut guest, registered) = callback("function_trace_call");
    guest.symbol(DATA + 24, 'D', "ftrace_trace_function");
    let all = guest.function("arch_ftrace_ops_list_func");
    let other = guest.function("get_random_u32");
    for own in [all, registered] {
        guest.put(DATA + 24, own);
        assert_eq!(found(&look(&guest)), []);
    }
    guest.put(DATA + 24, other);
    let report = look(&guest);
    let bent = "ftrace_trace_function, whom Ftrace calls";
    assert_eq!(
        found(&report),
        [(bent, "get_random_u32", "the kernel: get_random_u32")]
    );

    guest.put(DATA + 24, all);
    let call = guest.function("ftrace_call");
    let mut code = vec![0xe8];
    code.extend((other.wrapping_sub(call + 5) as u32).to_le_bytes());
    guest.bytes(call, &code);
    assert_eq!(found(&look(&guest))[0].0, "ftrace_call, whom Ftrace calls");
}

#[test]
fn function_graph_calls_its_own() {
    let (mut guest, _) = callback("function_trace_call");
    let base = DATA + 0x40;
    let (own, stub) = (
        guest.function("trace_graph_entry"),
        guest.function("ftrace_stub"),
    );
    let other = guest.function("get_random_u32");
    guest.symbol(base, 'D', "ftrace_graph_entry");
    guest.symbol(base + 8, 'D', "__SCK__fgraph_retfunc");
    guest.symbol(base + 16, 'd', "fgraph_array");
    let fields = [("entryfunc", 0), ("retfunc", 8), ("saved_func", 16)];
    guest.layout("fgraph_ops", &fields);
    guest.put(base + 24, HEAP);
    for at in [base, HEAP, HEAP + 16] {
        guest.put(at, own);
    }
    for at in [base + 8, HEAP + 8] {
        guest.put(at, stub);
    }
    assert_eq!((found(&look(&guest)), doubt(&look(&guest))), (vec![], None));
    let places = [
        (base, own, "ftrace_graph_entry".to_owned()),
        (base + 8, stub, "__SCK__fgraph_retfunc".to_owned()),
        (HEAP, own, format!("{HEAP:#x}")),
        (HEAP + 16, own, format!("{HEAP:#x}")),
        (HEAP + 8, stub, format!("{HEAP:#x}")),
    ];
    for (at, was, name) in places {
        // What ends an entry is none of the beginning.
        for bent in [other, THEIRS, own ^ stub ^ was] {
            guest.put(at, bent);
            let place = format!("function_graph's callback {name}");
            assert_eq!(found(&look(&guest))[0].0, place, "{bent:#x}");
        }
        guest.put(at, was);
    }
    let fprobes = guest.function("fprobe_entry");
    guest.put(HEAP, fprobes);
    let report = look(&guest);
    assert!(found(&report).is_empty() && doubt(&report).is_some());
}

/// A kernel with a kprobe of an event's at `TEXT + 0x800`.
fn probed() -> (Fake, u64) {
    let mut guest = Fake::new();
    let handler = guest.function("kprobe_dispatcher");
    guest.symbol(DATA, 'd', "kprobe_table");
    let kprobe = [
        ("hlist", 0),
        ("list", 16),
        ("addr", 32),
        ("pre_handler", 40),
        ("post_handler", 48),
        ("opcode", 56),
        ("flags", 64),
        ("ainsn.insn", 120),
        ("ainsn.size", 128),
        ("ainsn.opcode", 136),
        ("ainsn.rel32", 144),
        ("ainsn.emulate_op", 152),
    ];
    guest.layout("kprobe", &kprobe);
    guest.layout(
        "kretprobe",
        &[
            ("kp", 0),
            ("handler", 80),
            ("entry_handler", 88),
            ("rh", 104),
        ],
    );
    let optimized = [
        ("kp", 8),
        ("optinsn.copied_insn", 208),
        ("optinsn.insn", 216),
        ("optinsn.size", 224),
    ];
    guest.layout("optimized_kprobe", &optimized);
    guest.layout("trace_kprobe", &[("rp.kp", 16), ("tp.event", 200)]);
    guest.layout("trace_probe_event", &[("call", 8)]);
    guest.layout("trace_event_call", &[("prog_array", 24)]);
    guest.layout("bpf_prog_array", &[("items", 16)]);
    // In the last bucket.
    guest.put(DATA + 8 * 63, PROBE);
    guest.put(PROBE + 16, PROBE + 16);
    guest.put(PROBE + 32, TEXT + 0x800);
    guest.put(PROBE + 40, handler);
    guest.put(PROBE + 56, 0x55);
    guest.put(PROBE - 16 + 200, EVENT);
    guest.symbol(DATA + 0x300, 'D', "kprobe_insn_slots");
    guest.symbol(DATA + 0x300, 'D', "kprobe_optinsn_slots");
    guest.layout("kprobe_insn_cache", &[("pages", 8)]);
    guest.layout("kprobe_insn_page", &[("list", 0), ("insns", 16)]);
    guest.put(DATA + 0x308, SLOTS);
    guest.put(SLOTS, DATA + 0x308);
    guest.put(SLOTS + 16, SLOT);
    moved(&guest, &[0x55], &[0xcc]);
    (guest, handler)
}

/// Lets the kprobe have moved an instruction: this, and what follows it.
fn moved(guest: &Fake, code: &[u8], behind: &[u8]) {
    guest.put(PROBE + 120, SLOT + 0x800);
    guest.put(PROBE + 128, code.len() as u64);
    guest.bytes(SLOT + 0x800, &[code, behind].concat());
}

/// A call or a jump.
fn branch(opcode: u8, at: u64, to: u64) -> [u8; 5] {
    let mut code = [opcode, 0, 0, 0, 0];
    code[1..].copy_from_slice(&(to.wrapping_sub(at + 5) as u32).to_le_bytes());
    code
}

const PROBE: u64 = HEAP + 0x1000;
const EVENT: u64 = HEAP + 0x2000;
const SLOTS: u64 = HEAP + 0x4000;
const SLOT: u64 = MODULES + 0x1000;

/// The kernel's text, with this at the place that is probed, as it is compared.
fn compared(guest: &Fake, code: [u8; 6]) -> [u8; 6] {
    let mut text = [0x90; 0x1000];
    text[0x800..0x806].copy_from_slice(&code);
    guest.check(|view, owners, _| {
        Probes::of(view).restore(view, owners, &mut text);
    });
    text[0x800..0x806].try_into().expect("six")
}

#[test]
fn a_breakpoint_of_the_kernels_own_is_taken_for_what_it_stands_for() {
    let (guest, handler) = probed();
    let breakpoint = [0xcc, 1, 2, 3, 4, 5];
    assert_eq!(compared(&guest, breakpoint), [0x55, 1, 2, 3, 4, 5]);
    // Something else is there, or the handler is a module's.
    assert_eq!(compared(&guest, [0xe9; 6]), [0xe9; 6]);
    guest.put(PROBE + 40, THEIRS);
    assert_eq!(compared(&guest, breakpoint), breakpoint);
    // There is none, which the kernel has for nothing.
    guest.put(PROBE + 40, 0);
    assert_eq!(compared(&guest, breakpoint), breakpoint);
    // Two are in the table for one address.
    guest.put(PROBE + 40, handler);
    let twin = HEAP + 0x3800;
    for word in (0..256).step_by(8) {
        let value = match word {
            0 => 0,
            16 => twin + 16,
            32 => TEXT + 0x800,
            _ => 0,
        };
        guest.put(twin + word, value);
    }
    guest.put(DATA + 8 * 62, twin);
    assert_eq!(compared(&guest, breakpoint), breakpoint);
    guest.put(DATA + 8 * 62, 0);
    assert_ne!(compared(&guest, breakpoint), breakpoint);
    // Of several at one place, one is.
    guest.put(PROBE + 40, handler);
    let other = HEAP + 0x3000;
    guest.put(PROBE + 16, other + 16);
    guest.put(other + 16, PROBE + 16);
    guest.put(other + 40, THEIRS);
    assert_eq!(compared(&guest, breakpoint), breakpoint);
}

#[test]
fn what_runs_in_place_of_a_probed_instruction_does_the_same() {
    let (mut guest, _) = probed();
    let breakpoint = [0xcc, 1, 2, 3, 4, 5];
    let restored = |guest: &Fake| compared(guest, breakpoint) != breakpoint;
    // It goes on by a jump, to where it has to.
    let (at, behind) = (TEXT + 0x800, SLOT + 0x801);
    moved(&guest, &[0x55], &branch(0xe9, behind, at + 1));
    assert!(restored(&guest));
    for other in [
        branch(0xe9, behind, at + 2),
        branch(0xe8, behind, at + 1),
        [0x90; 5],
    ] {
        moved(&guest, &[0x55], &other);
        assert!(!restored(&guest), "{other:x?}");
    }
    // Of another size, or another instruction, or none.
    for other in [&[0x54][..], &[], &[0x55, 1], &[0x55, 2], &[0x55; 16]] {
        moved(&guest, other, &[0xcc]);
        assert!(!restored(&guest), "{other:x?}");
    }
    // In memory that was not made for it.
    moved(&guest, &[0x55], &[0xcc]);
    guest.put(SLOTS + 16, SLOT + 0x1000);
    assert!(!restored(&guest));
    guest.put(SLOTS + 16, SLOT);
    // Done by a function, where none is to.
    assert!(restored(&guest));
    let [call, jump] =
        ["kprobe_emulate_call", "kprobe_emulate_jmp"].map(|name| guest.function(name));
    guest.put(PROBE + 152, call);
    assert!(!restored(&guest));

    // A call is: by the right function, which has the right size and distance. Its copy
    // has to be right all the same.
    guest.put(PROBE + 56, 0xe8);
    moved(&guest, &[0xe8, 1, 2, 3, 5], &[0xcc]);
    guest.put(PROBE + 144, 0x0403_0201);
    assert!(!restored(&guest));
    moved(&guest, &[0xe8, 1, 2, 3, 4], &[0xcc]);
    guest.put(PROBE + 144, 0x0403_0201);
    assert!(restored(&guest));
    for (at, wrong, right) in [
        (152, jump, call),
        (152, THEIRS, call),
        (152, 0, call),
        (128, 6, 5),
        (144, 0x0403_0202, 0x0403_0201),
    ] {
        guest.put(PROBE + at, wrong);
        assert!(!restored(&guest), "{at} {wrong:x}");
        guest.put(PROBE + at, right);
        assert!(restored(&guest), "{at}");
    }
}

/// A byte in the middle of an instruction that was made a breakpoint is none of a
/// kprobe's, whatever the kprobe has for it.
#[test]
fn a_kprobe_is_where_an_instruction_begins() {
    let (guest, handler) = probed();
    let place = |before: [u8; 2]| {
        let mut text = [0x90; 0x1000];
        text[0x7fe..0x806].copy_from_slice(&[before[0], before[1], 0xcc, 1, 2, 3, 4, 5]);
        guest.check(|view, owners, _| Probes::of(view).restore(view, owners, &mut text));
        text[0x800]
    };
    assert_eq!(place([0x90, 0x90]), 0x55);
    // In a call, behind `xor %eax, %eax`, and behind what is no instruction.
    assert_eq!(place([0x90, 0xe8]), 0xcc);
    assert_eq!(place([0x31, 0xc0]), 0x55);
    assert_eq!(place([0x06, 0x90]), 0xcc);
    // Another kprobe took out an instruction that is longer than its breakpoint.
    let other = HEAP + 0x3800;
    for word in (0..256).step_by(8) {
        guest.put(other + word, 0);
    }
    let copy = SLOT + 0x880;
    for (at, value) in [
        (16, other + 16),
        (32, TEXT + 0x7fe),
        (40, handler),
        (56, 0x31),
        (120, copy),
        (128, 2),
    ] {
        guest.put(other + at, value);
    }
    guest.bytes(copy, &[0x31, 0xc0, 0xcc]);
    guest.put(DATA + 8 * 62, other);
    assert_eq!(place([0xcc, 0xc0]), 0x55);
    // One that did something else is not believed in what was there.
    for (at, wrong, right) in [(56, 0xe8, 0x31), (40, THEIRS, handler), (120, HEAP, copy)] {
        guest.put(other + at, wrong);
        assert_eq!(place([0xcc, 0xc0]), 0xcc, "{at}");
        guest.put(other + at, right);
        assert_eq!(place([0xcc, 0xc0]), 0x55, "{at}");
    }
    // Nor one that says that it made a jump of the kernel's own.
    for (at, value) in [(32, TEXT + 0x7ff), (56, 0x90), (64, 4), (200, 0x0302_0155)] {
        guest.put(other + at, value);
    }
    assert_eq!(place([0x90, 0xe9]), 0xcc);
}

/// What can be read of it is judged, and nothing is put back for it.
#[test]
fn a_kprobe_that_cannot_be_read_wholly_is_a_doubt_and_hides_nobody() {
    let (mut guest, handler) = probed();
    guest.layout("rethook", &[("data", 0), ("handler", 8)]);
    let breakpoint = [0xcc, 1, 2, 3, 4, 5];
    let look = |guest: &Fake| {
        let report = guest.check(|view, owners, report| {
            kprobes::handlers(view, owners, &Probes::of(view), report);
        });
        (report.findings.len(), doubt(&report).is_some())
    };
    assert_ne!(compared(&guest, breakpoint), breakpoint);
    let (list, others) = (PROBE + 16, PROBE + 16);
    // The list of those at one place, and one that is on it.
    for nowhere in [0x1000, 0x1010] {
        guest.put(list, nowhere);
        assert_eq!(look(&guest), (0, true));
        assert_eq!(compared(&guest, breakpoint), breakpoint);
        guest.put(PROBE + 40, THEIRS);
        assert_eq!(look(&guest), (1, true));
        guest.put(PROBE + 40, handler);
    }
    // Another one before the break, and one in a bucket behind.
    let (other, behind) = (HEAP + 0x3000, HEAP + 0x3800);
    for kprobe in [other, behind] {
        for word in (0..256).step_by(8) {
            guest.put(kprobe + word, 0);
        }
        guest.put(kprobe + 16, kprobe + 16);
        guest.put(kprobe + 32, TEXT + 0x900);
        guest.put(kprobe + 40, THEIRS);
    }
    guest.put(list, other + 16);
    guest.put(other + 16, 0x1000);
    assert_eq!(look(&guest), (1, true));
    guest.put(list, others);
    assert_eq!(look(&guest), (0, false));
    let bucket = DATA + 8 * 62;
    guest.put(bucket, PROBE);
    guest.put(DATA + 8 * 63, behind);
    guest.put(PROBE, 0x1000);
    assert_eq!(look(&guest), (1, true));
    guest.put(PROBE, 0);
    assert_eq!(look(&guest), (1, false));
    guest.put(DATA + 8 * 63, 0);
    // What it is returned through.
    let is_return = guest.function("pre_handler_kretprobe");
    guest.put(PROBE + 40, is_return);
    guest.put(PROBE + 80, THEIRS);
    guest.put(PROBE + 104, 0x1000);
    assert_eq!(look(&guest), (1, true));
}

#[test]
fn a_jump_is_a_kprobes_only_if_it_leads_to_what_was_made_for_it() {
    let (mut guest, _) = probed();
    let callback = guest.function("optimized_callback");
    let template = DATA + 0x400;
    for (within, name) in [
        (0, "optprobe_template_entry"),
        (1, "optprobe_template_clac"),
        (5, "optprobe_template_val"),
        (16, "optprobe_template_call"),
        (24, "optprobe_template_end"),
    ] {
        guest.symbol(template + within, 'r', name);
    }
    guest.bytes(template, &[0x90; 24]);
    guest.put(PROBE + 64, 4);
    // An instruction of one byte, one of three, and one of two.
    guest.bytes(PROBE + 200, &[0x48, 0x01, 0xd0, 0x31]);
    guest.put(PROBE + 208, SLOT);
    guest.put(PROBE + 216, 6);
    let (at, restored) = (TEXT + 0x800, [0x55, 0x48, 0x01, 0xd0, 0x31, 0xc0]);
    let jump_to = |to| {
        let mut code = [0xc0; 6];
        code[..5].copy_from_slice(&branch(0xe9, at, to));
        code
    };
    let jump = jump_to(SLOT);
    let mut code = [0x90; 35];
    code[5..7].copy_from_slice(&[0x48, 0xbf]);
    code[7..15].copy_from_slice(&(PROBE - 8).to_le_bytes());
    code[16..21].copy_from_slice(&branch(0xe8, SLOT + 16, callback));
    code[24..30].copy_from_slice(&restored);
    code[30..].copy_from_slice(&branch(0xe9, SLOT + 30, at + 6));
    guest.bytes(SLOT, &code);
    assert_eq!(compared(&guest, jump), restored);
    let elsewhere = jump_to(SLOT + 1);
    assert_eq!(compared(&guest, elsewhere), elsewhere);
    // A breakpoint there leads there as well.
    let mut breakpoint = restored;
    breakpoint[0] = 0xcc;
    assert_eq!(compared(&guest, breakpoint), restored);
    guest.put(PROBE + 208, SLOT + 1);
    assert_eq!(compared(&guest, breakpoint), breakpoint);
    guest.put(PROBE + 208, SLOT);
    // All of it has to be as it was made.
    for byte in 0..code.len() {
        let mut other = code;
        other[byte] ^= 0x10;
        guest.bytes(SLOT, &other);
        assert_eq!(compared(&guest, jump), jump, "{byte}");
    }
    // But for what keeps users' memory closed.
    code[1..4].copy_from_slice(&[0x0f, 0x01, 0xca]);
    guest.bytes(SLOT, &code);
    assert_eq!(compared(&guest, jump), restored);
    // Of other instructions, of too many, and in nobody's memory.
    for (place, wrong, right) in [
        (PROBE + 200, 0x31d0_0149, 0x31d0_0148),
        (PROBE + 216, 5, 6),
        (PROBE + 216, 20, 6),
        (PROBE + 216, u64::MAX, 6),
        (SLOTS + 16, SLOT + 0x1000, SLOT),
    ] {
        guest.put(place, wrong);
        assert_eq!(compared(&guest, jump), jump, "{place:x} {wrong:x}");
        guest.put(place, right);
        assert_eq!(compared(&guest, jump), restored, "{place:x}");
    }
}

#[test]
fn a_bpf_program_at_a_kprobe_or_an_event_is_found() {
    let (mut guest, _) = probed();
    let look = |guest: &Fake| {
        guest.check(|view, owners, report| {
            kprobes::handlers(view, owners, &Probes::of(view), report);
        })
    };
    assert_eq!(found(&look(&guest)), []);
    assert_eq!((look(&guest).notes.len(), doubt(&look(&guest))), (1, None));
    let other = guest.function("irq_work_single");
    guest.put(PROBE + 48, other);
    assert_eq!(found(&look(&guest)), []);
    let why = look(&guest).outcomes[0].doubt.clone().expect("a doubt");
    assert!(why.contains("irq_work_single"), "{why}");
    guest.put(PROBE + 48, 0);
    let programs = HEAP + 0x5000;
    guest.put(EVENT + 8 + 24, programs);
    assert_eq!(found(&look(&guest)), []);
    guest.put(programs + 16, HEAP);
    let report = look(&guest);
    assert_eq!(found(&report)[0].2, "a BPF program");

    // One of those that the image lists.
    let (list, event) = (DATA + 0x600, DATA + 0x700);
    guest.symbol(list, 'd', "__start_ftrace_events");
    guest.symbol(list + 8, 'd', "__stop_ftrace_events");
    guest.symbol(event, 'd', "event_sched_switch");
    let image = Image::made_of(
        &[(".init.data", list, &event.to_le_bytes())],
        &[(list, true)],
    );
    let look = |guest: &Fake| {
        guest.check(|view, owners, report| tracepoints::attached(view, owners, &image, report))
    };
    assert_eq!(found(&look(&guest)), []);
    guest.put(event + 24, programs);
    assert_eq!(found(&look(&guest))[0].0, "event event_sched_switch");
}

#[test]
fn a_kretprobe_is_called_where_functions_return_and_nobody_else() {
    let (mut guest, _) = probed();
    guest.layout("rethook", &[("data", 0), ("handler", 8)]);
    let [is_return, own, handler, other] = [
        "pre_handler_kretprobe",
        "kretprobe_dispatcher",
        "kretprobe_rethook_handler",
        "irq_work_single",
    ]
    .map(|name| guest.function(name));
    let (rethook, foreign) = (HEAP + 0x3800, HEAP + 0x3c00);
    guest.put(PROBE + 40, is_return);
    guest.put(PROBE + 80, own);
    guest.put(PROBE + 104, rethook);
    guest.put(foreign + 80, THEIRS);
    let look = |data: u64, handler: u64| {
        guest.put(rethook, data);
        guest.put(rethook + 8, handler);
        let report = guest.check(|view, owners, report| {
            kprobes::handlers(view, owners, &Probes::of(view), report);
        });
        (report.findings.len(), doubt(&report).is_some())
    };
    assert_eq!(look(PROBE, handler), (0, false));
    assert_eq!(look(foreign, 0), (0, false));
    assert_eq!(look(PROBE, THEIRS), (1, false));
    // Of the kernel's own, it is not of those for that.
    assert_eq!(look(PROBE, other), (1, false));
    assert_eq!(look(PROBE, own), (1, false));
    assert_eq!(look(foreign, handler), (1, false));
}

#[test]
fn what_cannot_be_read_hides_nothing_that_can() {
    let (guest, _) = probed();
    // Two in one bucket, the first of which leads nowhere.
    let (damaged, nowhere) = (HEAP + 0x3000, 0x1000);
    guest.put(DATA + 8 * 63, damaged);
    guest.put(damaged, PROBE);
    guest.put(damaged + 16, nowhere);
    guest.put(PROBE + 40, THEIRS);
    let report = guest.check(|view, owners, report| {
        kprobes::handlers(view, owners, &Probes::of(view), report);
    });
    assert_eq!(report.findings.len(), 1);
    assert!(doubt(&report).is_some());

    let (mut guest, _) = callback("call_direct_funcs");
    guest.symbol(DATA + 16, 'd', "direct_functions");
    guest.put(DATA + 16, nowhere);
    guest.put(OPS + 48, THEIRS);
    let report = look(&guest);
    assert_eq!(report.findings.len(), 1);
    assert!(doubt(&report).is_some());
}

#[test]
fn what_is_attached_to_a_tracepoint_is_known_or_a_doubt() {
    let (list, point, array) = (DATA + 0x600, DATA + 0x700, HEAP + 0x100);
    let mut guest = Fake::new();
    guest.symbol(list, 'd', "__start___tracepoints_ptrs");
    guest.symbol(list + 8, 'd', "__stop___tracepoints_ptrs");
    guest.layout("tracepoint", &[("name", 0), ("funcs", 8)]);
    guest.sized("tracepoint_func", 24);
    guest.put(point + 8, array);
    // The first of two leads nowhere.
    let offsets =
        [point + 0x40 - list, point - list - 4].map(|offset| (offset as u32).to_le_bytes());
    let image = Image::made_of(&[(".rodata", list, offsets.as_flattened())], &[]);
    let (damaged, leads_nowhere) = (point + 0x40 + 8, Cell::new(false));
    let mut look = |name: &str| {
        let function = match name {
            "" => THEIRS,
            name => guest.function(name),
        };
        guest.put(array, function);
        guest.put(damaged, if leads_nowhere.get() { 0x1000 } else { 0 });
        let report =
            guest.check(|view, owners, report| tracepoints::attached(view, owners, &image, report));
        (report.findings.len(), doubt(&report).is_some())
    };
    for known in ["probe_sched_switch", "perf_trace_sched_switch"] {
        assert_eq!(look(known), (0, false), "{known}");
    }
    assert_eq!(look("irq_work_single"), (0, true));
    assert_eq!(look("__bpf_trace_sched_switch"), (1, false));
    assert_eq!(look(""), (1, false));
    leads_nowhere.set(true);
    assert_eq!(look(""), (1, true));
}

/// Which is what the sites jump to: the list of functions alone would tell little.
#[test]
fn the_static_call_of_a_tracepoint_leads_to_what_is_attached_to_it() {
    let (list, point, key) = (DATA + 0x600, DATA + 0x700, DATA + 0x780);
    let (name, array) = (HEAP + 0x80, HEAP + 0x100);
    let mut guest = Fake::new();
    let iterator = guest.function("__traceiter_sched_switch");
    let [probe, second, other] = [
        "probe_sched_switch",
        "perf_trace_sched_switch",
        "irq_work_single",
    ]
    .map(|name| guest.function(name));
    let mut built = [0; 0x28];
    built[8..16].copy_from_slice(&key.to_le_bytes());
    built[16..24].copy_from_slice(&iterator.to_le_bytes());
    let offset = ((point - list) as u32).to_le_bytes();
    let image = Image::made_of(&[(".rodata", list, &offset), (".data", point, &built)], &[]);
    guest.symbol(list, 'd', "__start___tracepoints_ptrs");
    guest.symbol(list + 4, 'd', "__stop___tracepoints_ptrs");
    let members = [
        ("name", 0),
        ("static_call_key", 8),
        ("iterator", 16),
        ("funcs", 24),
    ];
    guest.layout("tracepoint", &members);
    guest.sized("tracepoint_func", 24);
    guest.bytes(name, b"sched_switch\0");
    guest.put(point, name);
    let look = |attached: &[u64], leads_to: u64| {
        guest.put(point + 24, if attached.is_empty() { 0 } else { array });
        for at in 0..3 {
            let function = attached.get(at).copied().unwrap_or(0);
            guest.put(array + 24 * at as u64, function);
        }
        guest.put(key, leads_to);
        // What the guest's own tracepoint says of its call is its word alone.
        guest.put(point + 8, HEAP);
        guest.put(point + 16, leads_to);
        let report =
            guest.check(|view, owners, report| tracepoints::attached(view, owners, &image, report));
        found(&report).first().map(|found| found.0.to_owned())
    };
    let call = Some("tracepoint sched_switch, its static call".to_owned());
    for attached in [&[][..], &[probe], &[probe, second]] {
        assert_eq!(look(attached, iterator), None, "{attached:?}");
        assert_eq!(look(attached, other), call, "{attached:?}");
        assert_eq!(look(attached, THEIRS), call, "{attached:?}");
        let is_only = attached.len() == 1;
        assert_eq!(look(attached, probe).is_none(), is_only, "{attached:?}");
    }
    // Told once where it is attached.
    assert_eq!(
        look(&[THEIRS], THEIRS),
        Some("tracepoint sched_switch".to_owned())
    );
}

/// A list that has no end is one that was not looked at.
#[test]
fn more_functions_at_a_tracepoint_than_are_looked_at_are_a_doubt() {
    let (list, point, array) = (DATA + 0x600, DATA + 0x700, HEAP + 0x100);
    let offset = ((point - list) as u32).to_le_bytes();
    let image = Image::made_of(&[(".rodata", list, &offset)], &[]);
    for (functions, is_doubt) in [(255, false), (256, true)] {
        let mut guest = Fake::new();
        let own = guest.function("probe_sched_switch");
        guest.symbol(list, 'd', "__start___tracepoints_ptrs");
        guest.symbol(list + 4, 'd', "__stop___tracepoints_ptrs");
        guest.layout("tracepoint", &[("name", 0), ("funcs", 8)]);
        guest.sized("tracepoint_func", 24);
        guest.put(point + 8, array);
        for at in 0..functions {
            guest.put(array + 24 * at, own);
        }
        let report =
            guest.check(|view, owners, report| tracepoints::attached(view, owners, &image, report));
        assert_eq!(doubt(&report).is_some(), is_doubt, "{functions}");
    }
}

/// Whatever it calls itself: nothing proves that it is Linux's.
#[test]
fn no_module_has_leave_to_attach_itself_to_a_tracepoint() {
    let (list, point, name, array) = (DATA + 0x600, DATA + 0x700, HEAP + 0x80, HEAP + 0x100);
    let offset = ((point - list) as u32).to_le_bytes();
    let image = Image::made_of(&[(".rodata", list, &offset)], &[]);
    for called in ["drop_monitor", "kvm", "kvm_intel"] {
        let mut guest = Fake::new();
        guest.modules[0].name = called.to_owned();
        guest.symbol(list, 'd', "__start___tracepoints_ptrs");
        guest.symbol(list + 4, 'd', "__stop___tracepoints_ptrs");
        guest.layout("tracepoint", &[("name", 0), ("funcs", 8)]);
        guest.sized("tracepoint_func", 24);
        guest.bytes(name, b"kfree_skb\0");
        guest.put(point, name);
        guest.put(point + 8, array);
        guest.put(array, THEIRS);
        let report =
            guest.check(|view, owners, report| tracepoints::attached(view, owners, &image, report));
        let [(place, _, owner)] = found(&report)[..] else {
            panic!("{called}: {report:?}");
        };
        assert_eq!(place, "tracepoint kfree_skb");
        assert!(
            owner.starts_with(&format!("the module {called}")),
            "{owner}"
        );
    }
}
