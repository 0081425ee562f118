//! Reading any file that has a kernel's symbols.

use std::fmt;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::libc;
use serde::{Deserialize, Serialize};

use super::elf::ElfKernel;
use super::kallsyms::Entry;
use super::unpack::Compression;
use super::{bzimage, elf, index, package, Fault, SymfileError, MAX_FILE, MAX_IMAGE};
use crate::kernel::Symbols;

/// What a kernel's symbols were read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Text: a System.map or a saved /proc/kallsyms, which nothing sure tells
    /// apart.
    List,
    /// The symbol table of an ELF file.
    Vmlinux,
    /// The kernel's own list, out of its image.
    Kallsyms,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::List => "symbol list",
            Self::Vmlinux => "vmlinux",
            Self::Kallsyms => "kernel image",
        })
    }
}

/// A kernel's symbols, and what else a file told of it.
#[derive(Debug)]
pub struct Known {
    /// At the addresses that it was linked with.
    pub symbols: Symbols,
    /// Where they are from.
    pub kind: Kind,
    /// Of the ELF note, in hex.
    pub build_id: Option<String>,
    /// `linux_banner` without its newline: printable ASCII.
    pub banner: Option<String>,
}

impl Known {
    /// Reads a System.map, a saved /proc/kallsyms, a vmlinux, a vmlinuz, a
    /// linux-image .deb, or an index of the store.
    ///
    /// # Errors
    /// If it cannot be read or is none of these.
    pub fn load(path: &Path) -> Result<Self, SymfileError> {
        Self::parse(content(path)?).map_err(|fault| fault.of(path))
    }

    /// The same, and, of a file that a guest can boot, the kernel in it: the ELF
    /// file and what follows it.
    ///
    /// # Errors
    /// As [`Known::load`].
    pub fn with_image(path: &Path) -> Result<(Self, Option<Vec<u8>>), SymfileError> {
        let bytes = content(path)?;
        if !bzimage::is(&bytes) {
            let known = Self::parse(bytes).map_err(|fault| fault.of(path))?;
            return Ok((known, None));
        }
        let kernel = bzimage::kernel(&bytes).map_err(|fault| fault.of(path))?;
        let known = Self::of_elf(&kernel).map_err(|fault| fault.of(path))?;
        Ok((known, Some(kernel)))
    }

    /// Reads the content of such a file, a package excepted.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(bytes: Vec<u8>) -> Result<Self, Fault> {
        if bytes.starts_with(index::MAGIC) {
            return Ok(index::read(&bytes)?);
        }
        if bzimage::is(&bytes) {
            return Self::of_elf(&bzimage::kernel(&bytes)?);
        }
        if bytes.starts_with(b"\x7fELF") {
            return Self::of_elf(&bytes);
        }
        // A vmlinux.xz, a System.map.gz.
        if let Some(compression) = Compression::of(&bytes) {
            let unpacked = compression
                .unpack(&bytes, MAX_IMAGE)
                .map_err(|error| Fault::Unpack(error.to_string()))?;
            return match unpacked.starts_with(b"\x7fELF") {
                true => Self::of_elf(&unpacked),
                false => Self::of_text(unpacked),
            };
        }
        Self::of_text(bytes)
    }

    fn of_elf(bytes: &[u8]) -> Result<Self, Fault> {
        let ElfKernel {
            symbols,
            from_symtab,
            build_id,
            banner,
        } = elf::read(bytes)?;
        let hex = |id: Vec<u8>| id.iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Self {
            symbols: Symbols::parse(text_of(&symbols))?,
            kind: match from_symtab {
                true => Kind::Vmlinux,
                false => Kind::Kallsyms,
            },
            build_id: build_id.map(hex),
            banner,
        })
    }

    fn of_text(bytes: Vec<u8>) -> Result<Self, Fault> {
        Ok(Self {
            symbols: Symbols::parse(bytes)?.normalise()?,
            kind: Kind::List,
            build_id: None,
            banner: None,
        })
    }
}

/// What is in a file, or, where it is a package, in the kernel in that.
fn content(path: &Path) -> Result<Vec<u8>, SymfileError> {
    let failed = || SymfileError::io("read", path);
    // O_NONBLOCK, so that a pipe of that name is refused, not waited for.
    let mut file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(failed())?;
    if !file.metadata().map_err(failed())?.is_file() {
        return Err(Fault::NotAFile.of(path));
    }
    let mut head = Vec::new();
    let length = package::MAGIC.len() as u64;
    file.by_ref()
        .take(length)
        .read_to_end(&mut head)
        .map_err(failed())?;
    file.seek(SeekFrom::Start(0)).map_err(failed())?;
    if head == package::MAGIC {
        // As a stream: packages may be large, and the kernel comes early.
        let kernel = package::kernel(BufReader::new(file));
        return kernel
            .map(|(_, bytes)| bytes)
            .map_err(|fault| fault.of(path));
    }
    let mut bytes = Vec::new();
    let limit = MAX_FILE + 1;
    file.take(limit).read_to_end(&mut bytes).map_err(failed())?;
    if bytes.len() as u64 == limit {
        return Err(Fault::TooLarge.of(path));
    }
    Ok(bytes)
}

/// As a System.map, in the order given.
fn text_of(symbols: &[Entry]) -> Vec<u8> {
    let mut text = String::with_capacity(symbols.len() * 40);
    for (address, kind, name) in symbols {
        text.push_str(&format!("{address:016x} {} {name}\n", char::from(*kind)));
    }
    text.into_bytes()
}
