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
        let across = self.grid.tiles_across() as usize;
        let (first, last) = (strips.start * across, strips.end * across);
        let missing = |component: &str| {
            Error::Invalid(format!("unit {}: {component} ends before tile {last}", self.unit))
        };
        fn part<T>(all: &[T], range: Range<usize>) -> Option<&[T]> {
            all.get(range)
        }
        let offsets: &[u32] = self.view(ESCAPE_OFFSETS)?;
        let offsets = part(offsets, first..last + 1).ok_or_else(|| missing(ESCAPE_OFFSETS))?;
        let escapes = match offsets {
            [first, .., last] => *first as usize..*last as usize,
            _ => 0..0,
        };
        Ok(StripsRef {
            sign_mantissa: part(self.view(SIGN_MANTISSA)?, first * TILE_WEIGHTS..last * TILE_WEIGHTS)
                .ok_or_else(|| missing(SIGN_MANTISSA))?,
            codes: part(self.view(CODES)?, first * TILE_CODE_BYTES..last * TILE_CODE_BYTES)
                .ok_or_else(|| missing(CODES))?,
            escape_offsets: offsets,
            escape_positions: part(self.view(ESCAPE_POSITIONS)?, escapes.clone())
                .ok_or_else(|| missing(ESCAPE_POSITIONS))?,
            escape_exponents: part(self.view(ESCAPE_EXPONENTS)?, escapes)
                .ok_or_else(|| missing(ESCAPE_EXPONENTS))?,
        })
    }

    fn dot(&self, rows: Range<usize>, x: &[f32], out: &mut [f32]) -> Result<()> {
        let strips = self.strips(rows.start / TILE_ROWS..rows.end.div_ceil(TILE_ROWS))?;
        dot_fixed12(self.base, &strips, x, out)
            .map_err(|e| Error::corrupt(self.checkpoint.root(), Some(self.unit), e.to_string()))
    }
}
