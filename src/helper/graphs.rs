//! Call flows that are being written, which takes minutes for a large trace:
//! by threads of their own, so that the engine goes on.

use std::path::PathBuf;
use std::sync::mpsc::{channel, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How often somebody who waits is told of it.
const PROGRESS_EVERY: Duration = Duration::from_secs(2);

/// The call flows of one helper. The last one of these to be dropped waits
/// until they are written: none is left half done.
#[derive(Clone, Debug)]
pub(super) struct Graphs {
    threads: Arc<Threads>,
    /// How many bytes of calls one may have.
    limit: u64,
}

/// Whether a call flow has all calls, or why it could not be written.
pub(super) type Written = Result<bool, String>;

#[derive(Debug, Default)]
struct Threads(Mutex<Vec<JoinHandle<()>>>);

impl Graphs {
    /// Those of a helper whose `limits.text_size` is `limit`.
    pub(super) fn up_to(limit: u64) -> Self {
        let threads = Arc::default();
        Self { threads, limit }
    }

    /// Begins to write that of a closed session.
    pub(super) fn write(&self, dir: PathBuf) {
        let limit = self.limit;
        self.spawn(move || drop(write_graph(&dir, limit)));
    }

    /// The same for somebody who waits: calls `progress` every few seconds,
    /// and `done` at the end.
    pub(super) fn write_for(
        &self,
        dir: PathBuf,
        progress: impl Fn(String) + Send + 'static,
        done: impl FnOnce(Written) + Send + 'static,
    ) {
        let limit = self.limit;
        self.wait_for(move || write_graph(&dir, limit), progress, done);
    }

    fn wait_for(
        &self,
        work: impl FnOnce() -> Written + Send + 'static,
        progress: impl Fn(String) + Send + 'static,
        done: impl FnOnce(Written) + Send + 'static,
    ) {
        let (written, is_written) = channel();
        self.spawn(move || {
            let _ = written.send(work());
        });
        self.spawn(move || {
            let begun = Instant::now();
            loop {
                match is_written.recv_timeout(PROGRESS_EVERY) {
                    Ok(written) => return done(written),
                    Err(RecvTimeoutError::Disconnected) => {
                        return done(Err("whatever wrote it came to an end".to_owned()));
                    }
                    Err(RecvTimeoutError::Timeout) => progress(format!(
                        "writing the call flow, since {} s",
                        begun.elapsed().as_secs()
                    )),
                }
            }
        });
    }

    pub(super) fn are_written(&self) -> bool {
        let mut threads = self
            .threads
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        threads.retain(|thread| !thread.is_finished());
        threads.is_empty()
    }

    /// Does it in a thread, or here and now where there can be none.
    pub(super) fn spawn(&self, work: impl FnOnce() + Send + 'static) {
        let work = Arc::new(Mutex::new(Some(work)));
        let take = |work: &Mutex<Option<_>>| {
            let mut work = work.lock().unwrap_or_else(PoisonError::into_inner);
            work.take()
        };
        let its = Arc::clone(&work);
        let thread = std::thread::Builder::new().name("graph".to_owned());
        match thread.spawn(move || take(&its).into_iter().for_each(|work| work())) {
            Ok(thread) => {
                let mut threads = self
                    .threads
                    .0
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner);
                threads.retain(|thread| !thread.is_finished());
                threads.push(thread);
            }
            Err(error) => {
                log::warn!("cannot start a thread: {error}");
                take(&work).into_iter().for_each(|work| work());
            }
        }
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        let threads = self.0.get_mut().unwrap_or_else(PoisonError::into_inner);
        for thread in threads.drain(..) {
            // It has logged what went wrong.
            let _ = thread.join();
        }
    }
}

/// Writes the call flow of a closed session. What goes wrong is logged, and
/// given: the records are safe, and `xftrace report` can be asked again.
fn write_graph(dir: &std::path::Path, limit: u64) -> Written {
    let written = crate::report::write_graph(dir, limit).map_err(anyhow::Error::from);
    match &written {
        Ok(true) => {}
        Ok(false) => log::warn!(
            "the call flow of {dir:?} ends at the {limit} bytes that limits.text_size allows; \
             `xftrace report` writes all of it"
        ),
        Err(error) => log::error!("the call flow of {dir:?} could not be written: {error:#}"),
    }
    written.map_err(|error| format!("{error:#}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_waits_is_told_of_it_and_then_answered() {
        let (said, says) = channel();
        let graphs = Graphs::up_to(u64::MAX);
        let last = said.clone();
        graphs.wait_for(
            || {
                std::thread::sleep(PROGRESS_EVERY * 3 / 2);
                Err("no room".to_owned())
            },
            move |text| said.send(text).expect("somebody waits"),
            move |written| {
                let why = written.expect_err("a reason");
                last.send(why).expect("somebody waits");
            },
        );
        assert!(!graphs.are_written());
        drop(graphs);
        let said: Vec<String> = says.iter().collect();
        assert_eq!(said, ["writing the call flow, since 2 s", "no room"]);
    }
}
