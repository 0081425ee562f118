//! The guest's kernel and initramfs: what tests/lab/kernel,
//! tests/lab/kernel-variant and tests/lab/initramfs build and keep.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{bail, Context, Result};

/// What the names of tests/lab/kernel-variant's kernels begin with.
const VARIANT: &str = "6.1-";
/// Kernels without what the lab's modules need.
const SMALL: [&str; 2] = ["6.1-no-btf", "6.1-no-tracer"];

/// Files of the guest that the lab boots. They lie in the lab's cache, and
/// other runs share them.
#[derive(Debug, Clone)]
pub struct Artifacts {
    /// The directory that tests/lab/kernel or tests/lab/kernel-variant made,
    /// with build/ for modules, or tests/lab/stock-kernel.
    pub kernel_dir: PathBuf,
    /// The kernel to boot.
    pub bzimage: PathBuf,
    /// Its symbols; a stock kernel has no such file.
    pub system_map: PathBuf,
    /// The kernel as ELF, with .symtab and .BTF, without DWARF; a stock kernel
    /// has no such file.
    pub vmlinux: PathBuf,
    /// The initramfs.
    pub initramfs: PathBuf,
}

impl Artifacts {
    /// Finds those of a kernel, as [`crate::Domain::kernel`] names it, in the
    /// cache, or builds them: minutes for the kernel, with progress on standard
    /// error.
    ///
    /// # Errors
    /// Where a build fails.
    pub fn build(kernel: &str) -> Result<Artifacts> {
        if let Some(stock) = kernel.strip_prefix("stock-") {
            return Artifacts::stock(stock);
        }
        let kernel_dir = match kernel.strip_prefix(VARIANT) {
            Some(variant) => run_script("kernel-variant", &[Path::new(variant)])?,
            None => run_script("kernel", &[Path::new(kernel)])?,
        };
        let for_modules = Some(kernel_dir.as_path()).filter(|_| !SMALL.contains(&kernel));
        Ok(Artifacts {
            bzimage: kernel_dir.join("bzImage"),
            system_map: kernel_dir.join("System.map"),
            vmlinux: kernel_dir.join("vmlinux"),
            initramfs: run_script("initramfs", for_modules.as_slice())?,
            kernel_dir,
        })
    }
}

impl Artifacts {
    /// Those of a distribution's kernel: VERSION-FLAVOUR, as
    /// tests/lab/stock-kernel takes them.
    fn stock(name: &str) -> Result<Artifacts> {
        let (version, flavour) = name.rsplit_once('-').unwrap_or((name, "cloud"));
        let kernel_dir = run_script("stock-kernel", &[version, flavour].map(Path::new))?;
        Ok(Artifacts {
            bzimage: kernel_dir.join("vmlinuz"),
            system_map: kernel_dir.join("System.map"),
            vmlinux: kernel_dir.join("vmlinux"),
            initramfs: run_script("initramfs", &[])?,
            kernel_dir,
        })
    }
}

/// The directory of the QEMU that tests/lab/qemu-build makes, or made before.
///
/// # Errors
/// Where the build fails.
pub fn patched_qemu() -> Result<PathBuf> {
    run_script("qemu-build", &[])
}

/// Where the lab's scripts are.
pub(crate) fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// Runs a script whose answer is a path, the only line of its output.
pub(crate) fn run_script(name: &str, arguments: &[&Path]) -> Result<PathBuf> {
    let path = script(name);
    let output = Command::new(&path)
        .args(arguments)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot run {}", path.display()))?;
    if !output.status.success() {
        bail!("{} failed ({}); see above", path.display(), output.status);
    }
    let answer = String::from_utf8_lossy(&output.stdout);
    Ok(PathBuf::from(answer.trim_end()))
}
