//! planes: round trips at every width, the transposes against their references, and refusals.

#![allow(clippy::unwrap_used, reason = "clippy's allowance for tests stops at their own functions")]

use llmpress_entropy::Error;
use llmpress_entropy::planes::*;
use llmpress_numbers::Numbers;
use proptest::prelude::*;

fn round_trip(level: i32, width: usize, rotate: bool, bytes: &[u8]) -> (Vec<u8>, Vec<u32>) {
    let (mut data, mut lengths) = (vec![], vec![]);
    Encoder::new(level).encode_chunk(width, rotate, bytes, &mut data, &mut lengths).unwrap();
    assert_eq!(lengths.len(), width);
    assert_eq!(data.len(), lengths.iter().sum::<u32>() as usize);
    assert!(data.len() <= bytes.len());
    let mut out = vec![0xaa; bytes.len()];
    Decoder::new().decode_chunk(width, rotate, &lengths, &data, &mut out).unwrap();
    assert_eq!(out, bytes);
    (data, lengths)
}

fn noise(n: usize) -> impl Iterator<Item = u64> {
    let mut numbers = Numbers::new(1);
    std::iter::repeat_with(move || numbers.bits()).take(n)
}

fn width() -> impl Strategy<Value = usize> {
    prop::sample::select(vec![1, 2, 4, 8])
}

/// Bytes with some structure: few distinct values, or any.
fn chunk() -> impl Strategy<Value = (usize, Vec<u8>)> {
    (width(), 1..=255_u8).prop_flat_map(|(width, distinct)| {
        (Just(width), prop::collection::vec(0..=distinct, 0..400 * width)).prop_map(|(width, mut bytes)| {
            bytes.truncate(bytes.len() / width * width);
            (width, bytes)
        })
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn transposes_equal_their_references((width, bytes) in chunk(), rotate in any::<bool>()) {
        let (mut fast, mut slow) = (vec![0; bytes.len()], vec![0; bytes.len()]);
        split(width, rotate, &bytes, &mut fast);
        split_reference(width, rotate, &bytes, &mut slow);
        prop_assert_eq!(&fast, &slow);
        let elements = bytes.len() / width;
        let planes: Vec<&[u8]> = (0..width).map(|plane| &fast[plane * elements..][..elements]).collect();
        let (mut out, mut out_slow) = (vec![0; bytes.len()], vec![0; bytes.len()]);
        join(rotate, &planes, &mut out);
        join_reference(rotate, &planes, &mut out_slow);
        prop_assert_eq!(&out, &bytes);
        prop_assert_eq!(&out_slow, &bytes);
    }

    #[test]
    fn chunks_round_trip((width, bytes) in chunk(), rotate in any::<bool>(), level in -2..6_i32) {
        round_trip(level, width, rotate, &bytes);
    }

    #[test]
    fn arbitrary_bytes_decode_or_are_corrupt(
        width in width(), rotate in any::<bool>(), data in prop::collection::vec(any::<u8>(), 0..300),
        cuts in prop::array::uniform8(any::<prop::sample::Index>()), elements in 0..60_usize, exact in any::<bool>(),
    ) {
        // Either lengths that sum to the data, or any.
        let mut cuts: Vec<usize> = cuts[1..width].iter().map(|cut| cut.index(data.len() + 1)).collect();
        cuts.push(data.len());
        if exact {
            cuts.sort_unstable();
        }
        let lengths: Vec<u32> = cuts.iter().scan(0, |last, &cut| {
            let length = cut.saturating_sub(*last) as u32;
            *last = cut;
            Some(length)
        }).collect();
        let mut out = vec![0; elements * width];
        match Decoder::new().decode_chunk(width, rotate, &lengths, &data, &mut out) {
            Ok(()) => prop_assert_eq!(data.len(), lengths.iter().sum::<u32>() as usize),
            Err(error) => prop_assert!(matches!(error, Error::Corrupt { .. }), "{error}"),
        }
    }

    /// Real frames with a byte changed, cut short, or decoded to another size.
    #[test]
    fn damaged_chunks_decode_or_are_corrupt(
        (width, bytes) in chunk(), at in any::<prop::sample::Index>(), change in 1..=255_u8, how in 0..3_u8,
    ) {
        let (mut data, mut lengths) = round_trip(1, width, true, &bytes);
        let mut out = vec![0; bytes.len()];
        match how {
            0 if !data.is_empty() => {
                let at = at.index(data.len());
                data[at] ^= change;
            }
            1 if lengths[width - 1] > 0 => {
                lengths[width - 1] -= 1;
                data.pop();
            }
            _ => out.resize(bytes.len() + width * (usize::from(change) % 3), 0),
        }
        if let Err(error) = Decoder::new().decode_chunk(width, true, &lengths, &data, &mut out) {
            prop_assert!(matches!(error, Error::Corrupt { .. }), "{error}");
        }
    }
}

#[test]
fn planes_run_from_the_least_significant_byte_and_hold_no_sign_above() {
    // Both signs of an F32: rotated, the exponent's byte is 0x7f and the sign the lowest bit of all.
    let bytes: Vec<u8> = [1.0_f32, -1.0, 1.5].into_iter().flat_map(f32::to_le_bytes).collect();
    let mut planes = [0; 12];
    split(4, true, &bytes, &mut planes);
    assert_eq!(planes, [0, 1, 0, 0, 0, 0, 0, 0, 0x80, 0x7f, 0x7f, 0x7f]);
    split(4, false, &bytes, &mut planes);
    assert_eq!(planes, [0, 0, 0, 0, 0, 0, 0x80, 0x80, 0xc0, 0x3f, 0xbf, 0x3f]);
}

#[test]
fn whole_chunks_round_trip_and_noise_is_stored() {
    for width in [1, 2, 4, 8] {
        let bytes: Vec<u8> = noise(CHUNK_ELEMENTS * width / 8).flat_map(u64::to_le_bytes).collect();
        for level in [1, 3] {
            let (data, lengths) = round_trip(level, width, true, &bytes);
            assert!(lengths.iter().all(|&length| length as usize == CHUNK_ELEMENTS));
            assert_eq!(data.len(), bytes.len());
        }
    }
}

#[test]
fn structure_is_found_at_the_default_level() {
    let encoded = |width, rotate, bytes: &[u8]| round_trip(DEFAULT_LEVEL, width, rotate, bytes).0.len();
    // BF16 kept as F32: two planes of zeros, but for the sign.
    let widened: Vec<u8> = noise(1 << 16).flat_map(|x| (x as u32 & 0xbfff_0000).to_le_bytes()).collect();
    assert!(encoded(4, false, &widened) < widened.len() * 51 / 100);
    // Positions 0, 1, 2, ...: each plane repeats or is constant.
    let positions: Vec<u8> = (0..1_u64 << 16).flat_map(u64::to_le_bytes).collect();
    assert!(encoded(8, false, &positions) < positions.len() / 100);
    assert!(encoded(2, true, &vec![0; 1 << 18]) < 200);
}

#[test]
fn an_encoder_and_a_decoder_serve_chunks_of_any_kind_in_turn() {
    let (mut encoder, mut decoder) = (Encoder::new(3), Decoder::new());
    for (width, elements) in [(8, 1000), (1, 0), (2, 5000), (4, 1), (8, 3), (2, 1 << 18), (1, 77)] {
        let bytes: Vec<u8> = noise(width * elements).map(|x| (x % 11) as u8).collect();
        let (mut data, mut lengths) = (vec![], vec![]);
        encoder.encode_chunk(width, false, &bytes, &mut data, &mut lengths).unwrap();
        let mut out = vec![0; bytes.len()];
        decoder.decode_chunk(width, false, &lengths, &data, &mut out).unwrap();
        assert_eq!(out, bytes);
    }
}

#[test]
fn two_frames_and_trailing_bytes_are_corrupt() {
    let (frame, _) = round_trip(1, 1, false, &[7; 500]);
    let decode = |data: &[u8], n: usize| {
        Decoder::new().decode_chunk(1, false, &[data.len() as u32], data, &mut vec![0; n])
    };
    assert_eq!(decode(&frame, 500), Ok(()));
    let twice = [&frame[..], &frame].concat();
    for (data, n) in [(&twice[..], 1000), (&twice, 500), (&frame, 499), (&frame, 501), (&[], 500)] {
        assert!(matches!(decode(data, n), Err(Error::Corrupt { .. })), "{} bytes to {n}", data.len());
    }
    let more = Decoder::new().decode_chunk(1, false, &[3], &[1, 2, 3, 4], &mut [0; 3]);
    assert!(matches!(more, Err(Error::Corrupt { .. })));
}

#[test]
fn caller_mistakes_are_invalid() {
    let (mut data, mut lengths) = (vec![], vec![]);
    let long = vec![0; 2 * CHUNK_ELEMENTS + 2];
    for (width, bytes) in [(0, &[0; 6][..]), (3, &[0; 6]), (4, &[0; 6]), (16, &[0; 16]), (2, &long)] {
        let result = Encoder::new(1).encode_chunk(width, true, bytes, &mut data, &mut lengths);
        assert!(matches!(result, Err(Error::Invalid(_))));
        let result = Decoder::new().decode_chunk(width, true, &vec![0; width], &[], &mut bytes.to_vec());
        assert!(matches!(result, Err(Error::Invalid(_))));
    }
    let result = Decoder::new().decode_chunk(2, true, &[0], &[], &mut []);
    assert!(matches!(result, Err(Error::Invalid(_))));
}
