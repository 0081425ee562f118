//! The connection to libvirt's daemon: finding domains, reading and defining
//! them, with errors in the words of what people typed.
//!
//! Read the XML that will be defined again with [`Domain::persistent_xml`]
//! only: it asks for passwords too, without which defining would delete them.

use uuid::Uuid;
use virt::connect::Connect;
use virt::domain::DomainState;
use virt::error::ErrorNumber;

use super::shell_word;
use super::xml::{DomainXml, Trace, XmlError, NAMESPACE};

/// The connection that is used where nothing else is said.
pub const DEFAULT_URI: &str = "qemu:///system";

/// Why libvirt did not do as asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConnectionError {
    /// There is no such domain.
    #[error(
        "no domain '{}'; `virsh{} list --all` shows those there are",
        typed.escape_debug(),
        option(uri)
    )]
    NoDomain {
        /// What was typed.
        typed: String,
        /// The connection on which it was looked for.
        uri: String,
    },
    /// The user may not.
    #[error(
        "libvirt at {uri} refuses: {message}. Run this as root (`sudo xftrace ..`), or as a \
         member of the group libvirt"
    )]
    Denied {
        /// The connection.
        uri: String,
        /// libvirt's words.
        message: String,
    },
    /// No daemon answers.
    #[error(
        "libvirt's daemon does not answer at {uri}: {message}. Start it with `systemctl start \
         libvirtd` (without systemd `virtlogd -d; libvirtd -d`)"
    )]
    NoDaemon {
        /// The connection.
        uri: String,
        /// libvirt's words.
        message: String,
    },
    /// The connection cannot be had for another reason.
    #[error("cannot use the libvirt connection {uri:?}: {message}")]
    BadUri {
        /// What was typed.
        uri: String,
        /// libvirt's words.
        message: String,
    },
    /// Anything else.
    #[error("libvirt cannot {what}: {message}")]
    Other {
        /// What it was asked for.
        what: String,
        /// libvirt's words.
        message: String,
    },
}

/// What may be done over a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Look: any user may, on most hosts.
    ReadOnly,
    /// Look and change.
    ReadWrite,
}

/// A connection to libvirt.
#[derive(Debug)]
pub struct Connection {
    inner: Connect,
    uri: String,
}

impl Connection {
    /// Connects to the URI, else to that of LIBVIRT_DEFAULT_URI, else to
    /// [`DEFAULT_URI`].
    ///
    /// # Errors
    /// Where there is no such connection, no daemon, or no permission.
    pub fn open(uri: Option<&str>, mode: Mode) -> Result<Connection, ConnectionError> {
        // libvirt prints every error on standard error itself otherwise.
        virt::error::clear_error_callback();
        let uri = uri_or_default(uri, std::env::var("LIBVIRT_DEFAULT_URI").ok());
        if uri.contains('\0') {
            return Err(ConnectionError::BadUri {
                message: "it has a NUL character in it".to_owned(),
                uri,
            });
        }
        let opened = match mode {
            Mode::ReadOnly => Connect::open_read_only(Some(&uri)),
            Mode::ReadWrite => Connect::open(Some(&uri)),
        };
        match opened {
            Ok(inner) => Ok(Connection { inner, uri }),
            Err(error) => Err(opening(uri, &error)),
        }
    }

    /// The URI that is connected to.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// Whether the domains are QEMU processes of this host, so that helpers
    /// can run here.
    pub fn is_local_qemu(&self) -> bool {
        self.uri.starts_with("qemu:///") || self.uri.starts_with("qemu+unix:///")
    }

    /// Finds a domain by id, UUID or name, in virsh's order
    /// (virshLookupDomainInternal, tools/virsh-util.c).
    ///
    /// # Errors
    /// Where there is none, or libvirt does not answer.
    pub fn domain(&self, typed: &str) -> Result<Domain, ConnectionError> {
        if typed.is_empty() || typed.contains('\0') {
            return Err(self.no_domain(typed));
        }
        if let Ok(id) = typed.parse() {
            if let Some(domain) = self.found(self.inner.lookup_domain_by_id(id))? {
                return Ok(domain);
            }
        }
        if let Ok(uuid) = Uuid::try_parse(typed) {
            if let Some(domain) = self.found(self.inner.lookup_domain_by_uuid(uuid))? {
                return Ok(domain);
            }
        }
        self.found(self.inner.lookup_domain_by_name(typed))?
            .ok_or_else(|| self.no_domain(typed))
    }

    /// All domains, running or not, by name.
    ///
    /// # Errors
    /// Where libvirt does not answer.
    pub fn domains(&self) -> Result<Vec<Domain>, ConnectionError> {
        let listed = self.inner.list_all_domains(0);
        let listed = listed.map_err(|error| other("list its domains", &error))?;
        let mut all = Vec::with_capacity(listed.len());
        for inner in listed {
            // One that goes away while we list is not there.
            if let Ok(domain) = Domain::new(inner) {
                all.push(domain);
            }
        }
        all.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(all)
    }

    /// Defines a domain, or defines it anew: its persistent XML is then this.
    ///
    /// # Errors
    /// Where libvirt refuses the XML or the user.
    pub fn define(&self, xml: &str) -> Result<Domain, ConnectionError> {
        let defined = self.inner.define_domain_xml(xml);
        defined
            .and_then(Domain::new)
            .map_err(|error| self.asking("define the domain", &error))
    }

    fn found(
        &self,
        looked_up: Result<virt::domain::Domain, virt::error::Error>,
    ) -> Result<Option<Domain>, ConnectionError> {
        match looked_up.and_then(Domain::new) {
            Ok(domain) => Ok(Some(domain)),
            Err(error) if is(&error, ErrorNumber::NoDomain) => Ok(None),
            Err(error) => Err(self.asking("look up the domain", &error)),
        }
    }

    fn no_domain(&self, typed: &str) -> ConnectionError {
        ConnectionError::NoDomain {
            typed: typed.to_owned(),
            uri: self.uri.clone(),
        }
    }

    /// Words an error of a connection that was open.
    fn asking(&self, what: &str, error: &virt::error::Error) -> ConnectionError {
        let denied = [
            ErrorNumber::AccessDenied,
            ErrorNumber::OperationDenied,
            ErrorNumber::AuthFailed,
        ];
        if denied.iter().any(|code| is(error, *code)) {
            return ConnectionError::Denied {
                uri: self.uri.clone(),
                message: error.message().to_owned(),
            };
        }
        other(what, error)
    }
}

/// A domain that libvirt knows.
#[derive(Debug)]
pub struct Domain {
    inner: virt::domain::Domain,
    name: String,
    uuid: Uuid,
}

/// The state of a domain, as virsh names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum State {
    Running,
    Paused,
    Suspended,
    ShuttingDown,
    ShutOff,
    Crashed,
    Unknown,
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            State::Running => "running",
            State::Paused => "paused",
            State::Suspended => "pmsuspended",
            State::ShuttingDown => "in shutdown",
            State::ShutOff => "shut off",
            State::Crashed => "crashed",
            State::Unknown => "unknown",
        })
    }
}

impl Domain {
    fn new(inner: virt::domain::Domain) -> Result<Domain, virt::error::Error> {
        Ok(Domain {
            name: inner.name()?,
            uuid: inner.uuid()?,
            inner,
        })
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The UUID.
    pub fn uuid(&self) -> Uuid {
        self.uuid
    }

    /// The number of the running domain; None where it does not run.
    pub fn id(&self) -> Option<u32> {
        self.inner.id()
    }

    /// Whether it has a QEMU process (running, paused, suspended, ..).
    ///
    /// # Errors
    /// Where libvirt does not answer, or the domain is gone.
    pub fn is_active(&self) -> Result<bool, ConnectionError> {
        let active = self.inner.is_active();
        active.map_err(|error| other("tell whether the domain runs", &error))
    }

    /// Whether it has a definition that outlives it.
    ///
    /// # Errors
    /// Where libvirt does not answer, or the domain is gone.
    pub fn is_persistent(&self) -> Result<bool, ConnectionError> {
        let persistent = self.inner.is_persistent();
        persistent.map_err(|error| other("tell whether the domain is persistent", &error))
    }

    /// What it is doing.
    pub fn state(&self) -> State {
        let Ok((state, _)) = self.inner.state() else {
            return State::Unknown;
        };
        let known = [
            (DomainState::Running, State::Running),
            (DomainState::Blocked, State::Running),
            (DomainState::Paused, State::Paused),
            (DomainState::Shutdown, State::ShuttingDown),
            (DomainState::Shutoff, State::ShutOff),
            (DomainState::Crashed, State::Crashed),
            (DomainState::PMSuspended, State::Suspended),
        ];
        let found = known.iter().find(|(theirs, _)| state.is(*theirs));
        found.map_or(State::Unknown, |(_, ours)| *ours)
    }

    /// The XML of the domain as it is now: of the running one while it runs.
    ///
    /// # Errors
    /// Where libvirt does not answer, or the domain is gone.
    pub fn live(&self) -> Result<Result<DomainXml, XmlError>, ConnectionError> {
        Ok(DomainXml::parse(&self.live_xml()?))
    }

    /// The text of the XML of the domain as it is now.
    ///
    /// # Errors
    /// Where libvirt does not answer, or the domain is gone.
    pub fn live_xml(&self) -> Result<String, ConnectionError> {
        self.xml(0)
    }

    /// The XML that the domain will start with next time.
    ///
    /// # Errors
    /// Where libvirt does not answer, or the domain is gone.
    pub fn persistent(&self) -> Result<Result<DomainXml, XmlError>, ConnectionError> {
        Ok(DomainXml::parse(&self.xml(XML_INACTIVE)?))
    }

    /// The text of the XML that the domain will start with next time, with the
    /// passwords in it: to be edited and defined again, and never printed.
    ///
    /// # Errors
    /// Where libvirt does not answer, the domain is gone, or the connection is
    /// read-only.
    pub fn persistent_xml(&self) -> Result<String, ConnectionError> {
        self.xml(XML_INACTIVE | XML_SECURE)
    }

    /// Sets xftrace's element in the metadata of the running domain, or with
    /// None removes it. Its persistent XML stays as it is.
    ///
    /// # Errors
    /// Where libvirt refuses, or the domain does not run.
    pub fn set_live_metadata(&self, trace: Option<&Trace>) -> Result<(), ConnectionError> {
        let element = trace.map(Trace::element_without_namespace);
        let set = self.inner.set_metadata(
            METADATA_ELEMENT,
            element.as_deref(),
            element.as_ref().map(|_| "xftrace"),
            Some(NAMESPACE),
            AFFECT_LIVE,
        );
        match set {
            Ok(_) => Ok(()),
            // Removing what is not there.
            Err(error) if is(&error, ErrorNumber::NoDomainMetadata) => Ok(()),
            Err(error) => Err(other("set the running domain's metadata", &error)),
        }
    }

    fn xml(&self, flags: u32) -> Result<String, ConnectionError> {
        let xml = self.inner.xml_desc(flags);
        xml.map_err(|error| other("give the domain's XML", &error))
    }
}

/// VIR_DOMAIN_XML_SECURE, include/libvirt/libvirt-domain.h: passwords too.
const XML_SECURE: u32 = 1 << 0;

/// VIR_DOMAIN_XML_INACTIVE, there: what the next start will use.
const XML_INACTIVE: u32 = 1 << 1;

/// VIR_DOMAIN_METADATA_ELEMENT, there: an element of one's own.
const METADATA_ELEMENT: i32 = 2;

/// VIR_DOMAIN_AFFECT_LIVE, there: the running domain.
const AFFECT_LIVE: u32 = 1 << 0;

/// The URI to connect to. Empty texts count as none, as in virsh.
fn uri_or_default(given: Option<&str>, environment: Option<String>) -> String {
    let given = given.map(str::to_owned).into_iter();
    given
        .chain(environment)
        .find(|uri| !uri.is_empty())
        .unwrap_or_else(|| DEFAULT_URI.to_owned())
}

/// `-c URI` for a virsh command line, where it needs one.
fn option(uri: &str) -> String {
    match uri {
        DEFAULT_URI => String::new(),
        uri => format!(" -c {}", shell_word(uri)),
    }
}

fn is(error: &virt::error::Error, code: ErrorNumber) -> bool {
    error.code().is(code)
}

/// Words an error of opening a connection. libvirt has no code of its own for
/// a socket that cannot be connected to, so the system's words decide, which
/// are English in a process that sets no locale.
fn opening(uri: String, error: &virt::error::Error) -> ConnectionError {
    let message = error.message().to_owned();
    let says = |words: &[&str]| words.iter().any(|word| message.contains(word));
    let auth = [
        ErrorNumber::AuthFailed,
        ErrorNumber::AuthUnavailable,
        ErrorNumber::AuthCancelled,
        ErrorNumber::AccessDenied,
    ];
    if says(&["Permission denied"]) || auth.iter().any(|code| is(error, *code)) {
        ConnectionError::Denied { uri, message }
    } else if says(&["socket"]) && says(&["No such file", "Connection refused", "reset by peer"]) {
        ConnectionError::NoDaemon { uri, message }
    } else {
        ConnectionError::BadUri { uri, message }
    }
}

fn other(what: &str, error: &virt::error::Error) -> ConnectionError {
    ConnectionError::Other {
        what: what.to_owned(),
        message: error.message().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// libvirt's own test driver, whose one domain is called `test`, has id 1
    /// and lives as long as this process.
    fn connect() -> Connection {
        Connection::open(Some("test:///default"), Mode::ReadWrite).unwrap()
    }

    #[test]
    fn finds_a_domain_by_name_id_and_uuid() {
        let connection = connect();
        let domain = connection.domain("test").unwrap();
        assert_eq!(domain.name(), "test");
        assert_eq!(domain.state(), State::Running);
        assert!(domain.is_active().unwrap() && domain.is_persistent().unwrap());
        let id = domain.id().unwrap().to_string();
        let uuid = domain.uuid().to_string();
        for typed in [id, uuid.to_uppercase(), uuid] {
            assert_eq!(connection.domain(&typed).unwrap().name(), "test", "{typed}");
        }
        let listed = connection.domains().unwrap();
        assert!(listed.iter().any(|domain| domain.name() == "test"));
    }

    #[test]
    fn says_where_to_look_for_a_domain_that_is_not_there() {
        let connection = connect();
        for typed in [
            "web1",
            "4711",
            "-1",
            "00000000-0000-0000-0000-000000000000",
            "a\0b",
            "",
        ] {
            let error = connection.domain(typed).unwrap_err().to_string();
            let start = format!("no domain '{}';", typed.escape_debug());
            assert!(error.starts_with(&start), "{error}");
            assert!(error.contains("`virsh -c test:///default list --all`"));
        }
    }

    #[test]
    fn tells_the_ways_in_which_opening_fails_apart() {
        let open = |uri| Connection::open(Some(uri), Mode::ReadOnly).unwrap_err();
        assert!(matches!(
            open("qemu+unix:///system?socket=/nonexistent/libvirt-sock"),
            ConnectionError::NoDaemon { .. }
        ));
        for uri in ["qemu+telegraph:///x", "a\0b", "test:///no/such/file.xml"] {
            let error = open(uri);
            assert!(matches!(error, ConnectionError::BadUri { .. }), "{error}");
        }
    }

    #[test]
    fn the_uri_is_the_option_then_the_environment_then_the_system() {
        let env = |text: &str| Some(text.to_owned());
        assert_eq!(uri_or_default(Some("a"), env("b")), "a");
        assert_eq!(uri_or_default(None, env("b")), "b");
        assert_eq!(uri_or_default(Some(""), env("")), DEFAULT_URI);
        assert_eq!(uri_or_default(None, None), DEFAULT_URI);
    }

    #[test]
    fn a_definition_goes_round_through_libvirt() {
        use crate::libvirt::xml::{enroll, unenroll};
        let connection = connect();
        let new = "<domain type='test'><name>round</name><memory>8192</memory>\
                   <os><type>hvm</type></os></domain>";
        let domain = connection.define(new).unwrap();
        let before = domain.persistent_xml().unwrap();

        let enrolled = enroll(&before, &Trace::default()).unwrap();
        connection.define(&enrolled.xml).unwrap();
        let stored = domain.persistent().unwrap().unwrap();
        assert!(
            crate::libvirt::enrolment::memory(&stored) == "shared file" && stored.trace.is_some()
        );
        let again = enroll(&domain.persistent_xml().unwrap(), &Trace::default()).unwrap();
        assert!(!again.changed);

        let back = unenroll(&domain.persistent_xml().unwrap())
            .unwrap()
            .unwrap();
        connection.define(&back).unwrap();
        assert_eq!(domain.persistent_xml().unwrap(), before);
    }

    #[test]
    fn metadata_of_the_running_domain_comes_and_goes() {
        let domain = connect().domain("test").unwrap();
        let mut trace = Trace::default();
        trace.functions = vec!["sys_read".to_owned()];
        for _ in 0..2 {
            domain.set_live_metadata(Some(&trace)).unwrap();
            assert_eq!(domain.live().unwrap().unwrap().trace, Some(trace.clone()));
            trace.at_start = true;
        }
        domain.set_live_metadata(None).unwrap();
        assert_eq!(domain.live().unwrap().unwrap().trace, None);
        domain.set_live_metadata(None).unwrap();
    }

    #[test]
    fn libvirt_says_what_is_wrong_with_a_definition() {
        let error = connect().define("<domain type='test'/>").unwrap_err();
        assert!(
            error.to_string().starts_with("libvirt cannot define"),
            "{error}"
        );
        assert!(connect().define("a\0b").is_err());
    }
}
