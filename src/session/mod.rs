//! A session on disk: one trace, from its start to its end.
//!
//! ```text
//! /var/log/libvirt/qemu/DOMAIN.xftrace/20261123T093000Z/
//!   session.json      what, of whom, when, and every count   (Meta)
//!   klog              the keys                               (keys::Klog)
//!   System.map-DIGEST the symbols it is read with, one a kernel (MapId)
//!   ring/boot1-cpu0   what was in that CPU's buffer, as it lay there
//!   findings.jsonl    what the guest was caught at
//!   modules.jsonl     the guest's own list of modules, whenever it changed
//!   module-symbols.jsonl  what each of them says its functions are called
//!   trace_graph.txt   the call flow
//! ```
//!
//! The directory holds all that it takes to decode the session again, anywhere.
//! [`SessionWriter`] is what the helper writes it with, while the guest runs;
//! [`Session`] reads it, finished or not, and gives the decoded items of all
//! CPUs in the order of their times; [`Follow`] does so while it grows. Nothing
//! is held in memory that grows with the trace.
//!
//! Beside the sessions lies a `findings.jsonl` of the domain's own
//! ([`DomainFindings`]), of what was found in its guest's memory.
//!
//! This module may use `ring` and what is before it.

mod disk;
mod findings;
mod follow;
mod lines;
mod maps;
mod meta;
mod modules;
mod place;
mod read;
mod settle;
mod store;
mod write;

pub use findings::{ControlFlow, DomainFindings, Doubt, Finding, FindingKind, Integrity};
pub use follow::{Follow, Look, HELD};
pub use maps::MapId;
pub use meta::{
    Boot, ClockPair, Counters, EndReason, GuestCounts, Meta, Mode, QemuProcess, State,
    SwitchChange, META_FILE,
};
pub use modules::{
    GuestName, ListTells, Listed, ModuleHistory, ModuleLook, ModuleNames, ModuleSymbols,
    ModulesReader, UNSURE_NS,
};
pub use place::{domain_dir, list, new_dir};
pub use read::{is_module_address, GuestCode, Items, Session};
pub(crate) use settle::Settling;
pub use settle::SETTLE;
pub use store::{ChunkReader, ChunkWriter};
pub use write::SessionWriter;

use std::io;
use std::path::PathBuf;

use crate::kernel::SymbolsError;
use crate::keys::KlogError;

/// The file in a session's directory that holds its keys.
pub const KLOG_FILE: &str = "klog";
/// The file in a session's directory that holds its call flow.
pub const GRAPH_FILE: &str = "trace_graph.txt";
/// The file in a session's directory, and beside a domain's sessions, that holds what
/// the guest was caught at.
pub const FINDINGS_FILE: &str = "findings.jsonl";
/// The guest's list of modules, in the session's directory.
pub const MODULES_FILE: &str = "modules.jsonl";
/// What the modules on it say their functions are called.
pub const MODULE_SYMBOLS_FILE: &str = "module-symbols.jsonl";

/// Why a session cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// A file or directory of it.
    #[error("cannot {action} {path:?}: {cause}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why not.
        cause: io::Error,
    },
    /// A directory without a `session.json` in it.
    #[error("{0:?} is no session: it has no session.json; sessions are the directories below /var/log/libvirt/qemu/DOMAIN.xftrace/")]
    NotASession(PathBuf),
    /// A `session.json` that cannot be understood.
    #[error("{path:?} cannot be understood: {cause}")]
    Meta {
        /// The file.
        path: PathBuf,
        /// Why not.
        cause: serde_json::Error,
    },
    /// The session is as large as it may become.
    #[error("the session has reached the {limit} bytes that limits.session_size allows")]
    Full {
        /// Bytes.
        limit: u64,
    },
    /// The disk is too slow for what comes.
    #[error("{waiting} bytes of the session wait for a slow disk, which is what limits.unwritten allows")]
    Behind {
        /// Bytes.
        waiting: u64,
    },
    /// A file of records that is none.
    #[error("{0:?} holds no ring-buffer chunks")]
    NotChunks(PathBuf),
    /// Symbols that are not what their name says.
    #[error("{0:?} was changed since the session was written: its content does not match the digest in its name; put the file back as it was")]
    MapChanged(PathBuf),
    /// The keys.
    #[error(transparent)]
    Klog(#[from] KlogError),
    /// The symbols.
    #[error(transparent)]
    Symbols(#[from] SymbolsError),
}

impl SessionError {
    /// For `map_err` on what was tried with a file.
    fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |cause| Self::Io {
            action,
            path,
            cause,
        }
    }
}
