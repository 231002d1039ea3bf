//! `config.json`: the few values a converter needs, and edits that leave the rest byte for byte.
//!
//! ```text
//! { "model_type": ..., "hidden_size": ..., ...        kept as written
//!   "dfloat11_config": {...} }                        appended, or cut out again
//! ```

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::{Error, Result};

/// The configuration's file name.
pub const CONFIG_FILE: &str = "config.json";
/// The key of the official DFloat11 configuration.
pub const DFLOAT11_KEY: &str = "dfloat11_config";
/// The key that names the file of weights, or the index, where these are not the usual ones.
pub const WEIGHTS_KEY: &str = "transformers_weights";

/// Where tools say how they quantised a checkpoint.
pub const QUANTISATION_KEYS: [&str; 2] = ["quantization_config", "compression_config"];

/// Where modelopt says it, if not there.
pub const QUANTISATION_FILE: &str = "hf_quant_config.json";

/// Where a multimodal configuration describes its decoder.
const TEXT_CONFIG: &str = "text_config";

const MAX_CONFIG_BYTES: u64 = 16 << 20;

/// A parsed `config.json` together with its own bytes.
#[derive(Debug, Clone)]
pub struct Config {
    path: PathBuf,
    text: String,
    value: serde_json::Map<String, Value>,
}

impl Config {
    /// Reads `config.json` in `directory`; `None` if there is none.
    pub fn read(directory: &Path) -> Result<Option<Self>> {
        let path = directory.join(CONFIG_FILE);
        let bytes = match crate::files::read_small_file(&path, MAX_CONFIG_BYTES) {
            Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                return Ok(None);
            }
            other => other?,
        };
        let text = String::from_utf8(bytes).map_err(|_| Error::corrupt(&path, None, "is not UTF-8"))?;
        Self::parse(&path, text).map(Some)
    }

    /// Parses the text of a configuration.
    pub fn parse(path: &Path, text: String) -> Result<Self> {
        match crate::python_json(text.as_bytes()) {
            Ok(Value::Object(value)) => Ok(Self { path: path.to_owned(), text, value }),
            Ok(_) => Err(Error::corrupt(path, None, "must hold a JSON object")),
            Err(e) => Err(Error::corrupt(path, None, format!("is not valid JSON: {e}"))),
        }
    }

    /// The file it was read from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file's text.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// A top-level value, or the one of `text_config` where a multimodal configuration keeps it there.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.value.get(key).or_else(|| self.value.get(TEXT_CONFIG)?.get(key))
    }

    /// A member of the top level.
    pub fn own(&self, key: &str) -> Option<&Value> {
        self.value.get(key)
    }

    /// The file of weights or the index that counts, whatever else there is: `transformers_weights`.
    ///
    /// # Errors
    /// It is no name.
    pub fn weights_file(&self) -> Result<Option<&str>> {
        match self.own(WEIGHTS_KEY) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(name)) => Ok(Some(name)),
            Some(other) => {
                let what = format!("{WEIGHTS_KEY} must be the name of a file, not {other}");
                Err(Error::corrupt(&self.path, None, what))
            }
        }
    }

    /// `architectures[0]`, such as `LlamaForCausalLM`.
    pub fn architecture(&self) -> Option<&str> {
        self.get("architectures")?.get(0)?.as_str()
    }

    /// `model_type`, such as `llama`.
    pub fn model_type(&self) -> Option<&str> {
        self.value.get("model_type")?.as_str()
    }

    /// Whether it describes more than one stack of layers: objects with a `hidden_size` of their own.
    pub(crate) fn has_towers(&self) -> bool {
        self.value.values().any(|value| value.get("hidden_size").is_some())
    }

    /// `hidden_size`.
    pub fn hidden_size(&self) -> Option<u64> {
        self.get("hidden_size")?.as_u64().filter(|&n| n > 0)
    }

    /// Whether the output head is the input embedding. Absent means the default of the architecture,
    /// which the tensors themselves tell.
    pub fn tie_word_embeddings(&self) -> Option<bool> {
        self.get("tie_word_embeddings")?.as_bool()
    }

    /// The settings of the tool that quantised the checkpoint.
    pub(crate) fn quantisation(&self) -> Option<&Value> {
        QUANTISATION_KEYS.iter().find_map(|key| self.get(key))
    }

    /// The tool whose packed weights the checkpoint holds: `quantization_config.quant_method`.
    pub fn quantised_by(&self) -> Option<&str> {
        let settings = self.quantisation()?.as_object()?;
        Some(settings.get("quant_method").and_then(Value::as_str).unwrap_or("a method without a name"))
    }

    /// The text with `key` set to `value` as its last member; everything else stays as it was.
    pub fn with_member(&self, key: &str, value: &Value) -> Result<String> {
        let text = self.without_member(key)?;
        let close =
            text.rfind('}').ok_or_else(|| Error::corrupt(&self.path, None, "has no closing brace"))?;
        let (body, tail) = text.split_at(close);
        let kept = body.trim_end();
        let json = serde_json::to_string_pretty(value)
            .map_err(|e| Error::Invalid(format!("{key}: {e}")))?
            .replace('\n', "\n  ");
        let comma = if kept.ends_with('{') { "" } else { "," };
        let space = &body[kept.len()..];
        // The white space before the brace goes after the new member, so that cutting the member out
        // again gives back the original bytes.
        Ok(format!("{kept}{comma}\n  \"{key}\": {json}{space}{tail}"))
    }

    /// The text with `key` of `text_config` set, where a multimodal configuration describes its decoder; everything
    /// else stays as it was.
    ///
    /// # Errors
    /// There is no such object.
    pub fn with_text_member(&self, key: &str, value: &Value) -> Result<String> {
        let span = value_span(&self.text, TEXT_CONFIG).filter(|_| self.own(TEXT_CONFIG).is_some());
        let span = span.ok_or_else(|| Error::corrupt(&self.path, None, "has no text_config"))?;
        let inner = Self::parse(&self.path, self.text[span.clone()].to_owned())?;
        let inner = inner.with_member(key, value)?;
        Ok(format!("{}{inner}{}", &self.text[..span.start], &self.text[span.end..]))
    }

    /// The text without `key`, the inverse of [`Self::with_member`].
    pub fn without_member(&self, key: &str) -> Result<String> {
        let Some(span) = member_span(&self.text, key) else {
            return Ok(self.text.clone());
        };
        Ok(format!("{}{}", &self.text[..span.start], &self.text[span.end..]))
    }
}

/// The bytes of the value of a top-level member of a (valid) JSON object.
fn value_span(text: &str, key: &str) -> Option<std::ops::Range<usize>> {
    let bytes = text.as_bytes();
    let (mut depth, mut at) = (0usize, 0);
    let (mut expects_key, mut start) = (false, None);
    while at < bytes.len() {
        match bytes[at] {
            b'{' | b'[' => {
                depth += 1;
                expects_key |= depth == 1;
            }
            b'}' | b']' => {
                depth = depth.checked_sub(1)?;
                if let Some(start) = start.filter(|_| depth == 0) {
                    return Some(trimmed(text, start, at));
                }
            }
            b',' if depth == 1 => {
                if let Some(start) = start {
                    return Some(trimmed(text, start, at));
                }
                expects_key = true;
            }
            b'"' => {
                let open = at;
                at += 1;
                while at < bytes.len() && bytes[at] != b'"' {
                    at += if bytes[at] == b'\\' { 2 } else { 1 };
                }
                if depth == 1 && expects_key {
                    expects_key = false;
                    if serde_json::from_str::<String>(text.get(open..=at)?).is_ok_and(|k| k == key) {
                        start = Some(at + 1 + text.get(at + 1..)?.find(':')? + 1);
                    }
                }
            }
            _ => {}
        }
        at += 1;
    }
    None
}

/// A range without the white space at its ends.
fn trimmed(text: &str, start: usize, end: usize) -> std::ops::Range<usize> {
    let part = &text[start..end];
    let start = end - part.trim_start().len();
    start..start + text[start..end].trim_end().len()
}

/// The bytes to cut so that a top-level member of a (valid) JSON object disappears together with one
/// comma.
fn member_span(text: &str, key: &str) -> Option<std::ops::Range<usize>> {
    let bytes = text.as_bytes();
    let mut depth = 0usize;
    let mut at = 0;
    // End of the previous member (or the opening brace), and the member being read.
    let (mut previous_end, mut found): (usize, Option<(usize, usize)>) = (0, None);
    let mut expects_key = false;
    while at < bytes.len() {
        match bytes[at] {
            b'{' | b'[' => {
                depth += 1;
                if depth == 1 {
                    (previous_end, expects_key) = (at + 1, true);
                }
            }
            b'}' | b']' => {
                depth = depth.checked_sub(1)?;
                if depth == 0
                    && let Some((start, _)) = found
                {
                    // The last member: cut from the end of the one before, comma included.
                    let end = text[..at].trim_end().len();
                    return Some(start..end);
                }
            }
            b',' if depth == 1 => {
                if let Some((start, first)) = found {
                    // Followed by another member: cut our comma too, unless the one before it goes.
                    return Some(if first == start { start..at + 1 } else { start..at });
                }
                (previous_end, expects_key) = (at, true);
            }
            b'"' => {
                let start = at;
                at += 1;
                while at < bytes.len() && bytes[at] != b'"' {
                    at += if bytes[at] == b'\\' { 2 } else { 1 };
                }
                let literal = text.get(start..=at)?;
                if depth == 1 && expects_key {
                    expects_key = false;
                    if serde_json::from_str::<String>(literal).is_ok_and(|k| k == key) {
                        let first = bytes.get(previous_end) != Some(&b',');
                        found = Some((previous_end, if first { previous_end } else { start }));
                    }
                }
            }
            _ => {}
        }
        at += 1;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> Config {
        Config::parse(Path::new("config.json"), text.to_owned()).unwrap()
    }

    #[test]
    fn a_member_is_added_and_cut_out_again_byte_for_byte() {
        let value = serde_json::json!({"version": "0.5.0", "list": [1, 2]});
        for text in [
            "{\n  \"a\": 1e-05,\n  \"b\": {\"c\": \"}\"}\n}\n",
            "{\"a\":1}",
            "{}",
            "{ }",
            "{\n}\n",
            "  {\"a\": [1, \"\\\"x\\\\\"] }  ",
        ] {
            let with = config(text).with_member("dfloat11_config", &value).unwrap();
            let parsed = config(&with);
            assert_eq!(parsed.get("dfloat11_config"), Some(&value), "{with}");
            assert_eq!(parsed.without_member("dfloat11_config").unwrap(), text);
            // Setting it again changes nothing.
            assert_eq!(parsed.with_member("dfloat11_config", &value).unwrap(), with);
        }
    }

    #[test]
    fn a_member_of_the_text_model_is_set_inside_of_it() {
        let text = "{\n  \"a\": [1, {\"text_config\": 0}],\n  \"text_config\": {\n    \"n\": 3,\n    \"s\": \"}\"\n  },\n  \"n\": 7\n}\n";
        let set = config(text).with_text_member("n", &serde_json::json!(2)).unwrap();
        let parsed = config(&set);
        assert_eq!(parsed.own("text_config").unwrap(), &serde_json::json!({"s": "}", "n": 2}));
        assert_eq!(parsed.own("n"), Some(&serde_json::json!(7)));
        assert_eq!(parsed.own("a"), config(text).own("a"));
        assert!(
            set.starts_with("{\n  \"a\": [1, {\"text_config\": 0}],") && set.ends_with(",\n  \"n\": 7\n}\n")
        );
        for text in [r#"{"text_config":{}}"#, r#"{"text_config" : { } , "b": 1}"#] {
            let set = config(text).with_text_member("k", &serde_json::json!([1])).unwrap();
            assert_eq!(config(&set).own("text_config"), Some(&serde_json::json!({"k": [1]})), "{set}");
        }
        assert!(config(r#"{"n": 1}"#).with_text_member("n", &serde_json::json!(2)).is_err());
        assert!(config(r#"{"text_config": 1}"#).with_text_member("n", &serde_json::json!(2)).is_err());
    }

    #[test]
    fn a_member_is_cut_out_wherever_it_stands() {
        for (text, rest) in [
            (r#"{"k": 1, "a": 2}"#, r#"{ "a": 2}"#),
            (r#"{"a": 2, "k": {"a": [1, 2]}, "b": 3}"#, r#"{"a": 2, "b": 3}"#),
            (r#"{"a": {"k": 1}}"#, r#"{"a": {"k": 1}}"#),
            (r#"{"a": "k", "k": "a"}"#, r#"{"a": "k"}"#),
            (r#"{"\u006b": 1}"#, "{}"),
        ] {
            let cut = config(text).without_member("k").unwrap();
            assert_eq!(cut, rest);
            config(&cut);
        }
    }
}
