//! Whether a kernel in memory is the very build that a System.map belongs to.
//!
//! A wrong System.map is the error that users of introspection tools report
//! most: everything seems to work and every name is wrong. The banner proves
//! the place of one symbol only, and sections are padded to whole pages, so
//! that data stays in place when a function grows. The kernel's own list of
//! its symbols, kallsyms, decides it: the addresses of its functions must be
//! those of System.map.
//!
//! This guards against mistakes. A hostile kernel can answer as it likes.

use crate::ram::{Gpa, GuestRam};

use super::find::STEP;
use super::{Gva, Symbols};

/// More symbols than any kernel has; an allyesconfig kernel has about a
/// million.
const MAX_SYMBOLS: u32 = 4 << 20;

/// How many entries of the list are copied at a time.
const CHUNK: usize = 16 << 10;

/// Larger than `struct task_struct` (some 9 KiB with everything on).
const MAX_TASK: usize = 32 << 10;

/// What the comparison of the kernel's list with System.map gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FunctionTable {
    /// The same build.
    Same,
    /// Another build.
    Other,
    /// System.map does not say where the list is: a kernel without
    /// CONFIG_KALLSYMS, or a saved /proc/kallsyms, which leaves it out.
    Unknown,
}

/// A piece of memory that is taken for a kernel's image.
#[derive(Clone, Copy, Debug)]
pub(super) struct Image {
    /// Where it begins.
    pub(super) base: Gpa,
    /// Link-time address of its beginning, `_text`.
    pub(super) link_text: Gva,
    /// Its length in bytes.
    pub(super) span: u64,
}

impl Image {
    /// Where a link-time address of the image lies.
    fn gpa(self, link: Gva) -> Option<Gpa> {
        let offset = link.wrapping_sub(self.link_text);
        (offset < self.span).then(|| self.base.checked_add(offset))?
    }
}

/// Whether `linux_proc_banner` (init/version.c) is at `gpa`.
pub(super) fn is_proc_banner(ram: &dyn GuestRam, gpa: Gpa) -> bool {
    const FORMAT: &[u8; 13] = b"%s version %s";
    let mut bytes = [0; FORMAT.len()];
    ram.read(gpa, &mut bytes).is_ok() && &bytes == FORMAT
}

/// Whether the task at `gpa` has the name of the idle task: INIT_TASK_COMM,
/// "swapper" (include/linux/init_task.h), to which init_idle() adds "/0".
/// Where the name lies in the structure differs between builds.
pub(super) fn is_init_task(ram: &dyn GuestRam, gpa: Gpa) -> bool {
    let room = ram.layout().place(gpa).map_or(0, |place| place.contiguous);
    let mut bytes = vec![0; MAX_TASK.min(usize::try_from(room).unwrap_or(MAX_TASK))];
    let named = |bytes: &[u8]| bytes.starts_with(b"swapper\0") || bytes.starts_with(b"swapper/0\0");
    ram.read(gpa, &mut bytes).is_ok() && bytes.windows(10).any(named)
}

/// Compares the addresses of functions in the kernel's kallsyms tables with
/// those of System.map. Since the tables are constant, this works from the
/// moment that the image is in memory, long before the kernel runs.
///
/// Corresponds to `kallsyms_sym_address()`, kernel/kallsyms.c: with
/// CONFIG_KALLSYMS_ABSOLUTE_PERCPU (x86 up to 6.14) an offset below 0 stands
/// for `relative_base - 1 - offset`; without, it is added to the base.
///
/// System.map and kallsyms are filtered differently, so each may lack some
/// symbols of the other. But in one build, only one of the two does: if each
/// has functions where the other has none, they are of different builds.
pub(super) fn compare_functions(
    ram: &dyn GuestRam,
    symbols: &Symbols,
    image: Image,
) -> FunctionTable {
    let tables = [
        "kallsyms_num_syms",
        "kallsyms_offsets",
        "kallsyms_relative_base",
    ];
    if tables.iter().any(|name| symbols.address(name).is_none()) {
        return FunctionTable::Unknown;
    }
    // Where the tables should be and cannot be read, nothing is the same.
    let tables = read_offsets(ram, symbols, image).zip(relative_base(ram, symbols, image));
    let Some((offsets, base)) = tables else {
        return FunctionTable::Other;
    };
    // Some versions list the compiler's padding symbols in one of the two.
    let ours: Vec<Gva> = symbols.function_starts().collect();
    let all: Vec<Gva> = symbols.text_addresses().collect();
    let text = symbols.text();
    let compare = |address_of: &dyn Fn(i32) -> u64| {
        let addresses = offsets.iter().map(|&offset| Gva(address_of(offset)));
        let mut theirs: Vec<Gva> = addresses.filter(|link| text.contains(link)).collect();
        theirs.sort_unstable();
        theirs.dedup();
        let shared = shared(&ours, &theirs);
        let known = self::shared(&all, &theirs);
        (shared, ours.len() - shared, theirs.len() - known)
    };
    let percpu = |offset: i32| match offset {
        0.. => u64::from(offset.unsigned_abs()),
        _ => base
            .wrapping_sub(1)
            .wrapping_add(u64::from(offset.unsigned_abs())),
    };
    let plain = |offset: i32| base.wrapping_add(u64::from(offset as u32));
    let (shared, ours_only, theirs_only) = compare(&percpu).max(compare(&plain));
    // What only one of the two lists, marks and such, is little.
    let alike = shared > 0 && ours_only <= shared / 10 && theirs_only <= shared / 10;
    if alike && (ours_only == 0 || theirs_only == 0) {
        FunctionTable::Same
    } else {
        FunctionTable::Other
    }
}

/// How many of `ours` are in `theirs` too; both are sorted.
fn shared(ours: &[Gva], theirs: &[Gva]) -> usize {
    let mut theirs = theirs.iter().peekable();
    let found = |address: &&Gva| {
        while theirs.next_if(|other| other < address).is_some() {}
        theirs.peek() == Some(address)
    };
    ours.iter().filter(found).count()
}

/// The link-time value of `kallsyms_relative_base`, which is the lowest
/// address that kallsyms lists: `_text` or close to it. What KASLR has added
/// to it, if it has already, is a multiple of [`STEP`].
fn relative_base(ram: &dyn GuestRam, symbols: &Symbols, image: Image) -> Option<u64> {
    let at = image.gpa(symbols.address("kallsyms_relative_base")?)?;
    let slid = ram.read_u64(at).ok()?;
    let text = image.link_text.0;
    Some(text.wrapping_add(slid.wrapping_sub(text) % STEP))
}

/// Copies `kallsyms_offsets`, if the kernel has it where System.map says.
fn read_offsets(ram: &dyn GuestRam, symbols: &Symbols, image: Image) -> Option<Vec<i32>> {
    let count = ram
        .read_u32(image.gpa(symbols.address("kallsyms_num_syms")?)?)
        .ok()?;
    let table = symbols.address("kallsyms_offsets")?;
    let start = image.gpa(table)?;
    // The whole table is in the image, whatever the count claims.
    let last = table.wrapping_add(u64::from(count) * 4);
    if count == 0 || count > MAX_SYMBOLS || image.gpa(last).is_none() {
        return None;
    }
    let mut offsets = Vec::with_capacity(count as usize);
    let mut bytes = vec![0; CHUNK * 4];
    while offsets.len() < count as usize {
        let now = CHUNK.min(count as usize - offsets.len()) * 4;
        let part = bytes.get_mut(..now)?;
        let at = start.checked_add(offsets.len() as u64 * 4)?;
        ram.read(at, part).ok()?;
        let words = part.chunks_exact(4).filter_map(|word| word.try_into().ok());
        offsets.extend(words.map(i32::from_le_bytes));
    }
    Some(offsets)
}
