//! How long it may take until there is a look. Whether the kernel lives, whether it has
//! started and whether it has booted anew is all the guest's word, and each puts a look
//! off. So each has a bound that the host keeps.

use std::time::{Duration, Instant};

/// How long a kernel that says that it is starting is given, in all: so much, and of that
/// one second comes back in [`REGAIN`] seconds in which one runs. It is not given anew
/// with each boot.
pub(crate) const START_LIMIT: Duration = Duration::from_secs(120);
const REGAIN: u32 = 10;
/// Without a look for so many intervals, and at least so long, the kernel is looked at
/// where it was last, whatever it says.
const INTERVALS: u32 = 3;
const AT_LEAST: Duration = Duration::from_secs(120);

/// What the guest has had of it.
#[derive(Debug)]
pub(super) struct Patience {
    limit: Duration,
    /// Since when there was no look, and the domain runs.
    since: Instant,
    /// How long a kernel may still say that it is starting.
    left: Duration,
    starting: Option<Instant>,
    regained: Instant,
}

impl Patience {
    /// Of looks at this interval.
    pub(super) fn new(interval: Duration, now: Instant) -> Self {
        Self {
            limit: interval.saturating_mul(INTERVALS).max(AT_LEAST),
            since: now,
            left: START_LIMIT,
            starting: None,
            regained: now,
        }
    }

    /// There was a look, or nobody wants one now: the domain stands still, or there is
    /// nothing to compare with.
    pub(super) fn renew(&mut self, now: Instant) {
        self.since = now;
    }

    /// Since when there was no look, once it is for too long.
    pub(super) fn is_over(&self, now: Instant) -> Option<Duration> {
        let time = now.saturating_duration_since(self.since);
        (time >= self.limit).then_some(time)
    }

    /// The kernel says that it is starting. Whether that is believed.
    pub(super) fn starts(&mut self, now: Instant) -> bool {
        let since = self.starting.replace(now).unwrap_or(now);
        let spent = now.saturating_duration_since(since).min(self.left);
        self.left = self.left.saturating_sub(spent);
        self.regained = now;
        // It is not waited for in vain meanwhile.
        self.since = (self.since + spent).min(now);
        !self.left.is_zero()
    }

    /// It has started.
    pub(super) fn runs(&mut self, now: Instant) {
        self.starting = None;
        let more = now.saturating_duration_since(self.regained) / REGAIN;
        self.regained = now;
        self.left = self.left.saturating_add(more).min(START_LIMIT);
    }

    /// Another bound than that of the interval.
    #[cfg(test)]
    pub(super) fn set_limit(&mut self, limit: Duration) {
        self.limit = limit;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_that_starts_again_and_again_is_not_given_its_time_again() {
        let start = Instant::now();
        let mut patience = Patience::new(Duration::from_secs(1), start);
        let at = |seconds| start + Duration::from_secs(seconds);
        // It runs for a second between two starts.
        let mut believed = 0;
        for second in 0..1000 {
            if second % 10 == 9 {
                patience.runs(at(second));
            } else if patience.starts(at(second)) {
                believed += 1;
            }
        }
        assert!((100..250).contains(&believed), "{believed}");
        assert!(patience.is_over(at(1000)).is_some());
        // One that has run for long is given it again.
        patience.runs(at(1001));
        patience.runs(at(4000));
        assert!(patience.starts(at(4001)));
        assert!(patience.starts(at(4100)));
        assert!(!patience.starts(at(4200)));
    }

    #[test]
    fn patience_ends_after_so_many_intervals_without_a_look() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut patience = Patience::new(Duration::from_secs(60), start);
        assert_eq!(patience.is_over(at(179)), None);
        assert_eq!(patience.is_over(at(180)), Some(Duration::from_secs(180)));
        patience.renew(at(180));
        assert_eq!(patience.is_over(at(359)), None);
        // The time for which it is believed that it starts does not count.
        assert!(patience.starts(at(300)));
        assert!(patience.starts(at(400)));
        assert_eq!(patience.is_over(at(459)), None);
        assert_eq!(patience.is_over(at(460)), Some(Duration::from_secs(180)));
        let often = Patience::new(Duration::from_secs(1), start);
        assert_eq!(often.is_over(at(119)), None);
        assert!(often.is_over(at(120)).is_some());
    }
}
