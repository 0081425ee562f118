//! Whether a domain is to be traced, and with which options: those of its
//! metadata, else those of the configuration where its name is in there.

use std::path::PathBuf;
use std::time::Duration;

use super::xml::{Access, DomainXml, Source};
use crate::config::Config;

/// How a domain is enrolled, with every option decided.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Enrolment {
    /// Where it says so.
    pub by: By,
    /// Functions to trace where `xftrace on` names none. May be empty.
    pub functions: Vec<String>,
    /// How long one key lasts.
    pub interval: Duration,
    /// Whether to trace from the domain's start on.
    pub at_start: bool,
    /// Whether the domain must not start without being traced.
    pub required: bool,
    /// The System.map of the guest's kernel; None: found by banner.
    pub symbols: Option<PathBuf>,
}

/// Where it says that a domain is enrolled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum By {
    /// In the domain's metadata.
    Metadata,
    /// In the configuration, by name.
    Name,
}

impl Enrolment {
    /// How this domain is enrolled; None where it is not.
    pub fn of(domain: &DomainXml, config: &Config) -> Option<Enrolment> {
        if let Some(trace) = &domain.trace {
            return Some(Enrolment {
                by: By::Metadata,
                functions: match trace.functions.is_empty() {
                    true => config.functions.clone(),
                    false => trace.functions.clone(),
                },
                interval: trace.interval.unwrap_or(config.interval),
                at_start: trace.at_start,
                required: trace.required,
                symbols: trace.symbols.clone(),
            });
        }
        config.auto_enroll.matches(&domain.name).then(|| Enrolment {
            by: By::Name,
            functions: config.functions.clone(),
            interval: config.interval,
            at_start: config.at_start,
            required: false,
            symbols: None,
        })
    }
}

/// What of a domain's memory, as its XML has it, keeps it from being traced;
/// None where nothing does.
pub fn untraceable(domain: &DomainXml) -> Option<String> {
    let backing = &domain.backing;
    let private = |access: &Option<Access>| *access == Some(Access::Private);
    let what = if backing.hugepages {
        "its memory is in huge pages, which xftrace does not support"
    } else if backing.source == Some(Source::Memfd) {
        "its memory is a memfd, which xftrace does not support"
    } else if backing.source != Some(Source::File) {
        "its memory is not file-backed"
    } else if backing.access != Some(Access::Shared) {
        "its memory file is private (access mode='private'): the guest's writes never reach it"
    } else if domain.numa.iter().any(|cell| private(&cell.access))
        || domain.modules.iter().any(|module| private(&module.access))
    {
        "a part of its memory is private, so that the guest's writes never reach the file"
    } else {
        return None;
    };
    Some(what.to_owned())
}
