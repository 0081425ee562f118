//! vmlinuz: the kernel as a boot loader takes it.
//!
//! A real-mode part with the boot protocol's header, then a small program that
//! unpacks the kernel, which lies inside it as an ELF file, compressed
//! (Documentation/x86/boot.rst; arch/x86/boot/header.S).

use super::bytes::{u16_at, u32_at};
use super::unpack::Compression;
use super::{Fault, MAX_IMAGE};

/// Where `boot_flag` and `header` are.
const BOOT_FLAG: usize = 0x1fe;
const HEADER: usize = 0x202;

/// Protocol 2.08 brought the place of the payload.
const VERSION_WITH_PAYLOAD: u16 = 0x208;

/// Whether this is such a file.
pub(super) fn is(bytes: &[u8]) -> bool {
    u16_at(bytes, BOOT_FLAG) == Some(0xaa55)
        && bytes.get(HEADER..HEADER + 4) == Some(b"HdrS".as_slice())
}

/// The ELF file inside.
pub(super) fn kernel(bytes: &[u8]) -> Result<Vec<u8>, Fault> {
    let version = u16_at(bytes, 0x206).ok_or(Fault::Cut)?;
    if version < VERSION_WITH_PAYLOAD {
        return Err(Fault::OldImage);
    }
    // 0 stands for 4, as it always has.
    let sectors = match bytes.get(0x1f1) {
        Some(0) => 4,
        Some(&sectors) => usize::from(sectors),
        None => return Err(Fault::Cut),
    };
    let field = |at| u32_at(bytes, at).and_then(|value| usize::try_from(value).ok());
    let range = || {
        let start = ((sectors + 1) * 512).checked_add(field(0x248)?)?;
        Some(start..start.checked_add(field(0x24c)?)?)
    };
    let payload = bytes.get(range().ok_or(Fault::Cut)?).ok_or(Fault::Cut)?;
    if payload.starts_with(b"\x7fELF") {
        return Ok(payload.to_vec());
    }
    let compression = Compression::of(payload).ok_or(Fault::Compression)?;
    compression
        .unpack(payload, MAX_IMAGE)
        .map_err(|error| Fault::Unpack(error.to_string()))
}
