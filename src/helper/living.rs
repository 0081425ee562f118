//! The kernel that a running domain runs, for a command that is gone in a moment.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::config::Config;
use crate::kernel::{Kernel, Symbols};
use crate::libvirt::enrolment::Enrolment;
use crate::libvirt::run_dir::RunDir;
use crate::libvirt::xml::DomainXml;
use crate::ram::{GuestRam, RamError};

use super::attach::Attached;
use super::link::Link;
use super::place;
use super::sources::Sources;
use super::watch::{Seen, Watch};

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(20);
/// How long a kernel that cannot be traced has to show that it lives. The ticks of one
/// that is idle stand still for a second and more.
const CLOSER: Duration = Duration::from_secs(3);

/// A kernel in a guest's memory.
#[derive(Debug)]
pub struct Living {
    /// Where it lies.
    pub kernel: Kernel,
    /// Its symbols.
    pub symbols: Arc<Symbols>,
    /// What it calls this boot, as sessions note it; none where it cannot be traced.
    pub boot_id: Option<u64>,
    /// Whether its heart was seen to beat.
    pub lives: bool,
}

/// Where symbols are looked for: where the domain says, or else in the store.
pub(super) fn places(enrolment: Option<&Enrolment>, config: &Config) -> Vec<PathBuf> {
    let own = enrolment.and_then(|wanted| wanted.symbols.clone());
    vec![own.unwrap_or_else(|| config.paths.symbols.clone())]
}

/// Finds the kernel that lives; where none is seen to within `patience` (a
/// paused guest's does not), or none can be traced, the one where a helper has
/// seen it, or else the lowest one. What the domain boots may be `named`: it is
/// one more file that has symbols.
///
/// # Errors
/// If there is none, with what there is instead; and if several live.
pub fn find_living(
    domain: &DomainXml,
    config: &Config,
    named: Option<&Path>,
    attached: &Attached,
    patience: Duration,
) -> anyhow::Result<Living> {
    let mut places = places(Enrolment::of(domain, config).as_ref(), config);
    places.extend(named.map(Path::to_owned));
    let mut watch = Watch::new(places.clone(), attached.max_cpus);
    let run_dir = RunDir::at(&config.paths.run);
    let known = place::noted(&run_dir, domain.uuid, attached.qemu);
    if let Some(place) = known {
        watch.known_at(place);
    }
    let ram = &*attached.ram;
    let until = Instant::now() + patience;
    while Instant::now() < until {
        if let (Seen::Booted, Some(guest)) = (watch.look(ram)?, watch.guest.take()) {
            if let Some(rivals) = watch.rivals() {
                anyhow::bail!("{rivals}");
            }
            return Ok(Living {
                boot_id: Some(guest.link.boot_id()),
                kernel: guest.kernel,
                symbols: guest.symbols,
                lives: true,
            });
        }
        std::thread::sleep(PAUSE);
    }
    let found = Sources::new(places).fitting(ram)?.find(ram, known)?;
    let (kernel, symbols) = (found.kernel, found.symbols);
    let link = Link::attach(ram, &kernel, &symbols).ok();
    Ok(Living {
        lives: moves(ram, &kernel, &symbols)?,
        boot_id: link.map(|link| link.boot_id()),
        kernel,
        symbols,
    })
}

/// Whether a kernel that nobody met shows a sign of life.
fn moves(ram: &dyn GuestRam, kernel: &Kernel, symbols: &Symbols) -> Result<bool, RamError> {
    let beats = || Link::vitals(ram, kernel, symbols);
    let first = beats()?;
    let until = Instant::now() + CLOSER;
    while first.is_some() && Instant::now() < until {
        std::thread::sleep(PAUSE);
        if beats()? != first {
            return Ok(true);
        }
    }
    Ok(false)
}
