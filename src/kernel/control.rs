//! The page through which the host and a guest kernel with CONFIG_XFTRACE
//! meet: `struct xftrace_control` and `struct xftrace_keys` of
//! `include/linux/xftrace.h`, as guest-kernel-patches adds it.
//!
//! What the guest tells here is a claim. The parts that do not change after
//! boot are copied once and checked for what they could break further down
//! ([`Ident`], [`RingLayout`]); the rest ([`Heartbeat`]) is copied at each
//! look and believed in nothing but what it says of the guest itself.

use crate::ram::{Gpa, GuestRam, RamError};

use super::{Gva, Kernel, Symbols};

/// `XFTRACE_MAGIC`: `"__XFTRC1"`.
pub const MAGIC: u64 = 0x3143_5254_4658_5f5f;
/// The version of the interface that this program speaks, `XFTRACE_ABI`.
pub const ABI: u32 = 1;

/// Offsets in `struct xftrace_control`, bytes.
mod at {
    pub(super) const MAGIC: u64 = 0x00;
    pub(super) const RING: u64 = 0x40;
    pub(super) const GUEST: u64 = 0x80;
    pub(super) const BOOT_ID: u64 = 0x10;
    pub(super) const HOST_SEQ: u64 = 0x100;
    pub(super) const HOST_COMMAND: u64 = 0x104;
    pub(super) const HOST_NR: u64 = 0x108;
    pub(super) const HOST_BUFFER_KB: u64 = 0x10c;
    pub(super) const HOST_FUNCTIONS: u64 = 0x110;
}

/// The most functions of which the guest's page has room at all, whatever it
/// claims: it is one page.
const FUNCTIONS_CEILING: u32 = (4096 - at::HOST_FUNCTIONS as u32) / 8;

/// Why there is no control block to work with.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The kernel was built without the patch.
    #[error(
        "the guest's kernel has no xftrace_control: it was built without CONFIG_XFTRACE; \
         boot a kernel with the patches of guest-kernel-patches applied, and give its System.map"
    )]
    NotPatched,
    /// The kernel has not come to `late_initcall` yet.
    #[error("the guest's kernel has not set up its control block yet: it is still booting")]
    NotReady,
    /// Another version of the interface.
    #[error("the guest's kernel speaks version {found} of the xftrace interface, this program version {ABI}; use a matching pair")]
    OtherAbi {
        /// What the guest's kernel claims to speak.
        found: u32,
    },
    /// A field that no real kernel would give.
    #[error("the guest's control block cannot be right: {field} is {value:#x}; System.map of another kernel, or memory changed by the guest")]
    Implausible {
        /// The field's name in `include/linux/xftrace.h`.
        field: &'static str,
        /// What it holds.
        value: u64,
    },
    /// Guest memory could not be read.
    #[error(transparent)]
    Ram(#[from] RamError),
}

/// `struct xftrace_ident`: what the guest's kernel offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ident {
    /// Random, another one at each boot.
    pub boot_id: u64,
    /// How many key slots there are; a power of two.
    pub key_slots: u32,
    /// The most functions that one command can name.
    pub max_functions: u32,
    /// How many CPUs the guest's kernel can have.
    pub nr_cpus: u32,
    /// The numbers of the record types.
    pub types: RecordTypes,
}

/// The type numbers (`struct trace_entry`) of the records to decode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct RecordTypes {
    /// `struct xftrace_root_entry`: a call of depth 0, with the task's name.
    pub root: u16,
    /// `struct xftrace_call_entry`.
    pub call: u16,
    /// `struct xftrace_return_entry`.
    pub ret: u16,
    /// `struct ftrace_graph_ent_entry`, which is not keyed.
    pub plain_call: u16,
    /// `struct ftrace_graph_ret_entry`, which is not keyed.
    pub plain_ret: u16,
}

/// `struct xftrace_ring`: where things are in the guest's ring buffer
/// (kernel/trace/ring_buffer.c). Offsets are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingLayout {
    /// Address of the `struct trace_buffer`.
    pub buffer: Gva,
    /// Size of a sub-buffer with its header.
    pub page_size: u32,
    /// In `struct trace_buffer`: pointer to the per-CPU pointers.
    pub buffers: u16,
    /// In `struct ring_buffer_per_cpu`, as all up to `dropped`.
    pub nr_pages: u16,
    /// A `list_head` in the ring of `struct buffer_page`.
    pub pages: u16,
    /// The page that is outside the ring.
    pub reader_page: u16,
    /// The page that is being written.
    pub commit_page: u16,
    /// Count of records in the buffer.
    pub entries: u16,
    /// Count of records overwritten.
    pub overrun: u16,
    /// Count of records lost because the ring was full of open ones.
    pub commit_overrun: u16,
    /// Count of records lost because the ring does not overwrite.
    pub dropped: u16,
    /// In `struct buffer_page`: its `list_head`.
    pub list: u16,
    /// In `struct buffer_page`: pointer to its sub-buffer.
    pub page: u16,
    /// In a sub-buffer: time of its first record.
    pub time_stamp: u16,
    /// In a sub-buffer: bytes of records in it.
    pub commit: u16,
    /// In a sub-buffer: the records.
    pub data: u16,
}

/// What the guest's kernel says of its switch, `enum xftrace_state`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SwitchState {
    /// Tracer nop.
    Off,
    /// Tracer function_graph, records keyed.
    On,
    /// Nothing is recorded any more; what was waits to be read.
    Stopped,
    /// A number that no kernel gives.
    Unknown(u32),
}

/// `struct xftrace_guest`: one look at what the guest's kernel tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heartbeat {
    /// Grows at each look of the guest at its page.
    pub beats: u64,
    /// The trace clock at that look, nanoseconds.
    pub clock: u64,
    /// The last command that the guest took up.
    pub seen_seq: u32,
    /// The last command that it finished.
    pub ack_seq: u32,
    /// What came of that: 0, or a negative errno.
    pub error: i32,
    /// The function at fault, an index, where `error` is -ENOENT.
    pub error_index: u32,
    /// What its switch is set to.
    pub state: SwitchState,
    /// Whether function_graph is its current tracer.
    pub tracer: bool,
    /// Whether its ring buffer takes records.
    pub recording: bool,
    /// When `seen_seq` was taken up, trace clock, nanoseconds.
    pub seen_clock: u64,
    /// When `ack_seq` was finished, trace clock, nanoseconds.
    pub ack_clock: u64,
}

/// The control block of a kernel that was found, and what does not change in
/// it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Control {
    base: Gpa,
    keys: Gpa,
    /// What the kernel offers.
    pub ident: Ident,
    /// How its ring buffer is laid out.
    pub ring: RingLayout,
}

impl Control {
    /// Finds the control block of `kernel` by its symbols, and checks it.
    ///
    /// # Errors
    /// See [`ControlError`]; [`ControlError::NotReady`] is worth another try
    /// later.
    pub fn attach(
        ram: &dyn GuestRam,
        kernel: &Kernel,
        symbols: &Symbols,
    ) -> Result<Self, ControlError> {
        let (Some(control), Some(keys)) = (
            symbols.address("xftrace_control"),
            symbols.address("global_key"),
        ) else {
            return Err(ControlError::NotPatched);
        };
        let base = kernel.image_gpa(control);
        if ram.read_u64(Gpa(base.0.wrapping_add(at::MAGIC)))? != MAGIC {
            return Err(ControlError::NotReady);
        }
        let mut page = [0u8; 0x80];
        ram.read(base, &mut page)?;
        let ident = ident(&page, kernel.runtime(keys))?;
        let ring = ring_layout(&page)?;
        Ok(Self {
            base,
            keys: kernel.image_gpa(keys),
            ident,
            ring,
        })
    }

    /// The boot id and the beats of a kernel that may have a control block,
    /// where it has one: what it takes to see whether it lives.
    ///
    /// # Errors
    /// If guest memory cannot be read.
    pub fn vitals(
        ram: &dyn GuestRam,
        kernel: &Kernel,
        symbols: &Symbols,
    ) -> Result<Option<(u64, u64)>, RamError> {
        let link = symbols.address("xftrace_control");
        let Some(link) = link.filter(|&link| kernel.in_image(link)) else {
            return Ok(None);
        };
        let word = |offset| ram.read_u64(Gpa(kernel.image_gpa(link).0.wrapping_add(offset)));
        if word(at::MAGIC)? != MAGIC {
            return Ok(None);
        }
        Ok(Some((word(at::BOOT_ID)?, word(at::GUEST)?)))
    }

    /// Where `global_key` lies: the epoch (u64), then the slots (u64 each).
    pub fn keys(&self) -> Gpa {
        self.keys
    }

    /// The boot id as it stands in guest memory now.
    ///
    /// # Errors
    /// If guest memory cannot be read.
    pub fn boot_id_now(&self, ram: &dyn GuestRam) -> Result<u64, RamError> {
        ram.read_u64(self.field(at::BOOT_ID))
    }

    /// The `struct trace_buffer` that is recorded into now: a snapshot in the
    /// guest swaps it for another.
    ///
    /// # Errors
    /// If guest memory cannot be read.
    pub fn buffer_now(&self, ram: &dyn GuestRam) -> Result<Gva, RamError> {
        ram.read_u64(self.field(at::RING)).map(Gva)
    }

    /// Looks at what the guest's kernel tells of itself now.
    ///
    /// # Errors
    /// If guest memory cannot be read.
    pub fn heartbeat(&self, ram: &dyn GuestRam) -> Result<Heartbeat, RamError> {
        // Each field is one load. `beats` and `ack_seq` are what the guest
        // writes last, so they are what is read first.
        let u64_at = |offset| ram.read_u64(self.field(at::GUEST + offset));
        let u32_at = |offset| ram.read_u32(self.field(at::GUEST + offset));
        let beats = u64_at(0)?;
        let ack_seq = u32_at(20)?;
        let seen_seq = u32_at(16)?;
        let flags = u32_at(36)?;
        Ok(Heartbeat {
            beats,
            clock: u64_at(8)?,
            seen_seq,
            ack_seq,
            error: u32_at(24)? as i32,
            error_index: u32_at(28)?,
            state: match u32_at(32)? {
                0 => SwitchState::Off,
                1 => SwitchState::On,
                2 => SwitchState::Stopped,
                other => SwitchState::Unknown(other),
            },
            tracer: flags & 1 != 0,
            recording: flags & 2 != 0,
            seen_clock: u64_at(40)?,
            ack_clock: u64_at(48)?,
        })
    }

    /// The number of the command that was written last.
    ///
    /// # Errors
    /// If guest memory cannot be read.
    pub fn last_command(&self, ram: &dyn GuestRam) -> Result<u32, RamError> {
        ram.read_u32(self.field(at::HOST_SEQ))
    }

    /// Writes a command into the host's part of the page, its number last.
    /// `functions` beyond what the page has room for are refused by the
    /// caller, who knows [`Ident::max_functions`].
    ///
    /// While it writes, the number there is `seen`, that of the command which
    /// the guest took up last: a guest that was about to take up an older
    /// command, which nobody waits for any more, sees the number change and
    /// takes none.
    ///
    /// # Errors
    /// If guest memory cannot be written.
    pub fn write_command(
        &self,
        ram: &dyn GuestRam,
        seen: u32,
        seq: u32,
        command: u32,
        buffer_kb: u32,
        functions: &[Gva],
    ) -> Result<(), RamError> {
        ram.write_u32(self.field(at::HOST_SEQ), seen)?;
        for (slot, function) in (0u64..).zip(functions) {
            ram.write_u64(self.field(at::HOST_FUNCTIONS + 8 * slot), function.0)?;
        }
        ram.write_u32(self.field(at::HOST_COMMAND), command)?;
        ram.write_u32(self.field(at::HOST_NR), functions.len() as u32)?;
        ram.write_u32(self.field(at::HOST_BUFFER_KB), buffer_kb)?;
        ram.write_u32(self.field(at::HOST_SEQ), seq)
    }

    /// Takes back the command that was written last: the number there is `seen`
    /// again, that of the command which the guest took up last.
    ///
    /// # Errors
    /// If guest memory cannot be written.
    pub fn withdraw_command(&self, ram: &dyn GuestRam, seen: u32) -> Result<(), RamError> {
        ram.write_u32(self.field(at::HOST_SEQ), seen)
    }

    fn field(&self, offset: u64) -> Gpa {
        Gpa(self.base.0.wrapping_add(offset))
    }
}

#[cfg(test)]
impl Control {
    /// A control block at `base`, for tests of what is asked and written there.
    pub(crate) fn for_tests(base: Gpa, max_functions: u32) -> Self {
        let types = RecordTypes {
            root: 20,
            call: 21,
            ret: 22,
            plain_call: 11,
            plain_ret: 10,
        };
        Self {
            base,
            keys: base,
            ident: Ident {
                boot_id: 1,
                key_slots: 64,
                max_functions,
                nr_cpus: 1,
                types,
            },
            ring: RingLayout {
                buffer: Gva(0),
                page_size: 4096,
                buffers: 0,
                nr_pages: 0,
                pages: 0,
                reader_page: 0,
                commit_page: 0,
                entries: 0,
                overrun: 0,
                commit_overrun: 0,
                dropped: 0,
                list: 0,
                page: 0,
                time_stamp: 0,
                commit: 8,
                data: 16,
            },
        }
    }
}

/// Little-endian fields of a copied block; reads past its end give 0.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn u64(&self, offset: usize) -> u64 {
        self.bytes(offset).map_or(0, u64::from_le_bytes)
    }

    fn u32(&self, offset: usize) -> u32 {
        self.bytes(offset).map_or(0, u32::from_le_bytes)
    }

    fn u16(&self, offset: usize) -> u16 {
        self.bytes(offset).map_or(0, u16::from_le_bytes)
    }

    fn bytes<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.0.get(offset..)?.first_chunk().copied()
    }
}

/// Refuses `value` unless `good`.
fn plausible(field: &'static str, value: u64, good: bool) -> Result<(), ControlError> {
    if good {
        Ok(())
    } else {
        Err(ControlError::Implausible { field, value })
    }
}

fn ident(page: &[u8], keys: Gva) -> Result<Ident, ControlError> {
    let fields = Fields(page);
    let abi = fields.u32(8);
    if abi != ABI {
        return Err(ControlError::OtherAbi { found: abi });
    }
    let ident = Ident {
        boot_id: fields.u64(16),
        key_slots: fields.u32(24),
        max_functions: fields.u32(28),
        nr_cpus: fields.u32(40),
        types: RecordTypes {
            root: fields.u16(44),
            call: fields.u16(46),
            ret: fields.u16(48),
            plain_call: fields.u16(50),
            plain_ret: fields.u16(52),
        },
    };
    let slots = ident.key_slots;
    plausible(
        "key_slots",
        slots.into(),
        slots.is_power_of_two() && (4..=256).contains(&slots),
    )?;
    let functions = ident.max_functions;
    plausible(
        "max_functions",
        functions.into(),
        (1..=FUNCTIONS_CEILING).contains(&functions),
    )?;
    // Two independent ways to the same address: the guest's own pointer, and
    // System.map with the slide that was found.
    plausible("keys", fields.u64(32), fields.u64(32) == keys.0)?;
    // CONFIG_NR_CPUS goes up to 8192 on x86-64.
    plausible(
        "nr_cpus",
        ident.nr_cpus.into(),
        (1..=8192).contains(&ident.nr_cpus),
    )?;
    Ok(ident)
}

fn ring_layout(page: &[u8]) -> Result<RingLayout, ControlError> {
    let fields = Fields(page.get(at::RING as usize..).unwrap_or_default());
    let layout = RingLayout {
        buffer: Gva(fields.u64(0)),
        page_size: fields.u32(8),
        buffers: fields.u16(12),
        nr_pages: fields.u16(14),
        pages: fields.u16(16),
        reader_page: fields.u16(18),
        commit_page: fields.u16(20),
        entries: fields.u16(22),
        overrun: fields.u16(24),
        commit_overrun: fields.u16(26),
        dropped: fields.u16(28),
        list: fields.u16(30),
        page: fields.u16(32),
        time_stamp: fields.u16(34),
        commit: fields.u16(36),
        data: fields.u16(38),
    };
    let size = layout.page_size;
    plausible(
        "page_size",
        size.into(),
        size.is_power_of_two() && (4096..=65536).contains(&size),
    )?;
    plausible("buffer", layout.buffer.0, layout.buffer.0 % 8 == 0)?;
    // Every field is a word of its own in its structure.
    for (name, offset) in [
        ("buffers", layout.buffers),
        ("nr_pages", layout.nr_pages),
        ("pages", layout.pages),
        ("reader_page", layout.reader_page),
        ("commit_page", layout.commit_page),
        ("entries", layout.entries),
        ("overrun", layout.overrun),
        ("commit_overrun", layout.commit_overrun),
        ("dropped", layout.dropped),
        ("list", layout.list),
        ("page", layout.page),
        ("time_stamp", layout.time_stamp),
        ("commit", layout.commit),
        ("data", layout.data),
    ] {
        plausible(name, offset.into(), offset % 8 == 0 && offset < 4096)?;
    }
    Ok(layout)
}
