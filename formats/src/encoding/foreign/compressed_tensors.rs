//! compressed-tensors: `pack-quantized` and `int-quantized`.

use std::collections::BTreeMap;

use super::settings::{Args, Group, Settings, group_size};
use super::{CODES, Foreign, ForeignUnit, Layout, SCALES, ZEROS, bit_stream, part, require, required, sides};
use crate::{Component, Config, Dtype, Error, Result};

/// The tensors that a quantised module is known by.
pub(super) const SUFFIXES: [&str; 2] = [".weight_packed", ".weight_scale"];

pub(super) fn take(
    config: &Config,
    settings: &Settings,
    module: &str,
    stored: &mut BTreeMap<String, Component>,
) -> Result<Option<ForeignUnit>> {
    let Settings::CompressedTensors(settings) = settings else { return Ok(None) };
    let name = |suffix: &str| format!("{module}.{suffix}");
    let unsupported = |what: String| Error::unsupported(config.path(), Some(&name("weight")), what);
    let group = settings.group(module);
    let args = group.and_then(|group| group.weights.as_ref());
    // Floats are read elsewhere; what has a scale besides is theirs too.
    if args.is_some_and(Args::is_float) || group.is_none() && !holds_integers(stored, module) {
        return Ok(None);
    }
    let group = group.ok_or_else(|| {
        unsupported(
            "belongs to no group of quantization_config.config_groups, which must say its bits".into(),
        )
    })?;
    let (Some(args), activations) = (&group.weights, &group.input_activations) else {
        return Err(unsupported("its group of quantization_config.config_groups has no weights".into()));
    };
    if args.kind != "int" || !(1..=8).contains(&args.num_bits) {
        return Err(unsupported(format!(
            "has weights of {} bits of {}; integers of 1 to 8 bits can be read: convert the original checkpoint",
            args.num_bits, args.kind
        )));
    }
    if !matches!(args.strategy.as_deref(), None | Some("channel" | "group")) {
        return Err(unsupported(format!(
            "has scales by {}; by channel and group can be read",
            args.strategy.as_deref().unwrap_or_default()
        )));
    }
    let scales = required(config, stored, &name("weight_scale"))?;
    let zeros = stored.remove(&name("weight_zero_point"));
    if !args.symmetric && zeros.is_none() {
        required(config, stored, &name("weight_zero_point"))?;
    }
    let mut foreign = Foreign {
        layout: Layout::IntQuantized,
        bits: args.num_bits,
        group_size: None,
        zeros: !args.symmetric,
        scattered: false,
        activation_bits: activations.as_ref().and_then(activation_bits),
    };
    let Some(packed) = stored.remove(&name("weight_packed")) else {
        let codes = required(config, stored, &name("weight"))?;
        return int_quantized(module, group, foreign, codes, scales, zeros).map(Some);
    };
    let shape = required(config, stored, &name("weight_shape"))?;
    let (rows, cols) = weight_shape(&shape)?;
    let (_, width) = sides(&packed)?;
    let dense = bit_stream::words(cols, args.num_bits);
    let whole = cols.div_ceil(u64::from(32 / u32::from(args.num_bits)));
    foreign.layout = match width {
        width if Some(width) == dense => Layout::PackQuantized,
        width if width == whole => Layout::PackQuantizedWhole,
        _ => {
            return Err(packed.corrupt(format!(
                "has {width} words a row where {cols} codes of {} bits take {}",
                args.num_bits,
                dense.unwrap_or(u64::MAX)
            )));
        }
    };
    require(&packed, Dtype::I32, &[rows, width])?;
    foreign.group_size = match args.strategy.as_deref() {
        Some("group") | None => group_size(config, args.group_size)?.filter(|size| u64::from(*size) < cols),
        _ => None,
    };
    let groups = foreign.groups(cols as usize) as u64;
    let part = part(module, rows, cols, &scales)?;
    require(&scales, part.dtype, &[rows, groups])?;
    let mut components = BTreeMap::from([(CODES.to_owned(), packed), (SCALES.to_owned(), scales)]);
    if let Some(zeros) = zeros.filter(|_| foreign.zeros) {
        let words = bit_stream::words(rows, args.num_bits).unwrap_or(u64::MAX);
        require(&zeros, Dtype::I32, &[words, groups])?;
        components.insert(ZEROS.to_owned(), zeros);
    }
    Ok(Some(ForeignUnit { name: part.name.clone(), foreign, part, components }))
}

/// Whether the tensors of a module are of integers: words, or signed bytes.
fn holds_integers(stored: &BTreeMap<String, Component>, module: &str) -> bool {
    let is = |last: &str, dtype| stored.get(&format!("{module}.{last}")).is_some_and(|c| c.dtype() == dtype);
    is("weight_packed", Dtype::I32) || is("weight", Dtype::I8)
}

fn int_quantized(
    module: &str,
    group: &Group,
    foreign: Foreign,
    codes: Component,
    scales: Component,
    zeros: Option<Component>,
) -> Result<ForeignUnit> {
    let (rows, cols) = sides(&codes)?;
    let part = part(module, rows, cols, &scales)?;
    require(&codes, Dtype::I8, &[rows, cols])?;
    if group.weights.as_ref().is_some_and(|args| args.strategy.as_deref() == Some("group")) {
        return Err(codes.corrupt("is int-quantized by groups, which the layout does not say".into()));
    }
    require(&scales, part.dtype, &[rows, 1])?;
    let mut components = BTreeMap::from([(CODES.to_owned(), codes), (SCALES.to_owned(), scales)]);
    if let Some(zeros) = zeros.filter(|_| foreign.zeros) {
        require(&zeros, Dtype::I8, &[rows, 1])?;
        components.insert(ZEROS.to_owned(), zeros);
    }
    Ok(ForeignUnit { name: part.name.clone(), foreign, part, components })
}

/// Widths of activations that are quantised as this library does it: integers, a token at a time, when it runs.
fn activation_bits(args: &Args) -> Option<u8> {
    let dynamic = args.dynamic == serde_json::Value::Bool(true);
    let same = args.kind == "int" && !args.symmetric && dynamic && args.strategy.as_deref() == Some("token");
    (same && (1..=8).contains(&args.num_bits)).then_some(args.num_bits)
}

/// The two numbers of `weight_shape`.
fn weight_shape(component: &Component) -> Result<(u64, u64)> {
    let mut sides = [0u64; 2];
    let width = match component.dtype() {
        Dtype::I64 => 8,
        Dtype::I32 => 4,
        other => return Err(component.corrupt(format!("is {} where I64 is needed", other.name()))),
    };
    if component.shape() != [2] {
        return Err(
            component.corrupt(format!("has shape {:?} where two numbers are needed", component.shape()))
        );
    }
    let mut bytes = [0; 16];
    component.read_at(0, &mut bytes[..2 * width])?;
    for (side, bytes) in sides.iter_mut().zip(bytes.chunks_exact(width)) {
        let mut wide = [0; 8];
        wide[..width].copy_from_slice(bytes);
        *side = u64::from_le_bytes(wide);
    }
    match sides {
        [rows @ 1..=0x7fff_ffff, cols @ 1..=0x7fff_ffff] => Ok((rows, cols)),
        [rows, cols] => Err(component.corrupt(format!("says {rows} x {cols}, which is no matrix"))),
    }
}
