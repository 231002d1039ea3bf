//! AWQ's `gemm` layout: a transposed matrix, eight neighbouring outputs in a word.

use std::collections::BTreeMap;

use super::settings::{Settings, group_size};
use super::{CODES, Foreign, ForeignUnit, Layout, SCALES, ZEROS, part, require, required, sides};
use crate::{Component, Config, Dtype, Error, Result};

/// The tensor that a quantised module is known by.
pub(super) const SUFFIX: &str = ".qweight";

/// Outputs in a word.
pub(super) const OUTPUTS: u64 = 8;

/// The nibble of a word that holds an output, counted within its eight: nibbles hold 0, 2, 4, 6, 1, 3, 5, 7.
pub(super) const NIBBLE: [u32; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

pub(super) fn take(
    config: &Config,
    settings: &Settings,
    module: &str,
    stored: &mut BTreeMap<String, Component>,
) -> Result<Option<ForeignUnit>> {
    let Settings::Awq(settings) = settings else { return Ok(None) };
    let version = settings.version.as_deref().unwrap_or("gemm");
    if settings.bits != 4 || !version.eq_ignore_ascii_case("gemm") || !settings.zero_point {
        return Err(Error::unsupported(
            config.path(),
            Some(module),
            format!(
                "is AWQ of {} bits in the {version:?} layout{}; 4 bits in gemm with zero points can be read",
                settings.bits,
                if settings.zero_point { "" } else { " without zero points" }
            ),
        ));
    }
    let codes = required(config, stored, &format!("{module}.qweight"))?;
    let scales = required(config, stored, &format!("{module}.scales"))?;
    let zeros = required(config, stored, &format!("{module}.qzeros"))?;
    let (cols, words) = sides(&codes)?;
    let rows = words.saturating_mul(OUTPUTS);
    let part = part(module, rows, cols, &scales)?;
    require(&codes, Dtype::I32, &[cols, words])?;
    let group_size = group_size(config, Some(settings.group_size))?.filter(|size| u64::from(*size) < cols);
    let foreign = Foreign {
        layout: Layout::Awq,
        bits: settings.bits,
        group_size,
        zeros: true,
        scattered: false,
        activation_bits: None,
    };
    let groups = foreign.groups(cols as usize) as u64;
    require(&scales, part.dtype, &[groups, rows])?;
    require(&zeros, Dtype::I32, &[groups, words])?;
    let components =
        BTreeMap::from([(CODES.to_owned(), codes), (SCALES.to_owned(), scales), (ZEROS.to_owned(), zeros)]);
    Ok(Some(ForeignUnit { name: part.name.clone(), foreign, part, components }))
}
