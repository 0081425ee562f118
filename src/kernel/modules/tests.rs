//! Lists of modules and their symbols as kernels have them, and as a hostile one
//! would.

use proptest::prelude::*;

use super::super::btf::build::Builder;
use super::super::btf::parse::kind;
use super::super::PageTables;
use super::*;
use crate::ram::{Gpa, Layout, VecRam};
use crate::test_time::cpu_time;

const MAP: u64 = 0xffff_ffff_8000_0000;
const TEXT: u64 = MAP + 0x20_0000;
const HEAD: u64 = TEXT + 0x1000;
const FIRST: u64 = TEXT + 0x2000;
const SECOND: u64 = TEXT + 0x3000;
/// Where `list` and `name` are in the `struct module` of these kernels.
const LIST: u64 = 8;
const NAME: u64 = 24;
const PIECES: u64 = 80;
/// Where `kallsyms` is in it.
const KALLSYMS: u64 = 136;
/// For what is bounded by its count.
const LONG: Duration = Duration::from_secs(10);

/// `struct module` up to 6.3.
fn layouts() -> Btf {
    let mut btf = Builder::new();
    let list = btf.words("list_head", 16, &[("next", 0, 8), ("prev", 8, 8)]);
    let word = btf.int("", 8);
    let layout = [("base", 0, 8), ("size", 8, 4), ("text_size", 12, 4)];
    let layout = btf.words("module_layout", 16, &layout);
    let members = [
        ("list", list, 64),
        ("name", word, 192),
        ("core_layout", layout, 640),
        ("init_layout", layout, 768),
        ("kallsyms", word, 8 * KALLSYMS as u32),
    ];
    btf.compound(kind::STRUCT, "module", 144, &members);
    let table = [("symtab", 0, 8), ("num_symtab", 8, 4), ("strtab", 16, 8)];
    btf.words("mod_kallsyms", 32, &table);
    btf.parse()
}

/// `struct module` from 6.4 on: text, data, and the text of the start.
fn kinds() -> Btf {
    let mut btf = Builder::new();
    let list = btf.words("list_head", 16, &[("next", 0, 8), ("prev", 8, 8)]);
    let word = btf.int("", 8);
    let memory = btf.words("module_memory", 16, &[("base", 0, 8), ("size", 8, 4)]);
    let index = btf.int("int", 4);
    let all = btf.add("", kind::ARRAY << 24, 0, &[memory, index, 3]);
    let members = [
        ("list", list, 64),
        ("name", word, 192),
        ("mem", all, 640),
        ("kallsyms", word, 8 * KALLSYMS as u32),
    ];
    btf.compound(kind::STRUCT, "module", 144, &members);
    // With what another kernel may have in front.
    let table = [("symtab", 8, 8), ("num_symtab", 24, 4), ("strtab", 16, 8)];
    btf.words("mod_kallsyms", 32, &table);
    let (text, init) = (btf.name("MOD_TEXT"), btf.name("MOD_INIT_TEXT"));
    let info = kind::ENUM << 24 | 2;
    btf.add("mod_mem_type", info, 4, &[text, 0, init, 2]);
    btf.parse()
}

struct Guest {
    ram: VecRam,
    kernel: Kernel,
    symbols: Symbols,
}

impl Guest {
    /// Two modules on the list.
    fn new() -> Self {
        let ram = VecRam::new(Layout::flat(4 << 20).expect("a layout"));
        ram.poke_u64(Gpa(0x1000 + 8 * 511), 0x2000 | 3);
        ram.poke_u64(Gpa(0x2000 + 8 * 510), 0x3000 | 3);
        for page in 0..2 {
            ram.poke_u64(Gpa(0x3000 + 8 * page), page << 21 | 0x83);
        }
        let root = Gpa(0x1000);
        let guest = Self {
            kernel: Kernel {
                phys_text: Gpa(TEXT - MAP),
                slide: 0,
                banner: "Linux version 6.1".to_owned(),
                levels: 4,
                tables: PageTables { root, levels: 4 },
                link_text: Gva(TEXT),
                span: 0x1_0000,
            },
            ram,
            symbols: Symbols::parse(
                format!(
                    "{TEXT:x} T _text\n{TEXT:x} T _stext\n{HEAD:x} T _etext\n{HEAD:x} D modules\n"
                )
                .into(),
            )
            .expect("symbols"),
        };
        guest.put(HEAD, SECOND + LIST);
        guest.put(SECOND + LIST, FIRST + LIST);
        guest.put(FIRST + LIST, HEAD);
        guest.ram.poke(Gpa(FIRST + NAME - MAP), b"ext4\0");
        guest.ram.poke(Gpa(SECOND + NAME - MAP), b"odd\x1b[2J\0");
        guest
    }

    fn put(&self, at: u64, value: u64) {
        self.ram.poke_u64(Gpa(at - MAP), value);
    }

    /// A word and two half words.
    fn piece(&self, at: u64, base: u64, size: u32, text: u32) {
        self.put(at, base);
        self.put(at + 8, u64::from(size) | u64::from(text) << 32);
    }

    fn read(&self, btf: &Btf) -> Result<Vec<Module>, ModulesError> {
        modules(&self.ram, &self.kernel, &self.symbols, btf)
    }
}

#[test]
fn modules_are_read_with_their_code_of_either_layout() {
    let base = 0xffff_ffff_c010_0000;
    let guest = Guest::new();
    guest.piece(FIRST + PIECES, base, 0x5000, 0x2000);
    guest.piece(FIRST + PIECES + 16, base + 0x9000, 0x1000, 0x1000);
    let found = guest.read(&layouts()).expect("modules");
    let names: Vec<&str> = found.iter().map(|module| module.name.as_str()).collect();
    assert_eq!(names, ["odd\\x1b[2J", "ext4"]);
    let at = |offset: u64| Gva(base + offset);
    assert_eq!(found[1].at, Gva(FIRST));
    assert_eq!(found[1].code, [at(0)..at(0x2000), at(0x9000)..at(0xa000)]);
    assert!(found[1].holds(at(0x4fff)) && !found[1].has(at(0x2000)));
    assert_eq!(found[0].code, []);

    guest.piece(FIRST + PIECES, base, 0x2000, 0);
    guest.piece(FIRST + PIECES + 16, base + 0x4000, 0x3000, 0);
    guest.piece(FIRST + PIECES + 32, base + 0x9000, 0x1000, 0);
    let found = guest.read(&kinds()).expect("modules");
    assert_eq!(found[1].code, [at(0)..at(0x2000), at(0x9000)..at(0xa000)]);
    assert!(found[1].holds(at(0x4000)) && !found[1].has(at(0x4000)));
}

#[test]
fn a_list_that_leads_nowhere_or_in_circles_is_an_error() {
    let guest = Guest::new();
    guest.put(FIRST + LIST, SECOND + LIST);
    let error = guest.read(&layouts()).expect_err("a circle");
    assert!(matches!(error, ModulesError::TooLong), "{error}");
    for nowhere in [0, 8, FIRST + LIST + 1, u64::MAX, 0xffff_8880_0000_0000] {
        guest.put(FIRST + LIST, nowhere);
        let error = guest.read(&layouts()).expect_err("nowhere");
        assert!(
            matches!(error, ModulesError::Lost(_)),
            "{nowhere:#x}: {error}"
        );
    }
}

mod hostile;
mod symbols;

proptest! {
    #[test]
    fn whatever_is_in_the_list_takes_little_time(
        words in proptest::collection::vec(
            prop_oneof![any::<u64>(), Just(HEAD), Just(FIRST + LIST), Just(SECOND + LIST)],
            64,
        ),
        newer in any::<bool>(),
    ) {
        let guest = Guest::new();
        for (number, word) in (0u64..).zip(&words) {
            let module = if number % 2 == 0 { FIRST } else { SECOND };
            guest.put(module + 8 * (number / 2), *word);
        }
        let btf = if newer { kinds() } else { layouts() };
        let begun = cpu_time();
        let _ = guest.read(&btf);
        prop_assert!((cpu_time() - begun).as_secs() < 2);
    }
}
