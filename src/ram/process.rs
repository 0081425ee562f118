//! Guest RAM in the memory of a QEMU process: plain anonymous memory, which no
//! file stands for.
//!
//! Everything goes through `/proc/PID/mem`. Opening it ties the descriptor to
//! the address space that the process has then (`mem_open`, fs/proc/base.c),
//! so that it can never come to mean another process: after the end of this
//! one, reads and writes do nothing. The process is not stopped and notices
//! nothing; its `mmap_lock` is held for reading while a page is copied, as a
//! page fault of its own would.
//!
//! What this cannot do is touch a word whole. The kernel copies with
//! `memcpy` (`access_remote_vm`, mm/memory.c), which on processors with ERMS
//! is `rep movsb`, and that is promised to be whole for single bytes only. So:
//!
//! * A word is read until two copies in a row agree; where it is what it was
//!   when it was read before, as most are, that one copy is enough.
//! * A word is written by its one byte that changes, where it is one. A key's
//!   epoch counts up by one, so that is so 255 times of 256. Where more bytes
//!   change, the word is copied at once, and a CPU that looks in that very
//!   moment may see a mixture of old and new.
//!
//! * Bits are changed by writing the one byte that has them; bits of several
//!   bytes are refused. What the guest does to the word's other bytes in the
//!   meantime stays. What it does to that very byte, between our look and our
//!   write, is undone.
//!
//! For what xftrace writes, that is enough.
//!
//! * A key's slot is not looked at before its epoch is published, by a system
//!   call of its own that comes later. (Each of the two takes and gives back
//!   the process's `mmap_lock`, and no store of x86 passes that.)
//! * An epoch that is seen mixed of an old and a new one is more than 63 away
//!   from the true one, which the guest notices at its second look
//!   (`xftrace_get_key` in the guest patch), unless it sees the same mixture
//!   twice. Then one record is under an epoch that was never handed out, or
//!   long ago, and counts as forged: it is not taken for another one.
//! * A command whose number is seen mixed is carried out twice, to the same
//!   effect.
//! * `RB_BUFFER_OFF`, the switch of a kernel without the patch, shares its
//!   byte with bits that count to more than 65,535 nested calls of
//!   ring_buffer_record_disable() only. The guest's own tracing_on is another
//!   writer of that one bit, and of two writers the last one wins, here as in
//!   the guest.
//!
//! A file that is mapped has none of this to think about, and is quicker: it
//! remains what is recommended.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use nix::libc;

use super::{Access, Gpa, GuestRam, Layout, RamError, PAGE_SIZE};

/// How often a word is read until two copies agree. One that differs each
/// time is being written all the time: then any of its values is as good.
const READS: usize = 4;

/// How many words are remembered, a power of two.
const REMEMBERED: usize = 1 << 16;

/// `/proc/PID/pagemap`, Documentation/admin-guide/mm/pagemap.rst: a page is
/// present or swapped out; otherwise nothing was ever there.
const POPULATED: u64 = 1 << 63 | 1 << 62;

/// How many pages' entries are asked for at most at once: 32 MiB of memory.
const ENTRIES: usize = 8192;

/// Guest RAM inside a process.
#[derive(Debug)]
pub struct ProcessRam {
    layout: Layout,
    /// For each backing of the layout, its address in the process.
    starts: Vec<u64>,
    mem: File,
    pagemap: File,
    path: PathBuf,
    writable: bool,
    lost: AtomicBool,
    before: Mutex<Words>,
}

/// Words as they were read last: address and size, and value. What comes to
/// lie in the same slot as another takes its place.
#[derive(Debug)]
struct Words(Vec<(u64, u64)>);

impl Words {
    /// Notes the value of a word, and says whether it had that before.
    fn same(&mut self, address: u64, bytes: &[u8]) -> bool {
        // An address is a multiple of the size, so that these differ.
        let key = address | bytes.len() as u64 >> 3;
        let value = bytes
            .iter()
            .rev()
            .fold(0, |word, &b| word << 8 | u64::from(b));
        // Fibonacci hashing: words at the same place of many pages spread.
        let slot = (key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 48) as usize % REMEMBERED;
        let now = (key, value);
        self.0
            .get_mut(slot)
            .is_some_and(|slot| std::mem::replace(slot, now) == now)
    }
}

impl ProcessRam {
    /// Opens the memory of the process with this directory in `/proc`. The
    /// backings of the layout lie at `starts` in it, in this order.
    ///
    /// Which process that is, the caller makes sure of *after* this: one that
    /// lives then, by its pidfd, was the one that was opened.
    ///
    /// # Errors
    /// [`RamError::BackingCount`], or what [`super::BackingFile::open`] gives:
    /// this needs the right to trace the process.
    pub fn open(
        dir: &Path,
        starts: Vec<u64>,
        access: Access,
        layout: Layout,
    ) -> Result<Self, RamError> {
        if starts.len() != layout.backings() {
            return Err(RamError::BackingCount {
                have: starts.len(),
                need: layout.backings(),
            });
        }
        let fits = |(i, start): (usize, &u64)| {
            start % PAGE_SIZE == 0 && start.checked_add(layout.needs(i)).is_some()
        };
        if let Some(at) = starts.iter().enumerate().position(|part| !fits(part)) {
            return Err(RamError::Unmapped {
                gpa: Gpa(starts[at]),
                len: layout.needs(at),
            });
        }
        let open = |name: &str, access| {
            let path = dir.join(name);
            File::options()
                .read(true)
                .write(access == Access::ReadWrite)
                .custom_flags(libc::O_NOCTTY)
                .open(&path)
                .map_err(|error| RamError::from_open(&path, access, error))
        };
        Ok(Self {
            mem: open("mem", access)?,
            pagemap: open("pagemap", Access::ReadOnly)?,
            path: dir.join("mem"),
            writable: access == Access::ReadWrite,
            lost: AtomicBool::new(false),
            before: Mutex::new(Words(vec![(0, 0); REMEMBERED])),
            layout,
            starts,
        })
    }

    /// The address in the process of what lies in one piece of the layout.
    fn address(&self, backing: usize, offset: u64) -> u64 {
        // `open` has checked that no backing runs past the end of the space.
        self.starts.get(backing).map_or(0, |start| start + offset)
    }

    /// Fills `buf`, with zeros where the process has no memory there any more.
    fn copy(&self, address: u64, buf: &mut [u8]) {
        if let Err(rest) = fill(&self.mem, address, buf) {
            self.lost.store(true, Ordering::Release);
            buf[rest..].fill(0);
        }
    }

    /// An aligned word of `N` bytes, and where it lies.
    fn word<const N: usize>(&self, gpa: Gpa) -> Result<(u64, [u8; N]), RamError> {
        let size = N as u64;
        if !gpa.is_aligned(size) {
            return Err(RamError::Misaligned { gpa, align: size });
        }
        let place = self.layout.resolve(gpa, size)?;
        let address = self.address(place.backing, place.offset.0);
        let mut word = [0; N];
        self.copy(address, &mut word);
        for _ in 1..READS {
            let mut before = self.before.lock().unwrap_or_else(PoisonError::into_inner);
            if before.same(address, &word) {
                break;
            }
            drop(before);
            self.copy(address, &mut word);
        }
        Ok((address, word))
    }

    fn write<const N: usize>(&self, gpa: Gpa, value: [u8; N]) -> Result<(), RamError> {
        self.writable(gpa, N as u64)?;
        let (address, old) = self.word::<N>(gpa)?;
        let mut changed = (0..N).filter(|&i| old[i] != value[i]);
        let part = match (changed.next(), changed.next()) {
            (None, _) => return Ok(()),
            (Some(only), None) => only..only + 1,
            (Some(_), Some(_)) => 0..N,
        };
        self.put(address + part.start as u64, &value[part]);
        Ok(())
    }

    fn writable(&self, gpa: Gpa, len: u64) -> Result<(), RamError> {
        if !self.writable {
            self.layout.resolve(gpa, len)?;
            return Err(RamError::ReadOnly { gpa });
        }
        Ok(())
    }

    /// Writes to the process, if it is still there.
    fn put(&self, address: u64, bytes: &[u8]) {
        if self.mem.write_all_at(bytes, address).is_err() {
            self.lost.store(true, Ordering::Release);
        }
    }

    /// The first page from `from` on, up to `end`, that was ever touched.
    fn next_in(&self, from: u64, end: u64) -> Option<u64> {
        let mut page = from / PAGE_SIZE;
        let last = end.div_ceil(PAGE_SIZE);
        // One page at first: most questions are about one that is there.
        let mut count = 1;
        let mut entries = Vec::new();
        while page < last {
            let now = count.min(usize::try_from(last - page).unwrap_or(ENTRIES));
            entries.resize(now * 8, 0);
            if fill(&self.pagemap, page * 8, &mut entries).is_err() {
                // It cannot be told: everything may be there.
                return Some(from.max(page * PAGE_SIZE));
            }
            // What was never touched has the same entry throughout, and to see
            // that takes no loop over the entries: of 64 GiB there are many.
            let alike = entries[8..] == entries[..entries.len() - 8];
            let telling = if alike { &entries[..8] } else { &entries[..] };
            let populated = telling.chunks_exact(8).position(|entry| {
                entry
                    .try_into()
                    .is_ok_and(|entry| u64::from_ne_bytes(entry) & POPULATED != 0)
            });
            if let Some(index) = populated {
                return Some(from.max((page + index as u64) * PAGE_SIZE));
            }
            page += now as u64;
            count = (count * 16).min(ENTRIES);
        }
        None
    }
}

/// Reads all of `buf`; an error says how much there was.
fn fill(file: &File, mut at: u64, buf: &mut [u8]) -> Result<(), usize> {
    let mut done = 0;
    while done < buf.len() {
        match file.read_at(&mut buf[done..], at) {
            Ok(0) => return Err(done),
            Ok(n) => {
                done += n;
                at += n as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return Err(done),
        }
    }
    Ok(())
}

impl GuestRam for ProcessRam {
    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn read(&self, gpa: Gpa, buf: &mut [u8]) -> Result<(), RamError> {
        self.layout.pieces(gpa, buf, |place, part| {
            self.copy(self.address(place.backing, place.offset.0), part);
        })
    }

    fn read_u64(&self, gpa: Gpa) -> Result<u64, RamError> {
        Ok(u64::from_le_bytes(self.word(gpa)?.1))
    }

    fn read_u32(&self, gpa: Gpa) -> Result<u32, RamError> {
        Ok(u32::from_le_bytes(self.word(gpa)?.1))
    }

    fn write_u64(&self, gpa: Gpa, value: u64) -> Result<(), RamError> {
        self.write(gpa, value.to_le_bytes())
    }

    fn write_u32(&self, gpa: Gpa, value: u32) -> Result<(), RamError> {
        self.write(gpa, value.to_le_bytes())
    }

    fn change_bits(&self, gpa: Gpa, mask: u32, set: bool) -> Result<u32, RamError> {
        self.writable(gpa, 4)?;
        let mask = mask.to_le_bytes();
        let mut changed = (0..mask.len()).filter(|&i| mask[i] != 0);
        let (only, None) = (changed.next(), changed.next()) else {
            return Err(RamError::NotAtomic { gpa });
        };
        let (address, old) = self.word::<4>(gpa)?;
        if let Some(i) = only {
            let byte = if set {
                old[i] | mask[i]
            } else {
                old[i] & !mask[i]
            };
            self.put(address + i as u64, &[byte]);
        }
        Ok(u32::from_le_bytes(old))
    }

    fn next_populated(&self, gpa: Gpa) -> Option<Gpa> {
        self.layout.next_populated(gpa, |backing, from, end| {
            let start = self.address(backing, 0);
            let found = self.next_in(start + from, start + end)?;
            Some(found - start)
        })
    }

    fn check(&self) -> Result<(), RamError> {
        if self.lost.load(Ordering::Acquire) {
            return Err(RamError::Ended {
                path: self.path.clone(),
            });
        }
        Ok(())
    }
}
