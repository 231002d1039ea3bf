//! Models of which two of four weights are kept, with and without sums beside them: run as those of the weights that they
//! stand for.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::sync::Arc;

use llmpress_entropy::fixed12;
use llmpress_formats::encoding::abq::{Abq, Floats, Packed as Codes, Zero};
use llmpress_formats::encoding::lowrank::{BaseRows, Packed as WithSums, Sums};
use llmpress_formats::encoding::sparse24::{Inner, Kept, Packed, QUAD, Sparse24, positions};
use llmpress_formats::encoding::{ComponentSpec, fixed12 as stored_fixed12};
use llmpress_formats::{Checkpoint, Dtype, Encoding};
use llmpress_model::{Model, Result, Skips, Unobserved, Weights};

#[path = "support/finished.rs"]
mod finished;

use finished::{Stored, owned, view};

/// The two of each four weights that are largest.
fn largest(weights: &[f32], cols: usize) -> Packed<'static> {
    let rows = weights.len() / cols;
    let mut at = vec![0; rows * positions::row_bytes(cols)];
    for (row, at) in weights.chunks(cols).zip(at.chunks_mut(positions::row_bytes(cols))) {
        let nibble = |quad: &[f32]| {
            let mut order = [0usize, 1, 2, 3];
            order.sort_by(|a, b| quad[*b].abs().total_cmp(&quad[*a].abs()));
            positions::of_mask(1 << order[0] | 1 << order[1]).unwrap()
        };
        positions::pack_row(row.chunks(QUAD).map(nibble), at);
    }
    Packed::round(Dtype::BF16, rows, cols, weights, at).unwrap()
}

/// Its values in eight bits, or other numbers of as many rows.
fn codes(values: &[f32], cols: usize) -> Codes<'static> {
    let (mut codes, mut scales, mut offsets) = (vec![], vec![], vec![]);
    for row in values.chunks(cols) {
        let least = row.iter().copied().fold(f32::INFINITY, f32::min);
        let scale = (row.iter().copied().fold(f32::NEG_INFINITY, f32::max) - least).max(1e-6) / 255.0;
        codes.extend(row.iter().map(|w| ((w - least) / scale).round().clamp(0.0, 255.0) as u8));
        scales.push(scale);
        offsets.push(least);
    }
    let floats = |values: &[f32]| Floats::round(Dtype::F32, values).unwrap();
    Codes::from_codes(Abq::new(8), cols, &codes, floats(&scales), Zero::Real(floats(&offsets))).unwrap()
}

fn with_codes(packed: Packed<'static>) -> Packed<'static> {
    let mut kept = vec![0.0; packed.rows() * packed.cols() / 2];
    for (row, out) in kept.chunks_mut(packed.cols() / 2).enumerate() {
        packed.kept_row(row, out).unwrap();
    }
    let codes = codes(&kept, packed.cols() / 2);
    packed.with_values(Kept::Abq(codes)).unwrap()
}

/// Its values in twelve bits.
fn with_fixed12(packed: &Packed<'_>) -> Stored {
    let (rows, cols) = (packed.rows(), packed.cols() / 2);
    let Kept::Plain(values) = packed.values() else { panic!("plain values") };
    let words: Vec<u16> = values.bytes().chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect();
    let mut histogram = fixed12::Histogram::new();
    histogram.add(&words);
    let window = histogram.best_window();
    let mut strips = fixed12::Strips::default();
    fixed12::encode_strips(window.base, cols, &words, &mut strips).unwrap();
    let grid = fixed12::Grid::new(rows as u64, cols as u64).unwrap();
    let mut escapes = 0u32;
    let offsets = std::iter::once(0).chain(strips.escape_counts.iter().map(|count| {
        escapes += count;
        escapes
    }));
    let bytes = [
        strips.sign_mantissa,
        strips.codes,
        offsets.flat_map(u32::to_le_bytes).collect(),
        bytemuck::cast_slice(&strips.escape_positions).to_vec(),
        strips.escape_exponents,
    ];
    let specs = stored_fixed12::components(&grid, window.escapes);
    let mut components = owned(packed.components());
    components.retain(|(spec, _)| spec.name == "positions");
    let specs = llmpress_formats::encoding::sparse24::encoded_components(rows as u64, 2 * cols as u64, specs);
    let values: Vec<(ComponentSpec, Vec<u8>)> = specs.into_iter().skip(1).zip(bytes).collect();
    components.extend(values);
    (Encoding::Sparse24(Sparse24 { values: Some(Inner::Fixed12 { base: window.base }) }), components)
}

/// What is dropped, as the mean of each block of 16: SLoRB's start.
fn with_sums(weights: &[f32], cols: usize, base: BaseRows<'static>, coded: bool) -> WithSums<'static> {
    let rows = weights.len() / cols;
    let kept = largest(weights, cols);
    let mut sums = Vec::new();
    for (row, weights) in weights.chunks(cols).enumerate() {
        let mut dense = vec![0.0; cols];
        kept.decode_row(row, &mut dense).unwrap();
        let lost: Vec<f32> = weights.iter().zip(dense).map(|(w, d)| w - d).collect();
        sums.extend(lost.chunks(16).map(|block| block.iter().sum::<f32>() / 16.0));
    }
    let sums = match coded {
        true => Sums::Abq(codes(&sums, cols.div_ceil(16))),
        false => Sums::Plain(Floats::round(Dtype::BF16, &sums).unwrap()),
    };
    WithSums::new(16, rows, cols, base, sums).unwrap()
}

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
