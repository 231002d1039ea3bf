//! Checkpoints whose matrices are rounded to codes of a few bits.

use std::collections::BTreeMap;
use std::path::Path;

use llmpress_formats::encoding::abq::{Abq, Floats, Packed, Zero};
use llmpress_formats::{
    Checkpoint, ComponentEntry, Digest, Dtype, FileEntry, Manifest, Producer, ShardEntry, Source,
    TensorEntry, UnitEntry,
};
use safetensors::tensor::TensorView;
use serde_json::json;

/// Rounds a matrix to the nearest codes of each group, with real zeros.
fn rounded(abq: Abq, weights: &[f32], cols: usize) -> Packed<'static> {
    let group = abq.group_columns(cols);
    let (mut codes, mut scales, mut offsets) = (Vec::new(), Vec::new(), Vec::new());
    for row in weights.chunks(cols) {
        for weights in row.chunks(group) {
            let low = weights.iter().fold(f32::INFINITY, |a, b| a.min(*b));
            let high = weights.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
            let most = (abq.levels() - 1) as f32;
            let scale = if high > low { (high - low) / most } else { 1.0 };
            codes.extend(weights.iter().map(|w| ((w - low) / scale).round().clamp(0.0, most) as u8));
            scales.push(scale);
            offsets.push(low);
        }
    }
    let floats = |values: &[f32]| Floats::round(Dtype::F32, values).unwrap();
    Packed::from_codes(abq, cols, &codes, floats(&scales), Zero::Real(floats(&offsets))).unwrap()
}

/// Writes a plain checkpoint of BF16 anew: tensors with `abq(name)` as codes, the others as they are.
pub(crate) fn write(from: &Path, to: &Path, abq: impl Fn(&str) -> Option<Abq>) {
    let source = Checkpoint::open(from).unwrap();
    let mut stored: BTreeMap<String, (safetensors::Dtype, Vec<usize>, Vec<u8>)> = BTreeMap::new();
    let (mut tensors, mut units) = (BTreeMap::new(), BTreeMap::new());
    for (name, tensor) in source.tensors() {
        let bytes = source.read_tensor(name).unwrap();
        let mut components = BTreeMap::new();
        let mut add = |component: &str, dtype, shape: Vec<u64>, bytes: &[u8]| {
            let tensor = if component == "data" { name.clone() } else { format!("{name}.{component}") };
            let shape = shape.iter().map(|n| *n as usize).collect();
            stored.insert(tensor.clone(), (dtype, shape, bytes.to_vec()));
            components.insert(component.to_owned(), ComponentEntry { tensor, blake3: Digest::of(bytes) });
        };
        let quantised = abq(name).filter(|_| tensor.shape.len() == 2);
        let encoding = match quantised {
            None => {
                add("data", safetensors::Dtype::BF16, tensor.shape.to_vec(), &bytes);
                json!({"name": "raw"})
            }
            Some(abq) => {
                assert_eq!(tensor.dtype, Dtype::BF16);
                let words: Vec<u16> = bytemuck::pod_collect_to_vec(&bytes);
                let wide: Vec<f32> = words.iter().map(|w| half::bf16::from_bits(*w).to_f32()).collect();
                let packed = rounded(abq, &wide, tensor.shape[1] as usize);
                for (spec, bytes) in packed.components() {
                    let dtype = match spec.dtype {
                        Dtype::U32 => safetensors::Dtype::U32,
                        Dtype::F32 => safetensors::Dtype::F32,
                        other => panic!("{other:?}"),
                    };
                    add(spec.name, dtype, spec.shape, bytes);
                }
                let mut encoding = serde_json::to_value(abq).unwrap();
                encoding["name"] = json!("abq");
                encoding
            }
        };
        let unit = UnitEntry {
            encoding: encoding.into(),
            tensors: vec![name.clone()],
            components: components.into(),
            fallback: None,
        };
        units.insert(name.clone(), unit);
        let entry = TensorEntry {
            dtype: tensor.dtype,
            shape: tensor.shape.to_vec(),
            unit: name.clone(),
            blake3: Digest::of(&bytes),
        };
        tensors.insert(name.clone(), entry);
    }
    let views = stored.iter().map(|(name, (dtype, shape, bytes))| {
        (name.clone(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    let shard = safetensors::serialize(views, None).unwrap();
    let header = 8 + u64::from_le_bytes(shard[..8].try_into().unwrap()) as usize;
    std::fs::write(to.join("model.safetensors"), &shard).unwrap();
    let config = std::fs::read(from.join("config.json")).unwrap();
    std::fs::write(to.join("config.json"), &config).unwrap();
    let file = |bytes: &[u8]| FileEntry { bytes: bytes.len() as u64, blake3: Digest::of(bytes) };
    let manifest = Manifest {
        format_version: "1.2".to_owned(),
        requires: Vec::new(),
        producer: Producer { name: "test".to_owned(), version: "0".to_owned(), revision: None },
        source: Source {
            name: "source".to_owned(),
            kind: "huggingface".to_owned(),
            shards: BTreeMap::new(),
            files: BTreeMap::new(),
        },
        base: None,
        recipe: json!({"to": "abq"}),
        tensors,
        units,
        tied: source.tied().iter().map(|(a, b)| (a.clone(), b.clone())).collect(),
        dropped: BTreeMap::new(),
        shards: BTreeMap::from([(
            "model.safetensors".to_owned(),
            ShardEntry { bytes: shard.len() as u64, header_blake3: Digest::of(&shard[..header]) },
        )]),
        files: BTreeMap::from([("config.json".to_owned(), file(&config))]),
        transforms: Vec::new(),
        manifest_blake3: Digest([0; 32]),
    };
    std::fs::write(to.join("llmpress.json"), manifest.to_bytes().unwrap()).unwrap();
}
