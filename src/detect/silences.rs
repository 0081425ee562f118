//! How long each CPU of a boot gave no record, while others gave some.

use std::collections::HashMap;

use super::profile::Silence;

/// Fewer records than this by other CPUs make no silence of one.
const OTHERS_BUSY: u64 = 1000;

/// The CPUs of a boot, by their records.
#[derive(Debug, Default)]
pub(super) struct Silences {
    cpus: HashMap<u16, Cpu>,
    events: u64,
    began: Option<u64>,
    now: u64,
}

/// When a CPU gave its last record.
#[derive(Clone, Copy, Debug)]
struct Cpu {
    time: u64,
    events: u64,
    longest: Option<Silence>,
}

impl Silences {
    /// That CPU gave a record then (guest trace clock, nanoseconds).
    pub(super) fn beat(&mut self, boot: u32, cpu: u16, time: u64) {
        self.events += 1;
        self.now = self.now.max(time);
        let began = *self.began.get_or_insert(time);
        let known = self.cpus.entry(cpu).or_insert(Cpu::since(began));
        known.silent(cpu, boot, time, self.events);
        (known.time, known.events) = (known.time.max(time), self.events);
    }

    /// That CPU was not silent until then.
    pub(super) fn excuse(&mut self, cpu: u16, until: u64) {
        let known = self.cpus.entry(cpu).or_insert(Cpu::since(until));
        (known.time, known.events) = (known.time.max(until), self.events);
    }

    /// The longest silence of each CPU since this was asked last, also of one that goes
    /// on: what is known of the CPUs stays.
    pub(super) fn so_far(&mut self, boot: u32) -> Vec<Silence> {
        let Some(began) = self.began else {
            return Vec::new();
        };
        let (now, events) = (self.now, self.events);
        let cpus = self.cpus.iter_mut();
        let longest = cpus.filter_map(|(&number, cpu)| {
            let mut open = *cpu;
            cpu.longest = None;
            open.silent(number, boot, now, events + 1);
            open.whole(began, now)
        });
        longest.collect()
    }

    /// The longest silence of each CPU now that the boot is over. `cpus` are those that
    /// the guest has: one that gave no record at all was silent all the time.
    pub(super) fn end(&mut self, boot: u32, cpus: &[u16]) -> Vec<Silence> {
        if let Some(began) = self.began {
            for &cpu in cpus {
                self.cpus.entry(cpu).or_insert(Cpu::since(began));
            }
        }
        let all = self.so_far(boot);
        *self = Self::default();
        all
    }
}

impl Cpu {
    fn since(time: u64) -> Self {
        Self {
            time,
            events: 0,
            longest: None,
        }
    }

    fn silent(&mut self, cpu: u16, boot: u32, until: u64, events: u64) {
        let others = events.saturating_sub(self.events + 1);
        let silence = Silence {
            cpu,
            boot,
            from: self.time,
            until,
            others,
            whole: false,
        };
        let longer = self
            .longest
            .is_none_or(|longest| silence.nanos() > longest.nanos());
        if others >= OTHERS_BUSY && longer {
            self.longest = Some(silence);
        }
    }

    fn whole(&self, began: u64, now: u64) -> Option<Silence> {
        self.longest.map(|silence| Silence {
            whole: silence.from <= began && silence.until >= now,
            ..silence
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    /// CPU 0 works for so many seconds, with 300 records each.
    fn work(silences: &mut Silences, seconds: std::ops::Range<u64>) {
        for second in seconds {
            for record in 0..300 {
                silences.beat(1, 0, second * SECOND + record);
            }
        }
    }

    /// The longest silence of CPU 1, whole seconds.
    fn longest(silences: &mut Silences) -> Option<u64> {
        let all = silences.so_far(1);
        let of_one = all.iter().find(|silence| silence.cpu == 1);
        of_one.map(|silence| silence.nanos() / SECOND)
    }

    #[test]
    fn a_silence_goes_on_from_one_look_to_the_next() {
        let mut silences = Silences::default();
        silences.beat(1, 1, 0);
        work(&mut silences, 0..5);
        assert_eq!(longest(&mut silences), Some(4));
        work(&mut silences, 5..10);
        assert_eq!(longest(&mut silences), Some(9));
        // It has ended, and is told with its end; the next one is one of its own.
        silences.beat(1, 1, 12 * SECOND);
        work(&mut silences, 12..14);
        assert_eq!(longest(&mut silences), Some(12));
        work(&mut silences, 14..18);
        assert_eq!(longest(&mut silences), Some(5));
        assert_eq!(silences.end(1, &[1]).len(), 1);
        assert_eq!(longest(&mut silences), None);
    }

    #[test]
    fn a_cpu_that_is_excused_was_not_silent() {
        let mut silences = Silences::default();
        work(&mut silences, 0..5);
        // Also one that gave no record yet.
        silences.excuse(1, 5 * SECOND);
        work(&mut silences, 5..10);
        assert_eq!(longest(&mut silences), Some(4));
        for second in 10..30 {
            work(&mut silences, second..second + 1);
            silences.excuse(1, second * SECOND);
        }
        assert_eq!(longest(&mut silences), None);
        work(&mut silences, 30..34);
        assert_eq!(longest(&mut silences), Some(4));
        // What it gave before that may come later, and is no silence.
        silences.excuse(1, 50 * SECOND);
        silences.beat(1, 1, 34 * SECOND);
        silences.beat(1, 1, 50 * SECOND);
        assert_eq!(longest(&mut silences), None);
    }

    #[test]
    fn others_that_are_idle_make_no_silence() {
        let mut silences = Silences::default();
        silences.beat(1, 1, 0);
        for second in 0..900 {
            silences.beat(1, 0, second * SECOND);
        }
        assert_eq!(longest(&mut silences), None);
    }
}
