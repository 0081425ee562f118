//! `xftrace off`.

use super::{Context, Exit};
use crate::cli::args::OffArgs;

/// Runs the command.
pub(super) fn run(_context: &Context, _args: &OffArgs) -> anyhow::Result<Exit> {
    anyhow::bail!("'off' is not built yet")
}
