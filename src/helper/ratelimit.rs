//! For what a guest can bring about as often as it likes: so much is said, and
//! the rest is counted.

use std::time::{Duration, Instant};

/// Lets through so many messages in a while, and counts the rest: for what a
/// guest can bring about as often as it likes.
#[derive(Debug)]
pub(super) struct RateLimit {
    burst: u32,
    per: Duration,
    since: Instant,
    used: u32,
    dropped: u64,
}

/// What a [`RateLimit`] says to one message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Say it, and that so many were not said before it.
    Say {
        /// Messages dropped since the last one that was said.
        dropped: u64,
    },
    /// Do not say it.
    Drop,
}

impl RateLimit {
    /// `burst` messages each `per`.
    pub(super) fn new(burst: u32, per: Duration) -> Self {
        Self {
            burst,
            per,
            since: Instant::now(),
            used: 0,
            dropped: 0,
        }
    }

    /// Asks for one message.
    pub(super) fn ask(&mut self) -> Verdict {
        self.ask_at(Instant::now())
    }

    /// The same for a message that ends with how many were not said, where it
    /// is to be said.
    pub(super) fn say(&mut self) -> Option<String> {
        match self.ask() {
            Verdict::Say { dropped: 0 } => Some(String::new()),
            Verdict::Say { dropped } => Some(format!(" ({dropped} messages before it not shown)")),
            Verdict::Drop => None,
        }
    }

    fn ask_at(&mut self, now: Instant) -> Verdict {
        if now.saturating_duration_since(self.since) >= self.per {
            self.since = now;
            self.used = 0;
        }
        if self.used == self.burst {
            self.dropped += 1;
            return Verdict::Drop;
        }
        self.used += 1;
        Verdict::Say {
            dropped: std::mem::take(&mut self.dropped),
        }
    }
}

/// The same for what may be told of again and again: what was told of before gets half
/// of it at the most, so that it does not take the turn of what is new.
#[derive(Debug)]
pub(super) struct Budget {
    all: RateLimit,
    again: RateLimit,
    held: u64,
}

impl Budget {
    /// `burst` messages each `per`.
    pub(super) fn new(burst: u32, per: Duration) -> Self {
        Self {
            all: RateLimit::new(burst, per),
            again: RateLimit::new(burst / 2, per),
            held: 0,
        }
    }

    /// Asks for one message.
    pub(super) fn ask(&mut self, again: bool) -> Verdict {
        if again && self.again.ask() == Verdict::Drop {
            self.held += 1;
            return Verdict::Drop;
        }
        match self.all.ask() {
            Verdict::Drop => Verdict::Drop,
            Verdict::Say { dropped } => Verdict::Say {
                dropped: dropped + std::mem::take(&mut self.held),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_again_leaves_room_for_what_is_new() {
        let mut budget = Budget::new(10, Duration::from_secs(3600));
        let said = |budget: &mut Budget, again| {
            let all = (0..100).map(|_| budget.ask(again));
            all.filter(|verdict| *verdict != Verdict::Drop).count()
        };
        assert_eq!(said(&mut budget, true), 5);
        assert_eq!(budget.ask(false), Verdict::Say { dropped: 95 });
        assert_eq!(said(&mut budget, false), 4);
    }

    #[test]
    fn a_burst_passes_and_the_rest_is_counted() {
        let mut limit = RateLimit::new(2, Duration::from_secs(10));
        let start = limit.since;
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(limit.ask_at(at(0)), Verdict::Say { dropped: 0 });
        assert_eq!(limit.ask_at(at(9)), Verdict::Say { dropped: 0 });
        assert_eq!(limit.ask_at(at(9)), Verdict::Drop);
        assert_eq!(limit.ask_at(at(9)), Verdict::Drop);
        assert_eq!(limit.ask_at(at(10)), Verdict::Say { dropped: 2 });
        assert_eq!(limit.ask_at(at(10)), Verdict::Say { dropped: 0 });
        assert_eq!(limit.ask_at(at(11)), Verdict::Drop);
    }
}
