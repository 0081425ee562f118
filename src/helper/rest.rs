//! What the engine does beside draining has a share of its time, and no more.

use std::time::{Duration, Instant};

/// Of the engine's time, what rests takes one part in so many.
pub(super) const SHARE: u32 = 10;

/// Until when something is not done again, for others to have their share.
#[derive(Debug, Default)]
pub(super) struct Rest(Option<Instant>);

impl Rest {
    pub(super) fn is_over(&self, now: Instant) -> bool {
        self.0.is_none_or(|until| now >= until)
    }

    /// It was done in this time.
    pub(super) fn after(&mut self, times: (Instant, Instant)) {
        self.at_least(times, Duration::ZERO);
    }

    /// The same, and it is not done again before `least` has passed.
    pub(super) fn at_least(&mut self, (begun, now): (Instant, Instant), least: Duration) {
        let took = now.saturating_duration_since(begun);
        self.0 = now.checked_add(least.max(took.saturating_mul(SHARE - 1)));
    }

    /// Nobody else has to have a share any more.
    pub(super) fn end(&mut self) {
        self.0 = None;
    }
}

/// The longest time from the beginning of what takes `took` until it is done again.
pub(super) const fn turn(took: Duration) -> Duration {
    took.saturating_mul(SHARE)
}
