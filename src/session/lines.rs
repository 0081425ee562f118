//! A file that a guest can make grow, a JSON object a line.

use std::path::Path;

use serde::Serialize;

use super::disk::{open_lines, LinesFile, Work};
use super::SessionError;

/// How far such a file has grown.
#[derive(Debug)]
pub(super) struct Lines {
    file: LinesFile,
    /// Bytes of it.
    size: u64,
    /// What it may come to: a line that passes it is the last but one.
    limit: u64,
}

impl Lines {
    /// Begins a file of the session in `dir`, or goes on with it.
    pub(super) fn open(dir: &Path, file: LinesFile, limit: u64) -> Result<Self, SessionError> {
        let path = file.path(dir);
        let size = open_lines(&path)
            .and_then(|file| file.metadata())
            .map_err(SessionError::io("open", &path))?
            .len();
        Ok(Self { file, size, limit })
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    pub(super) fn is_full(&self) -> bool {
        self.size >= self.limit
    }

    /// A line to be written, and where that fills the file, `last` behind it. Of a file
    /// that is full, nothing.
    pub(super) fn note<T: Serialize>(
        &mut self,
        line: &T,
        last: &T,
    ) -> Result<Option<Work>, SessionError> {
        if self.is_full() {
            return Ok(None);
        }
        let mut bytes = self.line(line)?;
        if self.is_full() {
            bytes.extend(self.line(last)?);
        }
        Ok(Some(Work::Lines(self.file, bytes)))
    }

    fn line(&mut self, value: &impl Serialize) -> Result<Vec<u8>, SessionError> {
        let mut line = serde_json::to_vec(value)
            .map_err(std::io::Error::from)
            .map_err(SessionError::io("write", self.file.path(Path::new(""))))?;
        line.push(b'\n');
        self.size += line.len() as u64;
        Ok(line)
    }
}
