//! How a matrix is to be quantised.

use std::fmt;

use llmpress_formats::encoding::abq::Abq;
use llmpress_formats::{Error, Result};
use serde::{Deserialize, Serialize};

/// Where zero may lie on a grid.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ZeroPoint {
    /// Anywhere: an offset is stored.
    #[default]
    Real,
    /// On a code from 0 to the greatest one.
    Integer,
    /// On the middle code: nothing is stored.
    Symmetric,
}

/// How codes and grids are found, each way dearer and better than the one before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Rung {
    /// Round to nearest on the grid from the least to the greatest weight. Goes by no text.
    Rtn,
    /// Round to nearest on the best grid found for the squares of what each column multiplies; without a text, for
    /// equal ones.
    Grid,
    /// Error feedback along the columns (GPTQ) on that grid, towards weights that make up for what the layers before
    /// have lost, then codes and grids polished in turn. Needs a text.
    #[default]
    Gptq,
}

impl Rung {
    /// Its name in recipes and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Rtn => "rtn",
            Self::Grid => "grid",
            Self::Gptq => "gptq",
        }
    }
}

impl fmt::Display for Rung {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How the matrices of a sub-layer are learned together, from where error feedback leaves them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Learn {
    /// Steps; by width where none are said ([`Self::steps`]).
    pub steps: Option<u32>,
    /// What draws windows.
    pub seed: u64,
}

impl Learn {
    /// The most steps.
    pub const MOST_STEPS: u32 = 100_000;

    /// The fewest windows: of so many one is held back, which no step sees, to judge by.
    pub const LEAST_WINDOWS: usize = llmpress_learn::HELD_BACK;

    /// Refuses a text of so many windows where it is too short to learn from.
    ///
    /// # Errors
    /// [`Error::Invalid`], with what would be right.
    pub fn check_windows(windows: usize) -> Result<()> {
        if windows >= Self::LEAST_WINDOWS {
            return Ok(());
        }
        Err(Error::Invalid(format!(
            "learning takes {} calibration windows at least, of which one is held back to judge by, and there are \
             {windows}: raise --calib-windows, with a shorter --calib-window where the text has no more, or leave `learn` out",
            Self::LEAST_WINDOWS
        )))
    }

    /// Steps at a width: the fewer bits the more there is to gain.
    pub fn steps(&self, bits: u8) -> u32 {
        self.steps.unwrap_or(match bits {
            0..=2 => 400,
            3 => 300,
            _ => 200,
        })
    }
}

/// How a matrix is to be quantised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Spec {
    /// Width, balance, groups: what is stored.
    pub abq: Abq,
    /// Where zero may lie.
    pub zero: ZeroPoint,
    /// How it is done.
    pub rung: Rung,
    /// Whether it is learned from there, with the other matrices of its sub-layer.
    pub learn: Option<Learn>,
}

impl Spec {
    /// Refuses what the encoding does not have, and a grid that could say zero and one other value alone.
    ///
    /// # Errors
    /// [`Error::Invalid`], with what would be right.
    pub fn check(&self) -> Result<()> {
        self.abq.check()?;
        if self.abq.bits == 1 && !self.abq.balanced && self.zero == ZeroPoint::Symmetric {
            return Err(Error::Invalid(
                "a symmetric grid of 1 bit has zero and one other value: take w1* (balanced) or a real zero point"
                    .to_owned(),
            ));
        }
        if let Some(learn) = self.learn {
            if self.rung != Rung::Gptq {
                return Err(Error::Invalid(format!("{} is no start to learn from: gptq is", self.rung)));
            }
            if learn.steps.is_some_and(|steps| steps == 0 || steps > Learn::MOST_STEPS) {
                return Err(Error::Invalid(format!("steps of learning: 1 to {}", Learn::MOST_STEPS)));
            }
        }
        Ok(())
    }

    /// The greatest code.
    pub(crate) fn top(&self) -> u8 {
        // At most 255: balanced grids are of 1 and 2 bits.
        (self.abq.levels() - 1).min(255) as u8
    }
}
