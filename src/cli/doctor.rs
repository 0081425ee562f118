//! `xftrace doctor`: what is missing for a domain to be traced, and the
//! command that mends it.
//!
//! A check that cannot be made because one before it failed is left out: the
//! first thing that is missing is the one to mend. What mends it is a command
//! that can be typed as it stands, but for a word in capitals that is the
//! user's to choose; what else is to be said stands behind it in brackets.

mod domain;
mod host;
mod plain;

use std::io::Write;

use super::{out, Context, Exit};
use crate::cli::args::DoctorArgs;
use crate::config::Config;
use crate::libvirt::shell_word;

/// Runs the command.
pub(super) fn run(context: &Context, args: &DoctorArgs) -> anyhow::Result<Exit> {
    let mut report = Report::default();
    let config = match context.config() {
        Ok(config) => {
            report.ok(format!(
                "configuration {} can be read",
                context.global.config_path().display()
            ));
            config
        }
        Err(error) => {
            report.missing(
                format!("a configuration that can be read: {error:#}"),
                format!(
                    "${{EDITOR:-vi}} {}",
                    shell_word(&context.global.config_path().to_string_lossy())
                ),
            );
            Config::default()
        }
    };
    let connection = host::check(context, &config, &mut report);
    if let (Some(typed), Some(connection)) = (&args.domain, &connection) {
        domain::check(&config, connection, typed, &mut report)?;
    }
    report.print()
}

/// The command that starts, restarts or reloads libvirt's daemon here.
fn daemon(verb: &str) -> String {
    // What sd_booted(3) looks at.
    if std::path::Path::new("/run/systemd/system").is_dir() {
        return format!("systemctl {verb} libvirtd");
    }
    let start = "virtlogd -d; libvirtd -d";
    match verb {
        "reload" => "kill -HUP $(cat /run/libvirtd.pid)".to_owned(),
        "restart" => format!("kill $(cat /run/libvirtd.pid); {start}"),
        _ => start.to_owned(),
    }
}

/// Has the domain's QEMU start anew.
fn restart(name: &str) -> String {
    format!("virsh shutdown {name}\nvirsh start {name}    (once it is off)")
}

/// What was found, in order.
#[derive(Debug, Default)]
struct Report {
    checks: Vec<Check>,
}

#[derive(Debug)]
struct Check {
    state: State,
    what: String,
    /// What to type.
    mend: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Ok,
    Missing,
    /// It works like this, and could work better.
    Advice,
}

impl Report {
    fn ok(&mut self, what: impl Into<String>) {
        self.add(State::Ok, what.into(), None);
    }

    fn missing(&mut self, what: impl Into<String>, mend: impl Into<String>) {
        self.add(State::Missing, what.into(), Some(mend.into()));
    }

    fn advice(&mut self, what: impl Into<String>, mend: impl Into<String>) {
        self.add(State::Advice, what.into(), Some(mend.into()));
    }

    fn add(&mut self, state: State, what: String, mend: Option<String>) {
        self.checks.push(Check { state, what, mend });
    }

    fn print(&self) -> anyhow::Result<Exit> {
        let mut out = out::Stdout::new();
        for check in &self.checks {
            let state = match check.state {
                State::Ok => "ok",
                State::Missing => "missing",
                State::Advice => "advice",
            };
            writeln!(out, "{state:8} {}", check.what)?;
            for line in check.mend.iter().flat_map(|mend| mend.lines()) {
                writeln!(out, "{:8}   -> {line}", "")?;
            }
        }
        let missing = self.checks.iter().filter(|c| c.state == State::Missing);
        match missing.count() {
            0 => {
                writeln!(out, "Nothing is missing.")?;
                Ok(Exit::Done)
            }
            n => {
                let things = if n == 1 { "thing is" } else { "things are" };
                writeln!(out, "{n} {things} missing.")?;
                Ok(Exit::Trouble)
            }
        }
    }
}
