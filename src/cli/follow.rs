//! `xftrace follow`.

use super::{Context, Exit};
use crate::cli::args::FollowArgs;

/// Runs the command.
pub(super) fn run(_context: &Context, _args: &FollowArgs) -> anyhow::Result<Exit> {
    anyhow::bail!("'follow' is not built yet")
}
