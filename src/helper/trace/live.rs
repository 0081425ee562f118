//! What a trace keeps of the boot that is on, and what it asks of it.

use crate::kernel::btf::Btf;
use crate::kernel::control::SwitchState;
use crate::kernel::stock::TraceArray;
use crate::kernel::Online;
use crate::ram::GuestRam;
use crate::ring::{Decoder, RingReader};

use super::super::clocks::Clocks;
use super::super::link::Link;
use super::super::watch::{Guest, Watch};
use super::gates::Gates;
use super::modules::Modules;
use super::{Trace, TraceError};

/// What belongs to one boot of the guest.
pub(super) struct Live {
    pub(super) guest: Guest,
    pub(super) reader: RingReader,
    pub(super) decoder: Decoder,
    /// In plain mode.
    pub(super) plain: Option<Plain>,
    /// The guest's own list of modules, where it can be found.
    pub(super) modules: Option<Modules>,
    /// What keeps records out of the ring.
    pub(super) gates: Gates,
    /// Which CPUs are online.
    pub(super) online: Option<Online>,
}

/// What is kept of a kernel without the patch while it is traced.
pub(super) struct Plain {
    array: TraceArray,
    /// What recording was switched to.
    recording: bool,
    /// Its trace clock, as its newest records have it.
    pub(super) clocks: Clocks,
}

impl Live {
    /// Of a kernel whose ring buffer `reader` reads; in plain mode it is that of `array`.
    pub(super) fn new(
        ram: &dyn GuestRam,
        guest: &Guest,
        reader: RingReader,
        array: Option<TraceArray>,
        decoder: Decoder,
    ) -> Self {
        let btf = Btf::of(ram, &guest.kernel, &guest.symbols);
        Self {
            gates: Gates::of(guest, btf.as_ref(), array.as_ref()),
            modules: Modules::of(guest, btf.as_ref()),
            online: Online::of(&guest.kernel, &guest.symbols),
            guest: guest.clone(),
            reader,
            decoder,
            plain: array.map(Plain::new),
        }
    }
}

impl Plain {
    fn new(array: TraceArray) -> Self {
        Self {
            array,
            recording: false,
            clocks: Clocks::default(),
        }
    }
}

impl Trace {
    /// Has the sentry judge what it was given, with what it has to know of the CPUs.
    pub(super) fn end_round(&mut self) {
        let Some(sentry) = &mut self.judging.sentry else {
            return;
        };
        let live = self.live.as_ref();
        let offline = live.and_then(|live| {
            let cpus = live.reader.nr_cpus();
            live.online?.offline(&*self.ram, cpus).ok()
        });
        if let Some(offline) = offline {
            sentry.offline(offline);
        }
        sentry.end_round();
    }

    /// In plain mode, the trace begins here: what the guest recorded since its
    /// boot is older.
    pub(super) fn begin_plain(&mut self) -> Result<(), TraceError> {
        self.record(false)?;
        let Some(live) = &mut self.live else {
            return Ok(());
        };
        let mut earlier = Vec::new();
        live.reader
            .begin_here(&*self.ram, &mut |chunk| earlier.push(chunk))?;
        if let Some(counts) = &mut self.writer.meta.guest_counts {
            counts.begin(live.reader.written(&*self.ram));
        }
        self.held.push(earlier);
        // Older than the trace, and of a kernel that lives.
        self.take_all();
        Ok(())
    }

    /// In plain mode, has the guest's ring take records, or not.
    pub(in crate::helper) fn record(&mut self, on: bool) -> Result<(), TraceError> {
        if let Some(plain) = self.live.as_mut().and_then(|live| live.plain.as_mut()) {
            plain.array.record(&*self.ram, on)?;
            plain.recording = on;
        }
        Ok(())
    }

    /// Whether the guest's tracer still is what was switched on, and whether
    /// its ring takes records; `None` if that cannot be told now. To be asked
    /// only while the guest is wanted on.
    pub(in crate::helper) fn tracing(&self, watch: &Watch) -> Option<(bool, bool)> {
        let live = self.live.as_ref()?;
        if let (Link::Plain(stock), Some(plain)) = (&live.guest.link, &live.plain) {
            let tracer = stock.still_traces(&*self.ram, &plain.array).ok()?;
            let recording = plain.array.recording(&*self.ram).ok()?;
            return plain.recording.then_some((tracer, recording));
        }
        let beat = watch.heartbeat()?;
        let tracer = beat.tracer && beat.state != SwitchState::Off;
        let recording = beat.recording && beat.state == SwitchState::On;
        (!watch.busy()).then_some((tracer, recording))
    }
}
