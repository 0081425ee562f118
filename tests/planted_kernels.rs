//! A guest whose memory is full of false kernels, each as good as whoever has
//! the guest's kernel can make it: none hides the true one, and looking at
//! them costs little.

use std::time::Duration;

use xftrace::kernel::{find_all_beside, has_banner, probe, FindError, Kernel};
use xftrace::ram::{Gpa, GuestRam, Layout, VecRam, PAGE_SIZE};

mod support;
use support::guest::{Guest, Plan};
use support::time::cpu_time;

const GIB: u64 = 1 << 30;
/// From one false kernel to the next: what is looked at of the synthetic one
/// does not overlap with its neighbours' then, though the images do.
const STRIDE: u64 = 4 << 20;
/// How many functions the kernel has, so that a comparison is worth something.
const FUNCTIONS: u64 = 12_000;
/// Code that is not optimized is that much slower, on a machine that does other work.
const SLOWNESS: u32 = if cfg!(debug_assertions) { 60 } else { 1 };

/// A guest whose kernel lies at the end of its RAM, behind all that is planted.
fn guest(functions: u64, ram: u64) -> Guest {
    let functions = (0..functions).map(|i| (format!("function_{i}"), i * 0x40));
    let plan = Plan {
        phys_text: ram - (16 << 20),
        slide: 0,
        functions: functions.collect(),
        ..Plan::default()
    };
    Guest::load(plan, VecRam::new(Layout::flat(ram).expect("a layout")))
}

/// The places of all that were found.
fn find(guest: &Guest) -> Vec<Gpa> {
    let kernels = probe(&guest.ram, &guest.symbols).expect("a search");
    kernels.iter().map(|kernel| kernel.phys_text).collect()
}

/// The words of the image that are not 0, by their offsets.
fn words(guest: &Guest) -> Vec<(u64, u64)> {
    let mut words = Vec::new();
    let mut page = [0; PAGE_SIZE as usize];
    for offset in (0..6 << 20).step_by(page.len()) {
        guest.ram.read(guest.gpa(offset), &mut page).expect("RAM");
        for (at, word) in (offset..).step_by(8).zip(page.chunks_exact(8)) {
            words.push((at, u64::from_le_bytes(word.try_into().expect("a word"))));
        }
    }
    words.retain(|&(_, word)| word != 0);
    words
}

/// Copies the kernel to as many places as there is room for before it, each
/// true to itself: with its own `phys_base`, and its own page tables. Gives
/// the places.
fn plant(guest: &Guest) -> Vec<Gpa> {
    const PRESENT: u64 = 1;
    let words = words(guest);
    let from = guest.plan.phys_text;
    let image = from..from + (6 << 20);
    let tables = guest.gpa_of("init_top_pgt").0 - from..Guest::SPARE;
    let phys_base = guest.ram.read_u64(guest.gpa_of("phys_base")).expect("RAM");
    let room = from - (8 << 20);
    let places = (0..room / STRIDE).map(|place| Gpa(place * STRIDE));
    for to in places.clone() {
        let moved = to.0.wrapping_sub(from);
        for &(offset, word) in &words {
            let leads = tables.contains(&offset) && word & PRESENT != 0;
            let moves = leads && image.contains(&(word & !0xfff));
            let word = word.wrapping_add(if moves { moved } else { 0 });
            guest.ram.poke_u64(Gpa(to.0 + offset), word);
        }
        let at = Gpa(guest.gpa_of("phys_base").0.wrapping_add(moved));
        guest.ram.poke_u64(at, phys_base.wrapping_add(moved));
    }
    places.collect()
}

/// Where that variable lies in the copy at `place`.
fn in_copy(guest: &Guest, place: Gpa, symbol: &str) -> Gpa {
    Gpa(place.0 + guest.gpa_of(symbol).0 - guest.plan.phys_text)
}

/// The only one found is the true one. Gives what the search cost on the
/// processor for each of so many false ones.
fn cost_of_each(guest: &Guest, planted: usize) -> Duration {
    let start = cpu_time();
    let found = find(guest);
    let taken = cpu_time() - start;
    assert_eq!(found, [Gpa(guest.plan.phys_text)]);
    taken / planted as u32
}

#[test]
fn banners_everywhere_hide_no_kernel() {
    let guest = guest(64, 2 * GIB);
    let banner = guest.gpa_of("linux_banner").0 - guest.plan.phys_text;
    let planted = (0..guest.plan.phys_text - (8 << 20)).step_by(2 << 20);
    for base in planted.clone() {
        let text = format!("Linux version 6.1.{base}\n\0");
        guest.ram.poke(Gpa(base + banner), text.as_bytes());
    }
    let each = cost_of_each(&guest, planted.count());
    let has = |text: &str| has_banner(&guest.ram, banner, Some(text)).expect("a look");
    assert!(has(&guest.plan.banner));
    assert!(!has("Linux version 2.6"));
    assert!(each < Duration::from_micros(30) * SLOWNESS, "{each:?}");
}

#[test]
fn copies_that_differ_in_their_functions_are_told_apart_at_little_cost() {
    let guest = guest(FUNCTIONS, GIB + GIB / 4);
    let places = plant(&guest);
    assert!(places.len() > 300);
    let spoil = |function: u64| {
        for &place in &places {
            let entry = Gpa(in_copy(&guest, place, "kallsyms_offsets").0 + function * 4);
            let offset = guest.ram.read_u32(entry).expect("RAM");
            guest.ram.poke_u32(entry, offset - 8);
        }
        cost_of_each(&guest, places.len())
    };
    // Right in all but the last function, and then wrong from an early one on.
    let (late, early) = (spoil(FUNCTIONS - 1), spoil(100));
    println!("{late:?} and {early:?} each");
    assert!(late < Duration::from_millis(1) * SLOWNESS, "{late:?}");
    assert!(early < late / 2, "{early:?} of {late:?}");
}

#[test]
fn perfect_copies_are_all_returned_and_with_them_the_true_kernel() {
    let guest = guest(FUNCTIONS, GIB + GIB / 4);
    let mut places = plant(&guest);
    places.push(Gpa(guest.plan.phys_text));
    let start = cpu_time();
    let found = probe(&guest.ram, &guest.symbols).expect("a search");
    let each = (cpu_time() - start) / places.len() as u32;
    let found: Vec<Gpa> = found.iter().map(|kernel| kernel.phys_text).collect();
    assert!(found == places, "{} of {}", found.len(), places.len());
    assert!(each < Duration::from_millis(1) * SLOWNESS, "{each:?}");
}

/// A list of functions that is said to be very long, and is all zeros or in no
/// order: what it takes to make an honest comparison dear.
#[test]
fn a_long_list_of_nothing_costs_little() {
    let guest = guest(64, GIB + GIB / 4);
    let places = plant(&guest);
    let spoil = |write: &dyn Fn(Gpa)| {
        for &place in &places {
            let count = in_copy(&guest, place, "kallsyms_num_syms");
            guest.ram.poke_u32(count, 1_000_000);
            write(in_copy(&guest, place, "kallsyms_offsets"));
        }
        let each = cost_of_each(&guest, places.len());
        assert!(each < Duration::from_millis(1) * SLOWNESS, "{each:?}");
    };
    spoil(&|list| guest.ram.poke(list, &[0; 64 * 4]));
    spoil(&|list| {
        for entry in 0..64 {
            guest
                .ram
                .poke_u32(Gpa(list.0 + entry * 4), 63 - entry as u32);
        }
    });
}

/// No guest has so many. What is returned is bounded all the same, and the true one is
/// still there for whoever knows where it was.
#[test]
fn thousands_of_perfect_copies_are_cut_off() {
    const MOST: usize = 4096;
    let guest = guest(64, 17 * GIB);
    assert!(plant(&guest).len() > MOST);
    let found = find(&guest);
    assert_eq!(found.len(), MOST);
    let place = Gpa(guest.plan.phys_text);
    assert!(!found.contains(&place));
    for (known, is_there) in [
        (place, true),
        (found[1], false),
        (Gpa(place.0 + 1), false),
        (Gpa(u64::MAX), false),
    ] {
        let kernels = find_all_beside(&guest.ram, &guest.symbols, Some(known));
        let places: Vec<Gpa> = kernels
            .expect("kernels")
            .iter()
            .map(|one| one.phys_text)
            .collect();
        assert_eq!(places.len(), MOST, "{known}");
        assert!(places.is_sorted() && places.windows(2).all(|two| two[0] != two[1]));
        assert_eq!(places.contains(&place), is_there, "{known}");
    }
}

/// What the finder says where there are false kernels only: of the one that
/// came furthest, whatever was planted before it.
#[test]
fn the_one_that_came_furthest_is_told_of() {
    let guest = guest(64, GIB);
    let banner = guest.gpa_of("linux_banner").0 - guest.plan.phys_text;
    for base in (0..GIB - (32 << 20)).step_by(2 << 20) {
        guest
            .ram
            .poke(Gpa(base + banner), b"Linux version 6.1 (false)\n\0");
    }
    let init_task = guest.gpa_of("init_task");
    guest.ram.poke(init_task, &[0; 0x1000]);
    match guest.find() {
        Err(FindError::Unfinished {
            gpa, same_build, ..
        }) => {
            assert_eq!((gpa, same_build), (Gpa(guest.plan.phys_text), true));
        }
        other => panic!("{:?}", other.map(|found: Vec<Kernel>| found.len())),
    }
}
