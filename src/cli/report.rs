//! `xftrace report`.

use std::fs::File;
use std::io::BufWriter;
use std::path::{Path, PathBuf};

use anyhow::Context as _;

use super::image::Image;
use super::out::Stdout;
use super::{Context, Exit};
use crate::cli::args::{Clock, Format, ReportArgs};
use crate::config::Config;
use crate::libvirt::connection::{Connection, Mode};
use crate::output::{self, TimeColumn, Weight};
use crate::session::{self, Session};

/// Runs the command.
pub(super) fn run(context: &Context, args: &ReportArgs) -> anyhow::Result<Exit> {
    // An image's session is gone with this.
    let mut _keep = None;
    let session = match (&args.session, &args.domain, &args.image.memory) {
        (Some(dir), ..) => Session::open(dir)?,
        (None, Some(domain), _) => Session::open(&newest(context, &context.config()?, domain)?)?,
        (None, None, Some(memory)) => {
            let image = Image::open(&context.config()?, &args.image, memory)?;
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

/// The newest session of a domain. libvirt is asked what domain is meant; a
/// domain that it does not know (any more) may still have left sessions.
fn newest(context: &Context, config: &Config, typed: &str) -> anyhow::Result<PathBuf> {
    let known = Connection::open(context.global.connect.as_deref(), Mode::ReadOnly)
        .and_then(|connection| connection.domain(typed));
    let name = known.map_or_else(|_| typed.to_owned(), |domain| domain.name().to_owned());
    let dir = session::domain_dir(&config.paths.sessions, &name);
    session::list(&dir).into_iter().next().with_context(|| {
        format!(
            "domain '{}' has no session below {}; 'xftrace on' begins one",
            name.escape_debug(),
            dir.display()
        )
    })
}
