//! What a trace tells of its guest: findings, to the log, to the session and to
//! the command that the configuration names.

use std::sync::Arc;

use crate::detect::Store;
use crate::session::{Finding, FindingKind, ModuleLook, ModuleSymbols};

use super::super::notify::{Notifier, Told};
use super::super::protocol::JudgedStatus;
use super::super::sentry::{self, OfModules, Sentry};
use super::super::watch::wall_ns;
use super::Trace;

const FAILED: &str = "the thread that judges has ended for a fault of xftrace's own; see the log";

/// What a trace is judged by while it is on.
#[derive(Default)]
pub(super) struct Judging {
    pub(super) sentry: Option<Sentry>,
    notifier: Option<Arc<Notifier>>,
    /// The baseline's name, and the kernel that it is of.
    baseline: Option<String>,
    kernel: String,
    /// Why nothing is judged.
    cannot: Option<String>,
    /// How often something was told of.
    findings: u64,
}

impl Judging {
    /// The guest's list of modules is this from now on.
    pub(super) fn modules(&mut self, look: ModuleLook) {
        if let Some(sentry) = &mut self.sentry {
            sentry.modules(OfModules::List(look));
        }
    }

    /// This is what a module says its functions are called.
    pub(super) fn module_symbols(&mut self, symbols: ModuleSymbols) {
        if let Some(sentry) = &mut self.sentry {
            sentry.modules(OfModules::Symbols(symbols));
        }
    }
}

impl Trace {
    /// Has findings told to a command.
    pub(in crate::helper) fn tell(&mut self, notifier: Option<Arc<Notifier>>) {
        self.judging.notifier = notifier;
    }

    /// Judges what is drained from now on by the baseline of this name. Where
    /// that cannot be, the log and the status say so: a trace that is not
    /// judged is worth having.
    pub(in crate::helper) fn judge_by(&mut self, name: String, store: &Store) {
        let judging = &mut self.judging;
        judging.baseline = Some(name.clone());
        let sentry = store
            .load(&name)
            .map_err(|error| error.to_string())
            .and_then(|baseline| {
                judging.kernel.clone_from(&baseline.kernel);
                Sentry::start(baseline).map_err(|error| error.to_string())
            });
        match sentry {
            Ok(sentry) => {
                judging.sentry = Some(sentry);
                self.tell_boot();
            }
            Err(why) => self.not_judged(why),
        }
    }

    fn not_judged(&mut self, why: String) {
        log::error!("the trace is not judged while it is on: {why}");
        self.judging.cannot = Some(why);
    }

    /// How the trace is judged.
    pub(in crate::helper) fn judged(&self) -> Option<JudgedStatus> {
        Some(JudgedStatus {
            baseline: self.judging.baseline.clone()?,
            cannot: match &self.judging.sentry {
                Some(sentry) if sentry.has_failed() => Some(FAILED.to_owned()),
                _ => self.judging.cannot.clone(),
            },
            findings: self.judging.findings,
        })
    }

    /// Has the sentry judge the boot that is on, if the baseline is of its kernel.
    pub(super) fn tell_boot(&mut self) {
        let judging = &mut self.judging;
        let (Some(sentry), Some(live)) = (&mut judging.sentry, &self.live) else {
            return;
        };
        let banner = live.guest.kernel.banner.clone();
        let other = banner.trim_end() != judging.kernel;
        sentry.boot(sentry::Kernel {
            boot: self.writer.meta.boots.last().map_or(1, |boot| boot.number),
            symbols: Arc::clone(&live.guest.symbols),
            slide: live.guest.kernel.slide,
            banner,
            tells_offline: live.online.is_some(),
        });
        judging.cannot = None;
        if other {
            let why = format!(
                "the baseline is of another kernel ({}) than the guest runs; 'xftrace baseline \
                 learn' makes one for it",
                judging.kernel
            );
            self.not_judged(why);
        }
    }

    /// Notes what the call flow showed.
    pub(super) fn detected(&mut self, found: &[crate::detect::Finding]) {
        for finding in found {
            self.judging.findings += 1;
            self.finding(Finding {
                wall_ns: wall_ns(),
                kind: FindingKind::ControlFlow(Box::new(finding.into())),
            });
        }
    }

    /// Notes, and logs, what the guest was caught at, and has it told.
    pub(in crate::helper) fn finding(&mut self, finding: Finding) {
        let told = Told {
            domain: &self.writer.meta.domain,
            uuid: self.writer.meta.uuid,
            session: Some(self.writer.dir()),
            finding: &finding,
            again: false,
        };
        told.tell(&mut self.said, self.judging.notifier.as_deref());
        if let Err(error) = self.writer.finding(&finding) {
            self.cannot_store(&error);
        }
    }
}
