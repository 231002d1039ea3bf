//! Stored weights to single precision.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

use super::Elements;
use super::isa::Isa;

/// Elements `first .. first + out.len()`, exactly.
pub(super) fn widen(isa: Isa, elements: Elements<'_>, first: usize, out: &mut [f32]) {
    let len = out.len();
    let elements = match elements {
        Elements::F32(x) => return out.copy_from_slice(&x[first..][..len]),
        Elements::Bf16(x) => Elements::Bf16(&x[first..][..len]),
        Elements::F16(x) => Elements::F16(&x[first..][..len]),
    };
    #[allow(unsafe_code)]
    match isa {
        // SAFETY: the features were detected, and there are as many elements as values.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { avx512::widen(elements, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2::widen(elements, out) },
        Isa::Portable => reference(elements, out),
    }
}

fn reference(elements: Elements<'_>, out: &mut [f32]) {
    match elements {
        Elements::F32(x) => out.copy_from_slice(x),
        Elements::Bf16(x) => {
            for (out, &word) in out.iter_mut().zip(x) {
                *out = f32::from_bits(u32::from(word) << 16);
            }
        }
        Elements::F16(x) => {
            for (out, &word) in out.iter_mut().zip(x) {
                *out = half::f16::from_bits(word).to_f32();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::test_values::same_bits;

    #[test]
    fn every_path_widens_every_word_exactly() {
        let words: Vec<u16> = (0..=u16::MAX).collect();
        for elements in [Elements::Bf16(&words), Elements::F16(&words)] {
            let expected: Vec<f32> = (0..words.len()).map(|i| elements.get(i)).collect();
            for isa in Isa::available() {
                let mut out = vec![0.5; words.len()];
                widen(isa, elements, 0, &mut out);
                assert!(same_bits(&out, &expected), "{isa:?}");
            }
        }
    }

    #[test]
    fn every_path_widens_any_part() {
        let words: Vec<u16> = (0..100).map(|i| i * 601).collect();
        let single: Vec<f32> = words.iter().map(|w| f32::from(*w)).collect();
        for elements in [Elements::F32(&single), Elements::Bf16(&words), Elements::F16(&words)] {
            for (first, len) in (0..40).flat_map(|first| (0..=60).map(move |len| (first, len))) {
                let expected: Vec<f32> = (first..first + len).map(|i| elements.get(i)).collect();
                for isa in Isa::available() {
                    let mut out = vec![0.5; len];
                    widen(isa, elements, first, &mut out);
                    assert!(same_bits(&out, &expected), "{isa:?}");
                }
            }
        }
    }
}
