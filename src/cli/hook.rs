//! `xftrace hook`: what libvirt's qemu hook runs.
//!
//! A domain starts as if this were not there. So: whatever goes wrong, also a
//! panic, the answer is yes; nothing goes to standard output, which libvirt
//! would take for a changed XML; and after [`BUDGET`] this ends, done or not.

use std::ffi::OsString;
use std::io::{Read, Write};
use std::panic::catch_unwind;
use std::time::Duration;

use super::out::Stdout;
use super::{logging, out, Context, Exit};
use crate::cli::args::HookArgs;
use crate::config::Config;
use crate::libvirt::hook::{decide, Decision, Operation};
use crate::libvirt::launch::{Launch, Started};
use crate::libvirt::run_dir::RunDir;
use crate::libvirt::xml::{DomainXml, MAX_XML};

/// The exit status by which the hook refuses the start of a domain. The
/// hook's script turns this one, and no other, into a failure: a binary that
/// does not even start (a library that is missing, say) exits with statuses of
/// its own, and must not keep domains from starting.
pub(super) const REFUSED: u8 = 3;

/// What is to lie in libvirt's hooks/qemu.d. It puts `--` before all that
/// libvirt passes, so that nothing of that is an option.
const SCRIPT: &str = include_str!("../../libvirt-hooks/50-xftrace");

/// How long libvirt may be kept waiting.
const BUDGET: Duration = Duration::from_secs(2);

/// Runs the command.
pub(super) fn run(context: &Context, args: &HookArgs) -> anyhow::Result<Exit> {
    if args.script {
        Stdout::new().write_all(SCRIPT.as_bytes())?;
        return Ok(Exit::Done);
    }
    std::thread::spawn(|| {
        std::thread::sleep(BUDGET);
        std::process::exit(0);
    });
    let handled = catch_unwind(|| handle(context, &args.arguments));
    Ok(handled.unwrap_or(Exit::Done))
}

fn handle(context: &Context, arguments: &[OsString]) -> Exit {
    let (config, problem) = match context.config() {
        Ok(config) => (config, None),
        Err(error) => (Config::default(), Some(error)),
    };
    logging::init(&config.log);
    if let Some(error) = problem {
        log::error!("hook: {error:#}; the defaults are used instead");
    }
    if let Err(error) = RunDir::at(&config.paths.run).note_hook_call() {
        log::warn!("hook: {:#}", anyhow::Error::new(error));
    }
    let operation = arguments.get(1).map(|text| text.to_string_lossy());
    let operation = operation.map_or(Operation::Other, |text| Operation::of(&text));
    if !operation.matters() {
        return Exit::Done;
    }
    match read_xml() {
        Ok((text, domain)) => act(context, &config, operation, &text, &domain),
        Err(error) => {
            let name = arguments.first().cloned().unwrap_or_default();
            log::error!("hook: domain {name:?} is not traced: {error:#}");
            Exit::Done
        }
    }
}

/// Reads the domain's XML from standard input.
fn read_xml() -> anyhow::Result<(Vec<u8>, DomainXml)> {
    let mut text = Vec::new();
    std::io::stdin()
        .lock()
        .take(MAX_XML as u64 + 1)
        .read_to_end(&mut text)?;
    let domain = DomainXml::parse_bytes(&text)?;
    Ok((text, domain))
}

fn act(
    context: &Context,
    config: &Config,
    operation: Operation,
    text: &[u8],
    domain: &DomainXml,
) -> Exit {
    let run_dir = RunDir::at(&config.paths.run);
    let name = &domain.name;
    let decision = decide(operation, domain, config);
    if matches!(decision, Decision::Helper | Decision::Explain(_)) {
        for problem in domain.trace.iter().flat_map(|trace| &trace.problems) {
            log::warn!("hook: domain '{name}': in its metadata, {problem}");
        }
    }
    match decision {
        Decision::Nothing => {}
        Decision::Explain(why) => log::warn!("hook: {why}"),
        Decision::Helper => match start(context, &run_dir, text, domain) {
            Ok(how) => log::info!("hook: domain '{name}': {how}"),
            Err(error) => log::error!("hook: domain '{name}' is not traced: {error:#}"),
        },
        Decision::Forget => {
            if let Err(error) = run_dir.forget(domain.uuid) {
                log::warn!("hook: domain '{name}': {:#}", anyhow::Error::new(error));
            }
        }
        Decision::Refuse(why) => {
            log::error!("hook: {why}");
            // libvirt makes it part of the error that who starts the domain
            // gets to see.
            out::message(&why);
            return Exit::Refused;
        }
    }
    Exit::Done
}

/// Saves the domain's XML and starts a helper where none runs, in the order
/// that [`RunDir`] asks for. Says what was done.
pub(super) fn start(
    context: &Context,
    run_dir: &RunDir,
    text: &[u8],
    domain: &DomainXml,
) -> anyhow::Result<String> {
    let xml = run_dir.save(domain.uuid, text)?;
    if run_dir.has_helper(domain.uuid) {
        return Ok("its helper runs already".to_owned());
    }
    let started = Launch {
        uuid: domain.uuid,
        xml: &xml,
        config: context.global.named_config(),
    }
    .start()?;
    Ok(match started {
        Started::Systemd => format!("xftrace@{}.service is starting", domain.uuid),
        Started::Process(pid) => format!("helper started as process {pid}"),
    })
}
