//! README.md promises what tests/lab/kernels.toml has, of which each row is an
//! end-to-end test.

use std::path::Path;

/// Between these stands the table, and nothing else.
const BEGIN: &str = "<!-- from tests/lab/kernels.toml -->\n";
const END: &str = "<!-- end -->\n";

#[test]
fn the_readmes_table_is_that_of_the_tests() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md");
    let text = std::fs::read_to_string(&path).expect("the README");
    let (before, rest) = text.split_once(BEGIN).expect("where the table begins");
    let (table, after) = rest.split_once(END).expect("where the table ends");
    let rows = xftrace_lab::rows().expect("the table");
    let wanted = xftrace_lab::markdown(&rows);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        let text = [before, BEGIN, &wanted, END, after].concat();
        std::fs::write(&path, text).expect("the README can be written");
        return;
    }
    for (is, should) in table.lines().zip(wanted.lines()) {
        assert_eq!(is, should, "UPDATE_GOLDEN=1 writes it anew");
    }
    assert_eq!(table, wanted, "UPDATE_GOLDEN=1 writes it anew");
}
