//! What a guest's kernel is compared with: the kernel that it boots, as a file of the
//! host's.

use std::path::Path;

use anyhow::Context as _;

use crate::integrity::{Image, Trusted};
use crate::kernel::{Kernel, Symbols};
use crate::symfiles::{Known, Store};

/// What a kernel is to be compared with: the file that is named, or what the store in
/// `symbols_dir` has. `None` where the store does not have it.
///
/// # Errors
/// If the file or the store cannot be read, or it is another kernel.
pub fn trusted(
    symbols_dir: &Path,
    named: Option<&Path>,
    kernel: &Kernel,
    symbols: &Symbols,
) -> anyhow::Result<Option<Trusted>> {
    let bytes = match named {
        Some(path) => {
            let (_, kernel) = Known::with_image(path)?;
            let name = path.display();
            Some(kernel.with_context(|| {
                format!("{name} is no kernel that can be booted; name the guest's vmlinuz")
            })?)
        }
        None => Store::at(symbols_dir).image(&kernel.banner)?,
    };
    let Some(bytes) = bytes else {
        return Ok(None);
    };
    let what = || match named {
        Some(path) => path.display().to_string(),
        None => format!("the kernel in {}", symbols_dir.display()),
    };
    let trusted = Image::parse(bytes).map_err(Into::into);
    let trusted = trusted.and_then(|image| Trusted::new(image, kernel, symbols));
    Ok(Some(trusted.with_context(what)?))
}
