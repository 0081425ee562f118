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

#[cfg(test)]
mod tests {
    use super::*;

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
