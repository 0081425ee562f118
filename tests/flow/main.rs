//! The call flow and its formats, from items to text: golden files
//! (`UPDATE_GOLDEN=1` writes them anew), formats read back, and properties that
//! hold for any input.

mod detect;
mod dsl;
mod forest;
mod formats;
mod golden;
mod props;
mod speed;
#[path = "../support/time.rs"]
mod time;

use std::convert::Infallible;
use std::time::{Duration, UNIX_EPOCH};

use xftrace::callflow::{Names, Tally};
use xftrace::output::{BootHeading, Format, Heading, WallClock};
use xftrace::ring::record::Item;
use xftrace::session::Mode;

/// The host's time when a guest's trace clock shows 0: 2026-01-31 23:59:58.5.
const EPOCH: u64 = 1_769_903_998_500_000_000;

/// The host clock of the tests; it is not known for boot 3.
struct Clock;

impl WallClock for Clock {
    fn wall(&self, boot: u32, guest: u64) -> Option<u64> {
        let boots = u64::from(boot)
            .checked_sub(1)
            .filter(|before| *before != 2)?;
        EPOCH
            .checked_add(boots.checked_mul(60_000_000_000)?)?
            .checked_add(guest)
    }
}

fn heading() -> Heading {
    let boot = |boot: u32, banner: &str| BootHeading {
        boot,
        banner: banner.into(),
        slide: u64::from(boot - 1) * dsl::SLIDE,
        clock: Clock
            .wall(boot, 1_000_000_000)
            .map(|wall| (1_000_000_000, UNIX_EPOCH + Duration::from_nanos(wall))),
    };
    Heading {
        domain: "lab1".into(),
        uuid: Some(uuid::uuid!("6f1d6a2e-1f0c-4b7e-9d3a-0123456789ab")),
        session: "2026-01-31T235958Z".into(),
        mode: Mode::Keyed,
        boots: vec![
            boot(1, "Linux version 6.1.0-xf (gcc 12.2.0) #1 SMP\n"),
            boot(2, "Linux version 6.1.0-\u{1b}[31mred \\x1b\n"),
        ],
        functions: vec!["__x64_sys_openat".into(), "__x64_sys_read".into()],
        started: Some(UNIX_EPOCH + Duration::from_nanos(EPOCH)),
        stopped: Some(UNIX_EPOCH + Duration::from_nanos(EPOCH + 2_500_000_000)),
        ended: "by xftrace off".into(),
        interval: Some(Duration::from_secs(1)),
        counters: vec![("keys that the guest changed".into(), 0)],
    }
}

/// Items that can all be read.
fn readable(items: &[Item]) -> impl Iterator<Item = Result<Item, Infallible>> + '_ {
    items.iter().copied().map(Ok)
}

fn write(format: Format, items: &[Item]) -> (String, Tally) {
    write_named(format, items, &dsl::Table)
}

/// The same with other names for the addresses.
fn write_named(format: Format, items: &[Item], names: &impl Names) -> (String, Tally) {
    let mut out = Vec::new();
    let tally = format.write(&mut out, &heading(), &Clock, names, || readable(items));
    let text = String::from_utf8(out).expect("output is UTF-8");
    (text, tally.expect("writing to memory does not fail"))
}
