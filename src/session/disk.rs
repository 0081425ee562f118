//! The thread that writes a session's files.
//!
//! A disk makes whoever writes to it wait: for a third of a second when a cache is
//! written back, for longer where storage is shared. The guest's ring buffer runs over
//! meanwhile. So whoever reads that one hands what is to be written to a thread, in the
//! order in which it is to be written, and goes on.

use std::collections::{HashMap, HashSet};
use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crate::ring::Gap;

use super::store::{ChunkWriter, Frame};
use super::{maps, meta, MapId, SessionError, FINDINGS_FILE, MODULES_FILE, MODULE_SYMBOLS_FILE};

/// A file of lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum LinesFile {
    Findings,
    Modules,
    ModuleSymbols,
}

impl LinesFile {
    pub(super) fn path(self, dir: &Path) -> PathBuf {
        dir.join(match self {
            Self::Findings => FINDINGS_FILE,
            Self::Modules => MODULES_FILE,
            Self::ModuleSymbols => MODULE_SYMBOLS_FILE,
        })
    }
}

/// What is to be done.
#[derive(Debug)]
pub(super) enum Work {
    /// Appends a chunk to the file of its CPU.
    Chunk { boot: u32, frame: Frame },
    /// No more chunks come of that boot: what of them cannot be written is given up.
    BootEnded,
    /// Appends whole lines.
    Lines(LinesFile, Vec<u8>),
    /// Puts this in the place of `session.json`.
    Meta(Vec<u8>),
    /// Puts the symbols of a kernel there, unless they are.
    Map(MapId, Vec<u8>),
    /// Tells that all before it is done.
    Tell(Sender<()>),
}

impl Work {
    /// What each takes besides its bytes: a guest may make as many chunks as it has bytes.
    pub(super) const OVERHEAD: u64 = std::mem::size_of::<Self>() as u64 + 64;

    /// What it takes of memory, bytes.
    pub(super) fn size(&self) -> u64 {
        let bytes = match self {
            Self::Chunk { frame, .. } => frame.size(),
            Self::Lines(_, bytes) | Self::Meta(bytes) | Self::Map(_, bytes) => bytes.len() as u64,
            Self::BootEnded | Self::Tell(_) => 0,
        };
        Self::OVERHEAD + bytes
    }
}

/// The thread, and what is shared with it. When it is dropped, what it was handed is
/// written.
#[derive(Debug)]
pub(super) struct Disk {
    /// None once it is dropped.
    work: Option<Sender<Vec<Work>>>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    /// Bytes that were handed over and are not written yet.
    waiting: AtomicU64,
    /// How many of them are a `session.json`, in files.
    metas: AtomicU64,
    /// Bytes of chunks that could not be written.
    unstored: AtomicU64,
    /// What went wrong since that was asked last.
    trouble: Mutex<Option<SessionError>>,
}

impl Disk {
    /// Starts a thread that writes the files of the session in `dir`.
    ///
    /// # Errors
    /// If it cannot be started.
    pub(super) fn start(dir: &Path) -> Result<Self, SessionError> {
        let shared = Arc::new(Shared::default());
        let (work, todo) = std::sync::mpsc::channel();
        let mut files = Files {
            dir: dir.to_owned(),
            shared: Arc::clone(&shared),
            boot: 0,
            chunks: HashMap::new(),
            holes: HashSet::new(),
            lines: HashMap::new(),
            maps: HashMap::new(),
        };
        let thread = std::thread::Builder::new()
            .name("disk".to_owned())
            .spawn(move || files.run(&todo))
            .map_err(SessionError::io("start the thread that writes", dir))?;
        Ok(Self {
            work: Some(work),
            shared,
            thread: Some(thread),
        })
    }

    /// Hands over what is to be done next. It is never waited for.
    pub(super) fn hand(&self, work: Vec<Work>) {
        let size: u64 = work.iter().map(Work::size).sum();
        let metas = work.iter().filter(|work| matches!(work, Work::Meta(_)));
        let metas = metas.count() as u64;
        let shared = &self.shared;
        shared.waiting.fetch_add(size, Ordering::Relaxed);
        shared.metas.fetch_add(metas, Ordering::Relaxed);
        if let Some(todo) = &self.work {
            // It ends when it is dropped, and not before.
            let _ = todo.send(work);
        }
    }

    /// Bytes that were handed over and are not written yet.
    pub(super) fn waiting(&self) -> u64 {
        self.shared.waiting.load(Ordering::Relaxed)
    }

    /// Whether a `session.json` is among them.
    pub(super) fn has_meta(&self) -> bool {
        self.shared.metas.load(Ordering::Relaxed) > 0
    }

    /// Bytes of chunks that could not be written.
    pub(super) fn unstored(&self) -> u64 {
        self.shared.unstored.load(Ordering::Relaxed)
    }

    /// What went wrong since this was asked last, if anything did.
    pub(super) fn take_trouble(&self) -> Option<SessionError> {
        lock(&self.shared.trouble).take()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.work = None;
        if let Some(thread) = self.thread.take() {
            // It has nothing to tell but that it is gone.
            let _ = thread.join();
        }
    }
}

/// The thread's own: the files.
struct Files {
    dir: PathBuf,
    shared: Arc<Shared>,
    /// Whose files are open.
    boot: u32,
    chunks: HashMap<u16, ChunkWriter>,
    /// CPUs whose last chunk could not be written.
    holes: HashSet<u16>,
    lines: HashMap<LinesFile, File>,
    /// Maps that could not be written yet.
    maps: HashMap<MapId, Vec<u8>>,
}

impl Files {
    fn run(&mut self, todo: &Receiver<Vec<Work>>) {
        while let Ok(works) = todo.recv() {
            for work in works {
                let size = work.size();
                let metas = u64::from(matches!(work, Work::Meta(_)));
                let done = self.work(work);
                self.note(done);
                self.shared.metas.fetch_sub(metas, Ordering::Relaxed);
                self.shared.waiting.fetch_sub(size, Ordering::Relaxed);
            }
            // At once: a helper that is killed takes what it still holds with it.
            let flushed = self.flush();
            self.note(flushed);
        }
        self.end_boot();
        let put = self.put_maps();
        self.note(put);
    }

    fn note(&mut self, done: Result<(), SessionError>) {
        if let Err(error) = done {
            lock(&self.shared.trouble).get_or_insert(error);
        }
    }

    fn work(&mut self, work: Work) -> Result<(), SessionError> {
        match work {
            Work::Chunk { boot, frame } => self.chunk(boot, frame),
            Work::BootEnded => {
                self.end_boot();
                Ok(())
            }
            Work::Lines(file, bytes) => self.lines(file, &bytes),
            Work::Meta(bytes) => {
                // Who reads of records there finds them, and the symbols for them.
                let maps = self.put_maps();
                let flushed = self.flush();
                meta::replace(&self.dir, &bytes).and(flushed).and(maps)
            }
            Work::Map(id, text) => {
                self.maps.insert(id, text);
                self.put_maps()
            }
            Work::Tell(to) => {
                let flushed = self.flush();
                self.note(flushed);
                // Who asked may have gone.
                let _ = to.send(());
                Ok(())
            }
        }
    }

    fn put_maps(&mut self) -> Result<(), SessionError> {
        let mut done = Ok(());
        self.maps.retain(|id, text| {
            let put = maps::put(&self.dir, id, text);
            let failed = put.is_err();
            done = std::mem::replace(&mut done, Ok(())).and(put);
            failed
        });
        done
    }

    /// Flushes each, and tells what is wrong with the first that fails.
    fn flush(&mut self) -> Result<(), SessionError> {
        let flushed = self.chunks.values_mut().map(ChunkWriter::flush);
        flushed.fold(Ok(()), Result::and)
    }

    fn chunk(&mut self, boot: u32, mut frame: Frame) -> Result<(), SessionError> {
        if boot != self.boot {
            self.end_boot();
            self.boot = boot;
        }
        let (cpu, size) = (frame.cpu(), frame.size());
        // On the very next chunk: the running numbers show the hole there, and would
        // take it for one of the guest's making.
        if self.holes.contains(&cpu) {
            frame.mark(Gap::NotStored);
        }
        let unstored = |bytes: u64| {
            self.shared.unstored.fetch_add(bytes, Ordering::Relaxed);
        };
        let writer = match self.chunks.entry(cpu) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => {
                match ChunkWriter::open(&self.dir, boot, cpu) {
                    Ok(writer) => entry.insert(writer),
                    Err(error) => {
                        unstored(size);
                        self.holes.insert(cpu);
                        return Err(error);
                    }
                }
            }
        };
        match writer.append(&frame) {
            Ok(()) => {
                self.holes.remove(&cpu);
                Ok(())
            }
            Err(error) => {
                // What was half written is cut off when it is opened again.
                let lost = self.chunks.remove(&cpu).map_or(0, ChunkWriter::give_up);
                unstored(lost + size);
                self.holes.insert(cpu);
                Err(error)
            }
        }
    }

    /// Writes what is left of the boot's chunks, as far as it can be.
    fn end_boot(&mut self) {
        for (_, mut chunks) in std::mem::take(&mut self.chunks) {
            let flushed = chunks.flush();
            if flushed.is_err() {
                let lost = chunks.give_up();
                self.shared.unstored.fetch_add(lost, Ordering::Relaxed);
            }
            self.note(flushed);
        }
        self.holes.clear();
    }

    fn lines(&mut self, file: LinesFile, bytes: &[u8]) -> Result<(), SessionError> {
        let path = file.path(&self.dir);
        let open = match self.lines.entry(file) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => {
                entry.insert(open_lines(&path).map_err(SessionError::io("open", &path))?)
            }
        };
        let end = open
            .seek(SeekFrom::End(0))
            .map_err(SessionError::io("write", &path))?;
        open.write_all(bytes).map_err(|cause| {
            // A part of a line would spoil the next one.
            let _ = open.set_len(end);
            SessionError::io("write", &path)(cause)
        })
    }
}

/// A file of lines, begun or gone on with.
pub(super) fn open_lines(path: &Path) -> std::io::Result<File> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
