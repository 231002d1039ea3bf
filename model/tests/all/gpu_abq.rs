//! Models of weights of a few bits on a GPU, in the emulator.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::abq as support;
use llmpress_emulator::Emulator;
use llmpress_formats::encoding::abq::Abq;
use llmpress_formats::{Checkpoint, Error};
use llmpress_kernels::gpu::Gpu;
use llmpress_model::{Engine, GpuModel, GpuNeeds, Model, Panels, Skips, Weights, greedy};

/// What activations in BF16 may move a logit by, as a share of the largest one.
const TOLERANCE: f32 = 0.05;

const IDS: [u32; 11] = [3, 17, 5, 60, 2, 9, 33, 41, 8, 8, 1];

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn open(dir: &Path) -> Model {
    Model::open(Arc::new(Checkpoint::open(dir).unwrap())).unwrap()
}

fn on_gpu(model: &Model, weights: Weights) -> GpuModel {
    GpuModel::open(Gpu::new(Emulator::new()), model, weights, false).unwrap()
}

/// Rows of logits of all tokens, read in pieces.
fn logits(engine: &dyn Engine, pieces: &[&[u32]]) -> Result<Vec<Vec<f32>>, Error> {
    let mut session = engine.session(pieces.iter().map(|p| p.len()).sum()).unwrap();
    session.announce(pieces.iter().map(|p| p.len()).sum());
    let mut rows = Vec::new();
    let mut part = Panels::default();
    for piece in pieces {
        session.read(piece, &Skips::new(), 0..piece.len())?;
        let mut of_piece = vec![Vec::new(); piece.len()];
        for run in engine.logit_runs(piece.len()) {
            session.logits(run, &mut part)?;
            of_piece.iter_mut().enumerate().for_each(|(t, row)| row.extend(part.token(t)));
        }
        rows.extend(of_piece);
    }
    Ok(rows)
}

/// The largest difference, as a share of the largest logit.
fn worst(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    assert_eq!(a.len(), b.len());
    let largest = b.iter().flatten().fold(0f32, |a, b| a.max(b.abs()));
    let pairs = a.iter().zip(b).flat_map(|(a, b)| a.iter().zip(b));
    pairs.map(|(a, b)| (a - b).abs() / largest).fold(0.0, |a, b| if b > a || b.is_nan() { b } else { a })
}

fn bits(rows: &[Vec<f32>]) -> Vec<Vec<u32>> {
    rows.iter().map(|row| row.iter().map(|x| x.to_bits()).collect()).collect()
}

fn widths(bits: u8, group_size: Option<u32>, activation_bits: Option<u8>) -> Abq {
    Abq { group_size, activation_bits, ..Abq::new(bits) }
}

/// A golden checkpoint whose linears are codes: all alike, or the query of other ones than key and value.
fn quantised(name: &str, abq: Abq, mixed: bool) -> (tempfile::TempDir, Model) {
    let dir = tempfile::tempdir().unwrap();
    support::write(&golden(name), dir.path(), |tensor| {
        let linear = tensor.contains("_proj") || tensor == "lm_head.weight";
        let abq = if mixed && tensor.contains("q_proj") { Abq { bits: 8, ..abq } } else { abq };
        linear.then_some(abq)
    });
    let model = open(dir.path());
    (dir, model)
}

#[test]
fn models_of_few_bits_run_near_the_processors_logits_and_alike_in_pieces() {
    for (name, abq, mixed) in [
        ("llama", widths(4, Some(32), None), false),
        ("qwen3", widths(3, None, None), true),
        ("llama_tied", widths(8, Some(32), Some(8)), false),
        ("llama", widths(4, None, Some(8)), true),
    ] {
        let (_dir, model) = quantised(name, abq, mixed);
        let expected = logits(&model, &[&IDS]).unwrap();
        let gpu = on_gpu(&model, Weights::Stored);
        let found = logits(&gpu, &[&IDS]).unwrap();
        let worst = worst(&found, &expected);
        println!("{name} {}: {worst:.4}", abq.widths());
        assert!(worst < TOLERANCE, "{name} {}: {worst}", abq.widths());
        // One token at a time: the first as it is, the others recorded.
        let pieces: Vec<&[u32]> = IDS.chunks(1).collect();
        assert!(bits(&logits(&gpu, &pieces).unwrap()) == bits(&found), "{name}: step by step");
        assert_eq!(greedy(&gpu, &IDS, 4).unwrap().len(), 4);
    }
}

#[test]
fn codes_take_the_memory_that_was_said() {
    for activation_bits in [None, Some(8)] {
        let (_dir, model) = quantised("llama", widths(4, Some(32), activation_bits), false);
        let gpu = on_gpu(&model, Weights::Stored);
        let (found, needs) = (gpu.allocated().0 as f64, GpuNeeds::of(&model, Weights::Stored, 1).unwrap());
        // Norms and other small things are not counted.
        let said = needs.weights as f64;
        assert!(said <= found && said > 0.9 * found, "{said} of {found}");
    }
}

#[test]
fn other_weights_decode_codes_unless_activations_are_quantised() {
    let (_dir, model) = quantised("llama", widths(4, Some(32), None), false);
    let codes = on_gpu(&model, Weights::Stored).allocated().0;
    let plain = on_gpu(&model, Weights::Bf16);
    assert!(plain.allocated().0 > codes);
    let expected = logits(&model, &[&IDS]).unwrap();
    assert!(worst(&logits(&plain, &[&IDS]).unwrap(), &expected) < TOLERANCE);
    let (_dir, model) = quantised("llama", widths(4, Some(32), Some(8)), false);
    let stored = on_gpu(&model, Weights::Stored);
    let expected = bits(&logits(&stored, &[&IDS]).unwrap());
    for weights in [Weights::Bf16, Weights::Fixed12, Weights::Dfloat11] {
        assert!(bits(&logits(&on_gpu(&model, weights), &[&IDS]).unwrap()) == expected, "{weights:?}");
    }
}

#[test]
fn an_activation_that_cannot_be_quantised_names_its_matrix() {
    // A norm of infinities makes the input of the first layer's MLP infinite.
    let dir = tempfile::tempdir().unwrap();
    let source = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(golden("llama")).unwrap() {
        let path = file.unwrap().path();
        std::fs::copy(&path, source.path().join(path.file_name().unwrap())).unwrap();
    }
    let path = source.path().join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let at = {
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let norm = file.tensor("model.layers.1.post_attention_layernorm.weight").unwrap();
        norm.data().as_ptr() as usize - bytes.as_ptr() as usize
    };
    bytes[at..at + 2].copy_from_slice(&half::bf16::INFINITY.to_le_bytes());
    std::fs::write(&path, bytes).unwrap();
    support::write(source.path(), dir.path(), |tensor| {
        tensor.contains("_proj").then_some(widths(4, None, Some(8)))
    });
    let model = open(dir.path());
    let gpu = on_gpu(&model, Weights::Stored);
    for pieces in [&[&IDS[..]][..], &[&IDS[..1], &IDS[1..2], &IDS[2..3]]] {
        let error = logits(&gpu, pieces).unwrap_err().to_string();
        assert!(error.contains("model.layers.1.mlp.gate_proj.weight"), "{error}");
    }
}
