//! Huge pages for a guest, and the machine as it was afterwards.

use std::fs;
use std::sync::{Mutex, PoisonError};

use anyhow::{bail, Context, Result};

/// How many there are of the default size, hugetlbpage.rst.
const POOL: &str = "/proc/sys/vm/nr_hugepages";

/// Held while the number is read and written: tests run side by side.
static CHANGING: Mutex<()> = Mutex::new(());

/// So many huge pages more than the machine has otherwise, until dropped.
#[derive(Debug)]
pub struct HugePages {
    more: u64,
}

impl HugePages {
    /// Has the kernel set aside huge pages of 2 MiB for a guest with this much
    /// memory, in MiB.
    ///
    /// # Errors
    /// Where it does not, for want of memory in one piece.
    pub fn for_guest(memory: u64) -> Result<HugePages> {
        let _guard = CHANGING.lock().unwrap_or_else(PoisonError::into_inner);
        let before = read()?;
        let pool = HugePages { more: memory / 2 };
        let wanted = before + pool.more;
        fs::write(POOL, wanted.to_string()).with_context(|| format!("cannot write {POOL}"))?;
        let have = read()?;
        if have < wanted {
            // Dropped without this, it would take away what it did not get.
            std::mem::forget(pool);
            fs::write(POOL, before.to_string())?;
            bail!("the kernel has {have} huge pages and not {wanted}");
        }
        Ok(pool)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _guard = CHANGING.lock().unwrap_or_else(PoisonError::into_inner);
        let less = read().map(|now| now.saturating_sub(self.more).to_string());
        let done = less.and_then(|less| Ok(fs::write(POOL, less)?));
        if let Err(error) = done {
            eprintln!("lab: cannot write {POOL}: {error:#}");
        }
    }
}

fn read() -> Result<u64> {
    let text = fs::read_to_string(POOL).with_context(|| format!("cannot read {POOL}"))?;
    text.trim()
        .parse()
        .with_context(|| format!("{POOL} has no number"))
}
