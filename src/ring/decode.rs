//! Takes the key off the records, and says what is wrong with them.
//!
//! Each CPU numbers its records from 0 on (xftrace_seq in
//! kernel/trace/xftrace.c), so a number that is ahead tells how many are
//! missing, and one that is behind tells that the record is a copy. A CPU
//! makes its records one after the other, so the epochs they name never go
//! back. What the guest writes between its own records cannot change the rest:
//! a record that is refused moves neither the number nor the epoch.

use crate::kernel::control::RecordTypes;
use crate::kernel::Gva;
use crate::keys::KeyHistory;

use super::event::{events, Clock};
use super::fields::{is_kernel_half, Fields, DEPTH_LIMIT};
use super::record::{
    Call, Comm, Forged, ForgedWhy, Item, Lost, LostWhy, Return, Task, TraceFlags, What,
};
use super::{plain, Chunk, Gap, RecordFormat};

/// Sizes of struct xftrace_call_entry, xftrace_root_entry and
/// xftrace_return_entry, bytes.
const CALL_SIZE: usize = 40;
const ROOT_SIZE: usize = 56;
const RETURN_SIZE: usize = 56;
/// Running numbers wrap at 2^32; one that is more than half of that ahead is
/// one that is behind.
const BEHIND: u32 = 1 << 31;

/// What the decoder asks about addresses: whether Ftrace can have a call site
/// there.
pub trait CodeMap {
    /// Whether a traced function can begin at this run-time address.
    fn is_function(&self, at: Gva) -> bool;
}

/// Decodes the chunks of one boot, each CPU's in order.
#[derive(Clone, Debug)]
pub struct Decoder {
    format: RecordFormat,
    boot: u32,
    cpus: Vec<Stream>,
}

/// What is known of one CPU's records so far.
#[derive(Clone, Debug, Default)]
struct Stream {
    page: Option<(u64, u32, Clock)>,
    next_seq: u64,
    epoch: u64,
    gap: Option<Gap>,
    /// The next record may have any number.
    late: bool,
}

impl Decoder {
    /// A decoder for boot number `boot` of a session, whose kernel writes its
    /// records like this.
    pub fn new(format: impl Into<RecordFormat>, boot: u32) -> Self {
        Self {
            format: format.into(),
            boot,
            cpus: Vec::new(),
        }
    }

    /// Goes on behind a CPU's chunk that was decoded elsewhere, and all before
    /// it: from its last record on, running numbers tell what is missing.
    pub fn resume_after(&mut self, chunk: &Chunk, keys: &KeyHistory, code: &dyn CodeMap) {
        if let Some(stream) = self.stream(chunk.cpu) {
            stream.late = true;
        }
        self.chunk(chunk, keys, code, &mut |_| ());
    }

    fn stream(&mut self, cpu: u16) -> Option<&mut Stream> {
        let index = usize::from(cpu);
        if self.cpus.len() <= index {
            self.cpus.resize(index + 1, Stream::default());
        }
        self.cpus.get_mut(index)
    }

    /// Decodes one chunk. Items come in the order in which the guest wrote
    /// them.
    pub fn chunk(
        &mut self,
        chunk: &Chunk,
        keys: &KeyHistory,
        code: &dyn CodeMap,
        sink: &mut dyn FnMut(Item),
    ) {
        let (format, boot, cpu) = (self.format, self.boot, chunk.cpu);
        let Some(stream) = self.stream(chunk.cpu) else {
            return;
        };
        // On in the middle of a page only where its beginning was seen.
        let clock = match stream.page {
            Some((time, end, clock)) if (time, end) == (chunk.page_time, chunk.offset) => clock,
            _ => Clock(chunk.page_time),
        };
        let mut walk = events(&chunk.bytes, clock);
        let end = chunk.offset.saturating_add(chunk.bytes.len() as u32);
        if chunk.gap == Some(Gap::Earlier) {
            walk.by_ref().for_each(drop);
            stream.page = Some((chunk.page_time, end, walk.clock()));
            return;
        }
        stream.gap = chunk.gap.or(stream.gap);
        let mut time = clock.0;
        for event in walk.by_ref() {
            let what = match event {
                Ok(event) => {
                    time = event.time;
                    let mut lost = |lost| {
                        sink(Item {
                            cpu,
                            boot,
                            time: event.time,
                            what: What::Lost(lost),
                        });
                    };
                    match &format {
                        RecordFormat::Keyed(types) => {
                            stream.record(*types, event.payload, keys, code, &mut lost)
                        }
                        RecordFormat::Plain(format) => {
                            if let Some(why) = stream.gap.take().and_then(lost_why) {
                                lost(Lost { records: None, why });
                            }
                            let what =
                                plain::record(format, Fields(event.payload), stream.next_seq);
                            stream.next_seq += u64::from(what.is_call_or_return());
                            what
                        }
                    }
                }
                Err(_) => What::Forged(Forged {
                    why: ForgedWhy::BadShape,
                    epoch: None,
                    pid: 0,
                    raw_func: 0,
                    depth: 0,
                }),
            };
            sink(Item {
                cpu,
                boot,
                time,
                what,
            });
        }
        stream.page = Some((chunk.page_time, end, walk.clock()));
    }
}

/// What became of records that are missing because of a gap; `None` where
/// nothing is.
fn lost_why(gap: Gap) -> Option<LostWhy> {
    match gap {
        Gap::Overrun => Some(LostWhy::Overrun),
        Gap::Torn => Some(LostWhy::Torn),
        Gap::HelperAbsent => Some(LostWhy::HelperAbsent),
        Gap::NotStored => Some(LostWhy::NotStored),
        Gap::Earlier => None,
    }
}

impl Stream {
    fn record(
        &mut self,
        types: RecordTypes,
        payload: &[u8],
        keys: &KeyHistory,
        code: &dyn CodeMap,
        lost: &mut dyn FnMut(Lost),
    ) -> What {
        let fields = Fields(payload);
        let Some(type_id) = fields.u16(0) else {
            return What::Other { type_id: 0 };
        };
        let size = if type_id == types.root {
            ROOT_SIZE
        } else if type_id == types.call {
            CALL_SIZE
        } else if type_id == types.ret {
            RETURN_SIZE
        } else if type_id == types.plain_call || type_id == types.plain_ret {
            return What::Forged(Forged {
                why: ForgedWhy::Unkeyed,
                epoch: None,
                pid: fields.i32(4).unwrap_or(0),
                raw_func: fields.u64(8).unwrap_or(0),
                depth: fields.i32(16).unwrap_or(0),
            });
        } else {
            return What::Other { type_id };
        };
        let forged = |why, epoch| {
            What::Forged(Forged {
                why,
                epoch,
                pid: fields.i32(4).unwrap_or(0),
                raw_func: fields.u64(8).unwrap_or(0),
                depth: fields.i32(32).unwrap_or(0),
            })
        };
        match self.keyed(types, type_id, size, fields, keys, code, lost) {
            Ok(what) => what,
            Err((why, epoch)) => forged(why, epoch),
        }
    }

    /// Decodes a record that claims to be keyed.
    #[allow(clippy::too_many_arguments)]
    fn keyed(
        &mut self,
        types: RecordTypes,
        type_id: u16,
        size: usize,
        fields: Fields<'_>,
        keys: &KeyHistory,
        code: &dyn CodeMap,
        lost: &mut dyn FnMut(Lost),
    ) -> Result<What, (ForgedWhy, Option<u64>)> {
        let bad = (ForgedWhy::BadShape, None);
        if fields.0.len() != size {
            return Err(bad);
        }
        let flags = TraceFlags(fields.u8(2).ok_or(bad)?);
        let pid = fields.i32(4).ok_or(bad)?;
        let epoch = keys.widen(fields.u32(24).ok_or(bad)?);
        let seq = fields.u32(28).ok_or(bad)?;
        let depth = fields.i32(32).ok_or(bad)?;
        let Some(key) = keys.key(epoch) else {
            return Err((ForgedWhy::UnknownEpoch, Some(epoch)));
        };
        let func = Gva(fields.u64(8).ok_or(bad)? ^ key);
        let caller = Gva(fields.u64(16).ok_or(bad)? ^ key);
        if !code.is_function(func) || !is_kernel_half(caller) {
            return Err((ForgedWhy::NotDecodable, Some(epoch)));
        }
        if !(0..DEPTH_LIMIT).contains(&depth) || (depth == 0 && type_id == types.call) {
            return Err((ForgedWhy::BadShape, Some(epoch)));
        }
        if epoch < self.epoch {
            return Err((ForgedWhy::StaleEpoch, Some(epoch)));
        }
        if std::mem::take(&mut self.late) {
            self.next_seq = seq.into();
        }
        let ahead = seq.wrapping_sub(self.next_seq as u32);
        if ahead >= BEHIND {
            return Err((ForgedWhy::Replayed, Some(epoch)));
        }
        if ahead > 0 {
            let why = self.gap.and_then(lost_why).unwrap_or(LostWhy::Overrun);
            lost(Lost {
                records: Some(ahead.into()),
                why,
            });
        }
        let seq = self.next_seq + u64::from(ahead);
        self.gap = None;
        self.epoch = epoch;
        self.next_seq = seq + 1;

        let depth = depth as u16;
        let mut task = Task { pid, comm: None };
        if type_id == types.ret {
            return Ok(What::Return(Return {
                task,
                flags,
                func,
                caller,
                depth,
                epoch,
                seq,
                overrun: fields.u32(36).ok_or(bad)?,
                calltime: fields.u64(40).ok_or(bad)?,
                rettime: fields.u64(48).ok_or(bad)?,
            }));
        }
        if type_id == types.root {
            task.comm = fields.bytes(40).map(Comm);
        }
        Ok(What::Call(Call {
            task,
            flags,
            func,
            caller,
            depth,
            epoch,
            seq,
        }))
    }
}

#[cfg(test)]
mod tests;
