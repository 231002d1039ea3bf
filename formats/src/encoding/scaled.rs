//! Matrices of small floats with scales, as other tools store them: FP8, NVFP4 and MXFP4.
//!
//! ```text
//! FP8     <m>.weight F8_E4M3 [N, K], weight_scale_inv [ceil(N / 128), ceil(K / 128)], or weight_scale [N, 1], [1] or []
//! NVFP4   <m>.weight_packed U8 [N, K / 2], weight_scale F8_E4M3 [N, K / 16], weight_global_scale [1]    compressed-tensors
//!         <m>.weight U8 [N, K / 2], weight_scale F8_E4M3 [N, K / 16], weight_scale_2 []                modelopt
//! MXFP4   <m>.weight_packed U8 [N, K / 2], weight_scale U8 [N, K / 32]                          compressed-tensors
//!         <x>_blocks U8 [E, N, K / 32, 16], <x>_scales U8 [E, N, K / 32], of the tensor <x> [E, K, N]     gpt-oss
//! ```
//!
//! `w = element * scale`, in single precision, rounded once to the dtype of the model. A global scale is a part of the scale: it is
//! multiplied with it, or divides it. These encodings are read only and in no manifest: what is stored so is kept as the tensors that it
//! is stored as.

mod elements;
mod find;
mod reader;

use serde::Serialize;

use crate::Dtype;

pub use elements::Element;
pub(crate) use find::{ScaledPart, any, find, method};
pub(super) use reader::Reader;

/// The elements, whatever they are called in a file.
pub const ELEMENTS: &str = "elements";
/// Their scales.
pub const SCALES: &str = "scales";
/// The scale of the scales, where there is one.
pub const GLOBAL: &str = "global";
/// All of them.
pub(crate) const COMPONENTS: [&str; 3] = [ELEMENTS, SCALES, GLOBAL];

/// What a global scale does to the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Global {
    /// They are multiplied with it.
    Factor,
    /// They are divided by it.
    Divisor,
}

/// How a matrix of small floats is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Scaled {
    /// What a weight is before it is scaled.
    pub element: Element,
    /// The dtype of the scales; U8 for exponents ([`Dtype::F8_E8M0`]) whose file calls them so.
    pub scale: Dtype,
    /// Rows and columns of the stored matrix that share a scale; those at its end may be fewer.
    pub block: [u64; 2],
    /// What the global scale does, if there is one.
    pub global: Option<Global>,
    /// Whether the tensor is the transpose of what is stored.
    pub transposed: bool,
}

impl Scaled {
    /// Its usual name.
    pub fn name(&self) -> &'static str {
        match (self.element, self.scale) {
            (Element::E4m3 | Element::E5m2, _) => "fp8",
            (Element::E2m1, Dtype::F8_E4M3) => "nvfp4",
            (Element::E2m1, _) => "mxfp4",
        }
    }

    /// Its element and the rows and columns that share a scale: `e4m3,128x128`.
    pub fn widths(&self) -> String {
        let [rows, cols] = self.block;
        format!("{},{rows}x{cols}", self.element.name())
    }
}
