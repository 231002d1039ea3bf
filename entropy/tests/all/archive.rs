//! archive: round trips of every layout, the fast paths against their references byte for byte, and refusals.

#![allow(clippy::unwrap_used, reason = "clippy's allowance for tests stops at their own functions")]

use llmpress_entropy::Error;
use llmpress_entropy::archive::*;
use llmpress_numbers::Numbers;
use proptest::prelude::*;

/// A matrix's words with what is needed to decode them.
struct Encoded {
    choice: Choice,
    data: Vec<u8>,
}

fn surveyed(layout: Layout, cols: usize, words: &[u16]) -> Choice {
    let rows = words.len().checked_div(cols).unwrap_or(0);
    let scales = if cols > 0 && rows * cols == words.len() && Scales::may_pay(rows as u64, cols as u64) {
        let sample: Vec<u16> = sampled(words.len() as u64)
            .flat_map(|run| &words[run.start as usize..run.end as usize])
            .copied()
            .collect();
        let mut means = Means::of(layout, layout.floor(&sample), rows, cols);
        // In parts that end within rows.
        let parts: Vec<Means> =
            (0..).step_by(97).zip(words.chunks(97)).map(|(first, part)| means.part(first, part)).collect();
        parts.iter().for_each(|part| means.add(part));
        Scales::of(layout, &means)
    } else {
        Scales::default()
    };
    let mut histogram = Histogram::new(layout);
    for (first, part) in (0..).step_by(89).zip(words.chunks(89)) {
        let mut other = Histogram::new(layout);
        other.add(&scales, first, part);
        histogram.merge(&other);
    }
    let choice = histogram.choose(&scales).unwrap();
    if rows * cols == words.len() && rows * cols > 0 {
        let whole = Choice::of(layout, rows, cols, words).unwrap();
        assert!(whole.model == choice.model && whole.scales == choice.scales);
    }
    choice
}

fn encode(layout: Layout, cols: usize, words: &[u16]) -> Encoded {
    let choice = surveyed(layout, cols, words);
    let mut of_elements = Vec::new();
    classes(&choice.model, &choice.scales.rows, &choice.scales.cols, 0, words.len(), &mut of_elements)
        .unwrap();
    let mut data = Vec::new();
    let mut encoder = Encoder::new(&choice.model);
    encoder.encode_chunk(&of_elements, words, &mut data).unwrap();
    let mut slow = Vec::new();
    encoder.encode_chunk_reference(&of_elements, words, &mut slow).unwrap();
    assert!(data == slow, "{} elements", words.len());
    Encoded { choice, data }
}

fn parameters(model: &Model) -> Parameters {
    Parameters { low: model.low(), base: model.base(), shift: model.shift(), classes: model.classes() }
}

fn round_trip(layout: Layout, cols: usize, words: &[u16]) -> Encoded {
    let encoded = encode(layout, cols, words);
    let rows = words.len().checked_div(cols).unwrap_or(0);
    let Choice { model, scales, .. } = &encoded.choice;
    let mut of_elements = Vec::new();
    classes(model, &scales.rows, &scales.cols, 0, words.len(), &mut of_elements).unwrap();
    let decoder = Decoder::new(model);
    for decode in [Decoder::decode_chunk, Decoder::decode_chunk_reference] {
        let mut out = vec![0xaaaa; words.len()];
        decode(&decoder, &of_elements, &encoded.data, &mut out).unwrap();
        assert!(out == words, "{} elements", words.len());
    }
    let frame = model.pack(scales).unwrap();
    let (stored, stored_scales) = Model::unpack(parameters(model), rows, cols, &frame).unwrap();
    assert!(stored == *model && stored_scales == *scales);
    encoded
}

fn normal(numbers: &mut Numbers) -> f32 {
    let (a, b) = (1.0 - numbers.share(), numbers.share());
    (-2.0 * a.ln()).sqrt() * (std::f32::consts::TAU * b).cos()
}

/// Weights of a trained matrix: normal, rows and columns of different scales.
fn weights(rows: usize, cols: usize, spread: f32, seed: u64) -> Vec<u16> {
    let mut numbers = Numbers::new(seed);
    let mut scale =
        |n: usize| -> Vec<f32> { (0..n).map(|_| (spread * normal(&mut numbers)).exp2()).collect() };
    let (by_row, by_col) = (scale(rows), scale(cols));
    let mut words = Vec::with_capacity(rows * cols);
    for row in &by_row {
        for col in &by_col {
            words.push((((0.02 * row * col * normal(&mut numbers)).to_bits() + 0x8000) >> 16) as u16);
        }
    }
    words
}

fn bits_a_weight(encoded: &Encoded, weights: usize) -> f64 {
    encoded.data.len() as f64 * 8.0 / weights as f64
}

#[test]
fn scales_of_rows_and_columns_are_worth_their_bits() {
    let (rows, cols) = (384, 640);
    let even = round_trip(Layout::BF16, cols, &weights(rows, cols, 0.0, 1));
    let spread = round_trip(Layout::BF16, cols, &weights(rows, cols, 0.7, 1));
    assert_eq!(even.choice.model.classes(), 1);
    assert!(spread.choice.model.classes() > 1);
    let words = weights(rows, cols, 0.7, 1);
    let without = round_trip(Layout::BF16, 0, &words);
    let n = words.len();
    let (even, spread, without) =
        (bits_a_weight(&even, n), bits_a_weight(&spread, n), bits_a_weight(&without, n));
    assert!(spread < without - 0.1 && spread < even + 0.1, "{even} {spread} {without}");
    // Normal weights have 10.48 bits: 2.05 of the binary logarithm of their magnitude to the octave, 8 more, less what the mantissa's
    // first bits follow from the exponent.
    assert!(even < 10.55, "{even}");
}

#[test]
fn what_is_expected_is_what_comes_of_it() {
    let words = weights(256, 512, 0.5, 3);
    let encoded = round_trip(Layout::BF16, 512, &words);
    let expected = encoded.choice.expected_bits / 8.0;
    let found =
        (encoded.data.len() + encoded.choice.model.pack(&encoded.choice.scales).unwrap().len()) as f64;
    assert!((found / expected - 1.0).abs() < 0.08, "{found} {expected}");
}

#[test]
fn every_word_of_every_layout_survives() {
    let all: Vec<u16> = (0..=u16::MAX).collect();
    for (layout, cols) in [(Layout::BF16, 256), (Layout::F16, 512), (Layout::BF16, 0), (Layout::F16, 0)] {
        round_trip(layout, cols, &all);
    }
    let bytes: Vec<u8> = (0..=255).cycle().take(256 * 300).collect();
    let mut words = Vec::new();
    widen(&bytes, &mut words);
    for layout in [Layout::F8_E4M3, Layout::F8_E5M2] {
        round_trip(layout, 256, &words);
    }
    let mut back = vec![0; bytes.len()];
    narrow(&words, &mut back);
    assert_eq!(back, bytes);
}

#[test]
fn odd_sizes_and_constants_survive() {
    for n in [1, 2, 7, 8, 9, 31, 32, 33, 63, 64, 65, 71, 72, 73, 1000, 4097] {
        round_trip(Layout::BF16, 0, &weights(1, n, 0.0, n as u64));
        round_trip(Layout::BF16, 0, &vec![0x3f80; n]);
        round_trip(Layout::F16, 0, &vec![0; n]);
        round_trip(Layout::BF16, 0, &vec![0xffff; n]);
    }
    // One value in a million of another kind: an escape.
    let mut words = vec![0x3f80; CHUNK_ELEMENTS];
    words[CHUNK_ELEMENTS / 2] = 0x0012;
    words[CHUNK_ELEMENTS - 1] = 0xff80;
    let encoded = round_trip(Layout::BF16, 512, &words);
    assert!(encoded.data.len() < CHUNK_ELEMENTS * 9 / 8 + 1000, "{}", encoded.data.len());
    let (model, mut nothing) = (&encoded.choice.model, Vec::new());
    Encoder::new(model).encode_chunk(&[], &[], &mut nothing).unwrap();
    Decoder::new(model).decode_chunk(&[], &nothing, &mut []).unwrap();
}

#[test]
fn arguments_that_do_not_fit_are_refused() {
    let words = weights(64, 64, 1.0, 5);
    let encoded = encode(Layout::BF16, 64, &words);
    let model = &encoded.choice.model;
    assert!(model.classes() > 1);
    let (mut out, decoder) = (vec![0; words.len()], Decoder::new(model));
    let refused = |result: Result<(), Error>| matches!(result, Err(Error::Invalid(_)));
    assert!(refused(decoder.decode_chunk(&[], &encoded.data, &mut out)));
    assert!(refused(decoder.decode_chunk(&vec![200; words.len()], &encoded.data, &mut out)));
    let mut encoder = Encoder::new(model);
    assert!(refused(encoder.encode_chunk(&[], &words, &mut Vec::new())));
    assert!(refused(encoder.encode_chunk(&[], &vec![0; CHUNK_ELEMENTS + 1], &mut Vec::new())));
    assert!(refused(encoder.encode_chunk(&vec![99; words.len()], &words, &mut Vec::new())));
    let mut of_elements = Vec::new();
    let Scales { rows, cols } = &encoded.choice.scales;
    assert!(refused(classes(model, rows, cols, 64 * 64 - 3, 4, &mut of_elements)));
    assert!(refused(classes(model, rows, &[], 0, 4, &mut of_elements)));
    let table = |frequencies: [u16; SYMBOLS]| Model::new(5, 400, 0, vec![frequencies]);
    let mut one = [0; SYMBOLS];
    one[1] = 4096;
    assert!(table(one).is_ok());
    one[1] = 4095;
    assert!(table(one).unwrap_err().to_string().contains("sum to 4095"));
    one[1] = 4096;
    assert!(Model::new(13, 0, 0, vec![one]).is_err() && Model::new(5, 0, 8, vec![one]).is_err());
    assert!(Model::new(7, 256, 0, vec![one]).is_err() && Model::new(5, 0, 0, vec![one; 17]).is_err());
    assert!(Model::new(5, 0, 0, vec![]).is_err());
    // A frame of other sizes, of more classes, and bytes that are no frame.
    let frame = model.pack(&encoded.choice.scales).unwrap();
    let unpack = |parameters, rows, frame: &[u8]| Model::unpack(parameters, rows, 64, frame);
    assert!(unpack(parameters(model), 64, &frame).is_ok() && unpack(parameters(model), 65, &frame).is_err());
    assert!(unpack(parameters(model), 64, &frame[1..]).is_err());
    for classes in [0, 1, 17] {
        assert!(unpack(Parameters { classes, ..parameters(model) }, 64, &frame).is_err());
    }
    // Without an escape in the model, what has no symbol cannot be encoded.
    assert!(refused(Encoder::new(&table(one).unwrap()).encode_chunk(&[], &[0x4000], &mut Vec::new())));
}

fn words() -> impl Strategy<Value = (Layout, usize, Vec<u16>)> {
    let layout = prop::sample::select(vec![Layout::BF16, Layout::F16]);
    let kind = prop_oneof![Just(0xffff_u16), Just(0x81ff), Just(0x3f83), Just(0x8003)];
    (layout, kind, 0..90_usize, 0..40_usize, any::<u64>()).prop_map(|(layout, kind, rows, cols, seed)| {
        let mut numbers = Numbers::new(seed);
        let mut words: Vec<u16> =
            (0..rows * cols).map(|_| numbers.bits() as u16 & kind | 0x3c00 & !kind).collect();
        words.truncate(rows * cols);
        (layout, cols, words)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn chunks_round_trip((layout, cols, words) in words()) {
        prop_assume!(!words.is_empty());
        round_trip(layout, cols, &words);
    }

    #[test]
    fn damaged_chunks_decode_alike_or_are_corrupt(
        (layout, cols, words) in words(), at in any::<prop::sample::Index>(), change in 1..=255_u8, how in 0..4_u8,
    ) {
        prop_assume!(!words.is_empty());
        let mut encoded = encode(layout, cols, &words);
        let mut out = vec![0; words.len()];
        let n = encoded.data.len();
        match how {
            0 => encoded.data[at.index(n)] ^= change,
            1 => encoded.data.truncate(at.index(n)),
            2 => encoded.data.extend(std::iter::repeat_n(change, usize::from(change))),
            _ => encoded.data[at.index(8)] ^= change,
        }
        let Choice { model, scales, .. } = &encoded.choice;
        let mut of_elements = Vec::new();
        classes(model, &scales.rows, &scales.cols, 0, words.len(), &mut of_elements).unwrap();
        let decoder = Decoder::new(model);
        let fast = decoder.decode_chunk(&of_elements, &encoded.data, &mut out);
        let mut slow_out = vec![0; words.len()];
        let slow = decoder.decode_chunk_reference(&of_elements, &encoded.data, &mut slow_out);
        prop_assert_eq!(fast.is_ok(), slow.is_ok());
        match fast {
            Ok(()) => prop_assert_eq!(out, slow_out),
            Err(error) => prop_assert!(matches!(error, Error::Corrupt { .. }), "{error}"),
        }
    }
}

/// Words through the coder of differences and back, by both of its paths. Gives the bytes that they take.
fn through_base(layout: Layout, base: &[u16], words: &[u16]) -> usize {
    let DifferenceChoice { model, top, .. } = DifferenceChoice::of(layout, base, words).unwrap();
    let (mut of_elements, mut found) = (Vec::new(), Vec::new());
    classes_of_base(layout, top, model.classes(), base, &mut of_elements);
    differences(base, words, &mut found).unwrap();
    let (mut data, mut slow) = (Vec::new(), Vec::new());
    let mut encoder = Encoder::new(&model);
    encoder.encode_chunk(&of_elements, &found, &mut data).unwrap();
    encoder.encode_chunk_reference(&of_elements, &found, &mut slow).unwrap();
    assert!(data == slow, "{} elements", words.len());
    let frame = model.pack(&Scales::default()).unwrap();
    let stored = Model::unpack_without_sign(model.low(), model.classes(), &frame).unwrap();
    assert!(stored == model);
    let decoder = Decoder::new(&stored);
    for decode in [Decoder::decode_chunk, Decoder::decode_chunk_reference] {
        let mut out = vec![0xaaaa; words.len()];
        decode(&decoder, &of_elements, &data, &mut out).unwrap();
        add_to_base(base, &mut out).unwrap();
        assert!(out == words, "{} elements", words.len());
    }
    data.len() + frame.len()
}

/// Weights and what an update of such a size makes of them.
fn fine_tune(count: usize, update: f32, seed: u64) -> (Vec<u16>, Vec<u16>) {
    let mut numbers = Numbers::new(seed);
    let word = |value: f32| (value.to_bits().wrapping_add(0x8000) >> 16) as u16;
    let base: Vec<u16> = (0..count).map(|_| word(0.02 * normal(&mut numbers))).collect();
    let tuned = base
        .iter()
        .map(|&base| word(f32::from_bits(u32::from(base) << 16) + 0.02 * update * normal(&mut numbers)));
    let tuned = tuned.collect();
    (base, tuned)
}

#[test]
fn small_updates_take_few_bits_and_none_almost_nothing() {
    let count = 1 << 18;
    let mut last = 0.0;
    for (update, most) in [(0.0, 0.03), (0.001, 1.4), (0.01, 4.2), (0.1, 7.7)] {
        let (base, words) = fine_tune(count, update, 5);
        let bits = through_base(Layout::BF16, &base, &words) as f64 * 8.0 / count as f64;
        assert!(last < bits && bits < most, "{update}: {bits}");
        last = bits;
    }
}

#[test]
fn every_difference_of_every_layout_survives() {
    let all: Vec<u16> = (0..=u16::MAX).collect();
    for layout in [Layout::BF16, Layout::F16] {
        for base in [0, 1, 0x7f80, 0x7fff, 0x8000, 0xffff] {
            through_base(layout, &vec![base; all.len()], &all);
            through_base(layout, &all, &vec![base; all.len()]);
        }
        let mut shuffled = all.clone();
        let mut random = Numbers::new(7);
        for i in (1..shuffled.len()).rev() {
            shuffled.swap(i, random.below(i + 1));
        }
        through_base(layout, &all, &shuffled);
        through_base(layout, &all, &all);
    }
    let bytes = |step: usize| -> Vec<u8> { (0..256 * 256).map(|i| (i / step) as u8).collect() };
    let (mut base, mut words) = (Vec::new(), Vec::new());
    widen(&bytes(1), &mut base);
    widen(&bytes(256), &mut words);
    for layout in [Layout::F8_E4M3, Layout::F8_E5M2] {
        through_base(layout, &base, &words);
    }
}

#[test]
fn differences_of_what_does_not_fit_are_refused() {
    let (base, words) = fine_tune(100, 0.01, 9);
    assert!(matches!(DifferenceChoice::of(Layout::BF16, &base[1..], &words), Err(Error::Invalid(_))));
    assert!(matches!(DifferenceChoice::of(Layout::BF16, &[], &[]), Err(Error::Invalid(_))));
    assert!(matches!(differences(&base[1..], &words, &mut Vec::new()), Err(Error::Invalid(_))));
    assert!(matches!(add_to_base(&base, &mut [0; 99]), Err(Error::Invalid(_))));
    let model = DifferenceChoice::of(Layout::BF16, &base, &words).unwrap().model;
    let frame = model.pack(&Scales::default()).unwrap();
    for (low, classes) in [(8, model.classes()), (0, model.classes() + 1), (0, 0), (0, 17)] {
        let refused = Model::unpack_without_sign(low, classes, &frame);
        assert!(matches!(refused, Err(Error::Corrupt { .. })), "{low} {classes}: {refused:?}");
    }
    for cut in 0..frame.len() {
        assert!(Model::unpack_without_sign(model.low(), model.classes(), &frame[..cut]).is_err());
    }
}

proptest! {
    #[test]
    fn any_words_over_any_base_survive(
        pairs in proptest::collection::vec((any::<u16>(), any::<u16>(), any::<bool>()), 1..700),
        f16 in any::<bool>(),
    ) {
        let base: Vec<u16> = pairs.iter().map(|pair| pair.0).collect();
        // Half of them near, the others anywhere: NaN, infinities and both zeros among them.
        let words: Vec<u16> =
            pairs.iter().map(|&(base, word, near)| if near { base.wrapping_add(word % 8) } else { word }).collect();
        through_base(if f16 { Layout::F16 } else { Layout::BF16 }, &base, &words);
    }
}
