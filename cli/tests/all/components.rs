//! Components that do not fit their tensors are refused by every verb, whatever digests say.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::path::Path;

use crate::support::{self, fails, ok, path, tinylm};
use llmpress_formats::{Dtype, Manifest};

/// tinylm as planes, where norms are raw, with a manifest changed by `edit` and digests that are right again.
fn tampered(out: &Path, edit: impl FnOnce(&mut Manifest)) {
    // A manifest that was made wrong before says nothing of what may be replaced.
    if out.exists() {
        std::fs::remove_dir_all(out).unwrap();
    }
    ok(&["convert", path(&tinylm()), path(out), "--to", "planes"]);
    change(out, edit);
}

fn change(out: &Path, edit: impl FnOnce(&mut Manifest)) {
    let file = out.join("llmpress.json");
    let mut manifest: Manifest = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    edit(&mut manifest);
    std::fs::write(&file, manifest.to_bytes().unwrap()).unwrap();
}

/// Every verb that reads tensors.
fn all_refuse(out: &Path, tensor: &str) {
    let dir = tempfile::tempdir().unwrap();
    let text = tinylm().join("eval.txt");
    let (model, text, to) = (path(out), path(&text), dir.path().join("to"));
    let source = tinylm();
    let verbs: [&[&str]; 9] = [
        &["eval", "ppl", model, "--text", text, "--window", "32", "--limit", "1"],
        &["generate", model, "-p", "hi", "-n", "1"],
        &["speed", model, "--prompt-tokens", "4", "--new-tokens", "1", "--runs", "1"],
        &["convert", model, path(&to), "--to", "fixed12"],
        &["restore", model, path(&to)],
        &["plan", model, "--to", "dfloat11"],
        &["diff", model, path(&source)],
        &["verify", model],
        &["verify", model, "--against", path(&source)],
    ];
    for args in verbs {
        let output = support::run(args);
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert_eq!(output.status.code(), Some(1), "{args:?}: {text}");
        assert!(!text.contains("panicked"), "{args:?}: {text}");
        assert!(text.contains(tensor), "{args:?}: {text}");
        assert!(!to.join("llmpress.json").exists() && !to.join("model.safetensors").exists(), "{args:?}");
    }
}

const NORM: &str = "model.layers.0.input_layernorm.weight";
const HEADLESS: &str = "model.layers.1.self_attn.q_proj.weight";

#[test]
fn a_raw_component_of_another_size_is_refused_by_every_verb() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    for (tensor, to_raw) in [(NORM, false), (HEADLESS, true)] {
        tampered(&out, |manifest| {
            let unit = manifest.units.get_mut(tensor).unwrap();
            if to_raw {
                // The planes' frames, U8 and too few, are said to be the matrix itself.
                let data = unit.components.remove("planes").unwrap();
                let lengths = unit.components.remove("lengths").unwrap();
                unit.encoding = serde_json::json!({"name": "raw"}).into();
                unit.components.insert("data", data);
                unit.components.insert("rest", lengths);
            } else {
                let entry = manifest.tensors.get_mut(tensor).unwrap();
                entry.shape = vec![entry.shape[0] * 2];
            }
        });
        all_refuse(&out, tensor);
    }
}

#[test]
fn a_raw_component_of_another_dtype_is_refused_by_every_verb() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    tampered(&out, |manifest| manifest.tensors.get_mut(NORM).unwrap().dtype = Dtype::F16);
    all_refuse(&out, NORM);
}

#[test]
fn sizes_that_wrap_are_refused_before_anything_is_planned() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    // 64 TiB are an honest size, but not of so short a component; several times 2^62 would wrap to nothing.
    for shape in [vec![1 << 22, 1 << 23], vec![1 << 31, 1 << 31], vec![1 << 61]] {
        tampered(&out, |manifest| {
            for name in [NORM, HEADLESS, "model.layers.2.input_layernorm.weight", "model.norm.weight"] {
                manifest.tensors.get_mut(name).unwrap().shape.clone_from(&shape);
            }
        });
        for args in [
            vec!["plan", path(&out), "--to", "planes"],
            vec!["convert", path(&out), path(&dir.path().join("to")), "--to", "raw"],
            vec!["restore", path(&out), path(&dir.path().join("to"))],
            vec!["verify", path(&out)],
        ] {
            let output = support::run(&args);
            let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
            assert_eq!(output.status.code(), Some(1), "{args:?}: {text}");
            assert!(!text.contains("panicked"), "{args:?}: {text}");
        }
    }
    tampered(&out, |manifest| manifest.shards.values_mut().for_each(|s| s.bytes = u64::MAX));
    assert!(fails(&["verify", path(&out)]).contains("2^58"));
}
