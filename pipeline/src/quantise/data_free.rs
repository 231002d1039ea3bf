//! Quantising by the weights alone: no model is run, so any architecture will do.
//!
//! ```text
//! block by block: weights --> grids --> nearest codes --> finished units        what is in no block comes last
//! ```

use std::collections::{BTreeMap, BTreeSet};

use llmpress_formats::encoding::PackedUnit;
use llmpress_formats::encoding::abq::{Floats, Packed, matrix};
use llmpress_formats::{Checkpoint, Error as FormatError, block_linears};
use llmpress_quantize::{Grid, Lesson, Rung, Spec, quantise_kept};

use crate::blocks::{Blocks, Made};
use crate::progress::{Counted, Task, Watch};
use crate::{Error, Result};

/// Bytes that are read at a time.
const PIECE: usize = 4 << 20;
/// Nothing is learned.
const NO_LESSONS: &[Lesson] = &[];

/// Does what is left after the finished blocks.
pub(crate) fn run(
    checkpoint: &Checkpoint,
    specs: &BTreeMap<String, Spec>,
    blocks: &mut Blocks,
    watch: &dyn Watch,
) -> Result<()> {
    let groups = groups(checkpoint, specs);
    let weights = |group: &[String]| -> Result<u64> {
        group.iter().map(|name| Ok(checkpoint.tensor(name)?.shape.iter().product::<u64>())).sum()
    };
    let total = groups.iter().map(|group| weights(group)).sum::<Result<u64>>()?;
    let done = blocks.count().min(groups.len());
    let progress = watch.begin(Task { verb: "quantise", size: total, counted: Counted::Weights });
    progress.start(total);
    progress.advance(groups[..done].iter().map(|group| weights(group)).sum::<Result<u64>>()?);
    for group in &groups[done..] {
        let mut made = Vec::with_capacity(group.len());
        for name in group {
            let Some(&spec) = specs.get(name) else { continue };
            made.push(quantise(checkpoint, name, spec).map_err(|e| named(name, e))?);
            progress.advance(weights(std::slice::from_ref(name))?);
        }
        blocks.write((&made, &[]), NO_LESSONS, None)?;
    }
    Ok(())
}

/// The tensors of each block, in order, and then those of none.
fn groups(checkpoint: &Checkpoint, specs: &BTreeMap<String, Spec>) -> Vec<Vec<String>> {
    let model_type = checkpoint.config().and_then(|c| c.model_type());
    let mut left: BTreeSet<&String> = specs.keys().collect();
    let mut groups = Vec::new();
    for mut block in block_linears(model_type, specs.keys().map(String::as_str)) {
        block.retain(|name| left.remove(name));
        groups.push(block);
    }
    // Blocks come sorted by name: 10 after 1. What matters is that the order is always the same.
    if !left.is_empty() {
        groups.push(left.into_iter().cloned().collect());
    }
    groups
}

fn quantise(checkpoint: &Checkpoint, name: &str, spec: Spec) -> Result<Made> {
    let tensor = checkpoint.tensor(name)?;
    if let Some(unit) = quantise_kept(checkpoint, name, spec)? {
        return Ok(Made { name: name.to_owned(), unit, instead: None });
    }
    let (_, cols) = matrix(&tensor.shape).unwrap_or_default();
    let mut weights = Vec::with_capacity(tensor.shape.iter().product::<u64>() as usize);
    let mut piece = vec![0u64; PIECE / 8];
    for at in (0..tensor.bytes).step_by(PIECE) {
        let bytes = (tensor.bytes - at).min(PIECE as u64) as usize;
        let bytes = &mut bytemuck::cast_slice_mut::<u64, u8>(&mut piece)[..bytes];
        checkpoint.read(name, at, bytes)?;
        weights.extend(Floats::new(tensor.dtype, &*bytes)?.iter());
    }
    let unit = PackedUnit::Abq(packed(&weights, cols as usize, spec)?);
    Ok(Made { name: name.to_owned(), unit, instead: None })
}

/// Rows of `cols` weights by the weights alone.
fn packed(weights: &[f32], cols: usize, spec: Spec) -> Result<Packed<'static>> {
    let grid = match spec.rung {
        Rung::Rtn => Grid::min_max(weights, cols, spec)?,
        Rung::Grid => Grid::search(weights, cols, spec, None)?,
        Rung::Gptq => return Err(Error::Invalid(format!("{} goes by a text", spec.rung))),
    };
    Ok(grid.pack(&grid.nearest(weights))?)
}

/// An error that says of which tensor.
fn named(name: &str, error: Error) -> Error {
    match error {
        Error::Format(FormatError::Invalid(what)) | Error::Invalid(what) => {
            Error::Invalid(format!("{name}: {what}"))
        }
        other => other,
    }
}
