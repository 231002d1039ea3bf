//! Checkpoints whose weights were turned and scaled: they run, they are told from nothing but rounding, and go back.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::support::{fails, ok, path, run, tinylm};
use llmpress_formats::{Checkpoint, Producer, Rotation, RotationSite, ScaleSite, Scales, Transform};
use llmpress_kernels::cpu::Hadamard;
use llmpress_model::{Model, folded};
use llmpress_pipeline::{Method, Options, Plan, Progress, Recipe, convert};
use serde_json::Value;

struct Silent;

impl Progress for Silent {
    fn start(&self, _: u64) {}
    fn advance(&self, _: u64) {}
    fn shard(&self, _: &str) {}
}

fn rotation(site: RotationSite, size: usize) -> Transform {
    let factors = Hadamard::new(size, None).unwrap().factors().to_vec();
    Transform::Rotation { site, rotation: Rotation { size: size as u32, factors, seed: Some(1) } }
}

/// R1, R2 and R4.
fn rotations(dir: &Path) -> Vec<Transform> {
    let model = Model::open(Arc::new(Checkpoint::open(dir).unwrap())).unwrap();
    let mut list = Vec::new();
    for layer in 0..model.config().layers.len() {
        for (site, norm) in [ScaleSite::AttentionNorm, ScaleSite::MlpNorm].into_iter().zip(model.norms(layer))
        {
            list.push(Transform::Scale { site, layer, scales: Scales::new(norm.unwrap()) });
        }
    }
    list.push(rotation(RotationSite::Residual, 256));
    list.push(rotation(RotationSite::Value, 64));
    list.push(rotation(RotationSite::Down, 768));
    list
}

/// tinylm, turned, under an encoding.
fn turned(out: &Path, method: Method) -> PathBuf {
    let view = folded(Checkpoint::open(&tinylm()).unwrap(), rotations(&tinylm())).unwrap();
    let plan = Plan::new(&view, &Recipe::new(method), 1 << 40).unwrap();
    let options = Options {
        jobs: Some(2),
        max_memory: None,
        resume: false,
        force: false,
        producer: Producer { name: "test".to_owned(), version: "0.1.0".to_owned(), revision: None },
        extra_files: BTreeMap::new(),
    };
    convert(&view, out, &plan, &options, &Silent).unwrap();
    out.to_owned()
}

#[test]
fn a_turned_checkpoint_runs_compares_with_its_source_and_is_restored() {
    let dir = tempfile::tempdir().unwrap();
    let out = turned(&dir.path().join("turned"), Method::Planes);
    let opened = Checkpoint::open(&out).unwrap();
    assert_eq!(opened.transforms(), rotations(&tinylm()));
    assert_eq!(opened.manifest().unwrap().requires, ["transforms"]);
    ok(&["verify", path(&out)]);
    let inspected = ok(&["inspect", path(&out)]);
    let line = "transformed: scale of attention_norm in 8 layers, scale of mlp_norm in 8 layers, rotation of residual, rotation of \
                value, rotation of down";
    assert!(inspected.contains(line), "{inspected}");
    // It runs as before, but for the rounding of what was turned.
    let text = tinylm().join("eval.txt");
    let perplexity = |dir: &Path| {
        let json = ok(&[
            "eval",
            "ppl",
            path(dir),
            "--text",
            path(&text),
            "--window",
            "256",
            "--limit",
            "2048",
            "--json",
        ]);
        serde_json::from_str::<Value>(&json).unwrap()["perplexity"].as_f64().unwrap()
    };
    let (before, after) = (perplexity(&tinylm()), perplexity(&out));
    assert!((before - after).abs() < 2e-3 * before && before != after, "{before} {after}");
    // Compared with its source only rounding is left, tensor by tensor.
    let json: Value =
        serde_json::from_str(&ok(&["verify", path(&out), "--against", path(&tinylm()), "--json"])).unwrap();
    let lossy = json["comparison"]["quantised"]["tensors"].as_array().unwrap();
    assert_eq!(lossy.len(), 8 * 9, "norms and matrices of every layer");
    assert!(lossy.iter().all(|t| t["relative"].as_f64().unwrap() < 0.01), "{lossy:?}");
    let found = run(&["diff", path(&tinylm()), path(&out), "--json"]);
    let json: Value = serde_json::from_slice(&found.stdout).unwrap();
    assert!(json["total"]["relative"].as_f64().unwrap() < 0.01, "{json}");
    // Stored anew it is as turned as it was, to the bit.
    let again = dir.path().join("again");
    ok(&["convert", path(&out), path(&again), "--to", "dfloat11"]);
    assert_eq!(Checkpoint::open(&again).unwrap().transforms(), opened.transforms());
    ok(&["diff", path(&out), path(&again)]);
    ok(&["verify", path(&again), "--against", path(&out)]);
    // And back.
    let restored = dir.path().join("restored");
    ok(&["restore", path(&out), path(&restored)]);
    let plain = Checkpoint::open(&restored).unwrap();
    assert!(plain.transforms().is_empty());
    let found = run(&["diff", path(&tinylm()), path(&restored), "--json"]);
    let json: Value = serde_json::from_slice(&found.stdout).unwrap();
    assert!(json["total"]["relative"].as_f64().unwrap() < 0.01, "{json}");
    let norms = "model.layers.3.input_layernorm.weight";
    assert!(
        plain.read_tensor(norms).unwrap() == Checkpoint::open(&tinylm()).unwrap().read_tensor(norms).unwrap(),
        "norms are what they were to the bit"
    );
    let restored = perplexity(&restored);
    assert!((before - restored).abs() < 2e-3 * before, "{before} {restored}");
}

#[test]
fn a_turned_checkpoint_of_another_configuration_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let out = turned(&dir.path().join("turned"), Method::Raw);
    let config = std::fs::read_to_string(out.join("config.json")).unwrap();
    std::fs::write(
        out.join("config.json"),
        config
            .replace("\"head_dim\": 64", "\"head_dim\": 32")
            .replace("\"num_attention_heads\": 4,", "\"num_attention_heads\": 8,")
            .replace("\"num_key_value_heads\": 2,", "\"num_key_value_heads\": 4,"),
    )
    .unwrap();
    let error =
        fails(&["eval", "ppl", path(&out), "--text", path(&tinylm().join("eval.txt")), "--limit", "1"]);
    assert!(error.contains("rotation of value") && error.contains("where a head has 32"), "{error}");
    let error = fails(&["restore", path(&out), path(&dir.path().join("restored"))]);
    assert!(error.contains("rotation of value"), "{error}");
}
