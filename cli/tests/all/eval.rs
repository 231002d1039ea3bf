//! Models run from the command line, and compressed ones are proven to be the same.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::path::Path;

use crate::support::{self, fails, ok, path, run, t, tinylm};
use llmpress_formats::Dtype;
use serde_json::Value;

fn json(args: &[&str]) -> Value {
    let args: Vec<&str> = args.iter().copied().chain(["--json"]).collect();
    serde_json::from_str(&ok(&args)).unwrap()
}

fn convert(out: &Path, method: &str) {
    ok(&["convert", path(&tinylm()), path(out), "--to", method, "--quiet"]);
}

#[test]
fn perplexity_of_tinylm_is_the_published_one() {
    let (model, text) = (tinylm(), tinylm().join("eval.txt"));
    for (window, expected, windows) in [("512", 29.2152, 72), ("256", 29.9688, 144)] {
        let report = json(&["eval", "ppl", path(&model), "--text", path(&text), "--window", window]);
        let perplexity = report["perplexity"].as_f64().unwrap();
        assert!((perplexity - expected).abs() < 0.01, "{window}: {perplexity}");
        assert_eq!(report["windows"], windows);
        assert_eq!(report["text_tokens"], 37042);
        assert_eq!(report["bos"], Value::Null);
        let error = report["nats_per_token_standard_error"].as_f64().unwrap();
        assert!(error > 0.0 && error < 0.05, "{error}");
    }
    // Longer contexts predict better; one window is one window.
    let slid = json(&[
        "eval",
        "ppl",
        path(&model),
        "--text",
        path(&text),
        "--window",
        "256",
        "--stride",
        "128",
        "--limit",
        "20",
    ]);
    let apart =
        json(&["eval", "ppl", path(&model), "--text", path(&text), "--window", "256", "--limit", "11"]);
    assert_eq!(slid["scored_tokens"], 255 + 19 * 128);
    assert!(slid["perplexity"].as_f64() < apart["perplexity"].as_f64());
}

#[test]
fn lossless_conversions_compute_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let text = tinylm().join("eval.txt");
    for method in ["dfloat11", "fixed12", "planes", "archive"] {
        let out = dir.path().join(method);
        convert(&out, method);
        let report = json(&[
            "verify",
            path(&out),
            "--against",
            path(&tinylm()),
            "--logits",
            "--text",
            path(&text),
            "--limit",
            "2",
        ]);
        let logits = &report["logits"];
        assert_eq!(logits["logits"], 2 * 511 * 4096, "{method}");
        assert_eq!(logits["differing"], 0, "{method}");
        assert_eq!(logits["generated"], 32);
        assert_eq!(logits["first_generated"], Value::Null);
        let kld = json(&[
            "eval",
            "kld",
            path(&out),
            "--base",
            path(&tinylm()),
            "--text",
            path(&text),
            "--limit",
            "2",
        ]);
        assert_eq!(kld["kl"]["max"], 0.0, "{method}");
        assert_eq!(kld["same_top"], 1.0);
        assert_eq!(kld["delta_p"]["min"], 0.0);
        assert_eq!(kld["perplexity"], kld["base_perplexity"]);
        let prompt = "My fellow citizens,";
        let [a, b] = [&out, &tinylm()].map(|m| json(&["generate", path(m), "--prompt", prompt, "-n", "16"]));
        assert_eq!(a["tokens"], b["tokens"]);
        assert_eq!(a["tokens"].as_array().unwrap().len(), 16);
        assert!(!a["text"].as_str().unwrap().is_empty());
    }
}

/// tinylm with some bytes of its weights changed.
fn changed(dir: &Path) {
    std::fs::create_dir(dir).unwrap();
    for entry in std::fs::read_dir(tinylm()).unwrap() {
        let from = entry.unwrap().path();
        std::fs::copy(&from, dir.join(from.file_name().unwrap())).unwrap();
    }
    let file = dir.join("model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    // The low bits of mantissas.
    bytes[middle..middle + 100_000].iter_mut().step_by(2).for_each(|b| *b ^= 0x10);
    std::fs::write(&file, bytes).unwrap();
}

#[test]
fn a_model_that_differs_is_told_from_its_base() {
    let dir = tempfile::tempdir().unwrap();
    let other = dir.path().join("other");
    changed(&other);
    let text = tinylm().join("eval.txt");
    let kld = json(&[
        "eval",
        "kld",
        path(&other),
        "--base",
        path(&tinylm()),
        "--text",
        path(&text),
        "--limit",
        "2",
    ]);
    let mean = kld["kl"]["mean"].as_f64().unwrap();
    assert!(mean > 1e-7 && mean < 1.0, "{mean}");
    assert!(kld["kl"]["max"].as_f64() > kld["kl"]["p99"].as_f64());
    assert!(kld["kl"]["p99"].as_f64() > kld["kl"]["median"].as_f64());
    assert_ne!(kld["perplexity"], kld["base_perplexity"]);
    let base = tinylm();
    let args = ["verify", path(&other), "--against", path(&base), "--logits", "--text", path(&text)];
    assert_eq!(run(&args).status.code(), Some(1));
}

#[test]
fn generation_is_repeatable_and_draws_by_seed() {
    let tokens = |args: &[&str]| {
        let model = tinylm();
        let fixed = ["generate", path(&model), "--prompt", "The state of", "-n", "24"].map(str::to_owned);
        let args: Vec<String> = fixed.into_iter().chain(args.iter().map(|a| (*a).to_owned())).collect();
        json(&args.iter().map(String::as_str).collect::<Vec<_>>())["tokens"].clone()
    };
    assert_eq!(tokens(&[]), tokens(&["--jobs", "1"]));
    let drawn = tokens(&["--temperature", "1", "--seed", "7"]);
    assert_eq!(drawn, tokens(&["--temperature", "1", "--seed", "7", "--jobs", "3"]));
    assert_ne!(drawn, tokens(&["--temperature", "1", "--seed", "8"]));
    assert_eq!(tokens(&["--temperature", "1", "--top-k", "1", "--seed", "3"]), tokens(&[]));
}

#[test]
fn what_cannot_run_is_said_before_it_starts() {
    let dir = tempfile::tempdir().unwrap();
    let text = tinylm().join("eval.txt");
    let ppl = |model: &Path, text: &Path, more: &[&str]| {
        let args = ["eval", "ppl", path(model), "--text", path(text)];
        fails(&args.into_iter().chain(more.iter().copied()).collect::<Vec<_>>())
    };
    let copy = |name: &str| {
        let to = dir.path().join(name);
        std::fs::create_dir(&to).unwrap();
        for entry in std::fs::read_dir(tinylm()).unwrap() {
            let from = entry.unwrap().path();
            std::fs::copy(&from, to.join(from.file_name().unwrap())).unwrap();
        }
        to
    };
    let edit = |dir: &Path, from: &str, to: &str| {
        let file = dir.join("config.json");
        let config = std::fs::read_to_string(&file).unwrap();
        assert!(config.contains(from), "{config}");
        std::fs::write(&file, config.replace(from, to)).unwrap();
    };

    let short = dir.path().join("short.txt");
    std::fs::write(&short, "Only a few words.").unwrap();
    let error = ppl(&tinylm(), &short, &[]);
    assert!(error.contains("fewer than a window of 512"), "{error}");
    assert!(ppl(&tinylm(), &text, &["--window", "1"]).contains("2 or more"));
    assert!(ppl(&tinylm(), &text, &["--stride", "512"]).contains("1 to 511"));
    assert!(ppl(&tinylm(), &dir.path().join("none.txt"), &[]).contains("none.txt"));

    let other = copy("architecture");
    edit(&other, "\"llama\"", "\"rwkv\"");
    let error = ppl(&other, &text, &[]);
    assert!(error.contains("rwkv") && error.contains("qwen2") && error.contains("config.json"), "{error}");

    let shape = copy("shape");
    edit(&shape, "\"intermediate_size\": 768", "\"intermediate_size\": 512");
    let error = ppl(&shape, &text, &[]);
    assert!(error.contains("mlp.") && error.contains("768") && error.contains("512"), "{error}");

    let layers = copy("layers");
    edit(&layers, "\"num_hidden_layers\": 8", "\"num_hidden_layers\": 9");
    let error = ppl(&layers, &text, &[]);
    assert!(error.contains("model.layers.8.") && error.contains("nearest"), "{error}");

    let rope = copy("rope");
    edit(&rope, "\"rope_type\": \"default\"", "\"rope_type\": \"spiral\"");
    assert!(ppl(&rope, &text, &[]).contains("spiral"));

    let tokenizer = copy("tokenizer");
    std::fs::remove_file(tokenizer.join("tokenizer.json")).unwrap();
    assert!(ppl(&tokenizer, &text, &[]).contains("tokenizer.json"));

    let file = dir.path().join("incomplete");
    support::checkpoint(&file, support::LLAMA, &[t("x", Dtype::BF16, &[2], vec![0; 4])]);
    let error = ppl(&file, &text, &[]);
    assert!(error.contains("num_hidden_layers"), "{error}");
    let model = tinylm();
    let base = ["eval", "kld", path(&model), "--base", path(&file), "--text", path(&text)];
    assert!(fails(&base).contains("num_hidden_layers"));

    assert!(fails(&["generate", path(&tinylm()), "--prompt", "x", "--chat"]).contains("chat template"));
    assert!(
        fails(&["generate", path(&tinylm()), "--prompt", "x", "--temperature", "200"])
            .contains("temperature")
    );
    assert_eq!(run(&["generate", path(&tinylm()), "--prompt", ""]).status.code(), Some(2));
}

#[test]
fn without_a_gpu_the_device_is_refused_in_a_line_and_doctor_says_why() {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/tinylm");
    let run = |args: &[&str]| {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_llmpress")).args(args).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    let (code, found, _) = run(&["doctor", "--json"]);
    assert_eq!(code, Some(0));
    let report: serde_json::Value = serde_json::from_str(&found).unwrap();
    assert!(report["gpu_modules"].as_array().unwrap().iter().any(|m| m == "fixed12"));
    assert!(report["cpu_kernels"].is_string());
    // Where there is a GPU the rest does not hold.
    let Some(why) = report["no_gpu"].as_str() else { return };
    for args in [
        &["generate", model, "--prompt", "x", "--device", "cuda"][..],
        &["speed", model, "--device", "cuda:1"],
        &["eval", "ppl", model, "--text", "x", "--device", "cuda"],
    ] {
        let (code, out, error) = run(args);
        assert_eq!((code, out.as_str()), (Some(1), ""), "{args:?}");
        assert_eq!(error.trim_end(), format!("error: {why}"), "{args:?}");
    }
}
