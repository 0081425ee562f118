//! A session that grows, as a helper would have it.

use std::path::{Path, PathBuf};

use tempfile::TempDir;
use uuid::Uuid;
use xftrace::kernel::control::RecordTypes;
use xftrace::kernel::Symbols;
use xftrace::keys::{Entry, Klog};
use xftrace::ring::{Chunk, RecordFormat};
use xftrace::session::{
    Boot, ClockPair, Counters, EndReason, Meta, Mode, QemuProcess, SessionWriter, State, KLOG_FILE,
};

/// The symbols of a kernel whose functions lie `shift` further on.
fn symbols(shift: u64) -> Symbols {
    let text = format!(
        "\
ffffffff81000000 T _text
ffffffff81000000 T _stext
{:x} T __x64_sys_read
{:x} T vfs_read
{:x} T do_syscall_64
ffffffff81004000 T _etext
ffffffff81600000 D _end
",
        SYS_READ + shift,
        VFS_READ + shift,
        SYSCALL - 0x10 + shift
    );
    Symbols::parse(text.into()).expect("symbols")
}

const SYS_READ: u64 = 0xffff_ffff_8100_1000;
const VFS_READ: u64 = 0xffff_ffff_8100_2000;
const SYSCALL: u64 = 0xffff_ffff_8100_3010;

const TYPES: RecordTypes = RecordTypes {
    root: 20,
    call: 21,
    ret: 22,
    plain_call: 11,
    plain_ret: 10,
};

/// The host's time when the clock of a boot shows 0: 2026-01-31 12:00:00.
const NOON: u64 = 1_769_860_800_000_000_000;
/// A time of the guest's clock that the host's first look at it was at.
pub(crate) const PAIRED: u64 = 1_000_000_000;

pub(crate) struct Growing {
    _temp: TempDir,
    pub(crate) writer: SessionWriter,
    klog: Klog,
    /// The number of each CPU's next record.
    seqs: [u32; 16],
    /// Where the functions of the kernel that runs lie.
    shift: u64,
}

/// A record, and what it says.
#[derive(Clone, Copy)]
pub(crate) enum Record {
    /// Of another tracer, with a type of its own.
    Other(u16),
    /// `__x64_sys_read` is entered.
    Root,
    /// And calls `vfs_read`.
    Call,
    /// That returns.
    Return,
    /// And so does the root.
    RootReturn,
    /// A call under no key.
    Forged,
}

impl Growing {
    /// With one boot, whose clock is not known, and one key.
    pub(crate) fn new(cpus: u32) -> Self {
        let temp = tempfile::tempdir().expect("a directory");
        let dir = temp.path().join("session");
        let writer = SessionWriter::create(&dir, meta()).expect("a session");
        let klog = Klog::create(&dir.join(KLOG_FILE)).expect("a key log");
        let mut growing = Self {
            _temp: temp,
            writer,
            klog,
            seqs: [0; 16],
            shift: 0,
        };
        growing.rotate();
        growing.boot(cpus);
        growing
    }

    pub(crate) fn dir(&self) -> &Path {
        self.writer.dir()
    }

    pub(crate) fn ring(&self, boot: u32, cpu: u16) -> PathBuf {
        self.dir().join(format!("ring/boot{boot}-cpu{cpu}"))
    }

    /// The next boot, of a kernel of its own, whose functions lie `shift`
    /// further on.
    pub(crate) fn boot_other(&mut self, cpus: u32, shift: u64) {
        self.shift = shift;
        self.boot(cpus);
    }

    /// The next boot, as the helper begins it.
    pub(crate) fn boot(&mut self, cpus: u32) {
        self.writer.end_boot();
        self.seqs = [0; 16];
        let number = self.writer.meta.boots.len() as u32 + 1;
        let symbols = self
            .writer
            .store_symbols(&symbols(self.shift), slide(number))
            .expect("room on the disk");
        self.writer.meta.boots.push(Boot {
            number,
            boot_id: number.into(),
            banner: "Linux version 6.1.0-test".into(),
            symbols,
            slide: slide(number),
            phys_text: 0x100_0000,
            levels: 4,
            nr_cpus: cpus,
            types: RecordFormat::Keyed(TYPES),
            found_ns: 0,
            clocks: None,
        });
        self.save();
    }

    /// The host has had its first look at the newest boot's clock.
    pub(crate) fn pair(&mut self) {
        let pair = ClockPair {
            guest_ns: PAIRED,
            host_ns: NOON + PAIRED,
        };
        let boot = self.writer.meta.boots.last_mut().expect("a boot");
        boot.clocks = Some((pair, pair));
        self.save();
    }

    /// Hands out the next key.
    pub(crate) fn rotate(&mut self) {
        let epoch = self.klog.last_epoch() + 1;
        let entry = Entry {
            epoch,
            key: key(epoch),
            wall_ns: 0,
            mono_ns: 0,
        };
        self.klog.append(&entry).expect("a key");
    }

    /// A chunk of one record.
    pub(crate) fn add(&mut self, cpu: u16, time: u64, record: Record) {
        self.add_all(cpu, &[(time, record)]);
    }

    /// A chunk of several, not further than 100 ms from each other.
    pub(crate) fn add_all(&mut self, cpu: u16, records: &[(u64, Record)]) {
        let page_time = records[0].0;
        let mut before = page_time;
        let mut bytes = Vec::new();
        for &(time, record) in records {
            let payload = self.payload(cpu, record);
            let words = (payload.len() / 4) as u32;
            bytes.extend((words | ((time - before) as u32) << 5).to_le_bytes());
            bytes.extend(payload);
            before = time;
        }
        let chunk = Chunk {
            cpu,
            page_time,
            offset: 0,
            bytes,
            gap: None,
        };
        self.writer.append(&chunk, 0).expect("room on the disk");
        self.writer.sync().expect("room on the disk");
    }

    fn payload(&mut self, cpu: u16, record: Record) -> Vec<u8> {
        let (kind, depth, func, caller) = match record {
            Record::Other(kind) => return [kind.to_le_bytes(), [0; 2]].concat(),
            Record::Root => (TYPES.root, 0, SYS_READ, SYSCALL),
            Record::Call => (TYPES.call, 1, VFS_READ, SYS_READ + 0x10),
            Record::Forged => (TYPES.call, 1, VFS_READ + 8, SYS_READ + 0x10),
            Record::Return => (TYPES.ret, 1, VFS_READ, SYS_READ + 0x10),
            Record::RootReturn => (TYPES.ret, 0, SYS_READ, SYSCALL),
        };
        let epoch = self.klog.last_epoch();
        let moved = self.shift + slide(self.writer.meta.boots.len() as u32);
        let seq = &mut self.seqs[usize::from(cpu)];
        // Corresponds to struct xftrace_call_entry and those that begin like it.
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend([0; 2]);
        bytes.extend((100 + i32::from(cpu)).to_le_bytes());
        bytes.extend(((func + moved) ^ key(epoch)).to_le_bytes());
        bytes.extend(((caller + moved) ^ key(epoch)).to_le_bytes());
        bytes.extend((epoch as u32).to_le_bytes());
        bytes.extend(seq.to_le_bytes());
        bytes.extend(i32::to_le_bytes(depth));
        bytes.extend([0; 4]);
        // Who has no key has no number of the guest's kernel either.
        *seq += u32::from(!matches!(record, Record::Forged));
        match record {
            Record::Root => bytes.extend(*b"cat\0............"),
            Record::Return | Record::RootReturn => {
                bytes.extend(1000u64.to_le_bytes());
                bytes.extend(1500u64.to_le_bytes());
            }
            _ => {}
        }
        bytes
    }

    /// The guest's next records on this CPU are lost.
    pub(crate) fn skip(&mut self, cpu: u16, records: u32) {
        self.seqs[usize::from(cpu)] += records;
    }

    /// Ends the session, as the helper does.
    pub(crate) fn close(&mut self) {
        let meta = &mut self.writer.meta;
        meta.state = State::Closed;
        meta.ended_ns = Some(NOON);
        meta.end = Some(EndReason::Off);
        self.save();
    }

    pub(crate) fn save(&mut self) {
        self.writer.save().expect("a session.json");
        self.writer.sync().expect("room on the disk");
    }
}

/// Each boot has its kernel elsewhere.
fn slide(boot: u32) -> u64 {
    u64::from(boot - 1) * 0x20_0000
}

fn key(epoch: u64) -> u64 {
    epoch.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn meta() -> Meta {
    Meta {
        version: 1,
        domain: "web-1".into(),
        uuid: Uuid::from_u128(1),
        mode: Mode::Keyed,
        state: State::Open,
        qemu: QemuProcess {
            pid: 1,
            start_time: 1,
        },
        started_ns: NOON,
        ended_ns: None,
        end: None,
        interval_ns: 1_000_000_000,
        switches: Vec::new(),
        boots: Vec::new(),
        counters: Counters::default(),
        guest_counts: None,
    }
}
