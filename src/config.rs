//! The configuration file, /etc/xftrace/xftrace.toml.
//!
//! Every key has a default, and so has a file that does not exist: a host
//! needs none. A key that is not known is an error, since a misspelt one that
//! silently does nothing is worse than a message. Paths can all be set, so
//! that a private lab or a test can run beside the host's own xftrace.
//!
//! packaging/xftrace.toml is the example with every key in it; a test holds it
//! against this module.

mod values;

use std::io::{self, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

pub use values::{
    parse_baseline, parse_function, parse_interval, AutoEnroll, ByteSize, IntegrityInterval,
    LogTarget, INTERVAL_MAX, INTERVAL_MIN,
};

/// Where the configuration is looked for when nothing else is said.
pub const DEFAULT_CONFIG_PATH: &str = "/etc/xftrace/xftrace.toml";

/// The most that is read of a configuration file, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// The configuration: see packaging/xftrace.toml for what each key does.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Functions to trace where neither the command nor the domain names any.
    #[serde(deserialize_with = "values::functions")]
    pub functions: Vec<String>,
    /// How long one key lasts, from [`INTERVAL_MIN`] to [`INTERVAL_MAX`].
    #[serde(deserialize_with = "values::interval")]
    pub interval: Duration,
    /// Whether domains that are enrolled by name are traced from their start.
    pub at_start: bool,
    /// Domains that count as enrolled by their name alone.
    pub auto_enroll: AutoEnroll,
    /// The baseline that a guest is checked against where neither the command nor
    /// the domain names one; empty for none.
    #[serde(deserialize_with = "values::baseline")]
    pub baseline: String,
    /// How often the kernel in a guest's memory is looked at, where the domain does
    /// not say.
    pub integrity_interval: IntegrityInterval,
    /// A command that is run for each finding, with it on standard input: an
    /// absolute path and arguments. Empty for none.
    #[serde(deserialize_with = "values::command")]
    pub on_finding: Vec<String>,
    /// Where things lie.
    pub paths: Paths,
    /// What is too much.
    pub limits: Limits,
    /// Where messages of the helper and the hook go.
    pub log: Log,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            functions: Vec::new(),
            interval: Duration::from_secs(1),
            at_start: false,
            auto_enroll: AutoEnroll::default(),
            baseline: String::new(),
            integrity_interval: IntegrityInterval(Some(Duration::from_secs(60))),
            on_finding: Vec::new(),
            paths: Paths::default(),
            limits: Limits::default(),
            log: Log::default(),
        }
    }
}

/// Where things lie, table `[paths]`. All are absolute.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Paths {
    /// Sessions go to `<sessions>/<domain>.xftrace/<UTC time>/`.
    #[serde(deserialize_with = "values::absolute")]
    pub sessions: PathBuf,
    /// Sockets of the helpers, and the XML of the domains that run.
    #[serde(deserialize_with = "values::absolute")]
    pub run: PathBuf,
    /// Symbols of guests' kernels: the store, and files that others put there.
    #[serde(deserialize_with = "values::absolute")]
    pub symbols: PathBuf,
    /// What clean guests do, learnt by `xftrace baseline learn`.
    #[serde(deserialize_with = "values::absolute")]
    pub baselines: PathBuf,
    /// libvirt's own directory of PID files, `<libvirt_run>/<domain>.pid`.
    #[serde(deserialize_with = "values::absolute")]
    pub libvirt_run: PathBuf,
    /// libvirt's hooks, in which qemu.d lies.
    #[serde(deserialize_with = "values::absolute")]
    pub libvirt_hooks: PathBuf,
    /// The configuration of libvirt's QEMU driver.
    #[serde(deserialize_with = "values::absolute")]
    pub qemu_conf: PathBuf,
}

impl Default for Paths {
    fn default() -> Paths {
        Paths {
            sessions: "/var/log/libvirt/qemu".into(),
            run: "/run/xftrace".into(),
            symbols: "/var/lib/xftrace/symbols".into(),
            baselines: "/var/lib/xftrace/baselines".into(),
            libvirt_run: "/run/libvirt/qemu".into(),
            libvirt_hooks: "/etc/libvirt/hooks".into(),
            qemu_conf: "/etc/libvirt/qemu.conf".into(),
        }
    }
}

/// What is too much, table `[limits]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// The most that one session may take on disk, without its symbols, its
    /// keys and the call flow. The trace ends there, and says so.
    pub session_size: ByteSize,
    /// How much of a session may wait for a slow disk, in the helper's memory; 1 MiB at
    /// least. What comes on top of it is lost to the trace, and counted.
    pub unwritten: ByteSize,
    /// The most that the calls in a `trace_graph.txt` may take. It ends there, and says
    /// so; the records are all there.
    pub text_size: ByteSize,
    /// The largest guest memory that a helper maps.
    pub guest_memory: ByteSize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            session_size: ByteSize(2 << 30),
            unwritten: ByteSize(128 << 20),
            text_size: ByteSize(4 << 30),
            guest_memory: ByteSize(4 << 40),
        }
    }
}

/// Where messages of the helper and the hook go, table `[log]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// The place.
    pub target: LogTarget,
    /// The least severe messages that are kept.
    #[serde(deserialize_with = "values::level")]
    pub level: log::LevelFilter,
}

impl Default for Log {
    fn default() -> Log {
        Log {
            target: LogTarget::Syslog,
            level: log::LevelFilter::Info,
        }
    }
}

/// Why a configuration could not be had.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is larger than any configuration.
    #[error("{} is no xftrace configuration: larger than 1 MiB", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// The file's content is wrong.
    #[error("{}:{line}: {message}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong there.
        message: String,
    },
}

impl Config {
    /// Reads a configuration that must exist.
    ///
    /// # Errors
    /// Where the file does not exist, cannot be read, or is wrong.
    pub fn load(path: &Path) -> Result<Config, ConfigError> {
        let read = |source| ConfigError::Read {
            path: path.to_owned(),
            source,
        };
        let mut bytes = Vec::new();
        std::fs::File::open(path)
            .and_then(|file| file.take(MAX_FILE + 1).read_to_end(&mut bytes))
            .map_err(read)?;
        if bytes.len() as u64 > MAX_FILE {
            return Err(ConfigError::TooLarge {
                path: path.to_owned(),
            });
        }
        let text = String::from_utf8(bytes).map_err(|error| ConfigError::Content {
            path: path.to_owned(),
            line: line_of(error.as_bytes(), error.utf8_error().valid_up_to()),
            message: "not UTF-8 text".to_owned(),
        })?;
        Config::parse(&text).map_err(|(line, message)| ConfigError::Content {
            path: path.to_owned(),
            line,
            message,
        })
    }

    /// Reads a configuration, or takes the defaults where there is no such
    /// file.
    ///
    /// # Errors
    /// Where the file exists and cannot be read or is wrong.
    pub fn load_or_default(path: &Path) -> Result<Config, ConfigError> {
        match Config::load(path) {
            Err(ConfigError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Ok(Config::default())
            }
            other => other,
        }
    }

    /// Reads a configuration's text. An error is the line, from 1, and what is
    /// wrong there, in one line.
    fn parse(text: &str) -> Result<Config, (usize, String)> {
        toml::from_str(text).map_err(|error| {
            let at = error.span().map_or(0, |Range { start, .. }| start);
            let message = error.message().trim().replace('\n', "; ");
            (line_of(text.as_bytes(), at), message)
        })
    }
}

/// The line, from 1, in which a byte lies.
fn line_of(text: &[u8], at: usize) -> usize {
    1 + text.iter().take(at).filter(|b| **b == b'\n').count()
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = include_str!("../packaging/xftrace.toml");

    #[test]
    fn the_example_is_the_defaults() {
        assert_eq!(Config::parse(EXAMPLE).unwrap(), Config::default());
    }

    /// The example with its comments taken off, so that every key is set.
    #[test]
    fn the_example_has_every_key_and_shows_its_default() {
        let set: String = EXAMPLE
            .lines()
            .map(|line| line.strip_prefix("#:").unwrap_or(line))
            .fold(String::new(), |all, line| all + line + "\n");
        assert_eq!(Config::parse(&set).unwrap(), Config::default());

        let keys: toml::Table = set.parse().unwrap();
        let count: usize = keys
            .values()
            .map(|value| value.as_table().map_or(1, |table| table.len()))
            .sum();
        // 7 at the top, 7 paths, 4 limits, 2 of the log: a new key must come
        // into the example too.
        assert_eq!(count, 20);
    }

    #[test]
    fn errors_name_the_line() {
        for (text, line, says) in [
            ("interval = \"1s\"\nintervall = \"1s\"\n", 2, "intervall"),
            ("\n\ninterval = \"5ms\"\n", 3, "10ms"),
            ("interval = \"2h\"", 1, "1h"),
            ("interval = \"soon\"", 1, "soon"),
            ("[log]\nlevel = \"loud\"\n", 2, "loud"),
            ("[log]\ntarget = \"printer\"\n", 2, "printer"),
            ("[paths]\nrun = \"run/xftrace\"\n", 2, "absolute"),
            ("[limits]\nsession_size = \"2X\"\n", 2, "2X"),
            ("auto_enroll = [\"web-[\"]", 1, "web-["),
            ("on_finding = [\"mail\", \"root\"]", 1, "absolute"),
            ("baseline = \"../x\"", 1, "baseline"),
            ("integrity_interval = \"10ms\"", 1, "1s"),
            ("auto_enroll = \"some\"", 1, "some"),
            ("functions = [\"a b\"]", 1, "function"),
            ("x = = 1", 1, ""),
        ] {
            let (at, message) = Config::parse(text).expect_err(text);
            assert_eq!(at, line, "{text}: {message}");
            assert!(message.contains(says), "{text}: {message}");
            assert!(!message.contains('\n'), "{message}");
        }
    }

    #[test]
    fn a_missing_file_is_the_defaults_unless_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("xftrace.toml");
        assert_eq!(Config::load_or_default(&path).unwrap(), Config::default());
        assert!(matches!(Config::load(&path), Err(ConfigError::Read { .. })));
        std::fs::write(&path, b"interval = \"1s\"\n\xff").unwrap();
        let error = Config::load_or_default(&path).unwrap_err().to_string();
        assert!(error.ends_with("xftrace.toml:2: not UTF-8 text"), "{error}");
        std::fs::write(&path, vec![b'#'; (MAX_FILE + 1) as usize]).unwrap();
        assert!(matches!(
            Config::load(&path),
            Err(ConfigError::TooLarge { .. })
        ));
    }
}
