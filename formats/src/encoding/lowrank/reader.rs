//! Decodes any range of a stored matrix with sums: the scalar reference.

use std::ops::Range;

use super::{
    BASE_WITHIN, Base, BaseRows, Lowrank, Packed, SUMS, SUMS_WITHIN, Sums, SumsEncoding, add, matrix,
};
use crate::encoding::abq::{self, Floats};
use crate::encoding::{ComponentSet, Part, raw, single, sparse24};
use crate::{Component, Dtype, Error, Result};

/// Most weights that are decoded at a time.
const STEP_WEIGHTS: u64 = 1 << 18;

#[derive(Debug)]
pub(in crate::encoding) struct Reader {
    lowrank: Lowrank,
    dtype: Dtype,
    /// What the base is read as: single precision where it would be rounded otherwise.
    base_dtype: Dtype,
    rows: u64,
    cols: u64,
    base: BaseReader,
    sums: SumsReader,
}

#[derive(Debug)]
enum BaseReader {
    Raw(raw::Reader),
    Sparse24(Box<sparse24::Reader>),
}

#[derive(Debug)]
enum SumsReader {
    Plain(Component),
    /// Read in single precision.
    Abq(abq::Reader),
}

impl Reader {
    pub(in crate::encoding) fn open(set: ComponentSet<'_>, parts: &[Part], lowrank: Lowrank) -> Result<Self> {
        let part = single(&set, parts)?;
        let invalid = |what: String| Error::Invalid(format!("unit {}: {what}", set.unit()));
        lowrank.check().map_err(|e| invalid(e.to_string()))?;
        if !abq::DTYPES.contains(&part.dtype) {
            return Err(invalid(format!(
                "tensor {} is {}, but lowrank holds F16, BF16 and F32",
                part.name,
                part.dtype.name()
            )));
        }
        let (rows, cols) = matrix(&part.shape).ok_or_else(|| {
            invalid(format!("tensor {}: {:?} is not a matrix that lowrank holds", part.name, part.shape))
        })?;
        let known = |name: &str| match (name.strip_prefix(BASE_WITHIN), &lowrank.sums) {
            (Some(name), _) => lowrank.base.component_names().contains(&name),
            (None, None) => name == SUMS,
            (None, Some(_)) => {
                name.strip_prefix(SUMS_WITHIN).is_some_and(|name| abq::COMPONENTS.contains(&name))
            }
        };
        if let Some(other) = set.names().find(|name| !known(name)) {
            return Err(invalid(format!("has a component {other}, which lowrank does not know")));
        }
        let quantised = matches!(&lowrank.base, Base::Sparse24(sparse) if sparse.is_lossy());
        let base_dtype = if quantised { Dtype::F32 } else { part.dtype };
        let of = |dtype: Dtype, cols: u64| -> Result<Part> {
            let shape = vec![rows, cols];
            let bytes = dtype.byte_len(&shape).ok_or_else(|| invalid("is too large".to_owned()))?;
            Ok(Part { name: part.name.clone(), dtype, shape, bytes })
        };
        let base_set = set.within(BASE_WITHIN);
        let base = match lowrank.base {
            Base::Raw => BaseReader::Raw(raw::Reader::open(base_set, &[of(base_dtype, cols)?])?),
            Base::Sparse24(sparse) => {
                let parts = [of(base_dtype, cols)?];
                BaseReader::Sparse24(Box::new(sparse24::Reader::open(base_set, &parts, sparse)?))
            }
        };
        let blocks = lowrank.blocks(cols);
        let sums = match lowrank.sums {
            None => {
                let sums = set.get(SUMS)?;
                let dtype = abq::float_dtype(&sums, "lowrank")?;
                sums.require(dtype, of(dtype, blocks)?.bytes)?;
                SumsReader::Plain(sums)
            }
            Some(SumsEncoding::Abq(abq)) => {
                let parts = [of(Dtype::F32, blocks)?];
                SumsReader::Abq(abq::Reader::open(set.within(SUMS_WITHIN), &parts, abq)?)
            }
        };
        Ok(Self { lowrank, dtype: part.dtype, base_dtype, rows, cols, base, sums })
    }

    pub(in crate::encoding) fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let width = abq::width(self.dtype);
        let total = self.rows * self.cols;
        let first = offset / width as u64;
        let end = first.checked_add((out.len() / width) as u64).filter(|&end| end <= total);
        let whole = offset.is_multiple_of(width as u64) && out.len().is_multiple_of(width);
        let Some(end) = end.filter(|_| whole) else {
            return Err(Error::Invalid(format!(
                "tensor of {} x {} weights: bytes from {offset} are no whole elements of it",
                self.rows, self.cols
            )));
        };
        let (mut at, mut rest) = (first, out);
        let (mut base, mut values, mut sums) = (Vec::new(), Vec::new(), Vec::new());
        while at < end {
            let to = self.piece_end(at).min(end);
            let (now, later) = rest.split_at_mut((to - at) as usize * width);
            rest = later;
            self.read_base(at..to, &mut base, &mut values)?;
            let blocks = self.block_of(at)..self.block_of(to - 1) + 1;
            self.read_sums(blocks.clone(), &mut sums)?;
            let mut values_left = &mut values[..];
            let mut element = at;
            for sum in &sums {
                let stop = self.block_end(element).min(to);
                let (block, later) = values_left.split_at_mut((stop - element) as usize);
                block.iter_mut().for_each(|weight| *weight = add(*weight, *sum));
                (values_left, element) = (later, stop);
            }
            abq::write_rounded(self.dtype, &values, now);
            at = to;
        }
        Ok(())
    }

    /// Some rows as they are stored.
    pub(in crate::encoding) fn packed_rows(&self, rows: Range<u64>) -> Result<Packed<'static>> {
        let count = rows.end.checked_sub(rows.start).filter(|_| rows.end <= self.rows);
        let count = count.and_then(|count| usize::try_from(count).ok());
        let count =
            count.ok_or_else(|| Error::Invalid(format!("rows {rows:?} of {} were asked for", self.rows)))?;
        let base = match &self.base {
            BaseReader::Raw(base) => {
                let of_row = self.cols as usize * abq::width(self.dtype);
                let mut bytes = vec![0; count * of_row];
                base.read(rows.start * of_row as u64, &mut bytes)?;
                BaseRows::Raw(Floats::new(self.dtype, bytes)?)
            }
            BaseReader::Sparse24(base) => BaseRows::Sparse24(base.packed_rows(rows.clone())?),
        };
        let sums = match &self.sums {
            SumsReader::Plain(sums) => {
                let of_row = self.lowrank.blocks(self.cols) as usize * abq::width(sums.dtype());
                let mut bytes = vec![0; count * of_row];
                sums.read_at(rows.start * of_row as u64, &mut bytes)?;
                Sums::Plain(Floats::new(sums.dtype(), bytes)?)
            }
            SumsReader::Abq(sums) => Sums::Abq(sums.packed_rows(rows)?),
        };
        let packed = Packed::new(self.lowrank.block, count, self.cols as usize, base, sums)?;
        match &self.sums {
            SumsReader::Plain(sums) => packed.check().map_err(|e| sums.corrupt(e.to_string()))?,
            SumsReader::Abq(_) => {}
        }
        Ok(packed)
    }

    /// Where to stop reading that begins at an element: after whole rows, or after whole blocks of a long one.
    fn piece_end(&self, at: u64) -> u64 {
        let row = at / self.cols;
        if self.cols <= STEP_WEIGHTS {
            return ((row + 1).max((at + STEP_WEIGHTS) / self.cols)) * self.cols;
        }
        (at + STEP_WEIGHTS).min((row + 1) * self.cols)
    }

    /// The number of the block that an element is in, counted over all rows.
    fn block_of(&self, element: u64) -> u64 {
        let (row, column) = (element / self.cols, element % self.cols);
        row * self.lowrank.blocks(self.cols) + column / u64::from(self.lowrank.block.max(1))
    }

    /// The first element after those of this one's block.
    fn block_end(&self, element: u64) -> u64 {
        let (row, column) = (element / self.cols, element % self.cols);
        let block = u64::from(self.lowrank.block.max(1));
        row * self.cols + ((column / block + 1) * block).min(self.cols)
    }

    /// The base of some elements, in single precision.
    fn read_base(&self, elements: Range<u64>, bytes: &mut Vec<u8>, values: &mut Vec<f32>) -> Result<()> {
        let width = abq::width(self.base_dtype);
        let count = (elements.end - elements.start) as usize;
        bytes.resize(count * width, 0);
        let at = elements.start * width as u64;
        match &self.base {
            BaseReader::Raw(base) => base.read(at, bytes)?,
            BaseReader::Sparse24(base) => base.read(at, bytes)?,
        }
        values.clear();
        values.extend(Floats::new(self.base_dtype, &bytes[..])?.iter());
        Ok(())
    }

    /// The sums of some blocks, counted over all rows.
    fn read_sums(&self, blocks: Range<u64>, out: &mut Vec<f32>) -> Result<()> {
        let count = (blocks.end - blocks.start) as usize;
        out.resize(count, 0.0);
        let sums = match &self.sums {
            SumsReader::Abq(sums) => return sums.read(blocks.start * 4, bytemuck::cast_slice_mut(out)),
            SumsReader::Plain(sums) => sums,
        };
        let width = abq::width(sums.dtype());
        let mut bytes = vec![0; count * width];
        sums.read_at(blocks.start * width as u64, &mut bytes)?;
        let floats = Floats::new(sums.dtype(), bytes)?;
        for (i, out) in out.iter_mut().enumerate() {
            *out = floats.get(i);
            if !out.is_finite() {
                let (at, of_row) = (blocks.start + i as u64, self.lowrank.blocks(self.cols).max(1));
                let what = format!("row {}: block {}: {out} is not finite", at / of_row, at % of_row);
                return Err(sums.corrupt(what));
            }
        }
        Ok(())
    }
}
