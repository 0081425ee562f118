//! The kernel's command line, `<os><cmdline>`, of a domain that boots a
//! kernel directly.
//!
//! What enrolling puts there is remembered word for word
//! ([`super::Trace::cmdline`]), so that unenrolling takes out that and nothing
//! else. What somebody has changed since stays as it is.

use quick_xml::escape::escape;

use super::edit::Editor;
use super::outline::ROOT;
use super::trace::Was;
use super::XmlError;

impl Editor<'_, '_> {
    /// Takes `old` out of the command line and puts `new` at its end. `was`
    /// says what `<cmdline>` was before `old` was put there; what it was
    /// before `new` is returned. Nothing changes in a domain that boots no
    /// kernel directly.
    pub(super) fn boot_with(
        &mut self,
        old: Option<&str>,
        new: Option<&str>,
        was: Option<Was>,
    ) -> Result<Option<Was>, XmlError> {
        let outline = self.outline;
        if old == new {
            return Ok(was);
        }
        let Some(os) = outline.child(ROOT, "os")? else {
            return Ok(None);
        };
        let Some(kernel) = outline.child(os, "kernel")? else {
            return Ok(None);
        };
        let new = new.map(|new| escape(new).into_owned());
        let Some(at) = outline.child(os, "cmdline")? else {
            let Some(new) = new else {
                return Ok(None);
            };
            let anchor = outline.child(os, "initrd")?.unwrap_or(kernel);
            let end = outline.get(anchor).close.end;
            let indent = self.indent(anchor);
            self.replace(end..end, format!("{indent}<cmdline>{new}</cmdline>"));
            return Ok(Some(Was::Absent));
        };
        let element = outline.get(at);
        if element.is_empty_tag() {
            return Ok(new.map(|new| {
                self.fill(at, &new);
                Was::EmptyTag
            }));
        }
        let content = element.open.end..element.close.start;
        let text = outline.text.get(content.clone()).unwrap_or_default();
        let kept = match old {
            Some(old) => without(text, &escape(old)),
            None => text.to_owned(),
        };
        match (new, was) {
            (Some(new), was) => {
                let space = if kept.is_empty() { "" } else { " " };
                self.replace(content, format!("{kept}{space}{new}"));
                return Ok(was);
            }
            (None, Some(Was::Absent)) if kept.is_empty() => {
                let whole = self.with_space_before(element.whole());
                self.replace(whole, String::new());
            }
            (None, Some(Was::EmptyTag)) if kept.is_empty() => {
                self.replace(element.open.end - 1..element.close.end, "/>".to_owned());
            }
            (None, _) => self.replace(content, kept),
        }
        Ok(None)
    }
}

/// `text` without the last `old` in it, and without the space that was put in
/// front of that.
fn without(text: &str, old: &str) -> String {
    let Some(at) = text.rfind(old) else {
        return text.to_owned();
    };
    let (before, rest) = text.split_at(at);
    let after = rest.strip_prefix(old).unwrap_or(rest);
    let before = before.strip_suffix(' ').unwrap_or(before);
    format!("{before}{after}")
}
