//! What `check` and `baseline` take.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueHint};

use super::{domain_text, ImageOption};
use crate::config::parse_baseline;

/// Say whether a guest's kernel control flow is hooked
///
/// Looks into the memory of a running domain (or of a saved image), and compares
/// the kernel with the one that the guest boots: its code, its constants, where
/// interrupts enter it, and whom it calls. And judges the domain's newest session
/// (or the one that is named): by what no kernel does and, with a baseline, by
/// what the guest did when it was clean. docs/detection.md says what each sees.
///
/// The kernel that the guest boots has to be known: 'xftrace symbols add' its
/// vmlinuz or linux-image package. The guest is neither stopped nor written to.
#[derive(Debug, Clone, Args)]
#[command(after_long_help = "\
Examples:
  xftrace check -d web1 --baseline web
  xftrace check /var/log/libvirt/qemu/web1.xftrace/20261123T093000Z
  xftrace check --memory web1.elf --kernel vmlinuz-6.1.0-50-amd64
  xftrace check -d web1 --json | jq '.flow.findings[] | .what'

Exit status:
  0  clean, as far as the rules can see
  1  something was found
  2  it could not be told, or an error")]
pub struct CheckArgs {
    /// The directory of a session
    #[arg(value_name = "SESSION", value_hint = ValueHint::DirPath, conflicts_with_all = ["domain", "memory"])]
    pub session: Option<PathBuf>,

    /// The domain to check, with its newest session: a name, id or UUID
    ///
    /// Without it and without a session, the only enrolled domain that runs.
    #[arg(short, long, value_name = "DOMAIN", value_parser = domain_text, conflicts_with = "memory")]
    pub domain: Option<String>,

    /// The baseline to compare with [default: the domain's, else the configuration's]
    ///
    /// A session that is named by its directory has no domain here.
    #[arg(short, long, value_name = "NAME", value_parser = parse_baseline)]
    pub baseline: Option<String>,

    /// The kernel that the guest boots: its vmlinuz or linux-image package
    /// [default: the one in the store]
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, conflicts_with = "session")]
    pub kernel: Option<PathBuf>,

    /// What to look at in place of a domain.
    #[command(flatten)]
    pub image: ImageOption,

    /// Print JSON, as docs/verdict.schema.json describes it
    #[arg(long)]
    pub json: bool,
}

/// Learn how a clean guest behaves, and look at what was learnt
///
/// A baseline is made of sessions of a guest that is known to be clean, traced
/// with the functions that it is to be checked with, while it did what it
/// usually does. It is of one build of one kernel.
#[derive(Debug, Clone, Args)]
#[command(
    subcommand_required = true,
    arg_required_else_help = true,
    after_long_help = "\
Examples:
  xftrace baseline learn web /var/log/libvirt/qemu/web1.xftrace/2026*
  xftrace baseline show web
  xftrace baseline diff web web-new
  xftrace baseline diff web /var/log/libvirt/qemu/web1.xftrace/20261123T093000Z"
)]
pub struct BaselineArgs {
    /// What to do.
    #[command(subcommand)]
    pub action: BaselineAction,
}

/// What `xftrace baseline` does.
#[derive(Debug, Clone, Subcommand)]
pub enum BaselineAction {
    /// Learn from clean sessions; a baseline that is there is widened
    Learn {
        /// The baseline
        #[arg(value_name = "NAME", value_parser = parse_baseline)]
        name: String,
        /// The directories of sessions
        #[arg(value_name = "SESSION", required = true, value_hint = ValueHint::DirPath)]
        sessions: Vec<PathBuf>,
    },
    /// Show what a baseline knows
    Show {
        /// The baseline
        #[arg(value_name = "NAME", value_parser = parse_baseline)]
        name: String,
    },
    /// Show what is only in one of two baselines, or only in a baseline or a session
    Diff {
        /// The baseline
        #[arg(value_name = "NAME", value_parser = parse_baseline)]
        name: String,
        /// Another baseline's name, or the directory of a session
        #[arg(value_name = "NAME|SESSION", value_hint = ValueHint::DirPath)]
        other: String,
    },
    /// List the baselines
    List,
    /// Remove a baseline
    Remove {
        /// The baseline
        #[arg(value_name = "NAME", value_parser = parse_baseline)]
        name: String,
    },
}
