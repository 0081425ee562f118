//! Times for people: the host's wall clock in UTC.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The first second of the year 10000, where RFC 3339 ends.
const END: u64 = 253_402_300_800;

/// Tells what the host's clock showed when the guest's trace clock showed
/// something.
pub trait WallClock {
    /// Nanoseconds since 1970-01-01 00:00 UTC when the trace clock of boot
    /// `boot` showed `guest` nanoseconds; `None` where that is not known.
    fn wall(&self, boot: u32, guest: u64) -> Option<u64>;
}

impl<C: WallClock + ?Sized> WallClock for &C {
    fn wall(&self, boot: u32, guest: u64) -> Option<u64> {
        (**self).wall(boot, guest)
    }
}

/// `2026-01-31T12:00:00.000000000Z`, or `unknown`.
pub(super) fn rfc3339(time: Option<SystemTime>) -> String {
    let known = time.filter(|time| {
        time.duration_since(UNIX_EPOCH)
            .is_ok_and(|since| since.as_secs() < END)
    });
    known.map_or_else(
        || "unknown".into(),
        |time| humantime::format_rfc3339_nanos(time).to_string(),
    )
}

/// A time in nanoseconds since 1970, to be shown.
pub(super) fn system_time(wall: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_nanos(wall)
}

/// Splits times into date, time of day and nanoseconds. Remembers the second
/// it was asked for last, since the calendar is what costs.
#[derive(Debug, Default)]
pub(super) struct Calendar {
    second: Option<u64>,
    text: String,
}

/// A moment, split.
pub(super) struct Moment<'a> {
    /// `2026-01-31`.
    pub(super) date: &'a str,
    /// `12:00:00`.
    pub(super) time: &'a str,
    /// Nanoseconds into the second.
    pub(super) nanos: u32,
}

impl Calendar {
    /// Splits `wall`, in nanoseconds since 1970.
    pub(super) fn moment(&mut self, wall: u64) -> Moment<'_> {
        let second = wall / 1_000_000_000;
        if self.second != Some(second) {
            self.second = Some(second);
            let at = UNIX_EPOCH + Duration::from_secs(second);
            self.text = humantime::format_rfc3339_seconds(at).to_string();
        }
        Moment {
            date: self.text.get(..10).unwrap_or("?"),
            time: self.text.get(11..19).unwrap_or("?"),
            nanos: (wall % 1_000_000_000) as u32,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_split_and_seconds_remembered() {
        let mut calendar = Calendar::default();
        for nanos in [7, 8] {
            let moment = calendar.moment(1_709_210_096_000_000_000 + nanos);
            assert_eq!((moment.date, moment.time), ("2024-02-29", "12:34:56"));
            assert_eq!(u64::from(moment.nanos), nanos);
        }
        assert_eq!(calendar.moment(0).date, "1970-01-01");
        assert_eq!(calendar.moment(u64::MAX).date, "2554-07-21");
    }

    #[test]
    fn a_time_that_has_no_date_is_unknown() {
        assert_eq!(rfc3339(None), "unknown");
        assert_eq!(
            rfc3339(UNIX_EPOCH.checked_sub(Duration::from_secs(1))),
            "unknown"
        );
        assert_eq!(
            rfc3339(UNIX_EPOCH.checked_add(Duration::from_secs(END))),
            "unknown"
        );
        assert_eq!(rfc3339(Some(UNIX_EPOCH)), "1970-01-01T00:00:00.000000000Z");
    }
}
