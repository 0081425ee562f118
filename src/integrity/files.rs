//! Files: the operations of mounted file systems. Those of /proc are for `proc.rs`.
//!
//! ```text
//! super_blocks -> super_block -> s_op, s_root -> dentry -> d_op, d_inode -> i_op, i_fop
//! ```
//!
//! The tables themselves are constants of the kernel (`data.rs`) or of the module
//! that the file system is from. What is judged here is which table is used: a
//! hook puts its own in the place of one. Which module a file system is from, the
//! place of its `struct file_system_type` tells: one in the kernel's image is from
//! none. Some are from two modules: the type's is built on another, which was loaded
//! before it (vfat on fat, virtiofs on fuse), or is extended by another ([`EXTENDED`]).

use super::finding::{Check, Finding, Report};
use super::owner::Owners;
use super::view::{go_on, Obstacle, View};
use crate::kernel::{Gva, Module};

/// Modules whose file systems have operations of a module that is loaded later, and by
/// which names that goes.
const EXTENDED: [(&str, &[&str]); 1] = [("nfs", &["nfsv2", "nfsv3", "nfsv4"])];

/// Looks at files.
pub(super) fn operations(view: &View<'_>, owners: &Owners, report: &mut Report) {
    let mut looked_at = 0;
    let mut doubts = Vec::new();
    let mut doubt = |doubt| doubts.push(doubt);
    let done = mounts(view, owners, report, &mut looked_at, &mut doubt);
    let done = go_on(done, &mut doubt)
        .and_then(|()| super::proc::entries(view, owners, report, &mut looked_at));
    doubts.extend(done.err().map(|error| error.to_string()));
    report.done(Check::Files, looked_at, doubts.into_iter().next());
}

/// What a table of operations may be of: the kernel's constants, or a module.
fn judge(
    view: &View<'_>,
    owners: &Owners,
    report: &mut Report,
    place: &dyn Fn() -> String,
    at: Gva,
    table: Gva,
    module: Option<&Module>,
) {
    let holder = owners.modules.iter().find(|known| known.holds(table));
    let may = match (holder, module) {
        (Some(holder), Some(module)) => {
            let extends = |(of, by): &(&str, &[&str])| {
                *of == module.name && by.contains(&holder.name.as_str())
            };
            owners.may_serve(holder, module) || EXTENDED.iter().any(extends)
        }
        _ => false,
    };
    if table.0 == 0 || view.in_constants(table) || may {
        return;
    }
    let owner = match holder {
        Some(module) => format!("the module {}", module.name),
        None => owners.owner(view, table).to_string(),
    };
    report.add(Finding {
        check: Check::Files,
        place: place(),
        address: at.0,
        expected: "operations of the kernel's own, or of the file system's module".to_owned(),
        found: view.name(table),
        owner: Some(owner),
    });
}

/// The roots of mounted file systems.
fn mounts(
    view: &View<'_>,
    owners: &Owners,
    report: &mut Report,
    looked_at: &mut u64,
    doubt: &mut dyn FnMut(String),
) -> Result<(), Obstacle> {
    const WHAT: &str = "a file system";
    let btf = view.btf()?;
    let block = btf.structure("super_block")?;
    let kind = btf.structure("file_system_type")?;
    let (dentry, inode) = (btf.structure("dentry")?, btf.structure("inode")?);
    let of = |field: Result<crate::kernel::btf::Field, _>| {
        field.map(|field: crate::kernel::btf::Field| u64::from(field.offset))
    };
    let (s_list, s_type) = (block.field("s_list")?.offset, of(block.field("s_type"))?);
    let (s_op, s_root) = (of(block.field("s_op"))?, of(block.field("s_root"))?);
    let name = of(kind.field("name"))?;
    let (d_inode, d_op) = (of(dentry.field("d_inode"))?, of(dentry.field("d_op"))?);
    let (i_op, i_fop) = (of(inode.field("i_op"))?, of(inode.field("i_fop"))?);
    let mut look = |block: Gva| {
        let follow = |at: Gva, offset: u64| view.pointer(at.wrapping_add(offset), WHAT);
        let kind = follow(block, s_type)?;
        // Whose the type is, where it lies says, and not its own word for that.
        let module = owners.modules.iter().find(|module| module.holds(kind));
        let name = view.text(follow(kind, name)?);
        let mut all = vec![("s_op", block, s_op)];
        // One that is being mounted or unmounted has no root.
        let root = follow(block, s_root)?;
        if root.0 != 0 {
            all.push(("d_op", root, d_op));
            let inode = follow(root, d_inode)?;
            if inode.0 != 0 {
                all.extend([("i_op", inode, i_op), ("i_fop", inode, i_fop)]);
            }
        }
        for (what, at, offset) in all {
            *looked_at += 1;
            let at = at.wrapping_add(offset);
            let table = view.pointer(at, WHAT)?;
            let place = || format!("{what} of the root of a mounted {name}");
            judge(view, owners, report, &place, at, table, module);
        }
        Ok(())
    };
    view.each(view.address("super_blocks")?, s_list, WHAT, |block| {
        go_on(look(block), doubt)
    })
}
