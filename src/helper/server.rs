//! The helper's socket: one listener, a thread a connection.

use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::sys::socket::{shutdown, Shutdown};
use uuid::Uuid;

use crate::libvirt::run_dir::{Claim, RunDir};

use super::engine::Job;
use super::protocol::{Line, Reply, Request, Status};

/// More conversations at once are refused.
const CONNECTIONS: usize = 16;
/// For a client to say what it wants.
const REQUEST_LIMIT: Duration = Duration::from_secs(10);

/// The socket of one domain's helper, and the lock that says there is one.
#[derive(Debug)]
pub(super) struct Server {
    listener: UnixListener,
    path: PathBuf,
    wake: (UnixStream, UnixStream),
    /// Set when nobody is to listen any more.
    ended: Arc<AtomicBool>,
    /// Held as long as the helper lives.
    _claim: Claim,
}

impl Server {
    /// Takes the domain: at most one helper has it.
    pub(super) fn bind(run_dir: &RunDir, uuid: Uuid) -> anyhow::Result<Self> {
        let Some(claim) = run_dir.claim(uuid)? else {
            anyhow::bail!("another helper looks after this domain already");
        };
        let path = run_dir.socket_path(uuid);
        // Left by a helper that was killed: the lock says that it has gone.
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                anyhow::bail!("cannot remove the old socket {path:?}: {error}")
            }
            _ => {}
        }
        let listener = UnixListener::bind(&path)
            .map_err(|error| anyhow::anyhow!("cannot listen on {path:?}: {error}"))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
        let wake = UnixStream::pair()?;
        wake.0.set_nonblocking(true)?;
        wake.1.set_nonblocking(true)?;
        Ok(Self {
            listener,
            path,
            wake,
            ended: Arc::default(),
            _claim: claim,
        })
    }

    /// Readable when a job is waiting.
    pub(super) fn wake(&self) -> BorrowedFd<'_> {
        self.wake.0.as_fd()
    }

    /// Begins to take requests.
    pub(super) fn serve(&self, status: Arc<Mutex<Status>>) -> anyhow::Result<Receiver<Job>> {
        let (sender, receiver) = channel();
        let listener = self.listener.try_clone()?;
        let wake = self.wake.1.try_clone()?;
        let ended = Arc::clone(&self.ended);
        std::thread::Builder::new()
            .name("listen".to_owned())
            .spawn(move || {
                let open = Arc::new(AtomicUsize::new(0));
                for stream in listener.incoming() {
                    if ended.load(Ordering::Acquire) {
                        return;
                    }
                    let (Ok(stream), Ok(wake)) = (stream, wake.try_clone()) else {
                        // Out of descriptors, perhaps: not forever.
                        std::thread::sleep(Duration::from_millis(100));
                        continue;
                    };
                    if open.load(Ordering::Relaxed) >= CONNECTIONS {
                        continue;
                    }
                    let (sender, status, open) = (
                        Sender::clone(&sender),
                        Arc::clone(&status),
                        Arc::clone(&open),
                    );
                    let counted = Counted::new(open);
                    let talk = move || {
                        let _counted = counted;
                        if let Err(error) = converse(stream, &sender, &wake, &status) {
                            log::debug!("a connection ended early: {error}");
                        }
                    };
                    if let Err(error) = std::thread::Builder::new()
                        .name("talk".to_owned())
                        .spawn(talk)
                    {
                        log::warn!("cannot serve a connection: {error}");
                    }
                }
            })?;
        Ok(receiver)
    }
}

/// One conversation, as long as it lasts: also where its thread panics, or was
/// never started.
#[derive(Debug)]
struct Counted(Arc<AtomicUsize>);

impl Counted {
    fn new(open: Arc<AtomicUsize>) -> Self {
        open.fetch_add(1, Ordering::Relaxed);
        Self(open)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Gone already is as good.
        let _ = fs::remove_file(&self.path);
        // Whoever listens returns from accept(2) with an error.
        self.ended.store(true, Ordering::Release);
        let _ = shutdown(self.listener.as_raw_fd(), Shutdown::Both);
    }
}

/// Empties the pipe that woke the engine.
pub(super) fn drain_wake(wake: BorrowedFd<'_>) {
    let mut bytes = [0; 64];
    while nix::unistd::read(wake, &mut bytes).is_ok_and(|read| read == bytes.len()) {}
}

fn converse(
    stream: UnixStream,
    jobs: &Sender<Job>,
    mut wake: &UnixStream,
    status: &Mutex<Status>,
) -> io::Result<()> {
    let mut line = Line::new(stream);
    line.patience(Some(REQUEST_LIMIT))?;
    let Some(request) = line.receive::<Request>()? else {
        return Ok(());
    };
    // The status is always at hand, even while the engine waits for the guest.
    if request == Request::Status {
        let now = status
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        return line.send(&Reply::Status(Box::new(now)));
    }
    let (reply, replies) = channel();
    if jobs.send(Job { request, reply }).is_err() {
        return line.send(&Reply::Error {
            text: "the helper is ending".to_owned(),
        });
    }
    // A full pipe wakes the engine as well.
    let _ = wake.write(&[1]);
    for reply in replies {
        line.send(&reply)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_conversation_that_ends_in_a_panic_makes_room_for_another() {
        let open = Arc::new(AtomicUsize::new(0));
        let counted = Counted::new(Arc::clone(&open));
        assert_eq!(open.load(Ordering::Relaxed), 1);
        let talk = std::thread::spawn(move || {
            let _counted = counted;
            panic!("a test");
        });
        assert!(talk.join().is_err());
        assert_eq!(open.load(Ordering::Relaxed), 0);
    }
}
