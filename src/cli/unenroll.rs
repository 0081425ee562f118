//! `xftrace unenroll`.

use std::io::Write;

use anyhow::{bail, Context as _};

use super::enroll::redefine;
use super::{guest_boot, out, Context, Exit};
use crate::cli::args::UnenrollArgs;
use crate::libvirt::connection::{Connection, Mode};
use crate::libvirt::xml::unenroll;

/// Runs the command.
pub(super) fn run(context: &Context, args: &UnenrollArgs) -> anyhow::Result<Exit> {
    let connection = Connection::open(context.global.connect.as_deref(), Mode::ReadWrite)?;
    let domain = connection.domain(&args.domain)?;
    if !domain.is_persistent()? {
        bail!(
            "domain '{}' is transient: it has no persistent XML, and so nothing of xftrace in it",
            domain.name()
        );
    }
    let before = domain.persistent_xml()?;
    let after =
        unenroll(&before).with_context(|| format!("cannot unenroll domain '{}'", domain.name()))?;
    let mut out = out::Stdout::new();
    let Some(after) = after else {
        writeln!(
            out,
            "Domain '{}' is not enrolled; nothing was changed.",
            domain.name()
        )?;
        return Ok(Exit::Done);
    };
    redefine(&connection, &domain, &before, &after)?;
    writeln!(
        out,
        "Domain '{}' is no longer enrolled; its XML is as it was before.",
        domain.name()
    )?;
    // What was typed inside the guest then, nobody here can know.
    if !domain.persistent()??.boots_kernel {
        writeln!(
            out,
            "If it was booted for mode plain, undo that inside the guest:\n  {}",
            guest_boot::undo()
        )?;
    }
    if domain.is_active()? {
        domain.set_live_metadata(None)?;
        writeln!(
            out,
            "It runs on unchanged: its helper ends with it, `xftrace off` ends a trace."
        )?;
    }
    Ok(Exit::Done)
}
