//! fixed12: the layout as the kernels read it, round trips, and refusals.

#![allow(clippy::unwrap_used, reason = "clippy's allowance for tests stops at their own functions")]

use llmpress_entropy::Error;
use llmpress_entropy::fixed12::*;
use llmpress_numbers::Numbers;
use proptest::prelude::*;

/// The escape offsets that a whole file would hold, from `start` on.
fn offsets(counts: &[u32], start: u32) -> Vec<u32> {
    let mut offsets = vec![start];
    let mut sum = start;
    for count in counts {
        sum += count;
        offsets.push(sum);
    }
    offsets
}

fn as_ref<'a>(strips: &'a Strips, offsets: &'a [u32]) -> StripsRef<'a> {
    StripsRef {
        sign_mantissa: &strips.sign_mantissa,
        codes: &strips.codes,
        escape_offsets: offsets,
        escape_positions: &strips.escape_positions,
        escape_exponents: &strips.escape_exponents,
    }
}

/// Encodes both ways, compares, decodes both ways, compares; returns the strips.
fn round_trip(base: i16, cols: usize, words: &[u16]) -> Strips {
    let (mut fast, mut slow) = (Strips::default(), Strips::default());
    encode_strips(base, cols, words, &mut fast).unwrap();
    encode_strips_reference(base, cols, words, &mut slow).unwrap();
    assert_eq!(fast, slow);
    let rows = words.len().checked_div(cols).unwrap_or(0);
    let grid = Grid::new(rows as u64, cols as u64).unwrap();
    assert_eq!(fast.sign_mantissa.len() as u64, grid.sign_mantissa_bytes());
    assert_eq!(fast.codes.len() as u64, grid.codes_bytes());
    let offsets = offsets(&fast.escape_counts, 3);
    assert_eq!(offsets.len() as u64 * 4, grid.escape_offsets_bytes());
    let mut out = vec![0xdead; words.len()];
    decode_strips(base, cols, rows, &as_ref(&fast, &offsets), &mut out).unwrap();
    assert_eq!(out, words);
    out.fill(0xdead);
    decode_strips_reference(base, cols, rows, &as_ref(&fast, &offsets), &mut out).unwrap();
    assert_eq!(out, words);
    fast
}

fn best(words: &[u16]) -> Window {
    let mut histogram = Histogram::new();
    histogram.add(words);
    histogram.best_window()
}

/// Words like trained weights with a few strays.
fn weight() -> impl Strategy<Value = u16> {
    (any::<u16>(), 0..200_u8, 0..12_u16).prop_map(|(bits, stray, exponent)| match stray {
        0 => bits,
        1 => [0, 0x8000, 1, 0x8001, 0x7f80, 0xff80, 0x7fc1, 0xffff][usize::from(bits % 8)],
        _ => bits & 0x807f | (112 + exponent) << 7,
    })
}

fn matrix(word: impl Strategy<Value = u16> + 'static) -> impl Strategy<Value = (usize, Vec<u16>)> {
    let word = word.boxed();
    (0..41_usize, 1..201_usize)
        .prop_flat_map(move |(rows, cols)| (Just(cols), prop::collection::vec(word.clone(), rows * cols)))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn weights_round_trip((cols, words) in matrix(weight())) {
        let window = best(&words);
        let strips = round_trip(window.base, cols, &words);
        prop_assert_eq!(strips.escape_positions.len() as u64, window.escapes);
    }

    #[test]
    fn any_words_round_trip_under_any_base((cols, words) in matrix(any::<u16>()), base in MIN_BASE..=MAX_BASE) {
        round_trip(base, cols, &words);
    }

    #[test]
    fn strips_encode_alike_alone_and_together((cols, words) in matrix(weight())) {
        let base = best(&words).base;
        let mut whole = Strips::default();
        encode_strips(base, cols, &words, &mut whole).unwrap();
        let (mut joined, mut piece) = (Strips::default(), Strips::default());
        for words in words.chunks(cols * TILE_ROWS) {
            encode_strips(base, cols, words, &mut piece).unwrap();
            joined.sign_mantissa.extend(&piece.sign_mantissa);
            joined.codes.extend(&piece.codes);
            joined.escape_counts.extend(&piece.escape_counts);
            joined.escape_positions.extend(&piece.escape_positions);
            joined.escape_exponents.extend(&piece.escape_exponents);
        }
        prop_assert_eq!(whole, joined);
    }

    /// Every encoding is the only one of its matrix: a changed byte is refused or changes the weights.
    #[test]
    fn a_changed_byte_never_goes_unseen(
        (cols, words) in matrix(weight()), part in 0..5_u8, at in any::<prop::sample::Index>(), bit in 0..32_u32
    ) {
        let base = best(&words).base;
        let mut strips = Strips::default();
        encode_strips(base, cols, &words, &mut strips).unwrap();
        let mut offsets = offsets(&strips.escape_counts, 0);
        fn flip<T>(items: &mut [T], at: prop::sample::Index, change: impl Fn(&mut T)) {
            if !items.is_empty() {
                let at = at.index(items.len());
                change(&mut items[at]);
            }
        }
        match part {
            0 => flip(&mut strips.sign_mantissa, at, |x| *x ^= 1 << (bit % 8)),
            1 => flip(&mut strips.codes, at, |x| *x ^= 1 << (bit % 8)),
            2 => flip(&mut offsets, at, |x| *x ^= 1 << bit),
            3 => flip(&mut strips.escape_positions, at, |x| *x ^= 1 << (bit % 16)),
            _ => flip(&mut strips.escape_exponents, at, |x| *x ^= 1 << (bit % 8)),
        }
        let changed = match part {
            0 => !strips.sign_mantissa.is_empty(),
            1 => !strips.codes.is_empty(),
            // A lone offset has nothing to differ from.
            2 => offsets.len() > 1,
            3 | 4.. => !strips.escape_positions.is_empty(),
        };
        let rows = words.len() / cols;
        let (mut fast, mut slow) = (vec![0; words.len()], vec![0; words.len()]);
        let strips = as_ref(&strips, &offsets);
        let result = decode_strips(base, cols, rows, &strips, &mut fast);
        prop_assert_eq!(&result, &decode_strips_reference(base, cols, rows, &strips, &mut slow));
        match result {
            Ok(()) => {
                prop_assert_eq!(&fast, &slow);
                prop_assert_eq!(fast != words, changed);
            }
            Err(error) => prop_assert!(matches!(error, Error::Corrupt { .. }), "{error}"),
        }
    }

    /// Any bytes at all, of the right or of any length.
    #[test]
    fn arbitrary_strips_decode_or_are_corrupt(
        rows in 0..40_usize, cols in 0..140_usize, base in -3..245_i16, seed in any::<u64>(),
        cuts in prop::array::uniform5(prop::bool::weighted(0.1)), sorted in any::<bool>(), zero in any::<bool>(),
        escapes in 0..40_usize,
    ) {
        let mut numbers = Numbers::new(seed);
        let grid = Grid::new(rows as u64, cols as u64).unwrap();
        let mut random = |n: usize| (0..n).map(|_| numbers.bits()).collect::<Vec<_>>();
        let mask = if zero { 0 } else { 0xff };
        let bytes = |v: Vec<u64>| v.into_iter().map(|x| x as u8 & mask).collect::<Vec<_>>();
        let sign_mantissa = bytes(random((grid.sign_mantissa_bytes() as usize).saturating_sub(cuts[0].into())));
        let codes = bytes(random((grid.codes_bytes() as usize).saturating_sub(cuts[1].into())));
        let mut escape_offsets: Vec<u32> = random(grid.tiles() as usize + usize::from(!cuts[2]))
            .into_iter().map(|x| (x % (escapes as u64 + 1)) as u32).collect();
        if sorted {
            escape_offsets.sort_unstable();
            if let [first, .., last] = &mut escape_offsets[..] {
                *first = 0;
                *last = escapes as u32;
            }
        }
        let mut escape_positions: Vec<u16> = random(escapes + usize::from(cuts[3]))
            .into_iter().map(|x| (x % 1030) as u16).collect();
        if sorted {
            escape_positions.sort_unstable();
        }
        let escape_exponents: Vec<u8> = random(escapes + usize::from(cuts[4]))
            .into_iter().map(|x| x as u8).collect();
        let strips = StripsRef {
            sign_mantissa: &sign_mantissa, codes: &codes, escape_offsets: &escape_offsets,
            escape_positions: &escape_positions, escape_exponents: &escape_exponents,
        };
        let (mut fast, mut slow) = (vec![0; rows * cols], vec![0; rows * cols]);
        let result = decode_strips(base, cols, rows, &strips, &mut fast);
        prop_assert_eq!(&result, &decode_strips_reference(base, cols, rows, &strips, &mut slow));
        match result {
            Ok(()) => {
                prop_assert_eq!(&fast, &slow);
                if cols > 0 {
                    let mut again = Strips::default();
                    encode_strips(base, cols, &fast, &mut again).unwrap();
                    prop_assert_eq!(&again.codes, &codes);
                    prop_assert_eq!(&again.escape_positions, &escape_positions);
                }
            }
            Err(error) => prop_assert!(matches!(error, Error::Corrupt { .. }), "{error}"),
        }
    }
}

/// The tile as the kernels read it, spelled out from the lanes' side and not through the coder's indices.
#[test]
fn a_full_tile_lies_as_the_tensor_core_lanes_read_it() {
    const BASE: u16 = 100;
    // A different word everywhere, as far as 4,096 words under 16 codes go; two escapes.
    let mut words = [0_u16; 1024];
    for (i, word) in words.iter_mut().enumerate() {
        let (sign, mantissa, code) = ((i / 7 % 2) as u16, (i * 37 % 128) as u16, (i * 11 % 16) as u16);
        *word = sign << 15 | (BASE + code + sign) << 7 | mantissa;
    }
    words[3 * 64 + 50] = 0x7f81;
    words[12 * 64 + 9] = 0x8003;
    let mut strips = Strips::default();
    encode_strips(BASE as i16, 64, &words, &mut strips).unwrap();
    assert_eq!(strips.escape_counts, [2]);
    assert_eq!(strips.escape_positions, [3 * 64 + 50, 12 * 64 + 9]);
    assert_eq!(strips.escape_exponents, [0xff, 0]);

    let mut seen = [false; 1024];
    for lane in 0..32 {
        let (g, q) = (lane / 4, lane % 4);
        // Plane B is 32 lanes x four words: h0 row g, h0 row g + 8, h1 row g, h1 row g + 8.
        let quad: Vec<u32> = strips.codes[16 * lane..16 * lane + 16]
            .chunks(4)
            .map(|b| u32::from_le_bytes(b.try_into().unwrap()))
            .collect();
        for h in 0..2 {
            // Plane A is 2 halves x 32 lanes x 16 bytes: row g's eight bytes, then row g + 8's.
            let sixteen = &strips.sign_mantissa[512 * h + 16 * lane..][..16];
            for (which, row) in [g, g + 8].into_iter().enumerate() {
                let word = quad[2 * h + which];
                for j in 0..4 {
                    for (k, shift) in [(2 * j, 4 * j), (2 * j + 1, 16 + 4 * j)] {
                        let col = 32 * h + 8 * q + k;
                        let byte = u32::from(sixteen[8 * which + k]);
                        let code = word >> shift & 15;
                        // Three additions' worth of kernel: byte at bit 0, code and base at bit 7.
                        let sum = byte + (code << 7) + (u32::from(BASE) << 7);
                        let decoded = (sum | byte << 8 & 0x8000) as u16;
                        let right = words[64 * row + col];
                        if strips.escape_positions.contains(&((64 * row + col) as u16)) {
                            assert_eq!((decoded & 0x807f, code), (right & 0x807f, 0));
                        } else {
                            assert_eq!(decoded, right, "row {row} col {col}");
                        }
                        seen[64 * row + col] = true;
                    }
                }
            }
        }
    }
    assert!(seen.iter().all(|&seen| seen));
}

#[test]
fn tiles_run_left_to_right_then_down_and_padding_is_zero() {
    // 17 x 65: four tiles, of which only the first has no padding.
    let words = vec![0x3f81_u16; 17 * 65];
    let strips = round_trip(127, 65, &words);
    let ones = |tile: usize| strips.sign_mantissa[tile * 1024..][..1024].iter().filter(|&&b| b == 1).count();
    assert_eq!([ones(0), ones(1), ones(2), ones(3)], [1024, 16, 64, 1]);
    assert!(strips.codes.iter().all(|&b| b == 0));
}

#[test]
fn every_word_round_trips() {
    let words: Vec<u16> = (0..=u16::MAX).collect();
    for base in [0, 1, 111, 120, 127, 238, 239] {
        for cols in [256, 1000] {
            round_trip(base, cols, &words[..words.len() / cols * cols]);
        }
    }
}

#[test]
fn constants_and_nothing_round_trip() {
    for word in [0, 0x8000, 0x3f80, 0x7f80, 0xffff, 0x0001] {
        for (rows, cols) in [(0, 0), (0, 5), (1, 1), (16, 64), (31, 63), (33, 129)] {
            let words = vec![word; rows * cols];
            round_trip(best(&words).base, cols, &words);
        }
    }
}

#[test]
fn caller_mistakes_are_invalid() {
    let mut out = Strips::default();
    for encode in [encode_strips, encode_strips_reference] {
        assert!(matches!(encode(-1, 4, &[0; 8], &mut out), Err(Error::Invalid(_))));
        assert!(matches!(encode(240, 4, &[0; 8], &mut out), Err(Error::Invalid(_))));
        assert!(matches!(encode(0, 3, &[0; 8], &mut out), Err(Error::Invalid(_))));
        assert!(matches!(encode(0, 0, &[0; 8], &mut out), Err(Error::Invalid(_))));
    }
    encode_strips(0, 4, &[0; 8], &mut out).unwrap();
    let strips = as_ref(&out, &[0, 0]);
    assert!(matches!(decode_strips(0, 4, 2, &strips, &mut [0; 7]), Err(Error::Invalid(_))));
    assert!(matches!(decode_strips(240, 4, 2, &strips, &mut [0; 8]), Err(Error::Corrupt { .. })));
    assert!(matches!(decode_strips(0, 4, 20, &strips, &mut [0; 80]), Err(Error::Corrupt { .. })));
}

#[test]
fn grids_count_tiles_and_refuse_overflow() {
    let grid = Grid::new(17, 65).unwrap();
    assert_eq!(
        (grid.rows(), grid.cols(), grid.strips(), grid.tiles_across(), grid.tiles()),
        (17, 65, 2, 2, 4)
    );
    assert_eq!(
        (grid.sign_mantissa_bytes(), grid.codes_bytes(), grid.escape_offsets_bytes()),
        (4096, 2048, 20)
    );
    assert_eq!(Grid::new(0, 9).unwrap().tiles(), 0);
    assert_eq!(Grid::new(u64::MAX, 0).unwrap().tiles(), 0);
    assert_eq!(Grid::new(u64::MAX, 1), None);
    assert_eq!(Grid::new(1 << 33, 1 << 33), None);
}
