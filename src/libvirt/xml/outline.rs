//! The elements of a domain's XML that xftrace looks at, and where in the text
//! they stand.

use std::ops::Range;

use quick_xml::escape::resolve_xml_entity;
use quick_xml::events::{BytesStart, Event};
use quick_xml::reader::Reader;
use quick_xml::XmlVersion;

use super::XmlError;

/// The most XML that is read, in bytes. A domain with hundreds of disks has
/// some hundred KiB; libvirt's own limit on a document over the wire is
/// 4 MiB (REMOTE_STRING_MAX, src/remote/remote_protocol.x).
pub const MAX_XML: usize = 4 << 20;

/// How deep elements may nest. libvirt's own go about ten deep, and libxml2
/// refuses documents deeper than 256.
const MAX_DEPTH: usize = 256;

/// The most elements that are kept of a document.
const MAX_ELEMENTS: usize = 1 << 16;

/// The longest text of an element that is kept, in bytes.
const MAX_TEXT: usize = 4096;

/// The children of a domain that are looked at: what is read of them, or where
/// an edit finds its place.
const OF_A_DOMAIN: [&str; 14] = [
    "name",
    "uuid",
    "genid",
    "title",
    "description",
    "metadata",
    "maxMemory",
    "memory",
    "currentMemory",
    "memoryBacking",
    "os",
    "cpu",
    "devices",
    "seclabel",
];

/// One element that xftrace looks at.
#[derive(Debug)]
pub(super) struct Element<'a> {
    /// The name as written, with its prefix.
    pub(super) name: &'a str,
    /// The start tag from `<` to past `>`, in bytes of the document.
    pub(super) open: Range<usize>,
    /// The end tag; of an empty-element tag (`<a/>`), the same as `open`.
    pub(super) close: Range<usize>,
    /// The text directly inside, entities resolved, of an element whose text
    /// is looked at.
    pub(super) text: Option<String>,
    parent: Option<usize>,
}

impl Element<'_> {
    /// Whether it is written as one empty-element tag.
    pub(super) fn is_empty_tag(&self) -> bool {
        self.open == self.close
    }

    /// From the start of the start tag to the end of the end tag.
    pub(super) fn whole(&self) -> Range<usize> {
        self.open.start..self.close.end
    }
}

/// The elements of one document, in its order.
#[derive(Debug)]
pub(super) struct Outline<'a> {
    /// The document.
    pub(super) text: &'a str,
    elements: Vec<Element<'a>>,
}

/// Names an element of an [`Outline`].
pub(super) type Index = usize;

/// The index of the outermost element, which each outline has.
pub(super) const ROOT: Index = 0;

impl<'a> Outline<'a> {
    /// Reads a document.
    pub(super) fn of(text: &'a str) -> Result<Outline<'a>, XmlError> {
        if text.len() > MAX_XML {
            return Err(XmlError::TooLarge(text.len() as u64));
        }
        for refused in ['\0', '\u{feff}'] {
            if let Some(at) = text.find(refused) {
                return Err(malformed(at, format!("the character {refused:?}")));
            }
        }
        let mut scan = Scan {
            text,
            elements: Vec::new(),
            open: Vec::new(),
        };
        let mut reader = Reader::from_str(text);
        loop {
            let from = position(&reader);
            let event = reader
                .read_event()
                .map_err(|error| malformed(from, error.to_string()))?;
            let range = from..position(&reader);
            if matches!(event, Event::Eof) {
                break;
            }
            scan.take(event, range)?;
        }
        scan.finish()
    }

    /// An element. Panics never: indices come from this outline alone.
    pub(super) fn get(&self, index: Index) -> &Element<'a> {
        &self.elements[index]
    }

    /// The children of an element.
    pub(super) fn children(&self, parent: Index) -> impl Iterator<Item = Index> + '_ {
        let end = self.get(parent).close.end;
        self.elements
            .iter()
            .enumerate()
            .skip(parent + 1)
            // In document order, those below an element follow it at once.
            .take_while(move |(_, e)| e.open.start < end)
            .filter(move |(_, e)| e.parent == Some(parent))
            .map(|(index, _)| index)
    }

    /// The children of an element that have this name.
    pub(super) fn named<'s>(
        &'s self,
        parent: Index,
        name: &'s str,
    ) -> impl Iterator<Item = Index> + 's {
        self.children(parent)
            .filter(move |index| self.get(*index).name == name)
    }

    /// The only child of this name, if there is one. Two of a kind that libvirt
    /// has but once are an error: which of them counts would be a guess.
    pub(super) fn child(&self, parent: Index, name: &str) -> Result<Option<Index>, XmlError> {
        let mut found = self.named(parent, name);
        let first = found.next();
        match found.next() {
            Some(second) => Err(malformed(
                self.get(second).open.start,
                format!("a second <{name}> element"),
            )),
            None => Ok(first),
        }
    }

    /// The element at the end of a path of names, each the only one of its
    /// name.
    pub(super) fn path(&self, names: &[&str]) -> Result<Option<Index>, XmlError> {
        let mut at = ROOT;
        for name in names {
            match self.child(at, name)? {
                Some(next) => at = next,
                None => return Ok(None),
            }
        }
        Ok(Some(at))
    }

    /// The value of an attribute, entities resolved.
    pub(super) fn attribute(&self, of: Index, name: &str) -> Result<Option<String>, XmlError> {
        let found = self.attributes(of)?.into_iter().find(|a| a.name == name);
        Ok(found.map(|a| a.value))
    }

    /// The attributes of an element, namespace declarations among them.
    pub(super) fn attributes(&self, of: Index) -> Result<Vec<Attribute<'a>>, XmlError> {
        let element = self.get(of);
        let bad = |what: String| malformed(element.open.start, what);
        let inside = element.open.start + 1..element.open.end - 1;
        let tag = self.text.get(inside.clone()).unwrap_or_default();
        let tag = match element.is_empty_tag() {
            true => tag.strip_suffix('/').unwrap_or(tag),
            false => tag,
        };
        let start = BytesStart::from_content(tag, element.name.len());
        let mut all = Vec::new();
        // That no two have the same name, libvirt's own parser has seen to; to
        // look again would only be work that a long tag can make longer.
        for attribute in start.attributes().with_checks(false) {
            let attribute = attribute.map_err(|error| bad(error.to_string()))?;
            let value = attribute
                .normalized_value(XmlVersion::Implicit1_0)
                .map_err(|error| bad(error.to_string()))?
                .into_owned();
            // Both are slices of `tag`, so that their places in it are the
            // differences of their addresses.
            let place = |part: &str| part.as_ptr() as usize - tag.as_ptr() as usize;
            let key = place(attribute.key.as_ref());
            let name = tag.get(key..key + attribute.key.as_ref().len());
            let raw = place(&attribute.value);
            all.push(Attribute {
                name: name.unwrap_or_default(),
                value,
                raw: inside.start + raw..inside.start + raw + attribute.value.len(),
            });
        }
        Ok(all)
    }
}

/// One attribute of an element.
#[derive(Debug)]
pub(super) struct Attribute<'a> {
    /// The name as written, with its prefix.
    pub(super) name: &'a str,
    /// The value, entities resolved.
    pub(super) value: String,
    /// Where the value stands in the document, without its quotes.
    pub(super) raw: Range<usize>,
}

/// The state while a document is read.
struct Scan<'a> {
    text: &'a str,
    elements: Vec<Element<'a>>,
    /// For each element that is open, its index where it is kept.
    open: Vec<Option<Index>>,
}

impl<'a> Scan<'a> {
    fn take(&mut self, event: Event<'a>, range: Range<usize>) -> Result<(), XmlError> {
        let at = range.start;
        match event {
            Event::Start(start) => {
                let kept = self.start(&start, range)?;
                self.open.push(kept);
            }
            Event::Empty(start) => {
                self.start(&start, range)?;
            }
            Event::End(_) => {
                // The reader has matched the names, so that one is open.
                if let Some(Some(index)) = self.open.pop() {
                    self.elements[index].close = range;
                }
            }
            Event::Text(text) => self.text(&text.xml10_content(), at)?,
            Event::CData(text) => self.text(&text.xml10_content(), at)?,
            Event::GeneralRef(name) => {
                let bad = |what: String| malformed(at, what);
                match name.resolve_char_ref().map_err(|e| bad(e.to_string()))? {
                    Some(c) => self.text(c.encode_utf8(&mut [0; 4]), at)?,
                    None => {
                        let text = resolve_xml_entity(&name.xml10_content())
                            .ok_or_else(|| bad("an entity that XML does not define".into()))?;
                        self.text(text, at)?;
                    }
                }
            }
            // Entities are defined there, and libvirt never writes one.
            Event::DocType(_) => return Err(malformed(at, "a document type".into())),
            Event::Comment(_) | Event::PI(_) | Event::Decl(_) | Event::Eof => {}
        }
        Ok(())
    }

    /// Takes a start tag, and says where it is kept.
    fn start(
        &mut self,
        start: &BytesStart<'_>,
        range: Range<usize>,
    ) -> Result<Option<Index>, XmlError> {
        let at = range.start;
        if self.open.len() >= MAX_DEPTH {
            return Err(malformed(
                at,
                format!("elements nested deeper than {MAX_DEPTH}"),
            ));
        }
        if self.open.is_empty() && !self.elements.is_empty() {
            return Err(malformed(at, "a second outermost element".into()));
        }
        let name_at = at + 1;
        let name = self
            .text
            .get(name_at..name_at + start.name().as_ref().len())
            .unwrap_or_default();
        let parent = match self.open.last() {
            None => None,
            Some(Some(parent)) => Some(*parent),
            Some(None) => return Ok(None),
        };
        if !self.is_looked_at(parent, name) {
            return Ok(None);
        }
        if self.elements.len() >= MAX_ELEMENTS {
            return Err(malformed(at, format!("more than {MAX_ELEMENTS} elements")));
        }
        self.elements.push(Element {
            name,
            open: range.clone(),
            close: range,
            text: self.has_text(parent, name).then(String::new),
            parent,
        });
        Ok(Some(self.elements.len() - 1))
    }

    /// Whether xftrace looks at elements of this name below this parent. A
    /// domain's XML is mostly devices, of which only memory modules count.
    fn is_looked_at(&self, parent: Option<Index>, name: &str) -> bool {
        let Some(parent) = parent else { return true };
        let parent = &self.elements[parent];
        let Some(grandparent) = parent.parent else {
            return OF_A_DOMAIN.contains(&name);
        };
        let grandparent = &self.elements[grandparent];
        match (grandparent.parent, grandparent.name, parent.name) {
            (None, _, "metadata" | "memoryBacking") => true,
            (None, _, "os") => matches!(name, "type" | "kernel" | "initrd" | "cmdline"),
            (None, _, "cpu") => name == "numa",
            (None, _, "devices") => name == "memory",
            (None, _, "seclabel") => name == "label",
            (Some(ROOT), "cpu", "numa") => name == "cell",
            (Some(ROOT), "devices", "memory") => matches!(name, "target" | "alias" | "address"),
            (Some(_), "memory", "target") => name == "size",
            _ => false,
        }
    }

    /// Whether the text of such an element is looked at.
    fn has_text(&self, parent: Option<Index>, name: &str) -> bool {
        match parent {
            Some(ROOT) => matches!(name, "name" | "uuid" | "memory"),
            Some(parent) if self.elements[parent].name == "seclabel" => name == "label",
            _ => name == "size",
        }
    }

    /// Takes text directly inside the innermost open element.
    fn text(&mut self, text: &str, at: usize) -> Result<(), XmlError> {
        let index = match self.open.last() {
            None if text.trim().is_empty() => return Ok(()),
            None => return Err(malformed(at, "text outside the outermost element".into())),
            Some(None) => return Ok(()),
            Some(Some(index)) => *index,
        };
        if let Some(kept) = &mut self.elements[index].text {
            if kept.len() + text.len() > MAX_TEXT {
                return Err(malformed(
                    at,
                    format!("a text longer than {MAX_TEXT} bytes"),
                ));
            }
            kept.push_str(text);
        }
        Ok(())
    }

    fn finish(self) -> Result<Outline<'a>, XmlError> {
        if self.elements.is_empty() {
            return Err(malformed(0, "no element".into()));
        }
        if !self.open.is_empty() {
            return Err(malformed(
                self.text.len(),
                "it ends inside an element".into(),
            ));
        }
        Ok(Outline {
            text: self.text,
            elements: self.elements,
        })
    }
}

fn position(reader: &Reader<&[u8]>) -> usize {
    // The document is no larger than MAX_XML.
    usize::try_from(reader.buffer_position()).unwrap_or(usize::MAX)
}

/// A [`XmlError::Malformed`].
pub(super) fn malformed(at: usize, what: String) -> XmlError {
    XmlError::Malformed { at, what }
}
