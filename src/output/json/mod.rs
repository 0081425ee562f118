//! JSON lines: the head, then each event, then the counters, an object a line.
//! docs/formats.md describes every field.

mod schema;

use std::io::{self, Write};

use serde::Serialize;

use super::escape::{escaped, host};
use super::heading::Heading;
use super::wall::{rfc3339, system_time, WallClock};
use super::Sink;
use crate::callflow::{Event, Tally};
use crate::session::Mode;
use schema::{Hex, What};

/// The version of the schema; it rises when a field changes its meaning.
const VERSION: u32 = 1;

/// Writes JSON lines.
pub struct Json<W, C> {
    out: W,
    clock: C,
}

impl<W: Write, C: WallClock> Json<W, C> {
    /// Writes the head. `out` should be buffered.
    pub fn new(out: W, clock: C, heading: &Heading) -> io::Result<Self> {
        let mut json = Self { out, clock };
        json.line(&Head::new(heading))?;
        Ok(json)
    }

    fn line(&mut self, line: &impl Serialize) -> io::Result<()> {
        serde_json::to_writer(&mut self.out, line)?;
        self.out.write_all(b"\n")
    }
}

impl<W: Write, C: WallClock> Sink for Json<W, C> {
    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }

    fn event(&mut self, event: &Event<'_>) -> io::Result<()> {
        let line = Line {
            cpu: event.cpu,
            boot: event.boot,
            guest_ns: event.time,
            time: self.clock.wall(event.boot, event.time).map(Rfc3339),
            what: What::new(&event.what),
        };
        self.line(&line)
    }

    fn finish(&mut self, tally: &Tally) -> io::Result<()> {
        #[derive(Serialize)]
        struct Summary<'a> {
            r#type: &'static str,
            #[serde(flatten)]
            tally: &'a Tally,
        }
        self.line(&Summary {
            r#type: "summary",
            tally,
        })?;
        self.out.flush()
    }
}

#[derive(Serialize)]
struct Head {
    r#type: &'static str,
    format: &'static str,
    version: u32,
    domain: String,
    uuid: Option<uuid::Uuid>,
    session: String,
    mode: Mode,
    functions: Vec<String>,
    started: Option<String>,
    stopped: Option<String>,
    ended: String,
    key_interval_ns: Option<u128>,
    boots: Vec<Boot>,
    counters: serde_json::Map<String, serde_json::Value>,
}

#[derive(Serialize)]
struct Boot {
    boot: u32,
    banner: String,
    slide: Hex,
    guest_ns: Option<u64>,
    time: Option<String>,
}

impl Head {
    fn new(heading: &Heading) -> Self {
        let boots = heading.boots.iter().map(|boot| Boot {
            boot: boot.boot,
            banner: escaped(&boot.banner, 512),
            slide: Hex(boot.slide),
            guest_ns: boot.clock.map(|(guest, _)| guest),
            time: boot.clock.map(|(_, wall)| rfc3339(Some(wall))),
        });
        Self {
            r#type: "header",
            format: "xftrace",
            version: VERSION,
            domain: host(&heading.domain),
            uuid: heading.uuid,
            session: host(&heading.session),
            mode: heading.mode,
            functions: heading.functions.iter().map(|name| host(name)).collect(),
            started: heading.started.map(|time| rfc3339(Some(time))),
            stopped: heading.stopped.map(|time| rfc3339(Some(time))),
            ended: host(&heading.ended),
            key_interval_ns: heading.interval.map(|interval| interval.as_nanos()),
            boots: boots.collect(),
            counters: heading
                .counters
                .iter()
                .map(|(what, n)| (host(what), (*n).into()))
                .collect(),
        }
    }
}

#[derive(Serialize)]
struct Line<'a> {
    #[serde(flatten)]
    what: What<'a>,
    cpu: u16,
    boot: u32,
    guest_ns: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    time: Option<Rfc3339>,
}

/// A time in nanoseconds since 1970, as text.
struct Rfc3339(u64);

impl Serialize for Rfc3339 {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&humantime::format_rfc3339_nanos(system_time(self.0)))
    }
}
