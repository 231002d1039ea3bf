//! The derivatives of the root-mean-square norm (Zhang and Sennrich, 2019) by what it norms, and by its weights.

use llmpress_kernels::cpu::PANEL;

/// From the derivative `d` by `norm(x)` to that by x, in place; features x `width` tokens, `width` at most [`PANEL`].
///
/// With r = 1 / sqrt(mean x^2 + eps): dx = r w d - x r^3 (sum w d x) / n.
pub(crate) fn norm_back(x: &[f32], weight: &[f32], eps: f32, width: usize, d: &mut [f32]) {
    let (mut squares, mut along) = ([0.0f32; PANEL], [0.0f32; PANEL]);
    for ((x, d), weight) in x.chunks_exact(width).zip(d.chunks_exact(width)).zip(weight) {
        for (((x, d), square), along) in x.iter().zip(d).zip(&mut squares).zip(&mut along) {
            *square += x * x;
            *along += weight * d * x;
        }
    }
    let n = weight.len() as f32;
    for (square, along) in squares.iter_mut().zip(&mut along) {
        let r = 1.0 / (*square / n + eps).sqrt();
        (*square, *along) = (r, *along * r * r * r / n);
    }
    for ((x, d), weight) in x.chunks_exact(width).zip(d.chunks_exact_mut(width)).zip(weight) {
        for (((x, d), r), along) in x.iter().zip(d).zip(&squares).zip(&along) {
            *d = r * weight * *d - x * along;
        }
    }
}

/// Adds to `out` the derivative by the norm's weights: r d x of each feature, over all tokens.
pub(crate) fn norm_gradient(x: &[f32], eps: f32, width: usize, d: &[f32], out: &mut [f32]) {
    let mut squares = [0.0f32; PANEL];
    for x in x.chunks_exact(width) {
        x.iter().zip(&mut squares).for_each(|(x, square)| *square += x * x);
    }
    let n = out.len() as f32;
    squares.iter_mut().for_each(|square| *square = 1.0 / (*square / n + eps).sqrt());
    for ((x, d), out) in x.chunks_exact(width).zip(d.chunks_exact(width)).zip(out) {
        *out += x.iter().zip(d).zip(&squares).fold(0.0, |sum, ((x, d), r)| sum + r * d * x);
    }
}
