//! What transformers computes of a model that is 2:4, exported as plain weights with zeros, beside what is computed here of the
//! packed one (`model/tests/golden/make_golden.py sparse`).
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use llmpress_formats::{Checkpoint, Producer, ShardFile};
use llmpress_model::{Model, Skips, Unobserved, greedy};
use llmpress_pipeline::{
    Options, Plan, Progress, Recipe, Request, Task, Watch, convert, convert_request, restore,
};

/// What every logit may differ by, beside this share of its value: as `model/tests/golden.rs` has it.
const TOLERANCE: f32 = 1e-4;

fn golden(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/golden").join(case)
}

fn options() -> Options {
    Options {
        jobs: Some(2),
        max_memory: None,
        resume: false,
        force: false,
        producer: Producer { name: "test".to_owned(), version: "0.1.0".to_owned(), revision: None },
        extra_files: BTreeMap::new(),
    }
}

/// Nobody watches.
struct Unwatched;

impl Watch for Unwatched {
    fn begin(&self, _task: Task) -> Box<dyn Progress + '_> {
        Box::new(Self)
    }
}

impl Progress for Unwatched {
    fn start(&self, _total: u64) {}
    fn advance(&self, _amount: u64) {}
    fn shard(&self, _file: &str) {}
}

/// The bytes of a tensor of a golden file.
fn read(shard: &ShardFile, name: &str) -> Vec<u8> {
    let component = shard.component(shard.header().get(name).unwrap());
    let mut bytes = vec![0; component.bytes() as usize];
    component.read_at(0, &mut bytes).unwrap();
    bytes
}

fn ids(shard: &ShardFile, name: &str) -> Vec<u32> {
    let bytes = read(shard, name);
    bytes.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as u32).collect()
}

/// The greatest distance of the logits from those that transformers computed.
fn worst(dir: &Path) -> f32 {
    let shard = ShardFile::open(&golden("llama_sparse24").join("golden.safetensors")).unwrap();
    let model = Model::open(Arc::new(Checkpoint::open(dir).unwrap())).unwrap();
    let ids = ids(&shard, "input_ids");
    let hidden = model.hidden(&ids, &mut model.cache(ids.len()), &Skips::new(), &mut Unobserved).unwrap();
    let logits = model.logits(&hidden).unwrap();
    let expected: Vec<f32> =
        read(&shard, "logits").chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    let found: Vec<f32> = (0..ids.len()).flat_map(|t| logits.token(t).collect::<Vec<f32>>()).collect();
    assert_eq!(found.len(), expected.len());
    let pairs = found.iter().zip(&expected);
    pairs
        .map(|(a, b)| (a - b).abs() / (1.0 + b.abs()))
        .fold(0.0, |a, b| if b > a || b.is_nan() { b } else { a })
}

#[test]
fn a_packed_model_has_the_logits_that_transformers_computes_of_its_export() {
    let dir = tempfile::tempdir().unwrap();
    let (made, plain, packed) =
        (dir.path().join("made"), dir.path().join("plain"), dir.path().join("packed"));
    // As the pass makes it.
    let request = Request::new(Recipe::from_short("sparse24:magnitude").unwrap());
    convert_request(&golden("llama"), &made, &request, 4 << 30, &options(), &Unwatched).unwrap();
    let found = worst(&made);
    assert!(found <= TOLERANCE, "{found}");
    // Its export is what transformers read.
    restore(&Checkpoint::open(&made).unwrap(), &plain, 4 << 30, &options(), &Unwatched).unwrap();
    let (ours, theirs) =
        (Checkpoint::open(&plain).unwrap(), Checkpoint::open(&golden("llama_sparse24")).unwrap());
    assert!(ours.tensors().keys().eq(theirs.tensors().keys()));
    for name in ours.tensors().keys() {
        assert!(ours.read_tensor(name).unwrap() == theirs.read_tensor(name).unwrap(), "{name}");
    }
    // And packed again from there.
    let plan = Plan::new(&theirs, &Recipe::from_short("sparse24").unwrap(), 4 << 30).unwrap();
    convert(&theirs, &packed, &plan, &options(), &Unwatched).unwrap();
    let found = worst(&packed);
    assert!(found <= TOLERANCE, "{found}");
    let units = Checkpoint::open(&packed).unwrap();
    assert_eq!(units.units().values().filter(|unit| unit.encoding().name() == "sparse24").count(), 14);
    let model = Model::open(Arc::new(units)).unwrap();
    let shard = ShardFile::open(&golden("llama_sparse24").join("golden.safetensors")).unwrap();
    let (prompt, expected) = (ids(&shard, "input_ids"), ids(&shard, "greedy"));
    assert_eq!(greedy(&model, &prompt[..8], expected.len()).unwrap(), expected);
}
