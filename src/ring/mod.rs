//! The passive reader: Ftrace's ring buffer, read out of guest memory while
//! the guest writes it.
//!
//! ```text
//! guest memory --reader--> Chunk --event--> Event --decode--> Item
//!               pages       bytes   time, payload    call, return, lost, forged
//! ```
//!
//! [`RingReader`] copies what is new in each CPU's pages, in rounds (`round`, by
//! the lists of `pages`), and keeps only copies that did not change under it
//! ([`Chunk`]). [`events`] takes a chunk apart by
//! the rules of kernel/trace/ring_buffer.c. [`Decoder`] takes the key off each
//! record, by the epoch that the record names and no other, and says where
//! records are missing, which it knows from their running numbers.
//!
//! A kernel without the patch writes its own records ([`RecordFormat::Plain`]):
//! they have no key, no number and no caller. What is missing among them is
//! known from what the reader saw ([`Gap`]) alone, and has no count.
//!
//! The reader moves nothing in the guest: no read pointer, no lock. A writer
//! that is too fast overtakes it, and then the loss is told. Chunks are also
//! what a session stores, so that a live guest and a session on disk take the
//! same way from there on.
//!
//! This module may use `kernel`, `keys` and `ram`.

mod decode;
mod event;
mod fields;
mod format;
mod pages;
mod plain;
mod reader;
pub mod record;
mod round;
mod structs;
mod taken;

pub use decode::{CodeMap, Decoder};
pub use event::{events, Clock, Event, Events, Malformed};
pub use format::RecordFormat;
pub use reader::{Chunk, Drained, Gap, RingError, RingReader, Written};

/// How often something is tried that changes under our eyes.
const TRIES: usize = 3;
