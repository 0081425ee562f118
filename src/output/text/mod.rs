//! `trace_graph.txt`: the layout of function_graph, with everything that does
//! not fit marked in its place.

mod columns;
mod head;

use std::io::{self, Write};

use super::escape::escaped;
use super::heading::Heading;
use super::wall::{Calendar, WallClock};
use super::Sink;
use crate::callflow::{
    Closed, Cut, CutWhy, Event, Fit, Happening, Kind, Loss, Opened, Origin, Reason, Tally,
    UncalledWhy,
};
use crate::ring::record::{Forged, Task};
use columns::{
    push_duration, push_function, push_hex, push_name, push_number, push_place, push_spaces,
    push_task,
};

/// What the first column shows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TimeColumn {
    /// The host's time of day, in UTC; a line tells when the day changes.
    #[default]
    Wall,
    /// The guest's trace clock, in seconds.
    Guest,
}

/// What stands in the duration column of a line without a duration.
const NO_DURATION: &[u8] = b"              |  ";
const MARKED: &[u8] = b"!!            |  ";
/// Spaces a level of nesting: TRACE_GRAPH_INDENT.
const INDENT: usize = 2;
/// No deeper than this is a line ever indented; a record can claim any depth.
const DEEPEST: u16 = 64;
const RULE: &[u8] = b" ------------------------------------------\n";

/// Writes the text format.
pub struct Text<W, C> {
    out: W,
    clock: C,
    time: TimeColumn,
    cpu_width: usize,
    boots: Vec<(u32, String)>,
    calendar: Calendar,
    date: String,
    /// The line that is being put together.
    line: Vec<u8>,
    ended: bool,
    /// How many bytes of calls there may be, and how many there are.
    limit: u64,
    written: u64,
    is_cut: bool,
}

impl<W: Write, C: WallClock> Text<W, C> {
    /// Writes the head, for which `tally` must be complete: make it in a pass
    /// of its own. `out` should be buffered.
    pub fn new(
        mut out: W,
        clock: C,
        heading: &Heading,
        tally: &Tally,
        time: TimeColumn,
    ) -> io::Result<Self> {
        head::write(&mut out, heading, tally, time)?;
        writeln!(out, "#")?;
        let mut text = Self::live(out, clock, tally.cpus.last().copied().unwrap_or(0), time)?;
        text.boots = heading
            .boots
            .iter()
            .map(|boot| (boot.boot, escaped(&boot.banner, head::BANNER_WIDTH)))
            .collect();
        Ok(text)
    }

    /// Writes the titles of the columns and no head: for a trace that is still
    /// going on. `last_cpu` is the highest CPU number to be expected.
    pub fn live(out: W, clock: C, last_cpu: u16, time: TimeColumn) -> io::Result<Self> {
        let mut text = Self {
            out,
            clock,
            time,
            cpu_width: last_cpu.checked_ilog10().unwrap_or(0) as usize + 1,
            boots: Vec::new(),
            calendar: Calendar::default(),
            date: String::new(),
            line: Vec::with_capacity(512),
            ended: false,
            limit: u64::MAX,
            written: 0,
            is_cut: false,
        };
        text.column_titles()?;
        Ok(text)
    }

    /// Ends with a line that says so once `limit` bytes of calls are written.
    #[must_use]
    pub fn up_to(mut self, limit: u64) -> Self {
        self.limit = limit;
        self
    }

    /// Whether all calls were written, as far as was seen yet.
    pub fn is_whole(&self) -> bool {
        !self.is_cut
    }

    fn column_titles(&mut self) -> io::Result<()> {
        let cpu = " ".repeat(self.cpu_width.saturating_sub(1));
        let out = &mut self.out;
        writeln!(
            out,
            "#      TIME       {cpu}CPU       TASK-PID          DURATION                  FUNCTION CALLS"
        )?;
        writeln!(
            out,
            "#       |         {cpu} |           |               |   |                     |   |   |   |"
        )
    }

    /// Everything before the duration column.
    fn prologue(&mut self, event: &Event<'_>, task: &Task, unsure: bool) {
        let line = &mut self.line;
        line.push(b' ');
        let wall = match self.time {
            TimeColumn::Wall => self.clock.wall(event.boot, event.time),
            TimeColumn::Guest => None,
        };
        match wall {
            Some(wall) => {
                let moment = self.calendar.moment(wall);
                if self.date != moment.date {
                    moment.date.clone_into(&mut self.date);
                    line.clear();
                    line.extend_from_slice(b"# ");
                    line.extend_from_slice(moment.date.as_bytes());
                    line.extend_from_slice(b" (UTC)\n ");
                }
                line.extend_from_slice(moment.time.as_bytes());
                line.push(b'.');
                push_number(line, u64::from(moment.nanos / 1000), 6, b'0');
            }
            None => {
                line.push(if self.time == TimeColumn::Wall {
                    b'~'
                } else {
                    b' '
                });
                push_guest_time(line, event.time, 7);
            }
        }
        line.extend_from_slice(b" |  ");
        push_number(line, event.cpu.into(), self.cpu_width, b' ');
        line.extend_from_slice(b") ");
        push_task(line, task, unsure);
        line.extend_from_slice(b" | ");
    }

    fn open(&mut self, event: &Event<'_>, call: &Opened<'_>, duration: Option<Option<u64>>) {
        self.prologue(event, &call.task, false);
        let line = &mut self.line;
        match duration {
            Some(Some(duration)) => push_duration(line, duration),
            Some(None) => line.extend_from_slice(MARKED),
            None => line.extend_from_slice(NO_DURATION),
        }
        indent(line, call.depth);
        push_function(line, &call.func);
        line.extend_from_slice(if duration.is_some() { b"();" } else { b"() {" });
        let mut notes = Notes::new(line);
        match call.origin {
            Origin::Inside | Origin::TailCall | Origin::Untold => {}
            Origin::Root | Origin::Elsewhere | Origin::Module => {
                push_place(notes.next(b"called from "), &call.caller);
            }
            Origin::Outside => push_place(notes.next(b"!! called from "), &call.caller),
        }
        if call.func.name.kind == Kind::Outside {
            notes.next(b"!! no kernel code belongs there");
        }
        if call.gap {
            notes.next(b"!! calls around it are missing");
        }
        if duration == Some(None) {
            notes.next(b"!! returned before it was called");
        }
        notes.end();
    }

    fn close(&mut self, event: &Event<'_>, closed: &Closed<'_>) {
        self.prologue(event, &closed.task, false);
        let line = &mut self.line;
        match closed.spent.total {
            Some(duration) => push_duration(line, duration),
            None => line.extend_from_slice(MARKED),
        }
        indent(line, closed.depth);
        line.push(b'}');
        let mut notes = Notes::new(line);
        match &closed.fit {
            Fit::Matched => push_function(notes.next(b""), &closed.func),
            Fit::OtherFunction(open) => {
                let line = notes.next(b"!! ");
                push_function(line, &closed.func);
                line.extend_from_slice(b" returned where open was ");
                push_function(line, open);
            }
            Fit::OtherCaller(to) => {
                let line = notes.next(b"!! ");
                push_function(line, &closed.func);
                line.extend_from_slice(b" did not return to where it was called from, but to ");
                push_place(line, to);
            }
            Fit::Uncalled(why) => {
                let unexplained = *why == UncalledWhy::Unexplained;
                let line = notes.next(if unexplained { b"!! " } else { b"" });
                push_function(line, &closed.func);
                line.extend_from_slice(b", call not seen: ");
                line.extend_from_slice(why.text().as_bytes());
            }
        }
        if closed.over_loss {
            notes.next(b"records lost inside");
        }
        if closed.spent.total.is_none() {
            notes.next(b"!! returned before it was called");
        }
        notes.end();
    }

    fn cut(&mut self, event: &Event<'_>, cut: &Cut<'_>) -> io::Result<()> {
        if cut.why == CutWhy::TraceEnd && !self.ended {
            self.ended = true;
            self.out
                .write_all(b"# Calls that were still open when the trace ended:\n")?;
        }
        self.prologue(event, &cut.task, false);
        let line = &mut self.line;
        line.extend_from_slice(NO_DURATION);
        indent(line, cut.depth);
        line.push(b'}');
        let mut notes = Notes::new(line);
        push_function(notes.next(b""), &cut.func);
        let line = notes.next(b"return not seen: ");
        line.extend_from_slice(cut.why.text().as_bytes());
        line.extend_from_slice(b" (open for ");
        push_fixed(line, event.time.saturating_sub(cut.since), 0, 1_000, 3);
        line.extend_from_slice(b" us)");
        notes.end();
        Ok(())
    }

    fn switch(&mut self, event: &Event<'_>, from: &Task, to: &Task) {
        let line = &mut self.line;
        line.extend_from_slice(RULE);
        line.push(b' ');
        push_number(line, event.cpu.into(), self.cpu_width, b' ');
        line.extend_from_slice(b") ");
        push_task(line, from, false);
        line.extend_from_slice(b" => ");
        push_task(line, to, false);
        while line.last() == Some(&b' ') {
            line.pop();
        }
        line.push(b'\n');
        line.extend_from_slice(RULE);
        line.push(b'\n');
    }

    fn interrupt(&mut self, event: &Event<'_>, task: &Task, arrow: &[u8]) {
        self.prologue(event, task, false);
        self.line.extend_from_slice(b"  ");
        self.line.extend_from_slice(arrow);
        self.line.extend_from_slice(b" |\n");
    }

    fn forged(&mut self, event: &Event<'_>, forged: &Forged) {
        self.prologue(
            event,
            &Task {
                pid: forged.pid,
                comm: None,
            },
            true,
        );
        let line = &mut self.line;
        line.extend_from_slice(MARKED);
        line.extend_from_slice(b"/* !! forged: ");
        line.extend_from_slice(forged.why.text().as_bytes());
        if let Some(epoch) = forged.epoch {
            line.extend_from_slice(b"; epoch ");
            push_number(line, epoch, 0, b' ');
        }
        line.extend_from_slice(b"; raw function ");
        push_hex(line, forged.raw_func);
        line.extend_from_slice(b"; depth ");
        if forged.depth < 0 {
            line.push(b'-');
        }
        push_number(line, forged.depth.unsigned_abs().into(), 0, b' ');
        line.extend_from_slice(b" */\n");
    }

    fn lost(&mut self, event: &Event<'_>, loss: &Loss<'_>) {
        let task = loss.task.unwrap_or(Task {
            pid: -1,
            comm: None,
        });
        self.prologue(event, &task, loss.task.is_none());
        let line = &mut self.line;
        line.extend_from_slice(MARKED);
        line.extend_from_slice(b"/* !! lost: ");
        match loss.lost.records {
            Some(records) => push_number(line, records, 0, b' '),
            None => line.extend_from_slice(b"an unknown number of"),
        }
        line.extend_from_slice(b" records: ");
        line.extend_from_slice(loss.lost.why.text().as_bytes());
        if let (Some(task), [_, ..]) = (&loss.task, loss.open.as_slice()) {
            line.extend_from_slice(b"; was open in ");
            push_name(line, task, false);
            line.extend_from_slice(b": ");
            for (at, func) in loss.open.iter().enumerate() {
                if at > 0 {
                    line.extend_from_slice(b" > ");
                }
                push_function(line, func);
            }
        }
        line.extend_from_slice(b" */\n");
    }

    fn boot(&mut self, event: &Event<'_>) {
        let banner = self.boots.iter().find(|(boot, _)| *boot == event.boot);
        let line = &mut self.line;
        line.extend_from_slice(b"# The guest has booted again. Boot ");
        push_number(line, event.boot.into(), 0, b' ');
        if let Some((_, banner)) = banner {
            line.extend_from_slice(b": ");
            line.extend_from_slice(banner.as_bytes());
        }
        line.push(b'\n');
    }
}

impl<W: Write, C: WallClock> Sink for Text<W, C> {
    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }

    fn event(&mut self, event: &Event<'_>) -> io::Result<()> {
        self.line.clear();
        match &event.what {
            Happening::Open(call) => self.open(event, call, None),
            Happening::Leaf(call, spent) => self.open(event, call, Some(spent.total)),
            Happening::Close(closed) => self.close(event, closed),
            Happening::Cut(cut) => self.cut(event, cut)?,
            Happening::Switch { from, to } => self.switch(event, from, to),
            Happening::IrqEnter(task) => self.interrupt(event, task, b"==========>"),
            Happening::IrqLeave(task) => self.interrupt(event, task, b"<=========="),
            Happening::Forged(forged) => self.forged(event, forged),
            Happening::Lost(loss) => self.lost(event, loss),
            Happening::Boot => self.boot(event),
        }
        self.written += self.line.len() as u64;
        self.out.write_all(&self.line)
    }

    fn takes_more(&mut self) -> io::Result<bool> {
        if self.written >= self.limit && !self.is_cut {
            self.is_cut = true;
            writeln!(
                self.out,
                "# The trace goes on. This file has as much of it as limits.text_size allows;\n\
                 # 'xftrace report' with the session's directory writes all of it."
            )?;
        }
        Ok(!self.is_cut)
    }

    fn finish(&mut self, _: &Tally) -> io::Result<()> {
        self.out.flush()
    }
}

/// Nanoseconds as seconds, with the kernel's six places.
fn push_guest_time(line: &mut Vec<u8>, time: u64, width: usize) {
    push_fixed(line, time / 1000, width, 1_000_000, 6);
}

/// `number` / `unit`, with `places` after the point.
fn push_fixed(line: &mut Vec<u8>, number: u64, width: usize, unit: u64, places: usize) {
    push_number(line, number / unit, width, b' ');
    line.push(b'.');
    push_number(line, number % unit, places, b'0');
}

fn indent(line: &mut Vec<u8>, depth: u16) {
    push_spaces(line, usize::from(depth.min(DEEPEST)) * INDENT);
}

/// The comment that ends a line, if there is anything to say.
struct Notes<'a> {
    line: &'a mut Vec<u8>,
    begun: bool,
}

impl<'a> Notes<'a> {
    fn new(line: &'a mut Vec<u8>) -> Self {
        Self { line, begun: false }
    }

    /// Begins another note, with `text`.
    fn next(&mut self, text: &[u8]) -> &mut Vec<u8> {
        self.line
            .extend_from_slice(if self.begun { b", " } else { b" /* " });
        self.line.extend_from_slice(text);
        self.begun = true;
        self.line
    }

    fn end(self) {
        self.line
            .extend_from_slice(if self.begun { b" */\n" } else { b"\n" });
    }
}
