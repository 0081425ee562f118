//! What a process has mapped: /proc/PID/maps, proc(5).

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor};

use super::MemoryError;

/// The mappings of a process.
#[derive(Debug, Default)]
pub(super) struct Maps(Vec<Mapping>);

/// One mapping.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mapping {
    /// First address and the one past the last.
    pub(super) start: u64,
    end: u64,
    /// For instance `rw-s`.
    permissions: String,
    /// Where in the file it starts, in bytes.
    offset: u64,
    /// The file's device, as major and minor number.
    device: (u64, u64),
    /// 0 where it has no file.
    inode: u64,
    /// The name that the file had when it was mapped; ` (deleted)` behind it
    /// where it has it no more.
    pub(super) path: String,
}

/// What a process has mapped of one file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Mapped {
    /// How many bytes from the file's start on, without a gap, are mapped
    /// shared and for writing.
    pub(super) shared: u64,
    /// Whether anything of it is mapped privately.
    pub(super) private: bool,
    /// Where in the process that begins.
    pub(super) address: Option<u64>,
}

impl Maps {
    /// Reads the mappings of the process with this directory in /proc.
    pub(super) fn read(dir: &Path) -> Result<Maps, MemoryError> {
        let path = dir.join("maps");
        let text = fs::read(&path).map_err(MemoryError::io("read", &path))?;
        Ok(Maps::parse(&String::from_utf8_lossy(&text)))
    }

    fn parse(text: &str) -> Maps {
        Maps(text.lines().filter_map(Mapping::parse).collect())
    }

    /// What is mapped of the file with this metadata, in the process with this
    /// directory in /proc.
    pub(super) fn of(&self, file: &fs::Metadata, dir: &Path) -> Mapped {
        let mut parts: Vec<&Mapping> = self
            .0
            .iter()
            .filter(|mapping| mapping.is_of(file, dir))
            .collect();
        parts.sort_by_key(|mapping| mapping.offset);
        let mut mapped = Mapped {
            shared: 0,
            private: false,
            address: None,
        };
        for part in parts {
            let length = part.end.saturating_sub(part.start);
            if !part.permissions.ends_with('s') {
                mapped.private = true;
            } else if part.permissions.starts_with("rw") && part.offset <= mapped.shared {
                if part.offset == 0 {
                    mapped.address = Some(part.start);
                }
                mapped.shared = mapped.shared.max(part.offset.saturating_add(length));
            }
        }
        mapped
    }

    /// The mappings of this size that begin with their file, are shared and for
    /// writing, and whose file has a name like that.
    pub(super) fn shared(&self, size: u64, is_named: impl Fn(&str) -> bool) -> Vec<&Mapping> {
        let fits = |mapping: &&Mapping| {
            mapping.inode != 0
                && mapping.permissions.starts_with("rw")
                && mapping.permissions.ends_with('s')
                && mapping.offset == 0
                && mapping.end.checked_sub(mapping.start) == Some(size)
                && is_named(&mapping.path)
        };
        self.0.iter().filter(fits).collect()
    }

    /// The mappings of this size that are private memory of no file.
    ///
    /// QEMU maps a block of RAM whole, and puts a page behind it that nobody
    /// may touch (qemu_ram_mmap, util/mmap-alloc.c), so that the kernel never
    /// merges it with a neighbour.
    pub(super) fn anonymous(&self, size: u64) -> Vec<&Mapping> {
        let fits = |mapping: &&Mapping| {
            mapping.inode == 0
                && mapping.path.is_empty()
                && mapping.permissions == "rw-p"
                && mapping.end.checked_sub(mapping.start) == Some(size)
        };
        self.0.iter().filter(fits).collect()
    }

    /// Whether a file that had this name, or a nameless one below it, is
    /// mapped and has been unlinked.
    pub(super) fn has_deleted(&self, path: &str) -> bool {
        let gone = self.0.iter().filter_map(|mapping| {
            let name = mapping.path.strip_suffix(" (deleted)")?;
            name.strip_prefix(path)
        });
        gone.into_iter()
            .any(|rest| rest.is_empty() || rest.starts_with('/'))
    }
}

impl Mapping {
    /// Reads one line.
    fn parse(line: &str) -> Option<Mapping> {
        // The path comes last, and may have spaces in it.
        let mut fields = line.splitn(6, ' ');
        let (start, end) = fields.next()?.split_once('-')?;
        let permissions = fields.next()?.to_owned();
        let offset = fields.next()?;
        let (major, minor) = fields.next()?.split_once(':')?;
        let inode = fields.next()?.parse().ok()?;
        let hex = |text| u64::from_str_radix(text, 16).ok();
        Some(Mapping {
            start: hex(start)?,
            end: hex(end)?,
            permissions,
            offset: hex(offset)?,
            device: (hex(major)?, hex(minor)?),
            inode,
            path: fields.next().unwrap_or_default().trim_start().to_owned(),
        })
    }

    /// The link to the mapped file itself, whatever became of its name
    /// (proc_map_files_lookup, fs/proc/base.c). `dir` is the process's.
    pub(super) fn link(&self, dir: &Path) -> PathBuf {
        dir.join("map_files")
            .join(format!("{:x}-{:x}", self.start, self.end))
    }

    /// Whether this is a mapping of the file.
    ///
    /// File systems that are made of others (overlayfs, btrfs subvolumes) show
    /// one device here and another to stat(2); then the mapping itself is
    /// asked, through /proc/PID/map_files, whose links lead to the very file.
    fn is_of(&self, file: &fs::Metadata, dir: &Path) -> bool {
        let device = file.dev();
        if self.inode == file.ino() && self.device == (major(device), minor(device)) {
            return true;
        }
        self.inode == file.ino()
            && fs::metadata(self.link(dir))
                .is_ok_and(|there| there.dev() == file.dev() && there.ino() == file.ino())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_lines_of_a_qemu() {
        let maps = Maps::parse(
            "55d0c0a00000-55d0c0d4b000 r-xp 0032f000 fe:01 1185443    /usr/bin/qemu-system-x86_64\n\
             7f1e00000000-7f1e20000000 rw-s 00000000 00:18 51    /dev/shm/qemu/1-a b/pc.ram\n\
             7f1e20000000-7f1e20001000 rw-s 00000000 00:18 52 /dev/shm/x (deleted)\n\
             7f1e30000000-7f1e30001000 rw-p 00000000 00:00 0 \n\
             7ffc0f5e4000-7ffc0f605000 rw-p 00000000 00:00 0                          [stack]\n\
             nonsense\n\
             \n",
        );
        assert_eq!(maps.0.len(), 5);
        let ram = &maps.0[1];
        assert_eq!(ram.path, "/dev/shm/qemu/1-a b/pc.ram");
        assert_eq!((ram.device, ram.inode), ((0, 0x18), 51));
        assert_eq!(ram.end - ram.start, 512 << 20);
        assert!(maps.has_deleted("/dev/shm/x") && maps.has_deleted("/dev/shm"));
        let anonymous = maps.anonymous(0x1000);
        assert_eq!((anonymous.len(), anonymous[0].start), (1, 0x7f1e_3000_0000));
        let shared = maps.shared(512 << 20, |path| path.ends_with("/pc.ram"));
        assert_eq!((shared.len(), shared[0].start), (1, 0x7f1e_0000_0000));
        assert!(maps.shared(0x1000, |path| path.is_empty()).is_empty());
        assert!(!maps.has_deleted("/dev/sh") && !maps.has_deleted("/usr/bin/qemu-system-x86_64"));
    }

    #[test]
    fn counts_only_what_is_shared_and_without_a_gap() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let metadata = file.as_file().metadata().unwrap();
        let (major, minor) = (major(metadata.dev()), minor(metadata.dev()));
        let of = |parts: &[(u64, u64, &str)]| {
            let lines: String = parts
                .iter()
                .map(|(offset, length, permissions)| {
                    let end = 0x1000_0000 + length;
                    let inode = metadata.ino();
                    format!("10000000-{end:x} {permissions} {offset:x} {major:x}:{minor:x} {inode} /f\n")
                })
                .collect();
            Maps::parse(&lines).of(&metadata, Path::new("/nonexistent"))
        };
        let is = |shared: u64, private| Mapped {
            shared,
            private,
            address: (shared > 0).then_some(0x1000_0000),
        };
        assert_eq!(of(&[(0, 0x3000, "rw-s")]), is(0x3000, false));
        assert_eq!(
            of(&[(0x2000, 0x1000, "rw-s"), (0, 0x2000, "rw-s")]),
            is(0x3000, false)
        );
        assert_eq!(
            of(&[(0, 0x1000, "rw-s"), (0x2000, 0x1000, "rw-s")]),
            is(0x1000, false)
        );
        assert_eq!(of(&[(0, 0x1000, "r--s")]), is(0, false));
        assert_eq!(of(&[(0, 0x1000, "rw-p")]), is(0, true));
        assert_eq!(of(&[]), is(0, false));
    }
}
