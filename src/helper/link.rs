//! How the host and the guest's kernel meet: through the control block that
//! the guest patch keeps (mode keyed), or, in a kernel without the patch, by
//! what its own symbols and BTF tell (mode plain).
//!
//! Which of the two it is, the host's own symbol file decides, and never the
//! guest: a kernel that has the patch is never traced without keys.

use crate::kernel::control::{Control, ControlError, Heartbeat};
use crate::kernel::stock::{Stock, StockError, TraceArray};
use crate::kernel::{Kernel, Symbols};
use crate::ram::{GuestRam, RamError};
use crate::ring::{RecordFormat, RingReader};
use crate::session::Mode;

/// Why a kernel that was found cannot be worked with.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinkError {
    #[error(transparent)]
    Control(#[from] ControlError),
    #[error(transparent)]
    Stock(#[from] StockError),
}

impl LinkError {
    /// The memory layer's own failure, which is no verdict about the kernel.
    pub(crate) fn into_ram(self) -> Result<RamError, Self> {
        match self {
            Self::Control(ControlError::Ram(error)) | Self::Stock(StockError::Ram(error)) => {
                Ok(error)
            }
            other => Err(other),
        }
    }
}

/// The seam between the modes.
#[derive(Clone, Debug)]
pub(crate) enum Link {
    Keyed(Control),
    Plain(Box<Stock>),
}

/// One look at a kernel's heart.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pulse {
    /// Moves while the kernel lives.
    pub(crate) beats: u64,
    /// What else a kernel with the patch tells.
    pub(crate) heartbeat: Option<Heartbeat>,
}

impl Link {
    /// What a kernel that was found shows of its life, before it is met:
    /// something that is another at each boot, and its beats. Costs two or
    /// three words, however many kernels there seem to be.
    pub(crate) fn vitals(
        ram: &dyn GuestRam,
        kernel: &Kernel,
        symbols: &Symbols,
    ) -> Result<Option<(u64, u64)>, RamError> {
        if symbols.address("xftrace_control").is_some() {
            return Control::vitals(ram, kernel, symbols);
        }
        Stock::vitals(ram, kernel, symbols)
    }

    /// Meets a kernel that was found.
    pub(crate) fn attach(
        ram: &dyn GuestRam,
        kernel: &Kernel,
        symbols: &Symbols,
    ) -> Result<Self, LinkError> {
        if symbols.address("xftrace_control").is_some() {
            return Ok(Self::Keyed(Control::attach(ram, kernel, symbols)?));
        }
        Ok(Self::Plain(Box::new(Stock::attach(ram, kernel, symbols)?)))
    }

    pub(crate) fn mode(&self) -> Mode {
        match self {
            Self::Keyed(_) => Mode::Keyed,
            Self::Plain(_) => Mode::Plain,
        }
    }

    pub(crate) fn boot_id(&self) -> u64 {
        match self {
            Self::Keyed(control) => control.ident.boot_id,
            Self::Plain(stock) => stock.boot_id,
        }
    }

    /// Whether guest memory still says that it is this boot.
    pub(crate) fn is_there(&self, ram: &dyn GuestRam) -> Result<bool, RamError> {
        let now = match self {
            Self::Keyed(control) => control.boot_id_now(ram)?,
            Self::Plain(stock) => stock.boot_id_now(ram)?,
        };
        Ok(now == self.boot_id())
    }

    pub(crate) fn pulse(&self, ram: &dyn GuestRam) -> Result<Pulse, RamError> {
        match self {
            Self::Keyed(control) => {
                let heartbeat = control.heartbeat(ram)?;
                Ok(Pulse {
                    beats: heartbeat.beats,
                    heartbeat: Some(heartbeat),
                })
            }
            Self::Plain(stock) => Ok(Pulse {
                beats: stock.ticks(ram)?,
                heartbeat: None,
            }),
        }
    }

    /// How its records look.
    pub(crate) fn format(&self) -> RecordFormat {
        match self {
            Self::Keyed(control) => RecordFormat::Keyed(control.ident.types),
            Self::Plain(stock) => RecordFormat::Plain(stock.format),
        }
    }

    /// The ring buffer that its records go to; in plain mode with the trace
    /// array that it belongs to. `functions` are named where there is none, by the names
    /// that Ftrace has.
    pub(crate) fn reader(
        &self,
        ram: &dyn GuestRam,
        kernel: &Kernel,
        since: u64,
        functions: &[String],
    ) -> Result<(RingReader, Option<TraceArray>), LinkError> {
        match self {
            Self::Keyed(control) => {
                let cpus = control.ident.nr_cpus;
                let reader = RingReader::new(kernel.clone(), control.ring, cpus, since);
                Ok((reader, None))
            }
            Self::Plain(stock) => {
                let array = stock.tracing(ram, functions)?;
                let reader = RingReader::new(kernel.clone(), array.ring, array.nr_cpus, 0);
                Ok((reader, Some(array)))
            }
        }
    }

    /// Why `functions` cannot be traced as things are.
    pub(crate) fn refuses(
        &self,
        ram: &dyn GuestRam,
        symbols: &Symbols,
        functions: &[String],
    ) -> Option<StockError> {
        match self {
            Self::Keyed(_) => None,
            Self::Plain(stock) => stock
                .tracing(ram, &symbols.ftrace_names(functions))
                .and_then(|_| stock.functions(ram, symbols)?.require(symbols, functions))
                .err(),
        }
    }
}
