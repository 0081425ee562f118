//! `xftrace on`.

use super::{Context, Exit};
use crate::cli::args::OnArgs;

/// Runs the command.
pub(super) fn run(_context: &Context, _args: &OnArgs) -> anyhow::Result<Exit> {
    anyhow::bail!("'on' is not built yet")
}
