//! Elements of tensors as numbers.

use llmpress_formats::Dtype;

/// The values of little-endian elements, as many as `out` takes; false if the dtype has none that are handled
/// here. Integers of 64 bits are rounded.
pub(crate) fn values(dtype: Dtype, bytes: &[u8], out: &mut [f64]) -> bool {
    fn each<const W: usize>(bytes: &[u8], out: &mut [f64], value: impl Fn([u8; W]) -> f64) {
        out.iter_mut().zip(bytes.as_chunks::<W>().0).for_each(|(out, &element)| *out = value(element));
    }
    match dtype {
        Dtype::BOOL | Dtype::U8 => each(bytes, out, |[b]| f64::from(b)),
        Dtype::I8 => each(bytes, out, |b| f64::from(i8::from_le_bytes(b))),
        Dtype::I16 => each(bytes, out, |b| f64::from(i16::from_le_bytes(b))),
        Dtype::U16 => each(bytes, out, |b| f64::from(u16::from_le_bytes(b))),
        Dtype::I32 => each(bytes, out, |b| f64::from(i32::from_le_bytes(b))),
        Dtype::U32 => each(bytes, out, |b| f64::from(u32::from_le_bytes(b))),
        Dtype::I64 => each(bytes, out, |b| i64::from_le_bytes(b) as f64),
        Dtype::U64 => each(bytes, out, |b| u64::from_le_bytes(b) as f64),
        Dtype::F16 => each(bytes, out, |b| half::f16::from_le_bytes(b).to_f64()),
        Dtype::BF16 => each(bytes, out, |b| half::bf16::from_le_bytes(b).to_f64()),
        Dtype::F32 => each(bytes, out, |b| f64::from(f32::from_le_bytes(b))),
        Dtype::F64 => each(bytes, out, f64::from_le_bytes),
        _ => return false,
    }
    true
}

/// Elements of `width` bytes whose bits differ.
pub(crate) fn count_differing(width: usize, a: &[u8], b: &[u8]) -> u64 {
    fn count<const W: usize>(a: &[u8], b: &[u8]) -> u64 {
        a.as_chunks::<W>().0.iter().zip(b.as_chunks::<W>().0).filter(|(a, b)| a != b).count() as u64
    }
    match width {
        1 => count::<1>(a, b),
        2 => count::<2>(a, b),
        4 => count::<4>(a, b),
        _ => count::<8>(a, b),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_numeric_dtype_has_its_values() {
        let mut out = [0.0; 2];
        for (dtype, bytes, expected) in [
            (Dtype::BOOL, vec![0, 1], [0.0, 1.0]),
            (Dtype::U8, vec![7, 255], [7.0, 255.0]),
            (Dtype::I8, vec![7, 255], [7.0, -1.0]),
            (Dtype::I16, vec![0, 128, 1, 0], [-32768.0, 1.0]),
            (Dtype::U16, vec![0, 128, 1, 0], [32768.0, 1.0]),
            (Dtype::I32, vec![255, 255, 255, 255, 1, 0, 0, 0], [-1.0, 1.0]),
            (Dtype::U32, vec![255, 255, 255, 255, 1, 0, 0, 0], [4294967295.0, 1.0]),
            (Dtype::I64, [(-5i64).to_le_bytes(), 6i64.to_le_bytes()].concat(), [-5.0, 6.0]),
            (Dtype::U64, [5u64.to_le_bytes(), 6u64.to_le_bytes()].concat(), [5.0, 6.0]),
            (Dtype::F16, vec![0, 0x3c, 1, 0], [1.0, 2f64.powi(-24)]),
            (Dtype::BF16, vec![0x80, 0xbf, 1, 0], [-1.0, 2f64.powi(-133)]),
            (Dtype::F32, [0.1f32.to_le_bytes(), 3f32.to_le_bytes()].concat(), [f64::from(0.1f32), 3.0]),
            (Dtype::F64, [0.1f64.to_le_bytes(), 3f64.to_le_bytes()].concat(), [0.1, 3.0]),
        ] {
            assert!(values(dtype, &bytes, &mut out), "{dtype:?}");
            assert_eq!(out, expected, "{dtype:?}");
        }
        assert!(!values(Dtype::F8_E4M3, &[0, 1], &mut out));
    }

    #[test]
    fn an_element_counts_once_however_many_bits_differ() {
        let (a, b) = ([0u8; 16], [1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9]);
        assert_eq!([1, 2, 4, 8].map(|width| count_differing(width, &a, &b)), [5, 3, 2, 2]);
    }
}
