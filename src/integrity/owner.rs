//! Whose code an address is.
//!
//! Besides the kernel's own text and its modules', code comes to be while a
//! kernel runs: Ftrace's trampolines, the instructions that kprobes moved out of
//! the way, and BPF programs. The kernel keeps lists of all of them (and of thunks
//! none that is needed, `its.rs`). Those lists are the guest's word; but whoever is on none of them has no name for what it
//! runs, and that is what is looked for.
//!
//! So that no entry of a list speaks for more than it is, it has what a kernel can
//! make and no more: memory where kernels allocate code, in one piece that can be
//! executed (behind each allocation is a page that cannot), apart from every module
//! and from the other entries of its list. One that is not so has nothing.

use std::cmp::Reverse;
use std::fmt;
use std::ops::Range;

use super::its;
use super::view::{Obstacle, View};
use crate::kernel::{modules, Executable, Gva, Module};

/// What Ftrace's trampolines are called.
pub(super) const FTRACE: &str = "a trampoline of Ftrace's";
/// What instructions are called that kprobes moved, and code that was made for them.
pub(super) const KPROBE: &str = "instructions that a kprobe moved";
/// A page, of instructions that kprobes moved.
const PAGE: u64 = 4096;
/// PMD_SIZE: what BPF programs share, for each node (`bpf_prog_pack`,
/// kernel/bpf/core.c).
const PACK: u64 = 2 << 20;
/// More nodes than any machine has.
const MAX_NODES: u32 = 1024;
/// A BPF program is no longer: the kernel takes a million instructions
/// (`BPF_COMPLEXITY_LIMIT_INSNS`), most of which become 3 to 5 bytes.
const MAX_PROGRAM: u64 = 16 << 20;
/// Where code is allocated, `MODULES_VADDR` to `MODULES_END` with and without KASLR
/// (arch/x86/include/asm/pgtable_64_types.h); the kernel's image may lie in it.
const AREA: Range<Gva> = Gva(0xffff_ffff_a000_0000)..Gva(0xffff_ffff_ff00_0000);
/// How many BPF programs are looked past for the memory that they lie in.
const MAX_INSIDE: usize = 1024;
/// The kernel's own programs in memory below 1 MiB.
const MEGABYTE: u64 = 1 << 20;

/// Whose an address is. All text is fit for a terminal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    /// A function of the kernel's.
    Kernel(String),
    /// A module of the guest's list.
    Module(String),
    /// Code that the kernel made, by its kind.
    Made(String),
    /// Something of the kernel's that is no code.
    Data(String),
    /// Nobody's.
    Nobody,
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kernel(name) => write!(f, "the kernel: {name}"),
            Self::Module(name) => write!(f, "the module {name}"),
            Self::Made(kind) => f.write_str(kind),
            Self::Data(name) => write!(f, "no code, but the kernel's {name}"),
            Self::Nobody => f.write_str("nobody in the guest's lists"),
        }
    }
}

/// Who there is.
pub(super) struct Owners {
    pub(super) modules: Vec<Module>,
    /// Code that the kernel made, and what it is, by its beginning.
    made: Vec<Claim>,
    /// The code of the modules and what the kernel made, in order, none of which
    /// touches another.
    code: Vec<Range<Gva>>,
    /// What could not be listed.
    pub(super) doubts: Vec<String>,
    /// What can be executed.
    pub(super) executable: Executable,
}

/// Code that the kernel made, and what it is.
type Claim = (Range<Gva>, String);

impl Owners {
    /// Whether a module may be what another one is built on: it was there when that
    /// came. The list has the youngest first.
    pub(super) fn may_serve(&self, module: &Module, other: &Module) -> bool {
        let place = |of: &Module| self.modules.iter().position(|one| one.at == of.at);
        place(module) >= place(other)
    }

    pub(super) fn of(view: &View<'_>) -> Self {
        let mut owners = Self::made(view);
        let listed = view
            .btf()
            .map_err(|error| error.to_string())
            .and_then(|btf| {
                modules(view.ram, view.kernel, view.symbols, btf).map_err(|error| error.to_string())
            });
        match listed {
            Ok(modules) => owners.modules = modules,
            Err(doubt) => owners.doubts.insert(0, doubt),
        }
        owners.arranged(view)
    }

    /// The code that the kernel made.
    fn made(view: &View<'_>) -> Self {
        let mut owners = Self {
            modules: Vec::new(),
            made: Vec::new(),
            code: Vec::new(),
            doubts: Vec::new(),
            executable: view.kernel.tables.executable(view.ram),
        };
        type List = fn(&View<'_>, &mut Vec<Claim>) -> Result<(), Obstacle>;
        // Each is there only in a kernel that is built with it.
        let lists: [(&str, List); 4] = [
            ("ftrace_ops_list", trampolines),
            ("kprobe_insn_slots", probe_slots),
            ("bpf_kallsyms", bpf_programs),
            ("pack_list", bpf_packs),
        ];
        let there = |symbol| view.symbols.address(symbol).is_some();
        for (_, list) in lists.into_iter().filter(|(symbol, _)| there(symbol)) {
            let mut claims = Vec::new();
            if let Err(error) = list(view, &mut claims) {
                owners.doubts.push(error.to_string());
            }
            claims.retain_mut(|(range, _)| owners.is_possible(view, range));
            owners.made.extend(apart(claims));
        }
        if there("real_mode_header") {
            if let Err(error) = real_mode(view, &mut owners.made) {
                owners.doubts.push(error.to_string());
            }
        }
        owners
    }

    /// Cuts what may have been allocated to the piece of executable memory that it
    /// begins in. False where none is left, or it lies where no code is allocated.
    fn is_possible(&self, view: &View<'_>, range: &mut Range<Gva>) -> bool {
        let image = view.kernel.in_image(view.kernel.link(range.start));
        *range = self.cut(range);
        AREA.contains(&range.start) && range.end <= AREA.end && !image && range.start < range.end
    }

    /// What can be executed of a range, from its beginning on, in one piece.
    fn cut(&self, range: &Range<Gva>) -> Range<Gva> {
        let pieces = &self.executable.pieces;
        let after = pieces.partition_point(|piece| piece.start <= range.start);
        let piece = after.checked_sub(1).and_then(|last| pieces.get(last));
        let end = piece.map_or(range.start, |piece| piece.end.min(range.end));
        range.start..end.max(range.start)
    }

    /// All in order, to be looked up.
    fn arranged(mut self, view: &View<'_>) -> Self {
        let modules = &self.modules;
        let memory = || modules.iter().flat_map(|module| &module.memory);
        self.made
            .retain(|(range, _)| !memory().any(|theirs| overlap(range, theirs)));
        self.code = self.all_code();
        if view.symbols.address(its::SYMBOL).is_some() {
            self.made.extend(self.thunks(view));
            self.code = self.all_code();
        }
        // Of those that begin together the largest first.
        self.made
            .sort_by_key(|(range, _)| (range.start, Reverse(range.end)));
        self
    }

    /// What the kernel made and the modules' code, in order.
    fn all_code(&self) -> Vec<Range<Gva>> {
        let made = self.made.iter().map(|(range, _)| range.clone());
        let modules = self.modules.iter().flat_map(|module| &module.code);
        joined(made.chain(modules.map(|range| self.cut(range))).collect())
    }

    /// Pages of thunks, by what is in them, among those that are nobody's.
    fn thunks(&self, view: &View<'_>) -> Vec<Claim> {
        let pages = self.executable.pieces.iter().flat_map(|piece| {
            let pages = (piece.start.0..piece.end.0).step_by(PAGE as usize);
            pages.map(|at| range(Gva(at), PAGE))
        });
        pages
            .filter(|page| AREA.contains(&page.start))
            .filter(|page| !view.kernel.in_image(view.kernel.link(page.start)) && !self.have(page))
            .take(its::MAX_PAGES)
            .filter(|page| its::is_page(view, page.start))
            .map(|page| (page, its::THUNKS.to_owned()))
            .collect()
    }

    /// The module of the list that has code there.
    pub(super) fn module_with_code(&self, at: Gva) -> Option<&str> {
        let mut modules = self.modules.iter();
        let module = modules.find(|module| module.code.iter().any(|code| code.contains(&at)));
        module.map(|module| module.name.as_str())
    }

    /// Whether a thunk of the kernel's is at `at`, which jumps where `register` says.
    pub(super) fn have_thunk(&self, view: &View<'_>, at: Gva, register: u8) -> bool {
        self.owner(view, at) == Owner::Made(its::THUNKS.to_owned())
            && its::is_thunk(view, at, register)
    }

    /// Whether a trampoline of Ftrace's begins there.
    pub(super) fn begins_trampoline(&self, at: Gva) -> bool {
        let first = self.made.partition_point(|(range, _)| range.start < at);
        let mut from = self.made.iter().skip(first);
        let mut begin = from.by_ref().take_while(|(range, _)| range.start == at);
        begin.any(|(_, kind)| kind == FTRACE)
    }

    /// Whether any of this is a module's code, or code that the kernel made.
    pub(super) fn have(&self, piece: &Range<Gva>) -> bool {
        let after = self.code.partition_point(|range| range.start < piece.end);
        let last = after.checked_sub(1).and_then(|last| self.code.get(last));
        last.is_some_and(|range| range.end > piece.start)
    }

    pub(super) fn owner(&self, view: &View<'_>, at: Gva) -> Owner {
        if view.in_text(at) {
            return Owner::Kernel(view.name(at));
        }
        if let Some(module) = self.modules.iter().find(|module| module.has(at)) {
            let offset = module.code.iter().find(|code| code.contains(&at));
            let offset = offset.map_or(0, |code| at.wrapping_sub(code.start));
            return Owner::Module(format!("{} (+{offset:#x})", module.name));
        }
        // The innermost: BPF programs lie in memory that is listed for many of them.
        let after = self.made.partition_point(|(range, _)| range.start <= at);
        let before = self.made.get(..after).unwrap_or_default();
        let mut before = before.iter().rev().take(MAX_INSIDE);
        if let Some((_, kind)) = before.find(|(range, _)| range.contains(&at)) {
            return Owner::Made(kind.clone());
        }
        if view.kernel.in_image(view.kernel.link(at)) {
            return Owner::Data(view.name(at));
        }
        Owner::Nobody
    }
}

fn overlap(one: &Range<Gva>, other: &Range<Gva>) -> bool {
    one.start < other.end && other.start < one.end
}

/// Those that touch no other. The same one twice is one.
fn apart(mut claims: Vec<Claim>) -> Vec<Claim> {
    claims.sort_by_key(|(range, _)| (range.start, range.end));
    claims.dedup_by(|(one, _), (other, _)| one == other);
    let mut reached = Gva(0);
    let mut next: Vec<Gva> = claims
        .iter()
        .skip(1)
        .map(|(range, _)| range.start)
        .collect();
    next.push(Gva(u64::MAX));
    let mut next = next.into_iter();
    claims.retain(|(range, _)| {
        let before = reached;
        reached = before.max(range.end);
        let behind = next.next().unwrap_or(Gva(u64::MAX));
        before <= range.start && range.end <= behind
    });
    claims
}

/// Pieces in order, those that touch made one.
fn joined(mut pieces: Vec<Range<Gva>>) -> Vec<Range<Gva>> {
    pieces.sort_by_key(|piece| piece.start);
    let mut joined: Vec<Range<Gva>> = Vec::new();
    for piece in pieces {
        match joined.last_mut() {
            Some(last) if piece.start <= last.end => last.end = last.end.max(piece.end),
            _ => joined.push(piece),
        }
    }
    joined
}

fn range(start: Gva, length: u64) -> Range<Gva> {
    start..Gva(start.0.saturating_add(length))
}

/// `struct ftrace_ops` (include/linux/ftrace.h): those that Ftrace calls, from
/// `ftrace_ops_list` on, the last of which is `ftrace_list_end`.
pub(super) fn ftrace_ops(view: &View<'_>) -> Result<Vec<Gva>, Obstacle> {
    const WHAT: &str = "the list of Ftrace's callbacks";
    let next = view.btf()?.structure("ftrace_ops")?.field("next")?.offset;
    let end = view.address("ftrace_list_end")?;
    let mut all = Vec::new();
    let mut at = view.pointer(view.address("ftrace_ops_list")?, WHAT)?;
    while at != end && at.0 != 0 {
        if all.len() >= super::view::MAX_ENTRIES {
            return Err(Obstacle::Endless(WHAT));
        }
        all.push(at);
        at = view.pointer(at.wrapping_add(next.into()), WHAT)?;
    }
    Ok(all)
}

/// A trampoline of Ftrace's.
#[derive(Clone, Copy, Debug)]
pub(super) struct Trampoline {
    /// The callback that it was made for, a `struct ftrace_ops`.
    pub(super) ops: Gva,
    pub(super) start: Gva,
    /// How many bytes it has.
    pub(super) length: u64,
}

/// Those of registered callbacks, and those of the kernel's own that were: their
/// trampolines stay (`ftrace_ops_trampoline_list`, kernel/trace/ftrace.c).
pub(super) fn ftrace_trampolines(view: &View<'_>) -> Result<Vec<Trampoline>, Obstacle> {
    const WHAT: &str = "the list of Ftrace's trampolines";
    let ops = view.btf()?.structure("ftrace_ops")?;
    let (at, size) = (
        ops.field("trampoline")?.offset,
        ops.field("trampoline_size")?.offset,
    );
    let mut all = ftrace_ops(view)?;
    if let Ok(head) = view.address("ftrace_ops_trampoline_list") {
        all.extend(view.list(head, ops.field("list")?.offset, WHAT)?);
    }
    let mut trampolines = Vec::new();
    for ops in all {
        let start = view.pointer(ops.wrapping_add(at.into()), WHAT)?;
        let length = view.pointer(ops.wrapping_add(size.into()), WHAT)?.0;
        // One of the kernel's own text has no size here.
        if start.0 != 0 && length != 0 {
            trampolines.push(Trampoline { ops, start, length });
        }
    }
    // Most are on both lists.
    trampolines.sort_by_key(|one| (one.start, one.ops));
    trampolines.dedup_by_key(|one| (one.start, one.ops));
    Ok(trampolines)
}

fn trampolines(view: &View<'_>, made: &mut Vec<Claim>) -> Result<(), Obstacle> {
    let all = ftrace_trampolines(view)?.into_iter();
    // Whole pages are executable, what is behind it in them too.
    let pages = |one: Trampoline| range(one.start, one.length.next_multiple_of(PAGE));
    let possible = all.filter(|one| one.length <= PAGE);
    made.extend(possible.map(|one| (pages(one), FTRACE.to_owned())));
    Ok(())
}

/// `struct kprobe_insn_cache` and `struct kprobe_insn_page`, kernel/kprobes.c.
fn probe_slots(view: &View<'_>, made: &mut Vec<Claim>) -> Result<(), Obstacle> {
    const WHAT: &str = "the list of kprobes' instructions";
    let btf = view.btf()?;
    let pages = btf.structure("kprobe_insn_cache")?.field("pages")?.offset;
    let page = btf.structure("kprobe_insn_page")?;
    let (list, insns) = (page.field("list")?.offset, page.field("insns")?.offset);
    for cache in ["kprobe_insn_slots", "kprobe_optinsn_slots"] {
        let Ok(cache) = view.address(cache) else {
            continue;
        };
        view.each(cache.wrapping_add(pages.into()), list, WHAT, |page| {
            let start = view.pointer(page.wrapping_add(insns.into()), WHAT)?;
            made.push((range(start, PAGE), KPROBE.to_owned()));
            Ok(())
        })?;
    }
    Ok(())
}

/// What a BPF program is called.
pub(super) fn bpf_program(name: &str) -> String {
    format!("the BPF program {name}")
}

/// `struct bpf_ksym`, include/linux/bpf.h.
fn bpf_programs(view: &View<'_>, made: &mut Vec<Claim>) -> Result<(), Obstacle> {
    const WHAT: &str = "the list of BPF programs";
    let ksym = view.btf()?.structure("bpf_ksym")?;
    let [start, end, name, list] = ["start", "end", "name", "lnode"].map(|name| ksym.field(name));
    let (start, end, name, list) = (start?.offset, end?.offset, name?.offset, list?.offset);
    view.each(view.address("bpf_kallsyms")?, list, WHAT, |program| {
        let from = view.pointer(program.wrapping_add(start.into()), WHAT)?;
        let to = view.pointer(program.wrapping_add(end.into()), WHAT)?;
        let name = view.text(program.wrapping_add(name.into()));
        if from < to && to.wrapping_sub(from) <= MAX_PROGRAM {
            made.push((from..to, bpf_program(&name)));
        }
        Ok(())
    })
}

/// `struct bpf_prog_pack`, kernel/bpf/core.c: memory for many programs.
fn bpf_packs(view: &View<'_>, made: &mut Vec<Claim>) -> Result<(), Obstacle> {
    const WHAT: &str = "the list of memory for BPF programs";
    let pack = view.btf()?.structure("bpf_prog_pack")?;
    let (list, ptr) = (pack.field("list")?.offset, pack.field("ptr")?.offset);
    let nodes = match view.address("nr_node_ids") {
        Ok(at) => view.half(at, WHAT)?.clamp(1, MAX_NODES),
        Err(_) => 1,
    };
    view.each(view.address("pack_list")?, list, WHAT, |pack| {
        let start = view.pointer(pack.wrapping_add(ptr.into()), WHAT)?;
        let room = PACK * u64::from(nodes);
        made.push((range(start, room), "memory for BPF programs".to_owned()));
        Ok(())
    })
}

/// What processors begin with, in real mode (arch/x86/realmode/init.c).
fn real_mode(view: &View<'_>, made: &mut Vec<Claim>) -> Result<(), Obstacle> {
    const WHAT: &str = "the code of real mode";
    let start = view.pointer(view.address("real_mode_header")?, WHAT)?;
    let blob = view
        .address("real_mode_blob_end")?
        .wrapping_sub(view.address("real_mode_blob")?);
    let length = blob.next_multiple_of(PAGE);
    let low = view.pointer(view.address("page_offset_base")?, WHAT)?;
    if start.wrapping_sub(low) < MEGABYTE && length <= MEGABYTE {
        made.push((range(start, length), "the code of real mode".to_owned()));
    }
    Ok(())
}

#[cfg(test)]
impl Owners {
    /// These modules, and what the guest has in its lists of code that it made.
    pub(super) fn made_of(view: &View<'_>, modules: Vec<Module>) -> Self {
        let mut owners = Self::made(view);
        owners.modules = modules;
        owners.arranged(view)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_somebodys_is_found_however_the_pieces_lie() {
        let pieces = [(5, 8), (0, 2), (6, 7), (8, 9), (20, 30), (21, 22)];
        let code = joined(pieces.map(|(from, to)| Gva(from)..Gva(to)).to_vec());
        assert_eq!(code, [Gva(0)..Gva(2), Gva(5)..Gva(9), Gva(20)..Gva(30)]);
        let owners = Owners {
            modules: Vec::new(),
            made: Vec::new(),
            code,
            doubts: Vec::new(),
            executable: Executable::default(),
        };
        for from in 0..32 {
            for to in from + 1..33 {
                let there = pieces.iter().any(|&(start, end)| start < to && from < end);
                assert_eq!(owners.have(&(Gva(from)..Gva(to))), there, "{from}..{to}");
            }
        }
    }
}
