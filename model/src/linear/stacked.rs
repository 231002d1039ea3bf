//! A matrix of a stack: experts that lie in one tensor.
//!
//! ```text
//! [experts, outputs, inputs]   the rows of an expert lie one after the other: read where they lie
//! [experts, inputs, outputs]   its columns are rows here: gathered some at a time; small floats are stored the other way round and
//!                              decoded so; what is encoded otherwise is decoded as a whole for every product
//! ```

use std::ops::Range;

use llmpress_formats::{Checkpoint, Dtype, Encoding, Error, Result, encoding};
use llmpress_kernels::cpu::Elements;

use super::source::{Source, buffer, part, typed};

/// Which matrix of which stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stack {
    /// How many matrices there are.
    pub(crate) count: usize,
    /// The number of this one.
    pub(crate) index: usize,
    /// Whether it is stored as `[inputs, outputs]`.
    pub(crate) transposed: bool,
}

impl Stack {
    /// The shape of the tensor.
    pub(super) fn shape(&self, rows: usize, cols: usize) -> [usize; 3] {
        if self.transposed { [self.count, cols, rows] } else { [self.count, rows, cols] }
    }
}

/// How elements come.
#[derive(Debug)]
enum Read {
    /// From where they lie, in this unit.
    Mapped(String),
    /// Some rows at a time.
    Rows,
    /// The whole matrix at a time.
    Whole,
}

#[derive(Debug)]
pub(super) struct Stacked {
    tensor: String,
    stack: Stack,
    dtype: Dtype,
    rows: usize,
    cols: usize,
    read: Read,
}

impl Stacked {
    /// Of a tensor whose shape and dtype were checked.
    pub(super) fn open(
        checkpoint: &Checkpoint,
        tensor: &str,
        stack: Stack,
        dtype: Dtype,
        rows: usize,
        cols: usize,
    ) -> Result<Self> {
        let info = checkpoint.tensor(tensor)?;
        let unit = checkpoint.unit_of(info)?;
        let mut all = Self { tensor: tensor.to_owned(), stack, dtype, rows, cols, read: Read::Rows };
        match unit.encoding() {
            Encoding::Raw if info.is_stored() => {
                // Checks that the component is what the tensor says, so that a faulty unit is found now.
                checkpoint.read(tensor, 0, &mut [])?;
                if all.mapped(checkpoint, &info.unit).is_ok() {
                    all.read = Read::Mapped(info.unit.clone());
                } else if stack.transposed {
                    all.read = Read::Whole;
                }
            }
            Encoding::Scaled(scaled) if scaled.transposed && stack.transposed && info.is_stored() => {}
            _ if stack.transposed => all.read = Read::Whole,
            _ => {}
        }
        Ok(all)
    }

    /// All elements of the tensor.
    fn mapped<'a>(&self, checkpoint: &'a Checkpoint, unit: &str) -> Result<Elements<'a>> {
        let all = typed(checkpoint.view(unit, encoding::raw::DATA)?, self.dtype);
        let all = all.filter(|all| all.len() == self.stack.count * self.rows * self.cols);
        all.ok_or_else(|| {
            Error::Invalid(format!("unit {unit} does not lie on whole {} elements", self.dtype.name()))
        })
    }

    fn width(&self) -> usize {
        self.dtype.bits() as usize / 8
    }

    /// The first element of the matrix.
    fn start(&self) -> usize {
        self.stack.index * self.rows * self.cols
    }
}

impl Source for Stacked {
    fn elements<'a>(
        &'a self,
        checkpoint: &'a Checkpoint,
        rows: Range<usize>,
        words: &'a mut Vec<u64>,
    ) -> Result<Elements<'a>> {
        let (start, width) = (self.start(), self.width());
        let count = rows.len() * self.cols;
        match &self.read {
            Read::Mapped(unit) => {
                let all = self.mapped(checkpoint, unit)?;
                if !self.stack.transposed {
                    let first = start + rows.start * self.cols;
                    return Ok(part(all, first..first + count));
                }
                let own = start..start + self.rows * self.cols;
                let out = buffer(words, count * width);
                match all {
                    Elements::F32(all) => {
                        gather(bytemuck::cast_slice(&all[own]), self.rows, rows, cast::<u32>(out))
                    }
                    Elements::Bf16(all) | Elements::F16(all) => {
                        gather(&all[own], self.rows, rows, cast::<u16>(out))
                    }
                }
            }
            Read::Rows => {
                let out = buffer(words, count * width);
                let (first, end) = (rows.start as u64, rows.end as u64);
                if self.stack.transposed {
                    checkpoint.read_columns(&self.tensor, self.stack.index as u64, first..end, out)?;
                } else {
                    checkpoint.read(&self.tensor, ((start + rows.start * self.cols) * width) as u64, out)?;
                }
            }
            Read::Whole => {
                let mut all = vec![0u64; (self.rows * self.cols * width).div_ceil(8)];
                let own = buffer(&mut all, self.rows * self.cols * width);
                checkpoint.read(&self.tensor, (start * width) as u64, own)?;
                let out = buffer(words, count * width);
                match width {
                    4 => gather(cast::<u32>(own), self.rows, rows, cast::<u32>(out)),
                    _ => gather(cast::<u16>(own), self.rows, rows, cast::<u16>(out)),
                }
            }
        }
        let bytes = &bytemuck::cast_slice::<u64, u8>(words)[..count * width];
        Ok(typed(bytes, self.dtype).unwrap_or(Elements::F32(&[])))
    }

    fn in_place(&self) -> bool {
        matches!(self.read, Read::Mapped(_)) && !self.stack.transposed
    }

    fn at_once(&self) -> bool {
        matches!(self.read, Read::Whole)
    }
}

/// Words of a buffer, which is aligned for all of them.
fn cast<T: bytemuck::Pod>(bytes: &mut [u8]) -> &mut [T] {
    bytemuck::cast_slice_mut(bytes)
}

/// Columns `columns` of a matrix whose rows have `across` elements, as rows.
fn gather<T: Copy>(all: &[T], across: usize, columns: Range<usize>, out: &mut [T]) {
    /// Rows that are read together, so that what is written lies together too.
    const ROWS: usize = 64;
    let height = all.len() / across.max(1);
    for (block, lines) in all.chunks(ROWS * across.max(1)).enumerate() {
        for (out, column) in out.chunks_exact_mut(height.max(1)).zip(columns.clone()) {
            let out = &mut out[block * ROWS..];
            out.iter_mut().zip(lines.chunks_exact(across)).for_each(|(out, line)| *out = line[column]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_become_rows() {
        for (height, across) in [(1, 1), (3, 2), (64, 5), (65, 7), (200, 3)] {
            let all: Vec<u16> = (0..height * across).map(|i| i as u16).collect();
            for columns in [0..across, across / 2..across, 0..0] {
                let mut out = vec![u16::MAX; columns.len() * height];
                gather(&all, across, columns.clone(), &mut out);
                for (i, column) in columns.enumerate() {
                    for row in 0..height {
                        assert_eq!(out[i * height + row], all[row * across + column]);
                    }
                }
            }
        }
    }
}
