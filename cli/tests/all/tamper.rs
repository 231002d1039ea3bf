//! `verify` finds any wrong byte in any file of a converted directory, and names the file.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use crate::support::{self, files, llmpress, ok, path, random};
#[test]
fn any_single_flipped_byte_is_found_and_named() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    support::checkpoint(&source, support::LLAMA, &support::tiny_llama());
    std::fs::write(source.join("tokenizer.json"), "{\"version\": \"1.0\"}").unwrap();
    let mut next = random(1);
    let mut flips = 0;
    for method in ["dfloat11", "fixed12", "planes", "archive"] {
        let out = dir.path().join(method);
        ok(&["convert", path(&source), path(&out), "--to", method, "--max-shard-size", "100K"]);
        ok(&["verify", path(&out)]);
        for (name, content) in files(&out) {
            let file = out.join(&name);
            // Some of each part of a file: the start, the header, the data, the end.
            let mut places: Vec<usize> = (0..30).map(|_| next() as usize % content.len()).collect();
            places
                .extend([0, 7, 8, 9, content.len() / 2, content.len() - 1].map(|p| p.min(content.len() - 1)));
            for place in places {
                let mut changed = content.clone();
                changed[place] ^= 1 << (next() % 8);
                std::fs::write(&file, &changed).unwrap();
                let output = llmpress().args(["verify", path(&out), "--no-decode"]).output().unwrap();
                let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
                assert_eq!(output.status.code(), Some(1), "{name} byte {place}: {text}");
                assert!(!text.contains("panicked"), "{name} byte {place}: {text}");
                assert!(text.contains(&name), "{name} byte {place} is not named: {text}");
                flips += 1;
            }
            std::fs::write(&file, &content).unwrap();
        }
        ok(&["verify", path(&out)]);
    }
    assert!(flips > 400, "{flips}");
}

#[test]
fn a_wrong_byte_never_becomes_a_wrong_restored_tensor() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    support::checkpoint(&source, support::LLAMA, &support::tiny_llama());
    let mut next = random(2);
    for method in ["dfloat11", "fixed12", "planes", "archive"] {
        let out = dir.path().join(method);
        ok(&["convert", path(&source), path(&out), "--to", method]);
        let file = out.join("model-00001-of-00001.safetensors");
        let content = std::fs::read(&file).unwrap();
        for _ in 0..25 {
            let mut changed = content.clone();
            let place = next() as usize % content.len();
            changed[place] ^= 1 << (next() % 8);
            std::fs::write(&file, &changed).unwrap();
            let back = dir.path().join("back");
            let output = llmpress().args(["restore", path(&out), path(&back), "--quiet"]).output().unwrap();
            if output.status.success() {
                // The byte was one that decoding does not need.
                ok(&["verify", path(&back), "--against", path(&source)]);
            }
            let _ = std::fs::remove_dir_all(&back);
        }
        std::fs::write(&file, &content).unwrap();
    }
}

#[test]
fn missing_and_added_files_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let (source, out) = (dir.path().join("source"), dir.path().join("out"));
    support::checkpoint(&source, support::LLAMA, &support::tiny_llama());
    std::fs::write(source.join("tokenizer.json"), "{}").unwrap();
    ok(&["convert", path(&source), path(&out), "--to", "planes"]);
    std::fs::write(out.join("notes.txt"), "mine").unwrap();
    assert!(ok(&["verify", path(&out)]).contains("unknown file, not checked: notes.txt"));
    std::fs::remove_file(out.join("tokenizer.json")).unwrap();
    let output = llmpress().args(["verify", path(&out)]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stdout).contains("FAULT tokenizer.json: cannot be opened"));
    let plain = support::fails(&["verify", path(&source)]);
    assert!(plain.contains("has no llmpress.json"), "{plain}");
}
