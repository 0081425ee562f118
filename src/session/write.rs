//! Writes a session while the guest runs.

use std::collections::HashSet;
use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use crate::kernel::Symbols;
use crate::ring::Chunk;

use super::disk::{Disk, LinesFile, Work};
use super::lines::Lines;
use super::modules::{MODULES_LIMIT, SYMBOLS_LIMIT};
use super::store::{ChunkReader, Frame};
use super::{
    maps, Finding, FindingKind, MapId, Meta, ModuleHistory, ModuleLook, ModuleSymbols, SessionError,
};

/// How large `findings.jsonl` may become, bytes: a guest can change its keys as
/// often as it likes.
const FINDINGS_LIMIT: u64 = 4 << 20;
/// So many bytes of chunks are handed to the disk at once.
const BATCH: u64 = 1 << 20;

/// A session that grows.
///
/// A thread of its own writes the files, in the order in which they were given here;
/// what could not be written is told when it is asked for
/// ([`SessionWriter::take_trouble`], [`SessionWriter::sync`]).
#[derive(Debug)]
pub struct SessionWriter {
    dir: PathBuf,
    /// What it is; [`SessionWriter::save`] writes it.
    pub meta: Meta,
    disk: Disk,
    /// What is not handed to the disk yet.
    batch: Vec<Work>,
    batch_size: u64,
    findings: Lines,
    modules: Lines,
    module_symbols: Lines,
    /// The symbols that were handed over.
    maps: HashSet<MapId>,
    /// The number that the load of a module had last.
    last_load: u32,
    /// Bytes of ring files, with those that could not be written.
    size: u64,
    /// Bytes of `session.json`, as it was saved last.
    meta_size: u64,
    /// What all of these may come to.
    limit: u64,
    /// How many bytes may wait for the disk.
    waiting_limit: u64,
    /// Something was refused for the limit's sake.
    full: bool,
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
        writer.sync()?;
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
            disk: Disk::start(dir)?,
            batch: Vec::new(),
            batch_size: 0,
            findings: Lines::open(dir, LinesFile::Findings, FINDINGS_LIMIT)?,
            modules: Lines::open(dir, LinesFile::Modules, MODULES_LIMIT)?,
            module_symbols: Lines::open(dir, LinesFile::ModuleSymbols, SYMBOLS_LIMIT)?,
            maps: HashSet::new(),
            last_load: 0,
            size: 0,
            meta_size: 0,
            limit: u64::MAX,
            waiting_limit: u64::MAX,
            full: false,
        })
    }

    /// Where it lies.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// How large it is, bytes: what grows with the trace, so without the
    /// symbols and the keys.
    pub fn size(&self) -> u64 {
        self.size.saturating_sub(self.unstored())
            + self.meta_size
            + self.findings.size()
            + self.modules.size()
            + self.module_symbols.size()
    }

    /// Sets how large it may become, and how much of it may wait for the disk, bytes.
    pub fn set_limits(&mut self, size: u64, waiting: u64) {
        (self.limit, self.waiting_limit) = (size, waiting);
    }

    /// From now on, what comes waits for the disk, however much that is.
    pub fn wait_for_disk(&mut self) {
        self.waiting_limit = u64::MAX;
    }

    /// Whether it has no room for what is to be stored.
    pub fn is_full(&self) -> bool {
        self.full || self.size() > self.limit
    }

    /// Bytes of chunks that were taken, and could not be written when their
    /// time came.
    pub fn unstored(&self) -> u64 {
        self.disk.unstored()
    }

    /// What could not be written, or the first of it, since this was asked last.
    pub fn take_trouble(&self) -> Option<SessionError> {
        self.disk.take_trouble()
    }

    /// No more chunks of the newest boot come. What of them cannot be written is given up.
    pub fn end_boot(&mut self) {
        self.hand([Work::BootEnded]);
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
    /// If they are nothing that can be written.
    pub fn store_symbols(&mut self, symbols: &Symbols, slide: u64) -> Result<MapId, SessionError> {
        let (id, text) =
            maps::text(symbols, slide).map_err(SessionError::io("write", &self.dir))?;
        // A guest may boot as often as it likes while the disk takes nothing.
        if self.maps.insert(id.clone()) {
            self.hand([Work::Map(id.clone(), text)]);
        }
        Ok(id)
    }

    /// Takes a chunk of the newest boot, which was read at `wall_ns`, for
    /// [`SessionWriter::flush`] to hand on.
    ///
    /// # Errors
    /// If it would make the session larger than it may become, or the disk has not
    /// taken what came before it; the caller marks the CPU's next chunk
    /// ([`crate::ring::Gap::NotStored`]).
    pub fn append(&mut self, chunk: &Chunk, wall_ns: u64) -> Result<(), SessionError> {
        let frame = Frame::of(chunk, wall_ns);
        let size = frame.size();
        if self.is_full() || self.size() + size > self.limit {
            self.full = true;
            return Err(SessionError::Full { limit: self.limit });
        }
        let waiting = self.disk.waiting() + self.batch_size + Work::OVERHEAD + size;
        if waiting > self.waiting_limit {
            return Err(SessionError::Behind {
                waiting: self.waiting_limit,
            });
        }
        let boot = self.meta.boots.last().map_or(1, |boot| boot.number);
        self.size += size;
        self.batch_size += Work::OVERHEAD + size;
        self.batch.push(Work::Chunk { boot, frame });
        if self.batch_size >= BATCH {
            self.flush();
        }
        Ok(())
    }

    /// Hands all that was taken to the disk, and does not wait for it.
    pub fn flush(&mut self) {
        if !self.batch.is_empty() {
            self.disk.hand(std::mem::take(&mut self.batch));
            self.batch_size = 0;
        }
    }

    /// Waits until all that was given is in its file.
    ///
    /// # Errors
    /// What could not be written, or the first of it, that was not told yet.
    pub fn sync(&mut self) -> Result<(), SessionError> {
        let (done, told) = std::sync::mpsc::channel();
        self.hand([Work::Tell(done)]);
        // It ends after this writer, and not before, unless it panics.
        told.recv()
            .map_err(|_| std::io::Error::other("the thread that writes it has ended"))
            .map_err(SessionError::io("write", &self.dir))?;
        self.take_trouble().map_or(Ok(()), Err)
    }

    fn hand(&mut self, work: impl IntoIterator<Item = Work>) {
        self.batch.extend(work);
        self.flush();
    }

    /// Notes what the guest was caught at, as far as the file may grow.
    ///
    /// # Errors
    /// If it is nothing that can be written.
    pub fn finding(&mut self, finding: &Finding) -> Result<(), SessionError> {
        let full = Finding {
            wall_ns: finding.wall_ns,
            kind: FindingKind::Full,
        };
        let work = self.findings.note(finding, &full)?;
        self.hand(work);
        Ok(())
    }

    /// Notes the guest's list of modules, as far as the file may grow; whether it
    /// was noted. The last line says that nothing is known from there on.
    ///
    /// # Errors
    /// If it is nothing that can be written.
    pub fn modules(&mut self, look: &ModuleLook) -> Result<bool, SessionError> {
        let unknown = ModuleLook {
            modules: None,
            ..look.clone()
        };
        let work = self.modules.note(look, &unknown)?;
        self.hand(work);
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
    /// If it is nothing that can be written.
    pub fn module_symbols(&mut self, symbols: &ModuleSymbols) -> Result<bool, SessionError> {
        let work = self.module_symbols.note(symbols, &ModuleSymbols::full())?;
        self.hand(work);
        Ok(!self.module_symbols.is_full())
    }

    /// Writes `session.json` as it is now.
    ///
    /// # Errors
    /// If it is nothing that can be written.
    pub fn save(&mut self) -> Result<(), SessionError> {
        let text = self.meta.text(&self.dir)?;
        self.meta_size = text.len() as u64;
        self.hand([Work::Meta(text)]);
        Ok(())
    }

    /// Whether a `session.json` still waits to be written.
    pub fn is_saving(&self) -> bool {
        self.disk.has_meta()
    }
}

#[cfg(test)]
mod tests {
    use super::super::{FINDINGS_FILE, MODULES_FILE};
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
        writer.set_limits(LIMIT, u64::MAX);
        let chunk = |cpu| Chunk {
            cpu,
            page_time: 1,
            offset: 0,
            bytes: vec![7; 4000],
            gap: None,
        };
        let taken = (0..1000).filter(|at| writer.append(&chunk(at % 3), 0).is_ok());
        let taken = taken.count();
        assert!(matches!(
            writer.append(&chunk(0), 0),
            Err(SessionError::Full { limit: LIMIT })
        ));
        assert!(writer.is_full());
        writer.end_boot();
        writer.sync().expect("written");
        let length = |path: &Path| fs::metadata(path).expect("a file").len();
        let ring = fs::read_dir(dir.join("ring")).expect("files").flatten();
        let ring: u64 = ring.map(|file| length(&file.path())).sum();
        let all = ring + length(&dir.join(super::super::META_FILE));
        assert!((LIMIT - 8000..=LIMIT).contains(&all), "{all}");
        assert!(taken >= 23, "{taken}");
        // Also for the helper that goes on with it, and for what else grows.
        let mut writer = SessionWriter::resume(&dir).expect("the session");
        writer.set_limits(LIMIT - 8000, u64::MAX);
        assert!(writer.is_full());
        writer.set_limits(u64::MAX, u64::MAX);
        writer.meta.domain = "x".repeat(200_000);
        writer.save().expect("saved");
        writer.set_limits(LIMIT * 2, u64::MAX);
        assert!(writer.is_full());
    }

    fn of_one(cpu: u16, fill: u8) -> Chunk {
        Chunk {
            cpu,
            page_time: 1,
            offset: 0,
            bytes: vec![fill; 4000],
            gap: None,
        }
    }

    fn stored(writer: &SessionWriter, cpu: u16) -> Vec<Chunk> {
        let reader = ChunkReader::open(writer.dir(), 1, cpu).expect("a file");
        let mut reader = reader.expect("a file");
        std::iter::from_fn(move || reader.next_chunk().expect("a chunk")).collect()
    }

    /// A named pipe lets nobody open it to write before somebody reads.
    #[test]
    fn a_slow_disk_is_not_waited_for_and_what_comes_on_top_is_refused() {
        const WAITING: u64 = 50_000;
        let parent = tempfile::tempdir().expect("a directory");
        let dir = parent.path().join("session");
        let mut writer = SessionWriter::create(&dir, meta()).expect("a session");
        writer.set_limits(u64::MAX, WAITING);
        let pipe = dir.join(FINDINGS_FILE);
        fs::remove_file(&pipe).expect("the file");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
        let finding = Finding {
            wall_ns: 1,
            kind: FindingKind::TracerOff,
        };
        writer.finding(&finding).expect("it waits");
        let mut taken = 0;
        let refused = loop {
            match writer.append(&of_one(1, 7), 0) {
                Ok(()) => taken += 1,
                Err(error) => break error,
            }
            writer.flush();
        };
        assert!(matches!(refused, SessionError::Behind { waiting: WAITING }));
        assert_eq!(
            taken,
            (WAITING - Work::OVERHEAD - 60) / (Work::OVERHEAD + 4032)
        );
        assert!(!writer.is_saving());
        writer.save().expect("it waits");
        assert!(writer.is_saving());
        // What was refused is no part of the size that it may have.
        assert!(!writer.is_full());
        assert!((taken * 4032..taken * 4032 + 4000).contains(&writer.size()));
        assert!(!dir.join("ring/boot1-cpu1").exists());

        let reader = fs::File::open(&pipe).expect("the pipe");
        let told = writer.sync().expect_err("no file to go on with");
        assert!(told.to_string().contains(FINDINGS_FILE), "{told}");
        drop(reader);
        assert!(!writer.is_saving());
        assert_eq!(stored(&writer, 1).len() as u64, taken);
        writer.append(&of_one(1, 8), 0).expect("room again");
        writer.sync().expect("a disk that goes on");
        assert_eq!(stored(&writer, 1).pop(), Some(of_one(1, 8)));
        assert_eq!(writer.unstored(), 0);
    }

    #[test]
    fn behind_what_could_not_be_written_there_is_a_hole() {
        let parent = tempfile::tempdir().expect("a directory");
        let dir = parent.path().join("session");
        let mut writer = SessionWriter::create(&dir, meta()).expect("a session");
        let in_the_way = dir.join("ring/boot1-cpu0");
        fs::create_dir(&in_the_way).expect("a directory");
        for (cpu, fill) in [(0, 1), (1, 2), (0, 3)] {
            writer.append(&of_one(cpu, fill), 0).expect("taken");
        }
        let told = writer.sync().expect_err("no file");
        assert!(told.to_string().contains("boot1-cpu0"), "{told}");
        assert_eq!(writer.unstored(), 2 * 4032);
        fs::remove_dir(&in_the_way).expect("the directory");
        for fill in [4, 5] {
            writer.append(&of_one(0, fill), 0).expect("taken");
        }
        writer.sync().expect("a disk that takes it");
        let marked = Chunk {
            gap: Some(crate::ring::Gap::NotStored),
            ..of_one(0, 4)
        };
        assert_eq!(stored(&writer, 0), [marked, of_one(0, 5)]);
        assert_eq!(stored(&writer, 1), [of_one(1, 2)]);
        assert!(writer.take_trouble().is_none());
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
