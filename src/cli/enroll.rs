//! `xftrace enroll`.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{bail, Context as _};

use super::ftrace_names::ftrace_names;
use super::{guest_boot, hook, out, Context, Exit};
use crate::cli::args::{EnrollArgs, PlainRing};
use crate::detect::{Store, StoreError};
use crate::kernel::stock::{command_line, reserved_command_line};
use crate::libvirt::connection::{Connection, Domain, Mode};
use crate::libvirt::enrolment::{advice, untraceable};
use crate::libvirt::memory::find_backing;
use crate::libvirt::run_dir::RunDir;
use crate::libvirt::shell_word;
use crate::libvirt::xml::{enroll, DomainXml, Trace};
use crate::symfiles::Known;

/// Runs the command.
pub(super) fn run(context: &Context, args: &EnrollArgs) -> anyhow::Result<Exit> {
    let mut wanted = Trace::default();
    wanted.functions.clone_from(&args.functions);
    wanted.interval = args.interval;
    wanted.at_start = args.at_start;
    wanted.symbols = args.symbols.as_ref().map(symbols).transpose()?;

    if let Some(name) = &args.baseline {
        expect_baseline(context, name)?;
        wanted.baseline = Some(name.clone());
    }

    wanted.integrity_interval = args.integrity_interval;

    let mut to_type = None;
    if let Some(ring) = args.plain {
        let store = context.config()?.paths.symbols;
        let names = ftrace_names(&args.functions, wanted.symbols.as_deref(), &store)?;
        wanted.cmdline = Some(match ring {
            PlainRing::Global => command_line(&names),
            PlainRing::Reserved => {
                let (parameters, typed) = reserved_command_line(&names);
                to_type = Some(typed);
                parameters
            }
        });
    }

    let connection = Connection::open(context.global.connect.as_deref(), Mode::ReadWrite)?;
    let domain = connection.domain(&args.domain)?;
    let name = shell_word(domain.name());
    if !domain.is_persistent()? {
        bail!(
            "domain '{}' is transient: it has no XML that outlives it and could be edited. Make \
             it persistent with `virsh dumpxml {name} > {name}.xml; virsh define {name}.xml`, \
             then enroll again",
            domain.name()
        );
    }
    let before = domain.persistent_xml()?;
    let enrolled = enroll(&before, &wanted)
        .with_context(|| format!("cannot enroll domain '{}'", domain.name()))?;
    if enrolled.changed {
        redefine(&connection, &domain, &before, &enrolled.xml)?;
    }
    let stored = domain.persistent()??;
    let Some(trace) = stored
        .trace
        .clone()
        .filter(|_| untraceable(&stored).is_none())
    else {
        bail!(
            "libvirt did not keep the changes to domain '{}'",
            domain.name()
        );
    };

    let mut out = out::Stdout::new();
    let how = match enrolled.changed {
        true => "is enrolled",
        false => "was enrolled like this already",
    };
    writeln!(
        out,
        "Domain '{}' {how}: {}.",
        domain.name(),
        options(&trace)
    )?;
    if let (Some(cmdline), None) = (&wanted.cmdline, &trace.cmdline) {
        writeln!(
            out,
            "It boots no kernel directly: its kernel's command line has to end with this:\n  \
             {cmdline}\nTo have it there:"
        )?;
        for line in guest_boot::commands(cmdline).lines() {
            writeln!(out, "  {line}")?;
        }
    }
    if let Some(typed) = to_type {
        writeln!(
            out,
            "After each of its boots, type inside the guest, as root:\n  {typed}"
        )?;
    }
    if domain.is_active()? {
        let live = domain.live()??;
        let why = match untraceable(&live) {
            None if enrolled.cmdline_changed => Some("its kernel has another command line".into()),
            why => why,
        };
        match why {
            Some(why) => writeln!(
                out,
                "As it runs now, {why}. Shut it down and start it again (a reboot from inside \
                 is not enough):\n  virsh shutdown {name}\n  virsh start {name}    (once it is off)"
            )?,
            None => writeln!(out, "{}", join(context, &connection, &domain, &trace)?)?,
        }
        if let Some(why) = advice(&live) {
            writeln!(
                out,
                "As it runs now, {why}; it gets one when it is shut down and started again \
                 (a reboot from inside is not enough):\n  virsh shutdown {name}\n  virsh start {name}    (once it is off)"
            )?;
        }
    }
    writeln!(out, "Undo: xftrace unenroll {name}")?;
    if wanted.cmdline.is_some() && trace.cmdline.is_none() {
        writeln!(out, "      {}", guest_boot::undo())?;
    }
    Ok(Exit::Done)
}

/// The file of symbols as it goes into the metadata.
fn symbols(path: &PathBuf) -> anyhow::Result<PathBuf> {
    let absolute = std::path::absolute(path)
        .with_context(|| format!("cannot make {} an absolute path", path.display()))?;
    let fits = |text: &str| !text.chars().any(char::is_control);
    if !absolute.to_str().is_some_and(fits) {
        bail!("{absolute:?} cannot stand in XML: rename it to plain UTF-8 text");
    }
    if absolute.exists() {
        // Better now than when the domain runs.
        Known::load(&absolute)?;
    } else {
        out::message(&format!(
            "warning: there is no file {} on this host yet",
            absolute.display()
        ));
    }
    Ok(absolute)
}

/// Says where a baseline is not there yet, which it may be learnt under later.
fn expect_baseline(context: &Context, name: &str) -> anyhow::Result<()> {
    match Store::at(&context.config()?.paths.baselines).load(name) {
        Ok(_) => {}
        Err(error @ StoreError::None { .. }) => out::message(&format!("warning: {error}")),
        Err(error) => return Err(error.into()),
    }
    Ok(())
}

/// Defines the edited XML, unless someone else has edited it in the meantime.
pub(super) fn redefine(
    connection: &Connection,
    domain: &Domain,
    before: &str,
    after: &str,
) -> anyhow::Result<()> {
    if domain.persistent_xml()? != before {
        bail!(
            "someone changed the XML of domain '{}' at the same time: try again",
            domain.name()
        );
    }
    connection.define(after)?;
    Ok(())
}

fn options(trace: &Trace) -> String {
    let functions = match trace.functions.is_empty() {
        true => "functions as `xftrace on` or the configuration names them".to_owned(),
        false => format!("functions {}", trace.functions.join(", ")),
    };
    let interval = trace.interval.map_or(String::new(), |interval| {
        format!(", a new key every {}", humantime::format_duration(interval))
    });
    let symbols = trace.symbols.as_ref().map_or(String::new(), |path| {
        format!(", symbols from {}", path.display())
    });
    let start = if trace.at_start {
        ", traced from its start on"
    } else {
        ""
    };
    let cmdline = trace.cmdline.as_ref().map_or(String::new(), |cmdline| {
        format!(", booted with '{cmdline}'")
    });
    let baseline = trace
        .baseline
        .as_ref()
        .map_or(String::new(), |name| format!(", judged by baseline {name}"));
    let looks = trace
        .integrity_interval
        .map_or(String::new(), |interval| match interval.0 {
            Some(_) => format!(", its memory checked every {interval}"),
            None => ", its memory not checked".to_owned(),
        });
    format!("{functions}{interval}{symbols}{baseline}{looks}{start}{cmdline}")
}

/// Enrols the running domain as well, whose memory can be read as it is: its
/// metadata, and a helper, as the hook would have started it.
fn join(
    context: &Context,
    connection: &Connection,
    domain: &Domain,
    trace: &Trace,
) -> anyhow::Result<String> {
    domain.set_live_metadata(Some(trace))?;
    if !connection.is_local_qemu() {
        return Ok("It can be traced once it is started again on its host.".to_owned());
    }
    let config = context.config()?;
    let run_dir = RunDir::at(&config.paths.run);
    let live: DomainXml = domain.live()??;
    if run_dir.has_helper(live.uuid) {
        return Ok(
            "Its helper runs with the options from before; `xftrace on` takes others at once."
                .to_owned(),
        );
    }
    if let Err(error) = find_backing(&live, &config.paths.libvirt_run) {
        return Ok(format!("As it runs now, it cannot be traced: {error}."));
    }
    let text = domain.live_xml()?;
    match hook::start(context, &run_dir, text.as_bytes(), &live) {
        Ok(_) => Ok("It can be traced at once, without a restart.".to_owned()),
        Err(error) => Ok(format!(
            "It can be traced once it is started again ({error:#})."
        )),
    }
}
