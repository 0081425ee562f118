//! What xftrace knows of libvirt: domain XML, enrolment, the daemon's
//! connection, hook events, and where QEMU keeps a domain's memory.
//!
//! Only `cli` and `helper` use this room, and only this room uses the `virt`
//! and `quick-xml` crates. Nothing here reads guest memory: `memory` finds
//! and opens the files, and hands them out as descriptors.
//!
//! - [`xml`] reads a domain's XML and edits the two places in it that are
//!   ours. Every byte elsewhere stays.
//! - `connection` asks the daemon. The hook never does: libvirt waits for
//!   the hook, so that asking would wait for itself.
//! - `hook` decides what a hook event asks for, and starts the helper.
//! - `memory` finds the files that a running QEMU has its guest's RAM in.

pub mod xml;
