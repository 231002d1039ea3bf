//! GPTQ, versions 1 and 2: a transposed matrix, codes packed along its columns.

use std::collections::BTreeMap;

use super::settings::{Settings, group_size};
use super::{
    CODES, Foreign, ForeignUnit, GROUP_INDEX, Layout, SCALES, ZEROS, bit_stream, part, require, required,
    sides,
};
use crate::{Component, Config, Dtype, Error, Result};

/// The tensor that a quantised module is known by.
pub(super) const SUFFIX: &str = ".qweight";

/// Widths that the layout has; others are packed in ways of their own by each tool.
const BITS: [u8; 4] = [2, 3, 4, 8];

/// Bytes of an index of groups that are read: a matrix of more columns is not met.
const MAX_INDEX_BYTES: u64 = 64 << 20;

pub(super) fn take(
    config: &Config,
    settings: &Settings,
    module: &str,
    stored: &mut BTreeMap<String, Component>,
) -> Result<Option<ForeignUnit>> {
    let Settings::Gptq(settings) = settings else { return Ok(None) };
    let unsupported = |what: String| Error::unsupported(config.path(), Some(module), what);
    let plain_zeros = match settings.checkpoint_format.as_deref().or(settings.format.as_deref()) {
        None | Some("gptq") => false,
        Some("gptq_v2") => true,
        Some(other) => {
            return Err(unsupported(format!(
                "is in GPTQ's {other:?} layout; gptq and gptq_v2 can be read: have its tool save it as one of them"
            )));
        }
    };
    if !BITS.contains(&settings.bits) {
        return Err(unsupported(format!(
            "has codes of {} bits; GPTQ's layout of 2, 3, 4 and 8 can be read",
            settings.bits
        )));
    }
    let codes = required(config, stored, &format!("{module}.qweight"))?;
    let scales = required(config, stored, &format!("{module}.scales"))?;
    let zeros = required(config, stored, &format!("{module}.qzeros"))?;
    let index = stored.remove(&format!("{module}.g_idx"));
    let (groups, rows) = sides(&scales)?;
    let (words, _) = sides(&codes)?;
    let cols = words.checked_mul(32).filter(|bits| bits.is_multiple_of(u64::from(settings.bits)));
    let cols = cols.map(|bits| bits / u64::from(settings.bits)).ok_or_else(|| {
        codes
            .corrupt(format!("has {words} words a column, which codes of {} bits do not fill", settings.bits))
    })?;
    let part = part(module, rows, cols, &scales)?;
    require(&codes, Dtype::I32, &[words, rows])?;
    let zero_words = bit_stream::words(rows, settings.bits).unwrap_or(u64::MAX);
    require(&zeros, Dtype::I32, &[groups, zero_words])?;
    let group_size = group_size(config, Some(settings.group_size))?.filter(|size| u64::from(*size) < cols);
    let mut foreign = Foreign {
        layout: Layout::Gptq { plain_zeros },
        bits: settings.bits,
        group_size,
        zeros: true,
        scattered: false,
        activation_bits: None,
    };
    if foreign.groups(cols as usize) as u64 != groups {
        return Err(scales.corrupt(format!(
            "has {groups} groups where {cols} columns make {} of quantization_config.group_size",
            foreign.groups(cols as usize)
        )));
    }
    let mut components =
        BTreeMap::from([(CODES.to_owned(), codes), (SCALES.to_owned(), scales), (ZEROS.to_owned(), zeros)]);
    if let Some(index) = index {
        require(&index, Dtype::I32, &[cols])?;
        foreign.scattered = scattered(&index, &foreign, cols as usize, groups)?;
        if foreign.scattered {
            components.insert(GROUP_INDEX.to_owned(), index);
        }
    }
    Ok(Some(ForeignUnit { name: part.name.clone(), foreign, part, components }))
}

/// Whether an index of groups differs from their order.
fn scattered(index: &Component, foreign: &Foreign, cols: usize, groups: u64) -> Result<bool> {
    let bytes = index.read_all(MAX_INDEX_BYTES)?;
    let step = foreign.group_columns(cols);
    let mut scattered = false;
    for (column, bytes) in bytes.chunks_exact(4).enumerate() {
        let group = i32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        if u64::try_from(group).is_ok_and(|group| group < groups) {
            scattered |= group as usize != column / step;
        } else {
            return Err(index.corrupt(format!("puts column {column} into group {group} of {groups}")));
        }
    }
    Ok(scattered)
}
