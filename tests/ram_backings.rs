//! One suite over every backing of guest RAM: whatever holds it, the layers
//! above get the same answers.
//!
//! Each fixture has the same 4 MiB in two pieces with a hole between them, a
//! way to write as the guest does, and a way to see what the guest would.
//! Huge pages need a machine that has some: tests/e2e has them.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::Arc;

use memmap2::{MmapMut, MmapOptions};
use nix::sys::memfd::{memfd_create, MFdFlags};
use xftrace::ram::{
    Access, BackingFile, FileRam, Gpa, GuestRam, ImageRam, Layout, LayoutError, ProcessRam,
    RamError, RamOffset, Range, VecRam, PAGE_SIZE,
};

const MIB: u64 = 1 << 20;
/// Where RAM goes on that has no room below 4 GiB.
const ABOVE_HOLE: u64 = 4 << 30;
/// Where the second piece begins, and how long each is.
const HIGH: u64 = 16 * MIB;
const PIECE: u64 = 2 * MIB;

/// Two pieces, of one backing each or both of one.
fn layout(backings: usize) -> Layout {
    let range = |gpa, backing, offset| Range {
        gpa: Gpa(gpa),
        len: PIECE,
        backing,
        offset: RamOffset(offset),
    };
    let high = match backings {
        1 => range(HIGH, 0, PIECE),
        _ => range(HIGH, 1, 0),
    };
    Layout::new(vec![range(0, 0, 0), high]).unwrap()
}

type Poke = Box<dyn Fn(u64, &[u8])>;
type Peek = Box<dyn Fn(u64, &mut [u8])>;

struct Fixture {
    name: &'static str,
    ram: Box<dyn GuestRam>,
    /// Writes and reads bytes as the guest does, by guest physical address.
    poke: Poke,
    peek: Peek,
    writable: bool,
    /// What must live as long.
    _keep: Vec<Box<dyn std::any::Any>>,
}

/// The offset in a file of both pieces.
fn offset(gpa: u64) -> u64 {
    if gpa >= HIGH {
        gpa - HIGH + PIECE
    } else {
        gpa
    }
}

fn sparse() -> (tempfile::TempDir, std::path::PathBuf, Arc<File>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pc.ram");
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .unwrap();
    file.set_len(2 * PIECE).unwrap();
    (dir, path, Arc::new(file))
}

fn of_file(
    name: &'static str,
    ram: Box<dyn GuestRam>,
    file: &Arc<File>,
    writable: bool,
) -> Fixture {
    let (poked, peeked) = (Arc::clone(file), Arc::clone(file));
    Fixture {
        name,
        ram,
        poke: Box::new(move |gpa, bytes| poked.write_all_at(bytes, offset(gpa)).unwrap()),
        peek: Box::new(move |gpa, bytes| peeked.read_exact_at(bytes, offset(gpa)).unwrap()),
        writable,
        _keep: Vec::new(),
    }
}

fn file() -> Fixture {
    let (dir, path, file) = sparse();
    let ram = FileRam::open(&path, Access::ReadWrite, layout(1)).unwrap();
    let mut fixture = of_file("file", Box::new(ram), &file, true);
    fixture._keep.push(Box::new(dir));
    fixture
}

/// By the descriptor of the process that has it, as QEMU's memfd is opened.
fn memfd() -> Fixture {
    let fd: OwnedFd = memfd_create(c"memory-backend-memfd", MFdFlags::MFD_CLOEXEC).unwrap();
    let file = Arc::new(File::from(fd));
    file.set_len(2 * PIECE).unwrap();
    let link = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
    let opened = BackingFile::open(Path::new(&link), Access::ReadWrite).unwrap();
    let ram = FileRam::map(vec![opened], layout(1)).unwrap();
    of_file("memfd", Box::new(ram), &file, true)
}

/// The memory of a process: this one.
fn process() -> Fixture {
    let anonymous = || -> MmapMut { MmapOptions::new().len(PIECE as usize).map_anon().unwrap() };
    let (low, high) = (anonymous(), anonymous());
    let starts = [&low, &high].map(|map| map.as_ptr().addr() as u64);
    let dir = Path::new("/proc/self");
    let ram = ProcessRam::open(dir, starts.to_vec(), Access::ReadWrite, layout(2)).unwrap();
    // What the test does to them, the compiler need not know of.
    let mem = File::options()
        .read(true)
        .write(true)
        .open("/proc/self/mem");
    let mem = Arc::new(mem.unwrap());
    let place = move |gpa: u64| match gpa.checked_sub(HIGH) {
        Some(into) => starts[1] + into,
        None => starts[0] + gpa,
    };
    let peeked = Arc::clone(&mem);
    Fixture {
        name: "process",
        ram: Box::new(ram),
        poke: Box::new(move |gpa, bytes| mem.write_all_at(bytes, place(gpa)).unwrap()),
        peek: Box::new(move |gpa, bytes| peeked.read_exact_at(bytes, place(gpa)).unwrap()),
        writable: true,
        _keep: vec![Box::new((low, high))],
    }
}

fn raw_image() -> Fixture {
    let (dir, path, file) = sparse();
    let ram = ImageRam::open(&path, |size| {
        assert_eq!(size, 2 * PIECE);
        Ok(layout(1))
    })
    .unwrap();
    let mut fixture = of_file("raw image", Box::new(ram), &file, false);
    fixture._keep.push(Box::new(dir));
    fixture
}

/// An ELF64 core with these segments: guest physical address, bytes in the
/// file, bytes in memory. The first segment's bytes follow the headers at
/// once, on no page, as QEMU writes them.
fn elf_header(segments: &[(u64, u64, u64)]) -> Vec<u8> {
    let mut bytes = b"\x7fELF\x02\x01\x01".to_vec();
    bytes.resize(16, 0);
    let half = |bytes: &mut Vec<u8>, n: u16| bytes.extend(n.to_le_bytes());
    // ET_CORE, EM_X86_64.
    half(&mut bytes, 4);
    half(&mut bytes, 62);
    bytes.extend(1u32.to_le_bytes());
    for n in [0u64, 64, 0] {
        bytes.extend(n.to_le_bytes());
    }
    bytes.extend(0u32.to_le_bytes());
    for n in [64, 56, segments.len() as u16, 0, 0, 0] {
        half(&mut bytes, n);
    }
    let mut at = 64 + 56 * segments.len() as u64;
    for &(gpa, len, memory) in segments {
        // PT_LOAD.
        bytes.extend(1u32.to_le_bytes());
        bytes.extend(7u32.to_le_bytes());
        for n in [at, 0xffff_8880_0000_0000 + gpa, gpa, len, memory, 0] {
            bytes.extend(n.to_le_bytes());
        }
        at += len;
    }
    bytes
}

fn elf_image() -> Fixture {
    let segments = [(0, PIECE, PIECE), (HIGH, PIECE, PIECE)];
    let header = elf_header(&segments);
    let base = header.len() as u64;
    let (dir, path, file) = sparse();
    file.set_len(base + 2 * PIECE).unwrap();
    file.write_all_at(&header, 0).unwrap();
    let ram = ImageRam::open(&path, |_| panic!("an ELF image says its layout")).unwrap();
    let (poked, peeked) = (Arc::clone(&file), file);
    Fixture {
        name: "ELF image",
        ram: Box::new(ram),
        poke: Box::new(move |gpa, bytes| poked.write_all_at(bytes, base + offset(gpa)).unwrap()),
        peek: Box::new(move |gpa, bytes| peeked.read_exact_at(bytes, base + offset(gpa)).unwrap()),
        writable: false,
        _keep: vec![Box::new(dir)],
    }
}

/// [`VecRam`], shared with the test.
fn vec_ram() -> Fixture {
    let ram = Arc::new(VecRam::new(layout(1)));
    let (poked, peeked) = (Arc::clone(&ram), Arc::clone(&ram));
    Fixture {
        name: "VecRam",
        ram: Box::new(Shared(ram)),
        poke: Box::new(move |gpa, bytes| poked.poke(Gpa(gpa), bytes)),
        peek: Box::new(move |gpa, bytes| peeked.read(Gpa(gpa), bytes).unwrap()),
        writable: true,
        _keep: Vec::new(),
    }
}

struct Shared(Arc<VecRam>);

impl GuestRam for Shared {
    fn layout(&self) -> &Layout {
        self.0.layout()
    }
    fn read(&self, gpa: Gpa, buf: &mut [u8]) -> Result<(), RamError> {
        self.0.read(gpa, buf)
    }
    fn read_u64(&self, gpa: Gpa) -> Result<u64, RamError> {
        self.0.read_u64(gpa)
    }
    fn read_u32(&self, gpa: Gpa) -> Result<u32, RamError> {
        self.0.read_u32(gpa)
    }
    fn write_u64(&self, gpa: Gpa, value: u64) -> Result<(), RamError> {
        self.0.write_u64(gpa, value)
    }
    fn write_u32(&self, gpa: Gpa, value: u32) -> Result<(), RamError> {
        self.0.write_u32(gpa, value)
    }
    fn change_bits(&self, gpa: Gpa, mask: u32, set: bool) -> Result<u32, RamError> {
        self.0.change_bits(gpa, mask, set)
    }
    fn next_populated(&self, gpa: Gpa) -> Option<Gpa> {
        self.0.next_populated(gpa)
    }
    fn check(&self) -> Result<(), RamError> {
        self.0.check()
    }
}

fn all() -> Vec<Fixture> {
    vec![
        file(),
        memfd(),
        process(),
        raw_image(),
        elf_image(),
        vec_ram(),
    ]
}

#[test]
fn what_the_guest_writes_is_read_at_every_alignment() {
    for fixture in all() {
        let ram = &fixture.ram;
        let bytes: Vec<u8> = (0..=255).cycle().take(3 * PAGE_SIZE as usize).collect();
        for base in [0x1000, HIGH + 0x3000, PIECE - 3 * PAGE_SIZE] {
            (fixture.poke)(base, &bytes);
            for (start, len) in [(0, 8), (1, 7), (3, 4096), (4095, 2), (4090, 8198), (8, 0)] {
                let mut read = vec![0xee; len];
                ram.read(Gpa(base + start as u64), &mut read).unwrap();
                assert_eq!(read, bytes[start..start + len], "{}", fixture.name);
            }
        }
        ram.check().unwrap();
    }
}

#[test]
fn words_are_little_endian_and_aligned() {
    for fixture in all() {
        let ram = &fixture.ram;
        for base in [0x2000, HIGH] {
            (fixture.poke)(base, &[1, 2, 3, 4, 5, 6, 7, 8]);
            let read = ram.read_u64(Gpa(base)).unwrap();
            assert_eq!(read, 0x0807_0605_0403_0201, "{}", fixture.name);
            assert_eq!(ram.read_u32(Gpa(base + 4)).unwrap(), 0x0807_0605);
            assert!(
                matches!(
                    ram.read_u64(Gpa(base + 4)),
                    Err(RamError::Misaligned { .. })
                ),
                "{}",
                fixture.name
            );
            assert!(ram.read_u32(Gpa(base + 2)).is_err());
        }
    }
}

#[test]
fn the_guest_sees_each_word_that_is_written_and_nothing_beside_it() {
    for fixture in all().iter().filter(|fixture| fixture.writable) {
        let Fixture { ram, name, .. } = fixture;
        (fixture.poke)(HIGH + 8, &[0xaa; 32]);
        // One byte differs, several, none, all.
        for value in [0xaaaa_aaaa_aaaa_aa55, 0xff, 0x100, 0x100, u64::MAX, 0] {
            ram.write_u64(Gpa(HIGH + 16), value).unwrap();
            let mut seen = [0; 32];
            (fixture.peek)(HIGH + 8, &mut seen);
            assert_eq!(seen[8..16], value.to_le_bytes(), "{name}");
            assert!(seen[..8]
                .iter()
                .chain(&seen[16..])
                .all(|&byte| byte == 0xaa));
            assert_eq!(ram.read_u64(Gpa(HIGH + 16)).unwrap(), value);
        }
        for value in [0xaaaa_aa00u32, 7, 0x1234_5678] {
            ram.write_u32(Gpa(HIGH + 12), value).unwrap();
            let mut seen = [0; 8];
            (fixture.peek)(HIGH + 8, &mut seen);
            assert_eq!(
                (&seen[..4], &seen[4..]),
                (&[0xaa; 4][..], &value.to_le_bytes()[..])
            );
        }
        assert!(ram.write_u64(Gpa(4), 1).is_err(), "{name}");
        ram.check().unwrap();
    }
}

#[test]
fn bits_are_set_and_cleared_and_nothing_beside_them() {
    const BIT: u32 = 1 << 20;
    for fixture in all().iter().filter(|fixture| fixture.writable) {
        let Fixture { ram, name, .. } = fixture;
        let word = || {
            let mut seen = [0; 12];
            (fixture.peek)(HIGH + 8, &mut seen);
            assert!(seen[..4].iter().chain(&seen[8..]).all(|&byte| byte == 0xaa));
            u32::from_le_bytes(seen[4..8].try_into().unwrap())
        };
        (fixture.poke)(HIGH + 8, &[0xaa; 12]);
        let at = Gpa(HIGH + 12);
        let changed = |mask, set| ram.change_bits(at, mask, set).unwrap();
        assert_eq!((changed(BIT, true), word()), (0xaaaa_aaaa, 0xaaba_aaaa));
        assert_eq!((changed(BIT, true), word()), (0xaaba_aaaa, 0xaaba_aaaa));
        assert_eq!((changed(BIT, false), word()), (0xaaba_aaaa, 0xaaaa_aaaa));
        assert_eq!((changed(0, true), word()), (0xaaaa_aaaa, 0xaaaa_aaaa));
        assert_eq!((changed(0xa0, false), word()), (0xaaaa_aaaa, 0xaaaa_aa0a));

        let wide = ram.change_bits(at, 0x180, true);
        match *name {
            "process" => {
                assert!(matches!(wide, Err(RamError::NotAtomic { .. })), "{wide:?}");
                assert_eq!(word(), 0xaaaa_aa0a);
            }
            _ => assert_eq!((wide.unwrap(), word()), (0xaaaa_aa0a, 0xaaaa_ab8a)),
        }
        assert!(ram.change_bits(Gpa(HIGH + 14), 1, true).is_err(), "{name}");
        assert!(ram.change_bits(Gpa(2 * HIGH), 1, true).is_err(), "{name}");
        ram.check().unwrap();
    }
}

/// As the guest's kernel counts in the word that its ring buffer is switched
/// off by.
#[test]
fn a_bit_of_a_process_is_changed_while_that_counts_in_the_words_other_bytes() {
    #[repr(align(4096))]
    struct Memory([AtomicU32; (2 * PIECE / 4) as usize]);
    static MEMORY: Memory = Memory([const { AtomicU32::new(0) }; _]);
    let start = MEMORY.0.as_ptr().addr() as u64;
    let dir = Path::new("/proc/self");
    let ram = ProcessRam::open(dir, vec![start], Access::ReadWrite, layout(1)).unwrap();
    let (mut rounds, done) = (0u32, AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..10_000 {
                ram.change_bits(Gpa(8), 1 << 20, true).unwrap();
                ram.change_bits(Gpa(8), 1 << 20, false).unwrap();
            }
            done.store(true, Ordering::Release);
        });
        // Up and down, lest the count comes to the switch.
        while !done.load(Ordering::Acquire) {
            rounds = rounds.wrapping_add(1);
            MEMORY.0[2].fetch_add(1 << 24 | 1, Ordering::Relaxed);
            MEMORY.0[2].fetch_sub(1, Ordering::Relaxed);
        }
    });
    let counted = MEMORY.0[2].load(Ordering::Relaxed);
    assert_eq!(counted, rounds << 24);
}

#[test]
fn an_image_is_not_written() {
    for fixture in all().iter().filter(|fixture| !fixture.writable) {
        let refused = |result| matches!(result, Err(RamError::ReadOnly { .. }));
        let bits = fixture.ram.change_bits(Gpa(0x1000), 1, true);
        assert!(refused(bits.map(drop)), "{}", fixture.name);
        assert!(
            refused(fixture.ram.write_u64(Gpa(8), 1)),
            "{}",
            fixture.name
        );
        assert!(
            refused(fixture.ram.write_u32(Gpa(8), 1)),
            "{}",
            fixture.name
        );
        let mut seen = [1; 8];
        (fixture.peek)(8, &mut seen);
        assert_eq!(seen, [0; 8]);
    }
}

#[test]
fn nothing_lies_between_the_pieces_or_after_them() {
    for fixture in all() {
        let ram = &fixture.ram;
        for gpa in [PIECE, HIGH - 8, HIGH + PIECE, u64::MAX - 7] {
            let unmapped = |result| matches!(result, Err(RamError::Unmapped { .. }));
            assert!(
                unmapped(ram.read_u64(Gpa(gpa)).map(drop)),
                "{}",
                fixture.name
            );
            assert!(unmapped(ram.read(Gpa(gpa), &mut [0])), "{}", fixture.name);
            assert!(unmapped(ram.write_u64(Gpa(gpa), 1)), "{}", fixture.name);
        }
        assert!(ram.read(Gpa(PIECE - 4), &mut [0; 8]).is_err());
    }
}

#[test]
fn what_was_never_touched_is_told_and_stays_untouched() {
    for fixture in all() {
        let Fixture { ram, name, .. } = &fixture;
        // An image's headers share a page with the memory's first bytes.
        let first = ram.next_populated(Gpa(PAGE_SIZE));
        assert_eq!(first, None, "{name}");
        (fixture.poke)(HIGH + 5 * PAGE_SIZE + 100, &[1]);
        let found = ram.next_populated(Gpa(PAGE_SIZE)).unwrap();
        // That page, or the one before where the file's pages are others.
        let at = HIGH + 5 * PAGE_SIZE;
        assert!((at - PAGE_SIZE..=at).contains(&found.0), "{name}: {found}");
        let inside = Gpa(at + 100);
        assert_eq!(ram.next_populated(inside), Some(inside), "{name}");
        assert_eq!(ram.next_populated(Gpa(at + 2 * PAGE_SIZE)), None, "{name}");
        assert!(ram.populated(inside, 8), "{name}");
        assert!(!ram.populated(Gpa(at + 2 * PAGE_SIZE), 8), "{name}");
    }
}

#[test]
fn a_process_that_has_ended_reads_as_zeros_and_is_told() {
    // cat waits for us; its stack is memory that it surely has.
    let mut cat = std::process::Command::new("cat")
        .stdin(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let dir = format!("/proc/{}", cat.id());
    let maps = loop {
        let maps = std::fs::read_to_string(format!("{dir}/maps")).unwrap();
        let exe = std::fs::read_link(format!("{dir}/exe")).unwrap();
        if exe.ends_with("cat") && maps.contains("[stack]") {
            break maps;
        }
    };
    let stack = maps.lines().find(|line| line.ends_with("[stack]")).unwrap();
    let (_, end) = stack.split_once(' ').unwrap().0.split_once('-').unwrap();
    let start = u64::from_str_radix(end, 16).unwrap() - PAGE_SIZE;
    let layout = Layout::flat(PAGE_SIZE).unwrap();
    let ram = ProcessRam::open(Path::new(&dir), vec![start], Access::ReadWrite, layout).unwrap();
    let mut page = vec![0; PAGE_SIZE as usize];
    ram.read(Gpa(0), &mut page).unwrap();
    assert!(page.iter().any(|&byte| byte != 0), "an empty stack");
    ram.check().unwrap();
    drop(cat.stdin.take());
    cat.wait().unwrap();
    ram.read(Gpa(0), &mut page).unwrap();
    assert!(page.iter().all(|&byte| byte == 0));
    let told = ram.check().unwrap_err().to_string();
    assert!(told.contains("QEMU has ended"), "{told}");
    ram.write_u64(Gpa(0), 1).unwrap();
    assert_eq!(ram.read_u64(Gpa(0)).unwrap(), 0);
}

/// Makes an image of these bytes and opens it.
fn open_image(bytes: &[u8]) -> Result<ImageRam, RamError> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    ImageRam::open(file.path(), Layout::flat)
}

#[test]
fn an_image_that_cannot_be_read_says_why() {
    let (two, one) = (2 * PAGE_SIZE, PAGE_SIZE);
    let cut = elf_header(&[(0, two, two)]);
    let mut table = elf_header(&[(0, two, two)]);
    table.truncate(80);
    let mut program = elf_header(&[(0, 0, one)]);
    program[16] = 2;
    let mut thirty_two = elf_header(&[]);
    thirty_two[4] = 1;
    let mut odd = elf_header(&[(100, one, one)]);
    odd.resize(odd.len() + one as usize, 0);
    let mut arm = cut.clone();
    arm[18] = 183;
    // Its bytes in the other order, as far as they are looked at.
    let mut big = cut.clone();
    big[5] = 2;
    for at in [16, 18, 54, 56] {
        big.swap(at, at + 1);
    }
    // As gcore has it: no physical addresses.
    let mut core = elf_header(&[(0, one, one), (0, one, one)]);
    core.resize(core.len() + two as usize, 0);
    // So many parts that their number is in a section's header.
    let mut many = elf_header(&[]);
    many[32..40].copy_from_slice(&64u64.to_le_bytes());
    many[40..48].copy_from_slice(&64u64.to_le_bytes());
    many[56..62].copy_from_slice(&[0xff, 0xff, 64, 0, 1, 0]);
    many.resize(128, 0);
    many[64 + 44..64 + 48].copy_from_slice(&5000u32.to_le_bytes());
    many.resize(128 + 5000 * 56, 0);
    for (bytes, says) in [
        (
            cut.as_slice(),
            "cut short: it has 120 bytes, and its headers speak of 8312",
        ),
        (table.as_slice(), "cut short"),
        (program.as_slice(), "no core file"),
        (thirty_two.as_slice(), "no dump of an x86-64 guest"),
        (odd.as_slice(), "is not a whole number of pages"),
        (arm.as_slice(), "another processor"),
        (big.as_slice(), "another processor"),
        (
            core.as_slice(),
            "two parts of the guest's RAM claim guest physical address 0x0. That is so for the \
             core of the QEMU process itself (gcore), and for a dump made with paging=on; make a \
             `virsh dump --memory-only",
        ),
        (many.as_slice(), "has 5000 ranges"),
        (&[0; 5000], "5000 bytes are no whole number of pages"),
        (&[], "empty"),
        (b"KDUMP   \0\0\0\0", "--format elf"),
        (b"LibvirtQemudSave", "saved state"),
    ] {
        let told = open_image(bytes).unwrap_err().to_string();
        assert!(told.contains(says), "{told}");
    }
}

#[test]
fn an_elf_image_with_holes_tells_them() {
    let mut bytes = elf_header(&[
        (0, PAGE_SIZE, 3 * PAGE_SIZE),
        (ABOVE_HOLE, PAGE_SIZE, PAGE_SIZE),
    ]);
    bytes.resize(bytes.len() + 2 * PAGE_SIZE as usize, 7);
    let ram = open_image(&bytes).unwrap();
    assert_eq!(ram.left_out(), [(Gpa(PAGE_SIZE), 2 * PAGE_SIZE)]);
    assert_eq!(ram.read_u32(Gpa(ABOVE_HOLE)).unwrap(), 0x0707_0707);
    let hole = ram.read_u64(Gpa(PAGE_SIZE)).unwrap_err().to_string();
    assert!(
        hole.contains("0x1000") && hole.contains("not RAM"),
        "{hole}"
    );
}

/// A whole part that is missing is a hole too; that between low and high RAM is none,
/// nor what is below 1 MiB, nor what is in front of the firmware or a memory module.
#[test]
fn an_elf_image_without_a_part_tells_it() {
    const MIB: u64 = 1 << 20;
    let parts = [
        (0, PAGE_SIZE, PAGE_SIZE),
        (MIB, PAGE_SIZE, PAGE_SIZE),
        (3 * MIB, PAGE_SIZE, 2 * PAGE_SIZE),
        (0xfffc_0000, PAGE_SIZE, PAGE_SIZE),
        (ABOVE_HOLE, PAGE_SIZE, PAGE_SIZE),
        (2 * ABOVE_HOLE, PAGE_SIZE, PAGE_SIZE),
    ];
    let mut bytes = elf_header(&parts);
    bytes.resize(bytes.len() + parts.len() * PAGE_SIZE as usize, 7);
    let ram = open_image(&bytes).unwrap();
    assert_eq!(
        ram.left_out(),
        [
            (Gpa(MIB + PAGE_SIZE), 2 * MIB - PAGE_SIZE),
            (Gpa(3 * MIB + PAGE_SIZE), PAGE_SIZE)
        ]
    );
}

#[test]
fn an_image_that_shrinks_is_told() {
    let (_dir, path, file) = sparse();
    let ram = ImageRam::open(&path, |_| Ok::<_, LayoutError>(layout(1))).unwrap();
    file.set_len(PAGE_SIZE).unwrap();
    assert_eq!(ram.read_u64(Gpa(HIGH)).unwrap(), 0);
    assert!(matches!(ram.check(), Err(RamError::Gone { .. })));
}

proptest::proptest! {
    /// Whatever the headers say: an answer, and no more memory than asked for.
    #[test]
    fn no_image_panics(
        at in 0usize..300,
        with in proptest::collection::vec(proptest::num::u8::ANY, 1..24),
        gpa in 0u64..(HIGH + PIECE),
    ) {
        let mut bytes = elf_header(&[(0, PAGE_SIZE, PAGE_SIZE), (HIGH, PAGE_SIZE, PAGE_SIZE)]);
        bytes.resize(bytes.len() + 2 * PAGE_SIZE as usize, 7);
        bytes[at..at + with.len()].copy_from_slice(&with);
        if let Ok(ram) = open_image(&bytes) {
            let _ = ram.read(Gpa(gpa), &mut [0; 64]);
            let _ = (ram.next_populated(Gpa(gpa)), ram.read_u64(Gpa(gpa & !7)));
        }
    }
}
