//! `sparse24` to the bit, whatever the weights and the range that is read, and what its reader refuses.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::collections::BTreeMap;

use crate::by_hand::{Raw, open, raw};
use llmpress_entropy::fixed12;
use llmpress_entropy::planes::{CHUNK_ELEMENTS, DEFAULT_LEVEL, Encoder};
use llmpress_formats::encoding::abq::{self, Abq, Floats, Zero};
use llmpress_formats::encoding::sparse24::{Inner, Kept, Packed, Sparse24, coded_positions, positions};
use llmpress_formats::{Dtype, Encoding};
use llmpress_numbers::Numbers;
use proptest::prelude::*;

const PLAIN: Encoding = Encoding::Sparse24(Sparse24 { values: None });
const NIBBLES: [u8; 6] = [4, 8, 9, 12, 13, 14];

fn noise(seed: u64) -> impl Iterator<Item = u64> {
    let mut numbers = Numbers::new(seed);
    std::iter::repeat_with(move || numbers.bits() >> 8)
}

fn width(dtype: Dtype) -> usize {
    dtype.bits() as usize / 8
}

/// Elements with all that is awkward among them: zeros of both signs, no numbers, infinities, denormal ones.
fn element(dtype: Dtype, x: u64) -> Vec<u8> {
    let bits = match (x % 11, dtype) {
        (0 | 1, _) => 0,
        (2, Dtype::F32) => 1 << 31,
        (2, _) => 1 << 15,
        (3, Dtype::F32) => 0x7f80_0000,
        (3, Dtype::F16) => 0x7c00,
        (3, _) => 0xff80,
        (4, Dtype::F32) => 0x7fa0_0001,
        (4, _) => 0x7fff,
        (5, _) => 1,
        _ => (x >> 8) as u32,
    };
    bits.to_le_bytes()[..width(dtype)].to_vec()
}

/// A dense matrix of which at most two in four are not +0.
fn dense(dtype: Dtype, rows: usize, cols: usize, seed: u64) -> Vec<u8> {
    let mut numbers = noise(seed);
    let mut bytes = Vec::new();
    for _ in 0..rows * cols / 4 {
        let mask = positions::to_mask(NIBBLES[(numbers.next().unwrap() % 6) as usize]);
        let empty = numbers.next().unwrap().is_multiple_of(7);
        for place in 0..4 {
            let x = numbers.next().unwrap();
            let kept = mask >> place & 1 == 1 && !empty;
            bytes.extend(if kept { element(dtype, x) } else { vec![0; width(dtype)] });
        }
    }
    bytes
}

/// Random positions, and codes for the kept values.
fn quantised(rows: usize, cols: usize, abq: Abq, seed: u64) -> Packed<'static> {
    let mut numbers = noise(seed);
    let mut at = vec![0; rows * positions::row_bytes(cols)];
    for row in at.chunks_exact_mut(positions::row_bytes(cols)) {
        let nibbles: Vec<u8> = numbers.by_ref().take(cols / 4).map(|x| NIBBLES[(x % 6) as usize]).collect();
        positions::pack_row(nibbles, row);
    }
    let kept = rows * cols / 2;
    let codes: Vec<u8> = numbers.by_ref().take(kept).map(|x| (x % u64::from(abq.levels())) as u8).collect();
    let groups = rows * abq.groups(cols / 2);
    let scales: Vec<f32> = numbers.by_ref().take(groups).map(|x| (x % 2001) as f32 / 1000.0 - 1.0).collect();
    let scale = Floats::round(Dtype::F16, &scales).unwrap();
    let zero = Zero::Integer(numbers.take(groups).map(|x| x as u8).collect());
    let values = abq::Packed::from_codes(abq, cols / 2, &codes, scale, zero).unwrap();
    Packed::new(rows, cols, at, Kept::Abq(values)).unwrap()
}

/// The dense matrix that the specification says: kept values at their places, +0 elsewhere.
fn spread(dtype: Dtype, cols: usize, positions: &[u8], values: &[u8]) -> Vec<u8> {
    let width = width(dtype);
    let quads = cols / 4;
    let mut out = vec![0; values.len() * 2];
    for i in 0..values.len() / width / 2 {
        let (row, quad) = (i / quads, i % quads);
        let nibble = positions[row * cols.div_ceil(8) + quad / 2] >> (quad % 2 * 4) & 15;
        for (which, place) in [nibble & 3, nibble >> 2].into_iter().enumerate() {
            let (to, from) = ((row * cols + quad * 4 + place as usize) * width, (2 * i + which) * width);
            out[to..to + width].copy_from_slice(&values[from..from + width]);
        }
    }
    out
}

fn with_fixed12(packed: &Packed<'_>) -> (Encoding, BTreeMap<String, Raw>) {
    let (rows, cols) = (packed.rows(), packed.cols() / 2);
    let Kept::Plain(values) = packed.values() else { panic!("plain values") };
    let words: Vec<u16> = values.bytes().chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect();
    let mut histogram = fixed12::Histogram::new();
    histogram.add(&words);
    let window = histogram.best_window();
    let mut strips = fixed12::Strips::default();
    fixed12::encode_strips(window.base, cols, &words, &mut strips).unwrap();
    let grid = fixed12::Grid::new(rows as u64, cols as u64).unwrap();
    let specs = llmpress_formats::encoding::fixed12::components(&grid, window.escapes);
    let mut escapes = 0u32;
    let offsets = std::iter::once(0).chain(strips.escape_counts.iter().map(|count| {
        escapes += count;
        escapes
    }));
    let offsets = offsets.flat_map(u32::to_le_bytes).collect();
    let bytes = [
        strips.sign_mantissa,
        strips.codes,
        offsets,
        bytemuck::cast_slice(&strips.escape_positions).to_vec(),
        strips.escape_exponents,
    ];
    let mut stored = raw(packed.components());
    stored.remove("values");
    for (spec, bytes) in specs.into_iter().zip(bytes) {
        stored.insert(format!("values.{}", spec.name), (spec.dtype, spec.shape, bytes));
    }
    (Encoding::Sparse24(Sparse24 { values: Some(Inner::Fixed12 { base: window.base }) }), stored)
}

fn read(reader: &llmpress_formats::encoding::UnitReader, from: usize, to: usize) -> Vec<u8> {
    let mut out = vec![0xaa; to - from];
    reader.read(from as u64, &mut out).unwrap();
    out
}

/// The same matrix with positions through the entropy coder.
fn with_coded_positions(mut stored: BTreeMap<String, Raw>, cols: u64) -> BTreeMap<String, Raw> {
    let (_, shape, positions) = stored.remove("positions").unwrap();
    let (mut frames, mut lengths) = (Vec::new(), Vec::new());
    for chunk in positions.chunks(CHUNK_ELEMENTS) {
        Encoder::new(DEFAULT_LEVEL).encode_chunk(1, false, chunk, &mut frames, &mut lengths).unwrap();
    }
    let specs = coded_positions(shape[0], cols, frames.len() as u64);
    let lengths = lengths.iter().flat_map(|length| length.to_le_bytes()).collect();
    for (spec, bytes) in specs.into_iter().zip([frames, lengths]) {
        stored.insert(spec.name.to_owned(), (spec.dtype, spec.shape, bytes));
    }
    stored
}

const DTYPES: [Dtype; 3] = [Dtype::BF16, Dtype::F16, Dtype::F32];

proptest! {
    #[test]
    fn what_is_two_in_four_comes_back_to_the_bit_from_any_range(
        rows in 1usize..40, quads in 1usize..50, seed in any::<u32>(), dtype in 0usize..3,
        ends in (0usize..8001, 0usize..8001),
    ) {
        let (dtype, cols) = (DTYPES[dtype], quads * 4);
        let expected = dense(dtype, rows, cols, u64::from(seed));
        let packed = Packed::from_dense(dtype, rows, cols, &expected).unwrap();
        packed.check().unwrap();
        let mut forms = vec![(PLAIN, raw(packed.components()))];
        if dtype == Dtype::BF16 {
            forms.push(with_fixed12(&packed));
        }
        let coded: Vec<_> = forms
            .iter()
            .map(|(encoding, stored)| (encoding.clone(), with_coded_positions(stored.clone(), cols as u64)))
            .collect();
        forms.extend(coded);
        let elements = rows * cols;
        let (a, b) = (ends.0 % (elements + 1), ends.1 % (elements + 1));
        for (encoding, stored) in forms {
            prop_assert!(!encoding.is_lossy());
            let reader = open(&encoding, dtype, &[rows as u64, cols as u64], &stored).unwrap();
            for (from, to) in [(0, elements), (a.min(b), a.max(b))] {
                let (from, to) = (from * width(dtype), to * width(dtype));
                prop_assert!(read(&reader, from, to) == expected[from..to]);
            }
            let some = reader.sparse_rows((rows / 3) as u64..rows as u64).unwrap().unwrap();
            let from = rows / 3 * cols * width(dtype);
            prop_assert!(some == Packed::from_dense(dtype, rows - rows / 3, cols, &expected[from..]).unwrap());
        }
        // In single precision the numbers are the same; what is no number stays none.
        let mut row = vec![1.0; cols];
        let floats = Floats::new(dtype, expected).unwrap();
        for at in 0..rows {
            packed.decode_row(at, &mut row).unwrap();
            for (column, x) in row.iter().enumerate() {
                let y = floats.get(at * cols + column);
                prop_assert!(x.to_bits() == y.to_bits());
            }
        }
    }

    #[test]
    fn every_stored_row_keeps_exactly_two_of_four(
        rows in 1usize..10, quads in 1usize..30, seed in any::<u32>(), zeros in any::<bool>(),
    ) {
        let cols = quads * 4;
        let dense = match zeros {
            true => vec![0; rows * cols * 2],
            false => dense(Dtype::BF16, rows, cols, u64::from(seed)),
        };
        let packed = Packed::from_dense(Dtype::BF16, rows, cols, &dense).unwrap();
        for row in 0..rows {
            for quad in 0..quads {
                let mask = positions::to_mask(positions::get(packed.positions_of(row), quad));
                prop_assert_eq!(mask.count_ones(), 2);
                let values = &dense[(row * cols + quad * 4) * 2..][..8];
                let real = (0..4).fold(0, |m, i| m | u8::from(values[2 * i..2 * i + 2] != [0, 0]) << i);
                prop_assert_eq!(mask & real, real);
                if zeros {
                    prop_assert_eq!(mask, 0b11);
                }
            }
        }
        prop_assert!(positions::row_bytes(cols) == packed.positions().len() / rows);
    }

    #[test]
    fn quantised_values_decode_as_those_of_half_the_columns(
        rows in 1usize..20, quads in 1usize..60, seed in any::<u32>(), bits in 1u8..=8,
        group in prop::option::of(1u32..3), dtype in 0usize..3, ends in (0usize..5000, 0usize..5000),
    ) {
        let (dtype, cols) = (DTYPES[dtype], quads * 4);
        let abq = Abq { group_size: group.map(|n| n * 32), ..Abq::new(bits) };
        let packed = quantised(rows, cols, abq, u64::from(seed));
        prop_assert!(packed.encoding().is_lossy());
        let Kept::Abq(values) = packed.values() else { panic!("codes") };
        let inner = open(
            &Encoding::Abq(abq), dtype, &[rows as u64, cols as u64 / 2], &raw(values.components()),
        ).unwrap();
        let kept = read(&inner, 0, rows * cols / 2 * width(dtype));
        let expected = spread(dtype, cols, packed.positions(), &kept);
        let reader =
            open(&packed.encoding(), dtype, &[rows as u64, cols as u64], &raw(packed.components())).unwrap();
        let (a, b) = (ends.0 % (rows * cols + 1), ends.1 % (rows * cols + 1));
        for (from, to) in [(0, rows * cols), (a.min(b), a.max(b))] {
            let (from, to) = (from * width(dtype), to * width(dtype));
            prop_assert!(read(&reader, from, to) == expected[from..to]);
        }
        let all = reader.sparse_rows(0..rows as u64).unwrap().unwrap();
        prop_assert!(all == packed);
        let coded = with_coded_positions(raw(packed.components()), cols as u64);
        let reader = open(&packed.encoding(), dtype, &[rows as u64, cols as u64], &coded).unwrap();
        prop_assert!(read(&reader, 0, rows * cols * width(dtype)) == expected);
        prop_assert!(reader.sparse_rows(0..rows as u64).unwrap().unwrap() == packed);
        let mut row = vec![0.0; cols];
        for (at, expected) in expected.chunks_exact(cols * width(dtype)).enumerate() {
            packed.decode_row(at, &mut row).unwrap();
            let rounded = Packed::round(dtype, 1, cols, &row, packed.positions_of(at).to_vec()).unwrap();
            let Kept::Plain(values) = rounded.values() else { panic!("plain") };
            prop_assert!(spread(dtype, cols, packed.positions_of(at), values.bytes()) == expected);
        }
    }
}

#[test]
fn no_rows_and_no_columns_pack_to_nothing() {
    for (rows, cols) in [(0, 0), (0, 8), (3, 0)] {
        let packed = Packed::from_dense(Dtype::BF16, rows, cols, &[]).unwrap();
        packed.check().unwrap();
        assert!(packed.components().iter().all(|(_, bytes)| bytes.is_empty()));
    }
}

#[test]
fn rows_of_any_length_are_read_in_parts() {
    let cols = (1 << 16) * 2 + 76;
    let expected = dense(Dtype::BF16, 2, cols, 7);
    let packed = Packed::from_dense(Dtype::BF16, 2, cols, &expected).unwrap();
    let abq = quantised(2, cols, Abq { group_size: Some(96), ..Abq::new(3) }, 5);
    let Kept::Abq(values) = abq.values() else { panic!("codes") };
    let shape = [2, cols as u64 / 2];
    let inner = open(&Encoding::Abq(*values.abq()), Dtype::BF16, &shape, &raw(values.components())).unwrap();
    let spread = spread(Dtype::BF16, cols, abq.positions(), &read(&inner, 0, 2 * cols));
    let (fixed12, stored) = with_fixed12(&packed);
    let forms = [
        (PLAIN, raw(packed.components()), &expected),
        (fixed12, stored, &expected),
        (abq.encoding(), raw(abq.components()), &spread),
    ];
    for (encoding, stored, expected) in forms {
        let reader = open(&encoding, Dtype::BF16, &[2, cols as u64], &stored).unwrap();
        for (from, to) in
            [(0, 2 * cols), (1, 3), (65_500, 65_600), (cols - 41, cols + 70_001), (100_001, 100_002)]
        {
            assert!(read(&reader, from * 2, to * 2) == expected[from * 2..to * 2], "{from}..{to}");
        }
    }
}

#[test]
fn bits_a_weight_are_those_that_the_encoding_says() {
    let packed = Packed::from_dense(Dtype::BF16, 32, 256, &dense(Dtype::BF16, 32, 256, 1)).unwrap();
    assert_eq!(packed.bits_per_weight(), 9.0);
    let four = quantised(32, 256, Abq { group_size: Some(128), ..Abq::new(4) }, 1);
    // A byte of zero point and 16 bits of scale for 128 kept values.
    assert_eq!(four.bits_per_weight(), 3.0 + 24.0 / 256.0);
}

#[test]
fn what_is_no_two_in_four_is_refused() {
    let mut bytes = dense(Dtype::BF16, 3, 16, 2);
    bytes[2 * (16 + 8)..2 * (16 + 12)].copy_from_slice(&[1, 0, 0, 0x80, 0, 0, 1, 0]);
    let error = Packed::from_dense(Dtype::BF16, 3, 16, &bytes).unwrap_err().to_string();
    assert!(error.contains("row 1: more than two of columns 8 to 11"), "{error}");
    for (dtype, rows, cols, len) in [
        (Dtype::F64, 1, 4, 32),
        (Dtype::BF16, 1, 6, 12),
        (Dtype::BF16, 2, 4, 8),
        (Dtype::F32, usize::MAX, 4, 8),
    ] {
        assert!(Packed::from_dense(dtype, rows, cols, &vec![0; len]).is_err());
    }
    // Positions of another size, or that are no two of four.
    for wrong in [vec![], vec![0x44, 0x44], vec![0x04], vec![0x45]] {
        assert!(Packed::pack(Dtype::BF16, 1, 8, &[0; 16], wrong).is_err());
    }
    assert!(
        Packed::pack(Dtype::BF16, 1, 4, &[0; 8], vec![0x14]).unwrap_err().to_string().contains("past its")
    );
}

#[test]
fn parameters_outside_of_the_encoding_are_refused() {
    let parse = |json: &str| serde_json::from_str::<Encoding>(json);
    let good = r#"{"name":"sparse24","values":{"name":"abq","bits":4,"group_size":64}}"#;
    let abq = Abq { group_size: Some(64), ..Abq::new(4) };
    assert_eq!(parse(good).unwrap(), Encoding::Sparse24(Sparse24 { values: Some(Inner::Abq(abq)) }));
    assert_eq!(parse(r#"{"name":"sparse24"}"#).unwrap(), PLAIN);
    for inner in ["planes", "dfloat11", "raw", "sparse24", "lowrank"] {
        let json = format!(r#"{{"name":"sparse24","values":{{"name":"{inner}","rotate":true}}}}"#);
        assert!(parse(&json).unwrap_err().to_string().contains(inner), "{inner}");
    }
    let packed = quantised(2, 64, Abq::new(4), 3);
    let stored = raw(packed.components());
    for (abq, says) in [
        (Abq { bits: 9, ..Abq::new(4) }, "codes of 9 bits"),
        (Abq { activation_bits: Some(8), ..Abq::new(4) }, "activations of 8 bits"),
    ] {
        let encoding = Encoding::Sparse24(Sparse24 { values: Some(Inner::Abq(abq)) });
        let error = open(&encoding, Dtype::BF16, &[2, 64], &stored).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
}

#[test]
fn components_that_do_not_fit_are_refused() {
    let packed = Packed::from_dense(Dtype::BF16, 3, 68, &dense(Dtype::BF16, 3, 68, 3)).unwrap();
    let (fixed12, with_fixed12) = with_fixed12(&packed);
    let quantised = quantised(3, 68, Abq::new(4), 3);
    let forms = [
        (PLAIN, raw(packed.components())),
        (fixed12, with_fixed12),
        (quantised.encoding(), raw(quantised.components())),
    ];
    for (encoding, stored) in &forms {
        let refused = |dtype: Dtype, shape: &[u64], stored: &BTreeMap<String, Raw>, says: &str| {
            let error = open(encoding, dtype, shape, stored).unwrap_err().to_string();
            assert!(error.contains(says), "{encoding:?}: {error}");
        };
        open(encoding, Dtype::BF16, &[3, 68], stored).unwrap();
        for shape in [&[3, 132][..], &[4, 68], &[3, 60]] {
            refused(Dtype::BF16, shape, stored, "needs");
        }
        for shape in
            [&[204][..], &[], &[0, 68], &[3, 0], &[3, 67], &[3, 66], &[u64::MAX, 68], &[1 << 40, 1 << 40]]
        {
            refused(Dtype::BF16, shape, stored, "is not a matrix that sparse24 holds");
        }
        refused(Dtype::U8, &[3, 68], stored, "sparse24 holds F16, BF16 and F32");
        for name in stored.keys() {
            // A grid without zero points is another one that there is.
            if name == "values.zero" {
                continue;
            }
            let mut less = stored.clone();
            less.remove(name);
            refused(Dtype::BF16, &[3, 68], &less, &format!("component {name} is missing"));
        }
        for name in ["other", "values.other", "values.values", "base.values"] {
            let mut more = stored.clone();
            more.insert(name.to_owned(), (Dtype::U8, vec![1], vec![0]));
            refused(Dtype::BF16, &[3, 68], &more, "does not know");
        }
        let mut wrong = stored.clone();
        wrong.insert("positions".to_owned(), (Dtype::U8, vec![3, 8], vec![0x44; 24]));
        refused(Dtype::BF16, &[3, 68], &wrong, "needs U8 of 27 bytes");
    }
    let mut both = raw(packed.components());
    both.extend(raw(quantised.components()));
    assert!(open(&PLAIN, Dtype::BF16, &[3, 68], &both).is_err());
    let mut other = raw(packed.components());
    other.insert("values".to_owned(), (Dtype::F16, vec![3, 34], vec![0; 204]));
    let error = open(&PLAIN, Dtype::BF16, &[3, 68], &other).unwrap_err().to_string();
    assert!(error.contains("needs BF16 of 204 bytes"), "{error}");
}

#[test]
fn coded_positions_that_break_the_format_are_refused() {
    let packed = Packed::from_dense(Dtype::BF16, 4, 68, &dense(Dtype::BF16, 4, 68, 9)).unwrap();
    let plain = raw(packed.components());
    let mut stored = with_coded_positions(plain.clone(), 68);
    // As they are.
    stored.insert("position_codes".to_owned(), (Dtype::U8, vec![36], packed.positions().to_vec()));
    stored.insert("position_lengths".to_owned(), (Dtype::U8, vec![1, 4], vec![36, 0, 0, 0]));
    let opened = |change: &dyn Fn(&mut BTreeMap<String, Raw>)| {
        let mut stored = stored.clone();
        change(&mut stored);
        open(&PLAIN, Dtype::BF16, &[4, 68], &stored)
    };
    assert!(opened(&|_| ()).unwrap().sparse_rows(0..4).unwrap().unwrap() == packed);
    for name in ["position_codes", "position_lengths"] {
        let error = opened(&|stored| drop(stored.remove(name))).unwrap_err().to_string();
        assert!(error.contains(&format!("component {name} is missing")), "{error}");
    }
    let both = opened(&|stored| drop(stored.insert("positions".to_owned(), plain["positions"].clone())));
    assert!(both.unwrap_err().to_string().contains("both positions and position_codes"));
    let wrong = (Dtype::U8, vec![1, 4], vec![35, 0, 0, 0]);
    assert!(opened(&|stored| drop(stored.insert("position_lengths".to_owned(), wrong.clone()))).is_err());
    // A nibble that stands for no two of four.
    let reader = opened(&|stored| stored.get_mut("position_codes").unwrap().2[9] = 0).unwrap();
    let error = reader.read(138, &mut [0; 4]).unwrap_err();
    assert!(error.kind() == "corrupt" && error.to_string().contains("u.position_codes: row 1: "), "{error}");
    // A frame that is none.
    let frames = (Dtype::U8, vec![20], vec![1; 20]);
    let lengths = (Dtype::U8, vec![1, 4], vec![20, 0, 0, 0]);
    let reader = opened(&|stored| {
        stored.insert("position_codes".to_owned(), frames.clone());
        stored.insert("position_lengths".to_owned(), lengths.clone());
    });
    let error = reader.unwrap().read(0, &mut [0; 4]).unwrap_err().to_string();
    assert!(error.contains("chunk 0: "), "{error}");
}

#[test]
fn positions_that_break_the_format_are_found_when_they_are_read() {
    // 17 quads: half of the last byte of a row belongs to none.
    let packed = Packed::from_dense(Dtype::BF16, 4, 68, &dense(Dtype::BF16, 4, 68, 9)).unwrap();
    let quantised = quantised(4, 68, Abq::new(2), 3);
    let forms = [
        (PLAIN, raw(packed.components())),
        with_fixed12(&packed),
        (quantised.encoding(), raw(quantised.components())),
    ];
    for (encoding, stored) in &forms {
        for quad in 0..18 {
            for nibble in 0..16u8 {
                let fine = if quad < 17 { NIBBLES.contains(&nibble) } else { nibble == 0 };
                let mut stored = stored.clone();
                let byte = &mut stored.get_mut("positions").unwrap().2[9 + quad / 2];
                let shift = 4 * (quad % 2);
                *byte = *byte & (0xf0 >> shift) | nibble << shift;
                let reader = open(encoding, Dtype::BF16, &[4, 68], &stored).unwrap();
                reader.read(0, &mut [0; 136]).expect("row 0 is sound");
                let read = reader.read(138, &mut [0; 4]);
                let rows = reader.sparse_rows(1..2).unwrap();
                assert_eq!((read.is_ok(), rows.is_ok()), (fine, fine), "quad {quad}: {nibble:#x}");
                for error in [read.err(), rows.err()].into_iter().flatten() {
                    assert_eq!(error.kind(), "corrupt");
                    assert!(error.to_string().contains("u.positions: row 1: "), "{error}");
                }
            }
        }
    }
}
