//! Enrolling and unenrolling, as edits of a domain's XML text.
//!
//! What makes unenrolling exact: something new always goes directly behind a
//! tag, white space first and then the element. So what was put in is the
//! element and all white space before it, whatever stands around it. Where an
//! element or a value had to change, the metadata says what it was
//! ([`Before`]).

use std::ops::Range;

use super::domain::{Access, DomainXml, Source};
use super::outline::{Attribute, Index, Outline, ROOT};
use super::trace::{self, Before, Setting, Trace, Was};
use super::XmlError;

/// What enrolling made of a domain's XML.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Enrolled {
    /// The XML as it should be.
    pub xml: String,
    /// Whether anything in it changed.
    pub changed: bool,
    /// Whether its memory changed, which takes effect at the next start.
    pub memory_changed: bool,
    /// Whether its kernel's command line changed, which does so too.
    pub cmdline_changed: bool,
}

/// Puts shared file memory and xftrace's metadata into a domain's XML. Huge
/// pages stay huge pages and a memfd a memfd: they are made shared.
///
/// Enrolling an enrolled domain sets its options anew; `required`, which is
/// set by hand only, stays.
///
/// # Errors
/// Where the XML cannot be read, or where its memory is of a kind that xftrace
/// cannot make a shared file ([`XmlError::Unsupported`]).
pub fn enroll(xml: &str, wanted: &Trace) -> Result<Enrolled, XmlError> {
    let outline = Outline::of(xml)?;
    let domain = DomainXml::read(&outline)?;
    check_supported(&domain)?;
    let mut editor = Editor::new(&outline);
    let as_is = domain.backing.hugepages || domain.backing.source == Some(Source::Memfd);
    let mut before = editor.share_memory(as_is)?;
    let memory_changed = !editor.edits.is_empty();

    let mut wanted = wanted.clone();
    let old = domain.trace.as_ref();
    let edits = editor.edits.len();
    let cmdline_before = editor.boot_with(
        old.and_then(|trace| trace.cmdline.as_deref()),
        wanted.cmdline.as_deref(),
        old.and_then(|trace| trace.before.cmdline),
    )?;
    let cmdline_changed = editor.edits.len() > edits;
    if !domain.boots_kernel {
        wanted.cmdline = None;
    }
    match (trace::find(&outline)?, &domain.trace) {
        (Some(at), Some(is)) => {
            wanted.required |= is.required;
            wanted.before = Before {
                cmdline: cmdline_before,
                ..before.or(is.before)
            };
            let same = wanted.before == is.before && wanted.same_options(is);
            if !same || !is.problems.is_empty() {
                editor.replace(outline.get(at).whole(), wanted.element());
            }
        }
        _ => {
            before.metadata = editor.metadata_before()?;
            before.cmdline = cmdline_before;
            wanted.before = before;
            editor.add_metadata(&wanted)?;
        }
    }
    Ok(Enrolled {
        changed: !editor.edits.is_empty(),
        memory_changed,
        cmdline_changed,
        xml: editor.done(),
    })
}

/// Takes out of a domain's XML what [`enroll`] put in, and puts back what was
/// there before. None where the domain is not enrolled.
///
/// What someone changed since then stays: a memory source that is no longer a
/// file, say, or other elements in a `<memoryBacking>` that enrolling made.
///
/// # Errors
/// Where the XML cannot be read.
pub fn unenroll(xml: &str) -> Result<Option<String>, XmlError> {
    let outline = Outline::of(xml)?;
    let Some(at) = trace::find(&outline)? else {
        return Ok(None);
    };
    let Trace {
        before, cmdline, ..
    } = Trace::read(&outline, at)?;
    let mut editor = Editor::new(&outline);
    editor.restore_memory(before)?;
    editor.boot_with(cmdline.as_deref(), None, before.cmdline)?;
    if let Some(metadata) = outline.child(ROOT, "metadata")? {
        let ours = editor.with_space_before(outline.get(at).whole());
        editor.cut(metadata, vec![ours], before.metadata);
    }
    Ok(Some(editor.done()))
}

fn check_supported(domain: &DomainXml) -> Result<(), XmlError> {
    let backing = &domain.backing;
    let private = |access: &Option<Access>| *access == Some(Access::Private);
    let found = if let Some(Source::Other(kind)) = &backing.source {
        format!("of the unknown source type {kind:?}")
    } else if let Some(Access::Other(mode)) = &backing.access {
        format!("of the unknown access mode {mode:?}")
    } else if domain.numa.iter().any(|cell| private(&cell.access)) {
        "in part private (memAccess='private' of a NUMA cell)".to_owned()
    } else if domain.modules.iter().any(|module| private(&module.access)) {
        "in part private (access='private' of a memory device)".to_owned()
    } else {
        return Ok(());
    };
    Err(XmlError::Unsupported { found })
}

/// A change of the text: what comes in the place of a range of bytes.
pub(super) struct Edit {
    at: Range<usize>,
    text: String,
}

pub(super) struct Editor<'o, 'a> {
    pub(super) outline: &'o Outline<'a>,
    edits: Vec<Edit>,
}

impl<'o, 'a> Editor<'o, 'a> {
    fn new(outline: &'o Outline<'a>) -> Self {
        Editor {
            outline,
            edits: Vec::new(),
        }
    }

    pub(super) fn replace(&mut self, at: Range<usize>, text: String) {
        self.edits.push(Edit { at, text });
    }

    /// The text with all edits made.
    fn done(mut self) -> String {
        self.edits.sort_by_key(|edit| edit.at.start);
        let text = self.outline.text;
        let mut all = String::with_capacity(text.len() + 512);
        let mut from = 0;
        for edit in &self.edits {
            all += text.get(from..edit.at.start).unwrap_or_default();
            all += &edit.text;
            from = edit.at.end;
        }
        all += text.get(from..).unwrap_or_default();
        all
    }

    /// Makes the memory a shared file, or where it is to stay what it is only
    /// shared, and says what it was.
    fn share_memory(&mut self, as_is: bool) -> Result<Before, XmlError> {
        let mut before = Before::default();
        let source = "<source type='file'/>";
        let access = "<access mode='shared'/>";
        let Some(backing) = self.outline.child(ROOT, "memoryBacking")? else {
            before.backing = Some(Was::Absent);
            let anchor = self.last_of(&["maxMemory", "memory", "currentMemory"]);
            let outer = self.indent(anchor);
            let inner = deeper(&outer);
            let end = self.outline.get(anchor).close.end;
            self.replace(
                end..end,
                format!(
                    "{outer}<memoryBacking>{inner}{source}{inner}{access}{outer}</memoryBacking>"
                ),
            );
            return Ok(before);
        };
        let outer = self.indent(backing);
        let inner = deeper(&outer);
        if self.outline.get(backing).is_empty_tag() {
            before.backing = Some(Was::EmptyTag);
            self.fill(backing, &format!("{inner}{source}{inner}{access}{outer}"));
            return Ok(before);
        }
        let mut new = String::new();
        if !as_is {
            before.source = self.set(backing, "source", "type", "file")?;
        }
        if before.source == Some(Setting::Absent) {
            new += &format!("{inner}{source}");
        }
        before.access = self.set(backing, "access", "mode", "shared")?;
        if before.access == Some(Setting::Absent) {
            new += &format!("{inner}{access}");
        }
        if !new.is_empty() {
            let at = self.outline.get(backing).open.end;
            self.replace(at..at, new);
        }
        Ok(before)
    }

    /// Sets the attribute of a child of `<memoryBacking>` where there is such
    /// a child, and says what it was.
    fn set(
        &mut self,
        backing: Index,
        child: &str,
        attribute: &str,
        value: &str,
    ) -> Result<Option<Setting>, XmlError> {
        let Some(attribute) = self.setting(backing, child, attribute)? else {
            return Ok(Some(Setting::Absent));
        };
        if attribute.value == value {
            return Ok(None);
        }
        self.replace(attribute.raw, value.to_owned());
        Ok(Some(Setting::Other))
    }

    /// The attribute that makes up a child of `<memoryBacking>`.
    fn setting(
        &self,
        backing: Index,
        child: &str,
        name: &str,
    ) -> Result<Option<Attribute<'a>>, XmlError> {
        let Some(at) = self.outline.child(backing, child)? else {
            return Ok(None);
        };
        let all = self.outline.attributes(at)?;
        match all.into_iter().find(|attribute| attribute.name == name) {
            Some(attribute) => Ok(Some(attribute)),
            None => Err(XmlError::Unsupported {
                found: format!("a <{child}> without {name}"),
            }),
        }
    }

    /// Puts the memory back to what it was.
    fn restore_memory(&mut self, before: Before) -> Result<(), XmlError> {
        let Some(backing) = self.outline.child(ROOT, "memoryBacking")? else {
            return Ok(());
        };
        let of = |setting| match before.backing {
            Some(_) => Some(Setting::Absent),
            None => setting,
        };
        let mut cuts = Vec::new();
        for (was, child, name, ours, other) in [
            (of(before.source), "source", "type", "file", "anonymous"),
            (of(before.access), "access", "mode", "shared", "private"),
        ] {
            let Some(at) = self.outline.child(backing, child)? else {
                continue;
            };
            let Some(attribute) = self.setting(backing, child, name)? else {
                continue;
            };
            if attribute.value != ours {
                continue;
            }
            match was {
                None => {}
                Some(Setting::Other) => self.replace(attribute.raw, other.to_owned()),
                Some(Setting::Absent) => {
                    cuts.push(self.with_space_before(self.outline.get(at).whole()));
                }
            }
        }
        self.cut(backing, cuts, before.backing);
        Ok(())
    }

    /// What `<metadata>` is before anything is put into it.
    fn metadata_before(&self) -> Result<Option<Was>, XmlError> {
        Ok(match self.outline.child(ROOT, "metadata")? {
            None => Some(Was::Absent),
            Some(at) if self.outline.get(at).is_empty_tag() => Some(Was::EmptyTag),
            Some(_) => None,
        })
    }

    fn add_metadata(&mut self, trace: &Trace) -> Result<(), XmlError> {
        let element = trace.element();
        let Some(metadata) = self.outline.child(ROOT, "metadata")? else {
            let anchor = self.last_of(&["name", "uuid", "genid", "title", "description"]);
            let outer = self.indent(anchor);
            let inner = deeper(&outer);
            let end = self.outline.get(anchor).close.end;
            self.replace(
                end..end,
                format!("{outer}<metadata>{inner}{element}{outer}</metadata>"),
            );
            return Ok(());
        };
        let outer = self.indent(metadata);
        let inner = deeper(&outer);
        if self.outline.get(metadata).is_empty_tag() {
            self.fill(metadata, &format!("{inner}{element}{outer}"));
        } else {
            let at = self.outline.get(metadata).open.end;
            self.replace(at..at, format!("{inner}{element}"));
        }
        Ok(())
    }

    /// Opens an empty-element tag and puts a content into it.
    pub(super) fn fill(&mut self, at: Index, content: &str) {
        let element = self.outline.get(at);
        let end = element.open.end;
        // `/>`: the only way in which such a tag ends.
        self.replace(
            end.saturating_sub(2)..end,
            format!(">{content}</{}>", element.name),
        );
    }

    /// Cuts ranges out of an element's content; and where only white space is
    /// left, puts the element back to what it was.
    fn cut(&mut self, at: Index, mut cuts: Vec<Range<usize>>, was: Option<Was>) {
        cuts.sort_by_key(|cut| cut.start);
        let element = self.outline.get(at);
        let mut left = String::new();
        let mut from = element.open.end;
        for cut in &cuts {
            left += self.outline.text.get(from..cut.start).unwrap_or_default();
            from = from.max(cut.end);
        }
        left += self
            .outline
            .text
            .get(from..element.close.start)
            .unwrap_or_default();
        match was.filter(|_| left.trim().is_empty() && !cuts.is_empty()) {
            Some(Was::Absent) => {
                let whole = self.with_space_before(element.whole());
                self.replace(whole, String::new());
            }
            Some(Was::EmptyTag) => {
                self.replace(element.open.end - 1..element.close.end, "/>".to_owned());
            }
            None => {
                for cut in cuts {
                    self.replace(cut, String::new());
                }
            }
        }
    }

    /// The last child of the domain that has one of these names.
    fn last_of(&self, names: &[&str]) -> Index {
        self.outline
            .children(ROOT)
            .filter(|index| names.contains(&self.outline.get(*index).name))
            .last()
            .unwrap_or(ROOT)
    }

    /// The line break and the indentation before an element; empty where it
    /// does not start a line.
    pub(super) fn indent(&self, of: Index) -> String {
        let space = self.space_before(self.outline.get(of).open.start);
        match space.rfind('\n') {
            Some(at) => space[at..].to_owned(),
            None => String::new(),
        }
    }

    pub(super) fn with_space_before(&self, range: Range<usize>) -> Range<usize> {
        range.start - self.space_before(range.start).len()..range.end
    }

    /// The white space, as XML has it, that ends at a place.
    fn space_before(&self, end: usize) -> &'a str {
        let text = self.outline.text.get(..end).unwrap_or_default();
        let kept = text.trim_end_matches([' ', '\t', '\r', '\n']).len();
        &text[kept..]
    }
}

/// The indentation of what is inside an element of this indentation.
fn deeper(outer: &str) -> String {
    match outer {
        "" => String::new(),
        outer => format!("{outer}  "),
    }
}
