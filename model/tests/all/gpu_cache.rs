//! Models whose cache holds codes on a GPU, in the emulator.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use llmpress_emulator::Emulator;
use llmpress_formats::{Checkpoint, Error, QuantizeSite, Transform};
use llmpress_kernels::gpu::Gpu;
use llmpress_model::{Engine, GpuModel, GpuNeeds, Model, Panels, Skips, Weights, greedy};

const IDS: [u32; 11] = [3, 17, 5, 60, 2, 9, 33, 41, 8, 8, 1];

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn open(dir: &Path, bits: Option<u8>) -> Model {
    let mut model = Model::open(Arc::new(Checkpoint::open(dir).unwrap())).unwrap();
    let cache = bits.map(|bits| Transform::Quantize { site: QuantizeSite::Cache, bits });
    model.transform(cache.into_iter().collect()).unwrap();
    model
}

fn on_gpu(model: &Model) -> GpuModel {
    GpuModel::open(Gpu::new(Emulator::new()), model, Weights::Stored, false).unwrap()
}

/// Rows of logits of all tokens, read in pieces.
fn logits(engine: &dyn Engine, pieces: &[&[u32]]) -> Result<Vec<Vec<f32>>, Error> {
    let mut session = engine.session(IDS.len()).unwrap();
    session.announce(IDS.len());
    let (mut rows, mut part) = (Vec::new(), Panels::default());
    for piece in pieces {
        session.read(piece, &Skips::new(), 0..piece.len())?;
        session.logits(0..engine.vocab_size(), &mut part)?;
        rows.extend((0..piece.len()).map(|token| part.token(token).collect()));
    }
    Ok(rows)
}

/// The largest difference, as a share of the largest logit.
fn worst(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    let largest = b.iter().flatten().fold(0f32, |a, b| a.max(b.abs()));
    let pairs = a.iter().zip(b).flat_map(|(a, b)| a.iter().zip(b));
    pairs.map(|(a, b)| (a - b).abs() / largest).fold(0.0, |a, b| if b > a || b.is_nan() { b } else { a })
}

#[test]
fn a_cache_of_codes_comes_near_the_processors_and_changes_no_bit_step_by_step() {
    for name in ["qwen3", "gemma3_text"] {
        let plain = logits(&on_gpu(&open(&golden(name), None)), &[&IDS]).unwrap();
        for (bits, tolerance) in [(8, 0.05), (4, 0.15)] {
            let model = open(&golden(name), Some(bits));
            let expected = logits(&model, &[&IDS]).unwrap();
            let gpu = on_gpu(&model);
            let found = logits(&gpu, &[&IDS]).unwrap();
            let worst = worst(&found, &expected);
            println!("{name} {bits}: {worst:.4}");
            assert!(worst < tolerance && found != plain, "{name} {bits}: {worst}");
            // One token at a time: the first as it is, the others recorded.
            let steps: Vec<&[u32]> = IDS.chunks(1).collect();
            let same = |a: &[Vec<f32>]| a.iter().flatten().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert!(same(&logits(&gpu, &steps).unwrap()) == same(&found), "{name} {bits}: step by step");
            assert_eq!(greedy(&gpu, &IDS, 4).unwrap().len(), 4);
        }
    }
}

#[test]
fn a_cache_of_codes_takes_the_memory_that_is_said() {
    let cache = |bits| {
        let model = open(&golden("llama"), bits);
        let needs = GpuNeeds::of(&model, Weights::Stored, 800).unwrap().cache;
        let gpu = on_gpu(&model);
        let before = gpu.allocated().0;
        let _session = gpu.session(800).unwrap();
        (needs as usize, gpu.allocated().0 - before, model.config().clone())
    };
    let ((plain, all, c), (four, all_four, _)) = (cache(None), cache(Some(4)));
    let heads = 2 * c.layers.len() * c.kv_heads * 800;
    assert_eq!(plain, heads * 2 * c.head_dim.next_multiple_of(8));
    assert_eq!(four, heads * (c.head_dim.div_ceil(2).next_multiple_of(8) + 5));
    assert_eq!(all - all_four, plain - four, "what a session really takes");
}

#[test]
fn a_key_that_no_code_stands_for_names_its_layer() {
    let source = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(golden("llama")).unwrap() {
        let path = file.unwrap().path();
        std::fs::copy(&path, source.path().join(path.file_name().unwrap())).unwrap();
    }
    let path = source.path().join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let at = {
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let norm = file.tensor("model.layers.1.input_layernorm.weight").unwrap();
        norm.data().as_ptr() as usize - bytes.as_ptr() as usize
    };
    bytes[at..at + 2].copy_from_slice(&half::bf16::INFINITY.to_le_bytes());
    std::fs::write(&path, bytes).unwrap();
    let model = open(source.path(), Some(8));
    let gpu = on_gpu(&model);
    for pieces in [&[&IDS[..]][..], &[&IDS[..1], &IDS[1..2], &IDS[2..3]]] {
        let error = logits(&gpu, pieces).unwrap_err().to_string();
        assert!(error.contains("a key or value of layer 1") && error.contains("NaN or infinite"), "{error}");
    }
}
