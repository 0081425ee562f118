//! Domain XML: what a domain is ([`DomainXml`]), what its metadata asks of
//! xftrace ([`Trace`]), and the edits by which it is enrolled ([`enroll`],
//! [`unenroll`]).
//!
//! The XML comes from libvirt, but what is in it comes from whoever may define
//! domains, and the hook reads it before a domain starts. So it is bounded in
//! size, depth and number of elements, takes time linear in its size, expands
//! no entities but the five of XML itself, and is an error, never a panic.
//!
//! Edits are made in the text: an edit names a byte range and what comes in
//! its place, so that comments, unknown elements and white space elsewhere are
//! kept as they are. Nothing is serialised from a model.

mod cmdline;
mod domain;
mod edit;
mod outline;
#[cfg(test)]
mod tests;
mod trace;

pub use domain::{Access, DomainXml, MachineFamily, MemoryBacking, MemoryDevice, NumaCell, Source};
pub use edit::{enroll, unenroll, Enrolled};
pub use outline::MAX_XML;
pub use trace::{Trace, NAMESPACE};

/// Why a domain's XML cannot be read or edited.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum XmlError {
    /// More than [`MAX_XML`] bytes.
    #[error("the domain's XML has {0} bytes, more than the {MAX_XML} that xftrace reads")]
    TooLarge(u64),
    /// Not well-formed XML, or something that a domain's XML never has.
    #[error("the domain's XML is malformed at byte {at}: {what}")]
    Malformed {
        /// Where, from the start of the text.
        at: usize,
        /// What is wrong there.
        what: String,
    },
    /// Well-formed, but not a domain, or without something that each has.
    #[error("the XML is not that of a libvirt domain: {0}")]
    NotADomain(String),
    /// A domain whose memory xftrace cannot make a shared file.
    #[error(
        "its memory is {found}, which xftrace does not support: it needs memory that is shared \
         (<source type='file'/> or memfd or huge pages, <access mode='shared'/>, no private NUMA \
         cell or DIMM). Change that with `virsh edit`, then enroll again"
    )]
    Unsupported {
        /// What stands in the way.
        found: String,
    },
}
