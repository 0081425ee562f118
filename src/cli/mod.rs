//! The command line: what people type, and what libvirt's hook runs.
//!
//! This room turns arguments into calls of the rest of the library and its
//! answers into text. It may use everything below it, and nothing below it
//! knows of it. Each command is one file with one `run`; [`args`] is all of
//! clap's definition.
//!
//! Rules that hold for every command:
//! - Data goes to standard output through [`out::Stdout`], messages go to
//!   standard error. A reader that goes away (`xftrace list | head -1`) ends
//!   the command quietly.
//! - A command returns how it ended ([`Exit`]) or an error; only [`run`] turns
//!   that into an exit status, and only it prints errors.
//! - The configuration is read by the commands that need it, through
//!   [`Context::config`], so that `--help` and the hook never fail on it.

pub mod args;
mod baseline;
mod check;
mod client;
mod doctor;
mod enroll;
mod enroll_command;
mod follow;
mod ftrace_names;
mod guest_boot;
mod helper;
mod hook;
mod image;
mod list;
mod logging;
mod off;
mod on;
pub mod out;
mod report;
mod status;
mod symbols;
pub mod target;
mod unenroll;

use std::io::Write;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::Parser;

use crate::config::Config;
use args::{Cli, Command, Global};

/// How a command ended, and so the exit status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Done as asked: 0.
    Done,
    /// A check found something in the guest: 1.
    Findings,
    /// Something is wrong, and the command itself has said what: 2.
    Trouble,
    /// The hook refuses the start of a domain that requires tracing:
    /// `hook::REFUSED`.
    Refused,
}

impl Exit {
    /// The exit status.
    fn status(self) -> u8 {
        match self {
            Exit::Done => 0,
            Exit::Findings => 1,
            Exit::Trouble => 2,
            Exit::Refused => hook::REFUSED,
        }
    }
}

/// What a command gets besides its own arguments.
#[derive(Debug)]
pub struct Context {
    /// The options that every command takes.
    pub global: Global,
}

impl Context {
    /// Reads the configuration.
    ///
    /// # Errors
    /// Where the file cannot be read or is wrong, with file and line; where a
    /// file was named and does not exist.
    pub fn config(&self) -> anyhow::Result<Config> {
        let config = match self.global.named_config() {
            Some(named) => Config::load(named)?,
            None => Config::load_or_default(&self.global.config_path())?,
        };
        Ok(config)
    }
}

/// Runs the command that the process was started with.
pub fn run() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let context = Context { global: cli.global };
    let result = match &cli.command {
        Command::Enroll(args) => enroll::run(&context, args),
        Command::Unenroll(args) => unenroll::run(&context, args),
        Command::On(args) => on::run(&context, args),
        Command::Off(args) => off::run(&context, args),
        Command::Status(args) => status::run(&context, args),
        Command::List(args) => list::run(&context, args),
        Command::Report(args) => report::run(&context, args),
        Command::Check(args) => check::run(&context, args),
        Command::Baseline(args) => baseline::run(&context, args),
        Command::Follow(args) => follow::run(&context, args),
        Command::Symbols(args) => symbols::run(&context, args),
        Command::Doctor(args) => doctor::run(&context, args),
        Command::Hook(args) => hook::run(&context, args),
        Command::Helper(args) => helper::run(&context, args),
    };
    // What is still buffered is part of the result: a full disk must show.
    let result = result.and_then(|exit| {
        out::Stdout::new().flush()?;
        Ok(exit)
    });
    match result {
        Ok(exit) => ExitCode::from(exit.status()),
        Err(error) if out::is_closed(&error) => ExitCode::from(Exit::Done.status()),
        Err(error) => {
            out::message(&format!("error: {error:#}"));
            ExitCode::from(Exit::Trouble.status())
        }
    }
}

/// Prints help, version or a usage error the way clap has worded it.
fn usage(error: &clap::Error) -> ExitCode {
    let worded_as_error =
        error.use_stderr() && error.kind() != ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand;
    if worded_as_error {
        out::prefix();
    }
    // Nobody is left to tell where even this cannot be printed.
    let _ = error.print();
    let exit = if error.use_stderr() {
        Exit::Trouble
    } else {
        Exit::Done
    };
    ExitCode::from(exit.status())
}
