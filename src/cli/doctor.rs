//! `xftrace doctor`.

use super::{Context, Exit};
use crate::cli::args::DoctorArgs;

/// Runs the command.
pub(super) fn run(_context: &Context, _args: &DoctorArgs) -> anyhow::Result<Exit> {
    anyhow::bail!("'doctor' is not built yet")
}
