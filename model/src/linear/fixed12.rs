//! fixed12: one token is multiplied from the twelve bits, more from decoded rows.

use std::ops::Range;

use llmpress_entropy::fixed12::{Grid, StripsRef, TILE_CODE_BYTES, TILE_ROWS, TILE_WEIGHTS};
use llmpress_formats::{Checkpoint, Encoding, Error, Result, encoding};
use llmpress_kernels::cpu::{Elements, dot_fixed12};

use super::decoded::Decoded;
use super::source::{Source, Stored};

#[derive(Debug)]
struct Fixed12 {
    unit: String,
    base: i16,
    grid: Grid,
    decoded: Decoded,
}

/// Opens a fixed12 matrix whose components are aligned.
pub(super) fn open(stored: &Stored<'_>) -> Result<Option<Box<dyn Source>>> {
    let Encoding::Fixed12 { base } = *stored.encoding()? else { return Ok(None) };
    let Some(grid) = Grid::new(stored.rows as u64, stored.cols as u64) else { return Ok(None) };
    // Also reads and checks the small tables, so that a faulty unit is found now.
    stored.checkpoint.read(stored.tensor, 0, &mut [])?;
    let fixed = Fixed12 { unit: stored.info.unit.clone(), base, grid, decoded: Decoded::new(stored) };
    let readable = fixed.unit(stored.checkpoint).check().is_ok();
    Ok(readable.then(|| Box::new(fixed) as Box<dyn Source>))
}

impl Fixed12 {
    fn unit<'a>(&'a self, checkpoint: &'a Checkpoint) -> Unit<'a> {
        Unit { checkpoint, unit: &self.unit, base: self.base, grid: self.grid }
    }
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
        self.unit(checkpoint).dot(rows, x, out)
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

/// A fixed12 unit where it lies.
struct Unit<'a> {
    checkpoint: &'a Checkpoint,
    unit: &'a str,
    base: i16,
    grid: Grid,
}

impl<'a> Unit<'a> {
    fn view<T: bytemuck::AnyBitPattern>(&self, component: &str) -> Result<&'a [T]> {
        let bytes = self.checkpoint.view(self.unit, component)?;
        bytemuck::try_cast_slice(bytes)
            .map_err(|e| Error::Invalid(format!("unit {}: {component}: {e}", self.unit)))
    }

    /// Whether every component can be read in place.
    fn check(&self) -> Result<()> {
        self.strips(0..0).map(|_| ())
    }

    fn strips(&self, strips: Range<usize>) -> Result<StripsRef<'a>> {
        use encoding::fixed12::{CODES, ESCAPE_EXPONENTS, ESCAPE_OFFSETS, ESCAPE_POSITIONS, SIGN_MANTISSA};
        let all = StripsRef {
            sign_mantissa: self.view(SIGN_MANTISSA)?,
            codes: self.view(CODES)?,
            escape_offsets: self.view(ESCAPE_OFFSETS)?,
            escape_positions: self.view(ESCAPE_POSITIONS)?,
            escape_exponents: self.view(ESCAPE_EXPONENTS)?,
        };
        let last = strips.end;
        some_strips(&all, self.grid.tiles_across() as usize, strips).ok_or_else(|| {
            Error::Invalid(format!("unit {}: a component ends before strip {last}", self.unit))
        })
    }

    fn dot(&self, rows: Range<usize>, x: &[f32], out: &mut [f32]) -> Result<()> {
        let strips = self.strips(rows.start / TILE_ROWS..rows.end.div_ceil(TILE_ROWS))?;
        dot_fixed12(self.base, &strips, x, out)
            .map_err(|e| Error::corrupt(self.checkpoint.root(), Some(self.unit), e.to_string()))
    }
}
