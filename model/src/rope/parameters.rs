//! Which rotary embeddings a configuration asks for, in all the forms that transformers 4 and 5 wrote.
//!
//! ```text
//! rope_scaling (4)      beside rope_theta and partial_rotary_factor at the top level; where it is there and not
//!                       empty it counts instead of rope_parameters
//! rope_parameters (5)   holds all of it; rope_theta of the top level counts where it does not say
//! by window             rope_parameters by layer type; rope_scaling goes into full_attention
//! ```

use llmpress_formats::blueprint::{Rope, RopeSets};
use llmpress_formats::{Blueprint, Config, Error, Result};
use serde_json::{Map, Value};

use super::{RopeConfig, Scaling};

/// By layer type.
const FULL: &str = "full_attention";
const SLIDING: &str = "sliding_attention";

impl RopeConfig {
    /// The rotary embeddings of a model: none, one, or that of layers that see everything and that of those with a window.
    pub(crate) fn of_model(config: &Config, blueprint: &Blueprint, head_dim: usize) -> Result<Vec<Self>> {
        let Some(rope) = &blueprint.rope else { return Ok(Vec::new()) };
        let scaling = Parameters::of(config, rope, "rope_scaling")?;
        let parameters = Parameters::of(config, rope, "rope_parameters")?;
        let theta = scaling.top_level("rope_theta")?;
        if let RopeSets::ByWindow { key, theta: local } = rope.sets {
            let (mut full, sliding) = (parameters.of_layers(FULL), parameters.of_layers(SLIDING));
            full.values.extend(scaling.values);
            let local = parameters.top_level(key)?.unwrap_or(local);
            let full = Self::parse(&full, theta.unwrap_or(rope.theta), head_dim)?;
            return Ok(vec![full, Self::parse(&sliding, local, head_dim)?]);
        }
        let chosen = if scaling.values.is_empty() { parameters } else { scaling };
        if let Some(layers) = [FULL, SLIDING].into_iter().find(|layers| chosen.get(layers).is_some()) {
            let what =
                format!("rope_parameters by layer type ({layers}): {} models have one set", blueprint.name);
            return Err(Error::unsupported(config.path(), None, what));
        }
        Ok(vec![Self::parse(&chosen, theta.unwrap_or(rope.theta), head_dim)?])
    }

    /// Reads one set of parameters. `theta` holds where they do not say.
    fn parse(p: &Parameters<'_>, theta: f64, head_dim: usize) -> Result<Self> {
        let config = p.config;
        let theta = p.number("rope_theta")?.unwrap_or(theta);
        let kind = p.kind()?;
        let said = match p.number("partial_rotary_factor")? {
            Some(partial) => Some(partial),
            None => p.top_level("partial_rotary_factor")?,
        };
        let partial = match (p.rope.partial, said) {
            (Some(default), said) => said.unwrap_or(default),
            // What is not scaled takes no notice of it.
            (None, Some(partial)) if kind != "default" && partial != 1.0 => {
                let what = format!(
                    "partial_rotary_factor {partial}: models of this model_type turn all of a head's features"
                );
                return Err(Error::unsupported(config.path(), None, what));
            }
            (None, _) => 1.0,
        };
        let dim = (head_dim as f64 * partial) as usize;
        if dim == 0 || dim > head_dim || !dim.is_multiple_of(2) || theta <= 1.0 {
            return Err(p.corrupt(format!(
                "the rotary embedding turns {dim} of {head_dim} features with base {theta}; it must be an even number \
                 of them and a base above 1"
            )));
        }
        let scaling = match kind {
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
                    truncate: p.get("truncate").and_then(Value::as_bool).unwrap_or(true),
                    attention,
                }
            }
            "llama3" => Scaling::Llama3 {
                factor: p.required("factor")?,
                low: p.required("low_freq_factor")?,
                high: p.required("high_freq_factor")?,
                original: p.original()?,
            },
            "longrope" => {
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
        Ok(Self { dim, theta, scaling, neighbours: p.rope.neighbours })
    }
}

/// One set of parameters.
struct Parameters<'a> {
    config: &'a Config,
    rope: &'a Rope,
    values: Map<String, Value>,
}

impl<'a> Parameters<'a> {
    /// Those of `key`; none where it is absent or null.
    fn of(config: &'a Config, rope: &'a Rope, key: &str) -> Result<Self> {
        let values = match config.get(key) {
            None | Some(Value::Null) => Map::new(),
            Some(Value::Object(values)) => values.clone(),
            Some(other) => {
                let what = format!("{key} is {other}; it must be an object");
                return Err(Error::corrupt(config.path(), None, what));
            }
        };
        Ok(Self { config, rope, values })
    }

    /// Those for one type of layers, of parameters by layer type.
    fn of_layers(&self, layers: &str) -> Self {
        let values = self.get(layers).and_then(Value::as_object).cloned().unwrap_or_default();
        Self { config: self.config, rope: self.rope, values }
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key)
    }

    /// The kind of scaling.
    fn kind(&self) -> Result<&str> {
        let kind = self.get("rope_type").or_else(|| self.get("type")).filter(|kind| !kind.is_null());
        let kind = match kind {
            None => "default",
            Some(kind) => kind
                .as_str()
                .ok_or_else(|| self.corrupt(format!("rope_type is {kind}; it must be a name")))?,
        };
        Ok(match kind {
            "su" => "longrope",
            "yarn" if self.rope.yarn_is_longrope => "longrope",
            kind => kind,
        })
    }

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
        self.positive(key, self.get(key))
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
        let top_level = if self.rope.sets == RopeSets::One { self.top_level(key)? } else { None };
        let original = match top_level {
            Some(original) => original,
            None => match self.number(key)? {
                Some(original) => original,
                None => self.max_positions()?,
            },
        };
        if original > 1.0 { Ok(original) } else { Err(self.corrupt(format!("{key} is {original}"))) }
    }

    fn factors(&self, key: &str, count: usize) -> Result<Vec<f64>> {
        let list = self.get(key).and_then(Value::as_array).filter(|l| l.len() == count);
        list.and_then(|l| l.iter().map(|v| v.as_f64().filter(|f| *f > 0.0)).collect()).ok_or_else(|| {
            self.corrupt(format!("{key} of the rotary embedding must be {count} positive numbers"))
        })
    }
}
