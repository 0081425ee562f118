//! From an address to a name.
//!
//! Several names may stand at one address: a system call's wrapper and the
//! body that the compiler folded into it, an assembly function and its weak
//! alias, a mark of the linker. One is chosen for each address when the file
//! is read, the same every time.

use std::cmp::Reverse;

use super::{Symbol, Symbols};
use crate::kernel::Gva;

/// Length of the ENDBR64 instruction that functions begin with where the
/// kernel is built with CONFIG_X86_KERNEL_IBT; Ftrace's call site, which is
/// what it records as the function's address, then comes after it.
const ENDBR: u64 = 4;

/// Longer than any function is: how far after a module's last known symbol an
/// address is still given its name.
const MAX_MODULE_FUNCTION: u64 = 64 << 10;

/// A function of a module, as [`Symbols::lookup_module`] finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModuleFunction<'a> {
    /// The symbol before the address.
    pub name: &'a str,
    /// How many bytes after it.
    pub offset: u64,
    /// The module that it belongs to.
    pub module: &'a str,
}

impl Symbols {
    /// The function of the kernel's image that a link-time address lies in,
    /// and how far in it: the nearest symbol of code at or before it. `None`
    /// outside the kernel's code.
    pub fn lookup(&self, link: Gva) -> Option<(&str, u64)> {
        let symbol = self.function_before(link)?;
        Some((self.name_of(symbol), link.0 - symbol.address))
    }

    /// The nearest symbol of any kind at or before a link-time address of the
    /// kernel's image, data too, and how many bytes the address is past it.
    pub fn symbol_before(&self, link: Gva) -> Option<(&str, u64)> {
        let after = self
            .image
            .partition_point(|symbol| symbol.address <= link.0);
        let before = self.image.get(..after)?;
        let address = before.last()?.address;
        let aliases = before.iter().rev().take_while(|s| s.address == address);
        let best = aliases
            .map(|symbol| (rank(symbol, self.name_of(symbol)), symbol))
            .min_by(|(one, _), (other, _)| one.cmp(other))?
            .1;
        Some((self.name_of(best), link.0 - address))
    }

    /// Which of the names at a link-time address the kernel itself has for it
    /// (`kallsyms_lookup()`): the first, of those that scripts/kallsyms.c puts in order.
    /// Its input is in the order of `nm -n`, that of names where addresses are the same.
    pub(super) fn kallsyms_name(&self, link: Gva) -> Option<&str> {
        let from = self.image.partition_point(|symbol| symbol.address < link.0);
        let aliases = self.image.get(from..)?.iter();
        let aliases = aliases.take_while(|symbol| symbol.address == link.0);
        let order = |symbol: &Symbol| {
            let name = self.name_of(symbol);
            let weak = symbol.kind.eq_ignore_ascii_case(&b'w');
            (weak, is_of_linker_script(name), underscores(name), name)
        };
        aliases.map(order).min().map(|(.., name)| name)
    }

    /// Whether a function of the kernel's image begins at this link-time
    /// address, or does with an ENDBR64 instruction before it.
    pub fn is_function_start(&self, link: Gva) -> bool {
        let begins = |address: u64| self.function_at(address).is_some();
        self.in_text(link) && (begins(link.0) || link.0.checked_sub(ENDBR).is_some_and(begins))
    }

    /// Whether a link-time address lies in the code through which interrupts
    /// enter the kernel: the section that the kernel marks as such
    /// (`__irqentry_text_start`), or one of the C handlers that x86's entry
    /// code calls (DEFINE_IDTENTRY_SYSVEC and DEFINE_IDTENTRY_IRQ in
    /// arch/x86/include/asm/idtentry.h name them), which lie elsewhere.
    ///
    /// Of a call that an interrupt made inside traced code it is the caller
    /// that lies here, since the handlers themselves are not traced.
    pub fn in_irq_entry(&self, link: Gva) -> bool {
        self.irq_text.iter().any(|range| range.contains(&link))
            || self
                .lookup(link)
                .is_some_and(|(name, _)| is_irq_handler(name))
    }

    /// The function of a module that a runtime address lies in, where the file
    /// (a saved /proc/kallsyms) lists modules. In a boot with another `slide`
    /// than that of the file, if the file's is known, they lie elsewhere.
    pub fn lookup_module(&self, address: Gva, slide: u64) -> Option<ModuleFunction<'_>> {
        if self.modules_slide.is_some_and(|known| known != slide) {
            return None;
        }
        let after = self
            .modules
            .partition_point(|(s, _)| s.address <= address.0);
        let before = self.modules.get(..after)?;
        let (symbol, module) = before.iter().rev().find(|(s, _)| s.is_text())?;
        let offset = address.0 - symbol.address;
        let module = self.part(module);
        (offset < MAX_MODULE_FUNCTION).then_some(ModuleFunction {
            name: self.name_of(symbol),
            offset,
            module,
        })
    }

    /// Whether the address is code of the kernel's image.
    pub(super) fn in_text(&self, link: Gva) -> bool {
        self.main_text.contains(&link) || self.init_text.contains(&link)
    }

    /// The addresses at which functions of `_stext` to `_etext` begin, in
    /// order, each once.
    pub(in crate::kernel) fn function_starts(&self) -> impl Iterator<Item = Gva> + '_ {
        self.functions
            .iter()
            .filter_map(|&index| self.image.get(index as usize))
            .map(|symbol| Gva(symbol.address))
            .filter(|address| self.main_text.contains(address))
    }

    /// The addresses of all symbols of code from `_stext` to `_etext`, those
    /// that name no function too, in order, each once.
    pub(in crate::kernel) fn text_addresses(&self) -> impl Iterator<Item = Gva> + '_ {
        let text = self.image.iter().filter(|symbol| symbol.is_text());
        let mut last = None;
        text.map(|symbol| Gva(symbol.address))
            .filter(|address| self.main_text.contains(address))
            .filter(move |&address| last.replace(address) != Some(address))
    }

    /// All symbols that name functions, in the order of their addresses.
    pub(super) fn function_names(&self) -> impl Iterator<Item = (&Symbol, &str)> {
        self.image
            .iter()
            .filter(|symbol| symbol.is_text() && self.in_text(Gva(symbol.address)))
            .map(|symbol| (symbol, self.name_of(symbol)))
            .filter(|(_, name)| !is_no_function(name))
    }

    /// The chosen symbol of the function that begins here.
    fn function_at(&self, address: u64) -> Option<&Symbol> {
        let of = |index: &u32| self.image.get(*index as usize);
        let key = |index: &u32| of(index).map_or(0, |symbol| symbol.address);
        let found = self.functions.binary_search_by_key(&address, key).ok()?;
        of(self.functions.get(found)?)
    }

    /// The chosen symbol of the function that the address lies in. Never one
    /// of another text range.
    fn function_before(&self, link: Gva) -> Option<&Symbol> {
        let range = [&self.main_text, &self.init_text]
            .into_iter()
            .find(|r| r.contains(&link))?;
        let of = |index: &u32| self.image.get(*index as usize);
        let begins = |index: &u32| of(index).map_or(0, |symbol| symbol.address);
        let after = self
            .functions
            .partition_point(|index| begins(index) <= link.0);
        let symbol = of(self.functions.get(after.checked_sub(1)?)?)?;
        range.contains(&Gva(symbol.address)).then_some(symbol)
    }

    /// Makes the indices of functions and of interrupt entries.
    pub(super) fn index_functions(&mut self) {
        let mut functions: Vec<u32> = Vec::new();
        // The function chosen last: its address and rank.
        let mut last: Option<(u64, Rank<'_>)> = None;
        for (symbol, index) in self.image.iter().zip(0..) {
            let name = self.name_of(symbol);
            if !symbol.is_text() || !self.in_text(Gva(symbol.address)) || is_no_function(name) {
                continue;
            }
            let rank = rank(symbol, name);
            match (&last, functions.last_mut()) {
                (Some((address, best)), Some(chosen)) if *address == symbol.address => {
                    if rank >= *best {
                        continue;
                    }
                    *chosen = index;
                }
                _ => functions.push(index),
            }
            last = Some((symbol.address, rank));
        }
        self.functions = functions;
        let marks = [
            ("__irqentry_text_start", "__irqentry_text_end"),
            // Where 6.1 and later keep the stubs that push the vector.
            ("irq_entries_start", "spurious_entries_start"),
        ];
        self.irq_text = marks
            .iter()
            .filter_map(|(start, end)| self.marked(start, end))
            .collect();
    }
}

/// What makes one alias better than another; the smallest is taken.
type Rank<'a> = (bool, u8, usize, bool, usize, Reverse<bool>, &'a str);

fn rank<'a>(symbol: &Symbol, name: &'a str) -> Rank<'a> {
    // Of a system call's names, the one that the dispatcher calls.
    let system_call = match name {
        _ if name.starts_with("__x64_sys_") => 0,
        _ if name.starts_with("__ia32_") => 2,
        _ => 1,
    };
    (
        !symbol.is_global(),
        system_call,
        if system_call == 0 {
            0
        } else {
            underscores(name)
        },
        // Suffixes such as .isra.0 are the compiler's.
        name.contains('.'),
        name.len(),
        Reverse(symbol.kind == b'T'),
        name,
    )
}

fn underscores(name: &str) -> usize {
    name.bytes().take_while(|&byte| byte == b'_').count()
}

/// Whether it is a name that a linker script gives to the bounds of something
/// (may_be_linker_script_provide_symbol() in scripts/kallsyms.c).
fn is_of_linker_script(name: &str) -> bool {
    let bounds = |rest: &str| {
        ["start_", "stop_", "end_"]
            .iter()
            .any(|mark| rest.starts_with(mark))
            || ["_start", "_end"].iter().any(|mark| rest.ends_with(mark))
    };
    name.len() >= 8 && name.strip_prefix("__").is_some_and(bounds)
}

/// Symbols of code that name no function: marks of the linker, and what the
/// compiler puts before functions for call padding (`__pfx_`) and control
/// flow integrity (`__cfi_`).
pub(super) fn is_no_function(name: &str) -> bool {
    let mark = matches!(
        name,
        "_text" | "_stext" | "_etext" | "_sinittext" | "_einittext"
    ) || name.ends_with("_text_start")
        || name.ends_with("_text_end");
    mark || name.starts_with("__pfx_") || name.starts_with("__cfi_")
}

/// The handlers of device interrupts, inter-processor interrupts and NMIs.
/// Faults and traps (`exc_page_fault`) are not interrupts: the code that
/// they interrupt asked for them.
fn is_irq_handler(name: &str) -> bool {
    let name = name.strip_prefix("asm_").unwrap_or(name);
    let name = name.trim_start_matches('_');
    name.starts_with("sysvec_")
        || matches!(
            name,
            "common_interrupt" | "spurious_interrupt" | "exc_nmi" | "asm_exc_nmi"
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: u64 = 0xffff_ffff_8100_0000;

    fn symbols(lines: &[(u64, char, &str)]) -> Symbols {
        let marks = [
            (0, 'T', "_text"),
            (0, 'T', "_stext"),
            (0x1000, 'T', "_etext"),
            (0x3000, 'T', "_sinittext"),
            (0x4000, 'T', "_einittext"),
        ];
        let line = |(offset, kind, name): &(u64, char, &str)| {
            format!("{:x} {kind} {name}\n", BASE + offset)
        };
        let text: String = marks.iter().chain(lines).map(line).collect();
        Symbols::parse(text.into()).unwrap()
    }

    fn at(symbols: &Symbols, offset: u64) -> Option<(&str, u64)> {
        symbols.lookup(Gva(BASE + offset))
    }

    #[test]
    fn the_nearest_symbol_before_is_taken_within_its_text() {
        let symbols = symbols(&[
            (0x40, 'T', "first"),
            (0x80, 't', "second"),
            (0x90, 'd', "data_in_text"),
            (0x2000, 'D', "data"),
            (0x3100, 't', "init_one"),
        ]);
        assert_eq!(at(&symbols, 0x3f), None);
        assert_eq!(at(&symbols, 0x40), Some(("first", 0)));
        assert_eq!(at(&symbols, 0x7f), Some(("first", 0x3f)));
        assert_eq!(at(&symbols, 0xfff), Some(("second", 0xf7f)));
        assert_eq!(at(&symbols, 0x1000), None);
        assert_eq!(at(&symbols, 0x2000), None);
        // The last function of another range is not its neighbour.
        assert_eq!(at(&symbols, 0x3000), None);
        assert_eq!(at(&symbols, 0x3101), Some(("init_one", 1)));
        assert_eq!(symbols.lookup(Gva(0)), None);
        assert_eq!(symbols.lookup(Gva(u64::MAX)), None);
    }

    #[test]
    fn of_aliases_the_best_is_taken_in_any_order() {
        for (names, best) in [
            (
                vec![
                    ('t', "__do_sys_getpid"),
                    ('T', "__ia32_sys_getpid"),
                    ('T', "__x64_sys_getpid"),
                ],
                "__x64_sys_getpid",
            ),
            (
                vec![('t', "__se_sys_read"), ('T', "__x64_sys_read")],
                "__x64_sys_read",
            ),
            (vec![('T', "__memset"), ('W', "memset")], "memset"),
            (vec![('t', "local"), ('T', "global_one")], "global_one"),
            (
                vec![('t', "get.constprop.0"), ('t', "get_pid_of")],
                "get_pid_of",
            ),
            (
                vec![('t', "nla_put_be32"), ('t', "nla_put_u32")],
                "nla_put_u32",
            ),
            (vec![('t', "kmap_b"), ('t', "kmap_a")], "kmap_a"),
            (vec![('T', "__noinstr_text_start"), ('t', "entry")], "entry"),
            (
                vec![('T', "__pfx_foo"), ('T', "__cfi_foo"), ('t', "bar")],
                "bar",
            ),
        ] {
            let lines: Vec<_> = names
                .iter()
                .map(|&(kind, name)| (0x40, kind, name))
                .collect();
            let reversed: Vec<_> = lines.iter().rev().copied().collect();
            for lines in [lines, reversed] {
                assert_eq!(at(&symbols(&lines), 0x42), Some((best, 2)));
            }
        }
    }

    #[test]
    fn function_starts_are_exact_or_after_endbr() {
        let symbols = symbols(&[
            (0x40, 'T', "first"),
            (0x70, 't', "__pfx_second"),
            (0x80, 't', "second"),
        ]);
        let starts = |offset| symbols.is_function_start(Gva(BASE + offset));
        assert!(starts(0x40) && starts(0x44) && starts(0x80));
        assert!(!starts(0x41) && !starts(0x70) && !starts(0x48) && !starts(0x1000));
        assert!(!symbols.is_function_start(Gva(2)));
        assert_eq!(symbols.function_starts().count(), 2);
    }

    #[test]
    fn interrupt_entries_are_known_by_section_and_by_name() {
        let symbols = symbols(&[
            (0x40, 'T', "vfs_read"),
            (0x80, 'T', "sysvec_apic_timer_interrupt"),
            (0xc0, 't', "__common_interrupt"),
            (0x100, 'T', "exc_page_fault"),
            (0x200, 'T', "__irqentry_text_start"),
            (0x200, 'T', "asm_exc_overflow"),
            (0x280, 'T', "__irqentry_text_end"),
            (0x280, 'T', "after"),
        ]);
        let entry = |offset| symbols.in_irq_entry(Gva(BASE + offset));
        assert!(entry(0x85) && entry(0xc0) && entry(0x200) && entry(0x27f));
        assert!(!entry(0x45) && !entry(0x100) && !entry(0x280) && !entry(0x5000));
    }

    #[test]
    fn module_functions_are_found_with_their_module() {
        let text =
            "ffffffff81000000 T _text\nffffffff81000000 T _stext\nffffffff81001000 T _etext\n\
            ffffffffc0000000 t ext4_read\t[ext4]\nffffffffc0000100 d ext4_data\t[ext4]\n\
            ffffffffc0100000 t nf_hook\t[nf_tables]\n";
        let symbols = Symbols::parse(text.into()).unwrap();
        let found = symbols
            .lookup_module(Gva(0xffff_ffff_c000_0104), 0)
            .unwrap();
        assert_eq!(
            found,
            ModuleFunction {
                name: "ext4_read",
                offset: 0x104,
                module: "ext4"
            }
        );
        assert_eq!(
            symbols
                .lookup_module(Gva(0xffff_ffff_c010_0000), 0)
                .unwrap()
                .module,
            "nf_tables"
        );
        assert_eq!(symbols.lookup_module(Gva(0xffff_ffff_c008_0000), 0), None);
        assert_eq!(symbols.lookup_module(Gva(0), 0), None);
        assert_eq!(symbols.lookup(Gva(0xffff_ffff_c000_0000)), None);
    }
}
