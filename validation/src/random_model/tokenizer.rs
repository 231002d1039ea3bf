//! A tokenizer with a token for each byte, and a text for it.

use std::collections::BTreeMap;
use std::path::Path;

use llmpress_formats::{Error, Result, write_atomic};
use serde_json::json;

use super::normal::mix;

/// A token for each byte.
pub(super) const VOCABULARY: usize = 256;
/// Bytes of a text: sixteen windows of 256 tokens, also of tokenizers that join some bytes.
const TEXT_BYTES: usize = 32 << 10;

/// Writes `tokenizer.json` for byte-level BPE without merges.
pub(super) fn write(dir: &Path) -> Result<()> {
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let vocabulary: BTreeMap<String, usize> =
        (0..=255u8).map(|byte| (visible(byte).to_string(), usize::from(byte))).collect();
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [],
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": null,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "vocab": vocabulary,
            "merges": [],
        },
    });
    let bytes = serde_json::to_vec(&tokenizer).map_err(|e| Error::Invalid(e.to_string()))?;
    write_atomic(&dir.join("tokenizer.json"), &bytes)
}

/// The character that stands for a byte in byte-level BPE: printable ones of Latin-1 for themselves, the others from 256 on
/// in order.
fn visible(byte: u8) -> char {
    let printable = |b: u8| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    if printable(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|&b| !printable(b)).count() as u32;
    char::from_u32(256 + before).unwrap_or(' ')
}

/// Words in no order, always the same.
#[must_use]
pub fn random_text() -> String {
    const WORDS: [&str; 32] = [
        "the", "of", "and", "a", "to", "in", "is", "was", "river", "stone", "light", "under", "seven",
        "because", "never", "green", "window", "walks", "slowly", "morning", "paper", "about", "music",
        "through", "silver", "kitchen", "asks", "them", "tomorrow", "bridge", "quite", "empty",
    ];
    let mut text = String::with_capacity(TEXT_BYTES + 16);
    let mut number = 0;
    while text.len() < TEXT_BYTES {
        number += 1;
        let random = mix(number);
        text.push_str(WORDS[(random % 32) as usize]);
        text.push_str(if random >> 60 == 0 { ".\n" } else { " " });
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn bytes_have_characters_of_their_own_as_in_gpt2() {
        let all: BTreeSet<char> = (0..=255).map(visible).collect();
        assert_eq!(all.len(), 256);
        assert_eq!((visible(b' '), visible(b'\n'), visible(b'a')), ('\u{120}', '\u{10a}', 'a'));
        assert_eq!((visible(0), visible(0x7f), visible(0xad)), ('\u{100}', '\u{121}', '\u{143}'));
    }
}
