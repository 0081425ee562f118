//! One test for each row of tests/lab/kernels.toml, by the row's name.

use std::collections::BTreeSet;

use xftrace_lab::{Row, Shows};

use crate::{backings, plain};

macro_rules! rows {
    ($($row:ident),* $(,)?) => {
        /// The rows that have a test.
        const TESTED: &[&str] = &[$(stringify!($row)),*];

        $(
            #[test]
            fn $row() {
                show(stringify!($row));
            }
        )*
    };
}

rows! {
    stock_6_1_cloud,
    stock_6_1_generic,
    stock_6_12_cloud,
    stock_6_12_generic,
    stock_6_12_boot_mapped,
    file,
    memfd,
    anonymous,
    huge_pages,
    huge_pages_linked,
    smallest,
    above_4g,
    cells,
    sparse_64g,
    balloon,
    dimm,
    dimm_memfd,
}

/// Shows what the row of a test says that it shows.
fn show(test: &str) {
    let row = Row::named(&test.replace('_', "-")).unwrap();
    match row.shows {
        Shows::SameLines => plain::same_lines(&row),
        Shows::EveryCall => backings::every_call(&row),
    }
}

/// A test without a row fails by itself.
#[test]
fn every_row_has_its_test() {
    let tested: BTreeSet<String> = TESTED.iter().map(|test| test.replace('_', "-")).collect();
    let rows = xftrace_lab::rows().unwrap();
    let rows: BTreeSet<String> = rows.into_iter().map(|row| row.name).collect();
    assert_eq!(rows, tested);
}
