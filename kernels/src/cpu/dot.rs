//! Rows times vector: the product of a single token.

use llmpress_entropy::fixed12::StripsRef;

use super::Elements;

/// Partial sums of a dot product: element `k` goes to sum `k % LANES`.
pub const LANES: usize = 64;

/// `out[r] = sum over k of weights[r * stride + k] * x[k]`.
///
/// [`LANES`] partial sums start from +0; element `k` is added to sum `k % LANES` by a fused multiply-add, in
/// ascending `k`. Then sum `i` takes sum `i + 32` for `i < 32`, sum `i + 16` for `i < 16`, and so on
/// down to one.
///
/// # Panics
/// Where `stride` is less than `x.len()` or `weights` is too short.
pub fn dot_rows(weights: Elements<'_>, stride: usize, x: &[f32], out: &mut [f32]) {
    assert!(stride >= x.len());
    for (r, out) in out.iter_mut().enumerate() {
        let mut sums = [0.0_f32; LANES];
        for (k, &x) in x.iter().enumerate() {
            sums[k % LANES] = weights.get(r * stride + k).mul_add(x, sums[k % LANES]);
        }
        *out = fold(sums);
    }
}

/// [`dot_rows`] of `rows` weights that are stored as fixed12 strips, `x.len()` columns each: the same bits as
/// decoding them to bfloat16 first.
///
/// `out` has one sum for each row of these strips; rows past it are padding.
///
/// # Errors
/// Those of [`llmpress_entropy::fixed12::decode_strips`].
pub fn dot_fixed12(
    base: i16,
    strips: &StripsRef<'_>,
    x: &[f32],
    out: &mut [f32],
) -> Result<(), llmpress_entropy::Error> {
    let mut words = vec![0; out.len() * x.len()];
    llmpress_entropy::fixed12::decode_strips(base, x.len(), out.len(), strips, &mut words)?;
    dot_rows(Elements::Bf16(&words), x.len(), x, out);
    Ok(())
}

/// The tree that ends a dot product.
fn fold(mut sums: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            sums[i] += sums[i + half];
        }
        half /= 2;
    }
    sums[0]
}
