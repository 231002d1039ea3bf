//! Which files of a source come along, and which are named as left behind.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::os::unix::fs::symlink;
use std::path::Path;

use crate::support::{self, LLAMA, bf16, checkpoint, fails, files, ok, path, run, t, tiny_llama};
use llmpress_formats::{Checkpoint, Dtype, Manifest, ShardFile};

fn left_behind(source: &Path, out: &Path) -> Vec<String> {
    let text = ok(&["convert", path(source), path(out), "--to", "planes", "--json"]);
    let summary: serde_json::Value = serde_json::from_str(&text).unwrap();
    serde_json::from_value(summary["left_behind"].clone()).unwrap()
}

#[test]
fn second_copies_are_named_and_not_copied() {
    let dir = tempfile::tempdir().unwrap();
    let (source, out) = (dir.path().join("s"), dir.path().join("o"));
    checkpoint(&source, LLAMA, &tiny_llama());
    let other = support::safetensors(&[t("orig.a.weight", Dtype::BF16, &[4], bf16(1, 4))]);
    for name in ["consolidated.safetensors", "adapter_model.safetensors", "mtp.safetensors"] {
        std::fs::write(source.join(name), &other).unwrap();
    }
    let index = r#"{"weight_map": {"a": "model-00001-of-00002.safetensors"}}"#;
    std::fs::write(source.join("model.safetensors.index.json"), index).unwrap();
    std::fs::create_dir(source.join("original")).unwrap();
    std::fs::write(source.join("pytorch_model.bin.index.json"), "{}").unwrap();
    let left = left_behind(&source, &out);
    assert_eq!(
        left,
        [
            "adapter_model.safetensors",
            "consolidated.safetensors",
            "model.safetensors.index.json",
            "mtp.safetensors",
            "original",
            "pytorch_model.bin.index.json"
        ]
    );
    assert_eq!(Checkpoint::open(&out).unwrap().tensors().len(), tiny_llama().len());
    ok(&["verify", path(&out), "--against", path(&source)]);
    assert!(
        ok(&["inspect", path(&source)]).contains("no part of it: adapter_model.safetensors, consolidated")
    );
}

#[test]
fn links_out_of_the_tree_are_not_copied() {
    let dir = tempfile::tempdir().unwrap();
    let (source, out) = (dir.path().join("s"), dir.path().join("o"));
    checkpoint(&source, LLAMA, &tiny_llama());
    std::fs::write(dir.path().join("secret"), "secret").unwrap();
    std::fs::create_dir(source.join("sub")).unwrap();
    std::fs::write(source.join("sub/inside.txt"), "inside").unwrap();
    symlink("../secret", source.join("notes.txt")).unwrap();
    symlink("/etc/hostname", source.join("hostname")).unwrap();
    symlink("gone", source.join("dangling.txt")).unwrap();
    symlink("someone@host.1:1", source.join(".#config.json")).unwrap();
    symlink("sub/inside.txt", source.join("inside.txt")).unwrap();
    symlink("../secret", source.join("tokenizer.json")).unwrap();
    let left = left_behind(&source, &out);
    assert_eq!(left, [".#config.json", "dangling.txt", "hostname", "notes.txt", "sub"]);
    let made = files(&out);
    assert_eq!((&made["inside.txt"][..], &made["tokenizer.json"][..]), (&b"inside"[..], &b"secret"[..]));
    // A file that the checkpoint needs is missed, not left out.
    std::fs::remove_file(source.join("tokenizer.json")).unwrap();
    symlink("gone", source.join("tokenizer.json")).unwrap();
    let error = fails(&["convert", path(&source), path(&dir.path().join("p")), "--to", "planes"]);
    assert!(error.contains("tokenizer.json"), "{error}");
}

#[test]
fn a_hub_cache_is_a_source_like_any_other() {
    let dir = tempfile::tempdir().unwrap();
    let repository = dir.path().join("models--a--b");
    let (blobs, snapshot) = (repository.join("blobs"), repository.join("snapshots/0123"));
    std::fs::create_dir_all(&blobs).unwrap();
    let plain = dir.path().join("plain");
    checkpoint(&plain, LLAMA, &tiny_llama());
    std::fs::write(plain.join("custom_notes.md"), "notes").unwrap();
    std::fs::create_dir_all(&snapshot).unwrap();
    for (i, (name, content)) in files(&plain).into_iter().enumerate() {
        std::fs::write(blobs.join(i.to_string()), content).unwrap();
        symlink(format!("../../blobs/{i}"), snapshot.join(name)).unwrap();
    }
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    assert!(left_behind(&snapshot, &a).is_empty());
    left_behind(&plain, &b);
    assert_eq!(files(&a).keys().collect::<Vec<_>>(), files(&b).keys().collect::<Vec<_>>());
}

#[test]
fn metadata_survives_conversion_and_restoration() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("s");
    checkpoint(&source, LLAMA, &tiny_llama());
    let metadata = |file: &Path| ShardFile::open(file).unwrap().header().metadata().clone();
    let expected = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    assert_eq!(metadata(&source.join("model.safetensors")), expected);
    for method in ["dfloat11", "fixed12", "planes", "archive"] {
        let (out, back) = (dir.path().join(method), dir.path().join(format!("{method}-back")));
        ok(&["convert", path(&source), path(&out), "--to", method, "--max-shard-size", "60K"]);
        let shards: Vec<_> = files(&out).into_keys().filter(|n| n.ends_with(".safetensors")).collect();
        assert!(shards.len() > 1);
        for shard in shards {
            assert_eq!(metadata(&out.join(shard)), expected);
        }
        ok(&["restore", path(&out), path(&back)]);
        assert_eq!(metadata(&back.join("model.safetensors")), expected);
    }
}

#[test]
fn what_only_python_writes_comes_out_byte_for_byte() {
    let dir = tempfile::tempdir().unwrap();
    let (source, out, back) = (dir.path().join("s"), dir.path().join("o"), dir.path().join("b"));
    let config = r#"{"model_type": "llama", "hidden_size": 64, "time_step_limit": [0.0, Infinity], "x": NaN,
        "y": -Infinity}"#;
    checkpoint(&source, config, &tiny_llama());
    std::fs::write(source.join("generation_config.json"), r#"{"eos_token_id": 0, "max_time": Infinity}"#)
        .unwrap();
    assert!(ok(&["inspect", path(&source)]).contains("llama"));
    ok(&["convert", path(&source), path(&out), "--to", "dfloat11"]);
    ok(&["verify", path(&out)]);
    ok(&["restore", path(&out), path(&back)]);
    for name in ["config.json", "generation_config.json"] {
        assert_eq!(std::fs::read(source.join(name)).unwrap(), std::fs::read(back.join(name)).unwrap());
    }
    let packed = std::fs::read_to_string(out.join("config.json")).unwrap();
    assert!(packed.contains("[0.0, Infinity], \"x\": NaN,"), "{packed}");
}

#[test]
fn a_tokenizer_with_what_only_python_writes_is_read_and_copied() {
    let dir = tempfile::tempdir().unwrap();
    let (source, out) = (dir.path().join("s"), dir.path().join("o"));
    std::fs::create_dir(&source).unwrap();
    for (name, bytes) in files(&support::tinylm()) {
        std::fs::write(source.join(name), bytes).unwrap();
    }
    let score = |model: &Path| {
        let text = support::tinylm().join("eval.txt");
        let args =
            ["eval", "ppl", path(model), "--text", path(&text), "--window", "64", "--limit", "1", "--json"];
        let report: serde_json::Value = serde_json::from_str(&ok(&args)).unwrap();
        report["perplexity"].as_f64().unwrap()
    };
    let plain = score(&source);
    let file = source.join("tokenizer.json");
    let truncation = "\"truncation\": {\"direction\": \"Right\", \"max_length\": Infinity, \
        \"strategy\": \"LongestFirst\", \"stride\": 0}";
    let text = std::fs::read_to_string(&file).unwrap();
    let odd =
        text.replacen("\"truncation\": null", truncation, 1).replacen("\"truncation\":null", truncation, 1);
    assert_ne!(text, odd);
    std::fs::write(&file, &odd).unwrap();
    assert_eq!(score(&source), plain);
    ok(&["convert", path(&source), path(&out), "--to", "planes"]);
    assert_eq!(std::fs::read_to_string(out.join("tokenizer.json")).unwrap(), odd);
    assert_eq!(score(&out), plain);
}

#[test]
fn weights_that_a_configuration_names_get_the_usual_names() {
    let dir = tempfile::tempdir().unwrap();
    let (source, out, back) = (dir.path().join("s"), dir.path().join("o"), dir.path().join("b"));
    let config = r#"{"model_type": "llama", "transformers_weights": "best.safetensors", "hidden_size": 64}"#;
    checkpoint(&source, config, &tiny_llama()[..1]);
    std::fs::write(source.join("best.safetensors"), support::safetensors(&tiny_llama())).unwrap();
    let left = left_behind(&source, &out);
    assert_eq!(left, ["model.safetensors"]);
    ok(&["verify", path(&out), "--against", path(&source)]);
    ok(&["restore", path(&out), path(&back)]);
    for made in [&out, &back] {
        let config = std::fs::read_to_string(made.join("config.json")).unwrap();
        assert_eq!(config, r#"{"model_type": "llama", "hidden_size": 64}"#);
        assert_eq!(Checkpoint::open(made).unwrap().tensors().len(), tiny_llama().len());
    }
}

#[test]
fn names_never_steer_a_terminal() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("s");
    let name = "evil\u{1b}[2J\u{9b}31m\r\n\u{202e}.weight";
    let mut tensors = tiny_llama();
    tensors.push(t(name, Dtype::BF16, &[64, 64], bf16(3, 4096)));
    checkpoint(&source, LLAMA, &tensors);
    std::fs::write(source.join("ev\u{1b}[2Jil.bin"), "x").unwrap();
    let (out, other) = (dir.path().join("o"), dir.path().join("p"));
    let odd = dir.path().join("no\u{1b}[2Jwhere");
    ok(&["convert", path(&source), path(&out), "--to", "planes", "--quiet"]);
    let commands: [&[&str]; 7] = [
        &["inspect", path(&source), "--tensors"],
        &["plan", path(&source), "--to", "planes", "--tensors"],
        &["convert", path(&source), path(&other), "--to", "dfloat11"],
        &["verify", path(&out), "--against", path(&source)],
        &["diff", path(&source), path(&out)],
        &["inspect", path(&odd)],
        &["inspect", path(&source), "--json"],
    ];
    for command in commands {
        let output = run(command);
        let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        let raw = text.chars().find(|c| (c.is_control() && *c != '\n') || *c == '\u{202e}');
        assert!(raw.is_none() || command.contains(&"--json"), "{command:?}: {raw:?} in {text:?}");
        assert!(!text.contains('\u{1b}'), "{command:?}: {text:?}");
    }
}

#[test]
fn a_tensor_with_the_name_of_the_metadata_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let (source, out, back) = (dir.path().join("s"), dir.path().join("o"), dir.path().join("b"));
    checkpoint(&source, LLAMA, &tiny_llama());
    ok(&["convert", path(&source), path(&out), "--to", "planes"]);
    // A manifest can give a tensor any name; as a plain one it could not be stored.
    let mut manifest = Manifest::read(&out).unwrap().unwrap();
    let entry = manifest.tensors.remove("lm_head.weight").unwrap();
    manifest.units.get_mut(&entry.unit).unwrap().tensors = vec!["__metadata__".to_owned()];
    manifest.tensors.insert("__metadata__".to_owned(), entry);
    std::fs::write(out.join("llmpress.json"), manifest.to_bytes().unwrap()).unwrap();
    let error = fails(&["restore", path(&out), path(&back)]);
    assert!(error.contains("__metadata__") && error.contains("rename"), "{error}");
    assert!(!back.exists());
    // In a header it can only be read as metadata.
    let header = r#"{"__metadata__":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#;
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.bytes().chain([1]));
    std::fs::write(source.join("model.safetensors"), bytes).unwrap();
    let error = fails(&["inspect", path(&source)]);
    assert!(error.contains("model.safetensors") && error.contains("__metadata__"), "{error}");
}

#[test]
fn what_torch_saved_is_stored_run_and_given_back_like_safetensors() {
    let dir = tempfile::tempdir().unwrap();
    let (source, out, back) = (dir.path().join("s"), dir.path().join("o"), dir.path().join("b"));
    let written = Path::new(env!("CARGO_MANIFEST_DIR")).join("../formats/tests/torch/single");
    std::fs::create_dir(&source).unwrap();
    std::fs::copy(written.join("pytorch_model.bin"), source.join("pytorch_model.bin")).unwrap();
    std::fs::write(source.join("config.json"), LLAMA).unwrap();
    std::fs::write(source.join("training_args.bin"), "not weights").unwrap();
    assert!(ok(&["inspect", path(&source)]).contains("F8_E4M3"));
    assert_eq!(left_behind(&source, &out), ["training_args.bin"]);
    ok(&["verify", path(&out), "--against", path(&source)]);
    ok(&["restore", path(&out), path(&back)]);
    let [stored, given_back] = [&source, &back].map(|dir| Checkpoint::open(dir).unwrap());
    assert!(stored.tensors().keys().eq(given_back.tensors().keys()) && stored.tensors().len() > 12);
    for name in stored.tensors().keys() {
        assert!(stored.read_tensor(name).unwrap() == given_back.read_tensor(name).unwrap(), "{name}");
    }
    // Killed and resumed, it is the same job; another file is not.
    ok(&["convert", path(&source), path(&out), "--to", "planes", "--resume"]);
    let mut bytes = std::fs::read(source.join("pytorch_model.bin")).unwrap();
    let (_, at) = stored.units()["of.float32"].position().unwrap();
    bytes[at as usize + 1] ^= 1;
    std::fs::write(source.join("pytorch_model.bin"), bytes).unwrap();
    assert!(!run(&["convert", path(&source), path(&out), "--to", "planes", "--resume"]).status.success());
}
