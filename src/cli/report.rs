//! `xftrace report`.

use super::{Context, Exit};
use crate::cli::args::ReportArgs;

/// Runs the command.
pub(super) fn run(_context: &Context, _args: &ReportArgs) -> anyhow::Result<Exit> {
    anyhow::bail!("'report' is not built yet")
}
