//! AVX2: a byte of positions chooses how four 16-bit values are shuffled over eight columns.

use std::arch::x86_64::*;

use super::KEPT;

/// Of each byte of positions, where in eight bytes of values the bytes of eight words come from; 128 is none.
static SHUFFLES: [[u8; 16]; 256] = {
    let mut all = [[128; 16]; 256];
    let mut byte = 0;
    while byte < 256 {
        let kept = KEPT[byte & 15] | KEPT[byte >> 4] << 4;
        let (mut column, mut next) = (0, 0);
        while column < 8 {
            if kept >> column & 1 == 1 {
                all[byte][2 * column] = 2 * next;
                all[byte][2 * column + 1] = 2 * next + 1;
                next += 1;
            }
            column += 1;
        }
        byte += 1;
    }
    all
};

/// Four values as eight words, zeros between them.
///
/// # Safety
/// The processor has AVX2; four words can be read.
#[allow(unsafe_code)]
#[target_feature(enable = "avx2")]
#[inline]
pub(in crate::cpu) unsafe fn spread(from: *const u16, positions: u8) -> __m128i {
    // SAFETY: the caller's promise; sixteen bytes of the table.
    unsafe {
        let shuffle = _mm_loadu_si128(SHUFFLES[usize::from(positions)].as_ptr().cast());
        _mm_shuffle_epi8(_mm_loadl_epi64(from.cast()), shuffle)
    }
}
