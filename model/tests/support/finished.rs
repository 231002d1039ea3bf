//! tinylm with matrices of its blocks stored otherwise.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use half::bf16;
use llmpress_formats::encoding::{ComponentSpec, stored_name};
use llmpress_formats::{
    Checkpoint, ComponentEntry, Digest, Encoding, ShardFile, ShardWriter, SlotPlan, UnitEntry,
};

pub(crate) fn tinylm() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/tinylm")
}

/// How a matrix is stored, and its components.
pub(crate) type Stored = (Encoding, Vec<(ComponentSpec, Vec<u8>)>);

/// The checkpoint with each linear of a block as `make` stores it, given its name, weights and columns.
pub(crate) fn view(dir: &Path, make: impl Fn(&str, &[f32], usize) -> Stored) -> Checkpoint {
    let source = Checkpoint::open(&tinylm()).unwrap();
    let mut units = BTreeMap::new();
    let mut slots = Vec::new();
    for (name, tensor) in source.tensors().iter().filter(|(name, _)| name.contains("_proj.")) {
        let bytes = source.read_tensor(name).unwrap();
        let weights: Vec<f32> = bytes.chunks(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect();
        let (encoding, stored) = make(name, &weights, tensor.shape[1] as usize);
        let mut components = BTreeMap::new();
        for (spec, bytes) in stored {
            let stored = stored_name(name, &encoding, spec.name);
            let link = ComponentEntry { tensor: stored.clone(), blake3: Digest::of(&bytes) };
            components.insert(spec.name.to_owned(), link);
            let plan = SlotPlan { name: stored, dtype: spec.dtype, shape: spec.shape, exact: true };
            slots.push((plan, bytes));
        }
        let encoding = serde_json::to_value(&encoding).unwrap();
        units.insert(
            name.clone(),
            UnitEntry {
                encoding: encoding.into(),
                tensors: vec![name.clone()],
                components: components.into(),
                fallback: None,
            },
        );
    }
    let path = dir.join("units.safetensors");
    let plan: Vec<SlotPlan> = slots.iter().map(|(plan, _)| plan.clone()).collect();
    let mut writer = ShardWriter::create(&path, plan.into_iter(), BTreeMap::new()).unwrap();
    for (plan, bytes) in slots {
        writer.place(&plan.name, plan.dtype, &plan.shape).unwrap().write_at(0, &bytes).unwrap();
    }
    writer.finish().unwrap();
    source.with_finished(ShardFile::open(&path).unwrap(), &units).unwrap()
}

/// Components with bytes of their own.
pub(crate) fn owned(components: Vec<(ComponentSpec, &[u8])>) -> Vec<(ComponentSpec, Vec<u8>)> {
    components.into_iter().map(|(spec, bytes)| (spec, bytes.to_vec())).collect()
}
