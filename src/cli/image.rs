//! `--memory FILE`: what a saved image of a guest's memory holds.
//!
//! The image goes through the same code as a running guest: the kernel is
//! found in it, and what lies in its ring buffers becomes a session, in a
//! directory that is gone with the command. Nothing beats in an image, so of
//! several kernels in it (a reboot may have left one behind, or somebody put it there)
//! nothing tells which one ran: the lowest is taken, unless somebody says which, and that
//! is said.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{bail, Context as _};
use tempfile::TempDir;
use uuid::Uuid;

use super::out;
use crate::cli::args::{ImageOption, MachineName};
use crate::config::Config;
use crate::helper::{Link, LinkError, Sources};
use crate::kernel::{Kernel, Symbols};
use crate::keys::Klog;
use crate::ram::{Gpa, GuestRam, ImageRam, Layout, LayoutError, MachineKind};
use crate::session::{
    Boot, Counters, EndReason, Meta, Mode, QemuProcess, Session, SessionWriter, State, KLOG_FILE,
};

/// How many places of other kernels are named.
const SHOWN: usize = 8;

/// A saved image with a kernel in it.
pub(super) struct Image {
    pub(super) ram: ImageRam,
    pub(super) kernel: Kernel,
    /// Where others are that pass every check, unless it was said which it is.
    pub(super) others: Vec<Gpa>,
    pub(super) symbols_path: PathBuf,
    pub(super) symbols: Arc<Symbols>,
    link: Result<Link, LinkError>,
    name: String,
}

impl Image {
    /// Opens an image and finds its kernel.
    pub(super) fn open(config: &Config, option: &ImageOption, path: &Path) -> anyhow::Result<Self> {
        let ram = ImageRam::open(path, |size| match option.machine {
            Some(MachineName::Pc) => Layout::pc(size, MachineKind::I440fx),
            Some(MachineName::Q35) => Layout::pc(size, MachineKind::Q35),
            None => flat(size),
        })?;
        let left_out = describe(ram.left_out());
        if let Some(text) = &left_out {
            out::message(&format!("warning: the image has holes: {text}"));
        }
        let place = option.symbols.as_ref().unwrap_or(&config.paths.symbols);
        let found = Sources::new(vec![place.clone()])
            .fitting(&ram)?
            .find(&ram, option.kernel_at);
        let found = found.map_err(|why| match left_out {
            Some(text) => why.context(format!(
                "no kernel can be found, perhaps for the image's holes ({text}); save it anew \
                 with `virsh dump --memory-only`"
            )),
            None => why.context(
                "no kernel can be found in the image: is it whole, and of a guest that had booted?",
            ),
        })?;
        let chosen = option.kernel_at;
        if let Some(place) = chosen.filter(|place| *place != found.kernel.phys_text) {
            bail!(
                "no kernel that the symbols fit lies at {place}: `xftrace status --memory` names \
                 those that do"
            );
        }
        Ok(Self {
            link: Link::attach(&ram, &found.kernel, &found.symbols),
            others: chosen.map_or(found.others, |_| Vec::new()),
            kernel: found.kernel,
            ram,
            symbols_path: found.path,
            symbols: found.symbols,
            name: path.file_name().map_or_else(String::new, |name| {
                name.to_string_lossy().escape_debug().to_string()
            }),
        })
    }

    /// Why what is said of its kernel may say nothing of the guest.
    pub(super) fn doubt(&self) -> Option<String> {
        let others: Vec<String> = self.others.iter().take(SHOWN).map(Gpa::to_string).collect();
        (!others.is_empty()).then(|| {
            let more = if self.others.len() > SHOWN {
                ", ..."
            } else {
                ""
            };
            format!(
                "the symbols fit {} more in the image (at {}{more}): a reboot left them, or \
                 somebody put them there. This is of the one at {}, and nothing \
                 tells whether it is the one that ran; --kernel-at says which to take",
                self.others.len(),
                others.join(", "),
                self.kernel.phys_text
            )
        })
    }

    /// What lies in the image's ring buffers, as a session; `klog` has the
    /// keys, where the records are under any.
    pub(super) fn session(&self, klog: Option<&Path>) -> anyhow::Result<(TempDir, Session)> {
        let link = match &self.link {
            Ok(link) => link,
            Err(error) => bail!("{error}"),
        };
        let mode = link.mode();
        match (mode, klog) {
            (Mode::Keyed, None) => bail!(
                "the records in the image are under keys: name the klog of the session that was \
                 open then, with --klog FILE"
            ),
            (Mode::Plain, Some(_)) => bail!(
                "the image's kernel is one without the xftrace patch, and its records are under \
                 no keys: leave out --klog"
            ),
            (Mode::Keyed, Some(klog)) => {
                Klog::read(klog)?;
            }
            (Mode::Plain, None) => {}
        }
        let (mut reader, _) = link.reader(&self.ram, &self.kernel, 0, &[])?;
        let keep = tempfile::tempdir().context("cannot make a directory for the session")?;
        let dir = keep.path().join("session");
        let meta = Meta {
            version: 1,
            domain: self.name.clone(),
            uuid: Uuid::nil(),
            mode,
            state: State::Closed,
            qemu: QemuProcess {
                pid: 0,
                start_time: 0,
            },
            started_ns: 0,
            ended_ns: None,
            end: Some(EndReason::Off),
            interval_ns: 0,
            switches: Vec::new(),
            boots: Vec::new(),
            counters: Counters::default(),
            guest_counts: None,
        };
        let mut writer = SessionWriter::create(&dir, meta)?;
        let symbols = writer.store_symbols(&self.symbols, self.kernel.slide)?;
        writer.meta.boots.push(Boot {
            number: 1,
            boot_id: link.boot_id(),
            banner: self.kernel.banner.clone(),
            symbols,
            slide: self.kernel.slide,
            phys_text: self.kernel.phys_text.0,
            levels: self.kernel.levels,
            nr_cpus: reader.nr_cpus(),
            types: link.format(),
            found_ns: 0,
            clocks: None,
        });
        if let Some(klog) = klog {
            std::fs::copy(klog, dir.join(KLOG_FILE))
                .with_context(|| format!("cannot copy {}", klog.display()))?;
        }
        // An image does not change: each of its pages is read once.
        loop {
            let mut stored = Ok(());
            let drained = reader.drain(&self.ram, &mut |chunk| {
                if stored.is_ok() {
                    stored = writer.append(&chunk, 0);
                }
            })?;
            stored?;
            writer.sync()?;
            let counters = &mut writer.meta.counters;
            counters.bytes += drained.bytes;
            counters.torn_pages += drained.torn;
            counters.damaged += drained.damaged;
            if !drained.cut {
                break;
            }
        }
        self.ram.check()?;
        writer.save()?;
        writer.sync()?;
        let counters = writer.meta.counters;
        if counters.damaged > 0 {
            out::message(&format!(
                "warning: {} of the image's ring buffers cannot be followed",
                counters.damaged
            ));
        }
        if counters.bytes == 0 {
            out::message(&format!(
                "the image's ring buffers are empty (its switch: {})",
                self.switch()
            ));
        }
        Ok((keep, Session::open(&dir)?))
    }

    /// What `xftrace status` says of how far the records can be trusted.
    pub(super) fn mode(&self) -> Option<&'static str> {
        self.link.as_ref().ok().map(|link| link.mode().text())
    }

    /// What `xftrace status` says of whether the kernel was recording.
    pub(super) fn switch(&self) -> String {
        let link = match &self.link {
            Ok(link) => link,
            Err(error) => return error.to_string(),
        };
        match link {
            Link::Keyed(control) => match control.heartbeat(&self.ram) {
                Ok(beat) => format!(
                    "{:?}, boot id {:016x}, {} heartbeats",
                    beat.state, control.ident.boot_id, beat.beats
                ),
                Err(error) => error.to_string(),
            },
            Link::Plain(stock) => {
                let array = stock.tracing::<&str>(&self.ram, &[]);
                let text = array.and_then(|array| {
                    let on = array.recording(&self.ram)?;
                    Ok(format!(
                        "{}, {}, {} KiB for each CPU",
                        array.tracer,
                        if on { "recording" } else { "not recording" },
                        array.kb
                    ))
                });
                text.unwrap_or_else(|error| error.to_string())
            }
        }
    }
}

/// A raw image as it lies there. That is right for what was saved with the hole
/// below 4 GiB in it, and for little memory; a copy of a large guest's memory
/// file has no hole, and where its RAM goes on, only the machine tells.
fn flat(size: u64) -> Result<Layout, LayoutError> {
    let flat = Layout::flat(size)?;
    let split = [MachineKind::I440fx, MachineKind::Q35]
        .into_iter()
        .any(|kind| Layout::pc(size, kind).is_ok_and(|layout| layout != flat));
    if split {
        out::message(
            "warning: so much memory has a hole below 4 GiB, and it is not known whether this raw \
             image has it too; if it is a copy of the guest's memory file, type --machine pc or \
             --machine q35 as well",
        );
    }
    Ok(flat)
}

/// The first holes of an image in words; None where it has none.
fn describe(left_out: &[(Gpa, u64)]) -> Option<String> {
    const SHOWN: usize = 4;
    if left_out.is_empty() {
        return None;
    }
    let shown = left_out.iter().take(SHOWN);
    let mut parts: Vec<String> = shown
        .map(|(gpa, len)| format!("{len} bytes from {gpa} on"))
        .collect();
    if left_out.len() > SHOWN {
        parts.push(format!("and {} more", left_out.len() - SHOWN));
    }
    Some(parts.join(", "))
}
