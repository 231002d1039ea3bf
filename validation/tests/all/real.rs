//! Real checkpoints against what transformers computed for them (`model/tests/golden/real.json`).
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use llmpress_formats::Checkpoint;
use llmpress_model::{Model, Skips, Tokenizer, Unobserved, greedy};
use llmpress_validation::{Protocol, perplexity};
use serde_json::Value;

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

fn ids(value: &Value) -> Vec<u32> {
    numbers(value).into_iter().map(|v| v as u32).collect()
}

fn close(what: &str, found: f64, expected: f64, tolerance: f64) {
    assert!((found - expected).abs() <= tolerance * (1.0 + expected.abs()), "{what}: {found} for {expected}");
}

fn check(name: &str, dir: &Path, text: &Path) {
    let golden: Value =
        serde_json::from_slice(&std::fs::read(repository().join("model/tests/golden/real.json")).unwrap())
            .unwrap();
    let golden = &golden[name];
    let model = Model::open(Arc::new(Checkpoint::open(dir).unwrap())).unwrap();
    let all = Tokenizer::open(dir).unwrap().encode(&std::fs::read_to_string(text).unwrap()).unwrap();
    let first = ids(&golden["ids"]);
    assert_eq!(all[..first.len()], first, "{name}: token ids");

    let hidden = model.hidden(&first, &mut model.cache(64), &Skips::new(), &mut Unobserved).unwrap();
    let logits = model.logits(&hidden).unwrap();
    let last: Vec<f64> = logits.token(first.len() - 1).map(f64::from).collect();
    for (id, expected) in ids(&golden["top"]["ids"]).into_iter().zip(numbers(&golden["top"]["logits"])) {
        close(&format!("{name}: logit {id}"), last[id as usize], expected, 1e-3);
    }
    for (id, expected) in numbers(&golden["first"]).into_iter().enumerate() {
        close(&format!("{name}: logit {id}"), last[id], expected, 1e-3);
    }
    let log_sum_exp = |l: &[f64]| {
        let max = l.iter().copied().fold(f64::MIN, f64::max);
        max + l.iter().map(|x| (x - max).exp()).sum::<f64>().ln()
    };
    close(&format!("{name}: log sum exp"), log_sum_exp(&last), golden["logsumexp"].as_f64().unwrap(), 1e-4);
    close(
        &format!("{name}: mean"),
        last.iter().sum::<f64>() / last.len() as f64,
        golden["mean"].as_f64().unwrap(),
        1e-3,
    );
    for (token, expected) in numbers(&golden["nll"]).into_iter().enumerate() {
        let logits: Vec<f64> = logits.token(token).map(f64::from).collect();
        let found = log_sum_exp(&logits) - logits[first[token + 1] as usize];
        close(&format!("{name}: nll {token}"), found, expected, 1e-3);
    }
    let expected = ids(&golden["greedy"]);
    assert_eq!(greedy(&model, &first[..16], expected.len()).unwrap(), expected, "{name}: greedy");

    let protocol = Protocol { window: 512, stride: None, limit: Some(16), bos: None };
    let found = perplexity(&model, &Skips::new(), &all, 1, protocol, None, &mut |_| ()).unwrap();
    let expected = golden["perplexity"].as_f64().or(golden["perplexity"]["value"].as_f64()).unwrap();
    println!("{name}: perplexity {} for {expected}", found.perplexity);
    close(&format!("{name}: perplexity"), found.perplexity, expected, 1e-4);
}

#[test]
fn tinylm_computes_what_transformers_computes() {
    let dir = repository().join("examples/tinylm");
    check("tinylm", &dir, &dir.join("eval.txt"));
}

#[test]
#[ignore = "needs real_models.py's output: LLMPRESS_MODELS=DIR cargo test -p llmpress-validation --test all real:: -- --ignored"]
fn real_models_compute_what_transformers_computes() {
    let models =
        PathBuf::from(std::env::var("LLMPRESS_MODELS").expect("LLMPRESS_MODELS names the directory"));
    for name in ["smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct"] {
        check(name, &models.join(name), &models.join("corpora/wiki.txt"));
    }
}
