//! `xftrace hook`.

use super::{Context, Exit};
use crate::cli::args::HookArgs;

/// The exit status by which the hook refuses the start of a domain.
pub(super) const REFUSED: u8 = 3;

/// Runs the command.
pub(super) fn run(_context: &Context, _args: &HookArgs) -> anyhow::Result<Exit> {
    anyhow::bail!("'hook' is not built yet")
}
