//! A GGUF file converts, runs and is inspected like any checkpoint: the example, written as llama.cpp's converter does.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::support::{self, fails, ok, path, run, tinylm};
use llmpress_formats::encoding::abq::Floats;
use llmpress_formats::{Checkpoint, Dtype};
use llmpress_model::{Model, Skips, Tokenizer, Unobserved};

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

/// Exports and wants the one file that comes of it.
fn exported(source: &Path, out: &Path) -> PathBuf {
    ok(&["export", path(source), path(out), "--as", "gguf", "--force"]);
    let files = std::fs::read_dir(out).unwrap().map(|entry| entry.unwrap().path());
    let files: Vec<PathBuf> = files.filter(|file| file.extension().is_some_and(|e| e == "gguf")).collect();
    assert_eq!(files.len(), 1, "{files:?}");
    files[0].clone()
}

#[test]
fn an_export_is_read_again_as_the_checkpoint_that_it_was_made_of() {
    let dir = tempfile::tempdir().unwrap();
    let (out, ours, plain) = (dir.path().join("out"), dir.path().join("ours"), dir.path().join("plain"));
    ok(&["convert", path(&tinylm()), path(&ours), "--to", "dfloat11"]);
    let file = exported(&ours, &out);
    assert_eq!(file.file_name().unwrap(), "model-BF16.gguf");
    ok(&["verify", path(&file), "--against", path(&ours)]);
    ok(&["restore", path(&file), path(&plain)]);
    ok(&["verify", path(&plain), "--against", path(&tinylm())]);
    assert_eq!(perplexity(&file), perplexity(&tinylm()));
    let text = std::fs::read_to_string(tinylm().join("eval.txt")).unwrap();
    let ids = |dir: &Path| Tokenizer::open(dir).unwrap().encode(&text[..20000.min(text.len())]).unwrap();
    assert!(ids(&file) == ids(&tinylm()));
    let generated = |dir: &Path| ok(&["generate", path(dir), "--prompt", "Once", "--max-new-tokens", "8"]);
    assert_eq!(generated(&file), generated(&tinylm()));
    // The same bytes from wherever the tensors come, and whatever runs.
    let bytes = std::fs::read(&file).unwrap();
    ok(&[
        "export",
        path(&ours),
        path(&plain),
        "--as",
        "gguf",
        "--force",
        "--jobs",
        "1",
        "--max-memory",
        "64M",
    ]);
    assert!(std::fs::read(plain.join("model-BF16.gguf")).unwrap() == bytes);
    // Complete, it is looked at and left; changed, it says so; in the way, it is refused.
    let again = ok(&["export", path(&ours), path(&out), "--as", "gguf", "--resume", "--json"]);
    assert!(again.contains("\"resumed_shards\": 1"), "{again}");
    assert!(fails(&["export", path(&ours), path(&out), "--as", "gguf"]).contains("--force"));
    let mut changed = bytes.clone();
    let last = changed.len() - 1000;
    changed[last] ^= 1;
    std::fs::write(&file, changed).unwrap();
    let error = fails(&["export", path(&ours), path(&out), "--as", "gguf", "--resume"]);
    assert!(error.contains("its model-BF16.gguf was changed"), "{error}");
    assert!(fails(&["restore", path(&ours), path(&out), "--resume"]).contains("--force"));
    exported(&ours, &out);
    assert!(std::fs::read(&file).unwrap() == bytes);
}

#[test]
fn an_export_that_was_killed_goes_on_after_what_it_had_written() {
    let dir = tempfile::tempdir().unwrap();
    let (out, whole) = (dir.path().join("out"), dir.path().join("whole"));
    let bytes = std::fs::read(exported(&tinylm(), &whole)).unwrap();
    let source = tinylm();
    let args = ["export", path(&source), path(&out), "--as", "gguf", "--jobs", "1", "--quiet"];
    let (hidden, marks) = (out.join(".llmpress/model-BF16.gguf"), out.join(".llmpress/model-BF16.gguf.json"));
    let start = std::time::Instant::now();
    ok(&args);
    let full = start.elapsed();
    let (mut begun, mut marked) = (0, 0);
    for step in 0..16u32 {
        std::fs::remove_dir_all(&out).unwrap();
        let mut child = support::llmpress().args(args).stderr(std::process::Stdio::null()).spawn().unwrap();
        std::thread::sleep(full.mul_f64(f64::from(step) / 16.0));
        child.kill().unwrap();
        child.wait().unwrap();
        // One of the marked bytes is another now: its group is written again.
        let of_marks = std::fs::read_to_string(&marks).ok();
        let inode = std::fs::metadata(&hidden).ok().map(|meta| meta.ino());
        if let (Some(of_marks), true) = (&of_marks, hidden.exists() && step % 2 == 1) {
            let of_marks: serde_json::Value = serde_json::from_str(of_marks).unwrap();
            let at = of_marks[0]["offset"].as_u64().unwrap();
            let file = std::fs::File::options().write(true).open(&hidden).unwrap();
            file.write_all_at(&[!bytes[at as usize]], at).unwrap();
        }
        ok(&[&args[..], &["--resume"]].concat());
        assert!(std::fs::read(out.join("model-BF16.gguf")).unwrap() == bytes, "{step}");
        assert!(!out.join(".llmpress").exists());
        begun += u32::from(inode.is_some());
        marked += u32::from(of_marks.is_some());
        // It is the file that was begun, not another.
        if let Some(inode) = inode.filter(|_| of_marks.is_some()) {
            assert_eq!(std::fs::metadata(out.join("model-BF16.gguf")).unwrap().ino(), inode);
        }
    }
    assert!(begun > 0 && marked > 0, "at least one run was killed after a group: {begun} {marked}");
}

#[test]
fn codes_are_exported_as_blocks_of_the_same_numbers() {
    let dir = tempfile::tempdir().unwrap();
    let (out, ours) = (dir.path().join("out"), dir.path().join("ours"));
    for (to, blocks) in [
        ("rtn:w4,g32,symmetric", "Q4_0"),
        ("rtn:w3,symmetric", "Q4_0"),
        ("rtn:w2*,g128,symmetric", "Q4_0"),
        ("rtn:w4,g64,int", "Q5_0"),
        ("rtn:w5,g32,symmetric", "Q5_0"),
        ("rtn:w8,g32,symmetric", "Q8_0"),
        ("rtn:w6,g64,int", "Q8_0"),
    ] {
        ok(&["convert", path(&tinylm()), path(&ours), "--to", to, "--force"]);
        let file = exported(&ours, &out);
        assert_eq!(file.file_name().unwrap().to_str().unwrap(), format!("model-{blocks}.gguf"), "{to}");
        ok(&["verify", path(&file), "--against", path(&ours)]);
        if to == "rtn:w4,g32,symmetric" {
            let (ours, exported) = (perplexity(&ours), perplexity(&file));
            assert!((ours / exported - 1.0).abs() < 1e-3, "{ours} {exported}");
        }
    }
    // What no block holds is decoded, and that is said.
    ok(&["convert", path(&tinylm()), path(&ours), "--to", "rtn:w8,g32", "--force"]);
    let told = ok(&["export", path(&ours), path(&out), "--as", "gguf", "--force"]);
    assert!(told.contains("not as asked for: blk.0.") && told.contains("written as bf16"), "{told}");
    ok(&["verify", path(&out.join("model-BF16.gguf")), "--against", path(&ours)]);
}

/// The checkpoints that transformers wrote for each architecture.
fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/golden").join(name)
}

#[test]
fn every_architecture_is_exported_or_refused_by_what_it_has() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    for (name, wanted) in [
        ("llama", None),
        ("llama_tied", None),
        ("llama_bias", None),
        ("llama_head_dim", None),
        ("llama_linear", None),
        ("llama_yarn", None),
        ("llama3_rope", None),
        ("mistral", None),
        ("mixtral", None),
        ("qwen2", None),
        ("qwen3", None),
        ("phi3", None),
        ("phi3_longrope", None),
        ("llama_dynamic", Some("rope_scaling")),
        ("llama_yarn_factor", Some("rope_scaling: of YaRN")),
        ("qwen3_moe", Some("has no experts in layer 1")),
        ("qwen3_moe_nonorm", Some("norm_topk_prob")),
        ("gemma3_text", Some("every sixth layer")),
    ] {
        if let Some(wanted) = wanted {
            let error = fails(&["export", path(&golden(name)), path(&out), "--as", "gguf", "--force"]);
            assert!(error.contains(wanted), "{name}: {error}");
            continue;
        }
        let file = exported(&golden(name), &out);
        ok(&["verify", path(&file), "--against", path(&golden(name))]);
        // The configuration is the model's: as the same numbers come of it.
        let logits = |dir: &Path| {
            let model = Model::open(Arc::new(Checkpoint::open(dir).unwrap())).unwrap();
            let ids = [3, 9, 27, 81, 5, 15];
            let mut cache = model.cache(ids.len());
            let hidden = model.hidden(&ids, &mut cache, &Skips::new(), &mut Unobserved).unwrap();
            model.logits(&hidden).unwrap().data().to_vec()
        };
        assert_eq!(logits(&file), logits(&golden(name)), "{name}");
    }
    // A window that llama.cpp does not have bounds the length of texts.
    let told = ok(&["export", path(&golden("mistral")), path(&out), "--as", "gguf", "--force"]);
    assert!(told.contains("at most 6 tokens"), "{told}");
}

/// A golden checkpoint with another configuration, and only the tensors that it has.
fn altered(name: &str, out: &Path, change: impl Fn(&mut serde_json::Value), keep: impl Fn(&str) -> bool) {
    let source = Checkpoint::open(&golden(name)).unwrap();
    let mut config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(golden(name).join("config.json")).unwrap()).unwrap();
    change(&mut config);
    let tensors = source.tensors().iter().filter(|(name, _)| keep(name));
    let tensors = tensors.map(|(name, tensor)| {
        support::t(name, tensor.dtype, &tensor.shape, source.read_tensor(name).unwrap())
    });
    support::checkpoint(out, &config.to_string(), &tensors.collect::<Vec<_>>());
}

#[test]
fn experts_and_norms_that_are_stored_otherwise_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let (gemma, experts, out) =
        (dir.path().join("gemma"), dir.path().join("experts"), dir.path().join("out"));
    altered(
        "gemma3_text",
        &gemma,
        |config| {
            config["layer_types"] = serde_json::Value::Null;
            config["query_pre_attn_scalar"] = 16.into();
        },
        |_| true,
    );
    altered(
        "qwen3_moe",
        &experts,
        |config| config["num_hidden_layers"] = 1.into(),
        |name| !name.contains("layers.1.") && !name.contains("layers.2."),
    );
    for source in [&gemma, &experts] {
        let file = exported(source, &out);
        ok(&["verify", path(&file), "--against", path(source)]);
        let plain = dir.path().join("plain");
        ok(&["restore", path(&file), path(&plain), "--force"]);
        ok(&["diff", path(&plain), path(source)]);
    }
    // Of a tiny norm the sum with one counts: a part of its digits is lost in the file, and in no result.
    let tiny = dir.path().join("tiny");
    let source = Checkpoint::open(&gemma).unwrap();
    let tensors = source.tensors().iter().map(|(name, tensor)| {
        let mut bytes = source.read_tensor(name).unwrap();
        if name.ends_with("layernorm.weight") {
            bytes[..4].copy_from_slice(&[0x55, 0x33, 0xd5, 0xb2]);
        }
        support::t(name, tensor.dtype, &tensor.shape, bytes)
    });
    let config = std::fs::read_to_string(gemma.join("config.json")).unwrap();
    support::checkpoint(&tiny, &config, &tensors.collect::<Vec<_>>());
    ok(&["verify", path(&exported(&tiny, &out)), "--against", path(&tiny)]);
}

#[test]
fn half_precision_models_keep_their_dtypes_and_what_gguf_lacks_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (half, ours, out) = (dir.path().join("half"), dir.path().join("ours"), dir.path().join("out"));
    let source = Checkpoint::open(&golden("llama")).unwrap();
    let tensors = source.tensors().iter().map(|(name, tensor)| {
        let bytes = source.read_tensor(name).unwrap();
        let value = |b: &[u8]| f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16);
        let values: Vec<f32> = bytes.chunks_exact(2).map(value).collect();
        let words = Floats::round(Dtype::F16, &values).unwrap().bytes().to_vec();
        support::t(name, Dtype::F16, &tensor.shape, words)
    });
    let config = std::fs::read_to_string(golden("llama").join("config.json")).unwrap();
    support::checkpoint(&half, &config, &tensors.collect::<Vec<_>>());
    ok(&["verify", path(&exported(&half, &out)), "--against", path(&half)]);
    ok(&["convert", path(&half), path(&ours), "--to", "rtn:w8,symmetric"]);
    ok(&["verify", path(&exported(&ours, &out)), "--against", path(&ours)]);
    for (to, wanted) in [("rtn:w8,kv8", "online"), ("drop:last=1", "prune with --portable")] {
        ok(&["convert", path(&half), path(&ours), "--to", to, "--force"]);
        let error = fails(&["export", path(&ours), path(&out), "--as", "gguf", "--force"]);
        assert!(error.contains(wanted), "{to}: {error}");
    }
}

#[test]
fn an_export_of_what_was_folded_is_verified_as_it_is_stored() {
    let dir = tempfile::tempdir().unwrap();
    let (ours, plain, other) = (dir.path().join("ours"), dir.path().join("plain"), dir.path().join("other"));
    let source = tinylm();
    ok(&["convert", path(&source), path(&ours), "--to", "sparse24:magnitude,permute"]);
    let file = exported(&ours, &dir.path().join("gguf"));
    let found = ok(&["verify", path(&file), "--against", path(&ours)]);
    assert!(found.contains("75 tensors") && found.contains("bit-identical"), "{found}");
    ok(&["export", path(&ours), path(&plain), "--as", "safetensors"]);
    ok(&["verify", path(&plain), "--against", path(&ours)]);
    // What is no export of it is compared in the source's order.
    ok(&["convert", path(&source), path(&other), "--to", "sparse24:magnitude"]);
    let output = run(&["verify", path(&other), "--against", path(&ours)]);
    assert_eq!(output.status.code(), Some(1));
}
