//! What libvirt's qemu hook is asked, and what follows from it.
//!
//! libvirt calls the hook with the domain's name, an operation, a
//! sub-operation and more, and the domain's XML on standard input
//! (<https://libvirt.org/hooks.html>). It waits for the hook, so that nothing
//! here waits for anything, and takes a failure in `prepare`, `start` and
//! `started` as a veto and one in `reconnect` as a reason to kill the running
//! domain. So whatever is wrong here, the answer is yes, but for one case: the
//! domain's own metadata says that it must not start untraced.
//!
//! Deciding is [`decide`], which does nothing; doing is `cli::hook`.

use super::enrolment::{untraceable, By, Enrolment};
use super::shell_word;
use super::xml::DomainXml;
use crate::config::Config;

/// The operations of the qemu hook.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Before libvirt prepares anything for a start.
    Prepare,
    /// Before QEMU is started.
    Start,
    /// QEMU runs, and with it the guest.
    Started,
    /// QEMU has ended.
    Stopped,
    /// libvirt has released everything.
    Release,
    /// A domain comes from another host.
    Migrate,
    /// A domain comes from a saved image.
    Restore,
    /// The daemon was started while the domain ran.
    Reconnect,
    /// A QEMU that libvirt did not start becomes a domain.
    Attach,
    /// Any that this version does not know.
    Other,
}

impl Operation {
    /// The operation of this name.
    pub fn of(name: &str) -> Operation {
        match name {
            "prepare" => Operation::Prepare,
            "start" => Operation::Start,
            "started" => Operation::Started,
            "stopped" => Operation::Stopped,
            "release" => Operation::Release,
            "migrate" => Operation::Migrate,
            "restore" => Operation::Restore,
            "reconnect" => Operation::Reconnect,
            "attach" => Operation::Attach,
            _ => Operation::Other,
        }
    }

    /// Whether anything ever follows from it.
    pub fn matters(self) -> bool {
        self != Operation::Other
    }
}

/// What follows from a hook event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Nothing.
    Nothing,
    /// The domain runs and is to be traced.
    Helper,
    /// The domain has ended.
    Forget,
    /// The domain should be traced and cannot be: why, and what to type.
    Explain(String),
    /// The domain must not start: why, and what to type.
    Refuse(String),
}

/// What follows from an operation on a domain.
pub fn decide(operation: Operation, domain: &DomainXml, config: &Config) -> Decision {
    let runs = match operation {
        Operation::Prepare | Operation::Start => return veto(domain, config),
        Operation::Stopped | Operation::Release => return Decision::Forget,
        Operation::Started | Operation::Reconnect => true,
        // These come before the domain runs, in the versions that are known;
        // `started` follows.
        Operation::Migrate | Operation::Restore | Operation::Attach => domain.id.is_some(),
        Operation::Other => false,
    };
    let Some(enrolment) = Enrolment::of(domain, config).filter(|_| runs) else {
        return Decision::Nothing;
    };
    match untraceable(domain) {
        None => Decision::Helper,
        Some(why) => Decision::Explain(explain(domain, &enrolment, &why)),
    }
}

/// Whether a domain that wants to start may.
fn veto(domain: &DomainXml, config: &Config) -> Decision {
    let required = Enrolment::of(domain, config).filter(|enrolment| enrolment.required);
    match (required, untraceable(domain)) {
        (Some(enrolment), Some(why)) => Decision::Refuse(format!(
            "{} (its metadata says required='yes')",
            explain(domain, &enrolment, &why)
        )),
        _ => Decision::Nothing,
    }
}

fn explain(domain: &DomainXml, enrolment: &Enrolment, why: &str) -> String {
    let name = &domain.name;
    let by = match enrolment.by {
        By::Metadata => "its metadata",
        By::Name => "auto_enroll in the configuration",
    };
    format!(
        "domain '{name}' cannot be traced, though {by} asks for it: {why}. Type `xftrace enroll \
         {}`, then shut the domain down and start it again",
        shell_word(name)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::AutoEnroll;

    const SHARED: &str =
        "<memoryBacking><source type='file'/><access mode='shared'/></memoryBacking>";

    fn domain(id: &str, backing: &str, attributes: Option<&str>) -> DomainXml {
        let metadata = attributes.map_or(String::new(), |attributes| {
            format!("<metadata><x:trace xmlns:x='urn:xftrace:domain:1.0' {attributes}/></metadata>")
        });
        DomainXml::parse(&format!(
            "<domain {id}><name>web-1</name><memory>1024</memory>{metadata}{backing}\
             <uuid>9a3f1c50-7f1e-4f0e-8f5e-0123456789ab</uuid></domain>"
        ))
        .unwrap()
    }

    fn all() -> Config {
        Config {
            auto_enroll: AutoEnroll::All,
            ..Config::default()
        }
    }

    const EVERY: [&str; 10] = [
        "prepare",
        "start",
        "started",
        "stopped",
        "release",
        "migrate",
        "restore",
        "reconnect",
        "attach",
        "some-later-one",
    ];

    #[test]
    fn a_domain_that_is_not_enrolled_is_left_alone() {
        let domain = domain("id='1'", "", None);
        for name in EVERY {
            let decision = decide(Operation::of(name), &domain, &Config::default());
            let forget = matches!(name, "stopped" | "release");
            assert_eq!(decision == Decision::Forget, forget, "{name}");
            assert_eq!(decision == Decision::Nothing, !forget, "{name}");
        }
    }

    #[test]
    fn a_running_enrolled_domain_gets_its_helper() {
        for domain in [
            domain("id='1'", SHARED, Some("")),
            domain("id='1'", SHARED, None),
        ] {
            for name in ["started", "reconnect", "migrate", "restore", "attach"] {
                let decision = decide(Operation::of(name), &domain, &all());
                assert_eq!(decision, Decision::Helper, "{name}");
            }
            for name in ["prepare", "start", "some-later-one"] {
                let decision = decide(Operation::of(name), &domain, &all());
                assert_eq!(decision, Decision::Nothing, "{name}");
            }
        }
        let coming = domain("", SHARED, Some(""));
        for name in ["migrate", "restore", "attach"] {
            let decision = decide(Operation::of(name), &coming, &all());
            assert_eq!(decision, Decision::Nothing, "{name}");
        }
    }

    #[test]
    fn what_cannot_be_traced_is_explained() {
        let private = SHARED.replace("shared", "private");
        let of = |trace| domain("id='1'", &private, trace);
        for domain in [of(Some("")), of(None)] {
            let Decision::Explain(text) = decide(Operation::Started, &domain, &all()) else {
                panic!("{domain:?}");
            };
            assert!(text.contains("`xftrace enroll web-1`"), "{text}");
            assert!(text.contains("private"), "{text}");
        }
    }

    #[test]
    fn only_a_required_trace_vetoes_and_only_a_start() {
        let private = SHARED.replace("shared", "private");
        let required = domain("id='1'", &private, Some("required='yes'"));
        for name in EVERY {
            let decision = decide(Operation::of(name), &required, &Config::default());
            let refused = matches!(decision, Decision::Refuse(_));
            assert_eq!(refused, matches!(name, "prepare" | "start"), "{name}");
        }
        let traceable = domain("", SHARED, Some("required='yes'"));
        let decision = decide(Operation::Prepare, &traceable, &Config::default());
        assert_eq!(decision, Decision::Nothing);
    }
}
