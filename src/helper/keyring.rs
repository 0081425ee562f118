//! The thread that hands out keys.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::kernel::control::Control;
use crate::keys::{KeyController, KeyError, KeyHistory, Klog, Tamper};
use crate::ram::GuestRam;

use super::link::Link;
use super::watch::{wall_ns, Liveness};

/// What was handed out is compared at least this often.
const VERIFY_EVERY: Duration = Duration::from_secs(1);
/// How often it is tried to hand a key to a guest that has just booted, or
/// whose heart is silent.
const TRY_EVERY: Duration = Duration::from_millis(20);

/// What the thread and the engine share.
#[derive(Debug)]
pub(super) struct Shared {
    /// The keys so far, for decoding what was just read.
    pub(super) history: RwLock<KeyHistory>,
    /// What the guest changed, with when it was noticed (wall clock, ns).
    found: Mutex<Vec<(u64, Tamper)>>,
    /// Why no key could be handed out, since the last one was.
    trouble: Mutex<Option<String>>,
    /// Intervals that passed without a key of their own.
    late: AtomicU64,
    /// The guest's control block; none while the guest is down.
    target: Mutex<Option<(Control, bool)>>,
    stop: AtomicBool,
    wake: (Mutex<()>, Condvar),
}

/// Where a session's keys come from.
#[derive(Debug)]
pub(super) enum Keys {
    /// A thread hands them out.
    Handed(KeyThread),
    /// There are none: mode plain.
    None,
}

impl Keys {
    /// The keys so far, for decoding what was just read.
    pub(super) fn with_history<R>(&self, look: impl FnOnce(&KeyHistory) -> R) -> R {
        match self.thread() {
            Some(keys) => look(
                &keys
                    .shared
                    .history
                    .read()
                    .unwrap_or_else(PoisonError::into_inner),
            ),
            None => look(&KeyHistory::default()),
        }
    }

    /// The thread, where there is one.
    pub(super) fn thread(&self) -> Option<&KeyThread> {
        match self {
            Self::Handed(keys) => Some(keys),
            Self::None => None,
        }
    }
}

/// The thread, and what is shared with it. Stops when dropped.
#[derive(Debug)]
pub(super) struct KeyThread {
    pub(super) shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl KeyThread {
    /// Hands out a first key at once and the others at `interval`, to the
    /// guest with this control block, and goes on counting from `late`
    /// intervals that had none.
    ///
    /// # Errors
    /// If the first key cannot be handed out.
    pub(super) fn start(
        klog: Klog,
        history: KeyHistory,
        late: u64,
        interval: Duration,
        control: Control,
        ram: Arc<dyn GuestRam>,
        liveness: Arc<Liveness>,
    ) -> Result<Self, KeyError> {
        let mut keys = KeyController::new(klog, control.keys(), control.ident.key_slots);
        let shared = Arc::new(Shared {
            history: RwLock::new(history),
            found: Mutex::default(),
            trouble: Mutex::default(),
            late: AtomicU64::new(late),
            target: Mutex::new(Some((control, false))),
            stop: AtomicBool::new(false),
            wake: (Mutex::new(()), Condvar::new()),
        });
        // Nobody looks at the heart meanwhile, however long the disk takes.
        shared.rotate(&mut keys, &*ram, || {
            control
                .boot_id_now(&*ram)
                .is_ok_and(|id| id == control.ident.boot_id)
        })?;
        let thread = {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new()
                .name("keys".to_owned())
                .spawn(move || shared.run(keys, interval, &*ram, &liveness))
                .map_err(KeyError::Thread)?
        };
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// The guest is down, or up again with another control block, whose first
    /// key is to be handed out at once.
    pub(super) fn retarget(&self, control: Option<Control>) {
        *lock(&self.shared.target) = control.map(|control| (control, true));
        self.wake();
    }

    /// Whether the guest that was retargeted to has its first key.
    pub(super) fn ready(&self) -> bool {
        lock(&self.shared.target).is_some_and(|(_, new)| !new)
    }

    /// What the guest changed since this was asked last.
    pub(super) fn take_found(&self) -> Vec<(u64, Tamper)> {
        std::mem::take(&mut *lock(&self.shared.found))
    }

    /// Why no key could be handed out, told once.
    pub(super) fn take_trouble(&self) -> Option<String> {
        lock(&self.shared.trouble).take()
    }

    /// Intervals that passed without a key of their own, so far.
    pub(super) fn late(&self) -> u64 {
        self.shared.late.load(Ordering::Relaxed)
    }

    /// The key in use.
    pub(super) fn epoch(&self) -> u64 {
        self.shared
            .history
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .last_epoch()
    }

    fn wake(&self) {
        let _held = lock(&self.shared.wake.0);
        self.shared.wake.1.notify_all();
    }
}

impl Drop for KeyThread {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.wake();
        if let Some(thread) = self.thread.take() {
            // It has nothing to tell but that it is gone.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn run(
        &self,
        mut keys: KeyController,
        interval: Duration,
        ram: &dyn GuestRam,
        liveness: &Liveness,
    ) {
        let mut due = Instant::now() + interval;
        // A key that is due does not make the thread spin while the guest is
        // paused.
        let mut not_before = Instant::now();
        while !self.stop.load(Ordering::Acquire) {
            let target = *lock(&self.target);
            let look_in = match target {
                Some((_, true)) => TRY_EVERY,
                _ => VERIFY_EVERY.min(interval),
            };
            self.wait(due.min(Instant::now() + look_in).max(not_before));
            let target = *lock(&self.target);
            let Some((control, new)) = target else {
                due = Instant::now() + interval;
                continue;
            };
            if new {
                keys.rebooted(control.keys(), control.ident.key_slots);
            }
            if !liveness.is_fresh(ram, &Link::Keyed(control)) {
                not_before = Instant::now() + TRY_EVERY;
                continue;
            }
            match keys.verify(ram) {
                Ok(found) => self.found(found),
                Err(error) => {
                    *lock(&self.trouble) = Some(format!("{:#}", anyhow::Error::from(error)))
                }
            }
            let now = Instant::now();
            if now < due && !new {
                continue;
            }
            let behind = now.saturating_duration_since(due).as_nanos() / interval.as_nanos().max(1);
            if behind > 0 {
                self.late.fetch_add(behind as u64, Ordering::Relaxed);
                due = now;
            }
            match self.rotate(&mut keys, ram, || {
                liveness.is_fresh(ram, &Link::Keyed(control))
            }) {
                Ok(()) => {
                    if new {
                        let mut target = lock(&self.target);
                        if let Some((current, new)) = &mut *target {
                            *new &= current.ident.boot_id != control.ident.boot_id;
                        }
                    }
                }
                Err(error) => {
                    *lock(&self.trouble) = Some(format!("{:#}", anyhow::Error::from(error)))
                }
            }
            due += interval;
        }
    }

    /// Sleeps until `until`, or until something changed.
    fn wait(&self, until: Instant) {
        let held = lock(&self.wake.0);
        let time = until.saturating_duration_since(Instant::now());
        if !self.stop.load(Ordering::Acquire) && !time.is_zero() {
            drop(self.wake.1.wait_timeout(held, time));
        }
    }

    fn rotate(
        &self,
        keys: &mut KeyController,
        ram: &dyn GuestRam,
        is_there: impl FnOnce() -> bool,
    ) -> Result<(), KeyError> {
        let note = |entry| {
            self.history
                .write()
                .unwrap_or_else(PoisonError::into_inner)
                .push(entry);
        };
        let (_, found) = keys.rotate(ram, note, is_there)?;
        self.found(found);
        Ok(())
    }

    /// Notes what the guest changed.
    pub(super) fn found(&self, found: Vec<Tamper>) {
        let now = wall_ns();
        lock(&self.found).extend(found.into_iter().map(|tamper| (now, tamper)));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
