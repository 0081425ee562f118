//! Where sessions lie.

use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use super::{SessionError, META_FILE};

/// The directory that holds a domain's sessions: `NAME.xftrace` next to the
/// domain's log below `sessions`. A name with a slash or a leading dot, which
/// libvirt refuses as well, is made harmless.
pub fn domain_dir(sessions: &Path, domain: &str) -> PathBuf {
    let safe: String = domain
        .chars()
        .map(|c| if c == '/' || c == '\0' { '_' } else { c })
        .collect();
    let dots = safe.len() - safe.trim_start_matches('.').len();
    let safe = format!("{}{}", "_".repeat(dots), safe.trim_start_matches('.'));
    sessions.join(format!("{safe}.xftrace"))
}

/// A name for a session that begins now, in a directory that is there then:
/// the time in UTC, with a number behind it where that is taken.
///
/// # Errors
/// If the directory cannot be made.
pub fn new_dir(domain_dir: &Path, wall_ns: u64) -> Result<PathBuf, SessionError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(domain_dir)
        .map_err(SessionError::io("create", domain_dir))?;
    let name = stamp(wall_ns / 1_000_000_000);
    let mut dir = domain_dir.join(&name);
    for number in 2..1000 {
        if !dir.exists() {
            break;
        }
        dir = domain_dir.join(format!("{name}-{number}"));
    }
    Ok(dir)
}

/// The sessions below a domain's directory, newest first. None where it cannot
/// be read.
pub fn list(domain_dir: &Path) -> Vec<PathBuf> {
    let mut dirs: Vec<PathBuf> = fs::read_dir(domain_dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.join(META_FILE).is_file())
        .collect();
    dirs.sort_by_key(|dir| {
        let name = dir
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let (stamp, number) = name.split_once('-').unwrap_or((&name, "1"));
        (stamp.to_owned(), number.parse::<u32>().unwrap_or(0))
    });
    dirs.reverse();
    dirs
}

/// Seconds since 1970 as `20261123T093000Z`.
fn stamp(seconds: u64) -> String {
    let time = UNIX_EPOCH + Duration::from_secs(seconds);
    let text = humantime::format_rfc3339_seconds(time).to_string();
    text.chars().filter(|c| !matches!(c, '-' | ':')).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_is_named_by_its_time() {
        assert_eq!(stamp(1_795_426_200), "20261123T093000Z");
    }

    #[test]
    fn a_name_stays_below_the_directory() {
        let dir = Path::new("/logs");
        assert_eq!(domain_dir(dir, "web1"), Path::new("/logs/web1.xftrace"));
        assert_eq!(domain_dir(dir, "../x"), Path::new("/logs/___x.xftrace"));
        assert_eq!(domain_dir(dir, ""), Path::new("/logs/.xftrace"));
    }

    #[test]
    fn sessions_of_one_second_are_told_apart_and_listed_newest_first() {
        let root = tempfile::tempdir().expect("a directory");
        let mut made = Vec::new();
        for second in [5, 5, 5, 4] {
            let dir = new_dir(root.path(), second * 1_000_000_000).expect("a name");
            fs::create_dir(&dir).expect("a directory");
            fs::write(dir.join(META_FILE), "{}").expect("a file");
            made.push(dir);
        }
        fs::create_dir(root.path().join("no-session")).expect("a directory");
        let listed = list(root.path());
        assert_eq!(
            listed,
            [&made[2], &made[1], &made[0], &made[3]].map(Clone::clone)
        );
    }
}
