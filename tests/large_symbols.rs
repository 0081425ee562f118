//! A kernel with 400,000 symbols is known quickly: once it is in the store, and before.

use std::fmt::Write;
use std::path::Path;
use std::time::Duration;

use nix::time::{clock_gettime, ClockId};
use xftrace::symfiles::{Known, Store};

mod support;
use support::guest::{Guest, Plan};

const SYMBOLS: u64 = 400_000;
/// How long it may take; code that is not optimized may take longer.
const LIMIT: Duration = Duration::from_millis(if cfg!(debug_assertions) { 1500 } else { 100 });

/// What this thread has taken of the processors, so that others on the machine do not
/// matter.
fn processor_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)
        .expect("a clock")
        .into()
}

#[test]
fn a_kernel_with_400_000_symbols_is_loaded_quickly() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut map = Plan::default().system_map();
    let from = Guest::SPARE + 0x10_0000;
    for number in 0..SYMBOLS {
        writeln!(
            map,
            "{:x} t some_function_number_{number}",
            from + number * 16
        )
        .expect("text");
    }
    let file = dir.path().join("System.map");
    std::fs::write(&file, map).expect("a file");
    let store = Store::at(&dir.path().join("store"));
    store.add(&file).expect("it is added");
    let entries = std::fs::read_dir(dir.path().join("store")).expect("the store");
    let mut paths = entries.flatten().map(|entry| entry.path());
    let index = paths.find(|path| path.is_file()).expect("an index");

    let load = |file: &Path| {
        let begun = processor_time();
        let known = Known::load(file).expect("it is read");
        let took = processor_time() - begun;
        let last = format!("some_function_number_{}", SYMBOLS - 1);
        assert!(known.symbols.address(&last).is_some());
        took
    };
    // Text is read once, to make the index; it is not to be much slower.
    for (what, file, limit) in [("as text", &file, 2 * LIMIT), ("indexed", &index, LIMIT)] {
        let took = (0..5).map(|_| load(file)).min().expect("five times");
        println!("{SYMBOLS} symbols {what}: {took:?}");
        assert!(took < limit, "{what}: {took:?}");
    }
}
