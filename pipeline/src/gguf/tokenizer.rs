//! A tokenizer as the metadata of a GGUF file.
//!
//! ```text
//! byte-level BPE               tokenizer.ggml.model "gpt2":  tokens, merges, and how texts are cut (tokenizer.ggml.pre)
//! BPE that falls back on bytes tokenizer.ggml.model "llama": tokens with scores in the order of the merges that make them
//! ```

use std::collections::BTreeMap;
use std::path::Path;

use llmpress_formats::{Error as FormatError, GgufValue, finite_json, read_small_file};
use llmpress_model::{ChatTemplate, Tokenizer, special_tokens};
use serde_json::Value;

use crate::Result;

const FILE: &str = "tokenizer.json";
const MAX_BYTES: u64 = 256 << 20;
/// Most tokens of a vocabulary.
const MAX_TOKENS: u64 = 1 << 22;

/// Kinds of tokens.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// How texts are cut: digits in threes, and one by one.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// What both tokenizers must make the same ids of: words, code, digits, spaces, other scripts.
const PROBE: &str = "Hello world! It's 1234567 o'clock, isn't IT?\n\n\tfn main() {\n        x += 3.14; // naïve café\n    }\r\n  \
                     東京 Привет здравствуй 👍🏽 a  b   c \u{00a0} end ";

type Keys = Vec<(String, GgufValue)>;

/// The keys of a checkpoint's tokenizer, for a vocabulary of so many rows; a file without one where it has none.
///
/// # Errors
/// A tokenizer that GGUF has no words for.
pub(super) fn keys(dir: &Path, rows: u64) -> Result<Keys> {
    let path = dir.join(FILE);
    let Some(bytes) = source_text(dir)? else {
        return Ok(vec![key("model", GgufValue::Text("no_vocab".to_owned()))]);
    };
    let bytes = finite_json(&bytes).unwrap_or(bytes);
    let tokenizer: Value = serde_json::from_slice(&bytes)
        .map_err(|e| FormatError::corrupt(&path, None, format!("is not valid JSON: {e}")))?;
    let source = Source { path: &path, tokenizer: &tokenizer };
    let vocabulary = source.vocabulary(rows)?;
    let mut keys = match tokenizer["model"]["byte_fallback"].as_bool() {
        Some(true) => source.by_scores(&vocabulary)?,
        _ => source.byte_level()?,
    };
    let (tokens, kinds) = vocabulary.into_iter().unzip();
    keys.push(key("tokens", GgufValue::Texts(tokens)));
    keys.push(key("token_type", GgufValue::Integers(kinds)));
    keys.extend(special(dir, &source)?);
    if let Some(template) = ChatTemplate::open(dir)? {
        keys.push(("tokenizer.chat_template".to_owned(), GgufValue::Text(template.source().to_owned())));
    }
    Ok(keys)
}

/// The checkpoint's `tokenizer.json`, if it has one.
fn source_text(dir: &Path) -> Result<Option<Vec<u8>>> {
    match read_small_file(&dir.join(FILE), MAX_BYTES) {
        Err(FormatError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
        other => Ok(Some(other?)),
    }
}

/// Compares what the tokenizer of a file makes of a text with what the checkpoint's own does.
///
/// # Errors
/// Other ids; a text that one of them cannot take.
pub(super) fn compare(dir: &Path, file: &Path) -> Result<()> {
    if source_text(dir)?.is_none() {
        return Ok(());
    }
    let [ours, written] = [dir, file].map(Tokenizer::open);
    let (ours, written) = (ours?, written?);
    if ours.encode(PROBE)? == written.encode(PROBE)? {
        return Ok(());
    }
    let what = format!(
        "cuts texts in a way that cannot be said in a GGUF file ({:?} becomes other tokens there); move the file elsewhere to write \
         the model without a tokenizer",
        PROBE.get(..12).unwrap_or_default()
    );
    Err(FormatError::unsupported(dir.join(FILE), None, what).into())
}

fn key(name: &str, value: GgufValue) -> (String, GgufValue) {
    (format!("tokenizer.ggml.{name}"), value)
}

/// Special tokens, and whether they are added.
fn special(dir: &Path, source: &Source<'_>) -> Result<Keys> {
    let tokenizer = Tokenizer::open(dir)?;
    let named = special_tokens(dir)?;
    let ids = source.ids();
    let id = |name: &str| named.get(name).and_then(|token| ids.get(token.as_str()).copied());
    let mut keys = Keys::new();
    let all = [
        ("bos_token_id", tokenizer.bos().map(u64::from)),
        ("eos_token_id", id("eos_token").or(tokenizer.eos().first().map(|id| u64::from(*id)))),
        ("unknown_token_id", id("unk_token")),
        ("padding_token_id", id("pad_token")),
    ];
    for (name, id) in all {
        if let Some(id) = id.and_then(|id| u32::try_from(id).ok()) {
            keys.push(key(name, GgufValue::Number(id)));
        }
    }
    keys.push(key("add_bos_token", GgufValue::Flag(tokenizer.adds_bos())));
    Ok(keys)
}

/// A `tokenizer.json`.
struct Source<'a> {
    path: &'a Path,
    tokenizer: &'a Value,
}

impl<'a> Source<'a> {
    fn refuse<T>(&self, what: &str) -> Result<T> {
        let what = format!(
            "{what}, which cannot be said in a GGUF file; move the file elsewhere to write the model without a tokenizer"
        );
        Err(FormatError::unsupported(self.path, None, what).into())
    }

    fn model(&self) -> &'a Value {
        &self.tokenizer["model"]
    }

    fn added(&self) -> impl Iterator<Item = &'a Value> {
        self.tokenizer["added_tokens"].as_array().map(Vec::as_slice).unwrap_or_default().iter()
    }

    /// Ids by token.
    fn ids(&self) -> BTreeMap<&'a str, u64> {
        let vocabulary = self.model()["vocab"].as_object().into_iter().flatten();
        let mut ids: BTreeMap<&str, u64> =
            vocabulary.filter_map(|(token, id)| Some((token.as_str(), id.as_u64()?))).collect();
        ids.extend(
            self.added().filter_map(|token| Some((token["content"].as_str()?, token["id"].as_u64()?))),
        );
        ids
    }

    /// Tokens with their kinds, one for each row of the embedding.
    fn vocabulary(&self, rows: u64) -> Result<Vec<(String, i32)>> {
        if self.model()["type"].as_str() != Some("BPE") {
            return self.refuse("is no BPE");
        }
        if rows > MAX_TOKENS {
            return self.refuse(&format!("has a vocabulary of {rows}"));
        }
        let falls_back = self.model()["byte_fallback"].as_bool() == Some(true);
        let unknown = self.model()["unk_token"].as_str();
        let mut all: Vec<(String, i32)> = (0..rows).map(|id| (format!("[PAD{id}]"), UNUSED)).collect();
        let mut put =
            |token: &str, id: u64, kind: i32| match usize::try_from(id).ok().and_then(|id| all.get_mut(id)) {
                Some(place) => {
                    *place = (token.to_owned(), kind);
                    true
                }
                None => false,
            };
        for (token, id) in self.model()["vocab"].as_object().into_iter().flatten() {
            let byte = token.len() == 6 && token.starts_with("<0x") && token.ends_with('>');
            let kind = match token.as_str() {
                token if Some(token) == unknown => UNKNOWN,
                _ if falls_back && byte => BYTE,
                _ => NORMAL,
            };
            if !id.as_u64().is_some_and(|id| put(token, id, kind)) {
                return self
                    .refuse(&format!("has token {token:?} with id {id}, and the embedding has {rows} rows"));
            }
        }
        for token in self.added() {
            let (Some(content), Some(id)) = (token["content"].as_str(), token["id"].as_u64()) else {
                continue;
            };
            let kind = match token["special"].as_bool() {
                _ if falls_back && Some(content) == unknown => UNKNOWN,
                Some(true) => CONTROL,
                _ => USER_DEFINED,
            };
            if !put(content, id, kind) {
                return self.refuse(&format!(
                    "adds token {content:?} with id {id}, and the embedding has {rows} rows"
                ));
            }
        }
        Ok(all)
    }

    /// Pairs that merge, in order.
    fn merges(&self) -> Result<Vec<(&'a str, &'a str)>> {
        let merges = self.model()["merges"].as_array().map(Vec::as_slice).unwrap_or_default();
        let pair = |merge: &'a Value| match merge {
            Value::String(text) => text.split_once(' '),
            Value::Array(pair) => match &pair[..] {
                [a, b] => Some((a.as_str()?, b.as_str()?)),
                _ => None,
            },
            _ => None,
        };
        match merges.iter().map(pair).collect() {
            Some(pairs) => Ok(pairs),
            None => self.refuse("has merges that are no pairs"),
        }
    }

    /// BPE on bytes written as characters.
    fn byte_level(&self) -> Result<Keys> {
        let normalizer = &self.tokenizer["normalizer"];
        if !normalizer.is_null() && normalizer["type"].as_str() != Some("NFC") {
            return self.refuse("changes texts before it cuts them");
        }
        let ignores = self.model()["ignore_merges"].as_bool() == Some(true);
        let Some(pre) = cut(&self.tokenizer["pre_tokenizer"], ignores) else {
            return self.refuse("cuts texts in a way that has no name there (gpt-2, smollm, llama-bpe and qwen2 are known here)");
        };
        let merges = self.merges()?;
        if merges.iter().any(|(a, b)| a.contains(' ') || b.contains(' ')) {
            return self.refuse("has merges of tokens with spaces");
        }
        Ok(vec![
            key("model", GgufValue::Text("gpt2".to_owned())),
            key("pre", GgufValue::Text(pre.to_owned())),
            key("merges", GgufValue::Texts(merges.into_iter().map(|(a, b)| format!("{a} {b}")).collect())),
        ])
    }

    /// SentencePiece's BPE: tokens merge by their scores, which follow the order of the merges that make them.
    fn by_scores(&self, vocabulary: &[(String, i32)]) -> Result<Keys> {
        let Some(prefix) = self.prefix() else {
            return self.refuse("writes spaces in another way than SentencePiece does");
        };
        let mut ranks: BTreeMap<String, usize> = BTreeMap::new();
        for (a, b) in self.merges()? {
            let next = ranks.len();
            ranks.entry(format!("{a}{b}")).or_insert(next);
        }
        let score = |token: &String| -(ranks.get(token).copied().unwrap_or(ranks.len()) as f32);
        Ok(vec![
            key("model", GgufValue::Text("llama".to_owned())),
            key("pre", GgufValue::Text("default".to_owned())),
            key("scores", GgufValue::Floats(vocabulary.iter().map(|(token, _)| score(token)).collect())),
            key("add_space_prefix", GgufValue::Flag(prefix)),
        ])
    }

    /// Whether a space is put before a text; `None` where spaces are not written as SentencePiece does.
    fn prefix(&self) -> Option<bool> {
        let steps = |value: &'a Value, list: &str| match value["type"].as_str() {
            Some("Sequence") => {
                value[list].as_array().map(Vec::as_slice).unwrap_or_default().iter().collect()
            }
            Some(_) => vec![value],
            None => Vec::new(),
        };
        let (mut prefix, mut replaced) = (false, false);
        for step in steps(&self.tokenizer["normalizer"], "normalizers") {
            match step["type"].as_str() {
                Some("Prepend") if step["prepend"] == "▁" => prefix = true,
                Some("Replace") if step["pattern"]["String"] == " " && step["content"] == "▁" => {
                    replaced = true
                }
                _ => return None,
            }
        }
        for step in steps(&self.tokenizer["pre_tokenizer"], "pretokenizers") {
            match step["type"].as_str() {
                // Where spaces are replaced already, nothing is left to cut at.
                Some("Split") if replaced && step["pattern"]["String"] == " " => {}
                Some("Metaspace") if step["replacement"] == "▁" && step["split"] == false => {
                    replaced = true;
                    prefix = match step["prepend_scheme"].as_str() {
                        Some("never") => false,
                        Some(_) => true,
                        None => step["add_prefix_space"].as_bool().unwrap_or(true),
                    };
                }
                _ => return None,
            }
        }
        replaced.then_some(prefix)
    }
}

/// llama.cpp's name of a way to cut texts.
fn cut(pre_tokenizer: &Value, ignores_merges: bool) -> Option<&'static str> {
    let steps = match pre_tokenizer["pretokenizers"].as_array() {
        Some(steps) => steps.as_slice(),
        None => std::slice::from_ref(pre_tokenizer),
    };
    let (last, before) = steps.split_last()?;
    if last["type"].as_str() != Some("ByteLevel") || last["add_prefix_space"].as_bool() == Some(true) {
        return None;
    }
    let own = last["use_regex"].as_bool().unwrap_or(true);
    match before {
        [] if own && !ignores_merges => Some("gpt-2"),
        [digits]
            if own
                && !ignores_merges
                && digits["type"] == "Digits"
                && digits["individual_digits"] == true =>
        {
            Some("smollm")
        }
        [split]
            if !own
                && split["type"] == "Split"
                && split["behavior"] == "Isolated"
                && split["invert"] != true =>
        {
            match (split["pattern"]["Regex"].as_str()?, ignores_merges) {
                (LLAMA3, true) => Some("llama-bpe"),
                (LLAMA3, false) => Some("smaug-bpe"),
                (QWEN2, false) => Some("qwen2"),
                _ => None,
            }
        }
        _ => None,
    }
}
