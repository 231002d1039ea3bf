//! What was done to the weights beside storing them: rotations, scales, and quantised heads (section 2.2 of the format).
//!
//! ```text
//! folded    into the weights: the model is the same, and a reader need not know    scale; permutation; rotation of values
//! online    the reader does a part of it whenever a token is read                  rotation of the residual stream, of what
//!                                                                                  down_proj gets; quantised heads and cache
//! ```
//!
//! The list is in the order in which it was done. A reader that runs the model must know every online one, so a manifest
//! with one says `requires: ["transforms"]`.

mod words;

use std::collections::BTreeSet;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{Error, Result};
pub use words::{Order, Scales};

/// Required where there is an online transformation.
pub(crate) const TRANSFORMS: &str = "transforms";

/// The largest size of a rotation.
const MAX_SIZE: u32 = 1 << 24;
/// Most factors of a rotation.
const MAX_FACTORS: usize = 32;
/// Most layers.
const MAX_LAYERS: usize = 1 << 16;

/// One transformation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Transform {
    /// An orthogonal matrix between two products.
    Rotation {
        /// Between which.
        site: RotationSite,
        /// The matrix.
        #[serde(flatten)]
        rotation: Rotation,
    },
    /// Outputs divided by scales that the columns of their readers are multiplied by.
    Scale {
        /// Which outputs.
        site: ScaleSite,
        /// The layer.
        layer: usize,
        /// A scale for each output; of `up` those of all experts, one after the other.
        scales: Scales,
    },
    /// Outputs in another order, and the columns of their readers with them.
    Permutation {
        /// Which outputs.
        site: PermutationSite,
        /// The layer.
        layer: usize,
        /// For each place what stood where before; of `down` the orders of all experts, one after the other, each from 0.
        order: Order,
    },
    /// Activations that are quantised whenever a token is read, each head of each token by itself.
    Quantize {
        /// Which ones.
        site: QuantizeSite,
        /// Width: 1 to 8; of the cache 4 or 8.
        bits: u8,
    },
}

/// Where a rotation stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RotationSite {
    /// The residual stream (R1): turned after the embedding and back before the last norm.
    Residual,
    /// Each head's values, turned back by the output projection (R2).
    Value,
    /// The input of the last product of an MLP (R4), wherever it has this size.
    Down,
}

/// Whose outputs are scaled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScaleSite {
    /// The norm before attention; query, key and value read it.
    AttentionNorm,
    /// The norm before the MLP; gate and up of all experts and the router read it.
    MlpNorm,
    /// Values, KV head after KV head; the output projection reads them.
    Value,
    /// The up projection; the down projection reads it.
    Up,
}

/// Whose outputs are in another order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PermutationSite {
    /// Values, KV head after KV head, each in an order of its own; the output projection reads them.
    Value,
    /// The input of the last product of an MLP, which gate and up make.
    Down,
}

/// Which activations are quantised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QuantizeSite {
    /// Query and key after the rotary embedding, and value.
    Qkv,
    /// Key after the rotary embedding, and value, as the cache holds them: in groups of 128 features. Where it stands `Qkv` is of
    /// queries alone.
    Cache,
}

/// A block-diagonal orthogonal matrix: in each block the Kronecker product of Hadamard matrices, over a diagonal of signs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rotation {
    /// Rows and columns.
    pub size: u32,
    /// The orders of the Hadamard matrices, the slowest index first. Their product is the size of a block and divides `size`.
    pub factors: Vec<u32>,
    /// Signs of the features are drawn from it; none are flipped where there is no seed.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub seed: Option<u32>,
}

impl Transform {
    /// Kinds and sites that this version knows, by their names.
    pub const KINDS: [(&'static str, &'static [&'static str]); 4] = [
        ("rotation", &["residual", "value", "down"]),
        ("scale", &["attention_norm", "mlp_norm", "value", "up"]),
        ("permutation", &["value", "down"]),
        ("quantize", &["qkv", "cache"]),
    ];

    /// Whether a reader must do a part of it whenever a token is read.
    pub fn online(&self) -> bool {
        match self {
            Self::Rotation { site, .. } => *site != RotationSite::Value,
            Self::Scale { .. } | Self::Permutation { .. } => false,
            Self::Quantize { .. } => true,
        }
    }

    /// Kind and site, as `rotation of residual`.
    pub fn name(&self) -> String {
        let value = serde_json::to_value(self).unwrap_or_default();
        let text = |key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        format!("{} of {}", text("kind"), text("site"))
    }

    /// Refuses online transformations where what is written cannot say them: a foreign format, a GPU.
    ///
    /// # Errors
    /// [`Error::Unsupported`] that names the first one; `what` says who cannot have it.
    pub fn refuse_online(all: &[Self], path: &Path, what: &str) -> Result<()> {
        match all.iter().find(|transform| transform.online()) {
            Some(transform) => {
                let what = format!("has the online transformation {}, {what}", transform.name());
                Err(Error::unsupported(path, None, what))
            }
            None => Ok(()),
        }
    }

    /// What was done, each kind and site once, in order: `rotation of residual`, `scale of up in 24 layers`.
    pub fn summary(all: &[Self]) -> Vec<String> {
        let mut counts: Vec<(String, usize)> = Vec::new();
        for transform in all {
            let name = transform.name();
            match counts.iter_mut().find(|(known, _)| *known == name) {
                Some((_, count)) => *count += 1,
                None => counts.push((name, 1)),
            }
        }
        let said = |(name, count): (String, usize)| match count {
            1 => name,
            count if !name.starts_with("rotation") => format!("{name} in {count} layers"),
            count => format!("{name} of {count} sizes"),
        };
        counts.into_iter().map(said).collect()
    }

    /// What a manifest with these transformations requires of its readers.
    pub fn requirements(all: &[Self]) -> Vec<String> {
        if all.iter().any(Self::online) { vec![TRANSFORMS.to_owned()] } else { Vec::new() }
    }

    /// Reads and checks a manifest's list.
    ///
    /// # Errors
    /// A kind or a site that this version does not know, by name; values that fit nothing.
    pub fn parse_all(path: &Path, values: &[Value]) -> Result<Vec<Self>> {
        let all: Vec<Self> =
            values.iter().enumerate().map(|(i, value)| Self::parse(path, i, value)).collect::<Result<_>>()?;
        let mut once = BTreeSet::new();
        for (i, one) in all.iter().enumerate() {
            if one.place().is_some_and(|place| !once.insert(place)) {
                let what = format!("transforms: {i} repeats the {}, which stands there once", one.name());
                return Err(Error::corrupt(path, None, what));
            }
        }
        Ok(all)
    }

    /// Where it stands, if only one of its kind may stand there: kind, site, and which of the site's.
    fn place(&self) -> Option<(u8, u8, usize)> {
        match self {
            Self::Rotation { site: site @ RotationSite::Down, rotation } => {
                Some((0, *site as u8, rotation.size as usize))
            }
            Self::Rotation { site, .. } => Some((0, *site as u8, 0)),
            Self::Scale { .. } => None,
            Self::Permutation { site, layer, .. } => Some((1, *site as u8, *layer)),
            Self::Quantize { site, .. } => Some((2, *site as u8, 0)),
        }
    }

    fn parse(path: &Path, index: usize, value: &Value) -> Result<Self> {
        let text = |key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default();
        let (kind, site) = (text("kind"), text("site"));
        let unknown = |what: &str, name: &str, known: &[&str]| {
            let what = format!(
                "transforms: {index} has {what} {name:?}, which is not known to this version (it reads {}): a newer \
                 llmpress is needed",
                known.join(", ")
            );
            Err(Error::unsupported(path, None, what))
        };
        let Some((_, sites)) = Self::KINDS.iter().find(|(name, _)| *name == kind) else {
            return unknown("kind", kind, &Self::KINDS.map(|(name, _)| name));
        };
        if !sites.contains(&site) {
            return unknown(&format!("a {kind} at site"), site, sites);
        }
        let corrupt = |what: String| Error::corrupt(path, None, format!("transforms: {index}: {what}"));
        let transform = Self::deserialize(value).map_err(|e| corrupt(e.to_string()))?;
        transform.check().map_err(corrupt)?;
        Ok(transform)
    }

    fn check(&self) -> Result<(), String> {
        match self {
            Self::Rotation { rotation, .. } => rotation.check(),
            Self::Permutation { layer, .. } => check_layer(*layer),
            Self::Scale { layer, scales, .. } => {
                check_layer(*layer)?;
                match scales.values().iter().position(|s| !s.is_finite()) {
                    Some(at) => Err(format!("scale {at} is not finite")),
                    None => Ok(()),
                }
            }
            Self::Quantize { site: QuantizeSite::Cache, bits: 4 | 8 } => Ok(()),
            Self::Quantize { site: QuantizeSite::Cache, bits } => {
                Err(format!("bits of a cache are {bits}; they must be 4 or 8"))
            }
            Self::Quantize { bits: 1..=8, .. } => Ok(()),
            Self::Quantize { bits, .. } => Err(format!("bits is {bits}; it must be 1 to 8")),
        }
    }
}

fn check_layer(layer: usize) -> Result<(), String> {
    if layer < MAX_LAYERS {
        Ok(())
    } else {
        Err(format!("layer is {layer}; no model has {MAX_LAYERS} of them"))
    }
}

impl Rotation {
    /// Rows and columns of a block of the diagonal.
    pub fn block(&self) -> u32 {
        self.factors.iter().fold(1u32, |n, f| n.saturating_mul(*f))
    }

    fn check(&self) -> Result<(), String> {
        if self.size == 0 || self.size > MAX_SIZE {
            return Err(format!("size is {}; it must be 1 to {MAX_SIZE}", self.size));
        }
        if self.factors.len() > MAX_FACTORS || self.factors.iter().any(|f| *f < 2) {
            return Err(format!("factors must be at most {MAX_FACTORS} numbers from 2 on"));
        }
        if !self.size.is_multiple_of(self.block()) {
            return Err(format!(
                "the product of factors {:?} does not divide size {}",
                self.factors, self.size
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Vec<Transform>> {
        let values: Vec<Value> = serde_json::from_str(text).unwrap();
        Transform::parse_all("llmpress.json".as_ref(), &values)
    }

    #[test]
    fn what_is_written_is_read_again() {
        let rotation = Rotation { size: 576, factors: vec![12, 12, 4], seed: Some(7) };
        let all = vec![
            Transform::Scale {
                site: ScaleSite::AttentionNorm,
                layer: 3,
                scales: Scales::new(&[1.0, -0.0, f32::MIN_POSITIVE, 3.4e38, 1e-45]),
            },
            Transform::Rotation { site: RotationSite::Residual, rotation: rotation.clone() },
            Transform::Rotation { site: RotationSite::Value, rotation: Rotation { seed: None, ..rotation } },
            Transform::Quantize { site: QuantizeSite::Qkv, bits: 4 },
            Transform::Quantize { site: QuantizeSite::Cache, bits: 8 },
            Transform::Permutation {
                site: PermutationSite::Down,
                layer: 2,
                order: Order::new(vec![2, 0, 1]),
            },
        ];
        let text = serde_json::to_string(&all).unwrap();
        assert_eq!(parse(&text).unwrap(), all, "{text}");
        assert!(
            text.contains(r#""kind":"rotation","site":"residual","size":576,"factors":[12,12,4],"seed":7"#),
            "{text}"
        );
        assert_eq!(
            all.iter().map(Transform::online).collect::<Vec<_>>(),
            [false, true, false, true, true, false]
        );
        assert!(text.contains(r#""site":"down","layer":2,"order":"000000020000000000000001""#), "{text}");
        assert_eq!(all[1].name(), "rotation of residual");
        let twice = [&all[..], &all[..1], &all[5..]].concat();
        let said = [
            "scale of attention_norm in 2 layers",
            "rotation of residual",
            "rotation of value",
            "quantize of qkv",
            "quantize of cache",
            "permutation of down in 2 layers",
        ];
        assert_eq!(Transform::summary(&twice), said);
        assert_eq!(Transform::requirements(&all), ["transforms"]);
        assert!(
            Transform::requirements(&all[..1]).is_empty() && Transform::requirements(&all[2..3]).is_empty()
        );
    }

    #[test]
    fn unknown_kinds_and_sites_are_refused_by_name() {
        for (text, named) in [
            (r#"[{"kind":"shear","site":"residual"}]"#, "\"shear\""),
            (r#"[{"kind":"permutation","site":"residual"}]"#, "\"residual\""),
            (r#"[{"kind":"rotation","site":"query","size":4,"factors":[4]}]"#, "\"query\""),
            (r#"[{"site":"residual"}]"#, "kind \"\""),
            (r#"[7]"#, "kind \"\""),
        ] {
            let error = parse(text).unwrap_err();
            assert!(matches!(error, Error::Unsupported { .. }), "{error}");
            assert!(error.to_string().contains(named) && error.to_string().contains("newer"), "{error}");
        }
    }

    #[test]
    fn values_that_fit_nothing_are_refused() {
        let rotation = |fields: &str| format!(r#"{{"kind":"rotation","site":"down",{fields}}}"#);
        let scale = |fields: &str| format!(r#"{{"kind":"scale","site":"up",{fields}}}"#);
        let order = |fields: &str| format!(r#"{{"kind":"permutation","site":"down",{fields}}}"#);
        for (one, named) in [
            (rotation(r#""size":0,"factors":[]"#), "size is 0"),
            (rotation(r#""size":4294967295,"factors":[]"#), "size is"),
            (rotation(r#""size":-4,"factors":[4]"#), "invalid value"),
            (rotation(r#""size":12,"factors":[8]"#), "does not divide"),
            (rotation(r#""size":12,"factors":[65536,65536,65536]"#), "does not divide"),
            (rotation(r#""size":12,"factors":[0]"#), "from 2 on"),
            (rotation(r#""size":12"#), "factors"),
            (rotation(r#""size":4,"factors":[4],"seed":-1"#), "invalid value"),
            (scale(r#""layer":65536,"scales":"3f800000""#), "layer is 65536"),
            (scale(r#""layer":0,"scales":"3f80000""#), "eight"),
            (scale(r#""layer":0,"scales":"3F800000""#), "eight"),
            (scale(r#""layer":0,"scales":"é3f8000""#), "eight"),
            (scale(r#""layer":0,"scales":"7f800000""#), "not finite"),
            (order(r#""layer":65536,"order":"00000000""#), "layer is 65536"),
            (order(r#""layer":0,"order":"0000000""#), "eight"),
            (order(r#""layer":0"#), "order"),
            (r#"{"kind":"quantize","site":"qkv","bits":9}"#.to_owned(), "bits is 9"),
            (r#"{"kind":"quantize","site":"cache","bits":9}"#.to_owned(), "4 or 8"),
            (r#"{"kind":"quantize","site":"cache","bits":5}"#.to_owned(), "4 or 8"),
        ] {
            let error = parse(&format!("[{one}]")).unwrap_err();
            assert!(
                matches!(error, Error::Corrupt { .. }) && error.to_string().contains(named),
                "{one}: {error}"
            );
        }
        let twice =
            r#"[{"kind":"quantize","site":"qkv","bits":4},{"kind":"quantize","site":"qkv","bits":8}]"#;
        assert!(parse(twice).unwrap_err().to_string().contains("quantize of qkv"));
        assert!(parse(&twice.replace("qkv", "cache")).unwrap_err().to_string().contains("quantize of cache"));
        assert!(parse(&twice.replacen("qkv", "cache", 1)).is_ok());
        let one = |layer: u8| order(&format!(r#""layer":{layer},"order":"00000000""#));
        assert!(
            parse(&format!("[{},{}]", one(0), one(0)))
                .unwrap_err()
                .to_string()
                .contains("permutation of down")
        );
        assert!(parse(&format!("[{},{}]", one(0), one(1))).is_ok());
        let r4 = |size| format!(r#"{{"kind":"rotation","site":"down","size":{size},"factors":[4]}}"#);
        assert!(parse(&format!("[{},{}]", r4(8), r4(16))).is_ok());
        assert!(parse(&format!("[{},{}]", r4(8), r4(8))).is_err());
    }
}
