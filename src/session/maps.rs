//! The symbols that a session is read with: a System.map for each kernel that
//! booted in it.
//!
//! A guest may reboot into another kernel while it is traced. So each boot says
//! which symbols are its own, by a digest of the text, and two boots of one
//! kernel share a file. What is written are the symbols that were compared with
//! the kernel in memory, and not a file that they were once read from. What is
//! read is compared with its digest: wrong symbols give wrong names, and
//! nothing else would show it.

use std::fmt;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::SessionError;
use crate::kernel::Symbols;

/// How much of a SHA-256 is enough to tell maps apart, bytes.
const DIGEST: usize = 20;

/// Which of a session's symbols: a digest of their text, in hex.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, Hash)]
#[serde(try_from = "String")]
pub struct MapId(String);

impl MapId {
    fn of(text: &[u8]) -> Self {
        let digest = Sha256::digest(text);
        let bytes = digest.iter().take(DIGEST);
        Self(bytes.map(|byte| format!("{byte:02x}")).collect())
    }

    /// The file that they lie in, in the session's directory.
    pub fn file(&self, dir: &Path) -> PathBuf {
        dir.join(format!("System.map-{self}"))
    }
}

/// A session's directory may be somebody else's: what becomes part of a path
/// is looked at.
impl TryFrom<String> for MapId {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let hex = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        if text.len() == 2 * DIGEST && text.bytes().all(hex) {
            Ok(Self(text))
        } else {
            Err("'symbols' of a boot is no digest of 40 hexadecimal digits")
        }
    }
}

impl fmt::Display for MapId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The symbols of a kernel that runs at `slide`, as a System.map, whatever they were
/// read from: text that can be read anywhere.
pub(super) fn text(symbols: &Symbols, slide: u64) -> std::io::Result<(MapId, Vec<u8>)> {
    let mut text = Vec::new();
    symbols.write_map(&mut text, slide)?;
    Ok((MapId::of(&text), text))
}

/// Puts such a text into `dir`, unless it is there.
pub(super) fn put(dir: &Path, id: &MapId, text: &[u8]) -> Result<(), SessionError> {
    let path = id.file(dir);
    if path.exists() {
        return Ok(());
    }
    // Whole or not there, for the helper may be killed; for root's eyes only,
    // as temporary files are.
    let failed = || SessionError::io("write", &path);
    let mut file = tempfile::NamedTempFile::new_in(dir).map_err(failed())?;
    file.write_all(text).map_err(failed())?;
    file.as_file().sync_data().map_err(failed())?;
    file.persist(&path).map_err(|error| failed()(error.error))?;
    Ok(())
}

/// The maps of a session that were read so far. More come while somebody reads
/// it, when a guest that is followed boots another kernel; what was lent out
/// stays where it is.
#[derive(Debug, Default)]
pub(super) struct Maps(OnceLock<Box<Map>>);

#[derive(Debug)]
struct Map {
    id: MapId,
    symbols: Symbols,
    next: Maps,
}

impl Maps {
    /// The symbols called `id`, which lie in `dir` if they were not read yet.
    pub(super) fn get(&self, dir: &Path, id: &MapId) -> Result<&Symbols, SessionError> {
        let mut maps = self;
        while let Some(map) = maps.0.get() {
            if map.id == *id {
                return Ok(&map.symbols);
            }
            maps = &map.next;
        }
        let map = Map {
            id: id.clone(),
            symbols: load(dir, id)?,
            next: Self::default(),
        };
        // Were another thread faster, its map and not this one is next.
        if maps.0.set(Box::new(map)).is_ok() {
            if let Some(map) = maps.0.get() {
                return Ok(&map.symbols);
            }
        }
        maps.get(dir, id)
    }
}

fn load(dir: &Path, id: &MapId) -> Result<Symbols, SessionError> {
    let path = id.file(dir);
    let text = Symbols::read(&path)?;
    if MapId::of(&text) != *id {
        return Err(SessionError::MapChanged(path));
    }
    Ok(Symbols::parse_file(&path, text)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAP: &str = "ffffffff81000000 T _text\nffffffff81000000 T _stext\n\
        ffffffff81001000 T one\nffffffff81002000 T _etext\n";

    fn symbols(name: &str) -> Symbols {
        Symbols::parse(MAP.replace("one", name).into()).unwrap()
    }

    fn store(dir: &Path, symbols: &Symbols) -> MapId {
        let (id, text) = text(symbols, 0).unwrap();
        put(dir, &id, &text).unwrap();
        id
    }

    #[test]
    fn one_kernel_is_stored_once_and_another_besides() {
        let dir = tempfile::tempdir().unwrap();
        let one = store(dir.path(), &symbols("one"));
        assert_eq!(store(dir.path(), &symbols("one")), one);
        let two = store(dir.path(), &symbols("two"));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
        let maps = Maps::default();
        for (id, name) in [(&one, "one"), (&two, "two"), (&one, "one")] {
            let found = maps.get(dir.path(), id).unwrap();
            assert!(found.address(name).is_some(), "{name}");
        }
    }

    #[test]
    fn a_map_that_was_changed_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let id = store(dir.path(), &symbols("one"));
        let text = MAP.replace("one", "two");
        std::fs::write(id.file(dir.path()), text).unwrap();
        let error = Maps::default().get(dir.path(), &id).unwrap_err();
        assert!(matches!(error, SessionError::MapChanged(_)), "{error}");
        assert!(error.to_string().contains(&id.to_string()), "{error}");
    }

    #[test]
    fn nothing_but_a_digest_becomes_part_of_a_path() {
        let digest = "0123456789abcdef0123456789abcdef01234567";
        assert!(MapId::try_from(digest.to_owned()).is_ok());
        for wrong in [
            "",
            "../../../../etc/passwd",
            &digest[1..],
            &digest.replace('a', "/"),
        ] {
            let json = serde_json::to_string(wrong).unwrap();
            let error = serde_json::from_str::<MapId>(&json).unwrap_err();
            assert!(error.to_string().contains("no digest"), "{error}");
        }
    }
}
