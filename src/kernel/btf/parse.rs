//! From bytes to an index of types.

use super::{Btf, BtfError, TYPES_LIMIT};

/// `BTF_MAGIC`, and the one version there is.
const MAGIC: u16 = 0xeb9f;
const VERSION: u8 = 1;
/// `struct btf_header` up to its last field.
const HEADER: usize = 24;
/// `struct btf_type`.
const RECORD: usize = 12;

/// The kinds of types, `BTF_KIND_*`.
pub(in crate::kernel) mod kind {
    pub(in crate::kernel) const INT: u32 = 1;
    pub(in crate::kernel) const PTR: u32 = 2;
    pub(in crate::kernel) const ARRAY: u32 = 3;
    pub(in crate::kernel) const STRUCT: u32 = 4;
    pub(in crate::kernel) const UNION: u32 = 5;
    pub(in crate::kernel) const ENUM: u32 = 6;
    pub(in crate::kernel) const FWD: u32 = 7;
    pub(in crate::kernel) const TYPEDEF: u32 = 8;
    pub(in crate::kernel) const VOLATILE: u32 = 9;
    pub(in crate::kernel) const CONST: u32 = 10;
    pub(in crate::kernel) const RESTRICT: u32 = 11;
    pub(in crate::kernel) const FUNC: u32 = 12;
    pub(in crate::kernel) const FUNC_PROTO: u32 = 13;
    pub(in crate::kernel) const VAR: u32 = 14;
    pub(in crate::kernel) const DATASEC: u32 = 15;
    pub(in crate::kernel) const FLOAT: u32 = 16;
    pub(in crate::kernel) const DECL_TAG: u32 = 17;
    pub(in crate::kernel) const TYPE_TAG: u32 = 18;
    pub(in crate::kernel) const ENUM64: u32 = 19;
}

/// The head of one type's record, `struct btf_type`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Record {
    /// Where its name begins among the names; 0: it has none.
    pub(super) name: u32,
    pub(super) kind: u32,
    /// How many members, values or parameters follow it.
    pub(super) count: usize,
    /// Whether its members' offsets hold the sizes of bit fields too.
    pub(super) flag: bool,
    /// Its size in bytes, or the type that it is made of.
    pub(super) size_or_type: u32,
    /// Where in the bytes what follows it begins.
    pub(super) body: usize,
}

impl Btf {
    /// Parses BTF as a kernel carries it: its header, its types, their names.
    ///
    /// # Errors
    /// [`BtfError::Malformed`] if any record does not fit.
    pub fn parse(bytes: Vec<u8>) -> Result<Self, BtfError> {
        let bad = |what, at| BtfError::Malformed { what, at };
        let word = |at| read_u32(&bytes, at).ok_or(bad("no header", at));
        let magic = word(0)?;
        if magic as u16 != MAGIC || (magic >> 16) as u8 != VERSION {
            return Err(bad("another magic number or version", 0));
        }
        let header = word(4)? as usize;
        if header < HEADER || header % 4 != 0 {
            return Err(bad("an impossible header", 4));
        }
        // The two sections, by offsets from the end of the header.
        let section = |at: usize| {
            let start = header.checked_add(word(at)? as usize);
            let end = start.and_then(|start| start.checked_add(word(at + 4).ok()? as usize));
            match (start, end) {
                (Some(start), Some(end)) if end <= bytes.len() => Ok(start..end),
                _ => Err(bad("a section that lies outside", at)),
            }
        };
        let (records, names) = (section(8)?, section(16)?);
        let mut btf = Self {
            types: Vec::with_capacity(records.len() / 20),
            bytes,
            names,
        };
        let mut at = records.start;
        while at < records.end {
            let record = btf.record_at(at).ok_or(bad("half a type", at))?;
            let body = body_size(&record).ok_or(bad("an unknown kind of type", at))?;
            let end = record.body.checked_add(body);
            let end = end.filter(|&end| end <= records.end);
            let start = u32::try_from(at).ok();
            let start = start.filter(|_| btf.types.len() < TYPES_LIMIT);
            btf.types.push(start.ok_or(bad("too many types", at))?);
            at = end.ok_or(bad("half a type", at))?;
        }
        Ok(btf)
    }

    /// The record of a type; `None` for 0 (void) and for an id of no type.
    pub(super) fn record(&self, id: u32) -> Option<Record> {
        let index = (id as usize).checked_sub(1)?;
        self.record_at(*self.types.get(index)? as usize)
    }

    fn record_at(&self, at: usize) -> Option<Record> {
        let info = self.word(at.checked_add(4)?)?;
        Some(Record {
            name: self.word(at)?,
            kind: info >> 24 & 0x1f,
            count: info as usize & 0xffff,
            flag: info >> 31 != 0,
            size_or_type: self.word(at.checked_add(8)?)?,
            body: at.checked_add(RECORD)?,
        })
    }

    /// How many types there are.
    pub(super) fn count(&self) -> u32 {
        self.types.len() as u32
    }

    /// Whether the name that begins at `offset` is `name`.
    pub(super) fn is_named(&self, offset: u32, name: &str) -> bool {
        let names = self.bytes.get(self.names.clone()).unwrap_or_default();
        let from = names.get(offset as usize..).unwrap_or_default();
        from.strip_prefix(name.as_bytes())
            .is_some_and(|rest| rest.first() == Some(&0))
    }

    pub(super) fn word(&self, at: usize) -> Option<u32> {
        read_u32(&self.bytes, at)
    }
}

/// How many bytes follow the head of a record; `None` for a kind that is not
/// known, whose length is not known either.
fn body_size(record: &Record) -> Option<usize> {
    Some(match record.kind {
        kind::INT | kind::VAR | kind::DECL_TAG => 4,
        kind::ARRAY => 12,
        kind::STRUCT | kind::UNION | kind::DATASEC | kind::ENUM64 => 12 * record.count,
        kind::ENUM | kind::FUNC_PROTO => 8 * record.count,
        kind::PTR
        | kind::FWD
        | kind::TYPEDEF
        | kind::VOLATILE
        | kind::CONST
        | kind::RESTRICT
        | kind::FUNC
        | kind::FLOAT
        | kind::TYPE_TAG => 0,
        _ => return None,
    })
}

fn read_u32(bytes: &[u8], at: usize) -> Option<u32> {
    bytes
        .get(at..)?
        .first_chunk()
        .copied()
        .map(u32::from_le_bytes)
}
