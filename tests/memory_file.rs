//! Guest RAM in real files: sharing, holes, truncation, and what is refused.

use std::fs::{self, File};
use std::os::unix::fs::{symlink, FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use tempfile::TempDir;
use xftrace::ram::{
    Access, BackingFile, FileRam, Gpa, GuestRam, Layout, MachineKind, RamError, RamOffset, Range,
};

const MIB: u64 = 1 << 20;

/// A directory with one sparse memory file of the given size.
fn memory_file(size: u64) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("pc.ram");
    let file = File::create(&path).expect("a memory file");
    file.set_len(size).expect("room for the memory file");
    (dir, path)
}

fn open(path: &Path, size: u64) -> Result<FileRam, RamError> {
    FileRam::open(
        path,
        Access::ReadWrite,
        Layout::flat(size).expect("a layout"),
    )
}

#[test]
fn what_one_side_writes_the_other_reads() {
    let (_dir, path) = memory_file(2 * MIB);
    let (ours, qemu) = (open(&path, 2 * MIB).unwrap(), open(&path, 2 * MIB).unwrap());
    qemu.write_u64(Gpa(0x1008), 0x1122_3344_5566_7788).unwrap();
    assert_eq!(ours.read_u64(Gpa(0x1008)).unwrap(), 0x1122_3344_5566_7788);
    ours.write_u32(Gpa(0x100c), 0xaabb_ccdd).unwrap();
    let mut bytes = [0; 10];
    qemu.read(Gpa(0x1007), &mut bytes).unwrap();
    assert_eq!(
        bytes,
        [0, 0x88, 0x77, 0x66, 0x55, 0xdd, 0xcc, 0xbb, 0xaa, 0]
    );
    assert_eq!(qemu.read_u32(Gpa(0x100c)).unwrap(), 0xaabb_ccdd);
}

#[test]
fn bits_are_changed_without_losing_what_the_other_side_changes() {
    let (_dir, path) = memory_file(2 * MIB);
    let (ours, qemu) = (open(&path, 2 * MIB).unwrap(), open(&path, 2 * MIB).unwrap());
    let start = std::sync::Arc::new(std::sync::Barrier::new(2));
    let flips = |ram: FileRam, mask| {
        let start = std::sync::Arc::clone(&start);
        std::thread::spawn(move || {
            start.wait();
            for _ in 0..1_000_000 {
                assert_eq!(ram.change_bits(Gpa(8), mask, true).unwrap() & mask, 0);
                assert_eq!(ram.change_bits(Gpa(8), mask, false).unwrap() & mask, mask);
            }
        })
    };
    let both = [flips(ours, 1 << 20), flips(qemu, 1)];
    for side in both {
        side.join().expect("no change of the other side was lost");
    }
    let look = open(&path, 2 * MIB).unwrap();
    assert_eq!(look.read_u32(Gpa(8)).unwrap(), 0);
    assert!(matches!(
        look.change_bits(Gpa(6), 1, true),
        Err(RamError::Misaligned { .. })
    ));
}

#[test]
fn ram_above_the_hole_lies_at_the_split_in_the_file() {
    let size = 3 << 30;
    let (_dir, path) = memory_file(size);
    let layout = Layout::pc(size, MachineKind::Q35).unwrap();
    let ram = FileRam::open(&path, Access::ReadWrite, layout).unwrap();
    ram.write_u64(Gpa(4 << 30), 7).unwrap();
    let mut bytes = [0; 8];
    File::open(&path)
        .unwrap()
        .read_exact_at(&mut bytes, 2 << 30)
        .unwrap();
    assert_eq!(u64::from_le_bytes(bytes), 7);
    assert!(matches!(
        ram.read_u64(Gpa(2 << 30)),
        Err(RamError::Unmapped { .. })
    ));
    assert!(ram.read(Gpa((2 << 30) - 4), &mut [0; 8]).is_err());
}

#[test]
fn a_read_crosses_from_one_file_into_the_next() {
    let (_a, first) = memory_file(MIB);
    let (_b, second) = memory_file(MIB);
    let files = [&first, &second].map(|path| BackingFile::open(path, Access::ReadWrite).unwrap());
    let layout = Layout::pc_nodes(&[MIB, MIB], MachineKind::I440fx, None).unwrap();
    let ram = FileRam::map(files.into(), layout).unwrap();
    File::options()
        .write(true)
        .open(&first)
        .unwrap()
        .write_at(b"end", MIB - 3)
        .unwrap();
    File::options()
        .write(true)
        .open(&second)
        .unwrap()
        .write_at(b"start", 0)
        .unwrap();
    let mut bytes = [0; 8];
    ram.read(Gpa(MIB - 3), &mut bytes).unwrap();
    assert_eq!(&bytes, b"endstart");
}

#[test]
fn asking_for_holes_allocates_nothing() {
    let (_dir, path) = memory_file(64 * MIB);
    let ram = open(&path, 64 * MIB).unwrap();
    assert_eq!(ram.next_populated(Gpa(0)), None);
    ram.write_u64(Gpa(16 * MIB), 1).unwrap();
    let start = ram.next_populated(Gpa(0)).unwrap();
    // The page itself, or the start of a huge one.
    assert!((14 * MIB..=16 * MIB).contains(&start.0), "{start}");
    assert_eq!(
        ram.next_populated(Gpa(16 * MIB + 5)),
        Some(Gpa(16 * MIB + 5))
    );
    assert_eq!(ram.next_populated(Gpa(32 * MIB)), None);
    assert!(ram.populated(Gpa(16 * MIB), 8));
    assert!(!ram.populated(Gpa(32 * MIB), 8));
    assert!(!ram.populated(Gpa(64 * MIB - 8), 16));
    // At most the one block that the write allocated.
    assert!(fs::metadata(&path).unwrap().blocks() * 512 <= 2 * MIB);
}

#[test]
fn what_is_populated_is_told_by_guest_address() {
    let (_dir, path) = memory_file(MIB);
    let half = vec![1; MIB as usize / 2];
    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .write_at(&half, 0)
        .unwrap();
    let range = |gpa, offset| Range {
        gpa: Gpa(gpa),
        len: MIB / 2,
        backing: 0,
        offset: RamOffset(offset),
    };
    // The half with data lies above the half that is a hole.
    let layout = Layout::new(vec![range(0, MIB / 2), range(4 * MIB, 0)]).unwrap();
    let ram = FileRam::open(&path, Access::ReadOnly, layout).unwrap();
    assert_eq!(ram.next_populated(Gpa(0x3000)), Some(Gpa(4 * MIB)));
    assert_eq!(ram.next_populated(Gpa(4 * MIB + 3)), Some(Gpa(4 * MIB + 3)));
    assert_eq!(ram.next_populated(Gpa(5 * MIB)), None);
}

#[test]
fn a_file_truncated_under_the_mapping_reads_as_zeros_and_is_told() {
    let (_dir, path) = memory_file(2 * MIB);
    let ram = open(&path, 2 * MIB).unwrap();
    ram.write_u64(Gpa(MIB), 7).unwrap();
    ram.check().unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    file.set_len(0x1000).unwrap();
    // Told by the size alone, before anything faults.
    assert!(matches!(ram.check(), Err(RamError::Gone { .. })));
    assert_eq!(ram.read_u64(Gpa(MIB)).unwrap(), 0);
    ram.write_u64(Gpa(MIB), 9).unwrap();
    let mut bytes = vec![1; 0x3000];
    ram.read(Gpa(0x5000), &mut bytes).unwrap();
    assert!(bytes.iter().all(|&byte| byte == 0));
    // Told still when the size looks right again: the content is lost.
    file.set_len(2 * MIB).unwrap();
    let told = ram.check().unwrap_err().to_string();
    assert!(
        told.contains("pc.ram") && told.contains("truncated"),
        "{told}"
    );
}

#[test]
fn a_file_shorter_than_the_layout_is_refused_with_both_sizes() {
    let (_dir, path) = memory_file(2 * MIB - 4096);
    let told = open(&path, 2 * MIB).err().expect("refused").to_string();
    for part in ["truncated", "pc.ram", "2093056", "2097152"] {
        assert!(told.contains(part), "{told}");
    }
}

#[test]
fn an_image_opened_to_read_is_not_written() {
    let (_dir, path) = memory_file(MIB);
    let ram = FileRam::open(&path, Access::ReadOnly, Layout::flat(MIB).unwrap()).unwrap();
    assert!(matches!(
        ram.write_u64(Gpa(0), 1),
        Err(RamError::ReadOnly { .. })
    ));
    assert!(matches!(
        ram.write_u32(Gpa(0), 1),
        Err(RamError::ReadOnly { .. })
    ));
    assert_eq!(ram.layout().total(), MIB);
    assert!(matches!(
        ram.read_u64(Gpa(4)),
        Err(RamError::Misaligned { .. })
    ));
    assert!(matches!(
        ram.read_u64(Gpa(MIB)),
        Err(RamError::Unmapped { .. })
    ));
}

#[test]
fn what_is_no_memory_file_is_refused_without_waiting() {
    let (dir, path) = memory_file(MIB);
    let refused = |path: &Path, access| BackingFile::open(path, access).expect_err("refused");
    let told = refused(dir.path(), Access::ReadOnly).to_string();
    assert!(told.contains("a directory"), "{told}");
    let told = refused(dir.path(), Access::ReadWrite).to_string();
    assert!(told.contains("a directory"), "{told}");

    let pipe = dir.path().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let told = refused(&pipe, Access::ReadOnly).to_string();
    assert!(told.contains("a pipe"), "{told}");

    let told = refused(Path::new("/dev/null"), Access::ReadOnly).to_string();
    assert!(told.contains("a device"), "{told}");

    let link = dir.path().join("link");
    symlink(&path, &link).unwrap();
    let told = refused(&link, Access::ReadWrite).to_string();
    assert!(told.contains("a symbolic link"), "{told}");

    let missing = refused(&dir.path().join("none"), Access::ReadWrite);
    assert!(matches!(missing, RamError::NotFound { .. }));
}

#[test]
fn a_file_is_the_same_by_any_name() {
    let (_dir, path) = memory_file(MIB);
    let by_path = BackingFile::open(&path, Access::ReadOnly).unwrap();
    let held = File::open(&path).unwrap();
    let fd = std::os::fd::AsRawFd::as_raw_fd(&held);
    let link = PathBuf::from(format!("/proc/self/fd/{fd}"));
    let by_link = BackingFile::open(&link, Access::ReadWrite).unwrap();
    let by_fd = BackingFile::from_fd(held.into(), &path, Access::ReadOnly).unwrap();
    assert_eq!(by_path.id(), by_link.id());
    assert_eq!(by_path.id(), by_fd.id());
    assert_eq!(by_fd.size(), MIB);
}

#[test]
fn the_number_of_files_must_be_the_layouts() {
    let (_dir, path) = memory_file(MIB);
    let file = BackingFile::open(&path, Access::ReadOnly).unwrap();
    let layout = Layout::pc_nodes(&[MIB, MIB], MachineKind::Q35, None).unwrap();
    let refused = FileRam::map(vec![file], layout).err().expect("refused");
    assert!(matches!(
        refused,
        RamError::BackingCount { have: 1, need: 2 }
    ));
}
