//! The kernel's symbols, as System.map or a saved /proc/kallsyms lists them.
//!
//! One line a symbol: address in hex, one letter for its kind (upper case:
//! global), name, and in kallsyms a module in brackets. The file is kept as
//! it is and symbols point into it; 400,000 lines load in well under a
//! second. Two indices are made besides: by name, and the functions of the
//! kernel's image by address (one name for each, the best of its aliases).
//!
//! Everything here is in link-time addresses, that is, those of the file. A
//! saved /proc/kallsyms holds the addresses of one boot; since the finder
//! only uses differences, the slide then comes out relative to that boot.
//! [`Symbols::normalise`] takes the slide off. Modules lie elsewhere in each
//! boot: theirs are runtime addresses, of the boot that the file is of.
//!
//! * `parse`: from bytes to [`Symbols`], and what is wrong with other files
//! * `table`: the same as a table that loads quickly, and as a System.map again
//! * `lookup`: from address to name
//! * `resolve`: from what somebody typed to functions

mod lookup;
mod parse;
mod resolve;
mod table;

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::ops::Range;

use super::Gva;

pub use lookup::ModuleFunction;
pub use parse::{SymbolsError, SymbolsFault};
pub use resolve::{FtraceNameError, FunctionMatch, UnknownFunction, UnknownWhy};
pub use table::TableFault;

/// One line of the file.
#[derive(Clone, Copy, Debug)]
struct Symbol {
    address: u64,
    /// Where the name begins in the text.
    name: u32,
    /// Its length in bytes.
    len: u16,
    /// The letter that `nm` uses for the kind.
    kind: u8,
}

impl Symbol {
    /// Whether it is code (`t`, `T`, and weak `w`, `W`).
    fn is_text(&self) -> bool {
        matches!(self.kind, b't' | b'T' | b'w' | b'W')
    }

    fn is_global(&self) -> bool {
        self.kind.is_ascii_uppercase()
    }
}

/// The symbols of one kernel.
pub struct Symbols {
    /// The file as it was read; names point into it.
    text: String,
    /// The symbols of the kernel's image, by address; those of one address
    /// in the order of the file.
    image: Vec<Symbol>,
    /// (hash of the name, index into `image`), sorted.
    by_name: Vec<(u32, u32)>,
    hasher: RandomState,
    /// Indices into `image`: one function for each address that has one.
    functions: Vec<u32>,
    /// Symbols of modules, by address, and the bytes of `text` with the
    /// module's name.
    modules: Vec<(Symbol, Range<u32>)>,
    /// The slide of the one boot in which the modules lay there, where it is
    /// known.
    modules_slide: Option<u64>,
    /// `_stext` to `_etext`.
    main_text: Range<Gva>,
    /// `_sinittext` to `_einittext`: freed once the kernel has started.
    init_text: Range<Gva>,
    /// The parts of the text that interrupts enter through.
    irq_text: Vec<Range<Gva>>,
}

impl Symbols {
    /// The link-time address of a symbol of the kernel's image. Of several
    /// with one name, a global one is taken before static ones, then the
    /// lowest address.
    pub fn address(&self, name: &str) -> Option<Gva> {
        let best = self
            .named(name)
            .min_by_key(|s| (!s.is_global(), s.address))?;
        Some(Gva(best.address))
    }

    /// Whether a symbol of the kernel's image with this name is at this link-time
    /// address: one of several, where several have the name.
    pub fn is_called(&self, link: Gva, name: &str) -> bool {
        self.named(name).any(|symbol| symbol.address == link.0)
    }

    /// Like [`Symbols::address`], for the first of several names that exists:
    /// for what kernel versions call differently.
    pub fn address_of_any(&self, names: &[&str]) -> Option<Gva> {
        names.iter().find_map(|name| self.address(name))
    }

    /// Where the kernel's banner lies in its image, in bytes from its beginning.
    pub fn banner_offset(&self) -> Option<u64> {
        let text = self.address("_text")?;
        Some(self.address("linux_banner")?.wrapping_sub(text))
    }

    /// Where the kernel's functions lie, without those that are freed after
    /// the start: `_stext` to `_etext`.
    pub fn text(&self) -> Range<Gva> {
        self.main_text.clone()
    }

    /// Where the functions lie that are freed after the start: `_sinittext`
    /// to `_einittext`. Empty if the file does not say.
    pub fn init_text(&self) -> Range<Gva> {
        self.init_text.clone()
    }

    /// How many symbols there are, those of modules too.
    pub fn len(&self) -> usize {
        self.image.len() + self.modules.len()
    }

    /// Never true: a file without symbols is refused.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn name_of(&self, symbol: &Symbol) -> &str {
        let start = symbol.name as usize;
        // In range and on character boundaries: `parse` made it from the
        // text, which is ASCII.
        self.text
            .get(start..start + usize::from(symbol.len))
            .unwrap_or("")
    }

    /// All symbols of the image with this name.
    fn named<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Symbol> + 'a {
        let hash = name_hash(&self.hasher, name);
        let first = self.by_name.partition_point(|entry| entry.0 < hash);
        self.by_name[first..]
            .iter()
            .take_while(move |entry| entry.0 == hash)
            .filter_map(|entry| self.image.get(entry.1 as usize))
            .filter(move |symbol| self.name_of(symbol) == name)
    }
}

impl std::fmt::Debug for Symbols {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Symbols")
            .field("len", &self.len())
            .field("text", &self.main_text)
            .finish_non_exhaustive()
    }
}

/// A keyed hash, so that no file can be made to have all names collide.
fn name_hash(hasher: &RandomState, name: &str) -> u32 {
    // The upper half is as good as any.
    (hasher.hash_one(name) >> 32) as u32
}
