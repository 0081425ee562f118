//! How long something takes, for tests that bound it.

use std::time::Duration;

use nix::time::{clock_gettime, ClockId};

/// The processor's time of this thread so far: what else the machine does
/// meanwhile is not in it.
pub(crate) fn cpu_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)
        .expect("a clock")
        .into()
}
