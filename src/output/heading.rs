//! What the head of an output file says beside the counters.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::wall::WallClock;
use crate::session::{Boot, Counters, EndReason, Mode, Session, State};

/// What is known of a session; whoever opens the session fills it in.
#[derive(Clone, Debug)]
pub struct Heading {
    /// The domain's name.
    pub domain: String,
    /// The domain's UUID, where there is a domain.
    pub uuid: Option<uuid::Uuid>,
    /// The session's name or directory.
    pub session: String,
    /// How the records are vouched for.
    pub mode: Mode,
    /// The guest's boots, in order.
    pub boots: Vec<BootHeading>,
    /// The functions that were asked for.
    pub functions: Vec<String>,
    /// When tracing was turned on.
    pub started: Option<SystemTime>,
    /// When it was turned off.
    pub stopped: Option<SystemTime>,
    /// Why it ended, in a few words.
    pub ended: String,
    /// How often the key changes.
    pub interval: Option<Duration>,
    /// More counters to show, from the layers below: what was counted, and how
    /// often.
    pub counters: Vec<(String, u64)>,
}

/// One boot of the guest.
#[derive(Clone, Debug, Default)]
pub struct BootHeading {
    /// Its number; 1 is the first of the session.
    pub boot: u32,
    /// The kernel's banner, as the guest's memory had it; escaped or not.
    pub banner: String,
    /// Run-time minus link-time addresses (KASLR).
    pub slide: u64,
    /// One moment on both clocks: the guest's trace clock in nanoseconds, and
    /// the host's time.
    pub clock: Option<(u64, SystemTime)>,
}

impl Heading {
    /// What a session says of itself.
    pub fn of(session: &Session) -> Self {
        let meta = &session.meta;
        let time = |ns: u64| UNIX_EPOCH + Duration::from_nanos(ns);
        let boot = |boot: &Boot| BootHeading {
            boot: boot.number,
            banner: boot.banner.clone(),
            slide: boot.slide,
            clock: boot
                .clocks
                .map(|(first, _)| (first.guest_ns, time(first.host_ns))),
        };
        let mut functions: Vec<String> = Vec::new();
        for function in meta.switches.iter().flat_map(|switch| &switch.functions) {
            if !functions.contains(function) {
                functions.push(function.clone());
            }
        }
        let ended = match (&meta.state, &meta.end) {
            (State::Open, _) => "not yet, or its helper was killed".to_owned(),
            (State::Closed, Some(EndReason::Error(error))) => format!("by an error: {error}"),
            (State::Closed, end) => match end {
                Some(EndReason::Off) => "by xftrace off",
                Some(EndReason::VmEnded) => "with the VM",
                Some(EndReason::HelperStopped) => "with its helper",
                Some(EndReason::HelperGone) => {
                    "when its helper was killed; what came after is not known"
                }
                Some(EndReason::SizeLimit) => "at its size limit",
                Some(EndReason::TooManyBoots) => {
                    "as the guest booted more often than it has room for"
                }
                Some(EndReason::Error(_)) | None => "unknown",
            }
            .to_owned(),
        };
        let Counters {
            torn_pages,
            damaged,
            after_reset_bytes,
            unstored_bytes,
            tampered,
            resumed,
            late_keys,
            records,
            forged,
            other,
            ..
        } = meta.counters;
        let mut counters = vec![
            ("keys and epochs that the guest changed", tampered),
            (
                "key intervals that passed without a key of their own",
                late_keys,
            ),
            ("pages that changed under each copy", torn_pages),
            (
                "rounds in which a CPU's buffer could not be followed",
                damaged,
            ),
            (
                "bytes set aside because the guest had been reset",
                after_reset_bytes,
            ),
            ("times that a helper took the session over", resumed),
        ];
        if unstored_bytes > 0 {
            counters.push(("bytes read that could not be stored", unstored_bytes));
        }
        if let Some(guest) = &meta.guest_counts {
            counters.extend([
                (
                    "records written, as the guest's own count has it",
                    guest.written,
                ),
                (
                    "of these overwritten, read from outside or not",
                    guest.overwritten,
                ),
                (
                    "records dropped by the guest's ring, as it says",
                    guest.dropped,
                ),
                (
                    "records read, of whatever kind",
                    records.saturating_add(forged).saturating_add(other),
                ),
            ]);
        }
        Self {
            domain: meta.domain.clone(),
            uuid: Some(meta.uuid),
            session: session.dir().display().to_string(),
            mode: meta.mode,
            boots: meta.boots.iter().map(boot).collect(),
            functions,
            started: Some(time(meta.started_ns)),
            stopped: meta.ended_ns.map(time),
            ended,
            interval: (meta.mode == Mode::Keyed).then(|| Duration::from_nanos(meta.interval_ns)),
            counters: counters
                .into_iter()
                .map(|(what, count)| (what.to_owned(), count))
                .collect(),
        }
    }
}

impl WallClock for Session {
    fn wall(&self, boot: u32, guest: u64) -> Option<u64> {
        self.meta
            .boots
            .iter()
            .find(|known| known.number == boot)?
            .wall_ns(guest)
    }
}
