//! Where things are in a kernel's tracing structures, by its own BTF.

use serde::{Deserialize, Serialize};

use super::super::btf::{Btf, BtfError, Field};

/// Offsets in structures, bytes; each structure's own.
#[derive(Debug)]
pub(super) struct Offsets {
    pub(super) array: ArrayOffsets,
    pub(super) ring: RingOffsets,
    pub(super) hash: HashOffsets,
    /// In `struct task_struct`; not with every configuration.
    pub(super) stack_canary: Option<u32>,
}

/// `struct trace_array` and `struct tracer`, kernel/trace/trace.h.
#[derive(Debug)]
pub(super) struct ArrayOffsets {
    pub(super) list: u32,
    pub(super) name: u32,
    pub(super) buffer: u32,
    pub(super) current_trace: u32,
    pub(super) tracer_name: u32,
}

/// kernel/trace/ring_buffer.c.
#[derive(Debug)]
pub(super) struct RingOffsets {
    // struct trace_buffer
    /// From 6.11 on, the buffer does not say for how many CPUs it is.
    pub(super) cpus: Option<u32>,
    pub(super) record_disabled: u32,
    pub(super) buffers: u16,
    /// From 6.8 on, sub-buffers may be larger than a page.
    pub(super) subbuf_order: Option<u32>,
    /// From 6.10 on, a buffer may lie in memory reserved at boot.
    pub(super) range_start: Option<u32>,
    // struct ring_buffer_per_cpu
    pub(super) nr_pages: u16,
    pub(super) pages: u16,
    pub(super) reader_page: u16,
    pub(super) commit_page: u16,
    pub(super) entries: u16,
    pub(super) overrun: u16,
    pub(super) commit_overrun: u16,
    pub(super) dropped: u16,
    // struct buffer_page
    pub(super) list: u16,
    pub(super) page: u16,
    // struct buffer_data_page
    pub(super) time_stamp: u16,
    pub(super) commit: u16,
    pub(super) data: u16,
}

/// `struct ftrace_hash`, kernel/trace/trace.h, and its entries.
#[derive(Debug)]
pub(super) struct HashOffsets {
    pub(super) size_bits: u32,
    pub(super) buckets: u32,
    pub(super) next: u32,
    pub(super) ip: u32,
}

impl Offsets {
    pub(super) fn of(btf: &Btf) -> Result<Self, BtfError> {
        let array = btf.structure("trace_array")?;
        let tracer = btf.structure("tracer")?;
        let buffer = btf.structure("trace_buffer")?;
        let cpu = btf.structure("ring_buffer_per_cpu")?;
        let page = btf.structure("buffer_page")?;
        let data = btf.structure("buffer_data_page")?;
        let hash = btf.structure("ftrace_hash")?;
        let entry = btf.structure("ftrace_func_entry")?;
        let task = btf.structure("task_struct")?;
        Ok(Self {
            array: ArrayOffsets {
                list: array.field("list")?.offset,
                name: array.field("name")?.offset,
                buffer: array.field("array_buffer.buffer")?.offset,
                current_trace: array.field("current_trace")?.offset,
                tracer_name: tracer.field("name")?.offset,
            },
            ring: RingOffsets {
                cpus: match buffer.field("cpus") {
                    Ok(field) => Some(word(field, 4)?),
                    Err(_) => None,
                },
                record_disabled: word(buffer.field("record_disabled")?, 4)?,
                buffers: small(buffer.field("buffers")?)?,
                subbuf_order: buffer.field("subbuf_order").ok().map(|field| field.offset),
                range_start: buffer
                    .field("range_addr_start")
                    .ok()
                    .map(|field| field.offset),
                nr_pages: small(cpu.field("nr_pages")?)?,
                pages: small(cpu.field("pages")?)?,
                reader_page: small(cpu.field("reader_page")?)?,
                commit_page: small(cpu.field("commit_page")?)?,
                entries: small(cpu.field("entries")?)?,
                overrun: small(cpu.field("overrun")?)?,
                commit_overrun: small(cpu.field("commit_overrun")?)?,
                dropped: small(cpu.field("dropped_events")?)?,
                list: small(page.field("list")?)?,
                page: small(page.field("page")?)?,
                time_stamp: small(data.field("time_stamp")?)?,
                commit: small(data.field("commit")?)?,
                data: small(data.field("data")?)?,
            },
            hash: HashOffsets {
                size_bits: hash.field("size_bits")?.offset,
                buckets: hash.field("buckets")?.offset,
                next: entry.field("hlist.next")?.offset,
                ip: entry.field("ip")?.offset,
            },
            stack_canary: task.field("stack_canary").ok().map(|field| field.offset),
        })
    }
}

/// A word of the ring buffer's structures, each of which is smaller than a
/// page.
fn small(field: Field) -> Result<u16, BtfError> {
    let offset = field.offset;
    if offset % 8 != 0 || offset >= 4096 {
        return Err(BtfError::Unknown(format!(
            "plausible ring buffer (a field at {offset:#x})"
        )));
    }
    Ok(offset as u16)
}

/// A field that must have this size and its alignment.
fn word(field: Field, size: u32) -> Result<u32, BtfError> {
    if field.size != size || field.offset % size != 0 {
        return Err(BtfError::Unknown(format!(
            "plausible ring buffer (a field of {} bytes at {:#x})",
            field.size, field.offset
        )));
    }
    Ok(field.offset)
}

/// A number in a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slot {
    /// Bytes from the beginning of the record.
    pub at: u16,
    /// Its size, 4 or 8 bytes.
    pub size: u8,
}

/// `struct ftrace_graph_ent_entry` (kernel/trace/trace_entries.h) of one
/// kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallFormat {
    /// `TRACE_GRAPH_ENT`.
    pub type_id: u16,
    /// The function entered.
    pub func: Slot,
    /// How many calls it is nested in.
    pub depth: Slot,
}

/// `struct ftrace_graph_ret_entry` of one kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReturnFormat {
    /// `TRACE_GRAPH_RET`.
    pub type_id: u16,
    /// The function that returned.
    pub func: Slot,
    /// How many calls it is nested in.
    pub depth: Slot,
    /// Calls of the task that were nested too deeply to be traced.
    pub overrun: Slot,
    /// When it was entered, trace clock.
    pub calltime: Slot,
    /// When it returned, trace clock.
    pub rettime: Slot,
}

/// How a kernel's own function-graph records look, by its BTF.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GraphFormat {
    /// A call.
    pub call: CallFormat,
    /// A return.
    pub ret: ReturnFormat,
}

impl GraphFormat {
    /// The format of the kernel that this BTF describes.
    ///
    /// # Errors
    /// If it has no such records, or impossible ones.
    pub fn of(btf: &Btf) -> Result<Self, BtfError> {
        let call = btf.structure("ftrace_graph_ent_entry")?;
        let ret = btf.structure("ftrace_graph_ret_entry")?;
        let type_id = |constant| {
            let value = btf.constant("trace_type", constant)?;
            let unknown = |_| BtfError::Unknown(format!("possible {constant}"));
            u16::try_from(value).map_err(unknown)
        };
        Ok(Self {
            call: CallFormat {
                type_id: type_id("TRACE_GRAPH_ENT")?,
                func: slot(call.field("graph_ent.func")?)?,
                depth: slot(call.field("graph_ent.depth")?)?,
            },
            ret: ReturnFormat {
                type_id: type_id("TRACE_GRAPH_RET")?,
                func: slot(ret.field("ret.func")?)?,
                depth: slot(ret.field("ret.depth")?)?,
                overrun: slot(ret.field("ret.overrun")?)?,
                // Where both are there (6.12), the inner ones are written:
                // __trace_graph_return() copies `ret` and nothing else.
                calltime: slot(ret.field_of_any(&["ret.calltime", "calltime"])?)?,
                rettime: slot(ret.field_of_any(&["ret.rettime", "rettime"])?)?,
            },
        })
    }
}

/// A number in a record, which is never longer than the kernel's own few
/// dozen bytes.
fn slot(field: Field) -> Result<Slot, BtfError> {
    if !matches!(field.size, 4 | 8) || field.offset >= 256 {
        return Err(BtfError::Unknown(format!(
            "plausible function_graph record (a field of {} bytes at {:#x})",
            field.size, field.offset
        )));
    }
    Ok(Slot {
        at: field.offset as u16,
        size: field.size as u8,
    })
}
