//! From names to offsets, sizes and constants.

use super::parse::{kind, Record};
use super::{Btf, BtfError, SIZE_LIMIT};

/// How many types and members one question may look at. The largest
/// structure that is asked for, `task_struct`, has some 250 members.
const BUDGET: u32 = 20_000;
/// How deep anonymous structures, arrays and typedefs are followed.
const DEPTH_LIMIT: u32 = 32;

/// A structure of the kernel.
#[derive(Clone, Copy, Debug)]
pub struct Structure<'b> {
    btf: &'b Btf,
    record: Record,
    name: &'b str,
}

/// A field of a [`Structure`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// Bytes from the beginning of the structure.
    pub offset: u32,
    /// Its size in bytes.
    pub size: u32,
}

/// A field while it is looked for.
#[derive(Clone, Copy)]
struct Found {
    offset: u32,
    type_id: u32,
}

/// What a question may still cost.
struct Budget(u32);

impl Budget {
    fn spend(&mut self) -> Option<()> {
        self.0 = self.0.checked_sub(1)?;
        Some(())
    }
}

impl Btf {
    /// The structure called `name`.
    ///
    /// # Errors
    /// [`BtfError::Unknown`] if the kernel has none.
    pub fn structure<'b>(&'b self, name: &'b str) -> Result<Structure<'b>, BtfError> {
        let mut records = (1..=self.count()).filter_map(|id| self.record(id));
        let record = records
            .find(|record| record.kind == kind::STRUCT && self.is_named(record.name, name))
            .ok_or_else(|| BtfError::Unknown(format!("struct {name}")))?;
        Ok(Structure {
            btf: self,
            record,
            name,
        })
    }

    /// The value of `constant` in `enum name`.
    ///
    /// # Errors
    /// [`BtfError::Unknown`] if the kernel has none.
    pub fn constant(&self, name: &str, constant: &str) -> Result<u32, BtfError> {
        let mut budget = Budget(BUDGET);
        (1..=self.count())
            .filter_map(|id| self.record(id))
            .filter(|record| record.kind == kind::ENUM && self.is_named(record.name, name))
            .find_map(|record| self.value(&record, constant, &mut budget))
            .ok_or_else(|| BtfError::Unknown(format!("{constant} in its enum {name}")))
    }

    fn value(&self, record: &Record, constant: &str, budget: &mut Budget) -> Option<u32> {
        (0..record.count)
            .map_while(|index| budget.spend().map(|()| record.body + 8 * index))
            .find(|&at| {
                self.word(at)
                    .is_some_and(|name| self.is_named(name, constant))
            })
            .and_then(|at| self.word(at + 4))
    }

    /// Looks for a member by its name, also in the members without a name.
    fn member(
        &self,
        record: &Record,
        name: &str,
        base: u32,
        depth: u32,
        budget: &mut Budget,
    ) -> Option<Found> {
        let depth = depth.checked_sub(1)?;
        for index in 0..record.count {
            budget.spend()?;
            let at = record.body + 12 * index;
            let (member, type_id, place) = (self.word(at)?, self.word(at + 4)?, self.word(at + 8)?);
            // With the flag, the upper 8 bits are the size of a bit field.
            let (bits, bit_field) = if record.flag {
                (place & 0xff_ffff, place >> 24 != 0)
            } else {
                (place, false)
            };
            let offset = base.checked_add(bits / 8).filter(|&at| at < SIZE_LIMIT);
            if self.is_named(member, name) {
                // What does not fill bytes has no offset in bytes.
                let whole = !bit_field && bits % 8 == 0;
                let offset = offset.filter(|_| whole)?;
                return Some(Found { offset, type_id });
            }
            let anonymous = member == 0 || self.is_named(member, "");
            if let (true, Some(offset)) = (anonymous, offset) {
                let inner = self.resolved(type_id, budget);
                let inner = inner.filter(is_compound);
                let found =
                    inner.and_then(|inner| self.member(&inner, name, offset, depth, budget));
                if found.is_some() {
                    return found;
                }
            }
        }
        None
    }

    /// The type behind typedefs and qualifiers.
    fn resolved(&self, mut id: u32, budget: &mut Budget) -> Option<Record> {
        for _ in 0..DEPTH_LIMIT {
            budget.spend()?;
            let record = self.record(id)?;
            match record.kind {
                kind::TYPEDEF | kind::VOLATILE | kind::CONST | kind::RESTRICT | kind::TYPE_TAG => {
                    id = record.size_or_type
                }
                _ => return Some(record),
            }
        }
        None
    }

    /// The size of a type in bytes.
    fn size(&self, id: u32, depth: u32, budget: &mut Budget) -> Option<u32> {
        let record = self.resolved(id, budget)?;
        let size = match record.kind {
            kind::INT | kind::STRUCT | kind::UNION | kind::ENUM | kind::ENUM64 | kind::FLOAT => {
                record.size_or_type
            }
            kind::PTR => 8,
            kind::ARRAY => {
                let element = self.word(record.body)?;
                let count = self.word(record.body + 8)?;
                let depth = depth.checked_sub(1)?;
                self.size(element, depth, budget)?.checked_mul(count)?
            }
            _ => return None,
        };
        (size <= SIZE_LIMIT).then_some(size)
    }
}

impl Structure<'_> {
    /// How long it is, bytes.
    ///
    /// # Errors
    /// [`BtfError::Unknown`] if it claims an impossible size.
    pub fn size(&self) -> Result<u32, BtfError> {
        let size = self.record.size_or_type;
        if size > SIZE_LIMIT {
            return Err(BtfError::Unknown(format!("possible size of {}", self.name)));
        }
        Ok(size)
    }

    /// The field at `path`: its name, or names of fields in fields, with dots
    /// between them (`array_buffer.buffer`). Members without a name are looked
    /// into, pointers are not followed.
    ///
    /// # Errors
    /// [`BtfError::Unknown`] if there is none, or it is a bit field.
    pub fn field(&self, path: &str) -> Result<Field, BtfError> {
        self.find(path)
            .ok_or_else(|| BtfError::Unknown(format!("field {path} in its struct {}", self.name)))
    }

    /// Like [`Structure::field`], for the first of several paths that exists:
    /// for what kernels call or place differently.
    ///
    /// # Errors
    /// [`BtfError::Unknown`] if there is none of them.
    pub fn field_of_any(&self, paths: &[&str]) -> Result<Field, BtfError> {
        let found = paths.iter().find_map(|path| self.find(path));
        found.ok_or_else(|| {
            let paths = paths.join(" or ");
            BtfError::Unknown(format!("field {paths} in its struct {}", self.name))
        })
    }

    fn find(&self, path: &str) -> Option<Field> {
        let mut budget = Budget(BUDGET);
        let mut inside = self.record;
        let mut offset = 0;
        let mut steps = path.split('.').peekable();
        while let Some(name) = steps.next().filter(|name| !name.is_empty()) {
            let found = self
                .btf
                .member(&inside, name, offset, DEPTH_LIMIT, &mut budget)?;
            offset = found.offset;
            if steps.peek().is_none() {
                let size = self.btf.size(found.type_id, DEPTH_LIMIT, &mut budget)?;
                return Some(Field { offset, size });
            }
            inside = self.btf.resolved(found.type_id, &mut budget)?;
            if !is_compound(&inside) {
                return None;
            }
        }
        None
    }
}

fn is_compound(record: &Record) -> bool {
    matches!(record.kind, kind::STRUCT | kind::UNION)
}
