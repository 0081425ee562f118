//! Names for functions and return addresses that mean the same in every boot
//! and every session of one kernel.

use std::collections::HashMap;
use std::fmt;

use crate::callflow::{Kind, Place};

/// A function by its number in a [`Labels`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Label(u32);

impl Label {
    /// What code in the module area is called where no symbol is known: where a
    /// module lies differs from boot to boot.
    pub(crate) const MODULE: Self = Self(0);
    /// What stands for a place where no kernel code belongs.
    pub(crate) const OUTSIDE: Self = Self(1);
    /// Kernel text that is no function's entry.
    pub(crate) const TEXT: Self = Self(2);
    /// Before a function's first callee and behind its last.
    pub(crate) const EDGE: Self = Self(3);
    /// Code in the module area that is no module's of the guest's own list.
    pub(crate) const UNLISTED: Self = Self(4);
    /// Code in the module area that runs while a module sets itself up or down.
    pub(crate) const LOADING: Self = Self(5);

    /// Whether it stands for code in the module area that has no name of its own.
    pub(crate) fn is_nameless_module(self) -> bool {
        [Self::MODULE, Self::UNLISTED, Self::LOADING].contains(&self)
    }
}

/// The names behind the labels. They are those of the symbol file, so that
/// there is an end to them, whatever a guest records.
#[derive(Debug)]
pub(crate) struct Labels<'n> {
    names: Vec<&'n str>,
    numbers: HashMap<(&'n str, Option<&'n str>), Label>,
}

/// The name of [`Label::MODULE`], and of a return address there.
pub(crate) const MODULE: &str = "(module area)";
/// The name of [`Label::OUTSIDE`].
pub(crate) const OUTSIDE: &str = "(outside)";
/// The name of [`Label::UNLISTED`], and of a return address there.
pub(crate) const UNLISTED: &str = "(unlisted code)";
/// The name of [`Label::LOADING`].
pub(crate) const LOADING: &str = "(module that loads)";
/// The name of [`Label::EDGE`].
pub(crate) const EDGE: &str = "-";

impl<'n> Labels<'n> {
    pub(crate) fn new() -> Self {
        Self {
            names: vec![MODULE, OUTSIDE, "(kernel text)", EDGE, UNLISTED, LOADING],
            numbers: HashMap::new(),
        }
    }

    /// The label of the function that an address enters.
    pub(crate) fn of(&mut self, place: &Place<'n>) -> Label {
        let Some(name) = place.entered() else {
            return match place.name.kind {
                Kind::Kernel => Label::TEXT,
                Kind::Module => Label::MODULE,
                Kind::Outside => Label::OUTSIDE,
            };
        };
        let next = Label(u32::try_from(self.names.len()).unwrap_or(u32::MAX));
        let names = &mut self.names;
        *self
            .numbers
            .entry((name, place.name.module))
            .or_insert_with(|| {
                names.push(name);
                next
            })
    }

    pub(crate) fn name(&self, label: Label) -> &'n str {
        self.names.get(label.0 as usize).copied().unwrap_or("?")
    }
}

/// A return address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Site<'n> {
    /// In a function, so many bytes behind its symbol.
    In(&'n str, u64),
    /// In a module, whose name is known or not.
    Module(Option<&'n str>),
    /// In the module area, and in no module of the guest's own list.
    Unlisted,
    /// Where no kernel code belongs.
    Outside,
    /// In kernel text, before any symbol.
    Text,
}

impl<'n> Site<'n> {
    pub(crate) fn of(place: &Place<'n>) -> Self {
        match (place.name.kind, place.name.symbol) {
            (Kind::Module, _) => Self::Module(place.name.module),
            (Kind::Outside, _) => Self::Outside,
            (Kind::Kernel, Some((symbol, offset))) => Self::In(symbol, offset),
            (Kind::Kernel, None) => Self::Text,
        }
    }
}

impl fmt::Display for Site<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::In(symbol, offset) => write!(f, "{symbol}+{offset:#x}"),
            Self::Module(Some(module)) => write!(f, "[{module}]"),
            Self::Module(None) => f.write_str(MODULE),
            Self::Unlisted => f.write_str(UNLISTED),
            Self::Outside => f.write_str(OUTSIDE),
            Self::Text => f.write_str("(kernel text)"),
        }
    }
}

/// Whether a function is what a system call's number leads to.
pub(crate) fn is_system_call(name: &str) -> bool {
    [
        "__x64_sys_",
        "__ia32_sys_",
        "__x64_compat_sys_",
        "__ia32_compat_sys_",
    ]
    .iter()
    .any(|prefix| name.starts_with(prefix))
}

/// The functions that call system calls' functions: `do_syscall_64` and
/// `do_int80_syscall_32` and their like (arch/x86/entry/common.c), or, where
/// these go through a switch, `x64_sys_call` and its like
/// (arch/x86/entry/syscall_64.c).
const DISPATCHERS: [&str; 10] = [
    "do_syscall_64",
    "x64_sys_call",
    "x32_sys_call",
    "ia32_sys_call",
    "do_int80_syscall_32",
    "do_int80_emulation",
    "do_fast_syscall_32",
    "__do_fast_syscall_32",
    "do_syscall_x64",
    "do_syscall_32_irqs_on",
];

/// Whether what is called below a function is a module that sets itself up, or ends:
/// `do_init_module` and `delete_module` call its functions (kernel/module/main.c).
pub(crate) fn loads_modules(name: &str) -> bool {
    [
        "do_init_module",
        "__do_sys_delete_module",
        "__x64_sys_delete_module",
        "__ia32_sys_delete_module",
    ]
    .contains(&name)
}

/// Whether a return address is one that a system call's function may have: it
/// lies in kernel text, in one of the dispatchers.
pub(crate) fn is_dispatcher(site: &Site<'_>) -> bool {
    matches!(site, Site::In(symbol, _) if DISPATCHERS.contains(symbol))
}
