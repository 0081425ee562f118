//! Guest RAM in a saved image: read only, and nobody changes it.
//!
//! Two forms. An ELF core as `virsh dump --memory-only` and QEMU's
//! `dump-guest-memory` write it, whose `PT_LOAD` headers say which guest
//! physical addresses lie where in the file (`write_elf64_loads`,
//! dump/dump.c); and a raw copy of the memory, which says nothing, so that the
//! caller brings the layout.
//!
//! An image comes from anywhere and its headers are not to be trusted: they
//! are parsed by the `object` crate and checked against the file's size.
//! Everything is read with `pread`, so that an image that shrinks costs an
//! error and no fault.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::unistd::{lseek64, Whence};
use object::elf::{FileHeader64, EM_X86_64, ET_CORE, PT_LOAD};
use object::read::elf::{FileHeader as _, ProgramHeader as _};
use object::{Endian as _, Endianness, ReadCache};

use super::{
    Access, BackingFile, Gpa, GuestRam, Layout, LayoutError, RamError, RamOffset, Range, PAGE_SIZE,
};

/// More parts than a dump has, those included that are not memory.
const MAX_HEADERS: usize = 4096;

/// Guest RAM in a saved image.
#[derive(Debug)]
pub struct ImageRam {
    layout: Layout,
    /// For each backing of the layout, where in the file it begins.
    starts: Vec<u64>,
    file: File,
    path: PathBuf,
    /// What the headers call memory and the file does not have.
    left_out: Vec<(Gpa, u64)>,
    lost: AtomicBool,
}

/// Why an image cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ImageError {
    /// A form that is not read.
    #[error(
        "it is a kdump-compressed dump; save the memory as ELF: `virsh dump --memory-only \
         --format elf DOMAIN FILE`"
    )]
    Compressed,
    /// A dump that was made without `--memory-only`.
    #[error(
        "it is libvirt's or QEMU's saved state of a domain, not its memory; make a \
         `virsh dump --memory-only --format elf DOMAIN FILE`"
    )]
    SavedState,
    /// No core file of a 64-bit guest.
    #[error("it is an ELF file, but no dump of an x86-64 guest's memory: {0}")]
    NotADump(String),
    /// A core file whose parts are not laid out as a guest's memory.
    #[error(
        "it is a core file whose parts are no guest's memory: {0}. That is so for the core of the \
         QEMU process itself (gcore), and for a dump made with paging=on; make a \
         `virsh dump --memory-only --format elf DOMAIN FILE`"
    )]
    NotLaidOut(LayoutError),
    /// The file ends before what its headers speak of.
    #[error("it is cut short: it has {have} bytes, and its headers speak of {need}")]
    CutShort {
        /// Bytes of the file.
        have: u64,
        /// Bytes that it should have.
        need: u64,
    },
    /// A raw image that is no whole number of pages.
    #[error(
        "it is cut short, or no image of memory: its {have} bytes are no whole number of pages"
    )]
    OddSize {
        /// Bytes of the file.
        have: u64,
    },
}

impl ImageRam {
    /// Opens an image. A raw one, which does not say where in the guest's
    /// physical address space it lies, is laid out as `raw` says for its
    /// size; [`Layout::flat`] is right for what has no hole.
    ///
    /// # Errors
    /// Those of [`BackingFile::open`], but [`RamError::NoImage`] where there is no
    /// such file; [`RamError::Image`] where it is in no form that can be read, or cut
    /// short.
    pub fn open(
        path: &Path,
        raw: impl FnOnce(u64) -> Result<Layout, LayoutError>,
    ) -> Result<Self, RamError> {
        let opened = BackingFile::open(path, Access::ReadOnly).map_err(|error| match error {
            RamError::NotFound { path } => RamError::NoImage { path },
            error => error,
        })?;
        let (mut file, size) = opened.into_file();
        let failed = |error| RamError::Image {
            path: path.to_path_buf(),
            error,
        };
        let mut magic = [0; 16];
        let read = io::Read::by_ref(&mut file)
            .take(16)
            .read(&mut magic)
            .map_err(|source| RamError::Io {
                path: path.to_path_buf(),
                doing: "read",
                source,
            })?;
        let is = |text: &[u8]| magic[..read].starts_with(text);
        // Also what makedumpfile writes (struct disk_dump_header), flat or not.
        if is(b"KDUMP   ") || is(b"DISKDUMP") || is(b"makedumpfile") {
            return Err(failed(ImageError::Compressed));
        }
        // src/qemu/qemu_saveimage.h of libvirt; migration/savevm.c of QEMU.
        if is(b"LibvirtQemudSave") || is(b"LibvirtQemudPart") || is(b"QEVM") {
            return Err(failed(ImageError::SavedState));
        }
        let (layout, starts, left_out) = if is(b"\x7fELF") {
            let parts = segments(&file, size).map_err(failed)?;
            let (ranges, starts) = parts.ranges();
            let layout = Layout::new(ranges);
            let layout = layout.map_err(|error| failed(ImageError::NotLaidOut(error)))?;
            (layout, starts, parts.left_out)
        } else {
            if size % PAGE_SIZE != 0 {
                return Err(failed(ImageError::OddSize { have: size }));
            }
            let layout = raw(size)?;
            // Backings one after the other, as the nodes of a guest.
            let mut at = 0;
            let starts = (0..layout.backings()).map(|i| {
                let start = at;
                at += layout.needs(i);
                start
            });
            let starts = starts.collect();
            if at > size {
                return Err(failed(ImageError::CutShort {
                    have: size,
                    need: at,
                }));
            }
            (layout, starts, Vec::new())
        };
        Ok(Self {
            layout,
            starts,
            file,
            path: path.to_path_buf(),
            left_out,
            lost: AtomicBool::new(false),
        })
    }

    /// What the image's headers call memory of the guest without having its
    /// bytes: address and length of each such hole.
    pub fn left_out(&self) -> &[(Gpa, u64)] {
        &self.left_out
    }

    fn word<const N: usize>(&self, gpa: Gpa) -> Result<[u8; N], RamError> {
        let size = N as u64;
        if !gpa.is_aligned(size) {
            return Err(RamError::Misaligned { gpa, align: size });
        }
        self.layout.resolve(gpa, size)?;
        let mut word = [0; N];
        self.read(gpa, &mut word)?;
        Ok(word)
    }

    fn start(&self, backing: usize) -> u64 {
        self.starts.get(backing).copied().unwrap_or(0)
    }
}

/// The parts of an ELF dump that have bytes: guest physical address, place in
/// the file, length.
#[derive(Default)]
struct Segments {
    parts: Vec<(u64, u64, u64)>,
    left_out: Vec<(Gpa, u64)>,
}

impl Segments {
    fn ranges(&self) -> (Vec<Range>, Vec<u64>) {
        let range = |(backing, &(gpa, _, len)): (usize, &(u64, u64, u64))| Range {
            gpa: Gpa(gpa),
            len,
            backing,
            offset: RamOffset(0),
        };
        let ranges = self.parts.iter().enumerate().map(range).collect();
        let starts = self.parts.iter().map(|&(_, start, _)| start).collect();
        (ranges, starts)
    }
}

fn segments(file: &File, size: u64) -> Result<Segments, ImageError> {
    let not_a_dump = |error: object::Error| ImageError::NotADump(error.to_string());
    // Reads what it is asked for, and no more.
    let cache = ReadCache::new(file);
    let header = FileHeader64::<Endianness>::parse(&cache).map_err(not_a_dump)?;
    let endian = header.endian().map_err(not_a_dump)?;
    if header.e_type.get(endian) != ET_CORE {
        return Err(ImageError::NotADump("it is no core file".to_owned()));
    }
    if header.e_machine.get(endian) != EM_X86_64 || !endian.is_little_endian() {
        return Err(ImageError::NotADump(
            "it is of another processor".to_owned(),
        ));
    }
    // The count may be of 32 bits, and the whole table is read.
    let count = header.phnum(endian, &cache).map_err(not_a_dump)?;
    let count = usize::try_from(count).unwrap_or(usize::MAX);
    if count > MAX_HEADERS {
        return Err(ImageError::NotLaidOut(LayoutError::TooMany(count)));
    }
    let headers = header.program_headers(endian, &cache).map_err(|_| {
        // Nothing else is wrong with a dump whose table is past its end.
        ImageError::CutShort {
            have: size,
            need: header.e_phoff.get(endian),
        }
    })?;
    let mut segments = Segments::default();
    let mut spans = Vec::new();
    for part in headers.iter().filter(|part| part.p_type(endian) == PT_LOAD) {
        let (offset, length) = part.file_range(endian);
        let gpa = part.p_paddr(endian);
        let memory = part.p_memsz(endian);
        let need = offset.saturating_add(length);
        if need > size {
            return Err(ImageError::CutShort { have: size, need });
        }
        spans.push((gpa, gpa.saturating_add(memory.max(length))));
        if length > 0 {
            segments.parts.push((gpa, offset, length));
        }
        if memory > length {
            let from = Gpa(gpa.saturating_add(length));
            segments.left_out.push((from, memory - length));
        }
    }
    segments.left_out.extend(gaps(spans));
    segments.left_out.sort_unstable();
    Ok(segments)
}

/// What lies between the parts of a dump, where a PC's RAM has no hole: from the end
/// of the first MiB, which video memory and ROMs cut up, to the last part below 4 GiB.
/// Memory modules begin at round addresses above that. What QEMU has in its last half a
/// gigabyte, the firmware and video memory, is in a dump too, and is no RAM: that never
/// reaches so far (`max-ram-below-4g`, hw/i386/pc.c).
fn gaps(mut spans: Vec<(u64, u64)>) -> Vec<(Gpa, u64)> {
    const LOW: u64 = 1 << 20;
    const DEVICES: u64 = 0xe000_0000;
    spans.sort_unstable();
    let mut gaps = Vec::new();
    let mut end = LOW;
    for (from, to) in spans {
        if from > end && from < DEVICES {
            gaps.push((Gpa(end), from - end));
        }
        end = end.max(to);
    }
    gaps
}

impl GuestRam for ImageRam {
    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn read(&self, gpa: Gpa, buf: &mut [u8]) -> Result<(), RamError> {
        self.layout.pieces(gpa, buf, |place, part| {
            // The layout keeps the sum inside the file as it was opened.
            let at = self.start(place.backing) + place.offset.0;
            if self.file.read_exact_at(part, at).is_err() {
                self.lost.store(true, Ordering::Release);
                part.fill(0);
            }
        })
    }

    fn read_u64(&self, gpa: Gpa) -> Result<u64, RamError> {
        Ok(u64::from_le_bytes(self.word(gpa)?))
    }

    fn read_u32(&self, gpa: Gpa) -> Result<u32, RamError> {
        Ok(u32::from_le_bytes(self.word(gpa)?))
    }

    fn write_u64(&self, gpa: Gpa, _value: u64) -> Result<(), RamError> {
        self.word::<8>(gpa)?;
        Err(RamError::ReadOnly { gpa })
    }

    fn write_u32(&self, gpa: Gpa, _value: u32) -> Result<(), RamError> {
        self.word::<4>(gpa)?;
        Err(RamError::ReadOnly { gpa })
    }

    fn change_bits(&self, gpa: Gpa, _mask: u32, _set: bool) -> Result<u32, RamError> {
        self.word::<4>(gpa)?;
        Err(RamError::ReadOnly { gpa })
    }

    fn next_populated(&self, gpa: Gpa) -> Option<Gpa> {
        self.layout.next_populated(gpa, |backing, from, end| {
            let start = self.start(backing);
            let at = match lseek64(
                self.file.as_fd(),
                i64::try_from(start + from).ok()?,
                Whence::SeekData,
            ) {
                Ok(at) => u64::try_from(at).ok()?.checked_sub(start)?,
                Err(Errno::ENXIO) => return None,
                // A file system that cannot tell: everything may be data.
                Err(_) => from,
            };
            // The file's pages need not be the guest's.
            let at = (at - at % PAGE_SIZE).max(from);
            (at < end).then_some(at)
        })
    }

    fn check(&self) -> Result<(), RamError> {
        if self.lost.load(Ordering::Acquire) {
            return Err(RamError::Gone {
                path: self.path.clone(),
            });
        }
        Ok(())
    }
}
