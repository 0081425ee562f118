//! Finding the kernel in guest RAM.
//!
//! A kernel's image is one piece of RAM that begins at a multiple of 2 MiB
//! (CONFIG_PHYSICAL_ALIGN is never less on x86-64), with or without KASLR.
//! So instead of searching all memory, the text of `linux_banner` is looked
//! for at the one place in each 2 MiB where System.map says it must be.
//!
//! That alone proves little: two builds may agree on the place of one symbol,
//! a kernel may still be starting, and whoever wrote the guest's memory may
//! have written the text there. What is found must pass every [`Check`]. The
//! image of a kernel that ran before a reboot passes too, until somebody
//! reuses its memory; therefore all are returned, and the caller takes the
//! one that lives.
//!
//! Whoever has the guest's kernel can plant the text at every such place, and
//! pass any of the checks too. It must neither hide the true kernel nor cost
//! the host much. So each place is looked at on its own, no number of false
//! ones ends the search (but [`MAX_KERNELS`] that pass every check, and then one at a
//! place that is known from before is among those that are given), and a place costs
//! little: the checks are a few small
//! copies, and the list of functions is read only as far as it is right. The
//! work is bounded by the guest's RAM, at less than a millisecond for each
//! 2 MiB of it, and that only where all of it was planted with care.

use std::cell::LazyCell;
use std::fmt;
use std::sync::Once;

use crate::ram::{Gpa, GuestRam, RamError};

use super::escape::escape;
use super::identify::{self, FunctionTable, Functions, Image};
use super::scan::{self, BANNER};
use super::{Gva, Kernel, PageTables, Symbols};

/// What the image is aligned to, in physical and in virtual memory.
pub(super) const STEP: u64 = 2 << 20;

/// __START_KERNEL_map, arch/x86/include/asm/page_64_types.h.
const START_KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;

/// KERNEL_IMAGE_SIZE with KASLR, same place: the image lies in the first GiB
/// from there.
const IMAGE_SPACE: u64 = 1 << 30;

/// Longer than any banner: release, builder, compiler and version are some
/// 200 bytes in Debian's.
const MAX_BANNER: usize = 1024;

/// How many kernels are returned. Each has 2 MiB of RAM that passes every check.
const MAX_KERNELS: usize = 4096;

/// What a place that has the right banner must pass to be a kernel, in the
/// order in which it is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Check {
    /// `linux_proc_banner` begins with the format that it has in the source.
    ProcBanner,
    /// `phys_base` gives a virtual base that a kernel can have.
    PhysBase,
    /// `__pgtable_l5_enabled` is 0 or 1.
    PagingMode,
    /// The kernel's own page tables lead from runtime addresses of the image
    /// to where the image is.
    PageTables,
    /// `init_task` holds the name of the idle task.
    InitTask,
    /// The kernel's own list of its symbols (kallsyms) has its functions at
    /// the addresses that System.map says.
    FunctionTable,
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ProcBanner => "the text of linux_proc_banner is not where it should be",
            Self::PhysBase => "phys_base gives an impossible base address",
            Self::PagingMode => "__pgtable_l5_enabled is neither 0 nor 1",
            Self::PageTables => "its page tables do not lead to it",
            Self::InitTask => "init_task has no idle task",
            Self::FunctionTable => "its own list of functions differs",
        })
    }
}

/// Why no kernel was found.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    /// Nothing in memory says that it is Linux.
    #[error(
        "there is no Linux kernel in the guest's memory ({searched} MiB in use{}); \
         has it booted yet?",
        if *.complete { "" } else { " searched, not all of it" }
    )]
    NoLinux {
        /// How much memory was searched, in MiB.
        searched: u64,
        /// Whether that was all memory in use.
        complete: bool,
    },
    /// A Linux is there, but not the one that System.map belongs to.
    #[error(
        "the guest runs another kernel than the one that the System.map belongs to (or is just \
         starting: then try again); the guest has: {}", .banners.join(" | ")
    )]
    OtherKernel {
        /// The banners found in memory, escaped; the first is the likeliest.
        /// Never empty.
        banners: Vec<String>,
    },
    /// The banner is in the right place by chance: the functions are not.
    #[error(
        "the System.map belongs to another build of the guest's kernel, whose functions have \
         other addresses; take the one that was made together with: {banner}"
    )]
    OtherBuild {
        /// The guest's banner, escaped.
        banner: String,
    },
    /// The image is there, but not as that of a running kernel.
    #[error(
        "the guest's kernel is in memory at {gpa}, but {check}; it is still starting (then try \
         again){}; the guest has: {banner}",
        if *.same_build { "" } else { ", or the System.map belongs to another build of it" }
    )]
    Unfinished {
        /// Where the image would begin.
        gpa: Gpa,
        /// The guest's banner, escaped.
        banner: String,
        /// The first check that failed.
        check: Check,
        /// Whether its list of functions shows that System.map is right.
        same_build: bool,
    },
    /// The symbol file lacks what the finder needs.
    #[error(
        "the System.map has no usable {0}; without the kernel's data symbols (in kallsyms: \
         CONFIG_KALLSYMS_ALL) the kernel cannot be found"
    )]
    Symbol(&'static str),
    /// The memory layer failed.
    #[error(transparent)]
    Ram(#[from] RamError),
}

/// Every kernel in guest RAM that `symbols` belong to and that passes all
/// checks, by their addresses; never empty.
///
/// Where there is none, memory is searched for what is there instead, which
/// takes about a second for each GiB in use. A caller that waits for a
/// guest to boot asks [`probe`] until it finds something.
///
/// # Errors
/// A [`FindError`] that says what is there instead.
pub fn find_all(ram: &dyn GuestRam, symbols: &Symbols) -> Result<Vec<Kernel>, FindError> {
    find_all_beside(ram, symbols, None)
}

/// Like [`find_all`]. Where one lies at `known`, it is among those that are given,
/// however many others there are.
///
/// # Errors
/// Like [`find_all`].
pub fn find_all_beside(
    ram: &dyn GuestRam,
    symbols: &Symbols,
    known: Option<Gpa>,
) -> Result<Vec<Kernel>, FindError> {
    let found = search(ram, symbols, known)?;
    if !found.kernels.is_empty() {
        return Ok(found.kernels);
    }
    if let Some(rejected) = found.rejected {
        return Err(rejected.explain(ram, symbols));
    }
    let scan = scan::banners(ram)?;
    // What was zeros because the file vanished is no verdict about the guest.
    ram.check()?;
    if scan.banners.is_empty() {
        return Err(FindError::NoLinux {
            searched: scan.searched >> 20,
            complete: scan.complete,
        });
    }
    Err(FindError::OtherKernel {
        banners: scan.banners,
    })
}

/// Like [`find_all`], without asking what is there instead: quick (a look at
/// each 2 MiB in use), and empty if there is no such kernel (yet).
///
/// # Errors
/// [`FindError::Symbol`] or [`FindError::Ram`].
pub fn probe(ram: &dyn GuestRam, symbols: &Symbols) -> Result<Vec<Kernel>, FindError> {
    Ok(search(ram, symbols, None)?.kernels)
}

/// Whether a kernel's banner lies `offset` bytes after a place where an image
/// may begin; that very banner, where one is given. As quick as [`probe`], and
/// no symbols are needed: what fails this need not be looked at further.
///
/// # Errors
/// If the memory layer failed.
pub fn has_banner(ram: &dyn GuestRam, offset: u64, banner: Option<&str>) -> Result<bool, RamError> {
    let mut at = Gpa(0);
    let mut found = false;
    while let Some(base) = next_candidate(ram, offset, at) {
        let text = scan::read_banner(ram, Gpa(base.0.saturating_add(offset)), MAX_BANNER);
        let is = |wanted: &str| {
            text.as_ref()
                .is_some_and(|there| escape(&there.text) == wanted)
        };
        found = banner.is_none_or(is);
        let Some(next) = base.checked_add(STEP).filter(|_| !found) else {
            break;
        };
        at = next;
    }
    ram.check()?;
    Ok(found)
}

/// The banners of the kernels in memory, escaped, the likeliest first: for
/// people, where nothing is known that fits. Takes about a second for each GiB
/// in use.
///
/// # Errors
/// If the memory layer failed.
pub fn banners(ram: &dyn GuestRam) -> Result<Vec<String>, RamError> {
    let scan = scan::banners(ram)?;
    ram.check()?;
    Ok(scan.banners)
}

/// What [`search`] found.
struct Found {
    kernels: Vec<Kernel>,
    /// Of the places that were no kernels, the one that came furthest.
    rejected: Option<Rejected>,
}

/// A place with the right banner that is not the kernel looked for.
struct Rejected {
    image: Image,
    banner: String,
    check: Check,
}

impl Rejected {
    /// What to tell: a kernel that is still starting, or another build.
    fn explain(self, ram: &dyn GuestRam, symbols: &Symbols) -> FindError {
        let Self {
            image,
            banner,
            check,
        } = self;
        let functions = Functions::of(symbols);
        match identify::compare_functions(ram, symbols, &functions, image) {
            FunctionTable::Other => FindError::OtherBuild { banner },
            table => FindError::Unfinished {
                gpa: image.base,
                banner,
                check,
                same_build: table == FunctionTable::Same,
            },
        }
    }
}

fn search(ram: &dyn GuestRam, symbols: &Symbols, known: Option<Gpa>) -> Result<Found, FindError> {
    static SAID: Once = Once::new();
    let anchors = Anchors::new(symbols)?;
    let functions = LazyCell::new(|| Functions::of(symbols));
    let mut kernels = Vec::new();
    let mut rejected: Option<Rejected> = None;
    let mut at = Gpa(0);
    if let Some(base) = known.filter(|base| base.0 % STEP == 0) {
        let its = examine(ram, symbols, &anchors, &functions, base);
        kernels.extend(its.and_then(Result::ok));
    }
    let examined = known.filter(|_| !kernels.is_empty());
    while let Some(base) = next_candidate(ram, anchors.banner, at) {
        if kernels.len() >= MAX_KERNELS {
            // It is looked at again and again.
            SAID.call_once(|| {
                log::warn!(
                    "the guest's memory is full of what looks like kernels; stopped looking at \
                     {base} (told once)"
                );
            });
            break;
        }
        if examined != Some(base) {
            match examine(ram, symbols, &anchors, &functions, base) {
                Some(Ok(kernel)) => kernels.push(kernel),
                Some(Err(next)) if rejected.as_ref().is_none_or(|last| next.check > last.check) => {
                    rejected = Some(next);
                }
                _ => {}
            }
        }
        let Some(next) = base.checked_add(STEP) else {
            break;
        };
        at = next;
    }
    ram.check()?;
    kernels.sort_unstable_by_key(|kernel| kernel.phys_text);
    Ok(Found { kernels, rejected })
}

/// The first multiple of 2 MiB from `at` on where the beginning of a banner
/// lies `banner` bytes further on.
fn next_candidate(ram: &dyn GuestRam, banner: u64, at: Gpa) -> Option<Gpa> {
    let text_len = BANNER.len() as u64;
    let mut base = at.0.checked_next_multiple_of(STEP)?;
    loop {
        let text = Gpa(base).checked_add(banner)?;
        let used = ram.next_populated(text)?;
        if used > text {
            // On to the first place whose banner is not before that.
            base = used
                .0
                .saturating_sub(banner)
                .checked_next_multiple_of(STEP)?;
            continue;
        }
        let mut bytes = [0; BANNER.len()];
        let there = ram.populated(text, text_len) && ram.read(text, &mut bytes).is_ok();
        if there && &bytes == BANNER {
            return Some(Gpa(base));
        }
        base = base.checked_add(STEP)?;
    }
}

/// Examines a place with the right text. `None`: not even the banner is whole.
fn examine(
    ram: &dyn GuestRam,
    symbols: &Symbols,
    anchors: &Anchors,
    functions: &LazyCell<Functions, impl FnOnce() -> Functions>,
    base: Gpa,
) -> Option<Result<Kernel, Rejected>> {
    let at = |offset: u64| Gpa(base.0.saturating_add(offset));
    let banner = scan::read_banner(ram, at(anchors.banner), MAX_BANNER)?;
    let banner = escape(&banner.text);
    let image = Image {
        base,
        link_text: anchors.text,
        span: anchors.span,
    };
    let rejected = |check| Rejected {
        image,
        banner: banner.clone(),
        check,
    };
    if let Some(offset) = anchors.proc_banner {
        if !identify::is_proc_banner(ram, at(offset)) {
            return Some(Err(rejected(Check::ProcBanner)));
        }
    }
    let phys_base = ram.read_u64(at(anchors.phys_base)).ok()?;
    let Some(text) = virtual_base(base, phys_base, anchors.span) else {
        return Some(Err(rejected(Check::PhysBase)));
    };
    let depths: &[u8] = match anchors.five_levels.map(|offset| ram.read_u32(at(offset))) {
        Some(Ok(0)) => &[4],
        Some(Ok(1)) => &[5],
        Some(_) => return Some(Err(rejected(Check::PagingMode))),
        // Kernels that keep it elsewhere: what leads to the image is right.
        None => &[4, 5],
    };
    let root = at(anchors.tables);
    let tables = depths.iter().map(|&levels| PageTables { root, levels });
    let leads = |tables: &PageTables| {
        [0, anchors.banner, anchors.phys_base]
            .iter()
            .all(|&offset| {
                let mapped = tables.walk(ram, text.wrapping_add(offset));
                mapped.is_ok_and(|mapped| mapped.gpa == at(offset))
            })
    };
    let Some(tables) = tables.into_iter().find(leads) else {
        return Some(Err(rejected(Check::PageTables)));
    };
    if let Some(offset) = anchors.init_task {
        if !identify::is_init_task(ram, at(offset)) {
            return Some(Err(rejected(Check::InitTask)));
        }
    }
    let kernel = Kernel {
        phys_text: base,
        slide: text.wrapping_sub(anchors.text),
        banner: banner.clone(),
        levels: tables.levels,
        tables,
        link_text: anchors.text,
        span: anchors.span,
    };
    Some(
        match identify::compare_functions(ram, symbols, functions, image) {
            FunctionTable::Same | FunctionTable::Unknown => Ok(kernel),
            FunctionTable::Other => Err(rejected(Check::FunctionTable)),
        },
    )
}

/// The runtime address of `_text`, by the definition of `phys_base`:
/// __phys_addr_symbol(x) = x - __START_KERNEL_map + phys_base,
/// arch/x86/include/asm/page_64.h. `phys_base` may be "negative".
fn virtual_base(base: Gpa, phys_base: u64, span: u64) -> Option<Gva> {
    let into = base.0.wrapping_sub(phys_base);
    let fits = into % STEP == 0 && into.checked_add(span)? <= IMAGE_SPACE;
    fits.then_some(Gva(START_KERNEL_MAP).wrapping_add(into))
}

/// Where things lie in the image, in bytes from `_text`.
struct Anchors {
    /// Link-time address of `_text` itself.
    text: Gva,
    span: u64,
    banner: u64,
    phys_base: u64,
    tables: u64,
    /// Until 6.16 or so; later kernels ask the processor.
    five_levels: Option<u64>,
    proc_banner: Option<u64>,
    init_task: Option<u64>,
}

impl Anchors {
    fn new(symbols: &Symbols) -> Result<Self, FindError> {
        let text = symbols.address("_text").ok_or(FindError::Symbol("_text"))?;
        let offset = |names: &[&str]| Some(symbols.address_of_any(names)?.wrapping_sub(text));
        // A file without _end: up to the last of the symbols used here.
        let end = offset(&["_end", "__brk_limit", "__bss_stop"]);
        let span = end.unwrap_or(IMAGE_SPACE - STEP);
        // Room for a word behind each of them.
        let inside = |offset: u64| offset.checked_add(8).is_some_and(|end| end <= span);
        let needed = |names: &[&'static str]| {
            let found = offset(names).filter(|&offset| inside(offset));
            found.ok_or(FindError::Symbol(names[0]))
        };
        if span == 0 || span > IMAGE_SPACE {
            return Err(FindError::Symbol("_end"));
        }
        let optional = |name| offset(&[name]).filter(|&offset| inside(offset));
        Ok(Self {
            text,
            span,
            banner: needed(&["linux_banner"])?,
            phys_base: needed(&["phys_base"])?,
            // Called init_level4_pgt up to 4.12.
            tables: needed(&["init_top_pgt", "swapper_pg_dir", "init_level4_pgt"])?,
            five_levels: optional("__pgtable_l5_enabled"),
            proc_banner: optional("linux_proc_banner"),
            init_task: optional("init_task"),
        })
    }
}
