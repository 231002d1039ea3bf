//! Running the program, and making checkpoints for it.
#![allow(dead_code, missing_docs, unreachable_pub)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use llmpress_formats::{Dtype, RenderEntry, render};
use llmpress_numbers::Numbers;

/// The program, ready for arguments.
pub fn llmpress() -> Command {
    Command::new(env!("CARGO_BIN_EXE_llmpress"))
}

pub fn tinylm() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/tinylm")
}

pub fn path(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}

pub fn run(args: &[&str]) -> Output {
    llmpress().args(args).output().expect("the program starts")
}

/// Runs and wants success; returns stdout.
pub fn ok(args: &[&str]) -> String {
    let output = run(args);
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{args:?}\n{out}\n{err}");
    out.into_owned()
}

/// Runs and wants exit code 1 and one line of error; returns it.
pub fn fails(args: &[&str]) -> String {
    let output = run(args);
    let err = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{args:?}\n{err}");
    assert!(!err.contains("panicked"), "{err}");
    err.lines().filter(|l| l.starts_with("error: ")).collect::<Vec<_>>().join("\n")
}

/// A tensor of a checkpoint to be made.
#[derive(Clone)]
pub struct T {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<u64>,
    pub bytes: Vec<u8>,
}

pub fn t(name: &str, dtype: Dtype, shape: &[u64], bytes: Vec<u8>) -> T {
    T { name: name.to_owned(), dtype, shape: shape.to_vec(), bytes }
}

/// A small deterministic generator.
pub fn random(seed: u64) -> impl FnMut() -> u64 {
    let mut numbers = Numbers::new(seed);
    move || numbers.bits()
}

/// BF16 words spread as trained weights are.
pub fn bf16(seed: u64, count: usize) -> Vec<u8> {
    let mut next = random(seed);
    (0..count)
        .flat_map(|_| {
            let r = next();
            let step = (r >> 20).leading_zeros() - 20 + (r >> 60) as u32 % 2;
            (r as u16 & 0x807f | (124 - step as u16) << 7).to_le_bytes()
        })
        .collect()
}

pub fn bytes(seed: u64, count: usize) -> Vec<u8> {
    let mut next = random(seed);
    (0..count).map(|_| next() as u8).collect()
}

/// The bytes of a safetensors file.
pub fn safetensors(tensors: &[T]) -> Vec<u8> {
    let mut entries = Vec::new();
    let mut data = Vec::new();
    for t in tensors {
        let begin = data.len() as u64;
        data.extend_from_slice(&t.bytes);
        entries.push(RenderEntry {
            name: t.name.clone(),
            dtype: t.dtype,
            shape: t.shape.clone(),
            begin,
            end: data.len() as u64,
        });
    }
    let mut file = render(&entries, &BTreeMap::from([("format".to_owned(), "pt".to_owned())]), None).unwrap();
    file.extend(data);
    file
}

pub const LLAMA: &str =
    r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64}"#;

/// A checkpoint of one file.
pub fn checkpoint(dir: &Path, config: &str, tensors: &[T]) {
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join("config.json"), config).unwrap();
    std::fs::write(dir.join("model.safetensors"), safetensors(tensors)).unwrap();
}

/// A llama of two blocks, small enough for hundreds of runs.
pub fn tiny_llama() -> Vec<T> {
    let mut tensors = Vec::new();
    for block in 0..2u64 {
        for (i, (path, rows, cols)) in [
            ("self_attn.q_proj", 64, 64),
            ("self_attn.k_proj", 32, 64),
            ("self_attn.v_proj", 32, 64),
            ("self_attn.o_proj", 64, 64),
            ("mlp.gate_proj", 128, 64),
            ("mlp.up_proj", 128, 64),
            ("mlp.down_proj", 64, 128),
        ]
        .into_iter()
        .enumerate()
        {
            let name = format!("model.layers.{block}.{path}.weight");
            tensors.push(t(
                &name,
                Dtype::BF16,
                &[rows, cols],
                bf16(block * 10 + i as u64, (rows * cols) as usize),
            ));
        }
        let norm = format!("model.layers.{block}.input_layernorm.weight");
        tensors.push(t(&norm, Dtype::BF16, &[64], bf16(99 + block, 64)));
    }
    tensors.push(t("lm_head.weight", Dtype::BF16, &[128, 64], bf16(7, 128 * 64)));
    tensors
}

/// Every file of a directory, by name.
pub fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            let content =
                if path.is_file() { std::fs::read(&path).unwrap() } else { b"(directory)".to_vec() };
            (name, content)
        })
        .collect()
}

/// Fails with the names of the files that differ.
pub fn same_files(a: &Path, b: &Path) {
    let (a, b) = (files(a), files(b));
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
    for (name, content) in &a {
        assert!(*content == b[name], "{name} differs");
    }
}
