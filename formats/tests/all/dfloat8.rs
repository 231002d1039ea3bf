//! `dfloat8` to the bit, whatever range is read, and what its reader refuses.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::collections::BTreeMap;

use crate::by_hand::{Raw, open};
use llmpress_entropy::dfloat8::encode;
use llmpress_entropy::dfloat11;
use llmpress_formats::encoding::dfloat8::COMPONENTS;
use llmpress_formats::encoding::dfloat11::{ENCODED_EXPONENT, GAPS, LUTS, OUTPUT_POSITIONS, SIGN_MANTISSA};
use llmpress_formats::{Dtype, Encoding, Error};
use llmpress_numbers::Numbers;

/// Weights as they are when they were scaled to the largest number, and some of every pattern.
fn bytes(count: usize, seed: u64) -> Vec<u8> {
    let mut numbers = Numbers::new(seed);
    let mut byte = || {
        let bits = numbers.bits();
        let exponent = 15 - ((bits >> 8).leading_zeros() - 8).min(15) as u8;
        if bits.is_multiple_of(97) { (bits >> 20) as u8 } else { exponent << 3 | bits as u8 & 0x87 }
    };
    (0..count).map(|_| byte()).collect()
}

fn stored(bytes: &[u8]) -> BTreeMap<String, Raw> {
    let unit = encode(bytes).unwrap();
    let dfloat11::EncodedUnit { luts, encoded_exponent, sign_mantissa, output_positions, gaps } = unit;
    let rows = luts.len() as u64 / 256;
    let u8s = |name: &str, bytes: Vec<u8>| (name.to_owned(), (Dtype::U8, vec![bytes.len() as u64], bytes));
    let mut all: BTreeMap<String, Raw> = [
        u8s(ENCODED_EXPONENT, encoded_exponent),
        u8s(SIGN_MANTISSA, sign_mantissa),
        u8s(OUTPUT_POSITIONS, output_positions),
        u8s(GAPS, gaps),
    ]
    .into_iter()
    .collect();
    all.insert(LUTS.to_owned(), (Dtype::U8, vec![rows, 256], luts));
    assert!(all.keys().all(|name| COMPONENTS.contains(&name.as_str())) && all.len() == COMPONENTS.len());
    all
}

#[test]
fn any_range_decodes_to_the_same_bytes() {
    // Odd tails; more than one block; more than is decoded at a time.
    for count in [997, 40_001, (1 << 18) + 3] {
        let bytes = bytes(count, count as u64);
        let reader = open(&Encoding::Dfloat8, Dtype::F8_E4M3, &[count as u64], &stored(&bytes)).unwrap();
        let mut numbers = Numbers::new(3);
        for _ in 0..20 {
            let from = numbers.below(count);
            let mut out = vec![0; numbers.below(count - from + 1)];
            reader.read(from as u64, &mut out).unwrap();
            assert!(out == bytes[from..from + out.len()], "{from} {}", out.len());
        }
        let mut all = vec![0; count];
        reader.read(0, &mut all).unwrap();
        assert!(all == bytes);
        assert!(reader.read(1, &mut all).is_err(), "past the end");
    }
}

#[test]
fn what_is_of_another_size_or_dtype_is_refused_by_name() {
    let bytes = bytes(5000, 1);
    let whole = stored(&bytes);
    let refused = |dtype, shape: &[u64], stored: &BTreeMap<String, Raw>| -> String {
        open(&Encoding::Dfloat8, dtype, shape, stored).unwrap_err().to_string()
    };
    assert!(refused(Dtype::BF16, &[5000], &whole).contains("F8_E4M3 only"));
    assert!(refused(Dtype::F8_E5M2, &[5000], &whole).contains("F8_E5M2"));
    assert!(refused(Dtype::F8_E4M3, &[5002], &whole).contains(SIGN_MANTISSA));
    for name in COMPONENTS {
        let mut less = whole.clone();
        less.remove(name);
        assert!(refused(Dtype::F8_E4M3, &[5000], &less).contains(name), "{name}");
    }
    // Tables of exponents that FP8 does not have, and damaged ones: found when they are needed.
    let words: Vec<u16> = bytes.iter().map(|byte| (u16::from(*byte) % 40 + 100) << 7).collect();
    let other = dfloat11::encode(&words).unwrap();
    let mut wrong = whole.clone();
    wrong.insert(LUTS.to_owned(), (Dtype::U8, vec![other.luts.len() as u64 / 256, 256], other.luts));
    let reader = open(&Encoding::Dfloat8, Dtype::F8_E4M3, &[5000], &wrong).unwrap();
    let error = reader.read(0, &mut [0; 10]).unwrap_err();
    assert!(
        matches!(&error, Error::Corrupt { .. }) && error.to_string().contains("FP8 does not have"),
        "{error}"
    );
}
