//! What `enroll` and `unenroll` take.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum, ValueHint};

use super::domain_text;
use crate::config::{parse_baseline, parse_function, parse_interval, IntegrityInterval};

/// Make a domain traceable
///
/// Edits the domain's persistent XML: its memory becomes a shared file on the
/// host, from which xftrace reads the trace, and the options below go into its
/// metadata. Everything else in the XML stays as it is, byte for byte, and
/// 'xftrace unenroll' puts back what was there before.
///
/// Huge pages and a memfd stay what they are, and become shared.
///
/// A running domain can be traced at once, through the QEMU process, also where
/// its memory is no file yet; a file is quicker and needs fewer rights. For
/// its memory to become one it must be shut down and started again (a reboot
/// from inside the guest is not enough); xftrace says so and never does it
/// itself. Enrolling again changes the options.
#[derive(Debug, Clone, Args)]
#[command(after_long_help = "\
Examples:
  xftrace enroll web1
  xftrace enroll web1 --functions sys_openat,sys_read --interval 500ms
  xftrace enroll web1 --functions sys_execve --at-start
  xftrace enroll web1 --symbols /srv/kernels/System.map-6.1-xftrace
  xftrace enroll web1 --functions sys_openat,sys_read --baseline web
  xftrace enroll web1 --integrity-interval 10s
  xftrace enroll web1 --functions sys_openat --plain
  xftrace enroll web1 --functions sys_openat --plain=reserved")]
pub struct EnrollArgs {
    /// The domain: a name, id or UUID
    #[arg(value_name = "DOMAIN", value_parser = domain_text)]
    pub domain: String,

    /// Functions that 'xftrace on' traces when it names none, separated by commas
    ///
    /// Names as in the guest's System.map; sys_read stands for __x64_sys_read.
    #[arg(
        short,
        long,
        value_name = "F,..",
        value_delimiter = ',',
        value_parser = parse_function
    )]
    pub functions: Vec<String>,

    /// How long one key lasts, 10ms to 1h [default: 1s, or the configuration's]
    #[arg(short, long, value_name = "TIME", value_parser = parse_interval)]
    pub interval: Option<Duration>,

    /// Trace from the start of the domain on, without 'xftrace on'
    #[arg(long)]
    pub at_start: bool,

    /// The guest's kernel has no xftrace patch: trace without keys
    ///
    /// Such a kernel traces what it was booted with. Where the domain boots a
    /// kernel directly (os/kernel in its XML), that goes on its command line; else it
    /// is printed, to be put there inside the guest. The records are not keyed
    /// and prove nothing against root in the guest.
    ///
    /// The functions are looked up in the kernel's symbols first (--symbols, or those
    /// that were added with 'xftrace symbols add'): a kernel that is booted with a name
    /// that it does not have records every function.
    ///
    /// RING says where the records go.
    #[arg(
        long,
        value_name = "RING",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "global",
        requires = "functions"
    )]
    pub plain: Option<PlainRing>,

    /// The symbols of the guest's kernel [default: those that fit, of 'xftrace symbols list']
    ///
    /// Any file that 'xftrace symbols add' takes. It stays where it is, is read
    /// whenever the domain starts, and is the only one tried for this domain.
    /// Without it, the helper looks for the kernel which it finds in the guest
    /// among those that were added with 'xftrace symbols add', and in files
    /// that lie in the symbols directory (/var/lib/xftrace/symbols).
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub symbols: Option<PathBuf>,

    /// The baseline that the guest is judged by [default: the configuration's]
    ///
    /// One that 'xftrace baseline learn' has made, or will have made: it is read
    /// when a trace begins. The trace is judged by it while it is on, and what is
    /// found goes to the log, to the session's findings.jsonl, and to the command
    /// of 'on_finding'. 'xftrace check -d DOMAIN' takes it too.
    #[arg(long, value_name = "NAME", value_parser = parse_baseline)]
    pub baseline: Option<String>,

    /// How often the kernel in the guest's memory is checked, 1s to 24h, or 'off'
    /// [default: the configuration's, else 1m]
    ///
    /// As 'xftrace check' does, while the domain runs, traced or not. It takes the
    /// kernel that the guest boots: 'xftrace symbols add' its vmlinuz or linux-image
    /// package. What is found goes to the log, to findings.jsonl beside the domain's
    /// sessions, and to the command of 'on_finding'; 'xftrace status' shows it.
    #[arg(long, value_name = "TIME", value_parser = clap::value_parser!(IntegrityInterval))]
    pub integrity_interval: Option<IntegrityInterval>,
}

/// Where a kernel without the patch has its records.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PlainRing {
    /// In the global ring buffer, which any kernel has
    Global,
    /// In an instance's, in memory reserved at boot (Linux 6.12 and later; its tracer
    /// is to be set inside the guest after each boot)
    Reserved,
}

/// Take out of a domain's XML what enroll put in
///
/// The persistent XML is again what it was before 'xftrace enroll', byte for
/// byte in everything that enroll touched. A running domain goes on unchanged;
/// its memory stays a shared file until it is shut down and started again.
///
/// What was done inside a guest for mode plain stays there. To boot it as before,
/// where it has update-grub: rm /etc/default/grub.d/xftrace.cfg && update-grub
#[derive(Debug, Clone, Args)]
#[command(after_long_help = "\
Examples:
  xftrace unenroll web1
  xftrace -c qemu+ssh://root@host/system unenroll web1")]
pub struct UnenrollArgs {
    /// The domain: a name, id or UUID
    #[arg(value_name = "DOMAIN", value_parser = domain_text)]
    pub domain: String,
}
