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

    /// The value below which `permille` thousandths of the values lie, down to
    /// the floor of its bucket; `None` if there are none.
    pub(crate) fn quantile(&self, permille: u64) -> Option<u64> {
        let wanted = u128::from(self.total) * u128::from(permille) / 1000;
        let mut below = 0u128;
        for (at, count) in self.buckets.iter().enumerate() {
            below += u128::from(*count);
            if below > wanted {
                return Some(floor(at));
            }
        }
        self.buckets.len().checked_sub(1).map(floor)
    }

    /// The value in the middle.
    pub(crate) fn median(&self) -> Option<u64> {
        self.quantile(500)
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
    fn quantiles_are_of_what_was_put_in() {
        let mut all = Histogram::default();
        assert_eq!(all.median(), None);
        for value in [3, 3, 3, 9, 1000] {
            all.add(value);
        }
        assert_eq!((all.quantile(0), all.median()), (Some(3), Some(3)));
        assert_eq!(all.quantile(600), Some(9));
        assert_eq!(all.quantile(999), Some(floor(bucket(1000))));
        assert_eq!(all.quantile(1000), Some(floor(bucket(1000))));
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
