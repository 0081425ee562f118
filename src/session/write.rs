//! Writes a session while the guest runs.

use std::collections::HashMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::kernel::Symbols;
use crate::ring::Chunk;

use super::store::{ChunkReader, ChunkWriter};
use super::{maps, Finding, FindingKind, MapId, Meta, SessionError, FINDINGS_FILE};

/// How large `findings.jsonl` may become, bytes: a guest can change its keys as
/// often as it likes.
const FINDINGS_LIMIT: u64 = 4 << 20;

/// A session that grows.
#[derive(Debug)]
pub struct SessionWriter {
    dir: PathBuf,
    /// What it is; [`SessionWriter::save`] writes it.
    pub meta: Meta,
    chunks: HashMap<u16, ChunkWriter>,
    findings: Findings,
    /// Bytes of ring files.
    size: u64,
}

impl SessionWriter {
    /// Makes the directory `dir` of a new session, for root's eyes only.
    ///
    /// # Errors
    /// If it is there already or cannot be written.
    pub fn create(dir: &Path, meta: Meta) -> Result<Self, SessionError> {
        let private = |path: &Path| {
            DirBuilder::new()
                .mode(0o700)
                .create(path)
                .map_err(SessionError::io("create", path))
        };
        private(dir)?;
        private(&dir.join("ring"))?;
        let writer = Self::open(dir, meta)?;
        writer.save()?;
        Ok(writer)
    }

    /// Goes on with the session in `dir`, whose helper has gone.
    ///
    /// # Errors
    /// If it cannot be understood or written.
    pub fn resume(dir: &Path) -> Result<Self, SessionError> {
        let meta = Meta::load(dir)?;
        let mut writer = Self::open(dir, meta)?;
        for entry in fs::read_dir(dir.join("ring")).map_err(SessionError::io("read", dir))? {
            let entry = entry.map_err(SessionError::io("read", dir))?;
            writer.size += entry.metadata().map_or(0, |file| file.len());
        }
        Ok(writer)
    }

    fn open(dir: &Path, meta: Meta) -> Result<Self, SessionError> {
        let path = dir.join(FINDINGS_FILE);
        let findings = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(&path)
            .map_err(SessionError::io("open", path))?;
        Ok(Self {
            dir: dir.to_owned(),
            meta,
            chunks: HashMap::new(),
            findings: Findings::new(findings, dir)?,
            size: 0,
        })
    }

    /// Where it lies.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// How large its ring files are, bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Where reading stopped in the newest boot: the last chunk of each CPU
    /// that left something.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn last_chunks(&self) -> Result<Vec<Chunk>, SessionError> {
        let Some(boot) = self.meta.boots.last() else {
            return Ok(Vec::new());
        };
        let mut all = Vec::new();
        for cpu in 0..boot.nr_cpus.min(u32::from(u16::MAX)) as u16 {
            let Some(mut chunks) = ChunkReader::open(&self.dir, boot.number, cpu)? else {
                continue;
            };
            let mut last = None;
            while let Some(chunk) = chunks.next_chunk()? {
                last = Some(chunk);
            }
            all.extend(last);
        }
        Ok(all)
    }

    /// Begins the next boot: its chunks go to files of their own.
    ///
    /// # Errors
    /// If what is buffered cannot be written.
    pub fn next_boot(&mut self) -> Result<(), SessionError> {
        self.flush()?;
        self.chunks.clear();
        Ok(())
    }

    /// Keeps the symbols of a kernel that runs at `slide`, for its boot to
    /// name.
    ///
    /// # Errors
    /// If they cannot be written.
    pub fn store_symbols(&self, symbols: &Symbols, slide: u64) -> Result<MapId, SessionError> {
        maps::store(&self.dir, symbols, slide)
    }

    /// Stores a chunk of the newest boot.
    ///
    /// # Errors
    /// If it cannot be written; the caller has the reader note the gap
    /// ([`crate::ring::Gap::DiskFull`]).
    pub fn append(&mut self, chunk: &Chunk) -> Result<(), SessionError> {
        let boot = self.meta.boots.last().map_or(1, |boot| boot.number);
        let writer = match self.chunks.entry(chunk.cpu) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => {
                entry.insert(ChunkWriter::open(&self.dir, boot, chunk.cpu)?)
            }
        };
        match writer.append(chunk, wall_ns()) {
            Ok(bytes) => {
                self.size += bytes;
                Ok(())
            }
            Err(error) => {
                // What was half written is cut off when it is opened again.
                self.chunks.remove(&chunk.cpu);
                Err(error)
            }
        }
    }

    /// Hands what is buffered to the operating system.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn flush(&mut self) -> Result<(), SessionError> {
        self.chunks.values_mut().try_for_each(ChunkWriter::flush)
    }

    /// Notes what the guest was caught at, as far as the file may grow.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn finding(&mut self, finding: &Finding) -> Result<(), SessionError> {
        self.findings.note(finding)
    }

    /// Writes `session.json`.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn save(&self) -> Result<(), SessionError> {
        self.meta.save(&self.dir)
    }
}

/// `findings.jsonl`, which takes no more than [`FINDINGS_LIMIT`].
#[derive(Debug)]
struct Findings {
    file: File,
    path: PathBuf,
    /// Bytes of it.
    size: u64,
}

impl Findings {
    /// Goes on with a file that is open for appending.
    fn new(file: File, dir: &Path) -> Result<Self, SessionError> {
        let path = dir.join(FINDINGS_FILE);
        let size = file
            .metadata()
            .map_err(SessionError::io("look at", &path))?
            .len();
        Ok(Self { file, path, size })
    }

    fn note(&mut self, finding: &Finding) -> Result<(), SessionError> {
        if self.size >= FINDINGS_LIMIT {
            return Ok(());
        }
        self.write(finding)?;
        if self.size >= FINDINGS_LIMIT {
            self.write(&Finding {
                wall_ns: finding.wall_ns,
                kind: FindingKind::Full,
            })?;
        }
        Ok(())
    }

    fn write(&mut self, finding: &Finding) -> Result<(), SessionError> {
        let mut line = serde_json::to_vec(finding)
            .map_err(std::io::Error::from)
            .map_err(SessionError::io("write", &self.path))?;
        line.push(b'\n');
        self.file
            .write_all(&line)
            .map_err(SessionError::io("write", &self.path))?;
        self.size += line.len() as u64;
        Ok(())
    }
}

/// The host's wall clock, nanoseconds since 1970.
fn wall_ns() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |time| time.as_nanos() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn findings_end_with_a_line_that_says_so() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = || {
            OpenOptions::new()
                .append(true)
                .create(true)
                .open(dir.path().join(FINDINGS_FILE))
                .expect("a file")
        };
        let finding = Finding {
            wall_ns: 1,
            kind: FindingKind::TracerOff,
        };
        let mut findings = Findings::new(file(), dir.path()).expect("a beginning");
        for _ in 0..FINDINGS_LIMIT / 20 {
            findings.note(&finding).expect("a line");
        }
        // Also where another helper goes on with the file.
        let mut findings = Findings::new(file(), dir.path()).expect("a beginning");
        findings.note(&finding).expect("nothing");
        let text = fs::read_to_string(dir.path().join(FINDINGS_FILE)).expect("the file");
        assert!((FINDINGS_LIMIT..FINDINGS_LIMIT + 200).contains(&(text.len() as u64)));
        let full: Vec<_> = text.lines().filter(|line| line.contains("full")).collect();
        assert_eq!(full, [r#"{"wall_ns":1,"finding":"full"}"#]);
        assert_eq!(text.lines().next_back(), full.first().copied());
    }
}
