//! The kernel out of a Debian package: an ar archive with a tar archive in it.

use std::io::Read;

use super::unpack::Compression;
use super::{Fault, MAX_FILE};

/// The most that is unpacked of a package to find the kernel in it. Debian's
/// largest, with debug information, has some 6 GiB.
const MAX_UNPACKED: u64 = 16 << 30;

/// How ar archives begin.
pub(super) const MAGIC: &[u8; 8] = b"!<arch>\n";

/// The first file in the package that has a kernel's symbols, and its name.
pub(super) fn kernel(package: impl Read) -> Result<(String, Vec<u8>), Fault> {
    let failed = |error: std::io::Error| Fault::Package(error.to_string());
    let mut archive = ar::Archive::new(package);
    while let Some(entry) = archive.next_entry() {
        let mut entry = entry.map_err(failed)?;
        let name = entry.header().identifier().to_vec();
        if !name.starts_with(b"data.tar") {
            continue;
        }
        // Looked at, then put back in front.
        let mut head = [0; 6];
        entry.read_exact(&mut head).map_err(failed)?;
        let data = std::io::Cursor::new(head).chain(entry);
        return match Compression::of(&head) {
            Some(compression) => {
                let data = compression.reader(data, MAX_FILE).map_err(failed)?;
                in_tar(data.take(MAX_UNPACKED))
            }
            None => in_tar(data.take(MAX_UNPACKED)),
        };
    }
    Err(Fault::NoKernel)
}

fn in_tar(data: impl Read) -> Result<(String, Vec<u8>), Fault> {
    let failed = |error: std::io::Error| Fault::Package(error.to_string());
    let mut archive = tar::Archive::new(data);
    for entry in archive.entries().map_err(failed)? {
        let mut entry = entry.map_err(failed)?;
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let name = name.trim_start_matches("./").to_owned();
        if !entry.header().entry_type().is_file() || !has_symbols(&name) {
            continue;
        }
        let mut bytes = Vec::new();
        let limit = MAX_FILE.saturating_add(1);
        let got = entry.by_ref().take(limit).read_to_end(&mut bytes);
        if got.map_err(failed)? as u64 == limit {
            return Err(Fault::TooLarge);
        }
        return Ok((name, bytes));
    }
    Err(Fault::NoKernel)
}

/// The kernel of linux-image packages, and what the -dbg ones have. The
/// System.map in /boot is Debian's stub.
fn has_symbols(name: &str) -> bool {
    name.starts_with("boot/vmlinuz-")
        || name.starts_with("usr/lib/debug/boot/System.map-")
        || name.starts_with("usr/lib/debug/boot/vmlinux-")
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A package with these files.
    pub(in crate::symfiles) fn package(files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut tar = tar::Builder::new(Vec::new());
        for (name, bytes) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            tar.append_data(&mut header, name, *bytes).unwrap();
        }
        let mut packed = flate2::read::GzEncoder::new(
            std::io::Cursor::new(tar.into_inner().unwrap()),
            flate2::Compression::fast(),
        );
        let mut data = Vec::new();
        packed.read_to_end(&mut data).unwrap();
        let mut package = ar::Builder::new(Vec::new());
        for (name, bytes) in [
            ("debian-binary", b"2.0\n".as_slice()),
            ("data.tar.gz", &data),
        ] {
            let header = ar::Header::new(name.into(), bytes.len() as u64);
            package.append(&header, bytes).unwrap();
        }
        package.into_inner().unwrap()
    }

    #[test]
    fn the_kernel_is_found_and_the_stub_is_not() {
        let files: [(&str, &[u8]); 3] = [
            ("./boot/System.map-6.1", b"stub"),
            ("./boot/vmlinuz-6.1", b"kernel"),
            ("./boot/vmlinuz-6.2", b"second"),
        ];
        let (name, bytes) = kernel(&package(&files)[..]).unwrap();
        assert_eq!(
            (name.as_str(), &bytes[..]),
            ("boot/vmlinuz-6.1", &b"kernel"[..])
        );
        let none = kernel(&package(&files[..1])[..]).unwrap_err();
        assert_eq!(none, Fault::NoKernel);
        assert!(matches!(
            kernel(&b"!<arch>\nrubbish"[..]),
            Err(Fault::Package(_))
        ));
    }
}
