//! `lab`: a private libvirt with real guests, from the command line.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{bail, Context, Result};
use clap::{Parser, Subcommand};
use xftrace_lab::{Domain, Lab, Options};

/// The directory in which running labs are found by their names.
const NAMES: &str = "/run/xftrace-lab";

/// A private libvirt with real guests, beside the machine's own.
#[derive(Debug, Parser)]
#[command(name = "lab")]
struct Cli {
    /// The lab's directory; without it, the one that "lab up" made last.
    #[arg(long, env = "XFTRACE_LAB_DIR", global = true)]
    dir: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start a lab and print its directory.
    Up {
        /// Install the hook of this xftrace binary.
        #[arg(long, value_name = "BINARY")]
        xftrace: Option<PathBuf>,
        /// End the lab when this process ends.
        #[arg(long, value_name = "PID")]
        owner: Option<u32>,
    },
    /// End the lab and everything in it.
    Down,
    /// Define a domain.
    Define(Domain),
    /// Start a domain and wait until it answers.
    Start {
        /// The domain.
        name: String,
    },
    /// Stop a domain at once.
    Destroy {
        /// The domain.
        name: String,
    },
    /// Run a shell command in a guest; its exit status is this one's.
    Run {
        /// How long it may take, in seconds.
        #[arg(long, default_value_t = 60)]
        timeout: u64,
        /// The domain.
        name: String,
        /// The command.
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Print what a guest's kernel has said.
    Console {
        /// The domain.
        name: String,
    },
    /// Run a command inside the lab's namespaces: virsh, xftrace.
    Exec {
        /// The command.
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// A shell inside the lab's namespaces.
    Enter,
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(status) => status,
        Err(error) => {
            eprintln!("lab: error: {error:#}");
            ExitCode::from(125)
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode> {
    let current = Path::new(NAMES).join("default");
    if let Command::Up { xftrace, owner } = cli.command {
        let lab = Lab::start(&Options {
            xftrace,
            owner,
            ..Options::default()
        })?;
        println!("{}", lab.dir().display());
        std::fs::create_dir_all(NAMES).with_context(|| format!("cannot make {NAMES}"))?;
        let _ = std::fs::remove_file(&current);
        std::os::unix::fs::symlink(lab.dir(), &current)?;
        lab.leave_running();
        return Ok(ExitCode::SUCCESS);
    }

    let here = std::env::current_dir()?;
    let lab = Lab::attach(&cli.dir.unwrap_or(current))?;
    match cli.command {
        Command::Up { .. } => {}
        Command::Down => lab.stop()?,
        Command::Define(domain) => drop(lab.define(&domain)?),
        Command::Start { name } => lab.guest(&name).start()?,
        Command::Destroy { name } => lab.guest(&name).destroy()?,
        Command::Run {
            timeout,
            name,
            command,
        } => {
            let guest = lab.guest(&name);
            if !guest.is_running()? {
                bail!("the domain '{name}' does not run");
            }
            guest.wait_until_ready()?;
            let output = guest.run_for(&command.join(" "), Duration::from_secs(timeout))?;
            print!("{}", output.text);
            return Ok(ExitCode::from(u8::try_from(output.status).unwrap_or(255)));
        }
        Command::Console { name } => print!("{}", lab.guest(&name).console()?),
        Command::Exec { command } => {
            let (program, arguments) = command.split_first().context("no command")?;
            return Err(lab.command(&here, program)?.args(arguments).exec().into());
        }
        Command::Enter => {
            let shell = std::env::var("SHELL").unwrap_or_else(|_| "/bin/sh".to_owned());
            return Err(lab.command(&here, shell)?.exec().into());
        }
    }
    Ok(ExitCode::SUCCESS)
}
