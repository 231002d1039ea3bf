//! How far two models' outputs are from each other: by what passes choose (FinerCut, section 3.2; widths of matrices).

use llmpress_kernels::cpu;
use llmpress_model::Panels;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// A distance of logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DistanceKind {
    /// The mean over tokens of the angle between their logits, in radians.
    Angular,
    /// The Frobenius norm of the difference.
    Euclidean,
    /// The mean over tokens of the Jensen-Shannon divergence of their distributions, in nats.
    #[serde(rename = "js")]
    JensenShannon,
}

impl DistanceKind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Angular, Self::Euclidean, Self::JensenShannon];

    /// Its short form.
    pub fn name(self) -> &'static str {
        match self {
            Self::Angular => "angular",
            Self::Euclidean => "euclidean",
            Self::JensenShannon => "js",
        }
    }

    /// The one of a short form.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

/// A distance that is added up window by window.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Distance {
    sum: f64,
    tokens: usize,
}

impl Distance {
    /// Takes up the tokens of a window, in order.
    pub fn add(&mut self, of_tokens: &[f64]) {
        self.sum += of_tokens.iter().sum::<f64>();
        self.tokens += of_tokens.len();
    }

    /// Its value.
    pub fn value(&self, kind: DistanceKind) -> f64 {
        match kind {
            DistanceKind::Euclidean => self.sum.sqrt(),
            _ => self.sum / self.tokens.max(1) as f64,
        }
    }
}

/// What each token adds to a distance: angle, squared norm of the difference, or divergence. Logits are vocabulary x tokens;
/// everything is added in F64 over the vocabulary in order, so threads change nothing.
pub fn distances(kind: DistanceKind, a: &Panels, b: &Panels) -> Vec<f64> {
    let panels: Vec<usize> = (0..a.count()).collect();
    let of_panels: Vec<Vec<f64>> = panels
        .into_par_iter()
        .map(|panel| {
            let (width, a, b) = (a.width(panel), a.panel(panel), b.panel(panel));
            match kind {
                DistanceKind::Angular => angles(a, b, width),
                DistanceKind::Euclidean => squares(a, b, width),
                DistanceKind::JensenShannon => divergences(a, b, width),
            }
        })
        .collect();
    of_panels.concat()
}

fn angles(a: &[f32], b: &[f32], width: usize) -> Vec<f64> {
    let mut sums = vec![[0f64; 3]; width];
    for (a, b) in a.chunks_exact(width).zip(b.chunks_exact(width)) {
        for ((sums, a), b) in sums.iter_mut().zip(a).zip(b) {
            let (a, b) = (f64::from(*a), f64::from(*b));
            sums[0] += a * b;
            sums[1] += a * a;
            sums[2] += b * b;
        }
    }
    let angle = |[product, a, b]: [f64; 3]| (product / (a * b).sqrt()).clamp(-1.0, 1.0).acos();
    sums.into_iter().map(angle).collect()
}

fn squares(a: &[f32], b: &[f32], width: usize) -> Vec<f64> {
    let mut sums = vec![0f64; width];
    for (a, b) in a.chunks_exact(width).zip(b.chunks_exact(width)) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            let difference = f64::from(*a) - f64::from(*b);
            *sum += difference * difference;
        }
    }
    sums
}

/// Jensen-Shannon divergences of softmax distributions.
fn divergences(a: &[f32], b: &[f32], width: usize) -> Vec<f64> {
    let normalisers = |x: &[f32]| -> Vec<f64> {
        let (mut max, mut sum) = (vec![f32::NEG_INFINITY; width], vec![0f64; width]);
        cpu::log_sum_exp(x, width, &mut max, &mut sum);
        sum.iter().zip(&max).map(|(sum, max)| f64::from(*max) + sum.ln()).collect()
    };
    let mut sums = vec![0f64; width];
    cpu::jensen_shannon(a, b, width, &normalisers(a), &normalisers(b), &mut sums);
    sums
}

#[cfg(test)]
mod tests {
    use super::*;

    fn panels(rows: &[[f32; 2]]) -> Panels {
        let mut panels = Panels::zeros(rows.len(), 2);
        for (row, values) in rows.iter().enumerate() {
            values.iter().enumerate().for_each(|(token, value)| panels.set(row, token, *value));
        }
        panels
    }

    #[test]
    fn distances_are_their_definitions() {
        // Token 0: the same direction; token 1: at a right angle.
        let (a, b) = (panels(&[[1.0, 1.0], [2.0, 0.0]]), panels(&[[2.0, 0.0], [4.0, 3.0]]));
        let angles = distances(DistanceKind::Angular, &a, &b);
        assert!(
            angles[0].abs() < 1e-7 && (angles[1] - std::f64::consts::FRAC_PI_2).abs() < 1e-12,
            "{angles:?}"
        );
        assert_eq!(distances(DistanceKind::Euclidean, &a, &b), [1.0 + 4.0, 1.0 + 9.0]);
        let mut total = Distance::default();
        total.add(&[5.0, 10.0]);
        assert_eq!(total.value(DistanceKind::Euclidean), 15f64.sqrt());
        assert_eq!(total.value(DistanceKind::Angular), 7.5);
        // Distributions that share nothing are ln 2 apart; equal ones are not apart, however they are shifted.
        let far = (panels(&[[0.0, 0.0], [-200.0, 5.0]]), panels(&[[-200.0, 7.0], [0.0, 12.0]]));
        let js = distances(DistanceKind::JensenShannon, &far.0, &far.1);
        assert!((js[0] - std::f64::consts::LN_2).abs() < 1e-7 && js[1].abs() < 1e-7, "{js:?}");
    }
}
