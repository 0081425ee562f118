//! Trace_Switch: turns the guest's tracing on and off, from outside.
//!
//! The switch is a page of guest memory ([`crate::kernel::control`]). The host
//! writes a command and its number there; the guest looks a few times a
//! second, from ordinary kernel context, and writes back what came of it.
//! Nothing in the guest waits for the host, and nothing here blocks: a command
//! is sent with [`send`] and asked after with [`Pending::poll`], so that the
//! caller can go on draining the guest's buffers meanwhile.
//!
//! This module may use `kernel` and `ram`. Which functions, and what a session
//! is, are the caller's business.

use std::fmt;
use std::time::Duration;

use crate::kernel::control::{Control, SwitchState};
use crate::kernel::Gva;
use crate::ram::{GuestRam, RamError};

/// What the guest can be asked to do, `enum xftrace_command`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Trace these functions, at their run-time addresses, and what they call.
    /// While tracing: go on with these instead.
    On {
        /// The functions; none would mean all of the kernel's.
        functions: Vec<Gva>,
        /// The size of the ring buffer of each CPU, KiB; 0 leaves it as it
        /// is. Only heeded from off.
        buffer_kb: u32,
    },
    /// Record no more, and keep what is recorded for the host to read.
    Stop,
    /// Tracer nop, which empties the ring buffer.
    Off,
}

impl Command {
    /// The number of the command in the guest's interface.
    fn number(&self) -> u32 {
        match self {
            Self::On { .. } => 1,
            Self::Stop => 2,
            Self::Off => 3,
        }
    }
}

/// Why the switch could not be thrown.
#[derive(Debug, thiserror::Error)]
pub enum SwitchError {
    /// More functions than the guest's page has room for.
    #[error("{given} functions are too many: the guest's kernel takes {max} at a time")]
    TooMany {
        /// How many were given.
        given: usize,
        /// How many there is room for.
        max: u32,
    },
    /// The guest's kernel tried, and could not.
    #[error("{0}")]
    Guest(GuestError),
    /// Guest memory could not be read or written.
    #[error(transparent)]
    Ram(#[from] RamError),
}

/// What the guest's kernel answered when it could not do what it was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestError {
    /// The errno, positive.
    pub errno: u32,
    /// The index of the function at fault, where `errno` is ENOENT.
    pub function: Option<u32>,
}

impl fmt::Display for GuestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const ENOENT: u32 = 2;
        const ENOMEM: u32 = 12;
        const EBUSY: u32 = 16;
        const ENODEV: u32 = 19;
        const EINVAL: u32 = 22;
        const EALREADY: u32 = 114;
        const ENOKEY: u32 = 126;
        let text = match self.errno {
            ENOENT => {
                "Ftrace in the guest cannot trace one of the functions (it is marked \
                       notrace or noinstr, or was inlined or freed after boot)"
            }
            ENOMEM => "the guest's kernel has no memory left for it; try a smaller --buffer-size",
            EBUSY => {
                "the guest's Ftrace is in use by the guest itself: its current_tracer is not \
                      nop, or somebody reads its trace_pipe; stop that inside the guest first"
            }
            ENODEV => {
                "Ftrace in the guest has shut itself down after an internal error; \
                       see the guest's kernel log, and reboot the guest"
            }
            EINVAL => "the guest's kernel does not know the command",
            EALREADY => "the guest's trace is stopped and not yet switched off; try again",
            ENOKEY => "the guest's kernel was given no key yet",
            errno => return write!(f, "the guest's kernel answered with error {errno}"),
        };
        f.write_str(text)
    }
}

/// A command that was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pending {
    seq: u32,
}

/// How far the guest is with a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// It has not looked yet.
    Waiting,
    /// It has taken the command up, and is at it.
    Working,
    /// It is done.
    Done {
        /// What its switch is set to now.
        state: SwitchState,
        /// How long it worked, by its own clock: turning tracing on or off
        /// has the kernel patch each of its call sites.
        worked: Duration,
    },
}

/// Writes a command for the guest to find.
///
/// # Errors
/// See [`SwitchError`].
pub fn send(
    ram: &dyn GuestRam,
    control: &Control,
    command: &Command,
) -> Result<Pending, SwitchError> {
    let (functions, buffer_kb): (&[Gva], u32) = match command {
        Command::On {
            functions,
            buffer_kb,
        } => (functions, *buffer_kb),
        Command::Stop | Command::Off => (&[], 0),
    };
    let max = control.ident.max_functions;
    if functions.len() > max as usize {
        return Err(SwitchError::TooMany {
            given: functions.len(),
            max,
        });
    }
    // The guest acts when the number differs from the one it did last.
    let seq = control.heartbeat(ram)?.ack_seq.wrapping_add(1);
    control.write_command(ram, seq, command.number(), buffer_kb, functions)?;
    Ok(Pending { seq })
}

impl Pending {
    /// Asks how far the guest is.
    ///
    /// # Errors
    /// [`SwitchError::Guest`] where the guest tried and could not.
    pub fn poll(self, ram: &dyn GuestRam, control: &Control) -> Result<Progress, SwitchError> {
        let beat = control.heartbeat(ram)?;
        if beat.ack_seq == self.seq {
            if beat.error == 0 {
                let worked = beat.ack_clock.saturating_sub(beat.seen_clock);
                return Ok(Progress::Done {
                    state: beat.state,
                    worked: Duration::from_nanos(worked),
                });
            }
            let errno = beat.error.unsigned_abs();
            return Err(SwitchError::Guest(GuestError {
                errno,
                function: (errno == 2).then_some(beat.error_index),
            }));
        }
        Ok(if beat.seen_seq == self.seq {
            Progress::Working
        } else {
            Progress::Waiting
        })
    }
}
