//! From the list of trace arrays to the ring buffer that is recorded into.

use std::time::{Duration, Instant};

use crate::ram::{Gpa, GuestRam, PAGE_SIZE};

use super::super::control::RingLayout;
use super::super::escape::escape;
use super::super::Gva;
use super::{command_line, lost, reserved_command_line, Stock, StockError, RB_BUFFER_OFF};

/// A ring of less, for each CPU, is written over between two looks.
pub(super) const SMALLEST_KB: u64 = 64;
/// How many trace arrays are looked at.
const MAX_ARRAYS: usize = 64;
/// How long the list of them, and the table of functions, may take each. They take some
/// milliseconds, and longer in memory that the host has swapped out.
pub(super) const BUDGET: Duration = Duration::from_millis(200);
/// CONFIG_NR_CPUS goes up to 8192 on x86-64.
const MAX_CPUS: u32 = 8192;
/// A sub-buffer is at most so many times twice a page.
const MAX_ORDER: u32 = 4;
/// Longer than the name of any tracer or instance that is shown.
const NAME_LENGTH: usize = 64;

/// The global ring buffer, or that of an instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceArray {
    /// The instance's name, escaped; `None` for the global one.
    pub name: Option<String>,
    /// What its current tracer is called, escaped.
    pub tracer: String,
    /// Where its ring buffer is and how that is laid out.
    pub ring: RingLayout,
    /// How many CPUs it has buffers for.
    pub nr_cpus: u32,
    /// The size of the first CPU's buffer, KiB.
    pub kb: u64,
    /// Whether it lies in memory that was reserved at boot.
    pub boot_mapped: bool,
    /// Its `struct trace_array`.
    at: Gva,
    /// `record_disabled` of its `struct trace_buffer`.
    record_disabled: Gpa,
}

impl TraceArray {
    /// Where its `struct trace_array` is.
    pub fn address(&self) -> Gva {
        self.at
    }

    /// Whether it takes records.
    ///
    /// # Errors
    /// If guest memory cannot be read.
    pub fn recording(&self, ram: &dyn GuestRam) -> Result<bool, StockError> {
        Ok(ram.read_u32(self.record_disabled)? & RB_BUFFER_OFF == 0)
    }

    /// Has it take records, or not: as the guest's own tracing_on does. The
    /// word's lower half counts who else has it take none; that is left alone.
    ///
    /// # Errors
    /// If guest memory cannot be written.
    pub fn record(&self, ram: &dyn GuestRam, on: bool) -> Result<(), StockError> {
        ram.change_bits(self.record_disabled, RB_BUFFER_OFF, !on)?;
        Ok(())
    }
}

impl Stock {
    /// All trace arrays, as far as their pointers lead somewhere.
    ///
    /// # Errors
    /// If the list itself cannot be followed.
    pub fn arrays(&self, ram: &dyn GuestRam) -> Result<Vec<TraceArray>, StockError> {
        const WHAT: &str = "the list of trace arrays";
        let begun = Instant::now();
        let mut arrays = Vec::new();
        let mut node = Gva(self.load(ram, self.arrays, WHAT)?);
        for _ in 0..MAX_ARRAYS {
            if node == self.arrays {
                break;
            }
            if begun.elapsed() > BUDGET {
                return Err(StockError::TooSlow { what: WHAT });
            }
            let at = Gva(node.0.wrapping_sub(self.offsets.array.list.into()));
            // An instance that is just being made or removed is passed over.
            if let Ok(array) = self.array(ram, at) {
                arrays.push(array);
            }
            node = Gva(self.load(ram, node, WHAT)?);
        }
        Ok(arrays)
    }

    fn array(&self, ram: &dyn GuestRam, at: Gva) -> Result<TraceArray, StockError> {
        let (array, ring) = (&self.offsets.array, &self.offsets.ring);
        let name = match self.load(ram, plus(at, array.name), "the name of an instance")? {
            0 => None,
            text => Some(self.text(ram, Gva(text))?),
        };
        let buffer = Gva(self.load(ram, plus(at, array.buffer), "a trace buffer")?);
        let nr_cpus = match ring.cpus {
            Some(offset) => self.load_u32(ram, plus(buffer, offset), "a trace buffer")?,
            None => ram.read_u32(self.nr_cpu_ids.ok_or(StockError::Symbol("nr_cpu_ids"))?)?,
        };
        if nr_cpus == 0 || nr_cpus > MAX_CPUS {
            return Err(StockError::Lost {
                what: "a trace buffer",
                at: buffer,
            });
        }
        let order = match ring.subbuf_order {
            Some(offset) => self.load_u32(ram, plus(buffer, offset), "a trace buffer")?,
            None => 0,
        };
        let page_size = (PAGE_SIZE as u32) << order.min(MAX_ORDER);
        let boot_mapped = match ring.range_start {
            Some(offset) => self.load(ram, plus(buffer, offset), "a trace buffer")? != 0,
            None => false,
        };
        let disabled = plus(buffer, ring.record_disabled);
        let record_disabled = self.kernel.translate(ram, disabled);
        let record_disabled = record_disabled.map_err(lost("a trace buffer", disabled))?;
        let buffers = self.load(ram, plus(buffer, ring.buffers.into()), "a trace buffer")?;
        // The smallest is the first to be written over. CPUs that never were have none.
        let mut pages = u64::MAX;
        for cpu in 0..nr_cpus {
            let at = Gva(buffers).wrapping_add(8 * u64::from(cpu));
            let its = self.load(ram, at, "a CPU's buffer")?;
            if its != 0 {
                let at = plus(Gva(its), ring.nr_pages.into());
                pages = pages.min(self.load(ram, at, "a CPU's buffer")?);
            }
        }
        if pages == u64::MAX {
            pages = 0;
        }
        Ok(TraceArray {
            name,
            tracer: self.tracer(ram, at)?,
            ring: self.ring(buffer, page_size),
            nr_cpus,
            kb: pages.saturating_mul(u64::from(page_size) >> 10),
            boot_mapped,
            at,
            record_disabled,
        })
    }

    fn ring(&self, buffer: Gva, page_size: u32) -> RingLayout {
        let ring = &self.offsets.ring;
        RingLayout {
            buffer,
            page_size,
            buffers: ring.buffers,
            nr_pages: ring.nr_pages,
            pages: ring.pages,
            reader_page: ring.reader_page,
            commit_page: ring.commit_page,
            entries: ring.entries,
            overrun: ring.overrun,
            commit_overrun: ring.commit_overrun,
            dropped: ring.dropped,
            list: ring.list,
            page: ring.page,
            time_stamp: ring.time_stamp,
            commit: ring.commit,
            data: ring.data,
        }
    }

    fn tracer(&self, ram: &dyn GuestRam, array: Gva) -> Result<String, StockError> {
        let offsets = &self.offsets.array;
        let tracer = Gva(self.load(ram, plus(array, offsets.current_trace), "the tracer")?);
        let name = Gva(self.load(ram, plus(tracer, offsets.tracer_name), "the tracer")?);
        self.text(ram, name)
    }

    /// Text of the guest: bounded, and escaped. Copied at once, or, where a page ends
    /// in it, in two parts, for the text may be the last before what is not mapped.
    fn text(&self, ram: &dyn GuestRam, at: Gva) -> Result<String, StockError> {
        let mut bytes = [0; NAME_LENGTH];
        let here = PAGE_SIZE - at.0 % PAGE_SIZE;
        let (first, second) = bytes.split_at_mut(NAME_LENGTH.min(here as usize));
        let read = |from, part: &mut [u8]| {
            let read = self.kernel.read(ram, from, part);
            read.map_err(lost("a name", from))
        };
        read(at, first)?;
        if !first.contains(&0) && !second.is_empty() {
            read(at.wrapping_add(here), second)?;
        }
        Ok(escape(
            bytes.split(|&byte| byte == 0).next().unwrap_or_default(),
        ))
    }

    /// The trace array that function_graph records into; of several, one in
    /// memory reserved at boot, since somebody set that up on purpose.
    ///
    /// # Errors
    /// If there is none, with what to boot the guest with for `functions`.
    pub fn tracing<S: AsRef<str>>(
        &self,
        ram: &dyn GuestRam,
        functions: &[S],
    ) -> Result<TraceArray, StockError> {
        let arrays = self.arrays(ram)?;
        let tracer = arrays
            .iter()
            .find(|array| array.name.is_none())
            .map_or_else(|| "unknown".to_owned(), |array| array.tracer.clone());
        // Somebody set that up on purpose; no kernel parameter sets its tracer.
        let reserved = arrays.iter().find(|array| array.boot_mapped);
        let reserved = reserved.and_then(|array| array.name.clone());
        let found = arrays
            .into_iter()
            .filter(|array| array.tracer == "function_graph")
            .max_by_key(|array| array.boot_mapped);
        let Some(found) = found else {
            if let Some(instance) = reserved {
                return Err(StockError::TracerNotSet { instance });
            }
            return Err(StockError::NotRunning {
                tracer,
                command_line: command_line(functions),
            });
        };
        if found.kb < SMALLEST_KB {
            return Err(StockError::RingTooSmall {
                kb: found.kb,
                command_line: match found.boot_mapped {
                    true => reserved_command_line(functions).0,
                    false => command_line(functions),
                },
                reserved: found.boot_mapped,
            });
        }
        Ok(found)
    }

    /// Whether `array` still is what it was when it was found: with the same
    /// ring buffer, and function_graph as its tracer.
    ///
    /// # Errors
    /// If its pointers lead nowhere.
    pub fn still_traces(&self, ram: &dyn GuestRam, array: &TraceArray) -> Result<bool, StockError> {
        let pointer = plus(array.at, self.offsets.array.buffer);
        let buffer = Gva(self.load(ram, pointer, "a trace buffer")?);
        Ok(buffer == array.ring.buffer && self.tracer(ram, array.at)? == array.tracer)
    }
}

pub(super) fn plus(at: Gva, offset: u32) -> Gva {
    at.wrapping_add(offset.into())
}
