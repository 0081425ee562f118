//! Layouts and lists that a hostile kernel makes up to cost the host time or memory.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use super::*;

/// Where lists of many modules begin, each so far from the one before.
const MANY: u64 = TEXT + 0x4_0000;
const STRIDE: u64 = 256;

/// What a hostile kernel says of `struct module` from 6.4 on.
#[derive(Clone, Copy, Debug)]
struct Claim {
    /// Where `mem` is, bytes.
    at: u32,
    /// How many pieces it has, and how large each is.
    count: u32,
    each: u32,
    /// Where a piece has its size.
    size_at: u32,
    text: u32,
    init: u32,
}

/// What Linux 6.12 says, as far as these tests have it.
const TRUE: Claim = Claim {
    at: 80,
    count: 7,
    each: 16,
    size_at: 8,
    text: 0,
    init: 4,
};

impl Claim {
    fn btf(self) -> Btf {
        let mut btf = Builder::new();
        let list = btf.words("list_head", 16, &[("next", 0, 8), ("prev", 8, 8)]);
        let word = btf.int("", 8);
        let fields = [("base", 0, 8), ("size", self.size_at, 4)];
        let memory = btf.words("module_memory", self.each, &fields);
        let index = btf.int("int", 4);
        let all = btf.add("", kind::ARRAY << 24, 0, &[memory, index, self.count]);
        let members = [
            ("list", list, 64),
            ("name", word, 192),
            ("mem", all, 8 * self.at),
        ];
        btf.compound(kind::STRUCT, "module", 144, &members);
        let (text, init) = (btf.name("MOD_TEXT"), btf.name("MOD_INIT_TEXT"));
        let info = kind::ENUM << 24 | 2;
        btf.add("mod_mem_type", info, 4, &[text, self.text, init, self.init]);
        btf.parse()
    }
}

/// A list of so many modules, as `layouts` has them.
fn list_of(many: u64) -> Guest {
    let guest = Guest::new();
    let node = |number: u64| MANY + STRIDE * number + LIST;
    guest.put(HEAD, node(0));
    for number in 0..many {
        let next = if number + 1 < many {
            node(number + 1)
        } else {
            HEAD
        };
        guest.put(node(number), next);
    }
    guest
}

#[test]
fn memory_in_more_pieces_than_any_module_has_is_refused() {
    let guest = Guest::new();
    let refused = |claim: Claim| {
        let error = guest.read(&claim.btf()).expect_err("a false layout");
        let text = error.to_string();
        assert!(
            text.contains("plausible struct module"),
            "{claim:?}: {text}"
        );
    };
    guest.read(&TRUE.btf()).expect("modules");
    // As many as a structure has room for.
    refused(Claim {
        count: 1 << 16,
        ..TRUE
    });
    refused(Claim { count: 17, ..TRUE });
    // Pieces that lie in each other, or hold not even what is read of them.
    refused(Claim {
        each: 1,
        count: 16,
        ..TRUE
    });
    refused(Claim { each: 0, ..TRUE });
    refused(Claim {
        size_at: 13,
        ..TRUE
    });
    // Code in a piece that there is not, and what is far from the list.
    refused(Claim { init: 7, ..TRUE });
    refused(Claim { at: 4096, ..TRUE });
}

#[test]
fn a_list_that_is_too_long_is_not_read_on() {
    let most = list_of(MAX_MODULES as u64);
    let found = most.read(&layouts()).expect("modules");
    assert_eq!(found.len(), MAX_MODULES);
    let error = list_of(MAX_MODULES as u64 + 1).read(&layouts());
    let error = error.expect_err("one too many").to_string();
    assert!(error.contains("has more than 512"), "{error}");
}

#[test]
fn of_each_module_one_piece_of_memory_is_copied() {
    let copies = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&copies);
    let mut guest = list_of(100);
    guest.ram = guest.ram.with_hook(move |_, gpa, _| {
        if gpa.0 >= MANY - MAP {
            counted.fetch_add(1, Ordering::Relaxed);
        }
    });
    assert_eq!(guest.read(&kinds()).expect("modules").len(), 100);
    assert_eq!(copies.load(Ordering::Relaxed), 100);
}

/// As memory is that the host has swapped out.
#[test]
fn slow_memory_is_not_waited_for() {
    const BUDGET: Duration = Duration::from_millis(20);
    let mut guest = list_of(MAX_MODULES as u64);
    guest.ram = guest.ram.with_hook(|_, gpa, _| {
        if gpa.0 >= MANY - MAP {
            std::thread::sleep(Duration::from_millis(2));
        }
    });
    let list = ModuleList::of(&guest.kernel, &guest.symbols, &layouts()).expect("a list");
    match list.read(&guest.ram, BUDGET) {
        Err(ModulesError::TooSlow { read, .. }) => assert!((1..=20).contains(&read), "{read}"),
        other => panic!("{other:?}"),
    }

    let mut guest = Guest::new();
    guest.piece(FIRST + PIECES, TEXT + 0x8000, 0x1000, 0x1000);
    guest.put(FIRST + KALLSYMS, TEXT + 0x4000);
    guest.put(TEXT + 0x4000, TEXT + 0x10_0000);
    guest.put(TEXT + 0x4008, 1 << 16);
    guest.ram = guest.ram.with_hook(|_, gpa, _| {
        if gpa.0 >= TEXT + 0x10_0000 - MAP {
            std::thread::sleep(Duration::from_millis(2));
        }
    });
    let list = ModuleList::of(&guest.kernel, &guest.symbols, &layouts()).expect("a list");
    let modules = list.read(&guest.ram, LONG).expect("modules");
    let first = modules.iter().find(|module| module.at == Gva(FIRST));
    let error = list.functions(&guest.ram, first.expect("the first"), BUDGET);
    let error = error.expect_err("slow");
    assert!(matches!(error, KallsymsError::Slow { .. }), "{error}");
    assert!(error.may_pass());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever the layout, and all the modules that are read.
    #[test]
    fn whatever_a_layout_claims_costs_little(
        at in prop_oneof![3 => Just(80u32), 1 => 0..5000u32],
        count in prop_oneof![1 => 0..20u32, 2 => 0..100u32, 1 => any::<u32>()],
        each in prop_oneof![3 => 0..40u32, 1 => any::<u32>()],
        size_at in prop_oneof![Just(8u32), 0..40u32],
        text in 0..20u32,
        init in prop_oneof![3 => 0..20u32, 1 => any::<u32>()],
        words in proptest::collection::vec(any::<u64>(), 16),
    ) {
        let guest = list_of(MAX_MODULES as u64);
        for number in 0..MAX_MODULES as u64 {
            for (place, word) in (0..).zip(&words) {
                // Small sizes too, so that there are pieces.
                guest.put(MANY + STRIDE * number + PIECES + 8 * place, word & 0xffff_00ff_ffff);
            }
        }
        let begun = cpu_time();
        let claim = Claim { at, count, each, size_at, text, init };
        let found = guest.read(&claim.btf());
        prop_assert!((cpu_time() - begun).as_secs() < 2);
        if let Ok(found) = found {
            for module in found {
                prop_assert!(module.memory.len() <= 16 && module.code.len() <= 2);
            }
        }
    }
}
