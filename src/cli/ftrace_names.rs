//! The functions of `enroll --plain`, by the names that the guest's own Ftrace has.
//!
//! They go on a kernel's command line. A name that the kernel does not know is passed
//! over there without a word, and a filter in which none is left lets every function
//! through (`ftrace_graph_set_hash()` and `ftrace_graph_addr()`, kernel/trace/): a guest
//! that is many times slower, and a trace of everything. So no name goes there that was
//! not looked up in the symbols of the guest's kernel.

use std::path::{Path, PathBuf};

use anyhow::{bail, Context as _};

use crate::kernel::{FtraceNameError, Symbols};
use crate::libvirt::shell_word;
use crate::symfiles::Known;

/// What the functions are called that somebody typed, by the file of symbols that was
/// named, and else by all that are in the store: which of them the guest boots is not
/// known before it has booted.
///
/// # Errors
/// If no symbols are known, or the kernel, or one of those in the store, has no such
/// function.
pub(super) fn ftrace_names(
    typed: &[String],
    named: Option<&Path>,
    store: &Path,
) -> anyhow::Result<Vec<String>> {
    let mut kernels = match named {
        Some(file) => vec![(file.to_owned(), Known::load(file)?.symbols)],
        None => known(store)?,
    };
    let Some((first, symbols)) = kernels.pop() else {
        bail!(
            "--plain puts the names of functions on the guest kernel's command line, and no \
             symbols are known that tell them ({} has none): type `xftrace symbols add FILE` \
             with the kernel's vmlinuz, vmlinux, System.map or .deb first, or add --symbols FILE \
             here",
            store.display()
        );
    };
    let names = |symbols: &Symbols, file: &Path| {
        let names = typed.iter().map(|typed| symbols.ftrace_name(typed));
        let names: Result<Vec<String>, FtraceNameError> = names.collect();
        names.with_context(|| format!("by the symbols of {}", file.display()))
    };
    let wanted = names(&symbols, &first)?;
    for (other, symbols) in kernels {
        let differ = match names(&symbols, &other) {
            Ok(names) if names == wanted => continue,
            Ok(names) => format!("{} calls them {}", other.display(), names.join(", ")),
            Err(why) => format!("{why:#}"),
        };
        bail!(
            "the kernels in {} do not agree on these functions ({differ}): say by --symbols {} \
             which of them the guest boots",
            store.display(),
            shell_word(&first.to_string_lossy())
        );
    }
    Ok(wanted)
}

/// All symbols in the store; what is no file of symbols is passed over, as the helper
/// does.
fn known(store: &Path) -> anyhow::Result<Vec<(PathBuf, Symbols)>> {
    let entries = match std::fs::read_dir(store) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(|| format!("cannot read {}", store.display()))?,
    };
    let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    files.retain(|path| path.is_file());
    files.sort();
    let known = files.into_iter().filter_map(|path| {
        let known = Known::load(&path).ok()?;
        Some((path, known.symbols))
    });
    Ok(known.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAP: &str = "ffffffff81000000 T _text\nffffffff81000000 T _stext\n\
        ffffffff81000040 T __x64_sys_read\nffffffff810000e0 T vfs_read\n\
        ffffffff81000180 t folded.isra.0\nffffffff810001c0 t folded.constprop.1\n\
        ffffffff81001000 T _etext\nffffffff81002000 D jiffies\n";

    fn names(typed: &[&str], named: Option<&Path>, store: &Path) -> Result<String, String> {
        let typed: Vec<String> = typed.iter().map(|&name| name.to_owned()).collect();
        let names = ftrace_names(&typed, named, store).map(|names| names.join(","));
        names.map_err(|error| format!("{error:#}"))
    }

    #[test]
    fn names_are_those_of_the_kernel_and_none_is_made_up() {
        let dir = tempfile::tempdir().unwrap();
        let (store, map) = (dir.path().join("store"), dir.path().join("System.map"));
        std::fs::write(&map, MAP).unwrap();
        let by = |typed: &[&str]| names(typed, Some(&map), &store);
        let both = by(&["sys_read", "vfs_read"]);
        assert_eq!(both.as_deref(), Ok("__x64_sys_read,vfs_read"));
        let said = by(&["sys_read", "sys_raed"]).unwrap_err();
        assert!(said.contains("has no function \"sys_raed\""), "{said}");
        assert!(said.contains("similar names: __x64_sys_read"), "{said}");
        assert!(by(&["jiffies"]).is_err());
        // Ftrace would know nothing of that name.
        let said = by(&["folded"]).unwrap_err();
        assert!(said.contains("folded.isra.0,folded.constprop.1"), "{said}");
        let copy = by(&["folded.isra.0"]);
        assert_eq!(copy.as_deref(), Ok("folded.isra.0"));
        // A file that is not there tells nothing.
        assert!(names(&["sys_read"], Some(&store), &store).is_err());
    }

    #[test]
    fn without_a_file_the_store_is_asked() {
        let dir = tempfile::tempdir().unwrap();
        let store = dir.path().join("store");
        let by = |typed: &[&str]| names(typed, None, &store);
        let said = by(&["sys_read"]).unwrap_err();
        assert!(said.contains("xftrace symbols add FILE"), "{said}");

        std::fs::create_dir(&store).unwrap();
        std::fs::write(store.join("README"), "no symbols").unwrap();
        assert!(by(&["sys_read"]).is_err());
        std::fs::write(store.join("System.map-1"), MAP).unwrap();
        assert_eq!(by(&["sys_read"]).as_deref(), Ok("__x64_sys_read"));
        assert!(by(&["sys_raed"]).is_err());

        // Another kernel, which has not all of it.
        let other = MAP.replace("vfs_read", "vfs_readv");
        std::fs::write(store.join("System.map-2"), other).unwrap();
        assert_eq!(by(&["sys_read"]).as_deref(), Ok("__x64_sys_read"));
        for typed in ["vfs_read", "vfs_readv"] {
            by(&[typed]).unwrap_err();
        }
        let said = by(&["vfs_readv"]).unwrap_err();
        assert!(
            said.contains("do not agree") && said.contains("--symbols"),
            "{said}"
        );
    }
}
