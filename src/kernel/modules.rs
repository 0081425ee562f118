//! The modules that the guest's kernel says are loaded.
//!
//! ```text
//! modules (list_head) -> struct module { list, name, where its code lies } -> ...
//! ```
//!
//! Up to 6.3 a module has its code in `core_layout` and `init_layout`, from 6.4
//! on in `mem[MOD_TEXT]` and `mem[MOD_INIT_TEXT]` (include/linux/module.h); the
//! BTF says which.
//!
//! All of it is the guest's word. A module that took itself off the list is not
//! here; what is here is at least what the guest admits to. What its functions are
//! called, [`kallsyms`] reads.

mod kallsyms;

use std::ops::Range;

use crate::ram::GuestRam;

use super::btf::{Btf, BtfError};
use super::escape::escape;
use super::{Gva, Kernel, Symbols, WalkError};

pub use kallsyms::{is_name, Kallsyms, KallsymsError, ModuleFunctions};

/// More modules than any guest has.
const MAX_MODULES: usize = 4096;
/// MODULE_NAME_LEN on 64-bit machines: 64 bytes less a word.
const NAME_LENGTH: usize = 56;
/// A piece that is larger is made up.
const MAX_PIECE: u64 = 256 << 20;

/// Why the modules are not known.
#[derive(Debug, thiserror::Error)]
pub enum ModulesError {
    /// The layout of its structures is not known.
    #[error(transparent)]
    Btf(#[from] BtfError),
    /// The kernel has no list of modules.
    #[error(
        "the symbols of the guest's kernel have no 'modules': it is built without CONFIG_MODULES"
    )]
    None,
    /// The list leads nowhere.
    #[error("the guest's list of modules cannot be followed: {0}")]
    Lost(#[from] WalkError),
    /// The list does not end.
    #[error("the guest's list of modules does not end after {MAX_MODULES}; it is made up")]
    Endless,
}

/// A module, as the guest has it in its list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// Its name, escaped.
    pub name: String,
    /// Where its `struct module` is.
    pub at: Gva,
    /// Where its code lies, that of its start too while it starts. Runtime
    /// addresses, never empty ranges.
    pub code: Vec<Range<Gva>>,
    /// Where all of it lies, code and data.
    pub memory: Vec<Range<Gva>>,
    /// Where its own table of symbols is, if it has one.
    pub kallsyms: Option<Kallsyms>,
}

impl Module {
    /// Whether a runtime address is code of this module.
    pub fn has(&self, at: Gva) -> bool {
        self.code.iter().any(|range| range.contains(&at))
    }

    /// Whether a runtime address is code or data of this module.
    pub fn holds(&self, at: Gva) -> bool {
        self.memory.iter().any(|range| range.contains(&at))
    }
}

/// Where things are in `struct module`.
#[derive(Clone, Debug)]
struct Offsets {
    list: u32,
    name: u32,
    pieces: Vec<Piece>,
    /// Where the symbols are, if the kernel has modules' symbols.
    kallsyms: Option<kallsyms::Offsets>,
}

/// A piece of a module's memory.
#[derive(Clone, Debug)]
struct Piece {
    /// Where its address is.
    base: u32,
    /// Where its size is, a u32.
    size: u32,
    /// Where the size of the code that it begins with is, if it has any.
    code: Option<u32>,
}

impl Offsets {
    fn of(btf: &Btf) -> Result<Self, BtfError> {
        let module = btf.structure("module")?;
        let pieces = match module.field("mem") {
            Ok(mem) => Self::by_kind(btf, mem.offset, mem.size)?,
            Err(_) => {
                let layout = |name: &str| {
                    let field = |field| {
                        let field = module.field(&format!("{name}.{field}"));
                        field.map(|field| field.offset)
                    };
                    Ok(Piece {
                        base: field("base")?,
                        size: field("size")?,
                        code: Some(field("text_size")?),
                    })
                };
                ["core_layout", "init_layout"]
                    .map(layout)
                    .into_iter()
                    .collect::<Result<_, BtfError>>()?
            }
        };
        Ok(Self {
            list: module.field("list")?.offset,
            name: module.field("name")?.offset,
            pieces,
            kallsyms: kallsyms::Offsets::of(btf).ok(),
        })
    }

    /// One `struct module_memory` for each `enum mod_mem_type`.
    fn by_kind(btf: &Btf, first: u32, length: u32) -> Result<Vec<Piece>, BtfError> {
        let memory = btf.structure("module_memory")?;
        let (base, size) = (memory.field("base")?.offset, memory.field("size")?.offset);
        let code = ["MOD_TEXT", "MOD_INIT_TEXT"].map(|kind| btf.constant("mod_mem_type", kind));
        let [Ok(text), Ok(init)] = code else {
            return Err(BtfError::Unknown("enum mod_mem_type".to_owned()));
        };
        let each = memory.size()?.max(1);
        let piece = |index: u32| {
            let start = first.saturating_add(index.saturating_mul(each));
            let size = start.saturating_add(size);
            Piece {
                base: start.saturating_add(base),
                size,
                code: [text, init].contains(&index).then_some(size),
            }
        };
        Ok((0..length / each).map(piece).collect())
    }
}

/// Where a kernel has its list of modules: looked up once, to be read often.
#[derive(Clone, Debug)]
pub struct ModuleList {
    kernel: Kernel,
    head: Gva,
    offsets: Offsets,
}

impl ModuleList {
    /// Finds the list of a kernel.
    ///
    /// # Errors
    /// If the kernel has none, or its layout is not known.
    pub fn of(kernel: &Kernel, symbols: &Symbols, btf: &Btf) -> Result<Self, ModulesError> {
        let head = symbols.address("modules").filter(|&at| kernel.in_image(at));
        Ok(Self {
            kernel: kernel.clone(),
            head: kernel.runtime(head.ok_or(ModulesError::None)?),
            offsets: Offsets::of(btf)?,
        })
    }

    /// The modules in it, in its order: the youngest first.
    ///
    /// # Errors
    /// If it cannot be followed. One that changes while it is read may give that
    /// too.
    pub fn read(&self, ram: &dyn GuestRam) -> Result<Vec<Module>, ModulesError> {
        let Self {
            kernel,
            head,
            offsets,
        } = self;
        let mut modules = Vec::new();
        let mut node = Gva(kernel.read_u64(ram, *head)?);
        while node != *head {
            if modules.len() >= MAX_MODULES {
                return Err(ModulesError::Endless);
            }
            let at = Gva(node.0.wrapping_sub(offsets.list.into()));
            let mut name = [0; NAME_LENGTH];
            kernel.read(ram, at.wrapping_add(offsets.name.into()), &mut name)?;
            let name = name.split(|&byte| byte == 0).next().unwrap_or_default();
            let word = |offset: u32| kernel.read_u64(ram, at.wrapping_add(offset.into()));
            let half = |offset: u32| kernel.read_u32(ram, at.wrapping_add(offset.into()));
            let (mut code, mut memory) = (Vec::new(), Vec::new());
            for piece in &offsets.pieces {
                let base = word(piece.base)?;
                memory.extend(range(base, half(piece.size)?));
                if let Some(size) = piece.code {
                    code.extend(range(base, half(size)?));
                }
            }
            modules.push(Module {
                name: escape(name),
                at,
                code,
                memory,
                kallsyms: offsets
                    .kallsyms
                    .and_then(|kallsyms| kallsyms.table(ram, kernel, at)),
            });
            node = Gva(kernel.read_u64(ram, node)?);
        }
        Ok(modules)
    }

    /// Whether the kernel keeps the symbols of its modules (CONFIG_KALLSYMS).
    pub fn has_symbols(&self) -> bool {
        self.offsets.kallsyms.is_some()
    }

    /// The functions of a module that was on the list, by its own symbols.
    ///
    /// # Errors
    /// If it has none, or they cannot be read; see [`KallsymsError::may_pass`].
    pub fn functions(
        &self,
        ram: &dyn GuestRam,
        module: &Module,
    ) -> Result<ModuleFunctions, KallsymsError> {
        let none = || KallsymsError::None(module.name.clone());
        let offsets = self.offsets.kallsyms.ok_or_else(none)?;
        kallsyms::read(ram, &self.kernel, offsets, module)
    }
}

/// The modules in the guest's list, once: see [`ModuleList::read`].
///
/// # Errors
/// If the list cannot be found or followed.
pub fn modules(
    ram: &dyn GuestRam,
    kernel: &Kernel,
    symbols: &Symbols,
    btf: &Btf,
) -> Result<Vec<Module>, ModulesError> {
    ModuleList::of(kernel, symbols, btf)?.read(ram)
}

/// A piece of a module, if there is one.
fn range(base: u64, size: u32) -> Option<Range<Gva>> {
    let end = base.checked_add(size.into())?;
    let there = base != 0 && size != 0 && u64::from(size) <= MAX_PIECE;
    there.then_some(Gva(base)..Gva(end))
}

#[cfg(test)]
mod tests;
