//! A kernel without the patch that cannot be traced yet.
//!
//! Such a guest is traced by what it was booted with, and that is not there as soon as
//! its kernel lives: function_graph begins when the kernel's initcalls have run, and for
//! a ring buffer in memory reserved at boot somebody sets the tracer inside the guest.
//! So what is to be traced from its start, or was before it was booted again, is waited
//! for, and the session stays open meanwhile.

use std::time::{Duration, Instant};

use crate::kernel::stock::StockError;
use crate::session::{Finding, FindingKind};

use super::engine::{Engine, Refusal};
use super::link::Link;
use super::rest::Rest;
use super::watch::{wall_ns, Guest};

/// How often it is looked whether it can be traced now; less often where a look takes
/// long, for it follows the guest's tables, which may be as long as the guest likes.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// That a guest is not traced which is to be, is told after so long.
const TELL_AFTER: Duration = Duration::from_secs(120);

/// What a guest is to be traced for without being asked.
#[derive(Clone, Debug)]
pub(super) struct Due {
    /// The functions, as named.
    pub(super) functions: Vec<String>,
    /// It was traced for them in this very boot, by another helper: whether the guest's own
    /// filter has changed since then is no reason to wait.
    pub(super) same_boot: bool,
}

/// What keeps the guest's kernel from being traced.
#[derive(Debug)]
pub(super) struct Awaited {
    /// Why, for people.
    pub(super) why: String,
    /// What it is to be traced for.
    pub(super) due: Due,
    rest: Rest,
}

impl Awaited {
    /// Whether it is time to look again.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        self.rest.is_over(now)
    }

    /// Somebody asks for it: it is looked at now.
    pub(super) fn hurry(&mut self) {
        self.rest.end();
    }
}

/// A guest that is to be traced and is not: it is down, or its kernel is waited for. One
/// that boots again and again is so all the while.
#[derive(Debug)]
pub(super) struct Untraced {
    since: Instant,
    told: bool,
}

impl Untraced {
    pub(super) fn new(since: Instant) -> Self {
        Self { since, told: false }
    }

    /// Whether it has lasted for so long that it is to be told of; once.
    fn is_to_be_told(&mut self, now: Instant) -> bool {
        let long = now.saturating_duration_since(self.since) > TELL_AFTER;
        long && !std::mem::replace(&mut self.told, long)
    }
}

impl Engine {
    /// Whether the guest's kernel can be traced now. If not, it is waited for.
    pub(super) fn is_ready(&mut self, guest: &Guest, due: &Due) -> bool {
        let begun = Instant::now();
        if let Some(error) = self.kept_from(guest, due) {
            self.wait_since(begun, due.clone(), &error);
            return false;
        }
        if self.awaited.take().is_some() {
            if let Some(again) = self.boots_said.say() {
                log::info!("the guest's kernel can be traced now{again}");
            }
        }
        true
    }

    /// The guest's kernel is waited for.
    pub(super) fn wait(&mut self, due: Due, error: &Refusal) {
        self.wait_since(Instant::now(), due, error);
    }

    fn wait_since(&mut self, begun: Instant, due: Due, error: &Refusal) {
        if self.awaited.is_none() {
            self.untraced.get_or_insert(Untraced::new(begun));
            let passes = error.downcast_ref().is_none_or(StockError::may_pass);
            match self.boots_said.say() {
                Some(again) if passes => {
                    log::warn!(
                        "the guest is traced as soon as it can be; not yet: {error:#}{again}"
                    );
                }
                Some(again) => {
                    log::error!("the guest is not traced as it is to be: {error:#}{again}")
                }
                None => {}
            }
        }
        let mut rest = Rest::default();
        rest.at_least((begun, Instant::now()), LOOK_EVERY);
        self.awaited = Some(Awaited {
            why: format!("{error:#}"),
            due,
            rest,
        });
    }

    /// What keeps a kernel from being traced that may be traced later. One with the patch
    /// is asked, and answers.
    fn kept_from(&self, guest: &Guest, due: &Due) -> Option<Refusal> {
        let Link::Plain(stock) = &guest.link else {
            return None;
        };
        let ram = &*self.attached.ram;
        // A function that it does not have will not come.
        let names = guest.symbols.full_names(&due.functions).ok()?;
        let error = match due.same_boot {
            true => stock
                .tracing(ram, &guest.symbols.ftrace_names(&names))
                .err(),
            false => guest.link.refuses(ram, &guest.symbols, &names),
        };
        if let Some(error) = error {
            return Some(error.into());
        }
        // What is written is written to a kernel that lives.
        let lives = self.watch.liveness.is_fresh(ram, &guest.link);
        let silent = self.watch.silent().as_millis();
        (!lives).then(|| {
            anyhow::anyhow!("the guest's kernel has shown no sign of life for {silent} ms")
        })
    }

    /// Tells that a guest has not been traced for long which is to be: to the session,
    /// where one is open, and to the log.
    pub(super) fn tell_untraced(&mut self, now: Instant) {
        let untraced = self.untraced.as_mut();
        if !untraced.is_some_and(|untraced| untraced.is_to_be_told(now)) {
            return;
        }
        let why = match (&self.awaited, self.watch.rivals()) {
            (Some(awaited), _) => awaited.why.clone(),
            (None, Some(rivals)) => rivals.to_string(),
            (None, None) => match self.watch.why.as_str() {
                "" => "its kernel has not been switched on".to_owned(),
                why => why.to_owned(),
            },
        };
        match &mut self.trace {
            Some(trace) => trace.finding(Finding {
                wall_ns: wall_ns(),
                kind: FindingKind::NotTraced { why },
            }),
            None => log::error!(
                "the guest is to be traced, and has not been for {} s: {why}",
                TELL_AFTER.as_secs()
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lasts_long_is_told_once() {
        let begun = Instant::now();
        let mut untraced = Untraced::new(begun);
        assert!(!untraced.is_to_be_told(begun + TELL_AFTER));
        let late = begun + TELL_AFTER + Duration::from_secs(1);
        assert!(untraced.is_to_be_told(late));
        assert!(!untraced.is_to_be_told(late));
    }
}
