//! Text that is not ours, made fit for a terminal and a log.

use std::borrow::Cow;

/// The most that is shown of a symbol; the kernel's own limit (KSYM_NAME_LEN) is
/// 512.
pub(super) const SYMBOL_WIDTH: usize = 255;

fn is_plain(byte: u8) -> bool {
    matches!(byte, b' '..=b'~') && byte != b'\\'
}

/// Writes bytes that the guest chose: printable ASCII as it is, a backslash
/// twice, everything else as `\xNN`, so that no two texts look the same. At most
/// `most` columns; what is longer ends in `..`.
pub(super) fn push_guest(out: &mut Vec<u8>, bytes: &[u8], most: usize) {
    push(out, bytes, most, is_plain);
}

fn push(out: &mut Vec<u8>, bytes: &[u8], most: usize, plain: impl Fn(u8) -> bool) {
    if bytes.len() <= most && bytes.iter().all(|&byte| plain(byte)) {
        out.extend_from_slice(bytes);
        return;
    }
    let start = out.len();
    let mut short = start;
    for &byte in bytes {
        if out.len() - start <= most.saturating_sub(2) {
            short = out.len();
        }
        if plain(byte) {
            out.push(byte);
        } else if byte == b'\\' {
            out.extend_from_slice(br"\\");
        } else {
            out.extend_from_slice(br"\x");
            out.extend([byte >> 4, byte & 15].map(|digit| b"0123456789abcdef"[usize::from(digit)]));
        }
        if out.len() - start > most {
            out.truncate(short);
            out.extend_from_slice(b"..");
            return;
        }
    }
}

/// The same as a `String`.
pub(super) fn guest(bytes: &[u8], most: usize) -> String {
    let mut out = Vec::new();
    push_guest(&mut out, bytes, most);
    String::from_utf8_lossy(&out).into_owned()
}

/// A symbol. System.map comes from who knows where: it can be a guest's. At most
/// [`SYMBOL_WIDTH`] columns.
pub(super) fn symbol(symbol: &str) -> Cow<'_, str> {
    if symbol.len() <= SYMBOL_WIDTH && symbol.bytes().all(is_plain) {
        return Cow::Borrowed(symbol);
    }
    Cow::Owned(guest(symbol.as_bytes(), SYMBOL_WIDTH))
}

/// Text from the guest that was escaped when it was read (a kernel's banner), and
/// is made sure of here: its backslashes stay as they are.
pub(super) fn escaped(text: &str, most: usize) -> String {
    let mut out = Vec::new();
    push(&mut out, text.trim_end().as_bytes(), most, |byte| {
        is_plain(byte) || byte == b'\\'
    });
    String::from_utf8_lossy(&out).into_owned()
}

/// Text from the host's side (a domain's name may be in any script) on one
/// line: control characters, and those that turn the direction of text, as
/// `\u{..}`.
pub(super) fn host(text: &str) -> String {
    let turns = |c: char| matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() || turns(c) {
            out.extend(c.escape_unicode());
        } else {
            out.push(c);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_could_steer_a_terminal_is_escaped() {
        assert_eq!(guest(b"sh", 15), "sh");
        assert_eq!(guest(b"\x1b[2J\n\xc3\xa9\\", 99), r"\x1b[2J\x0a\xc3\xa9\\");
        assert_eq!(escaped("Linux \\x1b\u{1b}\n", 99), r"Linux \x1b\x1b");
        assert_eq!(host("tést\n\u{202e}"), "tést\\u{a}\\u{202e}");
    }

    #[test]
    fn long_text_is_cut_and_never_amid_an_escape() {
        assert_eq!(guest(b"123456", 6), "123456");
        assert_eq!(guest(b"1234567", 6), "1234..");
        assert_eq!(guest(b"1\x01\x02\x03", 8), r"1\x01..");
        assert_eq!(guest(b"\x01\x02", 8), r"\x01\x02");
        for most in 2..12 {
            assert!(guest(b"a\x01bc\xff\xffdefg\\", most).len() <= most);
        }
    }
}
