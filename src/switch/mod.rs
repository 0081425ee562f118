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
        const EOPNOTSUPP: u32 = 95;
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
            EALREADY => "the guest's trace is stopped and not yet switched off",
            ENOKEY => "the guest's kernel was given no key yet",
            EOPNOTSUPP => {
                "the guest's trace buffer has sub-buffers of more than one page; \
                       write 4 to buffer_subbuf_size_kb in the guest's tracefs"
            }
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
    // The guest acts when the number differs from the one it did last. An
    // earlier command may still be at work, or not be taken up yet: what comes
    // of that must not be taken for an answer to this one.
    let beat = control.heartbeat(ram)?;
    let mut seq = control.last_command(ram)?.wrapping_add(1);
    while seq == beat.ack_seq || seq == beat.seen_seq {
        seq = seq.wrapping_add(1);
    }
    control.write_command(
        ram,
        beat.seen_seq,
        seq,
        command.number(),
        buffer_kb,
        functions,
    )?;
    Ok(Pending { seq })
}

impl Pending {
    /// Takes the command back, which nobody waits for any more. A guest that
    /// has taken it up already finishes it.
    ///
    /// # Errors
    /// If guest memory cannot be read or written.
    pub fn withdraw(self, ram: &dyn GuestRam, control: &Control) -> Result<(), SwitchError> {
        let seen = control.heartbeat(ram)?.seen_seq;
        Ok(control.withdraw_command(ram, seen)?)
    }

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ram::{Gpa, VecRam};

    /// Offsets in struct xftrace_control, include/linux/xftrace.h.
    const SEEN: u64 = 0x90;
    const ACK: u64 = 0x94;
    const ERROR: u64 = 0x98;
    const HOST_SEQ: u64 = 0x100;

    fn setting() -> (VecRam, Control) {
        let control = Control::for_tests(Gpa(0), 4);
        (VecRam::from_bytes(&[0; 4096]), control)
    }

    /// The guest takes up what is asked.
    fn take_up(ram: &VecRam) -> u32 {
        let seq = ram.read_u32(Gpa(HOST_SEQ)).expect("a number");
        ram.poke_u32(Gpa(SEEN), seq);
        seq
    }

    #[test]
    fn a_command_is_waited_for_until_its_own_number_comes_back() {
        let (ram, control) = setting();
        let pending = send(&ram, &control, &Command::Stop).expect("sent");
        assert!(matches!(
            pending.poll(&ram, &control),
            Ok(Progress::Waiting)
        ));
        let seq = take_up(&ram);
        assert!(matches!(
            pending.poll(&ram, &control),
            Ok(Progress::Working)
        ));
        ram.poke_u32(Gpa(ACK), seq);
        assert!(matches!(
            pending.poll(&ram, &control),
            Ok(Progress::Done { .. })
        ));
        ram.poke_u32(Gpa(ERROR), -16i32 as u32);
        assert!(matches!(
            pending.poll(&ram, &control),
            Err(SwitchError::Guest(GuestError { errno: 16, .. }))
        ));
    }

    #[test]
    fn the_answer_to_a_command_given_up_is_none_to_the_next() {
        // One that the guest was slow to finish, and one that it never saw.
        for slow in [true, false] {
            let (ram, control) = setting();
            send(&ram, &control, &Command::Off).expect("sent");
            let first = if slow {
                take_up(&ram)
            } else {
                ram.read_u32(Gpa(HOST_SEQ)).expect("a number")
            };
            let pending = send(&ram, &control, &Command::Stop).expect("sent");
            ram.poke_u32(Gpa(SEEN), first);
            ram.poke_u32(Gpa(ACK), first);
            assert!(matches!(
                pending.poll(&ram, &control),
                Ok(Progress::Waiting)
            ));
        }
    }

    #[test]
    fn a_command_that_is_withdrawn_is_not_found_by_the_guest() {
        let (ram, control) = setting();
        for before in [0, 7] {
            ram.poke_u32(Gpa(SEEN), before);
            ram.poke_u32(Gpa(ACK), before);
            let pending = send(&ram, &control, &Command::Off).expect("sent");
            pending.withdraw(&ram, &control).expect("withdrawn");
            // The guest looks for a number that is not the one it did last.
            assert_eq!(ram.read_u32(Gpa(HOST_SEQ)).expect("a number"), before);
        }
    }

    #[test]
    fn more_functions_than_the_page_takes_are_refused() {
        let (ram, control) = setting();
        let command = Command::On {
            functions: vec![Gva(0); 5],
            buffer_kb: 0,
        };
        assert!(matches!(
            send(&ram, &control, &command),
            Err(SwitchError::TooMany { given: 5, max: 4 })
        ));
        assert_eq!(ram.read_u32(Gpa(HOST_SEQ)).expect("a number"), 0);
    }
}
