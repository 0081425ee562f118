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

use std::ops::Range;

use memchr::memmem;

use crate::ram::{Gpa, GuestRam};

use super::find::STEP;
use super::{Gva, Symbols};

/// More symbols than any kernel has; an allyesconfig kernel has about a
/// million.
const MAX_SYMBOLS: u32 = 4 << 20;

/// How many entries of the list are copied at a time: a list that differs
/// early costs no more than that.
const CHUNK: usize = 1 << 10;

/// How many symbols may lie before the first function, those of per-CPU data.
const MAX_BEFORE: usize = 64 << 10;

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
    if ram.read(gpa, &mut bytes).is_err() {
        return false;
    }
    memmem::find_iter(&bytes, "swapper").any(|at| {
        let name = bytes.get(at..).unwrap_or_default();
        name.starts_with(b"swapper\0") || name.starts_with(b"swapper/0\0")
    })
}

/// Where System.map has functions: what a kernel's own list is compared with.
/// Made once for a search, for a guest can have many places compared.
pub(super) struct Functions {
    /// Where functions begin.
    starts: Vec<Gva>,
    /// Where anything in the code has a name. Some versions list the
    /// compiler's padding in one of the two lists.
    all: Vec<Gva>,
    text: Range<Gva>,
}

impl Functions {
    pub(super) fn of(symbols: &Symbols) -> Self {
        Self {
            starts: symbols.function_starts().collect(),
            all: symbols.text_addresses().collect(),
            text: symbols.text(),
        }
    }

    /// How many entries the list of the same build can have up to the end of
    /// its code, even if each address has another name too.
    fn most(&self) -> usize {
        MAX_BEFORE.saturating_add(self.all.len().saturating_mul(2))
    }
}

/// Compares the addresses of functions in the kernel's kallsyms tables with
/// those of System.map. Since the tables are constant, this works from the
/// moment that the image is in memory, long before the kernel runs.
///
/// Corresponds to `kallsyms_sym_address()`, kernel/kallsyms.c: with
/// CONFIG_KALLSYMS_ABSOLUTE_PERCPU (x86 up to 6.14) an offset below 0 stands
/// for `relative_base - 1 - offset`; without, it is added to the base. The
/// table is in the order of addresses, for the kernel looks names up in it by
/// halves. So both lists are gone through side by side, and no further than to
/// where they cannot be of one build any more.
///
/// System.map and kallsyms are filtered differently, so each may lack some
/// symbols of the other. But in one build, only one of the two does: if each
/// has functions where the other has none, they are of different builds.
pub(super) fn compare_functions(
    ram: &dyn GuestRam,
    symbols: &Symbols,
    functions: &Functions,
    image: Image,
) -> FunctionTable {
    if !symbols.tell_of_kallsyms() {
        return FunctionTable::Unknown;
    }
    // Where the tables should be and cannot be read, nothing is the same.
    if is_same(ram, symbols, functions, image) == Some(true) {
        FunctionTable::Same
    } else {
        FunctionTable::Other
    }
}

impl Symbols {
    /// Whether they tell where the kernel's own list of its symbols lies, so that the two
    /// can be compared. A saved /proc/kallsyms does not.
    pub fn tell_of_kallsyms(&self) -> bool {
        let tables = [
            "kallsyms_num_syms",
            "kallsyms_offsets",
            "kallsyms_relative_base",
        ];
        tables.iter().all(|name| self.address(name).is_some())
    }
}

/// Whether the kernel's list has the functions of System.map. `None`: it has
/// no list where System.map says.
fn is_same(
    ram: &dyn GuestRam,
    symbols: &Symbols,
    functions: &Functions,
    image: Image,
) -> Option<bool> {
    let base = relative_base(ram, symbols, image)?;
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
    let percpu = |offset: i32| match offset {
        0.. => u64::from(offset.unsigned_abs()),
        _ => base
            .wrapping_sub(1)
            .wrapping_add(u64::from(offset.unsigned_abs())),
    };
    let plain = |offset: i32| base.wrapping_add(u64::from(offset as u32));
    let mut forms = (Comparison::new(functions), Comparison::new(functions));
    let most = functions.most().min(count as usize);
    let mut bytes = vec![0; CHUNK * 4];
    let mut done = 0;
    while done < most && (forms.0.goes_on() || forms.1.goes_on()) {
        let now = CHUNK.min(most - done) * 4;
        let part = bytes.get_mut(..now)?;
        ram.read(start.checked_add(done as u64 * 4)?, part).ok()?;
        for word in part.chunks_exact(4).filter_map(|word| word.try_into().ok()) {
            let offset = i32::from_le_bytes(word);
            forms.0.next(Gva(percpu(offset)));
            forms.1.next(Gva(plain(offset)));
        }
        done += now / 4;
    }
    Some(forms.0.ends_alike() || forms.1.ends_alike())
}

/// Two lists of addresses, ours and the guest's, side by side.
struct Comparison<'a> {
    functions: &'a Functions,
    /// How many of our functions, and of all our names, were passed.
    passed: (usize, usize),
    last: Gva,
    /// Functions that both have, that only we have, and that only they have.
    shared: usize,
    ours_only: usize,
    theirs_only: usize,
    state: Progress,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Progress {
    InText,
    /// The guest's list is past the end of the code.
    Past,
    Unlike,
}

impl<'a> Comparison<'a> {
    fn new(functions: &'a Functions) -> Self {
        Self {
            functions,
            passed: (0, 0),
            last: Gva(0),
            shared: 0,
            ours_only: 0,
            theirs_only: 0,
            state: Progress::InText,
        }
    }

    fn goes_on(&self) -> bool {
        self.state == Progress::InText
    }

    /// Takes the next address of the guest's list.
    fn next(&mut self, address: Gva) {
        if !self.goes_on() || address == self.last {
            return;
        }
        if address < self.last {
            self.state = Progress::Unlike;
            return;
        }
        self.last = address;
        if address >= self.functions.text.end {
            self.state = Progress::Past;
        } else if address >= self.functions.text.start {
            self.ours_only += skip(&self.functions.starts, &mut self.passed.0, address);
            skip(&self.functions.all, &mut self.passed.1, address);
            let is_next = |list: &[Gva], at| list.get(at) == Some(&address);
            self.shared += usize::from(is_next(&self.functions.starts, self.passed.0));
            self.passed.0 += usize::from(is_next(&self.functions.starts, self.passed.0));
            self.theirs_only += usize::from(!is_next(&self.functions.all, self.passed.1));
            if !self.may_be_alike(self.functions.starts.len()) {
                self.state = Progress::Unlike;
            }
        }
    }

    /// Whether what only one of the lists has is little, and in one of them.
    fn may_be_alike(&self, of: usize) -> bool {
        let few = self.ours_only <= of / 10 && self.theirs_only <= of / 10;
        few && (self.ours_only == 0 || self.theirs_only == 0)
    }

    /// What it comes to, when there is no more.
    fn ends_alike(mut self) -> bool {
        self.ours_only += self.functions.starts.len().saturating_sub(self.passed.0);
        self.state != Progress::Unlike && self.shared > 0 && self.may_be_alike(self.shared)
    }
}

/// Passes what lies before `address`, and says how much that is.
fn skip(list: &[Gva], passed: &mut usize, address: Gva) -> usize {
    let rest = list.get(*passed..).unwrap_or_default();
    let before = rest.iter().take_while(|&&ours| ours < address).count();
    *passed += before;
    before
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
