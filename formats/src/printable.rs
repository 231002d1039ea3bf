//! Names as they may be printed: what a checkpoint says must not steer a terminal.

use std::borrow::Cow;

/// The text with control characters, and those that turn the direction of writing, as escapes such as `\u{1b}`.
pub fn printable(text: &str) -> Cow<'_, str> {
    if !text.chars().any(steers) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        if steers(c) { out.extend(c.escape_default()) } else { out.push(c) }
    }
    Cow::Owned(out)
}

fn steers(c: char) -> bool {
    c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_steers_a_terminal_is_left() {
        let raw = "model.\u{1b}[31mred\r\n\u{9b}1m\u{202e}x\u{7f}\0.weight";
        let shown = printable(raw);
        assert!(!shown.chars().any(steers), "{shown}");
        assert!(shown.contains("\\u{1b}[31mred\\r\\n"), "{shown}");
        assert!(matches!(printable("model.layers.0.größe"), Cow::Borrowed(_)));
    }
}
