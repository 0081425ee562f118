//! `xftrace symbols`.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde_json::json;

use super::{out, Context, Exit};
use crate::cli::args::{SymbolsArgs, SymbolsCommand};
use crate::symfiles::{Added, Store, Stored};

/// How much of an id a person is shown; what follows 'remove' may be shorter.
const SHORT_ID: usize = 16;

/// Runs the command.
pub(super) fn run(context: &Context, args: &SymbolsArgs) -> anyhow::Result<Exit> {
    let dir = context.config()?.paths.symbols;
    let store = Store::at(&dir);
    match &args.command {
        SymbolsCommand::Add { files } => add(&store, files),
        SymbolsCommand::List { json } => list(&store, *json),
        SymbolsCommand::Remove { ids } => {
            let mut out = out::Stdout::new();
            each(ids, |id| {
                let removed = store.remove(id)?;
                writeln!(out, "Removed {}.", short(&removed))?;
                Ok(())
            })
        }
    }
}

fn add(store: &Store, files: &[PathBuf]) -> anyhow::Result<Exit> {
    let mut out = out::Stdout::new();
    each(files, |file| {
        let (stored, added) = store.add(file)?;
        let how = match added {
            Added::New => "Added",
            Added::Replaced => "Replaced",
            Added::KeptRicher => "Kept what was known, which is more,",
        };
        let (id, kernel, head) = (short(&stored.id), kernel(&stored), &stored.head);
        writeln!(
            out,
            "{how} {id}: {kernel}, {} symbols ({}).",
            head.symbols, head.kind
        )?;
        Ok(())
    })
}

/// All of them, the good ones even where some are not.
fn each<T>(all: &[T], mut one: impl FnMut(&T) -> anyhow::Result<()>) -> anyhow::Result<Exit> {
    let mut exit = Exit::Done;
    for item in all {
        match one(item) {
            Err(error) if error.is::<io::Error>() => return Err(error),
            Err(error) => {
                out::message(&format!("error: {error:#}"));
                exit = Exit::Trouble;
            }
            Ok(()) => {}
        }
    }
    Ok(exit)
}

fn list(store: &Store, json: bool) -> anyhow::Result<Exit> {
    let (stored, faults) = store.list()?;
    let mut out = out::Stdout::new();
    if json {
        let object = |kernel: &Stored| {
            json!({
                "id": kernel.id,
                "path": kernel.path,
                "kind": kernel.head.kind,
                "build_id": kernel.head.build_id,
                "banner": kernel.head.banner,
                "symbols": kernel.head.symbols,
                "origin": kernel.head.origin,
            })
        };
        let all: Vec<_> = stored.iter().map(object).collect();
        writeln!(out, "{}", serde_json::to_string_pretty(&all)?)?;
    } else if stored.is_empty() {
        out::message("no kernel is known yet; add one with 'xftrace symbols add FILE'");
    } else {
        let id = "ID";
        writeln!(out, "{id:SHORT_ID$}   SYMBOLS   FROM             KERNEL")?;
        for kernel in &stored {
            let (id, head) = (short(&kernel.id), &kernel.head);
            let release = self::kernel(kernel);
            writeln!(
                out,
                "{id:SHORT_ID$}   {:7}   {:14}   {release}",
                head.symbols, head.kind
            )?;
        }
    }
    for fault in &faults {
        out::message(&format!("error: {fault}"));
    }
    Ok(match faults.is_empty() {
        true => Exit::Done,
        false => Exit::Trouble,
    })
}

fn short(id: &str) -> &str {
    id.get(..SHORT_ID).unwrap_or(id)
}

/// Its release, or the name of the file that did not tell it.
fn kernel(stored: &Stored) -> &str {
    let file = || Path::new(&stored.head.origin).file_name()?.to_str();
    let release = stored.head.release();
    release.or_else(file).unwrap_or("?")
}
