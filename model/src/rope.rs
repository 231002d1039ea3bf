//! Rotary position embeddings and their scalings (Su et al., RoFormer, section 3.4.2).
//!
//! ```text
//! angle(position p, pair i) = p * f_i,   f_i = theta^(-2 i / dim), scaled
//! (x_i, x_(i + dim/2))  is turned by the angle; features from dim on stay as they are
//! ```

use std::f64::consts::TAU;

use llmpress_formats::{Config, Error, Result};
use serde_json::Value;

use crate::Panels;

/// A rotary embedding: its size and how its frequencies follow from the configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    dim: usize,
    theta: f64,
    scaling: Scaling,
}

#[derive(Clone, Debug, PartialEq)]
enum Scaling {
    None,
    /// Positions divided by a factor.
    Linear {
        factor: f64,
    },
    /// A base that grows with the sequence ("NTK-aware", dynamic).
    Dynamic {
        factor: f64,
        max_positions: f64,
    },
    /// YaRN (Peng et al., section 3.4).
    Yarn {
        factor: f64,
        original: f64,
        beta_fast: f64,
        beta_slow: f64,
        truncate: bool,
        attention: f64,
    },
    /// Llama 3.1: low frequencies divided, high ones kept, those between blended.
    Llama3 {
        factor: f64,
        low: f64,
        high: f64,
        original: f64,
    },
    /// LongRoPE: a factor for each frequency, one list up to the original length and one beyond.
    LongRope {
        short: Vec<f64>,
        long: Vec<f64>,
        original: f64,
        attention: f64,
    },
}

impl RopeConfig {
    /// Reads `parameters`: the `rope_parameters` of transformers 5 or the `rope_scaling` of 4, which may be
    /// null. `theta` holds where they do not say.
    pub(crate) fn parse(config: &Config, parameters: &Value, theta: f64, head_dim: usize) -> Result<Self> {
        let p = Parameters { config, value: parameters };
        let theta = p.number("rope_theta")?.unwrap_or(theta);
        let partial = match p.number("partial_rotary_factor")? {
            Some(partial) => partial,
            None => p.top_level("partial_rotary_factor")?.unwrap_or(1.0),
        };
        let dim = (head_dim as f64 * partial) as usize;
        if dim == 0 || dim > head_dim || !dim.is_multiple_of(2) || theta <= 1.0 {
            return Err(p.corrupt(format!(
                "the rotary embedding turns {dim} of {head_dim} features with base {theta}; it must be an even number \
                 of them and a base above 1"
            )));
        }
        let kind = parameters.get("rope_type").or_else(|| parameters.get("type"));
        let scaling = match kind.and_then(Value::as_str).unwrap_or("default") {
            "default" => Scaling::None,
            "linear" => Scaling::Linear { factor: p.required("factor")? },
            "dynamic" => {
                Scaling::Dynamic { factor: p.required("factor")?, max_positions: p.max_positions()? }
            }
            "yarn" => {
                let original = p.original()?;
                let factor = match p.number("factor")? {
                    Some(factor) => factor,
                    None => p.max_positions()? / original,
                };
                let mscale = |m: f64| if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 };
                let attention =
                    match (p.number("attention_factor")?, p.number("mscale")?, p.number("mscale_all_dim")?) {
                        (Some(attention), ..) => attention,
                        (None, Some(m), Some(all)) => mscale(m) / mscale(all),
                        _ => mscale(1.0),
                    };
                Scaling::Yarn {
                    factor,
                    original,
                    beta_fast: p.number("beta_fast")?.unwrap_or(32.0),
                    beta_slow: p.number("beta_slow")?.unwrap_or(1.0),
                    truncate: parameters.get("truncate").and_then(Value::as_bool).unwrap_or(true),
                    attention,
                }
            }
            "llama3" => Scaling::Llama3 {
                factor: p.required("factor")?,
                low: p.required("low_freq_factor")?,
                high: p.required("high_freq_factor")?,
                original: p.original()?,
            },
            "longrope" | "su" => {
                let original = p.original()?;
                let factor = match p.number("factor")? {
                    Some(factor) => factor,
                    None => p.max_positions()? / original,
                };
                let attention = match p.number("attention_factor")? {
                    Some(attention) => attention,
                    None if factor <= 1.0 => 1.0,
                    None => (1.0 + factor.ln() / original.ln()).sqrt(),
                };
                Scaling::LongRope {
                    short: p.factors("short_factor", dim / 2)?,
                    long: p.factors("long_factor", dim / 2)?,
                    original,
                    attention,
                }
            }
            other => {
                return Err(Error::unsupported(
                    config.path(),
                    None,
                    format!(
                        "rope_type {other:?}; default, linear, dynamic, yarn, llama3 and longrope run here"
                    ),
                ));
            }
        };
        Ok(Self { dim, theta, scaling })
    }

    /// The length of sequence beyond which all of its frequencies are others, keys already cached included.
    pub fn switches_after(&self) -> Option<usize> {
        match &self.scaling {
            Scaling::LongRope { original, .. } => Some(*original as usize),
            _ => None,
        }
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
pub(crate) struct Rotation {
    half: usize,
    cos: Panels,
    sin: Panels,
}

impl Rotation {
    /// Of tokens at positions `first ..` in a sequence of `length`.
    pub(crate) fn new(config: &RopeConfig, first: usize, tokens: usize, length: usize) -> Self {
        let half = config.dim / 2;
        let (frequencies, scale) = config.frequencies(length.max(first + tokens));
        let mut rotation = Self { half, cos: Panels::zeros(half, tokens), sin: Panels::zeros(half, tokens) };
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
    pub(crate) fn turn(&self, panel: usize, width: usize, head: &mut [f32]) {
        let (low, rest) = head.split_at_mut(self.half * width);
        let angles = self.cos.panel(panel).iter().zip(self.sin.panel(panel));
        for ((low, high), (cos, sin)) in low.iter_mut().zip(rest).zip(angles) {
            (*low, *high) = (*low * cos - *high * sin, *high * cos + *low * sin);
        }
    }
}

/// The keys of `rope_parameters` or `rope_scaling`.
struct Parameters<'a> {
    config: &'a Config,
    value: &'a Value,
}

impl Parameters<'_> {
    fn corrupt(&self, what: String) -> Error {
        Error::corrupt(self.config.path(), None, what)
    }

    fn positive(&self, key: &str, value: Option<&Value>) -> Result<Option<f64>> {
        match value.filter(|v| !v.is_null()) {
            None => Ok(None),
            Some(value) => match value.as_f64() {
                Some(n) if n > 0.0 && n.is_finite() => Ok(Some(n)),
                _ => Err(self.corrupt(format!(
                    "{key} of the rotary embedding is {value}; it must be a positive number"
                ))),
            },
        }
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        self.positive(key, self.value.get(key))
    }

    fn top_level(&self, key: &str) -> Result<Option<f64>> {
        self.positive(key, self.config.get(key))
    }

    fn required(&self, key: &str) -> Result<f64> {
        self.number(key)?.ok_or_else(|| self.corrupt(format!("the rotary embedding needs {key}")))
    }

    fn max_positions(&self) -> Result<f64> {
        let key = "max_position_embeddings";
        self.top_level(key)?.ok_or_else(|| self.corrupt(format!("{key} is missing")))
    }

    /// The length that the model was first trained for. Phi-3 keeps it at the top level, which wins.
    fn original(&self) -> Result<f64> {
        let key = "original_max_position_embeddings";
        let original = match self.top_level(key)? {
            Some(original) => original,
            None => match self.number(key)? {
                Some(original) => original,
                None => self.max_positions()?,
            },
        };
        if original > 1.0 { Ok(original) } else { Err(self.corrupt(format!("{key} is {original}"))) }
    }

    fn factors(&self, key: &str, count: usize) -> Result<Vec<f64>> {
        let list = self.value.get(key).and_then(Value::as_array).filter(|l| l.len() == count);
        list.and_then(|l| l.iter().map(|v| v.as_f64().filter(|f| *f > 0.0)).collect()).ok_or_else(|| {
            self.corrupt(format!("{key} of the rotary embedding must be {count} positive numbers"))
        })
    }
}
