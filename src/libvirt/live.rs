//! What libvirt writes down of a running domain, and when it does.
//!
//! Some changes call no hook: a memory module that is plugged in is one. libvirt
//! saves the domain's XML as it runs after each of them, for its own next start,
//! beside the PID file (virDomainObjSave, src/conf/domain_conf.c), with what it
//! has learnt from QEMU: the address that a module has in the guest. It does so too
//! when the domain is paused or goes on, and when the guest is reset. To read that
//! takes no daemon that answers.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::xml::{DomainXml, MAX_XML};

/// Between two looks whether the file is another one.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Device, inode, length, and when it was written: libvirt writes a new file
/// and gives it the old one's name (virXMLSaveFile, src/util/virxml.c).
type Stamp = (u64, u64, u64, i64, i64);

/// What a domain that has a QEMU process does, by libvirt's word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doing {
    /// Its processors run.
    Runs,
    /// They do not: it is paused, suspended or crashed.
    StandsStill,
}

/// What a domain does just now; `None` where libvirt has not written it down.
pub fn doing(libvirt_run: &Path, domain: &DomainXml) -> Option<Doing> {
    let path = status_path(libvirt_run, domain);
    stamp(&path)?;
    let status = fs::read_to_string(path).ok()?;
    let noted = DomainXml::parse(domain_in(&status)?).ok()?;
    let is_it = noted.uuid == domain.uuid && noted.id == domain.id;
    is_it.then(|| doing_in(&status)).flatten()
}

fn status_path(libvirt_run: &Path, domain: &DomainXml) -> PathBuf {
    libvirt_run.join(format!("{}.xml", domain.name))
}

/// The XML of one start of a domain, as libvirt keeps it.
#[derive(Debug)]
pub struct LiveXml {
    path: PathBuf,
    uuid: Uuid,
    id: Option<u32>,
    looked: Option<Instant>,
    seen: Option<Stamp>,
    doing: Option<Doing>,
    written: Option<Instant>,
    /// What was seen is to be handed out once more.
    again: bool,
}

impl LiveXml {
    /// That of this domain, in the directory where libvirt has its PID files
    /// (/run/libvirt/qemu).
    pub fn new(libvirt_run: &Path, domain: &DomainXml) -> Self {
        Self {
            path: status_path(libvirt_run, domain),
            uuid: domain.uuid,
            id: domain.id,
            looked: None,
            seen: None,
            doing: None,
            written: None,
            again: false,
        }
    }

    /// What the domain does, by what was written last.
    pub fn doing(&self) -> Option<Doing> {
        self.doing
    }

    /// When that was written, as far as it was noticed since the first time.
    pub fn written(&self) -> Option<Instant> {
        self.written
    }

    /// The domain as it runs now, where libvirt has written it since this was
    /// asked last. What is not this start of this domain is none.
    pub fn changed(&mut self) -> Option<DomainXml> {
        if self.looked.is_some_and(|at| at.elapsed() < LOOK_EVERY) {
            return None;
        }
        self.looked = Some(Instant::now());
        let stamp = stamp(&self.path)?;
        let before = self.seen.replace(stamp);
        let is_new = before != Some(stamp);
        if is_new {
            self.written = before.and(self.looked);
        } else if !std::mem::take(&mut self.again) {
            return None;
        }
        self.doing = None;
        let status = fs::read_to_string(&self.path).ok()?;
        let domain = DomainXml::parse(domain_in(&status)?).ok()?;
        let is_it = domain.uuid == self.uuid && domain.id == self.id;
        self.doing = is_it.then(|| doing_in(&status)).flatten();
        is_it.then_some(domain)
    }

    /// Has what was given last be given again: nothing came of it.
    pub fn again(&mut self) {
        self.again = true;
    }
}

fn stamp(path: &Path) -> Option<Stamp> {
    let found = fs::symlink_metadata(path).ok()?;
    let fits = found.is_file() && found.len() <= 2 * MAX_XML as u64;
    let (seconds, nanoseconds) = (found.mtime(), found.mtime_nsec());
    fits.then_some((found.dev(), found.ino(), found.len(), seconds, nanoseconds))
}

/// What the domain does, as virDomainStateTypeToString() names it.
fn doing_in(status: &str) -> Option<Doing> {
    let (_, rest) = status.split_once("<domstatus ")?;
    let (attributes, _) = rest.split_once('>')?;
    let (_, state) = attributes.split_once("state='")?;
    match state.split_once('\'')?.0 {
        "running" | "blocked" => Some(Doing::Runs),
        "paused" | "pmsuspended" | "crashed" | "shutdown" | "shutoff" => Some(Doing::StandsStill),
        _ => None,
    }
}

/// The domain's own XML amid what libvirt notes beside it (`<domstatus>`),
/// none of which is named like that.
fn domain_in(status: &str) -> Option<&str> {
    const END: &str = "</domain>";
    let start = status.find("<domain ")?;
    let end = status.rfind(END)?.checked_add(END.len())?;
    status.get(start..end)
}

#[cfg(test)]
mod tests {
    use super::*;

    const UUID: &str = "9a3f1c50-7f1e-4f0e-8f5e-0123456789ab";

    fn status(id: u32, memory: u64) -> String {
        format!(
            "<!--\nWARNING: THIS IS AN AUTO-GENERATED FILE.\n-->\n\
             <domstatus state='running' reason='booted' pid='12'>\n  \
             <monitor path='/var/lib/libvirt/qemu/domain-1-web1/monitor.sock' type='unix'/>\n  \
             <domain type='qemu' id='{id}'>\n<name>web1</name><uuid>{UUID}</uuid>\
             <memory>{memory}</memory><metadata><x:y xmlns:x='z'>&lt;domain </x:y></metadata>\n  \
             </domain>\n</domstatus>\n"
        )
    }

    /// As libvirt does it.
    fn write(dir: &Path, text: &str) {
        let new = dir.join("web1.xml.new");
        fs::write(&new, text).unwrap();
        fs::rename(new, dir.join("web1.xml")).unwrap();
    }

    #[test]
    fn each_version_is_handed_out_once() {
        let dir = tempfile::tempdir().unwrap();
        let text = status(1, 1024);
        let domain = DomainXml::parse(domain_in(&text).unwrap()).unwrap();
        let mut live = LiveXml::new(dir.path(), &domain);
        let mut ask = || {
            live.looked = None;
            live.changed()
        };
        assert_eq!(ask(), None);
        write(dir.path(), &text);
        assert_eq!(ask().as_ref(), Some(&domain));
        assert_eq!(ask(), None);
        write(dir.path(), &status(1, 2048));
        assert_eq!(ask().unwrap().memory, 2 << 20);
        // Another start, another thing, and none.
        write(dir.path(), &status(2, 4096));
        assert_eq!(ask(), None);
        write(dir.path(), "</domain><domain ");
        assert_eq!(ask(), None);
        fs::remove_file(dir.path().join("web1.xml")).unwrap();
        assert_eq!(ask(), None);
    }

    #[test]
    fn what_came_to_nothing_is_handed_out_again() {
        let dir = tempfile::tempdir().unwrap();
        let text = status(1, 1024);
        let domain = DomainXml::parse(domain_in(&text).unwrap()).unwrap();
        let mut live = LiveXml::new(dir.path(), &domain);
        write(dir.path(), &text);
        for _ in 0..2 {
            live.looked = None;
            assert_eq!(live.changed().as_ref(), Some(&domain));
            live.again();
        }
        // It was written once.
        assert_eq!(live.written(), None);
    }

    #[test]
    fn it_says_whether_the_domain_runs_and_when_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let text = status(1, 1024);
        let domain = DomainXml::parse(domain_in(&text).unwrap()).unwrap();
        let mut live = LiveXml::new(dir.path(), &domain);
        let mut look = || {
            live.looked = None;
            live.changed();
            (live.doing(), live.written())
        };
        assert_eq!(look(), (None, None));
        assert_eq!(doing(dir.path(), &domain), None);
        write(dir.path(), &text);
        // That it is there is no news.
        assert_eq!(look(), (Some(Doing::Runs), None));
        let paused = text.replace("state='running'", "state='paused'");
        write(dir.path(), &paused);
        let (now, first) = look();
        assert_eq!(now, Some(Doing::StandsStill));
        assert_eq!(doing(dir.path(), &domain), Some(Doing::StandsStill));
        // Written anew, with nothing new in it, as when the guest is reset.
        write(dir.path(), &paused);
        let (now, second) = look();
        assert_eq!(now, Some(Doing::StandsStill));
        assert!(first.is_some() && second > first, "{first:?}, {second:?}");
        assert_eq!(look(), (now, second));
        // Another start says nothing of this one.
        write(dir.path(), &status(2, 1024));
        assert_eq!(look().0, None);
        assert_eq!(doing(dir.path(), &domain), None);
        write(dir.path(), &text.replace("running", "flying"));
        assert_eq!(look().0, None);
    }

    #[test]
    fn it_is_not_looked_at_all_the_time() {
        let dir = tempfile::tempdir().unwrap();
        let domain = DomainXml::parse(domain_in(&status(1, 1024)).unwrap()).unwrap();
        let mut live = LiveXml::new(dir.path(), &domain);
        assert_eq!(live.changed(), None);
        write(dir.path(), &status(1, 1024));
        assert_eq!(live.changed(), None, "looked again at once");
    }
}
