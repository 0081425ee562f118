//! What callflow needs to know of addresses: [`Names`], and the answer to one
//! question about one address, a [`Place`].

use crate::kernel::Gva;
use crate::session::GuestName;

/// How far behind its symbol a function's ftrace call site may lie: with
/// CONFIG_X86_KERNEL_IBT the call comes after a 4-byte `endbr64`.
const ENTRY_SLACK: u64 = 4;

/// The symbol in whose place ftrace puts a traced function's return address
/// (arch/x86/kernel/ftrace_64.S): a function that is entered by a tail call
/// finds it as its own.
const RETURN_TO_HANDLER: &str = "return_to_handler";

/// The part of the guest's address space that an address lies in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The kernel image's text.
    Kernel,
    /// The area that modules are loaded to, and with them BPF programs and
    /// trampolines. That something lies there says nothing of who put it there.
    Module,
    /// Anywhere else: no kernel code belongs there.
    Outside,
}

/// What is known of one address. `symbol` and `module` are what the host's own
/// symbols say; all that judges goes by them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Name<'a> {
    /// The symbol at or before the address, and how many bytes before it.
    pub symbol: Option<(&'a str, u64)>,
    /// The module that the symbol belongs to, if it belongs to one.
    pub module: Option<&'a str>,
    /// Where the address lies.
    pub kind: Kind,
    /// It lies in the code by which interrupts and faults enter the kernel:
    /// interrupt entry text (`__irqentry_text_start` to `__irqentry_text_end`), or
    /// what that calls before anything that ftrace can trace.
    pub irq_entry: bool,
    /// What the guest says, of an address in the module area of which the host knows
    /// no symbol. For people to read: a hostile guest says what it likes.
    pub told: Option<GuestName<'a>>,
}

/// Resolves run-time addresses, which mean something else after each boot.
pub trait Names {
    /// What `runtime` is in the kernel of boot number `boot`. Answers for
    /// every address and every boot: hostile records ask about any.
    fn function(&self, boot: u32, runtime: Gva) -> Name<'_>;

    /// What the guest says of an address in its module area, of which `function`
    /// knows no symbol, at a time of its trace clock: modules come and go.
    fn told(&self, boot: u32, runtime: Gva, time: u64) -> Option<GuestName<'_>> {
        let _ = (boot, runtime, time);
        None
    }
}

impl<N: Names + ?Sized> Names for &N {
    fn function(&self, boot: u32, runtime: Gva) -> Name<'_> {
        (**self).function(boot, runtime)
    }

    fn told(&self, boot: u32, runtime: Gva, time: u64) -> Option<GuestName<'_>> {
        (**self).told(boot, runtime, time)
    }
}

/// An address with what is known of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place<'n> {
    /// The address, as the guest's kernel had it.
    pub address: Gva,
    /// What is known of it.
    pub name: Name<'n>,
}

impl<'n> Place<'n> {
    /// The function that this address enters: `None` without a symbol, or
    /// where the address lies too far inside the symbol to be its entry.
    pub fn entered(&self) -> Option<&'n str> {
        match self.name.symbol {
            Some((symbol, offset)) if offset <= ENTRY_SLACK => Some(symbol),
            _ => None,
        }
    }

    /// The function that this address enters by the guest's word, with its module,
    /// where the host does not know: see [`Name::told`].
    pub fn told_entered(&self) -> Option<(&'n str, &'n str)> {
        let told = self.name.told?;
        let (symbol, offset) = told.symbol?;
        (offset <= ENTRY_SLACK).then_some((symbol, told.module))
    }

    /// The function that this address enters, for people: by the host's symbols,
    /// else `name [module?]` by the guest's word, else the address.
    pub fn function(&self) -> String {
        match (self.entered(), self.told_entered()) {
            (Some(symbol), _) => symbol.to_owned(),
            (None, Some((symbol, module))) => format!("{symbol} [{module}?]"),
            (None, None) => self.address.to_string(),
        }
    }

    /// The symbol without the suffix of a part that the compiler moved out of
    /// the function (`vfs_read.cold`): such a part is the function.
    pub fn owner(&self) -> Option<&'n str> {
        let (symbol, _) = self.name.symbol?;
        Some(symbol.find(".cold").map_or(symbol, |at| &symbol[..at]))
    }

    /// Where the symbol begins; without one, the address itself.
    pub fn start(&self) -> u64 {
        let offset = self.name.symbol.map_or(0, |(_, offset)| offset);
        self.address.0.wrapping_sub(offset)
    }

    /// The address is where ftrace takes returns: the call was a tail call.
    pub fn is_return_handler(&self) -> bool {
        matches!(self.name.symbol, Some((RETURN_TO_HANDLER, _)))
    }
}

/// A cache before [`Names`]: a fixed number of places, each address having one
/// where it may stand. A trace asks for the same few thousand addresses again
/// and again; a hostile one asks for any, and costs no more memory for it.
pub(super) struct Resolver<'n, N: ?Sized> {
    names: &'n N,
    cache: Vec<Option<(u32, Place<'n>)>>,
}

impl<'n, N: Names + ?Sized> Resolver<'n, N> {
    const BITS: u32 = 13;

    pub(super) fn new(names: &'n N) -> Self {
        Self {
            names,
            cache: vec![None; 1 << Self::BITS],
        }
    }

    /// What is known of `address` in boot `boot`, and what the guest says of it at
    /// this time.
    pub(super) fn place(&mut self, boot: u32, address: Gva, time: u64) -> Place<'n> {
        let mut place = self.lasting(boot, address);
        if place.name.kind == Kind::Module && place.name.symbol.is_none() {
            place.name.told = self.names.told(boot, address, time);
        }
        place
    }

    /// What does not depend on the time.
    pub(super) fn lasting(&mut self, boot: u32, address: Gva) -> Place<'n> {
        // Fibonacci hashing: the high bits of the product depend on all bits.
        let hash = (address.0 ^ u64::from(boot)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let place = || Place {
            address,
            name: self.names.function(boot, address),
        };
        let Some(slot) = self.cache.get_mut((hash >> (64 - Self::BITS)) as usize) else {
            return place();
        };
        match slot {
            Some((at, known)) if *at == boot && known.address == address => *known,
            _ => slot.insert((boot, place())).1,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    fn place(symbol: &'static str, offset: u64) -> Place<'static> {
        let name = Name {
            symbol: Some((symbol, offset)),
            module: None,
            kind: Kind::Kernel,
            irq_entry: false,
            told: None,
        };
        Place {
            address: Gva(0x1000 + offset),
            name,
        }
    }

    #[test]
    fn a_function_is_entered_at_its_symbol_or_behind_endbr64() {
        assert_eq!(place("f", 0).entered(), Some("f"));
        assert_eq!(place("f", 4).entered(), Some("f"));
        assert_eq!(place("f", 5).entered(), None);
        assert_eq!(place("f", 0x44).start(), 0x1000);
    }

    #[test]
    fn a_cold_part_belongs_to_its_function() {
        assert_eq!(place("vfs_read.cold", 9).owner(), Some("vfs_read"));
        assert_eq!(place("vfs_read.cold.12", 9).owner(), Some("vfs_read"));
        assert_eq!(place("vfs_read", 9).owner(), Some("vfs_read"));
    }

    struct Counting(Cell<u32>);

    impl Names for Counting {
        fn function(&self, boot: u32, _: Gva) -> Name<'_> {
            self.0.set(self.0.get() + 1);
            Name {
                symbol: Some(("f", u64::from(boot))),
                module: None,
                kind: Kind::Kernel,
                irq_entry: false,
                told: None,
            }
        }
    }

    #[test]
    fn the_cache_asks_once_and_keeps_boots_apart() {
        let names = Counting(Cell::new(0));
        let mut resolver = Resolver::new(&names);
        for boot in [1, 2, 1, 2, 1, 2] {
            let place = resolver.place(boot, Gva(0xffff_ffff_8100_0000), 1);
            assert_eq!(place.name.symbol, Some(("f", u64::from(boot))));
        }
        assert_eq!(names.0.get(), 2);
        for address in 0..100_000 {
            assert_eq!(resolver.place(1, Gva(address), 1).address, Gva(address));
        }
    }
}
