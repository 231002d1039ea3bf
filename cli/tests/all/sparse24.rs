//! Matrices of two in four at the program: made, looked at, verified, restored, packed again, run.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::{fails, llmpress, ok, path, run, same_files, tinylm};

#[test]
fn a_model_made_sparse_is_verified_by_its_errors_restored_packed_again_and_run() {
    let dir = tempfile::tempdir().unwrap();
    let (out, back, packed) = (dir.path().join("out"), dir.path().join("back"), dir.path().join("packed"));
    let source = tinylm();
    ok(&["convert", path(&source), path(&out), "--to", "sparse24:magnitude+fixed12"]);
    assert!(ok(&["verify", path(&out)]).contains("every digest is right"));
    let found = ok(&["verify", path(&out), "--against", path(&source)]);
    assert!(found.contains("19 bit-identical, 56 made 2:4 with a relative error of 0."), "{found}");
    assert!(found.contains("made 2:4: sparse24:magnitude"), "{found}");
    let inspected = ok(&["inspect", path(&out)]);
    assert!(inspected.contains("2:4,fixed12") && inspected.contains("7.0"), "{inspected}");
    ok(&["restore", path(&out), path(&back)]);
    assert!(ok(&["verify", path(&back), "--against", path(&out)]).contains("bit-identical"));
    // What is plain with zeros is packed without a pass, and is the same to the bit.
    ok(&["convert", path(&back), path(&packed), "--to", "sparse24"]);
    let found = ok(&["verify", path(&packed), "--against", path(&back)]);
    assert!(found.contains("75 tensors") && found.contains("bit-identical"), "{found}");
    let rows: serde_json::Value = serde_json::from_str(&ok(&["inspect", path(&packed), "--json"])).unwrap();
    assert_eq!(rows["by_encoding"]["sparse24"]["tensors"], 56);
    assert_eq!(rows["sparse"]["2:4"]["bits_per_weight"], 9.0);
    let text = source.join("eval.txt");
    let perplexity = |model: &std::path::Path| -> f64 {
        let args =
            ["eval", "ppl", path(model), "--text", path(&text), "--window", "256", "--limit", "2", "--json"];
        serde_json::from_str::<serde_json::Value>(&ok(&args)).unwrap()["perplexity"].as_f64().unwrap()
    };
    let (dense, strips, plain) = (perplexity(&back), perplexity(&out), perplexity(&packed));
    assert!(dense == strips && dense == plain, "{dense} {strips} {plain}");
    let logits = ["--logits", "--text", path(&text), "--limit", "1"];
    let refused = fails(&[&["verify", path(&out), "--against", path(&source)], &logits[..]].concat());
    assert!(refused.contains("made 2:4") && refused.contains("eval kld"), "{refused}");
}

#[test]
fn kept_values_beside_sums_take_fixed12_and_the_model_stays_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let (plain, direct, later, source) = (at("plain"), at("direct"), at("later"), tinylm());
    ok(&["convert", path(&source), path(&plain), "--to", "sparse24:magnitude,slorb"]);
    // At once, and of what was stored plainly: the same.
    ok(&["convert", path(&source), path(&direct), "--to", "sparse24:magnitude,slorb+fixed12"]);
    ok(&["convert", path(&plain), path(&later), "--to", "fixed12"]);
    let bits = |model: &Path| -> f64 {
        let found: serde_json::Value =
            serde_json::from_str(&ok(&["inspect", path(model), "--json"])).unwrap();
        found["quantised"].as_object().unwrap().values().next().unwrap()["bits_per_weight"].as_f64().unwrap()
    };
    assert_eq!(bits(&plain), 10.0);
    for model in [&direct, &later] {
        assert!((7.9..8.2).contains(&bits(model)), "{}", bits(model));
        assert!(ok(&["verify", path(model)]).contains("every digest is right"));
        assert!(ok(&["verify", path(model), "--against", path(&plain)]).contains("bit-identical"));
        let text = source.join("eval.txt");
        let logits = ["--logits", "--text", path(&text), "--limit", "1"];
        ok(&[&["verify", path(model), "--against", path(&plain)], &logits[..]].concat());
    }
    let shard = "model-00001-of-00001.safetensors";
    assert!(std::fs::read(direct.join(shard)).unwrap() == std::fs::read(later.join(shard)).unwrap());
    // In two threads and in one, with pieces of a few rows: the same bytes.
    let few = at("few");
    ok(&["convert", path(&plain), path(&few), "--to", "fixed12", "--jobs", "1", "--max-memory", "64MB"]);
    assert!(std::fs::read(few.join(shard)).unwrap() == std::fs::read(later.join(shard)).unwrap());
}

#[test]
fn a_rule_that_goes_by_a_text_is_refused_without_one() {
    let (dir, source) = (tempfile::tempdir().unwrap(), tinylm());
    let out = dir.path().join("out");
    let refused = fails(&["convert", path(&source), path(&out), "--to", "sparse24:wanda"]);
    assert!(refused.contains("--calib"), "{refused}");
    assert!(!out.exists());
}

#[test]
fn a_target_ratio_is_the_same_as_one_in_the_chain() {
    let source = tinylm();
    let plan = |more: &[&str]| ok(&[&["plan", path(&source), "--json"], more].concat());
    let by_option = plan(&["--to", "sparse24:wanda+rtn:w4,g64", "--target-ratio", "0.3"]);
    assert_eq!(by_option, plan(&["--to", "sparse24:wanda,ratio=0.3+rtn:w4,g64"]));
    let refused = |more: &[&str], words: &str| {
        let output = run(&[&["plan", path(&source)], more].concat());
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(matches!(output.status.code(), Some(1 | 2)) && error.contains(words), "{error}");
    };
    refused(&["--to", "sparse24:wanda", "--target-ratio", "0.5"], "give 0.5625");
    refused(&["--to", "sparse24:wanda,dense=10%", "--target-ratio", "0.6"], "give one of them");
    refused(&["--to", "gptq:w4", "--target-ratio", "0.6"], "--target-ratio is for");
    refused(&["--to", "sparse24:wanda", "--target-ratio", "60%"], "no share");
}

#[test]
fn training_stopped_by_ctrl_c_leaves_a_state_and_goes_on_to_the_same_bytes() {
    let (dir, source) = (tempfile::tempdir().unwrap(), tinylm());
    let (whole, out) = (dir.path().join("whole"), dir.path().join("out"));
    let text = source.join("calib.txt");
    let args = |out: &std::path::Path| -> Vec<String> {
        let to = "sparse24:magnitude,permute+ast:steps=60,batch=1,window=24,every=5";
        ["convert", path(&source), path(out), "--to", to, "--calib", path(&text)].map(String::from).into()
    };
    let mut child =
        llmpress().args(args(&out)).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let begun = Instant::now();
    // From when on it trains, and catches the signal.
    let caught = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
        let set = status
            .lines()
            .find_map(|line| u64::from_str_radix(line.strip_prefix("SigCgt:")?.trim(), 16).ok());
        set.is_some_and(|set| set >> 1 & 1 == 1)
    };
    while !caught() && begun.elapsed() < Duration::from_secs(120) {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let status = child.wait().unwrap();
    let mut said = String::new();
    std::io::Read::read_to_string(child.stderr.as_mut().unwrap(), &mut said).unwrap();
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("--resume"), "{said}");
    assert!(out.join(".llmpress/passes/2/training.state").exists() && !out.join("llmpress.json").exists());
    let resumed: Vec<String> = args(&out).into_iter().chain(["--resume".to_owned()]).collect();
    ok(&resumed.iter().map(String::as_str).collect::<Vec<_>>());
    ok(&args(&whole).iter().map(String::as_str).collect::<Vec<_>>());
    same_files(&whole, &out);
    // Channels are put back before matrices are compared; norms were trained too.
    let found = ok(&["verify", path(&out), "--against", path(&source)]);
    assert!(found.contains("73 made 2:4 or trained") && found.contains("ast:steps=60"), "{found}");
    assert!(ok(&["verify", path(&out)]).contains("every digest is right"));
    let inspected = ok(&["inspect", path(&out)]);
    assert!(inspected.contains("permutation of down in"), "{inspected}");
}
