//! The guest's kernel as the checks read it: words and texts by address, and
//! structures by the layout that the trusted image describes.

use std::cell::Cell;

use crate::kernel::btf::{Btf, BtfError};
use crate::kernel::{escape, Gva, Kernel, Symbols};
use crate::ram::GuestRam;

/// The longest name that is read.
const NAME_LENGTH: usize = 64;
/// How many entries of a list are followed: guest memory may hold circles.
pub(super) const MAX_ENTRIES: usize = 65_536;
/// How many reads all checks of one look may make, each of which walks the guest's
/// page tables: a guest may have lists of lists. A clean guest takes some 50,000.
const MAX_READS: u32 = 2_000_000;

/// Why a check could not be made.
#[derive(Debug, thiserror::Error)]
pub(super) enum Obstacle {
    /// The layout of a structure is not known.
    #[error("{0}")]
    Layout(#[from] BtfError),
    /// The image has no BTF at all.
    #[error("the kernel's image has no BTF, which would describe its structures")]
    NoLayouts,
    /// A symbol is missing.
    #[error("the symbols have no {0}")]
    Symbol(&'static str),
    /// A pointer leads nowhere.
    #[error("{0} at {1} leads nowhere")]
    Lost(&'static str, Gva),
    /// A list does not end.
    #[error("{0} does not end")]
    Endless(&'static str),
    /// There is more to read than any guest has.
    #[error("the guest's lists are longer than those of any kernel; stopped at {0}")]
    TooMuch(&'static str),
    /// This kernel's lists of them are not known.
    #[error("whom {0} call cannot be told: this kernel keeps them in other lists")]
    Unfollowed(&'static str),
}

/// What is to be done behind an entry of a list that cannot be read: the others are
/// looked at all the same, and it is a doubt. Not where there is too much to read.
pub(super) fn go_on<T: Default>(
    done: Result<T, Obstacle>,
    doubt: &mut dyn FnMut(String),
) -> Result<T, Obstacle> {
    match done {
        Err(error) if !matches!(error, Obstacle::TooMuch(_)) => {
            doubt(error.to_string());
            Ok(T::default())
        }
        done => done,
    }
}

/// What the checks read from.
pub(super) struct View<'a> {
    pub(super) ram: &'a dyn GuestRam,
    pub(super) kernel: &'a Kernel,
    pub(super) symbols: &'a Symbols,
    pub(super) btf: Option<&'a Btf>,
    /// How many reads are left.
    left: Cell<u32>,
}

impl<'a> View<'a> {
    pub(super) fn new(
        ram: &'a dyn GuestRam,
        kernel: &'a Kernel,
        symbols: &'a Symbols,
        btf: Option<&'a Btf>,
    ) -> Self {
        Self {
            ram,
            kernel,
            symbols,
            btf,
            left: Cell::new(MAX_READS),
        }
    }

    fn spend(&self, what: &'static str) -> Result<(), Obstacle> {
        let left = self.left.get().checked_sub(1);
        self.left.set(left.ok_or(Obstacle::TooMuch(what))?);
        Ok(())
    }

    pub(super) fn btf(&self) -> Result<&Btf, Obstacle> {
        self.btf.ok_or(Obstacle::NoLayouts)
    }

    /// The runtime address of a symbol in the kernel's image.
    pub(super) fn address(&self, name: &'static str) -> Result<Gva, Obstacle> {
        let link = self.symbols.address(name);
        let link = link.filter(|&at| self.kernel.in_image(at));
        Ok(self.kernel.runtime(link.ok_or(Obstacle::Symbol(name))?))
    }

    /// The pointer at an address.
    pub(super) fn pointer(&self, at: Gva, what: &'static str) -> Result<Gva, Obstacle> {
        self.spend(what)?;
        let word = self.kernel.read_u64(self.ram, at);
        word.map(Gva).map_err(|_| Obstacle::Lost(what, at))
    }

    pub(super) fn half(&self, at: Gva, what: &'static str) -> Result<u32, Obstacle> {
        self.spend(what)?;
        let word = self.kernel.read_u32(self.ram, at);
        word.map_err(|_| Obstacle::Lost(what, at))
    }

    pub(super) fn bytes(
        &self,
        at: Gva,
        length: usize,
        what: &'static str,
    ) -> Result<Vec<u8>, Obstacle> {
        self.spend(what)?;
        let mut bytes = vec![0; length];
        let read = self.kernel.read(self.ram, at, &mut bytes);
        read.map_err(|_| Obstacle::Lost(what, at))?;
        Ok(bytes)
    }

    /// So many bytes.
    pub(super) fn array<const N: usize>(
        &self,
        at: Gva,
        what: &'static str,
    ) -> Result<[u8; N], Obstacle> {
        self.spend(what)?;
        let mut bytes = [0; N];
        let read = self.kernel.read(self.ram, at, &mut bytes);
        read.map_err(|_| Obstacle::Lost(what, at))?;
        Ok(bytes)
    }

    /// A short text, escaped; what of it can be read.
    pub(super) fn text(&self, at: Gva) -> String {
        let mut text = Vec::new();
        while text.len() < NAME_LENGTH {
            let mut byte = [0];
            let from = at.wrapping_add(text.len() as u64);
            let spent = self.spend("a name").is_ok();
            let read = self.kernel.read(self.ram, from, &mut byte);
            if !spent || read.is_err() || byte == [0] {
                break;
            }
            text.extend(byte);
        }
        escape(&text)
    }

    /// The addresses in a list of the kernel's (`struct list_head`), each less
    /// `offset`, where the list's node lies in what is listed.
    pub(super) fn list(
        &self,
        head: Gva,
        offset: u32,
        what: &'static str,
    ) -> Result<Vec<Gva>, Obstacle> {
        let mut all = Vec::new();
        self.list_into(head, offset, what, &mut all)?;
        Ok(all)
    }

    /// Looks at each entry of such a list. What is wrong with one of them, or with the
    /// list, is told after those that can be read.
    pub(super) fn each(
        &self,
        head: Gva,
        offset: u32,
        what: &'static str,
        mut look: impl FnMut(Gva) -> Result<(), Obstacle>,
    ) -> Result<(), Obstacle> {
        let mut all = Vec::new();
        let mut done = self.list_into(head, offset, what, &mut all);
        for entry in all {
            match look(entry) {
                Err(error @ Obstacle::TooMuch(_)) => return Err(error),
                result => done = done.and(result),
            }
        }
        done
    }

    /// The same, and `all` has those that come before what is wrong with the list.
    pub(super) fn list_into(
        &self,
        head: Gva,
        offset: u32,
        what: &'static str,
        all: &mut Vec<Gva>,
    ) -> Result<(), Obstacle> {
        let mut node = self.pointer(head, what)?;
        while node != head {
            if all.len() >= MAX_ENTRIES {
                return Err(Obstacle::Endless(what));
            }
            all.push(Gva(node.0.wrapping_sub(offset.into())));
            node = self.pointer(node, what)?;
        }
        Ok(())
    }

    /// Whether a runtime address lies in the code of the kernel's image.
    pub(super) fn in_text(&self, at: Gva) -> bool {
        self.symbols.text().contains(&self.kernel.link(at))
    }

    /// Whether a runtime address is that of a function of the kernel's with one of
    /// these names. Several functions may have one name.
    pub(super) fn is_one_of(&self, at: Gva, names: &[&str]) -> bool {
        self.in_text(at) && self.is_called(at, names)
    }

    /// The same of anything in the kernel's image.
    pub(super) fn is_called(&self, at: Gva, names: &[&str]) -> bool {
        let link = self.kernel.link(at);
        names.iter().any(|name| self.symbols.is_called(link, name))
    }

    /// Whether it lies in the kernel's constants, or in variables that are
    /// constant once it has started.
    pub(super) fn in_constants(&self, at: Gva) -> bool {
        let link = self.kernel.link(at);
        let bounds = ["__start_rodata", "__end_rodata"].map(|name| self.symbols.address(name));
        matches!(bounds, [Some(start), Some(end)] if (start..end).contains(&link))
    }

    /// A runtime address by the kernel's symbols: `name+0x12`, or as it is.
    pub(super) fn name(&self, at: Gva) -> String {
        let link = self.kernel.link(at);
        let named = self
            .kernel
            .in_image(link)
            .then(|| self.symbols.symbol_before(link));
        match named.flatten() {
            Some((name, 0)) => name.to_owned(),
            Some((name, offset)) => format!("{name}+{offset:#x}"),
            None => at.to_string(),
        }
    }
}

#[cfg(test)]
impl View<'_> {
    /// Lets there be no read left.
    pub(super) fn exhaust(&self) {
        self.left.set(0);
    }
}
