//! The values of the configuration that are more than a text or a number.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use glob::Pattern;
use serde::de::{self, Deserialize, Deserializer, SeqAccess, Visitor};

use crate::detect::Store;

/// The shortest time that one key may last: a write and a sync to disk come
/// before each.
pub const INTERVAL_MIN: Duration = Duration::from_millis(10);

/// The longest time that one key may last.
pub const INTERVAL_MAX: Duration = Duration::from_secs(3600);

/// Reads an interval such as `1s`, `500ms` or `1m 30s`.
///
/// # Errors
/// Where the text is no time, or is not from [`INTERVAL_MIN`] to
/// [`INTERVAL_MAX`].
pub fn parse_interval(text: &str) -> Result<Duration, String> {
    let interval = humantime::parse_duration(text)
        .map_err(|error| format!("{text:?} is no time such as 1s or 500ms: {error}"))?;
    if !(INTERVAL_MIN..=INTERVAL_MAX).contains(&interval) {
        return Err(format!(
            "{text} is out of range: a key lasts from 10ms to 1h"
        ));
    }
    Ok(interval)
}

/// How often the kernel in a guest's memory is looked at; none for not at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IntegrityInterval(pub Option<Duration>);

/// The word for not at all.
const OFF: &str = "off";

/// The shortest and the longest time between two looks.
const LOOKS: std::ops::RangeInclusive<Duration> =
    Duration::from_secs(1)..=Duration::from_secs(24 * 3600);

impl FromStr for IntegrityInterval {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == OFF {
            return Ok(Self(None));
        }
        let time = humantime::parse_duration(text).map_err(|error| {
            format!("{text:?} is neither \"off\" nor a time such as 1m: {error}")
        })?;
        if !LOOKS.contains(&time) {
            return Err(format!(
                "{text} is out of range: between two looks are from 1s to 24h, or \"off\""
            ));
        }
        Ok(Self(Some(time)))
    }
}

impl fmt::Display for IntegrityInterval {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(time) => humantime::format_duration(time).fmt(f),
            None => f.write_str(OFF),
        }
    }
}

impl<'de> Deserialize<'de> for IntegrityInterval {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        text(from)
    }
}

/// Reads the name of a baseline.
///
/// # Errors
/// Where the text can be no such name.
pub fn parse_baseline(text: &str) -> Result<String, String> {
    if Store::is_name(text) {
        return Ok(text.to_owned());
    }
    Err(format!(
        "{text:?} is no baseline's name: letters, digits, '-', '_' and '.', not first, at most 64"
    ))
}

/// A number of bytes, written as `4096`, `8M` or `2G` (powers of 1024).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(pub u64);

const UNITS: [(char, u32); 4] = [('T', 40), ('G', 30), ('M', 20), ('K', 10)];

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<ByteSize, String> {
        let wrong = || format!("{text:?} is no size such as 4096, 8M or 2G");
        let upper = text.trim().to_ascii_uppercase();
        let bare = upper
            .strip_suffix("IB")
            .or_else(|| upper.strip_suffix('B'))
            .unwrap_or(&upper);
        let (digits, shift) = UNITS
            .iter()
            .find_map(|(unit, shift)| Some((bare.strip_suffix(*unit)?, *shift)))
            .unwrap_or((bare, 0));
        let number: u64 = digits.trim_end().parse().map_err(|_| wrong())?;
        number
            .checked_mul(1 << shift)
            .map(ByteSize)
            .ok_or_else(wrong)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fitting = UNITS
            .iter()
            .find(|(_, shift)| self.0 != 0 && self.0.trailing_zeros() >= *shift);
        match fitting {
            Some((unit, shift)) => write!(f, "{}{unit}", self.0 >> shift),
            None => write!(f, "{}", self.0),
        }
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<ByteSize, D::Error> {
        text(from)
    }
}

/// The name of a baseline, or nothing.
pub(super) fn baseline<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    let name = String::deserialize(from)?;
    match name.is_empty() {
        true => Ok(name),
        false => parse_baseline(&name).map_err(de::Error::custom),
    }
}

/// A program's absolute path and its arguments, or nothing.
pub(super) fn command<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<String>, D::Error> {
    let command = Vec::<String>::deserialize(from)?;
    match command.first() {
        Some(program) if !program.starts_with('/') => Err(de::Error::custom(format!(
            "{program:?} is no absolute path of a program"
        ))),
        _ => Ok(command),
    }
}

/// Which domains count as enrolled by their name alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AutoEnroll {
    /// Every domain.
    All,
    /// Those whose name matches one of these shell patterns.
    Names(Vec<Pattern>),
}

impl Default for AutoEnroll {
    fn default() -> AutoEnroll {
        AutoEnroll::Names(Vec::new())
    }
}

impl AutoEnroll {
    /// Whether the domain of this name is among them.
    pub fn matches(&self, domain: &str) -> bool {
        match self {
            AutoEnroll::All => true,
            AutoEnroll::Names(patterns) => patterns.iter().any(|pattern| pattern.matches(domain)),
        }
    }
}

impl<'de> Deserialize<'de> for AutoEnroll {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<AutoEnroll, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = AutoEnroll;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of name patterns such as [\"web-*\"], or \"all\"")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<AutoEnroll, E> {
                match text {
                    "all" => Ok(AutoEnroll::All),
                    other => Err(E::invalid_value(de::Unexpected::Str(other), &self)),
                }
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<AutoEnroll, A::Error> {
                let mut patterns = Vec::new();
                while let Some(text) = list.next_element::<String>()? {
                    let pattern = Pattern::new(&text).map_err(|error| {
                        de::Error::custom(format!("{text:?} is no name pattern: {error}"))
                    })?;
                    patterns.push(pattern);
                }
                Ok(AutoEnroll::Names(patterns))
            }
        }
        from.deserialize_any(Either)
    }
}

/// Where messages go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogTarget {
    /// The socket /dev/log, which is the journal's where there is one.
    Syslog,
    /// Standard error.
    Stderr,
    /// A file that is appended to.
    File(PathBuf),
}

impl FromStr for LogTarget {
    type Err = String;

    fn from_str(text: &str) -> Result<LogTarget, String> {
        match text {
            "syslog" => Ok(LogTarget::Syslog),
            "stderr" => Ok(LogTarget::Stderr),
            path if path.starts_with('/') => Ok(LogTarget::File(path.into())),
            other => Err(format!(
                "{other:?} is none of \"syslog\", \"stderr\" and an absolute path"
            )),
        }
    }
}

impl<'de> Deserialize<'de> for LogTarget {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<LogTarget, D::Error> {
        text(from)
    }
}

/// Deserialises what is read from a text.
fn text<'de, D, T>(from: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr<Err = String>,
{
    String::deserialize(from)?
        .parse()
        .map_err(de::Error::custom)
}

pub(super) fn interval<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
    parse_interval(&String::deserialize(from)?).map_err(de::Error::custom)
}

pub(super) fn level<'de, D: Deserializer<'de>>(from: D) -> Result<log::LevelFilter, D::Error> {
    let text = String::deserialize(from)?;
    text.parse().map_err(|_| {
        de::Error::custom(format!(
            "{text:?} is none of \"off\", \"error\", \"warn\", \"info\", \"debug\" and \"trace\""
        ))
    })
}

pub(super) fn absolute<'de, D: Deserializer<'de>>(from: D) -> Result<PathBuf, D::Error> {
    let path = PathBuf::deserialize(from)?;
    if path.is_absolute() {
        Ok(path)
    } else {
        Err(de::Error::custom(format!(
            "{path:?} is not an absolute path"
        )))
    }
}

pub(super) fn functions<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<String>, D::Error> {
    Vec::<String>::deserialize(from)?
        .iter()
        .map(|name| parse_function(name).map_err(de::Error::custom))
        .collect()
}

/// Reads a kernel function's name as people type it. The characters are those
/// of C identifiers and of the suffixes that compilers add (`.constprop.0`,
/// `.isra.0`), so that a name can never break a metadata attribute or a
/// message.
///
/// # Errors
/// Where the text is no such name, or is longer than 512 characters (the
/// kernel's own limit, KSYM_NAME_LEN, include/linux/kallsyms.h).
pub fn parse_function(text: &str) -> Result<String, String> {
    let name = text.trim();
    if name.is_empty() {
        return Err("a function's name is missing".to_owned());
    }
    if name.len() > 512 {
        return Err("a kernel function's name has at most 512 characters".to_owned());
    }
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '$');
    match name.chars().find(|c| !fits(*c)) {
        Some(c) => Err(format!(
            "{:?} is no part of a kernel function's name",
            c.to_string()
        )),
        None => Ok(name.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("8M", 8 << 20),
            ("8m", 8 << 20),
            ("8MiB", 8 << 20),
            ("8 MB", 8 << 20),
            ("2G", 2 << 30),
            ("1T", 1 << 40),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
        for text in ["", "M", "-1", "1.5G", "8X", "99999999999T", "0x10"] {
            assert!(text.parse::<ByteSize>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn a_size_reads_back_as_printed(bytes: u64) {
            prop_assert_eq!(ByteSize(bytes).to_string().parse(), Ok(ByteSize(bytes)));
        }

        #[test]
        fn no_text_makes_a_size_or_a_time_panic(text in ".{0,40}") {
            let _ = text.parse::<ByteSize>();
            let _ = parse_interval(&text);
            let _ = text.parse::<IntegrityInterval>();
            let _ = parse_function(&text);
        }
    }

    #[test]
    fn looks_are_so_far_apart_or_off() {
        for (text, seconds) in [("off", None), ("1s", Some(1)), ("1day", Some(86_400))] {
            let read: IntegrityInterval = text.parse().expect(text);
            assert_eq!(read.0, seconds.map(Duration::from_secs), "{text}");
            assert_eq!(read.to_string(), text);
        }
        for (text, says) in [
            ("0s", "1s to 24h"),
            ("25h", "1s to 24h"),
            ("Off", "off"),
            ("", "1m"),
        ] {
            let error = text.parse::<IntegrityInterval>().expect_err(text);
            assert!(error.contains(says), "{text}: {error}");
        }
    }

    #[test]
    fn name_patterns_match_as_in_a_shell() {
        let some = AutoEnroll::Names(
            ["web-*", "db?"]
                .iter()
                .map(|text| Pattern::new(text).unwrap())
                .collect(),
        );
        for (name, hit) in [
            ("web-1", true),
            ("web-", true),
            ("web1", false),
            ("db1", true),
            ("db", false),
            ("my-web-1", false),
        ] {
            assert_eq!(some.matches(name), hit, "{name}");
        }
        assert!(AutoEnroll::All.matches("anything"));
        assert!(!AutoEnroll::default().matches("anything"));
    }
}
