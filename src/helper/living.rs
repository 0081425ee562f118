//! The kernel that a running domain runs, for a command that is gone in a moment.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::config::Config;
use crate::kernel::{Kernel, Symbols};
use crate::libvirt::enrolment::Enrolment;
use crate::libvirt::run_dir::RunDir;
use crate::libvirt::xml::DomainXml;

use super::attach::Attached;
use super::place;
use super::sources::Sources;
use super::watch::{Seen, Watch};

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(20);

/// A kernel in a guest's memory.
#[derive(Debug)]
pub struct Living {
    /// Where it lies.
    pub kernel: Kernel,
    /// Its symbols.
    pub symbols: Arc<Symbols>,
}

/// Where symbols are looked for: where the domain says, or else in the store.
pub(super) fn places(enrolment: Option<&Enrolment>, config: &Config) -> Vec<PathBuf> {
    let own = enrolment.and_then(|wanted| wanted.symbols.clone());
    vec![own.unwrap_or_else(|| config.paths.symbols.clone())]
}

/// Finds the kernel that lives; where none is seen to within `patience` (a
/// paused guest's does not), or none can be traced, the one where a helper has
/// seen it, or else the most convincing one.
///
/// # Errors
/// If there is none, with what there is instead; and if several live.
pub fn find_living(
    domain: &DomainXml,
    config: &Config,
    attached: &Attached,
    patience: Duration,
) -> anyhow::Result<Living> {
    let places = places(Enrolment::of(domain, config).as_ref(), config);
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
                kernel: guest.kernel,
                symbols: guest.symbols,
            });
        }
        std::thread::sleep(PAUSE);
    }
    let found = Sources::new(places).fitting(ram)?.find(ram, known)?;
    Ok(Living {
        kernel: found.kernel,
        symbols: found.symbols,
    })
}
