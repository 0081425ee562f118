//! Writes a session while the guest runs.

use std::collections::HashMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::kernel::Symbols;
use crate::ring::Chunk;

use super::modules::{MODULES_LIMIT, SYMBOLS_LIMIT};
use super::store::{ChunkReader, ChunkWriter};
use super::{
    maps, Finding, FindingKind, MapId, Meta, ModuleHistory, ModuleLook, ModuleSymbols,
    SessionError, FINDINGS_FILE, MODULES_FILE, MODULE_SYMBOLS_FILE,
};

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
    findings: Lines,
    modules: Lines,
    module_symbols: Lines,
    /// The number that the load of a module had last.
    last_load: u32,
    /// Bytes of ring files.
    size: u64,
    /// Bytes of `session.json`, as it was saved last.
    meta_size: u64,
    /// What all of these may come to.
    limit: u64,
    /// Something was refused for the limit's sake.
    full: bool,
    /// Bytes of ring files that were taken and could not be written after all.
    unstored: u64,
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
        let mut writer = Self::open(dir, meta)?;
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
        writer.last_load = ModuleHistory::load(dir)?.last_load();
        for entry in fs::read_dir(dir.join("ring")).map_err(SessionError::io("read", dir))? {
            let entry = entry.map_err(SessionError::io("read", dir))?;
            writer.size += entry.metadata().map_or(0, |file| file.len());
        }
        Ok(writer)
    }

    fn open(dir: &Path, meta: Meta) -> Result<Self, SessionError> {
        Ok(Self {
            dir: dir.to_owned(),
            meta,
            chunks: HashMap::new(),
            findings: Lines::open(dir, FINDINGS_FILE, FINDINGS_LIMIT)?,
            modules: Lines::open(dir, MODULES_FILE, MODULES_LIMIT)?,
            module_symbols: Lines::open(dir, MODULE_SYMBOLS_FILE, SYMBOLS_LIMIT)?,
            last_load: 0,
            size: 0,
            meta_size: 0,
            limit: u64::MAX,
            full: false,
            unstored: 0,
        })
    }

    /// Where it lies.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// How large it is, bytes: what grows with the trace, so without the
    /// symbols and the keys.
    pub fn size(&self) -> u64 {
        self.size
            + self.meta_size
            + self.findings.size
            + self.modules.size
            + self.module_symbols.size
    }

    /// Sets how large it may become, bytes.
    pub fn set_limit(&mut self, limit: u64) {
        self.limit = limit;
    }

    /// Whether it has no room for what is to be stored.
    pub fn is_full(&self) -> bool {
        self.full || self.size() > self.limit
    }

    /// Bytes of chunks that were taken, and could not be written when their
    /// time came, or cannot now.
    pub fn unstored(&self) -> u64 {
        self.unstored
    }

    /// Writes what is buffered as far as it can be. What cannot is given up.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn finish(&mut self) -> Result<(), SessionError> {
        let mut result = Ok(());
        for (_, mut chunks) in self.chunks.drain() {
            if let Err(error) = chunks.flush() {
                self.unstored += chunks.buffered();
                result = Err(error);
            }
        }
        result
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
    /// If it cannot be written, or would make the session larger than it may
    /// become; the caller marks the CPU's next chunk
    /// ([`crate::ring::Gap::DiskFull`]).
    pub fn append(&mut self, chunk: &Chunk) -> Result<(), SessionError> {
        if self.is_full() || self.size() + ChunkWriter::size_of(chunk) > self.limit {
            self.full = true;
            return Err(SessionError::Full { limit: self.limit });
        }
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
                self.unstored += writer.buffered();
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
        let full = Finding {
            wall_ns: finding.wall_ns,
            kind: FindingKind::Full,
        };
        self.findings.note(finding, &full)
    }

    /// Notes the guest's list of modules, as far as the file may grow; whether it
    /// was noted. The last line says that nothing is known from there on.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn modules(&mut self, look: &ModuleLook) -> Result<bool, SessionError> {
        let unknown = ModuleLook {
            modules: None,
            ..look.clone()
        };
        self.modules.note(look, &unknown)?;
        Ok(!self.modules.is_full())
    }

    /// A number for the load of a module: see [`super::Listed::load`].
    pub fn new_load(&mut self) -> u32 {
        self.last_load = self.last_load.saturating_add(1);
        self.last_load
    }

    /// Notes what a module says its functions are called, as far as the file may
    /// grow; whether it was noted. The last line says that no more are.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn module_symbols(&mut self, symbols: &ModuleSymbols) -> Result<bool, SessionError> {
        self.module_symbols.note(symbols, &ModuleSymbols::full())?;
        Ok(!self.module_symbols.is_full())
    }

    /// Writes `session.json`.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn save(&mut self) -> Result<(), SessionError> {
        self.meta_size = self.meta.save(&self.dir)?;
        Ok(())
    }
}

/// A file that a guest can make grow, a JSON object a line.
#[derive(Debug)]
struct Lines {
    file: File,
    path: PathBuf,
    /// Bytes of it.
    size: u64,
    /// What it may come to: a line that passes it is the last but one.
    limit: u64,
}

impl Lines {
    /// Begins a file of the session, or goes on with it.
    fn open(dir: &Path, name: &str, limit: u64) -> Result<Self, SessionError> {
        let path = dir.join(name);
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(&path)
            .map_err(SessionError::io("open", &path))?;
        let size = file
            .metadata()
            .map_err(SessionError::io("look at", &path))?
            .len();
        Ok(Self {
            file,
            path,
            size,
            limit,
        })
    }

    fn is_full(&self) -> bool {
        self.size >= self.limit
    }

    /// Writes a line, and where that fills the file, `last` behind it. Of a file
    /// that is full, nothing becomes of it.
    fn note<T: Serialize>(&mut self, line: &T, last: &T) -> Result<(), SessionError> {
        if self.is_full() {
            return Ok(());
        }
        self.write(line)?;
        if self.is_full() {
            self.write(last)?;
        }
        Ok(())
    }

    fn write(&mut self, value: &impl Serialize) -> Result<(), SessionError> {
        let mut line = serde_json::to_vec(value)
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

    fn meta() -> Meta {
        Meta {
            version: 1,
            domain: "web1".to_owned(),
            uuid: uuid::Uuid::nil(),
            mode: super::super::Mode::Keyed,
            state: super::super::State::Open,
            qemu: super::super::QemuProcess {
                pid: 1,
                start_time: 1,
            },
            started_ns: 0,
            ended_ns: None,
            end: None,
            interval_ns: 1,
            switches: Vec::new(),
            boots: Vec::new(),
            counters: Default::default(),
            guest_counts: None,
        }
    }

    #[test]
    fn a_session_grows_to_its_limit_and_no_further() {
        const LIMIT: u64 = 100_000;
        let parent = tempfile::tempdir().expect("a directory");
        let dir = parent.path().join("session");
        let mut writer = SessionWriter::create(&dir, meta()).expect("a session");
        writer.set_limit(LIMIT);
        let chunk = |cpu| Chunk {
            cpu,
            page_time: 1,
            offset: 0,
            bytes: vec![7; 4000],
            gap: None,
        };
        let taken = (0..1000).filter(|at| writer.append(&chunk(at % 3)).is_ok());
        let taken = taken.count();
        assert!(matches!(
            writer.append(&chunk(0)),
            Err(SessionError::Full { limit: LIMIT })
        ));
        assert!(writer.is_full());
        writer.finish().expect("written");
        let length = |path: &Path| fs::metadata(path).expect("a file").len();
        let ring = fs::read_dir(dir.join("ring")).expect("files").flatten();
        let ring: u64 = ring.map(|file| length(&file.path())).sum();
        let all = ring + length(&dir.join(super::super::META_FILE));
        assert!((LIMIT - 8000..=LIMIT).contains(&all), "{all}");
        assert!(taken >= 23, "{taken}");
        // Also for the helper that goes on with it, and for what else grows.
        let mut writer = SessionWriter::resume(&dir).expect("the session");
        writer.set_limit(LIMIT - 8000);
        assert!(writer.is_full());
        writer.set_limit(u64::MAX);
        writer.meta.domain = "x".repeat(200_000);
        writer.save().expect("saved");
        writer.set_limit(LIMIT * 2);
        assert!(writer.is_full());
    }

    #[test]
    fn what_a_guest_makes_grow_ends_with_a_line_that_says_so() {
        let parent = tempfile::tempdir().expect("a directory");
        let dir = parent.path().join("session");
        let mut writer = SessionWriter::create(&dir, meta()).expect("a session");
        let finding = Finding {
            wall_ns: 1,
            kind: FindingKind::TracerOff,
        };
        let look = ModuleLook {
            boot: 1,
            since: 5,
            unseen_since: None,
            modules: Some(Vec::new()),
        };
        let note = |writer: &mut SessionWriter| {
            writer.finding(&finding).expect("a line");
            writer.modules(&look).expect("a line")
        };
        assert!(note(&mut writer));
        let most = MODULES_LIMIT / 20;
        let grows = |_: &u64| note(&mut writer) || !writer.findings.is_full();
        assert!(((0..most).take_while(grows).count() as u64) < most);
        // Also where another helper goes on with the files.
        drop(writer);
        assert!(!note(&mut SessionWriter::resume(&dir).expect("a session")));
        for (name, limit, last) in [
            (
                FINDINGS_FILE,
                FINDINGS_LIMIT,
                r#"{"wall_ns":1,"finding":"full"}"#,
            ),
            (
                MODULES_FILE,
                MODULES_LIMIT,
                r#"{"boot":1,"since":5,"modules":null}"#,
            ),
        ] {
            let text = fs::read_to_string(dir.join(name)).expect("the file");
            assert!((limit..limit + 200).contains(&(text.len() as u64)));
            assert_eq!(text.lines().filter(|line| *line == last).count(), 1);
            assert_eq!(text.lines().next_back(), Some(last));
        }
    }
}
