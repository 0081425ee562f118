//! A lab for xftrace: real guests under a real, private libvirt.
//!
//! ```text
//! tests/lab/kernel and kernel-variant, stock-kernel, initramfs
//!                                         make what a guest boots    (cached)
//! tests/lab/libvirtd                      keeps libvirt in namespaces
//! Lab                                     starts it, enters it, defines domains
//! Guest                                   starts a domain, runs commands in it
//! ```
//!
//! One implementation for everybody: the end-to-end tests use this library,
//! `make demo` and people use its program, `tests/lab/lab`. It knows nothing
//! of xftrace but how to put its hook in place and how to call it.
//!
//! Everything is bounded in time, errors carry the end of the guest's console,
//! and a lab leaves nothing behind: its processes live in a PID namespace that
//! ends with it, its files in one directory in /tmp and one in /dev/shm.

mod agent;
mod artifacts;
mod domain;
mod guest;
mod hugepages;
mod lab;
mod table;

use std::time::{Duration, Instant};

use anyhow::{bail, Result};

pub use agent::{Job, Output};
pub use artifacts::{patched_qemu, Artifacts};
pub use domain::{Backing, Domain, KERNEL};
pub use guest::Guest;
pub use hugepages::HugePages;
pub use lab::{Lab, Options};
pub use table::{markdown, rows, Meanwhile, Ring, Row, Shows};

/// Asks until there is an answer.
///
/// # Errors
/// The question's own error, at once; where there is no answer in time, that.
pub fn wait_for<T>(timeout: Duration, mut ask: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + timeout;
    loop {
        if let Some(answer) = ask()? {
            return Ok(answer);
        }
        if Instant::now() >= deadline {
            bail!("gave up after {timeout:?}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
