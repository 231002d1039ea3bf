//! Matrices of two in four at the program: made, looked at, verified, restored, packed again, run.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

mod support;

use support::{fails, ok, path, run, tinylm};

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
