//! A text for models that bring none.

use super::normal::mix;

/// Bytes of a text: eight windows of 256 tokens, also of tokenizers that join whole words.
const TEXT_BYTES: usize = 32 << 10;

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
