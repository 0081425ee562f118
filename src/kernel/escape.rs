//! Making bytes from outside fit for a terminal and a log.

/// The bytes as printable ASCII: what is not becomes `\xNN`, a backslash
/// `\\`.
pub(crate) fn escape(bytes: &[u8]) -> String {
    bytes
        .iter()
        .flat_map(|&byte| match byte {
            b'\\' => "\\\\".chars().collect::<Vec<_>>(),
            b' '..=b'~' => vec![char::from(byte)],
            _ => format!("\\x{byte:02x}").chars().collect(),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn control_characters_and_backslashes_are_spelt_out() {
        assert_eq!(escape(b"a b\x1b[2J\\\xff"), "a b\\x1b[2J\\\\\\xff");
    }

    proptest! {
        #[test]
        fn the_result_is_printable(bytes: Vec<u8>) {
            prop_assert!(escape(&bytes).bytes().all(|byte| (b' '..=b'~').contains(&byte)));
        }
    }
}
