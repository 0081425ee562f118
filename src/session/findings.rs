//! What the guest was caught at: `findings.jsonl`, of a session and of a domain.
//!
//! What a trace shows belongs to its session. What is found in the guest's memory
//! belongs to the domain, since no trace need be on: it goes to a file beside the
//! sessions.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{SessionError, FINDINGS_FILE};
use crate::integrity;
use crate::keys::Tamper;

/// How large a domain's file may become, bytes: then it is the old one, and a new one
/// begins. A guest can be caught as often as it likes.
const DOMAIN_LIMIT: u64 = 4 << 20;

/// Something the guest was caught at, one a line of `findings.jsonl`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// When it was noticed, host wall clock, nanoseconds since 1970.
    pub wall_ns: u64,
    /// What.
    #[serde(flatten)]
    pub kind: FindingKind,
}

/// What a [`Finding`] is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "finding", rename_all = "kebab-case")]
pub enum FindingKind {
    /// The guest changed what the host had put into `global_key`.
    KeyChanged(Tamper),
    /// Records that decode under no key, so many since the last line.
    ForgedRecords {
        /// How many.
        records: u64,
    },
    /// The guest's tracer is not function_graph while the trace is on.
    TracerOff,
    /// The guest was down for long, or booted and could not be traced.
    NotTraced {
        /// Why.
        why: String,
    },
    /// The guest's ring buffer, or a part of it, takes no records while the trace is on.
    RecordingOff {
        /// What keeps them out, where that is known.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        gate: Option<String>,
    },
    /// The guest's ring buffer was swapped for another one (a snapshot) while
    /// the trace is on. Both are read; but of two swaps between two looks one
    /// goes unseen, and what was recorded between them is out of its order.
    BufferSwapped,
    /// The file is as large as it may become: this is its last line, and what
    /// is found from here on is counted only.
    Full,
    /// The guest's control flow is not what its baseline says.
    ControlFlow(Box<ControlFlow>),
    /// The kernel in the guest's memory is not what was built.
    Integrity(Box<Integrity>),
    /// What was found in the guest's memory is there no more.
    IntegrityGone(Box<Integrity>),
    /// The kernel in the guest's memory could not be checked, or not wholly: that
    /// nothing is found means nothing.
    IntegrityDoubt(Doubt),
    /// The guest's memory could not be looked at for a while, though the domain runs.
    NotLookedAt {
        /// Why.
        why: String,
        /// For how long, seconds.
        seconds: u64,
        /// How often, since it was told last.
        count: u64,
    },
    /// The guest's kernel says that it has booted, and libvirt noted no reset of the
    /// domain: the guest started another kernel by itself (kexec), or only says so.
    BootWithoutReset {
        /// How often, since it was told last.
        count: u64,
    },
}

/// Why a look at the guest's memory says less than it should.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Doubt {
    /// What could not be checked; none where it is about all that was found.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub check: Option<integrity::Check>,
    /// Why.
    pub doubt: String,
    /// In how many looks, since it was told last.
    pub count: u64,
}

/// What [`detect`](crate::detect) found while the guest was traced.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ControlFlow {
    /// The rule that found it.
    pub rule: String,
    /// How sure it is.
    pub severity: String,
    /// What it is about.
    pub subject: String,
    /// What was seen.
    pub what: String,
    /// How often, since it was told of last.
    pub count: u64,
    /// The first time, as a verdict has it.
    #[serde(default, skip_serializing_if = "serde_json::Value::is_null")]
    pub evidence: serde_json::Value,
}

/// Something in the guest's memory that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Integrity {
    /// What, as a verdict has it.
    #[serde(flatten)]
    pub change: integrity::Finding,
    /// In how many looks it was seen, since it was told of last; of what is gone, in
    /// how many in all.
    pub count: u64,
    /// How often it was another thing that was found there than in the look before, or
    /// had come back, since it was told of last.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub changes: u64,
}

#[allow(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde hands over a reference"
)]
fn is_zero(count: &u64) -> bool {
    *count == 0
}

/// What was found in the memory of a domain's guest: `findings.jsonl` beside its
/// sessions, and the one before it with `.1` behind the name.
#[derive(Clone, Debug)]
pub struct DomainFindings {
    dir: PathBuf,
}

impl DomainFindings {
    /// Those of the domain whose sessions are in `domain_dir`, which need not be there.
    pub fn at(domain_dir: &Path) -> Self {
        Self {
            dir: domain_dir.to_owned(),
        }
    }

    /// Adds a line.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn note(&self, finding: &Finding) -> Result<(), SessionError> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.dir)
            .map_err(SessionError::io("create", &self.dir))?;
        let path = self.dir.join(FINDINGS_FILE);
        let write = || SessionError::io("write", &path);
        if fs::metadata(&path).is_ok_and(|file| file.len() >= DOMAIN_LIMIT) {
            let old = self.dir.join(format!("{FINDINGS_FILE}.1"));
            fs::rename(&path, &old).map_err(SessionError::io("rename", &path))?;
        }
        let mut line = serde_json::to_vec(finding)
            .map_err(std::io::Error::from)
            .map_err(write())?;
        line.push(b'\n');
        OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(&path)
            .and_then(|mut file| file.write_all(&line))
            .map_err(write())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(place: &str) -> Finding {
        let change = integrity::Finding {
            check: integrity::Check::KernelText,
            place: place.to_owned(),
            address: u64::MAX,
            expected: "90".to_owned(),
            found: "cc".to_owned(),
            owner: None,
        };
        Finding {
            wall_ns: 7,
            kind: FindingKind::Integrity(Box::new(Integrity {
                change,
                count: 2,
                changes: 0,
            })),
        }
    }

    #[test]
    fn a_change_in_memory_is_one_flat_line() {
        let line = serde_json::to_string(&found("vfs_read")).expect("JSON");
        assert_eq!(
            line,
            r#"{"wall_ns":7,"finding":"integrity","check":"kernel-text","place":"vfs_read","address":18446744073709551615,"expected":"90","found":"cc","count":2}"#
        );
        let read: Finding = serde_json::from_str(&line).expect("a finding");
        assert_eq!(read, found("vfs_read"));
    }

    #[test]
    fn a_domain_s_findings_are_two_files_of_so_much_each() {
        let parent = tempfile::tempdir().expect("a directory");
        let dir = parent.path().join("web1.xftrace");
        let findings = DomainFindings::at(&dir);
        let long = "x".repeat(100_000);
        for number in 0..100 {
            findings
                .note(&found(&format!("{number} {long}")))
                .expect("a line");
        }
        let length = |name: &str| fs::metadata(dir.join(name)).expect("a file").len();
        let old = length("findings.jsonl.1");
        assert!(
            (DOMAIN_LIMIT..DOMAIN_LIMIT + 200_000).contains(&old),
            "{old}"
        );
        assert!(length(FINDINGS_FILE) < DOMAIN_LIMIT);
        assert_eq!(fs::read_dir(&dir).expect("files").count(), 2);
        let newest = fs::read_to_string(dir.join(FINDINGS_FILE)).expect("text");
        let last = newest.lines().next_back().expect("a line");
        assert!(last.contains("\"place\":\"99 x"), "{}", &last[..80]);
    }
}
