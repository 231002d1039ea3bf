//! `verify` believes no claim of a manifest that it can look at, and opens nothing outside of the directory.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::path::Path;
use std::time::{Duration, Instant};

use crate::support::{self, checkpoint, files, llmpress, ok, path, tiny_llama, tinylm};
use llmpress_formats::{Digest, FileEntry, Manifest};

/// Rewrites a manifest with its own digest right again.
fn change(dir: &Path, change: impl FnOnce(&mut Manifest)) {
    let mut manifest = Manifest::read(dir).unwrap().unwrap();
    change(&mut manifest);
    std::fs::write(dir.join("llmpress.json"), manifest.to_bytes().unwrap()).unwrap();
}

/// Everything `verify` says, which must be exit 1 and soon.
fn found(dir: &Path, more: &[&str]) -> String {
    let start = Instant::now();
    let mut child = llmpress()
        .args([&["verify", path(dir)], more].concat())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    while child.try_wait().unwrap().is_none() {
        if start.elapsed() > Duration::from_secs(60) {
            child.kill().unwrap();
            panic!("verify hangs");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(!text.contains("panicked"), "{text}");
    text
}

/// A converted directory, made anew for each damage.
struct Made {
    dir: tempfile::TempDir,
}

impl Made {
    fn new(recipe: Option<&str>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (source, out) = (dir.path().join("source"), dir.path().join("whole"));
        match recipe {
            None => {
                checkpoint(&source, support::LLAMA, &tiny_llama());
                std::fs::write(source.join("tokenizer.json"), "{}").unwrap();
                ok(&["convert", path(&source), path(&out), "--to", "planes"]);
            }
            Some(recipe) => {
                let file = dir.path().join("recipe.toml");
                std::fs::write(&file, recipe).unwrap();
                ok(&["convert", path(&tinylm()), path(&out), "--recipe", path(&file)]);
            }
        }
        ok(&["verify", path(&out)]);
        Self { dir }
    }

    /// What is found after a change of the manifest and of the directory.
    fn with(&self, manifest: impl FnOnce(&mut Manifest), directory: impl FnOnce(&Path)) -> String {
        let out = self.dir.path().join("out");
        let _ = std::fs::remove_dir_all(&out);
        std::fs::create_dir(&out).unwrap();
        for (name, content) in files(&self.dir.path().join("whole")) {
            std::fs::write(out.join(name), content).unwrap();
        }
        change(&out, manifest);
        directory(&out);
        found(&out, &[])
    }
}

fn wants(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "{word:?} is not in: {text}");
    }
}

#[test]
fn nothing_outside_of_the_directory_is_opened() {
    let made = Made::new(None);
    let outside = made.dir.path().join("outside");
    std::fs::write(&outside, "x").unwrap();
    let entry = FileEntry { bytes: 1, blake3: Digest::of(b"x") };
    for name in ["../outside", path(&outside), "/etc/passwd", "..", ".", "", "a/b", "a\\b"] {
        let text = made.with(
            |m| {
                let _ = m.files.insert(name.to_owned(), entry.clone());
            },
            |_| {},
        );
        wants(&text, &["which is not a file of its directory"]);
        let shard = |m: &mut Manifest| {
            let first = m.shards.first_key_value().unwrap().1.clone();
            m.shards.insert(name.to_owned(), first);
        };
        wants(&made.with(shard, |_| {}), &["which is not a file of its directory"]);
    }
}

#[test]
fn a_fifo_is_a_fault_and_not_a_wait() {
    let made = Made::new(None);
    for name in ["tokenizer.json", "config.json", "model-00001-of-00001.safetensors", "llmpress.json"] {
        let text = made.with(
            |_| {},
            |dir| {
                std::fs::remove_file(dir.join(name)).unwrap();
                assert!(std::process::Command::new("mkfifo").arg(dir.join(name)).status().unwrap().success());
            },
        );
        wants(&text, &[name, "is not a file"]);
    }
}

#[test]
fn files_that_the_manifest_leaves_out_are_found() {
    let made = Made::new(None);
    let shard = "model-00001-of-00001.safetensors";
    wants(
        &made.with(
            |m| {
                let _ = m.shards.remove(shard);
            },
            |_| {},
        ),
        &["FAULT", shard, "is not listed"],
    );
    for name in ["config.json", "tokenizer.json", "model.safetensors.index.json"] {
        wants(
            &made.with(
                |m| {
                    let _ = m.files.remove(name);
                },
                |_| {},
            ),
            &["FAULT", name, "is not listed"],
        );
    }
    for name in ["config.json", "tokenizer.json"] {
        let gone = |dir: &Path| std::fs::remove_file(dir.join(name)).unwrap();
        let text = made.with(
            |m| {
                let _ = m.files.remove(name);
            },
            gone,
        );
        wants(&text, &["FAULT", name, "which the source had"]);
    }
    // A template that came later decides what the model is told.
    let added = |dir: &Path| std::fs::write(dir.join("chat_template.jinja"), "x").unwrap();
    wants(&made.with(|_| {}, added), &["FAULT chat_template.jinja", "is not listed"]);
}

#[test]
fn false_ties_are_found() {
    let made = Made::new(None);
    let tie = |m: &mut Manifest| {
        m.tied.insert("model.embed_tokens.weight".to_owned(), "lm_head.weight".to_owned());
    };
    wants(&made.with(tie, |_| {}), &["FAULT", "model.embed_tokens.weight", "is said to be tied"]);
    let made = Made::new(Some("to = \"raw\""));
    let untie = |m: &mut Manifest| m.tied.clear();
    wants(
        &made.with(untie, |_| {}),
        &["FAULT", "lm_head.weight", "is tied, but the manifest does not say so"],
    );
    let other = |m: &mut Manifest| {
        m.tied.insert("lm_head.weight".to_owned(), "model.norm.weight".to_owned());
    };
    wants(&made.with(other, |_| {}), &["FAULT", "lm_head.weight", "is said to be tied to model.norm.weight"]);
}

#[test]
fn false_prunings_are_found() {
    let plain = Made::new(Some("to = \"raw\""));
    let claim = |prune: &str| {
        let prune: serde_json::Value = serde_json::from_str(prune).unwrap();
        move |m: &mut Manifest| m.recipe["prune"] = prune
    };
    for (prune, words) in [
        (r#"{"attention": [2]}"#, "none of its tensors is among those that were left out"),
        (r#"{"mlp": [2]}"#, "the MLP of layer 2"),
        (r#"{"attention": [2], "mlp": [2]}"#, "none of its tensors"),
        (r#"{"attention": [2], "portable": true}"#, "is not zero"),
        (r#"{"attention": [99], "portable": true}"#, "no last product"),
        (r#"{"attention": "two"}"#, "recipe: prune"),
    ] {
        wants(&plain.with(claim(prune), |_| {}), &["FAULT", words]);
    }
    let unprune = |m: &mut Manifest| drop(m.recipe.as_object_mut().unwrap().remove("prune"));
    let dropped = Made::new(Some("to = \"raw\"\n[prune]\nattention = [6, 7]\n"));
    wants(&dropped.with(unprune, |_| {}), &["FAULT", "is said to be pruned, but the recipe does not say so"]);
    wants(&dropped.with(claim(r#"{"attention": [5, 6, 7]}"#), |_| {}), &["FAULT", "layer 5 was pruned"]);
    wants(&dropped.with(claim(r#"{"attention": [7]}"#), |_| {}), &["FAULT", "is said to be pruned"]);
    let forget = |m: &mut Manifest| m.dropped.clear();
    wants(&dropped.with(forget, |_| {}), &["FAULT", "none of its tensors is among"]);
    for recipe in ["attention = [7]\nmlp = [7]", "attention = [3]\nportable = true", "mlp = [0, 1]"] {
        let made = Made::new(Some(&format!("to = \"planes\"\n[prune]\n{recipe}\n")));
        wants(&made.with(claim(r#"{"attention": [1]}"#), |_| {}), &["FAULT"]);
        // A later conversion keeps what is true.
        let (out, again) = (made.dir.path().join("whole"), made.dir.path().join("again"));
        ok(&["convert", path(&out), path(&again), "--to", "fixed12"]);
        ok(&["verify", path(&again)]);
    }
}

#[test]
fn false_prunings_of_a_chain_are_found() {
    // Layer 4 of what the first pass leaves is layer 5 of the source, and layer 2 layer 3.
    let chain = "to = \"planes\"\npasses = [{ prune = { attention = [1], mlp = [1] } }, { prune = { attention = [4] } }, \
                 { prune = { mlp = [2], portable = true } }]\n";
    let made = Made::new(Some(chain));
    let claim = |pass: usize, prune: serde_json::Value| {
        move |m: &mut Manifest| m.recipe["passes"][pass]["prune"] = prune
    };
    for (pass, prune, words) in [
        (0, serde_json::json!({"attention": [2], "mlp": [2]}), "layer 2 was pruned"),
        (1, serde_json::json!({"attention": [5]}), "attention of layer 6 was pruned"),
        (2, serde_json::json!({"mlp": [3], "portable": true}), "MLP of layer 4 was pruned"),
        (2, serde_json::json!({"mlp": "two"}), "recipe: prune"),
    ] {
        wants(&made.with(claim(pass, prune), |_| {}), &["FAULT", words]);
    }
    let forget = |m: &mut Manifest| drop(m.recipe.as_object_mut().unwrap().remove("passes"));
    wants(&made.with(forget, |_| {}), &["FAULT", "is said to be pruned, but the recipe does not say so"]);
    // A later conversion keeps what is true.
    let (out, again) = (made.dir.path().join("whole"), made.dir.path().join("again"));
    ok(&["convert", path(&out), path(&again), "--to", "fixed12"]);
    ok(&["verify", path(&again)]);
}
