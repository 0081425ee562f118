//! Where the symbols of the guest's kernel may be, and which of them may fit.
//!
//! The store may know hundreds of kernels, and while a guest boots it is asked
//! several times a second. So no more is read of a file than it takes to see
//! that it does not fit: of an index its head, which says what the banner is
//! and where it must lie in memory. What passes that is loaded, and compared
//! with the kernel in memory by others.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::kernel::{banners, find_all_beside, has_banner, Kernel, Symbols};
use crate::ram::{Gpa, GuestRam, RamError};
use crate::symfiles::{Head, Known};

/// Looking through all memory for what the guest runs instead takes seconds:
/// it is done again after so many times what it took, and not at once.
const EXPLAIN_REST: u32 = 20;
const EXPLAIN_EVERY: Duration = Duration::from_secs(1);

/// The files and directories to look in, and what is known of each file.
#[derive(Debug)]
pub(crate) struct Sources {
    places: Vec<PathBuf>,
    files: HashMap<PathBuf, Source>,
    /// When the guest is to be looked through again, and what was found.
    explained: Option<(Instant, String)>,
}

/// A file, as it was when it was last read.
#[derive(Debug)]
struct Source {
    stamp: Stamp,
    content: Result<Glance, String>,
}

/// Device, inode, length, and when it was written, seconds and nanoseconds:
/// another content of that name has another one.
type Stamp = (u64, u64, u64, i64, i64);

/// What tells whether a kernel may be the guest's.
#[derive(Debug)]
struct Glance {
    banner: Option<String>,
    banner_offset: Option<u64>,
    /// Loaded already: a file that has no head, or a kernel that fitted.
    symbols: Option<Arc<Symbols>>,
}

/// What a look came to.
#[derive(Debug)]
pub(crate) struct Fitting {
    /// The kernels that may be the guest's.
    pub(crate) found: Vec<(PathBuf, Arc<Symbols>)>,
    /// Why there may be none.
    pub(crate) why: String,
}

/// A kernel in memory.
#[derive(Debug)]
pub(crate) struct Found {
    /// The one at the place that was asked for, or else the lowest of those that its
    /// symbols fit.
    pub(crate) kernel: Kernel,
    /// Where others are that these fit, or those of others that are looked for.
    pub(crate) others: Vec<Gpa>,
    pub(crate) symbols: Arc<Symbols>,
    /// Where they are from.
    pub(crate) path: PathBuf,
}

impl Fitting {
    /// The first of the kernels that is in memory; one at this place before others.
    ///
    /// # Errors
    /// If there is none, with what there is instead.
    pub(crate) fn find(self, ram: &dyn GuestRam, place: Option<Gpa>) -> anyhow::Result<Found> {
        let mut why = anyhow::Error::msg(self.why);
        let mut first: Option<Found> = None;
        for (path, symbols) in self.found {
            match find_all_beside(ram, &symbols, place) {
                Ok(mut kernels) => {
                    let known = kernels.iter().position(|one| Some(one.phys_text) == place);
                    // There is one at least.
                    let kernel = kernels.remove(known.unwrap_or(0));
                    let found = Found {
                        kernel,
                        others: kernels.iter().map(|other| other.phys_text).collect(),
                        symbols,
                        path,
                    };
                    if known.is_some() {
                        return Ok(found);
                    }
                    let Some(first) = &mut first else {
                        first = Some(found);
                        continue;
                    };
                    // Those of another kernel's symbols are others too.
                    let taken = first.kernel.phys_text;
                    for other in found.others.into_iter().chain([found.kernel.phys_text]) {
                        if other != taken && !first.others.contains(&other) {
                            first.others.push(other);
                        }
                    }
                }
                Err(error) => why = error.into(),
            }
        }
        first.ok_or(why)
    }
}

impl Sources {
    pub(crate) fn new(places: Vec<PathBuf>) -> Self {
        Self {
            places,
            files: HashMap::new(),
            explained: None,
        }
    }

    /// The kernels whose banner lies in guest memory where it should.
    pub(crate) fn fitting(&mut self, ram: &dyn GuestRam) -> Result<Fitting, RamError> {
        let paths = self.paths();
        self.files.retain(|path, _| paths.contains(path));
        let mut found = Vec::new();
        let mut unfit = 0;
        let mut fault = None;
        for path in paths {
            match self.look(&path, ram)? {
                Ok(Some(symbols)) => found.push((path, symbols)),
                Ok(None) => unfit += 1,
                Err(text) => fault = Some(text),
            }
        }
        let why = match fault {
            _ if !found.is_empty() => String::new(),
            // Of the ones that could be read, none fits.
            None if unfit > 0 => self.explain(unfit, ram)?,
            Some(text) => text,
            None if self.places.iter().all(|place| !place.exists()) => format!(
                "no symbols: {} does not exist; add those of the guest's kernel with 'xftrace \
                 symbols add FILE', FILE being its vmlinuz, vmlinux, System.map or .deb, or, \
                 where that is a file that the domain or --symbols names, put it there",
                self.named()
            ),
            None => format!(
                "no symbols: there are none in {}; add those of the guest's kernel with 'xftrace \
                 symbols add FILE', FILE being its vmlinuz, vmlinux, System.map or .deb",
                self.named()
            ),
        };
        Ok(Fitting { found, why })
    }

    /// The symbols of a file, if its banner is in memory.
    fn look(
        &mut self,
        path: &Path,
        ram: &dyn GuestRam,
    ) -> Result<Result<Option<Arc<Symbols>>, String>, RamError> {
        let stamp = stamp(path);
        let again = self.files.get(path).is_none_or(|file| file.stamp != stamp);
        if again {
            let content = glance(path);
            self.files
                .insert(path.to_owned(), Source { stamp, content });
        }
        let glance = match self.files.get_mut(path).map(|file| &mut file.content) {
            Some(Ok(glance)) => glance,
            Some(Err(text)) => return Ok(Err(text.clone())),
            None => return Ok(Ok(None)),
        };
        // Symbols without a banner are for the finder to complain of.
        if let Some(offset) = glance.banner_offset {
            if !has_banner(ram, offset, glance.banner.as_deref())? {
                return Ok(Ok(None));
            }
        }
        if let Some(symbols) = &glance.symbols {
            return Ok(Ok(Some(Arc::clone(symbols))));
        }
        Ok(match Known::load(path) {
            Ok(known) => {
                let symbols = Arc::new(known.symbols);
                glance.symbols = Some(Arc::clone(&symbols));
                Ok(Some(symbols))
            }
            Err(error) => Err(error.to_string()),
        })
    }

    /// The files there are, sorted; those being written have hidden names.
    fn paths(&self) -> Vec<PathBuf> {
        let mut paths = Vec::new();
        for place in &self.places {
            if !place.is_dir() {
                // What is not there is for `fitting` to tell.
                paths.extend(place.exists().then(|| place.clone()));
                continue;
            }
            let entries = std::fs::read_dir(place).into_iter().flatten().flatten();
            let visible =
                entries.filter(|entry| !entry.file_name().as_encoded_bytes().starts_with(b"."));
            let files = visible
                .map(|entry| entry.path())
                .filter(|path| path.is_file());
            let mut files: Vec<_> = files.collect();
            files.sort();
            paths.append(&mut files);
        }
        paths
    }

    /// What the guest has instead, looked for now and then.
    fn explain(&mut self, unfit: usize, ram: &dyn GuestRam) -> Result<String, RamError> {
        let fresh = |(until, _): &&(Instant, String)| Instant::now() < *until;
        if let Some((_, text)) = self.explained.as_ref().filter(fresh) {
            return Ok(text.clone());
        }
        let start = Instant::now();
        let there = banners(ram)?;
        let text = if there.is_empty() {
            "there is no Linux kernel in the guest's memory yet".to_owned()
        } else {
            format!(
                "the symbols of the guest's kernel are not among those of {} ({unfit} looked \
                 at); add them with 'xftrace symbols add FILE'; the guest has: {}",
                self.named(),
                there.join(" | ")
            )
        };
        let rest = start.elapsed().saturating_mul(EXPLAIN_REST);
        let until = Instant::now().checked_add(rest.max(EXPLAIN_EVERY));
        self.explained = until.map(|until| (until, text.clone()));
        Ok(text)
    }

    fn named(&self) -> String {
        let places = self.places.iter().map(|place| place.display().to_string());
        places.collect::<Vec<_>>().join(", ")
    }
}

/// What tells this content of the file from another; nothing, if it is gone.
fn stamp(path: &Path) -> Stamp {
    let meta = std::fs::metadata(path);
    meta.map_or((0, 0, 0, 0, 0), |meta| {
        let written = (meta.mtime(), meta.mtime_nsec());
        (meta.dev(), meta.ino(), meta.len(), written.0, written.1)
    })
}

/// The head of an index; any other file is read whole.
fn glance(path: &Path) -> Result<Glance, String> {
    if let Some(head) = File::open(path).ok().and_then(|file| Head::read(file).ok()) {
        return Ok(Glance {
            banner: head.banner,
            banner_offset: head.banner_offset,
            symbols: None,
        });
    }
    let known = Known::load(path).map_err(|error| error.to_string())?;
    Ok(Glance {
        banner_offset: known.symbols.banner_offset(),
        banner: known.banner,
        symbols: Some(Arc::new(known.symbols)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ram::{Gpa, Layout, VecRam};

    const BASE: u64 = 0xffff_ffff_8100_0000;

    fn map(banner: u64) -> String {
        format!(
            "{BASE:x} T _text\n{BASE:x} T _stext\n{:x} T _etext\n{:x} D linux_banner\n",
            BASE + 0x1000,
            BASE + banner
        )
    }

    #[test]
    fn only_what_lies_where_it_should_is_taken() {
        let ram = VecRam::new(Layout::flat(8 << 20).unwrap());
        let dir = tempfile::tempdir().unwrap();
        let away = dir.path().join("away");
        let none = Sources::new(vec![away]).fitting(&ram).unwrap();
        assert!(
            none.found.is_empty()
                && none.why.contains("away does not exist")
                && none.why.contains("symbols add"),
            "{none:?}"
        );
        let mut sources = Sources::new(vec![dir.path().to_owned()]);
        let none = sources.fitting(&ram).unwrap();
        assert!(
            none.found.is_empty() && none.why.contains("symbols add"),
            "{none:?}"
        );

        std::fs::write(dir.path().join("one"), map(0x2000)).unwrap();
        std::fs::write(dir.path().join("two"), map(0x3000)).unwrap();
        std::fs::write(dir.path().join(".half"), map(0x3000)).unwrap();
        let none = sources.fitting(&ram).unwrap();
        assert!(none.why.contains("no Linux kernel"), "{none:?}");

        ram.poke(Gpa((2 << 20) + 0x3000), b"Linux version 6.1.0 (a@b)\n\0");
        let names = |fitting: &Fitting| -> Vec<String> {
            let name = |(path, _): &(PathBuf, _)| path.file_name()?.to_str().map(str::to_owned);
            fitting.found.iter().filter_map(name).collect()
        };
        assert_eq!(names(&sources.fitting(&ram).unwrap()), ["two"]);

        // Put right while we look.
        std::fs::write(dir.path().join("one"), "rubbish").unwrap();
        std::fs::remove_file(dir.path().join("two")).unwrap();
        let none = sources.fitting(&ram).unwrap();
        assert!(
            none.found.is_empty() && none.why.contains("rubbish"),
            "{none:?}"
        );
        std::fs::write(dir.path().join("one"), map(0x3000)).unwrap();
        assert_eq!(names(&sources.fitting(&ram).unwrap()), ["one"]);
    }
}
