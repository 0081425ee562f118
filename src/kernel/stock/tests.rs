//! Against a kernel made of a few words: what is found in it, and what a
//! hostile one cannot do.

use proptest::prelude::*;

use crate::ram::{Layout, VecRam};

use super::super::btf::build::Builder;
use super::super::btf::parse::kind;
use super::super::PageTables;
use super::*;
use crate::test_time::cpu_time;

const MAP: u64 = 0xffff_ffff_8000_0000;
const TEXT: u64 = MAP + 0x20_0000;
const BTF: u64 = TEXT + 0x1000;
const DATA: u64 = TEXT + 0x1_0000;
const GLOBAL: u64 = DATA + 0x100;
const INSTANCE: u64 = DATA + 0x200;
const BUFFER: u64 = DATA + 0x300;
const MAPPED: u64 = DATA + 0x400;
const CPUS: u64 = DATA + 0x500;
const CPU: u64 = DATA + 0x600;
const HASH: u64 = DATA + 0x700;
const TRACER: u64 = DATA + 0x800;
const NOP: u64 = DATA + 0x840;
const NAMES: u64 = DATA + 0x900;

fn btf() -> Builder {
    let mut btf = Builder::new();
    let list = btf.words("list_head", 16, &[("next", 0, 8), ("prev", 8, 8)]);
    let word = btf.int("", 8);
    let half = btf.int("", 4);
    let inner = btf.words("array_buffer", 16, &[("tr", 0, 8), ("buffer", 8, 8)]);
    let members = [
        ("list", list, 0),
        ("name", word, 128),
        ("array_buffer", inner, 192),
        ("current_trace", word, 320),
    ];
    btf.compound(kind::STRUCT, "trace_array", 48, &members);
    btf.words("tracer", 8, &[("name", 0, 8)]);
    let fields = [
        ("record_disabled", 4, 4),
        ("buffers", 8, 8),
        ("range_addr_start", 16, 8),
    ];
    btf.words("trace_buffer", 24, &fields);
    let cpu = [
        "nr_pages",
        "pages",
        "reader_page",
        "commit_page",
        "entries",
        "overrun",
        "commit_overrun",
        "dropped_events",
    ];
    let cpu: Vec<_> = (0u32..)
        .zip(cpu)
        .map(|(n, name)| (name, 8 * n, 8))
        .collect();
    btf.words("ring_buffer_per_cpu", 64, &cpu);
    btf.words("buffer_page", 24, &[("list", 0, 8), ("page", 16, 8)]);
    let data = [("time_stamp", 0, 8), ("commit", 8, 8), ("data", 16, 8)];
    btf.words("buffer_data_page", 16, &data);
    let hash = [("size_bits", 0, 8), ("buckets", 8, 8)];
    btf.words("ftrace_hash", 16, &hash);
    let entry = [("hlist", list, 0), ("ip", word, 128)];
    btf.compound(kind::STRUCT, "ftrace_func_entry", 24, &entry);
    btf.words("task_struct", 16, &[("stack_canary", 8, 8)]);
    let ent = btf.words("ftrace_graph_ent", 12, &[("func", 0, 8), ("depth", 8, 4)]);
    let entry = [("ent", word, 0), ("graph_ent", ent, 64)];
    btf.compound(kind::STRUCT, "ftrace_graph_ent_entry", 20, &entry);
    let ret = [
        ("func", 0, 8),
        ("depth", 8, 4),
        ("overrun", 12, 4),
        ("calltime", 16, 8),
    ];
    let ret = btf.words("ftrace_graph_ret", 24, &ret);
    // As in 6.12, with one of the two times outside only.
    let entry = [
        ("ent", word, 0),
        ("ret", ret, 64),
        ("calltime", half, 256),
        ("rettime", word, 320),
    ];
    btf.compound(kind::STRUCT, "ftrace_graph_ret_entry", 48, &entry);
    let (call, ret) = (btf.name("TRACE_GRAPH_ENT"), btf.name("TRACE_GRAPH_RET"));
    btf.add("trace_type", kind::ENUM << 24 | 2, 4, &[call, 11, ret, 10]);
    btf
}

struct Guest {
    ram: VecRam,
    kernel: Kernel,
    symbols: String,
}

impl Guest {
    /// The global ring traces two functions; an instance traces none.
    fn new() -> Self {
        let ram = VecRam::new(Layout::flat(8 << 20).expect("a layout"));
        let root = Gpa(0x1000);
        // MAP is mapped to 0 on, in pages of 2 MiB.
        ram.poke_u64(Gpa(0x1000 + 8 * 511), 0x2000 | 3);
        ram.poke_u64(Gpa(0x2000 + 8 * 510), 0x3000 | 3);
        for page in 0..4 {
            ram.poke_u64(Gpa(0x3000 + 8 * page), page << 21 | 0x83);
        }
        let bytes = btf().bytes();
        let stop = BTF + bytes.len() as u64;
        let guest = Self {
            kernel: Kernel {
                phys_text: Gpa(TEXT - MAP),
                slide: 0,
                banner: "Linux version 6.1".to_owned(),
                levels: 4,
                tables: PageTables { root, levels: 4 },
                link_text: Gva(TEXT),
                span: 0x4_0000,
            },
            ram,
            symbols: format!(
                "{TEXT:x} T _text\n{TEXT:x} T _stext\n{:x} T vfs_read\n{:x} T vfs_open\n\
                 {BTF:x} T _etext\n{BTF:x} R __start_BTF\n{stop:x} R __stop_BTF\n\
                 {DATA:x} D ftrace_trace_arrays\n{:x} D jiffies_64\n{:x} D init_task\n\
                 {:x} D ftrace_graph_hash\n{:x} D nr_cpu_ids\n",
                TEXT + 0x100,
                TEXT + 0x200,
                DATA + 0x20,
                DATA + 0x30,
                DATA + 0x48,
                DATA + 0x50
            ),
        };
        guest.ram.poke(Gpa(BTF - MAP), &bytes);
        for (at, value) in [
            (DATA, INSTANCE),
            (INSTANCE, GLOBAL),
            (GLOBAL, DATA),
            (DATA + 0x38, 0x1234_5678_9abc_de00),
            (DATA + 0x48, HASH),
            (GLOBAL + 16, 0),
            (GLOBAL + 32, BUFFER),
            (GLOBAL + 40, TRACER),
            (INSTANCE + 16, NAMES),
            (INSTANCE + 32, MAPPED),
            (INSTANCE + 40, NOP),
            (DATA + 0x50, 2),
            (BUFFER + 8, CPUS),
            (MAPPED + 8, CPUS),
            (MAPPED + 16, 0x1000),
            (CPUS, CPU),
            (CPU, 100),
            (TRACER, NAMES + 16),
            (NOP, NAMES + 32),
            // Two buckets: two functions in one of them.
            (HASH, 1),
            (HASH + 8, HASH + 0x20),
            (HASH + 0x28, HASH + 0x40),
            (HASH + 0x40, HASH + 0x60),
            (HASH + 0x50, TEXT + 0x104),
            (HASH + 0x70, TEXT + 0x200),
        ] {
            guest.poke(at, value);
        }
        guest.ram.poke(Gpa(NAMES - MAP), b"x\x1bf\0");
        guest.ram.poke(Gpa(NAMES + 16 - MAP), b"function_graph\0");
        guest.ram.poke(Gpa(NAMES + 32 - MAP), b"nop\0");
        guest
    }

    fn poke(&self, at: u64, value: u64) {
        self.ram.poke_u64(Gpa(at - MAP), value);
    }

    fn symbols(&self) -> Symbols {
        Symbols::parse(self.symbols.clone().into_bytes()).expect("symbols")
    }

    fn attach(&self) -> Result<Stock, StockError> {
        Stock::attach(&self.ram, &self.kernel, &self.symbols())
    }

    fn without(mut self, symbol: &str) -> Self {
        let kept = self.symbols.lines().filter(|line| !line.ends_with(symbol));
        self.symbols = kept.map(|line| format!("{line}\n")).collect();
        self
    }
}

const NONE: [&str; 0] = [];

#[test]
fn the_ring_that_is_traced_is_found_with_its_switch() {
    let guest = Guest::new();
    let stock = guest.attach().expect("a stock kernel");
    let array = stock.tracing(&guest.ram, &NONE).expect("a ring");
    assert_eq!((array.name.as_deref(), array.boot_mapped), (None, false));
    assert_eq!((array.kb, array.nr_cpus), (400, 2));
    assert_eq!(array.ring.buffer, Gva(BUFFER));
    assert!(array.recording(&guest.ram).expect("a word"));

    array.record(&guest.ram, false).expect("a word");
    let disabled = guest.ram.read_u32(Gpa(BUFFER + 4 - MAP)).expect("a word");
    assert_eq!(disabled, RB_BUFFER_OFF);
    assert!(!array.recording(&guest.ram).expect("a word"));
    array.record(&guest.ram, true).expect("a word");
    assert!(array.recording(&guest.ram).expect("a word"));
}

#[test]
fn a_boot_mapped_instance_that_traces_goes_before_the_global_ring() {
    let guest = Guest::new();
    guest.poke(INSTANCE + 40, TRACER);
    let stock = guest.attach().expect("a stock kernel");
    let array = stock.tracing(&guest.ram, &NONE).expect("a ring");
    assert_eq!(array.name.as_deref(), Some("x\\x1bf"), "escaped");
    assert!(array.boot_mapped);
    assert_eq!(array.ring.buffer, Gva(MAPPED));
}

#[test]
fn formats_are_those_of_the_btf() {
    let format = Guest::new().attach().expect("a stock kernel").format;
    let slot = |at, size| Slot { at, size };
    assert_eq!(format.call.type_id, 11);
    assert_eq!(
        (format.call.func, format.call.depth),
        (slot(8, 8), slot(16, 4))
    );
    assert_eq!(format.ret.type_id, 10);
    assert_eq!(format.ret.calltime, slot(24, 8), "the inner one");
    assert_eq!(format.ret.rettime, slot(40, 8), "the only one");
}

#[test]
fn other_functions_than_the_booted_ones_are_refused_with_what_to_boot() {
    let guest = Guest::new();
    let (stock, symbols) = (guest.attach().expect("a stock kernel"), guest.symbols());
    let require = |names: &[&str]| {
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        stock
            .functions(&guest.ram, &symbols)?
            .require(&symbols, &names)
    };
    require(&["vfs_open", "vfs_read"]).expect("those it was booted with");
    let text = require(&["vfs_read"]).expect_err("one too few").to_string();
    assert!(text.contains("which are vfs_open, vfs_read;"), "{text}");
    assert!(text.contains("ftrace_graph_filter=vfs_read "), "{text}");
    // By another name of the same place, which is the one that Ftrace has.
    let line = guest
        .symbols
        .lines()
        .find(|line| line.ends_with(" vfs_read"));
    let alias = line.expect("a symbol").replace(" vfs_read", " also_read");
    let aliased = format!("{}{alias}\n", guest.symbols);
    let aliased = Symbols::parse(aliased.into_bytes()).expect("symbols");
    let require = |names: &[&str]| {
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        let booted = stock.functions(&guest.ram, &aliased)?;
        booted.require(&aliased, &names)
    };
    for read in ["vfs_read", "also_read"] {
        require(&["vfs_open", read]).expect("those it was booted with");
    }
    require(&["vfs_read", "also_read"]).expect_err("one of them twice");
    let text = require(&["vfs_read"]).expect_err("one too few").to_string();
    assert!(text.contains("ftrace_graph_filter=also_read "), "{text}");
    let require = |names: &[&str]| {
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        stock
            .functions(&guest.ram, &symbols)?
            .require(&symbols, &names)
    };
    // Whoever has not said yet what is to be traced is content with some.
    require(&[]).expect("some");
    guest.poke(HASH + 8, 0);
    for (wanted, filter) in [(&["vfs_read"][..], "vfs_read"), (&[], "FUNCTION,..")] {
        let text = require(wanted).expect_err("all").to_string();
        assert!(text.contains("which are all of them"), "{text}");
        assert!(
            text.contains(&format!("ftrace_graph_filter={filter} ")),
            "{text}"
        );
    }
}

#[test]
fn of_many_functions_some_are_named() {
    let guest = Guest::new();
    let (stock, symbols) = (guest.attach().expect("a stock kernel"), guest.symbols());
    // A list of so many, in one bucket, from behind the symbols on.
    let put = |many: u64| {
        let entry = |number: u64| TEXT + 0x10_0000 + 32 * number;
        guest.poke(HASH + 0x28, entry(0));
        for number in 0..many {
            let next = if number + 1 < many {
                entry(number + 1)
            } else {
                0
            };
            guest.poke(entry(number), next);
            guest.poke(entry(number) + 16, u64::MAX - number);
        }
        let booted = stock.functions(&guest.ram, &symbols).expect("a table");
        let names = booted.functions.iter().map(|(name, _)| name.clone());
        let asked: Vec<String> = names.collect();
        (booted.to_string(), booted.require(&symbols, &asked).is_ok())
    };
    let (text, same) = put(10);
    assert_eq!((text.matches(", ").count(), same), (9, true), "{text}");
    let (text, same) = put(4096);
    assert!(
        text.len() < 300 && text.ends_with(" and 4086 more"),
        "{text}"
    );
    assert!(same);
    // Of what was not read, nobody knows that it is the same.
    let (text, same) = put(4097);
    assert!(
        text.ends_with(" and more than 4086 others") && !same,
        "{text}"
    );
}

#[test]
fn a_name_may_end_where_memory_ends_and_cross_a_page() {
    let guest = Guest::new();
    guest.poke(GLOBAL + 40, NOP);
    let tracer = |at: u64, name: &[u8]| {
        guest.poke(NOP, at);
        guest.ram.poke(Gpa(at - MAP), name);
        let stock = guest.attach().expect("a stock kernel");
        let arrays = stock.arrays(&guest.ram).expect("a list");
        arrays.into_iter().find(|array| array.name.is_none())
    };
    for (at, name) in [
        (MAP + (8 << 20) - 15, &b"function_graph\0"[..]),
        (TEXT + 0x10_0ff8, b"function_graph\0"),
    ] {
        let array = tracer(at, name).expect("the global one");
        assert_eq!(array.tracer, "function_graph");
    }
    let long = tracer(TEXT + 0x10_0ff8, &[b'x'; 100]).expect("the global one");
    assert_eq!(long.tracer, "x".repeat(64));
    // Past the end of memory.
    assert_eq!(tracer(MAP + (8 << 20) - 8, b"function"), None);
}

/// As memory is that the host has swapped out.
#[test]
fn slow_memory_is_not_waited_for() {
    let mut guest = Guest::new();
    let stock = guest.attach().expect("a stock kernel");
    let symbols = guest.symbols();
    guest.poke(HASH + 0x60, HASH + 0x60);
    guest.poke(INSTANCE, INSTANCE);
    guest.ram = guest.ram.with_hook(|_, gpa, _| {
        if gpa.0 >= DATA - MAP {
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
    });
    let table = stock.functions(&guest.ram, &symbols);
    assert!(
        matches!(table, Err(StockError::TooSlow { .. })),
        "{table:?}"
    );
    let arrays = stock.arrays(&guest.ram);
    assert!(
        matches!(arrays, Err(StockError::TooSlow { .. })),
        "{arrays:?}"
    );
}

#[test]
fn memory_can_be_reserved_where_the_kernel_has_both_halves_of_that() {
    let mut guest = Guest::new();
    assert!(!guest.attach().expect("a stock kernel").can_reserve);
    guest
        .symbols
        .push_str(&format!("{:x} T reserve_mem_find_by_name\n", TEXT + 0x300));
    assert!(guest.attach().expect("a stock kernel").can_reserve);
}

/// What is said of a kernel in which something is missing.
fn refusal(guest: &Guest) -> String {
    let stock = guest.attach();
    let found = stock.and_then(|stock| stock.tracing(&guest.ram, &["vfs_read"]));
    found.expect_err("something is missing").to_string()
}

#[test]
fn a_kernel_without_btf_is_told_as_that() {
    let said = refusal(&Guest::new().without("__start_BTF"));
    assert!(said.contains("neither the xftrace patch nor BTF"), "{said}");
    let broken = Guest::new();
    broken.poke(BTF, 0);
    let said = refusal(&broken);
    assert!(said.contains("BTF cannot be read"), "{said}");
}

#[test]
fn a_kernel_without_the_tracer_is_told_as_that() {
    let said = refusal(&Guest::new().without("ftrace_graph_hash"));
    let wanted = "built without CONFIG_FUNCTION_GRAPH_TRACER";
    assert!(said.contains(wanted), "{said}");
}

#[test]
fn a_ring_that_is_too_small_is_told_with_what_to_boot() {
    let small = Guest::new();
    small.poke(CPU, 2);
    let said = refusal(&small);
    assert!(said.contains("has 8 KiB for each CPU"), "{said}");
    assert!(said.contains("trace_buf_size="), "{said}");
    // One in memory reserved at boot stays as large as it is.
    small.poke(INSTANCE + 40, TRACER);
    let said = refusal(&small);
    assert!(said.contains("reserve_mem="), "{said}");
    assert!(!said.contains("trace_buf_size"), "{said}");
    assert!(!said.contains("buffer_size_kb"), "{said}");
}

#[test]
fn a_tracer_that_does_not_run_is_told_with_what_to_boot() {
    let nop = Guest::new();
    nop.poke(GLOBAL + 40, NOP);
    // A ring in memory reserved at boot was set up to be used.
    let said = refusal(&nop);
    assert!(said.contains("no tracer for it"), "{said}");
    assert!(
        said.contains("/instances/INSTANCE/current_tracer"),
        "{said}"
    );
    nop.poke(DATA, GLOBAL);
    let said = refusal(&nop);
    assert!(said.contains("current tracer is 'nop'"), "{said}");
    assert!(said.contains("ftrace=function_graph"), "{said}");
}

#[test]
fn symbols_that_are_missing_are_named() {
    let said = refusal(&Guest::new().without("jiffies_64"));
    assert!(said.contains("jiffies_64"), "{said}");
    let said = refusal(&Guest::new().without("init_task"));
    assert!(said.contains("cannot be told apart"), "{said}");
}

#[test]
fn another_boot_has_another_id_and_a_moved_ring_is_noticed() {
    let guest = Guest::new();
    let stock = guest.attach().expect("a stock kernel");
    let array = stock.tracing(&guest.ram, &NONE).expect("a ring");
    assert_eq!(
        stock.boot_id_now(&guest.ram).expect("a word"),
        stock.boot_id
    );
    assert!(stock.still_traces(&guest.ram, &array).expect("pointers"));
    guest.poke(GLOBAL + 32, MAPPED);
    assert!(!stock.still_traces(&guest.ram, &array).expect("pointers"));
    guest.poke(GLOBAL + 32, BUFFER);
    guest.poke(GLOBAL + 40, NOP);
    assert!(!stock.still_traces(&guest.ram, &array).expect("pointers"));
    guest.poke(DATA + 0x38, 1);
    assert_ne!(
        stock.boot_id_now(&guest.ram).expect("a word"),
        stock.boot_id
    );
}

#[test]
fn lists_in_circles_end() {
    let guest = Guest::new();
    let stock = guest.attach().expect("a stock kernel");
    // The instance leads to itself, and so does a function of the table.
    guest.poke(INSTANCE, INSTANCE);
    guest.poke(HASH + 0x60, HASH + 0x60);
    guest.poke(HASH, u64::MAX);
    let arrays = stock.arrays(&guest.ram).expect("a list");
    assert!(arrays.len() > 1 && arrays.iter().all(|array| array.name.is_some()));
    let functions = stock.functions(&guest.ram, &guest.symbols());
    let functions = functions.expect("a table");
    assert_eq!((functions.functions.len(), functions.whole), (2, false));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever words stand in its structures: an answer, and soon.
    #[test]
    fn hostile_words_are_borne(
        words in proptest::collection::vec(
            (0u64..0x140, prop_oneof![
                any::<u64>(),
                (0u64..0x140).prop_map(|word| DATA + 8 * word),
                Just(0),
            ]),
            1..40,
        ),
    ) {
        let guest = Guest::new();
        for (word, value) in words {
            guest.poke(DATA + 8 * word, value);
        }
        let begun = cpu_time();
        if let Ok(stock) = guest.attach() {
            let array = stock.tracing(&guest.ram, &NONE);
            let _ = stock.functions(&guest.ram, &guest.symbols());
            if let Ok(array) = array {
                let _ = stock.still_traces(&guest.ram, &array);
                let _ = array.record(&guest.ram, false);
            }
        }
        prop_assert!(cpu_time() - begun < std::time::Duration::from_secs(5));
    }
}
