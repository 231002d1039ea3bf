//! How each tensor of a GGUF file is stored: floats as they are, or codes as blocks that stand for the same numbers.
//!
//! ```text
//! norms, biases, routers   F32, as llama.cpp wants them     wider only: the numbers are the same
//! matrices                 F32, F16, BF16 as they are       what is encoded, decoded
//! abq                      Q4_0, Q4_1, Q5_0, Q5_1, Q8_0     where scales are half precision numbers, else decoded
//! ```

use std::collections::BTreeMap;

use llmpress_formats::encoding::abq::{Floats, OFFSET, SCALE, ZERO, Zero};
use llmpress_formats::encoding::ggml::{Blocks, holding};
use llmpress_formats::{Checkpoint, Component, Dtype, Encoding, Error as FormatError};

use super::names::Placed;
use crate::Result;

/// Most bytes of a matrix's scales.
const MAX_SCALES: u64 = 1 << 30;

/// A tensor of the file, and how it is stored.
#[derive(Debug, Clone)]
pub(super) struct Stored {
    pub(super) placed: Placed,
    pub(super) blocks: Blocks,
    /// Of each part.
    pub(super) shape: Vec<u64>,
    /// Of each part.
    pub(super) dtype: Dtype,
    /// Why codes are decoded, where they are.
    pub(super) why: Option<String>,
}

impl Stored {
    /// Its shape in the file: parts lie one on the other.
    pub(super) fn whole(&self) -> Vec<u64> {
        let experts = (self.placed.parts.len() > 1).then_some(self.placed.parts.len() as u64);
        experts.into_iter().chain(self.shape.iter().copied()).collect()
    }

    /// Rows of a part, and values of a row.
    pub(super) fn sides(&self) -> (u64, u64) {
        match self.shape[..] {
            [rows] => (rows, 1),
            [ref leading @ .., cols] => (leading.iter().product(), cols),
            [] => (1, 1),
        }
    }
}

/// Decides for every tensor. Reads scales and zero points.
///
/// # Errors
/// A dtype that GGUF does not have; rows that do not divide into heads; damaged components.
pub(super) fn stored(checkpoint: &Checkpoint, placed: Vec<Placed>) -> Result<Vec<Stored>> {
    placed.into_iter().map(|placed| one(checkpoint, placed)).collect()
}

fn one(checkpoint: &Checkpoint, placed: Placed) -> Result<Stored> {
    let first = placed.parts.first().map(String::as_str).unwrap_or_default();
    let tensor = checkpoint.tensor(first)?;
    let (dtype, shape) = (tensor.dtype, tensor.shape.clone());
    let refuse =
        |name: &str, what: String| Err(FormatError::unsupported(checkpoint.root(), Some(name), what).into());
    for name in &placed.parts {
        let part = checkpoint.tensor(name)?;
        if (part.dtype, &part.shape) != (dtype, &shape) {
            return refuse(
                name,
                format!("is another one than {first}, with which it lies in one tensor of a GGUF file"),
            );
        }
    }
    let plain = match dtype {
        Dtype::F32 => Blocks::F32,
        Dtype::F16 => Blocks::F16,
        Dtype::BF16 => Blocks::Bf16,
        other => return refuse(first, format!("is {}: an export has F32, F16 and BF16", other.name())),
    };
    let rows = shape.first().copied().unwrap_or(0);
    if let Some(heads) = placed.heads.filter(|heads| *heads == 0 || !rows.is_multiple_of(2 * heads)) {
        return refuse(first, format!("has {rows} rows, which {heads} heads do not share evenly"));
    }
    let (mut blocks, mut why) = (plain, None);
    if shape.len() < 2 || placed.precise {
        blocks = Blocks::F32;
    } else {
        match codes(checkpoint, &placed.parts)? {
            Some(Ok(found)) => blocks = found,
            Some(Err(reason)) => why = Some(reason),
            None => {}
        }
    }
    Ok(Stored { placed, blocks, shape, dtype, why })
}

/// The smallest type that holds all parts, or why there is none; `None` where not all are stored as codes.
fn codes(checkpoint: &Checkpoint, parts: &[String]) -> Result<Option<Result<Blocks, String>>> {
    let mut common: Option<Vec<Blocks>> = None;
    for name in parts {
        let tensor = checkpoint.tensor(name)?;
        let unit = checkpoint.unit_of(tensor)?;
        let Encoding::Abq(abq) = unit.encoding() else { return Ok(None) };
        if !tensor.is_stored() {
            return Ok(None);
        }
        let read = |component: &str| unit.components().get(component).map(read_all).transpose();
        let floats = |component: &str| -> Result<Option<Floats<'static>>> {
            let Some(bytes) = read(component)? else { return Ok(None) };
            let dtype = unit.components().get(component).map_or(Dtype::F32, Component::dtype);
            Ok(Some(Floats::new(dtype, bytes)?))
        };
        let Some(scale) = floats(SCALE)? else { return Ok(None) };
        let zero = match (floats(OFFSET)?, read(ZERO)?) {
            (Some(offsets), _) => Zero::Real(offsets),
            (None, Some(zeros)) => Zero::Integer(zeros.into()),
            (None, None) => Zero::Symmetric,
        };
        let cols = tensor.shape.last().copied().unwrap_or(0);
        let types = match holding(abq, cols, &scale, &zero) {
            Ok(types) => types,
            Err(why) => return Ok(Some(Err(why))),
        };
        common = Some(match common {
            None => types,
            Some(before) => before.into_iter().filter(|blocks| types.contains(blocks)).collect(),
        });
    }
    let first = common.as_ref().and_then(|types| types.first().copied());
    Ok(common.map(|_| first.ok_or_else(|| "has experts that no one type holds".to_owned())))
}

fn read_all(component: &Component) -> Result<Vec<u8>> {
    if component.bytes() > MAX_SCALES {
        let what = format!("has {} bytes where at most {MAX_SCALES} are read", component.bytes());
        return Err(FormatError::corrupt(component.path(), Some(component.name()), what).into());
    }
    let mut bytes = vec![0; component.bytes() as usize];
    component.read_at(0, &mut bytes)?;
    Ok(bytes)
}

/// What was decoded and why, the tensors of a reason in one line.
pub(super) fn decoded(all: &[Stored]) -> Vec<(String, String)> {
    let mut reasons: BTreeMap<(&str, &str), Vec<&str>> = BTreeMap::new();
    for stored in all {
        if let Some(why) = &stored.why {
            reasons.entry((why, stored.blocks.name())).or_default().push(&stored.placed.name);
        }
    }
    let each = reasons.into_iter().map(|((why, blocks), names)| {
        let first = names.first().copied().unwrap_or_default();
        let more = if names.len() > 1 { format!(" and {} more", names.len() - 1) } else { String::new() };
        (format!("{first}{more}"), format!("{why}: written as {blocks}"))
    });
    each.collect()
}
