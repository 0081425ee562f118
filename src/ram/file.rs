//! Guest RAM in files that QEMU and we have mapped: libvirt's memory files, and
//! by their descriptors memfds and huge pages, which have no name.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use memmap2::{Advice, MmapOptions, MmapRaw};
use nix::errno::Errno;
use nix::libc;
use nix::sys::statfs::{fstatfs, HUGETLBFS_MAGIC};
use nix::unistd::{lseek64, Whence};

use super::sigbus::Watch;
use super::{volatile, Access, Gpa, GuestRam, Layout, RamError, PAGE_SIZE};

/// Which file it is, whatever name it goes by: to compare what was opened
/// with what `/proc/<qemu>/maps` says QEMU has mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileId {
    /// The device that holds the file (`st_dev`).
    pub dev: u64,
    /// The inode number on it.
    pub ino: u64,
}

/// A memory file that is open but not mapped yet, so that the caller can
/// check [`BackingFile::id`] before anything is read or written.
#[derive(Debug)]
pub struct BackingFile {
    file: File,
    path: PathBuf,
    access: Access,
    id: FileId,
    len: u64,
}

impl BackingFile {
    /// Opens a memory file by its path.
    ///
    /// A symbolic link as the last part of the path is refused, since the
    /// directory belongs to the user that QEMU runs as; the links of
    /// `/proc/PID/fd` and `/proc/PID/map_files`, which the kernel makes, are
    /// followed.
    ///
    /// # Errors
    /// [`RamError::NotFound`], [`RamError::NoPermission`],
    /// [`RamError::NotAFile`], or [`RamError::Io`] for the rest.
    pub fn open(path: &Path, access: Access) -> Result<Self, RamError> {
        let nofollow = if path.starts_with("/proc") {
            0
        } else {
            libc::O_NOFOLLOW
        };
        let file = File::options()
            .read(true)
            .write(access == Access::ReadWrite)
            // Without O_NONBLOCK, opening a pipe would wait for a writer.
            .custom_flags(nofollow | libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(path)
            .map_err(|error| RamError::from_open(path, access, error))?;
        Self::new(file, path, access)
    }

    /// Takes a descriptor that somebody else opened; `path` is what messages
    /// call it.
    ///
    /// # Errors
    /// [`RamError::NotAFile`] if it is not a regular file (a memfd is one).
    pub fn from_fd(fd: OwnedFd, path: &Path, access: Access) -> Result<Self, RamError> {
        Self::new(File::from(fd), path, access)
    }

    fn new(file: File, path: &Path, access: Access) -> Result<Self, RamError> {
        let meta = file.metadata().map_err(|source| RamError::Io {
            path: path.to_path_buf(),
            doing: "examine",
            source,
        })?;
        let kind = meta.file_type();
        if !kind.is_file() {
            let what = match () {
                () if kind.is_dir() => "a directory",
                () if kind.is_fifo() => "a pipe",
                () if kind.is_socket() => "a socket",
                () => "a device",
            };
            return Err(RamError::NotAFile {
                path: path.to_path_buf(),
                what,
            });
        }
        Ok(Self {
            file,
            path: path.to_path_buf(),
            access,
            id: FileId {
                dev: meta.dev(),
                ino: meta.ino(),
            },
            len: meta.len(),
        })
    }

    /// Which file this is.
    pub fn id(&self) -> FileId {
        self.id
    }

    /// Its size in bytes when it was opened.
    pub fn size(&self) -> u64 {
        self.len
    }

    /// The file, and its size.
    pub(super) fn into_file(self) -> (File, u64) {
        (self.file, self.len)
    }
}

/// The size of the file's pages where they are huge ones: it lies on
/// hugetlbfs, or is a memfd with `hugetlb=on`. Such a file has a whole number
/// of them.
fn huge_page(file: &File) -> Option<usize> {
    let found = fstatfs(file).ok()?;
    let size = usize::try_from(found.block_size()).ok()?;
    (found.filesystem_type() == HUGETLBFS_MAGIC && size > 0).then_some(size)
}

/// One mapped file.
///
/// The order of the fields matters: the watch ends before the mapping.
struct Backing {
    watch: Watch,
    map: MmapRaw,
    file: File,
    path: PathBuf,
    writable: bool,
    need: u64,
}

impl Backing {
    fn map(source: BackingFile, need: u64) -> Result<Self, RamError> {
        let BackingFile {
            file,
            path,
            access,
            len,
            ..
        } = source;
        if len < need {
            return Err(RamError::TooShort {
                path,
                have: len,
                need,
            });
        }
        let failed = |path: &Path, source| RamError::Io {
            path: path.to_path_buf(),
            doing: "map",
            source,
        };
        let mut bytes =
            usize::try_from(need).map_err(|error| failed(&path, io::Error::other(error)))?;
        let mut options = MmapOptions::new();
        let huge = huge_page(&file);
        if let Some(page) = huge {
            // A part of a huge page can be mapped, and never unmapped.
            bytes = bytes.next_multiple_of(page);
            // They are QEMU's to reserve; where it has not, neither have we.
            options.no_reserve_swap();
        }
        options.len(bytes);
        let map = match access {
            Access::ReadOnly => options.map_raw_read_only(&file),
            Access::ReadWrite => options.map_raw(&file),
        }
        .map_err(|error| failed(&path, error))?;
        // A core dump of ours should not hold the guest's memory. Best
        // effort: a kernel that refuses changes nothing else.
        let _ = map.advise(Advice::DontDump);
        Ok(Self {
            watch: Watch::new(map.as_ptr(), bytes, huge.unwrap_or(PAGE_SIZE as usize)),
            map,
            file,
            path,
            writable: access == Access::ReadWrite,
            need,
        })
    }

    fn check(&self) -> Result<(), RamError> {
        let shrunk = || {
            !self
                .file
                .metadata()
                .is_ok_and(|meta| meta.len() >= self.need)
        };
        if self.watch.lost() || shrunk() {
            return Err(RamError::Gone {
                path: self.path.clone(),
            });
        }
        Ok(())
    }

    /// The first offset in `[from, end)` of the file that is no hole.
    ///
    /// Only `SEEK_DATA`, never `SEEK_HOLE`: that would walk all pages of a
    /// populated file, which for a large guest takes seconds.
    fn next_populated(&self, from: u64, end: u64) -> Option<u64> {
        // Offsets of a file that is mapped fit. The file offset that this
        // moves is used by nobody.
        let at = match lseek64(&self.file, i64::try_from(from).ok()?, Whence::SeekData) {
            Ok(at) => u64::try_from(at).ok()?.max(from),
            Err(Errno::ENXIO) => return None,
            // A file system that cannot tell: everything may be data.
            Err(_) => from,
        };
        (at < end).then_some(at)
    }
}

/// Guest RAM in mapped files, shared with whoever else has them mapped.
pub struct FileRam {
    layout: Layout,
    backings: Vec<Backing>,
}

impl FileRam {
    /// Maps the files, one for each backing of the layout, in its order.
    ///
    /// # Errors
    /// [`RamError::BackingCount`], [`RamError::TooShort`] for a truncated
    /// file, or [`RamError::Io`] if the system cannot map it.
    pub fn map(files: Vec<BackingFile>, layout: Layout) -> Result<Self, RamError> {
        if files.len() != layout.backings() {
            return Err(RamError::BackingCount {
                have: files.len(),
                need: layout.backings(),
            });
        }
        let backings = files
            .into_iter()
            .enumerate()
            .map(|(i, file)| Backing::map(file, layout.needs(i)))
            .collect::<Result<_, _>>()?;
        Ok(Self { layout, backings })
    }

    /// Opens and maps one file that holds all of the guest's RAM.
    ///
    /// # Errors
    /// Those of [`BackingFile::open`] and [`FileRam::map`].
    pub fn open(path: &Path, access: Access, layout: Layout) -> Result<Self, RamError> {
        Self::map(vec![BackingFile::open(path, access)?], layout)
    }

    /// The address of an aligned word of `size` bytes, and its backing.
    fn word(&self, gpa: Gpa, size: u64) -> Result<(&Backing, usize), RamError> {
        if !gpa.is_aligned(size) {
            return Err(RamError::Misaligned { gpa, align: size });
        }
        let place = self.layout.resolve(gpa, size)?;
        // Both in range: `resolve` vouches for the backing, whose mapping has
        // all the bytes that the layout needs, and was sized as a `usize`.
        Ok((&self.backings[place.backing], place.offset.0 as usize))
    }

    /// Like [`FileRam::word`], for writing.
    fn writable_word(&self, gpa: Gpa, size: u64) -> Result<*mut u8, RamError> {
        let (backing, offset) = self.word(gpa, size)?;
        if !backing.writable {
            return Err(RamError::ReadOnly { gpa });
        }
        Ok(backing.map.as_mut_ptr().wrapping_add(offset))
    }
}

impl GuestRam for FileRam {
    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn read(&self, gpa: Gpa, buf: &mut [u8]) -> Result<(), RamError> {
        self.layout.pieces(gpa, buf, |place, part| {
            let map = &self.backings[place.backing].map;
            let src = map.as_ptr().wrapping_add(place.offset.0 as usize);
            // SAFETY: the layout places all of `part` inside what the backing
            // needs, and the mapping, alive as long as `self`, has at least
            // that length. `part` is memory of our own.
            unsafe { volatile::copy(src, part) };
        })
    }

    fn read_u64(&self, gpa: Gpa) -> Result<u64, RamError> {
        let (backing, offset) = self.word(gpa, 8)?;
        let src = backing.map.as_ptr().wrapping_add(offset);
        // SAFETY: `word` vouches for 8 bytes inside the mapping; the mapping
        // and the layout's ranges begin on pages, so an aligned GPA is an
        // aligned pointer.
        Ok(u64::from_le(unsafe { volatile::load_u64(src) }))
    }

    fn read_u32(&self, gpa: Gpa) -> Result<u32, RamError> {
        let (backing, offset) = self.word(gpa, 4)?;
        let src = backing.map.as_ptr().wrapping_add(offset);
        // SAFETY: as in `read_u64`, with 4 bytes.
        Ok(u32::from_le(unsafe { volatile::load_u32(src) }))
    }

    fn write_u64(&self, gpa: Gpa, value: u64) -> Result<(), RamError> {
        let dst = self.writable_word(gpa, 8)?;
        // SAFETY: as in `read_u64`, and the mapping is writable.
        unsafe { volatile::store_u64(dst, value.to_le()) };
        Ok(())
    }

    fn write_u32(&self, gpa: Gpa, value: u32) -> Result<(), RamError> {
        let dst = self.writable_word(gpa, 4)?;
        // SAFETY: as in `read_u64`, with 4 bytes, and the mapping is writable.
        unsafe { volatile::store_u32(dst, value.to_le()) };
        Ok(())
    }

    fn change_bits(&self, gpa: Gpa, mask: u32, set: bool) -> Result<u32, RamError> {
        let dst = self.writable_word(gpa, 4)?;
        // SAFETY: as in `read_u64`, with 4 bytes, and the mapping is writable.
        let old = unsafe { volatile::change_bits(dst, mask.to_le(), set) };
        Ok(u32::from_le(old))
    }

    fn next_populated(&self, gpa: Gpa) -> Option<Gpa> {
        self.layout.next_populated(gpa, |backing, from, end| {
            self.backings[backing].next_populated(from, end)
        })
    }

    fn check(&self) -> Result<(), RamError> {
        self.backings.iter().try_for_each(Backing::check)
    }
}
