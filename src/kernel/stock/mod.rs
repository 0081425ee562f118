//! A kernel without the xftrace patch: mode `plain`.
//!
//! Nothing in such a kernel knows of the host. Where its Ftrace keeps what it
//! records is found by symbol and by BTF, and believed as far as it checks out
//! ([`super::btf`]): from `global_trace`, and from the instances in
//! `ftrace_trace_arrays`, to the ring buffers; from the current tracer's name
//! to whether it records calls at all.
//!
//! ```text
//! ftrace_trace_arrays -> struct trace_array -> array_buffer.buffer -> struct trace_buffer -> buffers[cpu]
//! ```
//!
//! The kernel's own pointers are followed and nothing is searched for, so that
//! false headers and false banners elsewhere in memory move nobody off.
//!
//! **Is it alive?** There is no heartbeat. `jiffies_64` counts the kernel's
//! ticks; in a kernel that is idle it stands still for as long as all its CPUs
//! sleep, which its own timers end about once a second.
//!
//! **Which boot is it?** The stack canary of the first task is a random word
//! that boot_init_stack_canary() draws once, and `page_offset_base` and
//! `vmalloc_base` are random with RANDOMIZE_MEMORY. Together with where the
//! image lies they make up the boot id ([`Stock::boot_id_now`]).
//!
//! What is read here is the guest's word throughout. Plain mode proves nothing
//! against whoever is root in the guest.

mod booted;
mod command_line;
mod layout;
mod rings;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use crate::ram::{Gpa, GuestRam, RamError};

use super::btf::{Btf, BtfError};
use super::{Gva, Kernel, Symbols, WalkError};

pub use booted::Booted;
pub(crate) use command_line::set_tracer;
pub use command_line::{command_line, is_reserved, reserved_command_line};
pub use layout::{CallFormat, GraphFormat, ReturnFormat, Slot};
pub use rings::TraceArray;

use layout::Offsets;

/// `RB_BUFFER_OFF` in `record_disabled` of `struct trace_buffer`
/// (kernel/trace/ring_buffer.c): what the guest's own tracing_on sets.
pub const RB_BUFFER_OFF: u32 = 1 << 20;

/// Why a kernel without the patch cannot be traced.
#[derive(Debug, thiserror::Error)]
pub enum StockError {
    /// It says nothing of the layout of its structures.
    #[error(
        "the guest's kernel has neither the xftrace patch nor BTF (CONFIG_DEBUG_INFO_BTF), the \
         description of its own structures, without which its records cannot be found: boot a \
         kernel that has one of the two (Debian's have BTF), or, if this one has BTF, give \
         symbols that tell where (__start_BTF in its whole System.map or /proc/kallsyms)"
    )]
    NoBtf,
    /// The layout of its structures is not known.
    #[error(transparent)]
    Btf(BtfError),
    /// Something has no symbol.
    #[error(
        "the symbols of the guest's kernel have no {0}, without which a kernel without the \
         xftrace patch cannot be read; give its whole System.map or /proc/kallsyms"
    )]
    Symbol(&'static str),
    /// The patch is there, and the symbols do not know of it.
    #[error(
        "the guest's kernel has the xftrace patch, and its symbols have no xftrace_control: \
         they are not whole; give its whole System.map, vmlinux or vmlinuz"
    )]
    Patched,
    /// Built without function_graph.
    #[error(
        "the guest's kernel was built without CONFIG_FUNCTION_GRAPH_TRACER, whose records are \
         read (its symbols have no ftrace_graph_hash): boot a kernel that has it (Debian's have), \
         with the xftrace patch or without"
    )]
    NotBuiltIn,
    /// Nothing in it tells one boot from another.
    #[error(
        "the guest's kernel has no stack canary and no random memory layout, so that its boots \
         cannot be told apart: boot one that has either (CONFIG_STACKPROTECTOR, \
         CONFIG_RANDOMIZE_MEMORY; Debian's have both), or one with the xftrace patch"
    )]
    NoBootId,
    /// Its tracer is another one.
    #[error(
        "the guest's kernel does not run function_graph: its current tracer is '{tracer}'; boot \
         it with '{command_line}' on its kernel command line (or set the tracer inside the guest)"
    )]
    NotRunning {
        /// What it runs, escaped.
        tracer: String,
        /// What to boot it with.
        command_line: String,
    },
    /// It has a ring in memory reserved at boot, which nothing is recorded into.
    #[error(
        "the guest's kernel has a ring buffer in memory reserved at boot, and no tracer for it: \
         after each boot, type inside the guest, as root: {}",
        set_tracer(.instance)
    )]
    TracerNotSet {
        /// The instance, escaped.
        instance: String,
    },
    /// Its ring is too small to be read in time.
    #[error(
        "the guest's ring buffer has {kb} KiB for each CPU, which it writes over before it can \
         be read; {} KiB are the least: boot it with '{command_line}' on its kernel command line{}",
        rings::SMALLEST_KB,
        if *.reserved { "" } else { " (or make buffer_size_kb larger inside the guest)" }
    )]
    RingTooSmall {
        /// How large it is.
        kb: u64,
        /// What to boot it with.
        command_line: String,
        /// Whether it lies in memory reserved at boot, and so cannot become larger.
        reserved: bool,
    },
    /// It traces other functions than those asked for.
    #[error(
        "without the xftrace patch a guest traces the functions that it was booted with, which \
         are {booted}; to trace others, boot it with '{command_line}' on its kernel command line"
    )]
    OtherFunctions {
        /// What it traces.
        booted: String,
        /// What to boot it with.
        command_line: String,
    },
    /// Memory that the host has swapped out, most likely.
    #[error(
        "{what} could not be read in the guest's memory within {} ms: is the host short of memory?",
        rings::BUDGET.as_millis()
    )]
    TooSlow {
        /// What was to be read.
        what: &'static str,
    },
    /// A pointer of the guest leads nowhere.
    #[error(
        "the guest's tracing structures cannot be followed: {what} at {at} leads nowhere; are the \
         symbols those of the very build that runs?"
    )]
    Lost {
        /// What was looked for.
        what: &'static str,
        /// The address.
        at: Gva,
    },
    /// Guest memory could not be read.
    #[error(transparent)]
    Ram(#[from] RamError),
}

impl StockError {
    /// Whether it may be otherwise in the same boot: as the kernel starts, or when somebody
    /// sets its tracer.
    pub fn may_pass(&self) -> bool {
        matches!(
            self,
            Self::NotRunning { .. }
                | Self::TracerNotSet { .. }
                | Self::TooSlow { .. }
                | Self::Lost { .. }
        )
    }
}

impl From<BtfError> for StockError {
    fn from(error: BtfError) -> Self {
        match error {
            BtfError::Missing => Self::NoBtf,
            error => Self::Btf(error),
        }
    }
}

/// What does not change in one boot of a kernel without the patch.
#[derive(Clone, Debug)]
pub struct Stock {
    kernel: Kernel,
    offsets: Arc<Offsets>,
    /// Random words of this boot, by which it is told from others.
    secrets: Vec<Gpa>,
    /// What those were when it was found.
    pub boot_id: u64,
    jiffies: Gpa,
    /// How many CPUs the kernel can have.
    nr_cpu_ids: Option<Gpa>,
    /// `ftrace_trace_arrays`, the list of the global ring and the instances.
    arrays: Gva,
    /// `ftrace_graph_hash`: which functions function_graph records.
    filter: Gva,
    /// How its function-graph records look.
    pub format: GraphFormat,
    /// Whether a ring buffer may lie in memory that is reserved at boot by name.
    pub can_reserve: bool,
}

impl Stock {
    /// Finds what there is to find in a kernel without the patch.
    ///
    /// # Errors
    /// See [`StockError`]. That function_graph does not run is none of them:
    /// see [`Stock::tracing`].
    pub fn attach(
        ram: &dyn GuestRam,
        kernel: &Kernel,
        symbols: &Symbols,
    ) -> Result<Self, StockError> {
        let at = |name: &'static str| {
            let found = symbols.address(name).filter(|&at| kernel.in_image(at));
            found.ok_or(StockError::Symbol(name))
        };
        // Of kernel/trace/fgraph.c (in 6.1: trace_functions_graph.c), which is
        // compiled with the tracer only.
        if symbols.address("ftrace_graph_hash").is_none() {
            return Err(StockError::NotBuiltIn);
        }
        let btf = Btf::of(ram, kernel, symbols)?;
        // The guest's word, and no more than a hint for whoever gave the symbols.
        if btf.structure("xftrace_control").is_ok() {
            return Err(StockError::Patched);
        }
        let offsets = Offsets::of(&btf)?;
        let canary = offsets.stack_canary.and_then(|offset| {
            let task = at("init_task").ok()?;
            Some(Gva(task.0.wrapping_add(offset.into())))
        });
        let bases = ["page_offset_base", "vmalloc_base"].map(|name| at(name).ok());
        let secrets: Vec<Gpa> = std::iter::once(canary)
            .chain(bases)
            .flatten()
            .map(|link| kernel.image_gpa(link))
            .collect();
        if secrets.is_empty() {
            return Err(StockError::NoBootId);
        }
        // reserve_mem= (mm/memblock.c), which trace_instance= takes the name of.
        let reserves = symbols.address("reserve_mem_find_by_name").is_some();
        let mut stock = Self {
            kernel: kernel.clone(),
            can_reserve: reserves && offsets.ring.range_start.is_some(),
            format: GraphFormat::of(&btf)?,
            offsets: Arc::new(offsets),
            secrets,
            boot_id: 0,
            jiffies: kernel.image_gpa(at("jiffies_64")?),
            nr_cpu_ids: at("nr_cpu_ids").ok().map(|link| kernel.image_gpa(link)),
            arrays: kernel.runtime(at("ftrace_trace_arrays")?),
            filter: kernel.runtime(at("ftrace_graph_hash")?),
        };
        stock.boot_id = stock.boot_id_now(ram)?;
        Ok(stock)
    }

    /// Something that is another at each boot, and the count of ticks, of a
    /// kernel that has not been looked at closely: what it takes to see whether
    /// it lives.
    ///
    /// # Errors
    /// If guest memory cannot be read.
    pub fn vitals(
        ram: &dyn GuestRam,
        kernel: &Kernel,
        symbols: &Symbols,
    ) -> Result<Option<(u64, u64)>, RamError> {
        let word = |name| {
            let link = symbols.address(name).filter(|&at| kernel.in_image(at));
            link.map(|link| ram.read_u64(kernel.image_gpa(link)))
                .transpose()
        };
        let base = word("page_offset_base")?.unwrap_or(0);
        Ok(word("jiffies_64")?.map(|ticks| (base ^ kernel.slide, ticks)))
    }

    /// The boot id as guest memory has it now.
    ///
    /// # Errors
    /// If guest memory cannot be read.
    pub fn boot_id_now(&self, ram: &dyn GuestRam) -> Result<u64, RamError> {
        let place = self.kernel.slide ^ self.kernel.phys_text.0.rotate_left(32);
        self.secrets.iter().try_fold(place, |id, &at| {
            let word = ram.read_u64(at)?;
            // splitmix64's step: every bit of every word counts.
            let mixed = (id ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            Ok(mixed ^ mixed >> 29)
        })
    }

    /// The kernel's count of ticks, which moves while it lives.
    ///
    /// # Errors
    /// If guest memory cannot be read.
    pub fn ticks(&self, ram: &dyn GuestRam) -> Result<u64, RamError> {
        ram.read_u64(self.jiffies)
    }

    fn load(&self, ram: &dyn GuestRam, at: Gva, what: &'static str) -> Result<u64, StockError> {
        self.kernel.read_u64(ram, at).map_err(lost(what, at))
    }

    fn load_u32(&self, ram: &dyn GuestRam, at: Gva, what: &'static str) -> Result<u32, StockError> {
        self.kernel.read_u32(ram, at).map_err(lost(what, at))
    }
}

/// For `map_err` on what followed a guest's pointer.
fn lost(what: &'static str, at: Gva) -> impl FnOnce(WalkError) -> StockError {
    move |_| StockError::Lost { what, at }
}
