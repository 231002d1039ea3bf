//! Weights of which each four consecutive ones of a row keep two, whose values are codes of 1 to 8 bits.
//!
//! ```text
//! a row, 64 columns after the other:   a bit a column: whether it is kept   | codes of the 32 kept ones, P words
//! codes, cut into fields of 4, 2 and 1 bits (as `abq` does), each packed by itself:
//!   4 bits: byte i = code i, code 16 + i      2 bits: byte i = codes i, 8 + i, 16 + i, 24 + i      1 bit: bit i = code i
//! ```
//!
//! So a row is one stream, which takes the bits that its file does.

#[cfg(target_arch = "x86_64")]
pub(in crate::cpu) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(in crate::cpu) mod avx512;

use std::ops::Range;

use super::{KEPT, QUAD};
use crate::cpu::abq::{self, Fault, Lanes, Stored, Zero};
use crate::cpu::isa::Isa;
use crate::cpu::pages::Room;

/// Columns of a block: those of 32 kept ones.
pub(in crate::cpu) const BLOCK_COLS: usize = 64;
/// Kept columns of a block.
pub(in crate::cpu) const BLOCK_KEPT: usize = BLOCK_COLS / 2;
/// Words that say which are kept.
pub(in crate::cpu) const KEPT_WORDS: usize = 2;

/// What is wrong with a stored matrix.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CodesFault {
    /// Codes or grids that do not fit.
    #[error("{0}")]
    Codes(#[from] Fault),
    /// Values and positions are not those of one matrix.
    #[error(
        "{values} x {kept} values and {positions} bytes of positions are not two of four of {cols} columns"
    )]
    Size {
        /// Rows of the values.
        values: usize,
        /// Columns of the values.
        kept: usize,
        /// Bytes of the positions.
        positions: usize,
        /// Columns of the matrix.
        cols: usize,
    },
    /// A nibble's positions have no order, or bits are set past the last quad.
    #[error("row {row}: a quad whose first kept value does not lie before its second")]
    Positions {
        /// Where.
        row: usize,
    },
}

/// Where zero lies on the grid of each group.
#[derive(Debug)]
enum Zeros {
    Symmetric,
    Integer(Vec<u8>),
    Real(Lanes),
}

/// A matrix ready for products. It takes the bits of positions, codes and grids as they are stored.
#[derive(Debug)]
pub struct SparseCodes {
    rows: usize,
    cols: usize,
    bits: u8,
    planes: usize,
    /// Blocks of a group; at least one.
    group_blocks: usize,
    /// Groups of a row.
    groups: usize,
    /// `[rows, blocks, 2 + planes]`.
    words: Room<u32>,
    /// `[rows, groups]`.
    scale: Lanes,
    zero: Zeros,
}

/// Grids of some rows in single precision, `[rows, groups]` each.
#[derive(Debug, Default)]
pub(in crate::cpu) struct Grids {
    pub(in crate::cpu) scale: Vec<f32>,
    /// Codes that stand for zero, or offsets.
    pub(in crate::cpu) zero: Vec<f32>,
}

impl SparseCodes {
    /// Joins positions, `[rows, ceil(cols / 8)]`, and the codes of a matrix of half as many columns.
    ///
    /// # Errors
    /// Sizes that do not fit, positions that are not two a quad.
    pub fn new(values: &Stored<'_>, positions: &[u8], cols: usize) -> Result<Self, CodesFault> {
        let (rows, planes) = (values.rows, usize::from(values.planes));
        let groups = abq::check_stored(values)?;
        let fits = values.cols == cols / 2 && cols.is_multiple_of(QUAD);
        let of_row = cols.div_ceil(2 * QUAD);
        if !fits || rows.checked_mul(of_row) != Some(positions.len()) {
            return Err(CodesFault::Size {
                values: rows,
                kept: values.cols,
                positions: positions.len(),
                cols,
            });
        }
        let blocks = cols.div_ceil(BLOCK_COLS);
        let of_block = KEPT_WORDS + planes;
        let mut words = Room::<u32>::new(rows * blocks * of_block);
        for (row, out) in words.chunks_exact_mut((blocks * of_block).max(1)).enumerate() {
            let positions = &positions[row * of_row..][..of_row];
            if positions.len() * 2 * QUAD != cols && positions.last().is_some_and(|byte| byte >> 4 != 0) {
                return Err(CodesFault::Positions { row });
            }
            for (block, out) in out.chunks_exact_mut(of_block).enumerate() {
                let quads = (cols / QUAD - block * BLOCK_COLS / QUAD).min(BLOCK_COLS / QUAD);
                let kept = kept(&positions[block * BLOCK_COLS / 8..], quads);
                let kept = kept.ok_or(CodesFault::Positions { row })?;
                (out[0], out[1]) = (kept as u32, (kept >> 32) as u32);
                let word = |plane: usize| values.words[(plane * rows + row) * blocks + block];
                pack(planes, word, &mut out[KEPT_WORDS..]);
            }
        }
        let group_size = values.group_size.unwrap_or(usize::MAX);
        Ok(Self {
            rows,
            cols,
            bits: values.bits,
            planes,
            group_blocks: (group_size / BLOCK_KEPT).min(blocks).max(1),
            groups,
            words,
            scale: Lanes::of(values.scale),
            zero: match values.zero {
                Zero::Symmetric => Zeros::Symmetric,
                Zero::Integer(zeros) => Zeros::Integer(zeros.to_vec()),
                Zero::Real(offsets) => Zeros::Real(Lanes::of(offsets)),
            },
        })
    }

    /// How many rows there are.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Of the dense matrix.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes that it takes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let zero = match &self.zero {
            Zeros::Symmetric => 0,
            Zeros::Integer(zeros) => zeros.len(),
            Zeros::Real(offsets) => offsets.bytes(),
        };
        4 * self.words.len() + self.scale.bytes() + zero
    }

    /// Bit planes of a code.
    pub(in crate::cpu) fn planes(&self) -> usize {
        self.planes
    }

    /// Whether a weight is a scaled code and an offset, and not a scaled distance from a code.
    pub(in crate::cpu) fn has_offsets(&self) -> bool {
        matches!(self.zero, Zeros::Real(_))
    }

    /// Groups of a row.
    pub(in crate::cpu) fn groups(&self) -> usize {
        self.groups
    }

    /// Blocks of a row.
    pub(in crate::cpu) fn blocks(&self) -> usize {
        self.cols.div_ceil(BLOCK_COLS)
    }

    /// The blocks of a group.
    pub(in crate::cpu) fn group(&self, group: usize) -> Range<usize> {
        let first = group * self.group_blocks;
        first..first.saturating_add(self.group_blocks).min(self.blocks())
    }

    /// Words of a block.
    pub(in crate::cpu) fn block_words(&self) -> usize {
        KEPT_WORDS + self.planes
    }

    /// The blocks of a row.
    pub(in crate::cpu) fn row(&self, row: usize) -> &[u32] {
        let of_row = self.blocks() * self.block_words();
        &self.words[row * of_row..][..of_row]
    }

    /// Reads the grids of some rows.
    pub(in crate::cpu) fn grids(&self, rows: Range<usize>, grids: &mut Grids) {
        let (first, count) = (rows.start * self.groups, rows.len() * self.groups);
        grids.scale.resize(count, 0.0);
        grids.zero.resize(count, 0.0);
        self.scale.elements().widen(first, &mut grids.scale);
        match &self.zero {
            Zeros::Symmetric => grids.zero.fill(f32::from(1u8 << (self.bits - 1))),
            Zeros::Integer(zeros) => {
                grids.zero.iter_mut().zip(&zeros[first..]).for_each(|(to, zero)| *to = f32::from(*zero));
            }
            Zeros::Real(offsets) => offsets.elements().widen(first, &mut grids.zero),
        }
    }

    /// Writes some rows, in single precision, into `out` of `rows * cols`: what is not kept becomes +0, and a code what `abq`
    /// makes of it: `scale * (code - zero)`, or `scale * code + offset`, rounded after each operation.
    ///
    /// # Panics
    /// Where there are no such rows, or `out` has another length.
    pub fn widen(&self, rows: Range<usize>, out: &mut [f32]) {
        self.widen_with(Isa::detect(), rows, out);
    }

    fn widen_with(&self, isa: Isa, rows: Range<usize>, out: &mut [f32]) {
        assert!(rows.start <= rows.end && rows.end <= self.rows && out.len() == rows.len() * self.cols);
        #[allow(unsafe_code)]
        match isa {
            // SAFETY: the features were detected, and the lengths checked.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => unsafe { avx512::widen(self, rows, out) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { avx2::widen(self, rows, out) },
            Isa::Portable => self.widen_plainly(rows, out),
        }
    }

    fn widen_plainly(&self, rows: Range<usize>, out: &mut [f32]) {
        let mut grids = Grids::default();
        for (row, out) in rows.zip(out.chunks_exact_mut(self.cols.max(1))) {
            self.grids(row..row + 1, &mut grids);
            self.blocks_of_row(row, &grids, |block, weights| {
                let out = &mut out[block * BLOCK_COLS..];
                let count = out.len().min(BLOCK_COLS);
                out[..count].copy_from_slice(&weights[..count]);
            });
        }
    }

    /// Gives the weights of each block of a row in turn; columns past the last are +0. `grids` are those of the row.
    pub(in crate::cpu) fn blocks_of_row(
        &self,
        row: usize,
        grids: &Grids,
        mut then: impl FnMut(usize, &[f32; BLOCK_COLS]),
    ) {
        let words = self.row(row);
        for group in 0..self.groups {
            let (scale, zero) = (grids.scale[group], grids.zero[group]);
            for block in self.group(group) {
                let words = &words[block * self.block_words()..][..self.block_words()];
                let kept = u64::from(words[0]) | u64::from(words[1]) << 32;
                let (mut weights, mut next) = ([0.0; BLOCK_COLS], 0);
                for (column, weight) in weights.iter_mut().enumerate() {
                    if kept >> column & 1 == 1 {
                        let code = f32::from(code(self.planes, &words[KEPT_WORDS..], next));
                        *weight =
                            if self.has_offsets() { scale * code + zero } else { scale * (code - zero) };
                        next += 1;
                    }
                }
                then(block, &weights);
            }
        }
    }
}

/// Which of the columns of so many quads are kept, a bit each; `None` where one of them does not say it rightly.
fn kept(positions: &[u8], quads: usize) -> Option<u64> {
    let mut kept = 0;
    for quad in 0..quads {
        let bits = KEPT[usize::from(positions[quad / 2] >> (4 * (quad % 2)) & 15)];
        if bits == 0 {
            return None;
        }
        kept |= u64::from(bits) << (QUAD * quad);
    }
    Some(kept)
}

/// The word of a code's field of so many bits, and where it begins there.
fn place(bits: usize, code: usize) -> (usize, usize) {
    if bits == 1 {
        return (0, code);
    }
    // Codes of a byte lie as many apart as there are bytes.
    let (byte, in_byte) = (code % (4 * bits), code / (4 * bits));
    (byte / 4, 8 * (byte % 4) + bits * in_byte)
}

/// Packs 32 codes, of which each plane gives a word.
fn pack(planes: usize, plane: impl Fn(usize) -> u32, out: &mut [u32]) {
    let (fields, count) = abq::fields(planes, false);
    for field in &fields[..count] {
        let words = &mut out[field.offset..][..field.bits];
        for bit in 0..field.bits {
            let word = plane(field.offset + bit);
            for code in 0..BLOCK_KEPT {
                let (of_word, at) = place(field.bits, code);
                words[of_word] |= (word >> code & 1) << (at + bit);
            }
        }
    }
}

/// A code of a packed block.
fn code(planes: usize, words: &[u32], code: usize) -> u8 {
    let (fields, count) = abq::fields(planes, false);
    fields[..count].iter().fold(0, |all, field| {
        let (of_word, at) = place(field.bits, code);
        let bits = words[field.offset + of_word] >> at & ((1 << field.bits) - 1);
        all | (bits as u8) << field.offset
    })
}

#[cfg(test)]
pub(in crate::cpu) mod tests {
    use llmpress_numbers::Numbers;
    use proptest::prelude::*;

    use super::*;
    use crate::cpu::Elements;
    use crate::cpu::sparse24::Sparse24;
    use crate::cpu::sparse24::tests::positions;
    use crate::cpu::test_values::same_bits;

    /// A matrix of codes by chance, and what it stands for.
    #[derive(Debug)]
    pub(in crate::cpu) struct Case {
        pub(in crate::cpu) codes: SparseCodes,
        pub(in crate::cpu) dense: Vec<f32>,
    }

    /// Bits and planes, columns that are kept of a group, and what zero is: 0 symmetric, 1 an integer, 2 an offset.
    #[derive(Clone, Copy, Debug)]
    pub(in crate::cpu) struct Kind {
        pub(in crate::cpu) bits: u8,
        pub(in crate::cpu) balanced: bool,
        pub(in crate::cpu) group: Option<usize>,
        pub(in crate::cpu) zero: u8,
    }

    pub(in crate::cpu) fn kinds() -> impl Strategy<Value = Kind> {
        let group = prop_oneof![Just(None), (1usize..5).prop_map(|blocks| Some(32 * blocks))];
        (1u8..9, any::<bool>(), group, 0u8..3).prop_map(|(bits, balanced, group, zero)| Kind {
            bits,
            balanced: balanced && bits < 3,
            group,
            zero,
        })
    }

    impl Case {
        pub(in crate::cpu) fn new(kind: Kind, rows: usize, quads: usize, seed: u64) -> Self {
            let (cols, kept) = (quads * QUAD, quads * 2);
            let planes = kind.bits + u8::from(kind.balanced);
            let words = kept.div_ceil(32);
            let groups = kind.group.map_or(1, |size| kept.div_ceil(size)).min(kept.max(1));
            let groups = if kept == 0 { 0 } else { groups };
            let mut numbers = Numbers::new(seed);
            let levels = if kind.balanced { (1u64 << kind.bits) + 1 } else { 1 << kind.bits };
            let of: Vec<u8> = (0..rows * kept).map(|_| ((numbers.bits() >> 20) % levels) as u8).collect();
            let mut packed = vec![0u32; usize::from(planes) * rows * words];
            for (i, code) in of.iter().enumerate() {
                for plane in 0..usize::from(planes) {
                    let word = &mut packed[(plane * rows + i / kept) * words + i % kept / 32];
                    *word |= u32::from(code >> plane & 1) << (i % kept % 32);
                }
            }
            let half = |numbers: &mut Numbers| half::f16::from_f32(numbers.bits() as i32 as f32 / 2e9);
            let scale: Vec<half::f16> = (0..rows * groups).map(|_| half(&mut numbers)).collect();
            let offset: Vec<f32> = (0..rows * groups).map(|_| half(&mut numbers).to_f32() / 3.0).collect();
            let zero: Vec<u8> = (0..rows * groups).map(|_| (numbers.bits() >> 33) as u8).collect();
            let scale_words: Vec<u16> = scale.iter().map(|s| s.to_bits()).collect();
            let stored = Stored {
                rows,
                cols: kept,
                bits: kind.bits,
                planes,
                group_size: kind.group,
                activation_bits: None,
                words: &packed,
                scale: Elements::F16(&scale_words),
                zero: match kind.zero {
                    0 => Zero::Symmetric,
                    1 => Zero::Integer(&zero),
                    _ => Zero::Real(Elements::F32(&offset)),
                },
            };
            let positions = positions(seed ^ 2, rows, cols);
            let codes = SparseCodes::new(&stored, &positions, cols).unwrap();
            let values: Vec<f32> = (0..rows * kept)
                .map(|i| {
                    let at = i / kept * groups + kind.group.map_or(0, |size| i % kept / size);
                    let (scale, code) = (scale[at].to_f32(), f32::from(of[i]));
                    match kind.zero {
                        0 => scale * (code - f32::from(1u8 << (kind.bits - 1))),
                        1 => scale * (code - f32::from(zero[at])),
                        _ => scale * code + offset[at],
                    }
                })
                .collect();
            let mut dense = vec![0.0; rows * cols];
            let sparse = Sparse24::new(Elements::F32(&values), &positions, rows, cols).unwrap();
            sparse.widen(&mut dense).unwrap();
            Self { codes, dense }
        }
    }

    #[test]
    fn codes_take_the_bits_that_are_stored() {
        let kind = Kind { bits: 4, balanced: false, group: Some(64), zero: 0 };
        let codes = Case::new(kind, 8, 256, 1).codes;
        // Three bits a weight, and a scale of two bytes for 128.
        assert_eq!(codes.bytes(), 8 * 1024 * 3 / 8 + 8 * 8 * 2);
    }

    #[test]
    fn parts_that_do_not_fit_are_refused() {
        let (words, scale) = ([0u32; 16], [1.0f32; 4]);
        let of = |cols: usize, group, positions: &[u8]| {
            let stored = Stored {
                rows: 2,
                cols: cols / 2,
                bits: 4,
                planes: 4,
                group_size: group,
                activation_bits: None,
                words: &words[..4 * 2 * (cols / 2).div_ceil(32)],
                scale: Elements::F32(&scale[..2]),
                zero: Zero::Symmetric,
            };
            SparseCodes::new(&stored, positions, cols).map(|_| ())
        };
        assert_eq!(of(8, None, &[0x44; 2]), Ok(()));
        assert_eq!(of(8, None, &[0x44, 0x40]), Err(CodesFault::Positions { row: 1 }));
        assert_eq!(of(12, None, &[0x44, 4, 0x44, 4]), Ok(()));
        assert_eq!(of(12, None, &[0x44, 0x44, 0x44, 4]), Err(CodesFault::Positions { row: 0 }));
        assert!(matches!(of(8, None, &[0x44; 3]), Err(CodesFault::Size { .. })));
        assert!(matches!(of(6, None, &[0x44; 2]), Err(CodesFault::Size { .. })));
        assert!(matches!(of(8, Some(33), &[0x44; 2]), Err(CodesFault::Codes(Fault::Shape(_)))));
        assert!(matches!(of(128, Some(32), &[0x44; 32]), Err(CodesFault::Codes(Fault::Size { .. }))));
    }

    proptest! {
        #[test]
        fn every_path_widens_codes_alike(kind in kinds(), rows in 0usize..6, quads in 0usize..90, some: [prop::sample::Index; 2], seed: u64) {
            let case = Case::new(kind, rows, quads, seed);
            let (a, b) = (some[0].index(rows + 1), some[1].index(rows + 1));
            let rows = a.min(b)..a.max(b);
            let cols = quads * QUAD;
            let expected = &case.dense[rows.start * cols..rows.end * cols];
            for isa in Isa::available() {
                let mut out = vec![f32::NAN; expected.len()];
                case.codes.widen_with(isa, rows.clone(), &mut out);
                prop_assert!(same_bits(&out, expected), "{:?}", isa);
            }
        }
    }
}
