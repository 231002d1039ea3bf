//! Matrices of which two of four weights are kept.

use llmpress_entropy::fixed12;
use llmpress_formats::encoding::abq::{Abq, Floats, Packed as Codes, Zero};
use llmpress_formats::encoding::lowrank::{BaseRows, Packed as WithSums, Sums};
use llmpress_formats::encoding::sparse24::{Inner, Kept, Packed, QUAD, Sparse24, positions};
use llmpress_formats::encoding::{ComponentSpec, fixed12 as stored_fixed12};
use llmpress_formats::{Dtype, Encoding};

use super::finished::{Stored, owned};

/// The two of each four weights that are largest.
pub(crate) fn largest(weights: &[f32], cols: usize) -> Packed<'static> {
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
pub(crate) fn codes(values: &[f32], cols: usize) -> Codes<'static> {
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

pub(crate) fn with_codes(packed: Packed<'static>) -> Packed<'static> {
    let mut kept = vec![0.0; packed.rows() * packed.cols() / 2];
    for (row, out) in kept.chunks_mut(packed.cols() / 2).enumerate() {
        packed.kept_row(row, out).unwrap();
    }
    let codes = codes(&kept, packed.cols() / 2);
    packed.with_values(Kept::Abq(codes)).unwrap()
}

/// Its values in twelve bits.
pub(crate) fn with_fixed12(packed: &Packed<'_>) -> Stored {
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
pub(crate) fn with_sums(
    weights: &[f32],
    cols: usize,
    base: BaseRows<'static>,
    coded: bool,
) -> WithSums<'static> {
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
