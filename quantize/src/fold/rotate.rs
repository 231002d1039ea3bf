//! Rotations by Hadamard matrices (QuaRot; SpinQuant, section 3: R1, R2, R4).

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use llmpress_formats::{Error, Result, Rotation, RotationSite, ScaleSite, Scales, Transform};
use llmpress_kernels::cpu::Hadamard;
use llmpress_model::{Model, Reads};

/// Which rotations are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rotate {
    /// The residual stream (R1): two Hadamard transforms a token.
    pub residual: bool,
    /// Values of each head (R2): free.
    pub value: bool,
    /// The input of each last product of an MLP (R4): a Hadamard transform a layer and token.
    pub down: bool,
}

impl Rotate {
    /// All of them.
    pub const ALL: Self = Self { residual: true, value: true, down: true };

    const NAMES: [&'static str; 3] = ["r1", "r2", "r4"];

    fn parts(&self) -> [bool; 3] {
        [self.residual, self.value, self.down]
    }
}

/// `r1r2r4`, or the part of it that is wanted.
impl fmt::Display for Rotate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let wanted = Self::NAMES.iter().zip(self.parts()).filter(|(_, wanted)| *wanted);
        wanted.map(|(name, _)| name).try_for_each(|name| f.write_str(name))
    }
}

impl FromStr for Rotate {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut rest = text;
        let [residual, value, down] = Self::NAMES.map(|name| match rest.strip_prefix(name) {
            Some(after) => {
                rest = after;
                true
            }
            None => false,
        });
        if !rest.is_empty() || text.is_empty() {
            return Err(Error::Invalid(format!(
                "{text:?} are no rotations: r1 (residual stream), r2 (values), r4 (before down_proj), in this order, as in r2r4"
            )));
        }
        Ok(Self { residual, value, down })
    }
}

/// The transformations of a model that rotate it, signs drawn from `seed`. Norms are folded into their readers before R1.
///
/// # Errors
/// A rotation that its family does not have, by name.
pub fn rotations(model: &Model, rotate: Rotate, seed: u32) -> Result<Vec<Transform>> {
    let config = model.config();
    let mut list = Vec::new();
    if rotate.residual {
        for layer in 0..config.layers.len() {
            let sites = [ScaleSite::AttentionNorm, ScaleSite::MlpNorm].into_iter().zip(model.norms(layer));
            list.extend(sites.filter_map(|(site, norm)| {
                Some(Transform::Scale { site, layer, scales: Scales::new(norm?) })
            }));
        }
        list.push(rotation(RotationSite::Residual, config.hidden_size, seed)?);
    }
    if rotate.value {
        list.push(rotation(RotationSite::Value, config.head_dim, seed)?);
    }
    if rotate.down {
        let inputs = (0..config.layers.len()).flat_map(|layer| model.inputs_of(layer));
        let inner = inputs.filter(|input| matches!(input.reads, Reads::Inner | Reads::ExpertInner(_)));
        let sizes: BTreeSet<usize> = inner.map(|input| input.features).collect();
        for size in sizes {
            list.push(rotation(RotationSite::Down, size, seed)?);
        }
    }
    // What does not go is found now.
    model.folds(&list)?;
    Ok(list)
}

fn rotation(site: RotationSite, size: usize, seed: u32) -> Result<Transform> {
    let hadamard = Hadamard::new(size, None).map_err(Error::Invalid)?;
    let size = u32::try_from(size).map_err(|_| Error::Invalid(format!("a rotation of size {size}")))?;
    let rotation = Rotation { size, factors: hadamard.factors().to_vec(), seed: Some(seed) };
    Ok(Transform::Rotation { site, rotation })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rotations_have_short_names() {
        assert_eq!(Rotate::ALL.to_string(), "r1r2r4");
        for text in ["r1", "r2", "r4", "r1r2", "r1r4", "r2r4", "r1r2r4"] {
            assert_eq!(text.parse::<Rotate>().unwrap().to_string(), text);
        }
        for text in ["", "r3", "r4r1", "r1,r2", "r1r1"] {
            assert!(text.parse::<Rotate>().unwrap_err().to_string().contains("r2r4"), "{text}");
        }
    }
}
