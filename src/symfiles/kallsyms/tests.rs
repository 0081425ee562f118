//! Images with tables as scripts/kallsyms.c writes them.

use super::*;
use proptest::prelude::*;

pub(in crate::symfiles) const BASE: u64 = 0xffff_ffff_8100_0000;

/// What differs between kernels.
#[derive(Clone, Copy, Debug)]
pub(in crate::symfiles) struct Style {
    /// The order since 6.5.
    pub(in crate::symfiles) late: bool,
    /// 6.2 to 6.4 have the sequence of names before the tokens.
    pub(in crate::symfiles) seqs: bool,
    pub(in crate::symfiles) percpu: bool,
    pub(in crate::symfiles) long: bool,
}

/// Every combination.
pub(in crate::symfiles) fn styles() -> impl Iterator<Item = Style> {
    (0..16).map(|bits| Style {
        late: bits & 1 != 0,
        seqs: bits & 2 != 0,
        percpu: bits & 4 != 0,
        long: bits & 8 != 0,
    })
}

fn align(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(ALIGN), 0);
}

/// The tables, after `before` bytes of something else.
pub(in crate::symfiles) fn image(symbols: &[Entry], style: Style, before: usize) -> Vec<u8> {
    // Token 1 stands for a pair of letters, 2 for many, all graphic ones for themselves,
    // and the rest, the first of all included, for nothing.
    let token = |byte: u8| match byte {
        1 => b"sy".to_vec(),
        2 => b"x".repeat(500),
        b'!'..=b'~' => vec![byte],
        _ => Vec::new(),
    };
    let mut out = vec![0xa5; before.next_multiple_of(ALIGN)];
    let addresses = |out: &mut Vec<u8>| {
        for (address, ..) in symbols {
            let offset = match (style.percpu, address.checked_sub(BASE)) {
                (true, Some(offset)) => -1 - i32::try_from(offset).unwrap(),
                (true, None) => i32::try_from(*address).unwrap(),
                (false, offset) => i32::try_from(offset.expect("above the base")).unwrap(),
            };
            out.extend(offset.to_le_bytes());
        }
        align(out);
        out.extend(BASE.to_le_bytes());
    };
    if !style.late {
        addresses(&mut out);
    }
    out.extend((symbols.len() as u64).to_le_bytes());
    let start = out.len();
    let mut markers = Vec::new();
    for (number, (_, kind, name)) in symbols.iter().enumerate() {
        if number % BLOCK == 0 {
            markers.push((out.len() - start) as u32);
        }
        let text = format!("{}{name}", char::from(*kind))
            .replace("sy", "\x01")
            .replace(&"x".repeat(500), "\x02");
        match text.len() {
            len @ 0x80.. if style.long => out.extend([0x80 | (len & 0x7f) as u8, (len >> 7) as u8]),
            len => out.push(u8::try_from(len).unwrap()),
        }
        out.extend(text.bytes());
    }
    align(&mut out);
    markers.iter().for_each(|at| out.extend(at.to_le_bytes()));
    align(&mut out);
    if style.seqs {
        out.extend(vec![7; 3 * symbols.len()]);
        align(&mut out);
    }
    let mut index = Vec::new();
    let start = out.len();
    for byte in 0..=255 {
        index.push((out.len() - start) as u16);
        out.extend(token(byte));
        out.push(0);
    }
    align(&mut out);
    index.iter().for_each(|at| out.extend(at.to_le_bytes()));
    if style.late {
        addresses(&mut out);
    }
    out.extend([0xa5; 64]);
    out
}

/// Symbols of the image, some of them with long names; with `percpu`, one of
/// those that are no addresses too.
pub(in crate::symfiles) fn symbols(style: Style) -> Vec<Entry> {
    let mut all: Vec<Entry> = (0..1000)
        .map(|i| (BASE + i * 16, b't', format!("sys_function_{i}")))
        .collect();
    all[0] = (BASE, b'T', "_text".to_owned());
    all[300].2 = "x".repeat(127);
    all[301].2 = "y".repeat(if style.long { 510 } else { 200 });
    if style.percpu {
        all.insert(0, (0x1000, b'A', "percpu_symbol".to_owned()));
    }
    all
}

#[test]
fn every_kernels_tables_are_read() {
    for style in styles() {
        let symbols = symbols(style);
        let image = image(&symbols, style, 4096);
        let read = read(&image).unwrap_or_else(|fault| panic!("{style:?}: {fault}"));
        assert!(read.symbols == symbols, "{style:?}");
        let at = |number: usize| read.places[number].1;
        assert_eq!(u32_at(&image, at(0)), Some(symbols.len() as u32));
        assert_eq!(u64_at(&image, at(2)), Some(BASE));
        let first = u32_at(&image, at(1)).map(|word| word as i32);
        assert_eq!(
            first,
            Some(if style.percpu { 0x1000 } else { 0 }),
            "{style:?}"
        );
    }
}

#[test]
fn what_does_not_agree_is_no_table() {
    let style = styles().next().unwrap();
    let symbols = symbols(style);
    let good = image(&symbols, style, 64);
    let places = read(&good).unwrap().places;
    let broken = |at: usize| {
        let mut image = good.clone();
        image[at] ^= 1;
        read(&image).expect_err("refused").to_string()
    };
    let index = good.len() - 64 - 512;
    assert!(broken(index + 2).contains("no table of tokens"));
    assert!(broken(places[0].1).contains("no list of names"));
    assert!(broken(places[2].1 + 7).contains("no list of addresses"));
    // Out of order.
    assert!(broken(places[1].1 + 4 * 500 + 2).contains("no list of addresses"));
    assert!(read(b"").is_err());
}

/// Three bytes of the image for each name of a thousand.
#[test]
fn names_that_unpack_to_more_than_any_kernel_has_are_refused() {
    let style = styles().next().unwrap();
    let all = |count: u64| -> Vec<Entry> {
        let name = "x".repeat(1000);
        (0..count)
            .map(|i| (BASE + i * 16, b't', name.clone()))
            .collect()
    };
    assert_eq!(
        read(&image(&all(1000), style, 0)).unwrap().symbols.len(),
        1000
    );
    let large = image(&all(MAX_TEXT as u64 / 1000), style, 0);
    assert_eq!(read(&large).unwrap_err(), Fault::TooManySymbols);
}

#[test]
fn offsets_below_zero_tell_how_all_are_meant() {
    assert_eq!(addresses(&[0, 16], BASE), [BASE, BASE + 16]);
    assert_eq!(addresses(&[0, -1, -17], BASE), [0, BASE, BASE + 16]);
    assert_eq!(addresses(&[i32::MIN], u64::MAX), [(1 << 31) - 2]);
}

proptest! {
    /// A mutated image gives a list or a fault, in bounded time.
    #[test]
    fn mutated_tables_never_panic(
        bits in 0usize..16,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        cut in any::<prop::sample::Index>(),
        whole: bool,
    ) {
        let style = styles().nth(bits).unwrap();
        let mut image = image(&symbols(style), style, 8);
        for (at, byte) in changes {
            let at = at.index(image.len());
            image[at] = byte;
        }
        if !whole {
            image.truncate(cut.index(image.len()));
        }
        if let Ok(read) = read(&image) {
            prop_assert!(read.symbols.len() >= MIN_SYMBOLS);
        }
    }
}
