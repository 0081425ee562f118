//! Looking through all of guest RAM for what kernel it holds: only to tell
//! people what is there, once it is not what they said.

use crate::ram::{Gpa, GuestRam, RamError, PAGE_SIZE};

use super::escape::escape;

/// How every kernel's banner begins (init/version-timestamp.c).
pub(super) const BANNER: &[u8; 14] = b"Linux version ";

/// How much memory in use is looked through.
const MAX_SCAN: u64 = 8 << 30;

/// How much is copied at a time.
const CHUNK: usize = 64 << 10;

/// The compiler aligns arrays of that length to 16 bytes at least, the banner
/// too; copies of it in logs and files mostly are not.
const ALIGN: usize = 8;

/// Longer than what fits on a line of a message.
const MAX_BANNER: usize = 512;

/// How many different banners are told, and how often the text may be met
/// before the search ends: a guest can write it everywhere.
const MAX_BANNERS: usize = 4;
const MAX_HITS: usize = 4096;

/// What the search found.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Scan {
    /// Escaped, each once, those in the form of a kernel's own first.
    pub(super) banners: Vec<String>,
    /// Bytes of memory looked through.
    pub(super) searched: u64,
    /// Whether that was all in use.
    pub(super) complete: bool,
}

/// A banner as read from the guest.
pub(super) struct Banner {
    /// Without the newline and NUL that end it.
    pub(super) text: Vec<u8>,
    /// Whether it ends as `linux_banner` does, with a newline before the NUL.
    pub(super) whole: bool,
}

/// Copies the banner at `gpa`: text that begins as one and ends with NUL
/// within `max` bytes.
pub(super) fn read_banner(ram: &dyn GuestRam, gpa: Gpa, max: usize) -> Option<Banner> {
    // Not into a page that the guest never touched, nor past the end of RAM.
    let room = if ram.populated(gpa, max as u64) {
        max
    } else {
        (PAGE_SIZE - gpa.0 % PAGE_SIZE) as usize
    };
    let mut text = vec![0; max.min(room)];
    ram.read(gpa, &mut text).ok()?;
    let end = text.iter().position(|&byte| byte == 0)?;
    text.truncate(end);
    if !text.starts_with(BANNER) {
        return None;
    }
    let whole = text.last() == Some(&b'\n');
    if whole {
        text.pop();
    }
    Some(Banner { text, whole })
}

/// How many bytes from `start` on are in use and can be copied at once: up to
/// a whole chunk, and the one page that `start` is in at least.
fn stretch(ram: &dyn GuestRam, start: Gpa) -> usize {
    let room = ram
        .layout()
        .place(start)
        .map_or(1, |place| place.contiguous);
    let page = (PAGE_SIZE - start.0 % PAGE_SIZE) as usize;
    let mut len = page;
    while len < CHUNK && ram.populated(Gpa(start.0.saturating_add(len as u64)), 1) {
        len += PAGE_SIZE as usize;
    }
    len.min(CHUNK).min(usize::try_from(room).unwrap_or(CHUNK))
}

/// Looks through all memory in use, up to a limit.
pub(super) fn banners(ram: &dyn GuestRam) -> Result<Scan, RamError> {
    let mut found: Vec<(bool, String)> = Vec::new();
    let mut hits = 0;
    let mut searched = 0;
    let mut chunk = vec![0; CHUNK];
    let mut at = Gpa(0);
    let complete = loop {
        let Some(start) = ram.next_populated(at) else {
            break true;
        };
        if searched >= MAX_SCAN || hits >= MAX_HITS {
            break false;
        }
        let now = stretch(ram, start);
        let part = &mut chunk[..now];
        ram.read(start, part)?;
        searched += now as u64;
        for (i, word) in part.chunks_exact(ALIGN).enumerate() {
            if word != &BANNER[..ALIGN] {
                continue;
            }
            hits += 1;
            // Read anew from there: it may go on in the next chunk.
            let place = Gpa(start.0 + (i * ALIGN) as u64);
            if let Some(banner) = read_banner(ram, place, MAX_BANNER) {
                let entry = (!banner.whole, escape(&banner.text));
                if found.len() < MAX_BANNERS * 2 && !found.contains(&entry) {
                    found.push(entry);
                }
            }
        }
        match start.checked_add(now as u64) {
            Some(next) => at = next,
            None => break true,
        }
    };
    // Stable: among equals, the one lower in memory first.
    found.sort_by_key(|&(partial, _)| partial);
    let mut banners: Vec<String> = found.into_iter().map(|(_, text)| text).collect();
    banners.dedup();
    banners.truncate(MAX_BANNERS);
    Ok(Scan {
        banners,
        searched,
        complete,
    })
}
