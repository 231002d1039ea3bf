//! fixed12: one token is multiplied from the twelve bits, more from decoded rows.

use std::ops::Range;

use llmpress_entropy::fixed12::{Grid, StripsRef, TILE_CODE_BYTES, TILE_ROWS, TILE_WEIGHTS, decode_strips};
use llmpress_formats::{Checkpoint, Encoding, Error, Result, encoding};
use llmpress_kernels::cpu::{Elements, dot_fixed12};

use super::decoded::Decoded;
use super::source::{Source, Stored};

#[derive(Debug)]
struct Fixed12 {
    tiles: Tiles,
    decoded: Decoded,
}

/// Opens a fixed12 matrix whose components are aligned.
pub(super) fn open(stored: &Stored<'_>) -> Result<Option<Box<dyn Source>>> {
    let Encoding::Fixed12 { base } = *stored.encoding()? else { return Ok(None) };
    // Also reads and checks the small tables, so that a faulty unit is found now.
    stored.checkpoint.read(stored.tensor, 0, &mut [])?;
    let tiles = Tiles::open(stored, &UNIT, base, stored.cols);
    Ok(tiles.map(|tiles| Box::new(Fixed12 { tiles, decoded: Decoded::new(stored) }) as Box<dyn Source>))
}

impl Source for Fixed12 {
    fn elements<'a>(
        &'a self,
        checkpoint: &'a Checkpoint,
        rows: Range<usize>,
        words: &'a mut Vec<u64>,
    ) -> Result<Elements<'a>> {
        self.decoded.elements(checkpoint, rows, words)
    }

    fn dot(
        &self,
        checkpoint: &Checkpoint,
        rows: Range<usize>,
        x: &[f32],
        out: &mut [f32],
        _words: &mut Vec<u64>,
    ) -> Result<()> {
        let strips = self.tiles.strips(checkpoint, rows)?;
        dot_fixed12(self.tiles.base, &strips, x, out).map_err(|e| self.tiles.fault(checkpoint, e))
    }
}

/// Strips of 16 rows out of all of a matrix that is so many tiles wide; `None` where there are not so many.
pub(super) fn some_strips<'a>(
    all: &StripsRef<'a>,
    across: usize,
    strips: Range<usize>,
) -> Option<StripsRef<'a>> {
    let (first, last) = (strips.start * across, strips.end * across);
    let escape_offsets = all.escape_offsets.get(first..=last)?;
    let escapes = match escape_offsets {
        [first, .., last] => *first as usize..*last as usize,
        _ => 0..0,
    };
    Some(StripsRef {
        sign_mantissa: all.sign_mantissa.get(first * TILE_WEIGHTS..last * TILE_WEIGHTS)?,
        codes: all.codes.get(first * TILE_CODE_BYTES..last * TILE_CODE_BYTES)?,
        escape_offsets,
        escape_positions: all.escape_positions.get(escapes.clone())?,
        escape_exponents: all.escape_exponents.get(escapes)?,
    })
}

/// The names of the components in a unit.
#[derive(Debug)]
pub(super) struct Names {
    sign_mantissa: &'static str,
    codes: &'static str,
    escape_offsets: &'static str,
    escape_positions: &'static str,
    escape_exponents: &'static str,
}

const UNIT: Names = Names {
    sign_mantissa: encoding::fixed12::SIGN_MANTISSA,
    codes: encoding::fixed12::CODES,
    escape_offsets: encoding::fixed12::ESCAPE_OFFSETS,
    escape_positions: encoding::fixed12::ESCAPE_POSITIONS,
    escape_exponents: encoding::fixed12::ESCAPE_EXPONENTS,
};

/// Of kept values of sparse24.
pub(super) const VALUES: Names = Names {
    sign_mantissa: "values.sign_mantissa",
    codes: "values.codes",
    escape_offsets: "values.escape_offsets",
    escape_positions: "values.escape_positions",
    escape_exponents: "values.escape_exponents",
};

/// Of kept values of a base of lowrank.
pub(super) const BASE_VALUES: Names = Names {
    sign_mantissa: "base.values.sign_mantissa",
    codes: "base.values.codes",
    escape_offsets: "base.values.escape_offsets",
    escape_positions: "base.values.escape_positions",
    escape_exponents: "base.values.escape_exponents",
};

/// A matrix in fixed12 where it lies: a unit, or the values of one.
#[derive(Debug)]
pub(super) struct Tiles {
    unit: String,
    names: &'static Names,
    base: i16,
    rows: usize,
    cols: usize,
    grid: Grid,
}

impl Tiles {
    /// Finds the components of a matrix of so many columns; `None` where one is not aligned, or there are no weights.
    pub(super) fn open(stored: &Stored<'_>, names: &'static Names, base: i16, cols: usize) -> Option<Self> {
        let grid = Grid::new(stored.rows as u64, cols as u64)?;
        let tiles = Self { unit: stored.info.unit.clone(), names, base, rows: stored.rows, cols, grid };
        tiles.strips(stored.checkpoint, 0..0).is_ok().then_some(tiles)
    }

    /// What is added to codes.
    pub(super) fn base(&self) -> i16 {
        self.base
    }

    fn view<'a, T: bytemuck::AnyBitPattern>(
        &self,
        checkpoint: &'a Checkpoint,
        component: &str,
    ) -> Result<&'a [T]> {
        let bytes = checkpoint.view(&self.unit, component)?;
        bytemuck::try_cast_slice(bytes)
            .map_err(|e| Error::Invalid(format!("unit {}: {component}: {e}", self.unit)))
    }

    /// The strips that hold some rows, which begin with one.
    pub(super) fn strips<'a>(&self, checkpoint: &'a Checkpoint, rows: Range<usize>) -> Result<StripsRef<'a>> {
        let all = StripsRef {
            sign_mantissa: self.view(checkpoint, self.names.sign_mantissa)?,
            codes: self.view(checkpoint, self.names.codes)?,
            escape_offsets: self.view(checkpoint, self.names.escape_offsets)?,
            escape_positions: self.view(checkpoint, self.names.escape_positions)?,
            escape_exponents: self.view(checkpoint, self.names.escape_exponents)?,
        };
        let strips = rows.start / TILE_ROWS..rows.end.div_ceil(TILE_ROWS);
        let last = strips.end;
        some_strips(&all, self.grid.tiles_across() as usize, strips).ok_or_else(|| {
            Error::Invalid(format!("unit {}: a component ends before strip {last}", self.unit))
        })
    }

    /// The words of some rows; those beside them in their strips are decoded, too.
    pub(super) fn decode<'a>(
        &self,
        checkpoint: &Checkpoint,
        rows: Range<usize>,
        words: &'a mut Vec<u16>,
    ) -> Result<&'a [u16]> {
        let top = rows.start / TILE_ROWS * TILE_ROWS;
        let height = rows.end.next_multiple_of(TILE_ROWS).min(self.rows) - top;
        words.resize(height * self.cols, 0);
        let strips = self.strips(checkpoint, rows.clone())?;
        decode_strips(self.base, self.cols, height, &strips, words).map_err(|e| self.fault(checkpoint, e))?;
        Ok(&words[(rows.start - top) * self.cols..(rows.end - top) * self.cols])
    }

    /// What is wrong with the components.
    pub(super) fn fault(&self, checkpoint: &Checkpoint, error: impl std::fmt::Display) -> Error {
        Error::corrupt(checkpoint.root(), Some(&self.unit), error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn components_inside_of_another_encoding_have_the_names_of_their_own_with_a_prefix() {
        for (names, prefix) in [(&VALUES, "values."), (&BASE_VALUES, "base.values.")] {
            for (inner, name) in [
                (UNIT.sign_mantissa, names.sign_mantissa),
                (UNIT.codes, names.codes),
                (UNIT.escape_offsets, names.escape_offsets),
                (UNIT.escape_positions, names.escape_positions),
                (UNIT.escape_exponents, names.escape_exponents),
            ] {
                assert_eq!(format!("{prefix}{inner}"), name);
            }
        }
    }
}
