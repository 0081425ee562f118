//! `xftrace report`.

use std::fs::File;
use std::io::BufWriter;
use std::path::Path;

use anyhow::Context as _;

use super::image::Image;
use super::out::Stdout;
use super::{target, Context, Exit};
use crate::cli::args::{Clock, Format, ReportArgs};
use crate::output::{self, TimeColumn, Weight};
use crate::session::Session;

/// Runs the command.
pub(super) fn run(context: &Context, args: &ReportArgs) -> anyhow::Result<Exit> {
    // An image's session is gone with this.
    let mut _keep = None;
    let session = match (&args.session, &args.domain, &args.image.memory) {
        (Some(dir), ..) => Session::open(dir)?,
        (None, Some(typed), _) => {
            let known = target::known(context, typed);
            let name = known.map_or_else(|| typed.clone(), |domain| domain.name);
            Session::open(&target::newest_session(&context.config()?, &name)?)?
        }
        (None, None, Some(memory)) => {
            let image = Image::open(&context.config()?, &args.image, memory)?;
            if let Some(doubt) = image.doubt() {
                super::out::message(&format!("warning: {doubt}"));
            }
            let (dir, session) = image.session(args.klog.as_deref())?;
            _keep = Some(dir);
            session
        }
        // clap wants one of the three.
        (None, None, None) => anyhow::bail!("name a session's directory, or a domain with -d"),
    };
    let format = match args.format {
        Format::Text => output::Format::Text(match args.clock {
            Clock::Host => TimeColumn::Wall,
            Clock::Guest => TimeColumn::Guest,
        }),
        Format::Json => output::Format::Json,
        Format::Folded => output::Format::Folded {
            weight: Weight::OwnTime,
            by_pid: false,
        },
    };
    match args
        .output
        .as_deref()
        .filter(|file| *file != Path::new("-"))
    {
        Some(file) => {
            let out = File::create(file).with_context(|| format!("cannot create {file:?}"))?;
            format.session(&session, BufWriter::new(out))?;
        }
        None => {
            format.session(&session, BufWriter::new(Stdout::new()))?;
        }
    }
    Ok(Exit::Done)
}
