//! `xftrace status`.

use super::{Context, Exit};
use crate::cli::args::StatusArgs;

/// Runs the command.
pub(super) fn run(_context: &Context, _args: &StatusArgs) -> anyhow::Result<Exit> {
    anyhow::bail!("'status' is not built yet")
}
