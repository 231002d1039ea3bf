//! Options and variables that change how the program works, never what it computes.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use crate::support::{llmpress, ok, path, run, same_files, tinylm};
use serde_json::Value;

#[test]
fn help_tells_exit_codes_and_variables() {
    let help = ok(&["--help"]);
    for part in ["Exit codes:", "2  wrong usage", "NO_COLOR", "LLMPRESS_ISA", "--color"] {
        assert!(help.contains(part), "{part} is not in {help}");
    }
    assert!(!help.contains("render-chat-template"), "{help}");
    assert!(!ok(&["generate", "--help"]).contains("gpu-weights"));
}

#[test]
fn colours_are_where_they_are_asked_for() {
    let stderr = |args: &[&str]| String::from_utf8(run(args).stderr).unwrap();
    assert!(stderr(&["inspect", "no/such/place", "--color", "always"]).starts_with("\u{1b}[1;31merror:"));
    assert!(stderr(&["--color=always", "inspect", "no/such/place"]).contains('\u{1b}'));
    for plain in [
        &["inspect", "no/such/place"][..],
        &["inspect", "no/such/place", "--color", "never"],
        &["inspect", "no/such/place", "--color", "auto"],
        &["inspect", "no/such/place", "--color", "always", "--json"],
        &["inspect", "--color", "never"],
    ] {
        assert!(!stderr(plain).contains('\u{1b}'), "{plain:?}");
    }
    assert!(stderr(&["inspect", "--color", "always"]).contains('\u{1b}'), "mistakes too");
    assert!(String::from_utf8(run(&["--help", "--color", "always"]).stdout).unwrap().contains('\u{1b}'));
    assert_eq!(run(&["inspect", "x", "--color", "blue"]).status.code(), Some(2));
}

#[test]
fn instructions_change_neither_bytes_nor_logits() {
    let dir = tempfile::tempdir().unwrap();
    let (model, text) = (tinylm(), tinylm().join("eval.txt"));
    let with = |isa: &str, args: &[&str]| {
        let output = llmpress().args(args).env("LLMPRESS_ISA", isa).output().unwrap();
        (output.status.code(), [output.stdout, output.stderr].map(|b| String::from_utf8(b).unwrap()))
    };
    let perplexity = |isa: &str| {
        let args =
            ["eval", "ppl", path(&model), "--text", path(&text), "--window", "64", "--limit", "1", "--json"];
        let (code, [found, error]) = with(isa, &args);
        assert_eq!(code, Some(0), "{error}");
        serde_json::from_str::<Value>(&found).unwrap()["perplexity"].as_f64().unwrap()
    };
    let mut outputs = Vec::new();
    for isa in ["", "portable", "avx2", "avx512"] {
        let (code, [found, error]) = with(isa, &["doctor", "--json"]);
        if code == Some(2) {
            assert!(isa.starts_with("avx") && error.contains("this processor has no"), "{error}");
            continue;
        }
        let report: Value = serde_json::from_str(&found).unwrap();
        assert!(isa != "portable" || report["cpu_kernels"] == "portable", "{report}");
        let mut files = Vec::new();
        for method in ["dfloat11", "fixed12"] {
            let out = dir.path().join(format!("{method}{isa}"));
            let (code, [_, error]) =
                with(isa, &["convert", path(&model), path(&out), "--to", method, "--quiet"]);
            assert_eq!(code, Some(0), "{error}");
            files.push(out);
        }
        outputs.push((perplexity(isa), files));
    }
    assert!(outputs.len() >= 2);
    for (found, files) in &outputs[1..] {
        assert_eq!(found.to_bits(), outputs[0].0.to_bits());
        files.iter().zip(&outputs[0].1).for_each(|(a, b)| same_files(a, b));
    }
    let (code, [_, error]) = with("sse9", &["doctor"]);
    assert_eq!(code, Some(2));
    assert!(error.contains("LLMPRESS_ISA") && error.contains("portable"), "{error}");
}

#[test]
fn weights_in_any_form_generate_the_same_and_the_faster_form_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let generate = |model: &std::path::Path, more: &[&str]| {
        let args = ["generate", path(model), "-p", "It is a truth", "-n", "6"];
        run(&[&args[..], more].concat())
    };
    let expected = generate(&tinylm(), &[]);
    assert!(!String::from_utf8_lossy(&expected.stderr).contains("--weights"));
    for method in ["dfloat11", "planes", "fixed12"] {
        let out = dir.path().join(method);
        ok(&["convert", path(&tinylm()), path(&out), "--to", method, "--quiet"]);
        let told = String::from_utf8(generate(&out, &[]).stderr).unwrap();
        assert_eq!(told.contains("--weights bf16"), method != "fixed12", "{told}");
        for weights in ["stored", "bf16", "fixed12", "dfloat11"] {
            for flag in ["--weights", "--gpu-weights"] {
                let found = generate(&out, &[flag, weights, "--quiet"]);
                assert_eq!(found.stdout, expected.stdout, "{method} as {weights}");
                assert!(found.status.success() && found.stderr.is_empty());
            }
        }
    }
}
