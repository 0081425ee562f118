//! Has a guest that nobody traces switched off.
//!
//! A trace can end without its guest: the kernel did not answer, somebody in
//! there held `trace_pipe` open, something failed here, a helper was killed
//! halfway. The kernel then goes on recording for nobody, or stands stopped,
//! and in that state it takes no command to begin. So a session begins with a
//! guest that is off, and while there is no session, a guest that is not off
//! is told to be, until it is.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::kernel::control::{Control, SwitchState};
use crate::switch::{self, Command, Pending, Progress};

use super::engine::{Engine, Refusal};
use super::link::Link;
use super::ratelimit::{RateLimit, Verdict};

/// For the guest to do it, before it is asked anew.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between two tries.
const TRY_EVERY: Duration = Duration::from_secs(5);

/// What was asked of a guest that nobody traces.
#[derive(Debug)]
pub(super) struct Settling {
    asked: Option<(Pending, Instant)>,
    next: Instant,
    said: RateLimit,
}

impl Settling {
    pub(super) fn new() -> Self {
        Self {
            asked: None,
            next: Instant::now(),
            said: RateLimit::new(2, Duration::from_secs(600)),
        }
    }

    /// A failed try: the next one comes later.
    fn failed(&mut self, why: &str) {
        self.asked = None;
        self.next = Instant::now() + TRY_EVERY;
        if let Verdict::Say { .. } = self.said.ask() {
            log::warn!("no trace is on, but the guest's tracer cannot be set to nop: {why}");
        }
    }
}

impl Engine {
    /// Where the guest's kernel is seen to live and says that its switch is
    /// not off: its control block.
    fn unsettled(&self) -> anyhow::Result<Option<Control>> {
        let ram = &*self.attached.ram;
        let guest = self.watch.guest.as_ref();
        let Some(guest) = guest.filter(|guest| self.watch.liveness.is_fresh(ram, &guest.link))
        else {
            return Ok(None);
        };
        let Link::Keyed(control) = guest.link else {
            return Ok(None);
        };
        let off = control.heartbeat(ram)?.state == SwitchState::Off;
        Ok((!off).then_some(control))
    }

    /// Has the guest switched off, and waits for it. Whether it was not.
    pub(super) fn settle(&mut self, progress: &dyn Fn(String)) -> Result<bool, Refusal> {
        if self.unsettled()?.is_none() {
            return Ok(false);
        }
        progress("the guest's tracer is on from before; setting it to nop".to_owned());
        self.command(&Command::Off, &[], progress)?;
        Ok(true)
    }

    /// The same between other things, where nobody waits for it.
    pub(super) fn settle_meanwhile(&mut self) -> anyhow::Result<()> {
        let Some(control) = self.unsettled()? else {
            self.settling.asked = None;
            return Ok(());
        };
        let ram = Arc::clone(&self.attached.ram);
        let now = Instant::now();
        let Some((pending, since)) = self.settling.asked else {
            if now >= self.settling.next {
                let pending = switch::send(&*ram, &control, &Command::Off)?;
                self.settling.asked = Some((pending, now));
            }
            return Ok(());
        };
        match pending.poll(&*ram, &control) {
            // What its state says then, the next look shows.
            Ok(Progress::Done { .. }) => {
                self.settling.asked = None;
                self.settling.next = now + TRY_EVERY;
            }
            Ok(_) if now.saturating_duration_since(since) < PATIENCE => {}
            Ok(_) => {
                pending.withdraw(&*ram, &control)?;
                self.settling
                    .failed("its kernel does not take the command up");
            }
            Err(error) => self.settling.failed(&error.to_string()),
        }
        Ok(())
    }
}
