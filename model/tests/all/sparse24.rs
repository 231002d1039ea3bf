//! Models of which two of four weights are kept, with and without sums beside them: run as those of the weights that they
//! stand for.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::sync::Arc;

use llmpress_formats::encoding::abq::Floats;
use llmpress_formats::encoding::lowrank::{BaseRows, Packed as WithSums};
use llmpress_formats::encoding::sparse24::positions;
use llmpress_formats::{Checkpoint, Dtype};
use llmpress_model::{Model, Result, Skips, Unobserved, Weights};

use crate::finished::{Stored, owned, view};
use crate::sparse::{largest, with_codes, with_fixed12, with_sums};

fn logits(model: &Model, parts: &[&[u32]]) -> Result<Vec<f32>> {
    let mut cache = model.cache(parts.iter().map(|ids| ids.len()).sum());
    let mut all = Vec::new();
    for ids in parts {
        let logits = model.logits(&model.hidden(ids, &mut cache, &Skips::new(), &mut Unobserved)?)?;
        all.extend((0..ids.len()).flat_map(|token| logits.token(token).collect::<Vec<_>>()));
    }
    Ok(all)
}

const IDS: [u32; 6] = [17, 4, 311, 25, 900, 5];

fn all_at_once(model: &Model) -> Vec<f32> {
    logits(model, &[&IDS]).unwrap()
}

fn one_by_one(model: &Model) -> Vec<f32> {
    logits(model, &IDS.iter().map(std::slice::from_ref).collect::<Vec<_>>()).unwrap()
}

/// The same checkpoint as a model whose linears have the weights that `row` reads, in single precision.
fn decoded(checkpoint: &Arc<Checkpoint>, row: impl Fn(&str, usize, &mut [f32])) -> Model {
    let mut model = Model::open(checkpoint.clone()).unwrap();
    for (name, tensor) in checkpoint.tensors().iter().filter(|(name, _)| name.contains("_proj.")) {
        let cols = tensor.shape[1] as usize;
        let mut weights = vec![0.0; tensor.shape[0] as usize * cols];
        weights.chunks_mut(cols).enumerate().for_each(|(i, out)| row(name, i, out));
        model.replace_quantised(name, weights, None).unwrap();
    }
    model
}

fn far(a: &[f32], b: &[f32]) -> f32 {
    let largest = a.iter().fold(0f32, |most, x| most.max(x.abs()));
    a.iter().zip(b).fold(0f32, |most, (a, b)| most.max((a - b).abs())) / largest
}

#[test]
fn two_of_four_give_the_logits_of_the_dense_weights_to_the_bit() {
    let stored: [fn(&[f32], usize) -> Stored; 2] = [
        |weights, cols| {
            let packed = largest(weights, cols);
            (packed.encoding(), owned(packed.components()))
        },
        |weights, cols| with_fixed12(&largest(weights, cols)),
    ];
    for make in stored {
        let dir = tempfile::tempdir().unwrap();
        let checkpoint = Arc::new(view(dir.path(), |_, weights, cols| make(weights, cols)));
        let model = Model::open(checkpoint.clone()).unwrap();
        let mut dense = Model::open(checkpoint).unwrap();
        dense.load(Weights::Bf16).unwrap();
        assert_eq!(all_at_once(&model), all_at_once(&dense));
        assert_eq!(one_by_one(&model), one_by_one(&dense));
    }
}

#[test]
fn codes_of_two_in_four_give_the_logits_of_their_values_to_the_bit() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = Arc::new(view(dir.path(), |_, weights, cols| {
        let packed = with_codes(largest(weights, cols));
        (packed.encoding(), owned(packed.components()))
    }));
    let model = Model::open(checkpoint.clone()).unwrap();
    let dense = decoded(&checkpoint, |name, row, out| {
        checkpoint.sparse_rows(name, row as u64..row as u64 + 1).unwrap().decode_row(0, out).unwrap();
    });
    assert_eq!(all_at_once(&model), all_at_once(&dense));
    assert_eq!(one_by_one(&model), one_by_one(&dense));
}

#[test]
fn sums_beside_a_base_give_the_logits_of_both_together() {
    let stored: [fn(&[f32], usize) -> WithSums<'static>; 3] = [
        |weights, cols| with_sums(weights, cols, BaseRows::Sparse24(largest(weights, cols)), false),
        |weights, cols| {
            with_sums(weights, cols, BaseRows::Sparse24(with_codes(largest(weights, cols))), true)
        },
        |weights, cols| {
            let base = Floats::round(Dtype::BF16, &weights.iter().map(|w| w / 2.0).collect::<Vec<_>>());
            with_sums(weights, cols, BaseRows::Raw(base.unwrap()), false)
        },
    ];
    for make in stored {
        let dir = tempfile::tempdir().unwrap();
        let checkpoint = Arc::new(view(dir.path(), |_, weights, cols| {
            let packed = make(weights, cols);
            (packed.encoding(), owned(packed.components()))
        }));
        let model = Model::open(checkpoint.clone()).unwrap();
        let dense = decoded(&checkpoint, |name, row, out| {
            checkpoint.lowrank_rows(name, row as u64..row as u64 + 1).unwrap().decode_row(0, out).unwrap();
        });
        assert_eq!(all_at_once(&model), all_at_once(&dense));
        // One token is multiplied by the base and the sums apart, which adds in another order.
        let (apart, together) = (one_by_one(&model), one_by_one(&dense));
        assert!(far(&together, &apart) < 1e-4, "{}", far(&together, &apart));
    }
}

#[test]
fn a_quad_without_two_places_is_named_when_it_is_multiplied() {
    const TENSOR: &str = "model.layers.1.mlp.up_proj.weight";
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = view(dir.path(), |name, weights, cols| {
        let packed = largest(weights, cols);
        let mut components = owned(packed.components());
        if name == TENSOR {
            // Row 1, where its first byte is.
            components[0].1[positions::row_bytes(cols)] = 0;
        }
        (packed.encoding(), components)
    });
    let model = Model::open(Arc::new(checkpoint)).unwrap();
    for parts in [&[&IDS[..]][..], &[&IDS[..1]]] {
        let error = logits(&model, parts).unwrap_err().to_string();
        assert!(error.contains(TENSOR) && error.contains("positions"), "{error}");
    }
}
