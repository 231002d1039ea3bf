//! Files that go with the weights, by their usual names.

/// Files from which a model is built or its text made: another one there is another model.
const MODEL_FILES: [&str; 23] = [
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "configuration.json",
    "generation_config.json",
    "hf_quant_config.json",
    "merges.txt",
    "model.safetensors.index.json",
    "params.json",
    "preprocessor_config.json",
    "processor_config.json",
    "quantize_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
    "vocab.txt",
];

/// How the names of papers that go with a model begin.
const DOCUMENTS: [&str; 5] = ["LICENSE", "README", "NOTICE", "USE_POLICY", "COPYING"];

/// What files of weights end in, in any format.
const WEIGHTS: [&str; 12] =
    ["bin", "ckpt", "gguf", "ggml", "h5", "msgpack", "npz", "onnx", "ot", "pt", "pth", "safetensors"];

/// Whether a file of this name holds weights, in whatever format.
pub fn is_weights_file(name: &str) -> bool {
    name.rsplit_once('.').is_some_and(|(_, extension)| WEIGHTS.contains(&extension))
}

/// Whether a model's behaviour depends on a file of this name, weights apart.
pub fn is_model_file(name: &str) -> bool {
    MODEL_FILES.contains(&name)
}

/// Whether this is a name that checkpoints usually have beside their weights.
pub fn is_known_file(name: &str) -> bool {
    is_model_file(name) || DOCUMENTS.iter().any(|d| name.starts_with(d))
}
