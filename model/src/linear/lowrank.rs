//! lowrank: `y = B x + S (X x)`, where X x has the sum of each block of inputs.
//!
//! One token is multiplied so; more by the rows of B in single precision, to which the sums are added unrounded.
//!
//! ```text
//! sums of floats:  mapped; S (X x) is added in the order of `dot_rows`
//! sums of codes:   in memory in the order of the kernels; in the order of `abq::Matrix::multiply`
//! ```

use std::ops::Range;

use llmpress_formats::encoding::lowrank::{Base, BaseRows, SUMS, Sums, SumsEncoding};
use llmpress_formats::encoding::raw;
use llmpress_formats::encoding::sparse24::Packed;
use llmpress_formats::{Checkpoint, Encoding, Error, Result};
use llmpress_kernels::cpu::abq::{Inputs, Matrix};
use llmpress_kernels::cpu::{Elements, dot_rows};

use super::abq::Components;
use super::fixed12;
use super::source::{Source, Stored};
use super::sparse24::{Components24, Rows, Sparse};
use super::within::Floats;

#[derive(Debug)]
struct Lowrank {
    tensor: String,
    base: BaseSource,
    sums: SumsSource,
    cols: usize,
    block: usize,
}

#[derive(Debug)]
enum SumsSource {
    Plain(Floats),
    Codes(Matrix),
}

#[derive(Debug)]
enum BaseSource {
    Raw(Floats),
    Sparse(Sparse),
}

/// Opens a lowrank matrix. `None` where its components are not aligned.
pub(super) fn open(stored: &Stored<'_>) -> Result<Option<Box<dyn Source>>> {
    let Encoding::Lowrank(lowrank) = *stored.encoding()? else { return Ok(None) };
    let (checkpoint, unit) = (stored.checkpoint, &stored.info.unit);
    checkpoint.read(stored.tensor, 0, &mut [])?;
    let blocks = lowrank.blocks(stored.cols as u64) as usize;
    let sums = match lowrank.sums {
        None => {
            let components = checkpoint.unit_of(stored.info)?.components();
            let dtype = components.get(SUMS).map_or(stored.dtype, |sums| sums.dtype());
            Floats::mapped(checkpoint, unit, SUMS, dtype, blocks)?.map(SumsSource::Plain)
        }
        Some(SumsEncoding::Abq(_)) => {
            let all = checkpoint.lowrank_rows(stored.tensor, 0..stored.rows as u64)?;
            match all.sums() {
                Sums::Abq(codes) => {
                    let matrix = Matrix::new(&Components::of(codes.clone()).stored());
                    Some(SumsSource::Codes(matrix.map_err(|e| {
                        Error::corrupt(checkpoint.root(), Some(stored.tensor), e.to_string())
                    })?))
                }
                Sums::Plain(_) => None,
            }
        }
    };
    let base = match lowrank.base {
        Base::Raw => {
            debug_assert_eq!(BASE_DATA, format!("base.{}", raw::DATA));
            Floats::mapped(checkpoint, unit, BASE_DATA, stored.dtype, stored.cols)?.map(BaseSource::Raw)
        }
        Base::Sparse24(sparse) => {
            let read: Rows = |checkpoint, tensor, rows| base_rows(checkpoint, tensor, rows);
            let names = Components24 {
                positions: "base.positions",
                values: "base.values",
                fixed12: &fixed12::BASE_VALUES,
            };
            Sparse::open(stored, sparse.values, &names, read)?.map(BaseSource::Sparse)
        }
    };
    let (tensor, block) = (stored.tensor.to_owned(), lowrank.block as usize);
    Ok(sums.zip(base).map(|(sums, base)| {
        Box::new(Lowrank { tensor, base, sums, cols: stored.cols, block }) as Box<dyn Source>
    }))
}

/// The only component of a raw base.
const BASE_DATA: &str = "base.data";

fn base_rows(checkpoint: &Checkpoint, tensor: &str, rows: Range<u64>) -> Result<Packed<'static>> {
    match checkpoint.lowrank_rows(tensor, rows)?.into_base() {
        BaseRows::Sparse24(packed) => Ok(packed),
        BaseRows::Raw(_) => {
            Err(Error::Invalid(format!("tensor {tensor}: its base is not stored as sparse24")))
        }
    }
}

impl Source for Lowrank {
    fn elements<'a>(
        &'a self,
        checkpoint: &'a Checkpoint,
        rows: Range<usize>,
        words: &'a mut Vec<u64>,
    ) -> Result<Elements<'a>> {
        let count = rows.len() * self.cols;
        words.resize(count.div_ceil(2), 0);
        let out = &mut bytemuck::cast_slice_mut::<u64, f32>(words)[..count];
        match &self.base {
            BaseSource::Raw(base) => base.rows(checkpoint, rows.clone())?.widen(0, out),
            BaseSource::Sparse(base) => base.widen(checkpoint, rows.clone(), out)?,
        }
        let mut of_row = vec![0.0; self.cols.div_ceil(self.block)];
        for (row, out) in rows.zip(out.chunks_exact_mut(self.cols.max(1))) {
            match &self.sums {
                SumsSource::Plain(sums) => sums.rows(checkpoint, row..row + 1)?.widen(0, &mut of_row),
                SumsSource::Codes(sums) => sums.row(row, &mut of_row),
            }
            for (weights, sum) in out.chunks_mut(self.block).zip(&of_row) {
                // What is no number stays what it is.
                weights.iter_mut().filter(|weight| !weight.is_nan()).for_each(|weight| *weight += sum);
            }
        }
        Ok(Elements::F32(out))
    }

    fn dot(
        &self,
        checkpoint: &Checkpoint,
        rows: Range<usize>,
        x: &[f32],
        out: &mut [f32],
        _words: &mut Vec<u64>,
    ) -> Result<()> {
        match &self.base {
            BaseSource::Raw(base) => {
                dot_rows(base.rows(checkpoint, rows.clone())?, x.len(), x, out);
            }
            BaseSource::Sparse(base) => base.dot_rows(checkpoint, rows.clone(), x, out)?,
        }
        let blocks: Vec<f32> = x.chunks(self.block).map(|block| block.iter().sum()).collect();
        let mut added = vec![0.0; out.len()];
        match &self.sums {
            SumsSource::Plain(sums) => {
                dot_rows(sums.rows(checkpoint, rows)?, blocks.len(), &blocks, &mut added);
            }
            SumsSource::Codes(sums) => {
                let mut inputs = Inputs::default();
                sums.prepare(&blocks, 1, &mut inputs).map_err(|_| {
                    Error::Invalid(format!("tensor {}: its sums quantise what they multiply", self.tensor))
                })?;
                sums.multiply(rows, &inputs, &mut added);
            }
        }
        out.iter_mut().zip(added).for_each(|(out, sum)| *out += sum);
        Ok(())
    }

    fn in_place(&self) -> bool {
        match &self.base {
            BaseSource::Raw(_) => true,
            BaseSource::Sparse(base) => base.in_place(),
        }
    }
}
