//! The symbols of a module, as the guest's kernel keeps them for /proc/kallsyms.
//!
//! ```text
//! struct module.kallsyms -> struct mod_kallsyms { symtab, num_symtab, strtab }
//!                             symtab -> Elf64_Sym, one after the other
//! ```
//!
//! The table of a module that starts lies in the memory of its start, and is
//! exchanged for a smaller one when it has started (`add_kallsyms` and
//! `do_init_module`, kernel/module/). So the pointers are read with the list, and
//! again behind the copy: a table that is another one by then was not copied whole.
//!
//! What is taken of it are functions that lie in the module's own code. Nothing
//! that a module says of itself can name what is not its own.

use std::time::{Duration, Instant};

use crate::kernel::btf::{Btf, BtfError};
use crate::kernel::{Gva, Kernel, WalkError};
use crate::ram::GuestRam;

use super::Module;

/// More symbols than any module has; all of them, not the functions alone.
const MAX_SYMBOLS: u32 = 1 << 16;
/// What of a module's names is copied at most, and kept of them, bytes.
const MAX_NAMES: usize = 2 << 20;
/// The most functions that are kept of a module.
const MAX_FUNCTIONS: usize = 1 << 15;
/// The longest name of a symbol: KSYM_NAME_LEN less its end.
pub(super) const MAX_NAME: usize = 511;

/// The length of an `Elf64_Sym` (include/uapi/linux/elf.h).
const SYMBOL: usize = 24;
/// How many symbols are copied at once.
const AT_ONCE: u32 = 512;
/// A function, in the lower half of `st_info`.
const STT_FUNC: u8 = 2;
const PAGE: u64 = 4096;

/// Why the symbols of a module are not known.
#[derive(Debug, thiserror::Error)]
pub enum KallsymsError {
    /// It has none, or none yet.
    #[error("the module {0} has no table of symbols")]
    None(String),
    /// The table leads nowhere.
    #[error("the table of symbols of the module {module} cannot be read: {cause}")]
    Lost {
        /// The module's name.
        module: String,
        /// Why not.
        cause: WalkError,
    },
    /// It is longer than that of any module.
    #[error(
        "the module {module} has {count} symbols by its own word, and {MAX_SYMBOLS} are the \
         most that are read; its functions are not named"
    )]
    TooMany {
        /// The module's name.
        module: String,
        /// What it claims.
        count: u32,
    },
    /// Its names are spread over more than they can take.
    #[error(
        "the names of the symbols of the module {0} are spread over more than {MAX_NAMES} bytes; \
         its functions are not named"
    )]
    Spread(String),
    /// Its memory is slow.
    #[error(
        "the symbols of the module {module} could not be read within {} ms", .budget.as_millis()
    )]
    Slow {
        /// The module's name.
        module: String,
        /// In which time.
        budget: Duration,
    },
    /// It was another one behind the copy.
    #[error("the table of symbols of the module {0} changed while it was read")]
    Changed(String),
}

impl KallsymsError {
    /// Whether another try may do better: a module that starts, or goes, gives this.
    pub fn may_pass(&self) -> bool {
        !matches!(self, Self::TooMany { .. } | Self::Spread(_))
    }
}

/// The functions that a module names, by its own word.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModuleFunctions {
    /// Where each begins, in order, and its name; one name an address, the one
    /// that the guest's kernel would take: the first in its table. All lie in the
    /// module's code, and all names are of letters, digits, `_`, `.`, `$` and `-`.
    pub functions: Vec<(Gva, String)>,
    /// How many functions were left out: they lie elsewhere, have no name that is
    /// one, or find no room.
    pub refused: u64,
}

/// Where a module's table is: what its `struct mod_kallsyms` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Kallsyms {
    symbols: Gva,
    count: u32,
    names: Gva,
}

/// Where things are in `struct module` and `struct mod_kallsyms`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Offsets {
    /// In `struct module`.
    pub(super) pointer: u32,
    symbols: u32,
    count: u32,
    names: u32,
}

/// The longest `struct mod_kallsyms` of which that is so.
const MAX_TABLE: usize = 64;

impl Offsets {
    /// # Errors
    /// If the kernel is built without CONFIG_KALLSYMS, or with other structures.
    pub(super) fn of(btf: &Btf) -> Result<Self, BtfError> {
        let table = btf.structure("mod_kallsyms")?;
        let field = |name| table.field(name).map(|field| field.offset);
        Ok(Self {
            pointer: btf.structure("module")?.field("kallsyms")?.offset,
            symbols: field("symtab")?,
            count: field("num_symtab")?,
            names: field("strtab")?,
        })
    }

    /// The table of the module at `at`; none where it has none yet.
    fn table(self, ram: &dyn GuestRam, kernel: &Kernel, at: Gva) -> Option<Kallsyms> {
        let pointer = at.wrapping_add(self.pointer.into());
        self.follow(ram, kernel, kernel.read_u64(ram, pointer).ok()?)
    }

    /// The table that a module's pointer to it leads to.
    pub(super) fn follow(
        self,
        ram: &dyn GuestRam,
        kernel: &Kernel,
        table: u64,
    ) -> Option<Kallsyms> {
        if table == 0 {
            return None;
        }
        // One copy for all of it: this is read with the list, time and again.
        let last = self.symbols.max(self.count).max(self.names) as usize;
        let mut copy = [0; MAX_TABLE];
        let copy = copy.get_mut(..last.checked_add(8)?)?;
        kernel.read(ram, Gva(table), copy).ok()?;
        let word = |offset: u32| copy.get(offset as usize..)?.first_chunk();
        let word = |offset: u32| word(offset).map(|bytes| u64::from_le_bytes(*bytes));
        Some(Kallsyms {
            symbols: Gva(word(self.symbols)?),
            // An unsigned int.
            count: word(self.count)? as u32,
            names: Gva(word(self.names)?),
        })
    }
}

/// A symbol that is wanted: where it is, and where its name is from the first
/// name's beginning on.
#[derive(Clone, Copy)]
struct Wanted {
    at: u64,
    name: u32,
}

/// Reads the functions of `module`, whose table is where `offsets` say.
pub(super) fn read(
    ram: &dyn GuestRam,
    kernel: &Kernel,
    offsets: Offsets,
    module: &Module,
    budget: Duration,
) -> Result<ModuleFunctions, KallsymsError> {
    let reading = Reading {
        ram,
        kernel,
        module,
        budget,
        begun: Instant::now(),
    };
    let name = || module.name.clone();
    let table = module.kallsyms.ok_or_else(|| KallsymsError::None(name()))?;
    if table.count > MAX_SYMBOLS {
        let (module, count) = (name(), table.count);
        return Err(KallsymsError::TooMany { module, count });
    }
    let mut found = ModuleFunctions::default();
    let wanted = reading.functions(table, &mut found.refused)?;
    let names = reading.names(table, &wanted)?;
    if offsets.table(ram, kernel, module.at) != Some(table) {
        return Err(KallsymsError::Changed(name()));
    }

    let mut room = MAX_NAMES;
    for wanted in wanted {
        let again = found.functions.last().map(|(at, _)| at.0) == Some(wanted.at);
        match names.get(wanted.name, room) {
            _ if again => {}
            Some(name) => {
                room = room.saturating_sub(name.len());
                found.functions.push((Gva(wanted.at), name.to_owned()));
            }
            None => found.refused = found.refused.saturating_add(1),
        }
    }
    Ok(found)
}

/// The symbols of one module, while they are read.
struct Reading<'a> {
    ram: &'a dyn GuestRam,
    kernel: &'a Kernel,
    module: &'a Module,
    budget: Duration,
    begun: Instant,
}

impl Reading<'_> {
    /// Asked once for each few KiB: memory that the host has swapped out is slow.
    fn in_time(&self) -> Result<(), KallsymsError> {
        if self.begun.elapsed() <= self.budget {
            return Ok(());
        }
        Err(KallsymsError::Slow {
            module: self.module.name.clone(),
            budget: self.budget,
        })
    }

    /// The symbols that are functions of the module's own code, in order.
    fn functions(&self, table: Kallsyms, refused: &mut u64) -> Result<Vec<Wanted>, KallsymsError> {
        let mut wanted = Vec::new();
        let mut copy = vec![0; SYMBOL * AT_ONCE as usize];
        for first in (0..table.count).step_by(AT_ONCE as usize) {
            self.in_time()?;
            let many = AT_ONCE.min(table.count.saturating_sub(first)) as usize;
            let part = copy.get_mut(..many * SYMBOL).unwrap_or_default();
            let at = table.symbols.wrapping_add(u64::from(first) * SYMBOL as u64);
            self.kernel
                .read(self.ram, at, part)
                .map_err(|cause| KallsymsError::Lost {
                    module: self.module.name.clone(),
                    cause,
                })?;
            for symbol in part
                .chunks_exact(SYMBOL)
                .flat_map(|symbol| symbol.first_chunk())
            {
                // st_name, st_info, st_other, st_shndx, st_value; and st_size behind it.
                let [n0, n1, n2, n3, info, _, s0, s1, at @ ..]: &[u8; 16] = symbol;
                if info & 15 != STT_FUNC || (*s0, *s1) == (0, 0) {
                    continue;
                }
                let at = u64::from_le_bytes(*at);
                if self.module.has(Gva(at)) && wanted.len() < MAX_FUNCTIONS {
                    let name = u32::from_le_bytes([*n0, *n1, *n2, *n3]);
                    wanted.push(Wanted { at, name });
                } else {
                    *refused = refused.saturating_add(1);
                }
            }
        }
        // Of one address, those that come first in the table stay first.
        wanted.sort_by_key(|wanted| wanted.at);
        Ok(wanted)
    }

    /// Copies the names of these symbols, from the first to the last. What of them
    /// cannot be read is not there.
    fn names(&self, table: Kallsyms, wanted: &[Wanted]) -> Result<Names, KallsymsError> {
        let offsets = || wanted.iter().map(|wanted| wanted.name);
        let (Some(first), Some(last)) = (offsets().min(), offsets().max()) else {
            return Ok(Names {
                first: 0,
                bytes: Vec::new(),
            });
        };
        let length = (last.saturating_sub(first) as usize).saturating_add(MAX_NAME + 1);
        if length > MAX_NAMES {
            return Err(KallsymsError::Spread(self.module.name.clone()));
        }
        let mut bytes = vec![0; length];
        let mut at = table.names.wrapping_add(first.into());
        let mut done = 0;
        // A page at a time: the last name may end where no memory follows.
        while let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
            self.in_time()?;
            let whole = (PAGE - at.0 % PAGE) as usize;
            let many = whole.min(rest.len());
            let part = rest.get_mut(..many).unwrap_or_default();
            if self.kernel.read(self.ram, at, part).is_err() {
                break;
            }
            at = at.wrapping_add(many as u64);
            done += many;
        }
        bytes.truncate(done);
        Ok(Names { first, bytes })
    }
}

/// A copy of names, as they lie behind each other.
struct Names {
    first: u32,
    bytes: Vec<u8>,
}

impl Names {
    /// The name at `offset`, if there is one, it is one, and there is room for it.
    fn get(&self, offset: u32, room: usize) -> Option<&str> {
        let at = offset.checked_sub(self.first)? as usize;
        let end = at.saturating_add(MAX_NAME + 1).min(self.bytes.len());
        let bytes = self.bytes.get(at..end)?;
        // Names may lie in each other. What finds no room is not looked at closely.
        let length = memchr::memchr(0, bytes).filter(|&length| length <= room)?;
        let name = std::str::from_utf8(bytes.get(..length)?).ok()?;
        is_name(name).then_some(name)
    }
}

/// Whether this is what symbols and modules are called. Everything else that is
/// printable has a meaning where names are shown.
pub fn is_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_.$-".contains(&byte);
    (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(plain)
}
