//! What a block takes in memory, from shapes alone.

use llmpress_calibrate::{InputShape, MOST_COLUMNS};

/// The most bytes that a block takes whose linears read these inputs in turn, one at a time: beside streams, which have their
/// own bound ([`llmpress_calibrate::Room`]), and the mapped checkpoint. With `reconstruct` also what learning a sub-layer's
/// matrices takes.
///
/// What is sparse already is in memory in single precision, as products see it and packed. To it comes, for each input, the
/// larger of: the Hessian while it is factored, and the matrices while quads are settled; or, once all are sparse, their
/// derivatives, means of both kinds and latent values.
pub fn block_peak_bytes(inputs: &[InputShape], reconstruct: bool) -> u64 {
    let (mut done, mut peak) = (0u64, 0u64);
    for input in inputs {
        let square = input.features.saturating_mul(input.features);
        let wide = input.features > MOST_COLUMNS as u64;
        // Wide: the Hessian (4) and what is factored (8), then that and U (4). Else the Hessian and the drift stay, and panels
        // of it take the place of what was factored.
        let factoring = square.saturating_mul(if wide { 12 } else { 20 });
        let factored = square.saturating_mul(if wide { 4 } else { 16 });
        let weights = input.weights();
        let largest = input.rows.iter().copied().max().unwrap_or(0).saturating_mul(input.features);
        // All weights; of the largest a copy, its new values, those that are kept, masks, and what the product sees.
        let choosing =
            factored.saturating_add(weights.saturating_mul(4)).saturating_add(largest.saturating_mul(16));
        let now = factoring.saturating_add(weights.saturating_mul(4)).max(choosing);
        peak = peak.max(done.saturating_add(now));
        // What products see (4), kept values (2), masks (1/4), S (1/4).
        done = done.saturating_add(weights.saturating_mul(13).div_ceil(2));
    }
    if reconstruct {
        // What products see and derivatives by it (4 each), a turned matrix of a product (at most 4), and of kept weights latent
        // values and both means (2 each).
        let all = inputs.iter().fold(0u64, |sum, input| sum.saturating_add(input.weights()));
        peak = peak.max(done.saturating_add(all.saturating_mul(18)));
    }
    peak
}
