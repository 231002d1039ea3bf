//! `lowrank`: what another encoding holds, and a number added to every weight of a block of consecutive inputs.
//!
//! ```text
//! <tensor>.base.<component>   of `raw` (base.data) or `sparse24`      the base B, N x K
//! <tensor>.sums               F16, BF16 or F32 [N, ceil(K / block)]   S
//! or, encoded: <tensor>.sums.<component>                              of `abq`, for a matrix of N x ceil(K / block)
//!
//! y = B x + S (X x), where X x is the sum of each block of inputs
//! ```
//!
//! SLoRB of "Pruning Large Language Models with Semi-Structural Adaptive Sparse Training": its X is the fixed block sum, of
//! which nothing is stored.

mod packed;
mod reader;

use serde::{Deserialize, Serialize};

use super::abq::{self, Abq};
use super::nested::under;
use super::sparse24::{Sparse24, without_activations};
use super::{ComponentSpec, raw, sparse24};
use crate::{Dtype, Error, Result};

pub use packed::{BaseRows, Packed, Sums};
pub(super) use reader::Reader;

/// The sums.
pub const SUMS: &str = "sums";
/// What the names of the components of encoded sums begin with.
pub const SUMS_WITHIN: &str = "sums.";
/// What the names of the base's components begin with.
pub const BASE_WITHIN: &str = "base.";

/// All of them; a unit has those of its base, and `sums` or those of the encoding of its sums.
pub const COMPONENTS: [&str; 22] = [
    "base.data",
    "base.positions",
    "base.position_codes",
    "base.position_lengths",
    "base.values",
    "base.values.sign_mantissa",
    "base.values.codes",
    "base.values.escape_offsets",
    "base.values.escape_positions",
    "base.values.escape_exponents",
    "base.values.planes",
    "base.values.code_lengths",
    "base.values.scale",
    "base.values.offset",
    "base.values.zero",
    SUMS,
    "sums.planes",
    "sums.codes",
    "sums.code_lengths",
    "sums.scale",
    "sums.offset",
    "sums.zero",
];

/// How a matrix with sums is stored: the encoding's parameters in the manifest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Lowrank {
    /// Consecutive inputs that share a sum; the last block of a row may be shorter.
    pub block: u32,
    /// How the base is stored.
    pub base: Base,
    /// How the sums are encoded, if they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sums: Option<SumsEncoding>,
}

/// The encodings of a base.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "lowercase")]
pub enum Base {
    /// Every weight.
    Raw,
    /// Two in four ([`sparse24`]), whose values may be encoded in turn.
    Sparse24(Sparse24),
}

/// The encodings of sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "lowercase")]
pub enum SumsEncoding {
    /// Codes of 1 to 8 bits ([`abq`]). Groups count blocks.
    Abq(Abq),
}

impl Lowrank {
    /// Refuses parameters that the encoding does not have.
    ///
    /// # Errors
    /// [`Error::Invalid`], with what would be right.
    pub fn check(&self) -> Result<()> {
        if self.block == 0 {
            return Err(Error::Invalid("blocks of 0 columns: lowrank has 1 or more".to_owned()));
        }
        if let Some(SumsEncoding::Abq(abq)) = &self.sums {
            abq.check()?;
            without_activations(abq, "sums")?;
        }
        match &self.base {
            Base::Raw => Ok(()),
            Base::Sparse24(sparse) => sparse.check(),
        }
    }

    /// Its name in words: that of the base, and `s` with the columns that share a sum, and the widths of these.
    pub fn widths(&self) -> String {
        let base = match &self.base {
            Base::Raw => "raw".to_owned(),
            Base::Sparse24(sparse) => sparse.widths(),
        };
        let sums = match &self.sums {
            None => String::new(),
            Some(SumsEncoding::Abq(abq)) => format!(",{}", abq.widths()),
        };
        format!("{base}+s{}{sums}", self.block)
    }

    /// Blocks of a row of `cols` columns.
    pub fn blocks(&self, cols: u64) -> u64 {
        cols.div_ceil(u64::from(self.block.max(1)))
    }
}

/// Rows and columns of the matrix that a tensor is stored as: all leading dimensions are rows. `None` for tensors that
/// are no matrix (fewer than two dimensions, or an empty one) or too large.
pub fn matrix(shape: &[u64]) -> Option<(u64, u64)> {
    abq::matrix(shape)
}

/// The components of a base and of sums, as their own encodings make them: `raw` for `rows` x `cols`, or `sparse24`'s; and
/// `abq` for `rows` x blocks, or `None` with the dtype of plain sums.
pub fn components(
    base: Vec<ComponentSpec>,
    sums: Result<Vec<ComponentSpec>, (Dtype, u64, u64)>,
) -> Vec<ComponentSpec> {
    let mut specs = under(BASE_WITHIN, base);
    match sums {
        Ok(encoded) => specs.extend(under(SUMS_WITHIN, encoded)),
        Err((dtype, rows, blocks)) => {
            specs.push(ComponentSpec { name: SUMS, dtype, shape: vec![rows, blocks] });
        }
    }
    specs
}

impl Base {
    /// The names of its components.
    fn component_names(&self) -> &'static [&'static str] {
        match self {
            Self::Raw => &[raw::DATA],
            Self::Sparse24(_) => &sparse24::COMPONENTS,
        }
    }
}

/// A base and a sum together, in single precision. What is no number stays what it is.
fn add(base: f32, sum: f32) -> f32 {
    if base.is_nan() { base } else { base + sum }
}
