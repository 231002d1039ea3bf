//! DFloat11 units decode on a GPU to the words that were encoded.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use llmpress_emulator::Emulator;
use llmpress_entropy::dfloat11::{EncodedUnit, encode};
use llmpress_kernels::gpu::dfloat11::{Components, Scales, Unit};
use llmpress_kernels::gpu::{Error, Gpu};
use llmpress_numbers::Numbers;
use proptest::prelude::*;

fn positions(unit: &EncodedUnit) -> Vec<u32> {
    unit.output_positions.chunks(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect()
}

fn components<'a>(unit: &'a EncodedUnit, positions: &'a [u32]) -> Components<'a> {
    Components {
        luts: &unit.luts,
        encoded_exponent: &unit.encoded_exponent,
        sign_mantissa: &unit.sign_mantissa,
        output_positions: positions,
        gaps: &unit.gaps,
    }
}

fn decoded(gpu: &Gpu, c: &Components<'_>) -> Result<Vec<u16>, Error> {
    let unit = Unit::upload(gpu, c)?;
    let out = gpu.allocate(2 * unit.elements())?;
    unit.decode(gpu, out.view())?;
    out.view().read(unit.elements())
}

/// Words whose exponents follow counts that halve `steepness` times a step: steep ones have codes of many bits.
fn words(seed: u64, count: usize, symbols: u32, steepness: u32) -> Vec<u16> {
    let mut numbers = Numbers::new(seed);
    (0..count)
        .map(|_| {
            let state = numbers.bits();
            let exponent = ((state >> 8).leading_zeros() - 8) * 4 / steepness.max(1) % symbols.max(1);
            ((100 + exponent) << 7) as u16 | (state & 0x807f) as u16
        })
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn units_decode_to_their_words(
        seed in any::<u64>(), symbols in 2u32..130, steepness in 1u32..8,
        count in prop_oneof![1usize..40, 1000usize..1100, 9_000usize..60_000],
    ) {
        let words = words(seed, count, symbols, steepness);
        let Ok(unit) = encode(&words) else { return Ok(()) };
        let gpu = Gpu::new(if seed % 2 == 0 { Emulator::new() } else { Emulator::backwards() });
        let found = decoded(&gpu, &components(&unit, &positions(&unit))).unwrap();
        let differs = found.iter().zip(&words).position(|(a, b)| a != b);
        prop_assert_eq!(differs, None, "{} words, first positions {:?}", words.len(), &positions(&unit));
    }

    #[test]
    fn damaged_units_break_no_rule(
        seed in any::<u64>(), at in any::<prop::sample::Index>(), value in any::<u8>(), which in 0usize..4,
    ) {
        let words = words(seed, 12_000, 40, 3);
        let mut unit = encode(&words).unwrap();
        let mut positions = positions(&unit);
        match which {
            0 => *at.get_mut(&mut unit.luts) = value,
            1 => *at.get_mut(&mut unit.gaps) = value,
            2 => *at.get_mut(&mut positions) ^= u32::from(value) << (value % 24),
            _ => {
                let from = at.index(unit.encoded_exponent.len());
                unit.encoded_exponent[from..].fill(value);
            }
        }
        // Refused, or decoded to something: never a fault.
        let gpu = Gpu::new(Emulator::new());
        if let Err(error) = decoded(&gpu, &components(&unit, &positions)) {
            prop_assert!(matches!(error, Error::Invalid(_)), "{error}");
        }
    }
}

#[test]
fn codes_of_up_to_32_bits_decode() {
    // Fibonacci counts give the longest codes for the least weights; few are enough to pass the table's 11 bits.
    let (mut a, mut b) = (1usize, 1usize);
    let mut words = Vec::new();
    for symbol in 0..24u16 {
        words.extend(std::iter::repeat_n((90 + symbol) << 7 | symbol, a));
        (a, b) = (b, a + b);
    }
    // In an order that mixes them.
    let mut numbers = Numbers::new(7);
    for i in (1..words.len()).rev() {
        words.swap(i, numbers.below(i + 1));
    }
    let unit = encode(&words).unwrap();
    let longest = unit.luts[unit.luts.len() - 256..].iter().max().unwrap();
    assert!(*longest > 20, "{longest} bits");
    let gpu = Gpu::new(Emulator::new());
    assert!(decoded(&gpu, &components(&unit, &positions(&unit))).unwrap() == words);
}

#[test]
fn official_files_without_an_entry_decode_and_other_sizes_are_refused() {
    let words = words(3, 20_000, 40, 3);
    let unit = encode(&words).unwrap();
    let all = positions(&unit);
    let gpu = Gpu::new(Emulator::new());
    let c = components(&unit, &all);
    let refused = |c: &Components<'_>| matches!(Unit::upload(&gpu, c), Err(Error::Invalid(_)));
    assert!(decoded(&gpu, &Components { output_positions: &all[..all.len() - 1], ..c }).unwrap() == words);
    assert!(refused(&Components { output_positions: &all[..all.len() - 2], ..c }));
    assert!(refused(&Components { gaps: &unit.gaps[1..], ..c }));
    assert!(refused(&Components { luts: &unit.luts[1..], ..c }));
    assert!(refused(&Components { sign_mantissa: &unit.sign_mantissa[1..], ..c }));
    let mut swapped = all.clone();
    swapped.swap(0, 1);
    assert!(refused(&Components { output_positions: &swapped, ..c }));
}

/// FP8 weights as they are when they were scaled to the largest number; with `odd`, all patterns besides.
fn bytes(seed: u64, count: usize, odd: bool) -> Vec<u8> {
    let mut numbers = Numbers::new(seed);
    let mut byte = || {
        let state = numbers.bits();
        let exponent = 15 - ((state >> 8).leading_zeros() - 8).min(15) as u8;
        if odd && state.is_multiple_of(61) { (state >> 40) as u8 } else { exponent << 3 | state as u8 & 0x87 }
    };
    (0..count).map(|_| byte()).collect()
}

/// What the byte of an FP8 weight stands for, by the formula of its format.
fn e4m3(byte: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
    let size = match (exponent, byte & 7) {
        (15, 7) => return f32::NAN,
        (0, _) => mantissa * 2f32.powi(-9),
        _ => (8.0 + mantissa) * 2f32.powi(exponent - 10),
    };
    if byte > 127 { -size } else { size }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn fp8_matrices_decode_to_their_weights_times_their_scales(
        seed in any::<u64>(), rows in 1usize..90, eights in 1usize..60,
        block in prop_oneof![Just([128, 128]), Just([1, 1000]), Just([1000, 1000]), Just([16, 16]), Just([7, 8])],
    ) {
        let cols = 8 * eights;
        let weights = bytes(seed, rows * cols, seed.is_multiple_of(3));
        let Ok(unit) = llmpress_entropy::dfloat8::encode(&weights) else { return Ok(()) };
        let [height, width]: [usize; 2] = block;
        let across = cols.div_ceil(width);
        let mut numbers = Numbers::new(seed ^ 1);
        let sizes = [1.0, 1e-3, -3e-5, 1e38, 1e-38, 0.0];
        let values: Vec<f32> = (0..rows.div_ceil(height) * across)
            .map(|i| sizes[i % 6] * (1.0 + numbers.float()))
            .collect();
        let scales = Scales { values: &values, rows, cols, block };
        let gpu = Gpu::new(if seed % 2 == 0 { Emulator::new() } else { Emulator::backwards() });
        let positions = positions(&unit);
        let on_gpu = Unit::upload_fp8(&gpu, &components(&unit, &positions), &scales).unwrap();
        let out = gpu.allocate(2 * on_gpu.elements()).unwrap();
        on_gpu.decode(&gpu, out.view()).unwrap();
        let found: Vec<u16> = out.view().read(rows * cols).unwrap();
        for (i, (found, byte)) in found.iter().zip(&weights).enumerate() {
            let (row, col) = (i / cols, i % cols);
            let value = e4m3(*byte) * values[row / height * across + col / width];
            let wanted = if value.is_nan() { 0x7fc0 } else { half::bf16::from_f32(value).to_bits() };
            prop_assert_eq!(*found, wanted, "weight {}, {} of {:#x}", row, col, byte);
        }
    }
}

#[test]
fn scales_that_do_not_fit_an_fp8_matrix_are_refused() {
    let weights = bytes(5, 40 * 64, false);
    let unit = llmpress_entropy::dfloat8::encode(&weights).unwrap();
    let all = positions(&unit);
    let gpu = Gpu::new(Emulator::new());
    let (c, ones) = (components(&unit, &all), vec![1.0; 100]);
    let fine = Scales { values: &ones[..10], rows: 40, cols: 64, block: [8, 32] };
    Unit::upload_fp8(&gpu, &c, &fine).unwrap();
    let refused = |scales| matches!(Unit::upload_fp8(&gpu, &c, &scales), Err(Error::Invalid(_)));
    assert!(refused(Scales { values: &ones[..9], ..fine }));
    assert!(refused(Scales { values: &[f32::INFINITY; 10], ..fine }));
    assert!(refused(Scales { values: &ones[..60], block: [4, 12], ..fine }));
    assert!(refused(Scales { rows: 39, ..fine }));
    // Exponents of BF16 are none of FP8.
    let other = encode(&words(3, 1280, 40, 3)).unwrap();
    assert!(matches!(
        Unit::upload_fp8(&gpu, &components(&other, &positions(&other)), &fine),
        Err(Error::Invalid(_))
    ));
}
