//! Material that several tests use.
//!
//! Not every test uses all of it, hence the `allow`s.

#![allow(dead_code, unreachable_pub, missing_docs)]

pub mod guest;
pub mod hostile;
pub mod ring;
pub mod time;
