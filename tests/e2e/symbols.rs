//! Symbols out of the files that people have, against running guests.

use std::collections::BTreeSet;
use std::path::Path;

use xftrace::symfiles::{Kind, Known};
use xftrace_lab::{Backing, Domain};

use crate::lab::TestGuest;
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
