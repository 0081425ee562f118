//! Reads the files of modules, which may still grow: a JSON object a line.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

use super::{ModuleNames, MODULES_LIMIT, SYMBOLS_LIMIT};
use crate::session::{SessionError, MODULES_FILE, MODULE_SYMBOLS_FILE};

/// Reads one such file, as far as it is there.
#[derive(Debug)]
pub(super) struct LineReader {
    path: PathBuf,
    /// Where the line begins that is to be read next.
    next: u64,
    /// What is read at most, bytes.
    limit: u64,
}

impl LineReader {
    /// That of the session in `dir`. Whoever wrote it wrote no more than a line
    /// past `limit`.
    pub(super) fn new(dir: &Path, name: &str, limit: u64) -> Self {
        Self {
            path: dir.join(name),
            next: 0,
            limit: 2 * limit,
        }
    }

    /// Hands over what has come since. A file that is not there has no lines; a
    /// last line that is not finished is left for the next time.
    pub(super) fn read_on<T: DeserializeOwned>(
        &mut self,
        mut take: impl FnMut(T),
    ) -> Result<(), SessionError> {
        let path = &self.path;
        let io = |cause| SessionError::io("read", path)(cause);
        let mut file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(io(error)),
        };
        file.seek(SeekFrom::Start(self.next)).map_err(io)?;
        let mut file = BufReader::new(file.take(self.limit.saturating_sub(self.next)));
        let mut line = Vec::new();
        loop {
            line.clear();
            file.read_until(b'\n', &mut line).map_err(io)?;
            if line.last() != Some(&b'\n') {
                return Ok(());
            }
            take(
                serde_json::from_slice(&line).map_err(|cause| SessionError::Meta {
                    path: path.clone(),
                    cause,
                })?,
            );
            self.next += line.len() as u64;
        }
    }
}

/// Reads what a session has of its guest's modules into names, also while it
/// grows.
#[derive(Debug)]
pub struct ModulesReader {
    lists: LineReader,
    symbols: LineReader,
}

impl ModulesReader {
    /// Of the session in `dir`. Nothing is read yet.
    pub fn new(dir: &Path) -> Self {
        Self {
            lists: LineReader::new(dir, MODULES_FILE, MODULES_LIMIT),
            symbols: LineReader::new(dir, MODULE_SYMBOLS_FILE, SYMBOLS_LIMIT),
        }
    }

    /// Adds to `names` what has come since.
    ///
    /// # Errors
    /// If a file cannot be read or understood.
    pub fn read_on(&mut self, names: &ModuleNames) -> Result<(), SessionError> {
        self.lists.read_on(|look| names.list(&look))?;
        self.symbols.read_on(|symbols| names.symbols(symbols))
    }
}
