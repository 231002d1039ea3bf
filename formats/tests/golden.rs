//! Checkpoints of every released version must open and decode to the same bytes for good.
//!
//! `golden/<version>/<encoding>` was written by that version; its manifest holds the digests of the original
//! tensors. `golden/write VERSION` adds those of a new version.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use llmpress_formats::{Checkpoint, Digest, Kind};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

#[test]
fn every_released_version_still_decodes() {
    let source = Checkpoint::open(&golden().join("source")).unwrap();
    let mut checked = 0;
    for version in ["1.0", "1.1"] {
        for encoding in ["dfloat11", "fixed12", "planes"] {
            let checkpoint = Checkpoint::open(&golden().join(version).join(encoding)).unwrap();
            let manifest = checkpoint.manifest().unwrap();
            assert!(manifest.format_version.starts_with("1."));
            assert!(checkpoint.units().values().any(|u| u.encoding().name() == encoding));
            assert!(checkpoint.tensors().keys().eq(source.tensors().keys()));
            for (name, entry) in &manifest.tensors {
                let bytes = checkpoint.read_tensor(name).unwrap();
                assert_eq!(Digest::of(&bytes), entry.blake3, "{version} {encoding} {name}");
                assert!(bytes == source.read_tensor(name).unwrap(), "{version} {encoding} {name}");
                checked += 1;
            }
        }
    }
    assert!(checked > 30, "{checked}");
}

#[test]
fn an_official_directory_opens_without_a_manifest() {
    // As the official packer lays it out: units in files of their own that an index does not list.
    let dir = tempfile::tempdir().unwrap();
    let golden_dir = golden().join("1.0/dfloat11");
    for entry in std::fs::read_dir(&golden_dir).unwrap() {
        let path = entry.unwrap().path();
        if path.file_name().unwrap() != "llmpress.json" {
            std::fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
        }
    }
    let index = r#"{"weight_map": {"model.layers.0.input_layernorm.weight": "elsewhere.safetensors"}}"#;
    std::fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.kind(), Kind::Dfloat11);
    let source = Checkpoint::open(&golden().join("source")).unwrap();
    for (name, tensor) in source.tensors() {
        let other = checkpoint.tensor(name).unwrap();
        assert_eq!((other.dtype, &other.shape), (tensor.dtype, &tensor.shape), "{name}");
        assert!(checkpoint.read_tensor(name).unwrap() == source.read_tensor(name).unwrap(), "{name}");
    }
}
