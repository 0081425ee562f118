//! The symbols of modules.

use std::sync::atomic::{AtomicU64, Ordering};

use super::*;

/// The code of the first module, in the kernel's mapping for the tests' sake.
const CODE: u64 = TEXT + 0x8000;
const CODE_SIZE: u64 = 0x1000;
const TABLE: u64 = TEXT + 0x4000;
const SYMBOLS: u64 = TEXT + 0x10_0000;
const STRINGS: u64 = TEXT + 0x14_0000;
/// Behind which nothing is mapped.
const END: u64 = MAP + (4 << 20);

const FUNC: u8 = 0x12;
const OBJECT: u8 = 0x11;

impl Guest {
    /// The first module has code, and a table with these symbols: kind, section,
    /// address, and where the name is.
    fn with_symbols(symbols: &[(u8, u16, u64, u32)], strings: &[u8]) -> Self {
        let guest = Self::new();
        guest.piece(FIRST + PIECES, CODE, CODE_SIZE as u32, CODE_SIZE as u32);
        guest.table(SYMBOLS, symbols.len() as u64, STRINGS);
        for (number, &(info, section, at, name)) in (0u64..).zip(symbols) {
            let symbol = SYMBOLS + 24 * number;
            let rest = u64::from(info) << 32 | u64::from(section) << 48;
            guest.put(symbol, u64::from(name) | rest);
            guest.put(symbol + 8, at);
        }
        guest.ram.poke(Gpa(STRINGS - MAP), strings);
        guest
    }

    fn table(&self, symbols: u64, count: u64, names: u64) {
        self.put(FIRST + KALLSYMS, TABLE);
        self.put(TABLE, symbols);
        self.put(TABLE + 8, count);
        self.put(TABLE + 16, names);
    }

    /// What the first module says its functions are called.
    fn functions(&self) -> Result<ModuleFunctions, KallsymsError> {
        self.functions_by(&layouts())
    }

    fn functions_by(&self, btf: &Btf) -> Result<ModuleFunctions, KallsymsError> {
        let list = ModuleList::of(&self.kernel, &self.symbols, btf).expect("a list");
        let modules = list.read(&self.ram, LONG).expect("modules");
        let first = modules.iter().find(|module| module.at == Gva(FIRST));
        list.functions(&self.ram, first.expect("the first"), LONG)
    }
}

/// The names with how far in the code they are.
fn told(found: &ModuleFunctions) -> Vec<(u64, &str)> {
    let functions = found.functions.iter();
    functions
        .map(|(at, name)| (at.0.wrapping_sub(CODE), name.as_str()))
        .collect()
}

#[test]
fn functions_of_a_module_are_read_by_either_layout() {
    let symbols = [
        (0, 0, 0, 0),
        (FUNC, 1, CODE + 0x40, 1),
        (FUNC, 1, CODE, 6),
        // Not a function, not defined here, and another name of what is known.
        (OBJECT, 1, CODE + 0x80, 6),
        (FUNC, 0, CODE + 0x90, 6),
        (FUNC, 1, CODE + 0x40, 6),
    ];
    let guest = Guest::with_symbols(&symbols, b"\0read\0write.cold\0");
    let found = guest.functions().expect("functions");
    assert_eq!(told(&found), [(0, "write.cold"), (0x40, "read")]);
    assert_eq!(found.refused, 0);

    // Of the other layout, whose fields lie elsewhere.
    guest.put(TABLE, 0);
    guest.put(TABLE + 8, SYMBOLS);
    guest.put(TABLE + 16, STRINGS);
    guest.put(TABLE + 24, 6);
    let found = guest.functions_by(&kinds()).expect("functions");
    assert_eq!(told(&found), [(0, "write.cold"), (0x40, "read")]);
}

#[test]
fn nothing_outside_its_own_code_is_named() {
    let elsewhere = [
        CODE - 1,
        CODE + CODE_SIZE,
        TEXT,
        0,
        u64::MAX,
        0xffff_8880_0000_1000,
    ];
    let symbols = elsewhere.map(|at| (FUNC, 1, at, 1));
    let guest = Guest::with_symbols(&symbols, b"\0vfs_read\0");
    let found = guest.functions().expect("functions");
    assert_eq!((told(&found), found.refused), (vec![], 6));
}

#[test]
fn names_that_are_none_are_refused() {
    let mut strings = b"\0ok\0a b\0x\x1b[2J\0[ext4]\0\xff\0a;b\0".to_vec();
    let offsets: Vec<u32> = (0..strings.len() as u32)
        .filter(|&at| at == 0 || strings[at as usize - 1] == 0)
        .collect();
    let long = strings.len() as u32;
    strings.extend([b'l'; 511]);
    strings.push(0);
    strings.extend([b'm'; 600]);
    let mut symbols: Vec<_> = (0..)
        .zip(offsets)
        .map(|(number, name)| (FUNC, 1, CODE + number, name))
        .collect();
    symbols.push((FUNC, 1, CODE + 0x100, long));
    symbols.push((FUNC, 1, CODE + 0x200, long + 512));
    let guest = Guest::with_symbols(&symbols, &strings);
    let found = guest.functions().expect("functions");
    let longest = "l".repeat(511);
    assert_eq!(told(&found), [(1, "ok"), (0x100, longest.as_str())]);
    assert_eq!(found.refused, symbols.len() as u64 - 2);
}

#[test]
fn a_name_that_ends_where_memory_ends_is_read_and_one_without_an_end_is_not() {
    let symbols = [(FUNC, 1, CODE, 0), (FUNC, 1, CODE + 8, 8)];
    let guest = Guest::with_symbols(&symbols, b"");
    guest.table(SYMBOLS, 2, END - 12);
    guest.ram.poke(Gpa(END - 12 - MAP), b"one\0....open");
    let found = guest.functions().expect("functions");
    assert_eq!((told(&found), found.refused), (vec![(0, "one")], 1));
}

#[test]
fn tables_that_are_made_up_are_refused_at_once() {
    let guest = Guest::with_symbols(&[(FUNC, 1, CODE, 0)], b"f\0");
    let given = |symbols, count, names| {
        guest.table(symbols, count, names);
        let begun = cpu_time();
        let given = guest.functions();
        assert!((cpu_time() - begun).as_secs() < 2);
        given
    };
    for count in [(1 << 16) + 1, u64::from(u32::MAX)] {
        let error = given(SYMBOLS, count, STRINGS).expect_err("too many");
        assert!(matches!(error, KallsymsError::TooMany { .. }), "{error}");
        assert!(!error.may_pass());
    }
    // Into itself, past the end of memory, and nowhere.
    assert!(given(TABLE, 1 << 16, TABLE).is_ok());
    given(END - 48, 3, STRINGS).expect_err("past the end");
    for nowhere in [0, 1, END - 24, u64::MAX - 24, 0x8000_0000_0000_0000] {
        let error = given(nowhere, 2, STRINGS).expect_err("nowhere");
        assert!(matches!(error, KallsymsError::Lost { .. }), "{error}");
        let found = given(SYMBOLS, 1, nowhere | 1 << 63).expect("nameless");
        assert_eq!(told(&found), []);
    }
    guest.put(FIRST + KALLSYMS, 0);
    let error = guest.functions().expect_err("no table");
    assert!(error.may_pass() && matches!(error, KallsymsError::None(_)));
    guest.put(FIRST + KALLSYMS, END);
    assert!(matches!(guest.functions(), Err(KallsymsError::None(_))));

    // Names that are far apart.
    let symbols = [(FUNC, 1, CODE, 0), (FUNC, 1, CODE + 8, u32::MAX)];
    let guest = Guest::with_symbols(&symbols, b"f\0");
    let error = guest.functions().expect_err("spread");
    assert!(matches!(error, KallsymsError::Spread(_)), "{error}");
}

#[test]
fn what_is_kept_of_a_module_is_bounded() {
    // As many functions as there may be symbols, all with one long name.
    let guest = Guest::with_symbols(&[], &[b'n'; 500]);
    guest.piece(FIRST + PIECES, CODE, 1 << 20, 1 << 20);
    let count = 1 << 16;
    let symbols = MAP + 0x1_0000;
    guest.table(symbols, count, STRINGS);
    for number in 0..count {
        let symbol = symbols + 24 * number;
        guest.put(symbol, u64::from(FUNC) << 32 | 1 << 48);
        guest.put(symbol + 8, CODE + number);
    }
    let found = guest.functions().expect("functions");
    let kept: usize = found.functions.iter().map(|(_, name)| name.len()).sum();
    assert!((2 << 20) - 500 < kept && kept <= 2 << 20, "{kept}");
    assert_eq!(found.functions.len() as u64 + found.refused, count);
}

#[test]
fn a_table_that_changes_under_the_copy_is_not_taken() {
    static NAMES: AtomicU64 = AtomicU64::new(0);
    let symbols = [(FUNC, 1, CODE, 0)];
    let mut guest = Guest::with_symbols(&symbols, b"old\0new\0");
    guest.functions().expect("functions");
    guest.ram = guest.ram.with_hook(|ram, gpa, _| {
        // While its names are copied, it is exchanged.
        if gpa.0 >= STRINGS - MAP && NAMES.fetch_add(1, Ordering::Relaxed) == 0 {
            ram.poke_u64(Gpa(TABLE + 16 - MAP), STRINGS + 4);
        }
    });
    let error = guest.functions().expect_err("changed");
    assert!(matches!(error, KallsymsError::Changed(_)), "{error}");
    assert!(error.may_pass());
    assert_eq!(told(&guest.functions().expect("again")), [(0, "new")]);
}

proptest! {
    #[test]
    fn whatever_is_in_a_table_names_nothing_but_the_modules_own(
        words in proptest::collection::vec(
            prop_oneof![
                any::<u64>(),
                (0..CODE_SIZE).prop_map(|at| CODE + at),
                any::<u32>().prop_map(|name| u64::from(name % 64) | u64::from(FUNC) << 32 | 1 << 48),
                Just(TABLE),
                Just(SYMBOLS),
            ],
            96,
        ),
        count in prop_oneof![0..64u64, any::<u32>().prop_map(u64::from)],
        symbols in prop_oneof![Just(SYMBOLS), Just(TABLE), any::<u64>()],
        names in prop_oneof![Just(STRINGS), Just(SYMBOLS), Just(END - 8), any::<u64>()],
        strings in proptest::collection::vec(prop_oneof![any::<u8>(), Just(0), b'a'..=b'z'], 128),
    ) {
        let guest = Guest::with_symbols(&[], &strings);
        for (number, word) in (0u64..).zip(&words) {
            guest.put(SYMBOLS + 8 * number, *word);
        }
        guest.table(symbols, count, names);
        let begun = cpu_time();
        let found = guest.functions();
        prop_assert!((cpu_time() - begun).as_secs() < 2);
        if let Ok(found) = found {
            let mut last = None;
            for (at, name) in &found.functions {
                prop_assert!((CODE..CODE + CODE_SIZE).contains(&at.0));
                prop_assert!(is_name(name), "{name:?}");
                prop_assert!(last < Some(*at));
                last = Some(*at);
            }
        }
    }
}
