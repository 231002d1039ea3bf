//! Models of which two of four weights are kept, on a GPU, in the emulator.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::sync::Arc;

use llmpress_emulator::Emulator;
use llmpress_formats::Dtype;
use llmpress_formats::encoding::abq::Floats;
use llmpress_formats::encoding::lowrank::BaseRows;
use llmpress_kernels::gpu::Gpu;
use llmpress_model::{Engine, GpuModel, GpuNeeds, Model, Panels, Skips, Weights, greedy};

use crate::finished::{Stored, owned, view};
use crate::sparse::{largest, with_codes, with_fixed12, with_sums};

/// What activations in BF16 may move a logit by, as a share of the largest one.
const TOLERANCE: f32 = 0.05;

const IDS: [u32; 11] = [3, 17, 5, 60, 2, 9, 33, 41, 8, 8, 1];

fn on_gpu(model: &Model, weights: Weights) -> GpuModel {
    GpuModel::open(Gpu::new(Emulator::new()), model, weights, false).unwrap()
}

/// Rows of logits of all tokens, read in pieces.
fn logits(engine: &dyn Engine, pieces: &[&[u32]]) -> Vec<Vec<f32>> {
    let mut session = engine.session(pieces.iter().map(|p| p.len()).sum()).unwrap();
    session.announce(pieces.iter().map(|p| p.len()).sum());
    let mut rows = Vec::new();
    let mut part = Panels::default();
    for piece in pieces {
        session.read(piece, &Skips::new(), 0..piece.len()).unwrap();
        let mut of_piece = vec![Vec::new(); piece.len()];
        for run in engine.logit_runs(piece.len()) {
            session.logits(run, &mut part).unwrap();
            of_piece.iter_mut().enumerate().for_each(|(t, row)| row.extend(part.token(t)));
        }
        rows.extend(of_piece);
    }
    rows
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

fn model(make: impl Fn(&[f32], usize) -> Stored) -> (tempfile::TempDir, Model) {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = view(dir.path(), |_, weights, cols| make(weights, cols));
    let model = Model::open(Arc::new(checkpoint)).unwrap();
    (dir, model)
}

fn plain(weights: &[f32], cols: usize) -> Stored {
    let packed = largest(weights, cols);
    (packed.encoding(), owned(packed.components()))
}

#[test]
fn models_of_two_in_four_run_near_the_processors_logits_and_alike_in_pieces() {
    let (_plain_dir, of_values) = model(plain);
    let (_dir, of_fixed12) = model(|weights, cols| with_fixed12(&largest(weights, cols)));
    let expected = logits(&of_values, &[&IDS]);
    let gpu = on_gpu(&of_values, Weights::Stored);
    let found = logits(&gpu, &[&IDS]);
    assert!(worst(&found, &expected) < TOLERANCE, "{}", worst(&found, &expected));
    // One token at a time, then in other pieces.
    let pieces: Vec<&[u32]> = IDS.chunks(1).collect();
    assert!(bits(&logits(&gpu, &pieces)) == bits(&found), "step by step");
    assert_eq!(greedy(&gpu, &IDS, 3).unwrap().len(), 3);
    // The form of the kept values does not show.
    let other = on_gpu(&of_fixed12, Weights::Stored);
    assert!(bits(&logits(&other, &[&IDS])) == bits(&found), "kept values in fixed12");
    assert!(other.allocated().0 < gpu.allocated().0);
    // The same model with its zeros: another order of additions, the same but for that.
    let dense = on_gpu(&of_values, Weights::Bf16);
    assert!(dense.allocated().0 > gpu.allocated().0);
    assert!(worst(&logits(&dense, &[&IDS]), &found) < TOLERANCE / 2.0);
}

fn sums_beside_two_in_four(weights: &[f32], cols: usize) -> Stored {
    let packed = with_sums(weights, cols, BaseRows::Sparse24(largest(weights, cols)), false);
    (packed.encoding(), owned(packed.components()))
}

fn coded_sums_beside_all(weights: &[f32], cols: usize) -> Stored {
    let halves: Vec<f32> = weights.iter().map(|w| w / 2.0).collect();
    let base = BaseRows::Raw(Floats::round(Dtype::BF16, &halves).unwrap());
    let packed = with_sums(weights, cols, base, true);
    (packed.encoding(), owned(packed.components()))
}

#[test]
fn sums_beside_a_base_run_near_the_processors_logits_and_alike_in_pieces() {
    let stored: [fn(&[f32], usize) -> Stored; 2] = [sums_beside_two_in_four, coded_sums_beside_all];
    for make in stored {
        let (_dir, model) = model(make);
        let expected = logits(&model, &[&IDS]);
        let gpu = on_gpu(&model, Weights::Stored);
        let found = logits(&gpu, &[&IDS]);
        assert!(worst(&found, &expected) < TOLERANCE, "{}", worst(&found, &expected));
        let pieces: Vec<&[u32]> = IDS.chunks(1).collect();
        assert!(bits(&logits(&gpu, &pieces)) == bits(&found), "step by step");
        // Together with their zeros and sums they lie in other words of BF16.
        assert!(worst(&logits(&on_gpu(&model, Weights::Bf16), &[&IDS]), &found) < TOLERANCE);
    }
}

#[test]
fn two_in_four_take_the_memory_that_was_said() {
    let made: [fn(&[f32], usize) -> Stored; 5] = [
        plain,
        |weights, cols| with_fixed12(&largest(weights, cols)),
        |weights, cols| {
            // Codes are decoded, and lie there with their zeros.
            let packed = with_codes(largest(weights, cols));
            (packed.encoding(), owned(packed.components()))
        },
        sums_beside_two_in_four,
        coded_sums_beside_all,
    ];
    for make in made {
        let (_dir, model) = model(make);
        let gpu = on_gpu(&model, Weights::Stored);
        let (found, said) = (gpu.allocated().0 as f64, GpuNeeds::of(&model, Weights::Stored, 1).unwrap());
        // Norms, escapes and other small things are not counted.
        let said = said.weights as f64;
        assert!(said <= found && said > 0.9 * found, "{said} of {found}");
    }
}
