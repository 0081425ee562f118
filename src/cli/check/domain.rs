//! Both parts of `xftrace check`, of one domain.

use anyhow::bail;

use super::memory::{self, Looked};
use super::{baseline, flow, Checked};
use crate::cli::args::CheckArgs;
use crate::cli::{target, Context};
use crate::config::Config;
use crate::libvirt::connection::{Connection, Mode};
use crate::libvirt::enrolment::Enrolment;
use crate::libvirt::live::{doing, Doing};
use crate::libvirt::xml::DomainXml;
use crate::session::{self, Meta, QemuProcess};

const NO_LIFE: &str =
    "no kernel in the guest's memory shows a sign of life, though the domain runs: what was looked \
     at may be a copy that somebody left there, and not what runs";
const PAUSED: &str =
    "the domain stands still: what was looked at is the kernel where the helper saw it live, or \
     else the lowest in its memory";
const AT_REST: &str = "the domain does not run: its memory was not looked at";
const NO_DOMAIN: &str = "libvirt knows no such domain: no memory was looked at";
const NO_SESSION: &str =
    "the domain has no session: its call flow was not looked at ('xftrace on' begins one)";

/// A domain's memory, if it runs, and its newest session, if it has one. One that
/// libvirt does not know any more may still have left sessions.
pub(super) fn check(
    context: &Context,
    config: &Config,
    args: &CheckArgs,
    checked: &mut Checked,
) -> anyhow::Result<()> {
    let known = match &args.domain {
        Some(typed) => target::known(context, typed),
        None => Some(target::running(context, config, None)?),
    };
    let typed = args.domain.as_deref().unwrap_or_default();
    let name = known.as_ref().map_or(typed, |domain| &domain.name);
    checked.domain = Some(name.escape_debug().to_string());
    // A domain has an id while it runs.
    let running = known.as_ref().filter(|domain| domain.id.is_some());
    let looked = match running {
        Some(domain) => look(config, args, domain, checked)?,
        None => {
            let uri = context.global.connect.as_deref();
            match (&known, Connection::open(uri, Mode::ReadOnly)) {
                (Some(_), _) => checked.remarks.push(AT_REST.to_owned()),
                (None, Ok(_)) => checked.remarks.push(NO_DOMAIN.to_owned()),
                // It may run.
                (None, Err(error)) => checked
                    .doubts
                    .push(format!("no memory was looked at: {error}")),
            }
            None
        }
    };
    let sessions = session::list(&session::domain_dir(&config.paths.sessions, name));
    match sessions.first() {
        Some(dir) => {
            let own = Enrolment::baseline_of(known.as_ref(), config);
            let mut verdict = flow::judge(config, dir, baseline(args, own.as_deref()))?;
            let stale = looked.and_then(|now| {
                let meta = Meta::load(dir).ok()?;
                let last = meta.boots.last().map(|boot| boot.boot_id);
                of_another_boot((meta.qemu, last), (now.qemu, now.boot_id))
            });
            if let Some(why) = stale {
                verdict.doubt(why.to_owned());
            } else if running.is_none() {
                let last = "what the call flow says is of the domain's last session";
                checked.remarks.push(last.to_owned());
            }
            checked.flow = Some(verdict);
        }
        None => checked.remarks.push(NO_SESSION.to_owned()),
    }
    if checked.memory.is_none() && checked.flow.is_none() {
        let why = [&checked.doubts[..], &checked.remarks].concat();
        bail!("there is nothing to check: {}", why.join("; "));
    }
    Ok(())
}

/// The memory of a domain that runs. What runs there now, as far as it could be told.
fn look(
    config: &Config,
    args: &CheckArgs,
    domain: &DomainXml,
    checked: &mut Checked,
) -> anyhow::Result<Option<Looked>> {
    let (found, looked) = match memory::of_domain(config, args, domain) {
        Ok(mut looked) => (
            std::mem::replace(&mut looked.memory, Ok(None)),
            Some(looked),
        ),
        Err(error) => (Err(error), None),
    };
    match found {
        Ok(Some(found)) => {
            checked.found(found);
            let lives = looked.as_ref().is_some_and(|looked| looked.lives);
            if !lives && doing(&config.paths.libvirt_run, domain) == Some(Doing::StandsStill) {
                checked.remarks.push(PAUSED.to_owned());
            } else if !lives {
                checked.doubts.push(NO_LIFE.to_owned());
            }
        }
        Ok(None) => checked.doubts.push(memory::NO_IMAGE.to_owned()),
        // Who names the kernel wants the memory looked at.
        Err(error) if args.kernel.is_some() => return Err(error),
        Err(error) => checked
            .doubts
            .push(format!("the guest's memory was not looked at: {error:#}")),
    }
    Ok(looked)
}

/// A QEMU process, and what the kernel in it calls its boot, as far as that is known.
type Ran = (QemuProcess, Option<u64>);

/// Why a session whose last boot this is says nothing of what runs now.
fn of_another_boot(session: Ran, now: Ran) -> Option<&'static str> {
    if session.0 != now.0 {
        return Some(
            "the session is of an earlier start of the domain, and says nothing of the one that \
             runs now; trace that too ('xftrace on')",
        );
    }
    (session.1.is_some() && now.1.is_some() && session.1 != now.1).then_some(
        "the session is of an earlier boot of the guest, and says nothing of the one that runs \
         now; trace that too ('xftrace on')",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_says_nothing_of_another_boot_than_its_last() {
        let qemu = |start_time| QemuProcess { pid: 7, start_time };
        let told = |session, now| of_another_boot(session, now).is_some();
        let session = (qemu(8), Some(1));
        assert!(!told(session, (qemu(8), Some(1))));
        assert!(told(session, (qemu(8), Some(2))));
        assert!(told(session, (qemu(9), Some(1))));
        assert!(told(session, (qemu(9), None)));
        // Which boot it is, is not known: why, is told where memory is looked at.
        assert!(!told(session, (qemu(8), None)));
        assert!(!told((qemu(8), None), (qemu(8), Some(1))));
    }
}
