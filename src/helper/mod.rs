//! The helper: one process for each running domain that is traced.
//!
//! ```text
//!  xftrace on/off/status --socket--> server --jobs--> Engine --+-- Watch   the guest's kernel: which, where, alive?
//!                                                              +-- Trace   one open session
//!  QEMU's end, SIGTERM ------------- poll --------------^             +-- KeyThread  a fresh key at an interval
//!                                                                     +-- RingReader -> SessionWriter, Decoder
//! ```
//!
//! The engine is one thread that never blocks for long: it drains the guest's
//! buffers every few milliseconds while a trace is on, and does everything
//! else between two rounds. Keys are handed out by a thread of their own,
//! since noting a key waits for the disk, and the session's files are written by one
//! ([`SessionWriter`](crate::session::SessionWriter)). Where the domain or the
//! configuration names a baseline, another thread judges what is drained (`sentry`). One
//! looks at the kernel in the guest's memory now and then, traced or not (`patrol`), and
//! one runs the command that is wanted for findings (`notify`). Connections have threads
//! too, which only pass on what the engine says.
//!
//! The helper writes to guest memory in three places only: the key slots and the
//! command page, and in mode plain one bit, the ring buffer's own switch. And only
//! while the kernel that it found there is seen to live (`watch::Liveness`): after
//! a reset that memory belongs to something else. It never stops the guest, and the
//! guest's end is its own.

mod attach;
mod awaited;
mod booted;
mod boots;
mod candidates;
mod clocks;
mod engine;
#[cfg(test)]
mod fake;
mod graphs;
mod keyring;
mod left;
mod link;
mod living;
mod modules;
mod notify;
mod patrol;
mod place;
pub mod protocol;
mod ratelimit;
mod requests;
mod rest;
mod run;
mod sentry;
mod server;
mod settle;
mod sources;
#[cfg(test)]
mod tests;
mod trace;
mod trusted;
mod turn;
mod watch;

pub use attach::{attach, Attached};
pub(crate) use link::{Link, LinkError};
pub use living::{find_living, Living};
pub(crate) use patrol::START_LIMIT;
pub use run::{run, Options};
pub(crate) use sources::Sources;
pub use trusted::trusted;
