//! `xftrace helper`.

use anyhow::Context as _;

use super::{logging, Context, Exit};
use crate::cli::args::HelperArgs;
use crate::helper::{self, Options};
use crate::libvirt::launch::own_session;
use crate::libvirt::run_dir::RunDir;
use crate::libvirt::xml::DomainXml;

/// Runs the command.
pub(super) fn run(context: &Context, args: &HelperArgs) -> anyhow::Result<Exit> {
    own_session();
    let config = context.config()?;
    logging::init(&config.log);
    // Nobody may read this process's standard error: the log has to tell.
    start(config, args).inspect_err(|error| log::error!("domain {}: {error:#}", args.uuid))?;
    Ok(Exit::Done)
}

fn start(config: crate::config::Config, args: &HelperArgs) -> anyhow::Result<()> {
    let xml = match &args.xml {
        Some(named) => named.clone(),
        None => RunDir::at(&config.paths.run).xml_path(args.uuid),
    };
    let bytes =
        std::fs::read(&xml).with_context(|| format!("cannot read the domain's XML {xml:?}"))?;
    let domain = DomainXml::parse_bytes(&bytes)
        .with_context(|| format!("the domain's XML {xml:?} cannot be understood"))?;
    anyhow::ensure!(
        domain.uuid == args.uuid,
        "{xml:?} is the XML of domain {}, not of {}",
        domain.uuid,
        args.uuid
    );
    helper::run(Options { domain, config })
}
