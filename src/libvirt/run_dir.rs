//! The run directory (/run/xftrace): for each running domain that is traced,
//! its XML, the lock of its helper, its helper's socket, and where its kernel lies
//! in its memory, all named by UUID.
//!
//! Who does what, so that no start of a domain is missed:
//!
//! - The hook saves the XML, then starts a helper unless one holds the lock.
//! - The helper takes the lock ([`RunDir::claim`]), serves the domain, and
//!   when that one's QEMU has ended, gives the lock back and then looks for an
//!   XML with another id ([`RunDir::saved`]): a domain that was started anew
//!   while the helper still wrote the last trace. If there is one, it claims
//!   again and serves that.
//!
//! As each of them writes before it looks, at least one of them sees the
//! other.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use nix::errno::Errno;
use nix::fcntl::{fcntl, FcntlArg};
use nix::libc::{flock, F_UNLCK, F_WRLCK, SEEK_SET};
use uuid::Uuid;

use super::xml::{DomainXml, MAX_XML};

/// The run directory could not be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} {}", path.display())]
pub struct RunDirError {
    what: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// The run directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunDir {
    path: PathBuf,
}

/// The file whose time says when the hook was called.
const HOOK_CALLED: &str = "hook-called";

/// The lock of a domain's helper, held until this is dropped or the process
/// ends in whichever way.
#[derive(Debug)]
pub struct Claim {
    _file: File,
}

impl RunDir {
    /// The run directory at this path, which may not exist yet.
    pub fn at(path: &Path) -> RunDir {
        RunDir {
            path: path.to_owned(),
        }
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where a domain's XML is.
    pub fn xml_path(&self, uuid: Uuid) -> PathBuf {
        self.file(uuid, "xml")
    }

    /// Where the socket of a domain's helper is.
    pub fn socket_path(&self, uuid: Uuid) -> PathBuf {
        self.file(uuid, "sock")
    }

    /// A file of a domain. A [`Uuid`] prints as hex digits and dashes only, so
    /// that the name cannot lead elsewhere.
    fn file(&self, uuid: Uuid, kind: &str) -> PathBuf {
        self.path.join(format!("{uuid}.{kind}"))
    }

    /// Makes the directory, for its owner alone, where it is not there.
    ///
    /// # Errors
    /// Where it can neither be found nor made.
    pub fn create(&self) -> Result<(), RunDirError> {
        fs::DirBuilder::new()
            .mode(0o700)
            .recursive(true)
            .create(&self.path)
            .map_err(failed("make", &self.path))
    }

    /// Saves the XML of a domain, replacing what was there in one step.
    ///
    /// # Errors
    /// Where the directory cannot be written.
    pub fn save(&self, uuid: Uuid, xml: &[u8]) -> Result<PathBuf, RunDirError> {
        self.replace(self.xml_path(uuid), xml)
    }

    /// Saves what is known of where a domain's kernel lies, in the same way.
    ///
    /// # Errors
    /// Where the directory cannot be written.
    pub fn save_kernel(&self, uuid: Uuid, text: &[u8]) -> Result<PathBuf, RunDirError> {
        self.replace(self.file(uuid, "kernel"), text)
    }

    /// What was saved of that, if it can be read.
    pub fn kernel(&self, uuid: Uuid) -> Option<Vec<u8>> {
        fs::read(self.file(uuid, "kernel")).ok()
    }

    fn replace(&self, path: PathBuf, content: &[u8]) -> Result<PathBuf, RunDirError> {
        self.create()?;
        // A temporary file is 0600 from its creation on.
        tempfile::NamedTempFile::new_in(&self.path)
            .and_then(|mut file| {
                file.write_all(content)?;
                file.persist(&path).map_err(|error| error.error)
            })
            .map_err(failed("write", &path))?;
        Ok(path)
    }

    /// Notes that libvirt has called the hook now.
    ///
    /// # Errors
    /// Where the directory cannot be written.
    pub fn note_hook_call(&self) -> Result<(), RunDirError> {
        self.create()?;
        let path = self.path.join(HOOK_CALLED);
        OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .and_then(|file| file.set_modified(SystemTime::now()))
            .map_err(failed("touch", &path))
    }

    /// When libvirt last called the hook; None where it has not since the
    /// host was booted.
    pub fn hook_called(&self) -> Option<SystemTime> {
        let file = fs::metadata(self.path.join(HOOK_CALLED)).ok()?;
        file.modified().ok()
    }

    /// The XML that was saved of a domain; None where there is none that can
    /// be read as a domain's.
    pub fn saved(&self, uuid: Uuid) -> Option<DomainXml> {
        let mut xml = Vec::new();
        File::open(self.xml_path(uuid))
            .and_then(|file| file.take(MAX_XML as u64 + 1).read_to_end(&mut xml))
            .ok()?;
        let domain = DomainXml::parse_bytes(&xml).ok()?;
        (domain.uuid == uuid).then_some(domain)
    }

    /// All domains whose XML is saved, by name. Empty where the directory
    /// cannot be read.
    pub fn domains(&self) -> Vec<DomainXml> {
        let entries = fs::read_dir(&self.path).into_iter().flatten().flatten();
        let mut all: Vec<DomainXml> = entries
            .filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                let uuid = Uuid::try_parse(name.strip_suffix(".xml")?).ok()?;
                self.saved(uuid)
            })
            .collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    /// Removes what is left of a domain that has ended: its XML, its kernel's place, and the
    /// socket and lock of a helper that is no more. Those of a helper that
    /// still writes the last trace are its own to remove.
    ///
    /// # Errors
    /// Where a file is there and cannot be removed.
    pub fn forget(&self, uuid: Uuid) -> Result<(), RunDirError> {
        let stale: &[&str] = match self.has_helper(uuid) {
            true => &["xml", "kernel"],
            false => &["xml", "kernel", "sock", "lock"],
        };
        for kind in stale {
            let path = self.file(uuid, kind);
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(failed("remove", &path)(error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Whether a helper runs for the domain: whether its lock is held. Asking
    /// takes no lock, so that it cannot get in the way of one who takes it.
    pub fn has_helper(&self, uuid: Uuid) -> bool {
        let Ok(file) = File::open(self.file(uuid, "lock")) else {
            return false;
        };
        let mut lock = whole_file();
        match fcntl(&file, FcntlArg::F_OFD_GETLK(&mut lock)) {
            Ok(_) => i32::from(lock.l_type) != F_UNLCK,
            Err(_) => false,
        }
    }

    /// Takes the lock of a domain's helper; None where another has it.
    ///
    /// # Errors
    /// Where the directory cannot be written.
    pub fn claim(&self, uuid: Uuid) -> Result<Option<Claim>, RunDirError> {
        self.create()?;
        let path = self.file(uuid, "lock");
        loop {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(&path)
                .map_err(failed("open", &path))?;
            match fcntl(&file, FcntlArg::F_OFD_SETLK(&whole_file())) {
                Ok(_) => {}
                Err(Errno::EAGAIN | Errno::EACCES) => return Ok(None),
                Err(errno) => return Err(failed("lock", &path)(errno.into())),
            }
            // Someone may have removed the file between the two steps: then
            // the lock is on a file that nobody else will ever find.
            let ours = file.metadata().map_err(failed("look at", &path))?;
            match fs::metadata(&path) {
                Ok(there) if there.ino() == ours.ino() && there.dev() == ours.dev() => {
                    return Ok(Some(Claim { _file: file }));
                }
                _ => {}
            }
        }
    }
}

/// An exclusive lock on all of a file. An open file description's lock
/// (fcntl(2), "Open file description locks") goes with the description and not
/// with the process.
fn whole_file() -> flock {
    flock {
        l_type: F_WRLCK as i16,
        l_whence: SEEK_SET as i16,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RunDirError {
    let path = path.to_owned();
    move |source| RunDirError { what, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    const XML: &str = "<domain id='4'><name>web1</name>\
        <uuid>9a3f1c50-7f1e-4f0e-8f5e-0123456789ab</uuid><memory>1</memory></domain>";

    fn setting() -> (tempfile::TempDir, RunDir, Uuid) {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::at(&dir.path().join("xftrace"));
        let uuid = Uuid::try_parse("9a3f1c50-7f1e-4f0e-8f5e-0123456789ab").unwrap();
        (dir, run, uuid)
    }

    #[test]
    fn saves_for_the_owner_alone_and_reads_back() {
        let (_dir, run, uuid) = setting();
        assert_eq!(run.saved(uuid), None);
        assert_eq!(run.domains(), []);
        let path = run.save(uuid, XML.as_bytes()).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&path), 0o600);
        assert_eq!(mode(run.path()), 0o700);
        assert_eq!(run.saved(uuid).unwrap().id, Some(4));
        assert_eq!(run.domains().len(), 1);
        // Nothing but the file itself is left behind.
        assert_eq!(fs::read_dir(run.path()).unwrap().count(), 1);
        run.forget(uuid).unwrap();
        run.forget(uuid).unwrap();
        assert_eq!(fs::read_dir(run.path()).unwrap().count(), 0);
    }

    #[test]
    fn remembers_when_the_hook_was_called() {
        let (_dir, run, _) = setting();
        assert_eq!(run.hook_called(), None);
        let before = SystemTime::now();
        run.note_hook_call().unwrap();
        let first = run.hook_called().unwrap();
        assert!(first >= before);
        run.note_hook_call().unwrap();
        assert!(run.hook_called().unwrap() > first);
        assert_eq!(run.domains(), []);
    }

    #[test]
    fn an_xml_under_another_uuid_is_none() {
        let (_dir, run, _) = setting();
        let other = Uuid::nil();
        run.save(other, XML.as_bytes()).unwrap();
        assert_eq!(run.saved(other), None);
        assert_eq!(run.domains(), []);
    }

    #[test]
    fn one_helper_holds_the_lock() {
        let (_dir, run, uuid) = setting();
        assert!(!run.has_helper(uuid));
        let claim = run.claim(uuid).unwrap().unwrap();
        assert!(run.has_helper(uuid));
        assert!(run.claim(uuid).unwrap().is_none());
        run.save(uuid, XML.as_bytes()).unwrap();
        run.forget(uuid).unwrap();
        assert!(
            run.has_helper(uuid),
            "the lock of a live helper was removed"
        );
        drop(claim);
        assert!(!run.has_helper(uuid));
        assert!(run.claim(uuid).unwrap().is_some());
        run.forget(uuid).unwrap();
        assert_eq!(fs::read_dir(run.path()).unwrap().count(), 0);
    }
}
