//! The host's side of the guest's command agent.
//!
//! Corresponds to guest/agent.c, which has the protocol. QEMU serves one
//! connection to the port at a time: a second one waits until the first is
//! closed.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};

/// How long a command may take to be started.
const START_TIMEOUT: Duration = Duration::from_secs(20);

/// What the agent says about one command.
#[derive(Debug)]
enum Message {
    Pid(u32),
    Out(Vec<u8>),
    Part(Vec<u8>),
    Exit(i32),
    Error(String),
    Pong(String),
}

/// A connection to a guest's agent, for any number of commands at once.
#[derive(Debug)]
pub(crate) struct Agent {
    state: Mutex<State>,
    writer: Mutex<UnixStream>,
}

#[derive(Debug, Default)]
struct State {
    next_id: u64,
    /// Who waits for what is said under an identifier.
    listeners: HashMap<String, Sender<Message>>,
    /// The boot identifier that the guest named last.
    boot_id: Option<String>,
    closed: bool,
}

impl Agent {
    /// Connects to the port's socket. This says nothing about the guest yet:
    /// see [`Agent::wait_until_it_answers`].
    pub(crate) fn connect(socket: &Path) -> Result<Arc<Agent>> {
        let stream = UnixStream::connect(socket)
            .with_context(|| format!("cannot connect to the guest's agent {}", socket.display()))?;
        let reader = BufReader::new(stream.try_clone()?);
        let agent = Arc::new(Agent {
            state: Mutex::default(),
            writer: Mutex::new(stream),
        });
        // Held weakly, so that the thread ends with the last handle: dropping
        // the agent shuts the socket down.
        let weak = Arc::downgrade(&agent);
        std::thread::Builder::new()
            .name("guest agent".to_owned())
            .spawn(move || {
                for line in reader.split(b'\n') {
                    let (Ok(line), Some(agent)) = (line, weak.upgrade()) else {
                        break;
                    };
                    agent.take(&String::from_utf8_lossy(&line));
                }
                if let Some(agent) = weak.upgrade() {
                    let mut state = agent.state();
                    state.closed = true;
                    state.listeners.clear();
                }
            })?;
        Ok(agent)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether QEMU has closed the connection.
    pub(crate) fn is_closed(&self) -> bool {
        self.state().closed
    }

    /// Gives one line to whom it is for. A line that is not of the protocol,
    /// as when the guest died in the middle of one, is passed over.
    fn take(&self, line: &str) {
        let mut words = line.trim_end_matches('\r').splitn(3, ' ');
        let (Some(id), Some(verb)) = (words.next(), words.next()) else {
            return;
        };
        let rest = words.next().unwrap_or("");
        let mut state = self.state();
        let message = match verb {
            "ready" if id == "-" => {
                // A boot anew: nobody will end the commands of the last one.
                state.listeners.clear();
                state.boot_id = Some(rest.to_owned());
                return;
            }
            "pid" => rest.parse().ok().map(Message::Pid),
            "exit" => rest.parse().ok().map(Message::Exit),
            "out" => Some(Message::Out(unescape(rest))),
            "part" => Some(Message::Part(unescape(rest))),
            "error" => Some(Message::Error(rest.to_owned())),
            "pong" => {
                state.boot_id = Some(rest.to_owned());
                Some(Message::Pong(rest.to_owned()))
            }
            _ => None,
        };
        if let (Some(message), Some(listener)) = (message, state.listeners.get(id)) {
            // A listener that is gone does not care.
            let _ = listener.send(message);
        }
    }

    fn listen(&self) -> (String, Receiver<Message>) {
        let (sender, receiver) = mpsc::channel();
        let mut state = self.state();
        state.next_id += 1;
        let id = format!("j{}", state.next_id);
        if !state.closed {
            state.listeners.insert(id.clone(), sender);
        }
        (id, receiver)
    }

    fn send(&self, id: &str, rest: &str) -> Result<()> {
        if rest.contains('\n') {
            bail!("the agent takes one line, not {rest:?}");
        }
        // The line's end before it finishes what a reboot may have cut off.
        let line = format!("\n{id} {rest}\n");
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        writer
            .write_all(line.as_bytes())
            .context("cannot write to the guest's agent: QEMU closed the port")
    }

    /// Asks until the agent answers, and returns the guest's boot identifier.
    pub(crate) fn wait_until_it_answers(&self, timeout: Duration) -> Result<String> {
        let deadline = Instant::now() + timeout;
        let (id, receiver) = self.listen();
        loop {
            self.send(&id, "ping")?;
            match receiver.recv_timeout(Duration::from_millis(200)) {
                Ok(Message::Pong(boot_id)) => {
                    self.state().listeners.remove(&id);
                    return Ok(boot_id);
                }
                Ok(_) | Err(RecvTimeoutError::Timeout) => {}
                // It has just said that it is ready, or QEMU is gone.
                Err(RecvTimeoutError::Disconnected) => {
                    let state = self.state();
                    match &state.boot_id {
                        Some(boot_id) if !state.closed => return Ok(boot_id.clone()),
                        _ => bail!("QEMU ended before the guest's agent answered"),
                    }
                }
            }
            if Instant::now() > deadline {
                bail!("the guest's agent did not answer within {timeout:?}");
            }
        }
    }

    /// The boot identifier that the guest named last.
    pub(crate) fn boot_id(&self) -> Option<String> {
        self.state().boot_id.clone()
    }

    /// Starts a command, one line for `sh -c`.
    pub(crate) fn spawn(self: &Arc<Agent>, command: &str) -> Result<Job> {
        let (id, receiver) = self.listen();
        self.send(&id, &format!("run {command}"))?;
        let mut job = Job {
            agent: Arc::clone(self),
            id,
            receiver,
            command: command.to_owned(),
            pid: 0,
            line: Vec::new(),
            exit: None,
        };
        match job.next(START_TIMEOUT)? {
            Message::Pid(pid) => job.pid = pid,
            Message::Error(text) => bail!("the guest cannot run '{command}': {text}"),
            other => bail!("the guest's agent answers out of turn: {other:?}"),
        }
        Ok(job)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let writer = self
            .writer
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        // The reader's thread holds a duplicate; this ends its read.
        let _ = writer.shutdown(std::net::Shutdown::Both);
    }
}

/// A command that runs in a guest. Dropping the handle leaves it running.
#[derive(Debug)]
pub struct Job {
    agent: Arc<Agent>,
    id: String,
    receiver: Receiver<Message>,
    command: String,
    pid: u32,
    line: Vec<u8>,
    exit: Option<i32>,
}

/// What a command that ended has left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Its exit status; 128 and the signal's number if it died of one.
    pub status: i32,
    /// What it wrote to standard output and standard error, in that order.
    pub text: String,
}

impl Output {
    /// The text of a command that must have succeeded.
    ///
    /// # Errors
    /// Where its status is not 0; the error has status and text.
    pub fn success(self) -> Result<String> {
        if self.status != 0 {
            bail!(
                "exit status {} in the guest, output:\n{}",
                self.status,
                self.text
            );
        }
        Ok(self.text)
    }
}

impl Job {
    /// The process ID, in the guest, of the shell that runs the command. A
    /// shell runs its last command in its own place only if told to: begin
    /// the command with `exec` where its process ID matters.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Writes a line to the command's standard input.
    ///
    /// # Errors
    /// Where the connection is gone.
    pub fn send_line(&self, line: &str) -> Result<()> {
        self.agent.send(&self.id, &format!("in {line}"))
    }

    /// Closes the command's standard input.
    ///
    /// # Errors
    /// Where the connection is gone.
    pub fn close_input(&self) -> Result<()> {
        self.agent.send(&self.id, "eof")
    }

    /// Sends a signal, by its number, to the command's process group.
    ///
    /// # Errors
    /// Where the connection is gone.
    pub fn kill(&self, signal: i32) -> Result<()> {
        self.agent.send(&self.id, &format!("kill {signal}"))
    }

    fn next(&mut self, timeout: Duration) -> Result<Message> {
        match self.receiver.recv_timeout(timeout) {
            Ok(message) => Ok(message),
            Err(RecvTimeoutError::Timeout) => {
                bail!("nothing came from '{}' within {timeout:?}", self.command)
            }
            Err(RecvTimeoutError::Disconnected) => {
                bail!("the guest ended or rebooted while '{}' ran", self.command)
            }
        }
    }

    /// The next line of output, or `None` when the command has ended.
    ///
    /// # Errors
    /// Where nothing comes within the time, or the guest is gone.
    pub fn line(&mut self, timeout: Duration) -> Result<Option<String>> {
        let deadline = Instant::now() + timeout;
        while self.exit.is_none() {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.next(left)? {
                Message::Out(text) => {
                    self.line.extend(text);
                    return Ok(Some(self.take_line()));
                }
                Message::Part(text) => self.line.extend(text),
                Message::Exit(status) => self.exit = Some(status),
                Message::Error(text) => bail!("'{}' in the guest: {text}", self.command),
                Message::Pid(_) | Message::Pong(_) => {}
            }
        }
        Ok((!self.line.is_empty()).then(|| self.take_line()))
    }

    fn take_line(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.line)).into_owned()
    }

    /// Waits for the end, and returns the output that was not yet read.
    ///
    /// # Errors
    /// Where the command does not end within the time, or the guest is gone;
    /// the error has the output so far.
    pub fn wait(&mut self, timeout: Duration) -> Result<Output> {
        let deadline = Instant::now() + timeout;
        let mut text = String::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.line(left) {
                Ok(Some(line)) => {
                    text.push_str(&line);
                    text.push('\n');
                }
                Ok(None) => break,
                Err(error) => {
                    let so_far =
                        format!("'{}' did not end; its output so far:\n{text}", self.command);
                    return Err(error.context(so_far));
                }
            }
        }
        let status = self.exit.unwrap_or(-1);
        Ok(Output { status, text })
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.agent.state().listeners.remove(&self.id);
    }
}

/// Undoes the agent's \xHH.
fn unescape(text: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("\\x") {
        bytes.extend_from_slice(&rest.as_bytes()[..at]);
        let code = rest.get(at + 2..at + 4);
        match code.and_then(|code| u8::from_str_radix(code, 16).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &rest[at + 4..];
            }
            None => {
                bytes.extend_from_slice(b"\\x");
                rest = &rest[at + 2..];
            }
        }
    }
    bytes.extend_from_slice(rest.as_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::unescape;

    #[test]
    fn escapes_are_undone() {
        assert_eq!(unescape("a\\x5cb\\x09\\xc3\\xa9"), "a\\b\té".as_bytes());
        assert_eq!(unescape("cut \\x4"), b"cut \\x4");
        assert_eq!(unescape("no \\xzz hex"), b"no \\xzz hex");
    }
}
