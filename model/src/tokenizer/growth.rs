//! How long a tokenizer's own rules can make a text: a chain of replacements can double it with every link.
//!
//! ```text
//! normalizer:  Replace "a" by "bb", Replace "b" by "cc", ...      growth 2 x 2 x ...
//! ```
//!
//! What only reads a text, or what does nothing when it is done again, counts as 1.

use serde::Deserialize;
use serde_json::Value;

use super::charsmap::longest_replacement;
use super::expressions::Expressions;

/// Most rules of a kind; published tokenizers have some ten.
const MAX_RULES: usize = 256;

/// Most growth; published tokenizers have some two. Even a short text would become one that no model ends reading.
const MAX_GROWTH: f64 = 256.0;

/// The parts of a `tokenizer.json` that change texts.
#[derive(Deserialize)]
pub(super) struct Rules {
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    decoder: Value,
}

/// How many bytes may come of one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Growth {
    pub(super) encoding: f64,
    pub(super) decoding: f64,
    /// Whether decoding searches the text, which may take long.
    pub(super) decoder_searches: bool,
}

impl Rules {
    /// The growth, or what is too much of these rules: also of their regular expressions.
    pub(super) fn growth(&self) -> Result<Growth, String> {
        let mut expressions = Expressions::default();
        let mut growth = |part: &Value| {
            let mut sum = Sum { growth: 1.0, rules: 0, expressions: &mut expressions };
            sum.add(part).map(|()| sum.growth)
        };
        let encoding = growth(&self.normalizer)? * growth(&self.pre_tokenizer)?;
        let decoding = growth(&self.decoder)?;
        let decoder_searches = self.decoder.to_string().contains("\"Regex\"");
        let growth = Growth { encoding, decoding, decoder_searches };
        match growth.encoding.max(growth.decoding) {
            most if most <= MAX_GROWTH => expressions.check().map(|()| growth),
            most => {
                Err(format!("has rules that make a text {most:.0} times as long; {MAX_GROWTH} are allowed"))
            }
        }
    }
}

struct Sum<'a> {
    growth: f64,
    rules: usize,
    expressions: &'a mut Expressions,
}

impl Sum<'_> {
    /// Takes every object for a rule, whatever it is called: tokenizers read several notations.
    fn add(&mut self, value: &Value) -> Result<(), String> {
        match value {
            Value::Array(items) => items.iter().try_for_each(|item| self.add(item)),
            Value::Object(members) => {
                self.rules += 1;
                if self.rules > MAX_RULES {
                    return Err(format!("has more than {MAX_RULES} rules that change a text"));
                }
                for kind in ["Regex", "String"] {
                    if let Some(Value::String(pattern)) = members.get(kind) {
                        self.expressions.add(kind, pattern)?;
                    }
                }
                self.growth *= match members.get("type").and_then(Value::as_str) {
                    // A character of two bytes for every byte.
                    Some("ByteLevel") => 2.0,
                    // Spaces around every Chinese character of three bytes.
                    Some("BertNormalizer") => 5.0 / 3.0,
                    _ => 1.0,
                };
                if let Some(Value::String(table)) = members.get("precompiled_charsmap") {
                    // Unicode's longest stand for characters of three bytes.
                    self.growth *= (longest_replacement(table).unwrap_or(0) as f64 / 3.0).max(1.0);
                }
                let characters =
                    |key: &str| members.get(key).and_then(Value::as_str).map(|s| s.chars().count());
                if let Some(content) = characters("content") {
                    self.growth *= replaced(members.get("pattern"), content as f64);
                }
                for key in ["prepend", "prefix"] {
                    // Before every piece, of which a text may have as many as characters.
                    self.growth *= 1.0 + characters(key).unwrap_or(0) as f64;
                }
                members.values().try_for_each(|member| self.add(member))
            }
            _ => Ok(()),
        }
    }
}

/// Growth by putting `content` characters in the place of a pattern.
fn replaced(pattern: Option<&Value>, content: f64) -> f64 {
    let text = |key: &str| pattern.and_then(|p| p.get(key)).and_then(Value::as_str);
    let shortest = match (text("String"), text("Regex")) {
        (Some(text), _) => text.chars().count(),
        // At most four bytes a character.
        (None, Some(expression)) => {
            let parsed = regex_syntax::parse(expression).ok();
            parsed.and_then(|e| e.properties().minimum_len()).unwrap_or(0).div_ceil(4)
        }
        (None, None) => 0,
    };
    match shortest {
        // Between all characters.
        0 => 1.0 + content,
        shortest => (content / shortest as f64).max(1.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn growth(tokenizer: Value) -> Result<Growth, String> {
        serde_json::from_value::<Rules>(tokenizer).unwrap().growth()
    }

    fn replace(pattern: Value, content: &str) -> Value {
        json!({"type": "Replace", "pattern": pattern, "content": content})
    }

    #[test]
    fn published_rules_hardly_grow_a_text() {
        let llama = json!({
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": "▁"}, replace(json!({"String": " "}), "▁")]},
            "decoder": {"type": "Sequence", "decoders": [
                replace(json!({"String": "▁"}), " "), {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}});
        assert!(growth(llama).unwrap().encoding <= 2.0);
        let xlm = json!({"normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, replace(json!({"Regex": " {2,}"}), "▁")]}});
        let none = Growth { encoding: 1.0, decoding: 1.0, decoder_searches: false };
        assert_eq!(growth(xlm).unwrap(), none);
        assert_eq!(growth(json!({})).unwrap(), none);
    }

    #[test]
    fn chains_multiply() {
        let double = |n: usize| json!(vec![replace(json!({"String": "a"}), "aa"); n]);
        let chain = |n: usize| json!({"normalizer": {"type": "Sequence", "normalizers": double(n)}});
        assert_eq!(growth(chain(8)).unwrap().encoding, 256.0);
        assert!(growth(chain(30)).unwrap_err().contains("1073741824 times as long"));
        assert!(growth(chain(1000)).unwrap_err().contains("rules"));
        let between = json!({"decoder": replace(json!({"Regex": "x*"}), "abc")});
        assert_eq!(growth(between).unwrap().decoding, 4.0);
        let expressions = json!({"pre_tokenizer": vec![json!({"pattern": {"Regex": "a"}}); 17]});
        assert!(growth(expressions).unwrap_err().contains("expressions"));
        let bytes = |n: usize| json!({"normalizer": vec![json!({"type": "ByteLevel"}); n]});
        assert_eq!(growth(bytes(2)).unwrap().encoding, 4.0);
        assert!(growth(bytes(40)).unwrap_err().contains("times as long"));
    }
}
