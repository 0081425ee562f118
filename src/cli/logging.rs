//! Where the messages of the helper and the hook go: the `log` crate's
//! records to syslog (the journal listens there too), to standard error, or to
//! a file.
//!
//! A message is one line: control characters are escaped, whoever's text is in
//! it. Writing one never blocks and never fails the caller: a log daemon that
//! hangs must not hold up a trace, let alone the start of a domain. What could
//! not be written is counted and told with the next message that can.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::net::UnixDatagram;
use std::sync::Mutex;
use std::time::SystemTime;

use log::{Level, Metadata, Record};
use syslog::{Facility, Formatter3164, LogFormat, Severity};

use crate::config::{self, LogTarget};

/// The socket of the system's log daemon.
const SYSLOG_SOCKET: &str = "/dev/log";

/// The longest message that is written, in bytes; the rest is cut off.
const MAX_MESSAGE: usize = 2000;

/// Sends the process's messages where the configuration says. Where that
/// cannot be opened, to standard error.
pub(super) fn init(log: &config::Log) {
    let sink = match &log.target {
        LogTarget::Syslog => Syslog::connect().map(Sink::Syslog),
        LogTarget::Stderr => Ok(Sink::Stderr),
        LogTarget::File(path) => OpenOptions::new()
            .append(true)
            .create(true)
            .open(path)
            .map(Sink::File),
    };
    let (sink, failed) = match sink {
        Ok(sink) => (sink, None),
        Err(error) => (Sink::Stderr, Some(error)),
    };
    let logger = Box::new(Logger(Mutex::new(State { sink, dropped: 0 })));
    // Only a second call fails, and the first one's choice holds.
    if log::set_boxed_logger(logger).is_ok() {
        log::set_max_level(log.level);
    }
    if let Some(error) = failed {
        log::debug!(
            "no log at {:?} ({error}); messages go to standard error",
            log.target
        );
    }
}

/// Turns a message into one printable line of bounded length.
fn one_line(message: &str) -> String {
    let mut line = String::with_capacity(message.len());
    for c in message.chars() {
        if line.len() > MAX_MESSAGE {
            line.push_str("[..]");
            break;
        }
        match c {
            // Turning the direction of text misleads a reader as well.
            c if c.is_control() || is_bidi(c) => line.extend(c.escape_default()),
            c => line.push(c),
        }
    }
    line
}

/// The characters that change the direction of text (Unicode Standard Annex
/// 9, explicit formatting characters).
fn is_bidi(c: char) -> bool {
    matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

struct Logger(Mutex<State>);

struct State {
    sink: Sink,
    dropped: u64,
}

enum Sink {
    Syslog(Syslog),
    Stderr,
    File(File),
}

impl log::Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let line = one_line(&record.args().to_string());
        // A thread that panicked while it logged has left nothing half done
        // that matters here.
        let mut state = self.0.lock().unwrap_or_else(|poison| poison.into_inner());
        if state.dropped > 0 {
            let told = format!("{} messages could not be logged", state.dropped);
            match state.sink.write(Level::Warn, &told) {
                Ok(()) => state.dropped = 0,
                Err(_) => {
                    state.dropped += 1;
                    return;
                }
            }
        }
        if state.sink.write(record.level(), &line).is_err() {
            state.dropped += 1;
        }
    }

    fn flush(&self) {}
}

impl Sink {
    fn write(&mut self, level: Level, line: &str) -> io::Result<()> {
        match self {
            Sink::Syslog(syslog) => syslog.write(level, line),
            Sink::Stderr => writeln!(io::stderr(), "xftrace: {line}"),
            Sink::File(file) => {
                let now = humantime::format_rfc3339_millis(SystemTime::now());
                let text = format!("{now} xftrace[{}] {level} {line}\n", std::process::id());
                file.write_all(text.as_bytes())
            }
        }
    }
}

/// A connection to the log daemon that comes back when the daemon does. (The
/// one of the `syslog` crate blocks on a daemon that hangs, and stays broken
/// after a restart of it; its message format is used.)
struct Syslog {
    socket: UnixDatagram,
    format: Formatter3164,
}

impl Syslog {
    fn connect() -> io::Result<Syslog> {
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        socket.connect(SYSLOG_SOCKET)?;
        Ok(Syslog {
            socket,
            format: Formatter3164 {
                facility: Facility::LOG_DAEMON,
                hostname: None,
                process: "xftrace".to_owned(),
                pid: std::process::id(),
            },
        })
    }

    fn write(&mut self, level: Level, line: &str) -> io::Result<()> {
        let severity = match level {
            Level::Error => Severity::LOG_ERR,
            Level::Warn => Severity::LOG_WARNING,
            Level::Info => Severity::LOG_INFO,
            Level::Debug | Level::Trace => Severity::LOG_DEBUG,
        };
        let mut text = Vec::new();
        self.format
            .format(&mut text, severity, line)
            .map_err(|error| io::Error::other(error.to_string()))?;
        match self.socket.send(&text) {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(error),
            Err(_) => {
                *self = Syslog::connect()?;
                self.socket.send(&text).map(drop)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_one_printable_line() {
        assert_eq!(one_line("plain é"), "plain é");
        assert_eq!(
            one_line("a\nb\x1b[2J\u{202e}\0"),
            "a\\nb\\u{1b}[2J\\u{202e}\\u{0}"
        );
        let long = one_line(&"x".repeat(100_000));
        assert!(long.len() < MAX_MESSAGE + 20 && long.ends_with("[..]"));
    }
}
