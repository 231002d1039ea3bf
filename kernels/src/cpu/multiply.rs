//! Matrix times panel: the product of a prefill.

/// `out[r * width + t] = sum over k of weights[r * stride + k] * x[k * width + t]`, the rows of `out` being
/// `out.len() / width` and `k` running over `x.len() / width`.
///
/// Each sum starts from +0 and takes its terms in ascending `k`, every one by a fused multiply-add: the
/// bits do not depend on the processor, nor on how tokens or rows are split into calls.
///
/// # Panics
/// Where `width` is 0, `x` or `out` are no whole rows of `width`, `stride` is less than the columns, or
/// `weights` is too short.
pub fn multiply(weights: &[f32], stride: usize, x: &[f32], width: usize, out: &mut [f32]) {
    let cols = x.len() / width;
    assert!(x.len().is_multiple_of(width) && out.len().is_multiple_of(width) && stride >= cols);
    for (r, out) in out.chunks_exact_mut(width).enumerate() {
        out.fill(0.0);
        for (&w, x) in weights[r * stride..][..cols].iter().zip(x.chunks_exact(width)) {
            for (sum, &x) in out.iter_mut().zip(x) {
                *sum = w.mul_add(x, *sum);
            }
        }
    }
}
