//! Codes at rest through an entropy coder: whole codes in bytes, which are then stored as `planes` stores bytes.
//!
//! ```text
//! code of column k    bits P (k mod e) .. of byte k / e of its row, e = 8 / P codes a byte; rows one after the other
//! <tensor>.codes          U8 [B]            chunks of 2^18 of these bytes, each a zstd frame or as it is
//! <tensor>.code_lengths   U8 [chunks, 4]    u32 stored length of each; raw length = stored as is
//! ```
//!
//! Codes of trained weights are not equally likely, and a bit plane does not show it: each of its bits is 0 as often as 1.

use std::ops::Range;

use super::{Abq, CODE_LENGTHS, CODES, WORD_COLUMNS, pack_row};
use crate::encoding::planes::{self, Split};
use crate::encoding::{ComponentSet, ComponentSpec};
use crate::{Dtype, Error, Result};

/// Bytes are coded as they are.
const SPLIT: Split = Split { width: 1, rotate: false };
/// Most bytes that are decoded at a time, unless a row has more.
const STEP_BYTES: usize = 1 << 18;

/// Codes in a byte.
pub fn codes_per_byte(abq: &Abq) -> usize {
    (8 / abq.planes() as usize).max(1)
}

/// Bytes of a row of `cols` codes before they are coded.
pub fn row_bytes(abq: &Abq, cols: usize) -> usize {
    cols.div_ceil(codes_per_byte(abq))
}

/// Joins the codes of a row: `row_bytes` of them.
pub fn join(abq: &Abq, codes: &[u8], out: &mut [u8]) {
    let width = abq.planes();
    for (codes, byte) in codes.chunks(codes_per_byte(abq)).zip(out) {
        *byte = codes.iter().rev().fold(0, |byte, code| byte.checked_shl(width).unwrap_or(0) | code);
    }
}

/// The codes of a row; bits that belong to no code must be 0.
pub(super) fn split(abq: &Abq, bytes: &[u8], out: &mut [u8]) -> bool {
    let (width, mask) = (abq.planes(), ((1u16 << abq.planes()) - 1) as u8);
    let mut rest = 0;
    for (codes, &byte) in out.chunks_mut(codes_per_byte(abq)).zip(bytes) {
        let mut byte = byte;
        for code in codes {
            *code = byte & mask;
            byte = byte.checked_shr(width).unwrap_or(0);
        }
        rest |= byte;
    }
    rest == 0
}

/// The components that take the place of `planes` where the frames of a matrix take `stored` bytes.
pub fn components(abq: &Abq, rows: u64, cols: u64, stored: u64) -> [ComponentSpec; 2] {
    let bytes = rows.saturating_mul(row_bytes(abq, cols as usize) as u64);
    let chunks = planes::chunks(bytes, SPLIT.width);
    [
        ComponentSpec { name: CODES, dtype: Dtype::U8, shape: vec![stored] },
        ComponentSpec { name: CODE_LENGTHS, dtype: Dtype::U8, shape: vec![chunks, 4] },
    ]
}

/// Reads coded codes as bit planes.
#[derive(Debug)]
pub(super) struct Coded {
    abq: Abq,
    cols: usize,
    frames: planes::Reader,
}

impl Coded {
    pub(super) fn open(set: ComponentSet<'_>, abq: Abq, rows: u64, cols: usize) -> Result<Self> {
        let bytes = rows.checked_mul(row_bytes(&abq, cols) as u64);
        let bytes = bytes.ok_or_else(|| Error::Invalid(format!("unit {}: is too large", set.unit())))?;
        let frames = planes::Reader::new(set.get(CODES)?, &set.get(CODE_LENGTHS)?, bytes, SPLIT)?;
        Ok(Self { abq, cols, frames })
    }

    /// The frames, for errors.
    pub(super) fn component(&self) -> &crate::Component {
        self.frames.data()
    }

    /// The planes of these columns (whole rows, or a part of one that begins on a word) of rows from `row` on: as many rows as
    /// `out` has room for, `[planes, rows, words]`.
    pub(super) fn load(&self, row: u64, columns: Range<usize>, rows: usize, out: &mut [u32]) -> Result<()> {
        let each = codes_per_byte(&self.abq);
        let words = columns.len().div_ceil(WORD_COLUMNS);
        let (of_row, of_piece) = (row_bytes(&self.abq, self.cols) as u64, columns.len().div_ceil(each));
        let (mut bytes, mut codes) = (Vec::new(), vec![0; columns.len()]);
        let step = (STEP_BYTES / of_piece.max(1)).max(1);
        for first in (0..rows).step_by(step) {
            let count = step.min(rows - first);
            bytes.resize(count * of_piece, 0);
            let at = (row + first as u64) * of_row + (columns.start / each) as u64;
            self.frames.read(at, &mut bytes)?;
            for (i, bytes) in bytes.chunks_exact(of_piece.max(1)).enumerate() {
                let at = first + i;
                if !split(&self.abq, bytes, &mut codes) {
                    let row = row + at as u64;
                    return Err(self
                        .component()
                        .corrupt(format!("row {row}: bits are set that belong to no code")));
                }
                for (plane, out) in out.chunks_exact_mut((rows * words).max(1)).enumerate() {
                    pack_row(&codes, plane as u32, &mut out[at * words..][..words]);
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn codes_come_out_as_they_went_in(
            bits in 1u8..=8, balanced: bool, codes in prop::collection::vec(any::<u8>(), 0..100),
        ) {
            let abq = Abq { balanced: balanced && bits <= 2, ..Abq::new(bits) };
            let codes: Vec<u8> = codes.iter().map(|code| (u32::from(*code) % abq.levels()) as u8).collect();
            let mut bytes = vec![0xff; row_bytes(&abq, codes.len())];
            join(&abq, &codes, &mut bytes);
            let mut back = vec![9; codes.len()];
            prop_assert!(split(&abq, &bytes, &mut back));
            prop_assert_eq!(&back, &codes);
            // A bit that belongs to no code is seen, wherever there is one.
            let spare = 8 - codes_per_byte(&abq) * abq.planes() as usize;
            if spare > 0 && !bytes.is_empty() {
                bytes[0] |= 0x80;
                prop_assert!(!split(&abq, &bytes, &mut back));
            }
        }
    }
}
