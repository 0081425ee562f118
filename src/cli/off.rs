//! `xftrace off`.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use anyhow::Context as _;

use super::out::Stdout;
use super::{client, out, target, Context, Exit};
use crate::cli::args::OffArgs;
use crate::helper::protocol::{Reply, Request};
use crate::session::GRAPH_FILE;

/// Runs the command.
pub(super) fn run(context: &Context, args: &OffArgs) -> anyhow::Result<Exit> {
    let config = context.config()?;
    let domain = target::running(context, &config, args.domain.domain.as_deref())?;
    let Reply::Off {
        session,
        graph,
        counters,
    } = client::ask(context, &config, &domain, &Request::Off)?
    else {
        anyhow::bail!("the helper's answer is none to 'off'; is it of another version?");
    };
    let copy = match &args.output {
        _ if args.no_copy => None,
        Some(named) => Some(named.as_path()),
        None => Some(Path::new(GRAPH_FILE)),
    };
    match copy {
        None => {}
        Some(stdout) if stdout == Path::new("-") => {
            let mut from = File::open(&graph).with_context(|| format!("cannot read {graph:?}"))?;
            io::copy(&mut from, &mut Stdout::new())?;
        }
        Some(file) => {
            fs::copy(&graph, file).with_context(|| {
                format!(
                    "cannot write {file:?} (the call flow is in {})",
                    graph.display()
                )
            })?;
        }
    }
    out::message(&format!(
        "the trace of domain '{}' is off: {} records, {} lost, {} forged, {} keys changed by the guest\n\
         xftrace: the session is {}",
        client::name(&domain),
        counters.records,
        counters.lost,
        counters.forged,
        counters.tampered,
        session.display()
    ));
    Ok(Exit::Done)
}
