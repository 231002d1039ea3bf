//! DFloat11: the fast paths against their scalar twins, pieces against the whole, hostile bytes.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use llmpress_entropy::dfloat11::{
    Assembler, Code, EncodedUnit, Histogram, Layout, Piece, Position, Sections, Span, Unrepresentable,
    decode_span, decode_span_reference, encode, encode_piece, encode_piece_reference, encode_reference,
};
use llmpress_numbers::Numbers;
use proptest::prelude::*;

fn random(seed: u64) -> impl FnMut() -> u64 {
    let mut numbers = Numbers::new(seed);
    move || numbers.bits()
}

/// Words whose exponents fall off by about half a step, as trained weights do, or by `skew`.
fn weights(seed: u64, count: usize, symbols: u32, skew: u32) -> Vec<u16> {
    let mut next = random(seed);
    (0..count)
        .map(|_| {
            let r = next();
            let step = ((r >> 20).leading_zeros() - 20) * skew + (r >> 60) as u32 % 2;
            let exponent = 127 - (step % symbols.max(1)).min(126) as u16;
            (r as u16 & 0x807f) | exponent << 7
        })
        .collect()
}

fn span(unit: &EncodedUnit) -> Span<'_> {
    Span {
        encoded_exponent: &unit.encoded_exponent,
        gaps: &unit.gaps,
        output_positions: &unit.output_positions,
        sign_mantissa: &unit.sign_mantissa,
    }
}

/// Encodes by both ways, decodes by both, wholly and from `skip`.
fn check(words: &[u16], skip: usize) {
    let unit = match (encode(words), encode_reference(words)) {
        (Ok(fast), Ok(reference)) => {
            // By component: a failure would print megabytes otherwise.
            assert!(fast.luts == reference.luts, "luts");
            assert!(fast.encoded_exponent == reference.encoded_exponent, "encoded_exponent");
            assert!(fast.sign_mantissa == reference.sign_mantissa, "sign_mantissa");
            assert!(fast.output_positions == reference.output_positions, "output_positions");
            assert!(fast.gaps == reference.gaps, "gaps");
            fast
        }
        (fast, reference) => {
            assert_eq!(fast.unwrap_err(), reference.unwrap_err());
            return;
        }
    };
    let code = Code::from_luts(&unit.luts).unwrap();
    let mut out = vec![0; words.len()];
    decode_span(&code, &span(&unit), 0, &mut out).unwrap();
    assert!(out == words);
    out.fill(0);
    decode_span_reference(&code, &span(&unit), 0, &mut out).unwrap();
    assert!(out == words);
    let skip = skip % words.len();
    let mut tail = vec![0; (words.len() - skip).div_ceil(2)];
    decode_span(&code, &span(&unit), skip, &mut tail).unwrap();
    assert!(tail == words[skip..skip + tail.len()]);
}

#[test]
fn sizes_from_one_to_several_blocks_round_trip() {
    for count in (1..130).chain([1000, 4095, 4096, 4097, 12_000, 13_000, 65_536, 150_001]) {
        check(&weights(count as u64, count, 40, 1), count / 3);
    }
}

#[test]
fn an_empty_unit_is_refused() {
    assert_eq!(encode(&[]), Err(Unrepresentable::Empty));
    assert_eq!(encode_reference(&[]), Err(Unrepresentable::Empty));
}

#[test]
fn exponents_that_the_tables_take_for_pointers_are_refused() {
    let all: Vec<u16> = (0..=u16::MAX).collect();
    assert_eq!(encode(&all), Err(Unrepresentable::Exponent(255)));
    for word in [0x7f80, 0xff80, 0x7fc1, 0x7800] {
        let mut words = weights(1, 5000, 40, 1);
        words.push(word);
        assert!(matches!(encode(&words), Err(Unrepresentable::Exponent(240..))), "{word:x}");
    }
    // All words below them, signs, denormals and zeros included.
    let below: Vec<u16> = all.into_iter().filter(|w| w >> 7 & 0xff < 240).collect();
    check(&below, 7);
}

#[test]
fn constant_units_and_small_alphabets_encode_or_are_refused_alike() {
    for symbols in 1..=60 {
        for count in [1, 2, 7, 100, 5000] {
            check(&weights(u64::from(symbols), count, symbols, 1), count / 2);
        }
    }
    check(&[0x3f80; 9000], 0);
    assert_eq!(encode(&[0x3f80; 9000]), Err(Unrepresentable::NoFirstEntry));
}

/// Exponents with Fibonacci counts: the tree is a chain, and codes grow by one bit a symbol.
fn fibonacci(symbols: u16) -> Vec<u16> {
    let (mut a, mut b) = (1usize, 1usize);
    let mut words = Vec::new();
    for symbol in 0..symbols {
        words.extend((0..a).map(|i| (100 + symbol) << 7 | (i as u16 & 0x7f)));
        (a, b) = (b, a + b);
    }
    words
}

#[test]
fn long_codes_decode_and_the_limit_of_32_bits_holds() {
    let mut next = random(5);
    for symbols in [10, 18, 24] {
        let mut words = fibonacci(symbols);
        for i in (1..words.len()).rev() {
            words.swap(i, next() as usize % (i + 1));
        }
        check(&words, 11);
    }
    // Counts alone show the limit: no need for the hundred million words.
    let mut counts = [0u64; 40];
    let (mut a, mut b) = (2u64, 3u64);
    for count in &mut counts {
        *count = a;
        (a, b) = (b, a + b);
    }
    let mut all = [0; 256];
    all[100..140].copy_from_slice(&counts);
    let histogram = Histogram::from_counts(all);
    if let Ok(code) = Code::build(&histogram) {
        assert_eq!(code.lengths().iter().max(), Some(&32));
    }
}

#[test]
fn streams_that_end_on_and_across_every_edge_round_trip() {
    let words = weights(3, 14_000, 40, 1);
    for count in 12_000..12_600 {
        let unit = encode(&words[..count]).unwrap();
        let code = Code::from_luts(&unit.luts).unwrap();
        let mut out = vec![0; count];
        decode_span(&code, &span(&unit), 0, &mut out).unwrap();
        assert!(out == words[..count]);
    }
    for count in 1..400 {
        check(&words[..count], 0);
    }
}

#[test]
fn a_last_window_without_a_code_has_no_gap_and_decodes() {
    // Units whose last code, a long one, crosses into a new window and ends on a byte.
    let words = weights(8, 4000, 30, 1);
    let mut seen = 0;
    for count in 1000..4000 {
        let mut words = words[..count].to_vec();
        words.push(50 << 7);
        let mut histogram = Histogram::new();
        histogram.add(&words);
        let Ok(code) = Code::build(&histogram) else { continue };
        let layout = Layout::new(&code, &histogram).unwrap();
        let end = layout.bits % 64;
        if end == 0 || !end.is_multiple_of(8) || end >= u64::from(code.lengths()[50]) {
            continue;
        }
        let unit = encode(&words).unwrap();
        let first_bit = (layout.bits / 64) as usize * 5;
        let gap = (first_bit..first_bit + 5).fold(0, |g, i| g << 1 | (unit.gaps[i / 8] >> (7 - i % 8) & 1));
        assert_eq!(gap, 0, "no code starts there, not even the end symbol's");
        let mut out = vec![0; words.len()];
        decode_span(&Code::from_luts(&unit.luts).unwrap(), &span(&unit), 0, &mut out).unwrap();
        assert!(out == words);
        seen += 1;
    }
    assert!(seen > 10, "{seen}");
}

#[test]
fn a_changed_index_is_noticed() {
    let words = weights(9, 60_000, 40, 1);
    let unit = encode(&words).unwrap();
    let code = Code::from_luts(&unit.luts).unwrap();
    let mut out = vec![0; words.len()];
    let used_windows = unit.encoded_exponent.len() / 8;
    for window in (1..used_windows).step_by(97) {
        let mut changed = unit.clone();
        changed.gaps[(window * 5 + 4) / 8] ^= 0x80 >> ((window * 5 + 4) % 8);
        let error = decode_span(&code, &span(&changed), 0, &mut out).unwrap_err().to_string();
        assert!(
            error.contains("gaps") || error.contains("output_positions") || error.contains("no code"),
            "{error}"
        );
    }
    for entry in 1..unit.output_positions.len() / 4 - 1 {
        for delta in [1u32, u32::MAX] {
            let mut changed = unit.clone();
            let at = entry * 4..entry * 4 + 4;
            let value = u32::from_le_bytes(changed.output_positions[at.clone()].try_into().unwrap());
            changed.output_positions[at].copy_from_slice(&value.wrapping_add(delta).to_le_bytes());
            assert!(decode_span(&code, &span(&changed), 0, &mut out).is_err());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn fast_and_reference_agree(seed: u64, count in 1usize..40_000, symbols in 2u32..60, skew in 1u32..4, skip: usize) {
        check(&weights(seed, count, symbols, skew), skip);
    }

    #[test]
    fn pieces_join_to_the_whole(seed: u64, count in 1usize..60_000, cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6)) {
        let words = weights(seed, count, 40, 1);
        let Ok(whole) = encode(&words) else { return Ok(()) };
        let mut histogram = Histogram::new();
        histogram.add(&words);
        let code = Code::build(&histogram).unwrap();
        let layout = Layout::new(&code, &histogram).unwrap();
        let mut cuts: Vec<usize> = cuts.iter().map(|c| c.index(count)).chain([0, count]).collect();
        cuts.sort_unstable();
        let (mut assembler, mut sections) = (Assembler::new(&layout), Sections::default());
        let (mut at, mut piece, mut reference) = (Position::default(), Piece::default(), Piece::default());
        for pair in cuts.windows(2) {
            let part = &words[pair[0]..pair[1]];
            encode_piece(&code, at, part, &mut piece);
            encode_piece_reference(&code, at, part, &mut reference);
            prop_assert!(piece == reference);
            assembler.push(&piece, &mut sections);
            let mut histogram = Histogram::new();
            histogram.add(part);
            at.element += part.len() as u64;
            at.bit += code.encoded_bits(&histogram);
        }
        assembler.finish(&code, &mut sections).unwrap();
        prop_assert!(sections.encoded_exponent == whole.encoded_exponent);
        prop_assert!(sections.gaps == whole.gaps);
        prop_assert!(sections.output_positions == whole.output_positions);
    }

    #[test]
    fn runs_of_blocks_decode_alone(seed: u64, from in 0usize..8, to in 1usize..9, skip: usize) {
        let words = weights(seed, 110_000, 40, 1);
        let unit = encode(&words).unwrap();
        let blocks = unit.gaps.len() / 320;
        let (from, to) = (from.min(blocks - 1), to.clamp(from + 1, blocks).max(from.min(blocks - 1) + 1));
        let position = |i: usize| u32::from_le_bytes(unit.output_positions[4 * i..4 * i + 4].try_into().unwrap()) as usize;
        let end = (to * 4096 + 8).min(unit.encoded_exponent.len());
        let part = Span {
            encoded_exponent: &unit.encoded_exponent[from * 4096..end],
            gaps: &unit.gaps[from * 320..to * 320],
            output_positions: &unit.output_positions[from * 4..to * 4 + 4],
            sign_mantissa: &unit.sign_mantissa[position(from)..position(to)],
        };
        let symbols = position(to) - position(from);
        let skip = skip % symbols;
        let code = Code::from_luts(&unit.luts).unwrap();
        let mut out = vec![0; symbols - skip];
        decode_span(&code, &part, skip, &mut out).unwrap();
        prop_assert!(out[..] == words[position(from) + skip..position(to)]);
    }

    #[test]
    fn any_bytes_decode_alike_or_are_refused(
        seed: u64,
        flips in prop::collection::vec((0usize..4, any::<prop::sample::Index>(), any::<u8>()), 0..4),
    ) {
        let words = weights(seed, 30_000, 20, 1);
        let mut unit = encode(&words).unwrap();
        for (which, index, value) in flips {
            let component = match which {
                0 => &mut unit.encoded_exponent,
                1 => &mut unit.gaps,
                2 => &mut unit.output_positions,
                _ => &mut unit.luts,
            };
            let at = index.index(component.len());
            component[at] = value;
        }
        if let Ok(code) = Code::from_luts(&unit.luts) {
            let (mut fast, mut slow) = (vec![0; 30_000], vec![0; 30_000]);
            let a = decode_span(&code, &span(&unit), 0, &mut fast);
            let b = decode_span_reference(&code, &span(&unit), 0, &mut slow);
            prop_assert_eq!(a.is_ok(), b.is_ok(), "{:?} {:?}", a, b);
            if a.is_ok() {
                prop_assert!(fast == slow);
            }
        }
    }

    #[test]
    fn any_tables_are_read_or_refused(rows in 1usize..18, fill: u8, bytes in prop::collection::vec(any::<(u16, u8)>(), 0..40)) {
        let mut luts = vec![fill; rows * 256];
        for (at, value) in bytes {
            let len = luts.len();
            luts[usize::from(at) % len] = value;
        }
        let _ = Code::from_luts(&luts);
    }
}
