//! The guest's kernel, seen from outside: its symbols, where it lies, and how
//! its virtual addresses become guest physical ones.
//!
//! The way from a name to a byte has three steps. [`Symbols`] reads the
//! host's copy of the kernel's System.map: a name has a *link-time* address.
//! [`find_all`] finds where that kernel lies in guest RAM, with KASLR, and
//! gives a [`Kernel`]: the slide makes a link-time address a *runtime* one,
//! and what lies inside the kernel's image has a known guest physical
//! address. For everything else (stacks, vmalloc, modules) the guest's own
//! page tables are walked ([`Kernel::translate`]).
//!
//! ```text
//! name -Symbols-> link-time Gva -slide-> runtime Gva -page walk-> Gpa
//!                       `----------- image_gpa -------------------^
//! ```
//!
//! What is trusted here: System.map, a file of the host's administrator
//! (though a bad one gives an error, never a panic). What is not: every byte
//! of guest memory. A guest can make the finder find nothing, or find what is
//! not a kernel; it cannot make it read outside RAM, loop, or take more than
//! a bounded amount of memory. All that the guest's text (the banner) goes
//! into is escaped first.
//!
//! Uses [`crate::ram`] alone, and knows nothing of tracing except for the
//! control block that the guest patch keeps in its image.

mod address;
pub mod btf;
pub mod control;
mod escape;
mod executable;
mod find;
pub mod gates;
mod identify;
mod image;
mod modules;
mod online;
mod paging;
mod scan;
mod started;
pub mod stock;
mod symbols;

pub use address::Gva;
pub(crate) use escape::escape;
pub use executable::Executable;
pub use find::{banners, find_all, find_all_beside, has_banner, probe, Check, FindError};
pub use image::Kernel;
pub use modules::{
    is_name, modules, Kallsyms, KallsymsError, Module, ModuleFunctions, ModuleList, ModulesError,
};
pub use online::Online;
pub use paging::{Mapped, PageTables, WalkError};
pub(crate) use started::has_started;
pub use symbols::{
    FtraceNameError, FunctionMatch, ModuleFunction, Symbols, SymbolsError, SymbolsFault,
    TableFault, UnknownFunction, UnknownWhy,
};
