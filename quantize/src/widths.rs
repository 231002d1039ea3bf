//! Widths by matrix under a budget: more bits where they matter.
//!
//! ```text
//! one matrix on a grid of 3 bits --> distance of the logits, measured        how much its error matters
//! some of its rows at each width --> squares of the error under h            how the error goes with the width
//! loss(width) = distance x error(width) / error(3 bits); budget --> widths of the least sum of losses
//! ```
//!
//! Losses of matrices count as independent and as going with the square of the error, which small errors do.

mod measure;

use std::collections::BTreeMap;
use std::str::FromStr;

use llmpress_calibrate::{Calibration, Choice, Room, allocate};
use llmpress_formats::encoding::abq::{self, ZeroKind};
use llmpress_formats::{Dtype, Error, Result};
use llmpress_model::Model;

use crate::kept::is_halved;
use crate::{Spec, ZeroPoint};
pub use measure::Measured;
use measure::Sensitivity;

/// Widths that a matrix may get. What one bit does to a model is far beyond what errors of 3 bits tell.
const WIDTHS: [u8; 7] = [2, 3, 4, 5, 6, 7, 8];

/// A mean of true bits a weight, scales and zero points included, in hundredths.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MeanBits(pub u32);

impl MeanBits {
    /// Bits.
    pub fn bits(self) -> f64 {
        f64::from(self.0) / 100.0
    }

    /// The width at or below it.
    pub fn width(self) -> u8 {
        (self.0 / 100).clamp(1, 8) as u8
    }
}

impl FromStr for MeanBits {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (whole, part) = text.split_once('.').unwrap_or((text, "0"));
        let number = |text: &str| match text.bytes().all(|b| b.is_ascii_digit()) {
            true => text.parse::<u32>().ok(),
            false => None,
        };
        let found = match (number(whole), number(part), part.len()) {
            (Some(whole @ 1..=8), Some(tenths), 1) => Some(whole * 100 + tenths * 10),
            (Some(whole @ 1..=8), Some(hundredths), 2) => Some(whole * 100 + hundredths),
            _ => None,
        };
        found.map(Self).ok_or_else(|| {
            Error::Invalid(format!(
                "{text:?} is no mean of bits: 1 to 8.99, with two decimals at most, as 3.25"
            ))
        })
    }
}

/// Bits that a matrix takes, with scales and zero points of 16 bits, which few matrices exceed.
pub fn expected_bits(spec: &Spec, rows: u64, cols: u64) -> u64 {
    let zero = match spec.zero {
        ZeroPoint::Symmetric => ZeroKind::Symmetric,
        ZeroPoint::Integer => ZeroKind::Integer,
        ZeroPoint::Real => ZeroKind::Real(Dtype::F16),
    };
    let components = abq::components(&spec.abq, rows, cols, Dtype::F16, zero);
    let bytes = components.iter().filter_map(|c| c.dtype.byte_len(&c.shape)).fold(0, u64::saturating_add);
    bytes.saturating_mul(8)
}

/// Gives every matrix of a layer the width that is best for a model under a budget of bits, which those of `specs` that are no
/// linears of a layer do not count in. The losses that they are expected to have together are never more than those of any one
/// width for all that the budget has room for.
///
/// # Errors
/// A budget that not even the least width has room for; those of [`crate::run`]'s inputs: tensors, activations, files.
pub fn assign(
    model: &mut Model,
    specs: &BTreeMap<String, Spec>,
    mean: MeanBits,
    calibration: &Calibration,
    room: &Room,
    progress: &mut dyn Measured,
) -> Result<BTreeMap<String, Spec>> {
    for tensor in specs.keys() {
        if is_halved(model.checkpoint(), tensor)? {
            return Err(Error::Invalid(format!(
                "{tensor}: two of four of its weights are kept: give it a width, not a share of a mean"
            )));
        }
    }
    let sensitivities = measure::measure(model, specs, calibration, room, progress)?;
    let mut choices = Vec::with_capacity(sensitivities.len());
    let mut weights = 0u64;
    for Sensitivity { tensor, rows, cols, losses } in &sensitivities {
        let Some(spec) = specs.get(tensor) else { continue };
        let (rows, cols) = (*rows as u64, *cols as u64);
        weights = weights.saturating_add(rows * cols);
        let choice = |(width, loss): &(u8, f64)| {
            let spec = with_width(spec, *width);
            Choice { cost: expected_bits(&spec, rows, cols), loss: *loss }
        };
        choices.push(losses.iter().map(choice).collect::<Vec<_>>());
    }
    let budget = (mean.bits() * weights as f64).floor() as u64;
    let chosen = allocate(&choices, budget).ok_or_else(|| {
        let least: u64 = choices.iter().filter_map(|c| c.iter().map(|c| c.cost).min()).sum();
        Error::Invalid(format!(
            "{} bits a weight: these matrices take {:.3} at least, scales and zero points included",
            mean.bits(),
            least as f64 / weights.max(1) as f64
        ))
    })?;
    let mut assigned = specs.clone();
    for (sensitivity, choice) in sensitivities.iter().zip(chosen) {
        if let (Some(spec), Some((width, _))) =
            (assigned.get_mut(&sensitivity.tensor), sensitivity.losses.get(choice))
        {
            *spec = with_width(spec, *width);
        }
    }
    Ok(assigned)
}

fn with_width(spec: &Spec, bits: u8) -> Spec {
    Spec { abq: abq::Abq { bits, ..spec.abq }, ..*spec }
}
