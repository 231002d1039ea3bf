//! Models with parts of their own (`model/tests/golden`) through methods of every kind: lossless ones keep every bit of the logits, whatever their tensors'
//! shapes; passes do what they can and leave the rest.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use llmpress_formats::{Checkpoint, Producer};
use llmpress_model::{Model, Skips, Unobserved, Weights};
use llmpress_pipeline::{Options, Progress, Recipe, Request, Task, Watch, convert_request};

/// One of each family, and the experts that are stored in MXFP4.
const CASES: &[&str] = &[
    "golden/gpt_oss",
    "mxfp4/gpt_oss",
    "golden/deepseek_v3",
    "golden/qwen3_next",
    "golden/qwen3_5_moe",
    "golden/llama4",
];

fn case(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests").join(name)
}

fn options() -> Options {
    Options {
        jobs: Some(2),
        max_memory: None,
        resume: false,
        force: false,
        producer: Producer { name: "test".to_owned(), version: "0.1.0".to_owned(), revision: None },
        extra_files: BTreeMap::new(),
    }
}

/// Nobody watches.
struct Unwatched;

impl Watch for Unwatched {
    fn begin(&self, _task: Task) -> Box<dyn Progress + '_> {
        Box::new(Self)
    }
}

impl Progress for Unwatched {
    fn start(&self, _total: u64) {}
    fn advance(&self, _amount: u64) {}
    fn shard(&self, _file: &str) {}
}

fn open(dir: &Path) -> Model {
    Model::open(Arc::new(Checkpoint::open_dequantised(dir).unwrap())).unwrap()
}

/// Logits of several tokens at once, and of one after them.
fn logits(model: &Model) -> Vec<f32> {
    let ids: Vec<u32> = (0..20).map(|i| (i * 37 + 5) % 120).collect();
    let mut cache = model.cache(ids.len());
    let mut all = Vec::new();
    for piece in [&ids[..19], &ids[19..]] {
        let hidden = model.hidden(piece, &mut cache, &Skips::new(), &mut Unobserved).unwrap();
        all.extend_from_slice(model.logits(&hidden).unwrap().data());
    }
    all
}

fn bits(model: &Model) -> Vec<u32> {
    logits(model).iter().map(|x| x.to_bits()).collect()
}

#[test]
fn lossless_methods_keep_every_bit_of_the_logits() {
    for &name in CASES {
        let expected = bits(&open(&case(name)));
        for to in ["dfloat11", "fixed12", "planes", "archive"] {
            let dir = tempfile::tempdir().unwrap();
            let out = dir.path().join("out");
            let request = Request::new(Recipe::from_short(to).unwrap());
            convert_request(&case(name), &out, &request, 4 << 30, &options(), &Unwatched).unwrap();
            let mut model = open(&out);
            assert!(bits(&model) == expected, "{name} as {to}");
            model.load(Weights::Bf16).unwrap();
            assert!(bits(&model) == expected, "{name} as {to}, decoded once");
        }
    }
}

#[test]
fn a_quantising_pass_takes_the_matrices_that_are_tensors_and_leaves_the_others() {
    for &name in CASES {
        let expected = logits(&open(&case(name)));
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let request = Request::new(Recipe::from_short("rtn:w8").unwrap());
        convert_request(&case(name), &out, &request, 4 << 30, &options(), &Unwatched).unwrap();
        let model = open(&out);
        let largest = expected.iter().fold(0f32, |a, b| a.max(b.abs()));
        let off =
            logits(&model).iter().zip(&expected).map(|(a, b)| (a - b).abs() / largest).fold(0.0, f32::max);
        // A token may go through another expert.
        assert!(off > 0.0 && off < 0.5, "{name}: {off}");
        let coded = |tensor: &str| {
            let checkpoint = model.checkpoint();
            let unit = checkpoint.unit_of(checkpoint.tensor(tensor).unwrap()).unwrap();
            unit.encoding().name().to_owned()
        };
        for tensor in model.checkpoint().tensors().keys().filter(|t| t.contains(".layers.")) {
            let leaf = tensor.trim_end_matches(".weight").rsplit('.').next().unwrap();
            let router = ["gate", "router", "shared_expert_gate", "in_proj_ba", "in_proj_a", "in_proj_b"];
            let matrix = tensor.ends_with("_proj.weight")
                || ["kv_a_proj_with_mqa", "in_proj_qkvz", "in_proj_qkv", "in_proj_z"].contains(&leaf);
            let wanted = matrix && !router.contains(&leaf);
            assert_eq!(coded(tensor) == "abq", wanted, "{name}: {tensor}: {}", coded(tensor));
        }
    }
}
