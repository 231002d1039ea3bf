//! DFloat11 units decode on a GPU to the words that were encoded.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use llmpress_emulator::Emulator;
use llmpress_entropy::dfloat11::{EncodedUnit, encode};
use llmpress_kernels::gpu::dfloat11::{Components, Unit};
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
