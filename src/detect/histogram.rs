//! How often a value was about so large.

/// Counts values in buckets whose widths grow with the value: eight for each
/// power of two, so that a bucket is at most an eighth wider than it is high.
/// At most 496 buckets, whatever is put in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Histogram {
    buckets: Vec<u64>,
    total: u64,
}

/// Buckets for each power of two, and the bits that choose among them.
const FINE_BITS: u32 = 3;
const FINE: u64 = 1 << FINE_BITS;

fn bucket(value: u64) -> usize {
    if value < FINE {
        return value as usize;
    }
    let shift = value.ilog2() - FINE_BITS;
    (u64::from(shift) * FINE + (value >> shift)) as usize
}

/// The smallest value of a bucket.
fn floor(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    if bucket < 2 * FINE {
        return bucket;
    }
    let shift = bucket / FINE - 1;
    (FINE + bucket % FINE) << shift
}

/// The value that is reached when more than so many were counted, bucket by bucket.
fn past(buckets: impl Iterator<Item = (usize, u64)>, most: u64) -> Option<u64> {
    let mut counted = 0u64;
    for (at, count) in buckets {
        counted = counted.saturating_add(count);
        if counted > most {
            return Some(floor(at));
        }
    }
    None
}

impl Histogram {
    /// Counts a value.
    pub(crate) fn add(&mut self, value: u64) {
        let at = bucket(value);
        if self.buckets.len() <= at {
            self.buckets.resize(at + 1, 0);
        }
        if let Some(count) = self.buckets.get_mut(at) {
            *count += 1;
            self.total += 1;
        }
    }

    /// How many values were counted.
    pub(crate) fn total(&self) -> u64 {
        self.total
    }

    /// The values that all but the extremes lie between: at most `most` at each
    /// end, and at most one of a hundred, lie beyond. `None` if there are none.
    pub(crate) fn without_extremes(&self, most: u64) -> Option<(u64, u64)> {
        let beyond = most.min(self.total / 100);
        let (low, high) = (self.counts(), self.counts().rev());
        Some((past(low, beyond)?, past(high, beyond)?))
    }

    /// The buckets, each with how many values are in it.
    fn counts(&self) -> impl DoubleEndedIterator<Item = (usize, u64)> + '_ {
        self.buckets.iter().copied().enumerate()
    }

    /// The value in the middle.
    pub(crate) fn median(&self) -> Option<u64> {
        past(self.counts(), self.total / 2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn small_values_are_told_apart() {
        for value in 0..16 {
            assert_eq!(floor(bucket(value)), value);
        }
        assert_eq!((floor(bucket(16)), floor(bucket(17))), (16, 16));
        assert!(bucket(u64::MAX) < 496);
    }

    #[test]
    fn the_median_is_of_what_was_put_in() {
        let mut all = Histogram::default();
        assert_eq!(all.median(), None);
        for (value, median) in [(9, 9), (3, 9), (3, 3), (1000, 9), (1000, 9), (1000, 1000)] {
            all.add(value);
            assert_eq!(all.median(), Some(floor(bucket(median))), "with {value}");
        }
    }

    #[test]
    fn extremes_are_few_by_share_and_by_number() {
        let mut all = Histogram::default();
        assert_eq!(all.without_extremes(20), None);
        let mut put = |value, times| (0..times).for_each(|_| all.add(value));
        put(2, 21);
        put(3, 900);
        put(7, 9);
        assert_eq!(all.total(), 930);
        assert_eq!(all.without_extremes(20), Some((2, 3)), "9 of 930 are few");
        let mut put = |value, times| (0..times).for_each(|_| all.add(value));
        put(3, 9_000);
        put(7, 12);
        assert_eq!(all.without_extremes(20), Some((2, 7)), "21 are not");
        assert_eq!(all.without_extremes(21), Some((3, 3)));
    }

    proptest! {
        #[test]
        fn a_bucket_is_narrow_and_buckets_keep_the_order(a in any::<u64>(), b in any::<u64>()) {
            let (low, high) = (a.min(b), a.max(b));
            prop_assert!(bucket(low) <= bucket(high));
            prop_assert!(floor(bucket(a)) <= a);
            prop_assert!(a - floor(bucket(a)) <= a / FINE);
        }
    }
}
