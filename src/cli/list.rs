//! `xftrace list`.

use super::{Context, Exit};
use crate::cli::args::ListArgs;

/// Runs the command.
pub(super) fn run(_context: &Context, _args: &ListArgs) -> anyhow::Result<Exit> {
    anyhow::bail!("'list' is not built yet")
}
