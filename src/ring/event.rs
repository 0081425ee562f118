//! The events on a page of the ring buffer.
//!
//! Corresponds to struct ring_buffer_event and enum ring_buffer_type,
//! include/linux/ring_buffer.h. An event begins with a 32-bit word: the low 5
//! bits are its type or length, the other 27 the time since the event before
//! it, in nanoseconds of the trace clock.

/// `RINGBUF_TYPE_PADDING`: the rest of the page, or an event that was taken
/// back.
const PADDING: u32 = 29;
/// `RINGBUF_TYPE_TIME_EXTEND`: more bits for the time of the next event.
const TIME_EXTEND: u32 = 30;
/// `RINGBUF_TYPE_TIME_STAMP`: the absolute time of the next event.
const TIME_STAMP: u32 = 31;
/// An absolute time has 59 bits (TS_MSB in kernel/trace/ring_buffer.c).
const ABSOLUTE_BITS: u32 = 59;

/// The time that runs along a page: what it takes to go on in its middle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clock(pub u64);

/// One record on a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event<'a> {
    /// When it was written, guest trace clock, nanoseconds.
    pub time: u64,
    /// The record; begins with a `struct trace_entry`. May be up to 3 bytes
    /// longer than the record.
    pub payload: &'a [u8],
}

/// The bytes of a page make no sense from here on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed;

/// The events in `bytes`, which begin at an event, with `clock` at the time of
/// the page or of the last event before them.
pub fn events(bytes: &[u8], clock: Clock) -> Events<'_> {
    Events { rest: bytes, clock }
}

/// Iterator of [`events`]. Ends after the first [`Malformed`].
#[derive(Clone, Debug)]
pub struct Events<'a> {
    rest: &'a [u8],
    clock: Clock,
}

impl Events<'_> {
    /// The time after the events taken so far.
    pub fn clock(&self) -> Clock {
        self.clock
    }
}

impl<'a> Iterator for Events<'a> {
    type Item = Result<Event<'a>, Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.rest.is_empty() {
            match self.step() {
                Some(None) => {}
                Some(Some(payload)) => {
                    return Some(Ok(Event {
                        time: self.clock.0,
                        payload,
                    }));
                }
                None => {
                    self.rest = &[];
                    return Some(Err(Malformed));
                }
            }
        }
        None
    }
}

impl<'a> Events<'a> {
    /// Takes one event off: its payload, `Some(None)` where it carries none,
    /// `None` where it does not fit.
    fn step(&mut self) -> Option<Option<&'a [u8]>> {
        let header = word(self.rest)?;
        let delta = u64::from(header >> 5);
        let rest = self.rest.get(4..)?;
        let (body, payload) = match header & 31 {
            PADDING if delta == 0 => {
                // The page ends here: what follows was never written.
                self.rest = &[];
                return Some(None);
            }
            // An event that was taken back. Its time is not counted, as in
            // rb_update_read_stamp().
            PADDING => (word(rest)? as usize, None),
            TIME_EXTEND => {
                self.advance(delta | u64::from(word(rest)?) << 27);
                (4, None)
            }
            TIME_STAMP => {
                let stamp = delta | u64::from(word(rest)?) << 27;
                let high = self.clock.0 >> ABSOLUTE_BITS << ABSOLUTE_BITS;
                self.clock = Clock(high | stamp & ((1 << ABSOLUTE_BITS) - 1));
                (4, None)
            }
            0 => {
                // The length counts its own word (rb_event_data_length()).
                self.advance(delta);
                let length = word(rest)? as usize;
                let payload = rest.get(4..length)?;
                (length.checked_next_multiple_of(4)?, Some(payload))
            }
            words => {
                self.advance(delta);
                let length = 4 * words as usize;
                (length, Some(rest.get(..length)?))
            }
        };
        self.rest = rest.get(body..)?;
        Some(payload)
    }

    fn advance(&mut self, delta: u64) {
        self.clock = Clock(self.clock.0.wrapping_add(delta));
    }
}

fn word(bytes: &[u8]) -> Option<u32> {
    bytes.first_chunk().copied().map(u32::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(kind: u32, delta: u32) -> [u8; 4] {
        (kind | delta << 5).to_le_bytes()
    }

    fn all(bytes: &[u8], clock: u64) -> Vec<Result<(u64, Vec<u8>), Malformed>> {
        events(bytes, Clock(clock))
            .map(|e| e.map(|e| (e.time, e.payload.to_vec())))
            .collect()
    }

    #[test]
    fn short_and_long_records_with_their_times() {
        let mut page = Vec::new();
        page.extend(header(2, 5));
        page.extend([1; 8]);
        page.extend(header(0, 7));
        page.extend(10u32.to_le_bytes());
        page.extend([2; 8]); // 6 of payload, 2 to the next word
        page.extend(header(1, 0));
        page.extend([3; 4]);
        assert_eq!(
            all(&page, 100),
            [
                Ok((105, vec![1; 8])),
                Ok((112, vec![2; 6])),
                Ok((112, vec![3; 4]))
            ]
        );
    }

    #[test]
    fn time_extends_and_absolute_times() {
        let mut page = Vec::new();
        page.extend(header(TIME_EXTEND, 1));
        page.extend(2u32.to_le_bytes());
        page.extend(header(1, 3));
        page.extend([0; 4]);
        page.extend(header(TIME_STAMP, 9));
        page.extend(1u32.to_le_bytes());
        page.extend(header(1, 1));
        page.extend([0; 4]);
        let high = 0xf8 << 56;
        let first = high + 1 + (2 << 27) + 3;
        let second = high + 9 + (1 << 27) + 1;
        assert_eq!(
            all(&page, high),
            [Ok((first, vec![0; 4])), Ok((second, vec![0; 4]))]
        );
    }

    #[test]
    fn padding_is_passed_over_or_ends_the_page() {
        let mut page = Vec::new();
        page.extend(header(PADDING, 4)); // an event taken back: 8 bytes of it
        page.extend(8u32.to_le_bytes());
        page.extend([0xff; 4]);
        page.extend(header(1, 1));
        page.extend([7; 4]);
        page.extend(header(PADDING, 0));
        page.extend([0xff; 12]);
        assert_eq!(all(&page, 0), [Ok((1, vec![7; 4]))]);
    }

    #[test]
    fn going_on_in_the_middle_gives_the_same() {
        let mut page = Vec::new();
        for step in 0..20u32 {
            page.extend(header(1 + step % 3, step));
            page.extend(vec![step as u8; 4 * (1 + step % 3) as usize]);
        }
        let whole = all(&page, 50);
        let cut = 8 + 12 + 16 + 8;
        let mut first = events(&page[..cut], Clock(50));
        let mut both: Vec<_> = first
            .by_ref()
            .map(|e| e.map(|e| (e.time, e.payload.to_vec())))
            .collect();
        both.extend(all(&page[cut..], first.clock().0));
        assert_eq!(both, whole);
    }

    #[test]
    fn lengths_that_do_not_fit_end_it() {
        for (kind, length) in [
            (0, 0u32),
            (0, 3),
            (0, 100),
            (0, u32::MAX),
            (PADDING, u32::MAX),
        ] {
            let mut page = header(kind, 1).to_vec();
            page.extend(length.to_le_bytes());
            assert_eq!(all(&page, 0), [Err(Malformed)], "{kind} {length}");
        }
        assert_eq!(all(&[1, 2, 3], 0), [Err(Malformed)]);
        assert_eq!(all(&header(28, 0), 0), [Err(Malformed)]);
    }

    proptest! {
        #[test]
        fn any_bytes_end(bytes in proptest::collection::vec(any::<u8>(), 0..4096), clock: u64) {
            let total: usize = events(&bytes, Clock(clock))
                .filter_map(Result::ok)
                .map(|event| event.payload.len() + 4)
                .sum();
            prop_assert!(total <= bytes.len());
        }
    }
}
