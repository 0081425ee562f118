//! Against a trace array made of a few words: each gate, and what a hostile one
//! cannot do.

use proptest::prelude::*;

use super::super::btf::build::Builder;
use super::super::PageTables;
use super::*;
use crate::ram::{Layout, VecRam};
use crate::test_time::cpu_time;

const MAP: u64 = 0xffff_ffff_8000_0000;
const TEXT: u64 = MAP + 0x20_0000;
const DATA: u64 = TEXT + 0x1000;
const ARRAY: u64 = DATA + 0x100;
const BUFFER: u64 = DATA + 0x200;
const PARTS: u64 = DATA + 0x300;
/// Of CPU 0, and 0x40 bytes further that of the next.
const PART: u64 = DATA + 0x400;
const MASK: u64 = DATA + 0x500;
const COUNTS: u64 = DATA + 0x600;
const CPUS: u32 = 4;
/// For what is bounded by its count.
const LONG: Duration = Duration::from_secs(10);

/// As in 6.12; the limit is not in 6.1.
fn btf(limit: bool) -> Builder {
    let mut btf = Builder::new();
    let inner = [("tr", 0, 8), ("buffer", 8, 8), ("data", 16, 8)];
    let inner = btf.words("array_buffer", 24, &inner);
    btf.structure("trace_array", 40, &[("array_buffer", inner, 128)]);
    btf.words("trace_array_cpu", 16, &[("disabled", 4, 4)]);
    let mut fields = vec![
        ("record_disabled", 4, 4),
        ("cpumask", 8, 8),
        ("buffers", 16, 8),
    ];
    if limit {
        fields.push(("max_data_size", 28, 4));
    }
    btf.words("trace_buffer", 32, &fields);
    let fields = [("record_disabled", 4, 4), ("current_context", 8, 4)];
    btf.words("ring_buffer_per_cpu", 16, &fields);
    btf
}

struct Guest {
    ram: VecRam,
    kernel: Kernel,
    symbols: Vec<(&'static str, u64)>,
}

impl Guest {
    /// All gates are open; CPU 3 is none that the guest has.
    fn new() -> Self {
        let ram = VecRam::new(Layout::flat(8 << 20).expect("a layout"));
        // MAP is mapped to 0 on, in pages of 2 MiB.
        ram.poke_u64(Gpa(0x1000 + 8 * 511), 0x2000 | 3);
        ram.poke_u64(Gpa(0x2000 + 8 * 510), 0x3000 | 3);
        for page in 0..4 {
            ram.poke_u64(Gpa(0x3000 + 8 * page), page << 21 | 0x83);
        }
        let tables = PageTables {
            root: Gpa(0x1000),
            levels: 4,
        };
        let guest = Self {
            kernel: Kernel::made_up(Gpa(TEXT - MAP), Gva(TEXT), 0x1_0000, tables),
            ram,
            symbols: vec![
                ("_text", TEXT),
                ("_stext", TEXT),
                ("_etext", DATA),
                ("global_trace", ARRAY),
                ("__per_cpu_offset", DATA),
                ("alloc_cpumask_var_node", TEXT + 0x10),
            ],
        };
        for (at, value) in [
            (ARRAY + 24, BUFFER),
            // An offset, to which each CPU's own is added.
            (ARRAY + 32, COUNTS - 0x1_0000),
            (BUFFER + 8, MASK),
            (BUFFER + 16, PARTS),
            (BUFFER + 24, 4000 << 32),
            (MASK, 0b111),
            (PARTS + 24, 0),
            (COUNTS + 0x30, u64::MAX),
        ] {
            guest.poke(at, value);
        }
        for cpu in 0..3 {
            guest.poke(PARTS + 8 * cpu, PART + 0x40 * cpu);
            guest.poke(PART + 0x40 * cpu, 0);
            guest.poke(PART + 0x40 * cpu + 8, 0);
            guest.poke(COUNTS + 0x10 * cpu, 0);
        }
        for cpu in 0..4 {
            guest.poke(DATA + 8 * cpu, 0x1_0000 + 0x10 * cpu);
        }
        guest
    }

    fn poke(&self, at: u64, value: u64) {
        self.ram.poke_u64(Gpa(at - MAP), value);
    }

    fn half(&self, at: u64, value: u32) {
        self.ram.poke(Gpa(at - MAP), &value.to_le_bytes());
    }

    fn gates_by(&self, btf: &Builder) -> Result<Gates, GatesError> {
        let lines = self.symbols.iter();
        let text: String = lines
            .map(|(name, at)| format!("{at:x} T {name}\n"))
            .collect();
        let symbols = Symbols::parse(text.into_bytes()).expect("symbols");
        Gates::of(&self.kernel, &symbols, &btf.parse(), None)
    }

    fn gates(&self) -> Gates {
        self.gates_by(&btf(true)).expect("gates")
    }

    fn shut(&self) -> Vec<(GateKind, Option<u16>)> {
        let shut = self.gates().shut(&self.ram, CPUS, LONG).expect("a look");
        shut.into_iter().map(|gate| (gate.kind, gate.cpu)).collect()
    }
}

#[test]
fn each_gate_is_seen_shut_and_open() {
    let guest = Guest::new();
    assert_eq!(guest.shut(), []);
    assert_eq!(guest.gates().unseen(), []);
    let half = |at: u64, shut: u32, open: u32, what: GateKind, cpu: Option<u16>| {
        guest.half(at, shut);
        assert_eq!(guest.shut(), [(what, cpu)], "{at:#x}");
        guest.half(at, open);
        assert_eq!(guest.shut(), []);
    };
    half(BUFFER + 4, RB_BUFFER_OFF, 0, GateKind::Switch, None);
    half(BUFFER + 4, 1, 0, GateKind::Count, None);
    half(BUFFER + 4, 1 << 31, 0, GateKind::Count, None);
    half(BUFFER + 28, 0, 4000, GateKind::Limit, None);
    half(BUFFER + 28, 19, 20, GateKind::Limit, None);
    half(MASK, 0b011, 0b111, GateKind::Mask, Some(2));
    half(PART + 0x40 + 4, 1, 0, GateKind::CpuCount, Some(1));
    // A record in the making is one mark.
    half(PART + 8, 0x11, 0x10, GateKind::Context, Some(0));
    half(COUNTS + 0x24, 1, 0, GateKind::Disabled, Some(2));

    guest.half(BUFFER + 4, RB_BUFFER_OFF | 1);
    let both = [(GateKind::Switch, None), (GateKind::Count, None)];
    assert_eq!(guest.shut(), both);
}

#[test]
fn a_kernel_without_a_limit_or_with_its_mask_in_place_is_read_too() {
    let mut guest = Guest::new();
    guest
        .symbols
        .retain(|(name, _)| *name != "alloc_cpumask_var_node");
    guest.poke(BUFFER + 8, 0b101);
    guest.half(BUFFER + 28, 0);
    let gates = guest.gates_by(&btf(false)).expect("gates");
    assert_eq!(gates.unseen(), []);
    let shut = gates.shut(&guest.ram, CPUS, LONG).expect("a look");
    let mask = Gate {
        kind: GateKind::Mask,
        cpu: Some(1),
    };
    assert_eq!(shut, BTreeSet::from([mask]));
}

#[test]
fn what_cannot_be_located_is_named() {
    let mut guest = Guest::new();
    guest
        .symbols
        .retain(|(name, _)| *name != "__per_cpu_offset");
    let mut sparse = Builder::new();
    let inner = [("buffer", 8, 8), ("data", 16, 8)];
    let inner = sparse.words("array_buffer", 24, &inner);
    sparse.structure("trace_array", 40, &[("array_buffer", inner, 128)]);
    sparse.words("trace_array_cpu", 16, &[("disabled", 4, 4)]);
    let fields = [("record_disabled", 4, 4), ("buffers", 16, 8)];
    sparse.words("trace_buffer", 32, &fields);
    sparse.words("ring_buffer_per_cpu", 16, &[("record_disabled", 4, 8)]);
    let gates = guest.gates_by(&sparse).expect("gates");
    let unseen: Vec<String> = gates.unseen().iter().map(Unseen::to_string).collect();
    let whys = [
        "cpumask",
        "plausible record_disabled",
        "current_context",
        "__per_cpu_offset",
    ];
    assert_eq!(unseen.len(), whys.len(), "{unseen:?}");
    for (unseen, why) in unseen.iter().zip(whys) {
        assert!(unseen.contains(why), "{unseen}");
    }
    // The rest is looked at.
    guest.half(BUFFER + 4, 1);
    guest.half(PART + 4, 1);
    let shut = gates.shut(&guest.ram, CPUS, LONG).expect("a look");
    assert_eq!(shut.len(), 1);

    guest.symbols.retain(|(name, _)| *name != "global_trace");
    let error = guest.gates_by(&btf(true)).expect_err("no array");
    assert!(error.to_string().contains("global_trace"), "{error}");
}

#[test]
fn a_look_ends_where_a_pointer_leads_nowhere_or_memory_is_slow() {
    let guest = Guest::new();
    let gates = guest.gates();
    for at in [ARRAY + 24, ARRAY + 32, BUFFER + 8, BUFFER + 16, PARTS + 8] {
        let guest = Guest::new();
        guest.poke(at, 0x1234_5678_9abc_def8);
        let look = gates.shut(&guest.ram, CPUS, LONG);
        assert!(matches!(look, Err(GatesError::Lost { .. })), "{look:?}");
    }
    let slow = Guest::new();
    let ram = slow
        .ram
        .with_hook(|_, _, _| std::thread::sleep(Duration::from_millis(1)));
    let look = gates.shut(&ram, CPUS, Duration::from_millis(5));
    assert!(matches!(look, Err(GatesError::TooSlow { .. })), "{look:?}");
}

#[test]
fn many_gates_are_told_in_few_words() {
    let cpu = |cpu| Gate {
        kind: GateKind::CpuCount,
        cpu: Some(cpu),
    };
    let all: BTreeSet<Gate> = (0..1000).map(cpu).collect();
    let text = describe(&all);
    assert!(text.ends_with(": CPU 0, 1, 2, 3 and 996 more"), "{text}");
    let text = describe(&BTreeSet::from([cpu(7)]));
    assert!(text.ends_with(": CPU 7"), "{text}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever words stand there, and however many CPUs it says to have: an answer,
    /// and soon.
    #[test]
    fn hostile_words_are_borne(
        words in proptest::collection::vec(
            (0u64..0x100, prop_oneof![
                any::<u64>(),
                (0u64..0x100).prop_map(|word| DATA + 8 * word),
                Just(0),
            ]),
            1..40,
        ),
        cpus in any::<u32>(),
    ) {
        let guest = Guest::new();
        let gates = guest.gates();
        for (word, value) in words {
            guest.poke(DATA + 8 * word, value);
        }
        let begun = cpu_time();
        let _ = gates.shut(&guest.ram, cpus, Duration::from_millis(100));
        prop_assert!(cpu_time() - begun < Duration::from_secs(2));
    }
}
