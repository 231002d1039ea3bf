//! A finished tensor as it is stored: `sparse24`, or with sums `lowrank` over it.

use llmpress_formats::encoding::abq::Floats;
use llmpress_formats::encoding::sparse24::positions;
use llmpress_formats::encoding::{PackedUnit, lowrank, sparse24};
use llmpress_formats::{Error, Result};

use crate::quads::QUAD;
use crate::report::Finished;
use crate::slorb::GROUP;

impl Finished {
    /// Packs it: what a product of it multiplies is [`Self::product`], bit for bit.
    ///
    /// # Errors
    /// A dtype that the encodings do not have.
    pub fn unit(&self) -> Result<PackedUnit> {
        let (rows, cols) = (self.sparse.rows(), self.sparse.cols());
        let mut bytes = vec![0u8; rows * positions::row_bytes(cols)];
        let of_rows = bytes.chunks_exact_mut(positions::row_bytes(cols).max(1));
        for (row, masks) in of_rows.zip(self.sparse.masks().chunks_exact((cols / QUAD).max(1))) {
            let nibbles: Option<Vec<u8>> = masks.iter().map(|mask| positions::of_mask(*mask)).collect();
            let nibbles = nibbles
                .ok_or_else(|| Error::Invalid(format!("{}: a quad does not keep two", self.tensor)))?;
            positions::pack_row(nibbles, row);
        }
        let base = sparse24::Packed::round(self.dtype, rows, cols, &self.sparse.dense(), bytes)?;
        let Some(sums) = &self.sums else { return Ok(PackedUnit::Sparse24(base)) };
        let sums = lowrank::Sums::Plain(Floats::round(self.dtype, sums)?);
        let base = lowrank::BaseRows::Sparse24(base);
        Ok(PackedUnit::Lowrank(lowrank::Packed::new(GROUP as u32, rows, cols, base, sums)?))
    }
}

#[cfg(test)]
mod tests {
    use llmpress_formats::Dtype;

    use super::*;
    use crate::Rule;
    use crate::masks::magnitude;
    use crate::quads::Sparse;
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
