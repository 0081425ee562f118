//! `xftrace on`.

use std::time::Duration;

use super::{client, out, target, Context, Exit};
use crate::cli::args::OnArgs;
use crate::helper::protocol::{Reply, Request};
use crate::session::Mode;

/// Runs the command.
pub(super) fn run(context: &Context, args: &OnArgs) -> anyhow::Result<Exit> {
    let config = context.config()?;
    let domain = target::running(context, &config, args.domain.domain.as_deref())?;
    let request = Request::On {
        functions: args.functions.clone(),
        interval_ns: args.interval.map(|time| time.as_nanos() as u64),
        buffer_kb: args.buffer_size.map(|size| (size.0 >> 10) as u32),
    };
    let Reply::On {
        functions,
        session,
        pickup_ns,
        worked_ns,
        mode,
    } = client::ask(context, &config, &domain, &request)?
    else {
        anyhow::bail!("the helper's answer is none to 'on'; is it of another version?");
    };
    let millis = |ns| Duration::from_nanos(ns).as_millis();
    let how = match mode {
        Mode::Keyed => format!(
            "the guest took it up after {} ms and patched its call sites in {} ms",
            millis(pickup_ns),
            millis(worked_ns)
        ),
        Mode::Plain => format!("mode {}", mode.text()),
    };
    out::message(&format!(
        "tracing {} in domain '{}'\nxftrace: {how}\nxftrace: recording to {}",
        functions.join(" "),
        client::name(&domain),
        session.display()
    ));
    Ok(Exit::Done)
}
