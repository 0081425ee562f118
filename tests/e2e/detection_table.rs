//! The table of docs/detection.md: which class of hooks was found by what, and
//! after how long, in a run on real guests.
//!
//! `make detection` writes it. All other runs compare theirs with it, but for the
//! times, so that it says what the tests show.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use crate::classes::{Class, Shows, CLASSES};

/// Between these stands the table, and nothing else.
const BEGIN: &str = "<!-- from make detection -->\n";
const END: &str = "<!-- end -->\n";

const HEAD: &str = "\
| class | what is done | Linux | call flow | live, after | `check`, after | memory | `check`, after |
| --- | --- | --- | --- | --- | --- | --- | --- |
";
/// The columns that no two runs have the same.
const TIMES: [usize; 3] = [5, 6, 8];

/// How long after the hook was put there it was found in a guest.
#[derive(Debug, Default)]
pub(crate) struct Found {
    /// By the call flow, by the helper.
    pub(crate) live: Option<Duration>,
    /// By the call flow, by `xftrace check`.
    pub(crate) flow: Option<Duration>,
    /// In memory, by `xftrace check`.
    pub(crate) memory: Option<Duration>,
}

/// What was found in the guest of a kernel, by class.
pub(crate) type OfKernel = (String, Vec<(&'static str, Found)>);

/// Compares the table with what a run found, or writes it anew.
pub(crate) fn agrees_or_is_written(found: &[OfKernel]) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/detection.md");
    let text = std::fs::read_to_string(&path).expect("docs/detection.md");
    let (before, rest) = text.split_once(BEGIN).expect("where the table begins");
    let (table, after) = rest.split_once(END).expect("where the table ends");
    let now = markdown(found);
    println!("{now}");
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        let text = [before, BEGIN, &now, END, after].concat();
        std::fs::write(&path, text).expect("docs/detection.md can be written");
        return;
    }
    let is = without_times(table);
    assert_eq!(is, without_times(&now), "'make detection' writes it anew");
}

/// The table, with a row for each class.
fn markdown(found: &[OfKernel]) -> String {
    let mut text = HEAD.to_owned();
    for class in &CLASSES {
        // In the order in which the class names its kernels.
        let kernels = class.kernels.iter();
        let of: Vec<(&str, &Found)> = kernels
            .filter_map(|kernel| {
                let (_, of) = found.iter().find(|(of, _)| of == kernel)?;
                let (_, found) = of.iter().find(|(name, _)| *name == class.name)?;
                Some((*kernel, found))
            })
            .collect();
        row(&mut text, class, &of);
    }
    text
}

fn row(text: &mut String, class: &Class, of: &[(&str, &Found)]) {
    let each = |what: &dyn Fn(&str, &Found) -> String| {
        let of = of.iter().map(|(kernel, found)| what(kernel, found));
        of.collect::<Vec<_>>().join(" / ")
    };
    let kernels = each(&|kernel, _| kernel.to_owned());
    let live = each(&|_, found| seconds(found.live));
    let flow = each(&|_, found| seconds(found.flow));
    let memory = each(&|_, found| seconds(found.memory));
    let by_flow = match class.flow {
        Shows::It(rule) => format!("`{}`", rule.name()),
        Shows::Nothing(why) => format!("no: {why}"),
    };
    let by_memory = match &class.memory {
        Shows::It(place) => format!("`{}`", place.check),
        Shows::Nothing(why) => format!("no: {why}"),
    };
    // Writing into a String cannot fail.
    let _ = writeln!(
        text,
        "| {} | {} | {kernels} | {by_flow} | {live} | {flow} | {by_memory} | {memory} |",
        class.name, class.what
    );
}

fn seconds(time: Option<Duration>) -> String {
    match time.map(|time| time.as_secs_f64()) {
        None => "-".to_owned(),
        Some(under) if under < 1.0 => "under 1 s".to_owned(),
        Some(time) => format!("{time:.0} s"),
    }
}

/// The rows of a table without the columns of times.
fn without_times(table: &str) -> Vec<Vec<&str>> {
    table.lines().map(cells_without_times).collect()
}

fn cells_without_times(row: &str) -> Vec<&str> {
    let cells = row.split('|').enumerate();
    let cells = cells.filter(|(column, _)| !TIMES.contains(column));
    cells.map(|(_, cell)| cell.trim()).collect()
}

#[test]
fn only_times_may_differ() {
    let row = |kernel: &str, rule: &str, live: &str, flow: &str, memory: &str| {
        format!("| seq | what | {kernel} | {rule} | {live} | {flow} | `files` | {memory} |\n")
    };
    let table = row("6.1", "`unknown-module`", "4 s", "2 s", "2 s");
    let slower = row("6.1", "`unknown-module`", "40 s", "20 s", "30 s");
    assert_eq!(without_times(&table), without_times(&slower));
    for other in [
        row("6.12", "`unknown-module`", "4 s", "2 s", "2 s"),
        row("6.1", "no: why", "4 s", "2 s", "2 s"),
    ] {
        assert_ne!(without_times(&table), without_times(&other));
    }
}
