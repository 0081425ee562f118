//! Surviving a memory file that shrinks while it is mapped.
//!
//! Touching a page of a mapped file past the file's end raises `SIGBUS`, and
//! anybody who may write the file (QEMU, root, a full tmpfs) can bring that
//! about. A helper that runs as root must not die of it. So each mapping is
//! registered here; the handler replaces the mapping that faulted with
//! anonymous zero pages and notes that it is lost. The faulting load is then
//! repeated and reads zeros; [`Watch::lost`] tells.
//!
//! Faults anywhere else get the action that was installed before us; a
//! `SIGBUS` that somebody sent gets the default action, which is to die (the
//! handler of Rust's runtime would swallow it).

use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use nix::libc;

/// One registered mapping. A slot is made for each, and neither freed nor used
/// again: the handler may walk the list at any moment and must not lock, and so
/// never finds the start of one mapping with the length of another. A process
/// maps the memory of a few guests in its life.
struct Slot {
    /// First address.
    start: usize,
    /// Length in bytes.
    len: usize,
    /// The size of its pages, in bytes.
    page: usize,
    /// Cleared when the mapping is given up.
    live: AtomicBool,
    /// Set by the handler.
    lost: AtomicBool,
    /// The next slot of the list.
    next: Option<&'static Slot>,
}

/// The list of slots, newest first.
static SLOTS: AtomicPtr<Slot> = AtomicPtr::new(ptr::null_mut());

/// Held while a slot is added; the handler does not need it.
static CHANGING: Mutex<()> = Mutex::new(());

/// What `SIGBUS` did before us; `None` if that could not be found out.
static BEFORE: OnceLock<Option<libc::sigaction>> = OnceLock::new();

/// A mapping under watch, until dropped.
///
/// Must be dropped before the mapping is unmapped: otherwise the handler
/// might replace what some later mapping has at the same address.
pub(super) struct Watch {
    slot: &'static Slot,
}

impl Watch {
    /// Watches `[start, start + len)`, a live mapping with pages of `page`
    /// bytes, a power of two.
    pub(super) fn new(start: *const u8, len: usize, page: usize) -> Self {
        install();
        let _guard = lock();
        let slot: *mut Slot = Box::leak(Box::new(Slot {
            start: start.expose_provenance(),
            len,
            page,
            live: AtomicBool::new(true),
            lost: AtomicBool::new(false),
            next: newest(),
        }));
        // With release: a handler that finds the slot finds what is in it.
        SLOTS.store(slot, Ordering::Release);
        // SAFETY: just leaked, so it lives for ever; shared use only from here on.
        let slot = unsafe { &*slot };
        Self { slot }
    }

    /// Whether the mapping was replaced by zeros since.
    pub(super) fn lost(&self) -> bool {
        self.slot.lost.load(Ordering::Acquire)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.slot.live.store(false, Ordering::Release);
    }
}

/// The lock guards no data that a panic could leave half changed.
fn lock() -> MutexGuard<'static, ()> {
    CHANGING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The slot that was added last.
fn newest() -> Option<&'static Slot> {
    // SAFETY: null, or from `Box::leak` and never freed; nothing but the atomics
    // of a slot changes once it is here.
    unsafe { SLOTS.load(Ordering::Acquire).as_ref() }
}

/// All slots, also of mappings that are gone. Lock-free, so fit for the handler.
fn slots() -> impl Iterator<Item = &'static Slot> {
    std::iter::successors(newest(), |slot| slot.next)
}

/// Installs the handler, once in the life of the process.
fn install() {
    BEFORE.get_or_init(|| {
        // SAFETY: an all-zero sigaction is a valid value to be filled in.
        let mut before: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
        let mut ours = before;
        ours.sa_sigaction = on_sigbus as extern "C" fn(_, _, _) as usize;
        // On the alternative stack if the thread has one, as the handler of
        // Rust's runtime does, which we pass other faults on to.
        ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: both pointers are to live values of the right type, and the
        // handler has the signature that SA_SIGINFO asks for.
        let done = unsafe {
            libc::sigemptyset(&mut ours.sa_mask);
            libc::sigaction(libc::SIGBUS, &ours, &mut before)
        };
        // It cannot fail for SIGBUS; if it did, faults would be fatal as they
        // were before.
        (done == 0).then_some(before)
    });
}

/// The handler. Only async-signal-safe calls: atomics, mmap, sigaction, raise.
extern "C" fn on_sigbus(_signal: c_int, info: *mut libc::siginfo_t, _context: *mut c_void) {
    // SAFETY: errno of this thread; restored, since the interrupted code may
    // be about to look at it.
    let errno = unsafe { *libc::__errno_location() };
    // SAFETY: with SA_SIGINFO the kernel passes a valid siginfo.
    let (code, fault) = unsafe { ((*info).si_code, (*info).si_addr().addr()) };
    // Codes above 0 come from the kernel and carry the address; the others
    // were sent by somebody (kill, sigqueue).
    if !(code > 0 && contain(fault)) {
        pass_on(code);
    }
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

/// Replaces the watched mapping that `fault` lies in; false if there is none.
fn contain(fault: usize) -> bool {
    let within = |slot: &&Slot| {
        let live = slot.live.load(Ordering::Acquire);
        live && fault >= slot.start && fault - slot.start < slot.len
    };
    let Some(slot) = slots().find(within) else {
        return false;
    };
    slot.lost.store(true, Ordering::Release);
    // The whole mapping, so that nobody mixes zeros with what is left. Where
    // the system has no room for that much, at least the page that faulted: all
    // of it, for a huge page cannot be replaced in part.
    let page = fault & !(slot.page - 1);
    zero_pages(slot.start, slot.len) || zero_pages(page, slot.page)
}

/// Maps zero pages over `[start, start + len)`.
fn zero_pages(start: usize, len: usize) -> bool {
    // SAFETY: the range lies in a watched mapping: start and length are of one
    // slot, hence of one mapping, and never change. Nobody unmaps it before it is
    // dropped, which nobody does who is reading or writing there, as the thread
    // that faulted is. No reference to it exists; MAP_FIXED swaps it atomically.
    // The thread used raw pointers and finds valid memory at the same address.
    let mapped = unsafe {
        libc::mmap(
            ptr::with_exposed_provenance_mut(start),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    mapped != libc::MAP_FAILED
}

/// Leaves a signal that is not ours to whoever had it before.
fn pass_on(code: c_int) {
    // SAFETY: an all-zero sigaction is SIG_DFL without flags.
    let default: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    let faulted = code > 0;
    let action = match BEFORE.get() {
        Some(Some(before)) if faulted => *before,
        _ => default,
    };
    // SAFETY: a valid action; a null old action is allowed. Returning to the
    // faulting instruction raises the signal again, then with this action.
    unsafe { libc::sigaction(libc::SIGBUS, &action, ptr::null_mut()) };
    if !faulted {
        // Nothing would repeat a signal that was sent. It stays pending until
        // we return, and then ends the process.
        // SAFETY: raise is async-signal-safe.
        unsafe { libc::raise(libc::SIGBUS) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use memmap2::{MmapOptions, MmapRaw};
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    /// Set in the process that a test starts to see it die.
    const VICTIM: &str = "XFTRACE_TEST_SIGBUS";

    /// A mapped file that has been truncated to nothing.
    fn truncated(pages: usize) -> MmapRaw {
        let file = tempfile::tempfile().unwrap();
        file.set_len(pages as u64 * 4096).unwrap();
        let map = MmapOptions::new().len(pages * 4096).map_raw(&file).unwrap();
        file.set_len(0).unwrap();
        map
    }

    /// Runs the test of the given name again, in a process of its own.
    fn rerun(test: &str, how: &str) -> std::process::ExitStatus {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", test, "--nocapture"])
            .env(VICTIM, how)
            .output()
            .unwrap()
            .status
    }

    #[test]
    fn a_truncated_mapping_becomes_zeros_and_is_told() {
        let map = truncated(4);
        let watch = Watch::new(map.as_ptr(), 4 * 4096, 4096);
        let other = Watch::new(ptr::null::<u8>().wrapping_add(0x1000), 4096, 4096);
        assert!(!watch.lost());
        // SAFETY: inside the mapping; that it faults is the point.
        let seen = unsafe { ptr::read_volatile(map.as_ptr().add(4096 * 2 + 5)) };
        assert_eq!(seen, 0);
        assert!(watch.lost());
        assert!(!other.lost());
    }

    /// The handler may have found the first mapping just before it went.
    #[test]
    fn a_slot_stands_for_one_mapping_only() {
        let place = ptr::null::<u8>().wrapping_add(0x1000);
        let first = Watch::new(place, 4096, 4096);
        let slot = first.slot;
        drop(first);
        assert!(!slots().any(|slot| slot.live.load(Ordering::Relaxed) && slot.start == 0x1000));
        let larger = Watch::new(place, 1 << 30, 4096);
        assert!(!ptr::eq(larger.slot, slot));
        assert_eq!((slot.start, slot.len), (0x1000, 4096));
        assert!(!larger.lost());
    }

    /// A start that is not on a page cannot be mapped, as where there is no room.
    #[test]
    fn where_not_all_can_be_replaced_a_whole_page_is() {
        let map = truncated(8);
        let page = map.as_ptr().addr().next_multiple_of(4 * 4096);
        let watch = Watch::new(map.as_ptr().wrapping_add(8), 8 * 4096 - 8, 4 * 4096);
        // SAFETY: inside the mapping; that it faults is the point.
        let seen = unsafe { ptr::read_volatile(map.as_ptr().with_addr(page + 2 * 4096 + 5)) };
        assert!(seen == 0 && watch.lost());
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let zeros = format!("{page:x}-{:x} rw-p", page + 4 * 4096);
        assert!(maps.contains(&zeros), "no {zeros} in {maps}");
    }

    #[test]
    fn a_fault_elsewhere_still_kills() {
        if let Ok(how) = std::env::var(VICTIM) {
            let map = truncated(1);
            let _watch = Watch::new(map.as_ptr().wrapping_add(4096), 4096, 4096);
            match how.as_str() {
                // SAFETY: inside the mapping, which is not under watch.
                "fault" => unsafe { ptr::read_volatile(map.as_ptr()) },
                // SAFETY: raise has no preconditions.
                _ => unsafe { libc::raise(libc::SIGBUS) as u8 },
            };
            std::process::exit(0);
        }
        let name = "ram::sigbus::tests::a_fault_elsewhere_still_kills";
        for how in ["fault", "sent"] {
            assert_eq!(rerun(name, how).signal(), Some(libc::SIGBUS), "{how}");
        }
    }
}
