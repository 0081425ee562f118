//! The store: a directory with an index for each kernel that is known.
//!
//! An index is named by the kernel's build id, or, where the file had none, by
//! a digest of the symbols. So the same kernel is never there twice from the
//! same kind of file, and adding it again replaces it, unless what is there is
//! from a vmlinux and tells more. Files that are no
//! indices, such as a System.map that somebody copied there, are left alone;
//! the helper reads them too.
//!
//! Of a file that the guest can boot, the kernel itself is kept as well, since
//! that is what its memory is checked against: `images/ID.gz`, the ELF file with
//! what follows it, under gzip, whose checksum shows damage.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, Permissions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use flate2::write::GzEncoder;
use flate2::Compression;
use sha2::{Digest, Sha256};

use super::index::{self, Head};
use super::{unpack, Fault, Kind, Known, SymfileError, MAX_IMAGE};

/// How the names of indices end.
const SUFFIX: &str = "xfsyms";

/// Where the kernels themselves are, and how their names end.
const IMAGES: &str = "images";
const IMAGE_SUFFIX: &str = "gz";

/// How much of a digest is enough to tell kernels apart.
const DIGEST: usize = 20;

/// How the names of files begin that are being written, and after how long
/// nobody is writing them any more.
const ADDING: &str = ".adding-";
const ABANDONED: Duration = Duration::from_secs(60 * 60);

/// What became of a file that was added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Added {
    /// Its kernel was not there before.
    New,
    /// It took the place of what was known of its kernel.
    Replaced,
    /// What is known of its kernel is from a vmlinux, which has more symbols
    /// than a kernel's own list.
    KeptRicher,
}

/// The directory.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
}

/// A kernel in the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// What it is called here.
    pub id: String,
    /// Its index.
    pub path: PathBuf,
    /// What the index says.
    pub head: Head,
    /// The kernel itself, where it is kept.
    pub image: Option<PathBuf>,
}

impl Store {
    /// The store in `dir`, which need not exist yet.
    pub fn at(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
        }
    }

    /// Reads a file of any kind and keeps its symbols; also says what became of
    /// them. The index is whole or not there.
    ///
    /// # Errors
    /// If the file cannot be used or the store cannot be written, or another
    /// kernel of that build id is there.
    pub fn add(&self, file: &Path) -> Result<(Stored, Added), SymfileError> {
        let (known, kernel) = Known::with_image(file)?;
        let head = Head::new(&known, &file.display().to_string());
        let bytes = index::write(&known, &head);
        let id = id(&known);
        let path = self.dir.join(format!("{id}.{SUFFIX}"));
        let there = kept(&path);
        let other = there
            .as_ref()
            .is_some_and(|there| differ(there.banner.as_deref(), head.banner.as_deref()));
        if other {
            return Err(SymfileError::Id(format!(
                "another kernel is in the store under the build id of {file:?}; if that is \
                 wrong, type `xftrace symbols remove {id}` and add this one again"
            )));
        }
        // The index last: what is listed is whole.
        if let Some(kernel) = kernel {
            self.put(&self.image_path(&id), &|file| {
                let mut gzip = GzEncoder::new(file, Compression::fast());
                gzip.write_all(&kernel)?;
                gzip.finish().map(|_| ())
            })?;
        }
        let richer =
            there.filter(|there| (there.kind, head.kind) == (Kind::Vmlinux, Kind::Kallsyms));
        let (head, added) = match richer {
            Some(there) => (there, Added::KeptRicher),
            None => {
                let replaced = path.exists();
                self.put(&path, &|file| file.write_all(&bytes))?;
                let added = if replaced {
                    Added::Replaced
                } else {
                    Added::New
                };
                (head, added)
            }
        };
        let image = Some(self.image_path(&id)).filter(|image| image.is_file());
        let stored = Stored {
            id,
            path,
            head,
            image,
        };
        Ok((stored, added))
    }

    /// Writes a file that is whole or not there, for everybody to read.
    fn put(
        &self,
        path: &Path,
        write: &dyn Fn(&mut File) -> std::io::Result<()>,
    ) -> Result<(), SymfileError> {
        let dir = path.parent().unwrap_or(&self.dir);
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(dir)
            .map_err(SymfileError::io("create", dir))?;
        sweep(dir);
        let failed = || SymfileError::io("write", path);
        // In the same directory, under a hidden name, so that nobody reads it
        // half written and a rename puts it in place.
        let mut file = tempfile::Builder::new()
            .prefix(ADDING)
            .tempfile_in(dir)
            .map_err(failed())?;
        write(file.as_file_mut()).map_err(failed())?;
        let mode = Permissions::from_mode(0o644);
        file.as_file().set_permissions(mode).map_err(failed())?;
        file.as_file().sync_all().map_err(failed())?;
        file.persist(path).map_err(|error| failed()(error.error))?;
        let sync = File::open(dir).and_then(|dir| dir.sync_all());
        sync.map_err(SymfileError::io("write", dir))
    }

    fn image_path(&self, id: &str) -> PathBuf {
        self.dir.join(IMAGES).join(format!("{id}.{IMAGE_SUFFIX}"))
    }

    /// The kernel with this banner, as it was built: the ELF file and what
    /// follows it. None where no file that the guest can boot was added.
    ///
    /// # Errors
    /// If it cannot be read, or is damaged.
    pub fn image(&self, banner: &str) -> Result<Option<Vec<u8>>, SymfileError> {
        let (stored, _) = self.list()?;
        let fits = |kernel: &Stored| kernel.head.banner.as_deref() == Some(banner);
        let kept = stored.into_iter().filter(fits);
        let Some(path) = kept.filter_map(|kernel| kernel.image).next() else {
            return Ok(None);
        };
        let packed = fs::read(&path).map_err(SymfileError::io("read", &path))?;
        let kernel = unpack::Compression::Gzip.unpack(&packed, MAX_IMAGE);
        let kernel = kernel.map_err(|error| Fault::Unpack(error.to_string()).of(&path))?;
        Ok(Some(kernel))
    }

    /// All that are there, by release and id, and what is wrong with those
    /// that cannot be read.
    ///
    /// # Errors
    /// If the directory cannot be read. One that is not there is empty.
    pub fn list(&self) -> Result<(Vec<Stored>, Vec<SymfileError>), SymfileError> {
        let (mut stored, mut faults) = (Vec::new(), Vec::new());
        for (id, path) in self.files()? {
            match head(&path) {
                Ok(head) => {
                    let image = Some(self.image_path(&id)).filter(|image| image.is_file());
                    stored.push(Stored {
                        id,
                        path,
                        head,
                        image,
                    });
                }
                Err(error) => faults.push(error),
            }
        }
        stored.sort_by_cached_key(|kernel| {
            (kernel.head.release().map(str::to_owned), kernel.id.clone())
        });
        Ok((stored, faults))
    }

    /// Removes the kernel whose id begins like this; damaged ones too.
    ///
    /// # Errors
    /// If there is none or there are several, or it cannot be removed.
    pub fn remove(&self, id: &str) -> Result<String, SymfileError> {
        let files = self.files()?;
        let mut like = files.iter().filter(|(known, _)| known.starts_with(id));
        let found = match (files.get_key_value(id), like.next(), like.next()) {
            (Some(exact), ..) => exact,
            (None, Some(only), None) if !id.is_empty() => only,
            (None, Some(_), Some(_)) => {
                let text = format!("several kernels have ids that begin with '{id}': type more");
                return Err(SymfileError::Id(text));
            }
            _ => {
                let text = format!(
                    "no kernel in {} has an id that begins with '{}'; see 'xftrace symbols list'",
                    self.dir.display(),
                    id.escape_debug()
                );
                return Err(SymfileError::Id(text));
            }
        };
        let image = self.image_path(found.0);
        match fs::remove_file(&image) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(SymfileError::io("remove", &image)(error));
            }
            _ => {}
        }
        fs::remove_file(found.1).map_err(SymfileError::io("remove", found.1))?;
        Ok(found.0.clone())
    }

    /// The indices, by id.
    fn files(&self) -> Result<BTreeMap<String, PathBuf>, SymfileError> {
        let entries = match fs::read_dir(&self.dir) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(BTreeMap::new());
            }
            entries => entries.map_err(SymfileError::io("read", &self.dir))?,
        };
        let paths = entries.flatten().map(|entry| entry.path());
        let index = |path: PathBuf| {
            let id = path.file_stem()?.to_str()?.to_owned();
            let ours = path.extension()? == SUFFIX && path.is_file();
            ours.then_some((id, path))
        };
        Ok(paths.filter_map(index).collect())
    }
}

/// The head of an index.
fn head(path: &Path) -> Result<Head, SymfileError> {
    let file = File::open(path).map_err(SymfileError::io("read", path))?;
    Head::read(file).map_err(|fault| SymfileError::Content {
        path: path.to_owned(),
        fault: fault.into(),
    })
}

/// What an index says that can be read; none where it is damaged anywhere.
fn kept(path: &Path) -> Option<Head> {
    Known::load(path).ok()?;
    head(path).ok()
}

/// Whether two kernels tell what they are and are not the same.
fn differ(one: Option<&str>, other: Option<&str>) -> bool {
    one.zip(other).is_some_and(|(one, other)| one != other)
}

/// Removes what was left by somebody who was killed while writing. What cannot
/// be removed does no harm.
fn sweep(dir: &Path) {
    let Ok(entries) = fs::read_dir(dir) else {
        return;
    };
    for entry in entries.flatten() {
        let ours = entry.file_name().to_string_lossy().starts_with(ADDING);
        let changed = entry.metadata().and_then(|metadata| metadata.modified());
        let age = changed.ok().and_then(|at| at.elapsed().ok());
        if ours && age.is_some_and(|age| age > ABANDONED) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// What a kernel is called: by its build id, as long as that can be no path.
fn id(known: &Known) -> String {
    let build_id = known.build_id.clone().filter(|id| index::is_build_id(id));
    build_id.unwrap_or_else(|| digest(known))
}

/// What a kernel without a build id is called.
fn digest(known: &Known) -> String {
    let digest = Sha256::digest(known.symbols.to_table());
    let bytes = digest.iter().take(DIGEST);
    bytes.map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_build_id_never_becomes_a_name() {
        let text =
            "ffffffff81000000 T _text\nffffffff81000010 T _stext\nffffffff81100000 T _etext\n";
        let mut known = Known::parse(text.into()).unwrap();
        let digest = id(&known);
        for bad in ["", "../../etc/cron", "/etc/x", "5A5A", "5a5", "5a 5"] {
            known.build_id = Some(bad.to_owned());
            assert_eq!(id(&known), digest, "{bad:?}");
        }
        for good in ["5a".to_owned(), "5a".repeat(64)] {
            known.build_id = Some(good.clone());
            assert_eq!(id(&known), good);
        }
        known.build_id = Some("5a".repeat(65));
        assert_eq!(id(&known), digest);
    }
}
