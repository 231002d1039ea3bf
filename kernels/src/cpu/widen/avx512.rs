//! AVX-512: sixteen at a time.

use std::arch::x86_64::*;

use crate::cpu::Elements;
use crate::cpu::dot::avx512::{Bf16, Half, Load, Single};

/// Elements from those that are widened to those asked of memory.
const AHEAD: usize = 2048;

/// As [`super::reference`].
///
/// # Safety
/// The processor has AVX-512 F, BW and VL; there are as many elements as values of `out`.
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c")]
pub(super) unsafe fn widen(elements: Elements<'_>, out: &mut [f32]) {
    // SAFETY: the caller's promise.
    unsafe {
        match elements {
            Elements::F32(x) => all::<Single>(x.as_ptr(), out),
            Elements::Bf16(x) => all::<Bf16>(x.as_ptr(), out),
            Elements::F16(x) => all::<Half>(x.as_ptr(), out),
        }
    }
}

#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c")]
unsafe fn all<L: Load>(from: *const L::Word, out: &mut [f32]) {
    let (vectors, rest) = out.as_chunks_mut::<16>();
    for (i, out) in vectors.iter_mut().enumerate() {
        let from = from.wrapping_add(16 * i);
        _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(AHEAD).cast());
        // SAFETY: as many elements as values.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), L::load(from, __mmask16::MAX)) };
    }
    let mask = (1 << rest.len()) - 1;
    // SAFETY: the mask leaves out what is past the end.
    unsafe {
        let from = from.wrapping_add(16 * vectors.len());
        _mm512_mask_storeu_ps(rest.as_mut_ptr(), mask, L::load(from, mask));
    }
}
