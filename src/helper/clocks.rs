//! The guest's trace clock against the host's.

use crate::session::ClockPair;

/// The pairs are judged over this time.
const WINDOW_NS: u64 = 1_000_000_000;

/// The first and the last good pair of clocks of one boot.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Clocks(Option<(ClockPair, ClockPair)>);

impl Clocks {
    /// Notes that the guest's clock showed `guest_ns` a moment before the host's wall
    /// clock showed `host_ns`. Of the pairs within a second, the one with the least between
    /// the guest's stamp and our look is the best: the one in which the host is the least
    /// ahead.
    pub(super) fn note(&mut self, guest_ns: u64, host_ns: u64) {
        let pair = ClockPair { guest_ns, host_ns };
        let ahead = |pair: &ClockPair| i128::from(pair.host_ns) - i128::from(pair.guest_ns);
        let Some((first, last)) = &mut self.0 else {
            self.0 = Some((pair, pair));
            return;
        };
        let in_first = pair.guest_ns.saturating_sub(first.guest_ns) < WINDOW_NS;
        if in_first && ahead(&pair) < ahead(first) {
            *first = pair;
        }
        let in_last = pair.guest_ns.saturating_sub(last.guest_ns) < WINDOW_NS;
        if !in_last || ahead(&pair) < ahead(last) {
            *last = pair;
        }
    }

    /// The first and the last.
    pub(super) fn pairs(&self) -> Option<(ClockPair, ClockPair)> {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_pair_of_the_first_and_of_the_last_second_is_kept() {
        let mut clocks = Clocks::default();
        for (guest, host) in [
            (0, 500),
            (100, 510),
            (200, 900),
            (2_000_000_000, 2_000_000_700),
            (2_000_000_100, 2_000_000_600),
            (2_000_000_200, 2_000_000_900),
        ] {
            clocks.note(guest, host);
        }
        let pair = |guest_ns, host_ns| ClockPair { guest_ns, host_ns };
        let last = pair(2_000_000_100, 2_000_000_600);
        assert_eq!(clocks.pairs(), Some((pair(100, 510), last)));
    }
}
