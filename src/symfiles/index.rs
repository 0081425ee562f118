//! An index: one kernel's symbols as the store keeps them.
//!
//! ```text
//! "XFSYMS\r\n"   8 bytes, as PNG has them: a text transfer would show
//! version       u32, 1
//! head's length u32
//! CRC-32        u32, of the head
//! CRC-32        u32, of the table
//! head          JSON
//! table         kernel::Symbols
//! ```
//!
//! The head is enough to say whether a guest may run this kernel.

use std::io::Read;

use serde::{Deserialize, Serialize};

use super::bytes::u32_at;
use super::{Kind, Known};
use crate::kernel::{Symbols, TableFault};

/// How it begins.
pub(super) const MAGIC: &[u8; 8] = b"XFSYMS\r\n";

/// The only version there is.
const VERSION: u32 = 1;

/// Bytes before the head.
const FIXED: usize = 24;

/// Far more than a head has.
const MAX_HEAD: u32 = 64 << 10;

/// The most that is taken for a banner; the kernel's is shorter.
pub(super) const MAX_BANNER: usize = 1024;

/// A build id has 20 bytes, more with other hashes.
pub(super) const MAX_BUILD_ID: usize = 64;

/// What an index says of its kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// What the symbols were read from.
    pub kind: Kind,
    /// Of the kernel's ELF note, in hex; a System.map has none.
    pub build_id: Option<String>,
    /// `linux_banner`, where it is known: printable ASCII.
    pub banner: Option<String>,
    /// Where the banner lies, in bytes from the beginning of the image.
    pub banner_offset: Option<u64>,
    /// How many symbols there are.
    pub symbols: usize,
    /// The file that it was made from, as it was named then: printable ASCII.
    pub origin: String,
}

impl Head {
    /// The head for symbols from the file `origin`.
    pub fn new(known: &Known, origin: &str) -> Self {
        Self {
            kind: known.kind,
            build_id: known.build_id.clone(),
            banner: known.banner.clone(),
            banner_offset: known.symbols.banner_offset(),
            symbols: known.symbols.len(),
            origin: origin.escape_default().to_string(),
        }
    }

    /// Reads the head alone, and no more of the file than a head can take.
    ///
    /// # Errors
    /// If it is not an index, or is a damaged one.
    pub fn read(file: impl Read) -> Result<Self, IndexFault> {
        let mut bytes = Vec::new();
        let limit = FIXED as u64 + u64::from(MAX_HEAD);
        file.take(limit)
            .read_to_end(&mut bytes)
            .map_err(|_| IndexFault::Damaged)?;
        Ok(split(&bytes)?.0)
    }

    /// Whether it says what a head that was written here can say. The checksum
    /// does not tell: an index may be brought along, as any other file.
    fn is_plausible(&self) -> bool {
        let banner = |text: &String| text.len() <= MAX_BANNER && is_printable(text);
        self.build_id.as_deref().is_none_or(is_build_id)
            && self.banner.as_ref().is_none_or(banner)
            && is_printable(&self.origin)
    }

    /// The kernel's release, the third word of the banner.
    pub fn release(&self) -> Option<&str> {
        self.banner.as_deref()?.split(' ').nth(2)
    }
}

/// Why bytes are no index.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IndexFault {
    /// It begins as something else.
    #[error("it is not an index of xftrace's")]
    Magic,
    /// Made by a later xftrace.
    #[error(
        "it is an index of version {0}, and this xftrace knows version 1; add the kernel again"
    )]
    Version(u32),
    /// Cut short or changed.
    #[error("the index is damaged; remove it and add the kernel again")]
    Damaged,
    /// The checksum is right and the content is not.
    #[error("the index cannot be read ({0}); remove it and add the kernel again")]
    Table(TableFault),
}

/// Not as a source: the text says it, and so does that of whoever has this.
impl From<TableFault> for IndexFault {
    fn from(fault: TableFault) -> Self {
        Self::Table(fault)
    }
}

/// The bytes of an index.
pub(super) fn write(known: &Known, head: &Head) -> Vec<u8> {
    let head = serde_json::to_vec(head).unwrap_or_default();
    let table = known.symbols.to_table();
    let mut bytes = Vec::with_capacity(FIXED + head.len() + table.len());
    bytes.extend(MAGIC);
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend((head.len() as u32).to_le_bytes());
    bytes.extend(crc32fast::hash(&head).to_le_bytes());
    bytes.extend(crc32fast::hash(&table).to_le_bytes());
    bytes.extend(head);
    bytes.extend(table);
    bytes
}

/// All of it.
pub(super) fn read(bytes: &[u8]) -> Result<Known, IndexFault> {
    let (head, table) = split(bytes)?;
    if u32_at(bytes, 20) != Some(crc32fast::hash(table)) {
        return Err(IndexFault::Damaged);
    }
    Ok(Known {
        symbols: Symbols::from_table(table)?,
        kind: head.kind,
        build_id: head.build_id,
        banner: head.banner,
    })
}

/// The head, checked, and what comes after it.
fn split(bytes: &[u8]) -> Result<(Head, &[u8]), IndexFault> {
    if !bytes.starts_with(MAGIC) {
        return Err(IndexFault::Magic);
    }
    let field = |at| u32_at(bytes, at).ok_or(IndexFault::Damaged);
    let version = field(8)?;
    if version != VERSION {
        return Err(IndexFault::Version(version));
    }
    let len = field(12)?;
    let rest = bytes.get(FIXED..).ok_or(IndexFault::Damaged)?;
    let (head, table) = rest
        .split_at_checked(len as usize)
        .ok_or(IndexFault::Damaged)?;
    if len > MAX_HEAD || crc32fast::hash(head) != field(16)? {
        return Err(IndexFault::Damaged);
    }
    let head: Head = serde_json::from_slice(head).map_err(|_| IndexFault::Damaged)?;
    if !head.is_plausible() {
        return Err(IndexFault::Damaged);
    }
    Ok((head, table))
}

/// Whether this is a build id in hex. It becomes a file's name, so nothing else
/// may pass for one.
pub(super) fn is_build_id(text: &str) -> bool {
    let hex = |byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    text.len() % 2 == 0 && (2..=2 * MAX_BUILD_ID).contains(&text.len()) && text.bytes().all(hex)
}

/// Whether text can be shown as it is.
fn is_printable(text: &str) -> bool {
    text.bytes().all(|byte| matches!(byte, b' '..=b'~'))
}
