//! Any words through every coder and back.
#![no_main]

use libfuzzer_sys::fuzz_target;
use llmpress_entropy::{dfloat8, dfloat11, fixed12, planes};

fuzz_target!(|input: (Vec<u16>, u8, u8)| {
    let (words, cols, width) = input;
    if let Ok(unit) = dfloat11::encode(&words) {
        assert_eq!(dfloat11::encode_reference(&words), Ok(unit.clone()));
        let code = dfloat11::Code::from_luts(&unit.luts).expect("its own tables are valid");
        let span = dfloat11::Span {
            encoded_exponent: &unit.encoded_exponent,
            gaps: &unit.gaps,
            output_positions: &unit.output_positions,
            sign_mantissa: &unit.sign_mantissa,
        };
        let mut out = vec![0; words.len()];
        dfloat11::decode_span(&code, &span, 0, &mut out).expect("what was encoded decodes");
        assert_eq!(out, words);
    }
    let small: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    if let Ok(unit) = dfloat8::encode(&small) {
        let code = dfloat11::Code::from_luts(&unit.luts).expect("its own tables are valid");
        assert!(dfloat8::fits(&code));
        let mut sign_mantissa = Vec::new();
        dfloat8::unpack(&unit.sign_mantissa, 0, small.len(), &mut sign_mantissa);
        let span = dfloat11::Span {
            encoded_exponent: &unit.encoded_exponent,
            gaps: &unit.gaps,
            output_positions: &unit.output_positions,
            sign_mantissa: &sign_mantissa,
        };
        let (mut out, mut back) = (vec![0; small.len()], vec![0; small.len()]);
        dfloat11::decode_span(&code, &span, 0, &mut out).expect("what was encoded decodes");
        dfloat8::narrow(&out, &mut back);
        assert_eq!(back, small);
    }
    let cols = usize::from(cols) + 1;
    let matrix = &words[..words.len() / cols * cols];
    if !matrix.is_empty() {
        let mut histogram = fixed12::Histogram::new();
        histogram.add(matrix);
        let window = histogram.best_window();
        let mut strips = fixed12::Strips::default();
        fixed12::encode_strips(window.base, cols, matrix, &mut strips).expect("fits");
        assert_eq!(strips.escape_exponents.len() as u64, window.escapes);
        let mut offsets = vec![0u32];
        for count in &strips.escape_counts {
            offsets.push(offsets[offsets.len() - 1] + count);
        }
        let view = fixed12::StripsRef {
            sign_mantissa: &strips.sign_mantissa,
            codes: &strips.codes,
            escape_offsets: &offsets,
            escape_positions: &strips.escape_positions,
            escape_exponents: &strips.escape_exponents,
        };
        let mut out = vec![0; matrix.len()];
        fixed12::decode_strips(window.base, cols, matrix.len() / cols, &view, &mut out).expect("decodes");
        assert_eq!(out, matrix);
    }
    let width = [1, 2, 4, 8][usize::from(width % 4)];
    let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    let bytes = &bytes[..bytes.len() / width * width];
    for rotate in [false, true] {
        let (mut data, mut lengths) = (Vec::new(), Vec::new());
        let mut encoder = planes::Encoder::new(planes::DEFAULT_LEVEL);
        if encoder.encode_chunk(width, rotate, bytes, &mut data, &mut lengths).is_err() {
            continue;
        }
        let mut out = vec![0; bytes.len()];
        planes::Decoder::new().decode_chunk(width, rotate, &lengths, &data, &mut out).expect("decodes");
        assert_eq!(out, bytes);
    }
});
