//! What a block takes in memory, from shapes alone.

use llmpress_calibrate::{InputShape, MOST_COLUMNS};

/// The most bytes that error feedback takes over a block whose linears read these inputs in turn, one at a time: beside
/// streams, which have their own bound ([`llmpress_calibrate::Room`]), and the mapped checkpoint.
///
/// What is quantised already is in memory in single precision, and packed. To it comes, for each input, the larger of: the
/// Hessian while it is factored, and the matrices while codes are chosen.
pub fn block_peak_bytes(inputs: &[InputShape]) -> u64 {
    let (mut done, mut peak) = (0u64, 0u64);
    for input in inputs {
        let square = input.features.saturating_mul(input.features);
        let wide = input.features > MOST_COLUMNS as u64;
        // Wide: the Hessian (4) and what is factored (8), then that and U (4). Else the Hessian and the drift stay, and
        // later panels of it take the place of what was factored.
        let factoring = square.saturating_mul(if wide { 12 } else { 20 });
        let factored = square.saturating_mul(if wide { 4 } else { 16 });
        let weights = input.weights();
        let largest = input.rows.iter().copied().max().unwrap_or(0).saturating_mul(input.features);
        // All weights; of the largest a copy, its codes twice, its new values, and as many again while it is packed.
        let choosing =
            factored.saturating_add(weights.saturating_mul(4)).saturating_add(largest.saturating_mul(12));
        let now = factoring.saturating_add(weights.saturating_mul(4)).max(choosing);
        peak = peak.max(done.saturating_add(now));
        // In single precision, and a byte a code at most.
        done = done.saturating_add(weights.saturating_mul(5));
    }
    peak
}
