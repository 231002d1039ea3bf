//! `sparse24`: of every four consecutive inputs of a row two are kept, the others are +0.
//!
//! ```text
//! <tensor>.positions   U8 [N, ceil(K / 8)]        four bits a quad: where its first and its second kept value lie
//! <tensor>.values      of the tensor [N, K / 2]   the kept values, in the order of their columns
//! or, encoded: <tensor>.values.<component>        of `fixed12` or `abq`, for a matrix of N x K / 2
//! or, instead of positions: <tensor>.position_codes, <tensor>.position_lengths      through an entropy coder
//! ```
//!
//! The pattern that sparse tensor cores multiply; one of theirs is built from it when it is loaded, never stored.

mod packed;
pub mod positions;
mod reader;

use serde::{Deserialize, Serialize};

use super::abq::{self, Abq};
use super::nested::{full_name, under};
use super::{ComponentSpec, fixed12, planes};
use crate::{Dtype, Error, Result};

pub use packed::{Kept, Packed};
pub(super) use reader::Reader;

/// Where the kept values lie.
pub const POSITIONS: &str = "positions";
/// The bytes of positions through an entropy coder, in the place of [`POSITIONS`]: six of sixteen nibbles there are.
pub const POSITION_CODES: &str = "position_codes";
/// The stored length of each chunk of them.
pub const POSITION_LENGTHS: &str = "position_lengths";
/// The kept values.
pub const VALUES: &str = "values";
/// What the names of the components of encoded values begin with.
pub const WITHIN: &str = "values.";

/// All of them; a unit has `positions` or the two that stand for it, and `values` or those of the encoding of its values.
pub const COMPONENTS: [&str; 14] = [
    POSITIONS,
    POSITION_CODES,
    POSITION_LENGTHS,
    VALUES,
    "values.sign_mantissa",
    "values.codes",
    "values.escape_offsets",
    "values.escape_positions",
    "values.escape_exponents",
    "values.planes",
    "values.code_lengths",
    "values.scale",
    "values.offset",
    "values.zero",
];

/// Columns of a quad, of which two are kept.
pub const QUAD: usize = 4;

/// The dtypes of tensors that can be stored so.
pub const DTYPES: [Dtype; 3] = abq::DTYPES;

/// How a matrix of two in four is stored: the encoding's parameters in the manifest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct Sparse24 {
    /// How the kept values are encoded, if they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub values: Option<Inner>,
}

/// The encodings of kept values: an encoding inside of an encoding has none inside of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "lowercase")]
pub enum Inner {
    /// Twelve bits a kept value ([`fixed12`]); BF16.
    Fixed12 {
        /// What is added to a code and the sign to give the exponent.
        base: i16,
    },
    /// Codes of 1 to 8 bits ([`abq`]). Groups count kept columns.
    Abq(Abq),
}

impl Inner {
    /// The name in the manifest.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Fixed12 { .. } => "fixed12",
            Self::Abq(_) => "abq",
        }
    }

    /// The names of its components.
    pub(super) fn component_names(&self) -> &'static [&'static str] {
        match self {
            Self::Fixed12 { .. } => &fixed12::COMPONENTS,
            Self::Abq(_) => &abq::COMPONENTS,
        }
    }
}

impl Sparse24 {
    /// Whether it holds other values than the tensor had.
    pub fn is_lossy(&self) -> bool {
        matches!(self.values, Some(Inner::Abq(_)))
    }

    /// The parameters of quantised values.
    pub fn abq(&self) -> Option<&Abq> {
        match &self.values {
            Some(Inner::Abq(abq)) => Some(abq),
            _ => None,
        }
    }

    /// Its name in words: `2:4`, and how the values are encoded.
    pub fn widths(&self) -> String {
        match &self.values {
            None => "2:4".to_owned(),
            Some(Inner::Fixed12 { .. }) => "2:4,fixed12".to_owned(),
            Some(Inner::Abq(abq)) => format!("2:4,{}", abq.widths()),
        }
    }

    /// Refuses parameters that the encoding does not have.
    ///
    /// # Errors
    /// [`Error::Invalid`], with what would be right.
    pub fn check(&self) -> Result<()> {
        let Some(abq) = self.abq() else { return Ok(()) };
        abq.check()?;
        without_activations(abq, "kept values")
    }
}

/// Inputs of a product are quantised by the columns of the whole matrix: codes inside of another encoding know a part of them.
pub(super) fn without_activations(abq: &Abq, of: &str) -> Result<()> {
    match abq.activation_bits {
        None => Ok(()),
        Some(bits) => Err(Error::Invalid(format!(
            "activations of {bits} bits: the inputs of {of} inside of another encoding stay floating point"
        ))),
    }
}

/// Rows and columns of the matrix that a tensor is stored as: all leading dimensions are rows. `None` for tensors that
/// are no matrix (fewer than two dimensions, or an empty one) or too large, or whose columns are no multiple of four.
pub fn matrix(shape: &[u64]) -> Option<(u64, u64)> {
    abq::matrix(shape).filter(|(_, cols)| cols.is_multiple_of(QUAD as u64))
}

/// The component of positions.
pub fn positions_component(rows: u64, cols: u64) -> ComponentSpec {
    ComponentSpec { name: POSITIONS, dtype: Dtype::U8, shape: vec![rows, cols.div_ceil(2 * QUAD as u64)] }
}

/// The components that take the place of positions where the frames of their bytes take `stored` bytes.
pub fn coded_positions(rows: u64, cols: u64, stored: u64) -> [ComponentSpec; 2] {
    let bytes = rows.saturating_mul(cols.div_ceil(2 * QUAD as u64));
    [
        ComponentSpec { name: POSITION_CODES, dtype: Dtype::U8, shape: vec![stored] },
        ComponentSpec { name: POSITION_LENGTHS, dtype: Dtype::U8, shape: vec![planes::chunks(bytes, 1), 4] },
    ]
}

/// The components of a matrix whose values are plain, in the order in which they are written.
pub fn components(rows: u64, cols: u64, dtype: Dtype) -> Vec<ComponentSpec> {
    let values = ComponentSpec { name: VALUES, dtype, shape: vec![rows, cols / 2] };
    vec![positions_component(rows, cols), values]
}

/// What a component of a matrix of two in four is called in a unit where it is the base of another encoding, and what one of the
/// encoding of its values is there; a name that there is none of stays.
pub fn in_base(name: &'static str) -> &'static str {
    full_name(super::lowrank::BASE_WITHIN, name).unwrap_or(name)
}

/// What a component of the encoding of values is called in the unit; a name that no such encoding has stays.
pub fn within(name: &'static str) -> &'static str {
    full_name(WITHIN, name).unwrap_or(name)
}

/// The components of a matrix whose values have these, as their encoding makes them for `rows` x `cols / 2`.
pub fn encoded_components(rows: u64, cols: u64, values: Vec<ComponentSpec>) -> Vec<ComponentSpec> {
    std::iter::once(positions_component(rows, cols)).chain(under(WITHIN, values)).collect()
}
