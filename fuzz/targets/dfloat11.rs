//! Any bytes as the components of a DFloat11 unit: both decoders agree, and neither fails otherwise than
//! by an error.
#![no_main]

use libfuzzer_sys::fuzz_target;
use llmpress_entropy::dfloat11::{Code, Span, decode_span, decode_span_reference, encode};

/// Words, then (component, place, value) edits, (component, bytes) to cut, weights to skip and to decode.
type Input = (Vec<u16>, Vec<(u8, u16, u8)>, (u8, u8), u16, u16, Vec<u8>);

fuzz_target!(|input: Input| {
    let (words, edits, (cut, cut_bytes), skip, wanted, luts) = input;
    let _ = Code::from_luts(&luts);
    // Start from a valid unit, then change and cut it.
    let words: Vec<u16> = words.iter().map(|w| w & 0xbfff).collect();
    let Ok(mut unit) = encode(&words) else { return };
    for (component, at, value) in edits {
        let bytes = match component % 5 {
            0 => &mut unit.luts,
            1 => &mut unit.encoded_exponent,
            2 => &mut unit.gaps,
            3 => &mut unit.output_positions,
            _ => &mut unit.sign_mantissa,
        };
        let len = bytes.len();
        if len > 0 {
            bytes[usize::from(at) % len] = value;
        }
    }
    let component = match cut % 8 {
        0 => &mut unit.encoded_exponent,
        1 => &mut unit.gaps,
        2 => &mut unit.output_positions,
        3 => &mut unit.sign_mantissa,
        4 => &mut unit.luts,
        _ => &mut Vec::new(),
    };
    component.truncate(component.len().saturating_sub(usize::from(cut_bytes)));
    let Ok(code) = Code::from_luts(&unit.luts) else { return };
    let span = Span {
        encoded_exponent: &unit.encoded_exponent,
        gaps: &unit.gaps,
        output_positions: &unit.output_positions,
        sign_mantissa: &unit.sign_mantissa,
    };
    let skip = usize::from(skip) % (words.len() + 1);
    let wanted = usize::from(wanted) % (words.len() + 2 - skip);
    let (mut fast, mut slow) = (vec![0; wanted], vec![0; wanted]);
    let a = decode_span(&code, &span, skip, &mut fast);
    let b = decode_span_reference(&code, &span, skip, &mut slow);
    assert_eq!(a.is_ok(), b.is_ok(), "{a:?} {b:?}");
    if a.is_ok() {
        assert_eq!(fast, slow);
    }
});
