//! Checkpoints of every released version must open and decode to the same bytes for good.
//!
//! `golden/<version>/<encoding>` was written by that version; its manifest holds the digests of the original
//! tensors. `golden/write VERSION` adds those of a new version.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use llmpress_formats::{Base, Checkpoint, Digest, Encoding, Kind, QuantizeSite, Transform};

/// Versions that have quantised and transformed checkpoints.
const WITH_ABQ: [&str; 4] = ["1.2", "1.3", "1.4", "1.5"];
/// Versions that have matrices of two in four.
const WITH_SPARSE: [&str; 3] = ["1.3", "1.4", "1.5"];
/// Versions that have `archive`.
const WITH_ARCHIVE: [&str; 2] = ["1.4", "1.5"];
/// Versions that have tensors stored by a base, and by others.
const WITH_DELTA: [&str; 1] = ["1.5"];

/// Versions that have `dfloat8`.
const WITH_DFLOAT8: [&str; 1] = ["1.5"];

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

#[test]
fn every_released_version_still_decodes() {
    let source = Checkpoint::open(&golden().join("source")).unwrap();
    let mut checked = 0;
    for version in ["1.0", "1.1", "1.2", "1.3", "1.4", "1.5"] {
        let more = WITH_ARCHIVE.contains(&version).then_some("archive");
        for encoding in ["dfloat11", "fixed12", "planes"].into_iter().chain(more) {
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
fn differences_from_a_base_of_every_released_version_still_decode() {
    let base = Base::open(&golden().join("source")).unwrap();
    let tuned = Checkpoint::open(&golden().join("tuned")).unwrap();
    for version in WITH_DELTA {
        let stored =
            Checkpoint::open(&golden().join(version).join("delta")).unwrap().with_base(&base).unwrap();
        let manifest = stored.manifest().unwrap();
        assert_eq!(manifest.base.as_ref().unwrap().name, "source");
        assert!(stored.tensors().keys().eq(tuned.tensors().keys()));
        let mut forms = std::collections::BTreeSet::new();
        for (name, entry) in &manifest.tensors {
            let bytes = stored.read_tensor(name).unwrap();
            assert!(bytes == tuned.read_tensor(name).unwrap(), "{version} {name}");
            assert_eq!(Digest::of(&bytes), entry.blake3, "{version} {name}");
            forms.insert(match stored.units()[name].encoding() {
                Encoding::Delta(delta) if delta.coded.is_some() => "difference",
                Encoding::Delta(_) => "equal",
                other => other.name(),
            });
        }
        assert!(
            ["difference", "equal", "planes", "same"].iter().all(|form| forms.contains(form)),
            "{forms:?}"
        );
    }
}

#[test]
fn fp8_of_every_released_version_still_decodes() {
    let source = Checkpoint::open(&golden().join("source8")).unwrap();
    for version in WITH_DFLOAT8 {
        let checkpoint = Checkpoint::open(&golden().join(version).join("dfloat8")).unwrap();
        let of = |name| checkpoint.unit_of(checkpoint.tensor(name).unwrap()).unwrap().encoding().name();
        assert_eq!(["a.weight", "norm.weight"].map(of), ["dfloat8", "raw"]);
        assert!(checkpoint.tensors().keys().eq(source.tensors().keys()));
        for (name, entry) in &checkpoint.manifest().unwrap().tensors {
            let bytes = checkpoint.read_tensor(name).unwrap();
            assert!(bytes == source.read_tensor(name).unwrap(), "{version} {name}");
            assert_eq!(Digest::of(&bytes), entry.blake3, "{version} {name}");
        }
    }
}

#[test]
fn quantised_matrices_of_every_released_version_stand_for_the_same_numbers() {
    for version in WITH_ABQ {
        let directory = golden().join(version);
        // The numbers lie in a plain file: nothing that reads codes has a part in them.
        let expected = std::fs::read(directory.join("abq.expected")).unwrap();
        let expected = safetensors::SafeTensors::deserialize(&expected).unwrap();
        let source = Checkpoint::open(&golden().join("source")).unwrap();
        for (form, codes) in [("abq", "planes"), ("coded", "codes")] {
            let checkpoint = Checkpoint::open(&directory.join(form)).unwrap();
            let manifest = checkpoint.manifest().unwrap();
            assert!(checkpoint.tensors().keys().map(String::as_str).eq(sorted(expected.names())));
            let (mut forms, mut stored_so) = (std::collections::BTreeSet::new(), 0);
            for (name, entry) in &manifest.tensors {
                let bytes = checkpoint.read_tensor(name).unwrap();
                assert!(bytes == expected.tensor(name).unwrap().data(), "{version} {form} {name}");
                assert_eq!(Digest::of(&bytes), entry.blake3, "{version} {form} {name}");
                let unit = checkpoint.unit_of(checkpoint.tensor(name).unwrap()).unwrap();
                if let Encoding::Abq(abq) = unit.encoding() {
                    let has = |name: &str| unit.components().contains_key(name);
                    forms.insert((abq.widths(), ["offset", "zero"].into_iter().find(|name| has(name))));
                    stored_so += usize::from(has(codes));
                } else {
                    assert!(bytes == source.read_tensor(name).unwrap(), "{version} {form} {name}");
                }
            }
            let all = [
                ("w1*,g32", None),
                ("w1", Some("zero")),
                ("w2*a4", Some("offset")),
                ("w2,g96", Some("offset")),
                ("w3a8,g32", Some("offset")),
                ("w4", None),
                ("w5,g32", Some("zero")),
                ("w8a8", None),
            ];
            let all = all.map(|(widths, zero)| (widths.to_owned(), zero));
            assert_eq!(forms, all.into_iter().collect(), "every form that there is");
            assert!(stored_so > 2, "{form}: {stored_so}");
        }
    }
}

fn sorted(mut names: Vec<&str>) -> Vec<&str> {
    names.sort_unstable();
    names
}

#[test]
fn transformed_checkpoints_of_every_released_version_open() {
    for version in WITH_ABQ {
        let checkpoint = Checkpoint::open(&golden().join(version).join("transformed")).unwrap();
        let manifest = checkpoint.manifest().unwrap();
        assert_eq!(manifest.requires, ["transforms"]);
        let said = [
            "scale of attention_norm in 2 layers",
            "scale of mlp_norm in 2 layers",
            "rotation of residual",
            "rotation of value",
            "rotation of down",
            "quantize of qkv",
        ];
        assert_eq!(Transform::summary(checkpoint.transforms()), said);
        for (name, entry) in &manifest.tensors {
            assert_eq!(Digest::of(&checkpoint.read_tensor(name).unwrap()), entry.blake3, "{version} {name}");
        }
    }
}

#[test]
fn checkpoints_with_a_quantised_cache_of_every_released_version_open() {
    for version in WITH_ABQ {
        let checkpoint = Checkpoint::open(&golden().join(version).join("cached")).unwrap();
        assert_eq!(checkpoint.manifest().unwrap().requires, ["transforms"]);
        assert_eq!(checkpoint.transforms(), [Transform::Quantize { site: QuantizeSite::Cache, bits: 8 }]);
    }
}

#[test]
fn matrices_of_two_in_four_of_every_released_version_decode_to_the_same_bytes() {
    let source = Checkpoint::open(&golden().join("source24")).unwrap();
    for version in WITH_SPARSE {
        let mut forms = std::collections::BTreeSet::new();
        for form in ["sparse24", "sparse24-abq", "lowrank", "lowrank-abq"] {
            let checkpoint = Checkpoint::open(&golden().join(version).join(form)).unwrap();
            for (name, entry) in &checkpoint.manifest().unwrap().tensors {
                let bytes = checkpoint.read_tensor(name).unwrap();
                assert_eq!(Digest::of(&bytes), entry.blake3, "{version} {form} {name}");
                if form == "sparse24" {
                    assert!(bytes == source.read_tensor(name).unwrap(), "{version} {name}");
                }
                let unit = checkpoint.unit_of(checkpoint.tensor(name).unwrap()).unwrap();
                forms.extend(unit.encoding().widths());
            }
        }
        let all = ["2:4", "2:4+s16", "2:4,fixed12", "2:4,w3+s16,w8", "2:4,w4,g32"];
        assert_eq!(forms.into_iter().collect::<Vec<_>>(), all, "every form that there is");
    }
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
