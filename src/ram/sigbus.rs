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
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use nix::libc;

/// One registered mapping. Slots are made once and reused, never freed: the
/// handler may walk the list at any moment, and must not lock.
struct Slot {
    /// First address; 0 in a free slot.
    start: AtomicUsize,
    /// Length in bytes.
    len: AtomicUsize,
    /// Set by the handler.
    lost: AtomicBool,
    /// The next slot of the list; written before the slot is published.
    next: AtomicPtr<Slot>,
}

/// The list of slots, newest first.
static SLOTS: AtomicPtr<Slot> = AtomicPtr::new(ptr::null_mut());

/// Held while slots are given out or taken back; the handler does not need it.
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
    /// Watches `[start, start + len)`, a live mapping.
    pub(super) fn new(start: *const u8, len: usize) -> Self {
        install();
        let _guard = lock();
        let slot = slots()
            .find(|slot| slot.start.load(Ordering::Relaxed) == 0)
            .unwrap_or_else(add_slot);
        slot.lost.store(false, Ordering::Relaxed);
        slot.len.store(len, Ordering::Relaxed);
        // Last, with release: a handler that sees the start sees the rest.
        slot.start
            .store(start.expose_provenance(), Ordering::Release);
        Self { slot }
    }

    /// Whether the mapping was replaced by zeros since.
    pub(super) fn lost(&self) -> bool {
        self.slot.lost.load(Ordering::Acquire)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _guard = lock();
        self.slot.start.store(0, Ordering::Release);
    }
}

/// The lock guards no data that a panic could leave half changed.
fn lock() -> MutexGuard<'static, ()> {
    CHANGING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// All slots, free ones too. Lock-free, so fit for the handler.
fn slots() -> impl Iterator<Item = &'static Slot> {
    let mut at = SLOTS.load(Ordering::Acquire);
    std::iter::from_fn(move || {
        // SAFETY: the list holds only null and pointers from `Box::leak`.
        let slot: &'static Slot = unsafe { at.as_ref() }?;
        at = slot.next.load(Ordering::Acquire);
        Some(slot)
    })
}

/// Puts a free slot in front of the list. The caller holds the lock.
fn add_slot() -> &'static Slot {
    let slot: *mut Slot = Box::leak(Box::new(Slot {
        start: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        lost: AtomicBool::new(false),
        next: AtomicPtr::new(SLOTS.load(Ordering::Relaxed)),
    }));
    SLOTS.store(slot, Ordering::Release);
    // SAFETY: just leaked, so it lives for ever; shared use only from here on.
    unsafe { &*slot }
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
    let hit = slots().find_map(|slot| {
        let start = slot.start.load(Ordering::Acquire);
        let len = slot.len.load(Ordering::Relaxed);
        (start != 0 && fault >= start && fault - start < len).then_some((slot, start, len))
    });
    let Some((slot, start, len)) = hit else {
        return false;
    };
    slot.lost.store(true, Ordering::Release);
    // The whole mapping, so that nobody mixes zeros with what is left. Where
    // the system has no room for that much, at least the page that faulted.
    let page = fault & !(super::PAGE_SIZE as usize - 1);
    zero_pages(start, len) || zero_pages(page, super::PAGE_SIZE as usize)
}

/// Maps zero pages over `[start, start + len)`.
fn zero_pages(start: usize, len: usize) -> bool {
    // SAFETY: the range lies in a watched mapping, which nobody unmaps while
    // it is watched and to which no reference exists; MAP_FIXED swaps it
    // atomically. The thread that faulted was reading or writing through raw
    // pointers and finds valid memory at the same address.
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
        let watch = Watch::new(map.as_ptr(), 4 * 4096);
        let other = Watch::new(ptr::null::<u8>().wrapping_add(0x1000), 4096);
        assert!(!watch.lost());
        // SAFETY: inside the mapping; that it faults is the point.
        let seen = unsafe { ptr::read_volatile(map.as_ptr().add(4096 * 2 + 5)) };
        assert_eq!(seen, 0);
        assert!(watch.lost());
        assert!(!other.lost());
        // A slot is given out clean again.
        drop(watch);
        let _rest: Vec<_> = (0..8)
            .map(|i| {
                let watch = Watch::new(ptr::null::<u8>().wrapping_add(0x2000 + i), 1);
                assert!(!watch.lost());
                watch
            })
            .collect();
    }

    #[test]
    fn a_fault_elsewhere_still_kills() {
        if let Ok(how) = std::env::var(VICTIM) {
            let map = truncated(1);
            let _watch = Watch::new(map.as_ptr().wrapping_add(4096), 4096);
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
