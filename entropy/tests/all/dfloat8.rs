//! FP8 weights come back bit for bit, whatever they are, from any place on.

use llmpress_entropy::dfloat8::{encode, fits, narrow, pack, unpack, widen};
use llmpress_entropy::dfloat11::{Code, Span, Unrepresentable, decode_span};
use proptest::collection::vec;
use proptest::prelude::*;

/// The formula of the format: fields of a byte.
fn fields(byte: u8) -> (u16, u16, u16) {
    (u16::from(byte / 128), u16::from(byte / 8 % 16), u16::from(byte % 8))
}

#[test]
fn every_byte_has_a_word_of_its_fields_and_comes_back() {
    let bytes: Vec<u8> = (0..=255).collect();
    let (mut words, mut back) = (Vec::new(), vec![0; 256]);
    widen(&bytes, &mut words);
    for (&byte, &word) in bytes.iter().zip(&words) {
        let (sign, exponent, mantissa) = fields(byte);
        assert_eq!(word, sign * 0x8000 + exponent * 0x80 + mantissa);
    }
    narrow(&words, &mut back);
    assert_eq!(back, bytes);
}

#[test]
fn what_has_no_first_entry_is_refused_and_not_stored_wrongly() {
    assert_eq!(encode(&[]), Err(Unrepresentable::Empty));
    assert_eq!(encode(&[0x38; 100]), Err(Unrepresentable::NoFirstEntry));
}

/// Weights as they are when they were scaled to the largest number: each exponent half as often as the one above it.
fn scaled() -> impl Strategy<Value = u8> {
    (any::<u8>(), 0u32..1 << 14).prop_map(|(byte, chance)| {
        let down = (chance + 1).ilog2() as u8;
        byte & 0x87 | down.min(15) << 3
    })
}

proptest! {
    #[test]
    fn weights_come_back_from_any_place_on(
        bytes in prop_oneof![vec(any::<u8>(), 1..3000), vec(scaled(), 1..40_000)],
        from in any::<prop::sample::Index>(),
    ) {
        let unit = match encode(&bytes) {
            Ok(unit) => unit,
            Err(Unrepresentable::NoFirstEntry) => return Ok(()),
            Err(other) => return Err(TestCaseError::fail(other.to_string())),
        };
        prop_assert_eq!(unit.sign_mantissa.len(), bytes.len().div_ceil(2));
        let code = Code::from_luts(&unit.luts).unwrap();
        prop_assert!(fits(&code));
        let mut sign_mantissa = Vec::new();
        unpack(&unit.sign_mantissa, 0, bytes.len(), &mut sign_mantissa);
        let span = Span {
            encoded_exponent: &unit.encoded_exponent,
            gaps: &unit.gaps,
            output_positions: &unit.output_positions,
            sign_mantissa: &sign_mantissa,
        };
        let from = from.index(bytes.len());
        let mut words = vec![0; bytes.len() - from];
        decode_span(&code, &span, from, &mut words).unwrap();
        let mut back = vec![0; words.len()];
        narrow(&words, &mut back);
        prop_assert_eq!(&back, &bytes[from..]);
    }

    #[test]
    fn halves_are_what_the_fields_are_from_any_place_on(bytes in vec(any::<u8>(), 0..70), first in 0usize..80, count in 0usize..80) {
        let whole: Vec<u8> = bytes.iter().map(|byte| byte & 0x87).collect();
        let (mut halves, mut back) = (Vec::new(), Vec::new());
        pack(&whole, &mut halves);
        for (i, byte) in whole.iter().enumerate() {
            let (sign, _, mantissa) = fields(*byte);
            prop_assert_eq!(u16::from(halves[i / 2] >> (4 * (i % 2)) & 15), sign * 8 + mantissa);
        }
        unpack(&halves, first, count, &mut back);
        let wanted: Vec<u8> = (first..first + count).map(|i| whole.get(i).copied().unwrap_or(0)).collect();
        prop_assert_eq!(back, wanted);
    }
}
