//! Where RAM lies in the guest's physical address space, and which part of
//! which backing holds it.
//!
//! A guest physical address is not an offset in the memory file: a PC needs
//! a hole for devices below 4 GiB, so RAM that does not fit below it goes on
//! at 4 GiB. The split follows QEMU's `pc_init1` (hw/i386/pc_piix.c) and
//! `pc_q35_init` (hw/i386/pc_q35.c). For a live guest the truth is what
//! `info mtree -f` says; [`Layout::new`] takes any such list.

use super::{Gpa, RamError, RamOffset, PAGE_SIZE};

/// One stretch of RAM: guest physical `[gpa, gpa + len)` lies at
/// `[offset, offset + len)` of backing number `backing`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First guest physical address.
    pub gpa: Gpa,
    /// Length in bytes.
    pub len: u64,
    /// Which backing, counted from 0.
    pub backing: usize,
    /// Where in that backing it begins.
    pub offset: RamOffset,
}

impl Range {
    /// The first guest physical address after the range.
    pub fn end(&self) -> Gpa {
        // `Layout::new` refuses ranges for which this would saturate.
        Gpa(self.gpa.0.saturating_add(self.len))
    }
}

/// Where a guest physical address lies, as [`Layout::resolve`] finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Which backing.
    pub backing: usize,
    /// Where in that backing.
    pub offset: RamOffset,
    /// How many bytes from here on lie in the same range, at least 1.
    pub contiguous: u64,
}

/// The QEMU machine types whose memory split is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MachineKind {
    /// `pc`, `pc-i440fx-*`.
    I440fx,
    /// `q35`, `pc-q35-*`.
    Q35,
}

/// Where RAM goes on above the hole below 4 GiB.
const FOUR_GIB: u64 = 0x1_0000_0000;

/// More ranges than any machine has (QEMU allows 256 memory slots and 128
/// NUMA nodes); keeps every search short.
const MAX_RANGES: usize = 1024;

impl MachineKind {
    /// The kind that a libvirt `<type machine='..'>` or QEMU `-machine`
    /// value stands for, e.g. `pc-q35-7.2` or `pc`; `None` for others.
    pub fn from_name(name: &str) -> Option<Self> {
        if name == "q35" || name.starts_with("pc-q35-") {
            Some(Self::Q35)
        } else if name == "pc" || name.starts_with("pc-i440fx-") {
            Some(Self::I440fx)
        } else {
            None
        }
    }

    /// How many bytes of `size` lie below 4 GiB at most; `limit` is
    /// `max-ram-below-4g` where it is given.
    fn below_4g(self, size: u64, limit: Option<u64>) -> u64 {
        // QEMU compares with >=: RAM of exactly the limit is split too.
        match self {
            // Rounded down to a GiB only where RAM is split at all, and of
            // the split only what is above 3 GiB.
            Self::I440fx => {
                let fits_below = limit.unwrap_or(0xe000_0000);
                if size >= fits_below {
                    fits_below.min(0xc000_0000)
                } else {
                    fits_below
                }
            }
            Self::Q35 => {
                let split = if size >= 0xb000_0000 {
                    0x8000_0000
                } else {
                    0xb000_0000
                };
                split.min(limit.unwrap_or(FOUR_GIB))
            }
        }
    }
}

/// Why a layout is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// There is no RAM at all.
    #[error("the guest's memory layout is empty")]
    Empty,
    /// More ranges than any machine has.
    #[error("the guest's memory layout has {0} ranges, more than any machine has")]
    TooMany(usize),
    /// A start, length or offset is not a multiple of 4096, or is 0 bytes.
    #[error("RAM at {gpa} with {len} bytes is not a whole number of pages")]
    Unaligned {
        /// Where the range begins.
        gpa: Gpa,
        /// Its length.
        len: u64,
    },
    /// A range runs past the end of a 64-bit address or offset.
    #[error("RAM at {gpa} with {len} bytes runs past the end of the address space")]
    Overflow {
        /// Where the range begins.
        gpa: Gpa,
        /// Its length.
        len: u64,
    },
    /// Two ranges claim the same guest physical address.
    #[error("two parts of the guest's RAM claim guest physical address {gpa}")]
    Overlap {
        /// The first address claimed twice.
        gpa: Gpa,
    },
}

/// The map from guest physical addresses to places in the backings: sorted,
/// page-aligned, not overlapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    ranges: Vec<Range>,
    /// Bytes of RAM in all.
    total: u64,
    /// For each backing, how many bytes of it the ranges need.
    needs: Vec<u64>,
}

impl Layout {
    /// A layout of the given ranges, in any order.
    ///
    /// # Errors
    /// A [`LayoutError`] if they overlap, overflow or are not whole pages.
    pub fn new(mut ranges: Vec<Range>) -> Result<Self, LayoutError> {
        if ranges.is_empty() {
            return Err(LayoutError::Empty);
        }
        if ranges.len() > MAX_RANGES || ranges.iter().any(|r| r.backing >= MAX_RANGES) {
            return Err(LayoutError::TooMany(ranges.len()));
        }
        ranges.sort_by_key(|range| range.gpa);
        let mut total = 0u64;
        let mut free_from = Gpa(0);
        let mut needs = Vec::new();
        for range in &ranges {
            let &Range { gpa, len, .. } = range;
            let overflow = LayoutError::Overflow { gpa, len };
            if len == 0
                || [gpa.0, len, range.offset.0]
                    .iter()
                    .any(|n| n % PAGE_SIZE != 0)
            {
                return Err(LayoutError::Unaligned { gpa, len });
            }
            let end = gpa.checked_add(len).ok_or(overflow)?;
            let need = range.offset.checked_add(len).ok_or(overflow)?.0;
            if gpa < free_from {
                return Err(LayoutError::Overlap { gpa });
            }
            free_from = end;
            // No overlap, so the sum is below 2^64.
            total += len;
            if needs.len() <= range.backing {
                needs.resize(range.backing + 1, 0);
            }
            needs[range.backing] = need.max(needs[range.backing]);
        }
        Ok(Self {
            ranges,
            total,
            needs,
        })
    }

    /// One backing, guest physical address = offset: a saved raw image, a
    /// small guest, a test. `size` is in bytes and rounded down to whole
    /// pages.
    ///
    /// # Errors
    /// [`LayoutError::Empty`] below one page.
    pub fn flat(size: u64) -> Result<Self, LayoutError> {
        Self::from_pieces(&[size], u64::MAX)
    }

    /// The RAM of a PC with one backing of `size` bytes.
    ///
    /// # Errors
    /// [`LayoutError::Empty`] below one page; [`LayoutError::Unaligned`] if
    /// `size` is not a whole number of pages.
    pub fn pc(size: u64, machine: MachineKind) -> Result<Self, LayoutError> {
        Self::pc_nodes(&[size], machine, None)
    }

    /// The RAM of a PC whose memory is the given backings one after the
    /// other (one a NUMA node, in the order of the nodes), in bytes each.
    /// `max_below_4g` is the machine's `max-ram-below-4g`, where it is given.
    ///
    /// # Errors
    /// As [`Layout::pc`].
    pub fn pc_nodes(
        sizes: &[u64],
        machine: MachineKind,
        max_below_4g: Option<u64>,
    ) -> Result<Self, LayoutError> {
        let mut total = 0u64;
        for &size in sizes {
            if size % PAGE_SIZE != 0 {
                return Err(LayoutError::Unaligned {
                    gpa: Gpa(total),
                    len: size,
                });
            }
            total = total.checked_add(size).ok_or(LayoutError::Overflow {
                gpa: Gpa(total),
                len: size,
            })?;
        }
        Self::from_pieces(sizes, machine.below_4g(total, max_below_4g))
    }

    /// The same with memory modules: backings of their own, which follow those
    /// there are, each at the address and with the size given, in bytes.
    ///
    /// # Errors
    /// As [`Layout::new`].
    pub fn with_modules(mut self, modules: &[(Gpa, u64)]) -> Result<Self, LayoutError> {
        let first = self.backings();
        let module = |(i, &(gpa, len)): (usize, &(Gpa, u64))| Range {
            gpa,
            len,
            backing: first + i,
            offset: RamOffset(0),
        };
        self.ranges.extend(modules.iter().enumerate().map(module));
        Self::new(self.ranges)
    }

    /// Like [`Layout::pc`], with the split given: `below_4g` bytes from
    /// address 0 on and the rest at 4 GiB (QEMU's `max-ram-below-4g`).
    ///
    /// # Errors
    /// As [`Layout::pc`]; [`LayoutError::Overlap`] for a split above 4 GiB.
    pub fn split(size: u64, below_4g: u64) -> Result<Self, LayoutError> {
        if below_4g > FOUR_GIB && size > below_4g {
            return Err(LayoutError::Overlap { gpa: Gpa(FOUR_GIB) });
        }
        Self::from_pieces(&[size], below_4g)
    }

    /// Lays the backings end to end, the first `below` bytes from address 0
    /// on, the rest from 4 GiB on.
    fn from_pieces(sizes: &[u64], below: u64) -> Result<Self, LayoutError> {
        let mut ranges = Vec::new();
        // Bytes of RAM placed so far.
        let mut done = 0u64;
        for (backing, &size) in sizes.iter().enumerate() {
            let size = size - size % PAGE_SIZE;
            let low = size.min(below.saturating_sub(done));
            let overflow = LayoutError::Overflow {
                gpa: Gpa(done),
                len: size,
            };
            if low > 0 {
                ranges.push(Range {
                    gpa: Gpa(done),
                    len: low,
                    backing,
                    offset: RamOffset(0),
                });
            }
            if low < size {
                let past = (done + low) - below;
                ranges.push(Range {
                    gpa: Gpa(FOUR_GIB.checked_add(past).ok_or(overflow)?),
                    len: size - low,
                    backing,
                    offset: RamOffset(low),
                });
            }
            done = done.checked_add(size).ok_or(overflow)?;
        }
        Self::new(ranges)
    }

    /// The ranges, sorted by guest physical address.
    pub fn ranges(&self) -> &[Range] {
        &self.ranges
    }

    /// Bytes of RAM in all.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// How many backings the layout speaks of.
    pub fn backings(&self) -> usize {
        self.needs.len()
    }

    /// How many bytes backing number `backing` must have at least; 0 for one
    /// that the layout does not use.
    pub fn needs(&self, backing: usize) -> u64 {
        self.needs.get(backing).copied().unwrap_or(0)
    }

    /// The range that holds `gpa`.
    pub fn range_of(&self, gpa: Gpa) -> Option<&Range> {
        let after = self.ranges.partition_point(|range| range.gpa <= gpa);
        let range = self.ranges.get(after.checked_sub(1)?)?;
        (gpa < range.end()).then_some(range)
    }

    /// Where `gpa` lies, and how far the range goes on from there.
    pub fn place(&self, gpa: Gpa) -> Option<Place> {
        let range = self.range_of(gpa)?;
        let into = gpa.0 - range.gpa.0;
        Some(Place {
            backing: range.backing,
            // `new` has checked offset + len, and into < len.
            offset: RamOffset(range.offset.0 + into),
            contiguous: range.len - into,
        })
    }

    /// Cuts a copy of `buf.len()` bytes from `gpa` on into what lies in one
    /// piece each, and has `copy` fill these.
    ///
    /// # Errors
    /// [`RamError::Unmapped`] where a byte is not RAM; what lies before it
    /// was filled.
    pub(super) fn pieces(
        &self,
        gpa: Gpa,
        buf: &mut [u8],
        mut copy: impl FnMut(Place, &mut [u8]),
    ) -> Result<(), RamError> {
        let unmapped = RamError::Unmapped {
            gpa,
            len: buf.len() as u64,
        };
        let mut at = gpa;
        let mut rest = buf;
        while !rest.is_empty() {
            let Some(place) = self.place(at) else {
                return Err(unmapped);
            };
            let len = place.contiguous.min(rest.len() as u64);
            let (now, later) = rest.split_at_mut(len as usize);
            copy(place, now);
            rest = later;
            // Cannot overflow: the layout has room for these bytes.
            at = Gpa(at.0.saturating_add(len));
        }
        Ok(())
    }

    /// The first populated address at or after `gpa`, where `find` tells it
    /// for one backing: its first populated offset in `[from, end)`.
    pub(super) fn next_populated(
        &self,
        gpa: Gpa,
        find: impl Fn(usize, u64, u64) -> Option<u64>,
    ) -> Option<Gpa> {
        let first = self.ranges.partition_point(|range| range.end() <= gpa);
        self.ranges.iter().skip(first).find_map(|range| {
            let start = gpa.max(range.gpa);
            let from = range.offset.0 + (start.0 - range.gpa.0);
            let found = find(range.backing, from, range.offset.0 + range.len)?;
            Some(Gpa(range.gpa.0 + (found - range.offset.0)))
        })
    }

    /// Where all of `[gpa, gpa + len)` lies, if it is in one range.
    ///
    /// # Errors
    /// [`RamError::Unmapped`] if it is not RAM, or crosses from one range
    /// into another.
    pub fn resolve(&self, gpa: Gpa, len: u64) -> Result<Place, RamError> {
        self.place(gpa)
            .filter(|place| len <= place.contiguous)
            .ok_or(RamError::Unmapped { gpa, len })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GIB: u64 = 1 << 30;

    fn spans(layout: &Layout) -> Vec<(u64, u64, u64)> {
        let span = |r: &Range| (r.gpa.0, r.len, r.offset.0);
        layout.ranges().iter().map(span).collect()
    }

    #[test]
    fn i440fx_splits_at_3_gib_from_3_5_gib_on() {
        let whole = Layout::pc(0xe000_0000 - PAGE_SIZE, MachineKind::I440fx).unwrap();
        assert_eq!(spans(&whole), [(0, 0xe000_0000 - PAGE_SIZE, 0)]);
        let split = Layout::pc(0xe000_0000, MachineKind::I440fx).unwrap();
        assert_eq!(
            spans(&split),
            [(0, 3 * GIB, 0), (4 * GIB, GIB / 2, 3 * GIB)]
        );
    }

    #[test]
    fn q35_splits_at_2_gib_from_2_75_gib_on() {
        let whole = Layout::pc(0xb000_0000 - PAGE_SIZE, MachineKind::Q35).unwrap();
        assert_eq!(whole.ranges().len(), 1);
        let split = Layout::pc(4 * GIB, MachineKind::Q35).unwrap();
        assert_eq!(
            spans(&split),
            [(0, 2 * GIB, 0), (4 * GIB, 2 * GIB, 2 * GIB)]
        );
        assert_eq!(split.total(), 4 * GIB);
        assert_eq!(split.needs(0), 4 * GIB);
    }

    #[test]
    fn numa_nodes_follow_each_other_across_the_hole() {
        let layout = Layout::pc_nodes(&[GIB, 2 * GIB], MachineKind::Q35, None).unwrap();
        assert_eq!(
            layout.ranges(),
            [
                Range {
                    gpa: Gpa(0),
                    len: GIB,
                    backing: 0,
                    offset: RamOffset(0)
                },
                Range {
                    gpa: Gpa(GIB),
                    len: GIB,
                    backing: 1,
                    offset: RamOffset(0)
                },
                Range {
                    gpa: Gpa(4 * GIB),
                    len: GIB,
                    backing: 1,
                    offset: RamOffset(GIB)
                },
            ]
        );
        assert_eq!((layout.needs(0), layout.needs(1)), (GIB, 2 * GIB));
    }

    #[test]
    fn max_ram_below_4g_moves_the_split_as_in_qemu() {
        use MachineKind::{I440fx, Q35};
        let below = |machine, size, limit| {
            let layout = Layout::pc_nodes(&[size], machine, Some(limit)).unwrap();
            (layout.ranges()[0].len, layout.ranges().len())
        };
        // RAM of less than the limit is not split, of just as much it is, and
        // on i440fx never above 3 GiB.
        assert_eq!(below(I440fx, GIB, 2 * GIB), (GIB, 1));
        assert_eq!(below(I440fx, 2 * GIB, 2 * GIB), (2 * GIB, 1));
        assert_eq!(below(I440fx, 3 * GIB, 2 * GIB), (2 * GIB, 2));
        assert_eq!(below(I440fx, 7 * GIB / 2, 4 * GIB), (7 * GIB / 2, 1));
        assert_eq!(below(I440fx, 4 * GIB, 4 * GIB), (3 * GIB, 2));
        // On q35 the limit only ever lowers.
        assert_eq!(below(Q35, 4 * GIB, 4 * GIB), (2 * GIB, 2));
        assert_eq!(below(Q35, 4 * GIB, GIB), (GIB, 2));
        assert_eq!(below(Q35, 2 * GIB, GIB), (GIB, 2));
        assert_eq!(below(Q35, 2 * GIB, 3 * GIB), (2 * GIB, 1));
    }

    #[test]
    fn modules_are_backings_of_their_own() {
        let nodes = Layout::pc_nodes(&[GIB, GIB], MachineKind::Q35, None).unwrap();
        let at = Gpa(4 * GIB);
        let layout = nodes.clone().with_modules(&[(at, GIB / 4)]).unwrap();
        assert_eq!((layout.backings(), layout.needs(2)), (3, GIB / 4));
        let place = layout.resolve(Gpa(at.0 + 8), 8).unwrap();
        assert_eq!((place.backing, place.offset), (2, RamOffset(8)));
        assert!(layout.resolve(Gpa(at.0 + GIB / 4), 1).is_err());
        let inside = nodes.clone().with_modules(&[(Gpa(GIB), GIB)]);
        assert_eq!(inside, Err(LayoutError::Overlap { gpa: Gpa(GIB) }));
        assert_eq!(nodes.clone().with_modules(&[]), Ok(nodes));
    }

    #[test]
    fn machine_names_are_libvirts() {
        assert_eq!(MachineKind::from_name("pc-q35-7.2"), Some(MachineKind::Q35));
        assert_eq!(
            MachineKind::from_name("pc-i440fx-7.2"),
            Some(MachineKind::I440fx)
        );
        assert_eq!(MachineKind::from_name("microvm"), None);
    }

    #[test]
    fn nothing_resolves_in_the_hole_or_across_an_end() {
        let layout = Layout::pc(4 * GIB, MachineKind::Q35).unwrap();
        assert!(layout.resolve(Gpa(2 * GIB), 1).is_err());
        assert!(layout.resolve(Gpa(2 * GIB - 8), 9).is_err());
        assert!(layout.resolve(Gpa(u64::MAX), u64::MAX).is_err());
        let high = layout.resolve(Gpa(4 * GIB + 5), 3).unwrap();
        assert_eq!(high.offset, RamOffset(2 * GIB + 5));
        assert_eq!(high.contiguous, 2 * GIB - 5);
    }

    #[test]
    fn impossible_layouts_are_refused() {
        let range = |gpa, len, offset| Range {
            gpa: Gpa(gpa),
            len,
            backing: 0,
            offset: RamOffset(offset),
        };
        assert_eq!(Layout::new(vec![]), Err(LayoutError::Empty));
        assert_eq!(Layout::flat(4095), Err(LayoutError::Empty));
        let overlap = Layout::new(vec![range(0x1000, 0x2000, 0), range(0, 0x2000, 0)]);
        assert_eq!(overlap, Err(LayoutError::Overlap { gpa: Gpa(0x1000) }));
        let last = u64::MAX - 0xfff;
        assert!(matches!(
            Layout::new(vec![range(last, 0x2000, 0)]),
            Err(LayoutError::Overflow { .. })
        ));
        assert!(matches!(
            Layout::new(vec![range(0, 0x2000, last)]),
            Err(LayoutError::Overflow { .. })
        ));
        assert!(matches!(
            Layout::new(vec![range(0, 100, 0)]),
            Err(LayoutError::Unaligned { .. })
        ));
        assert!(Layout::split(8 * GIB, 5 * GIB).is_err());
    }

    proptest! {
        /// Any size of RAM is placed completely, each byte once.
        #[test]
        fn all_ram_is_placed(
            pages in 1u64..(1 << 22),
            q35: bool,
            limit in prop::option::of(1u64..(1 << 20)),
        ) {
            let machine = if q35 { MachineKind::Q35 } else { MachineKind::I440fx };
            let size = pages * PAGE_SIZE;
            let limit = limit.map(|pages| pages * PAGE_SIZE);
            let layout = Layout::pc_nodes(&[size], machine, limit).unwrap();
            prop_assert_eq!(layout.total(), size);
            prop_assert_eq!(layout.needs(0), size);
            let mut next = 0;
            for range in layout.ranges() {
                prop_assert_eq!(range.offset.0, next);
                next += range.len;
            }
        }

        /// What is accepted resolves to inside the backing, whatever is asked.
        #[test]
        fn resolve_stays_inside(
            pieces in prop::collection::vec((0u64..64, 1u64..16, 0u64..64), 1..8),
            gpa in 0u64..(80 << 12),
            len: u16,
        ) {
            let ranges = pieces.iter().map(|&(gpa, len, offset)| Range {
                gpa: Gpa(gpa << 12),
                len: len << 12,
                backing: 0,
                offset: RamOffset(offset << 12),
            });
            if let Ok(layout) = Layout::new(ranges.collect()) {
                if let Ok(place) = layout.resolve(Gpa(gpa), len.into()) {
                    prop_assert!(place.offset.0 + u64::from(len) <= layout.needs(0));
                    prop_assert!(u64::from(len) <= place.contiguous);
                }
            }
        }
    }
}
