//! lowrank: `y = B x + S (X x)`, where X x has the sum of each block of inputs.
//!
//! One token is multiplied so; more by the rows of B in single precision, to which the sums are added unrounded.

use std::ops::Range;

use llmpress_formats::encoding::lowrank::{Base, BaseRows, SUMS, Sums, SumsEncoding};
use llmpress_formats::encoding::raw;
use llmpress_formats::encoding::sparse24::Packed;
use llmpress_formats::{Checkpoint, Encoding, Error, Result};
use llmpress_kernels::cpu::{Elements, dot_rows};

use super::source::{Source, Stored};
use super::sparse24::{Rows, Sparse};
use super::within::Floats;

#[derive(Debug)]
struct Lowrank {
    base: BaseSource,
    sums: Floats,
    cols: usize,
    block: usize,
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
            Floats::mapped(checkpoint, unit, SUMS, dtype, blocks)?
        }
        Some(SumsEncoding::Abq(_)) => {
            let all = checkpoint.lowrank_rows(stored.tensor, 0..stored.rows as u64)?;
            match all.sums() {
                Sums::Abq(codes) => Some(Floats::decode(codes)?),
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
            let names = ("base.positions", "base.values");
            Sparse::open(stored, sparse.values, names, read)?.map(BaseSource::Sparse)
        }
    };
    let block = lowrank.block as usize;
    Ok(sums
        .zip(base)
        .map(|(sums, base)| Box::new(Lowrank { base, sums, cols: stored.cols, block }) as Box<dyn Source>))
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
        let sums = self.sums.rows(checkpoint, rows.clone())?;
        let mut of_row = vec![0.0; self.cols.div_ceil(self.block)];
        for (row, out) in out.chunks_exact_mut(self.cols.max(1)).enumerate() {
            sums.widen(row * of_row.len(), &mut of_row);
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
        dot_rows(self.sums.rows(checkpoint, rows)?, blocks.len(), &blocks, &mut added);
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
