//! Everything that reads guest memory, over memory that a guest filled with
//! what it liked: no panic, no hang, nothing read outside RAM, and no answer
//! without what it takes.
//!
//! Each suite starts from a synthetic guest that is read without fault, so
//! that what is changed matters.

mod support;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use support::guest::{Guest, Plan, DIRECT_MAP, LINK_TEXT};
use support::hostile::{changes, Change};
use support::time::cpu_time;
use xftrace::kernel::{find_all, FindError, Gva, Kernel};
use xftrace::ram::{Gpa, GuestRam, Layout, VecRam};

/// The image of the synthetic guest, where changes hurt most.
const IMAGE: (u64, u64) = (0x100_0000, 0x60_0000);

/// What must hold of any kernel that the finder returns.
fn is_sound(guest: &Guest, kernel: &Kernel) {
    assert!(kernel.phys_text.is_aligned(2 << 20));
    assert!(kernel.levels == 4 || kernel.levels == 5);
    assert!(kernel.banner.len() <= 4096);
    assert!(kernel
        .banner
        .bytes()
        .all(|byte| (b' '..=b'~').contains(&byte)));
    let banner = guest.symbols.address("linux_banner").expect("a symbol");
    assert_eq!(kernel.link(kernel.runtime(banner)), banner);
    assert!(guest.ram.layout().place(kernel.image_gpa(banner)).is_some());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn the_finder_stands_changes_to_the_image(changes in changes(IMAGE.0, IMAGE.1), five: bool) {
        let guest = Guest::of(Plan { levels: if five { 5 } else { 4 }, ..Plan::default() });
        changes.iter().for_each(|change| change.apply(&guest.ram));
        if let Ok(kernels) = guest.find() {
            kernels.iter().for_each(|kernel| is_sound(&guest, kernel));
        }
    }

    /// Changes at the few pages that everything hangs from.
    #[test]
    fn the_finder_stands_changes_to_its_anchors(
        picks in prop::collection::vec((0usize..9, 0u64..0x60, prop::collection::vec(any::<u8>(), 1..9)), 1..6),
    ) {
        let guest = Guest::new();
        let names = [
            "linux_banner", "linux_proc_banner", "kallsyms_num_syms", "kallsyms_relative_base",
            "kallsyms_offsets", "phys_base", "__pgtable_l5_enabled", "init_task", "init_top_pgt",
        ];
        for (name, offset, bytes) in picks {
            guest.ram.poke(Gpa(guest.gpa_of(names[name]).0 + offset), &bytes);
        }
        match guest.find() {
            Ok(kernels) => kernels.iter().for_each(|kernel| is_sound(&guest, kernel)),
            Err(error) => prop_assert!(error.to_string().bytes().all(|b| (b' '..=b'~').contains(&b))),
        }
    }

    /// The guest changes its memory between any two looks at it.
    #[test]
    fn the_finder_stands_changes_while_it_looks(
        changes in prop::collection::vec(changes(IMAGE.0, IMAGE.1), 1..8),
    ) {
        let reads = AtomicUsize::new(0);
        let built = Arc::new(AtomicBool::new(false));
        let armed = Arc::clone(&built);
        let ram = VecRam::new(Layout::flat(32 << 20).expect("a layout"));
        let guest = Guest::load(Plan::default(), ram.with_hook(move |ram, _, _| {
            let read = reads.fetch_add(1, Ordering::Relaxed);
            if armed.load(Ordering::Relaxed) && read % 3 == 0 {
                changes[read / 3 % changes.len()].iter().for_each(|change| change.apply(ram));
            }
        }));
        built.store(true, Ordering::Relaxed);
        for _ in 0..4 {
            if let Ok(kernels) = guest.find() {
                kernels.iter().for_each(|kernel| is_sound(&guest, kernel));
            }
        }
    }

    #[test]
    fn the_finder_stands_random_memory(
        pages in prop::collection::vec((0u64..4096, any::<[u64; 8]>()), 0..64),
    ) {
        let ram = VecRam::new(Layout::flat(16 << 20).expect("a layout"));
        for (page, words) in pages {
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            ram.poke(Gpa(page << 12), &bytes.repeat(64));
        }
        prop_assert!(find_all(&ram, &Guest::new().symbols).is_err());
    }

    #[test]
    fn the_walk_stands_changed_tables(
        // The tables of the synthetic guest.
        changes in changes(0x140_4000, 0xc000),
        addresses in prop::collection::vec(any::<u64>(), 16),
    ) {
        let guest = Guest::new();
        let kernel = guest.kernel();
        changes.iter().for_each(|change| change.apply(&guest.ram));
        let near = [LINK_TEXT + guest.plan.slide, DIRECT_MAP, u64::MAX - 50, 0];
        let near = near.iter().flat_map(|base| addresses.iter().map(move |a| base.wrapping_add(a & 0xff_ffff)));
        for address in near.chain(addresses.iter().copied()).map(Gva) {
            if let Ok(gpa) = kernel.translate(&guest.ram, address) {
                prop_assert!(guest.ram.layout().place(gpa).is_some());
            }
            let _ = kernel.read(&guest.ram, address, &mut [0; 9000]);
            let _ = kernel.read_u64(&guest.ram, address);
            let _ = kernel.read_u32(&guest.ram, address);
        }
    }
}

#[test]
fn memory_full_of_kernels_takes_bounded_time_and_memory() {
    // The right text at every place, in 1 GiB, each with a banner of its own.
    let ram = VecRam::new(Layout::flat(1 << 30).expect("a layout"));
    let banner = Guest::new().gpa_of("linux_banner").0 - IMAGE.0;
    for base in (0..1 << 30).step_by(2 << 20) {
        let text = format!("Linux version {base}\n\0");
        ram.poke(Gpa((base + banner) % (1 << 30)), text.as_bytes());
    }
    let guest = Guest::load(Plan::default(), ram);
    let start = cpu_time();
    let kernels = guest.find().expect("the real one is among the first");
    assert_eq!(kernels.len(), 1);
    let taken = cpu_time() - start;
    assert!(taken < Duration::from_secs(10), "{taken:?}");
}

#[test]
fn finding_allocates_nothing_in_the_guest() {
    let guest = Guest::of(Plan {
        ram: 256 << 20,
        ..Plan::default()
    });
    let before = guest.ram.hole_reads();
    guest.find().expect("the kernel");
    assert_eq!(guest.ram.hole_reads(), before);

    let empty = VecRam::new(Layout::flat(256 << 20).expect("a layout"));
    let found = find_all(&empty, &guest.symbols).expect_err("nothing is there");
    assert!(
        matches!(
            found,
            FindError::NoLinux {
                searched: 0,
                complete: true
            }
        ),
        "{found}"
    );
    assert_eq!(empty.hole_reads(), 0);
}

#[test]
fn a_change_is_applied() {
    // The suites above are worth nothing if their changes do not arrive.
    let ram = VecRam::from_bytes(&[0; 0x3000]);
    Change::Word(8, 5).apply(&ram);
    Change::Flip(8, 1).apply(&ram);
    assert_eq!(ram.read_u64(Gpa(8)).expect("RAM"), 7);
    Change::Fill(0x1000, 9).apply(&ram);
    Change::Copy(0x2000, 0x1000).apply(&ram);
    assert_eq!(ram.read_u64(Gpa(0x2ff8)).expect("RAM"), 9);
    Change::Bytes(0x2ffe, vec![1; 8]).apply(&ram);
    assert_eq!(
        ram.read_u64(Gpa(0x2ff8)).expect("RAM"),
        0x0101_0000_0000_0009
    );
}
