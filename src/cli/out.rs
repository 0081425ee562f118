//! Standard output and standard error of the commands.

use std::fmt;
use std::io::{self, Write};

/// Standard output, buffered by line where it is a terminal. An error says
/// that it was standard output that failed, so that a reader that went away
/// is told from every other broken pipe (a helper's socket, say).
#[derive(Debug)]
pub struct Stdout(io::Stdout);

impl Stdout {
    /// The process's standard output.
    pub fn new() -> Stdout {
        Stdout(io::stdout())
    }
}

impl Default for Stdout {
    fn default() -> Stdout {
        Stdout::new()
    }
}

impl Write for Stdout {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.write(buf).map_err(OutputError::wrap)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush().map_err(OutputError::wrap)
    }
}

/// Standard output could not be written.
#[derive(Debug)]
struct OutputError(io::Error);

impl OutputError {
    fn wrap(error: io::Error) -> io::Error {
        // Kept as it is: `write_all` must see it to try again.
        if error.kind() == io::ErrorKind::Interrupted {
            return error;
        }
        io::Error::new(error.kind(), OutputError(error))
    }
}

impl fmt::Display for OutputError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot write to standard output: {}", self.0)
    }
}

impl std::error::Error for OutputError {}

/// Whether the error is that the reader of standard output went away.
pub(super) fn is_closed(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause.downcast_ref::<io::Error>().is_some_and(|io| {
            io.kind() == io::ErrorKind::BrokenPipe
                && io.get_ref().is_some_and(|inner| inner.is::<OutputError>())
        })
    })
}

/// Prints a message for people on standard error, as `xftrace: TEXT`. What
/// cannot be printed there is dropped: nobody is left to be told.
pub fn message(text: &str) {
    let _ = writeln!(io::stderr(), "xftrace: {text}");
}

/// The start of a message that clap goes on with.
pub(super) fn prefix() {
    let _ = write!(io::stderr(), "xftrace: ");
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn only_standard_output_closes_quietly() {
        let pipe = || io::Error::from(io::ErrorKind::BrokenPipe);
        let ours = anyhow::Error::new(OutputError::wrap(pipe())).context("listing");
        assert!(is_closed(&ours));
        let socket: Result<(), _> = Err(pipe());
        let socket = socket.context("asking the helper").unwrap_err();
        assert!(!is_closed(&socket));
        let full = io::Error::from(io::ErrorKind::StorageFull);
        assert!(!is_closed(&OutputError::wrap(full).into()));
    }
}
