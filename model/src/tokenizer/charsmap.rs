//! The table of replacements of a `Precompiled` normalizer, as SentencePiece makes it.
//!
//! ```text
//! base64:  u32 bytes of the trie | trie | text 0 | text 0 | ...
//! ```

/// Bytes of the longest text that the table puts in the place of others; `None` if it is no such table.
pub(super) fn longest_replacement(base64: &str) -> Option<usize> {
    let bytes = decode(base64)?;
    let (head, rest) = bytes.split_first_chunk::<4>()?;
    let texts = rest.get(u32::from_le_bytes(*head) as usize..)?;
    texts.split(|&b| b == 0).map(<[u8]>::len).max()
}

fn decode(base64: &str) -> Option<Vec<u8>> {
    let digits = base64.trim_end_matches('=').as_bytes();
    let value = |digit: u8| match digit {
        b'A'..=b'Z' => Some(digit - b'A'),
        b'a'..=b'z' => Some(digit - b'a' + 26),
        b'0'..=b'9' => Some(digit - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    };
    let mut out = Vec::with_capacity(digits.len() / 4 * 3 + 3);
    for four in digits.chunks(4) {
        let mut bits = 0u32;
        for i in 0..4 {
            bits = bits << 6 | u32::from(four.get(i).map_or(Some(0), |&digit| value(digit))?);
        }
        out.extend_from_slice(&bits.to_be_bytes()[1..four.len()]);
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_text_is_found() {
        // Four bytes of trie, then "ab", "", "xyz".
        assert_eq!(longest_replacement("BAAAAAEBAQFhYgAAeHl6AA=="), Some(3));
        assert_eq!(decode("TWFu"), Some(b"Man".to_vec()));
        assert_eq!(decode("TWE="), Some(b"Ma".to_vec()));
        assert_eq!(decode("TQ=="), Some(b"M".to_vec()));
        for other in ["", "AA", "/////w==", "BA*A"] {
            assert_eq!(longest_replacement(other), None, "{other}");
        }
    }
}
