//! A tokenizer with a token for each character, and a text that a model draws from its own predictions.
//!
//! ```text
//! token 0 is the line feed, 1 the space, ... 95 the tilde;   a window: '\n', then each token drawn at temperature 1
//! ```
//!
//! The mean of -log p over it estimates the model's entropy. Any other model's is larger by the divergence from this one, so
//! that what is wrong about a model cannot cancel out, as it would on a text that means nothing to it.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use llmpress_formats::{Checkpoint, Error, Result, write_atomic};
use llmpress_model::{Engine, Model, Sampling, Skips};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use serde_json::json;

/// Characters that texts are made of.
pub(super) const CHARACTERS: usize = 96;
/// Windows of the text, and tokens of each: those that a perplexity is taken of.
const WINDOWS: usize = 8;
const WINDOW: usize = 256;

/// Writes `tokenizer.json` and `eval.txt` beside a model.
pub(super) fn write(dir: &Path) -> Result<()> {
    write_tokenizer(dir)?;
    let model = Model::open(Arc::new(Checkpoint::open(dir)?))?;
    let sampling = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, seed: 0 };
    let mut random = ChaCha8Rng::seed_from_u64(sampling.seed);
    let mut session = model.session(WINDOW)?;
    let mut text = String::with_capacity(WINDOWS * WINDOW);
    for _ in 0..WINDOWS {
        session.clear();
        let mut id = 0;
        text.push(character(id));
        for _ in 1..WINDOW {
            session.read(&[id], &Skips::new(), 0..1)?;
            id = session.pick(sampling, &mut random)?;
            text.push(character(id));
        }
    }
    write_atomic(&dir.join("eval.txt"), text.as_bytes())
}

/// The character of a token.
fn character(id: u32) -> char {
    match id {
        0 => '\n',
        _ => char::from_u32(0x1f + id).unwrap_or(' '),
    }
}

/// Byte-level BPE without merges.
fn write_tokenizer(dir: &Path) -> Result<()> {
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    // Bytes that cannot be seen have characters from 256 on there: the line feed is the eleventh, the space the 33rd.
    let visible = |id: u32| match character(id) {
        '\n' => '\u{10a}',
        ' ' => '\u{120}',
        other => other,
    };
    let vocabulary: BTreeMap<String, u32> =
        (0..CHARACTERS as u32).map(|id| (visible(id).to_string(), id)).collect();
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
