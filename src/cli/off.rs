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
    let reply = client::ask(context, &config, &domain, &Request::Off)?;
    if reply == Reply::CalledOff {
        out::message(&format!(
            "the trace of domain '{}' that was to begin with it had not begun, and is called off; \
             'xftrace on' begins one",
            client::name(&domain)
        ));
        return Ok(Exit::Done);
    }
    let Reply::Off {
        session,
        graph,
        is_whole,
        unwritten,
        counters,
        left,
    } = reply
    else {
        anyhow::bail!("the helper's answer is none to 'off'; is it of another version?");
    };
    // Whatever comes of the call flow: the trace has ended, with these counts.
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
    let done = match left {
        None => Exit::Done,
        Some(why) => {
            out::message(&format!(
                "warning: domain '{}': {why}",
                client::name(&domain)
            ));
            Exit::Trouble
        }
    };
    if let Some(why) = unwritten {
        anyhow::bail!(
            "the call flow is not there: {why}. The records are; once that is mended, type \
             `xftrace report {}`",
            session.display()
        );
    }
    if !is_whole {
        out::message(&format!(
            "warning: the call flow has not all calls, for it is as large as limits.text_size \
             allows. `xftrace report {}` writes all",
            session.display()
        ));
    }
    let file = match &args.output {
        _ if args.no_copy => return Ok(done),
        Some(stdout) if stdout == Path::new("-") => {
            let mut from = File::open(&graph).with_context(|| format!("cannot read {graph:?}"))?;
            io::copy(&mut from, &mut Stdout::new())?;
            return Ok(done);
        }
        Some(named) => named.as_path(),
        None => Path::new(GRAPH_FILE),
    };
    copy(&graph, file).with_context(|| {
        format!(
            "cannot write {file:?} (the call flow is in {})",
            graph.display()
        )
    })?;
    Ok(done)
}

/// Copies the call flow to `file`, whole or not at all. The directory may be
/// one that others write in: whatever they have put there under that name, no
/// byte goes to where it leads, for the copy is made beside it, and renamed.
fn copy(graph: &Path, file: &Path) -> anyhow::Result<()> {
    match fs::symlink_metadata(file) {
        Ok(there) if !there.is_file() => {
            let what = match there.is_symlink() {
                true => "a symbolic link",
                false => "no regular file",
            };
            anyhow::bail!("it is there and is {what}: name a file with -o FILE");
        }
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    let dir = match file.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut copy = tempfile::Builder::new()
        .prefix(".xftrace-")
        .tempfile_in(dir)?;
    io::copy(&mut File::open(graph)?, &mut copy)?;
    copy.persist(file)?;
    Ok(())
}
