//! A matrix with sums in memory: made by a pass, or seen where it is stored.

use super::{Base, Lowrank, SUMS, SumsEncoding, add, components};
use crate::encoding::abq::{self, Fault, Floats};
use crate::encoding::{ComponentSpec, Encoding, raw, sparse24};
use crate::{Error, Result};

/// The base, `[rows, cols]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BaseRows<'a> {
    /// Every weight.
    Raw(Floats<'a>),
    /// Two in four.
    Sparse24(sparse24::Packed<'a>),
}

/// The sums, `[rows, blocks]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sums<'a> {
    /// As they are.
    Plain(Floats<'a>),
    /// As codes.
    Abq(abq::Packed<'a>),
}

/// A matrix of `rows` x `cols` with sums: a finished unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packed<'a> {
    lowrank: Lowrank,
    rows: usize,
    cols: usize,
    base: BaseRows<'a>,
    sums: Sums<'a>,
}

impl<'a> Packed<'a> {
    /// Takes parts as they are stored; `block` consecutive inputs share a sum. Looks at sizes alone: [`Self::check`] looks at
    /// what is in them.
    ///
    /// # Errors
    /// Sizes that do not fit.
    pub fn new(block: u32, rows: usize, cols: usize, base: BaseRows<'a>, sums: Sums<'a>) -> Result<Self> {
        let lowrank = Lowrank {
            block,
            base: match &base {
                BaseRows::Raw(_) => Base::Raw,
                BaseRows::Sparse24(base) => Base::Sparse24(base.parameters()),
            },
            sums: match &sums {
                Sums::Plain(_) => None,
                Sums::Abq(sums) => Some(SumsEncoding::Abq(*sums.abq())),
            },
        };
        lowrank.check()?;
        let blocks = lowrank.blocks(cols as u64) as usize;
        let base_fits = match &base {
            BaseRows::Raw(base) => Some(base.len()) == rows.checked_mul(cols),
            BaseRows::Sparse24(base) => (base.rows(), base.cols()) == (rows, cols),
        };
        let sums_fit = match &sums {
            Sums::Plain(sums) => Some(sums.len()) == rows.checked_mul(blocks),
            Sums::Abq(sums) => (sums.rows(), sums.cols()) == (rows, blocks),
        };
        if !base_fits || !sums_fit {
            return Err(Error::Invalid(format!(
                "a base and sums do not make {rows} x {cols} weights with sums of {block} columns"
            )));
        }
        Ok(Self { lowrank, rows, cols, base, sums })
    }

    /// The parameters.
    pub fn parameters(&self) -> &Lowrank {
        &self.lowrank
    }

    /// The encoding of a unit of these [`Self::components`].
    pub fn encoding(&self) -> Encoding {
        Encoding::Lowrank(self.lowrank)
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Columns that share a sum.
    pub fn block(&self) -> usize {
        self.lowrank.block.max(1) as usize
    }

    /// Sums of a row.
    pub fn blocks(&self) -> usize {
        self.lowrank.blocks(self.cols as u64) as usize
    }

    /// The base.
    pub fn base(&self) -> &BaseRows<'a> {
        &self.base
    }

    /// The base alone.
    pub fn into_base(self) -> BaseRows<'a> {
        self.base
    }

    /// The sums.
    pub fn sums(&self) -> &Sums<'a> {
        &self.sums
    }

    /// Bits of the components over weights, zeros included: the true width.
    pub fn bits_per_weight(&self) -> f64 {
        let bytes: usize = self.components().iter().map(|(_, bytes)| bytes.len()).sum();
        bytes as f64 * 8.0 / (self.rows * self.cols).max(1) as f64
    }

    /// The components as they are stored, in order.
    pub fn components(&self) -> Vec<(ComponentSpec, &[u8])> {
        let (rows, cols) = (self.rows as u64, self.cols as u64);
        let (base, mut bytes): (Vec<_>, Vec<_>) = match &self.base {
            BaseRows::Raw(base) => (raw::components(base.dtype(), &[rows, cols]), vec![base.bytes()]),
            BaseRows::Sparse24(base) => base.components().into_iter().unzip(),
        };
        let sums = match &self.sums {
            Sums::Plain(sums) => {
                bytes.push(sums.bytes());
                Err((sums.dtype(), rows, self.blocks() as u64))
            }
            Sums::Abq(sums) => {
                let (specs, of_sums): (Vec<_>, Vec<_>) = sums.components().into_iter().unzip();
                bytes.extend(of_sums);
                Ok(specs)
            }
        };
        components(base, sums).into_iter().zip(bytes).collect()
    }

    /// Looks at every word of every component.
    ///
    /// # Errors
    /// What [`sparse24::Packed::check`] and [`abq::Packed::check`] find; sums that are not finite.
    pub fn check(&self) -> Result<()> {
        if let BaseRows::Sparse24(base) = &self.base {
            base.check()?;
        }
        match &self.sums {
            Sums::Plain(sums) => match sums.first_not_finite() {
                None => Ok(()),
                Some(at) => {
                    let blocks = self.blocks().max(1);
                    Err(not_finite(at / blocks, at % blocks, sums.get(at)).into())
                }
            },
            Sums::Abq(sums) => sums.check(),
        }
    }

    /// The sums of a row, in single precision, into `out` (`blocks` of them).
    ///
    /// # Errors
    /// A sum that is not finite, codes or scales that break their format.
    pub fn sums_row(&self, row: usize, out: &mut [f32]) -> Result<()> {
        let sums = match &self.sums {
            Sums::Abq(sums) => return sums.decode_row(row, out),
            Sums::Plain(sums) => sums,
        };
        let blocks = self.blocks();
        for (block, out) in out.iter_mut().enumerate().take(blocks) {
            *out = sums.get(row * blocks + block);
            if !out.is_finite() {
                return Err(not_finite(row, block, *out).into());
            }
        }
        Ok(())
    }

    /// Decodes a row into `out` (`cols` values), in single precision: base and sum together, rounded once.
    ///
    /// # Errors
    /// As for [`Self::check`], in this row.
    pub fn decode_row(&self, row: usize, out: &mut [f32]) -> Result<()> {
        match &self.base {
            BaseRows::Raw(base) => {
                out.iter_mut().enumerate().for_each(|(i, out)| *out = base.get(row * self.cols + i));
            }
            BaseRows::Sparse24(base) => base.decode_row(row, out)?,
        }
        let mut sums = vec![0.0; self.blocks()];
        self.sums_row(row, &mut sums)?;
        for (out, sum) in out.chunks_mut(self.block()).zip(sums) {
            out.iter_mut().for_each(|weight| *weight = add(*weight, sum));
        }
        Ok(())
    }
}

pub(super) fn not_finite(row: usize, block: usize, value: f32) -> Fault {
    Fault { component: SUMS, row, what: format!("block {block}: {value} is not finite") }
}
