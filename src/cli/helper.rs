//! `xftrace helper`.

use super::{Context, Exit};
use crate::cli::args::HelperArgs;

/// Runs the command.
pub(super) fn run(_context: &Context, _args: &HelperArgs) -> anyhow::Result<Exit> {
    anyhow::bail!("'helper' is not built yet")
}
