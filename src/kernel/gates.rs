//! What keeps records out of a ring buffer whose tracer is on.
//!
//! The guest's own `tracing_on` is but one of several words that the kernel looks at
//! before it makes a record. Each is a gate: while it is shut, the traced functions run
//! and leave nothing behind. They are, in the order in which a call comes by
//! (trace_graph_entry() in kernel/trace/trace_functions_graph.c,
//! ring_buffer_lock_reserve() in kernel/trace/ring_buffer.c; 6.1 and 6.12 are the same
//! but for the limit):
//!
//! ```text
//! trace_array_cpu.disabled        one record of a CPU at a time; tracing_cpumask
//! trace_buffer.record_disabled    RB_BUFFER_OFF: tracing_on; below it a count
//! trace_buffer.cpumask            CPUs that have a part of the buffer
//! ring_buffer_per_cpu.record_disabled   the count of a CPU's part
//! trace_buffer.max_data_size      the longest record (from 6.8 on)
//! ring_buffer_per_cpu.current_context   marks of records in the making
//! ```
//!
//! No gates are `buffer_disabled` of `struct trace_array` (a copy of the switch, for the
//! latency tracers), `stop_count` (it comes with the buffer's count) and
//! `tracing_disabled` (it forbids a change of tracers, and no record).
//!
//! All of it is the guest's word, and changes while it is read: a look says what was shut
//! at that moment. For how long a gate has to be shut until it means something is for the
//! caller.

#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::fmt;
use std::time::{Duration, Instant};

use crate::ram::{Gpa, GuestRam, RamError};

use super::btf::{Btf, BtfError, Field, Structure};
use super::stock::RB_BUFFER_OFF;
use super::{Gva, Kernel, Symbols, WalkError};

/// Less than the shortest record of function_graph takes (`struct ftrace_graph_ent_entry`,
/// 20 bytes); a kernel's own limit is a page less some bytes.
const SHORTEST: u32 = 20;
/// How many CPUs of a kind are named.
const SHOWN: usize = 4;

/// Why gates cannot be looked at.
#[derive(Debug, thiserror::Error)]
pub enum GatesError {
    /// The layout of the structures is not known.
    #[error(transparent)]
    Btf(#[from] BtfError),
    /// Something has no symbol.
    #[error("the symbols of the guest's kernel have no {0}")]
    Symbol(&'static str),
    /// A pointer leads nowhere.
    #[error("{what} of the guest's trace buffer cannot be followed: {why}")]
    Lost {
        /// What was to be read.
        what: &'static str,
        /// Why it was not.
        why: WalkError,
    },
    /// Memory that the host has swapped out, most likely.
    #[error("the gates of {read} of {cpus} CPUs were read within {} ms", .budget.as_millis())]
    TooSlow {
        /// Of how many they were read.
        read: u32,
        /// Of how many there are.
        cpus: u32,
        /// In which time.
        budget: Duration,
    },
    /// Guest memory could not be read.
    #[error(transparent)]
    Ram(#[from] RamError),
}

/// A kind of gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum GateKind {
    /// `RB_BUFFER_OFF` in `record_disabled` of `struct trace_buffer`: what tracing_on sets.
    Switch,
    /// The rest of that word: how many want the buffer off, ring_buffer_record_disable().
    Count,
    /// `max_data_size` of `struct trace_buffer`, where no record is as short.
    Limit,
    /// A CPU with a part of the buffer that is not in the buffer's `cpumask`.
    Mask,
    /// `record_disabled` of a CPU's part, ring_buffer_record_disable_cpu().
    CpuCount,
    /// `current_context` of a CPU's part: a mark for each context that makes a record, of
    /// which two keep another one of it out.
    Context,
    /// `disabled` of a CPU's `struct trace_array_cpu`.
    Disabled,
}

impl GateKind {
    /// Whether the kernel shuts it for every record that it makes, so that a CPU with
    /// much to record shows it shut as often as not.
    pub fn shuts_for_records(self) -> bool {
        matches!(self, Self::Context | Self::Disabled)
    }

    fn text(self) -> &'static str {
        match self {
            Self::Switch => "its switch (RB_BUFFER_OFF in record_disabled of struct trace_buffer)",
            Self::Count => {
                "the count of those who want it off (record_disabled of struct trace_buffer)"
            }
            Self::Limit => "its longest record (max_data_size of struct trace_buffer)",
            Self::Mask => "the CPUs that it is for (cpumask of struct trace_buffer)",
            Self::CpuCount => {
                "the count of those who want a CPU's part off (record_disabled of struct \
                 ring_buffer_per_cpu)"
            }
            Self::Context => {
                "a CPU's marks of records in the making (current_context of struct \
                 ring_buffer_per_cpu)"
            }
            Self::Disabled => {
                "a CPU's count in the trace array (disabled of struct trace_array_cpu)"
            }
        }
    }
}

/// One gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Gate {
    /// What it is.
    pub kind: GateKind,
    /// Whose it is; `None` for the whole buffer's.
    pub cpu: Option<u16>,
}

/// Which gates are shut, as text of a bounded length.
pub fn describe(gates: &BTreeSet<Gate>) -> String {
    let kinds: BTreeSet<GateKind> = gates.iter().map(|gate| gate.kind).collect();
    let told = kinds.into_iter().map(|kind| {
        let of_kind = gates.iter().filter(|gate| gate.kind == kind);
        let cpus: Vec<u16> = of_kind.filter_map(|gate| gate.cpu).collect();
        format!("{}{}", kind.text(), Cpus(&cpus))
    });
    told.collect::<Vec<_>>().join("; ")
}

struct Cpus<'a>(&'a [u16]);

impl fmt::Display for Cpus<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, cpu) in self.0.iter().take(SHOWN).enumerate() {
            let before = if index == 0 { ": CPU " } else { ", " };
            write!(f, "{before}{cpu}")?;
        }
        match self.0.len().saturating_sub(SHOWN) {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

/// A gate that this kernel has, or may have, and that is not looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unseen {
    /// Which.
    pub kind: GateKind,
    /// Why.
    pub why: String,
}

impl fmt::Display for Unseen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.kind.text(), self.why)
    }
}

/// Where the mask of CPUs is.
#[derive(Clone, Copy, Debug)]
struct Mask {
    offset: u32,
    /// With CONFIG_CPUMASK_OFFSTACK there is a pointer to it.
    behind_pointer: bool,
}

/// Where the gates of one trace array are.
#[derive(Clone, Debug)]
pub struct Gates {
    kernel: Kernel,
    /// The `struct trace_array`.
    array: Gva,
    // In it.
    buffer: u32,
    // In struct trace_buffer.
    buffers: u32,
    record_disabled: u32,
    limit: Option<u32>,
    mask: Option<Mask>,
    // In struct ring_buffer_per_cpu.
    cpu_count: Option<u32>,
    context: Option<u32>,
    /// In the trace array, its per-CPU pointer; in `struct trace_array_cpu`, the count;
    /// and `__per_cpu_offset`.
    disabled: Option<(u32, u32, Gpa)>,
    unseen: Vec<Unseen>,
}

impl Gates {
    /// Finds the gates of the trace array at `array`, or of the global one.
    ///
    /// # Errors
    /// If none can be found. Single ones that cannot are in [`Gates::unseen`].
    pub fn of(
        kernel: &Kernel,
        symbols: &Symbols,
        btf: &Btf,
        array: Option<Gva>,
    ) -> Result<Self, GatesError> {
        let symbol = |name| symbols.address(name).filter(|&at| kernel.in_image(at));
        let array = match array {
            Some(array) => array,
            // static, kernel/trace/trace.c
            None => {
                kernel.runtime(symbol("global_trace").ok_or(GatesError::Symbol("global_trace"))?)
            }
        };
        let of_array = btf.structure("trace_array")?;
        let of_buffer = btf.structure("trace_buffer")?;
        let mut gates = Self {
            kernel: kernel.clone(),
            array,
            buffer: sized(&of_array, "array_buffer.buffer", 8)?,
            buffers: sized(&of_buffer, "buffers", 8)?,
            record_disabled: sized(&of_buffer, "record_disabled", 4)?,
            // Kernels before 6.8 have a limit that is a constant.
            limit: sized(&of_buffer, "max_data_size", 4).ok(),
            mask: None,
            cpu_count: None,
            context: None,
            disabled: None,
            unseen: Vec::new(),
        };
        // include/linux/cpumask.h: cpumask_var_t; lib/cpumask.c has this where it is a
        // pointer.
        let behind_pointer = symbols.address("alloc_cpumask_var_node").is_some();
        let mask = of_buffer.field("cpumask").map(|field| Mask {
            offset: field.offset,
            behind_pointer,
        });
        gates.mask = gates.seen(GateKind::Mask, mask.map_err(Into::into));
        let of_cpu = |field| Ok(sized(&btf.structure("ring_buffer_per_cpu")?, field, 4)?);
        gates.cpu_count = gates.seen(GateKind::CpuCount, of_cpu("record_disabled"));
        gates.context = gates.seen(GateKind::Context, of_cpu("current_context"));
        let disabled = || {
            let data = sized(&of_array, "array_buffer.data", 8)?;
            let count = sized(&btf.structure("trace_array_cpu")?, "disabled", 4)?;
            // arch/x86/kernel/setup_percpu.c; not without CONFIG_SMP.
            let offsets = symbol("__per_cpu_offset");
            let offsets = offsets.ok_or(GatesError::Symbol("__per_cpu_offset"))?;
            Ok((data, count, kernel.image_gpa(offsets)))
        };
        gates.disabled = gates.seen(GateKind::Disabled, disabled());
        Ok(gates)
    }

    fn seen<T>(&mut self, kind: GateKind, found: Result<T, GatesError>) -> Option<T> {
        found
            .map_err(|why| {
                let why = why.to_string();
                self.unseen.push(Unseen { kind, why });
            })
            .ok()
    }

    /// Gates that are not looked at, and why.
    pub fn unseen(&self) -> &[Unseen] {
        &self.unseen
    }

    /// Which gates are shut now, of the buffer and of the first `cpus` CPUs. Reads some
    /// twenty words a CPU, for no longer than `budget`.
    ///
    /// # Errors
    /// If a pointer leads nowhere, or it takes too long: then nothing is known.
    pub fn shut(
        &self,
        ram: &dyn GuestRam,
        cpus: u32,
        budget: Duration,
    ) -> Result<BTreeSet<Gate>, GatesError> {
        let begun = Instant::now();
        let mut shut = BTreeSet::new();
        let buffer = self.pointer(ram, plus(self.array, self.buffer), "the trace array")?;
        let off = self.half(ram, plus(buffer, self.record_disabled), "the switch")?;
        let limit = match self.limit {
            Some(offset) => Some(self.half(ram, plus(buffer, offset), "the limit")?),
            None => None,
        };
        let of_buffer = [
            (GateKind::Switch, off & RB_BUFFER_OFF != 0),
            (GateKind::Count, off & !RB_BUFFER_OFF != 0),
            (GateKind::Limit, limit.is_some_and(|most| most < SHORTEST)),
        ];
        let of_buffer = of_buffer.into_iter().filter(|(_, is_shut)| *is_shut);
        shut.extend(of_buffer.map(|(kind, _)| Gate { kind, cpu: None }));
        let buffers = self.pointer(ram, plus(buffer, self.buffers), "the list of CPUs")?;
        let mask = match self.mask {
            Some(mask) if mask.behind_pointer => {
                Some(self.pointer(ram, plus(buffer, mask.offset), "the mask")?)
            }
            mask => mask.map(|mask| plus(buffer, mask.offset)),
        };
        let data = match self.disabled {
            Some((data, ..)) => {
                Some(self.pointer(ram, plus(self.array, data), "the trace array")?)
            }
            None => None,
        };
        for cpu in 0..cpus.min(u16::MAX.into()) {
            if begun.elapsed() > budget {
                return Err(GatesError::TooSlow {
                    read: cpu,
                    cpus,
                    budget,
                });
            }
            let slot = buffers.wrapping_add(8 * u64::from(cpu));
            let part = self.pointer(ram, slot, "the list of CPUs")?;
            // A CPU that the guest never had.
            if part.0 == 0 {
                continue;
            }
            let mut note = |kind, is_shut| {
                if is_shut {
                    let cpu = Some(cpu as u16);
                    shut.insert(Gate { kind, cpu });
                }
            };
            if let Some(mask) = mask {
                let at = mask.wrapping_add(u64::from(cpu / 64) * 8);
                let word = self.pointer(ram, at, "the mask")?.0;
                note(GateKind::Mask, word >> (cpu % 64) & 1 == 0);
            }
            if let Some(offset) = self.cpu_count {
                let word = self.half(ram, plus(part, offset), "a CPU's part")?;
                note(GateKind::CpuCount, word != 0);
            }
            if let Some(offset) = self.context {
                let word = self.half(ram, plus(part, offset), "a CPU's part")?;
                // trace_recursive_lock(): the mark of the context and that of a transition.
                note(GateKind::Context, word.count_ones() > 1);
            }
            if let (Some((_, count, offsets)), Some(data)) = (self.disabled, data) {
                let own = Gpa(offsets.0.wrapping_add(8 * u64::from(cpu)));
                let at = data.wrapping_add(ram.read_u64(own)?);
                let word = self.half(ram, plus(at, count), "a CPU's trace array")?;
                note(GateKind::Disabled, word != 0);
            }
        }
        Ok(shut)
    }

    fn pointer(&self, ram: &dyn GuestRam, at: Gva, what: &'static str) -> Result<Gva, GatesError> {
        let word = self.kernel.read_u64(ram, at);
        word.map(Gva).map_err(|why| GatesError::Lost { what, why })
    }

    fn half(&self, ram: &dyn GuestRam, at: Gva, what: &'static str) -> Result<u32, GatesError> {
        let word = self.kernel.read_u32(ram, at);
        word.map_err(|why| GatesError::Lost { what, why })
    }
}

/// A field that has to be of this size.
fn sized(of: &Structure<'_>, path: &str, size: u32) -> Result<u32, BtfError> {
    let Field { offset, size: is } = of.field(path)?;
    if is != size || offset % size != 0 {
        return Err(BtfError::Unknown(format!(
            "plausible {path} ({is} bytes at {offset:#x})"
        )));
    }
    Ok(offset)
}

fn plus(at: Gva, offset: u32) -> Gva {
    at.wrapping_add(offset.into())
}
