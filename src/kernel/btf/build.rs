//! Makes BTF for tests.

use super::parse::kind;
use super::Btf;

/// Builds BTF as a linker would.
pub(crate) struct Builder {
    types: Vec<u8>,
    names: Vec<u8>,
    count: u32,
}

impl Builder {
    pub(crate) fn new() -> Self {
        Self {
            types: Vec::new(),
            names: vec![0],
            count: 0,
        }
    }

    pub(crate) fn name(&mut self, name: &str) -> u32 {
        if name.is_empty() {
            return 0;
        }
        let at = self.names.len() as u32;
        self.names.extend(name.as_bytes());
        self.names.push(0);
        at
    }

    /// Adds a type, and returns its id.
    pub(crate) fn add(&mut self, name: &str, info: u32, size_or_type: u32, body: &[u32]) -> u32 {
        let name = self.name(name);
        for word in [name, info, size_or_type].iter().chain(body) {
            self.types.extend(word.to_le_bytes());
        }
        self.count += 1;
        self.count
    }

    pub(crate) fn int(&mut self, name: &str, size: u32) -> u32 {
        self.add(name, kind::INT << 24, size, &[8 * size])
    }

    /// Members by name, type, and offset in bits.
    pub(crate) fn compound(
        &mut self,
        kind: u32,
        name: &str,
        size: u32,
        members: &[(&str, u32, u32)],
    ) -> u32 {
        let mut body = Vec::new();
        for &(name, type_id, bits) in members {
            body.extend([self.name(name), type_id, bits]);
        }
        self.add(name, kind << 24 | members.len() as u32, size, &body)
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(0x0001_eb9fu32.to_le_bytes());
        for word in [
            24,
            0,
            self.types.len() as u32,
            self.types.len() as u32,
            self.names.len() as u32,
        ] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(&self.types);
        bytes.extend(&self.names);
        bytes
    }

    pub(crate) fn parse(&self) -> Btf {
        Btf::parse(self.bytes()).expect("BTF")
    }
}

impl Builder {
    /// A structure, its members as for [`Builder::compound`].
    pub(crate) fn structure(&mut self, name: &str, size: u32, members: &[(&str, u32, u32)]) {
        self.compound(kind::STRUCT, name, size, members);
    }

    /// A structure of words: each field's name, offset and size in bytes.
    pub(crate) fn words(&mut self, name: &str, size: u32, fields: &[(&str, u32, u32)]) -> u32 {
        let members: Vec<_> = fields
            .iter()
            .map(|&(name, at, size)| (name, self.int("", size), 8 * at))
            .collect();
        self.compound(kind::STRUCT, name, size, &members)
    }
}
