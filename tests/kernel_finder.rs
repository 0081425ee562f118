//! The finder over synthetic guests: what it finds, and what it says where it
//! finds nothing.

mod support;

use support::guest::{Guest, Plan, DIRECT_MAP, LINK_TEXT};
use xftrace::kernel::{find_all, probe, Check, FindError, Gva, Symbols};
use xftrace::ram::{Gpa, GuestRam, Layout, MachineKind, RamError, RamOffset, Range, VecRam};

/// What the finder says of a guest that was changed after it was built.
fn told(change: impl Fn(&Guest)) -> FindError {
    let guest = Guest::new();
    change(&guest);
    guest.find().expect_err("no kernel")
}

#[test]
fn a_kernel_is_found_wherever_kaslr_put_it() {
    for levels in [4, 5] {
        // Physically above and below where it is virtually: phys_base has
        // either sign. No slide is KASLR off.
        for (phys_text, slide) in [
            (0x100_0000, 0),
            (0x120_0000, 0x3be0_0000),
            (0x180_0000, 0x20_0000),
        ] {
            let guest = Guest::of(Plan {
                levels,
                phys_text,
                slide,
                ..Plan::default()
            });
            let found = guest.find().expect("the kernel");
            let [kernel] = found.as_slice() else {
                panic!("{found:?}")
            };
            assert_eq!(kernel.phys_text, Gpa(phys_text));
            assert_eq!(kernel.slide, slide);
            assert_eq!(kernel.levels, levels);
            assert_eq!(kernel.banner, guest.plan.banner);
            assert_eq!(kernel.release(), "6.1.0-test");

            let read = guest.symbols.address("vfs_read").expect("a function");
            assert_eq!(kernel.runtime(read), Gva(read.0 + slide));
            assert_eq!(kernel.link(kernel.runtime(read)), read);
            assert_eq!(kernel.image_gpa(read), Gpa(phys_text + 0x100));
            let walked = kernel
                .translate(&guest.ram, kernel.runtime(read))
                .expect("mapped");
            assert_eq!(walked, kernel.image_gpa(read));
            assert!(
                kernel.in_image(read)
                    && !kernel.in_image(Gva(0))
                    && !kernel.in_image(Gva(DIRECT_MAP))
            );
        }
    }
}

#[test]
fn memory_is_read_through_the_guests_own_tables() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    // Two pages that follow each other in virtual memory only.
    let gva = guest.map_page(0, Gpa(0x7000));
    guest.map_page(0x1000, Gpa(0x3000));
    guest.ram.poke(Gpa(0x7ffc), b"over");
    guest.ram.poke(Gpa(0x3000), b" the edge");
    let mut text = [0; 13];
    kernel
        .read(&guest.ram, gva.wrapping_add(0xffc), &mut text)
        .expect("mapped");
    assert_eq!(&text, b"over the edge");

    let gva = gva.wrapping_add(0xff8);
    assert_eq!(
        kernel.read_u64(&guest.ram, gva).expect("mapped") >> 32,
        u64::from(u32::from_le_bytes(*b"over"))
    );
    assert_eq!(
        kernel
            .read_u32(&guest.ram, gva.wrapping_add(4))
            .expect("mapped"),
        u32::from_le_bytes(*b"over")
    );
    assert!(kernel.read_u64(&guest.ram, gva.wrapping_add(4)).is_err());
    assert!(kernel
        .read_u64(&guest.ram, gva.wrapping_add(0x1008))
        .is_err());

    let direct = kernel
        .translate(&guest.ram, Gva(DIRECT_MAP + 0x12345))
        .expect("mapped");
    assert_eq!(direct, Gpa(0x12345));
}

#[test]
fn a_kernel_above_the_hole_is_found() {
    let layout = Layout::split(64 << 20, 16 << 20).expect("a layout");
    let phys_text = (4 << 30) + (2 << 20);
    let plan = Plan {
        ram: 16 << 20,
        phys_text,
        ..Plan::default()
    };
    let guest = Guest::load(plan, VecRam::new(layout));
    assert_eq!(guest.kernel().phys_text, Gpa(phys_text));
}

#[test]
fn an_image_across_two_backings_is_found() {
    // Two NUMA nodes meet in the middle of it.
    let meet = 0x110_0000;
    let range = |gpa, len, backing| Range {
        gpa: Gpa(gpa),
        len,
        backing,
        offset: RamOffset(0),
    };
    let ranges = vec![range(0, meet, 0), range(meet, (32 << 20) - meet, 1)];
    let layout = Layout::new(ranges).expect("a layout");
    let guest = Guest::load(Plan::default(), VecRam::new(layout));
    assert_eq!(guest.kernel().phys_text, Gpa(0x100_0000));
}

#[test]
fn the_old_image_after_a_reboot_is_returned_too() {
    let old = Guest::of(Plan {
        phys_text: 0x80_0000,
        ..Plan::default()
    });
    let plan = Plan {
        phys_text: 0x180_0000,
        slide: 0x400_0000,
        ..Plan::default()
    };
    let new = Guest::load(plan, old.ram);
    let found: Vec<_> = new
        .find()
        .expect("kernels")
        .iter()
        .map(|k| k.phys_text)
        .collect();
    assert_eq!(found, [Gpa(0x80_0000), Gpa(0x180_0000)]);
}

#[test]
fn both_forms_of_kallsyms_are_compared() {
    for absolute_percpu in [true, false] {
        let guest = Guest::of(Plan {
            absolute_percpu,
            ..Plan::default()
        });
        guest.kernel();
        // One function elsewhere.
        let table = guest.gpa_of("kallsyms_offsets");
        let entry = guest.ram.read_u32(Gpa(table.0 + 20)).expect("RAM");
        let moved = if absolute_percpu {
            entry - 16
        } else {
            entry + 16
        };
        guest.ram.poke_u32(Gpa(table.0 + 20), moved);
        let error = guest.find().expect_err("another build");
        assert!(matches!(error, FindError::OtherBuild { .. }), "{error}");
        assert!(error.to_string().contains("6.1.0-test"), "{error}");
    }
}

#[test]
fn lists_filtered_differently_are_of_one_build() {
    // The guest's own list leaves out one function, or has one more.
    let fewer = Guest::new();
    fewer.ram.poke_u32(fewer.gpa_of("kallsyms_num_syms"), 63);
    fewer.kernel();
    let more = Guest::new();
    more.ram.poke_u32(more.gpa_of("kallsyms_num_syms"), 65);
    more.ram.poke_u32(
        Gpa(more.gpa_of("kallsyms_offsets").0 + 64 * 4),
        -0x10_0000i32 as u32,
    );
    more.kernel();
    // The compiler's padding symbols, in System.map alone and in both.
    let padded = Guest::new();
    let functions = padded.plan.functions.iter().skip(1);
    let padding = functions.map(|(name, at)| format!("{:x} t __pfx_{name}\n", LINK_TEXT + at - 16));
    let map = padded.plan.system_map() + &padding.collect::<String>();
    let symbols = Symbols::parse(map.into()).expect("a System.map");
    find_all(&padded.ram, &symbols).expect("the same build");
    // Behind the first function, in the order of addresses.
    let table = padded.gpa_of("kallsyms_offsets").0;
    padded.ram.poke_u32(padded.gpa_of("kallsyms_num_syms"), 65);
    padded.ram.poke_u32(Gpa(table + 4), -0xf1i32 as u32);
    for (at, (_, offset)) in (2u64..).zip(padded.plan.functions.iter().skip(1)) {
        padded.ram.poke_u32(Gpa(table + at * 4), !*offset as u32);
    }
    find_all(&padded.ram, &symbols).expect("the same build");
    // Half of them missing is no filter.
    let half = Guest::new();
    half.ram.poke_u32(half.gpa_of("kallsyms_num_syms"), 32);
    assert!(matches!(half.find(), Err(FindError::OtherBuild { .. })));
}

#[test]
fn a_list_that_is_not_where_it_should_be_is_another_builds() {
    let guest = Guest::new();
    // A count that leads out of the image: nothing is read.
    guest
        .ram
        .poke_u32(guest.gpa_of("kallsyms_num_syms"), u32::MAX);
    let error = guest.find().expect_err("another build");
    assert!(matches!(error, FindError::OtherBuild { .. }), "{error}");
    // Told as that also where some other check fails before.
    guest.ram.poke_u32(guest.gpa_of("__pgtable_l5_enabled"), 7);
    let error = guest.find().expect_err("another build");
    assert!(matches!(error, FindError::OtherBuild { .. }), "{error}");
}

#[test]
fn each_check_refuses_what_it_is_for() {
    let fails = |symbol: &'static str, offset: u64, bytes: Vec<u8>| {
        let error = told(|guest| guest.ram.poke(Gpa(guest.gpa_of(symbol).0 + offset), &bytes));
        assert!(error.to_string().contains("6.1.0-test"), "{error}");
        match error {
            FindError::Unfinished {
                gpa: Gpa(0x100_0000),
                check,
                same_build: true,
                ..
            } => check,
            other => panic!("{other}"),
        }
    };
    let zeros = vec![0; 8];
    assert_eq!(
        fails("linux_proc_banner", 0, zeros.clone()),
        Check::ProcBanner
    );
    // Not a multiple of 2 MiB, and outside the kernel's GiB.
    assert_eq!(fails("phys_base", 0, vec![1]), Check::PhysBase);
    assert_eq!(fails("phys_base", 7, vec![0x7f]), Check::PhysBase);
    assert_eq!(fails("__pgtable_l5_enabled", 0, vec![2]), Check::PagingMode);
    // A kernel of the other depth, and one whose tables are not made yet.
    assert_eq!(fails("__pgtable_l5_enabled", 0, vec![0]), Check::PageTables);
    assert_eq!(fails("init_top_pgt", 511 * 8, zeros), Check::PageTables);
    // 2 MiB off, which is a possible base, but not the one that is mapped.
    assert_eq!(fails("phys_base", 2, vec![0xc0]), Check::PageTables);
    assert_eq!(
        fails("init_task", 0x5a8, b"sleeper".to_vec()),
        Check::InitTask
    );
}

#[test]
fn a_kernel_without_the_depth_variable_is_found_by_its_tables() {
    for levels in [4, 5] {
        let guest = Guest::of(Plan {
            levels,
            ..Plan::default()
        });
        let map = guest
            .plan
            .system_map()
            .replace("__pgtable_l5_enabled", "something_else");
        let symbols = Symbols::parse(map.into()).expect("a System.map");
        let found = find_all(&guest.ram, &symbols).expect("the kernel");
        assert_eq!(found.first().map(|kernel| kernel.levels), Some(levels));
    }
}

#[test]
fn the_system_map_of_another_kernel_is_refused_with_the_guests_banner() {
    let guest = Guest::of(Plan {
        banner: "Linux version 5.10\x1b[2J\\".into(),
        ..Plan::default()
    });
    // Somebody's log, not aligned, and a file's content, without the newline.
    guest.ram.poke(Gpa(0x3003), b"Linux version 1.0 (log)\n\0");
    guest.ram.poke(Gpa(0x5000), b"Linux version 4.4 (file)\0");
    let map = guest
        .plan
        .system_map()
        .replace("81200000 D linux_banner", "81200100 D linux_banner");
    let symbols = Symbols::parse(map.into()).expect("a System.map");
    assert_eq!(probe(&guest.ram, &symbols).expect("no error"), []);
    let error = find_all(&guest.ram, &symbols).expect_err("another kernel");
    let FindError::OtherKernel { banners } = &error else {
        panic!("{error}")
    };
    assert_eq!(
        banners,
        &["Linux version 5.10\\x1b[2J\\\\", "Linux version 4.4 (file)"]
    );
    assert!(
        error
            .to_string()
            .contains("the guest has: Linux version 5.10\\x1b"),
        "{error}"
    );
}

#[test]
fn a_banner_across_the_end_of_a_copied_piece_is_told_whole() {
    let guest = Guest::new();
    let ram = VecRam::new(Layout::pc(3 << 30, MachineKind::Q35).expect("a layout"));
    for page in 0..32 {
        ram.poke(Gpa(page << 12), &[1]);
    }
    ram.poke(Gpa((64 << 10) - 8), b"Linux version 6.12 (across)\n\0");
    let error = find_all(&ram, &guest.symbols).expect_err("another kernel");
    let FindError::OtherKernel { banners } = &error else {
        panic!("{error}")
    };
    assert_eq!(banners, &["Linux version 6.12 (across)"]);
}

#[test]
fn no_linux_is_told_as_that() {
    let guest = Guest::new();
    let ram = VecRam::new(Layout::flat(64 << 20).expect("a layout"));
    ram.poke(Gpa(0x10_0000), &vec![0xaa; 3 << 20]);
    let error = find_all(&ram, &guest.symbols).expect_err("no Linux");
    assert!(
        matches!(
            error,
            FindError::NoLinux {
                searched: 3,
                complete: true
            }
        ),
        "{error}"
    );
    assert!(error.to_string().contains("has it booted yet"), "{error}");
}

#[test]
fn symbols_without_what_the_finder_needs_are_refused_by_name() {
    let guest = Guest::new();
    for needed in ["linux_banner", "phys_base", "init_top_pgt"] {
        let map: Vec<_> = guest.plan.system_map().lines().map(str::to_owned).collect();
        let map: Vec<_> = map
            .into_iter()
            .filter(|line| !line.ends_with(&format!(" {needed}")))
            .collect();
        let symbols = Symbols::parse(map.join("\n").into()).expect("a System.map");
        let error = find_all(&guest.ram, &symbols).expect_err("refused");
        assert!(error.to_string().contains(needed), "{error}");
        assert!(probe(&guest.ram, &symbols).is_err());
    }
    // One that lies before the image, or behind its end.
    for wrong in ["ffffffff80fffff8", "ffffffff815ffffc", "0000000000000000"] {
        let map = guest.plan.system_map().replace(
            "ffffffff81400000 D phys_base",
            &format!("{wrong} D phys_base"),
        );
        let symbols = Symbols::parse(map.into()).expect("a System.map");
        let error = find_all(&guest.ram, &symbols).expect_err("refused");
        assert!(matches!(error, FindError::Symbol("phys_base")), "{error}");
    }
}

#[test]
fn a_saved_kallsyms_serves_as_well() {
    // Addresses of the running kernel, without the tables' own names, and
    // with modules.
    let guest = Guest::new();
    let map = guest.plan.system_map();
    let slid = |line: &str| {
        let (address, rest) = line.split_once(' ').expect("a symbol");
        let address = u64::from_str_radix(address, 16).expect("an address") + guest.plan.slide;
        format!("{address:016x} {rest}\n")
    };
    let lines = map.lines().filter(|line| !line.contains("kallsyms_"));
    let text: String = lines.map(slid).collect();
    let text = format!("{text}ffffffffc0000000 t init_module\t[dummy]\n");
    let symbols = Symbols::parse(text.into()).expect("a kallsyms");
    let found = find_all(&guest.ram, &symbols).expect("the kernel");
    assert_eq!(found.first().map(|kernel| kernel.slide), Some(0));
    let read = symbols.address("vfs_read").expect("a function");
    assert_eq!(read, Gva(LINK_TEXT + guest.plan.slide + 0x100));
}

#[test]
fn memory_that_vanished_is_no_verdict_about_the_guest() {
    let guest = Guest::new();
    guest.ram.lose();
    let error = guest.find().expect_err("gone");
    assert!(
        matches!(error, FindError::Ram(RamError::Gone { .. })),
        "{error}"
    );
    assert!(guest.ram.layout().total() > 0);
}
