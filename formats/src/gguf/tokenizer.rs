//! The tokenizer of a GGUF file as `tokenizer.json`.
//!
//! ```text
//! tokenizer.ggml.model "gpt2"    tokens, merges, and how texts are cut (tokenizer.ggml.pre)   byte-level BPE
//! tokenizer.ggml.model "llama"   tokens with scores                                           BPE whose merges follow the scores
//! ```
//!
//! What is not known here makes none: a `tokenizer.json` of the original model beside the file serves then.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};

use super::TOKENIZER_FILE;
use super::metadata::{Metadata, Value as Told};
use crate::{Error, Result};

/// Kinds of tokens in a file.
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;
/// Longest token whose merges are looked for: time grows with the square of it.
const MAX_MERGED: usize = 128;
/// Largest `tokenizer.json` beside a file.
const MAX_BYTES: u64 = 256 << 20;

/// How texts are cut before they are encoded, by `tokenizer.ggml.pre`.
fn pattern(pre: &str) -> Option<Value> {
    let split = |pattern: &str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
    let byte_level = |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": regex});
    let steps = match pre {
        "default" | "gpt-2" => return Some(byte_level(true)),
        "smollm" => vec![json!({"type": "Digits", "individual_digits": true}), byte_level(true)],
        "llama-bpe" | "llama3" | "smaug-bpe" => vec![
            split(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            ),
            byte_level(false),
        ],
        "qwen2" | "deepseek-r1-qwen" => vec![
            split(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            ),
            byte_level(false),
        ],
        _ => return None,
    };
    Some(json!({"type": "Sequence", "pretokenizers": steps}))
}

/// `tokenizer.json`: the one beside the file, or one made of its metadata, if it can be.
pub(super) fn tokenizer(file: &Path, metadata: &Metadata) -> Result<Option<Vec<u8>>> {
    let beside = file.with_file_name(TOKENIZER_FILE);
    if beside.is_file() {
        return crate::read_small_file(&beside, MAX_BYTES).map(Some);
    }
    let Some(tokens) = metadata.texts("tokenizer.ggml.tokens") else { return Ok(None) };
    let made = match metadata.text("tokenizer.ggml.model") {
        Some("gpt2") => byte_level(file, metadata, tokens)?,
        Some("llama") => Some(by_scores(metadata, tokens)),
        _ => None,
    };
    let Some(mut made) = made else { return Ok(None) };
    made["version"] = json!("1.0");
    made["truncation"] = Value::Null;
    made["padding"] = Value::Null;
    made["added_tokens"] = json!(added(metadata, tokens));
    made["post_processor"] = post_processor(metadata, tokens);
    Ok(serde_json::to_vec(&made).ok())
}

/// Tokens that texts are searched for before anything else.
fn added(metadata: &Metadata, tokens: &[String]) -> Vec<Value> {
    let kinds = match metadata.get("tokenizer.ggml.token_type") {
        Some(Told::Integers(kinds)) => kinds.as_slice(),
        _ => &[],
    };
    let each =
        tokens.iter().zip(kinds).enumerate().filter(|(_, (_, kind))| [CONTROL, USER_DEFINED].contains(kind));
    each.map(|(id, (token, kind))| {
        json!({
            "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            "special": *kind == CONTROL,
        })
    })
    .collect()
}

/// The BOS before a text, where it is asked for.
fn post_processor(metadata: &Metadata, tokens: &[String]) -> Value {
    let bos = metadata
        .number("tokenizer.ggml.bos_token_id")
        .and_then(|id| Some((id, tokens.get(usize::try_from(id).ok()?)?)));
    // What SentencePiece's tokenizers do where nobody says.
    let adds = metadata
        .flag("tokenizer.ggml.add_bos_token")
        .unwrap_or(metadata.text("tokenizer.ggml.model") == Some("llama"));
    match bos {
        Some((id, token)) if adds => {
            let special = json!({"id": token, "ids": [id], "tokens": [token]});
            json!({
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": BTreeMap::from([(token, special)]),
            })
        }
        _ => Value::Null,
    }
}

/// The vocabulary; of tokens that are there twice, the first counts.
fn vocabulary(tokens: &[String]) -> BTreeMap<&str, usize> {
    let mut vocabulary = BTreeMap::new();
    for (id, token) in tokens.iter().enumerate() {
        vocabulary.entry(token.as_str()).or_insert(id);
    }
    vocabulary
}

/// BPE on bytes written as characters, as GPT-2 began.
fn byte_level(file: &Path, metadata: &Metadata, tokens: &[String]) -> Result<Option<Value>> {
    let Some(cut) = pattern(metadata.text("tokenizer.ggml.pre").unwrap_or("default")) else {
        return Ok(None);
    };
    let Some(merges) = metadata.texts("tokenizer.ggml.merges") else { return Ok(None) };
    let mut pairs = Vec::with_capacity(merges.len());
    for merge in merges {
        let (a, b) = merge.split_once(' ').ok_or_else(|| {
            Error::corrupt(file, None, format!("tokenizer.ggml.merges: {merge:?} is not two tokens"))
        })?;
        pairs.push([a, b]);
    }
    Ok(Some(json!({
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": false, "ignore_merges": metadata.text("tokenizer.ggml.pre") == Some("llama-bpe"),
            "vocab": vocabulary(tokens), "merges": pairs,
        },
        "normalizer": null,
        "pre_tokenizer": cut,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
    })))
}

/// SentencePiece's BPE: any two tokens that are one together merge, those of the highest score first.
fn by_scores(metadata: &Metadata, tokens: &[String]) -> Value {
    let scores = match metadata.get("tokenizer.ggml.scores") {
        Some(Told::Floats(scores)) => scores.as_slice(),
        _ => &[],
    };
    let vocabulary = vocabulary(tokens);
    let mut merges: Vec<(f32, usize, usize, [&str; 2])> = Vec::new();
    for (id, token) in tokens.iter().enumerate().filter(|(_, token)| token.len() <= MAX_MERGED) {
        let score = scores.get(id).copied().unwrap_or(0.0);
        for (at, _) in token.char_indices().skip(1) {
            let (a, b) = token.split_at(at);
            if let (Some(first), Some(second)) = (vocabulary.get(a), vocabulary.get(b)) {
                merges.push((score, *first, *second, [a, b]));
            }
        }
    }
    merges.sort_by(|x, y| y.0.total_cmp(&x.0).then(x.1.cmp(&y.1)).then(x.2.cmp(&y.2)));
    let pairs: Vec<[&str; 2]> = merges.into_iter().map(|(.., pair)| pair).collect();
    let prefix = metadata.flag("tokenizer.ggml.add_space_prefix").unwrap_or(true);
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let normalizer = match prefix {
        true => json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}),
        false => replace,
    };
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let unknown = metadata
        .number("tokenizer.ggml.unknown_token_id")
        .and_then(|id| tokens.get(usize::try_from(id).ok()?));
    json!({
        "model": {
            "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": true, "byte_fallback": true, "ignore_merges": false, "vocab": vocabulary, "merges": pairs,
        },
        "normalizer": normalizer,
        "pre_tokenizer": null,
        "decoder": {"type": "Sequence", "decoders": decoders},
    })
}

/// `tokenizer_config.json`: special tokens, and the chat template.
pub(super) fn settings(metadata: &Metadata) -> Option<Vec<u8>> {
    let tokens = metadata.texts("tokenizer.ggml.tokens")?;
    let mut settings = serde_json::Map::new();
    for (key, kind) in
        [("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")]
    {
        let id = metadata.number(&format!("tokenizer.ggml.{kind}_token_id"));
        if let Some(token) = id.and_then(|id| tokens.get(usize::try_from(id).ok()?)) {
            settings.insert(key.to_owned(), json!(token));
        }
    }
    if let Some(adds) = metadata.flag("tokenizer.ggml.add_bos_token") {
        settings.insert("add_bos_token".to_owned(), json!(adds));
    }
    if let Some(template) = metadata.text("tokenizer.chat_template") {
        settings.insert("chat_template".to_owned(), json!(template));
    }
    settings.insert("tokenizer_class".to_owned(), json!("PreTrainedTokenizerFast"));
    serde_json::to_vec_pretty(&Value::Object(settings)).ok()
}
