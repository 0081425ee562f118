//! `xftrace baseline`.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context as _;

use super::out::{self, Stdout};
use super::{Context, Exit};
use crate::cli::args::{BaselineAction, BaselineArgs};
use crate::detect::{differences, Band, Baseline, LearnError, Store, StoreError};
use crate::session::Session;

/// Runs the command.
pub(super) fn run(context: &Context, args: &BaselineArgs) -> anyhow::Result<Exit> {
    let store = Store::at(&context.config()?.paths.baselines);
    match &args.action {
        BaselineAction::Learn { name, sessions } => return learn(&store, name, sessions),
        BaselineAction::Show { name } => show(&mut Stdout::new(), name, &store.load(name)?)?,
        BaselineAction::Diff { name, other } => diff(&store, name, other)?,
        BaselineAction::List => list(&store)?,
        BaselineAction::Remove { name } => store.remove(name)?,
    }
    Ok(Exit::Done)
}

/// Learns one session after another, and keeps what was learnt if any was. A
/// session that is refused costs the exit status, not the others.
fn learn(store: &Store, name: &str, sessions: &[PathBuf]) -> anyhow::Result<Exit> {
    let mut baseline = match store.load(name) {
        Ok(baseline) => Some(baseline),
        Err(StoreError::None { .. }) => None,
        Err(error) => return Err(error.into()),
    };
    let mut out = Stdout::new();
    let (mut learnt, mut refused) = (0, 0);
    for dir in sessions {
        let shown = dir.display();
        let fresh = baseline.is_none();
        let taught = Session::open(dir)
            .map_err(LearnError::from)
            .and_then(|session| {
                let banner = session.meta.boots.first().map_or("", |boot| &boot.banner);
                let known = baseline.get_or_insert_with(|| Baseline::new(banner));
                known.learn(&session)
            });
        if fresh && taught.is_err() {
            // Its kernel is not what the others must be of.
            baseline = None;
        }
        match taught {
            Ok(taught) => {
                learnt += 1;
                let left_out = taught.skipped;
                writeln!(
                    out,
                    "{shown}: {} calls; new: {} edges, {} sequences of system calls; left out: {} \
                     calls of interrupts, {} with a gap, {} cut, {} incomplete",
                    taught.calls,
                    taught.new_edges,
                    taught.new_sequences,
                    left_out.interrupts,
                    left_out.gaps,
                    left_out.cut,
                    left_out.incomplete
                )?;
                for (rule, what) in &taught.warnings {
                    let (rule, what) = (rule.escape_debug(), what.escape_debug());
                    out::message(&format!(
                        "note: {shown}: learnt although it was warned of: {rule}: {what}"
                    ));
                }
                if left_out.no_room > 0 {
                    writeln!(out, "{shown}: {} sightings found no room", left_out.no_room)?;
                }
            }
            Err(LearnError::Again) => writeln!(out, "{shown}: learnt before")?,
            Err(error) => {
                refused += 1;
                out::message(&format!("error: {shown}: {error}"));
            }
        }
    }
    if let (Some(baseline), true) = (&baseline, learnt > 0) {
        let path = store.save(name, baseline)?;
        writeln!(out, "{}: {}", path.display(), state(baseline))?;
        let modules = baseline
            .functions
            .values()
            .flat_map(|function| &function.from_modules);
        let modules: std::collections::BTreeSet<&String> = modules.collect();
        if !modules.is_empty() {
            let names: Vec<&str> = modules.into_iter().map(String::as_str).collect();
            out::message(&format!(
                "note: calls by modules are part of this baseline now ({}); a hook that a module \
                 had in place while it was learnt is one of them",
                names.join(", ")
            ));
        }
    }
    Ok(if refused > 0 {
        Exit::Trouble
    } else {
        Exit::Done
    })
}

/// How much a baseline knows, and whether that is enough.
fn state(baseline: &Baseline) -> String {
    let sessions = baseline.sessions.len();
    let known = format!("{sessions} sessions, {} edges", baseline.edges());
    match baseline.expected_new() {
        None => format!("{known}; a second session will tell whether it has seen enough"),
        Some(new) if baseline.has_converged() => {
            format!("{known}; converged: the next session is likely to bring {new:.0} new edges")
        }
        Some(new) => {
            format!(
                "{known}; not converged: the next session is likely to bring {new:.0} new edges"
            )
        }
    }
}

fn show(out: &mut impl Write, name: &str, baseline: &Baseline) -> std::io::Result<()> {
    writeln!(out, "baseline:  {name}")?;
    writeln!(out, "kernel:    {}", baseline.kernel)?;
    writeln!(out, "knows:     {}", state(baseline))?;
    let lost: u64 = baseline.sessions.values().map(|learnt| learnt.lost).sum();
    let calls: u64 = baseline.sessions.values().map(|learnt| learnt.calls).sum();
    writeln!(out, "learnt:    {calls} calls, {lost} records lost")?;
    let band = |band: Option<Band>| {
        band.map_or_else(
            || "too few".to_owned(),
            |band| {
                format!(
                    "{}..{} (medians {}..{})",
                    band.low, band.high, band.lowest_median, band.highest_median
                )
            },
        )
    };
    for (function, root) in &baseline.roots {
        let kind = if root.system_call {
            "system call"
        } else {
            "root"
        };
        writeln!(out, "\n{function} ({kind})")?;
        let callers: Vec<&str> = root.callers.iter().map(String::as_str).collect();
        writeln!(out, "  called from   {}", callers.join(" "))?;
        writeln!(out, "  calls below   {}", band(root.calls))?;
        writeln!(
            out,
            "  duration      {}, in hundredths of an empty call",
            band(root.duration)
        )?;
    }
    writeln!(out, "\nsequences of three system calls, by process:")?;
    for (process, sequences) in &baseline.processes {
        writeln!(out, "  {process}: {}", sequences.len())?;
    }
    Ok(())
}

fn diff(store: &Store, name: &str, other: &str) -> anyhow::Result<()> {
    let old = store.load(name)?;
    let is_dir = other.contains('/') || !Store::is_name(other);
    let new = if is_dir {
        let session = Session::open(Path::new(other))?;
        Baseline::of(&session).with_context(|| other.to_owned())?
    } else {
        store.load(other)?
    };
    let mut out = Stdout::new();
    for difference in differences(&old, &new) {
        let sign = if difference.added { '+' } else { '-' };
        writeln!(out, "{sign} {:<9} {}", difference.part, difference.what)?;
    }
    Ok(())
}

fn list(store: &Store) -> anyhow::Result<()> {
    let mut out = Stdout::new();
    for name in store.names()? {
        match store.load(&name) {
            Ok(baseline) => writeln!(out, "{name}  {}  {}", state(&baseline), baseline.kernel)?,
            Err(error) => out::message(&format!("{error}")),
        }
    }
    Ok(())
}
