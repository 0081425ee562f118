//! xftrace records, from a libvirt/QEMU host and without ever stopping the
//! guest, which kernel functions a Linux guest calls, and says whether that is
//! what they call in a clean one.
//!
//! The pipeline, in the order data flows through it:
//!
//! ```text
//! guest RAM file -> ram -> kernel -> keys, switch, ring -> session -> callflow -> output, detect
//!                   bytes   symbols    Klog, on/off, pages   files      call trees  trace_graph.txt, verdict
//! ```
//!
//! Each module uses only those to its left. [`helper`] runs the pipeline for
//! one domain; [`symfiles`] is where symbols come from; [`cli`] is what people type; [`libvirt`] is what these two know
//! of libvirt.

// tests/support, which unit tests use too, names it from outside.
#[cfg(test)]
extern crate self as xftrace;

pub mod callflow;
pub mod cli;
pub mod config;
pub mod detect;
pub mod follow;
pub mod helper;
pub mod integrity;
pub mod kernel;
pub mod keys;
pub mod libvirt;
pub mod output;
pub mod ram;
pub mod report;
pub mod ring;
pub mod session;
pub mod switch;
pub mod symfiles;

#[cfg(test)]
#[path = "../tests/support/schema.rs"]
mod test_schema;
#[cfg(test)]
#[path = "../tests/support/time.rs"]
mod test_time;
