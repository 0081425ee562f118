//! Names by address and time.

use super::super::{Listed, ModulesReader};
use super::*;
use crate::session::{MODULES_FILE, MODULE_SYMBOLS_FILE};

const SECOND: u64 = UNSURE_NS;
const BASE: u64 = 0xffff_ffff_c010_0000;

fn listed(load: u32, name: &str, page: u64) -> Listed {
    let from = BASE + 0x1000 * page;
    Listed {
        name: name.to_owned(),
        code: vec![(from, from + 0x1000)],
        load,
    }
}

fn look(second: u64, modules: &[Listed]) -> ModuleLook {
    ModuleLook {
        boot: 1,
        since: second * SECOND,
        unseen_since: None,
        modules: Some(modules.to_vec()),
    }
}

fn symbols(load: u32, functions: &[(u64, &str)]) -> ModuleSymbols {
    let functions = functions.iter();
    ModuleSymbols {
        load,
        name: String::new(),
        functions: functions
            .map(|&(at, name)| (BASE + at, name.to_owned()))
            .collect(),
        refused: 0,
        unread: None,
    }
}

/// A line of either file.
fn line(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("JSON") + "\n"
}

fn told(names: &ModuleNames, second: u64, at: u64) -> Option<String> {
    let told = names.told(1, Gva(BASE + at), second * SECOND);
    told.map(|told| told.to_string())
}

#[test]
fn a_name_is_that_of_the_module_which_was_there_at_the_time() {
    let names = ModuleNames::default();
    names.list(&look(10, &[listed(1, "old", 0), listed(2, "stays", 1)]));
    names.list(&look(20, &[listed(2, "stays", 1)]));
    names.list(&look(30, &[listed(3, "new", 0), listed(2, "stays", 1)]));
    names.symbols(symbols(1, &[(0, "enter"), (0x80, "leave")]));
    names.symbols(symbols(3, &[(0, "other")]));
    for (second, at, name) in [
        (8, 0, None),
        // A look comes some time after what it shows.
        (9, 0, Some("enter+0x0 [old?]")),
        (15, 0, Some("enter+0x0 [old?]")),
        (15, 0x7f, Some("enter+0x7f [old?]")),
        (15, 0x90, Some("leave+0x10 [old?]")),
        (15, 0xfff, Some("leave+0xf7f [old?]")),
        (20, 0, Some("enter+0x0 [old?]")),
        (22, 0, None),
        (31, 0x90, Some("other+0x90 [new?]")),
        (u64::MAX / SECOND, 0, Some("other+0x0 [new?]")),
        // Without symbols there is the module.
        (15, 0x1000, Some("[stays?]")),
        (15, 0x2000, None),
    ] {
        let name = name.map(str::to_owned);
        assert_eq!(told(&names, second, at), name, "{at:#x} after {second} s");
    }
    assert_eq!(names.told(2, Gva(BASE), 15 * SECOND), None);
}

#[test]
fn where_lists_or_modules_differ_nothing_is_told() {
    let names = ModuleNames::default();
    names.list(&look(10, &[listed(1, "one", 0)]));
    names.list(&look(11, &[listed(2, "two", 0)]));
    names.symbols(symbols(1, &[(0, "f")]));
    names.symbols(symbols(2, &[(0, "f")]));
    assert_eq!(told(&names, 10, 0), None);
    assert_eq!(told(&names, 13, 0).as_deref(), Some("f+0x0 [two?]"));

    // The same module again, with other functions; and with the same, of which the
    // one's symbols were never read.
    names.list(&look(20, &[listed(3, "two", 0)]));
    names.symbols(symbols(3, &[(0, "g"), (8, "h")]));
    assert_eq!(told(&names, 20, 0), None);
    names.list(&look(30, &[listed(4, "two", 0)]));
    names.symbols(symbols(4, &[]));
    assert_eq!(told(&names, 30, 8).as_deref(), Some("h+0x0 [two?]"));

    // Two that both have it, of one list.
    names.list(&look(
        40,
        &[listed(5, "a", 0), listed(6, "b", 0), listed(7, "c", 1)],
    ));
    assert_eq!(told(&names, 42, 0x10), None);
    assert_eq!(told(&names, 42, 0x1010).as_deref(), Some("[c?]"));
}

#[test]
fn a_module_names_nothing_but_its_own_code_whatever_the_file_says() {
    let names = ModuleNames::default();
    names.list(&look(10, &[listed(1, "evil", 1), listed(2, "good", 2)]));
    let lies = [(0x10, "below"), (0x2010, "stolen"), (0x1800, "own")];
    names.symbols(symbols(1, &lies));
    // What it said first stands.
    names.symbols(symbols(1, &[(0x1000, "later")]));
    assert_eq!(told(&names, 15, 0x10), None);
    assert_eq!(told(&names, 15, 0x1010).as_deref(), Some("[evil?]"));
    assert_eq!(told(&names, 15, 0x1801).as_deref(), Some("own+0x1 [evil?]"));
    assert_eq!(told(&names, 15, 0x2010).as_deref(), Some("[good?]"));
}

#[test]
fn names_that_are_none_and_ranges_that_are_made_up_tell_nothing() {
    let names = ModuleNames::default();
    let mut odd = listed(3, "odd", 0);
    odd.code = vec![(u64::MAX, 0), (5, 5), (0, u64::MAX)];
    let modules = [
        listed(1, "a] vfs_read [b", 1),
        listed(0, "unnumbered", 2),
        listed(2, "", 3),
    ];
    names.list(&look(10, &modules));
    names.symbols(symbols(1, &[(0x1000, "f")]));
    for page in 1..4 {
        assert_eq!(told(&names, 15, 0x1000 * page), None);
    }
    names.list(&look(20, &[odd, listed(4, "x", 1)]));
    names.symbols(symbols(3, &[(0, "a b"), (1, ""), (2, "f\n")]));
    assert_eq!(told(&names, 25, 0).as_deref(), None);

    // More lists than the helper can have made.
    let names = ModuleNames::default();
    for number in 1..=1000 {
        names.list(&look(10, &[listed(number, "fast", 0)]));
        let expected = (number as usize <= AROUND).then(|| "[fast?]".to_owned());
        assert_eq!(told(&names, 10, 0), expected, "{number} lists");
    }
    assert_eq!(told(&names, 12, 0).as_deref(), Some("[fast?]"));
}

#[test]
fn a_session_that_grows_is_read_on_and_one_without_symbols_is_read() {
    let dir = tempfile::tempdir().expect("a directory");
    let write = |name: &str, text: &str| {
        let path = dir.path().join(name);
        let before = std::fs::read_to_string(&path).unwrap_or_default();
        std::fs::write(&path, before + text).expect("written");
    };
    let names = ModuleNames::default();
    let mut reader = ModulesReader::new(dir.path());
    reader.read_on(&names).expect("nothing there");
    // As sessions had it before there were symbols.
    write(
        MODULES_FILE,
        "{\"boot\":1,\"since\":1,\"modules\":[{\"name\":\"old\",\"code\":[[1,2]]}]}\n",
    );
    reader.read_on(&names).expect("a list");
    write(MODULES_FILE, &line(&look(10, &[listed(1, "m", 0)])));
    let whole = line(&symbols(1, &[(0, "f")]));
    let (begun, rest) = whole.split_at(20);
    write(MODULE_SYMBOLS_FILE, begun);
    reader.read_on(&names).expect("half a line");
    assert_eq!(told(&names, 15, 0).as_deref(), Some("[m?]"));
    write(MODULE_SYMBOLS_FILE, rest);
    reader.read_on(&names).expect("the rest");
    assert_eq!(told(&names, 15, 0).as_deref(), Some("f+0x0 [m?]"));
    write(MODULE_SYMBOLS_FILE, "{}\n");
    assert!(reader.read_on(&names).is_err());
}
