//! Files of torch, written by torch itself (`torch/make_torch.py`).
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use llmpress_formats::{Checkpoint, Dtype, Encoding, Kind};

fn directory(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/torch").join(name)
}

/// A directory with one file of weights.
fn with_file(bytes: &[u8]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("pytorch_model.bin"), bytes).unwrap();
    dir
}

#[test]
fn every_dtype_is_what_torch_says_of_it() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(directory("single").join("pytorch_model.bin"), dir.path().join("pytorch_model.bin"))
        .unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.kind(), Kind::HuggingFace);
    checkpoint.check_units().unwrap();
    let bytes = std::fs::read(directory("single").join("expected.safetensors")).unwrap();
    let expected = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(checkpoint.tensors().len(), expected.len());
    for (name, view) in expected.tensors() {
        let tensor = checkpoint.tensor(&name).unwrap();
        let shape: Vec<u64> = view.shape().iter().map(|side| *side as u64).collect();
        assert_eq!(
            (tensor.dtype.name(), &tensor.shape),
            (view.dtype().to_string().as_str(), &shape),
            "{name}"
        );
        assert!(checkpoint.read_tensor(&name).unwrap() == view.data(), "{name}");
        let unit = checkpoint.unit_of(tensor).unwrap();
        assert!(
            *unit.encoding() == Encoding::Raw
                && checkpoint.view(&tensor.unit, "data").unwrap() == view.data()
        );
    }
}

#[test]
fn files_are_found_by_their_index_or_their_numbers() {
    let (dir, names) =
        (tempfile::tempdir().unwrap(), ["1", "2"].map(|n| format!("pytorch_model-0000{n}-of-00002.bin")));
    let copy = |name: &str| std::fs::copy(directory("parts").join(name), dir.path().join(name)).unwrap();
    for name in &names {
        copy(name);
    }
    for indexed in [false, true] {
        if indexed {
            copy("pytorch_model.bin.index.json");
        }
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert!(checkpoint.tensors().keys().eq(["a.weight", "b.weight"].iter()));
        assert_eq!(checkpoint.directory().index_file().is_some(), indexed);
    }
    std::fs::remove_file(dir.path().join(&names[1])).unwrap();
    assert!(Checkpoint::open(dir.path()).unwrap_err().to_string().contains("download it"));
    std::fs::remove_file(dir.path().join("pytorch_model.bin.index.json")).unwrap();
    let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("one of 2 parts") && error.contains("download the others"), "{error}");
    // Where there are safetensors, they count.
    let weights = directory("../foreign/awq-g32/model.safetensors");
    std::fs::copy(weights, dir.path().join("model.safetensors")).unwrap();
    assert!(!Checkpoint::open(dir.path()).unwrap().tensors().contains_key("a.weight"));
}

#[test]
fn tensors_that_share_a_storage_are_both_there() {
    let checkpoint = Checkpoint::open(&directory("shared")).unwrap();
    let [a, b] =
        ["model.embed_tokens.weight", "lm_head.weight"].map(|name| checkpoint.read_tensor(name).unwrap());
    assert!(a == b && a.len() == 24);
}

#[test]
fn a_pickle_that_asks_for_anything_but_tensors_is_refused_by_name() {
    for (name, wanted) in [
        ("runs", "asks for posix.system"),
        ("module", "asks for torch.nn.modules.linear.Linear"),
        ("number", "epoch: is an integer"),
        ("nested", "model: is a dict"),
        ("list", "no state dict"),
        ("transposed", "w: has strides [1, 3] for the shape [3, 4]"),
        ("old", "before version 1.6"),
    ] {
        let dir = with_file(&std::fs::read(directory("refused").join(format!("{name}.bin"))).unwrap());
        let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains(wanted) && error.contains("pytorch_model.bin"), "{name}: {error}");
    }
    assert!(!Path::new("/tmp/it-ran").exists());
}

#[test]
fn damaged_files_are_refused_or_read_as_they_are() {
    let whole = std::fs::read(directory("single").join("pytorch_model.bin")).unwrap();
    for len in (0..whole.len()).step_by(97) {
        let dir = with_file(&whole[..len]);
        assert!(Checkpoint::open(dir.path()).is_err(), "{len}");
    }
    // Any byte may be any other: it opens or not, and reads or not.
    for at in (0..whole.len()).step_by(13) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x55;
        let dir = with_file(&bytes);
        if let Ok(checkpoint) = Checkpoint::open(dir.path()) {
            checkpoint.tensors().keys().for_each(|name| drop(checkpoint.read_tensor(name)));
        }
    }
    assert_eq!(Checkpoint::open(with_file(&whole).path()).unwrap().tensors()["rows"].dtype, Dtype::F32);
}
