//! Guest RAM in our own memory, for tests of everything above.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::OnceLock;

use super::{Gpa, GuestRam, Layout, RamError, PAGE_SIZE};

const WORDS: usize = PAGE_SIZE as usize / 8;

type Page = [AtomicU64; WORDS];

/// Called with the memory, address and length before each read.
type Hook = Box<dyn Fn(&VecRam, Gpa, u64) + Send + Sync>;

/// Guest RAM for tests: sparse, shareable between threads, and able to
/// misbehave as a hostile guest does.
///
/// Pages that were never written are holes, as in a fresh memory file; how
/// often one was read is counted ([`VecRam::hole_reads`]), since on a real
/// file each such read would allocate a page.
pub struct VecRam {
    layout: Layout,
    /// For each range of the layout, its pages; unset ones are holes.
    pages: Vec<Vec<OnceLock<Box<Page>>>>,
    read_only: bool,
    gone: AtomicBool,
    hole_reads: AtomicU64,
    hook: Option<Hook>,
}

impl VecRam {
    /// Memory of the given layout, all of it holes.
    pub fn new(layout: Layout) -> Self {
        let pages = layout
            .ranges()
            .iter()
            .map(|range| {
                (0..range.len / PAGE_SIZE)
                    .map(|_| OnceLock::new())
                    .collect()
            })
            .collect();
        Self {
            layout,
            pages,
            read_only: false,
            gone: AtomicBool::new(false),
            hole_reads: AtomicU64::new(0),
            hook: None,
        }
    }

    /// Flat memory with the given content at address 0, padded with zeros to
    /// whole pages (at least one).
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let size = (bytes.len() as u64).max(1).next_multiple_of(PAGE_SIZE);
        let ram = Self::new(Layout::flat(size).expect("at least one page"));
        ram.poke(Gpa(0), bytes);
        ram
    }

    /// The same memory, refusing writes as a saved image does ([`VecRam::poke`]
    /// still works).
    pub fn read_only(mut self) -> Self {
        self.read_only = true;
        self
    }

    /// The same memory, which calls `hook` before each read: what it pokes is
    /// what the guest would have written just then.
    pub fn with_hook(mut self, hook: impl Fn(&Self, Gpa, u64) + Send + Sync + 'static) -> Self {
        self.hook = Some(Box::new(hook));
        self
    }

    /// Makes [`GuestRam::check`] fail, as after a truncated file.
    pub fn lose(&self) {
        self.gone.store(true, Ordering::Release);
    }

    /// How many reads touched a page that is a hole.
    pub fn hole_reads(&self) -> u64 {
        self.hole_reads.load(Ordering::Relaxed)
    }

    /// Writes bytes as the guest would: past write protection, and filling
    /// holes.
    ///
    /// # Panics
    /// If any byte is outside the layout: a mistake in the test.
    pub fn poke(&self, gpa: Gpa, bytes: &[u8]) {
        for (i, &byte) in bytes.iter().enumerate() {
            let at = Gpa(gpa.0 + i as u64);
            let shift = at.0 % 8 * 8;
            self.update(at, |old| old & !(0xff << shift) | u64::from(byte) << shift);
        }
    }

    /// Like [`VecRam::poke`], for one little-endian word at any address.
    ///
    /// # Panics
    /// As [`VecRam::poke`].
    pub fn poke_u64(&self, gpa: Gpa, value: u64) {
        self.poke(gpa, &value.to_le_bytes());
    }

    /// Like [`VecRam::poke`], for one little-endian half word at any address.
    ///
    /// # Panics
    /// As [`VecRam::poke`].
    pub fn poke_u32(&self, gpa: Gpa, value: u32) {
        self.poke(gpa, &value.to_le_bytes());
    }

    /// Changes the word that holds `gpa`, filling a hole.
    fn update(&self, gpa: Gpa, change: impl Fn(u64) -> u64) {
        let page = self
            .page(gpa)
            .unwrap_or_else(|| panic!("{gpa} is outside the test's memory"))
            .get_or_init(|| Box::new([const { AtomicU64::new(0) }; WORDS]));
        let word = &page[word_of(gpa)];
        word.fetch_update(Ordering::Release, Ordering::Relaxed, |old| {
            Some(change(old))
        })
        .expect("the change is never refused");
    }

    /// The page that holds `gpa`, if that is RAM.
    fn page(&self, gpa: Gpa) -> Option<&OnceLock<Box<Page>>> {
        let range = self.layout.range_of(gpa)?;
        let index = self.layout.ranges().partition_point(|r| r.gpa < range.gpa);
        let page = (gpa.0 - range.gpa.0) / PAGE_SIZE;
        self.pages.get(index)?.get(usize::try_from(page).ok()?)
    }

    /// The word that holds `gpa`; 0 from a hole, `None` outside RAM.
    fn load(&self, gpa: Gpa) -> Option<u64> {
        Some(match self.page(gpa)?.get() {
            Some(page) => page[word_of(gpa)].load(Ordering::Acquire),
            None => {
                self.hole_reads.fetch_add(1, Ordering::Relaxed);
                0
            }
        })
    }

    /// Calls the hook, but not for what the hook itself reads.
    fn before_read(&self, gpa: Gpa, len: u64) {
        thread_local! {
            static IN_HOOK: Cell<bool> = const { Cell::new(false) };
        }
        /// Ends the hook's turn, also where a test fails inside it.
        struct Turn;
        impl Drop for Turn {
            fn drop(&mut self) {
                IN_HOOK.set(false);
            }
        }
        if let Some(hook) = &self.hook {
            if !IN_HOOK.replace(true) {
                let _turn = Turn;
                hook(self, gpa, len);
            }
        }
    }

    /// Common checks of the word accesses.
    fn check_word(&self, gpa: Gpa, size: u64, write: bool) -> Result<(), RamError> {
        if !gpa.is_aligned(size) {
            return Err(RamError::Misaligned { gpa, align: size });
        }
        self.layout.resolve(gpa, size)?;
        if write && self.read_only {
            return Err(RamError::ReadOnly { gpa });
        }
        Ok(())
    }
}

/// Which word of its page holds `gpa`.
fn word_of(gpa: Gpa) -> usize {
    (gpa.0 % PAGE_SIZE / 8) as usize
}

impl GuestRam for VecRam {
    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn read(&self, gpa: Gpa, buf: &mut [u8]) -> Result<(), RamError> {
        self.before_read(gpa, buf.len() as u64);
        let len = buf.len() as u64;
        let unmapped = || RamError::Unmapped { gpa, len };
        gpa.checked_add(len).ok_or_else(unmapped)?;
        let mut at = gpa;
        let mut done = 0;
        while done < buf.len() {
            let word = self.load(at).ok_or_else(unmapped)?.to_le_bytes();
            let from = (at.0 % 8) as usize;
            let len = (8 - from).min(buf.len() - done);
            buf[done..done + len].copy_from_slice(&word[from..from + len]);
            done += len;
            at = Gpa(at.0.saturating_add(len as u64));
        }
        Ok(())
    }

    fn read_u64(&self, gpa: Gpa) -> Result<u64, RamError> {
        self.before_read(gpa, 8);
        self.check_word(gpa, 8, false)?;
        self.load(gpa).ok_or(RamError::Unmapped { gpa, len: 8 })
    }

    fn read_u32(&self, gpa: Gpa) -> Result<u32, RamError> {
        self.before_read(gpa, 4);
        self.check_word(gpa, 4, false)?;
        let word = self.load(gpa).ok_or(RamError::Unmapped { gpa, len: 4 })?;
        Ok((word >> (gpa.0 % 8 * 8)) as u32)
    }

    fn write_u64(&self, gpa: Gpa, value: u64) -> Result<(), RamError> {
        self.check_word(gpa, 8, true)?;
        self.update(gpa, |_| value);
        Ok(())
    }

    fn write_u32(&self, gpa: Gpa, value: u32) -> Result<(), RamError> {
        self.check_word(gpa, 4, true)?;
        let shift = gpa.0 % 8 * 8;
        let mask = u64::from(u32::MAX) << shift;
        self.update(gpa, |old| old & !mask | u64::from(value) << shift);
        Ok(())
    }

    fn change_bits(&self, gpa: Gpa, mask: u32, set: bool) -> Result<u32, RamError> {
        let old = self.read_u32(gpa)?;
        self.check_word(gpa, 4, true)?;
        let mask = u64::from(mask) << (gpa.0 % 8 * 8);
        self.update(gpa, |word| if set { word | mask } else { word & !mask });
        Ok(old)
    }

    fn next_populated(&self, gpa: Gpa) -> Option<Gpa> {
        let ranges = self.layout.ranges();
        let first = ranges.partition_point(|range| range.end() <= gpa);
        let mut rest = ranges.iter().zip(&self.pages).skip(first);
        rest.find_map(|(range, pages)| {
            let from = gpa.max(range.gpa);
            let skip = ((from.0 - range.gpa.0) / PAGE_SIZE) as usize;
            let filled = |page: &OnceLock<_>| page.get().is_some();
            let page = skip + pages.iter().skip(skip).position(filled)?;
            Some(from.max(Gpa(range.gpa.0 + page as u64 * PAGE_SIZE)))
        })
    }

    fn check(&self) -> Result<(), RamError> {
        if self.gone.load(Ordering::Acquire) {
            return Err(RamError::Gone {
                path: "test memory".into(),
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ram::{MachineKind, RamOffset, Range};

    #[test]
    fn words_and_bytes_agree() {
        let ram = VecRam::from_bytes(&[1, 2, 3, 4, 5, 6, 7, 8, 9]);
        assert_eq!(ram.read_u64(Gpa(0)).unwrap(), 0x0807_0605_0403_0201);
        assert_eq!(ram.read_u32(Gpa(4)).unwrap(), 0x0807_0605);
        ram.write_u32(Gpa(4), 0xdead_beef).unwrap();
        let mut buf = [0; 6];
        ram.read(Gpa(3), &mut buf).unwrap();
        assert_eq!(buf, [4, 0xef, 0xbe, 0xad, 0xde, 9]);
        ram.write_u64(Gpa(8), 7).unwrap();
        assert_eq!(ram.read_u64(Gpa(8)).unwrap(), 7);
    }

    #[test]
    fn bounds_alignment_and_protection_hold() {
        let ram = VecRam::from_bytes(&[0; 10]).read_only();
        assert!(matches!(
            ram.read_u64(Gpa(4)),
            Err(RamError::Misaligned { .. })
        ));
        assert!(matches!(
            ram.read_u64(Gpa(4096)),
            Err(RamError::Unmapped { .. })
        ));
        assert!(matches!(
            ram.write_u64(Gpa(0), 1),
            Err(RamError::ReadOnly { .. })
        ));
        assert!(ram.read(Gpa(4090), &mut [0; 7]).is_err());
        assert!(ram.read(Gpa(u64::MAX), &mut [0; 7]).is_err());
        assert!(ram.check().is_ok());
        ram.lose();
        assert!(matches!(ram.check(), Err(RamError::Gone { .. })));
    }

    #[test]
    fn holes_are_told_and_counted() {
        let ram = VecRam::new(Layout::pc(3 << 30, MachineKind::Q35).unwrap());
        assert_eq!(ram.next_populated(Gpa(0)), None);
        ram.poke(Gpa(0x5ffe), &[1; 4]);
        ram.poke(Gpa((4 << 30) + 0x1000), &[1]);
        assert_eq!(ram.next_populated(Gpa(0)), Some(Gpa(0x5000)));
        assert_eq!(ram.next_populated(Gpa(0x6100)), Some(Gpa(0x6100)));
        assert_eq!(
            ram.next_populated(Gpa(0x7000)),
            Some(Gpa((4 << 30) + 0x1000))
        );
        assert_eq!(ram.next_populated(Gpa(u64::MAX)), None);
        assert!(ram.populated(Gpa(0x5123), 0x1edd));
        assert!(!ram.populated(Gpa(0x5123), 0x1ede));
        assert!(ram.populated(Gpa(0), 0));
        assert!(!ram.populated(Gpa(u64::MAX), 2));
        assert_eq!(ram.hole_reads(), 0);
        ram.read_u64(Gpa(0)).unwrap();
        assert_eq!(ram.hole_reads(), 1);
    }

    #[test]
    fn reads_cross_adjacent_ranges() {
        let range = |gpa, offset| Range {
            gpa: Gpa(gpa),
            len: 0x1000,
            backing: 0,
            offset: RamOffset(offset),
        };
        let ram = VecRam::new(Layout::new(vec![range(0, 0x1000), range(0x1000, 0)]).unwrap());
        ram.poke(Gpa(0xffc), b"over the");
        let mut buf = [0; 8];
        ram.read(Gpa(0xffc), &mut buf).unwrap();
        assert_eq!(&buf, b"over the");
    }

    #[test]
    fn the_hook_changes_memory_between_two_reads() {
        let ram = VecRam::from_bytes(&[0; 8]).with_hook(|ram, gpa, _| {
            // What the hook reads does not call it again.
            let before = ram.read_u64(gpa).unwrap();
            ram.poke_u64(gpa, before + 1);
        });
        assert_eq!(ram.read_u64(Gpa(0)).unwrap(), 1);
        assert_eq!(ram.read_u64(Gpa(0)).unwrap(), 2);
    }
}
