//! `xftrace status`.

use std::io::Write;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::image::Image;
use super::out::Stdout;
use super::{client, target, Context, Exit};
use crate::cli::args::StatusArgs;
use crate::helper::protocol::{GuestStatus, IntegrityStatus, Reply, Request, Status};
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
    if let Some(doubt) = image.doubt() {
        writeln!(out, "           not trusted: {doubt}")?;
    }
    writeln!(out, "  symbols  {}", image.symbols_path.display())?;
    if let Some(mode) = image.mode() {
        writeln!(out, "  mode     {mode}")?;
    }
    writeln!(out, "  switch   {}", image.switch())
}

/// Of symbols that do not say where the kernel has its own.
pub(super) const NOT_COMPARED: &str = "not compared with the kernel's own list of symbols, which \
    they do not tell the place of (a saved /proc/kallsyms): only its banner says that they are \
    those of this very build";

/// How many findings are listed.
const LISTED: usize = 5;

/// How the guest's memory is checked, and what came of it.
fn print_integrity(
    out: &mut impl Write,
    integrity: Option<&IntegrityStatus>,
    now: SystemTime,
) -> std::io::Result<()> {
    let Some(integrity) = integrity else {
        return writeln!(out, "  checked  no: integrity_interval is off");
    };
    let every = humantime::format_duration(Duration::from_nanos(integrity.interval_ns));
    write!(out, "  checked  every {every}; ")?;
    match &integrity.last {
        None => writeln!(out, "no look yet")?,
        Some(look) => {
            let at = UNIX_EPOCH + Duration::from_nanos(look.wall_ns);
            let ago = now.duration_since(at).unwrap_or_default().as_secs();
            let found = look.findings.len() as u64 + look.not_listed;
            let result = match (found, look.doubts.is_empty()) {
                (0, true) => "clean".to_owned(),
                (0, false) => "nothing found, but not all could be checked".to_owned(),
                (found, _) => format!("findings: {found}"),
            };
            let cost = Duration::from_nanos(look.cpu_ns).as_secs_f64();
            writeln!(
                out,
                "last {ago} s ago, in {cost:.2} s of processor time: {result}"
            )?;
            for finding in look.findings.iter().take(LISTED) {
                write!(out, "           {}: {}", finding.check, finding.place)?;
                match &finding.owner {
                    Some(owner) => writeln!(out, ": {owner}")?,
                    None => writeln!(out)?,
                }
            }
            if found > LISTED as u64 {
                writeln!(
                    out,
                    "           and {} more; 'xftrace check' lists them",
                    found - LISTED as u64
                )?;
            }
            for doubt in &look.doubts {
                writeln!(out, "           could not tell: {doubt}")?;
            }
        }
    }
    if let Some(why) = &integrity.cannot {
        writeln!(out, "           not now: {why}")?;
    }
    Ok(())
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
            compared,
            mode,
            rivals,
            plain,
        } => {
            writeln!(out, "  kernel   {banner}")?;
            writeln!(out, "           slide {slide:#x}, {levels}-level paging, last sign of life {silent_ms} ms ago")?;
            writeln!(out, "  symbols  {}", symbols.display())?;
            if !compared {
                writeln!(out, "           {NOT_COMPARED}")?;
            }
            writeln!(out, "  mode     {}", mode.text())?;
            if let Some(why) = rivals {
                writeln!(out, "           not trusted: {why}")?;
            }
            let cannot = plain.as_ref().and_then(|plain| plain.cannot.as_ref());
            if let Some(why) = cannot.filter(|_| status.awaited.is_none()) {
                writeln!(out, "           cannot be traced as it is: {why}")?;
            }
        }
    }
    print_integrity(out, status.integrity.as_ref(), SystemTime::now())?;
    if let Some(why) = &status.awaited {
        writeln!(
            out,
            "  waits    the guest is traced as soon as it can be: {why}"
        )?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::helper::protocol::LookStatus;
    use crate::integrity::{Check, Finding};

    fn shown(integrity: Option<&IntegrityStatus>) -> String {
        let mut out = Vec::new();
        let now = UNIX_EPOCH + Duration::from_secs(100);
        print_integrity(&mut out, integrity, now).expect("text");
        String::from_utf8(out).expect("text")
    }

    #[test]
    fn how_the_memory_is_checked_is_told_in_words() {
        assert_eq!(shown(None), "  checked  no: integrity_interval is off\n");
        let mut status = IntegrityStatus {
            interval_ns: 60_000_000_000,
            cannot: Some("there is no kernel".to_owned()),
            looks: 0,
            last: None,
        };
        assert_eq!(
            shown(Some(&status)),
            "  checked  every 1m; no look yet\n           not now: there is no kernel\n"
        );
        status.cannot = None;
        status.last = Some(LookStatus {
            wall_ns: 88_000_000_000,
            cpu_ns: 163_000_000,
            findings: Vec::new(),
            not_listed: 0,
            doubts: Vec::new(),
        });
        let line = "  checked  every 1m; last 12 s ago, in 0.16 s of processor time: ";
        assert_eq!(shown(Some(&status)), format!("{line}clean\n"));
        let look = status.last.as_mut().expect("a look");
        look.doubts.push("files: no BTF".to_owned());
        assert_eq!(
            shown(Some(&status)),
            format!(
                "{line}nothing found, but not all could be checked\n           could not tell: \
                 files: no BTF\n"
            )
        );
        let look = status.last.as_mut().expect("a look");
        look.doubts.clear();
        look.not_listed = 1;
        let finding = Finding {
            check: Check::KernelText,
            place: "vfs_read".to_owned(),
            address: 1,
            expected: "90".to_owned(),
            found: "cc".to_owned(),
            owner: Some("the module x".to_owned()),
        };
        look.findings = vec![finding; 6];
        let hook = "           kernel-text: vfs_read: the module x\n".repeat(5);
        assert_eq!(
            shown(Some(&status)),
            format!("{line}findings: 7\n{hook}           and 2 more; 'xftrace check' lists them\n")
        );
    }
}
