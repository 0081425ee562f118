//! A small kernel, and what may and may not become of its text.

use super::*;

const TEXT: u64 = 0xffff_ffff_8100_0000;
const DATA: u64 = 0xffff_ffff_8200_0000;
const SLIDE: u64 = 0x0a40_0000;
/// Where things are in the text.
const FTRACE: usize = 0x00;
const STATIC: usize = 0x10;
const BRANCH: usize = 0x20;
const OTHER: usize = 0x30;
const RETURNS: usize = 0x40;
const PLAIN: usize = 0x50;
const LOCK: usize = 0x60;
const CALLEE: usize = 0x70;
const THUNK: usize = 0x80;
const ZERO: usize = 0x88;
/// Thunks for branches by `rbx` and `r11`, and another one for `rbx`.
const INDIRECT: usize = 0x94;
const UPPER: usize = 0x98;
const ITS: usize = 0xa0;
const INDIRECT_CALL: usize = 0xb0;
const UPPER_CALL: usize = 0xb8;
const UPPER_JUMP: usize = 0xc0;
const END: usize = 0xd0;
/// Code that is none of the text.
const MADE: usize = 0x2000_0000;

fn symbols() -> Symbols {
    let mut map = String::new();
    for (at, name) in [
        (TEXT, "_text"),
        (TEXT, "_stext"),
        (TEXT + CALLEE as u64, "callee"),
        (TEXT + THUNK as u64, "__x86_return_thunk"),
        (TEXT + ZERO as u64, "__static_call_return0"),
        (TEXT + INDIRECT as u64, "__x86_indirect_thunk_rbx"),
        (TEXT + UPPER as u64, "__x86_indirect_thunk_r11"),
        (TEXT + ITS as u64, "__x86_indirect_its_thunk_rbx"),
        (TEXT + END as u64, "_etext"),
        (DATA + 28, "__SCK__lent"),
        (DATA, "__start_mcount_loc"),
        (DATA + 8, "__stop_mcount_loc"),
        (DATA + 8, "__start___jump_table"),
        (DATA + 24, "__stop___jump_table"),
        (DATA + 24, "__start_static_call_sites"),
        (DATA + 32, "__stop_static_call_sites"),
        (DATA + 0x1000, "_end"),
    ] {
        map.push_str(&format!("{at:016x} T {name}\n"));
    }
    Symbols::parse(map.into_bytes()).expect("symbols")
}

fn branch(opcode: u8, from: usize, to: usize) -> Vec<u8> {
    let offset = to as i32 - from as i32 - 5;
    [vec![opcode], offset.to_le_bytes().to_vec()].concat()
}

/// The same, made longer by a prefix.
fn prefixed(opcode: u8, from: usize, to: usize) -> Vec<u8> {
    [vec![0x2e], branch(opcode, from + 1, to)].concat()
}

fn put(text: &mut [u8], at: usize, code: &[u8]) {
    text[at..at + code.len()].copy_from_slice(code);
}

fn offset(from: u64, to: u64) -> [u8; 4] {
    (to.wrapping_sub(from) as i32).to_le_bytes()
}

fn text() -> Vec<u8> {
    let mut text = vec![0x55; END];
    put(&mut text, FTRACE, &branch(0xe8, FTRACE, CALLEE));
    put(&mut text, STATIC, &branch(0xe8, STATIC, CALLEE));
    put(&mut text, BRANCH, &[0x0f, 0x1f, 0x44, 0, 0]);
    put(&mut text, OTHER, &[0x90; 6]);
    put(&mut text, RETURNS, &branch(0xe9, RETURNS, THUNK));
    put(
        &mut text,
        PLAIN,
        &[0x48, 0xc7, 0xc0, 0x00, 0x10, 0x00, 0x81],
    );
    put(&mut text, LOCK, &[0xf0, 0xff, 0x00]);
    put(
        &mut text,
        INDIRECT_CALL,
        &branch(0xe8, INDIRECT_CALL, INDIRECT),
    );
    put(&mut text, UPPER_CALL, &prefixed(0xe8, UPPER_CALL, UPPER));
    put(&mut text, UPPER_JUMP, &prefixed(0xe9, UPPER_JUMP, UPPER));
    text
}

fn image() -> Image {
    let replacements = DATA + 0x300;
    // A call, which leads elsewhere from another place.
    let replacement = branch(
        0xe8,
        0,
        (TEXT as usize + CALLEE).wrapping_sub(replacements as usize),
    );
    let at = DATA + 0x200;
    let other = [
        offset(at, TEXT + OTHER as u64).to_vec(),
        offset(at + 4, replacements).to_vec(),
        vec![0, 0, 6, 5],
    ]
    .concat();
    let at = |place: u64| [offset(DATA + 0x400, TEXT + place).to_vec()].concat();
    let indirect = [INDIRECT_CALL, UPPER_CALL, UPPER_JUMP].into_iter();
    let indirect = indirect.zip((DATA + 0x600..).step_by(4));
    let indirect = indirect.flat_map(|(site, at)| offset(at, TEXT + site as u64));
    let indirect: Vec<u8> = indirect.collect();
    let mut lists = (TEXT + FTRACE as u64).to_le_bytes().to_vec();
    lists.extend(offset(DATA + 8, TEXT + BRANCH as u64));
    lists.extend(offset(DATA + 12, TEXT + PLAIN as u64));
    lists.extend([0; 8]);
    lists.extend(offset(DATA + 24, TEXT + STATIC as u64));
    lists.extend([0; 4]);
    Image::made_of(
        &[
            (".text", TEXT, &text()),
            (".data", DATA, &lists),
            (".altinstructions", DATA + 0x200, &other),
            (".altinstr_replacement", replacements, &replacement),
            (".return_sites", DATA + 0x400, &at(RETURNS as u64)),
            (".retpoline_sites", DATA + 0x600, &indirect),
            (
                ".smp_locks",
                DATA + 0x500,
                &offset(DATA + 0x500, TEXT + LOCK as u64),
            ),
        ],
        &[(TEXT + PLAIN as u64 + 3, false)],
    )
}

/// The text as it is in memory before it was patched.
fn loaded() -> Vec<u8> {
    let mut text = text();
    put(
        &mut text,
        PLAIN + 3,
        &(0x8100_1000 + SLIDE as u32).to_le_bytes(),
    );
    text
}

/// A guest whose variables are these, with a thunk for `r11` and code that a static call
/// of `lent` may lead to.
struct Variables<F>(F);

impl<F: Fn(Gva) -> Option<u64>> Guest for Variables<F> {
    fn variable(&self, at: Gva, _: usize) -> Option<u64> {
        (self.0)(at)
    }

    fn is_thunk(&self, at: Gva, register: u8) -> bool {
        (at, register) == (Gva(TEXT + MADE as u64), 11)
    }

    fn may_lead(&self, key: &str, to: Gva) -> bool {
        (key, to) == ("__SCK__lent", Gva(TEXT + MADE as u64))
    }
}

fn check(memory: &[u8]) -> TextReport {
    let (image, symbols) = (image(), symbols());
    let sites = Sites::of(&image, &symbols).expect("its sites");
    compare(
        &image,
        &sites,
        &symbols,
        SLIDE,
        memory,
        &Variables(|_| None),
    )
    .expect("a comparison")
}

#[test]
fn what_a_kernel_makes_of_itself_is_clean() {
    assert_eq!(check(&loaded()).changes, []);
    let nop5 = [0x0f, 0x1f, 0x44, 0, 0];
    for (at, code) in [
        (FTRACE, nop5.to_vec()),
        (STATIC, nop5.to_vec()),
        (STATIC, vec![0x2e, 0x2e, 0x2e, 0x31, 0xc0]),
        (STATIC, branch(0xe8, STATIC, THUNK)),
        (BRANCH, branch(0xe9, BRANCH, PLAIN)),
        (OTHER, vec![0x66, 0x0f, 0x1f, 0x44, 0, 0]),
        (OTHER, [branch(0xe8, OTHER, CALLEE), vec![0x90]].concat()),
        (RETURNS, vec![0xc3, 0xcc, 0xcc, 0xcc, 0xcc]),
        (LOCK, vec![0x3e]),
        (INDIRECT_CALL, vec![0xff, 0xd3, 0x0f, 0x1f, 0x00]),
        (INDIRECT_CALL, branch(0xe8, INDIRECT_CALL, ITS)),
        (UPPER_CALL, vec![0x41, 0xff, 0xd3, 0x0f, 0x1f, 0x00]),
        (UPPER_CALL, vec![0x0f, 0xae, 0xe8, 0x41, 0xff, 0xd3]),
        (UPPER_CALL, prefixed(0xe8, UPPER_CALL, MADE)),
        (UPPER_JUMP, vec![0x41, 0xff, 0xe3, 0xcc, 0x66, 0x90]),
        (UPPER_JUMP, prefixed(0xe9, UPPER_JUMP, MADE)),
    ] {
        let mut memory = loaded();
        put(&mut memory, at, &code);
        let report = check(&memory);
        assert_eq!(report.changes, [], "{at:#x} {code:02x?}");
        assert!(report.trampolines.is_empty());
    }
}

#[test]
fn a_tracers_own_trampoline_is_told_of() {
    let mut memory = loaded();
    put(&mut memory, FTRACE, &branch(0xe8, FTRACE, 0x1000_0000));
    let report = check(&memory);
    assert_eq!(report.changes, []);
    let expected = BTreeMap::from([(TEXT + 0x1000_0000, (1, TEXT))]);
    assert_eq!(report.trampolines, expected);
}

#[test]
fn what_a_hook_makes_of_it_is_found() {
    for (at, code) in [
        // Elsewhere than at a function, in none of its own forms, or not at a
        // place that is patched at all.
        (STATIC, branch(0xe8, STATIC, 0x1000_0000)),
        (STATIC, branch(0xe8, STATIC, CALLEE + 1)),
        (BRANCH, branch(0xe9, BRANCH, CALLEE)),
        (BRANCH, branch(0xe8, BRANCH, PLAIN)),
        (OTHER, [branch(0xe8, OTHER, THUNK), vec![0x90]].concat()),
        (RETURNS, branch(0xe9, RETURNS, CALLEE)),
        (PLAIN, branch(0xe9, PLAIN, CALLEE)),
        (FTRACE, branch(0xe9, FTRACE, CALLEE)),
        (CALLEE, vec![0xcc]),
        (LOCK, vec![0x90]),
        // By another register, elsewhere, or another kind of branch.
        (INDIRECT_CALL, vec![0xff, 0xd0, 0x0f, 0x1f, 0x00]),
        (INDIRECT_CALL, branch(0xe8, INDIRECT_CALL, MADE)),
        (INDIRECT_CALL, branch(0xe8, INDIRECT_CALL, CALLEE)),
        (INDIRECT_CALL, branch(0xe9, INDIRECT_CALL, ITS)),
        (UPPER_CALL, prefixed(0xe8, UPPER_CALL, ITS)),
        (UPPER_CALL, prefixed(0xe8, UPPER_CALL, MADE + 1)),
        (UPPER_CALL, prefixed(0xe9, UPPER_CALL, MADE)),
        (UPPER_CALL, vec![0xff, 0xd3, 0x0f, 0x1f, 0x40, 0x00]),
    ] {
        let mut memory = loaded();
        put(&mut memory, at, &code);
        let report = check(&memory);
        assert_eq!(report.changes.len(), 1, "{at:#x} {code:02x?}");
        let change = &report.changes[0];
        let range = change.at.0..change.at.0 + change.memory.len() as u64;
        assert!(range.start <= TEXT + (at + code.len()) as u64 && range.end > TEXT + at as u64);
        assert_ne!(change.built, change.memory);
    }
}

#[test]
fn a_static_call_leads_to_what_its_key_says() {
    let (image, symbols) = (image(), symbols());
    let sites = Sites::of(&image, &symbols).expect("its sites");
    let nop5 = [0x0f, 0x1f, 0x44, 0, 0];
    let zero = [0x2e, 0x2e, 0x2e, 0x31, 0xc0];
    let thunk = branch(0xe8, STATIC, THUNK);
    let (lent, elsewhere) = (branch(0xe8, STATIC, MADE), branch(0xe8, STATIC, MADE + 1));
    let runtime = |at: usize| TEXT + SLIDE + at as u64;
    for (key, code, is_clean) in [
        (runtime(THUNK), &thunk[..], true),
        (runtime(CALLEE), &thunk, false),
        (0, &nop5, true),
        (runtime(THUNK), &nop5, false),
        (runtime(CALLEE), &zero, false),
        (runtime(ZERO), &zero, true),
        // One that the kernel lets others set.
        (runtime(MADE), &lent, true),
        (runtime(CALLEE), &lent, false),
        (runtime(MADE + 1), &elsewhere, false),
    ] {
        let mut memory = loaded();
        put(&mut memory, STATIC, code);
        let variable = Variables(|at| (at == Gva(DATA + 28)).then_some(key));
        let report = compare(&image, &sites, &symbols, SLIDE, &memory, &variable);
        let changes = report.expect("a comparison").changes;
        assert_eq!(changes.is_empty(), is_clean, "{key:#x} {code:02x?}");
    }
}

#[test]
fn a_flipped_byte_is_found_wherever_it_is() {
    for at in 0..END {
        for bit in 0..8 {
            let mut memory = loaded();
            memory[at] ^= 1 << bit;
            let report = check(&memory);
            // Where Ftrace's call leads is told of, not judged.
            let found = report.changes.len() + report.trampolines.len();
            assert_eq!(found, 1, "bit {bit} of {at:#x}");
        }
    }
}

#[test]
fn what_is_told_of_has_a_limit() {
    let memory: Vec<u8> = loaded().iter().map(|byte| !byte).collect();
    let report = check(&memory);
    assert!(!report.changes.is_empty() && report.changes.len() <= MAX_CHANGES);
    let (image, symbols) = (image(), symbols());
    let sites = Sites::of(&image, &symbols).expect("its sites");
    assert!(compare(
        &image,
        &sites,
        &symbols,
        0,
        &[0; END + 1],
        &Variables(|_| None)
    )
    .is_err());
}
