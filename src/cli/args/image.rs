//! What `status` and `report` take in place of a domain.

use std::path::PathBuf;

use clap::{Args, ValueEnum, ValueHint};

use crate::ram::Gpa;

/// A saved image of a guest's memory, and what it takes to read it.
#[derive(Debug, Clone, Args)]
pub struct ImageOption {
    /// A saved image of a guest's memory, in place of a domain
    ///
    /// An ELF file as `virsh dump --memory-only --format elf DOMAIN FILE`
    /// writes it, or a raw copy of the memory.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub memory: Option<PathBuf>,

    /// The symbols of the image's kernel: a file that 'symbols add' takes
    /// [default: those in the store that fit]
    #[arg(long, value_name = "FILE", requires = "memory", value_hint = ValueHint::FilePath)]
    pub symbols: Option<PathBuf>,

    /// The machine of a raw image, which tells where RAM goes on above 4 GiB
    ///
    /// Without it, a guest physical address is an offset in the file: right
    /// for less than 2.75 GiB of memory, and for what has the hole below 4 GiB
    /// in it.
    #[arg(long, value_enum, value_name = "MACHINE", requires = "memory")]
    pub machine: Option<MachineName>,

    /// Where the image's kernel lies, of several that may be in it, as
    /// 'status --memory' names them
    ///
    /// A guest physical address, as 0x1000000 or 16777216. A reboot may leave a
    /// kernel behind, and who controls the guest's kernel can put copies there.
    /// The one that ran is where the session.json of the guest's last boot has
    /// it ("phys_text").
    #[arg(long, value_name = "ADDRESS", requires = "memory", value_parser = parse_address)]
    pub kernel_at: Option<Gpa>,
}

fn parse_address(text: &str) -> Result<Gpa, String> {
    let address = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    address
        .map(Gpa)
        .map_err(|_| "an address is a number, as 0x1000000 is".to_owned())
}

/// A kind of machine, by the name of libvirt and QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum MachineName {
    /// i440FX
    Pc,
    /// Q35
    Q35,
}
