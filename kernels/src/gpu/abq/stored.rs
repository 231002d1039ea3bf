//! What no kernel checks of a matrix as it is stored.

use super::super::{Error, Result};
use super::layout::{HALF_COLS, TILE_ROWS};

pub(super) use crate::cpu::abq::{Stored, Zero};

/// What is wrong with a stored matrix, beside its size.
fn invalid(stored: &Stored<'_>, what: &str) -> Error {
    Error::Invalid(format!("an abq matrix of {} x {}: {what}", stored.rows, stored.cols))
}

/// Refuses widths, groups and components that do not belong together. The number of groups of a row.
pub(super) fn check(stored: &Stored<'_>) -> Result<usize> {
    let &Stored { rows, cols, bits, planes, group_size, words, scale, zero, .. } = stored;
    if !(1..=8).contains(&bits) || !(1..=8).contains(&planes) || planes != bits && planes != bits + 1 {
        return Err(invalid(stored, &format!("there are no weights of {bits} bits in {planes} planes")));
    }
    if group_size.is_some_and(|group| group == 0 || !group.is_multiple_of(HALF_COLS)) {
        return Err(invalid(stored, "its groups are no multiples of 32 columns"));
    }
    // Kernels count columns in 32 bits.
    if rows == 0 || cols == 0 || cols > 1 << 30 {
        return Err(invalid(stored, "no kernel does its shape"));
    }
    let groups = group_size.map_or(1, |group| cols.div_ceil(group));
    let size = |what: &str, found: usize, each: usize| {
        let expected = rows.checked_mul(each);
        if Some(found) == expected {
            Ok(())
        } else {
            Err(invalid(stored, &format!("{what} has {found} elements")))
        }
    };
    size("planes", words.len(), usize::from(planes) * cols.div_ceil(32))?;
    size("scale", scale.len(), groups)?;
    match zero {
        Zero::Symmetric => {}
        Zero::Integer(zero) => size("zero", zero.len(), groups)?,
        Zero::Real(offset) => size("offset", offset.len(), groups)?,
    }
    Ok(groups)
}

/// Refuses matrices that cannot lie one below the other. Their rows together.
pub(super) fn check_stack(parts: &[Stored<'_>]) -> Result<usize> {
    let Some((first, others)) = parts.split_first() else {
        return Err(Error::Invalid("no abq matrices".to_owned()));
    };
    let shape = |s: &Stored<'_>| (s.cols, s.bits, s.planes, s.group_size, s.activation_bits);
    if others.iter().any(|other| shape(other) != shape(first)) {
        return Err(invalid(first, "one of another shape below it"));
    }
    if parts[..others.len()].iter().any(|part| !part.rows.is_multiple_of(TILE_ROWS)) {
        return Err(invalid(first, "only whole strips of 16 rows can lie above another matrix"));
    }
    Ok(parts.iter().map(|part| part.rows).sum())
}
