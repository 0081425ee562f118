//! The checks against a kernel that is made of a few words: what each finds in it,
//! and what it leaves alone.

mod callbacks;
mod lists;
mod proc;

use std::collections::BTreeMap;

use super::finding::{Finding, Report};
use super::owner::Owners;
use super::view::View;
use crate::kernel::btf::build::Builder;
use crate::kernel::{Gva, Kernel, Module, PageTables, Symbols};
use crate::ram::{Gpa, Layout, VecRam};

const MAP: u64 = 0xffff_ffff_8000_0000;
/// The kernel's image, whose text is a page.
pub(super) const TEXT: u64 = MAP + 0x20_0000;
pub(super) const DATA: u64 = TEXT + 0x1_0000;
const END: u64 = TEXT + 0x8_0000;
/// What was allocated.
pub(super) const HEAP: u64 = MAP + 0x40_0000;
/// Eight pages of the module area, the first four of which can be executed.
pub(super) const MODULES: u64 = 0xffff_ffff_c000_0000;
/// What all structures are long.
const SIZE: u32 = 512;
const NO_EXECUTE: u64 = 1 << 63;

/// A guest in the making.
pub(super) struct Fake {
    ram: VecRam,
    kernel: Kernel,
    symbols: String,
    btf: Builder,
    /// How many functions there are.
    functions: u64,
    /// The modules on the list.
    pub(super) modules: Vec<Module>,
    text_end: u64,
}

impl Fake {
    pub(super) fn new() -> Self {
        let ram = VecRam::new(Layout::flat(8 << 20).expect("a layout"));
        ram.poke_u64(Gpa(0x1000 + 8 * 511), 0x2000 | 3);
        ram.poke_u64(Gpa(0x2000 + 8 * 510), 0x3000 | 3);
        ram.poke_u64(Gpa(0x2000 + 8 * 511), 0x4000 | 3);
        for page in 0..3 {
            let data = if page == 1 { 0 } else { NO_EXECUTE };
            ram.poke_u64(Gpa(0x3000 + 8 * page), page << 21 | 0x83 | data);
        }
        ram.poke_u64(Gpa(0x4000), 0x5000 | 3);
        for page in 0..8 {
            let data = if page < 4 { 0 } else { NO_EXECUTE };
            let to = 0x60_0000 + (page << 12);
            ram.poke_u64(Gpa(0x5000 + 8 * page), to | 3 | data);
        }
        let root = Gpa(0x1000);
        Self {
            ram,
            kernel: Kernel::made_up(
                Gpa(TEXT - MAP),
                Gva(TEXT),
                END - TEXT,
                PageTables { root, levels: 4 },
            ),
            symbols: format!(
                "{TEXT:x} T _text\n{TEXT:x} T _stext\n{:x} D _sdata\n{END:x} D _edata\n",
                DATA + 0x480
            ),
            btf: Builder::new(),
            functions: 0,
            modules: vec![module("hook", 0, 4)],
            text_end: TEXT + 0x1000,
        }
    }

    /// Names a function of the kernel's, which is somewhere in its text.
    pub(super) fn function(&mut self, name: &str) -> u64 {
        self.functions += 1;
        let at = TEXT + 0x10 * self.functions;
        self.symbol(at, 't', name);
        at
    }

    pub(super) fn symbol(&mut self, at: u64, kind: char, name: &str) {
        self.symbols += &format!("{at:x} {kind} {name}\n");
    }

    /// Describes a structure of words, by their offsets in bytes; a dot in a name is
    /// a structure in it.
    pub(super) fn layout(&mut self, name: &str, fields: &[(&str, u32)]) {
        let mut inner: BTreeMap<&str, Vec<(&str, u32, u32)>> = BTreeMap::new();
        let mut members = Vec::new();
        for &(path, at) in fields {
            match path.split_once('.') {
                Some((outer, path)) => inner.entry(outer).or_default().push((path, at, 8)),
                None => members.push((path, self.btf.int("", 8), 8 * at)),
            }
        }
        for (outer, fields) in inner {
            members.push((outer, self.btf.words("", SIZE, &fields), 0));
        }
        self.btf.structure(name, SIZE, &members);
    }

    /// Describes a structure of which only the size is asked for.
    pub(super) fn sized(&mut self, name: &str, size: u32) {
        self.btf.structure(name, size, &[]);
    }

    /// Lets the kernel's text end elsewhere than with its first page.
    pub(super) fn text_ends(&mut self, at: u64) {
        self.text_end = at;
    }

    /// Lets a page of the module area not be executed.
    pub(super) fn forbid(&mut self, page: u64) {
        let entry = Gpa(0x5000 + 8 * page);
        let to = 0x60_0000 + (page << 12);
        self.ram.poke_u64(entry, to | 3 | NO_EXECUTE);
    }

    pub(super) fn put(&self, at: u64, value: u64) {
        self.bytes(at, &value.to_le_bytes());
    }

    pub(super) fn bytes(&self, at: u64, bytes: &[u8]) {
        let gpa = self.kernel.translate(&self.ram, Gva(at)).expect("mapped");
        self.ram.poke(gpa, bytes);
    }

    /// What a check comes to, with these modules on the list.
    pub(super) fn check(&self, check: impl FnOnce(&View<'_>, &Owners, &mut Report)) -> Report {
        let symbols = format!("{}{:x} T _etext\n", self.symbols, self.text_end);
        let symbols = Symbols::parse(symbols.into_bytes()).expect("symbols");
        let btf = self.btf.parse();
        let view = View::new(&self.ram, &self.kernel, &symbols, Some(&btf));
        let owners = Owners::made_of(&view, self.modules.clone());
        let mut report = Report::default();
        check(&view, &owners, &mut report);
        report
    }
}

/// A module with a page of code and one of data.
pub(super) fn module(name: &str, code: u64, data: u64) -> Module {
    let page = |page: u64| Gva(MODULES + (page << 12))..Gva(MODULES + ((page + 1) << 12));
    Module {
        name: name.to_owned(),
        at: page(data).start,
        code: vec![page(code)],
        memory: vec![page(code), page(data)],
        kallsyms: None,
    }
}

/// Code of the module that is on the list, and of nobody.
pub(super) const THEIRS: u64 = MODULES + 0x100;
pub(super) const NOBODYS: u64 = MODULES + 0x2100;

/// What was found: place, what is there, and whose it is.
pub(super) fn found(report: &Report) -> Vec<(&str, &str, &str)> {
    report.findings.iter().map(parts).collect()
}

fn parts(one: &Finding) -> (&str, &str, &str) {
    let owner = one.owner.as_deref().unwrap_or_default();
    (&one.place, &one.found, owner)
}
