//! Any bytes as the components of a fixed12 matrix: both decoders agree.
#![no_main]

use libfuzzer_sys::fuzz_target;
use llmpress_entropy::fixed12::{
    Grid, Strips, StripsRef, decode_strips, decode_strips_reference, encode_strips,
};

/// Base, rows, columns, words, then (component, place, value) edits.
type Input = (i16, u8, u8, Vec<u16>, Vec<(u8, u16, u16)>);

fuzz_target!(|input: Input| {
    let (base, rows, cols, pattern, edits) = input;
    let (rows, cols) = (usize::from(rows % 40) + 1, usize::from(cols) + 1);
    let words: Vec<u16> =
        (0..rows * cols).map(|i| pattern.get(i % pattern.len().max(1)).copied().unwrap_or(0x3f80)).collect();
    let mut strips = Strips::default();
    if encode_strips(base % 240, cols, &words, &mut strips).is_err() {
        return;
    }
    let mut offsets = vec![0u32];
    for count in &strips.escape_counts {
        offsets.push(offsets[offsets.len() - 1] + count);
    }
    assert_eq!(offsets.len() as u64, Grid::new(rows as u64, cols as u64).expect("is small").tiles() + 1);
    for (component, at, value) in edits {
        let at = usize::from(at);
        match component % 5 {
            0 => edit(&mut strips.sign_mantissa, at, value as u8),
            1 => edit(&mut strips.codes, at, value as u8),
            2 => edit(&mut offsets, at, u32::from(value)),
            3 => edit(&mut strips.escape_positions, at, value),
            _ => edit(&mut strips.escape_exponents, at, value as u8),
        }
    }
    let view = StripsRef {
        sign_mantissa: &strips.sign_mantissa,
        codes: &strips.codes,
        escape_offsets: &offsets,
        escape_positions: &strips.escape_positions,
        escape_exponents: &strips.escape_exponents,
    };
    let (mut fast, mut slow) = (vec![0; words.len()], vec![0; words.len()]);
    let a = decode_strips(base, cols, rows, &view, &mut fast);
    let b = decode_strips_reference(base, cols, rows, &view, &mut slow);
    assert_eq!(a.is_ok(), b.is_ok(), "{a:?} {b:?}");
    if a.is_ok() {
        assert_eq!(fast, slow);
    }
});

fn edit<T>(list: &mut [T], at: usize, value: T) {
    let len = list.len();
    if len > 0 {
        list[at % len] = value;
    }
}
