//! fixed12 in memory.

use llmpress_entropy::fixed12;
use llmpress_formats::encoding;

use crate::Result;
use crate::method::timed::{Joined, Timed, invalid};

/// One matrix.
#[derive(Default)]
struct Matrix {
    base: i16,
    rows: usize,
    cols: usize,
    strips: fixed12::Strips,
    offsets: Vec<u32>,
}

#[derive(Default)]
pub(super) struct Matrices(Vec<Matrix>);

impl Timed for Matrices {
    fn encode(&mut self, unit: &Joined) -> Result<usize> {
        let mut stored = 0;
        let mut rest = unit.words();
        self.0.resize_with(unit.matrices.len(), Matrix::default);
        for ((shape, bytes), m) in unit.matrices.iter().zip(&mut self.0) {
            let (words, later) = rest.split_at(bytes / 2);
            rest = later;
            let grid = encoding::fixed12::grid(shape).ok_or_else(|| invalid("not a matrix"))?;
            (m.rows, m.cols) = (grid.rows() as usize, grid.cols() as usize);
            let mut histogram = fixed12::Histogram::new();
            histogram.add(words);
            m.base = histogram.best_window().base;
            fixed12::encode_strips(m.base, m.cols, words, &mut m.strips).map_err(invalid)?;
            m.offsets.clear();
            m.offsets.push(0);
            m.offsets.extend(m.strips.escape_counts.iter().scan(0u32, |sum, n| {
                *sum += n;
                Some(*sum)
            }));
            stored += m.strips.sign_mantissa.len() + m.strips.codes.len() + m.offsets.len() * 4;
            stored += m.strips.escape_positions.len() * 3;
        }
        Ok(stored)
    }

    fn decode(&mut self, out: &mut [u8]) -> Result<()> {
        let mut rest: &mut [u16] = bytemuck::cast_slice_mut(out);
        for m in &self.0 {
            let (now, later) = rest.split_at_mut(m.rows * m.cols);
            rest = later;
            let strips = fixed12::StripsRef {
                sign_mantissa: &m.strips.sign_mantissa,
                codes: &m.strips.codes,
                escape_offsets: &m.offsets,
                escape_positions: &m.strips.escape_positions,
                escape_exponents: &m.strips.escape_exponents,
            };
            fixed12::decode_strips(m.base, m.cols, m.rows, &strips, now).map_err(invalid)?;
        }
        Ok(())
    }
}
