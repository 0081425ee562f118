//! Key_Controller and Klog: who hands out the keys, and who remembers them.
//!
//! A key is 64 random bits from the operating system's generator, valid for
//! one *epoch*; epochs count up from 1 within a session and never come back.
//! [`Klog`] is the write-ahead history on disk: an entry is appended and
//! synced before [`KeyController`] puts its key into the guest, so that no
//! record can exist whose key is lost. [`KeyHistory`] is that history in
//! memory, for the decoder.
//!
//! The guest can read the keys, and change what it was given. So the
//! controller compares what lies in the guest with what it put there at each
//! turn, and says what it found ([`Tamper`]); it never reads a key back.
//!
//! This module may use `kernel` and `ram`, and knows nothing of records.

mod controller;
mod history;
mod klog;

pub use controller::{KeyController, KeyError, Tamper};
pub use history::KeyHistory;
pub use klog::{Entry, Klog, KlogError, KlogReader};
