//! A kernel without the patch that cannot be traced yet.
//!
//! Such a guest is traced by what it was booted with, and that is not there as soon as
//! its kernel lives: function_graph begins when the kernel's initcalls have run, and for
//! a ring buffer in memory reserved at boot somebody sets the tracer inside the guest.
//! So what is to be traced from its start, or was before it was booted again, is waited
//! for, and the session stays open meanwhile.

use std::time::{Duration, Instant};

use super::engine::Engine;
use super::rest::Rest;
use super::watch::Guest;

/// How often it is looked whether it can be traced now; less often where a look takes
/// long, for it follows the guest's tables, which may be as long as the guest likes.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// A session whose guest is not traced for longer is told of.
pub(super) const TELL_AFTER: Duration = Duration::from_secs(120);

/// What keeps the guest's kernel from being traced.
#[derive(Debug)]
pub(super) struct Awaited {
    /// Why, for people.
    pub(super) why: String,
    since: Instant,
    rest: Rest,
    told: bool,
}

impl Awaited {
    /// It was looked at in this time.
    fn new(why: String, times: (Instant, Instant)) -> Self {
        let mut rest = Rest::default();
        rest.at_least(times, LOOK_EVERY);
        Self {
            why,
            since: times.0,
            rest,
            told: false,
        }
    }

    /// Whether it is time to look again.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        self.rest.is_over(now)
    }

    /// Somebody asks for it: it is looked at now.
    pub(super) fn hurry(&mut self) {
        self.rest.end();
    }

    /// Whether it has lasted for so long that it is to be told of; once.
    pub(super) fn is_to_be_told(&mut self, now: Instant) -> bool {
        let long = now.saturating_duration_since(self.since) > TELL_AFTER;
        let first = long && !self.told;
        self.told |= first;
        first
    }
}

impl Engine {
    /// Whether the guest's kernel, which is to be traced for these functions, has yet to
    /// be waited for.
    pub(super) fn has_to_wait(&mut self, guest: &Guest, functions: &[String]) -> bool {
        let begun = Instant::now();
        let why = self.kept_from(guest, functions);
        let times = (begun, Instant::now());
        let Some(why) = why else {
            if self.awaited.take().is_some() {
                log::info!("the guest's kernel can be traced now");
            }
            return false;
        };
        match &mut self.awaited {
            Some(awaited) => {
                awaited.rest.at_least(times, LOOK_EVERY);
                awaited.why = why;
            }
            none => {
                if let Some(again) = self.boots_said.say() {
                    log::warn!("the guest is traced as soon as it can be; not yet: {why}{again}");
                }
                *none = Some(Awaited::new(why, times));
            }
        }
        true
    }

    /// What keeps a kernel from being traced that may be traced later.
    fn kept_from(&self, guest: &Guest, functions: &[String]) -> Option<String> {
        let mut names = Vec::new();
        for function in functions {
            // A function that it does not have will not come.
            let found = guest.symbols.resolve_function(function).ok()?;
            names.push(found.name);
        }
        let ram = &*self.attached.ram;
        let why = guest.link.refuses(ram, &guest.symbols, &names)?;
        Some(format!("{:#}", anyhow::Error::from(why)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_takes_long_to_look_at_is_looked_at_less_often() {
        let begun = Instant::now();
        for (took, rest) in [(1, 100), (11, 100), (200, 1800)] {
            let now = begun + Duration::from_millis(took);
            let awaited = Awaited::new("a test".to_owned(), (begun, now));
            let rest = Duration::from_millis(rest);
            assert!(!awaited.is_due(now + rest - Duration::from_millis(1)));
            assert!(awaited.is_due(now + rest));
        }
    }

    #[test]
    fn what_is_waited_for_long_is_told_once() {
        let begun = Instant::now();
        let mut awaited = Awaited::new("a test".to_owned(), (begun, begun));
        assert!(!awaited.is_to_be_told(begun + TELL_AFTER));
        let late = begun + TELL_AFTER + Duration::from_secs(1);
        assert!(awaited.is_to_be_told(late));
        assert!(!awaited.is_to_be_told(late));
    }
}
