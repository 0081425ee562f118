//! Reading a symbol file, and saying what is wrong with one.

use std::collections::hash_map::RandomState;
use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::libc;

use super::{name_hash, Symbol, Symbols};
use crate::kernel::escape::escape;
use crate::kernel::Gva;

/// Larger than any kernel's: the System.map of an allyesconfig kernel has
/// some 30 MB. Also keeps positions in the file below 2^32.
const MAX_FILE: u64 = 256 << 20;

/// The kernel's limit is 512 (KSYM_NAME_LEN, include/linux/kallsyms.h).
const MAX_NAME: usize = 1024;

/// Why the symbols could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum SymbolsError {
    /// The file cannot be read.
    #[error("cannot read the symbol file {path:?}")]
    Io {
        /// The path as given.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The file can be read, but not used.
    #[error("{path:?} cannot be used as the guest kernel's System.map")]
    Content {
        /// The path as given.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        fault: SymbolsFault,
    },
}

/// What is wrong with the content of a symbol file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SymbolsFault {
    /// It is not a regular file.
    #[error(
        "it is not a file; name the System.map that was made when the guest's kernel was built"
    )]
    NotAFile,
    /// It has no symbols at all.
    #[error("it is empty")]
    Empty,
    /// Debian and Ubuntu install 83 bytes that say where the real one is.
    #[error(
        "it is only the note that the distribution installs in its place; take the kernel itself, \
         /boot/vmlinuz-RELEASE, or its linux-image package (the real System.map is in the package \
         {package:?})"
    )]
    Stub {
        /// The package that the note names, escaped.
        package: String,
    },
    /// It is some other kind of file.
    #[error("it is {what}, not text with an address, a letter and a name on each line{hint}")]
    Binary {
        /// What it seems to be.
        what: &'static str,
        /// What to do with a file of that kind, or nothing.
        hint: &'static str,
    },
    /// More than 256 MiB.
    #[error("it has {0} bytes, far more than any kernel's")]
    TooLarge(u64),
    /// A line is not of the form `address letter name`.
    #[error("line {line} is not an address, a letter and a name: {text:?}")]
    BadLine {
        /// Counted from 1.
        line: usize,
        /// The beginning of the line, escaped.
        text: String,
    },
    /// /proc/kallsyms as seen by somebody who may not see addresses.
    #[error(
        "all its addresses are zero: /proc/kallsyms was saved by a user who may not see them; \
         save it as root with kernel.kptr_restrict below 2"
    )]
    AddressesHidden,
    /// The marks that say where the kernel's code lies are missing.
    #[error("it has no usable {0}, so it is not the complete list of a kernel's symbols")]
    NoText(&'static str),
}

impl Symbols {
    /// Reads a System.map, or a saved /proc/kallsyms.
    ///
    /// # Errors
    /// [`SymbolsError::Io`] if it cannot be read, [`SymbolsError::Content`]
    /// if it is not such a file.
    pub fn load(path: &Path) -> Result<Self, SymbolsError> {
        Self::parse_file(path, Self::read(path)?)
    }

    /// Reads the bytes of such a file.
    ///
    /// # Errors
    /// As [`Symbols::load`], if it cannot be read or is no file, or too large.
    pub fn read(path: &Path) -> Result<Vec<u8>, SymbolsError> {
        let content = |fault| SymbolsError::Content {
            path: path.to_path_buf(),
            fault,
        };
        let failed = |source| SymbolsError::Io {
            path: path.to_path_buf(),
            source,
        };
        // O_NONBLOCK, so that a pipe of that name is refused, not waited for.
        let file = File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(failed)?;
        let meta = file.metadata().map_err(failed)?;
        if !meta.is_file() {
            return Err(content(SymbolsFault::NotAFile));
        }
        let mut bytes = Vec::new();
        // The size of /proc/kallsyms is 0: read on until it ends.
        let limit = MAX_FILE + 1;
        file.take(limit).read_to_end(&mut bytes).map_err(failed)?;
        if bytes.len() as u64 == limit {
            return Err(content(SymbolsFault::TooLarge(meta.len().max(limit))));
        }
        Ok(bytes)
    }

    /// As [`Symbols::parse`], for what was read from `path`.
    ///
    /// # Errors
    /// The first thing that is wrong with it.
    pub fn parse_file(path: &Path, bytes: Vec<u8>) -> Result<Self, SymbolsError> {
        Self::parse(bytes).map_err(|fault| SymbolsError::Content {
            path: path.to_path_buf(),
            fault,
        })
    }

    /// Reads the content of such a file.
    ///
    /// # Errors
    /// The first thing that is wrong with it.
    pub fn parse(bytes: Vec<u8>) -> Result<Self, SymbolsFault> {
        if bytes.len() as u64 > MAX_FILE {
            return Err(SymbolsFault::TooLarge(bytes.len() as u64));
        }
        let text = as_text(bytes)?;
        let (mut image, mut modules) = parse_lines(&text)?;
        if image.iter().all(|symbol| symbol.address == 0) {
            return Err(SymbolsFault::AddressesHidden);
        }
        // Stable, and quick where the file is in order already, as both kinds
        // of file nearly are.
        image.sort_by_key(|symbol| symbol.address);
        modules.sort_by_key(|(symbol, _)| symbol.address);
        Self::indexed(text, image, modules)
    }

    /// With the indices made, of symbols that are in order.
    pub(super) fn indexed(
        text: String,
        image: Vec<Symbol>,
        modules: Vec<(Symbol, Range<u32>)>,
    ) -> Result<Self, SymbolsFault> {
        let mut symbols = Self {
            text,
            image,
            by_name: Vec::new(),
            hasher: RandomState::new(),
            functions: Vec::new(),
            modules,
            modules_slide: None,
            main_text: Gva(0)..Gva(0),
            init_text: Gva(0)..Gva(0),
            irq_text: Vec::new(),
        };
        symbols.by_name = symbols
            .image
            .iter()
            .zip(0..)
            .map(|(symbol, index)| (name_hash(&symbols.hasher, symbols.name_of(symbol)), index))
            .collect();
        symbols.by_name.sort_unstable();
        symbols.find_text()?;
        symbols.index_functions();
        Ok(symbols)
    }

    /// Finds out where the kernel's code is, by the marks of the linker.
    pub(super) fn find_text(&mut self) -> Result<(), SymbolsFault> {
        self.main_text = self
            .marked("_stext", "_etext")
            .ok_or(SymbolsFault::NoText("_stext and _etext"))?;
        if self.address("_text").is_none() {
            return Err(SymbolsFault::NoText("_text"));
        }
        let empty = Gva(0)..Gva(0);
        self.init_text = self.marked("_sinittext", "_einittext").unwrap_or(empty);
        Ok(())
    }

    /// The stretch between two marks of the linker, if both exist and it is
    /// not empty.
    pub(super) fn marked(&self, start: &str, end: &str) -> Option<Range<Gva>> {
        let range = self.address(start)?..self.address(end)?;
        (!range.is_empty()).then_some(range)
    }
}

/// The bytes as ASCII text, or what they are instead.
fn as_text(bytes: Vec<u8>) -> Result<String, SymbolsFault> {
    let binary = |what, hint| Err(SymbolsFault::Binary { what, hint });
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Err(SymbolsFault::Empty);
    }
    if bytes.starts_with(b"\x7fELF") {
        return binary("an ELF file", "; add it with `xftrace symbols add`");
    }
    if bytes.starts_with(b"\x1f\x8b") || bytes.starts_with(b"\xfd7zXZ") {
        return binary("a compressed file", "; add it with `xftrace symbols add`");
    }
    if bytes.contains(&0) || !bytes.is_ascii() {
        return binary("a binary file", "");
    }
    String::from_utf8(bytes).or_else(|_| binary("a binary file", ""))
}

/// Symbols of the image, and those of modules with the module's name.
type Parsed = (Vec<Symbol>, Vec<(Symbol, Range<u32>)>);

/// Takes the text apart, line by line.
fn parse_lines(text: &str) -> Result<Parsed, SymbolsFault> {
    // A guess that avoids most of the growing: 40 bytes a line.
    let mut image = Vec::with_capacity(text.len() / 40);
    let mut modules = Vec::new();
    let mut start = 0;
    for (number, line) in text.split('\n').enumerate() {
        let here = start;
        start += line.len() + 1;
        if line.trim_ascii().is_empty() {
            continue;
        }
        let bad = || match stub_package(line) {
            Some(package) => SymbolsFault::Stub { package },
            None => SymbolsFault::BadLine {
                line: number + 1,
                text: escape(line.as_bytes().get(..60).unwrap_or(line.as_bytes())),
            },
        };
        let fields = parse_line(line).ok_or_else(bad)?;
        // `MAX_FILE` keeps positions, `MAX_NAME` lengths in their types.
        let at = |part: &Range<usize>| (here + part.start) as u32;
        let symbol = Symbol {
            address: fields.address,
            name: at(&fields.name),
            len: fields.name.len() as u16,
            kind: fields.kind,
        };
        match fields.module {
            None => image.push(symbol),
            Some(module) => {
                let end = (here + module.end) as u32;
                modules.push((symbol, at(&module)..end));
            }
        }
    }
    Ok((image, modules))
}

/// The parts of one line; names as positions in it.
struct Fields {
    address: u64,
    kind: u8,
    name: Range<usize>,
    module: Option<Range<usize>>,
}

/// `ffffffff81000000 T _text`, and from kallsyms also
/// `ffffffffc0000000 t init_module<TAB>[name]`.
fn parse_line(line: &str) -> Option<Fields> {
    let line = line.trim_ascii_end();
    let (address, rest) = line.split_once(' ')?;
    if address.len() > 16 || !address.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let address = u64::from_str_radix(address, 16).ok()?;
    let (kind, rest) = rest.split_once(' ')?;
    let &[kind] = kind.as_bytes() else {
        return None;
    };
    let (name, module) = match rest.split_once('\t') {
        Some((name, module)) => (name, Some(module.strip_prefix('[')?.strip_suffix(']')?)),
        None => (rest, None),
    };
    let fits = |name: &str| {
        (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_graphic())
    };
    if !kind.is_ascii_graphic() || !fits(name) || !module.is_none_or(fits) {
        return None;
    }
    let name_at = line.len() - rest.len();
    Some(Fields {
        address,
        kind,
        name: name_at..name_at + name.len(),
        // Up to the closing bracket.
        module: module.map(|module| line.len() - 1 - module.len()..line.len() - 1),
    })
}

/// The package that Debian's stub names:
/// `ffffffffffffffff B The real System.map is in the linux-image-<version>-dbg package`.
fn stub_package(line: &str) -> Option<String> {
    let (_, rest) = line.split_once("The real System.map is in the ")?;
    let package = rest.trim_ascii_end().strip_suffix(" package")?;
    Some(escape(package.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_time::cpu_time;
    use proptest::prelude::*;

    const SMALL: &str = "ffffffff81000000 T _text\nffffffff81000000 T _stext\n\
        ffffffff81000040 t foo\nffffffff81001000 T _etext\n";

    fn fault(bytes: &[u8]) -> SymbolsFault {
        Symbols::parse(bytes.to_vec()).expect_err("refused")
    }

    #[test]
    fn a_small_map_loads() {
        let symbols = Symbols::parse(SMALL.into()).unwrap();
        assert_eq!(symbols.len(), 4);
        assert_eq!(symbols.address("foo"), Some(Gva(0xffff_ffff_8100_0040)));
        assert_eq!(symbols.address("fo"), None);
        let dos = SMALL.replace('\n', "\r\n");
        assert_eq!(
            Symbols::parse(dos.into()).unwrap().address("foo"),
            symbols.address("foo")
        );
    }

    #[test]
    fn kallsyms_with_modules_loads_and_keeps_them_apart() {
        let text = format!("{SMALL}ffffffffc0000000 t foo\t[ext4]\n");
        let symbols = Symbols::parse(text.into()).unwrap();
        assert_eq!(symbols.address("foo"), Some(Gva(0xffff_ffff_8100_0040)));
        assert_eq!(symbols.len(), 5);
    }

    #[test]
    fn each_kind_of_bad_file_has_its_message() {
        let stub = b"ffffffffffffffff B The real System.map is in the \
            linux-image-6.1.0-37-amd64-dbg package\n";
        let hidden = SMALL
            .replace("ffffffff8100", "000000000000")
            .replace("1000 ", "0000 ");
        let hidden: String = hidden
            .lines()
            .map(|l| format!("0000000000000000{}\n", &l[16..]))
            .collect();
        for (bytes, expected) in [
            (&b""[..], "empty"),
            (b"\n \n", "empty"),
            (stub, "linux-image-6.1.0-37-amd64-dbg"),
            (b"\x7fELF\x02\x01", "symbols add"),
            (b"\x1f\x8b\x08", "symbols add"),
            (b"ffffffff81000000 T _text\0", "binary"),
            ("ffffffff81000000 T t\u{e4}xt".as_bytes(), "binary"),
            (b"ffffffff81000000 T _text\nhello\x1b[2J\n", "line 2"),
            (b"ffffffff81000000 T _text\n", "_stext"),
            (b"fffffffff81000000 T _text\n", "line 1"),
            (b"+1 T _text\n", "line 1"),
            (b"1 TT _text\n", "line 1"),
            (b"1 T two names\n", "line 1"),
            (b"1 T name\tmodule\n", "line 1"),
            (hidden.as_bytes(), "as root"),
        ] {
            let told = fault(bytes).to_string();
            assert!(told.contains(expected), "{told:?} lacks {expected:?}");
            assert!(!told.contains('\x1b'), "{told:?}");
        }
    }

    #[test]
    fn text_that_ends_before_it_begins_is_refused() {
        let swapped = SMALL.replace("_stext", "_x").replace("_etext", "_stext");
        let swapped = format!("{swapped}ffffffff81000000 T _etext\n");
        assert_eq!(
            fault(swapped.as_bytes()),
            SymbolsFault::NoText("_stext and _etext")
        );
    }

    #[test]
    fn a_directory_a_pipe_and_nothing_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let told = |path: &Path| {
            let error = anyhow::Error::from(Symbols::load(path).expect_err("refused"));
            format!("{error:#}")
        };
        assert!(told(dir.path()).contains("not a file"));
        let pipe = dir.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(told(&pipe).contains("not a file"));
        let none = told(&dir.path().join("none"));
        assert!(
            none.contains("none") && none.contains("No such file"),
            "{none}"
        );
    }

    #[test]
    fn half_a_million_lines_load_quickly() {
        let mut text = SMALL.replace("81001000", "91001000");
        for i in 0..500_000u64 {
            let address = 0xffff_ffff_8100_0100 + i * 16;
            text.push_str(&format!("{address:016x} t some_function_number_{i}\n"));
        }
        let start = cpu_time();
        let symbols = Symbols::parse(text.into()).unwrap();
        // Some 0.15 s optimised; the bound is for code that is not.
        let taken = cpu_time() - start;
        assert!(taken.as_secs() < 10, "{taken:?}");
        let last = symbols.address("some_function_number_499999").unwrap();
        assert_eq!(
            symbols.lookup(last),
            Some(("some_function_number_499999", 0))
        );
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(bytes: Vec<u8>) {
            let _ = Symbols::parse(bytes);
        }

        /// Lines that are nearly right, around the marks that make it load.
        #[test]
        fn mutated_maps_never_panic(
            lines in prop::collection::vec("[0-9a-f]{0,17} ?[a-zA-Z?]? ?[ -~]{0,20}(\t\\[[a-z]{0,3}\\]?)?", 0..20),
            good in prop::collection::vec((0u64..0x2000, "[tTdDwWA]", "[a-z_.]{1,4}"), 0..20),
            probe in 0u64..0x3000,
        ) {
            let mut text = SMALL.to_owned();
            for (address, kind, name) in good {
                text.push_str(&format!("{:x} {kind} {name}\n", 0xffff_ffff_8100_0000 + address));
            }
            let with_bad = format!("{text}{}\n", lines.join("\n"));
            for text in [text, with_bad] {
                if let Ok(symbols) = Symbols::parse(text.into()) {
                    let at = Gva(0xffff_ffff_8100_0000 + probe);
                    if let Some((name, offset)) = symbols.lookup(at) {
                        prop_assert!(!name.is_empty());
                        prop_assert!(offset <= probe);
                    }
                    let _ = symbols.is_function_start(at);
                    let _ = symbols.in_irq_entry(at);
                    let _ = symbols.resolve_function("a.b");
                }
            }
        }
    }
}
