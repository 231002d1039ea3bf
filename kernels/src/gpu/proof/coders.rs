//! Decoders of lossless encodings give back every bit.

use llmpress_entropy::dfloat11;

use super::numbers::Numbers;
use super::{Court, Result};
use crate::gpu::Error;
use crate::gpu::ceiling;
use crate::gpu::dfloat11::{Components, Unit};
use crate::gpu::fixed12::Matrix;

/// Words whose exponents follow counts that halve `steepness` times a step: steep ones have codes of many bits.
fn steep(numbers: &mut Numbers, count: usize, symbols: u32, steepness: u32) -> Vec<u16> {
    (0..count)
        .map(|_| {
            let bits = numbers.next();
            let exponent = ((bits >> 8).leading_zeros() - 8) * 4 / steepness % symbols;
            ((100 + exponent) << 7) as u16 | (bits & 0x807f) as u16
        })
        .collect()
}

/// Words whose exponents follow the Fibonacci numbers, which give the longest codes, in an order that mixes them.
fn fibonacci(numbers: &mut Numbers, symbols: u16) -> Vec<u16> {
    let (mut a, mut b) = (1usize, 1usize);
    let mut words = Vec::new();
    for symbol in 0..symbols {
        words.extend(std::iter::repeat_n((90 + symbol) << 7 | symbol, a));
        (a, b) = (b, a + b);
    }
    for i in (1..words.len()).rev() {
        words.swap(i, (numbers.next() >> 33) as usize % (i + 1));
    }
    words
}

pub(super) fn prove(court: &mut Court<'_>) -> Result<()> {
    let mut numbers = Numbers::new(11);
    let mut units = Vec::new();
    for (count, symbols, steepness) in
        [(7, 3, 4), (1000, 40, 1), (9001, 130, 7), (60_000, 40, 3), (300_001, 20, 4)]
    {
        units.push((
            format!("{count} words, {symbols} exponents"),
            steep(&mut numbers, count, symbols, steepness),
        ));
    }
    units.push(("codes of up to 23 bits".to_owned(), fibonacci(&mut numbers, 24)));
    units.push(("a model's weights".to_owned(), numbers.weights(1 << 21, 0)));
    for (shape, words) in units {
        if court.too_large(words.len()) {
            continue;
        }
        // A distribution that the format cannot hold is no case.
        let Ok(unit) = dfloat11::encode(&words) else { continue };
        let positions: Vec<u32> = bytemuck::pod_collect_to_vec(&unit.output_positions);
        court.case("decode_dfloat11", &shape, |court| {
            let components = Components {
                luts: &unit.luts,
                encoded_exponent: &unit.encoded_exponent,
                sign_mantissa: &unit.sign_mantissa,
                output_positions: &positions,
                gaps: &unit.gaps,
            };
            let unit = Unit::upload(court.gpu, &components)?;
            let out = court.gpu.upload(&vec![u16::MAX; words.len()])?;
            unit.decode(court.gpu, out.view())?;
            let found: Vec<u16> = out.view().read(words.len())?;
            court.same("decode_dfloat11", &shape, &found, &words);
            Ok(())
        })?;
    }
    for (rows, cols, odd) in [(1, 1, 0), (39, 600, 3), (17, 72, 1024), (150, 129, 100), (1024, 4096, 0)] {
        if court.too_large(rows * cols) {
            continue;
        }
        let shape = format!("{rows} x {cols}, {odd} in 1,024 escape");
        let words = numbers.weights(rows * cols, odd);
        court.case("decode_fixed12", &shape, |court| {
            let matrix = Matrix::encode(court.gpu, rows, cols, &words)?;
            let out = court.gpu.upload(&vec![u16::MAX; words.len()])?;
            matrix.decode(court.gpu, out.view())?;
            let found: Vec<u16> = out.view().read(words.len())?;
            court.same("decode_fixed12", &shape, &found, &words);
            Ok(())
        })?;
    }
    for count in [0usize, 4, 8, 90_000, 1 << 20] {
        let data: Vec<u32> = (0..count).map(|_| numbers.next() as u32).collect();
        let shape = format!("{count} words");
        court.case("read_all", &shape, |court| {
            let blocks = ceiling::blocks(court.gpu) as usize;
            let (input, out) = (court.gpu.upload(&data)?, court.gpu.allocate(4 * blocks)?);
            ceiling::read_all(court.gpu, input.view(), out.view())?;
            let found = out.view().read::<u32>(blocks)?.into_iter().fold(0, |a, b| a ^ b);
            court.same("read_all", &shape, &[found], &[data.iter().fold(0, |a, b| a ^ b)]);
            Ok::<(), Error>(())
        })?;
    }
    Ok(())
}
