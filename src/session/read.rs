//! Reads a session, finished or not.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::kernel::{Gva, Symbols};
use crate::keys::{KeyHistory, Klog};
use crate::ring::record::Item;
use crate::ring::{CodeMap, Decoder};

use super::maps::Maps;
use super::store::{self, ChunkReader};
use super::{
    Boot, Finding, Meta, Mode, ModuleHistory, SessionError, State, FINDINGS_FILE, KLOG_FILE,
};

/// `MODULES_VADDR` and `MODULES_END` (arch/x86/include/asm/pgtable_64_types.h)
/// of a kernel with RANDOMIZE_BASE, whose image has 1 GiB.
const MODULES: std::ops::Range<u64> = 0xffff_ffff_c000_0000..0xffff_ffff_ff00_0000;

/// The most that is read of a session's findings, bytes.
const MAX_FINDINGS: u64 = 8 << 20;

/// Whether a run-time address lies where modules are loaded, and what the
/// kernel makes code in as it runs (BPF programs, trampolines).
pub fn is_module_address(at: Gva) -> bool {
    MODULES.contains(&at.0)
}

/// Where code is in one boot of a guest.
#[derive(Clone, Copy, Debug)]
pub struct GuestCode<'a> {
    /// The kernel's symbols, at link-time addresses.
    pub symbols: &'a Symbols,
    /// Run-time address minus link-time address, wrapping.
    pub slide: u64,
}

impl CodeMap for GuestCode<'_> {
    fn is_function(&self, at: Gva) -> bool {
        self.symbols
            .is_function_start(Gva(at.0.wrapping_sub(self.slide)))
            || is_module_address(at)
    }
}

/// A session on disk.
#[derive(Debug)]
pub struct Session {
    dir: PathBuf,
    /// What it is.
    pub meta: Meta,
    /// Its keys; none in plain mode.
    pub keys: KeyHistory,
    maps: Maps,
    /// Of one that was still written when it was opened: how far the files of its
    /// boots and CPUs went then.
    ends: Option<BTreeMap<(u32, u16), u64>>,
}

impl Session {
    /// Opens the session in `dir`. One that is still written is, to its reader, what
    /// it is now: there may be no key here for what comes later.
    ///
    /// # Errors
    /// If any of its files is missing or cannot be understood.
    pub fn open(dir: &Path) -> Result<Self, SessionError> {
        let meta = Meta::load(dir)?;
        // Before the keys: a key is on disk before the guest has it.
        let ends = (meta.state == State::Open).then(|| ends(dir, &meta));
        let keys = match meta.mode {
            Mode::Keyed => Klog::read(&dir.join(KLOG_FILE))?,
            Mode::Plain => KeyHistory::default(),
        };
        let session = Self {
            dir: dir.to_owned(),
            meta,
            keys,
            maps: Maps::default(),
            ends,
        };
        for boot in &session.meta.boots {
            session.symbols(boot)?;
        }
        Ok(session)
    }

    /// The symbols of the kernel that ran in a boot, which may be one that came
    /// since the session was opened.
    ///
    /// # Errors
    /// If it did, and they cannot be read.
    pub fn symbols(&self, boot: &Boot) -> Result<&Symbols, SessionError> {
        self.maps.get(&self.dir, &boot.symbols)
    }

    /// Where it lies.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What the guest was caught at while it was traced, oldest first; of very
    /// many the first ones. A last line that is not finished is left out.
    ///
    /// # Errors
    /// If the file cannot be read or understood.
    pub fn findings(&self) -> Result<Vec<Finding>, SessionError> {
        let path = self.dir.join(FINDINGS_FILE);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(SessionError::io("read", path)(error)),
        };
        let mut text = String::new();
        file.take(MAX_FINDINGS)
            .read_to_string(&mut text)
            .map_err(SessionError::io("read", &path))?;
        text.split_inclusive('\n')
            .filter(|line| line.ends_with('\n'))
            .map(|line| {
                serde_json::from_str(line).map_err(|cause| SessionError::Meta {
                    path: path.clone(),
                    cause,
                })
            })
            .collect()
    }

    /// The guest's own lists of modules, as they were while it was traced.
    ///
    /// # Errors
    /// If the file cannot be read or understood.
    pub fn modules(&self) -> Result<ModuleHistory, SessionError> {
        ModuleHistory::load(&self.dir)
    }

    /// The file of a CPU, if it left one.
    fn chunks(&self, boot: u32, cpu: u16) -> Result<Option<ChunkReader>, SessionError> {
        match &self.ends {
            None => ChunkReader::open(&self.dir, boot, cpu),
            Some(ends) => {
                let end = ends.get(&(boot, cpu)).copied().unwrap_or(0);
                ChunkReader::open_up_to(&self.dir, boot, cpu, end)
            }
        }
    }

    /// All that was recorded until it was opened, decoded: boot after boot, and within
    /// a boot the CPUs' items by their times.
    pub fn items(&self) -> Items<'_> {
        Items {
            session: self,
            boots: self.meta.boots.iter(),
            merge: None,
        }
    }
}

/// The CPUs that a boot can have left files of.
fn cpus(boot: &Boot) -> std::ops::Range<u16> {
    0..boot.nr_cpus.min(u32::from(u16::MAX)) as u16
}

/// How far the files of each boot and CPU go by now.
fn ends(dir: &Path, meta: &Meta) -> BTreeMap<(u32, u16), u64> {
    let of_boot = |boot: &Boot| {
        let number = boot.number;
        cpus(boot).map(move |cpu| ((number, cpu), store::length(dir, number, cpu)))
    };
    let all = meta.boots.iter().flat_map(of_boot);
    all.filter(|&(_, length)| length > 0).collect()
}

/// Iterator of [`Session::items`]. Holds a page's items of each CPU.
pub struct Items<'a> {
    session: &'a Session,
    boots: std::slice::Iter<'a, Boot>,
    merge: Option<Merge<'a>>,
}

impl Iterator for Items<'_> {
    type Item = Result<Item, SessionError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(merge) = &mut self.merge {
                match merge.next() {
                    Ok(Some(item)) => return Some(Ok(item)),
                    Ok(None) => {}
                    Err(error) => {
                        self.merge = None;
                        return Some(Err(error));
                    }
                }
            }
            match Merge::new(self.session, self.boots.next()?) {
                Ok(merge) => self.merge = Some(merge),
                Err(error) => return Some(Err(error)),
            }
        }
    }
}

/// Merges the CPUs of one boot.
struct Merge<'a> {
    keys: &'a KeyHistory,
    code: GuestCode<'a>,
    streams: Vec<Stream>,
    /// (time, stream) of the first item of each stream that has one.
    heads: BinaryHeap<Reverse<(u64, usize)>>,
}

/// The items of one CPU.
struct Stream {
    chunks: ChunkReader,
    decoder: Decoder,
    items: VecDeque<Item>,
}

impl<'a> Merge<'a> {
    fn new(session: &'a Session, boot: &Boot) -> Result<Self, SessionError> {
        let mut merge = Self {
            keys: &session.keys,
            code: GuestCode {
                symbols: session.symbols(boot)?,
                slide: boot.slide,
            },
            streams: Vec::new(),
            heads: BinaryHeap::new(),
        };
        for cpu in cpus(boot) {
            if let Some(chunks) = session.chunks(boot.number, cpu)? {
                let decoder = Decoder::new(boot.types, boot.number);
                merge.streams.push(Stream {
                    chunks,
                    decoder,
                    items: VecDeque::new(),
                });
                merge.refill(merge.streams.len() - 1)?;
            }
        }
        Ok(merge)
    }

    fn next(&mut self) -> Result<Option<Item>, SessionError> {
        let Some(Reverse((_, index))) = self.heads.pop() else {
            return Ok(None);
        };
        let item = self
            .streams
            .get_mut(index)
            .and_then(|stream| stream.items.pop_front());
        self.refill(index)?;
        Ok(item)
    }

    /// Has the stream's next item take part, after decoding more if it takes.
    fn refill(&mut self, index: usize) -> Result<(), SessionError> {
        let Some(stream) = self.streams.get_mut(index) else {
            return Ok(());
        };
        while stream.items.is_empty() {
            let Some(chunk) = stream.chunks.next_chunk()? else {
                return Ok(());
            };
            let items = &mut stream.items;
            stream
                .decoder
                .chunk(&chunk, self.keys, &self.code, &mut |item| {
                    items.push_back(item)
                });
        }
        if let Some(first) = stream.items.front() {
            self.heads.push(Reverse((first.time, index)));
        }
        Ok(())
    }
}
