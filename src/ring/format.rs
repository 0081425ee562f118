//! Whose records a ring buffer holds.

use serde::{Deserialize, Serialize};

use crate::kernel::control::RecordTypes;
use crate::kernel::stock::GraphFormat;

/// How the records of one boot of a guest are to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum RecordFormat {
    /// Those of the xftrace patch, under keys.
    Keyed(RecordTypes),
    /// The kernel's own, as its BTF describes them.
    Plain(GraphFormat),
}

impl From<RecordTypes> for RecordFormat {
    fn from(types: RecordTypes) -> Self {
        Self::Keyed(types)
    }
}
