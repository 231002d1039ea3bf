//! Rows of a matrix and what is kept of them.

use std::borrow::Cow;
use std::ops::Range;

use llmpress_formats::encoding::sparse24::positions;
use llmpress_formats::{Dtype, Encoding, Tensor};

use crate::source::UnitSource;
use crate::{Error, Result};

/// A matrix of which rows are read.
pub(super) struct Sheet<'a> {
    unit: &'a UnitSource<'a>,
    dtype: Dtype,
    rows: u64,
    cols: usize,
    /// Whether it is stored as two in four already: what was kept then is kept now, zeros among it.
    is_sparse: bool,
}

/// What is kept of some rows.
#[derive(Default)]
pub(super) struct Packing {
    positions: Vec<u8>,
    values: Vec<u8>,
}

impl Packing {
    /// Where the kept values lie.
    pub(super) fn positions(&self) -> &[u8] {
        &self.positions
    }

    /// The kept values.
    pub(super) fn values(&self) -> &[u8] {
        &self.values
    }

    /// The kept values as words of 16 bits.
    pub(super) fn words(&self) -> Cow<'_, [u16]> {
        match bytemuck::try_cast_slice(&self.values) {
            Ok(words) => Cow::Borrowed(words),
            Err(_) => Cow::Owned(bytemuck::pod_collect_to_vec(&self.values)),
        }
    }
}

impl<'a> Sheet<'a> {
    pub(super) fn new(unit: &'a UnitSource<'a>, tensor: &Tensor, rows: u64, cols: usize) -> Result<Self> {
        let stored = unit.checkpoint().unit_of(tensor)?.encoding();
        let is_sparse = matches!(stored, Encoding::Sparse24(_)) && tensor.is_stored();
        Ok(Self { unit, dtype: tensor.dtype, rows, cols, is_sparse })
    }

    fn width(&self) -> usize {
        self.dtype.bits() as usize / 8
    }

    /// Bytes of a row.
    pub(super) fn row_bytes(&self) -> usize {
        self.cols * self.width()
    }

    /// Bytes of some rows.
    pub(super) fn bytes_of(&self, rows: &Range<u64>) -> u64 {
        (rows.end - rows.start) * self.row_bytes() as u64
    }

    /// The rows in pieces of at most `piece_bytes`, and at least `together` rows each.
    pub(super) fn pieces(&self, piece_bytes: usize, together: u64) -> Vec<Range<u64>> {
        let fit = (piece_bytes / self.row_bytes().max(1)) as u64;
        let step = (fit / together.max(1)).max(1) * together.max(1);
        (0..self.rows.div_ceil(step)).map(|i| i * step..((i + 1) * step).min(self.rows)).collect()
    }

    /// Reads rows into `dense` (as words, whatever the dtype) and packs them; or the first of them that keeps more than two of
    /// a quad, and why.
    pub(super) fn pack(
        &self,
        rows: Range<u64>,
        dense: &mut Vec<u16>,
        out: &mut Packing,
    ) -> Result<Result<(), (u64, String)>> {
        let count = (rows.end - rows.start) as usize;
        let (row_bytes, of_row) = (self.row_bytes(), positions::row_bytes(self.cols));
        dense.resize(count * row_bytes / 2, 0);
        let dense: &mut [u8] = bytemuck::cast_slice_mut(dense);
        self.unit.read(rows.start * row_bytes as u64, dense)?;
        if self.is_sparse {
            let packed = self.unit.checkpoint().sparse_rows(self.unit.first_name(), rows)?;
            out.positions.clear();
            out.positions.extend_from_slice(packed.positions());
        } else {
            out.positions.resize(count * of_row, 0);
            let of_rows = dense.chunks_exact(row_bytes.max(1));
            for ((row, dense), positions) in
                (rows.start..).zip(of_rows).zip(out.positions.chunks_exact_mut(of_row.max(1)))
            {
                if let Err(quad) = positions::choose_row(self.width(), dense, positions) {
                    let (first, last) = (quad * 4, quad * 4 + 3);
                    return Ok(Err((
                        row,
                        format!("more than two of columns {first} to {last} are not zero"),
                    )));
                }
            }
        }
        out.values.clear();
        let of_rows = dense.chunks_exact(row_bytes.max(1));
        for (dense, positions) in of_rows.zip(out.positions.chunks_exact(of_row.max(1))) {
            positions::gather(self.width(), positions, dense, &mut out.values).map_err(|quad| {
                Error::Invalid(format!("tensor {}: quad {quad} has no places", self.unit.first_name()))
            })?;
        }
        Ok(Ok(()))
    }
}
