//! `xftrace status`.

use std::io::Write;
use std::path::Path;
use std::time::Duration;

use super::image::Image;
use super::out::Stdout;
use super::{client, target, Context, Exit};
use crate::cli::args::StatusArgs;
use crate::helper::protocol::{GuestStatus, Reply, Request, Status};
use crate::libvirt::run_dir::RunDir;
use crate::ram::GuestRam;

/// Runs the command.
pub(super) fn run(context: &Context, args: &StatusArgs) -> anyhow::Result<Exit> {
    let config = context.config()?;
    if let Some(memory) = &args.image.memory {
        let image = Image::open(&config, &args.image, memory)?;
        print_image(&mut Stdout::new(), memory, &image)?;
        return Ok(Exit::Done);
    }
    let domains = match &args.domain {
        Some(domain) => vec![target::running(context, &config, Some(domain))?],
        None => RunDir::at(&config.paths.run).domains(),
    };
    let mut all = Vec::new();
    for domain in &domains {
        let Some(mut line) = client::connect_running(&config, domain)? else {
            if args.domain.is_some() {
                anyhow::bail!(
                    "no helper runs for domain '{}'; 'xftrace doctor {}' says why",
                    client::name(domain),
                    client::name(domain)
                );
            }
            continue;
        };
        line.patience(Some(Duration::from_secs(5)))?;
        line.send(&Request::Status)?;
        match client::receive(&mut line, domain)? {
            Some(Reply::Status(status)) => all.push(*status),
            _ => anyhow::bail!(
                "the helper of domain '{}' gave no status",
                client::name(domain)
            ),
        }
    }
    let mut stdout = Stdout::new();
    if args.json {
        serde_json::to_writer_pretty(&mut stdout, &all)?;
        writeln!(stdout)?;
    } else if all.is_empty() {
        super::out::message("no helper runs; 'xftrace list' shows the domains");
    } else {
        for status in &all {
            print(&mut stdout, status)?;
        }
    }
    Ok(Exit::Done)
}

fn print_image(out: &mut impl Write, path: &Path, image: &Image) -> std::io::Result<()> {
    let kernel = &image.kernel;
    let banner = kernel.banner.trim_end().escape_debug();
    writeln!(out, "image      {}", path.display())?;
    writeln!(out, "  memory   {} bytes", image.ram.layout().total())?;
    writeln!(out, "  kernel   {banner}")?;
    writeln!(
        out,
        "           at {}, slide {:#x}, {}-level paging",
        kernel.phys_text, kernel.slide, kernel.levels
    )?;
    if image.others > 0 {
        writeln!(
            out,
            "           and {} more that ran before it, or after",
            image.others
        )?;
    }
    writeln!(out, "  symbols  {}", image.symbols_path.display())?;
    if let Some(mode) = image.mode() {
        writeln!(out, "  mode     {mode}")?;
    }
    writeln!(out, "  switch   {}", image.switch())
}

fn print(out: &mut impl Write, status: &Status) -> std::io::Result<()> {
    writeln!(
        out,
        "domain     {} ({})",
        status.domain.escape_debug(),
        status.uuid
    )?;
    writeln!(
        out,
        "  helper   {} for QEMU process {}",
        status.helper_pid, status.qemu.pid
    )?;
    for file in &status.memory {
        writeln!(out, "  memory   {}", file.display())?;
    }
    match &status.guest {
        GuestStatus::Searching { why } => writeln!(out, "  kernel   not found: {why}")?,
        GuestStatus::Alive {
            banner,
            slide,
            levels,
            silent_ms,
            symbols,
            mode,
            cannot,
            ..
        } => {
            writeln!(out, "  kernel   {banner}")?;
            writeln!(out, "           slide {slide:#x}, {levels}-level paging, last sign of life {silent_ms} ms ago")?;
            writeln!(out, "  symbols  {}", symbols.display())?;
            writeln!(out, "  mode     {}", mode.text())?;
            if let Some(why) = cannot {
                writeln!(out, "           cannot be traced as it is: {why}")?;
            }
        }
    }
    let Some(trace) = &status.trace else {
        writeln!(out, "  trace    off")?;
        if let Some(last) = &status.last_session {
            writeln!(out, "  last     {}", last.display())?;
        }
        return Ok(());
    };
    let counters = &trace.counters;
    writeln!(
        out,
        "  trace    on ({}): {}",
        trace.mode.name(),
        trace.functions.join(" ")
    )?;
    writeln!(
        out,
        "  session  {} ({} bytes stored)",
        trace.session.display(),
        trace.stored
    )?;
    match trace.epoch {
        Some(epoch) => writeln!(
            out,
            "  keys     epoch {epoch}, one each {}; {} intervals without one; {} changed by the guest",
            humantime::format_duration(Duration::from_nanos(trace.interval_ns)),
            counters.late_keys,
            counters.tampered
        )?,
        None => writeln!(out, "  keys     none")?,
    }
    writeln!(out, "  boot     {} of the session", trace.boot)?;
    match &trace.judged {
        None => writeln!(out, "  judged   no: no baseline is named")?,
        Some(judged) => match &judged.cannot {
            None => writeln!(
                out,
                "  judged   by baseline {}: {} findings",
                judged.baseline, judged.findings
            )?,
            Some(why) => writeln!(out, "  judged   no: {why}")?,
        },
    }
    writeln!(
        out,
        "  records  {}; lost {} in {} places; forged {}; other tracers' {}",
        counters.records, counters.lost, counters.lost_places, counters.forged, counters.other
    )?;
    writeln!(
        out,
        "  reading  {} torn pages, {} damaged rounds, {} bytes set aside after a reset, {} bytes not stored, {} takeovers",
        counters.torn_pages,
        counters.damaged,
        counters.after_reset_bytes,
        counters.unstored_bytes,
        counters.resumed
    )
}
