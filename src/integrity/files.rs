//! Files: the operations of mounted file systems and of /proc.
//!
//! ```text
//! super_blocks -> super_block -> s_op, s_root -> dentry -> d_op, d_inode -> i_op, i_fop
//! proc_root, net.proc_net -> tree of proc_dir_entry -> proc_ops, proc_iops, seq_ops
//! ```
//!
//! The tables themselves are constants of the kernel (`data.rs`) or of the module
//! that the file system is from. What is judged here is which table is used: a
//! hook puts its own in the place of one. Of the kernel's own files in /proc/net it
//! is known which table each has, by the table's symbol.

use super::finding::{Check, Finding, Report};
use super::owner::Owners;
use super::view::{Obstacle, View, MAX_ENTRIES};
use crate::kernel::Gva;

/// The kernel's own sequence operations, by the file's name. Of a kernel that has
/// one of them in a module, the symbol is not there.
const SEQUENCES: [(&str, &str); 13] = [
    ("arp", "arp_seq_ops"),
    ("dev", "dev_seq_ops"),
    ("icmp", "ping_v4_seq_ops"),
    ("netlink", "netlink_seq_ops"),
    ("packet", "packet_seq_ops"),
    ("raw", "raw_seq_ops"),
    ("route", "fib_route_seq_ops"),
    ("tcp", "tcp4_seq_ops"),
    ("tcp6", "tcp6_seq_ops"),
    ("udp", "udp_seq_ops"),
    ("udp6", "udp6_seq_ops"),
    ("unix", "unix_seq_ops"),
    ("raw6", "raw6_seq_ops"),
];
/// How deep the directories of /proc are followed.
const MAX_DEPTH: usize = 16;

/// Looks at files.
pub(super) fn operations(view: &View<'_>, owners: &Owners, report: &mut Report) {
    let mut looked_at = 0;
    let done = mounts(view, owners, report, &mut looked_at)
        .and_then(|()| proc(view, owners, report, &mut looked_at));
    let doubt = done.err().map(|error| error.to_string());
    report.done(Check::Files, looked_at, doubt);
}

/// What a table of operations may be of: the kernel's constants, or a module.
fn judge(
    view: &View<'_>,
    owners: &Owners,
    report: &mut Report,
    place: &dyn Fn() -> String,
    at: Gva,
    table: Gva,
    module: Option<Gva>,
) {
    let known = owners.modules.iter();
    let theirs = |known: &&crate::kernel::Module| Some(known.at) == module;
    let from_module = known
        .clone()
        .any(|known| known.holds(table) && theirs(&known));
    if table.0 == 0 || view.in_constants(table) || from_module {
        return;
    }
    let holder = known.clone().find(|known| known.holds(table));
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
    let (name, owner) = (of(kind.field("name"))?, of(kind.field("owner"))?);
    let (d_inode, d_op) = (of(dentry.field("d_inode"))?, of(dentry.field("d_op"))?);
    let (i_op, i_fop) = (of(inode.field("i_op"))?, of(inode.field("i_fop"))?);
    for block in view.list(view.address("super_blocks")?, s_list, WHAT)? {
        let follow = |at: Gva, offset: u64| view.pointer(at.wrapping_add(offset), WHAT);
        let kind = follow(block, s_type)?;
        let module = Some(follow(kind, owner)?).filter(|module| module.0 != 0);
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
    }
    Ok(())
}

/// Where things are in `struct proc_dir_entry`, fs/proc/internal.h.
struct Entry {
    ops: u64,
    iops: u64,
    seq_ops: u64,
    name: u64,
    subdir: u64,
    subdir_node: u64,
}

/// The files in /proc that are not of processes.
fn proc(
    view: &View<'_>,
    owners: &Owners,
    report: &mut Report,
    looked_at: &mut u64,
) -> Result<(), Obstacle> {
    const WHAT: &str = "the network namespaces";
    let btf = view.btf()?;
    let layout = btf.structure("proc_dir_entry")?;
    let of = |name| layout.field(name).map(|field| u64::from(field.offset));
    let entry = Entry {
        ops: of("proc_ops")?,
        iops: of("proc_iops")?,
        seq_ops: of("seq_ops")?,
        name: of("name")?,
        subdir: of("subdir")?,
        subdir_node: of("subdir_node")?,
    };
    let mut walk = Walk {
        view,
        owners,
        report,
        entry,
        left: MAX_ENTRIES,
    };
    walk.directory(view.address("proc_root")?, "/proc", MAX_DEPTH)?;
    if let (Ok(head), Ok(net)) = (view.address("net_namespace_list"), btf.structure("net")) {
        let (list, proc_net) = (net.field("list")?.offset, net.field("proc_net")?.offset);
        for net in view.list(head, list, WHAT)? {
            let directory = view.pointer(net.wrapping_add(proc_net.into()), WHAT)?;
            if directory.0 != 0 {
                walk.directory(directory, "/proc/net", MAX_DEPTH)?;
            }
        }
    }
    *looked_at += (MAX_ENTRIES - walk.left) as u64;
    Ok(())
}

struct Walk<'a, 'b> {
    view: &'a View<'b>,
    owners: &'a Owners,
    report: &'a mut Report,
    entry: Entry,
    left: usize,
}

impl Walk<'_, '_> {
    /// A directory and all in it: a red-black tree of entries.
    fn directory(&mut self, at: Gva, path: &str, depth: usize) -> Result<(), Obstacle> {
        const WHAT: &str = "a directory of /proc";
        let Some(depth) = depth.checked_sub(1) else {
            return Err(Obstacle::Endless(WHAT));
        };
        self.tables(at, path)?;
        let mut open = vec![self
            .view
            .pointer(at.wrapping_add(self.entry.subdir), WHAT)?];
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
            let name = self
                .view
                .pointer(inner.wrapping_add(self.entry.name), WHAT)?;
            let path = format!("{path}/{}", self.view.text(name));
            self.directory(inner, &path, depth)?;
        }
        Ok(())
    }

    /// The operations of an entry.
    fn tables(&mut self, at: Gva, path: &str) -> Result<(), Obstacle> {
        const WHAT: &str = "a file of /proc";
        let view = self.view;
        let in_net = path.strip_prefix("/proc/net/");
        let known = SEQUENCES.iter().find(|(name, _)| in_net == Some(name));
        let expected = known.and_then(|&(_, ops)| Some((view.address(ops).ok()?, ops)));
        let module_of = |table| {
            self.owners
                .modules
                .iter()
                .find(|module| module.holds(table))
        };
        for (what, offset) in [("proc_ops", self.entry.ops), ("proc_iops", self.entry.iops)] {
            let at = at.wrapping_add(offset);
            let table = view.pointer(at, WHAT)?;
            // A module's file may have its operations; the kernel's own may not.
            let module = module_of(table).filter(|_| expected.is_none());
            if let Some(module) = module {
                self.report
                    .note(format!("{path} is a file of the module {}", module.name));
            }
            let place = || format!("{what} of {path}");
            let module = module.map(|module| module.at);
            judge(view, self.owners, self.report, &place, at, table, module);
        }
        let Some((expected, symbol)) = expected else {
            return Ok(());
        };
        let place = at.wrapping_add(self.entry.seq_ops);
        let table = view.pointer(place, WHAT)?;
        if table != expected {
            let owner = match module_of(table) {
                Some(module) => format!("the module {}", module.name),
                None => self.owners.owner(view, table).to_string(),
            };
            self.report.add(Finding {
                check: Check::Files,
                place: format!("seq_ops of {path}"),
                address: place.0,
                expected: symbol.to_owned(),
                found: view.name(table),
                owner: Some(owner),
            });
        }
        Ok(())
    }
}
