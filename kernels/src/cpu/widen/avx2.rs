//! AVX2 and F16C: eight at a time.

use std::arch::x86_64::*;

use crate::cpu::Elements;

/// As [`super::reference`].
///
/// # Safety
/// The processor has AVX2 and F16C; there are as many elements as values of `out`.
#[allow(unsafe_code)]
#[target_feature(enable = "avx2,f16c")]
pub(super) unsafe fn widen(elements: Elements<'_>, out: &mut [f32]) {
    let (Elements::Bf16(words) | Elements::F16(words)) = elements else {
        return super::reference(elements, out);
    };
    let whole = out.len() / 8 * 8;
    for at in (0..whole).step_by(8) {
        // SAFETY: at + 8 <= out.len(), which is that of the words.
        unsafe {
            let words = _mm_loadu_si128(words.as_ptr().add(at).cast());
            let single = if let Elements::F16(_) = elements {
                _mm256_cvtph_ps(words)
            } else {
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(words)))
            };
            _mm256_storeu_ps(out.as_mut_ptr().add(at), single);
        }
    }
    let (words, out) = (&words[whole..], &mut out[whole..]);
    super::reference(
        if let Elements::F16(_) = elements { Elements::F16(words) } else { Elements::Bf16(words) },
        out,
    );
}
