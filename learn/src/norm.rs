//! The derivative of the root-mean-square norm by what it norms (Zhang and Sennrich, 2019).

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
