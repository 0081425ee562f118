//! Which of the kernels that were found in guest memory is the one that runs?
//!
//! More than one place may pass all that the finder checks: the image of a
//! kernel that ran before a reset, and copies that somebody planted. What runs
//! moves: its heart beats, and so a kernel is taken only once looks at it
//! differ. A copy that moves too, kept alive by whoever controls the guest's
//! kernel, is as good as the true one as far as memory shows. So the choice
//! goes by what the host knows by itself, and is the same each time:
//!
//! 1. The kernel that is attached stays for as long as it lives.
//! 2. Where one was before is where it is still: a kernel does not move. The
//!    place is that of the kernel attached last, by this helper or another
//!    ([`super::place`]).
//! 3. The one at the lowest address; but that is a guess, and nothing is traced on
//!    the strength of it while another lives. Of several files of symbols that fit it,
//!    one comes first that says where the list of functions is, which was
//!    compared then.
//!
//! While there is one to be preferred that stands still, another has to move
//! at several looks in a row. A guest that was paused goes on with all that is
//! in it, and whose heart is seen first is chance.

use std::collections::HashMap;

use crate::ram::Gpa;

/// At how many looks in a row a kernel has to have moved, where another would
/// be preferred. Between two looks a heart beats several times.
const LOOKS: u32 = 3;

/// The kernels seen so far that were not taken, and what is known of the one
/// that was.
#[derive(Debug, Default)]
pub(super) struct Candidates {
    /// By place, and by what is another at each boot.
    seen: HashMap<(Gpa, u64), Seen>,
    next: HashMap<(Gpa, u64), Seen>,
    /// Where the guest's kernel was when that was known.
    known: Option<Gpa>,
}

#[derive(Clone, Copy, Debug)]
struct Seen {
    beats: u64,
    /// At how many looks in a row it had moved.
    moved: u32,
}

impl Candidates {
    /// Notes where the guest's kernel is.
    pub(super) fn known_at(&mut self, place: Gpa) {
        self.known = Some(place);
    }

    /// Where it was.
    pub(super) fn known(&self) -> Option<Gpa> {
        self.known
    }

    /// Whether this is where it was.
    pub(super) fn is_known(&self, place: Gpa) -> bool {
        self.known == Some(place)
    }

    /// Forgets how they moved: the one that is attached lives.
    pub(super) fn clear(&mut self) {
        self.seen.clear();
        self.next.clear();
    }

    /// Notes a kernel at this look.
    pub(super) fn note(&mut self, place: Gpa, boot: u64, beats: u64) {
        let before = self.seen.get(&(place, boot));
        let moved = match before {
            Some(before) if before.beats != beats => before.moved.saturating_add(1),
            _ => 0,
        };
        self.next.insert((place, boot), Seen { beats, moved });
    }

    /// The end of a look: the places of those that live, in the order in which
    /// they are to be taken. `attached`: there is a kernel, which is silent.
    pub(super) fn living(&mut self, attached: bool) -> Vec<Gpa> {
        self.seen = std::mem::take(&mut self.next);
        let known = self.known;
        let is_known = |place: Gpa| known == Some(place);
        let held = attached || self.seen.keys().any(|(place, _)| is_known(*place));
        let lives = |(place, _): &(Gpa, u64), seen: &Seen| {
            let waits = attached || (held && !is_known(*place));
            seen.moved >= if waits { LOOKS } else { 1 }
        };
        let living = self.seen.iter().filter(|(at, seen)| lives(at, seen));
        let mut living: Vec<Gpa> = living.map(|((place, _), _)| *place).collect();
        living.sort_unstable_by_key(|&place| (!is_known(place), place));
        living.dedup();
        living
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOW: Gpa = Gpa(0x20_0000);
    const HIGH: Gpa = Gpa(0x80_0000);

    /// A look at which both are there, with those beats.
    fn look(candidates: &mut Candidates, attached: bool, low: u64, high: u64) -> Vec<Gpa> {
        candidates.note(HIGH, 1, high);
        candidates.note(LOW, 1, low);
        candidates.living(attached)
    }

    #[test]
    fn what_stands_still_is_not_taken_and_the_lowest_of_others_comes_first() {
        let mut candidates = Candidates::default();
        assert_eq!(look(&mut candidates, false, 5, 5), []);
        assert_eq!(look(&mut candidates, false, 5, 6), [HIGH]);
        assert_eq!(look(&mut candidates, false, 6, 7), [LOW, HIGH]);
        // Not seen at one look is anew at the next.
        assert_eq!(candidates.living(false), []);
        assert_eq!(look(&mut candidates, false, 7, 8), []);
    }

    #[test]
    fn another_boot_in_the_same_place_is_another_kernel() {
        let mut candidates = Candidates::default();
        candidates.note(LOW, 1, 5);
        assert_eq!(candidates.living(false), []);
        candidates.note(LOW, 2, 0);
        assert_eq!(candidates.living(false), []);
    }

    #[test]
    fn the_known_one_comes_first_and_is_waited_for() {
        let mut candidates = Candidates::default();
        candidates.known_at(HIGH);
        // The other moves first.
        assert_eq!(look(&mut candidates, false, 1, 1), []);
        assert_eq!(look(&mut candidates, false, 2, 1), []);
        assert_eq!(look(&mut candidates, false, 3, 2), [HIGH]);
        assert_eq!(look(&mut candidates, false, 4, 3), [HIGH, LOW]);
        // Not for ever, and not where it is gone.
        let mut candidates = Candidates::default();
        candidates.known_at(HIGH);
        let looks: Vec<_> = (0..4)
            .map(|beat| look(&mut candidates, false, beat, 1))
            .collect();
        assert_eq!(looks, [vec![], vec![], vec![], vec![LOW]]);
        let mut candidates = Candidates::default();
        candidates.known_at(Gpa(0));
        look(&mut candidates, false, 1, 1);
        assert_eq!(look(&mut candidates, false, 2, 1), [LOW]);
    }

    #[test]
    fn a_silent_one_is_given_time() {
        let mut candidates = Candidates::default();
        let looks: Vec<_> = (0..4)
            .map(|beat| look(&mut candidates, true, beat, 1))
            .collect();
        assert_eq!(looks, [vec![], vec![], vec![], vec![LOW]]);
        candidates.clear();
        assert_eq!(look(&mut candidates, true, 9, 1), []);
    }
}
