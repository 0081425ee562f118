//! What a trace tells of its guest: findings, to the log, to the session and to
//! the command that the configuration names.

use std::sync::Arc;

use crate::detect::Baseline;
use crate::session::{Finding, FindingKind, FINDINGS_FILE};

use super::super::notify::{brief, Notifier, Told};
use super::super::ratelimit::Verdict;
use super::super::sentry::{self, Sentry};
use super::super::watch::wall_ns;
use super::Trace;

impl Trace {
    /// Has findings told to a command.
    pub(in crate::helper) fn tell(&mut self, notifier: Option<Arc<Notifier>>) {
        self.notifier = notifier;
    }

    /// Judges what is drained from now on.
    pub(in crate::helper) fn judge_by(&mut self, baseline: Baseline) -> std::io::Result<()> {
        self.sentry = Some(Sentry::start(baseline)?);
        self.tell_boot();
        Ok(())
    }

    pub(super) fn tell_boot(&mut self) {
        let (Some(sentry), Some(live)) = (&mut self.sentry, &self.live) else {
            return;
        };
        sentry.boot(sentry::Kernel {
            boot: self.writer.meta.boots.last().map_or(1, |boot| boot.number),
            symbols: Arc::clone(&live.guest.symbols),
            slide: live.guest.kernel.slide,
            banner: live.guest.kernel.banner.clone(),
        });
    }

    /// Notes what the call flow showed.
    pub(super) fn detected(&mut self, found: &[crate::detect::Finding]) {
        for finding in found {
            self.finding(Finding {
                wall_ns: wall_ns(),
                kind: FindingKind::ControlFlow(Box::new(finding.into())),
            });
        }
    }

    /// Notes, and logs, what the guest was caught at, and has it told.
    pub(in crate::helper) fn finding(&mut self, finding: Finding) {
        if let Verdict::Say { dropped } = self.said.ask() {
            log::warn!(
                "domain {}: {}{}",
                self.writer.meta.domain.escape_debug(),
                serde_json::to_string(&brief(&finding.kind)).unwrap_or_default(),
                if dropped > 0 {
                    format!(" ({dropped} findings before it are in {FINDINGS_FILE} only)")
                } else {
                    String::new()
                }
            );
        }
        if let Some(notifier) = &self.notifier {
            let told = Told {
                domain: &self.writer.meta.domain,
                uuid: self.writer.meta.uuid,
                session: self.writer.dir(),
                finding: &finding,
            };
            notifier.tell(told.json());
        }
        if let Err(error) = self.writer.finding(&finding) {
            self.cannot_store(&error);
        }
    }
}
