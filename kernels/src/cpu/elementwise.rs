//! Norm, gates and softmax over panels.

/// `e^x`, within 2 units in the last place: 0 below -104, infinity above 88.8, NaN for NaN.
#[must_use]
pub fn exp(x: f32) -> f32 {
    x.exp()
}

/// `up[i] = gate[i] / (1 + e^-gate[i]) * up[i]`: the SiLU gate.
pub fn silu_gate(gate: &[f32], up: &mut [f32]) {
    for (up, &gate) in up.iter_mut().zip(gate) {
        *up *= gate / (1.0 + exp(-gate));
    }
}

/// `up[i] = gelu(gate[i]) * up[i]` with the tanh form of GELU:
/// `0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`.
pub fn gelu_tanh_gate(gate: &[f32], up: &mut [f32]) {
    for (up, &x) in up.iter_mut().zip(gate) {
        let inner = 0.797_884_6 * (x + 0.044_715 * x * x * x);
        // tanh(y) = 1 - 2 / (e^2y + 1)
        *up *= 0.5 * x * (2.0 - 2.0 / (exp(2.0 * inner) + 1.0));
    }
}

/// The softmax of each column of `scores` (rows x `width`) in place. Minus infinity becomes 0.
pub fn softmax(scores: &mut [f32], width: usize) {
    for token in 0..width {
        let len = scores.len();
        let column = || (token..len).step_by(width);
        let max = column().map(|i| scores[i]).fold(f32::NEG_INFINITY, f32::max);
        let mut sum = 0.0;
        for i in column() {
            scores[i] = exp(scores[i] - max);
            sum += scores[i];
        }
        for i in column() {
            scores[i] /= sum;
        }
    }
}

/// `out[f, t] = x[f, t] / sqrt(mean over f of x[f, t]^2 + eps) * weight[f]` on a panel of `width` tokens and
/// `weight.len()` features.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, width: usize, out: &mut [f32]) {
    for token in 0..width {
        let mut sum = 0.0_f32;
        for x in x.iter().skip(token).step_by(width) {
            sum = x.mul_add(*x, sum);
        }
        let scale = 1.0 / (sum / weight.len() as f32 + eps).sqrt();
        for (f, weight) in weight.iter().enumerate() {
            let i = f * width + token;
            out[i] = x[i] * scale * weight;
        }
    }
}
