//! Is a guest's QEMU ever stopped? Two witnesses: its own events, and the state
//! of its threads in /proc.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use xftrace_lab::wait_for;

use crate::lab::TestGuest;

/// Longer than anything here takes on a busy machine.
const SOON: Duration = Duration::from_secs(60);
/// How long a mark may take before another is set.
const MARK_AGAIN: Duration = Duration::from_secs(1);
/// How often QEMU's state is looked at. Being stopped and let go on again takes
/// a tenth of that at least, so that it is met when done often.
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// Does something while QEMU is never stopped.
pub(crate) fn unstopped<T>(guest: &TestGuest, run: impl FnOnce() -> T) -> T {
    let watch = Watch::start(guest);
    let result = run();
    watch.saw_nothing();
    result
}

/// Watches a guest's QEMU until it is dropped.
pub(crate) struct Watch<'a> {
    guest: &'a TestGuest,
    events: Child,
    heard: Arc<Mutex<Vec<String>>>,
    marks: AtomicU64,
    looks: Arc<AtomicU64>,
    stopped: Arc<AtomicU64>,
    end: Arc<AtomicBool>,
    looker: Option<JoinHandle<()>>,
}

impl Watch<'_> {
    /// Returns when both witnesses are at work.
    pub(crate) fn start(guest: &TestGuest) -> Watch<'_> {
        let mut events = Command::new("stdbuf")
            .args(["-oL", "virsh", "--connect", &guest.lab().uri()])
            .args(["qemu-monitor-event", "--loop", guest.name()])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("virsh");
        let heard = Arc::new(Mutex::new(Vec::new()));
        let lines = BufReader::new(events.stdout.take().expect("a pipe")).lines();
        let to = Arc::clone(&heard);
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                to.lock().unwrap_or_else(PoisonError::into_inner).push(line);
            }
        });

        let qemu = guest.qemu_pid().unwrap();
        let looks = Arc::new(AtomicU64::new(0));
        let stopped = Arc::new(AtomicU64::new(0));
        let end = Arc::new(AtomicBool::new(false));
        let shared = (Arc::clone(&looks), Arc::clone(&stopped), Arc::clone(&end));
        let looker = std::thread::spawn(move || {
            let (looks, stopped, end) = shared;
            while !end.load(Ordering::Relaxed) {
                // A process that has gone, or that is none, shows nothing.
                if let Some(found) = threads_stopped(qemu) {
                    stopped.fetch_add(found, Ordering::Relaxed);
                    looks.fetch_add(1, Ordering::Relaxed);
                }
                std::thread::sleep(LOOK_EVERY);
            }
        });
        let watch = Watch {
            guest,
            events,
            heard,
            marks: AtomicU64::new(0),
            looks,
            stopped,
            end,
            looker: Some(looker),
        };
        watch.hear();
        watch
    }

    /// Waits until virsh has heard all that QEMU said before now.
    ///
    /// QEMU tells of each block job by its name, which makes a mark among its
    /// events. The job here fails at once and is forgotten: it is to make a file
    /// where none can be.
    fn hear(&self) {
        let job = |mark: &str| {
            format!(
                "{{\"execute\":\"blockdev-create\",\"arguments\":{{\"job-id\":\"{mark}\",\
                 \"options\":{{\"driver\":\"file\",\"filename\":\"/proc/none\",\"size\":1}}}}}}"
            )
        };
        wait_for(SOON, || {
            let mark = format!("mark-{}", self.marks.fetch_add(1, Ordering::Relaxed));
            let name = self.guest.name();
            let lab = self.guest.lab();
            lab.virsh(&["qemu-monitor-command", name, &job(&mark)])?;
            let concluded = |line: &String| line.contains("concluded") && line.contains(&mark);
            let heard = wait_for(MARK_AGAIN, || {
                Ok(self.heard().iter().any(concluded).then_some(()))
            });
            Ok(heard.ok())
        })
        .expect("virsh hears QEMU's events");
    }

    fn heard(&self) -> Vec<String> {
        let heard = self.heard.lock();
        heard.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// STOP and RESUME among QEMU's events so far.
    pub(crate) fn events(&self) -> Vec<String> {
        self.hear();
        let mut heard = self.heard();
        heard.retain(|line| line.contains("event STOP") || line.contains("event RESUME"));
        heard
    }

    /// How often one of QEMU's threads was found stopped, by a signal or by
    /// a debugger.
    pub(crate) fn stopped(&self) -> u64 {
        self.stopped.load(Ordering::Relaxed)
    }

    /// Refuses a QEMU that was stopped.
    pub(crate) fn saw_nothing(self) {
        assert_eq!(self.events(), [""; 0]);
        let looks = self.looks.load(Ordering::Relaxed);
        assert_eq!(self.stopped(), 0, "of {looks} looks");
        assert!(looks > 100, "QEMU was hardly looked at: {looks}");
    }
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        if let Some(looker) = self.looker.take() {
            let _ = looker.join();
        }
        let _ = self.events.kill();
        let _ = self.events.wait();
    }
}

/// How many threads of a process are stopped: their stat says T or t. `None` where there
/// is no QEMU.
fn threads_stopped(pid: u32) -> Option<u64> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).ok()?;
    let states = threads.flatten().filter_map(|thread| {
        // One that has just ended has none.
        let stat = fs::read_to_string(thread.path().join("stat")).ok()?;
        // proc(5): the state comes after the name, which may hold anything.
        let (_, rest) = stat.rsplit_once(") ")?;
        Some(rest.starts_with(['T', 't']))
    });
    let states: Vec<bool> = states.collect();
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
    let is_there = name.contains("qemu") && !states.is_empty();
    is_there.then(|| states.iter().filter(|&&stopped| stopped).count() as u64)
}
