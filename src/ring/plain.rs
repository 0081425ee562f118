//! The kernel's own function_graph records: no key, no number, no caller.
//!
//! Corresponds to struct ftrace_graph_ent_entry and ftrace_graph_ret_entry,
//! kernel/trace/trace_entries.h, as the guest kernel's BTF lays them out. A
//! record is taken at its word; refused is only what no kernel writes.

use crate::kernel::stock::{GraphFormat, Slot};
use crate::kernel::Gva;

use super::fields::{is_kernel_half, Fields, DEPTH_LIMIT};
use super::record::{Call, Forged, ForgedWhy, Return, Task, TraceFlags, What};

/// Decodes one record of a kernel with `format`; `seq` is how many of its CPU
/// came before.
pub(super) fn record(format: &GraphFormat, fields: Fields<'_>, seq: u64) -> What {
    let Some(type_id) = fields.u16(0) else {
        return What::Other { type_id: 0 };
    };
    let good = if type_id == format.call.type_id {
        call(format, fields, seq)
    } else if type_id == format.ret.type_id {
        ret(format, fields, seq)
    } else {
        return What::Other { type_id };
    };
    good.unwrap_or_else(|| {
        let number = |slot| number(fields, slot).unwrap_or(0);
        What::Forged(Forged {
            why: ForgedWhy::BadShape,
            epoch: None,
            pid: fields.i32(4).unwrap_or(0),
            raw_func: number(format.call.func),
            depth: number(format.call.depth) as i32,
        })
    })
}

fn call(format: &GraphFormat, fields: Fields<'_>, seq: u64) -> Option<What> {
    let format = &format.call;
    Some(What::Call(Call {
        task: task(fields)?,
        flags: TraceFlags(fields.u8(2)?),
        func: function(fields, format.func)?,
        caller: Gva(0),
        depth: depth(fields, format.depth)?,
        epoch: 0,
        seq,
    }))
}

fn ret(format: &GraphFormat, fields: Fields<'_>, seq: u64) -> Option<What> {
    let format = &format.ret;
    Some(What::Return(Return {
        task: task(fields)?,
        flags: TraceFlags(fields.u8(2)?),
        func: function(fields, format.func)?,
        caller: Gva(0),
        depth: depth(fields, format.depth)?,
        epoch: 0,
        seq,
        overrun: number(fields, format.overrun)? as u32,
        calltime: number(fields, format.calltime)?,
        rettime: number(fields, format.rettime)?,
    }))
}

fn task(fields: Fields<'_>) -> Option<Task> {
    let pid = fields.i32(4)?;
    Some(Task { pid, comm: None })
}

fn function(fields: Fields<'_>, slot: Slot) -> Option<Gva> {
    Some(Gva(number(fields, slot)?)).filter(|&at| is_kernel_half(at))
}

fn depth(fields: Fields<'_>, slot: Slot) -> Option<u16> {
    let depth = u16::try_from(number(fields, slot)?).ok()?;
    (i32::from(depth) < DEPTH_LIMIT).then_some(depth)
}

fn number(fields: Fields<'_>, slot: Slot) -> Option<u64> {
    let at = usize::from(slot.at);
    match slot.size {
        4 => fields.u32(at).map(u64::from),
        8 => fields.u64(at),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Chunk, CodeMap, Decoder, Gap, RecordFormat};
    use super::*;
    use crate::kernel::stock::{CallFormat, ReturnFormat};
    use crate::keys::KeyHistory;
    use crate::ring::record::{Lost, LostWhy};
    use proptest::prelude::*;

    const FUNC: u64 = 0xffff_ffff_8100_1000;

    fn slot(at: u16, size: u8) -> Slot {
        Slot { at, size }
    }

    /// As 6.1 has it.
    fn format() -> GraphFormat {
        GraphFormat {
            call: CallFormat {
                type_id: 11,
                func: slot(8, 8),
                depth: slot(16, 4),
            },
            ret: ReturnFormat {
                type_id: 10,
                func: slot(8, 8),
                depth: slot(16, 4),
                overrun: slot(20, 4),
                calltime: slot(24, 8),
                rettime: slot(32, 8),
            },
        }
    }

    struct NoCode;

    impl CodeMap for NoCode {
        fn is_function(&self, _: Gva) -> bool {
            false
        }
    }

    fn entry(kind: u16, func: u64, depth: i32) -> Vec<u8> {
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend([TraceFlags::HARDIRQ, 0]);
        bytes.extend(77i32.to_le_bytes());
        bytes.extend(func.to_le_bytes());
        bytes.extend(depth.to_le_bytes());
        if kind == 10 {
            bytes.extend(3u32.to_le_bytes());
            bytes.extend(1000u64.to_le_bytes());
            bytes.extend(2500u64.to_le_bytes());
        }
        bytes
    }

    fn chunk(offset: u32, records: &[Vec<u8>], gap: Option<Gap>) -> Chunk {
        let mut bytes = Vec::new();
        for record in records {
            let words = (record.len() / 4) as u32;
            bytes.extend((words | 10 << 5).to_le_bytes());
            bytes.extend(record);
        }
        Chunk {
            cpu: 0,
            page_time: 500,
            offset,
            bytes,
            gap,
        }
    }

    fn decode(decoder: &mut Decoder, chunk: &Chunk) -> Vec<(u64, What)> {
        let mut items = Vec::new();
        decoder.chunk(chunk, &KeyHistory::default(), &NoCode, &mut |item| {
            items.push((item.time, item.what));
        });
        items
    }

    fn decoder() -> Decoder {
        Decoder::new(RecordFormat::Plain(format()), 1)
    }

    #[test]
    fn calls_and_returns_come_out_as_they_lie() {
        let records = [entry(11, FUNC, 2), entry(10, FUNC, 2), entry(5, 0, 0)];
        let items = decode(&mut decoder(), &chunk(0, &records, None));
        let task = Task {
            pid: 77,
            comm: None,
        };
        let (flags, func) = (TraceFlags(TraceFlags::HARDIRQ), Gva(FUNC));
        let call = What::Call(Call {
            task,
            flags,
            func,
            caller: Gva(0),
            depth: 2,
            epoch: 0,
            seq: 0,
        });
        let ret = What::Return(Return {
            task,
            flags,
            func,
            caller: Gva(0),
            depth: 2,
            epoch: 0,
            seq: 1,
            overrun: 3,
            calltime: 1000,
            rettime: 2500,
        });
        let other = What::Other { type_id: 5 };
        assert_eq!(items, [(510, call), (520, ret), (530, other)]);
    }

    #[test]
    fn what_no_kernel_writes_is_refused() {
        for record in [
            entry(11, FUNC, -1),
            entry(11, FUNC, 128),
            entry(11, 0x1000, 0),
            entry(10, 0, 0),
            entry(10, FUNC, 0)[..36].to_vec(),
            entry(11, FUNC, 0)[..16].to_vec(),
        ] {
            let items = decode(&mut decoder(), &chunk(0, &[record], None));
            let why = match items[..] {
                [(_, What::Forged(forged))] => Some(forged.why),
                _ => None,
            };
            assert_eq!(why, Some(ForgedWhy::BadShape), "{items:?}");
        }
    }

    #[test]
    fn a_gap_is_a_loss_of_unknown_size_in_its_place() {
        for (gap, why) in [
            (Gap::Overrun, LostWhy::Overrun),
            (Gap::Torn, LostWhy::Torn),
            (Gap::HelperAbsent, LostWhy::HelperAbsent),
            (Gap::NotStored, LostWhy::NotStored),
        ] {
            let items = decode(&mut decoder(), &chunk(0, &[entry(11, FUNC, 0)], Some(gap)));
            let lost = What::Lost(Lost { records: None, why });
            assert_eq!(items[0], (510, lost));
            assert!(matches!(items[1..], [(510, What::Call(_))]));
        }
    }

    #[test]
    fn what_is_older_than_the_trace_counts_for_its_times_alone() {
        let mut decoder = decoder();
        let earlier = chunk(0, &[entry(11, FUNC, 0)], Some(Gap::Earlier));
        assert_eq!(decode(&mut decoder, &earlier), []);
        let offset = earlier.bytes.len() as u32;
        let items = decode(&mut decoder, &chunk(offset, &[entry(10, FUNC, 0)], None));
        assert!(matches!(items[..], [(520, What::Return(_))]), "{items:?}");
    }

    proptest! {
        #[test]
        fn any_bytes_and_any_format_are_borne(
            bytes in proptest::collection::vec(any::<u8>(), 0..64),
            at in 0u16..300,
            size: u8,
        ) {
            let mut format = format();
            format.call.depth = slot(at, size);
            format.ret.rettime = slot(at, size);
            for format in [format, super::tests::format()] {
                let mut decoder = Decoder::new(RecordFormat::Plain(format), 1);
                decode(&mut decoder, &chunk(0, std::slice::from_ref(&bytes), None));
            }
        }
    }
}
