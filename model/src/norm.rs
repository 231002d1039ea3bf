//! Norms of the residual stream and of what sub-layers give out.
//!
//! ```text
//! rms:    x / sqrt(mean x^2 + eps) * weight                        (Zhang and Sennrich, 2019)
//! layer:  the same of x - mean x, and a bias                       (Ba et al., 2016)
//! ```

use llmpress_formats::blueprint::NormKind;
use llmpress_formats::{Checkpoint, Result};
use llmpress_kernels::cpu::{PANEL, rms_norm};
use rayon::prelude::*;

use crate::Panels;
use crate::linear::vector;
use crate::unused::Used;

/// A norm with its weights.
#[derive(Debug)]
pub(crate) struct Norm {
    /// The tensor of its weights.
    pub(crate) name: String,
    /// As they multiply: with the offset of its family.
    pub(crate) weight: Vec<f32>,
    pub(crate) bias: Option<Vec<f32>>,
    /// Whether the mean is taken away first.
    pub(crate) centred: bool,
}

impl Norm {
    /// Of `len` features, whose tensors are called `module`.
    pub(crate) fn open(
        checkpoint: &Checkpoint,
        used: &Used,
        kind: NormKind,
        module: &str,
        len: usize,
    ) -> Result<Self> {
        let name = format!("{module}.weight");
        let mut weight = vector(checkpoint, &name, len)?;
        if kind == NormKind::RmsPlusOne {
            weight.iter_mut().for_each(|w| *w += 1.0);
        }
        used.note(&name);
        let bias = match kind {
            NormKind::Layer { bias: true } => {
                let name = format!("{module}.bias");
                used.note(&name);
                Some(vector(checkpoint, &name, len)?)
            }
            _ => None,
        };
        Ok(Self { name, weight, bias, centred: matches!(kind, NormKind::Layer { .. }) })
    }

    /// `out = norm(x)`.
    pub(crate) fn apply(&self, x: &Panels, eps: f32, out: &mut Panels) {
        if self.centred {
            let mut centred = x.clone();
            centre(&mut centred);
            rms(&centred, &self.weight, eps, out);
        } else {
            rms(x, &self.weight, eps, out);
        }
        let Some(bias) = &self.bias else { return };
        for panel in 0..out.count() {
            let width = out.width(panel);
            for (row, bias) in out.panel_mut(panel).chunks_exact_mut(width).zip(bias) {
                row.iter_mut().for_each(|x| *x += bias);
            }
        }
    }
}

/// `out = norm(x)`, or x where there is no norm.
pub(crate) fn normed(norm: Option<&Norm>, x: &Panels, eps: f32, out: &mut Panels) {
    match norm {
        Some(norm) => norm.apply(x, eps, out),
        None => out.clone_from(x),
    }
}

/// Takes each token's mean away: sums in ascending features.
fn centre(x: &mut Panels) {
    let features = x.features();
    for panel in 0..x.count() {
        let width = x.width(panel);
        let data = x.panel_mut(panel);
        let mut means = [0.0f64; PANEL];
        for row in data.chunks_exact(width) {
            means.iter_mut().zip(row).for_each(|(mean, x)| *mean += f64::from(*x));
        }
        means.iter_mut().for_each(|mean| *mean /= features as f64);
        for row in data.chunks_exact_mut(width) {
            row.iter_mut().zip(&means).for_each(|(x, mean)| *x = (f64::from(*x) - mean) as f32);
        }
    }
}

/// `out = norm(x)` by the root of the mean square.
fn rms(x: &Panels, weight: &[f32], eps: f32, out: &mut Panels) {
    out.resize(x.features(), x.tokens());
    let widths: Vec<usize> = (0..x.count()).map(|panel| x.width(panel)).collect();
    let one = |(panel, out): (usize, &mut [f32])| rms_norm(x.panel(panel), weight, eps, widths[panel], out);
    let panels: Vec<_> = out.panels_mut().enumerate().collect();
    if panels.len() == 1 {
        panels.into_iter().for_each(one);
    } else {
        panels.into_par_iter().for_each(one);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_norm_is_the_formula_of_its_paper_however_many_tokens_there_are() {
        let (features, eps) = (5, 1e-3);
        let weight = vec![0.5, -1.0, 2.0, 1.5, 0.25];
        let bias = vec![0.1, 0.2, -0.3, 0.0, 4.0];
        let norm =
            Norm { name: String::new(), weight: weight.clone(), bias: Some(bias.clone()), centred: true };
        for tokens in [1, 2, PANEL - 1, PANEL, PANEL + 1] {
            let mut x = Panels::zeros(features, tokens);
            for token in 0..tokens {
                let one = |f: usize| ((f * 7 + token * 3) % 11) as f32 - 4.0 + 100.0 * (token % 3) as f32;
                x.set_token(token, (0..features).map(one));
            }
            let mut out = Panels::default();
            norm.apply(&x, eps, &mut out);
            for token in 0..tokens {
                let x: Vec<f64> = x.token(token).map(f64::from).collect();
                let mean = x.iter().sum::<f64>() / x.len() as f64;
                let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / x.len() as f64;
                for (f, y) in out.token(token).enumerate() {
                    let expected = (x[f] - mean) / (variance + f64::from(eps)).sqrt() * f64::from(weight[f])
                        + f64::from(bias[f]);
                    assert!((f64::from(y) - expected).abs() < 1e-5, "{y} {expected}");
                }
            }
        }
    }
}
