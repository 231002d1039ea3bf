//! A GGUF file converts, runs and is inspected like any checkpoint: the example, written as llama.cpp's converter does.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

mod support;

use std::path::Path;

use llmpress_formats::Checkpoint;
use llmpress_model::Tokenizer;
use support::{fails, ok, path, tinylm};

/// Writes metadata and tensors.
#[derive(Default)]
struct Writer {
    values: (u64, Vec<u8>),
    tensors: (u64, Vec<u8>),
    data: Vec<u8>,
}

fn text(value: &str) -> Vec<u8> {
    [&(value.len() as u64).to_le_bytes()[..], value.as_bytes()].concat()
}

impl Writer {
    fn value(&mut self, key: &str, kind: u32, value: &[u8]) {
        self.values.0 += 1;
        self.values.1.extend([&text(key)[..], &kind.to_le_bytes(), value].concat());
    }

    fn number(&mut self, key: &str, value: u32) {
        self.value(key, 4, &value.to_le_bytes());
    }

    fn text(&mut self, key: &str, value: &str) {
        self.value(key, 8, &text(value));
    }

    fn list(&mut self, key: &str, kind: u32, count: usize, values: Vec<u8>) {
        let head = [&kind.to_le_bytes()[..], &(count as u64).to_le_bytes()].concat();
        self.value(key, 9, &[head, values].concat());
    }

    fn tensor(&mut self, name: &str, shape: &[u64], kind: u32, bytes: &[u8]) {
        self.tensors.0 += 1;
        let mut info = text(name);
        info.extend((shape.len() as u32).to_le_bytes());
        shape.iter().rev().for_each(|side| info.extend(side.to_le_bytes()));
        info.extend(kind.to_le_bytes());
        info.extend((self.data.len() as u64).to_le_bytes());
        self.tensors.1.extend(info);
        self.data.extend(bytes);
        self.data.resize(self.data.len().next_multiple_of(32), 0);
    }

    fn write(self, file: &Path) {
        let mut out = b"GGUF\x03\0\0\0".to_vec();
        out.extend(self.tensors.0.to_le_bytes());
        out.extend(self.values.0.to_le_bytes());
        out.extend(self.values.1);
        out.extend(self.tensors.1);
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(self.data);
        std::fs::write(file, out).unwrap();
    }
}

const BF16: u32 = 30;
const Q8_0: u32 = 8;

/// 32 weights in BF16 as a block of Q8_0.
fn q8_0(words: &[u8]) -> Vec<u8> {
    let value = |b: &[u8]| f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16);
    let values: Vec<f32> = words.chunks_exact(2).map(value).collect();
    let largest = values.iter().fold(0f32, |most, value| most.max(value.abs())) / 127.0;
    // In half precision, cut off.
    let exponent = (largest.to_bits() >> 23).saturating_sub(127 - 15);
    let (scale, word) = match exponent {
        0 => (0.0, 0),
        _ => (
            f32::from_bits(largest.to_bits() & !0x1fff),
            (exponent << 10 | largest.to_bits() >> 13 & 0x3ff) as u16,
        ),
    };
    let code =
        |value: &f32| if scale == 0.0 { 0 } else { (value / scale).round().clamp(-128.0, 127.0) as i8 as u8 };
    [word.to_le_bytes().to_vec(), values.iter().map(code).collect()].concat()
}

/// The example as one file, its matrices of blocks plain or of eight bits.
fn write(file: &Path, linears: u32) {
    let source = Checkpoint::open(&tinylm()).unwrap();
    let mut w = Writer::default();
    w.text("general.architecture", "llama");
    for (key, value) in [
        ("block_count", 8),
        ("context_length", 1024),
        ("embedding_length", 256),
        ("feed_forward_length", 768),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
        ("attention.key_length", 64),
        ("vocab_size", 4096),
    ] {
        w.number(&format!("llama.{key}"), value);
    }
    w.value("llama.attention.layer_norm_rms_epsilon", 6, &1e-5f32.to_le_bytes());
    w.value("llama.rope.freq_base", 6, &10000f32.to_le_bytes());
    let tokenizer: serde_json::Value =
        serde_json::from_slice(&std::fs::read(tinylm().join("tokenizer.json")).unwrap()).unwrap();
    let mut tokens = vec![String::new(); 4096];
    for (token, id) in tokenizer["model"]["vocab"].as_object().unwrap() {
        tokens[id.as_u64().unwrap() as usize] = token.clone();
    }
    let merges: Vec<String> = tokenizer["model"]["merges"]
        .as_array()
        .unwrap()
        .iter()
        .map(|pair| format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap()))
        .collect();
    w.text("tokenizer.ggml.model", "gpt2");
    w.text("tokenizer.ggml.pre", "gpt-2");
    w.list("tokenizer.ggml.tokens", 8, tokens.len(), tokens.iter().flat_map(|token| text(token)).collect());
    let kinds = (0..tokens.len()).flat_map(|id| (if id == 0 { 3i32 } else { 1 }).to_le_bytes());
    w.list("tokenizer.ggml.token_type", 5, tokens.len(), kinds.collect());
    w.list("tokenizer.ggml.merges", 8, merges.len(), merges.iter().flat_map(|merge| text(merge)).collect());
    w.number("tokenizer.ggml.bos_token_id", 0);
    w.number("tokenizer.ggml.eos_token_id", 0);
    w.value("tokenizer.ggml.add_bos_token", 7, &[0]);
    w.text("tokenizer.chat_template", "{% for m in messages %}{{ m.content }}{% endfor %}");
    for (name, tensor) in source.tensors() {
        let mut bytes = source.read_tensor(name).unwrap();
        let heads = if name.contains("q_proj") { 4 } else { 2 };
        if name.contains("q_proj") || name.contains("k_proj") {
            // Rows of the halves of each head take turns.
            let row = bytes.len() / tensor.shape[0] as usize;
            let (rows, of_head) = (tensor.shape[0] as usize, tensor.shape[0] as usize / heads);
            let from =
                |place: usize| place / of_head * of_head + place % of_head / 2 + place % 2 * of_head / 2;
            bytes = (0..rows).flat_map(|place| bytes[from(place) * row..][..row].to_vec()).collect();
        }
        let renamed = name
            .replace("model.layers.", "blk.")
            .replace("model.embed_tokens", "token_embd")
            .replace("model.norm", "output_norm")
            .replace("input_layernorm", "attn_norm")
            .replace("post_attention_layernorm", "ffn_norm")
            .replace("self_attn.o_proj", "attn_output")
            .replace("self_attn.", "attn_")
            .replace("mlp.", "ffn_")
            .replace("_proj", "");
        if linears == Q8_0 && name.contains("_proj") {
            let blocks: Vec<u8> = bytes.chunks_exact(64).flat_map(q8_0).collect();
            w.tensor(&renamed, &tensor.shape, Q8_0, &blocks);
        } else {
            w.tensor(&renamed, &tensor.shape, BF16, &bytes);
        }
    }
    w.write(file);
}

fn perplexity(model: &Path) -> f64 {
    let text = tinylm().join("eval.txt");
    let told = ok(&["eval", "ppl", path(model), "--text", path(&text), "--limit", "2", "--json"]);
    serde_json::from_str::<serde_json::Value>(&told).unwrap()["perplexity"].as_f64().unwrap()
}

#[test]
fn a_gguf_file_converts_to_the_checkpoint_that_it_was_made_of() {
    let dir = tempfile::tempdir().unwrap();
    let (file, out, plain) =
        (dir.path().join("tinylm.gguf"), dir.path().join("out"), dir.path().join("plain"));
    write(&file, BF16);
    let inspected = ok(&["inspect", path(&file)]);
    assert!(inspected.contains("gguf checkpoint, LlamaForCausalLM"), "{inspected}");
    assert!(ok(&["plan", path(&file), "--to", "dfloat11"]).contains("dfloat11"));
    ok(&["convert", path(&file), path(&out), "--to", "dfloat11"]);
    ok(&["verify", path(&out), "--against", path(&file)]);
    ok(&["diff", path(&out), path(&tinylm())]);
    ok(&["restore", path(&file), path(&plain)]);
    ok(&["diff", path(&plain), path(&tinylm())]);
    // Nothing but the model comes along, though the file lies among others.
    std::fs::write(dir.path().join("other.txt"), "not the model's").unwrap();
    ok(&["convert", path(&file), path(&out), "--to", "fixed12", "--force"]);
    assert!(!out.join("other.txt").exists() && out.join("tokenizer.json").exists());
    let again = ok(&["convert", path(&file), path(&out), "--to", "fixed12", "--resume", "--json"]);
    assert!(again.contains("\"resumed_shards\": 1"), "{again}");
    assert_eq!(perplexity(&file), perplexity(&tinylm()));
    assert_eq!(perplexity(&out), perplexity(&tinylm()));
    // Its tokenizer is the example's.
    let text = std::fs::read_to_string(tinylm().join("eval.txt")).unwrap();
    let ids = |dir: &Path| Tokenizer::open(dir).unwrap().encode(&text[..20000.min(text.len())]).unwrap();
    assert!(ids(&file) == ids(&tinylm()) && ids(&out) == ids(&tinylm()));
    let generated = |dir: &Path| ok(&["generate", path(dir), "--prompt", "Once", "--max-new-tokens", "8"]);
    assert_eq!(generated(&file), generated(&tinylm()));
}

#[test]
fn blocks_of_eight_bits_run_near_what_they_were_made_of() {
    let dir = tempfile::tempdir().unwrap();
    let (file, out) = (dir.path().join("q8_0.gguf"), dir.path().join("out"));
    write(&file, Q8_0);
    let inspected = ok(&["inspect", path(&file)]);
    assert!(inspected.contains("q8_0") && inspected.contains("8.500"), "{inspected}");
    let (ours, original) = (perplexity(&file), perplexity(&tinylm()));
    assert!((ours / original - 1.0).abs() < 0.01, "{ours} {original}");
    for to in ["planes", "rtn:w4,g64,symmetric"] {
        ok(&["convert", path(&file), path(&out), "--to", to, "--force"]);
        ok(&["verify", path(&out), "--against", path(&file)]);
        assert!(to != "planes" || perplexity(&out) == ours);
    }
}

#[test]
fn what_is_no_gguf_file_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("model.gguf");
    std::fs::write(&file, b"GGUF").unwrap();
    for verb in [&["inspect"][..], &["eval", "ppl"]] {
        let text = tinylm().join("eval.txt");
        let mut args = [verb, &[path(&file)]].concat();
        if verb.len() > 1 {
            args.extend(["--text", path(&text)]);
        }
        let error = fails(&args);
        assert!(error.contains("model.gguf") && error.contains("cut short"), "{error}");
    }
    let error = fails(&["inspect", path(dir.path())]);
    assert!(error.contains("give one of the GGUF files"), "{error}");
    let other = dir.path().join("model.bin");
    std::fs::write(&other, b"").unwrap();
    assert!(fails(&["inspect", path(&other)]).contains("no GGUF file by its name"));
}

#[test]
fn scores_make_a_tokenizer_that_merges_the_best_first() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("scores.gguf");
    let tokens = [
        ("<unk>", 2, 0.0f32),
        ("<s>", 3, 0.0),
        ("</s>", 3, 0.0),
        ("▁", 1, -10.0),
        ("a", 1, -10.0),
        ("b", 1, -10.0),
        ("ab", 1, -1.0),
        ("▁a", 1, -2.0),
        ("▁ab", 1, -3.0),
        ("<0xC3>", 6, 0.0),
        ("<0xA9>", 6, 0.0),
    ];
    let mut w = Writer::default();
    w.text("general.architecture", "llama");
    for key in ["block_count", "embedding_length", "attention.head_count"] {
        w.number(&format!("llama.{key}"), 2);
    }
    w.text("tokenizer.ggml.model", "llama");
    w.list(
        "tokenizer.ggml.tokens",
        8,
        tokens.len(),
        tokens.iter().flat_map(|(token, ..)| text(token)).collect(),
    );
    let kinds = tokens.iter().flat_map(|(_, kind, _)| i32::to_le_bytes(*kind));
    w.list("tokenizer.ggml.token_type", 5, tokens.len(), kinds.collect());
    let scores = tokens.iter().flat_map(|(.., score)| score.to_le_bytes());
    w.list("tokenizer.ggml.scores", 6, tokens.len(), scores.collect());
    for (key, id) in [("bos", 1), ("eos", 2), ("unknown", 0)] {
        w.number(&format!("tokenizer.ggml.{key}_token_id"), id);
    }
    w.write(&file);
    let tokenizer = Tokenizer::open(&file).unwrap();
    for (text, ids) in [
        ("ab", &[8][..]),
        ("a", &[7]),
        ("aab", &[7, 6]),
        ("b a", &[3, 5, 7]),
        ("é", &[3, 9, 10]),
        ("</s>", &[2]),
    ] {
        assert_eq!(tokenizer.encode(text).unwrap(), ids, "{text}");
        assert_eq!(tokenizer.decode(ids, true).unwrap(), if text == "</s>" { "" } else { text });
    }
    assert!(tokenizer.adds_bos() && tokenizer.bos() == Some(1) && tokenizer.eos() == [2]);
}
