//! The history of keys on disk.
//!
//! A text file, one entry a line, so that it can be read, compared and cut
//! with ordinary tools:
//!
//! ```text
//! # xftrace klog 1
//! 1 8f3a5c0e91d2b746 1763889709123456789 8123456789
//! ```
//!
//! epoch, key in hexadecimal, wall clock (nanoseconds since 1970, UTC),
//! monotonic clock (CLOCK_MONOTONIC of this host, nanoseconds). The times are
//! those at which the entry was written, just before the key went into the
//! guest.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::KeyHistory;

/// The first line of every Klog.
const HEADER: &str = "# xftrace klog 1";

/// A line is at most four numbers; what is longer is no Klog.
const LINE_LIMIT: u64 = 128;

/// One key and when it was handed out.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// The number of the key, from 1 on.
    pub epoch: u64,
    /// The key.
    pub key: u64,
    /// Wall clock, nanoseconds since 1970.
    pub wall_ns: u64,
    /// CLOCK_MONOTONIC of the host, nanoseconds.
    pub mono_ns: u64,
}

/// Without the key, which has no place in a log.
impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entry")
            .field("epoch", &self.epoch)
            .field("wall_ns", &self.wall_ns)
            .field("mono_ns", &self.mono_ns)
            .finish_non_exhaustive()
    }
}

/// What can be wrong with a Klog.
#[derive(Debug, thiserror::Error)]
pub enum KlogError {
    /// The file could not be made, read or synced.
    #[error("cannot {action} the key log {path:?}: {cause}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        cause: io::Error,
    },
    /// The file is not a Klog, or was damaged.
    #[error("{path:?}, line {line}: {what}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The line, from 1 on.
        line: usize,
        /// What is wrong with it.
        what: &'static str,
    },
}

/// The key history of one session, open for appending.
#[derive(Debug)]
pub struct Klog {
    file: File,
    path: PathBuf,
    last_epoch: u64,
}

impl Klog {
    /// Makes a new, empty Klog, readable by its owner only.
    ///
    /// # Errors
    /// If the file is there already or cannot be written.
    pub fn create(path: &Path) -> Result<Self, KlogError> {
        let io = |action| {
            let path = path.to_owned();
            move |cause| KlogError::Io {
                action,
                path,
                cause,
            }
        };
        let mut file = OpenOptions::new()
            .append(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(io("create"))?;
        writeln!(file, "{HEADER}").map_err(io("write"))?;
        file.sync_all().map_err(io("sync"))?;
        Ok(Self {
            file,
            path: path.to_owned(),
            last_epoch: 0,
        })
    }

    /// Opens the Klog of a session that goes on, and gives what it holds.
    ///
    /// A last line that a crash left unfinished is cut off: its key was never
    /// handed out, since that comes after the sync.
    ///
    /// # Errors
    /// If the file cannot be read or is not a Klog.
    pub fn resume(path: &Path) -> Result<(Self, KeyHistory), KlogError> {
        let (history, good_bytes) = read(path)?;
        let io = |action| {
            let path = path.to_owned();
            move |cause| KlogError::Io {
                action,
                path,
                cause,
            }
        };
        let mut file = OpenOptions::new()
            .write(true)
            .open(path)
            .map_err(io("open"))?;
        file.set_len(good_bytes).map_err(io("mend"))?;
        file.seek(SeekFrom::End(0)).map_err(io("open"))?;
        file.sync_all().map_err(io("sync"))?;
        let last_epoch = history.last_epoch();
        Ok((
            Self {
                file,
                path: path.to_owned(),
                last_epoch,
            },
            history,
        ))
    }

    /// Reads a Klog for decoding. An unfinished last line is left out.
    ///
    /// # Errors
    /// If the file cannot be read or is not a Klog.
    pub fn read(path: &Path) -> Result<KeyHistory, KlogError> {
        read(path).map(|(history, _)| history)
    }

    /// The epoch of the last entry; 0 where there is none.
    pub fn last_epoch(&self) -> u64 {
        self.last_epoch
    }

    /// Appends an entry and returns once it is on disk.
    ///
    /// # Errors
    /// If it cannot be written or synced; the key must not be used then.
    pub fn append(&mut self, entry: &Entry) -> Result<(), KlogError> {
        let line = format!(
            "{} {:016x} {} {}\n",
            entry.epoch, entry.key, entry.wall_ns, entry.mono_ns
        );
        let io = |action| {
            let path = &self.path;
            move |cause| KlogError::Io {
                action,
                path: path.clone(),
                cause,
            }
        };
        // One write, so that a crash leaves a prefix of the line at most.
        self.file.write_all(line.as_bytes()).map_err(io("write"))?;
        self.file.sync_data().map_err(io("sync"))?;
        self.last_epoch = entry.epoch;
        Ok(())
    }
}

/// The history in a file, and how many of its bytes are whole lines.
fn read(path: &Path) -> Result<(KeyHistory, u64), KlogError> {
    let mut reader = KlogReader::open(path)?;
    reader.read_on()?;
    Ok((reader.keys, reader.good_bytes))
}

/// Reads a Klog that may still grow.
#[derive(Debug)]
pub struct KlogReader {
    path: PathBuf,
    file: BufReader<File>,
    /// Lines read so far.
    lines: usize,
    /// How many bytes from the start are whole lines.
    good_bytes: u64,
    keys: KeyHistory,
}

impl KlogReader {
    /// Opens a Klog. Nothing of it is read yet.
    ///
    /// # Errors
    /// If the file cannot be opened.
    pub fn open(path: &Path) -> Result<Self, KlogError> {
        let file = File::open(path).map_err(|cause| KlogError::Io {
            action: "read",
            path: path.to_owned(),
            cause,
        })?;
        Ok(Self {
            path: path.to_owned(),
            file: BufReader::new(file),
            lines: 0,
            good_bytes: 0,
            keys: KeyHistory::default(),
        })
    }

    /// The keys read so far.
    pub fn keys(&self) -> &KeyHistory {
        &self.keys
    }

    /// Reads what has come since. An unfinished last line is left for the next
    /// time.
    ///
    /// # Errors
    /// If the file cannot be read or is not a Klog.
    pub fn read_on(&mut self) -> Result<(), KlogError> {
        let path = &self.path;
        let io = |cause| KlogError::Io {
            action: "read",
            path: path.clone(),
            cause,
        };
        self.file
            .seek(SeekFrom::Start(self.good_bytes))
            .map_err(io)?;
        loop {
            let number = self.lines + 1;
            let mut line = String::new();
            let damaged = |what| KlogError::Damaged {
                path: path.clone(),
                line: number,
                what,
            };
            let bytes = io::Read::take(&mut self.file, LINE_LIMIT)
                .read_line(&mut line)
                .map_err(io)?;
            if bytes == 0 && number > 1 {
                return Ok(());
            }
            let Some(text) = line.strip_suffix('\n') else {
                if number == 1 || bytes as u64 == LINE_LIMIT {
                    return Err(damaged("this is no xftrace key log"));
                }
                return Ok(());
            };
            if number == 1 {
                if text != HEADER {
                    return Err(damaged("this is no xftrace key log of version 1"));
                }
            } else {
                let entry =
                    parse(text).ok_or_else(|| damaged("not an epoch, a key and two times"))?;
                if !self.keys.push(entry) {
                    return Err(damaged("the epoch does not follow the one before it"));
                }
            }
            self.lines = number;
            self.good_bytes += bytes as u64;
        }
    }
}

fn parse(line: &str) -> Option<Entry> {
    let mut words = line.split(' ');
    let entry = Entry {
        epoch: words.next()?.parse().ok()?,
        key: u64::from_str_radix(words.next()?, 16).ok()?,
        wall_ns: words.next()?.parse().ok()?,
        mono_ns: words.next()?.parse().ok()?,
    };
    words.next().is_none().then_some(entry)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn entry(epoch: u64) -> Entry {
        Entry {
            epoch,
            key: epoch.wrapping_mul(0x9e37_79b9_7f4a_7c15),
            wall_ns: 7,
            mono_ns: epoch,
        }
    }

    fn written(entries: u64) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("klog");
        let mut klog = Klog::create(&path).expect("a new klog");
        for epoch in 1..=entries {
            klog.append(&entry(epoch)).expect("an entry");
        }
        (dir, path)
    }

    #[test]
    fn what_is_appended_is_read_again() {
        let (_dir, path) = written(3);
        let history = Klog::read(&path).expect("a history");
        assert_eq!(history.last_epoch(), 3);
        for epoch in 1..=3 {
            assert_eq!(history.key(epoch), Some(entry(epoch).key));
        }
        assert_eq!(history.key(0), None);
        assert_eq!(history.key(4), None);
    }

    #[test]
    fn only_its_owner_may_read_it() {
        use std::os::unix::fs::PermissionsExt;
        let (_dir, path) = written(1);
        let mode = fs::metadata(&path).expect("the file").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn a_new_klog_never_replaces_one() {
        let (_dir, path) = written(1);
        assert!(matches!(
            Klog::create(&path),
            Err(KlogError::Io {
                action: "create",
                ..
            })
        ));
    }

    #[test]
    fn a_line_cut_by_a_crash_is_cut_off_and_gone_over() {
        let (_dir, path) = written(2);
        let whole = fs::read(&path).expect("the file");
        for cut in 1..20 {
            fs::write(&path, &whole[..whole.len() - cut]).expect("a cut file");
            assert_eq!(Klog::read(&path).expect("a history").last_epoch(), 1);
        }
        let (mut klog, history) = Klog::resume(&path).expect("a klog to go on with");
        assert_eq!((klog.last_epoch(), history.last_epoch()), (1, 1));
        klog.append(&entry(2)).expect("an entry");
        assert_eq!(fs::read(&path).expect("the file"), whole);
    }

    #[test]
    fn what_is_no_klog_is_refused() {
        let (_dir, path) = written(0);
        for text in [
            "",
            "\n",
            "1 0 0 0\n",
            "# xftrace klog 1\n1 zz 0 0\n",
            "# xftrace klog 1\n1 0 0\n",
            "# xftrace klog 1\n1 0 0 0 0\n",
            "# xftrace klog 1\n2 0 0 0\n1 0 0 0\n",
            "# xftrace klog 1\n1 0 0 0\n1 0 0 0\n",
            "# xftrace klog 1\n0 0 0 0\n",
        ] {
            fs::write(&path, text).expect("a file");
            assert!(
                matches!(Klog::read(&path), Err(KlogError::Damaged { .. })),
                "{text:?}"
            );
        }
        fs::write(&path, [b'x'; 1 << 20]).expect("a file");
        assert!(matches!(
            Klog::read(&path),
            Err(KlogError::Damaged { line: 1, .. })
        ));
    }

    #[test]
    fn a_key_is_not_shown_in_debug_output() {
        assert!(!format!(
            "{:?}",
            Entry {
                key: 0xdead_beef,
                ..entry(1)
            }
        )
        .contains("dead"));
        assert!(!format!(
            "{:?}",
            Entry {
                key: 12345,
                ..entry(1)
            }
        )
        .contains("12345"));
    }

    #[test]
    fn a_reader_goes_on_where_the_last_whole_line_ended() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("klog");
        let mut klog = Klog::create(&path).expect("a klog");
        let mut reader = KlogReader::open(&path).expect("a reader");
        reader.read_on().expect("no key yet");
        assert!(reader.keys().is_empty());
        klog.append(&entry(1)).expect("a key");
        let half = fs::read(&path).expect("the file");
        klog.append(&entry(2)).expect("a key");
        let whole = fs::read(&path).expect("the file");
        for length in half.len()..whole.len() {
            fs::write(&path, &whole[..length]).expect("a half line");
            reader.read_on().expect("the keys");
            assert_eq!(reader.keys().last_epoch(), 1, "{length}");
        }
        fs::write(&path, &whole).expect("the whole line");
        reader.read_on().expect("the keys");
        assert_eq!(reader.keys().last_epoch(), 2);
        assert_eq!(reader.keys().key(2), Some(entry(2).key));
    }
}
