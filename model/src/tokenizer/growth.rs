//! How long a tokenizer's own rules can make a text: a chain of replacements can double it with every link.
//!
//! ```text
//! normalizer:  Replace "a" by "bb", Replace "b" by "cc", ...      growth 2 x 2 x ...
//! ```
//!
//! What only reads a text, or what Unicode bounds, counts as 1.

use serde::Deserialize;
use serde_json::Value;

/// Most rules of a kind; published tokenizers have some ten.
const MAX_RULES: usize = 256;
/// Most regular expressions: each may take some MiB.
const MAX_EXPRESSIONS: usize = 16;
/// Longest regular expression, in bytes.
const MAX_EXPRESSION_BYTES: usize = 4096;

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

/// How many characters may come of one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Growth {
    pub(super) encoding: f64,
    pub(super) decoding: f64,
}

impl Rules {
    /// The growth, or what is too much of these rules.
    pub(super) fn growth(&self) -> Result<Growth, String> {
        let [normalizer, pre_tokenizer, decoder] = [&self.normalizer, &self.pre_tokenizer, &self.decoder]
            .map(|part| {
                let mut sum = Sum { growth: 1.0, rules: 0, expressions: 0 };
                sum.add(part).map(|()| sum)
            });
        let (normalizer, pre_tokenizer, decoder) = (normalizer?, pre_tokenizer?, decoder?);
        if normalizer.expressions + pre_tokenizer.expressions + decoder.expressions > MAX_EXPRESSIONS {
            return Err(format!("has more than {MAX_EXPRESSIONS} regular expressions"));
        }
        let growth = Growth { encoding: normalizer.growth * pre_tokenizer.growth, decoding: decoder.growth };
        match growth.encoding.max(growth.decoding) {
            most if most <= MAX_GROWTH => Ok(growth),
            most => {
                Err(format!("has rules that make a text {most:.0} times as long; {MAX_GROWTH} are allowed"))
            }
        }
    }
}

struct Sum {
    growth: f64,
    rules: usize,
    expressions: usize,
}

impl Sum {
    /// Takes every object for a rule, whatever it is called: tokenizers read several notations.
    fn add(&mut self, value: &Value) -> Result<(), String> {
        match value {
            Value::Array(items) => items.iter().try_for_each(|item| self.add(item)),
            Value::Object(members) => {
                self.rules += 1;
                if self.rules > MAX_RULES {
                    return Err(format!("has more than {MAX_RULES} rules that change a text"));
                }
                if let Some(Value::String(expression)) = members.get("Regex") {
                    self.expressions += 1;
                    if expression.len() > MAX_EXPRESSION_BYTES {
                        return Err(format!(
                            "has a regular expression of {} bytes, the most is {MAX_EXPRESSION_BYTES}",
                            expression.len()
                        ));
                    }
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
        assert_eq!(growth(xlm).unwrap(), Growth { encoding: 1.0, decoding: 1.0 });
        assert_eq!(growth(json!({})).unwrap(), Growth { encoding: 1.0, decoding: 1.0 });
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
    }
}
