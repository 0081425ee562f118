//! Small kernels made here, in every form that people have them in.

use std::io::{Cursor, Read, Write};
use std::time::Duration;

use nix::time::ClockId;
use proptest::prelude::*;

use super::kallsyms::tests::{image, styles, symbols, Style, BASE};
use super::kallsyms::Entry;
use super::unpack::Compression;
use super::*;
use crate::kernel::Gva;

const BANNER: &str = "Linux version 6.1.0-test (a@b) (cc) #1 SMP";
const BUILD_ID: [u8; 20] = [0x5a; 20];

/// What every kernel here has besides functions.
fn marks() -> Vec<Entry> {
    let at = |offset, kind, name: &str| (BASE + offset, kind, name.to_owned());
    vec![
        at(0x10_0000, b'T', "_stext"),
        at(0x20_0000, b'T', "_etext"),
        at(0x20_1000, b'D', "linux_banner"),
    ]
}

/// An ELF file: a segment at the base with the banner, a kernel's tables
/// behind it, and a note with the build id. No sections, as nothing needs them.
fn elf(style: Style) -> Vec<u8> {
    let mut all = symbols(style);
    all.retain(|(_, _, name)| name != "_text");
    all.push((BASE, b'T', "_text".to_owned()));
    all.extend(marks());
    all.sort_by_key(|symbol| symbol.0);
    let mut data = vec![0; 0x20_1000];
    data.extend(BANNER.bytes().chain(*b"\n\0"));
    data.resize(0x20_2000, 0);
    let tables = image(&all, style, 0);
    data.extend(tables);

    let mut note = Vec::new();
    for word in [4u32, 20, 3] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"GNU\0");
    note.extend(BUILD_ID);
    let head = 64 + 2 * 56;
    let header = |kind: u32, at: usize, address: u64, len: usize| {
        let mut header = Vec::new();
        header.extend(kind.to_le_bytes());
        header.extend(5u32.to_le_bytes());
        for word in [at as u64, address, 0, len as u64, len as u64, 8] {
            header.extend(word.to_le_bytes());
        }
        header
    };
    let data_at = (head + note.len()).next_multiple_of(8);
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for word in [BASE, 64, 0] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 2, 64, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    elf.extend(header(1, data_at, BASE, data.len()));
    elf.extend(header(4, head, 0, note.len()));
    elf.extend(note);
    elf.resize(data_at, 0);
    elf.extend(data);
    elf
}

/// As the kernel's build packs it, but for the four bytes of size.
fn pack(bytes: &[u8], compression: Compression) -> Vec<u8> {
    match compression {
        Compression::Gzip => {
            let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            out.write_all(bytes).unwrap();
            out.finish().unwrap()
        }
        Compression::Xz => {
            let mut options = lzma_rust2::XzOptions::with_preset(0);
            // As scripts/xz_wrap.sh has it for x86.
            options.prepend_pre_filter(lzma_rust2::FilterType::BcjX86, 0);
            let mut out = lzma_rust2::XzWriter::new(Vec::new(), options).unwrap();
            out.write_all(bytes).unwrap();
            out.finish().unwrap()
        }
        Compression::Lzma => {
            let options = lzma_rust2::LzmaOptions::with_preset(0);
            let mut out =
                lzma_rust2::LzmaWriter::new_use_header(Vec::new(), &options, None).unwrap();
            out.write_all(bytes).unwrap();
            out.finish().unwrap()
        }
        Compression::Bzip2 => {
            let mut out = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
            out.write_all(bytes).unwrap();
            out.finish().unwrap()
        }
        Compression::Lz4 => {
            let mut out = 0x184c_2102u32.to_le_bytes().to_vec();
            for block in bytes.chunks(1 << 20) {
                let block = lz4_flex::block::compress(block);
                out.extend((block.len() as u32).to_le_bytes());
                out.extend(block);
            }
            out
        }
        Compression::Zstd => {
            use ruzstd::encoding::{compress_to_vec, CompressionLevel};
            let mut out = compress_to_vec(bytes, CompressionLevel::Fastest);
            assert_eq!(out[4] & 0x20, 0, "has a window");
            // What `zstd -22 --ultra` says where it does not know the size.
            out[5] = 17 << 3;
            out
        }
    }
}

const ALL: [Compression; 6] = [
    Compression::Gzip,
    Compression::Xz,
    Compression::Lzma,
    Compression::Bzip2,
    Compression::Lz4,
    Compression::Zstd,
];

/// A boot image with this payload.
fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut out = vec![0; 3 * 512 + 0x40];
    out[0x1f1] = 2;
    out[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    out[0x202..0x206].copy_from_slice(b"HdrS");
    out[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
    out[0x248..0x24c].copy_from_slice(&0x40u32.to_le_bytes());
    out[0x24c..0x250].copy_from_slice(&(payload.len() as u32 + 4).to_le_bytes());
    out.extend(payload);
    out.extend([0x00, 0x00, 0x20, 0x00]);
    out.extend(b"the rest");
    out
}

fn any_style() -> Style {
    styles().last().unwrap()
}

fn check(known: &Known) {
    assert_eq!(known.banner.as_deref(), Some(BANNER));
    assert_eq!(known.build_id, Some("5a".repeat(20)));
    assert_eq!(known.kind, Kind::Kallsyms);
    let address = |name| known.symbols.address(name);
    assert_eq!(address("sys_function_7"), Some(Gva(BASE + 7 * 16)));
    // Where the kernel's own list is, for comparing it with a guest's.
    for name in [
        "kallsyms_num_syms",
        "kallsyms_offsets",
        "kallsyms_relative_base",
    ] {
        let at = address(name).unwrap_or_else(|| panic!("no {name}"));
        assert!(at > Gva(BASE + 0x20_2000 - 1), "{name} at {at}");
    }
}

#[test]
fn a_boot_image_is_read_in_every_compression() {
    let elf = elf(any_style());
    check(&Known::parse(elf.clone()).unwrap());
    check(&Known::parse(bzimage(&elf)).unwrap());
    for compression in ALL {
        let packed = pack(&elf, compression);
        assert_eq!(Compression::of(&packed), Some(compression));
        let known = Known::parse(bzimage(&packed));
        check(&known.unwrap_or_else(|fault| panic!("{compression:?}: {fault}")));
        // And the same file packed alone.
        check(&Known::parse(packed).unwrap());
    }
}

#[test]
fn a_package_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let deb = dir.path().join("any name");
    let image = bzimage(&pack(&elf(any_style()), Compression::Gzip));
    let files: [(&str, &[u8]); 1] = [("./boot/vmlinuz-6.1.0-test", &image)];
    std::fs::write(&deb, package::tests::package(&files)).unwrap();
    check(&Known::load(&deb).unwrap());
}

#[test]
fn what_unpacks_to_more_than_it_may_is_refused() {
    let bomb = vec![0; 3 << 20];
    for compression in ALL {
        let packed = pack(&bomb, compression);
        let error = compression.unpack(&packed, 1 << 20).expect_err("refused");
        assert_eq!(
            error.kind(),
            std::io::ErrorKind::FileTooLarge,
            "{compression:?}"
        );
        assert_eq!(compression.unpack(&packed, 3 << 20).unwrap().len(), 3 << 20);
        // Nor does a stream's reader take more than is asked for.
        let mut some = Vec::new();
        let reader = compression.reader(Cursor::new(packed), 3 << 20).unwrap();
        reader.take(1000).read_to_end(&mut some).unwrap();
        assert_eq!(some.len(), 1000);
    }
}

#[test]
fn each_wrong_file_has_its_message() {
    let mut arm = elf(any_style());
    arm[18] = 183;
    let stripped = {
        let mut elf = elf(any_style());
        elf.truncate(0x20_1000);
        elf
    };
    let packed = pack(&elf(any_style()), Compression::Gzip);
    let mut lzo = bzimage(&packed);
    lzo[3 * 512 + 0x40] ^= 1;
    let mut damaged = bzimage(&packed);
    damaged[3 * 512 + 0x40 + 2000] ^= 0xff;
    let short = bzimage(&packed)[..5000].to_vec();
    let mut old = bzimage(&packed);
    old[0x206] = 7;
    old[0x207] = 2;
    let stub = b"ffffffffffffffff B The real System.map is in the \
        linux-image-6.1.0-44-cloud-amd64-dbg package\n";
    for (bytes, expected) in [
        (arm, "not for x86-64"),
        (stripped, "kallsyms"),
        (lzo, "not known here"),
        (damaged, "cannot be unpacked"),
        (short, "cut short"),
        (old, "2.6.26"),
        (stub.to_vec(), "vmlinuz"),
        (b"\x7fELF".to_vec(), "cannot be read"),
        (b"".to_vec(), "empty"),
        (b"XFSYMS\r\n".to_vec(), "damaged"),
    ] {
        let told = Known::parse(bytes).expect_err(expected).to_string();
        assert!(told.contains(expected), "{told:?} lacks {expected:?}");
    }
}

#[test]
fn the_store_keeps_lists_and_removes() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::at(&dir.path().join("not/there/yet"));
    assert!(store.list().unwrap().0.is_empty());
    let file = dir.path().join("vmlinux");
    std::fs::write(&file, elf(any_style())).unwrap();
    let (stored, added) = store.add(&file).unwrap();
    assert_eq!(
        (stored.id.as_str(), added),
        ("5a".repeat(20).as_str(), Added::New)
    );
    assert_eq!(stored.head.release(), Some("6.1.0-test"));
    assert_eq!(store.add(&file).unwrap().1, Added::Replaced);
    check(&Known::load(&stored.path).unwrap());

    // One whose file tells no build id.
    let map = dir.path().join("System.map");
    let line =
        |(address, kind, name): &Entry| format!("{address:x} {} {name}\n", char::from(*kind));
    let mut text: String = marks().iter().map(line).collect();
    text.push_str(&format!("{BASE:x} T _text\n"));
    std::fs::write(&map, &text).unwrap();
    let (second, _) = store.add(&map).unwrap();
    assert_eq!(
        (second.head.banner_offset, second.head.release()),
        (Some(0x20_1000), None)
    );
    assert_eq!(store.list().unwrap().0.len(), 2);

    assert!(store.remove("").is_err() && store.remove("x").is_err());
    assert_eq!(store.remove(&second.id[..4]).unwrap(), second.id);
    assert_eq!(store.list().unwrap().0, std::slice::from_ref(&stored));

    // A damaged one is told of, and can still be removed.
    let mut bytes = std::fs::read(&stored.path).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&stored.path, &bytes).unwrap();
    assert!(Known::load(&stored.path)
        .unwrap_err()
        .to_string()
        .contains("damaged"));
    bytes[30] ^= 1;
    std::fs::write(&stored.path, &bytes).unwrap();
    let (kernels, faults) = store.list().unwrap();
    assert!(kernels.is_empty() && faults.len() == 1);
    store.remove(&stored.id).unwrap();
    // Nothing else is left, no temporary file either.
    let left = std::fs::read_dir(dir.path().join("not/there/yet")).unwrap();
    assert_eq!(left.count(), 0);
}

/// An index as a vmlinux gives it, or what a vmlinuz does, of one kernel.
#[test]
fn what_is_known_is_not_replaced_by_less_or_by_another_kernel() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::at(&dir.path().join("store"));
    let file = dir.path().join("file");
    let add = |kind: Kind, banner: Option<&str>| {
        let mut known = Known::parse(elf(any_style())).unwrap();
        known.kind = kind;
        known.banner = banner.map(str::to_owned);
        let head = Head::new(&known, "a file");
        std::fs::write(&file, index::write(&known, &head)).unwrap();
        store
            .add(&file)
            .map(|(stored, added)| (stored.head.kind, added))
    };
    let ours = Some(BANNER);
    assert_eq!(
        add(Kind::Kallsyms, ours).unwrap(),
        (Kind::Kallsyms, Added::New)
    );
    assert_eq!(
        add(Kind::Kallsyms, ours).unwrap(),
        (Kind::Kallsyms, Added::Replaced)
    );
    assert_eq!(
        add(Kind::Vmlinux, ours).unwrap(),
        (Kind::Vmlinux, Added::Replaced)
    );
    assert_eq!(
        add(Kind::Kallsyms, ours).unwrap(),
        (Kind::Vmlinux, Added::KeptRicher)
    );
    assert_eq!(
        add(Kind::Vmlinux, ours).unwrap(),
        (Kind::Vmlinux, Added::Replaced)
    );

    let told = add(Kind::Vmlinux, Some("Linux version 5.10 other"))
        .unwrap_err()
        .to_string();
    let id = "5a".repeat(20);
    assert!(told.contains(&format!("symbols remove {id}")), "{told}");
    assert_eq!(store.list().unwrap().0[0].head.banner.as_deref(), ours);

    // One that is damaged is worth nothing.
    let stored = &store.list().unwrap().0[0];
    let mut bytes = std::fs::read(&stored.path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&stored.path, &bytes).unwrap();
    assert_eq!(
        add(Kind::Kallsyms, ours).unwrap(),
        (Kind::Kallsyms, Added::Replaced)
    );
}

#[test]
fn everybody_can_read_an_index_and_nothing_is_left_of_a_crash() {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("vmlinux");
    std::fs::write(&file, elf(any_style())).unwrap();
    let there = dir.path().join("store");
    std::fs::create_dir(&there).unwrap();
    let [old, new, other] = [".adding-a", ".adding-b", "System.map"].map(|name| there.join(name));
    let hour = Duration::from_secs(60 * 60);
    for (path, age) in [(&old, 2 * hour), (&new, hour / 2), (&other, 2 * hour)] {
        let file = std::fs::File::create(path).unwrap();
        file.set_modified(std::time::SystemTime::now() - age)
            .unwrap();
    }
    let (stored, _) = Store::at(&there).add(&file).unwrap();
    let mode = std::fs::metadata(&stored.path)
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o7777, 0o644);
    assert!(!old.exists() && new.exists() && other.exists());
}

/// Whoever can write an index can get its checksums right.
#[test]
fn an_index_that_lies_of_itself_is_refused() {
    let known = Known::parse(elf(any_style())).unwrap();
    let good = Head::new(&known, "/boot/vmlinux");
    let dir = tempfile::tempdir().unwrap();
    let store = Store::at(&dir.path().join("store"));
    let file = dir.path().join("index");
    let add = |head: &Head| {
        std::fs::write(&file, index::write(&known, head)).unwrap();
        store.add(&file)
    };
    let with = |change: &dyn Fn(&mut Head)| {
        let mut head = good.clone();
        change(&mut head);
        head
    };
    let id = |id: &str| with(&|head| head.build_id = Some(id.to_owned()));
    let outside = dir.path().join("outside");
    for bad in [
        id(""),
        id("../outside"),
        id(outside.to_str().unwrap()),
        id("5A5A"),
        id("5a5"),
        id(&"5a".repeat(65)),
        with(&|head| head.banner = Some("Linux version 6.1\x1b[2J".to_owned())),
        with(&|head| head.banner = Some("Linux version 6.1\nerror: x".to_owned())),
        with(&|head| head.banner = Some("L".repeat(2000))),
        with(&|head| head.origin = "/boot/\u{202e}x".to_owned()),
    ] {
        let told = add(&bad).expect_err("refused").to_string();
        assert!(told.contains("damaged"), "{bad:?}: {told}");
    }
    let mut left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().flatten().collect();
    left.retain(|entry| entry.file_name() != "index");
    assert!(left.is_empty(), "{left:?}");

    // What is written here passes, whatever the file was called.
    add(&Head::new(&known, "/\x1b[2J/\u{fc}\n\\")).unwrap();
    let (stored, _) = store.list().unwrap();
    assert_eq!(stored.len(), 1);
}

/// An index of a large kernel is read faster than its System.map. How fast, is for
/// tests/large_symbols.rs.
#[test]
fn an_index_of_400_000_symbols_loads_faster_than_its_map() {
    let mut text: String = marks()
        .iter()
        .map(|(address, kind, name)| format!("{address:x} {} {name}\n", char::from(*kind)))
        .collect();
    text = format!("{BASE:x} T _text\n{text}").replace("81200000", "91200000");
    for i in 0..400_000u64 {
        text.push_str(&format!(
            "{:x} t some_function_number_{i}\n",
            BASE + 0x20_2000 + i * 16
        ));
    }
    let known = Known::parse(text.clone().into()).unwrap();
    let head = Head::new(&known, "a file");
    let bytes = index::write(&known, &head);
    // Of this thread alone, so that others on the machine do not matter.
    let cpu_time = || -> Duration {
        let now = ClockId::CLOCK_THREAD_CPUTIME_ID.now();
        now.unwrap().into()
    };
    let best = |run: &dyn Fn()| {
        let time = |_| {
            let start = cpu_time();
            run();
            cpu_time() - start
        };
        (0..3).map(time).min().unwrap()
    };
    let whole = best(&|| drop(index::read(&bytes).unwrap()));
    let glance = best(&|| drop(Head::read(&bytes[..]).unwrap()));
    println!("an index of 400,000 symbols: {whole:?}, its head: {glance:?}");
    let lines = best(&|| drop(Known::parse(text.clone().into()).unwrap()));
    assert!(
        whole < lines,
        "the index takes {whole:?}, its System.map {lines:?}"
    );
    assert!(
        glance * 20 < whole,
        "the head takes {glance:?}, all of it {whole:?}"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever is done to a file, it gives symbols or a fault.
    #[test]
    fn mutated_files_never_panic(
        form in 0usize..4,
        compression in 0usize..6,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        early: bool,
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        // Made once: mutating is what takes the time here.
        static KERNELS: std::sync::LazyLock<Vec<Vec<u8>>> = std::sync::LazyLock::new(|| {
            let elf = elf(any_style());
            let mut all: Vec<Vec<u8>> =
                ALL.iter().map(|&compression| bzimage(&pack(&elf, compression))).collect();
            let known = Known::parse(elf.clone()).unwrap();
            let head = Head::new(&known, "a file");
            all.push(index::write(&known, &head));
            all.push(package::tests::package(&[("./boot/vmlinuz-6", &all[0])]));
            all.push(elf);
            all
        });
        let mut bytes = KERNELS[if form == 0 { compression } else { 5 + form }].clone();
        let within = if early { bytes.len().min(2048) } else { bytes.len() };
        for (at, byte) in changes {
            let at = at.index(within);
            bytes[at] = byte;
        }
        if let Some(cut) = cut {
            let len = cut.index(bytes.len());
            bytes.truncate(len);
        }
        let _ = package::kernel(&bytes[..]);
        let _ = Head::read(&bytes[..]);
        if let Ok(known) = Known::parse(bytes) {
            let _ = Head::new(&known, "a file");
            let _ = known.symbols.lookup(Gva(BASE + 100));
        }
    }
}
