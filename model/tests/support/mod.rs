//! Checkpoints of the golden architectures in single precision, plain or with a manifest that lists transformations.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use llmpress_formats::{
    Checkpoint, ComponentEntry, Digest, Directory, Dtype, FileEntry, MANIFEST_FILE, Manifest, Producer,
    Source, TensorEntry, Transform, UnitEntry,
};
use llmpress_model::{Model, Panels, Skips, Unobserved};
use safetensors::tensor::TensorView;

pub(crate) type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// Every golden architecture that can be transformed.
pub(crate) fn goldens() -> Vec<PathBuf> {
    let mut dirs = all_goldens();
    dirs.retain(|dir| open(dir).config().blueprint.special().is_none());
    dirs
}

/// Every golden architecture.
pub(crate) fn all_goldens() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/golden");
    let mut dirs: Vec<PathBuf> =
        std::fs::read_dir(root).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_dir()).collect();
    dirs.sort();
    assert!(dirs.len() >= 20, "{dirs:?}");
    dirs
}

pub(crate) fn open(dir: &Path) -> Model {
    Model::open(Arc::new(Checkpoint::open(dir).unwrap())).unwrap()
}

/// All tensors of a checkpoint, which are F32, BF16 or F16, in single precision.
pub(crate) fn tensors(checkpoint: &Checkpoint) -> Tensors {
    let values = |name: &String, dtype: Dtype| -> Vec<f32> {
        let bytes = checkpoint.read_tensor(name).unwrap();
        match dtype {
            Dtype::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
            Dtype::BF16 => {
                let word = |b: &[u8]| u32::from(u16::from_le_bytes(b.try_into().unwrap()));
                bytes.chunks_exact(2).map(|b| f32::from_bits(word(b) << 16)).collect()
            }
            other => panic!("{other:?}"),
        }
    };
    let of = |(name, t): (&String, &llmpress_formats::Tensor)| {
        let shape = t.shape.iter().map(|&n| n as usize).collect();
        (name.clone(), (shape, values(name, t.dtype)))
    };
    checkpoint.tensors().iter().map(of).collect()
}

/// Writes `tensors` with the configuration of `like`; with a manifest where there are transformations.
pub(crate) fn write(dir: &Path, like: &Path, tensors: &Tensors, transforms: &[Transform]) {
    std::fs::create_dir_all(dir).unwrap();
    std::fs::copy(like.join("config.json"), dir.join("config.json")).unwrap();
    let bytes: BTreeMap<&String, Vec<u8>> =
        tensors.iter().map(|(n, (_, v))| (n, v.iter().flat_map(|v| v.to_le_bytes()).collect())).collect();
    let views = tensors.iter().map(|(name, (shape, _))| {
        (name, TensorView::new(safetensors::Dtype::F32, shape.clone(), &bytes[name]).unwrap())
    });
    let shard = "model.safetensors";
    safetensors::serialize_to_file(views, None, &dir.join(shard)).unwrap();
    if transforms.is_empty() {
        return;
    }
    let tied = Checkpoint::open(dir).unwrap().tied().clone();
    let directory = Directory::open(dir).unwrap();
    let config = std::fs::read(dir.join("config.json")).unwrap();
    let file = FileEntry { bytes: config.len() as u64, blake3: Digest::of(&config) };
    let entry = |name: &String| TensorEntry {
        dtype: Dtype::F32,
        shape: tensors[name].0.iter().map(|&n| n as u64).collect(),
        unit: name.clone(),
        blake3: Digest::of(&bytes[name]),
    };
    let unit = |name: &String| UnitEntry {
        encoding: serde_json::json!({"name": "raw"}).into(),
        tensors: vec![name.clone()],
        components: BTreeMap::from([(
            "data".to_owned(),
            ComponentEntry { tensor: name.clone(), blake3: Digest::of(&bytes[name]) },
        )])
        .into(),
        fallback: None,
    };
    let manifest = Manifest {
        format_version: "1.2".to_owned(),
        requires: Transform::requirements(transforms),
        producer: Producer { name: "test".to_owned(), version: "0".to_owned(), revision: None },
        source: Source {
            name: "source".to_owned(),
            kind: "huggingface".to_owned(),
            shards: BTreeMap::new(),
            files: BTreeMap::new(),
        },
        base: None,
        recipe: serde_json::json!({"to": "raw"}),
        tensors: tensors.keys().map(|name| (name.clone(), entry(name))).collect(),
        units: tensors.keys().map(|name| (name.clone(), unit(name))).collect(),
        tied,
        dropped: BTreeMap::new(),
        shards: BTreeMap::from([(shard.to_owned(), directory.shards()[0].entry().unwrap())]),
        files: BTreeMap::from([("config.json".to_owned(), file)]),
        transforms: transforms.iter().map(|t| serde_json::to_value(t).unwrap()).collect(),
        manifest_blake3: Digest([0; 32]),
    };
    std::fs::write(dir.join(MANIFEST_FILE), manifest.to_bytes().unwrap()).unwrap();
}

/// The golden checkpoint in single precision, and the ids of its text.
pub(crate) fn single(golden: &Path, dir: &Path) -> Vec<u32> {
    write(dir, golden, &tensors(&Checkpoint::open(golden).unwrap()), &[]);
    let bytes = std::fs::read(golden.join("golden.safetensors")).unwrap();
    let ids = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let ids = ids.tensor("input_ids").unwrap();
    ids.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as u32).collect()
}

/// A row of logits a token.
pub(crate) fn logits(model: &Model, ids: &[u32]) -> Vec<f32> {
    let mut cache = model.cache(ids.len());
    let hidden = model.hidden(ids, &mut cache, &Skips::new(), &mut Unobserved).unwrap();
    let logits: Panels = model.logits(&hidden).unwrap();
    (0..ids.len()).flat_map(|t| logits.token(t).collect::<Vec<f32>>()).collect()
}

/// The largest difference as a share of the largest |value|.
pub(crate) fn worst(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let largest = b.iter().fold(0f32, |a, b| a.max(b.abs()));
    a.iter()
        .zip(b)
        .map(|(a, b)| (a - b).abs() / largest)
        .fold(0.0, |a, b| if b > a || b.is_nan() { b } else { a })
}
