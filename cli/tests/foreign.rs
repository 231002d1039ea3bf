//! Checkpoints that other tools quantised: their codes are taken over, or their numbers given back.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

mod support;

use std::path::{Path, PathBuf};

use llmpress_formats::{Checkpoint, Encoding};
use support::{LLAMA, checkpoint, fails, ok, path, tiny_llama};

const WEIGHT: &str = "model.layers.0.self_attn.q_proj.weight";

/// The checkpoints that those tools wrote, without what they decode to.
fn sources(dir: &Path) -> Vec<(String, PathBuf, Vec<u8>)> {
    let written = Path::new(env!("CARGO_MANIFEST_DIR")).join("../formats/tests/foreign");
    let mut sources = Vec::new();
    for entry in std::fs::read_dir(&written).unwrap().map(Result::unwrap).filter(|e| e.path().is_dir()) {
        let name = entry.file_name().into_string().unwrap();
        let source = dir.join(&name);
        std::fs::create_dir(&source).unwrap();
        for file in ["config.json", "model.safetensors"] {
            std::fs::copy(entry.path().join(file), source.join(file)).unwrap();
        }
        let expected = std::fs::read(entry.path().join("expected.safetensors")).unwrap();
        let expected =
            safetensors::SafeTensors::deserialize(&expected).unwrap().tensor(WEIGHT).unwrap().data().to_vec();
        sources.push((name, source, expected));
    }
    assert!(sources.len() >= 10);
    sources
}

#[test]
fn codes_are_taken_over_without_changing_a_number() {
    let dir = tempfile::tempdir().unwrap();
    for (name, source, expected) in sources(dir.path()) {
        let (out, back) = (dir.path().join(format!("{name}-out")), dir.path().join(format!("{name}-back")));
        ok(&["convert", path(&source), path(&out), "--to", "abq"]);
        ok(&["verify", path(&out)]);
        ok(&["verify", path(&out), "--against", path(&source)]);
        let converted = Checkpoint::open(&out).unwrap();
        assert!(converted.read_tensor(WEIGHT).unwrap() == expected, "{name}");
        let unit = converted.unit_of(converted.tensor(WEIGHT).unwrap()).unwrap();
        // Columns that are spread over groups have no home there.
        assert_eq!(matches!(unit.encoding(), Encoding::Abq(_)), name != "gptq-act-order", "{name}");
        let manifest = std::fs::read_to_string(out.join("llmpress.json")).unwrap();
        assert_eq!(manifest.contains("act-order"), name == "gptq-act-order", "{name}");
        for config in [&out, &back] {
            if config == &back {
                ok(&["restore", path(&source), path(&back)]);
            }
            assert!(
                !std::fs::read_to_string(config.join("config.json")).unwrap().contains("quantization_config")
            );
        }
        assert!(Checkpoint::open(&back).unwrap().read_tensor(WEIGHT).unwrap() == expected, "{name}");
        ok(&["diff", path(&back), path(&source)]);
    }
}

#[test]
fn whoever_only_stores_tensors_gets_them_back_as_the_tool_packed_them() {
    let dir = tempfile::tempdir().unwrap();
    for (name, source, _) in sources(dir.path()) {
        let (out, back) = (dir.path().join(format!("{name}-out")), dir.path().join(format!("{name}-back")));
        ok(&["convert", path(&source), path(&out), "--to", "planes"]);
        ok(&["verify", path(&out), "--against", path(&source)]);
        ok(&["restore", path(&out), path(&back)]);
        ok(&["verify", path(&back), "--against", path(&source)]);
        let [a, b] = [&source, &back].map(|dir| std::fs::read(dir.join("config.json")).unwrap());
        assert!(a == b && Checkpoint::open(&back).unwrap().tensors().len() > 2, "{name}");
    }
}

#[test]
fn abq_without_widths_is_for_what_is_quantised_already() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("s");
    checkpoint(&source, LLAMA, &tiny_llama());
    let error = fails(&["convert", path(&source), path(&dir.path().join("o")), "--to", "abq"]);
    assert!(error.contains("abq:w4"), "{error}");
    assert!(!dir.path().join("o").exists());
}
