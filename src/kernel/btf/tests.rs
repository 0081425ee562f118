use std::time::Duration;

use proptest::prelude::*;

use super::build::Builder;
use super::parse::kind;
use super::*;
use crate::test_time::cpu_time;

/// Nested, anonymous and qualified members, an array, a bit field, an enum.
fn sample() -> Builder {
    let mut btf = Builder::new();
    let int = btf.int("int", 4);
    let long = btf.int("long", 8);
    let wrapped = btf.compound(kind::STRUCT, "", 8, &[("a", long, 0)]);
    let local = btf.add("local_t", kind::TYPEDEF << 24, wrapped, &[]);
    let volatile = btf.add("", kind::VOLATILE << 24, local, &[]);
    let pointer = btf.add("", kind::PTR << 24, 99_999, &[]);
    let array = btf.add("", kind::ARRAY << 24, 0, &[int, int, 5]);
    let inner = btf.compound(
        kind::STRUCT,
        "array_buffer",
        16,
        &[("tr", pointer, 0), ("buffer", pointer, 64)],
    );
    let anonymous = btf.compound(kind::UNION, "", 8, &[("x", int, 0), ("y", volatile, 0)]);
    let fields = [
        ("name", pointer, 0),
        ("", anonymous, 64),
        ("array_buffer", inner, 128),
        ("list", array, 256),
    ];
    btf.compound(kind::STRUCT, "trace_array", 56, &fields);
    // A structure with bit fields: the upper 8 bits of the offset are sizes.
    let name = btf.name("id");
    let after = btf.name("page");
    let info = 1 << 31 | kind::STRUCT << 24 | 2;
    btf.add(
        "buffer_page",
        info,
        16,
        &[name, int, 30 << 24, after, pointer, 64],
    );
    let (one, two) = (btf.name("TRACE_GRAPH_RET"), btf.name("TRACE_GRAPH_ENT"));
    btf.add("trace_type", kind::ENUM << 24 | 2, 4, &[one, 10, two, 11]);
    btf
}

#[test]
fn fields_are_found_by_their_path() {
    let btf = sample().parse();
    let of = btf.structure("trace_array").expect("a structure");
    let field = |path: &str| of.field(path).map(|field| (field.offset, field.size)).ok();
    assert_eq!(of.size().ok(), Some(56));
    assert_eq!(field("name"), Some((0, 8)));
    assert_eq!(field("x"), Some((8, 4)), "in a member without a name");
    assert_eq!(field("y"), Some((8, 8)), "behind a qualifier and a typedef");
    assert_eq!(field("y.a"), Some((8, 8)));
    assert_eq!(field("array_buffer"), Some((16, 16)));
    assert_eq!(field("array_buffer.buffer"), Some((24, 8)));
    assert_eq!(field("list"), Some((32, 20)));
    for absent in ["", "nam", "names", "array_buffer.", "name.tr", "buffer"] {
        assert_eq!(field(absent), None, "{absent}");
    }
    let either = of.field_of_any(&["newer", "array_buffer.tr"]);
    assert_eq!(either.map(|field| field.offset).ok(), Some(16));
}

#[test]
fn a_bit_field_has_no_offset_and_others_beside_it_do() {
    let btf = sample().parse();
    let of = btf.structure("buffer_page").expect("a structure");
    assert!(of.field("id").is_err());
    let page = of.field("page").expect("a field");
    assert_eq!((page.offset, page.size), (8, 8));
}

#[test]
fn constants_are_found_in_their_enum() {
    let btf = sample().parse();
    assert_eq!(btf.constant("trace_type", "TRACE_GRAPH_ENT").ok(), Some(11));
    let absent = btf.constant("trace_type", "TRACE_GRAPH");
    let text = absent.expect_err("no such constant").to_string();
    assert!(
        text.contains("TRACE_GRAPH in its enum trace_type"),
        "{text}"
    );
    assert!(btf.constant("other", "TRACE_GRAPH_ENT").is_err());
}

#[test]
fn what_is_missing_is_named() {
    let btf = sample().parse();
    let text = btf.structure("trace_buffer").expect_err("none").to_string();
    assert!(text.contains("no struct trace_buffer"), "{text}");
    let of = btf.structure("trace_array").expect("a structure");
    let text = of.field("clock").expect_err("none").to_string();
    assert!(
        text.contains("field clock in its struct trace_array"),
        "{text}"
    );
}

#[test]
fn what_is_cut_short_or_foreign_is_refused() {
    let bytes = sample().bytes();
    for length in 0..bytes.len() {
        assert!(Btf::parse(bytes[..length].to_vec()).is_err(), "{length}");
    }
    let mut other = bytes.clone();
    other[2] = 2;
    assert!(Btf::parse(other).is_err(), "another version");
    let mut unknown = Builder::new();
    unknown.add("later", 31 << 24, 0, &[]);
    let error = Btf::parse(unknown.bytes()).expect_err("unknown kind");
    assert!(error.to_string().contains("unknown kind"), "{error}");
}

#[test]
fn circles_and_fans_end() {
    // A typedef of itself; an array of itself; a structure in itself.
    let mut btf = Builder::new();
    let round = btf.add("round", kind::TYPEDEF << 24, 1, &[]);
    let array = btf.add("", kind::ARRAY << 24, 0, &[2, 2, 2]);
    btf.compound(
        kind::STRUCT,
        "s",
        8,
        &[("a", round, 0), ("b", array, 0), ("", 3, 0)],
    );
    let btf = btf.parse();
    let of = btf.structure("s").expect("a structure");
    for path in ["a", "b", "c", "a.b"] {
        assert!(of.field(path).is_err(), "{path}");
    }
    // Each structure holds the next one many times over.
    let mut btf = Builder::new();
    for level in 0..30 {
        let members = vec![("", level + 2, 0); 100];
        btf.compound(kind::STRUCT, &format!("s{level}"), 8, &members);
    }
    let btf = btf.parse();
    let begun = cpu_time();
    assert!(btf.structure("s0").expect("one").field("x").is_err());
    assert!(cpu_time() - begun < Duration::from_secs(1));
}

#[test]
fn more_types_and_values_than_any_kernel_has_are_not_looked_through() {
    let head = |types: &[u8], names: &[u8]| {
        let lengths = [
            24,
            0,
            types.len() as u32,
            types.len() as u32,
            names.len() as u32,
        ];
        let words = std::iter::once(0x0001_eb9f).chain(lengths);
        let head: Vec<u8> = words.flat_map(u32::to_le_bytes).collect();
        Btf::parse([&head, types, names].concat())
    };
    // Structures without a member, one after the other.
    let one: Vec<u8> = [0, kind::STRUCT << 24, 8]
        .iter()
        .flat_map(|word: &u32| word.to_le_bytes())
        .collect();
    head(&one.repeat(TYPES_LIMIT), b"\0").expect("as many as there may be");
    let error = head(&one.repeat(TYPES_LIMIT + 1), b"\0").expect_err("one more");
    assert!(error.to_string().contains("too many types"), "{error}");

    // Enumerations of one name, whose values are none that is asked for.
    let mut btf = Builder::new();
    let (other, last) = (btf.name("OTHER"), btf.name("LAST"));
    btf.add("few", kind::ENUM << 24 | 2, 4, &[other, 1, last, 2]);
    for _ in 0..3 {
        let values = [other, 1].repeat(10_000);
        btf.add("many", kind::ENUM << 24 | 10_000, 4, &values);
    }
    btf.add("many", kind::ENUM << 24 | 1, 4, &[last, 2]);
    let btf = btf.parse();
    assert_eq!(btf.constant("few", "LAST").expect("a value"), 2);
    btf.constant("many", "LAST").expect_err("too far behind");
}

#[test]
fn impossible_sizes_and_offsets_are_refused() {
    let mut btf = Builder::new();
    let int = btf.int("int", 4);
    let huge = btf.add("", kind::ARRAY << 24, 0, &[int, int, u32::MAX]);
    let deep = btf.add("", kind::ARRAY << 24, 0, &[huge, int, u32::MAX]);
    let members = [("huge", huge, 0), ("deep", deep, 0), ("far", int, u32::MAX)];
    btf.compound(kind::STRUCT, "s", u32::MAX, &members);
    let btf = btf.parse();
    let of = btf.structure("s").expect("a structure");
    assert!(of.size().is_err());
    for path in ["huge", "deep", "far"] {
        assert!(of.field(path).is_err(), "{path}");
    }
}

proptest! {
    #[test]
    fn changed_bytes_never_panic_nor_take_long(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12),
    ) {
        let mut bytes = sample().bytes();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Ok(btf) = Btf::parse(bytes) {
            for name in ["trace_array", "array_buffer", "buffer_page"] {
                let Ok(of) = btf.structure(name) else { continue };
                for path in ["name", "x", "y.a", "array_buffer.buffer", "list", "id", "page"] {
                    if let Ok(field) = of.field(path) {
                        prop_assert!(field.offset < SIZE_LIMIT && field.size <= SIZE_LIMIT);
                    }
                }
            }
            let _ = btf.constant("trace_type", "TRACE_GRAPH_ENT");
        }
    }

    #[test]
    fn any_bytes_behind_a_header_are_borne(
        body in proptest::collection::vec(any::<u8>(), 0..2000),
        names in 0u32..500,
    ) {
        let mut bytes = 0x0001_eb9fu32.to_le_bytes().to_vec();
        let types = (body.len() as u32).saturating_sub(names);
        for word in [24, 0, types, types, names.min(body.len() as u32)] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(&body);
        if let Ok(btf) = Btf::parse(bytes) {
            let _ = btf.structure("a").and_then(|of| of.field("b.c"));
            let _ = btf.structure("");
            let _ = btf.constant("", "");
        }
    }
}
