//! The kernel out of a Debian package: an ar archive with a tar archive in it.

use std::io::{self, Read};

use super::unpack::Compression;
use super::{Fault, MAX_FILE};

/// The most that is unpacked of a package to find the kernel in it. Debian's
/// largest, with debug information, has some 6 GiB.
const MAX_UNPACKED: u64 = 16 << 30;

/// How ar archives begin.
pub(super) const MAGIC: &[u8; 8] = b"!<arch>\n";

/// What stands before each file of an ar archive: its name first, in 16 bytes.
const AR_HEADER: usize = 60;
const AR_NAME: std::ops::Range<usize> = 0..16;
/// Its length in decimal digits.
const AR_LENGTH: std::ops::Range<usize> = 48..58;

fn failed(error: io::Error) -> Fault {
    Fault::Package(error.to_string())
}

/// The first file in the package that has a kernel's symbols, and its name.
///
/// The files of a package have short names (deb(5)), so that none of ar's ways
/// to write longer ones has to be known.
pub(super) fn kernel(mut package: impl Read) -> Result<(String, Vec<u8>), Fault> {
    let mut magic = [0; MAGIC.len()];
    package.read_exact(&mut magic).map_err(failed)?;
    let mut header = [0; AR_HEADER];
    while magic == *MAGIC && read_or_end(&mut package, &mut header).map_err(failed)? {
        let damaged = || Fault::Package("a header in it is damaged".to_owned());
        let field = |range| header.get(range).map(<[u8]>::trim_ascii);
        let name = field(AR_NAME).unwrap_or_default();
        let length = field(AR_LENGTH).and_then(|digits| std::str::from_utf8(digits).ok());
        let length: u64 = length
            .and_then(|text| text.parse().ok())
            .filter(|_| header.ends_with(b"`\n"))
            .ok_or_else(damaged)?;
        if !name.starts_with(b"data.tar") {
            // Each begins at an even place.
            let mut rest = package.by_ref().take(length + length % 2);
            io::copy(&mut rest, &mut io::sink()).map_err(failed)?;
            continue;
        }
        let mut entry = package.take(length);
        // Looked at, then put back in front.
        let mut head = [0; 6];
        entry.read_exact(&mut head).map_err(failed)?;
        let data = io::Cursor::new(head).chain(entry);
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

/// Fills the buffer; false where there is nothing more.
fn read_or_end(from: &mut impl Read, buf: &mut [u8]) -> io::Result<bool> {
    let mut first = Vec::new();
    from.by_ref()
        .take(buf.len() as u64)
        .read_to_end(&mut first)?;
    if first.is_empty() {
        return Ok(false);
    }
    io::Cursor::new(first).read_exact(buf).map(|()| true)
}

/// Entries are taken as they lie there. Those that say the name of the next one
/// in their content (GNU's, pax's) may have any length, and would be read whole
/// into memory; the names that are looked for fit into a header.
fn in_tar(data: impl Read) -> Result<(String, Vec<u8>), Fault> {
    let mut archive = tar::Archive::new(data);
    for entry in archive.entries().map_err(failed)?.raw(true) {
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

    /// The largest piece that was asked for at once.
    struct Asked<R>(R, std::rc::Rc<std::cell::Cell<usize>>);

    impl<R: Read> Read for Asked<R> {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            self.1.set(self.1.get().max(buf.len()));
            self.0.read(buf)
        }
    }

    #[test]
    fn the_name_of_an_entry_does_not_fill_the_memory() {
        let header = |kind: tar::EntryType, name: &str, size| {
            let mut header = tar::Header::new_gnu();
            header.set_path(name).unwrap();
            header.set_entry_type(kind);
            header.set_size(size);
            header.set_cksum();
            io::Cursor::new(header.as_bytes().to_vec())
        };
        let regular = || {
            let mut content = b"kernel".to_vec();
            content.resize(3 * 512, 0);
            header(tar::EntryType::Regular, "boot/vmlinuz-6", 6).chain(io::Cursor::new(content))
        };
        for kind in [
            tar::EntryType::GNULongName,
            tar::EntryType::GNULongLink,
            tar::EntryType::XHeader,
            tar::EntryType::XGlobalHeader,
            tar::EntryType::GNUSparse,
        ] {
            let size = 64 << 20;
            let long = header(kind, "x", size).chain(io::repeat(b'x').take(size));
            let asked = std::rc::Rc::default();
            let tar = Asked(long.chain(regular()), std::rc::Rc::clone(&asked));
            let (name, bytes) = in_tar(tar).unwrap();
            assert_eq!(
                (name.as_str(), &bytes[..]),
                ("boot/vmlinuz-6", &b"kernel"[..])
            );
            assert!(asked.get() <= 64 << 10, "{kind:?}: {} bytes", asked.get());
        }
    }

    /// Names that ar keeps elsewhere, and lengths that are none.
    #[test]
    fn an_archive_that_no_package_is_ends_in_a_fault() {
        let member = |name: &str, length: &str| {
            format!("!<arch>\n{name:<16}0           0     0     100644  {length:<10}`\nab")
        };
        for (text, expected) in [
            (member("//", "9999999999"), "no kernel"),
            (member("/77", "2"), "no kernel"),
            (member("#1/9999999999", "2"), "no kernel"),
            (member("debian-binary", "two"), "damaged"),
            (member("debian-binary", "-2"), "damaged"),
            (member("debian-binary", "2").replace('`', "'"), "damaged"),
            (member("data.tar", "2"), "cannot be read"),
            (member("debian-binary", "2") + "more", "cannot be read"),
        ] {
            let told = kernel(text.as_bytes()).unwrap_err().to_string();
            assert!(told.contains(expected), "{text:?}: {told}");
        }
    }
}
