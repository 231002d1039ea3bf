//! Models in GGUF files are those of the checkpoints that they were made of (`formats/tests/gguf/make_gguf.py`), to the bit.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use llmpress_formats::{Checkpoint, Dtype, Edit};
use llmpress_model::{Model, Skips, Unobserved};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn gguf(name: &str) -> PathBuf {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../formats/tests/gguf/models");
    models.join(format!("{name}.gguf"))
}

/// Values of a tensor, whatever its dtype: norms are in single precision there.
fn values(checkpoint: &Checkpoint, name: &str) -> Vec<u32> {
    let bytes = checkpoint.read_tensor(name).unwrap();
    match checkpoint.tensor(name).unwrap().dtype {
        Dtype::F32 => bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        _ => bytes.chunks_exact(2).map(|b| u32::from(u16::from_le_bytes([b[0], b[1]])) << 16).collect(),
    }
}

fn logits(checkpoint: Checkpoint) -> Vec<u32> {
    let model = Model::open(Arc::new(checkpoint)).unwrap();
    let ids: Vec<u32> = (0..40).map(|i| i * 37 % 128).collect();
    let mut cache = model.cache(ids.len() + 1);
    let mut all = Vec::new();
    for ids in [&ids[..], &[7]] {
        let hidden = model.hidden(ids, &mut cache, &Skips::new(), &mut Unobserved).unwrap();
        all.extend(model.logits(&hidden).unwrap().data().iter().map(|logit| logit.to_bits()));
    }
    all
}

#[test]
fn models_in_gguf_files_are_the_checkpoints_that_they_were_made_of() {
    for name in [
        "llama",
        "llama_bias",
        "llama3_rope",
        "llama_linear",
        "mixtral",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "gemma3_text",
        "phi3_longrope",
    ] {
        let mut original = Checkpoint::open(&golden(name)).unwrap();
        let file = Checkpoint::open(&gguf(name)).unwrap();
        assert!(file.tensors().keys().eq(original.tensors().keys()), "{name}");
        for tensor in original.tensors().keys() {
            assert_eq!(file.tensors()[tensor].shape, original.tensors()[tensor].shape, "{name} {tensor}");
            let same = values(&file, tensor) == values(&original, tensor);
            assert!(same, "{name} {tensor}");
        }
        if name == "gemma3_text" {
            // The format does not say by what scores are scaled: it is the size of a head in every published model but one.
            let text = original
                .config()
                .unwrap()
                .text()
                .replace("\"query_pre_attn_scalar\": 24", "\"query_pre_attn_scalar\": 16");
            original = original.edited(&Edit { config: Some(text), ..Edit::default() }).unwrap();
        }
        assert!(logits(file) == logits(original), "{name}");
    }
}
