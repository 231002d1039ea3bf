//! Rotary position embeddings and their scalings (Su et al., RoFormer, section 3.4.2).
//!
//! ```text
//! angle(position p, pair i) = p * f_i,   f_i = theta^(-2 i / dim), scaled
//! (x_i, x_(i + dim/2))  is turned by the angle; features from dim on stay as they are
//! (x_2i, x_(2i + 1))    in models that turn neighbours
//! ```

mod parameters;

use std::f64::consts::TAU;

use crate::Panels;

/// A rotary embedding: its size and how its frequencies follow from the configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    dim: usize,
    theta: f64,
    scaling: Scaling,
    neighbours: bool,
}

/// How frequencies are scaled; lengths are in tokens.
#[derive(Clone, Debug, PartialEq)]
pub enum Scaling {
    /// Not at all.
    None,
    /// Positions divided by a factor.
    Linear {
        /// The factor.
        factor: f64,
    },
    /// A base that grows with the sequence ("NTK-aware", dynamic).
    Dynamic {
        /// How far it is stretched.
        factor: f64,
        /// The length up to which it is not.
        max_positions: f64,
    },
    /// YaRN (Peng et al., section 3.4).
    Yarn {
        /// How far low frequencies are stretched.
        factor: f64,
        /// The length that the model was first trained for.
        original: f64,
        /// Turns within that length from which on a frequency is kept.
        beta_fast: f64,
        /// Turns up to which it is divided by the whole factor.
        beta_slow: f64,
        /// Whether the bounds between are whole pairs.
        truncate: bool,
        /// What sine and cosine are multiplied by.
        attention: f64,
    },
    /// Llama 3.1: low frequencies divided, high ones kept, those between blended.
    Llama3 {
        /// What low frequencies are divided by.
        factor: f64,
        /// Turns within the original length below which a frequency is low.
        low: f64,
        /// Turns above which it is high.
        high: f64,
        /// The length that the model was first trained for.
        original: f64,
    },
    /// LongRoPE: a factor for each frequency, one list up to the original length and one beyond.
    LongRope {
        /// Up to the original length.
        short: Vec<f64>,
        /// Beyond.
        long: Vec<f64>,
        /// The length that the model was first trained for.
        original: f64,
        /// What sine and cosine are multiplied by.
        attention: f64,
    },
}

impl RopeConfig {
    /// How many features of a head it turns.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// The base of its frequencies.
    pub fn theta(&self) -> f64 {
        self.theta
    }

    /// How its frequencies are scaled.
    pub fn scaling(&self) -> &Scaling {
        &self.scaling
    }

    /// One that turns nothing.
    pub(crate) fn none() -> Self {
        Self { dim: 0, theta: 1e4, scaling: Scaling::None, neighbours: false }
    }

    /// Turns features half the turned part away together, not neighbours.
    pub(crate) fn turn_halves(&mut self) {
        self.neighbours = false;
    }

    /// Whether neighbouring features are turned together.
    pub fn turns_neighbours(&self) -> bool {
        self.neighbours
    }

    /// The length of sequence beyond which all of its frequencies are others, keys already cached included.
    pub fn switches_after(&self) -> Option<usize> {
        match &self.scaling {
            Scaling::LongRope { original, .. } => Some(*original as usize),
            _ => None,
        }
    }

    /// Whether frequencies depend on the length of the sequence.
    pub fn depends_on_length(&self) -> bool {
        matches!(self.scaling, Scaling::Dynamic { .. } | Scaling::LongRope { .. })
    }

    /// The turns of each pair a position, and what sine and cosine are multiplied by, for a sequence of
    /// `length` tokens.
    pub fn frequencies(&self, length: usize) -> (Vec<f32>, f32) {
        let power = |theta: f64| move |i: usize| theta.powf(-2.0 * i as f64 / self.dim as f64);
        let plain = power(self.theta);
        let half = self.dim / 2;
        let mut attention = 1.0;
        let frequencies: Vec<f64> = match &self.scaling {
            Scaling::None => (0..half).map(plain).collect(),
            Scaling::Linear { factor } => (0..half).map(|i| plain(i) / factor).collect(),
            Scaling::Dynamic { factor, max_positions } => {
                let length = (length as f64).max(*max_positions);
                let stretch = factor * length / max_positions - (factor - 1.0);
                // Two features have one frequency, 1, whatever the base.
                let exponent = if self.dim > 2 { self.dim as f64 / (self.dim - 2) as f64 } else { 1.0 };
                (0..half).map(power(self.theta * stretch.powf(exponent))).collect()
            }
            Scaling::Yarn { factor, original, beta_fast, beta_slow, truncate, attention: a } => {
                attention = *a;
                let dim = self.dim as f64;
                // The pair that makes this many turns within the original length.
                let pair = |turns: f64| dim * (original / (turns * TAU)).ln() / (2.0 * self.theta.ln());
                let (mut low, mut high) = (pair(*beta_fast), pair(*beta_slow));
                if *truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                (low, high) = (low.max(0.0), high.min(dim - 1.0));
                if low == high {
                    high += 0.001;
                }
                (0..half)
                    .map(|i| {
                        let interpolated = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                        plain(i) * ((1.0 - interpolated) + interpolated / factor)
                    })
                    .collect()
            }
            Scaling::Llama3 { factor, low, high, original } => (0..half)
                .map(|i| {
                    let f = plain(i);
                    let turns = original * f / TAU;
                    if turns > *high {
                        f
                    } else if turns < *low {
                        f / factor
                    } else {
                        let kept = (turns - low) / (high - low);
                        f * ((1.0 - kept) / factor + kept)
                    }
                })
                .collect(),
            Scaling::LongRope { short, long, original, attention: a } => {
                attention = *a;
                let factors = if length as f64 > *original { long } else { short };
                (0..half).map(|i| plain(i) / factors[i]).collect()
            }
        };
        (frequencies.into_iter().map(|f| f as f32).collect(), attention as f32)
    }
}

/// Cosine and sine of an angle, `position * frequency`, times `scale`. The product is rounded as the reference
/// implementation rounds it.
pub(crate) fn cos_sin(position: usize, frequency: f32, scale: f32) -> (f32, f32) {
    let angle = f64::from(position as f32 * frequency);
    (angle.cos() as f32 * scale, angle.sin() as f32 * scale)
}

/// Sines and cosines of a run of positions.
#[derive(Debug)]
pub struct Rotation {
    half: usize,
    neighbours: bool,
    cos: Panels,
    sin: Panels,
}

impl Rotation {
    /// Of tokens at positions `first ..` in a sequence of `length`.
    pub fn new(config: &RopeConfig, first: usize, tokens: usize, length: usize) -> Self {
        let half = config.dim / 2;
        let (frequencies, scale) = config.frequencies(length.max(first + tokens));
        let (cos, sin) = (Panels::zeros(half, tokens), Panels::zeros(half, tokens));
        let mut rotation = Self { half, neighbours: config.neighbours, cos, sin };
        for token in 0..tokens {
            for (i, f) in frequencies.iter().enumerate() {
                let (cos, sin) = cos_sin(first + token, *f, scale);
                rotation.cos.set(i, token, cos);
                rotation.sin.set(i, token, sin);
            }
        }
        rotation
    }

    /// Turns one head of panel `panel`: its features x the panel's tokens.
    pub fn turn(&self, panel: usize, width: usize, head: &mut [f32]) {
        self.pairs(panel, width, head, |x, y, cos, sin| (x * cos - y * sin, y * cos + x * sin));
    }

    /// The transpose of [`Self::turn`]: what derivatives go through. Where sine and cosine are scaled it scales once more.
    pub fn transposed(&self, panel: usize, width: usize, head: &mut [f32]) {
        self.pairs(panel, width, head, |x, y, cos, sin| (x * cos + y * sin, y * cos - x * sin));
    }

    /// Every pair with its cosine and sine.
    #[inline(always)]
    fn pairs(
        &self,
        panel: usize,
        width: usize,
        head: &mut [f32],
        turn: impl Fn(f32, f32, f32, f32) -> (f32, f32),
    ) {
        if self.half == 0 {
            return;
        }
        let (cos, sin) = (self.cos.panel(panel), self.sin.panel(panel));
        let one = |low: &mut [f32], high: &mut [f32], cos: &[f32], sin: &[f32]| {
            for ((low, high), (cos, sin)) in low.iter_mut().zip(high).zip(cos.iter().zip(sin)) {
                (*low, *high) = turn(*low, *high, *cos, *sin);
            }
        };
        if self.neighbours {
            let angles = cos.chunks_exact(width).zip(sin.chunks_exact(width));
            for (pair, (cos, sin)) in head.chunks_exact_mut(2 * width).zip(angles) {
                let (low, high) = pair.split_at_mut(width);
                one(low, high, cos, sin);
            }
        } else {
            let (low, high) = head.split_at_mut(self.half * width);
            one(low, high, cos, sin);
        }
    }
}
