//! Whether a domain is to be traced, and with which options: those of its
//! metadata, else those of the configuration where its name is in there.

use std::path::PathBuf;
use std::time::Duration;

use super::xml::{Access, DomainXml, Source};
use crate::config::{Config, IntegrityInterval};

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
    /// The baseline that it is checked against.
    pub baseline: Option<String>,
    /// How often the kernel in its memory is looked at.
    pub integrity_interval: IntegrityInterval,
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
                baseline: Self::baseline_of(Some(domain), config),
                integrity_interval: trace
                    .integrity_interval
                    .unwrap_or(config.integrity_interval),
            });
        }
        config.auto_enroll.matches(&domain.name).then(|| Enrolment {
            by: By::Name,
            functions: config.functions.clone(),
            interval: config.interval,
            at_start: config.at_start,
            required: false,
            symbols: None,
            baseline: Self::baseline_of(None, config),
            integrity_interval: config.integrity_interval,
        })
    }

    /// The baseline that a domain, or one of which nothing is known, is checked
    /// against.
    pub fn baseline_of(domain: Option<&DomainXml>, config: &Config) -> Option<String> {
        let own = domain.and_then(|domain| domain.trace.as_ref()?.baseline.clone());
        own.or_else(|| Some(config.baseline.clone()).filter(|name| !name.is_empty()))
    }
}

/// What of a domain's memory, as its XML has it, keeps it from being traced;
/// None where nothing does.
///
/// That is private memory of a file, and nothing else: the file stands for the
/// guest's memory and never shows what the guest writes. Memory of no file is
/// read through the QEMU process.
pub fn untraceable(domain: &DomainXml) -> Option<String> {
    let backing = &domain.backing;
    let private = |access: &Option<Access>| *access == Some(Access::Private);
    let in_files = backing.hugepages || backing.source == Some(Source::File);
    let what = if in_files && backing.access != Some(Access::Shared) {
        match backing.hugepages {
            true => {
                "its huge pages are private (<access mode='shared'/> is missing): the guest's \
                     writes never reach their file"
            }
            false => {
                "its memory file is private (access mode='private'): the guest's writes never \
                      reach it"
            }
        }
    } else if backing.source == Some(Source::Memfd) && private(&backing.access) {
        "its memfd is private (access mode='private'): the guest's writes never reach it"
    } else if (in_files || backing.source == Some(Source::Memfd))
        && (domain.numa.iter().any(|cell| private(&cell.access))
            || domain.modules.iter().any(|module| private(&module.access)))
    {
        "a part of its memory is private, so that the guest's writes never reach the file"
    } else {
        return None;
    };
    Some(what.to_owned())
}

/// What a domain's memory is, as its XML has it, in a word or two.
pub fn memory(domain: &DomainXml) -> &'static str {
    let backing = &domain.backing;
    match backing.source {
        _ if untraceable(domain).is_some() => "not traceable",
        Some(Source::Memfd) => "memfd",
        _ if backing.hugepages => "huge pages",
        Some(Source::File) => "shared file",
        _ => "anonymous",
    }
}

/// Why memory of no file is the second best, where a domain has that: what
/// `enroll` and `doctor` say.
pub fn advice(domain: &DomainXml) -> Option<&'static str> {
    (memory(domain) == "anonymous").then_some(
        "its memory is anonymous, and traced through /proc of the QEMU process: that costs the \
         host a system call and a copy more for each page read, cannot read or write a word \
         whole, and needs the right to trace QEMU. A shared file in RAM has none of this",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_domain_s_baseline_is_taken_and_else_the_configuration_s() {
        let domain = |trace: &str| {
            let uuid = "6f1d6a2e-1f0c-4b7e-9d3a-0123456789ab";
            DomainXml::parse(&format!(
                "<domain><name>web1</name><uuid>{uuid}</uuid><memory>1</memory>{trace}</domain>"
            ))
            .expect("a domain")
        };
        let enrolled = |attributes: &str| {
            domain(&format!(
                "<metadata><x:trace xmlns:x='urn:xftrace:domain:1.0' {attributes}/></metadata>"
            ))
        };
        let config = |baseline: &str, names: &str| {
            let text = format!("baseline = \"{baseline}\"\nauto_enroll = [\"{names}\"]\n");
            toml::from_str::<Config>(&text).expect("a configuration")
        };
        for (domain, config, taken) in [
            (
                enrolled("baseline='own'"),
                config("all", "db*"),
                Some("own"),
            ),
            (enrolled(""), config("all", "db*"), Some("all")),
            (domain(""), config("all", "web*"), Some("all")),
            (enrolled("baseline='own'"), config("", "db*"), Some("own")),
            (enrolled(""), config("", "db*"), None),
        ] {
            let enrolment = Enrolment::of(&domain, &config).expect("enrolled");
            assert_eq!(enrolment.baseline.as_deref(), taken, "{domain:?}");
        }
        // So are the looks at its memory.
        for (domain, taken) in [
            (enrolled("integrity-interval='2s'"), "2s"),
            (enrolled("integrity-interval='off'"), "off"),
            (enrolled(""), "1m"),
            (domain(""), "1m"),
        ] {
            let enrolment = Enrolment::of(&domain, &config("", "web*")).expect("enrolled");
            assert_eq!(
                enrolment.integrity_interval.to_string(),
                taken,
                "{domain:?}"
            );
        }
    }
}
