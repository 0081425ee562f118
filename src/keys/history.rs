//! The keys that were handed out, for the decoder.

use std::fmt;

use super::Entry;

/// The keys of a session by epoch. Epochs follow each other without a gap, so
/// that it is one vector.
#[derive(Clone, Default)]
pub struct KeyHistory {
    first_epoch: u64,
    keys: Vec<u64>,
    /// Wall clock of the first and the last entry, nanoseconds since 1970.
    span_ns: Option<(u64, u64)>,
}

impl KeyHistory {
    /// Adds the next key. `false`, and nothing is added, where its epoch does
    /// not follow the last one, or is 0.
    pub fn push(&mut self, entry: Entry) -> bool {
        if entry.epoch == 0 || (!self.keys.is_empty() && entry.epoch != self.last_epoch() + 1) {
            return false;
        }
        if self.keys.is_empty() {
            self.first_epoch = entry.epoch;
        }
        self.keys.push(entry.key);
        let first = self.span_ns.map_or(entry.wall_ns, |(first, _)| first);
        self.span_ns = Some((first, entry.wall_ns));
        true
    }

    /// The key of an epoch, if it was ever handed out.
    pub fn key(&self, epoch: u64) -> Option<u64> {
        let index = usize::try_from(epoch.checked_sub(self.first_epoch)?).ok()?;
        self.keys.get(index).copied()
    }

    /// The newest epoch; 0 where there is none.
    pub fn last_epoch(&self) -> u64 {
        self.first_epoch + self.keys.len() as u64 - u64::from(!self.keys.is_empty())
    }

    /// The oldest epoch; 0 where there is none.
    pub fn first_epoch(&self) -> u64 {
        self.first_epoch
    }

    /// How many keys there are.
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// The full epoch of which a record holds the low 32 bits: the newest one
    /// handed out with these bits, or, if there is none, the number as it is
    /// (which no key answers to).
    pub fn widen(&self, low: u32) -> u64 {
        let last = self.last_epoch();
        let same_high = (last & !0xffff_ffff) | u64::from(low);
        if same_high <= last {
            same_high
        } else {
            // Written before the low half wrapped around, or never handed out.
            same_high.checked_sub(1 << 32).unwrap_or(same_high)
        }
    }
}

/// Without the keys, which have no place in a log.
impl fmt::Debug for KeyHistory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyHistory")
            .field("first_epoch", &self.first_epoch)
            .field("last_epoch", &self.last_epoch())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(epoch: u64) -> Entry {
        Entry {
            epoch,
            key: !epoch,
            wall_ns: 0,
            mono_ns: 0,
        }
    }

    #[test]
    fn epochs_follow_each_other() {
        let mut history = KeyHistory::default();
        assert_eq!(
            (history.last_epoch(), history.key(0), history.key(1)),
            (0, None, None)
        );
        assert!(!history.push(entry(0)));
        assert!(history.push(entry(5)));
        assert!(!history.push(entry(5)) && !history.push(entry(7)) && !history.push(entry(4)));
        assert!(history.push(entry(6)));
        assert_eq!(
            (history.first_epoch(), history.last_epoch(), history.len()),
            (5, 6, 2)
        );
        assert_eq!(history.key(4), None);
        assert_eq!(history.key(5), Some(!5));
        assert_eq!(history.key(6), Some(!6));
        assert_eq!(history.key(7), None);
    }

    #[test]
    fn the_low_half_of_an_epoch_finds_the_whole() {
        let mut history = KeyHistory::default();
        assert!(history.push(entry(0xffff_ffff)));
        assert_eq!(history.widen(0xffff_ffff), 0xffff_ffff);
        assert_eq!(history.widen(0), 0, "not handed out yet");
        assert!(history.push(entry(0x1_0000_0000)));
        assert_eq!(history.widen(0), 0x1_0000_0000);
        assert_eq!(history.widen(0xffff_ffff), 0xffff_ffff);
        // Never handed out: whatever comes of it, no key answers to it.
        assert_eq!(history.key(history.widen(7)), None);
    }
}
