//! A kernel is found wherever its boot loader puts it, boot after boot.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use xftrace::session::{Boot, Meta};
use xftrace::symfiles::Known;
use xftrace_lab::{wait_for, Backing, Domain};

use crate::lab::TestGuest;
use crate::traced::Traced;

/// The guests, at one time, each booted so often. Most of the time between
/// a reset and the kernel's being found, the helper waits for the old heart.
const KERNELS: [&str; 4] = ["6.1", "6.12", "stock-6.1-cloud", "stock-6.12-cloud"];
const BOOTS: usize = 5;
/// Longer than a boot takes on a busy machine.
const SOON: Duration = Duration::from_secs(60);

#[test]
fn guests_booted_twenty_times_are_found_twenty_times() {
    let begun = Instant::now();
    let guests = std::thread::scope(|scope| {
        let start = |(guest, kernel): (usize, _)| {
            scope.spawn(move || boots_of(&format!("kaslr{guest}"), kernel))
        };
        let guests: Vec<_> = KERNELS.into_iter().enumerate().map(start).collect();
        let join = |guest: std::thread::ScopedJoinHandle<Vec<Boot>>| guest.join().expect("boots");
        guests.into_iter().flat_map(join).collect::<Vec<Boot>>()
    });
    assert_eq!(guests.len(), 20);
    println!("20 boots in {:?}", begun.elapsed());

    let different = |what: fn(&Boot) -> u64| guests.iter().map(what).collect::<BTreeSet<u64>>();
    assert_eq!(different(|boot| boot.boot_id).len(), 20);
    // Of hundreds of places in virtual memory, and of some hundred in memory.
    let slides = different(|boot| boot.slide).len();
    let places = different(|boot| boot.phys_text).len();
    println!("{slides} slides, {places} places in memory");
    assert!(slides > 10 && places > 10, "{slides} {places}");
}

/// Boots a guest that is traced all the while, and says where its kernel was
/// found at each boot. What is found has a heart that beats and takes commands,
/// so it is the true one.
fn boots_of(name: &str, kernel: &str) -> Vec<Boot> {
    let is_stock = kernel.starts_with("stock-");
    let guest = TestGuest::define(&Domain {
        kernel: kernel.to_owned(),
        backing: Backing::File,
        memory: if is_stock { 384 } else { 256 },
        ..Domain::new(name)
    });
    let plain: &[&str] = if is_stock { &["--plain"] } else { &[] };
    let options = [&["--functions", "sys_read"], plain].concat();
    let traced = Traced::start_with(guest, &options);
    traced.on_soon();
    let dir = traced.session().dir().to_owned();
    is_where_the_guest_says(&traced, &Meta::load(&dir).expect("a session"));
    let mut times = Vec::new();
    for boots in 2..=BOOTS {
        let reset = Instant::now();
        traced.lab().virsh(&["reset", name]).unwrap();
        let found = || {
            let meta = Meta::load(&dir).ok();
            Ok(meta.filter(|meta| meta.boots.len() == boots && meta.switches.len() == boots))
        };
        wait_for(SOON, found).unwrap_or_else(|_| panic!("boot {boots}: {}", traced.log()));
        times.push(reset.elapsed());
        is_where_the_guest_says(&traced, &Meta::load(&dir).expect("a session"));
    }
    println!("{name} from each reset until it is traced again: {times:.1?}");

    traced.off().meta.boots
}

/// The last boot's kernel was found where the guest itself says that it is.
fn is_where_the_guest_says(traced: &Traced, meta: &Meta) {
    traced.wait_until_ready().unwrap();
    let line = traced.sh("grep ' _text$' /proc/kallsyms");
    let now = u64::from_str_radix(line.split(' ').next().unwrap(), 16).unwrap();
    let kernel = traced.lab().artifacts(traced.kernel()).unwrap().bzimage;
    let symbols = Known::load(&kernel).unwrap().symbols;
    let link = symbols.address("_text").unwrap().0;
    let last = meta.boots.last().expect("a boot");
    assert_eq!(last.slide, now.wrapping_sub(link), "boot {}", last.number);
}
