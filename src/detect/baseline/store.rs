//! Baselines on disk, by name.

use std::fs::{self, DirBuilder};
use std::io::{self, Read, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use super::{Baseline, FORMAT, VERSION};

/// The most that is read of a baseline's file, in bytes.
const MAX_FILE: u64 = 64 << 20;

/// The directory that baselines lie in, `NAME.json` each.
#[derive(Clone, Debug)]
pub struct Store(PathBuf);

/// Why a baseline cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A name that is none.
    #[error("{0:?} cannot be a baseline's name: letters, digits, '-', '_' and '.', not first, and at most 64")]
    Name(String),
    /// There is none of that name.
    #[error("there is no baseline {name:?} in {}; `xftrace baseline learn {name} SESSION..` makes one", dir.display())]
    None {
        /// Which.
        name: String,
        /// Where.
        dir: PathBuf,
    },
    /// A file or directory.
    #[error("cannot {action} {path:?}: {cause}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why not.
        cause: io::Error,
    },
    /// A file that is no baseline.
    #[error("{path:?} is no baseline: {cause}")]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        cause: serde_json::Error,
    },
    /// A file of another version, or of something else.
    #[error("{path:?} is of form {format:?} version {version}; this xftrace reads {FORMAT:?} version {VERSION}: learn it anew")]
    Version {
        /// The file.
        path: PathBuf,
        /// What it says it is.
        format: String,
        /// And of which version.
        version: u32,
    },
}

/// What every version of the file has.
#[derive(serde::Deserialize)]
struct Head {
    #[serde(default)]
    format: String,
    #[serde(default)]
    version: u32,
}

impl Store {
    /// The baselines in a directory, which need not be there.
    pub fn at(dir: &Path) -> Self {
        Self(dir.to_owned())
    }

    /// Whether a text can be the name of a baseline.
    pub fn is_name(name: &str) -> bool {
        let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        (1..=64).contains(&name.len()) && name.chars().all(fits) && !name.starts_with(['.', '-'])
    }

    fn path(&self, name: &str) -> Result<PathBuf, StoreError> {
        if Self::is_name(name) {
            return Ok(self.0.join(format!("{name}.json")));
        }
        Err(StoreError::Name(name.to_owned()))
    }

    /// Reads the baseline of this name.
    ///
    /// # Errors
    /// If there is none, or it cannot be read or understood.
    pub fn load(&self, name: &str) -> Result<Baseline, StoreError> {
        let path = self.path(name)?;
        let mut text = Vec::new();
        let read =
            fs::File::open(&path).and_then(|file| file.take(MAX_FILE).read_to_end(&mut text));
        match read {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(StoreError::None {
                    name: name.to_owned(),
                    dir: self.0.clone(),
                })
            }
            Err(error) => return Err(io_error("read", &path)(error)),
        }
        let content = |cause| StoreError::Content {
            path: path.clone(),
            cause,
        };
        let Head { format, version } = serde_json::from_slice(&text).map_err(content)?;
        if (format.as_str(), version) != (FORMAT, VERSION) {
            return Err(StoreError::Version {
                path,
                format,
                version,
            });
        }
        serde_json::from_slice(&text).map_err(content)
    }

    /// Writes a baseline, whole or not at all.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn save(&self, name: &str, baseline: &Baseline) -> Result<PathBuf, StoreError> {
        let path = self.path(name)?;
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.0)
            .map_err(io_error("create", &self.0))?;
        let io = || io_error("write", &path);
        let mut file = tempfile::NamedTempFile::new_in(&self.0).map_err(io())?;
        serde_json::to_writer_pretty(io::BufWriter::new(&mut file), baseline)
            .map_err(io::Error::from)
            .map_err(io())?;
        file.write_all(b"\n").map_err(io())?;
        file.as_file().sync_data().map_err(io())?;
        file.persist(&path)
            .map_err(|error| error.error)
            .map_err(io())?;
        Ok(path)
    }

    /// Removes the baseline of this name.
    ///
    /// # Errors
    /// If there is none, or it cannot be removed.
    pub fn remove(&self, name: &str) -> Result<(), StoreError> {
        let path = self.path(name)?;
        fs::remove_file(&path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => StoreError::None {
                name: name.to_owned(),
                dir: self.0.clone(),
            },
            _ => io_error("remove", &path)(error),
        })
    }

    /// The names of all, sorted.
    ///
    /// # Errors
    /// If the directory is there and cannot be read.
    pub fn names(&self) -> Result<Vec<String>, StoreError> {
        let entries = match fs::read_dir(&self.0) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(io_error("read", &self.0)(error)),
        };
        let mut names: Vec<String> = entries
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter_map(|file| file.strip_suffix(".json").map(str::to_owned))
            .filter(|name| Self::is_name(name))
            .collect();
        names.sort();
        Ok(names)
    }
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    let path = path.to_owned();
    move |cause| StoreError::Io {
        action,
        path,
        cause,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn baselines_are_kept_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::at(&dir.path().join("baselines"));
        assert_eq!(store.names().unwrap(), Vec::<String>::new());
        assert!(matches!(store.load("web"), Err(StoreError::None { .. })));
        let baseline = Baseline::new("Linux version 6.1\n");
        store.save("web", &baseline).unwrap();
        store.save("db-1.2", &baseline).unwrap();
        assert_eq!(store.load("web").unwrap(), baseline);
        assert_eq!(store.names().unwrap(), ["db-1.2", "web"]);
        store.remove("web").unwrap();
        assert!(matches!(store.remove("web"), Err(StoreError::None { .. })));
    }

    #[test]
    fn a_name_leads_nowhere_else() {
        for name in ["", "../x", "a/b", ".hidden", "-d", "a b", &"x".repeat(65)] {
            assert!(!Store::is_name(name), "{name}");
            let store = Store::at(Path::new("/nowhere"));
            assert!(matches!(store.load(name), Err(StoreError::Name(_))));
        }
    }

    #[test]
    fn other_files_are_refused_with_what_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::at(dir.path());
        let said = |text: &str| {
            fs::write(dir.path().join("x.json"), text).unwrap();
            store.load("x").unwrap_err().to_string()
        };
        assert!(said("{}").contains("version 0"));
        assert!(said("{\"format\":\"xftrace-baseline\",\"version\":9}").contains("version 9"));
        assert!(said("[").contains("no baseline"));
        let mut good = serde_json::to_value(Baseline::new("k")).unwrap();
        good["more"] = 1.into();
        assert!(said(&good.to_string()).contains("more"));
    }
}
