//! Which of the stored tensors are elements, scales and global scale of a matrix.
//!
//! ```text
//! <x>_scale_inv, <x>_scale --> <x>, or <x>_packed      and <x>_global_scale or <x>_scale_2
//! <x>_scales               --> <x>_blocks
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::elements::scale_bytes;
use super::{ELEMENTS, Element, GLOBAL, Global, SCALES, Scaled};
use crate::encoding::Part;
use crate::encoding::foreign::Groups;
use crate::{Config, Dtype, Error, QUANTISATION_FILE, Result};

/// The tools whose small floats are read, by `quantization_config.quant_method`.
const METHODS: [&str; 6] = ["fp8", "compressed-tensors", "modelopt", "modelopt_fp4", "fbgemm_fp8", "mxfp4"];
/// What the names of scales end in.
const SCALE_SUFFIXES: [&str; 3] = ["_scale_inv", "_scale", "_scales"];
/// Scales of inputs, which are not quantised where weights are seen as numbers: what is left of the name of a module's scale.
const OF_INPUTS: [&str; 3] = ["input_scale", "input_global_scale", "activation_scale"];
/// Most columns of a matrix: a row is decoded as a whole.
const MOST_COLUMNS: u64 = 1 << 24;

/// A tensor that elements or scales may be.
#[derive(Debug, Clone)]
pub(crate) struct ScaledPart {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<u64>,
}

/// A matrix, and the stored tensors that it takes.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) scaled: Scaled,
    /// The tensor that it is.
    pub(crate) part: Part,
    /// The stored tensors by the component that they are.
    pub(crate) takes: Vec<(&'static str, String)>,
    /// Stored tensors that say nothing of the numbers.
    pub(crate) drops: Vec<String>,
}

/// The tool that made small floats of a checkpoint's weights, as far as it is said.
pub(crate) fn method<'a>(root: &Path, config: Option<&'a Config>) -> Option<&'a str> {
    match config.and_then(Config::quantised_by) {
        Some(method) => METHODS.into_iter().find(|known| *known == method),
        None => root.join(QUANTISATION_FILE).is_file().then_some("modelopt"),
    }
}

/// Whether any of these names is of scales.
pub(crate) fn any<'a>(mut names: impl Iterator<Item = &'a str>) -> bool {
    names.any(|name| SCALE_SUFFIXES.iter().any(|suffix| name.ends_with(suffix)))
}

/// The matrices among the stored tensors.
///
/// # Errors
/// Elements without scales or of another shape than these; elements or scales that are not read.
pub(crate) fn find(
    root: &Path,
    config: Option<&Config>,
    stored: &BTreeMap<String, ScaledPart>,
) -> Result<Vec<Found>> {
    let groups = config.map_or(Ok(None), Groups::of)?;
    let search = Search { root, config, groups, stored };
    let mut found = Vec::new();
    let mut taken = BTreeSet::new();
    for name in stored.keys() {
        let matrix = match name.strip_suffix("_scales") {
            Some(tensor) => search.blocks(tensor, name)?,
            None => search.by_scale(name)?,
        };
        let Some(matrix) = matrix else { continue };
        for (_, name) in &matrix.takes {
            if !taken.insert(name.clone()) {
                return Err(search.corrupt(name, "belongs to two matrices".to_owned()));
            }
        }
        found.push(matrix);
    }
    Ok(found)
}

/// The module that a weight is of.
fn module(tensor: &str) -> &str {
    tensor.strip_suffix(".weight").unwrap_or(tensor)
}

struct Search<'a> {
    root: &'a Path,
    config: Option<&'a Config>,
    groups: Option<Groups>,
    stored: &'a BTreeMap<String, ScaledPart>,
}

impl Search<'_> {
    fn corrupt(&self, tensor: &str, what: String) -> Error {
        Error::corrupt(self.root, Some(tensor), what)
    }

    fn unsupported(&self, tensor: &str, what: String) -> Error {
        Error::unsupported(self.root, Some(tensor), what)
    }

    /// The matrix whose scales are `name`, if these are scales of weights.
    fn by_scale(&self, name: &str) -> Result<Option<Found>> {
        let stem = name.strip_suffix("_scale_inv").or_else(|| name.strip_suffix("_scale"));
        let Some(tensor) = stem else { return Ok(None) };
        let packed = format!("{tensor}_packed");
        let (elements, part) = match (self.stored.get(tensor), self.stored.get(&packed)) {
            (Some(_), Some(_)) => {
                return Err(self.corrupt(tensor, format!("is stored, and {packed} too: remove one of them")));
            }
            (Some(part), None) => (tensor, part),
            (None, Some(part)) => (packed.as_str(), part),
            (None, None) if tensor.ends_with(".weight") => {
                let what = format!(
                    "is missing, of which {name} is the scale: the directory is incomplete, copy it again"
                );
                return Err(self.corrupt(tensor, what));
            }
            // Of inputs, keys and values, and whatever else.
            (None, None) => return Ok(None),
        };
        let scales = self.part(name)?;
        let element = match part.dtype {
            Dtype::F8_E4M3 => Element::E4m3,
            Dtype::F8_E5M2 => Element::E5m2,
            Dtype::U8 | Dtype::I8 | Dtype::F4 => Element::E2m1,
            other => {
                // Whatever it is that has a scale, it is no small float, unless it is said to be.
                return match self.groups.as_ref().and_then(|groups| groups.float(module(tensor))) {
                    None => Ok(None),
                    Some(group) => Err(self.bits(tensor, group.bits, other)),
                };
            }
        };
        let configured = self.configured(tensor, element, part.dtype)?;
        let of_exponents = matches!(scales.dtype, Dtype::U8 | Dtype::F8_E8M0);
        if element == Element::E2m1 && !of_exponents && scales.dtype != Dtype::F8_E4M3 {
            let what = format!(
                "is {} with scales in {}: integers of that kind are not read, only FP4 with scales in F8_E4M3 (NVFP4) or U8 (MXFP4)",
                part.dtype.name(),
                scales.dtype.name()
            );
            return Err(self.unsupported(elements, what));
        }
        let mut takes = vec![(ELEMENTS, elements.to_owned()), (SCALES, name.to_owned())];
        let global = self.global(tensor, &mut takes)?;
        if self.stored.contains_key(&format!("{tensor}_zero_point")) {
            let what =
                "has zero points, which small floats are not read with: have its tool save it symmetric";
            return Err(self.unsupported(elements, what.to_owned()));
        }
        let [.., rows, stored_cols] = part.shape[..] else {
            return Err(
                self.corrupt(elements, format!("has shape {:?} where a matrix is needed", part.shape))
            );
        };
        // Safetensors counts FP4 by elements.
        let in_byte = if part.dtype == Dtype::F4 { 1 } else { element.in_byte() };
        let cols = stored_cols.saturating_mul(in_byte);
        if !cols.is_multiple_of(element.in_byte()) {
            return Err(self
                .corrupt(elements, format!("has rows of {cols} halves of bytes, which are no whole bytes")));
        }
        let leading = &part.shape[..part.shape.len() - 2];
        let block = self.block(name, leading, [rows, cols], &scales.shape, configured)?;
        let mut shape = leading.to_vec();
        shape.extend([rows, cols]);
        let scaled = Scaled { element, scale: scales.dtype, block, global, transposed: false };
        self.found(tensor, scaled, shape, takes).map(Some)
    }

    /// A stack of MXFP4 matrices in the layout of gpt-oss.
    fn blocks(&self, tensor: &str, name: &str) -> Result<Option<Found>> {
        let elements = format!("{tensor}_blocks");
        let Some(part) = self.stored.get(&elements) else { return Ok(None) };
        let scales = self.part(name)?;
        if (part.dtype, scales.dtype) != (Dtype::U8, Dtype::U8) {
            let (a, b) = (part.dtype.name(), scales.dtype.name());
            return Err(
                self.corrupt(&elements, format!("is {a} with scales in {b} where both are U8 in MXFP4"))
            );
        }
        let [ref leading @ .., rows, groups, bytes] = part.shape[..] else {
            let what = format!("has shape {:?} where blocks are [experts, rows, groups, 16]", part.shape);
            return Err(self.corrupt(&elements, what));
        };
        if bytes != 16 || scales.shape[..] != part.shape[..part.shape.len() - 1] {
            let what = format!(
                "has shape {:?} and its scales {:?}, where blocks are of 16 bytes with a scale each",
                part.shape, scales.shape
            );
            return Err(self.corrupt(&elements, what));
        }
        let mut shape = leading.to_vec();
        shape.extend([groups.saturating_mul(32), rows]);
        let scaled = Scaled {
            element: Element::E2m1,
            scale: Dtype::U8,
            block: [1, 32],
            global: None,
            transposed: true,
        };
        let takes = vec![(ELEMENTS, elements), (SCALES, name.to_owned())];
        self.found(tensor, scaled, shape, takes).map(Some)
    }

    fn part(&self, name: &str) -> Result<&ScaledPart> {
        let part = self.stored.get(name).ok_or_else(|| self.corrupt(name, "is missing".to_owned()))?;
        match scale_bytes(part.dtype) {
            Some(_) => Ok(part),
            None => {
                Err(self.unsupported(name, format!("is {}, which scales are not read in", part.dtype.name())))
            }
        }
    }

    /// The global scale, which is taken, and what it does.
    fn global(&self, tensor: &str, takes: &mut Vec<(&'static str, String)>) -> Result<Option<Global>> {
        let of =
            |suffix: &str| Some(format!("{tensor}{suffix}")).filter(|name| self.stored.contains_key(name));
        let found = match (of("_global_scale"), of("_scale_2")) {
            (None, None) => return Ok(None),
            (Some(name), None) => (Global::Divisor, name),
            (None, Some(name)) => (Global::Factor, name),
            (Some(name), Some(other)) => {
                return Err(
                    self.corrupt(&name, format!("is a global scale, and so is {other}: remove one of them"))
                );
            }
        };
        let (does, name) = found;
        let part = self.part(&name)?;
        if part.shape.iter().product::<u64>() != 1 || part.dtype != Dtype::F32 {
            let what = format!("is {} {:?} where a global scale is one F32", part.dtype.name(), part.shape);
            return Err(self.corrupt(&name, what));
        }
        takes.push((GLOBAL, name));
        Ok(Some(does))
    }

    /// Rows and columns of a block, where the configuration says them.
    fn configured(&self, tensor: &str, element: Element, dtype: Dtype) -> Result<Option<[u64; 2]>> {
        let Some(config) = self.config else { return Ok(None) };
        if let Some(groups) = &self.groups {
            return match groups.float(module(tensor)) {
                Some(group) if u64::from(group.bits) * element.in_byte() != 8 => {
                    Err(self.bits(tensor, group.bits, dtype))
                }
                Some(group) => Ok(group.block),
                None => Ok(None),
            };
        }
        let Some(sizes) = config.quantisation().and_then(|q| q.get("weight_block_size")) else {
            return Ok(None);
        };
        match sizes.as_array().map(Vec::as_slice) {
            None if sizes.is_null() => Ok(None),
            Some([rows, cols]) => match (rows.as_u64(), cols.as_u64()) {
                (Some(rows @ 1..), Some(cols @ 1..)) => Ok(Some([rows, cols])),
                _ => Err(self.block_size(config, sizes)),
            },
            _ => Err(self.block_size(config, sizes)),
        }
    }

    fn bits(&self, tensor: &str, bits: u8, dtype: Dtype) -> Error {
        let what = format!(
            "has weights of {bits} bits of float in {}; 8 bits in F8_E4M3 and F8_E5M2 and 4 bits in U8 can be read: convert the \
             original checkpoint",
            dtype.name()
        );
        self.unsupported(tensor, what)
    }

    fn block_size(&self, config: &Config, sizes: &serde_json::Value) -> Error {
        let what = format!("quantization_config: weight_block_size {sizes} is not two numbers above 0");
        Error::corrupt(config.path(), None, what)
    }

    /// Rows and columns that share a scale, told by the shape of the scales.
    fn block(
        &self,
        name: &str,
        leading: &[u64],
        [rows, cols]: [u64; 2],
        shape: &[u64],
        configured: Option<[u64; 2]>,
    ) -> Result<[u64; 2]> {
        let grid = match shape.strip_prefix(leading) {
            Some([] | [1]) => Some([1, 1]),
            Some([a]) => Some([*a, 1]),
            Some([a, b]) => Some([*a, *b]),
            _ => None,
        };
        let fits = |[a, b]: [u64; 2]| {
            if let Some([height, width]) = configured
                && [rows.div_ceil(height), cols.div_ceil(width)] == [a, b]
            {
                return Some([height, width]);
            }
            let side = |of: u64, parts: u64| (parts > 0 && of.is_multiple_of(parts)).then(|| of / parts);
            Some([side(rows, a)?, side(cols, b)?])
        };
        grid.and_then(fits).ok_or_else(|| {
            let blocks = configured.map(|[a, b]| format!(" in blocks of {a} x {b}")).unwrap_or_default();
            self.corrupt(
                name,
                format!("has shape {shape:?}, which is no grid of scales over {rows} x {cols}{blocks}"),
            )
        })
    }

    /// Everything together.
    fn found(
        &self,
        tensor: &str,
        scaled: Scaled,
        shape: Vec<u64>,
        takes: Vec<(&'static str, String)>,
    ) -> Result<Found> {
        let dtype = match scaled.scale {
            dtype @ (Dtype::F16 | Dtype::BF16) => dtype,
            _ => self.dtype(),
        };
        // Of what is stored: a row of it is decoded as a whole.
        let cols = if scaled.transposed { shape.iter().nth_back(1) } else { shape.last() };
        let fits = |cols: &u64| (1..=MOST_COLUMNS).contains(cols) && shape.iter().all(|side| *side > 0);
        let bytes = dtype.byte_len(&shape).filter(|bytes| *bytes <= crate::MAX_TOTAL_BYTES);
        let (Some(bytes), Some(true)) = (bytes, cols.map(fits)) else {
            return Err(self.corrupt(tensor, format!("would be {shape:?}, which is no size that is read")));
        };
        let drops = match tensor.strip_suffix("weight") {
            Some(module) => {
                let names = OF_INPUTS.iter().map(|name| format!("{module}{name}"));
                names.filter(|name| self.stored.contains_key(name)).collect()
            }
            None => Vec::new(),
        };
        Ok(Found { scaled, part: Part { name: tensor.to_owned(), dtype, shape, bytes }, takes, drops })
    }

    /// The dtype of the model, where scales do not tell it.
    fn dtype(&self) -> Dtype {
        let said = |key: &str| self.config?.get(key)?.as_str();
        match said("dtype").or_else(|| said("torch_dtype")).map(|name| name.trim_start_matches("torch.")) {
            Some("float16") => Dtype::F16,
            Some("float32") => Dtype::F32,
            _ => Dtype::BF16,
        }
    }
}
