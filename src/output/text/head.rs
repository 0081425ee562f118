//! The head of `trace_graph.txt`: what was traced, what was lost, how to read it.

use std::io::{self, Write};

use super::super::escape::{escaped, host};
use super::super::heading::{BootHeading, Heading};
use super::super::wall::rfc3339;
use super::TimeColumn;
use crate::callflow::{Counts, Reason, Tally};

/// The most that is shown of a kernel's banner (the kernel's own is about 200).
pub(super) const BANNER_WIDTH: usize = 240;

/// Writes the head.
pub(super) fn write(
    out: &mut impl Write,
    heading: &Heading,
    tally: &Tally,
    time: TimeColumn,
) -> io::Result<()> {
    writeln!(
        out,
        "# xftrace: function_graph of a guest, recorded from its host"
    )?;
    writeln!(out, "#")?;
    session(out, heading)?;
    writeln!(out, "#")?;
    counters(out, heading, tally)?;
    writeln!(out, "#")?;
    legend(out, time)
}

fn row(out: &mut impl Write, label: &str, value: &str) -> io::Result<()> {
    writeln!(out, "# {label:<12}{value}")
}

fn session(out: &mut impl Write, heading: &Heading) -> io::Result<()> {
    let uuid = heading
        .uuid
        .map(|uuid| format!(" ({uuid})"))
        .unwrap_or_default();
    row(out, "domain:", &format!("{}{uuid}", host(&heading.domain)))?;
    row(out, "session:", &host(&heading.session))?;
    row(out, "mode:", heading.mode.text())?;
    row(out, "functions:", &host(&heading.functions.join(" ")))?;
    row(out, "started:", &rfc3339(heading.started))?;
    let lasted = match (heading.started, heading.stopped) {
        (Some(start), Some(stop)) => stop.duration_since(start).ok(),
        _ => None,
    };
    let lasted = lasted.map(|time| format!(" (after {:.3} s)", time.as_secs_f64()));
    row(
        out,
        "stopped:",
        &format!("{}{}", rfc3339(heading.stopped), lasted.unwrap_or_default()),
    )?;
    row(out, "ended:", &host(&heading.ended))?;
    for boot in &heading.boots {
        self::boot(out, boot)?;
    }
    Ok(())
}

fn boot(out: &mut impl Write, boot: &BootHeading) -> io::Result<()> {
    let label = format!("boot {}:", boot.boot);
    row(out, &label, &escaped(&boot.banner, BANNER_WIDTH))?;
    let clock = boot.clock.map(|(guest, wall)| {
        let (seconds, nanos) = (guest / 1_000_000_000, guest % 1_000_000_000);
        format!(
            ", guest clock {seconds}.{nanos:09} s = {}",
            rfc3339(Some(wall))
        )
    });
    row(
        out,
        "",
        &format!("slide {:#x}{}", boot.slide, clock.unwrap_or_default()),
    )
}

fn counters(out: &mut impl Write, heading: &Heading, tally: &Tally) -> io::Result<()> {
    let epochs = tally.epochs.map_or_else(
        || "none".to_owned(),
        |epochs| {
            format!(
                "{} to {}, {} different",
                epochs.first, epochs.last, epochs.count
            )
        },
    );
    let interval = heading
        .interval
        .map(|interval| format!(", a new key every {}", humantime::format_duration(interval)));
    row(
        out,
        "key epochs:",
        &format!("{epochs}{}", interval.unwrap_or_default()),
    )?;
    row(
        out,
        "calls:",
        &format!(
            "{}: {} roots, {} leaves",
            tally.calls, tally.roots, tally.leaves
        ),
    )?;
    row(out, "returns:", &tally.returns.to_string())?;
    row(
        out,
        "seen:",
        &format!(
            "{} CPUs, {} tasks, {} task switches, {} interrupts, {} boots",
            tally.cpus.len(),
            tally.tasks,
            tally.switches,
            tally.interrupts,
            tally.boots
        ),
    )?;
    writeln!(out, "#")?;
    lost(out, tally)?;
    reasons(out, "forged", "", &tally.forged)?;
    reasons(out, "cut", " (calls whose return was not seen)", &tally.cut)?;
    reasons(
        out,
        "uncalled",
        " (returns whose call was not seen)",
        &tally.uncalled,
    )?;
    for (what, count) in [
        (
            "returns of another function than was open",
            tally.other_function,
        ),
        (
            "returns to somewhere else than where the call came from",
            tally.other_caller,
        ),
        (
            "calls around which calls are missing, unexplained",
            tally.gaps,
        ),
        ("calls from outside kernel and modules", tally.from_outside),
        (
            "calls from modules, as far as that is unusual",
            tally.from_modules,
        ),
        ("calls of functions without a symbol", tally.unresolved),
        (
            "calls of functions that the guest alone names",
            tally.told_by_guest,
        ),
        (
            "calls that the guest's ftrace found too deep",
            tally.overruns,
        ),
        ("records older than the one before", tally.time_backwards),
        ("returns older than their call", tally.bad_durations),
        (
            "tasks forgotten because there were too many",
            tally.evictions,
        ),
        ("other tracers' records", tally.other),
    ] {
        writeln!(out, "# {what}: {count}")?;
    }
    for (what, count) in &heading.counters {
        writeln!(out, "# {}: {count}", host(what))?;
    }
    Ok(())
}

fn lost(out: &mut impl Write, tally: &Tally) -> io::Result<()> {
    let records = tally.lost_records.total();
    write!(out, "# lost: {records}")?;
    let uncounted = tally.lost_uncounted;
    if uncounted > 0 {
        write!(
            out,
            " and more: at {uncounted} places it is not known how many"
        )?;
    }
    writeln!(out)?;
    for (why, places) in tally.lost_places.iter() {
        let records = tally.lost_records.get(why);
        writeln!(
            out,
            "#   {}: {records} records at {places} places",
            why.text()
        )?;
    }
    Ok(())
}

fn reasons<R: Reason>(
    out: &mut impl Write,
    what: &str,
    meaning: &str,
    counts: &Counts<R>,
) -> io::Result<()> {
    writeln!(out, "# {what}: {}{meaning}", counts.total())?;
    for (why, count) in counts.iter() {
        writeln!(out, "#   {}: {count}", why.text())?;
    }
    Ok(())
}

fn legend(out: &mut impl Write, time: TimeColumn) -> io::Result<()> {
    let times = match time {
        TimeColumn::Wall => {
            "# TIME is the host's, in UTC; ~ before it: the guest's trace clock in seconds,\n\
             # because that moment's host time is not known."
        }
        TimeColumn::Guest => "# TIME is the guest's trace clock in seconds.",
    };
    writeln!(out, "{times}")?;
    out.write_all(
        b"# DURATION is from entry to return, sleep included: $ more than 1 s, @ 100 ms,\n\
          # * 10 ms, # 1 ms, ! 100 us, + 10 us.\n\
          # ==========> an interrupt or fault begins; <========== it has ended.\n\
          # called from: the return address, shown for roots and where it does not lie in the\n\
          # function around. [module]: in the module area, and nothing is known of it;\n\
          # [outside]: where no kernel code belongs.\n\
          # f [ext4?]: function and module are the guest's own word, read from its memory;\n\
          # f [ext4]: they are from the symbols on the host.\n\
          # !! marks what cannot be right in a sound trace, what was forged, and what was lost.\n",
    )
}
