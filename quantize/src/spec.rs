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

/// What is learned together, and towards what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Grain {
    /// The matrices of a sub-layer, towards what the original's stream is after it.
    #[default]
    SubLayer,
    /// Those of both sub-layers of a block, towards what the original gives out on its own stream and on that of the model
    /// as it is quantised so far (ABQ-LLM).
    Block,
    /// All of the decoder, towards what the dense model says of the next token: once every block is quantised.
    Model,
}

/// What of a matrix is learned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LearnedPart {
    /// Where each weight lies on its grid, and the grids (EfficientQAT).
    #[default]
    Places,
    /// The ends of each grid: its scale and zero point. Codes stay as error feedback chose them.
    Clip,
    /// Those, and which way each weight is rounded, by steps of signs (SignRound).
    Round,
}

/// What is learned of a block beside its matrices, and what its loss holds beside the distance of what it gives out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Beside {
    /// Scales of channels, folded into norms and matrices, wherever no rotation stands.
    pub scale: bool,
    /// A product of two vectors added to `down_proj` before it is rounded, in the first three and the last four blocks.
    pub compensate: bool,
    /// Distribution correction: the angle between what is given out and what is to be.
    pub correct: bool,
    /// How far attention maps are from what they are to be.
    pub maps: bool,
}

/// How matrices are learned together, from where error feedback leaves them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Learn {
    /// Steps, a window each, or four of them where the whole model is learned; by width where neither they nor epochs are said ([`Self::steps`]).
    pub steps: Option<u32>,
    /// How often each window is seen, where that is said instead.
    pub epochs: Option<u32>,
    /// What draws windows.
    pub seed: u64,
    /// What is learned together.
    pub grain: Grain,
    /// What of each matrix.
    pub of: LearnedPart,
    /// What else, of blocks.
    pub beside: Beside,
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

    /// Windows of a step.
    pub fn batch(&self) -> u64 {
        if self.grain == Grain::Model { u64::from(crate::whole::BATCH) } else { 1 }
    }

    /// Steps at a width, of so many windows: the fewer bits the more there is to gain.
    pub fn steps(&self, bits: u8, windows: usize) -> u32 {
        let by_epochs = self.epochs.map(|epochs| {
            let steps = u64::from(epochs).saturating_mul(windows as u64).div_ceil(self.batch());
            u32::try_from(steps).unwrap_or(u32::MAX).clamp(1, Self::MOST_STEPS)
        });
        self.steps.or(by_epochs).unwrap_or(match bits {
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
    /// Whether it is learned from there, with other matrices.
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
            match (learn.epochs, learn.steps) {
                (Some(0), _) => return Err(Error::Invalid("epochs of learning: 1 and more".to_owned())),
                (Some(_), Some(_)) => {
                    let what = "steps and epochs say the same: how long is learned; give one of them";
                    return Err(Error::Invalid(what.to_owned()));
                }
                _ => {}
            }
            if learn.grain != Grain::Block && learn.beside != Beside::default() {
                return Err(Error::Invalid(
                    "scale, compensate, correct and maps are of whole blocks: say learn=block".to_owned(),
                ));
            }
        }
        Ok(())
    }

    /// How it is learned with its sub-layer or block, where it is.
    pub(crate) fn by_layer(&self) -> Option<Learn> {
        self.learn.filter(|learn| learn.grain != Grain::Model)
    }

    /// How it is learned with the whole model, where it is.
    pub fn whole(&self) -> Option<Learn> {
        self.learn.filter(|learn| learn.grain == Grain::Model)
    }

    /// The greatest code.
    pub(crate) fn top(&self) -> u8 {
        // At most 255: balanced grids are of 1 and 2 bits.
        (self.abq.levels() - 1).min(255) as u8
    }
}
