//! Symbols out of the files that people have, against running guests.

use std::collections::BTreeSet;
use std::path::Path;

use xftrace::kernel::stock::command_line;
use xftrace::symfiles::{Kind, Known};
use xftrace_lab::{Backing, Domain};

use crate::lab::TestGuest;
use crate::pause::kill_helper;
use crate::plain::unpacked;

/// The symbols of code of a System.map or /proc/kallsyms, each once.
fn code(text: &str) -> BTreeSet<(u64, &str)> {
    let symbol = |line: &'_ str| -> Option<(u64, usize)> {
        let (address, rest) = line.split_once(' ')?;
        let kind = rest.split_once(' ')?.0;
        let code = matches!(kind, "t" | "T" | "w" | "W");
        let name_at = line.len() - rest.len() + kind.len() + 1;
        code.then(|| Some((u64::from_str_radix(address, 16).ok()?, name_at)))?
    };
    let lines = text.lines();
    lines
        .filter_map(|line| symbol(line).and_then(|(at, name)| Some((at, line.get(name..)?))))
        .collect()
}

/// What is read of a stock kernel's package is what that kernel says of itself
/// once it runs: the same name at every address.
fn a_stock_kernel_is_known(kernel: &str, name: &str) {
    let guest = TestGuest::define_alone(&Domain {
        kernel: kernel.to_owned(),
        ..Domain::new(name)
    });
    let artifacts = guest.lab().artifacts(kernel).unwrap();
    let image = Known::load(&artifacts.bzimage).unwrap();
    assert_eq!(image.kind, Kind::Kallsyms);
    let package = Known::load(&artifacts.kernel_dir.join("image.deb")).unwrap();
    assert_eq!(package.build_id, image.build_id);
    assert!(image.build_id.is_some());

    guest.start().unwrap();
    let version = guest.run("cat /proc/version").unwrap().success().unwrap();
    assert_eq!(image.banner.as_deref(), Some(version.trim_end()));
    // Data is most of it, and the serial port is slow: of data only two.
    let command = "echo 0 >/proc/sys/kernel/kptr_restrict; \
        grep -E ' [tTwW] [^[]*$| (linux_banner|_end)$' /proc/kallsyms | gzip -c | base64";
    let listing = String::from_utf8(unpacked(&guest, command)).unwrap();
    let there = code(&listing);
    let text = there
        .iter()
        .find(|symbol| symbol.1 == "_text")
        .expect("_text");
    let slide = text.0 - image.symbols.address("_text").expect("_text").0;
    let mut map = Vec::new();
    image.symbols.write_map(&mut map, slide).unwrap();
    let map = String::from_utf8(map).unwrap();
    let ours = code(&map);
    assert!(ours.len() > 10_000, "{} symbols of code", ours.len());
    let ours: BTreeSet<_> = ours
        .into_iter()
        .map(|(at, name)| (at + slide, name))
        .collect();
    let differ: Vec<_> = ours.symmetric_difference(&there).take(10).collect();
    assert!(differ.is_empty(), "slide {slide:#x}: {differ:x?}");

    // What was saved at a slide is the same again without it.
    let saved = Known::parse(listing.into_bytes()).unwrap();
    assert_eq!(saved.kind, Kind::List);
    for name in ["_text", "vfs_read", "linux_banner", "_end"] {
        assert_eq!(
            saved.symbols.address(name),
            image.symbols.address(name),
            "{name}"
        );
    }
}

#[test]
fn symbols_of_a_stock_6_1_are_the_guests_own() {
    a_stock_kernel_is_known("stock-6.1-cloud", "stock61");
}

#[test]
fn symbols_of_a_stock_6_12_are_the_guests_own() {
    a_stock_kernel_is_known("stock-6.12-cloud", "stock612");
}

/// With the guest's kernel and others in the store, the helper takes the right
/// one by itself; with only others, it says what is missing.
#[test]
fn symbols_that_fit_are_found_in_the_store() {
    let guest = TestGuest::define_alone(&Domain {
        backing: Backing::File,
        ..Domain::new("picks")
    });
    let dir = tempfile::tempdir().expect("a directory");
    let xftrace = |arguments: &[&str]| {
        let output = guest.xftrace(dir.path()).args(arguments).output();
        let output = output.expect("xftrace ran");
        let text = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8(text).expect("text"))
    };
    let path = |path: &Path| path.to_str().expect("a path").to_owned();
    // The store is the whole lab's, and other tests add to it as well.
    let empty_the_store = || {
        let (_, list) = xftrace(&["symbols", "list", "--json"]);
        let known: serde_json::Value = serde_json::from_str(&list).expect("JSON");
        for kernel in known.as_array().expect("an array") {
            let id = kernel["id"].as_str().expect("an id");
            assert_eq!(xftrace(&["symbols", "remove", id]).0, Some(0));
        }
    };
    empty_the_store();
    let stock = guest.lab().artifacts("stock-6.1-cloud").unwrap().bzimage;
    assert_eq!(xftrace(&["symbols", "add", &path(&stock)]).0, Some(0));
    assert_eq!(xftrace(&["enroll", "picks"]).0, Some(0));
    guest.start().unwrap();
    let (status, text) = xftrace(&["on", "-d", "picks", "sys_read"]);
    assert_eq!(status, Some(2), "{text}");
    assert!(
        text.contains("symbols add") && text.contains("Linux version 6.1"),
        "{text}"
    );

    // The very kernel, as its boot image.
    let own = guest.lab().artifacts(guest.kernel()).unwrap().bzimage;
    let (status, text) = xftrace(&["symbols", "add", &path(&own)]);
    assert_eq!(status, Some(0), "{text}");
    let (status, text) = xftrace(&["on", "-d", "picks", "sys_read"]);
    assert_eq!(status, Some(0), "{text}");
    guest.run("rwloop 1000").unwrap().success().unwrap();
    let (status, text) = xftrace(&["off", "-d", "picks"]);
    assert_eq!(status, Some(0), "{text}");
    let graph = std::fs::read_to_string(dir.path().join("trace_graph.txt")).expect("a call flow");
    assert!(graph.contains("__x64_sys_read() {"));
    // The session is decoded with its own copy, when the store is empty again.
    empty_the_store();
    let (status, text) = xftrace(&["report", "-d", "picks"]);
    assert_eq!(status, Some(0));
    assert!(text.contains("__x64_sys_read() {"));
}

/// Each kind of file that there is of a kernel leads to a trace of it, through the store.
#[test]
fn a_guest_is_traced_with_symbols_of_each_kind_of_file() {
    let keyed = TestGuest::define_alone(&Domain {
        backing: Backing::File,
        ..Domain::new("each-kind")
    });
    let artifacts = keyed.lab().artifacts(keyed.kernel()).unwrap();
    let dir = tempfile::tempdir().expect("a directory");
    let saved = dir.path().join("kallsyms");
    enroll_and_start(&keyed, dir.path());
    let all = "echo 0 >/proc/sys/kernel/kptr_restrict; gzip -c /proc/kallsyms | base64";
    std::fs::write(&saved, unpacked(&keyed, all)).expect("a file");
    let whole = [
        &artifacts.vmlinux,
        &artifacts.system_map,
        &artifacts.bzimage,
    ];
    for file in whole {
        traced_with(&keyed, dir.path(), file, true);
    }
    traced_with(&keyed, dir.path(), &saved, false);
    keyed.destroy().unwrap();

    let stock = keyed.beside(&Domain {
        kernel: "stock-6.1-cloud".to_owned(),
        backing: Backing::File,
        memory: 384,
        append: command_line(&["__x64_sys_read"]),
        ..Domain::new("its-package")
    });
    let package = stock.lab().artifacts(stock.kernel()).unwrap();
    enroll_and_start(&stock, dir.path());
    traced_with(
        &stock,
        dir.path(),
        &package.kernel_dir.join("image.deb"),
        true,
    );
}

fn enroll_and_start(guest: &TestGuest, dir: &Path) {
    guest
        .xftrace(dir)
        .args(["enroll", guest.name()])
        .assert()
        .success();
    guest.start().unwrap();
}

/// Adds a file to the store, which has no other kernel, traces the guest, and takes it out
/// again. Whether it could be `compared` with the guest's own list is told.
fn traced_with(guest: &TestGuest, dir: &Path, file: &Path, compared: bool) {
    let name = guest.name();
    let run = |arguments: &[&str]| {
        let done = guest.xftrace(dir).args(arguments).assert().success();
        String::from_utf8(done.get_output().stdout.clone()).expect("text")
    };
    let added = run(&["symbols", "add", file.to_str().expect("a path")]);
    let id = added.split([' ', ':']).nth(1).expect("an id");
    run(&["on", "-d", name, "sys_read"]);
    guest.run("rwloop 500").unwrap().success().unwrap();
    let not_compared = "not compared with the kernel's own list of symbols";
    assert_ne!(
        run(&["status", "-d", name]).contains(not_compared),
        compared
    );
    assert_ne!(run(&["doctor", name]).contains(not_compared), compared);
    run(&["off", "-d", name]);
    let graph = std::fs::read_to_string(dir.join("trace_graph.txt")).expect("a call flow");
    let reads = graph.matches("__x64_sys_read() {").count();
    assert!(reads >= 500, "{file:?}: {reads}: {graph:.2000}");
    run(&["symbols", "remove", id]);
    // The next helper takes what the store has then.
    kill_helper(guest);
}
