//! How a finding is told: to the log, and to the command that the configuration wants
//! run for each (`on_finding`).
//!
//! The command gets the finding as one JSON object on standard input. It is run as it
//! stands, without a shell, one at a time, by a thread of its own: neither a
//! slow command nor a guest that is caught again and again keeps the engine
//! from draining. Each run has so long and is then killed; there are only so
//! many a minute; a few findings wait, and the others are in the log and in
//! findings.jsonl alone.

use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{sync_channel, Receiver, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::session::{ControlFlow, Finding, FindingKind, FINDINGS_FILE};

use super::ratelimit::{Budget, Verdict};

/// How long the command may take.
const TIME: Duration = Duration::from_secs(10);
/// The same while the helper ends.
const TIME_AT_END: Duration = Duration::from_secs(1);
/// Findings that may wait.
const WAITING: usize = 16;
/// Runs in a minute.
const A_MINUTE: u32 = 10;

/// Findings that the log is told of in a minute.
const LOGGED: u32 = 10;

/// How often the log is told of findings.
pub(super) fn log_limit() -> Budget {
    Budget::new(LOGGED, Duration::from_secs(60))
}

/// A finding, and of whom: what the command gets.
#[derive(serde::Serialize)]
pub(super) struct Told<'a> {
    pub(super) domain: &'a str,
    pub(super) uuid: Uuid,
    /// None of what was found in memory.
    pub(super) session: Option<&'a Path>,
    #[serde(flatten)]
    pub(super) finding: &'a Finding,
    /// Whether it was told of before: what is new goes before it.
    #[serde(skip)]
    pub(super) again: bool,
}

impl Told<'_> {
    /// As one JSON object.
    fn json(&self) -> Vec<u8> {
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// Tells the log, as often as `said` allows, and the command. Never waits.
    pub(super) fn tell(&self, said: &mut Budget, notifier: Option<&Notifier>) {
        if let Verdict::Say { dropped } = said.ask(self.again) {
            log::warn!(
                "domain {}: {}{}",
                self.domain.escape_debug(),
                serde_json::to_string(&brief(&self.finding.kind)).unwrap_or_default(),
                if dropped > 0 {
                    format!(" ({dropped} findings before it are in {FINDINGS_FILE} only)")
                } else {
                    String::new()
                }
            );
        }
        if let Some(notifier) = notifier {
            notifier.tell(self.json(), self.again);
        }
    }
}

/// A finding as the log has it: without the call path.
fn brief(kind: &FindingKind) -> FindingKind {
    match kind {
        FindingKind::ControlFlow(found) => FindingKind::ControlFlow(Box::new(ControlFlow {
            evidence: serde_json::Value::Null,
            ..(**found).clone()
        })),
        other => other.clone(),
    }
}

/// Hands findings to the command.
pub(super) struct Notifier {
    to: Option<SyncSender<Vec<u8>>>,
    thread: Option<JoinHandle<()>>,
    rate: Mutex<Budget>,
    /// The helper is about to end.
    hurry: Arc<AtomicBool>,
}

impl Notifier {
    /// One that runs `command`, a program's absolute path and its arguments.
    ///
    /// # Errors
    /// If there can be no thread.
    pub(super) fn start(command: &[String]) -> std::io::Result<Self> {
        let (to, waiting) = sync_channel(WAITING);
        let command = command.to_vec();
        let hurry = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&hurry);
        let thread = std::thread::Builder::new()
            .name("on_finding".to_owned())
            .spawn(move || run(&command, TIME, &waiting, &told))?;
        Ok(Self {
            to: Some(to),
            thread: Some(thread),
            rate: Mutex::new(Budget::new(A_MINUTE, Duration::from_secs(60))),
            hurry,
        })
    }

    /// Has the command run with this finding. Never waits.
    pub(super) fn tell(&self, json: Vec<u8>, again: bool) {
        let mut rate = self.rate.lock().unwrap_or_else(PoisonError::into_inner);
        if rate.ask(again) == Verdict::Drop {
            return;
        }
        if let Some(to) = &self.to {
            // Full: the finding is in the log and in findings.jsonl.
            let _ = to.try_send(json);
        }
    }
}

impl Drop for Notifier {
    /// Lets what waits be told, with less time for each.
    fn drop(&mut self) {
        self.hurry.store(true, Ordering::Relaxed);
        self.to = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn run(command: &[String], time: Duration, waiting: &Receiver<Vec<u8>>, hurry: &AtomicBool) {
    let Some((program, arguments)) = command.split_first() else {
        return;
    };
    while let Ok(json) = waiting.recv() {
        let child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        match child {
            Ok(child) => attend(child, json, time, program, hurry),
            Err(error) => log::error!("on_finding: cannot run {program:?}: {error}"),
        }
    }
}

/// Feeds a command, and waits until it has ended or has had its time.
fn attend(mut child: Child, json: Vec<u8>, time: Duration, program: &str, hurry: &AtomicBool) {
    // A command that does not read must not hold this thread: one of its own
    // writes, and ends when the command does.
    let writer = child.stdin.take().map(|mut stdin| {
        std::thread::spawn(move || {
            let _ = stdin.write_all(&json);
        })
    });
    let started = Instant::now();
    let limit = || {
        if hurry.load(Ordering::Relaxed) {
            time.min(TIME_AT_END)
        } else {
            time
        }
    };
    loop {
        match child.try_wait() {
            Ok(Some(status)) if status.success() => break,
            Ok(Some(status)) => {
                log::error!("on_finding: {program:?}: {status}");
                break;
            }
            Ok(None) if started.elapsed() < limit() => {
                std::thread::sleep(Duration::from_millis(20))
            }
            Ok(None) => {
                log::error!(
                    "on_finding: {program:?} took longer than {:?} and was killed",
                    limit()
                );
                let _ = child.kill();
                let _ = child.wait();
                break;
            }
            Err(error) => {
                log::error!("on_finding: {program:?}: {error}");
                break;
            }
        }
    }
    if let Some(writer) = writer {
        if writer.is_finished() {
            let _ = writer.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Vec<String> {
        ["/bin/sh", "-c", script].map(str::to_owned).to_vec()
    }

    #[test]
    fn the_command_gets_the_finding_and_no_shell_sees_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("got");
        let command = shell(&format!("cat >> {}", file.display()));
        let notifier = Notifier::start(&command).expect("a thread");
        notifier.tell(b"{\"what\":\"$(reboot)\"}\n".to_vec(), false);
        notifier.tell(b"{}\n".to_vec(), true);
        drop(notifier);
        let got = std::fs::read_to_string(file).expect("what it got");
        assert_eq!(got, "{\"what\":\"$(reboot)\"}\n{}\n");
    }

    #[test]
    fn a_command_that_hangs_is_killed_and_the_next_one_runs() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("runs");
        let command = shell(&format!("echo >> {}; exec sleep 100", file.display()));
        let (to, waiting) = sync_channel(2);
        // More than a pipe holds, which nobody reads.
        to.send(vec![b'x'; 1 << 20]).expect("room");
        to.send(Vec::new()).expect("room");
        drop(to);
        let started = Instant::now();
        run(
            &command,
            Duration::from_millis(300),
            &waiting,
            &AtomicBool::new(false),
        );
        assert!(
            started.elapsed() < Duration::from_secs(20),
            "{:?}",
            started.elapsed()
        );
        assert_eq!(std::fs::read_to_string(file).expect("runs"), "\n\n");
    }

    #[test]
    fn so_many_are_run_in_a_minute() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("runs");
        let notifier =
            Notifier::start(&shell(&format!("echo >> {}", file.display()))).expect("a thread");
        for _ in 0..100 {
            notifier.tell(Vec::new(), false);
        }
        drop(notifier);
        let runs = std::fs::read_to_string(file).expect("runs").len();
        assert_eq!(runs, A_MINUTE as usize);
    }
}
