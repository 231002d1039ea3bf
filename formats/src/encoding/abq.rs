//! `abq`: codes of 1 to 8 bits as bit planes, with a scale and a zero point a group.
//!
//! ```text
//! <tensor>.planes   U32 [P, N, ceil(K / 32)]   bit b of the code of column k: bit k % 32 of word k / 32 of plane b
//! or, coded: <tensor>.codes, <tensor>.code_lengths (`coded.rs`)
//! <tensor>.scale    F16, BF16 or F32 [N, G]    w = scale * code + offset
//! <tensor>.offset   F16, BF16 or F32 [N, G]    or
//! <tensor>.zero     U8 [N, G]                  w = scale * (code - zero); neither: zero = 2^(bits - 1)
//! ```
//!
//! After ABQ-LLM (AAAI 2025), whose products run over bit planes; zero points may be real numbers here.

mod bits;
pub mod coded;
mod floats;
mod packed;
mod reader;

use serde::{Deserialize, Serialize};

use super::ComponentSpec;
use crate::{Dtype, Error, Result};

pub use bits::{pack, pack_row, unpack_row};
pub use floats::Floats;
pub(super) use floats::width;
pub(crate) use floats::write_rounded;
pub use packed::{Packed, Zero};
pub(super) use reader::{Reader, float_dtype};

/// The bit planes of the codes.
pub const PLANES: &str = "planes";
/// The codes through an entropy coder, instead of planes.
pub const CODES: &str = "codes";
/// The lengths of their frames.
pub const CODE_LENGTHS: &str = "code_lengths";
/// What a code is multiplied by.
pub const SCALE: &str = "scale";
/// What is added to the product.
pub const OFFSET: &str = "offset";
/// The code of zero.
pub const ZERO: &str = "zero";

/// All of them; a unit has `planes`, or `codes` and `code_lengths`, and `offset` or `zero` or neither.
pub const COMPONENTS: [&str; 6] = [PLANES, CODES, CODE_LENGTHS, SCALE, OFFSET, ZERO];

/// Columns in a word of a plane.
pub const WORD_COLUMNS: usize = 32;

/// Widths of codes, and of activations.
pub const BITS: std::ops::RangeInclusive<u8> = 1..=8;

/// How a matrix is quantised: the encoding's parameters in the manifest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Abq {
    /// Bits of a code, 1 to 8.
    pub bits: u8,
    /// Whether there is one level more, so that the grid is symmetric (1 and 2 bits only): codes 0 ..= 2^bits, which
    /// take `bits + 1` planes. The paper's bit balance.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub balanced: bool,
    /// Columns that share a scale, a multiple of 32; a whole row if there is none. The last group of a row may be
    /// shorter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group_size: Option<u32>,
    /// Bits to which the inputs of a product are quantised when it runs, 1 to 8; they stay floating point if there is
    /// none. The weights do not depend on it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub activation_bits: Option<u8>,
}

impl Abq {
    /// Codes of so many bits, one group a row, inputs in floating point.
    pub const fn new(bits: u8) -> Self {
        Self { bits, balanced: false, group_size: None, activation_bits: None }
    }

    /// Refuses widths, group sizes and balance that the encoding does not have.
    ///
    /// # Errors
    /// [`Error::Invalid`], with what would be right.
    pub fn check(&self) -> Result<()> {
        let bad = |what: String| Err(Error::Invalid(what));
        if !BITS.contains(&self.bits) {
            return bad(format!("codes of {} bits: abq has 1 to 8", self.bits));
        }
        if self.balanced && self.bits > 2 {
            return bad(format!("balanced codes of {} bits: abq balances 1 and 2 bits", self.bits));
        }
        if let Some(group_size) = self.group_size
            && (group_size == 0 || !(group_size as usize).is_multiple_of(WORD_COLUMNS))
        {
            return bad(format!("groups of {group_size} columns: abq has multiples of {WORD_COLUMNS}"));
        }
        match self.activation_bits {
            Some(bits) if !BITS.contains(&bits) => {
                bad(format!("activations of {bits} bits: abq has 1 to 8, or none for floating point"))
            }
            _ => Ok(()),
        }
    }

    /// Bit planes of a code.
    pub fn planes(&self) -> u32 {
        u32::from(self.bits) + u32::from(self.balanced)
    }

    /// How many codes there are: 0 .. `levels`.
    pub fn levels(&self) -> u32 {
        (1 << u32::from(self.bits).min(8)) + u32::from(self.balanced)
    }

    /// The code of zero of a symmetric grid.
    pub fn centre(&self) -> u8 {
        1 << self.bits.clamp(1, 8).saturating_sub(1)
    }

    /// Groups of a row of `cols` columns.
    pub fn groups(&self, cols: usize) -> usize {
        cols.div_ceil(self.group_columns(cols))
    }

    /// Columns of all groups of a row but the last, which may be shorter; never 0.
    pub fn group_columns(&self, cols: usize) -> usize {
        self.group_size.map_or(cols, |size| size as usize).max(1)
    }

    /// Its name in recipes, without the method: `w4`, `w2*a8`, `w4,g128`.
    pub fn widths(&self) -> String {
        let star = if self.balanced { "*" } else { "" };
        let activations = self.activation_bits.map(|bits| format!("a{bits}")).unwrap_or_default();
        let group = self.group_size.map(|size| format!(",g{size}")).unwrap_or_default();
        format!("w{}{star}{activations}{group}", self.bits)
    }
}

/// How zero points are stored: what a unit's size depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ZeroKind {
    /// Not at all: the middle code is zero.
    Symmetric,
    /// As a code from 0 to 255.
    Integer,
    /// As what is added, in this dtype.
    Real(Dtype),
}

/// The dtypes of scales and offsets, and of the tensors that can be stored so.
pub const DTYPES: [Dtype; 3] = [Dtype::F16, Dtype::BF16, Dtype::F32];

/// Rows and columns of the matrix that a tensor is stored as: all leading dimensions are rows. `None` for tensors that
/// are no matrix (fewer than two dimensions, or an empty one) or too large.
pub fn matrix(shape: &[u64]) -> Option<(u64, u64)> {
    let (&cols, leading) = shape.split_last()?;
    let rows = leading.iter().try_fold(1u64, |a, &b| a.checked_mul(b))?;
    // A row may be padded to whole words, in up to eight planes.
    let padded = rows.checked_mul(cols.checked_add(31)?)?.checked_mul(8 * 4)?;
    (!leading.is_empty() && rows > 0 && cols > 0 && usize::try_from(padded).is_ok()).then_some((rows, cols))
}

/// The components of a matrix whose codes lie in planes, in the order in which they are written.
pub fn components(abq: &Abq, rows: u64, cols: u64, scale: Dtype, zero: ZeroKind) -> Vec<ComponentSpec> {
    let groups = abq.groups(cols as usize) as u64;
    let planes = vec![u64::from(abq.planes()), rows, cols.div_ceil(WORD_COLUMNS as u64)];
    let mut specs = vec![
        ComponentSpec { name: PLANES, dtype: Dtype::U32, shape: planes },
        ComponentSpec { name: SCALE, dtype: scale, shape: vec![rows, groups] },
    ];
    match zero {
        ZeroKind::Symmetric => {}
        ZeroKind::Integer => {
            specs.push(ComponentSpec { name: ZERO, dtype: Dtype::U8, shape: vec![rows, groups] });
        }
        ZeroKind::Real(dtype) => {
            specs.push(ComponentSpec { name: OFFSET, dtype, shape: vec![rows, groups] });
        }
    }
    specs
}

/// What is wrong with the contents of a component.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) component: &'static str,
    pub(crate) row: usize,
    pub(crate) what: String,
}

impl From<Fault> for Error {
    fn from(fault: Fault) -> Self {
        Self::Invalid(format!("{}: row {}: {}", fault.component, fault.row, fault.what))
    }
}
