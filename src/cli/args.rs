//! The command line as clap sees it: one definition that feeds parsing, help,
//! the man page and the shell completions.
//!
//! The first paragraph of each comment is the short help (`-h`), all of it the
//! long one (`--help`). Values are checked here as far as they can be without
//! asking libvirt or a helper, so that a typing mistake costs nothing.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum, ValueHint};
use uuid::Uuid;

use crate::config::{parse_function, parse_interval, ByteSize, DEFAULT_CONFIG_PATH};

mod detect;
mod enroll;
mod image;

pub use detect::{BaselineAction, BaselineArgs, CheckArgs};
pub use enroll::{EnrollArgs, PlainRing, UnenrollArgs};
pub use image::{ImageOption, MachineName};

/// Record which kernel functions a Linux guest calls, from its host, while it runs
///
/// xftrace reads the trace straight out of the guest's memory, which libvirt
/// keeps in a file on the host. The addresses in each record are XORed inside
/// the guest with a key that only the host hands out and that changes every
/// interval, so that a record made up without the key does not decode. That is
/// evidence, not secrecy. The guest is never paused.
#[derive(Debug, Parser)]
#[command(
    name = "xftrace",
    version,
    after_help = "See 'xftrace help COMMAND' for the options and examples of one command.",
    after_long_help = TOP_EXAMPLES,
    subcommand_required = true,
    arg_required_else_help = true,
    max_term_width = 100
)]
pub struct Cli {
    /// What holds for every command.
    #[command(flatten)]
    pub global: Global,
    /// The command itself.
    #[command(subcommand)]
    pub command: Command,
}

const TOP_EXAMPLES: &str = "\
Getting started, for a domain called web1:
  xftrace doctor web1               say what is missing for web1 to be traced
  xftrace enroll web1               shared memory and our metadata into its XML
  virsh shutdown web1; virsh start web1
  xftrace on sys_openat sys_read    trace these two and all that they call
  xftrace off                       the call flow is now in ./trace_graph.txt

Exit status:
  0  done
  1  a check found something in the guest
  2  an error, or a command line that cannot be understood

Environment:
  LIBVIRT_DEFAULT_URI  the libvirt connection where -c is not given
  XFTRACE_CONFIG       the configuration file where --config is not given

Files:
  /etc/xftrace/xftrace.toml             configuration
  /var/lib/xftrace/symbols/             the kernels that are known
  /var/log/libvirt/qemu/NAME.xftrace/   the sessions recorded of domain NAME
  /run/xftrace/                         sockets of the running helpers";

/// Options that every command takes.
#[derive(Debug, Clone, Args)]
pub struct Global {
    /// The libvirt connection to use [default: qemu:///system]
    ///
    /// As for virsh. Without it, LIBVIRT_DEFAULT_URI is used where that is
    /// set, and qemu:///system where it is not.
    #[arg(
        short,
        long,
        global = true,
        value_name = "URI",
        help_heading = "Global options",
        value_hint = ValueHint::Url
    )]
    pub connect: Option<String>,

    /// The configuration file [default: /etc/xftrace/xftrace.toml]
    ///
    /// Without it, XFTRACE_CONFIG is used where that is set. A missing default
    /// file means the built-in defaults; a missing file that was named is an
    /// error.
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        env = "XFTRACE_CONFIG",
        hide_env = true,
        help_heading = "Global options",
        value_hint = ValueHint::FilePath
    )]
    pub config: Option<PathBuf>,
}

impl Global {
    /// The configuration file that will be read: the one named, else the
    /// default one.
    pub fn config_path(&self) -> PathBuf {
        self.named_config()
            .map_or_else(|| PathBuf::from(DEFAULT_CONFIG_PATH), Path::to_owned)
    }

    /// The configuration file where one was named. An empty name, as from an
    /// empty XFTRACE_CONFIG, is none.
    pub fn named_config(&self) -> Option<&Path> {
        self.config
            .as_deref()
            .filter(|path| !path.as_os_str().is_empty())
    }
}

/// The commands. What each is for stands at its arguments, whose text clap
/// takes where a variant has none.
#[derive(Debug, Subcommand)]
#[allow(missing_docs)]
pub enum Command {
    Enroll(EnrollArgs),
    Unenroll(UnenrollArgs),
    On(OnArgs),
    Off(OffArgs),
    Status(StatusArgs),
    List(ListArgs),
    Report(ReportArgs),
    Check(CheckArgs),
    Baseline(BaselineArgs),
    Follow(FollowArgs),
    Symbols(SymbolsArgs),
    Doctor(DoctorArgs),
    #[command(hide = true)]
    Hook(HookArgs),
    #[command(hide = true)]
    Helper(HelperArgs),
}

/// `-d DOMAIN`, for commands that find the domain themselves where there is
/// but one.
#[derive(Debug, Clone, Args)]
pub struct DomainOption {
    /// The domain: a name, id or UUID
    ///
    /// Without it, the only enrolled domain that runs; where there are
    /// several, they are listed and nothing is done.
    #[arg(short, long, value_name = "DOMAIN", value_parser = domain_text)]
    pub domain: Option<String>,
}

/// Start tracing, or trace other functions
///
/// Each function named is traced with everything that it calls. Without a
/// name, those of the domain's metadata are traced, else those of the
/// configuration. The guest takes the change up within a fifth of a second
/// and is never paused. A second 'xftrace on' changes the functions of the
/// trace that runs.
#[derive(Debug, Clone, Args)]
#[command(after_long_help = "\
Examples:
  xftrace on sys_openat sys_read
  xftrace on -d web1 sys_execve
  xftrace on -d web1 --interval 100ms --buffer-size 32M sys_read

Names:
  As in the guest's System.map. sys_read finds __x64_sys_read. An unknown name
  is refused, with the nearest ones.")]
pub struct OnArgs {
    /// Which domain.
    #[command(flatten)]
    pub domain: DomainOption,

    /// Functions to trace, each with all that it calls
    #[arg(value_name = "FUNCTION", value_parser = parse_function)]
    pub functions: Vec<String>,

    /// How long one key lasts, 10ms to 1h [default: the domain's, else the configuration's]
    #[arg(short, long, value_name = "TIME", value_parser = parse_interval)]
    pub interval: Option<Duration>,

    /// The trace buffer of each guest CPU, for example 8M [default: the guest's own]
    ///
    /// A larger one bears longer bursts of calls before records are
    /// overwritten. The guest's kernel allocates it out of the guest's memory.
    #[arg(short, long, value_name = "SIZE", value_parser = buffer_size)]
    pub buffer_size: Option<ByteSize>,
}

/// Stop tracing and write trace_graph.txt
///
/// Drains what is left in the guest's buffers, closes the session, and leaves
/// its call flow in ./trace_graph.txt as well as next to the domain's log in
/// /var/log/libvirt/qemu/DOMAIN.xftrace/.
#[derive(Debug, Clone, Args)]
#[command(after_long_help = "\
Examples:
  xftrace off
  xftrace off -d web1 -o web1-boot.txt
  xftrace off -o - | less
  xftrace off --no-copy")]
pub struct OffArgs {
    /// Which domain.
    #[command(flatten)]
    pub domain: DomainOption,

    /// Where the call flow goes; - is standard output [default: trace_graph.txt]
    ///
    /// A file of that name is replaced once the new one is complete. What is no
    /// file (a link, a device, a pipe) is left alone, and refused.
    #[arg(
        short,
        long,
        value_name = "FILE",
        conflicts_with = "no_copy",
        value_hint = ValueHint::FilePath
    )]
    pub output: Option<PathBuf>,

    /// Leave the call flow in the session's directory only
    #[arg(long)]
    pub no_copy: bool,
}

/// Show what is traced, and every count of what was lost or forged
///
/// Without -d, all domains that have a helper. Each counter says what it
/// counts: records, those that are lost and in how many places, those under no
/// known key, keys that the guest changed, pages torn under the copy.
#[derive(Debug, Clone, Args)]
#[command(after_long_help = "\
Examples:
  xftrace status
  xftrace status -d web1
  xftrace status --memory web1.elf
  xftrace status --json | jq '.[].trace.counters.lost'")]
pub struct StatusArgs {
    /// The domain: a name, id or UUID [default: all that have a helper]
    #[arg(short, long, value_name = "DOMAIN", value_parser = domain_text, conflicts_with = "memory")]
    pub domain: Option<String>,

    /// Print JSON
    #[arg(long, conflicts_with = "memory")]
    pub json: bool,

    /// An image in place of a domain.
    #[command(flatten)]
    pub image: ImageOption,
}

/// List the domains and which of them can be traced
///
/// One line a domain: its state, whether it is enrolled, what its memory is,
/// and whether a helper looks after it.
#[derive(Debug, Clone, Args)]
#[command(after_long_help = "\
Examples:
  xftrace list
  xftrace list --name    the enrolled domains, for scripts")]
pub struct ListArgs {
    /// Only the names of enrolled domains, one a line
    #[arg(long)]
    pub name: bool,
}

/// Decode a recorded session
///
/// A session can be decoded again at any time, on any machine that has its
/// directory; neither the domain nor libvirt is needed.
/// With -d, the newest session of that domain. With --memory, what lies in the
/// ring buffers of a saved image; where its kernel has the patch, under the
/// keys of --klog.
#[derive(Debug, Clone, Args)]
#[command(
    group = ArgGroup::new("source").args(["session", "domain", "memory"]).required(true),
    after_long_help = "\
Examples:
  xftrace report /var/log/libvirt/qemu/web1.xftrace/20261123T093000Z
  xftrace report -d web1 --format json -o web1.json
  xftrace report -d web1 --format folded | flamegraph.pl > web1.svg
  xftrace report --memory web1.elf --klog SESSION/klog")]
pub struct ReportArgs {
    /// The directory of a session
    #[arg(value_name = "SESSION", value_hint = ValueHint::DirPath)]
    pub session: Option<PathBuf>,

    /// The domain whose newest session to decode: a name, id or UUID
    #[arg(short, long, value_name = "DOMAIN", value_parser = domain_text)]
    pub domain: Option<String>,

    /// An image in place of a session.
    #[command(flatten)]
    pub image: ImageOption,

    /// The keys of the image's records: the klog of the session that was open;
    /// none in mode plain
    #[arg(long, value_name = "FILE", requires = "memory", value_hint = ValueHint::FilePath)]
    pub klog: Option<PathBuf>,

    /// What to write
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t = Format::Text)]
    pub format: Format,

    /// Where to write it; - is standard output [default: -]
    #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub output: Option<PathBuf>,

    /// Whose time the records carry
    #[arg(long, value_enum, value_name = "CLOCK", default_value_t = Clock::Host)]
    pub clock: Clock,
}

/// The formats that `report` writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// The call flow as in trace_graph.txt
    Text,
    /// One JSON object a line for each call and each mark
    Json,
    /// Folded stacks with their time, for flame graphs
    Folded,
}

/// Whose clock the times of a report are in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Clock {
    /// The host's wall time, mapped by the guest's heartbeat
    Host,
    /// The guest's trace clock, as recorded
    Guest,
}

/// Show the call flow as it happens
///
/// Follows the trace that is on, from its beginning, until it ends or until
/// Ctrl-C, which leaves the trace on. What the guest records shows within a
/// second, unless the host or the reader of the output is slower than the
/// guest. Calls stand in the order of their times, and losses in their place,
/// as in trace_graph.txt.
#[derive(Debug, Clone, Args)]
#[command(after_long_help = "\
Examples:
  xftrace follow
  xftrace follow -d web1 | grep '!!'     what is forged, lost, or cannot be right
  xftrace follow --format json | grep '\"type\":\"lost\"'
  xftrace follow | head -100")]
pub struct FollowArgs {
    /// Which domain.
    #[command(flatten)]
    pub domain: DomainOption,

    /// The format of what is written
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t = FollowFormat::Text)]
    pub format: FollowFormat,

    /// Whose clock the times are in, in the text format
    #[arg(long, value_enum, value_name = "CLOCK", default_value_t = Clock::Host)]
    pub clock: Clock,
}

/// The formats that `follow` writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum FollowFormat {
    /// The call flow as in trace_graph.txt, without its head
    Text,
    /// One JSON object a line for each call and each mark
    Json,
}

/// Keep the symbols of the guests' kernels
///
/// Records are addresses; the symbols of the very kernel that the guest runs
/// make names of them. Once they have been added, the helper of each domain
/// finds by itself which of them belong to its guest, and refuses all others.
#[derive(Debug, Clone, Args)]
#[command(after_long_help = "\
Examples:
  xftrace symbols add /srv/kernels/vmlinuz-6.1.0-44-cloud-amd64
  xftrace symbols add linux-image-6.1.0-44-cloud-amd64_6.1.164-1_amd64.deb
  xftrace symbols list
  xftrace symbols remove 3f9a")]
pub struct SymbolsArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: SymbolsCommand,
}

/// What can be done with symbols.
#[derive(Debug, Clone, Subcommand)]
#[command(subcommand_required = true, arg_required_else_help = true)]
pub enum SymbolsCommand {
    /// Add the symbols of kernels
    ///
    /// Each FILE is a System.map, a vmlinux, a vmlinuz (bzImage), a linux-image
    /// package (.deb), or what the guest's root read from /proc/kallsyms. What
    /// it is, is told by its content. The file is read once, and not needed
    /// any more. Adding a kernel again replaces it.
    ///
    /// Debian installs a note in place of System.map: take the vmlinuz.
    Add {
        /// The files
        #[arg(value_name = "FILE", required = true, value_hint = ValueHint::FilePath)]
        files: Vec<PathBuf>,
    },
    /// List the kernels that are known
    ///
    /// One line each: its id (the build id, or a digest where the file had
    /// none), how many symbols there are, what they are from, and the kernel's
    /// release, or where that is unknown (for a System.map), the file's name.
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Remove kernels
    Remove {
        /// Their ids, or the beginnings of them
        #[arg(value_name = "ID", required = true)]
        ids: Vec<String>,
    },
}

/// Say what is missing for a domain to be traced, and how to mend it
///
/// Each check is 'ok', or 'missing' with the command that mends it. Without a
/// domain, only the host is looked at. The exit status is 0 where nothing is
/// missing and 2 where something is.
#[derive(Debug, Clone, Args)]
#[command(after_long_help = "\
Examples:
  xftrace doctor
  xftrace doctor web1")]
pub struct DoctorArgs {
    /// The domain: a name, id or UUID
    #[arg(value_name = "DOMAIN", value_parser = domain_text)]
    pub domain: Option<String>,
}

/// What libvirt's qemu hook runs
///
/// Called as libvirt calls /etc/libvirt/hooks/qemu, with the domain's XML on
/// standard input: DOMAIN OPERATION SUB-OPERATION EXTRA. Not for people.
#[derive(Debug, Clone, Args)]
pub struct HookArgs {
    /// Print the script that libvirt runs, and do nothing else
    #[arg(long)]
    pub script: bool,

    /// DOMAIN OPERATION SUB-OPERATION EXTRA
    ///
    /// Not told apart here: whatever libvirt passes, now or in some later
    /// version, must not become a usage error that stops a domain.
    #[arg(
        value_name = "ARGUMENT",
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    pub arguments: Vec<OsString>,
}

/// The process that traces one running domain
///
/// Started by the hook, through xftrace@UUID.service where there is systemd.
/// It ends by itself with the domain's QEMU process. Not for people.
#[derive(Debug, Clone, Args)]
pub struct HelperArgs {
    /// The domain's UUID
    #[arg(long, value_name = "UUID")]
    pub uuid: Uuid,

    /// The domain's XML as the hook saved it [default: UUID.xml in the run directory]
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub xml: Option<PathBuf>,
}

/// A domain as typed: not empty, and without NUL, on which libvirt's C strings
/// end.
fn domain_text(text: &str) -> Result<String, String> {
    if text.is_empty() {
        return Err("a domain is a name, id or UUID, not an empty text".to_owned());
    }
    if text.contains('\0') {
        return Err("a domain's name has no NUL in it".to_owned());
    }
    Ok(text.to_owned())
}

/// A ring buffer's size: from 64 KiB, below which a few calls fill it, to
/// 1 GiB a CPU.
fn buffer_size(text: &str) -> Result<ByteSize, String> {
    let size: ByteSize = text.parse()?;
    if !(64 << 10..=1 << 30).contains(&size.0) {
        return Err("a CPU's buffer is from 64K to 1G".to_owned());
    }
    Ok(size)
}

#[cfg(test)]
mod tests;
