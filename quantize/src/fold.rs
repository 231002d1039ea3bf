//! Transformations that make weights and activations easier to quantise: which ones a model gets.
//!
//! ```text
//! rotations    norms folded into their readers, then R1, R2, R4 of the model's sizes: outliers are spread
//! smoothing    s = sqrt(act / weight) of each channel between a producer and its readers: outliers are shared
//! ```
//!
//! What they do to each tensor is [`llmpress_model::Folds`]; this says which are wanted.

mod rotate;
mod smooth;

use llmpress_calibrate::Calibration;
use llmpress_formats::{Error, QuantizeSite, Result, Transform};
use llmpress_model::Model;

pub use rotate::{Rotate, rotations};
pub(crate) use smooth::round;
pub use smooth::{Smooth, smoothing};

/// Signs of rotations are drawn from it.
const SEED: u32 = 1;

/// What a model gets before its matrices are quantised.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Transformations {
    /// Rotations, if any.
    pub rotate: Option<Rotate>,
    /// Diagonal scaling wherever no rotation spreads outliers.
    pub smooth: bool,
    /// Bits to which each head's query, key and value are quantised; none: as they are.
    pub qkv_bits: Option<u8>,
    /// Bits in which the cache holds keys and values, 4 or 8; none: as they are. With them `qkv_bits` are of queries alone.
    pub cache_bits: Option<u8>,
}

impl Transformations {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Where scales are wanted.
    fn smooth(&self) -> Smooth {
        let rotate = self.rotate.unwrap_or(Rotate { residual: false, value: false, down: false });
        Smooth { norms: !rotate.residual, value: !rotate.value, up: !rotate.down }
    }

    /// Refuses what says nothing.
    ///
    /// # Errors
    /// Scales where rotations stand everywhere; widths that there are not.
    pub fn check(&self) -> Result<()> {
        if self.smooth && self.rotate == Some(Rotate::ALL) {
            return Err(Error::Invalid(
                "smooth leaves nothing to scale where r1, r2 and r4 rotate: rotate=r2r4 leaves it the norms"
                    .to_owned(),
            ));
        }
        match (self.qkv_bits, self.cache_bits) {
            (Some(bits), _) if !(1..=8).contains(&bits) => {
                Err(Error::Invalid(format!("qkv{bits}: query, key and value have 1 to 8 bits")))
            }
            (_, Some(bits)) if !matches!(bits, 4 | 8) => {
                Err(Error::Invalid(format!("kv{bits}: a cache has 4 or 8 bits (kv4, kv8)")))
            }
            _ => Ok(()),
        }
    }

    /// The transformations of a model: scales, from what its linears multiply in some windows, then rotations, then what is
    /// quantised online.
    ///
    /// # Errors
    /// Those of [`Self::check`]; what the model's family does not support, by name; smoothing without windows.
    pub fn of(&self, model: &Model, calibration: Option<&Calibration>) -> Result<Vec<Transform>> {
        self.check()?;
        let mut list = Vec::new();
        if self.smooth {
            let calibration = calibration
                .ok_or_else(|| Error::Invalid("smooth goes by a text: give one with --calib".to_owned()))?;
            list.extend(smoothing(model, calibration, self.smooth())?);
        }
        if let Some(rotate) = self.rotate {
            list.extend(rotations(model, rotate, SEED)?);
        }
        let of = |site| move |bits| Transform::Quantize { site, bits };
        list.extend(self.qkv_bits.map(of(QuantizeSite::Qkv)));
        list.extend(self.cache_bits.map(of(QuantizeSite::Cache)));
        Ok(list)
    }
}
