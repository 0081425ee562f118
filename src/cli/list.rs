//! `xftrace list`.

use std::io::Write;

use super::{out, Context, Exit};
use crate::cli::args::ListArgs;
use crate::config::Config;
use crate::libvirt::connection::{Connection, Domain, Mode};
use crate::libvirt::enrolment::{memory, By, Enrolment};
use crate::libvirt::run_dir::RunDir;
use crate::libvirt::xml::DomainXml;

/// Runs the command.
pub(super) fn run(context: &Context, args: &ListArgs) -> anyhow::Result<Exit> {
    let config = context.config()?;
    let connection = Connection::open(context.global.connect.as_deref(), Mode::ReadOnly)?;
    let run_dir = RunDir::at(&config.paths.run);
    let rows: Vec<[String; 5]> = connection
        .domains()?
        .iter()
        .map(|domain| row(domain, &config, &run_dir))
        .filter(|row| !args.name || row[2] != NOT_ENROLLED)
        .collect();

    let mut out = out::Stdout::new();
    if args.name {
        for [name, ..] in rows {
            writeln!(out, "{name}")?;
        }
        return Ok(Exit::Done);
    }
    let head = ["DOMAIN", "STATE", "ENROLLED", "MEMORY", "HELPER"].map(str::to_owned);
    let mut widths = [0; 5];
    for row in rows.iter().chain([&head]) {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    for row in [&head].into_iter().chain(&rows) {
        let cells = row.iter().zip(widths);
        let line: String = cells
            .map(|(cell, width)| format!("{cell:width$}   "))
            .collect();
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(Exit::Done)
}

const NOT_ENROLLED: &str = "no";

fn row(domain: &Domain, config: &Config, run_dir: &RunDir) -> [String; 5] {
    let name = domain.name().escape_debug().to_string();
    let state = domain.state().to_string();
    let now = match domain.live() {
        Ok(Ok(xml)) => xml,
        Ok(Err(error)) => {
            return [
                name,
                state,
                NOT_ENROLLED.into(),
                error.to_string(),
                "-".into(),
            ]
        }
        // It ended between being listed and being asked.
        Err(_) => return [name, state, NOT_ENROLLED.into(), "-".into(), "-".into()],
    };
    let next = match domain.persistent() {
        Ok(Ok(xml)) => Some(xml),
        _ => None,
    };
    let helper = match run_dir.has_helper(domain.uuid()) {
        true => "runs",
        false => "-",
    };
    [
        name,
        state,
        enrolled(&now, next.as_ref(), config).to_owned(),
        memory(&now).to_owned(),
        helper.to_owned(),
    ]
}

fn enrolled(now: &DomainXml, next: Option<&DomainXml>, config: &Config) -> &'static str {
    let by = |xml| Enrolment::of(xml, config).map(|enrolment| enrolment.by);
    match (by(now), next.and_then(by)) {
        (Some(By::Metadata), _) => "yes",
        (_, Some(By::Metadata)) => "from its next start on",
        (Some(By::Name), _) => "by name",
        _ => NOT_ENROLLED,
    }
}
