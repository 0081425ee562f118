//! Huge pages for a guest, and the machine as it was afterwards.

use std::fs;

use anyhow::{ensure, Context, Result};

/// How many there are of the default size, hugetlbpage.rst.
const POOL: &str = "/proc/sys/vm/nr_hugepages";

/// More huge pages than the machine had, until dropped.
#[derive(Debug)]
pub struct HugePages {
    before: u64,
}

impl HugePages {
    /// Has the kernel set aside huge pages of 2 MiB for a guest with this much
    /// memory, in MiB.
    ///
    /// # Errors
    /// Where it does not, for want of memory in one piece.
    pub fn for_guest(memory: u64) -> Result<HugePages> {
        let pool = HugePages { before: read()? };
        let wanted = pool.before + memory / 2;
        fs::write(POOL, wanted.to_string()).with_context(|| format!("cannot write {POOL}"))?;
        let have = read()?;
        ensure!(
            have >= wanted,
            "the kernel has {have} huge pages and not {wanted}"
        );
        Ok(pool)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if let Err(error) = fs::write(POOL, self.before.to_string()) {
            eprintln!("lab: cannot write {POOL}: {error}");
        }
    }
}

fn read() -> Result<u64> {
    let text = fs::read_to_string(POOL).with_context(|| format!("cannot read {POOL}"))?;
    text.trim()
        .parse()
        .with_context(|| format!("{POOL} has no number"))
}
