//! The files in /proc that are not of processes.
//!
//! ```text
//! proc_root, net.proc_net -> tree of proc_dir_entry
//!     proc_iops, proc_dops        always the kernel's
//!     proc_ops                    the kernel's, or of the module whose file it is
//!     seq_ops, single_show        what the kernel's proc_ops call, if these are for it
//!     write
//! ```
//!
//! The kernel does not keep whose file it is. It is a module's where the operations
//! are in that module; that is noted, for the guest's own word is all there is. These
//! lead to the kernel, to that module, or to one that was loaded before it. Of files
//! that the kernel itself makes it is known by name what they have, and then a module
//! has no part in it.

mod known;

use super::finding::{Check, Finding, Report};
use super::owner::{Owner, Owners};
use super::view::{Obstacle, View, MAX_ENTRIES};
use crate::kernel::{Gva, Module};

use known::KNOWN;

/// The kernel's own operations that call a table of four functions, or one function
/// (fs/proc/generic.c, fs/proc/proc_net.c).
const SEQUENCES: [&str; 2] = ["proc_seq_ops", "proc_net_seq_ops"];
const SINGLES: [&str; 2] = ["proc_single_ops", "proc_net_single_ops"];
/// `S_IFMT` and `S_IFDIR`: modules make directories, but not what these do.
const TYPE: u16 = 0o170_000;
const DIRECTORY: u16 = 0o040_000;
/// How deep the directories of /proc are followed.
const MAX_DEPTH: usize = 16;
const WHAT: &str = "a file of /proc";

/// Where things are in `struct proc_dir_entry`, fs/proc/internal.h.
struct Entry {
    ops: u64,
    iops: u64,
    dops: u64,
    seq_ops: u64,
    write: u64,
    mode: u64,
    name: u64,
    subdir: u64,
    subdir_node: u64,
    /// How long the tables are that it leads to.
    ops_size: u32,
    seq_ops_size: u32,
}

/// Looks at all entries.
pub(super) fn entries(
    view: &View<'_>,
    owners: &Owners,
    report: &mut Report,
    looked_at: &mut u64,
) -> Result<(), Obstacle> {
    let btf = view.btf()?;
    let layout = btf.structure("proc_dir_entry")?;
    let of = |name| layout.field(name).map(|field| u64::from(field.offset));
    let entry = Entry {
        ops: of("proc_ops")?,
        iops: of("proc_iops")?,
        dops: of("proc_dops")?,
        seq_ops: of("seq_ops")?,
        write: of("write")?,
        mode: of("mode")?,
        name: of("name")?,
        subdir: of("subdir")?,
        subdir_node: of("subdir_node")?,
        ops_size: btf.structure("proc_ops")?.size()?,
        seq_ops_size: btf.structure("seq_operations")?.size()?,
    };
    let mut walk = Walk {
        view,
        owners,
        report,
        entry,
        left: MAX_ENTRIES,
    };
    let done = walk.all();
    *looked_at += (MAX_ENTRIES - walk.left) as u64;
    done
}

struct Walk<'a, 'b> {
    view: &'a View<'b>,
    owners: &'a Owners,
    report: &'a mut Report,
    entry: Entry,
    left: usize,
}

impl<'a> Walk<'a, '_> {
    fn all(&mut self) -> Result<(), Obstacle> {
        const WHAT: &str = "the network namespaces";
        let view = self.view;
        self.directory(view.address("proc_root")?, "/proc", MAX_DEPTH)?;
        let net = view.btf()?.structure("net");
        if let (Ok(head), Ok(net)) = (view.address("net_namespace_list"), net) {
            let (list, proc_net) = (net.field("list")?.offset, net.field("proc_net")?.offset);
            view.each(head, list, WHAT, |net| {
                let directory = view.pointer(net.wrapping_add(proc_net.into()), WHAT)?;
                match directory.0 {
                    0 => Ok(()),
                    _ => self.directory(directory, "/proc/net", MAX_DEPTH),
                }
            })?;
        }
        Ok(())
    }

    /// A directory and all in it: a red-black tree of entries.
    fn directory(&mut self, at: Gva, path: &str, depth: usize) -> Result<(), Obstacle> {
        const WHAT: &str = "a directory of /proc";
        let Some(depth) = depth.checked_sub(1) else {
            return Err(Obstacle::Endless(WHAT));
        };
        self.file(at, path)?;
        let subdir = at.wrapping_add(self.entry.subdir);
        let mut open = vec![self.view.pointer(subdir, WHAT)?];
        while let Some(node) = open.pop() {
            if node.0 == 0 {
                continue;
            }
            self.left = self.left.checked_sub(1).ok_or(Obstacle::Endless(WHAT))?;
            // struct rb_node: the parent and colour, right, left.
            for offset in [8, 16] {
                open.push(self.view.pointer(node.wrapping_add(offset), WHAT)?);
            }
            let inner = Gva(node.0.wrapping_sub(self.entry.subdir_node));
            let name = inner.wrapping_add(self.entry.name);
            let name = self.view.pointer(name, WHAT)?;
            let path = format!("{path}/{}", self.view.text(name));
            self.directory(inner, &path, depth)?;
        }
        Ok(())
    }

    /// The operations of an entry.
    fn file(&mut self, entry: Gva, path: &str) -> Result<(), Obstacle> {
        let view = self.view;
        let there = |offset: u64| {
            let at = entry.wrapping_add(offset);
            Ok::<_, Obstacle>((at, view.pointer(at, WHAT)?))
        };
        // No module gets at those.
        for (what, offset) in [
            ("proc_iops", self.entry.iops),
            ("proc_dops", self.entry.dops),
        ] {
            let (at, table) = there(offset)?;
            if table.0 != 0 && !view.in_constants(table) {
                self.found(what, path, at, table, "operations of the kernel's own");
            }
        }
        let (at, ops) = there(self.entry.ops)?;
        let mode = view.array(entry.wrapping_add(self.entry.mode), WHAT)?;
        if u16::from_le_bytes(mode) & TYPE == DIRECTORY && !view.in_constants(ops) && ops.0 != 0 {
            self.found(
                "proc_dir_ops",
                path,
                at,
                ops,
                "operations of the kernel's own",
            );
            return Ok(());
        }
        let mut called = vec![("proc_ops", at, ops)];
        let is = |names: &[&str]| view.is_called(ops, names);
        let (sequence, single) = (is(&SEQUENCES), is(&SINGLES));
        if sequence || single {
            let (at, to) = there(self.entry.seq_ops)?;
            called.push((if sequence { "seq_ops" } else { "single_show" }, at, to));
            let (at, to) = there(self.entry.write)?;
            called.push(("write", at, to));
        }
        called.retain(|(_, _, to)| to.0 != 0);
        if let Some(expected) = self.known(path) {
            // The last of them is what does the work.
            let own = called
                .iter()
                .any(|(_, _, to)| view.is_called(*to, &[expected]));
            if !own {
                let last = called.iter().find(|(what, ..)| *what != "proc_ops");
                if let Some(&(what, at, to)) = last.or(called.first()) {
                    self.found(what, path, at, to, expected);
                }
                return Ok(());
            }
        }
        let mut maker: Option<&Module> = None;
        for (what, at, to) in called {
            let theirs = match what {
                "proc_ops" => self.table(what, path, (at, to), self.entry.ops_size)?,
                "seq_ops" => self.table(what, path, (at, to), self.entry.seq_ops_size)?,
                "single_show" => {
                    let theirs = self.owners.modules.iter().find(|module| module.has(to));
                    self.function(what, path, (at, to), theirs);
                    theirs
                }
                _ => {
                    self.function(what, path, (at, to), maker);
                    None
                }
            };
            maker = maker.or(theirs);
        }
        if let Some(module) = maker {
            let note = format!("{path} is a file of the module {}", module.name);
            self.report.note(note);
        }
        Ok(())
    }

    /// What a file of this kernel's own must have, if that is known.
    fn known(&self, path: &str) -> Option<&'static str> {
        let (_, symbol) = KNOWN.iter().find(|(known, _)| *known == path)?;
        self.view.symbols.address(symbol).map(|_| *symbol)
    }

    /// A table of functions: the module that it is in, if it is a module's. Those of
    /// the kernel's constants are compared byte by byte.
    fn table(
        &mut self,
        what: &'static str,
        path: &str,
        (at, table): (Gva, Gva),
        size: u32,
    ) -> Result<Option<&'a Module>, Obstacle> {
        let view = self.view;
        if view.in_constants(table) {
            return Ok(None);
        }
        let mut modules = self.owners.modules.iter();
        let maker = modules.find(|module| module.holds(table));
        if maker.is_none() && !view.kernel.in_image(view.kernel.link(table)) {
            self.found(
                what,
                path,
                at,
                table,
                "operations of the kernel's own, or of a module's",
            );
            return Ok(None);
        }
        let functions = view.bytes(table, size as usize, WHAT)?;
        for (word, offset) in functions.chunks_exact(8).zip((0u64..).step_by(8)) {
            let to = word.try_into().map_or(0, u64::from_le_bytes);
            // proc_flags, which has 8 bytes to itself.
            let flags = what == "proc_ops" && offset == 0;
            if to != 0 && !flags {
                let place = table.wrapping_add(offset);
                self.function(what, path, (place, Gva(to)), maker);
            }
        }
        Ok(maker)
    }

    /// A function that a file of `maker` calls, or of the kernel's if that is none.
    fn function(
        &mut self,
        what: &'static str,
        path: &str,
        (at, function): (Gva, Gva),
        maker: Option<&Module>,
    ) {
        let mut modules = self.owners.modules.iter();
        let theirs = modules.find(|module| module.has(function));
        let may = match (theirs, maker) {
            (Some(theirs), Some(maker)) => self.owners.may_serve(theirs, maker),
            _ => false,
        };
        if !may && !self.view.in_text(function) {
            let expected = "a function of the kernel's, or of the module whose file it is";
            self.found(what, path, at, function, expected);
        }
    }

    fn found(&mut self, what: &str, path: &str, at: Gva, is: Gva, expected: &str) {
        let module = self.owners.modules.iter().find(|module| module.holds(is));
        let owner = match (self.owners.owner(self.view, is), module) {
            (Owner::Nobody, Some(module)) => format!("the module {}", module.name),
            (owner, _) => owner.to_string(),
        };
        self.report.add(Finding {
            check: Check::Files,
            place: format!("{what} of {path}"),
            address: at.0,
            expected: expected.to_owned(),
            found: self.view.name(is),
            owner: Some(owner),
        });
    }
}
