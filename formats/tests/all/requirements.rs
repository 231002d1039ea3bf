//! What a manifest requires of its readers, and what it says was done to the weights.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::path::Path;

use llmpress_formats::{Checkpoint, Error, MANIFEST_FILE, Manifest, Result, Transform};
use serde_json::{Value, json};

/// A golden directory whose manifest says so.
fn opened(transforms: Value, requires: &[&str]) -> Result<Checkpoint> {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/1.1/planes");
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(&golden).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    let mut manifest = Manifest::read(dir.path()).unwrap().unwrap();
    manifest.transforms = serde_json::from_value(transforms).unwrap();
    manifest.requires = requires.iter().map(|name| (*name).to_owned()).collect();
    std::fs::write(dir.path().join(MANIFEST_FILE), manifest.to_bytes().unwrap()).unwrap();
    Checkpoint::open(dir.path())
}

fn refused(transforms: Value, requires: &[&str]) -> Error {
    opened(transforms, requires).expect_err("is refused")
}

#[test]
fn what_a_reader_does_not_know_and_is_required_is_refused_by_name() {
    let error = refused(json!([]), &["transforms", "telepathy"]);
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    assert!(
        error.to_string().contains("\"telepathy\"") && error.to_string().contains("newer llmpress"),
        "{error}"
    );
    assert!(opened(json!([]), &["transforms"]).is_ok());
    let error = refused(json!([{"kind": "reflection", "site": "residual"}]), &["transforms"]);
    assert!(
        matches!(error, Error::Unsupported { .. }) && error.to_string().contains("\"reflection\""),
        "{error}"
    );
}

#[test]
fn an_online_transformation_must_be_required() {
    let rotation =
        |site: &str| json!([{"kind": "rotation", "site": site, "size": 8, "factors": [4], "seed": 1}]);
    assert!(refused(rotation("down"), &[]).to_string().contains("requires"));
    let online = opened(rotation("residual"), &["transforms"]).unwrap();
    assert_eq!(online.transforms().iter().map(Transform::name).collect::<Vec<_>>(), ["rotation of residual"]);
    assert_eq!(opened(rotation("value"), &[]).unwrap().transforms().len(), 1, "folded: nothing to do");
    assert!(opened(json!([]), &[]).unwrap().transforms().is_empty());
}

#[test]
fn an_encoding_that_is_not_known_is_refused_by_name_also_inside_of_another() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/1.1/planes");
    let manifest = Manifest::read(&golden).unwrap().unwrap();
    let (name, entry) = manifest.units.first_key_value().unwrap();
    let refused = |encoding: Value| {
        let entry = llmpress_formats::UnitEntry { encoding: encoding.into(), ..entry.clone() };
        entry.encoding(&golden, name).expect_err("is refused")
    };
    for encoding in [
        json!({"name": "braid"}),
        json!({"name": "sparse24", "values": {"name": "braid"}}),
        json!({"name": "lowrank", "block": 16, "base": {"name": "braid"}}),
        json!({"name": "lowrank", "block": 16, "base": {"name": "raw"}, "sums": {"name": "braid"}}),
        json!({"name": "lowrank", "block": 16, "base": {"name": "sparse24", "values": {"name": "braid"}}}),
    ] {
        let error = refused(encoding.clone());
        assert!(matches!(error, Error::Unsupported { .. }), "{encoding}: {error}");
        assert!(error.to_string().contains("\"braid\""), "{error}");
    }
    // What is known, but not there, breaks the format.
    for encoding in [
        json!({"name": "sparse24", "values": {"name": "planes", "rotate": true}}),
        json!({"name": "lowrank", "block": 16, "base": {"name": "lowrank", "block": 16, "base": {"name": "raw"}}}),
    ] {
        let error = refused(encoding.clone());
        assert_eq!(error.kind(), "corrupt", "{encoding}: {error}");
    }
}
