//! `xftrace unenroll`.

use super::{Context, Exit};
use crate::cli::args::UnenrollArgs;

/// Runs the command.
pub(super) fn run(_context: &Context, _args: &UnenrollArgs) -> anyhow::Result<Exit> {
    anyhow::bail!("'unenroll' is not built yet")
}
