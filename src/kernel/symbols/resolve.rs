//! From what somebody typed to the functions that it means.

use std::collections::BTreeSet;
use std::fmt;

use super::lookup::is_no_function;
use super::{Symbol, Symbols};
use crate::kernel::escape::escape;
use crate::kernel::Gva;

/// How a system call's function is called since Linux 4.17 (SYSCALL_DEFINEx
/// in arch/x86/include/asm/syscall_wrapper.h).
const X64_SYSTEM_CALL: &str = "__x64_sys_";

/// What people, and older kernels, call a system call's function.
const SYSTEM_CALL: [&str; 4] = ["sys_", "__se_sys_", "__do_sys_", "SyS_"];

/// Suffixes of copies that the compiler makes of a function; `.cold` is not
/// one, it is a part that is jumped to.
const CLONES: [&str; 4] = [".isra.", ".constprop.", ".part.", ".llvm."];

/// How many similar names an error offers.
const NEAREST: usize = 5;

/// Names longer than any function's are not compared with all of them.
const MAX_TYPED: usize = 128;

/// A function that was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FunctionMatch {
    /// Its name in System.map, which may not be what was typed; of copies
    /// that the compiler made, the name that they were made of.
    pub name: String,
    /// Its link-time addresses, sorted, each once, never empty. There are
    /// several where several files of the kernel have a static function of
    /// that name, or where the compiler made several copies.
    pub addresses: Vec<Gva>,
}

/// Why a name is no function that can be traced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnknownWhy {
    /// There is no symbol of that name.
    NotFound,
    /// There is one, but it is data or a mark of the linker.
    NotAFunction,
    /// It is freed once the kernel has started.
    OnlyAtStart,
}

/// A name that is not one of the kernel's functions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownFunction {
    /// What was typed, escaped.
    pub typed: String,
    /// What is wrong with it.
    pub why: UnknownWhy,
    /// Up to five functions of similar name, the most similar first.
    pub nearest: Vec<String>,
}

impl fmt::Display for UnknownFunction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let typed = &self.typed;
        match self.why {
            UnknownWhy::NotFound => write!(f, "the guest's kernel has no function {typed:?}")?,
            UnknownWhy::NotAFunction => {
                write!(f, "{typed:?} is not a function of the guest's kernel")?
            }
            UnknownWhy::OnlyAtStart => write!(
                f,
                "the function {typed:?} exists only while the guest's kernel starts"
            )?,
        }
        match self.nearest.as_slice() {
            [] => Ok(()),
            names => write!(f, "; similar names: {}", names.join(", ")),
        }
    }
}

impl std::error::Error for UnknownFunction {}

/// Why a typed name is none that Ftrace knows.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FtraceNameError {
    /// It means no function.
    #[error(transparent)]
    Unknown(#[from] UnknownFunction),
    /// It means several functions of several names: copies that the compiler made.
    #[error(
        "the guest's kernel has {typed:?} at several places, each of which its Ftrace knows by \
         another name: type {copies} instead"
    )]
    Copies {
        /// What was typed, escaped.
        typed: String,
        /// The copies' names, with commas between.
        copies: String,
    },
}

impl Symbols {
    /// The function, or functions of one name, that a typed name means.
    ///
    /// The exact name first; then a system call by its common name
    /// (`sys_read` is `__x64_sys_read`); then the copies that the compiler
    /// made of a function (`foo.isra.0` for `foo`). A static name that
    /// several files of the kernel use means all of them.
    ///
    /// # Errors
    /// [`UnknownFunction`] with the names that come nearest.
    pub fn resolve_function(&self, typed: &str) -> Result<FunctionMatch, UnknownFunction> {
        if let Some(found) = self.function_named(typed) {
            return Ok(found);
        }
        let system_call = SYSTEM_CALL.iter().find_map(|prefix| {
            let call = typed.strip_prefix(prefix)?;
            self.function_named(&format!("{X64_SYSTEM_CALL}{call}"))
        });
        if let Some(found) = system_call.or_else(|| self.clones_of(typed)) {
            return Ok(found);
        }
        let init = |symbol: &Symbol| self.init_text.contains(&Gva(symbol.address));
        let why = match self.named(typed).next() {
            None => UnknownWhy::NotFound,
            Some(symbol) if symbol.is_text() && init(symbol) => UnknownWhy::OnlyAtStart,
            Some(_) => UnknownWhy::NotAFunction,
        };
        Err(UnknownFunction {
            typed: escape(typed.as_bytes()),
            why,
            nearest: self.nearest(typed),
        })
    }

    /// The full names of the functions that typed names mean, each once.
    ///
    /// # Errors
    /// [`UnknownFunction`] of the first that means none.
    pub fn full_names(&self, typed: &[String]) -> Result<Vec<String>, UnknownFunction> {
        let mut names = Vec::new();
        for name in typed {
            let found = self.resolve_function(name)?.name;
            if !names.contains(&found) {
                names.push(found);
            }
        }
        Ok(names)
    }

    /// What the kernel's own Ftrace calls the function that a typed name means: it has
    /// one name for each place, and each copy that the compiler made by its own. A system
    /// call without arguments has not the name that it is known by (`__x64_sys_getpid`),
    /// since its body lies at the same place (`__do_sys_getpid`).
    ///
    /// # Errors
    /// [`FtraceNameError`] if there is none, or several.
    pub fn ftrace_name(&self, typed: &str) -> Result<String, FtraceNameError> {
        let found = self.resolve_function(typed)?;
        let places = found.addresses.iter();
        let mut names: Vec<&str> = Vec::new();
        for name in places.filter_map(|&at| self.kallsyms_name(at)) {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        match names[..] {
            [name] => Ok(name.to_owned()),
            _ => Err(FtraceNameError::Copies {
                typed: escape(typed.as_bytes()),
                copies: names.join(","),
            }),
        }
    }

    /// The same of functions by their full names, for people to type. One that Ftrace has
    /// no name for stays as it is.
    pub fn ftrace_names(&self, functions: &[String]) -> Vec<String> {
        let name = |function: &String| {
            let name = self.ftrace_name(function);
            name.unwrap_or_else(|_| function.clone())
        };
        functions.iter().map(name).collect()
    }

    /// Whether a symbol is a function that outlives the kernel's start.
    fn is_lasting(&self, symbol: &Symbol) -> bool {
        symbol.is_text()
            && self.main_text.contains(&Gva(symbol.address))
            && !is_no_function(self.name_of(symbol))
    }

    fn function_named(&self, name: &str) -> Option<FunctionMatch> {
        function(
            name,
            self.named(name).filter(|symbol| self.is_lasting(symbol)),
        )
    }

    fn clones_of(&self, name: &str) -> Option<FunctionMatch> {
        let is_clone = |other: &str| {
            let suffix = other.strip_prefix(name).unwrap_or("");
            let cold = suffix.contains(".cold");
            !cold && CLONES.iter().any(|clone| suffix.starts_with(clone))
        };
        let clones = self
            .function_names()
            .filter(|(symbol, other)| is_clone(other) && self.is_lasting(symbol));
        function(name, clones.map(|(symbol, _)| symbol))
    }

    /// The functions whose names come nearest to what was typed.
    fn nearest(&self, typed: &str) -> Vec<String> {
        if typed.is_empty() || typed.len() > MAX_TYPED || !typed.is_ascii() {
            return Vec::new();
        }
        let wanted = common_name(typed);
        let mut found: Vec<(usize, &str)> = self
            .function_names()
            .filter(|(symbol, _)| self.main_text.contains(&Gva(symbol.address)))
            .filter_map(|(_, name)| Some((distance(wanted, common_name(name))?, name)))
            .collect();
        // A system call before its namesakes, for it is what people trace.
        let system_call = |name: &str| name.starts_with(X64_SYSTEM_CALL);
        found.sort_by_key(|&(distance, name)| (distance, !system_call(name), name.len(), name));
        found.dedup();
        let names = found.into_iter().take(NEAREST);
        names.map(|(_, name)| name.to_owned()).collect()
    }
}

/// The function of these symbols, if there are any.
fn function<'a>(name: &str, symbols: impl Iterator<Item = &'a Symbol>) -> Option<FunctionMatch> {
    // A set: sorted, and each once.
    let addresses: BTreeSet<Gva> = symbols.map(|symbol| Gva(symbol.address)).collect();
    (!addresses.is_empty()).then(|| FunctionMatch {
        name: name.to_owned(),
        addresses: addresses.into_iter().collect(),
    })
}

/// The name without what tells a system call's function from its bare name.
fn common_name(name: &str) -> &str {
    let prefixes = [X64_SYSTEM_CALL].into_iter().chain(SYSTEM_CALL);
    let bare = prefixes
        .into_iter()
        .find_map(|prefix| name.strip_prefix(prefix));
    bare.unwrap_or(name)
}

/// How far two names are apart, or `None` if they have nothing in common.
fn distance(wanted: &str, name: &str) -> Option<usize> {
    let (short, long) = (wanted.len().min(name.len()), wanted.len().max(name.len()));
    let limit = (long / 3).max(2);
    // One contains the other: near, though the lengths differ.
    if short >= 4 && (name.contains(wanted) || wanted.contains(name)) {
        return Some(1 + (long - short) / 4);
    }
    if long - short > limit {
        return None;
    }
    let distance = strsim::osa_distance(wanted, name);
    (distance <= limit).then_some(distance)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAP: &str = "ffffffff81000000 T _text\nffffffff81000000 T _stext\n\
        ffffffff81000040 T __x64_sys_read\nffffffff81000080 T __ia32_sys_read\n\
        ffffffff810000c0 T __x64_sys_openat\nffffffff810000e0 T vfs_read\n\
        ffffffff81000100 t helper\nffffffff81000140 t helper\n\
        ffffffff81000180 t folded.isra.0\nffffffff810001c0 t folded.constprop.1\n\
        ffffffff81000200 t folded.isra.0.cold\n\
        ffffffff81001000 T _etext\nffffffff81002000 D jiffies\n\
        ffffffff81003000 T _sinittext\nffffffff81003040 t start_up\nffffffff81004000 T _einittext\n";

    fn symbols() -> Symbols {
        Symbols::parse(MAP.into()).unwrap()
    }

    /// The name, and the last three digits of its addresses.
    fn found(typed: &str) -> (String, Vec<u64>) {
        let found = symbols().resolve_function(typed).unwrap();
        let digits = |address: &Gva| address.0 & 0xfff;
        (found.name, found.addresses.iter().map(digits).collect())
    }

    #[test]
    fn names_and_system_calls_are_found() {
        assert_eq!(found("vfs_read"), ("vfs_read".into(), vec![0xe0]));
        assert_eq!(found("sys_read"), ("__x64_sys_read".into(), vec![0x40]));
        assert_eq!(
            found("__se_sys_openat"),
            ("__x64_sys_openat".into(), vec![0xc0])
        );
        assert_eq!(
            found("__ia32_sys_read"),
            ("__ia32_sys_read".into(), vec![0x80])
        );
        // A bare name is not a system call.
        assert!(symbols().resolve_function("read").is_err());
    }

    #[test]
    fn a_name_means_all_its_functions_and_all_its_clones() {
        assert_eq!(found("helper"), ("helper".into(), vec![0x100, 0x140]));
        assert_eq!(found("folded"), ("folded".into(), vec![0x180, 0x1c0]));
        assert_eq!(
            found("folded.isra.0"),
            ("folded.isra.0".into(), vec![0x180])
        );
    }

    /// The names of a stock kernel, in another order than its own.
    #[test]
    fn ftrace_has_one_name_for_each_place() {
        let more = "ffffffff81000300 T __x64_sys_getpid\nffffffff81000300 T __ia32_sys_getpid\n\
            ffffffff81000300 t __do_sys_getpid\nffffffff81000340 W weak\n\
            ffffffff81000340 T __strong\nffffffff81000380 T __start_part\n\
            ffffffff81000380 T ___first\nffffffff810003c0 t only.part.0\n";
        let symbols = Symbols::parse(format!("{MAP}{more}").into()).unwrap();
        for (typed, name) in [
            ("sys_read", "__x64_sys_read"),
            ("helper", "helper"),
            ("sys_getpid", "__do_sys_getpid"),
            ("__x64_sys_getpid", "__do_sys_getpid"),
            ("__do_sys_getpid", "__do_sys_getpid"),
            ("weak", "__strong"),
            ("__start_part", "___first"),
            ("only", "only.part.0"),
        ] {
            assert_eq!(
                symbols.ftrace_name(typed).as_deref().ok(),
                Some(name),
                "{typed}"
            );
        }
        let several = symbols.ftrace_name("folded").unwrap_err().to_string();
        assert!(
            several.contains("type folded.isra.0,folded.constprop.1 "),
            "{several}"
        );
        let names = ["__x64_sys_getpid", "none"].map(str::to_owned);
        assert_eq!(symbols.ftrace_names(&names), ["__do_sys_getpid", "none"]);
    }

    #[test]
    fn what_is_refused_says_why_and_offers_names() {
        let refused = |typed| symbols().resolve_function(typed).unwrap_err();
        let typo = refused("sys_opena");
        assert_eq!(typo.nearest, ["__x64_sys_openat"]);
        assert!(
            typo.to_string().contains("similar names: __x64_sys_openat"),
            "{typo}"
        );
        assert_eq!(refused("read").nearest[0], "__x64_sys_read");
        assert_eq!(refused("vfs_raed").nearest[0], "vfs_read");
        assert_eq!(refused("jiffies").why, UnknownWhy::NotAFunction);
        assert_eq!(refused("_stext").why, UnknownWhy::NotAFunction);
        assert_eq!(refused("start_up").why, UnknownWhy::OnlyAtStart);
        assert!(!refused("a\x1b[2J").to_string().contains('\x1b'));
        assert!(refused("").nearest.is_empty());
        assert!(refused(&"x".repeat(10_000)).nearest.is_empty());
    }
}
