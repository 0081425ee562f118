//! The element in a domain's metadata by which it is enrolled.
//!
//! ```xml
//! <xftrace:trace xmlns:xftrace="urn:xftrace:domain:1.0" functions="sys_openat,sys_read"
//!     interval="1s" at-start="yes" required="no" symbols="/path" baseline="web"
//!     integrity-interval="30s" cmdline="ftrace=.." before="no-source,no-access"/>
//! ```
//!
//! Every attribute may be missing. One that makes no sense is left out and
//! told of in [`Trace::problems`]: a slip in `virsh edit` should cost that
//! attribute and a message, not the trace. Attributes that a later version may
//! add are passed over.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use quick_xml::escape::escape;

use super::outline::{Index, Outline, ROOT};
use super::XmlError;
use crate::config::{parse_baseline, parse_function, parse_interval, IntegrityInterval};

/// The XML namespace of xftrace's element in a domain's metadata. libvirt
/// allows one element a namespace there.
pub const NAMESPACE: &str = "urn:xftrace:domain:1.0";

/// The element's name in that namespace.
const LOCAL_NAME: &str = "trace";

/// What a domain's metadata asks of xftrace.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Trace {
    /// Functions to trace where `xftrace on` names none. Empty: those of the
    /// configuration.
    pub functions: Vec<String>,
    /// How long one key lasts. None: as the configuration has it.
    pub interval: Option<Duration>,
    /// Whether to trace from the domain's start on.
    pub at_start: bool,
    /// Whether the domain must not start without its helper. Set by hand only.
    pub required: bool,
    /// The System.map of the guest's kernel, absolute. None: found by banner.
    pub symbols: Option<PathBuf>,
    /// The baseline that the domain is checked against. None: that of the
    /// configuration.
    pub baseline: Option<String>,
    /// How often the kernel in the guest's memory is looked at. None: as the
    /// configuration has it.
    pub integrity_interval: Option<IntegrityInterval>,
    /// What enrolling put on the command line of the kernel that the domain
    /// boots directly.
    pub cmdline: Option<String>,
    /// What is wrong in the element, one text each.
    pub problems: Vec<String>,
    /// What the XML was before it was enrolled.
    pub(super) before: Before,
}

/// What stood in the XML where enrolling changed something. None each: as it
/// is now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Before {
    /// `<metadata>`.
    pub(super) metadata: Option<Was>,
    /// `<memoryBacking>`.
    pub(super) backing: Option<Was>,
    /// `<source>` in it.
    pub(super) source: Option<Setting>,
    /// `<access>` in it.
    pub(super) access: Option<Setting>,
    /// `<cmdline>` of `<os>`.
    pub(super) cmdline: Option<Was>,
}

/// What an element was that enrolling put something in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Was {
    /// There was none.
    Absent,
    /// It was written as an empty-element tag.
    EmptyTag,
}

/// What a setting was that enrolling set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Setting {
    /// There was none.
    Absent,
    /// It was set to what enrolling cannot work with: `anonymous` of the
    /// source, `private` of the access.
    Other,
}

/// The words that the attribute `before` is made of.
const WORDS: [(&str, Before); 10] = {
    const NONE: Before = Before {
        metadata: None,
        backing: None,
        source: None,
        access: None,
        cmdline: None,
    };
    [
        (
            "no-metadata",
            Before {
                metadata: Some(Was::Absent),
                ..NONE
            },
        ),
        (
            "empty-metadata",
            Before {
                metadata: Some(Was::EmptyTag),
                ..NONE
            },
        ),
        (
            "no-backing",
            Before {
                backing: Some(Was::Absent),
                ..NONE
            },
        ),
        (
            "empty-backing",
            Before {
                backing: Some(Was::EmptyTag),
                ..NONE
            },
        ),
        (
            "no-source",
            Before {
                source: Some(Setting::Absent),
                ..NONE
            },
        ),
        (
            "anonymous",
            Before {
                source: Some(Setting::Other),
                ..NONE
            },
        ),
        (
            "no-access",
            Before {
                access: Some(Setting::Absent),
                ..NONE
            },
        ),
        (
            "private",
            Before {
                access: Some(Setting::Other),
                ..NONE
            },
        ),
        (
            "no-cmdline",
            Before {
                cmdline: Some(Was::Absent),
                ..NONE
            },
        ),
        (
            "empty-cmdline",
            Before {
                cmdline: Some(Was::EmptyTag),
                ..NONE
            },
        ),
    ]
};

impl Before {
    /// This, and where it says nothing, what the other says.
    pub(super) fn or(self, other: Before) -> Before {
        Before {
            metadata: self.metadata.or(other.metadata),
            backing: self.backing.or(other.backing),
            source: self.source.or(other.source),
            access: self.access.or(other.access),
            cmdline: self.cmdline.or(other.cmdline),
        }
    }

    fn parse(text: &str) -> Result<Before, String> {
        let mut all = Before::default();
        for word in text.split(',').filter(|word| !word.is_empty()) {
            match WORDS.iter().find(|(known, _)| *known == word) {
                Some((_, before)) => all = all.or(*before),
                None => return Err(format!("{word:?} is unknown")),
            }
        }
        Ok(all)
    }
}

impl fmt::Display for Before {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let said = WORDS.iter().filter(|(_, before)| before.or(*self) == *self);
        for (n, (word, _)) in said.enumerate() {
            f.write_str(if n == 0 { "" } else { "," })?;
            f.write_str(word)?;
        }
        Ok(())
    }
}

impl Trace {
    /// Whether both ask for the same.
    pub fn same_options(&self, other: &Trace) -> bool {
        let bare = |trace: &Trace| Trace {
            problems: Vec::new(),
            before: Before::default(),
            ..trace.clone()
        };
        bare(self) == bare(other)
    }

    /// Reads the element at this place of the outline.
    pub(super) fn read(outline: &Outline<'_>, at: Index) -> Result<Trace, XmlError> {
        let mut trace = Trace::default();
        for attribute in outline.attributes(at)? {
            if let Err(why) = trace.set(attribute.name, &attribute.value) {
                trace.problems.push(format!("{}: {why}", attribute.name));
            }
        }
        Ok(trace)
    }

    fn set(&mut self, name: &str, value: &str) -> Result<(), String> {
        match name {
            "functions" => {
                let named = value.split(',').map(str::trim).filter(|f| !f.is_empty());
                self.functions = named.map(parse_function).collect::<Result<_, _>>()?;
            }
            "interval" => self.interval = Some(parse_interval(value)?),
            "at-start" => self.at_start = yes_or_no(value)?,
            "required" => self.required = yes_or_no(value)?,
            "symbols" => self.symbols = Some(absolute(value)?),
            "baseline" => self.baseline = Some(parse_baseline(value)?),
            "integrity-interval" => self.integrity_interval = Some(value.parse()?),
            "cmdline" => self.cmdline = Some(printable(value)?),
            "before" => self.before = Before::parse(value)?,
            _ => {}
        }
        Ok(())
    }

    /// The element as it goes into a domain's XML.
    pub(super) fn element(&self) -> String {
        format!(
            "<xftrace:{LOCAL_NAME} xmlns:xftrace=\"{NAMESPACE}\"{}/>",
            self.attributes()
        )
    }

    /// The element as virDomainSetMetadata wants it, which gives it its
    /// namespace itself.
    pub(in crate::libvirt) fn element_without_namespace(&self) -> String {
        format!("<{LOCAL_NAME}{}/>", self.attributes())
    }

    fn attributes(&self) -> String {
        let mut attributes = String::new();
        let mut add = |name: &str, value: &str| {
            // The double quotes are those that libvirt prints metadata with.
            attributes += &format!(" {name}=\"{}\"", escape(value));
        };
        if !self.functions.is_empty() {
            add("functions", &self.functions.join(","));
        }
        if let Some(interval) = self.interval {
            add(
                "interval",
                &humantime::format_duration(interval).to_string(),
            );
        }
        if self.at_start {
            add("at-start", "yes");
        }
        if self.required {
            add("required", "yes");
        }
        if let Some(symbols) = &self.symbols {
            add("symbols", &symbols.to_string_lossy());
        }
        if let Some(baseline) = &self.baseline {
            add("baseline", baseline);
        }
        if let Some(interval) = self.integrity_interval {
            add("integrity-interval", &interval.to_string());
        }
        if let Some(cmdline) = &self.cmdline {
            add("cmdline", cmdline);
        }
        if self.before != Before::default() {
            add("before", &self.before.to_string());
        }
        attributes
    }
}

/// The place of xftrace's element, if the domain has one.
///
/// Namespaces are resolved here, for children of `<metadata>` alone, in one
/// pass: a resolver that keeps every declaration of the document and searches
/// them for every element takes time with the square of its size.
pub(super) fn find(outline: &Outline<'_>) -> Result<Option<Index>, XmlError> {
    let Some(metadata) = outline.path(&["metadata"])? else {
        return Ok(None);
    };
    let mut outer = Declared::default();
    outer.take(outline, ROOT)?;
    outer.take(outline, metadata)?;
    let mut found = None;
    for child in outline.children(metadata) {
        let element = outline.get(child);
        let (prefix, local) = match element.name.split_once(':') {
            Some((prefix, local)) => (Some(prefix), local),
            None => (None, element.name),
        };
        if local != LOCAL_NAME {
            continue;
        }
        let mut own = Declared::default();
        own.take(outline, child)?;
        let ours = own.says(prefix).or_else(|| outer.says(prefix));
        if ours == Some(true) && found.replace(child).is_some() {
            return Err(super::outline::malformed(
                element.open.start,
                format!("a second <{}> element", element.name),
            ));
        }
    }
    Ok(found)
}

/// For each prefix that is declared (None: no prefix), whether it stands for
/// [`NAMESPACE`].
#[derive(Default)]
struct Declared(std::collections::HashMap<Option<String>, bool>);

impl Declared {
    /// Takes the declarations of an element, which hide those taken before.
    fn take(&mut self, outline: &Outline<'_>, at: Index) -> Result<(), XmlError> {
        for attribute in outline.attributes(at)? {
            let prefix = match attribute.name.strip_prefix("xmlns") {
                Some("") => None,
                Some(rest) => match rest.strip_prefix(':') {
                    Some(prefix) => Some(prefix.to_owned()),
                    None => continue,
                },
                None => continue,
            };
            self.0.insert(prefix, attribute.value == NAMESPACE);
        }
        Ok(())
    }

    fn says(&self, prefix: Option<&str>) -> Option<bool> {
        self.0.get(&prefix.map(str::to_owned)).copied()
    }
}

fn yes_or_no(text: &str) -> Result<bool, String> {
    match text {
        "yes" => Ok(true),
        "no" => Ok(false),
        other => Err(format!("{other:?} is neither \"yes\" nor \"no\"")),
    }
}

/// Text without control characters, and not empty.
fn printable(text: &str) -> Result<String, String> {
    if text.is_empty() || text.chars().any(char::is_control) {
        return Err(format!("{text:?} is empty or has control characters"));
    }
    Ok(text.to_owned())
}

/// An absolute path without control characters, which XML could not carry and
/// a message should not.
fn absolute(text: &str) -> Result<PathBuf, String> {
    if !text.starts_with('/') {
        return Err(format!("{text:?} is not an absolute path"));
    }
    if text.chars().any(char::is_control) {
        return Err(format!("{text:?} has control characters"));
    }
    Ok(PathBuf::from(text))
}
