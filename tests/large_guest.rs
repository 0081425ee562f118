//! A guest with 64 GiB, most of which it never touched: the kernel is found
//! quickly, and holes stay holes.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::time::{Duration, Instant};

use memmap2::MmapOptions;
use xftrace::kernel::{has_banner, probe};
use xftrace::ram::{Access, FileRam, Gpa, GuestRam, Layout, MachineKind, ProcessRam, PAGE_SIZE};

mod support;
use support::guest::Guest;

const SIZE: u64 = 64 << 30;
/// How long it may take; code that is not optimized may take longer.
const LIMIT: Duration = Duration::from_millis(if cfg!(debug_assertions) { 400 } else { 100 });

fn layout() -> Layout {
    Layout::pc(SIZE, MachineKind::Q35).expect("a layout")
}

/// Writes a small guest, and a page in use every GiB, which may be anywhere.
fn fill(guest: &Guest, write: impl Fn(&[u8], u64)) {
    let mut page = [0; PAGE_SIZE as usize];
    let mut at = Gpa(0);
    while let Some(next) = guest.ram.next_populated(at) {
        guest.ram.read(next, &mut page).expect("a page");
        write(&page, next.0);
        at = Gpa(next.0 + PAGE_SIZE);
    }
    for gib in 1..64 {
        write(&[1], gib << 30 | 0x20_0000);
    }
}

/// Finds the kernel, and gives the shortest of some times that it took.
fn find(guest: &Guest, ram: &dyn GuestRam) -> Duration {
    let once = || {
        let started = Instant::now();
        // As is asked first of each kernel that is known, and then of the one that fits.
        let offset = guest.symbols.banner_offset().expect("a banner");
        assert!(has_banner(ram, offset, None).expect("a search"));
        let kernels = probe(ram, &guest.symbols).expect("a search");
        let took = started.elapsed();
        assert_eq!(kernels.len(), 1);
        assert_eq!(kernels[0].phys_text, Gpa(guest.plan.phys_text));
        took
    };
    (0..5).map(|_| once()).min().expect("five times")
}

#[test]
fn the_kernel_of_a_large_file_is_found_without_filling_it() {
    let guest = Guest::new();
    let dir = tempfile::tempdir_in("/dev/shm").expect("a directory in RAM");
    let path = dir.path().join("pc.ram");
    let file = File::create_new(&path).expect("a file");
    file.set_len(SIZE).expect("a sparse file");
    fill(&guest, |bytes, at| {
        file.write_all_at(bytes, at).expect("room");
    });
    let before = file.metadata().expect("its size").blocks();
    let ram = FileRam::open(&path, Access::ReadWrite, layout()).expect("mapped");
    let took = find(&guest, &ram);
    assert_eq!(file.metadata().expect("its size").blocks(), before);
    assert!(took < LIMIT, "{took:?}");
}

#[test]
fn the_kernel_in_a_large_process_is_found_without_filling_it() {
    let guest = Guest::new();
    let map = MmapOptions::new()
        .len(SIZE as usize)
        .no_reserve_swap()
        .map_anon()
        .expect("address space");
    let start = map.as_ptr().addr() as u64;
    let mem = File::options().write(true).open("/proc/self/mem");
    let mem = mem.expect("our own memory");
    fill(&guest, |bytes, at| {
        mem.write_all_at(bytes, start + at).expect("room");
    });
    let resident = || -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").expect("a status");
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("RssAnon:"));
        let number = line.and_then(|line| line.trim().strip_suffix(" kB"));
        number.and_then(|text| text.parse().ok()).expect("a number")
    };
    let dir = Path::new("/proc/self");
    let ram = ProcessRam::open(dir, vec![start], Access::ReadWrite, layout()).expect("opened");
    let before = resident();
    let took = find(&guest, &ram);
    assert!(resident() < before + (64 << 10), "holes were filled");
    assert!(took < LIMIT, "{took:?}");
}
