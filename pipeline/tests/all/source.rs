//! A source that changes under a conversion never gives a mixture that counts as done.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use llmpress_formats::{Checkpoint, Dtype, Producer, RenderEntry, render};
use llmpress_pipeline::{Method, Options, Plan, Progress, Recipe, convert, restore};

/// Four tensors in a file each.
fn source(dir: &Path) {
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join("config.json"), r#"{"model_type": "llama", "hidden_size": 64}"#).unwrap();
    std::fs::write(dir.join("tokenizer.json"), "{}").unwrap();
    for i in 1..=4u8 {
        let name = format!("model.layers.{i}.mlp.up_proj.weight");
        let entry = RenderEntry { name, dtype: Dtype::BF16, shape: vec![64, 64], begin: 0, end: 8192 };
        let mut bytes = render(&[entry], &BTreeMap::new(), None).unwrap();
        bytes.extend((0..4096u16).flat_map(|j| (0x3c00 + (j % 251) + u16::from(i)).to_le_bytes()));
        std::fs::write(dir.join(format!("model-{i:05}-of-00004.safetensors")), bytes).unwrap();
    }
}

fn options() -> Options {
    Options {
        jobs: Some(1),
        max_memory: None,
        resume: false,
        force: false,
        producer: Producer { name: "test".to_owned(), version: "0.1.0".to_owned(), revision: None },
        extra_files: BTreeMap::new(),
    }
}

/// Does something once, when the first shard is complete.
struct Meanwhile<F: Fn() + Sync>(F, AtomicBool);

impl<F: Fn() + Sync> Progress for Meanwhile<F> {
    fn start(&self, _: u64) {}
    fn advance(&self, _: u64) {}
    fn shard(&self, _: &str) {
        if !self.1.swap(true, Ordering::SeqCst) {
            (self.0)();
        }
    }
}

/// What is done to a source, and what it is called.
type Change = (&'static str, fn(&Path));

fn changes() -> Vec<Change> {
    vec![
        ("a weight is written to", |dir| {
            let file = dir.join("model-00004-of-00004.safetensors");
            let mut bytes = std::fs::read(&file).unwrap();
            *bytes.last_mut().unwrap() ^= 1;
            std::fs::write(file, bytes).unwrap();
        }),
        ("a shard is replaced", |dir| {
            let file = dir.join("model-00001-of-00004.safetensors");
            std::fs::copy(&file, dir.join("new")).unwrap();
            std::fs::rename(dir.join("new"), file).unwrap();
        }),
        ("a shard is cut short", |dir| {
            let file = dir.join("model-00004-of-00004.safetensors");
            std::fs::File::options().write(true).open(file).unwrap().set_len(4000).unwrap();
        }),
        ("the configuration is another", |dir| {
            std::fs::write(dir.join("config.json"), r#"{"model_type": "qwen2", "hidden_size": 64}"#).unwrap();
        }),
        ("the tokenizer is another", |dir| std::fs::write(dir.join("tokenizer.json"), "[]").unwrap()),
        ("a file comes in addition", |dir| std::fs::write(dir.join("chat_template.jinja"), "x").unwrap()),
        ("a file goes", |dir| std::fs::remove_file(dir.join("tokenizer.json")).unwrap()),
    ]
}

#[test]
fn a_source_that_changes_meanwhile_is_never_published() {
    for (what, change) in changes() {
        for method in [Method::Raw, Method::Planes] {
            let dir = tempfile::tempdir().unwrap();
            let (from, out) = (dir.path().join("source"), dir.path().join("out"));
            source(&from);
            let checkpoint = Checkpoint::open(&from).unwrap();
            let plan = Plan::new(&checkpoint, &Recipe::new(method), 8192).unwrap();
            assert_eq!(plan.shards.len(), 4);
            let meanwhile = Meanwhile(|| change(&from), AtomicBool::new(false));
            let result = convert(&checkpoint, &out, &plan, &options(), &meanwhile);
            assert!(result.is_err(), "{what}");
            assert!(!out.join("llmpress.json").exists(), "{what}");
            // Nor does it count as a checkpoint.
            assert!(Checkpoint::open(&out).unwrap_err().to_string().contains("unfinished"), "{what}");
        }
    }
}

#[test]
fn a_restored_checkpoint_is_no_mixture_either() {
    for (what, change) in changes().into_iter().filter(|(what, _)| what.contains("tokenizer")) {
        let dir = tempfile::tempdir().unwrap();
        let (from, packed, out) =
            (dir.path().join("source"), dir.path().join("packed"), dir.path().join("out"));
        source(&from);
        let checkpoint = Checkpoint::open(&from).unwrap();
        let plan = Plan::new(&checkpoint, &Recipe::new(Method::Planes), 8192).unwrap();
        let quiet = Meanwhile(|| {}, AtomicBool::new(false));
        convert(&checkpoint, &packed, &plan, &options(), &quiet).unwrap();
        let packed_checkpoint = Checkpoint::open(&packed).unwrap();
        let meanwhile = Meanwhile(|| change(&packed), AtomicBool::new(false));
        assert!(restore(&packed_checkpoint, &out, 8192, &options(), &meanwhile).is_err(), "{what}");
        assert!(Checkpoint::open(&out).unwrap_err().to_string().contains("unfinished"), "{what}");
    }
}
