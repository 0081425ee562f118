//! The ring buffer of a synthetic guest, and a writer that follows the steps of
//! kernel/trace/ring_buffer.c, one store at a time.

use std::collections::VecDeque;

use xftrace::kernel::control::{RecordTypes, RingLayout};
use xftrace::kernel::Gva;
use xftrace::keys::{Entry, KeyHistory};
use xftrace::ram::{Gpa, VecRam};
use xftrace::ring::CodeMap;

use super::guest::DIRECT_MAP;

pub const KEY: u64 = 0x0123_4567_89ab_cdef;
pub const FUNC: u64 = 0xffff_ffff_8100_0100;
pub const TYPES: RecordTypes = RecordTypes {
    root: 20,
    call: 21,
    ret: 22,
    plain_call: 11,
    plain_ret: 10,
};
/// Bytes of records on a page.
pub const ROOM: u32 = 4080;
/// Where the structures and pages lie: above the image, below the end of RAM.
pub const BUFFERS: u64 = 0x180_0000;
pub const PER_CPU: u64 = 0x180_1000;
pub const HOLDERS: u64 = 0x180_2000;
pub const PAGES: u64 = 0x181_0000;

pub fn layout() -> RingLayout {
    RingLayout {
        buffer: Gva(DIRECT_MAP + BUFFERS),
        page_size: 4096,
        buffers: 64,
        nr_pages: 40,
        pages: 56,
        reader_page: 88,
        commit_page: 80,
        entries: 128,
        overrun: 136,
        commit_overrun: 144,
        dropped: 152,
        list: 0,
        page: 48,
        time_stamp: 0,
        commit: 8,
        data: 16,
    }
}

/// The guest's side: what its kernel would store, store by store.
pub struct Writer {
    pub base: u64,
    /// The pages of the ring, in its order; the places below are places in it.
    pub ring: Vec<u64>,
    /// The page outside.
    reader: u64,
    tail: usize,
    /// The oldest page that no reader of the guest has taken.
    head: usize,
    overrun: u64,
    at: u32,
    pub time: u64,
    last_time: u64,
    pub seq: u32,
    pub stores: VecDeque<(Gpa, Vec<u8>)>,
}

impl Writer {
    fn page(&self, index: u64) -> Gpa {
        Gpa(self.base + PAGES + 4096 * index)
    }

    fn holder(&self, index: u64) -> u64 {
        self.base + HOLDERS + 64 * index
    }

    fn per_cpu(&self, field: u64) -> u64 {
        self.base + PER_CPU + field
    }

    /// The structures of an empty buffer of one CPU: page 0 is the tail, and
    /// page `nr_pages` is the reader's.
    pub fn new(nr_pages: u64) -> Self {
        Self::at(0, nr_pages)
    }

    /// The same of a second buffer, all of it that much further on.
    pub fn at(base: u64, nr_pages: u64) -> Self {
        let mut writer = Self {
            base,
            ring: (0..nr_pages).collect(),
            reader: nr_pages,
            tail: 0,
            head: 0,
            overrun: 0,
            at: 0,
            time: 1_000_000,
            last_time: 0,
            seq: 0,
            stores: VecDeque::new(),
        };
        let gva = |at: u64| DIRECT_MAP + at;
        writer.word(base + BUFFERS + 64, gva(base + BUFFERS + 0x100));
        writer.word(base + BUFFERS + 0x100, gva(writer.per_cpu(0)));
        writer.word(writer.per_cpu(40), nr_pages);
        writer.word(writer.per_cpu(56), gva(writer.holder(0)));
        writer.word(writer.per_cpu(88), gva(writer.holder(nr_pages)));
        writer.word(writer.per_cpu(80), gva(writer.holder(0)));
        for index in 0..=nr_pages {
            // A flag in the low bits, as RB_PAGE_HEAD is.
            let next = gva(writer.holder((index + 1) % nr_pages)) | u64::from(index == 1);
            writer.word(writer.holder(index), next);
            writer.word(writer.holder(index) + 48, gva(writer.page(index).0));
            writer.word(writer.page(index).0, 0);
            writer.word(writer.page(index).0 + 8, 0);
        }
        writer
    }

    fn word(&mut self, at: u64, value: u64) {
        self.stores
            .push_back((Gpa(at), value.to_le_bytes().to_vec()));
    }

    fn bytes(&mut self, at: u64, bytes: Vec<u8>) {
        self.stores.push_back((Gpa(at), bytes));
    }

    /// One call of the tracer: reserve, fill, commit.
    pub fn record(&mut self, advance: u64) {
        self.time += advance;
        let mut payload = Vec::new();
        payload.extend(21u16.to_le_bytes());
        payload.extend([0, 0]);
        payload.extend(77i32.to_le_bytes());
        payload.extend((FUNC ^ KEY).to_le_bytes());
        payload.extend((0xffff_ffff_8100_0242 ^ KEY).to_le_bytes());
        payload.extend(1u32.to_le_bytes());
        payload.extend(self.seq.to_le_bytes());
        payload.extend(1i32.to_le_bytes());
        payload.extend(77i32.to_le_bytes());
        let length = 4 + payload.len() as u32;
        if self.at + length > ROOM {
            // rb_reset_tail(): the rest is a discarded event.
            let at = self.page(self.ring[self.tail]).0 + 16 + u64::from(self.at);
            let left = ROOM - self.at;
            if left > 8 {
                self.bytes(at, (29u32 | 1 << 5).to_le_bytes().to_vec());
                self.bytes(at + 4, (left - 4).to_le_bytes().to_vec());
                self.at = ROOM;
            } else if left > 0 {
                self.bytes(at, 29u32.to_le_bytes().to_vec());
            }
            // rb_tail_page_update()
            let full = (self.ring[self.tail], self.at);
            self.tail = (self.tail + 1) % self.ring.len();
            if self.tail == self.head {
                self.head = (self.head + 1) % self.ring.len();
                // rb_handle_head_page(), which counts records.
                self.overrun += 1;
                self.word(self.per_cpu(136), self.overrun);
            }
            self.at = 0;
            self.word(self.page(self.ring[self.tail]).0 + 8, 0);
            self.fill(payload, length);
            self.count();
            // rb_set_commit_to_write(): the full page first, then the pointer.
            self.word(self.page(full.0).0 + 8, full.1.into());
            let holder = self.holder(self.ring[self.tail]);
            self.word(self.per_cpu(80), DIRECT_MAP + holder);
        } else {
            self.fill(payload, length);
            self.count();
        }
        self.word(self.page(self.ring[self.tail]).0 + 8, self.at.into());
        self.seq += 1;
    }

    /// rb_commit() counts a record before it is committed.
    fn count(&mut self) {
        self.word(self.per_cpu(128), u64::from(self.seq) + 1);
    }

    fn fill(&mut self, payload: Vec<u8>, length: u32) {
        let page = self.page(self.ring[self.tail]).0;
        let at = page + 16 + u64::from(self.at);
        let delta = if self.at == 0 {
            0
        } else {
            self.time - self.last_time
        };
        self.bytes(
            at,
            ((payload.len() as u32 / 4) | (delta as u32) << 5)
                .to_le_bytes()
                .to_vec(),
        );
        if self.at == 0 {
            self.word(page, self.time);
        }
        for (words, part) in payload.chunks(8).enumerate() {
            self.bytes(at + 4 + 8 * words as u64, part.to_vec());
        }
        self.last_time = self.time;
        self.at += length;
    }

    /// A reader in the guest takes the oldest page, and puts the one that it
    /// had in its place: rb_get_reader_page().
    pub fn take_page(&mut self) {
        let places = self.ring.len();
        if self.head == self.tail {
            return;
        }
        let holders = self.holder(0);
        let gva = |index: u64| DIRECT_MAP + holders + 64 * index;
        let before = self.ring[(self.head + places - 1) % places];
        let after = self.ring[(self.head + 1) % places];
        self.word(self.page(self.reader).0 + 8, 0);
        self.word(self.holder(self.reader), gva(after) | 1);
        self.word(self.per_cpu(56), gva(before));
        self.word(self.holder(before), gva(self.reader));
        std::mem::swap(&mut self.ring[self.head], &mut self.reader);
        self.word(self.per_cpu(88), gva(self.reader));
        self.head = (self.head + 1) % places;
    }

    /// All stores that are yet to be made.
    pub fn settle(&mut self, ram: &VecRam) {
        while !self.stores.is_empty() {
            self.step(ram);
        }
    }

    pub fn step(&mut self, ram: &VecRam) {
        if let Some((at, bytes)) = self.stores.pop_front() {
            ram.poke(at, &bytes);
        }
    }
}

/// A kernel of one function.
pub struct Code;

impl CodeMap for Code {
    fn is_function(&self, at: Gva) -> bool {
        at.0 == FUNC
    }
}

/// The one key that there was.
pub fn keys() -> KeyHistory {
    let mut keys = KeyHistory::default();
    keys.push(Entry {
        epoch: 1,
        key: KEY,
        wall_ns: 0,
        mono_ns: 0,
    });
    keys
}
