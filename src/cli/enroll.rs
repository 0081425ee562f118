//! `xftrace enroll`.

use super::{Context, Exit};
use crate::cli::args::EnrollArgs;

/// Runs the command.
pub(super) fn run(_context: &Context, _args: &EnrollArgs) -> anyhow::Result<Exit> {
    anyhow::bail!("'enroll' is not built yet")
}
