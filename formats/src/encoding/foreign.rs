//! Checkpoints that other tools quantised: codes of integers with a scale and a zero point a group, in their layouts.
//!
//! ```text
//! compressed-tensors   <m>.weight_packed [N, ceil(K b / 32)], weight_scale [N, G], weight_zero_point, weight_shape
//!                      <m>.weight I8 [N, K], weight_scale [N, 1]
//! GPTQ                 <m>.qweight [K b / 32, N], scales [G, N], qzeros [G, N b / 32], g_idx [K]
//! AWQ (gemm)           <m>.qweight [K, N / 8], scales [G, N], qzeros [G, N / 8]
//! ```
//!
//! In all of them `w = scale * (code - zero)`; what differs is where the bits lie. A matrix appears as the tensor
//! `<m>.weight` [N, K] in the dtype of its scales.

mod awq;
pub mod bit_stream;
mod compressed_tensors;
mod gptq;
mod held;
mod reader;
mod settings;

use std::collections::BTreeMap;

use serde::Serialize;

use crate::encoding::Part;
use crate::encoding::abq::{Abq, WORD_COLUMNS};
use crate::{Component, Config, Dtype, Error, Result};

pub use held::Held;
pub use reader::Codes;
pub(super) use settings::Groups;
use settings::Settings;

/// The codes, whatever they are called in a file.
pub const CODES: &str = "codes";
/// The scales.
pub const SCALES: &str = "scales";
/// The zero points, where they are stored.
pub const ZEROS: &str = "zeros";
/// The group of each column, where the layout has it.
pub const GROUP_INDEX: &str = "group_index";
/// The sides of the matrix, where the layout has them.
pub const SHAPE: &str = "shape";
/// All of them.
pub(crate) const COMPONENTS: [&str; 5] = [CODES, SCALES, ZEROS, GROUP_INDEX, SHAPE];

/// Where the bits of a quantised matrix lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Layout {
    /// compressed-tensors' `pack-quantized`: a stream of bits a row.
    PackQuantized,
    /// The same by releases that put whole codes into each word.
    PackQuantizedWhole,
    /// compressed-tensors' `int-quantized`: signed bytes.
    IntQuantized,
    /// GPTQ: a stream of bits a column of the transposed matrix.
    Gptq {
        /// Whether zero points are stored as they are, and not less one.
        plain_zeros: bool,
    },
    /// AWQ's `gemm`.
    Awq,
}

impl Layout {
    /// What a component of `module` is called in a file.
    pub fn stored_name(self, module: &str, component: &str) -> String {
        let last = match (self, component) {
            (Self::Gptq { .. } | Self::Awq, CODES) => "qweight",
            (Self::Gptq { .. } | Self::Awq, SCALES) => "scales",
            (Self::Gptq { .. } | Self::Awq, ZEROS) => "qzeros",
            (Self::Gptq { .. } | Self::Awq, GROUP_INDEX) => "g_idx",
            (Self::IntQuantized, CODES) => "weight",
            (_, CODES) => "weight_packed",
            (_, SCALES) => "weight_scale",
            (_, ZEROS) => "weight_zero_point",
            (_, SHAPE) => "weight_shape",
            (_, other) => other,
        };
        format!("{module}.{last}")
    }
}

/// How a matrix was quantised by another tool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Foreign {
    /// Where its bits lie.
    pub layout: Layout,
    /// Bits of a code.
    pub bits: u8,
    /// Columns that share a scale; a whole row if there is none.
    pub group_size: Option<u32>,
    /// Whether zero points are stored; else the middle code is zero.
    pub zeros: bool,
    /// Whether columns belong to groups by an index of their own instead of by their order.
    pub scattered: bool,
    /// Bits of the inputs, where they are to be quantised a token at a time without symmetry, as this library does.
    pub activation_bits: Option<u8>,
}

impl Foreign {
    /// The tool and its layout.
    pub fn name(&self) -> &'static str {
        match self.layout {
            Layout::PackQuantized | Layout::PackQuantizedWhole => "pack-quantized",
            Layout::IntQuantized => "int-quantized",
            Layout::Gptq { .. } => "gptq",
            Layout::Awq => "awq",
        }
    }

    /// The parameters of the same numbers as an `abq` matrix.
    ///
    /// # Errors
    /// Why that encoding does not hold them.
    pub fn abq(&self) -> Result<Abq> {
        if self.scattered {
            return Err(Error::Invalid(
                "its columns are spread over the groups (act-order), and abq has groups of neighbours".into(),
            ));
        }
        if let Some(size) = self.group_size.filter(|size| !(*size as usize).is_multiple_of(WORD_COLUMNS)) {
            return Err(Error::Invalid(format!(
                "it has groups of {size} columns, and abq has multiples of {WORD_COLUMNS}"
            )));
        }
        let abq = Abq {
            bits: self.bits,
            balanced: false,
            group_size: self.group_size,
            activation_bits: self.activation_bits,
        };
        abq.check()?;
        Ok(abq)
    }

    /// Columns of all groups of a row but the last; never 0.
    pub(crate) fn group_columns(&self, cols: usize) -> usize {
        self.group_size.map_or(cols, |size| size as usize).max(1)
    }

    /// Groups of a row.
    pub(crate) fn groups(&self, cols: usize) -> usize {
        cols.div_ceil(self.group_columns(cols))
    }
}

/// A unit of a checkpoint that another tool quantised.
pub(crate) struct ForeignUnit {
    pub(crate) name: String,
    pub(crate) foreign: Foreign,
    pub(crate) part: Part,
    pub(crate) components: BTreeMap<String, Component>,
}

/// What a tool has to say of its matrices, found among the stored tensors by their names.
type Take = fn(&Config, &Settings, &str, &mut BTreeMap<String, Component>) -> Result<Option<ForeignUnit>>;

/// What the names of a quantised module's tensors end in, by the tool that the configuration names.
fn suffixes(config: &Config) -> &'static [&'static str] {
    match config.quantised_by() {
        Some("compressed-tensors") => &compressed_tensors::SUFFIXES,
        Some("gptq" | "gptqmodel") => &[gptq::SUFFIX],
        Some("awq") => &[awq::SUFFIX],
        _ => &[],
    }
}

/// Whether any of these names is of a matrix that such a tool quantised. Settings may be there without any.
pub(crate) fn any<'a>(config: &Config, mut names: impl Iterator<Item = &'a str>) -> bool {
    let suffixes = suffixes(config);
    !suffixes.is_empty() && names.any(|name| suffixes.iter().any(|suffix| name.ends_with(suffix)))
}

/// Takes the quantised matrices out of `stored`. What is left are plain tensors.
///
/// # Errors
/// A method that is not read, settings that are not, tensors that do not fit them.
pub(crate) fn take_units(
    config: &Config,
    stored: &mut BTreeMap<String, Component>,
) -> Result<Vec<ForeignUnit>> {
    let suffixes = suffixes(config);
    let modules: std::collections::BTreeSet<String> = stored
        .keys()
        .filter_map(|name| suffixes.iter().find_map(|suffix| name.strip_suffix(suffix)).map(str::to_owned))
        .collect();
    let settings = if modules.is_empty() { None } else { Settings::of(config)? };
    let Some(settings) = settings else { return Ok(Vec::new()) };
    let take: Take = match &settings {
        Settings::CompressedTensors(_) => compressed_tensors::take,
        Settings::Gptq(_) => gptq::take,
        Settings::Awq(_) => awq::take,
    };
    let mut units = Vec::with_capacity(modules.len());
    for module in modules {
        units.extend(take(config, &settings, &module, stored)?);
    }
    Ok(units)
}

/// Takes a component out of `stored` that must be there.
fn required(config: &Config, stored: &mut BTreeMap<String, Component>, name: &str) -> Result<Component> {
    stored.remove(name).ok_or_else(|| {
        Error::corrupt(
            config.path(),
            Some(name),
            "is missing beside the other tensors of its matrix: the directory is incomplete, copy it again",
        )
    })
}

/// Most columns of a matrix: a row is decoded as a whole.
const MOST_COLUMNS: u64 = 1 << 24;

/// The matrix as a tensor.
fn part(module: &str, rows: u64, cols: u64, scales: &Component) -> Result<Part> {
    let dtype = match scales.dtype() {
        dtype @ (Dtype::F16 | Dtype::BF16 | Dtype::F32) => dtype,
        other => {
            return Err(scales.corrupt(format!("is {} where scales are F16, BF16 or F32", other.name())));
        }
    };
    let shape = vec![rows, cols];
    match (rows, cols, dtype.byte_len(&shape)) {
        (1.., 1..=MOST_COLUMNS, Some(bytes)) if bytes <= crate::MAX_TOTAL_BYTES => {
            Ok(Part { name: format!("{module}.weight"), dtype, shape, bytes })
        }
        _ => {
            Err(scales
                .corrupt(format!("belongs to a matrix of {rows} x {cols}, which is no size that is read")))
        }
    }
}

/// The sides of a stored matrix.
fn sides(component: &Component) -> Result<(u64, u64)> {
    match component.shape() {
        [a, b] => Ok((*a, *b)),
        other => Err(component.corrupt(format!("has shape {other:?} where a matrix is needed"))),
    }
}

/// Refuses another shape or dtype than the layout asks for.
fn require(component: &Component, dtype: Dtype, shape: &[u64]) -> Result<()> {
    if component.dtype() != dtype || component.shape() != shape {
        return Err(component.corrupt(format!(
            "is {} {:?} where its layout needs {} {shape:?}",
            component.dtype().name(),
            component.shape(),
            dtype.name()
        )));
    }
    Ok(())
}
