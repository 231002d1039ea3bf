//! A finished tensor as it is stored: `sparse24`, or with sums `lowrank` over it.

use llmpress_formats::encoding::abq::Floats;
use llmpress_formats::encoding::sparse24::positions;
use llmpress_formats::encoding::{PackedUnit, lowrank, sparse24};
use llmpress_formats::{Checkpoint, Dtype, Encoding, Error, Result};

use crate::ast::Start;
use crate::quads::{QUAD, Sparse};
use crate::report::Finished;
use crate::slorb::GROUP;

impl Finished {
    /// Packs it: what a product of it multiplies is [`Self::product`], bit for bit.
    ///
    /// # Errors
    /// A dtype that the encodings do not have.
    pub fn unit(&self) -> Result<PackedUnit> {
        pack(&self.tensor, self.dtype, &self.sparse, self.sums.as_deref())
    }
}

impl Start {
    /// What a tensor stores that is 2:4, its values plain; none where it is stored otherwise.
    ///
    /// # Errors
    /// Components that break their format; groups of sums of another size than training has.
    pub fn read(checkpoint: &Checkpoint, tensor: &str) -> Result<Option<Self>> {
        let info = checkpoint.tensor(tensor)?;
        let Some((rows, _)) = sparse24::matrix(&info.shape).filter(|_| info.is_stored()) else {
            return Ok(None);
        };
        match checkpoint.unit_of(info)?.encoding() {
            Encoding::Sparse24(encoding) if !encoding.is_lossy() => {
                let packed = checkpoint.sparse_rows(tensor, 0..rows)?;
                Ok(Some(Self::of(tensor, info.dtype, &packed, None)?))
            }
            Encoding::Lowrank(_) => {
                let packed = checkpoint.lowrank_rows(tensor, 0..rows)?;
                let lowrank::BaseRows::Sparse24(base) = packed.base() else { return Ok(None) };
                if base.encoding().is_lossy() || matches!(packed.sums(), lowrank::Sums::Abq(_)) {
                    return Ok(None);
                }
                if packed.block() != GROUP {
                    return Err(Error::Invalid(format!(
                        "{tensor}: has sums of {} columns each, and training has {GROUP}",
                        packed.block()
                    )));
                }
                let mut sums = vec![0.0; packed.rows() * packed.blocks()];
                for (row, out) in sums.chunks_exact_mut(packed.blocks().max(1)).enumerate() {
                    packed.sums_row(row, out)?;
                }
                Ok(Some(Self::of(tensor, info.dtype, base, Some(sums))?))
            }
            _ => Ok(None),
        }
    }

    fn of(tensor: &str, dtype: Dtype, packed: &sparse24::Packed<'_>, sums: Option<Vec<f32>>) -> Result<Self> {
        let (rows, cols) = (packed.rows(), packed.cols());
        let (mut dense, mut masks) = (vec![0.0; rows * cols], Vec::with_capacity(rows * cols / QUAD));
        for (row, out) in dense.chunks_exact_mut(cols.max(1)).enumerate() {
            packed.decode_row(row, out)?;
            let bytes = packed.positions_of(row);
            masks.extend((0..cols / QUAD).map(|quad| positions::to_mask(positions::get(bytes, quad))));
        }
        Ok(Self { tensor: tensor.to_owned(), dtype, sparse: Sparse::new(&dense, masks, cols)?, sums })
    }

    /// Packs it, as [`Finished::unit`].
    ///
    /// # Errors
    /// A dtype that the encodings do not have; values that are not finite.
    pub fn unit(&self) -> Result<PackedUnit> {
        pack(&self.tensor, self.dtype, &self.sparse, self.sums.as_deref())
    }
}

fn pack(tensor: &str, dtype: Dtype, sparse: &Sparse, sums: Option<&[f32]>) -> Result<PackedUnit> {
    let (rows, cols) = (sparse.rows(), sparse.cols());
    let mut bytes = vec![0u8; rows * positions::row_bytes(cols)];
    let of_rows = bytes.chunks_exact_mut(positions::row_bytes(cols).max(1));
    for (row, masks) in of_rows.zip(sparse.masks().chunks_exact((cols / QUAD).max(1))) {
        let nibbles: Option<Vec<u8>> = masks.iter().map(|mask| positions::of_mask(*mask)).collect();
        let nibbles = nibbles.ok_or_else(|| Error::Invalid(format!("{tensor}: a quad does not keep two")))?;
        positions::pack_row(nibbles, row);
    }
    let base = sparse24::Packed::round(dtype, rows, cols, &sparse.dense(), bytes)?;
    let Some(sums) = sums else { return Ok(PackedUnit::Sparse24(base)) };
    let sums = lowrank::Sums::Plain(Floats::round(dtype, sums)?);
    let base = lowrank::BaseRows::Sparse24(base);
    Ok(PackedUnit::Lowrank(lowrank::Packed::new(GROUP as u32, rows, cols, base, sums)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Rule;
    use crate::masks::magnitude;
    use crate::report::{Report, bits_per_weight};
    use crate::rounding::round_all;
    use crate::slorb::sum_preserving;
    use crate::testing::noise;

    #[test]
    fn what_is_packed_decodes_to_what_the_product_multiplies_and_is_as_wide_as_said() {
        for dtype in [Dtype::BF16, Dtype::F16, Dtype::F32] {
            for (rows, cols, slorb) in [(1, 4, false), (3, 36, true), (5, 64, true), (2, 12, false)] {
                let mut weights: Vec<f32> = (0..rows * cols).map(|i| noise(cols, i)).collect();
                weights[1] = 0.0;
                round_all(&mut weights, dtype).unwrap();
                let sparse = Sparse::new(&weights, magnitude(&weights), cols).unwrap();
                let mut sums = slorb.then(|| sum_preserving(&weights, &sparse.dense(), cols));
                sums.iter_mut().for_each(|sums| round_all(sums, dtype).unwrap());
                let report = Report {
                    tensor: "w".to_owned(),
                    rule: Rule::Magnitude,
                    instead: None,
                    tokens: 0,
                    damping: None,
                    reconstructed: None,
                    unlearned: None,
                    relative_error: 0.0,
                    bits_per_weight: bits_per_weight(dtype, cols, slorb),
                    seconds: 0.0,
                };
                let done = Finished { tensor: "w".to_owned(), dtype, sparse, sums, report };
                let unit = done.unit().unwrap();
                assert_eq!(matches!(unit, PackedUnit::Lowrank(_)), slorb);
                assert!((unit.bits_per_weight() - done.report.bits_per_weight).abs() < 1e-9, "{cols}");
                let product = done.product();
                let mut row = vec![0.0; cols];
                for (at, expected) in product.chunks_exact(cols).enumerate() {
                    unit.decode_row(at, &mut row).unwrap();
                    assert!(row.iter().zip(expected).all(|(a, b)| a.to_bits() == b.to_bits()), "{dtype:?}");
                }
            }
        }
    }
}
