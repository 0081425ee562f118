//! Records as the guest writes them, and as a hostile one would.

use super::*;
use crate::keys::Entry;
use proptest::prelude::*;

const TYPES: RecordTypes = RecordTypes {
    root: 20,
    call: 21,
    ret: 22,
    plain_call: 11,
    plain_ret: 10,
};
const FUNC: u64 = 0xffff_ffff_8100_1000;
const CALLER: u64 = 0xffff_ffff_8100_2042;

struct Code;

impl CodeMap for Code {
    fn is_function(&self, at: Gva) -> bool {
        at.0 == FUNC
    }
}

fn key(epoch: u64) -> u64 {
    epoch.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn keys(epochs: u64) -> KeyHistory {
    let mut keys = KeyHistory::default();
    for epoch in 1..=epochs {
        assert!(keys.push(Entry {
            epoch,
            key: key(epoch),
            wall_ns: 0,
            mono_ns: 0
        }));
    }
    keys
}

/// A record as the guest makes it: type, key, epoch, number, depth.
fn record(kind: u16, key: u64, epoch: u32, seq: u32, depth: i32) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(kind.to_le_bytes());
    bytes.extend([TraceFlags::HARDIRQ, 0]);
    bytes.extend(77i32.to_le_bytes());
    bytes.extend((FUNC ^ key).to_le_bytes());
    bytes.extend((CALLER ^ key).to_le_bytes());
    bytes.extend(epoch.to_le_bytes());
    bytes.extend(seq.to_le_bytes());
    bytes.extend(depth.to_le_bytes());
    match kind {
        20 => {
            bytes.extend(77i32.to_le_bytes());
            bytes.extend(*b"cat\0............");
        }
        21 => bytes.extend(77i32.to_le_bytes()),
        _ => {
            bytes.extend(3u32.to_le_bytes());
            bytes.extend(1000u64.to_le_bytes());
            bytes.extend(2500u64.to_le_bytes());
        }
    }
    bytes
}

fn chunk(records: &[Vec<u8>], gap: Option<Gap>) -> Chunk {
    let mut bytes = Vec::new();
    for record in records {
        let words = (record.len() / 4) as u32;
        bytes.extend((words | 10 << 5).to_le_bytes());
        bytes.extend(record);
    }
    Chunk {
        cpu: 1,
        page_time: 500,
        offset: 0,
        bytes,
        gap,
    }
}

fn decode(decoder: &mut Decoder, chunk: &Chunk, keys: &KeyHistory) -> Vec<What> {
    let mut items = Vec::new();
    decoder.chunk(chunk, keys, &Code, &mut |item| items.push(item.what));
    items
}

fn good(epoch: u64, seq: u32, depth: i32) -> Vec<u8> {
    record(
        if depth == 0 { 20 } else { 21 },
        key(epoch),
        epoch as u32,
        seq,
        depth,
    )
}

fn why(what: &What) -> Option<ForgedWhy> {
    match what {
        What::Forged(forged) => Some(forged.why),
        _ => None,
    }
}

#[test]
fn a_call_and_its_return_come_out_without_the_key() {
    let records = [good(1, 0, 0), record(22, key(2), 2, 1, 0)];
    let mut items = Vec::new();
    let chunk = chunk(&records, None);
    Decoder::new(TYPES, 4).chunk(&chunk, &keys(2), &Code, &mut |item| items.push(item));
    let task = |comm| Task { pid: 77, comm };
    let flags = TraceFlags(TraceFlags::HARDIRQ);
    let (func, caller) = (Gva(FUNC), Gva(CALLER));
    let call = Call {
        task: task(Some(Comm(*b"cat\0............"))),
        flags,
        func,
        caller,
        depth: 0,
        epoch: 1,
        seq: 0,
    };
    let ret = Return {
        task: task(None),
        flags,
        func,
        caller,
        depth: 0,
        epoch: 2,
        seq: 1,
        overrun: 3,
        calltime: 1000,
        rettime: 2500,
    };
    let item = |time, what| Item {
        cpu: 1,
        boot: 4,
        time,
        what,
    };
    assert_eq!(
        items,
        [item(510, What::Call(call)), item(520, What::Return(ret))]
    );
}

#[test]
fn a_record_decodes_under_the_epoch_it_names_and_no_other() {
    // Made with the key of epoch 2, and naming 1: nothing is guessed.
    let chunk = chunk(&[record(21, key(2), 1, 0, 1)], None);
    let items = decode(&mut Decoder::new(TYPES, 1), &chunk, &keys(3));
    assert_eq!(
        items.iter().map(why).collect::<Vec<_>>(),
        [Some(ForgedWhy::NotDecodable)]
    );
}

#[test]
fn what_is_forged_is_told_with_its_reason_and_changes_nothing_else() {
    let forged = [
        (record(21, 0, 1, 1, 1), ForgedWhy::NotDecodable),
        (record(21, key(1), 9, 1, 1), ForgedWhy::UnknownEpoch),
        (record(21, key(1), 0, 1, 1), ForgedWhy::UnknownEpoch),
        (record(21, key(1), 1, 1, 1), ForgedWhy::StaleEpoch),
        (record(21, key(2), 2, 0, 1), ForgedWhy::Replayed),
        (record(21, key(2), 2, 1, -1), ForgedWhy::BadShape),
        (record(21, key(2), 2, 1, 128), ForgedWhy::BadShape),
        (record(21, key(2), 2, 1, 0), ForgedWhy::BadShape),
        (good(2, 1, 1)[..36].to_vec(), ForgedWhy::BadShape),
        (record(11, 0, 0, 0, 0), ForgedWhy::Unkeyed),
        (record(10, 0, 0, 0, 0), ForgedWhy::Unkeyed),
    ];
    for (record, reason) in forged {
        let chunk = chunk(&[good(2, 0, 1), record, good(2, 1, 1)], None);
        let items = decode(&mut Decoder::new(TYPES, 1), &chunk, &keys(2));
        let reasons: Vec<_> = items.iter().map(why).collect();
        assert_eq!(reasons, [None, Some(reason), None], "{reason:?}");
    }
}

/// Deeper than Linux 6.1 nests, and no deeper than 6.12 does.
#[test]
fn deep_calls_are_calls() {
    let chunk = chunk(&[good(1, 0, 50), good(1, 1, 98), good(1, 2, 127)], None);
    let items = decode(&mut Decoder::new(TYPES, 1), &chunk, &keys(1));
    let depths = items.iter().map(|item| match item {
        What::Call(call) => Some(call.depth),
        _ => None,
    });
    let depths: Vec<_> = depths.collect();
    assert_eq!(depths, [Some(50), Some(98), Some(127)]);
}

#[test]
fn altered_keys_decode_nothing() {
    let mut wrong = KeyHistory::default();
    for epoch in 1..=3 {
        wrong.push(Entry {
            epoch,
            key: key(epoch) ^ 1 << 40,
            wall_ns: 0,
            mono_ns: 0,
        });
    }
    let records: Vec<_> = (0..100)
        .map(|seq| good(1 + u64::from(seq) / 34, seq, 1))
        .collect();
    let items = decode(&mut Decoder::new(TYPES, 1), &chunk(&records, None), &wrong);
    assert_eq!(items.len(), 100);
    assert!(items
        .iter()
        .all(|item| why(item) == Some(ForgedWhy::NotDecodable)));
}

#[test]
fn missing_records_are_counted_in_their_place() {
    for (gap, reason) in [
        (None, LostWhy::Overrun),
        (Some(Gap::Torn), LostWhy::Torn),
        (Some(Gap::HelperAbsent), LostWhy::HelperAbsent),
        (Some(Gap::NotStored), LostWhy::NotStored),
    ] {
        let mut decoder = Decoder::new(TYPES, 1);
        let first = decode(&mut decoder, &chunk(&[good(1, 2, 1)], None), &keys(1));
        assert_eq!(
            first[0],
            What::Lost(Lost {
                records: Some(2),
                why: LostWhy::Overrun
            })
        );
        let next = decode(
            &mut decoder,
            &chunk(&[good(1, 10, 1), good(1, 11, 1)], gap),
            &keys(1),
        );
        assert_eq!(
            next[0],
            What::Lost(Lost {
                records: Some(7),
                why: reason
            })
        );
        assert!(matches!(next[1..], [What::Call(_), What::Call(_)]));
    }
}

#[test]
fn numbers_wrap() {
    let mut decoder = Decoder::new(TYPES, 1);
    let before = chunk(&[good(1, u32::MAX - 1, 1)], None);
    decoder.resume_after(&before, &keys(1), &Code);
    let records = [good(1, u32::MAX, 1), good(1, 0, 1), good(1, 1, 1)];
    let items = decode(&mut decoder, &chunk(&records, None), &keys(1));
    assert!(matches!(
        items[..],
        [What::Call(_), What::Call(_), What::Call(_)]
    ));
}

#[test]
fn what_is_missing_after_a_chunk_decoded_elsewhere_is_counted() {
    let mut decoder = Decoder::new(TYPES, 1);
    let before = chunk(&[good(1, 500, 1), good(1, 501, 1)], None);
    decoder.resume_after(&before, &keys(1), &Code);
    let after = chunk(&[good(1, 510, 1)], Some(Gap::HelperAbsent));
    let items = decode(&mut decoder, &after, &keys(1));
    let lost = Lost {
        records: Some(8),
        why: LostWhy::HelperAbsent,
    };
    assert!(matches!(items[..], [What::Lost(found), What::Call(_)] if found == lost));
    // A CPU that left nothing had recorded nothing, or it is lost.
    let mut other = chunk(&[good(1, 3, 1)], None);
    other.cpu = 2;
    let items = decode(&mut decoder, &other, &keys(1));
    let lost = Lost {
        records: Some(3),
        why: LostWhy::Overrun,
    };
    assert_eq!(items[0], What::Lost(lost), "{items:?}");
}

proptest! {
    #[test]
    fn any_bytes_are_decoded_and_each_event_gives_one_item_at_least(
        bytes in proptest::collection::vec(any::<u8>(), 0..4096),
        page_time: u64,
        epochs in 0u64..5,
    ) {
        let chunk = Chunk { cpu: 0, page_time, offset: 0, bytes, gap: None };
        let items = decode(&mut Decoder::new(TYPES, 1), &chunk, &keys(epochs));
        let events = events(&chunk.bytes, Clock(page_time)).count();
        let lost = items.iter().filter(|item| matches!(item, What::Lost(_))).count();
        prop_assert_eq!(items.len() - lost, events);
    }

    #[test]
    fn a_flipped_bit_in_an_address_or_epoch_never_decodes(bit in 64u32..224) {
        let mut record = good(2, 0, 1);
        record[(bit / 8) as usize] ^= 1 << (bit % 8);
        let items = decode(&mut Decoder::new(TYPES, 1), &chunk(&[record], None), &keys(2));
        // A flip in the low bits of the caller gives another address in
        // the kernel: XOR alone cannot tell.
        let caller_low = (128..184).contains(&bit);
        prop_assert!(caller_low || why(&items[0]).is_some(), "{items:?}");
    }
}
