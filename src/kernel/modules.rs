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
use std::time::{Duration, Instant};

use crate::ram::GuestRam;

use super::btf::{Btf, BtfError};
use super::escape::escape;
use super::{Gva, Kernel, Symbols, WalkError};

pub use kallsyms::{is_name, Kallsyms, KallsymsError, ModuleFunctions};

/// More modules than guests have, of which some 200 are many. A list that is longer
/// is not read at all: of what is not listed, it would be said that nobody owns it.
const MAX_MODULES: usize = 512;
/// MODULE_NAME_LEN on 64-bit machines: 64 bytes less a word.
const NAME_LENGTH: usize = 56;
/// The pieces that a module's memory may have; Linux 6.12 has 7 (`enum
/// mod_mem_type`).
const MAX_PIECES: u32 = 16;
/// What is read of a `struct module`, which has some 1300 bytes, lies no further
/// apart.
const MAX_APART: u32 = 4096;
/// How long one read of the list may take where nobody waits for it.
const PATIENCE: Duration = Duration::from_secs(2);
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
    /// It does not end, or not soon enough.
    #[error(
        "the guest's list of modules has more than {MAX_MODULES}, the most that are read, or does \
         not end: it is not gone by"
    )]
    TooLong,
    /// It is short, but its memory is slow.
    #[error(
        "the guest's list of modules could not be read within {} ms, only {read} of them",
        .budget.as_millis()
    )]
    TooSlow {
        /// How many were read.
        read: usize,
        /// In which time.
        budget: Duration,
    },
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
    /// From where to where all of that is.
    block: Range<u32>,
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
        let mut offsets = Self {
            list: module.field("list")?.offset,
            name: module.field("name")?.offset,
            pieces,
            kallsyms: kallsyms::Offsets::of(btf).ok(),
            block: 0..0,
        };
        offsets.block = offsets.span()?;
        Ok(offsets)
    }

    /// One `struct module_memory` for each `enum mod_mem_type`.
    fn by_kind(btf: &Btf, first: u32, length: u32) -> Result<Vec<Piece>, BtfError> {
        let memory = btf.structure("module_memory")?;
        let (base, size) = (memory.field("base")?.offset, memory.field("size")?.offset);
        let code = ["MOD_TEXT", "MOD_INIT_TEXT"].map(|kind| btf.constant("mod_mem_type", kind));
        let [Ok(text), Ok(init)] = code else {
            return Err(BtfError::Unknown("enum mod_mem_type".to_owned()));
        };
        let each = memory.size()?;
        let holds = each >= base.saturating_add(8).max(size.saturating_add(4));
        let count = length.checked_div(each).unwrap_or(0);
        if !holds || count.checked_mul(each) != Some(length) || text.max(init) >= count {
            return Err(BtfError::Unknown(format!(
                "plausible struct module (its memory is {length} bytes, a piece of it {each})"
            )));
        }
        if count > MAX_PIECES {
            return Err(BtfError::Unknown(format!(
                "plausible struct module (its memory has {count} pieces)"
            )));
        }
        let piece = |index: u32| {
            let start = first.saturating_add(index.saturating_mul(each));
            let size = start.saturating_add(size);
            Piece {
                base: start.saturating_add(base),
                size,
                code: [text, init].contains(&index).then_some(size),
            }
        };
        Ok((0..count).map(piece).collect())
    }

    /// From where to where in the structure all is that is read.
    fn span(&self) -> Result<Range<u32>, BtfError> {
        let mut fields = vec![(self.list, 8), (self.name, NAME_LENGTH as u32)];
        for piece in &self.pieces {
            fields.extend([(piece.base, 8), (piece.size, 4)]);
            fields.extend(piece.code.map(|code| (code, 4)));
        }
        fields.extend(self.kallsyms.map(|kallsyms| (kallsyms.pointer, 8)));
        let start = fields.iter().map(|&(at, _)| at).min().unwrap_or(0);
        let ends = fields.iter().map(|&(at, size)| at.saturating_add(size));
        let end = ends.max().unwrap_or(0);
        if end.saturating_sub(start) > MAX_APART {
            return Err(BtfError::Unknown(format!(
                "plausible struct module (what is read of it is at {start:#x} to {end:#x})"
            )));
        }
        Ok(start..end)
    }
}

/// What was copied of a `struct module`, by the offsets in it.
struct Block {
    bytes: Vec<u8>,
    first: u32,
}

impl Block {
    /// What [`Offsets::span`] does not span is 0.
    fn at<const N: usize>(&self, offset: u32) -> [u8; N] {
        let at = offset.saturating_sub(self.first) as usize;
        let found = self.bytes.get(at..).and_then(|rest| rest.first_chunk());
        found.copied().unwrap_or([0; N])
    }

    fn word(&self, offset: u32) -> u64 {
        u64::from_le_bytes(self.at(offset))
    }

    fn half(&self, offset: u32) -> u32 {
        u32::from_le_bytes(self.at(offset))
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

    /// The modules in it, in its order: the youngest first. Of each, one piece of
    /// memory is copied, and what that says of its symbols.
    ///
    /// # Errors
    /// If it cannot be followed, or not within `budget`. One that changes while it
    /// is read may give that too.
    pub fn read(&self, ram: &dyn GuestRam, budget: Duration) -> Result<Vec<Module>, ModulesError> {
        let begun = Instant::now();
        let (kernel, offsets) = (&self.kernel, &self.offsets);
        let mut modules = Vec::new();
        let mut block = Block {
            bytes: vec![0; offsets.block.len()],
            first: offsets.block.start,
        };
        let mut node = Gva(kernel.read_u64(ram, self.head)?);
        while node != self.head {
            if modules.len() >= MAX_MODULES {
                return Err(ModulesError::TooLong);
            }
            if begun.elapsed() > budget {
                let read = modules.len();
                return Err(ModulesError::TooSlow { read, budget });
            }
            let at = Gva(node.0.wrapping_sub(offsets.list.into()));
            kernel.read(ram, at.wrapping_add(block.first.into()), &mut block.bytes)?;
            modules.push(self.module(ram, at, &block));
            node = Gva(block.word(offsets.list));
        }
        Ok(modules)
    }

    /// The module of which this is a copy.
    fn module(&self, ram: &dyn GuestRam, at: Gva, block: &Block) -> Module {
        let offsets = &self.offsets;
        let name: [u8; NAME_LENGTH] = block.at(offsets.name);
        let name = name.split(|&byte| byte == 0).next().unwrap_or_default();
        let (mut code, mut memory) = (Vec::new(), Vec::new());
        for piece in &offsets.pieces {
            let base = block.word(piece.base);
            memory.extend(range(base, block.half(piece.size)));
            code.extend(piece.code.and_then(|size| range(base, block.half(size))));
        }
        Module {
            name: escape(name),
            at,
            code,
            memory,
            kallsyms: offsets.kallsyms.and_then(|kallsyms| {
                kallsyms.follow(ram, &self.kernel, block.word(kallsyms.pointer))
            }),
        }
    }

    /// Whether the kernel keeps the symbols of its modules (CONFIG_KALLSYMS).
    pub fn has_symbols(&self) -> bool {
        self.offsets.kallsyms.is_some()
    }

    /// The functions of a module that was on the list, by its own symbols.
    ///
    /// # Errors
    /// If it has none, or they cannot be read, or not within `budget`; see
    /// [`KallsymsError::may_pass`].
    pub fn functions(
        &self,
        ram: &dyn GuestRam,
        module: &Module,
        budget: Duration,
    ) -> Result<ModuleFunctions, KallsymsError> {
        let none = || KallsymsError::None(module.name.clone());
        let offsets = self.offsets.kallsyms.ok_or_else(none)?;
        kallsyms::read(ram, &self.kernel, offsets, module, budget)
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
    ModuleList::of(kernel, symbols, btf)?.read(ram, PATIENCE)
}

/// A piece of a module, if there is one.
fn range(base: u64, size: u32) -> Option<Range<Gva>> {
    let end = base.checked_add(size.into())?;
    let there = base != 0 && size != 0 && u64::from(size) <= MAX_PIECE;
    there.then_some(Gva(base)..Gva(end))
}

#[cfg(test)]
mod tests;
