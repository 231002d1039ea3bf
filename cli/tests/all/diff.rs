//! `diff` tells how far two checkpoints are from each other, whatever their encodings.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use crate::support::{self, LLAMA, T, checkpoint, fails, ok, path, run, t, tiny_llama, tinylm};
use llmpress_formats::{Checkpoint, Dtype};
use serde_json::Value;

/// Runs `diff --json`, which finds differences.
fn differences(a: &Path, b: &Path) -> Value {
    let output = run(&["diff", path(a), path(b), "--json"]);
    assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stderr));
    let error: Value = serde_json::from_slice(&output.stderr).unwrap();
    assert_eq!(error["error"]["kind"], "findings");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Two checkpoints: the little llama, and what `edit` makes of it.
fn pair(dir: &Path, edit: impl FnOnce(&mut Vec<T>)) -> (PathBuf, PathBuf) {
    let (a, b) = (dir.join("a"), dir.join("b"));
    let mut tensors = tiny_llama();
    checkpoint(&a, LLAMA, &tensors);
    edit(&mut tensors);
    checkpoint(&b, LLAMA, &tensors);
    (a, b)
}

fn find<'a>(tensors: &'a mut [T], name: &str) -> &'a mut T {
    tensors.iter_mut().find(|t| t.name == name).unwrap()
}

fn set(t: &mut T, element: usize, word: u16) {
    t.bytes[2 * element..][..2].copy_from_slice(&word.to_le_bytes());
}

const Q: &str = "model.layers.1.self_attn.q_proj.weight";
const NORM: &str = "model.layers.0.input_layernorm.weight";

#[test]
fn a_converted_checkpoint_is_identical_to_its_source() {
    let dir = tempfile::tempdir().unwrap();
    let count = Checkpoint::open(&tinylm()).unwrap().tensors().len();
    for method in ["dfloat11", "fixed12", "planes", "archive"] {
        let out = dir.path().join(method);
        ok(&["convert", path(&tinylm()), path(&out), "--to", method]);
        let text = ok(&["diff", path(&tinylm()), path(&out)]);
        let line = format!("{count} identical, 0 different, 0 not comparable, 0 in one only");
        assert!(text.contains(&line), "{text}");
        let json: Value =
            serde_json::from_str(&ok(&["diff", path(&out), path(&tinylm()), "--json"])).unwrap();
        assert_eq!(json["identical"], count);
        assert_eq!((&json["total"]["differing"], &json["total"]["relative"]), (&0.into(), &0.0.into()));
    }
    // Two encodings, neither of them plain.
    ok(&["diff", path(&dir.path().join("dfloat11")), path(&dir.path().join("fixed12"))]);
}

#[test]
fn changed_weights_are_listed_the_largest_relative_error_first() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = pair(dir.path(), |tensors| {
        let q = find(tensors, Q);
        q.bytes = [0u8, 0x3f].repeat(q.bytes.len() / 2);
        set(q, 5, 0x3f80);
        set(q, 4095, 0xbf00);
        let norm = find(tensors, NORM);
        norm.bytes.fill(0);
    });
    // A is 0.5 everywhere too, so that the norms are known.
    let mut tensors = tiny_llama();
    let q = find(&mut tensors, Q);
    q.bytes = [0u8, 0x3f].repeat(q.bytes.len() / 2);
    checkpoint(&a, LLAMA, &tensors);

    let found = differences(&a, &b);
    let rows = found["different"].as_array().unwrap();
    assert_eq!(rows.iter().map(|r| r["tensor"].as_str().unwrap()).collect::<Vec<_>>(), [NORM, Q]);
    // All of a tensor that became zero.
    assert_eq!((&rows[0]["relative"], &rows[0]["cosine"]), (&1.0.into(), &Value::Null));
    let q = &rows[1];
    assert_eq!((&q["differing"], &q["elements"], &q["dtype_a"]), (&2.into(), &4096.into(), &"BF16".into()));
    assert_eq!((&q["max_abs"], &q["rms"]), (&1.0.into(), &(1.25f64 / 4096.0).sqrt().into()));
    assert_eq!(q["relative"], (1.25f64 / 1024.0).sqrt());
    let cosine = (4094.0 * 0.25 + 0.5 - 0.25) / (1024.0f64.sqrt() * (4095.0 * 0.25 + 1.0f64).sqrt());
    assert!((q["cosine"].as_f64().unwrap() - cosine).abs() < 1e-15);
    assert_eq!(found["identical"], tensors.len() - 2);

    let text = String::from_utf8(run(&["diff", path(&a), path(&b), "--limit", "1"]).stdout).unwrap();
    assert!(text.contains(NORM) && !text.contains(Q) && text.contains("... 1 more"), "{text}");
    assert!(text.contains("\ntotal ") && text.contains(", 2 different,"), "{text}");
    assert!(fails(&["diff", path(&a), path(&b)]).contains(" differ"));
    // The same from an encoded one, and for any number of threads.
    let encoded = dir.path().join("encoded");
    ok(&["convert", path(&b), path(&encoded), "--to", "dfloat11"]);
    assert_eq!(differences(&a, &encoded), found);
    let one = run(&["diff", path(&a), path(&b), "--json", "--jobs", "1"]);
    assert_eq!(serde_json::from_slice::<Value>(&one.stdout).unwrap(), found);
}

#[test]
fn missing_tensors_and_other_shapes_and_dtypes_are_listed() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = pair(dir.path(), |tensors| {
        tensors.retain(|t| t.name != Q);
        find(tensors, NORM).shape = vec![8, 8];
        find(tensors, "model.layers.1.input_layernorm.weight").dtype = Dtype::I16;
        tensors.push(t("extra", Dtype::I64, &[1], vec![0; 8]));
    });
    let found = differences(&a, &b);
    assert_eq!(found["only_in_a"], serde_json::json!([Q]));
    assert_eq!(found["only_in_b"], serde_json::json!(["extra"]));
    let other = found["incomparable"].as_array().unwrap();
    assert_eq!(other.len(), 2);
    assert_eq!((&other[0]["tensor"], &other[0]["shape_b"]), (&NORM.into(), &serde_json::json!([8, 8])));
    assert_eq!((&other[1]["dtype_a"], &other[1]["dtype_b"]), (&"BF16".into(), &"I16".into()));
    assert!(found["different"].as_array().unwrap().is_empty());
    let text = String::from_utf8(run(&["diff", path(&a), path(&b)]).stdout).unwrap();
    assert!(text.contains(&format!("only in {}: {Q}\n", a.display())), "{text}");
    assert!(text.contains(&format!("not comparable: {NORM} is BF16 [64] in")), "{text}");
    assert!(text.contains(" 2 not comparable, 2 in one only"), "{text}");
}

#[test]
fn a_nan_is_counted_and_leaves_every_number_finite() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = pair(dir.path(), |tensors| {
        set(find(tensors, NORM), 3, 0x7fc0);
        set(find(tensors, Q), 0, 0x7f80);
    });
    for (a, b) in [(&a, &b), (&b, &a)] {
        let found = differences(a, b);
        for row in found["different"].as_array().unwrap() {
            assert_eq!((&row["differing"], &row["non_finite_mismatches"]), (&1.into(), &1.into()));
            assert_eq!((&row["max_abs"], &row["relative"]), (&0.0.into(), &0.0.into()));
        }
        assert_eq!(found["total"]["non_finite_mismatches"], 2);
    }
    ok(&["diff", path(&b), path(&b)]);
}

#[test]
fn a_widened_copy_is_equal_by_value_but_not_identical() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = pair(dir.path(), |tensors| {
        for t in tensors {
            t.dtype = Dtype::F32;
            t.bytes = t.bytes.chunks(2).flat_map(|word| [0, 0, word[0], word[1]]).collect();
        }
    });
    let found = differences(&a, &b);
    let rows = found["different"].as_array().unwrap();
    assert_eq!((rows.len(), &found["identical"]), (tiny_llama().len(), &0.into()));
    for row in rows {
        assert_eq!((&row["dtype_a"], &row["dtype_b"]), (&"BF16".into(), &"F32".into()));
        assert_eq!(
            (&row["differing"], &row["relative"], &row["max_abs"]),
            (&0.into(), &0.0.into(), &0.0.into())
        );
        assert!((row["cosine"].as_f64().unwrap() - 1.0).abs() < 1e-12);
    }
}

#[test]
fn a_tied_head_is_compared_with_a_stored_one() {
    let dir = tempfile::tempdir().unwrap();
    let head = |name: &str, seed| t(name, Dtype::BF16, &[128, 64], support::bf16(seed, 128 * 64));
    let embedding = "model.embed_tokens.weight";
    let make = |name: &str, tensors: &[T]| {
        let path = dir.path().join(name);
        checkpoint(&path, LLAMA, tensors);
        path
    };
    let tied = make("tied", &[head(embedding, 1)]);
    let stored = make("stored", &[head(embedding, 1), head("lm_head.weight", 1)]);
    let other = make("other", &[head(embedding, 1), head("lm_head.weight", 2)]);
    let identical = |a: &Path, b: &Path| {
        serde_json::from_str::<Value>(&ok(&["diff", path(a), path(b), "--json"])).unwrap()["identical"]
            .clone()
    };
    // Tied in both, the weights count once.
    assert_eq!(identical(&tied, &tied), 1);
    assert_eq!(identical(&tied, &stored), 2);
    assert_eq!(identical(&stored, &tied), 2);
    let found = differences(&tied, &other);
    assert_eq!(found["different"][0]["tensor"], "lm_head.weight");
    assert_eq!(found["different"].as_array().unwrap().len(), 1);
}

#[test]
fn what_cannot_be_read_is_an_error_and_no_finding() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = pair(dir.path(), |_| ());
    ok(&["diff", path(&a), path(&b)]);
    let missing = dir.path().join("missing");
    let error = fails(&["diff", path(&a), path(&missing)]);
    assert!(error.contains("missing"), "{error}");
    std::fs::write(b.join("model.safetensors"), b"short").unwrap();
    let error = fails(&["diff", path(&a), path(&b)]);
    assert!(error.contains("model.safetensors"), "{error}");
    assert_eq!(run(&["diff", path(&a)]).status.code(), Some(2));
}
