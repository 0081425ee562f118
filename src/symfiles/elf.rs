//! A kernel as an ELF file: vmlinux, or what comes out of a vmlinuz.
//!
//! vmlinux has its symbols in .symtab; what is packed into a vmlinuz has been
//! stripped of them, and only its kallsyms are left. Both have the build id in
//! a note and the banner in their data.

use memchr::memmem;
use object::elf::{EM_X86_64, SHF_ALLOC, SHF_EXECINSTR, SHF_WRITE, SHT_NOBITS};
use object::read::elf::{ElfFile64, FileHeader};
use object::{
    Endianness, Object, ObjectSection, ObjectSegment, ObjectSymbol, SectionFlags, SymbolKind,
    SymbolSection,
};

use super::index::{MAX_BANNER, MAX_BUILD_ID};
use super::kallsyms::{self, Entry, MAX_SYMBOLS, MAX_TEXT};
use super::Fault;

/// What a kernel says of itself first, and what ends it
/// (init/version-timestamp.c).
const BANNER: &[u8] = b"Linux version ";
const BANNER_END: &[u8] = b"\n\0";

type Elf<'a> = ElfFile64<'a, Endianness>;

/// How symbols begin that System.map leaves out: what modules are linked by,
/// and labels of the assembler.
const LEFT_OUT: [&str; 4] = [".L", "__crc_", "__ksymtab_", "__kstrtab"];

/// What an ELF file says of its kernel.
#[derive(Debug)]
pub(super) struct ElfKernel {
    pub(super) symbols: Vec<Entry>,
    /// Whether they are from .symtab, and not from kallsyms.
    pub(super) from_symtab: bool,
    pub(super) build_id: Option<Vec<u8>>,
    pub(super) banner: Option<String>,
}

/// Reads it.
pub(super) fn read(bytes: &[u8]) -> Result<ElfKernel, Fault> {
    let damaged = |error: object::read::Error| Fault::Elf(error.to_string());
    let elf = Elf::parse(bytes).map_err(damaged)?;
    if elf.elf_header().e_machine(elf.endian()) != EM_X86_64 {
        return Err(Fault::Machine);
    }
    let mut symbols = from_symtab(&elf, MAX_SYMBOLS, MAX_TEXT)?;
    let complete = |name: &str| symbols.iter().any(|symbol| symbol.2 == name);
    let from_symtab = ["_text", "_stext", "_etext"]
        .iter()
        .all(|name| complete(name));
    if !from_symtab {
        symbols = from_kallsyms(&elf, bytes)?;
    }
    let build_id = elf.build_id().map_err(damaged)?;
    Ok(ElfKernel {
        banner: banner(&elf, bytes, &symbols),
        build_id: build_id
            .filter(|id| (1..=MAX_BUILD_ID).contains(&id.len()))
            .map(<[u8]>::to_vec),
        symbols,
        from_symtab,
    })
}

/// The symbols that `nm` would list and System.map keeps (scripts/mksysmap): at
/// most so many, with so many bytes of names.
fn from_symtab(elf: &Elf<'_>, most: usize, most_text: usize) -> Result<Vec<Entry>, Fault> {
    let wanted = |symbol: &object::read::elf::ElfSymbol64<'_, '_, Endianness>| {
        let kind = kind(elf, symbol)?;
        let name = symbol.name().ok()?;
        let fits = (1..=1024).contains(&name.len())
            && name.bytes().all(|byte| byte.is_ascii_graphic())
            && !LEFT_OUT.iter().any(|start| name.starts_with(start));
        fits.then(|| (symbol.address(), kind, name.to_owned()))
    };
    let (mut all, mut text) = (Vec::new(), 0);
    for entry in elf.symbols().filter_map(|symbol| wanted(&symbol)) {
        // Many may share the bytes of one name.
        text += entry.2.len();
        if all.len() == most || text > most_text {
            return Err(Fault::TooManySymbols);
        }
        all.push(entry);
    }
    Ok(all)
}

/// The letter that `nm` uses.
fn kind(elf: &Elf<'_>, symbol: &object::read::elf::ElfSymbol64<'_, '_, Endianness>) -> Option<u8> {
    if matches!(symbol.kind(), SymbolKind::File | SymbolKind::Section) {
        return None;
    }
    let letter = match symbol.section() {
        SymbolSection::Absolute => b'A',
        SymbolSection::Section(index) => {
            let section = elf.section_by_index(index).ok()?;
            let SectionFlags::Elf { sh_flags, sh_type } = section.flags() else {
                return None;
            };
            match sh_type {
                _ if !sh_flags.contains(SHF_ALLOC) => return None,
                _ if sh_flags.contains(SHF_EXECINSTR) => b'T',
                SHT_NOBITS => b'B',
                _ if sh_flags.contains(SHF_WRITE) => b'D',
                _ => b'R',
            }
        }
        _ => return None,
    };
    Some(match (symbol.is_weak(), symbol.is_global()) {
        (true, _) if letter == b'T' => b'W',
        (true, _) => b'V',
        (false, true) => letter,
        (false, false) => letter.to_ascii_lowercase(),
    })
}

/// Those of kallsyms, and where its own tables are, so that they can be
/// compared with a guest's.
fn from_kallsyms(elf: &Elf<'_>, bytes: &[u8]) -> Result<Vec<Entry>, Fault> {
    let found = kallsyms::read(bytes)?;
    let mut symbols = found.symbols;
    for (name, offset) in found.places {
        let address = elf.segments().find_map(|segment| {
            let (start, len) = segment.file_range();
            let within = (offset as u64).checked_sub(start).filter(|at| *at < len)?;
            segment.address().checked_add(within)
        });
        symbols.extend(address.map(|address| (address, b'r', name.to_owned())));
    }
    Ok(symbols)
}

/// The banner: where `linux_banner` is, or else the first text that looks
/// like one.
fn banner(elf: &Elf<'_>, bytes: &[u8], symbols: &[Entry]) -> Option<String> {
    let read = |from: &[u8]| {
        let text = from.get(..MAX_BANNER.min(from.len()))?;
        let end = memmem::find(text, BANNER_END)?;
        let text = text.get(..end).filter(|text| text.starts_with(BANNER))?;
        let printable = |byte: &u8| byte.is_ascii_graphic() || *byte == b' ';
        // The kernel's own format for /proc/version has it too.
        let real = text.iter().all(printable) && !text.contains(&b'%');
        real.then(|| String::from_utf8_lossy(text).into_owned())
    };
    let place = symbols.iter().find(|symbol| symbol.2 == "linux_banner");
    let named = place.and_then(|(address, ..)| {
        elf.segments().find_map(|segment| {
            let within = address.checked_sub(segment.address())?;
            read(segment.data().ok()?.get(usize::try_from(within).ok()?..)?)
        })
    });
    named.or_else(|| {
        memmem::find_iter(bytes, BANNER)
            .take(64)
            .find_map(|at| read(bytes.get(at..)?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ELF file with so many functions, all of one name.
    fn elf(count: usize, name: &str) -> Vec<u8> {
        let strings = format!("\0{name}\0").into_bytes();
        let mut symbol = 1u32.to_le_bytes().to_vec();
        symbol.extend([0x12, 0, 1, 0]);
        symbol.extend(0xffff_ffff_8100_0000u64.to_le_bytes());
        symbol.extend(0u64.to_le_bytes());
        let symbols = symbol.repeat(count);
        let section = |kind: u32, flags: u64, at: usize, len: usize, link: u32, size: u64| {
            let mut header = 0u32.to_le_bytes().to_vec();
            header.extend(kind.to_le_bytes());
            for word in [flags, 0, at as u64, len as u64] {
                header.extend(word.to_le_bytes());
            }
            header.extend(link.to_le_bytes());
            header.extend(0u32.to_le_bytes());
            header.extend(8u64.to_le_bytes());
            header.extend(size.to_le_bytes());
            header
        };
        let strings_at = 64 + 4 * 64;
        let symbols_at = (strings_at + strings.len()).next_multiple_of(8);
        let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
        elf.resize(16, 0);
        elf.extend([2, 0, 62, 0, 1, 0, 0, 0]);
        for word in [0u64, 0, 64] {
            elf.extend(word.to_le_bytes());
        }
        elf.extend(0u32.to_le_bytes());
        for half in [64u16, 56, 0, 64, 4, 3] {
            elf.extend(half.to_le_bytes());
        }
        elf.extend(section(0, 0, 0, 0, 0, 0));
        elf.extend(section(1, 6, 64, 0, 0, 0));
        elf.extend(section(2, 0, symbols_at, symbols.len(), 3, 24));
        elf.extend(section(3, 0, strings_at, strings.len(), 0, 0));
        elf.extend(strings);
        elf.resize(symbols_at, 0);
        elf.extend(symbols);
        elf
    }

    #[test]
    fn no_more_symbols_are_taken_than_a_kernel_has() {
        let read = |most, most_text| {
            let bytes = elf(1001, "function");
            let all = from_symtab(&Elf::parse(&bytes[..]).unwrap(), most, most_text);
            all.map(|all| all.len())
        };
        // The first of a table stands for none.
        assert_eq!(read(1000, 8000), Ok(1000));
        assert_eq!(read(999, 8000), Err(Fault::TooManySymbols));
        assert_eq!(read(1000, 7999), Err(Fault::TooManySymbols));
    }
}
