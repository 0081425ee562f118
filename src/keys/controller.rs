//! Key_Controller: makes keys, notes them, hands them to the guest.

use std::collections::VecDeque;
use std::time::Duration;

use nix::time::{clock_gettime, ClockId};
use rand::rngs::SysRng;
use rand::TryRng;
use serde::{Deserialize, Serialize};

use crate::ram::{Gpa, GuestRam, RamError};

use super::{Entry, Klog, KlogError};

/// Why no key could be handed out.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The key could not be noted, so it was not handed out.
    #[error(transparent)]
    Klog(#[from] KlogError),
    /// The operating system gave no random bits.
    #[error("the operating system's random generator failed: {0}")]
    Random(String),
    /// There was no thread to hand them out.
    #[error("the thread that hands out keys cannot be started: {0}")]
    Thread(std::io::Error),
    /// The guest went away while its key was noted.
    #[error(
        "the guest was reset, or stopped, while its key of epoch {epoch} was written to disk: \
         it was not handed out"
    )]
    GuestGone {
        /// The epoch of that key, which is used for no other.
        epoch: u64,
    },
    /// Guest memory could not be written.
    #[error(transparent)]
    Ram(#[from] RamError),
}

/// Something in the guest's `global_key` that is not what was put there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "what", rename_all = "kebab-case")]
pub enum Tamper {
    /// The epoch was changed.
    Epoch {
        /// What the host had written.
        expected: u64,
        /// What stood there.
        found: u64,
    },
    /// The key of an epoch was changed. (Neither key is told: a log is no
    /// place for the one, and the other is the guest's to choose.)
    Key {
        /// Whose key.
        epoch: u64,
    },
}

/// Hands out one key after another to one boot of one guest.
#[derive(Debug)]
pub struct KeyController {
    klog: Klog,
    keys: Gpa,
    slots: u64,
    /// What is in the guest's slots now: for each, the newest of this boot.
    given: VecDeque<(u64, u64)>,
}

impl KeyController {
    /// A controller that writes to `global_key` at `keys`, which has `slots`
    /// key slots, and goes on after the last epoch of `klog`.
    pub fn new(klog: Klog, keys: Gpa, slots: u32) -> Self {
        Self {
            klog,
            keys,
            slots: u64::from(slots.max(2)),
            given: VecDeque::new(),
        }
    }

    /// The guest was booted anew: its slots are empty, and may lie elsewhere.
    pub fn rebooted(&mut self, keys: Gpa, slots: u32) {
        self.keys = keys;
        self.slots = u64::from(slots.max(2));
        self.given.clear();
    }

    /// The epoch of the last key that was noted; 0 where there is none.
    pub fn epoch(&self) -> u64 {
        self.klog.last_epoch()
    }

    /// Makes the next key, notes it on disk, tells it to `noted`, and then, if
    /// the guest `is_there`, hands it to it: the slot first, the epoch after
    /// it. So whoever decodes can know each key before a record can be made
    /// with it. `is_there` is asked after the disk was waited for, right
    /// before guest memory is written.
    ///
    /// Noting a key waits for the disk, and the guest can change the epoch
    /// meanwhile. It is about to be overwritten, so what is there is looked at
    /// once more: gives the key, and what [`KeyController::verify`] found.
    ///
    /// # Errors
    /// See [`KeyError`]. After any of them the guest still has the old key;
    /// the caller may try again.
    pub fn rotate(
        &mut self,
        ram: &dyn GuestRam,
        noted: impl FnOnce(Entry),
        is_there: impl FnOnce() -> bool,
    ) -> Result<(Entry, Vec<Tamper>), KeyError> {
        let key = SysRng
            .try_next_u64()
            .map_err(|e| KeyError::Random(e.to_string()))?;
        let entry = Entry {
            epoch: self.klog.last_epoch() + 1,
            key,
            wall_ns: clock_ns(ClockId::CLOCK_REALTIME),
            mono_ns: clock_ns(ClockId::CLOCK_MONOTONIC),
        };
        self.klog.append(&entry)?;
        noted(entry);
        if !is_there() {
            return Err(KeyError::GuestGone { epoch: entry.epoch });
        }
        let found = self.verify(ram)?;
        // Not by their number: an epoch that was not handed out left its slot
        // to an older key.
        let slot = self.slot(entry.epoch);
        self.given
            .retain(|&(epoch, _)| epoch % self.slots != entry.epoch % self.slots);
        ram.write_u64(slot, entry.key)?;
        ram.write_u64(self.keys, entry.epoch)?;
        self.given.push_back((entry.epoch, entry.key));
        Ok((entry, found))
    }

    /// Compares what lies in the guest with what was put there, and puts it
    /// right again. Each difference is told once, as it is gone afterwards.
    ///
    /// # Errors
    /// If guest memory cannot be read or written.
    pub fn verify(&self, ram: &dyn GuestRam) -> Result<Vec<Tamper>, RamError> {
        let mut found = Vec::new();
        for &(epoch, key) in &self.given {
            let slot = self.slot(epoch);
            if ram.read_u64(slot)? != key {
                ram.write_u64(slot, key)?;
                found.push(Tamper::Key { epoch });
            }
        }
        if let Some(&(expected, _)) = self.given.back() {
            let there = ram.read_u64(self.keys)?;
            if there != expected {
                ram.write_u64(self.keys, expected)?;
                found.push(Tamper::Epoch {
                    expected,
                    found: there,
                });
            }
        }
        Ok(found)
    }

    fn slot(&self, epoch: u64) -> Gpa {
        Gpa(self.keys.0.wrapping_add(8 + 8 * (epoch % self.slots)))
    }
}

/// A clock of this host, in nanoseconds; 0 if it cannot be read.
fn clock_ns(clock: ClockId) -> u64 {
    clock_gettime(clock).map_or(0, |time| Duration::from(time).as_nanos() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ram::VecRam;

    const KEYS: Gpa = Gpa(0x100);

    fn controller(slots: u32) -> (tempfile::TempDir, VecRam, KeyController) {
        let dir = tempfile::tempdir().expect("a directory");
        let klog = Klog::create(&dir.path().join("klog")).expect("a klog");
        (
            dir,
            VecRam::from_bytes(&[0; 4096]),
            KeyController::new(klog, KEYS, slots),
        )
    }

    fn word(ram: &VecRam, index: u64) -> u64 {
        ram.read_u64(Gpa(KEYS.0 + 8 * index)).expect("a word")
    }

    #[test]
    fn a_key_goes_to_its_slot_and_is_on_disk() {
        let (dir, ram, mut controller) = controller(4);
        for epoch in 1..=9 {
            let (entry, found) = controller.rotate(&ram, drop, || true).expect("a key");
            assert_eq!(found, []);
            assert_eq!((entry.epoch, word(&ram, 0)), (epoch, epoch));
            assert_eq!(word(&ram, 1 + epoch % 4), entry.key);
            let noted = Klog::read(&dir.path().join("klog")).expect("a history");
            assert_eq!(noted.key(epoch), Some(entry.key));
        }
        assert_eq!(controller.verify(&ram).expect("a look"), []);
    }

    #[test]
    fn keys_differ() {
        let (_dir, ram, mut controller) = controller(4);
        let keys: std::collections::HashSet<_> = (0..64)
            .map(|_| controller.rotate(&ram, drop, || true).expect("a key").0.key)
            .collect();
        assert_eq!(keys.len(), 64);
    }

    #[test]
    fn the_key_is_on_disk_before_it_is_in_the_guest() {
        // A guest memory that cannot be written to: the key is noted all the
        // same, and so its epoch is never used for another key.
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("klog");
        let ram = VecRam::from_bytes(&[0; 4096]).read_only();
        let mut controller = KeyController::new(Klog::create(&path).expect("a klog"), KEYS, 4);
        assert!(matches!(
            controller.rotate(&ram, drop, || true),
            Err(KeyError::Ram(_))
        ));
        assert_eq!(Klog::read(&path).expect("a history").last_epoch(), 1);
        assert_eq!(controller.epoch(), 1);
    }

    #[test]
    fn a_guest_that_went_away_while_its_key_was_noted_is_not_written_to() {
        let (_dir, ram, mut controller) = controller(4);
        controller.rotate(&ram, drop, || true).expect("a key");
        let memory = || {
            let mut bytes = vec![0; 4096];
            ram.read(Gpa(0), &mut bytes).map(|()| bytes)
        };
        let before = memory().expect("a look");
        assert!(matches!(
            controller.rotate(&ram, drop, || false),
            Err(KeyError::GuestGone { epoch: 2 })
        ));
        assert_eq!(memory().expect("a look"), before);
        // Its epoch is not used again.
        assert_eq!(
            controller
                .rotate(&ram, drop, || true)
                .expect("a key")
                .0
                .epoch,
            3
        );
        assert_eq!(controller.verify(&ram).expect("a look"), []);
        // Nor is the key that its slot has put back when that is due again.
        for epoch in 4..=12 {
            let (entry, found) = controller.rotate(&ram, drop, || true).expect("a key");
            assert_eq!((entry.epoch, found), (epoch, vec![]));
            assert_eq!(word(&ram, 1 + epoch % 4), entry.key);
            assert_eq!(controller.verify(&ram).expect("a look"), []);
        }
    }

    #[test]
    fn what_the_guest_changed_is_told_once_and_put_right() {
        let (_dir, ram, mut controller) = controller(4);
        let (first, _) = controller.rotate(&ram, drop, || true).expect("a key");
        controller.rotate(&ram, drop, || true).expect("a key");
        ram.write_u64(Gpa(KEYS.0 + 16), 7).expect("a write");
        ram.write_u64(KEYS, 77).expect("a write");
        let found = controller.verify(&ram).expect("a look");
        assert_eq!(
            found,
            [
                Tamper::Key { epoch: 1 },
                Tamper::Epoch {
                    expected: 2,
                    found: 77
                }
            ]
        );
        assert_eq!((word(&ram, 0), word(&ram, 2)), (2, first.key));
        assert_eq!(controller.verify(&ram).expect("a look"), []);
    }

    #[test]
    fn what_the_guest_changes_while_a_key_is_noted_is_told() {
        let (_dir, ram, mut controller) = controller(4);
        controller.rotate(&ram, drop, || true).expect("a key");
        let change = |_| ram.write_u64(KEYS, 77).expect("a write");
        let (entry, found) = controller.rotate(&ram, change, || true).expect("a key");
        assert_eq!(
            found,
            [Tamper::Epoch {
                expected: 1,
                found: 77
            }]
        );
        assert_eq!((entry.epoch, word(&ram, 0)), (2, 2));
    }

    #[test]
    fn a_slot_that_was_never_given_is_not_looked_at() {
        let (_dir, ram, mut controller) = controller(4);
        controller.rotate(&ram, drop, || true).expect("a key");
        ram.write_u64(Gpa(KEYS.0 + 24), 7).expect("a write");
        assert_eq!(controller.verify(&ram).expect("a look"), []);
    }

    #[test]
    fn a_reboot_keeps_counting_elsewhere() {
        let (_dir, ram, mut controller) = controller(4);
        controller.rotate(&ram, drop, || true).expect("a key");
        let elsewhere = Gpa(0x800);
        controller.rebooted(elsewhere, 8);
        assert_eq!(controller.verify(&ram).expect("a look"), []);
        let (entry, _) = controller.rotate(&ram, drop, || true).expect("a key");
        assert_eq!(entry.epoch, 2);
        assert_eq!(ram.read_u64(elsewhere).expect("a word"), 2);
    }
}
