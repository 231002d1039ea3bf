//! `abq` against a plain formula, whatever the widths and the range that is read, and what its reader refuses.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::collections::BTreeMap;

use crate::by_hand::{self, Raw};
use half::{bf16, f16};
use llmpress_entropy::planes::{CHUNK_ELEMENTS, DEFAULT_LEVEL, Encoder};
use llmpress_formats::encoding::UnitReader;
use llmpress_formats::encoding::abq::{Abq, Floats, Packed, Zero, coded, pack, unpack_row};
use llmpress_formats::{Dtype, Encoding, Error};
use llmpress_numbers::Numbers;
use proptest::prelude::*;

/// Stores components of a unit and opens a reader of it.
fn open(abq: Abq, dtype: Dtype, shape: &[u64], stored: &BTreeMap<String, Raw>) -> Result<UnitReader, Error> {
    by_hand::open(&Encoding::Abq(abq), dtype, shape, stored)
}

fn raw(packed: &Packed<'_>) -> BTreeMap<String, Raw> {
    by_hand::raw(packed.components())
}

/// The codes in bytes.
fn joined(packed: &Packed<'_>) -> Vec<u8> {
    let abq = packed.abq();
    let mut codes = vec![0; packed.cols()];
    let mut bytes = vec![0; coded::row_bytes(abq, packed.cols()) * packed.rows()];
    for (row, out) in bytes.chunks_exact_mut(coded::row_bytes(abq, packed.cols())).enumerate() {
        packed.codes(row, &mut codes);
        coded::join(abq, &codes, out);
    }
    bytes
}

/// The same matrix with codes through the entropy coder.
fn with_coded(packed: &Packed<'_>) -> BTreeMap<String, Raw> {
    let (abq, mut stored) = (packed.abq(), raw(packed));
    let (mut frames, mut lengths) = (Vec::new(), Vec::new());
    for chunk in joined(packed).chunks(CHUNK_ELEMENTS) {
        Encoder::new(DEFAULT_LEVEL).encode_chunk(1, false, chunk, &mut frames, &mut lengths).unwrap();
    }
    let specs = coded::components(abq, packed.rows() as u64, packed.cols() as u64, frames.len() as u64);
    let lengths = lengths.iter().flat_map(|length| length.to_le_bytes()).collect();
    stored.remove("planes");
    for (spec, bytes) in specs.into_iter().zip([frames, lengths]) {
        stored.insert(spec.name.to_owned(), (spec.dtype, spec.shape, bytes));
    }
    stored
}

fn noise(seed: u64) -> impl Iterator<Item = u64> {
    let mut numbers = Numbers::new(seed);
    std::iter::repeat_with(move || numbers.bits() >> 8)
}

/// A matrix and its codes.
fn matrix(abq: Abq, rows: usize, cols: usize, zero: u8, seed: u64) -> (Packed<'static>, Vec<u8>) {
    let codes: Vec<u8> = noise(seed).take(rows * cols).map(|x| (x % u64::from(abq.levels())) as u8).collect();
    let groups = rows * abq.groups(cols);
    let float = |x: u64| (x % 2001) as f32 / 1000.0 - 1.0;
    let dtypes = [Dtype::F16, Dtype::BF16, Dtype::F32];
    let floats = |seed: u64| {
        let values: Vec<f32> = noise(seed).take(groups).map(float).collect();
        Floats::round(dtypes[(seed % 3) as usize], &values).unwrap()
    };
    let zero = match zero {
        0 => Zero::Symmetric,
        1 => Zero::Integer(noise(seed + 1).take(groups).map(|x| x as u8).collect()),
        _ => Zero::Real(floats(seed + 2)),
    };
    (Packed::from_codes(abq, cols, &codes, floats(seed + 3), zero).unwrap(), codes)
}

/// The formula of the specification, one element at a time.
fn formula(packed: &Packed<'_>, codes: &[u8], dtype: Dtype) -> Vec<u8> {
    let (abq, cols) = (packed.abq(), packed.cols());
    let group_size = abq.group_size.map_or(cols, |g| g as usize);
    let value = |i: usize| {
        let group = i / cols * cols.div_ceil(group_size) + i % cols / group_size;
        let (code, scale) = (f32::from(codes[i]), packed.scale().get(group));
        match packed.zero() {
            Zero::Symmetric => scale * (code - (1 << (abq.bits - 1)) as f32),
            Zero::Integer(zeros) => scale * (code - f32::from(zeros[group])),
            Zero::Real(offsets) => scale * code + offsets.get(group),
        }
    };
    let bytes = |x: f32| match dtype {
        Dtype::F16 => f16::from_f32(x).to_le_bytes().to_vec(),
        Dtype::BF16 => bf16::from_f32(x).to_le_bytes().to_vec(),
        _ => x.to_le_bytes().to_vec(),
    };
    (0..codes.len()).flat_map(|i| bytes(value(i))).collect()
}

fn parameters() -> impl Strategy<Value = Abq> {
    let group = prop::option::of((1u32..5).prop_map(|n| n * 32));
    (1u8..=8, any::<bool>(), group, prop::option::of(1u8..=8)).prop_map(
        |(bits, balanced, group, activations)| Abq {
            bits,
            balanced: balanced && bits <= 2,
            group_size: group,
            activation_bits: activations,
        },
    )
}

proptest! {
    #[test]
    fn any_range_decodes_as_the_formula_says(
        abq in parameters(),
        rows in 1usize..20,
        cols in 1usize..200,
        zero in 0u8..3,
        seed in any::<u32>(),
        dtype in prop::sample::select(vec![Dtype::F16, Dtype::BF16, Dtype::F32]),
        ends in (0usize..4001, 0usize..4001),
    ) {
        let (packed, codes) = matrix(abq, rows, cols, zero, u64::from(seed));
        let expected = formula(&packed, &codes, dtype);
        let (a, b) = (ends.0 % (codes.len() + 1), ends.1 % (codes.len() + 1));
        let width = expected.len() / codes.len();
        for stored in [raw(&packed), with_coded(&packed)] {
            let reader = open(abq, dtype, &[rows as u64, cols as u64], &stored).unwrap();
            for (from, to) in [(0, codes.len()), (a.min(b), a.max(b))] {
                let mut out = vec![0xaa; (to - from) * width];
                reader.read((from * width) as u64, &mut out).unwrap();
                prop_assert!(out == expected[from * width..to * width]);
            }
            let some = (rows / 3) as u64..rows as u64;
            let some = reader.packed_rows(some.clone()).unwrap().unwrap();
            prop_assert!(some.planes() == Packed::from_codes(
                abq, cols, &codes[rows / 3 * cols..], some.scale().clone(), some.zero().clone(),
            ).unwrap().planes());
        }
        let mut row = vec![0.0; cols];
        for (i, expected) in formula(&packed, &codes, Dtype::F32).chunks(4 * cols).enumerate() {
            packed.decode_row(i, &mut row).unwrap();
            prop_assert!(bytemuck::cast_slice::<f32, u8>(&row) == expected);
        }
    }

    #[test]
    fn planes_are_the_bits_of_the_codes(
        planes in 1u32..=8, rows in 0usize..5, cols in 1usize..100, seed in any::<u32>(),
    ) {
        let mask = (1u64 << planes) - 1;
        let codes: Vec<u8> = noise(u64::from(seed)).take(rows * cols).map(|x| (x & mask) as u8).collect();
        let packed = pack(&codes, cols, planes);
        let words = cols.div_ceil(32);
        prop_assert_eq!(packed.len(), planes as usize * rows * words);
        for (plane, of_plane) in packed.chunks(words * rows.max(1)).enumerate() {
            for (i, word) in of_plane.iter().enumerate() {
                let (row, first) = (i / words, i % words * 32);
                let bit = |k: usize| {
                    let code = if first + k < cols { codes[row * cols + first + k] } else { 0 };
                    u32::from(code >> plane & 1) << k
                };
                prop_assert_eq!(*word, (0..32).map(bit).sum::<u32>());
            }
        }
        let mut row = vec![0xee; cols];
        for (i, expected) in codes.chunks(cols).enumerate() {
            unpack_row(&packed, rows, words, i, &mut row);
            prop_assert!(row == expected);
        }
    }
}

#[test]
fn rows_of_any_length_are_read_in_parts() {
    // Longer than what is decoded at a time: parts end between groups, or inside of a long one.
    let cols = (1 << 16) * 2 + 77;
    for group_size in [None, Some(96), Some(128), Some(1 << 16), Some(3 << 15), Some(1 << 31)] {
        let abq = Abq { group_size, ..Abq::new(3) };
        let (packed, codes) = matrix(abq, 2, cols, 2, 7);
        let expected = formula(&packed, &codes, Dtype::BF16);
        for stored in [raw(&packed), with_coded(&packed)] {
            let reader = open(abq, Dtype::BF16, &[2, cols as u64], &stored).unwrap();
            for (from, to) in
                [(0, 2 * cols), (1, 3), (65_500, 65_600), (cols - 40, cols + 70_000), (100_001, 100_002)]
            {
                let mut out = vec![0; (to - from) * 2];
                reader.read(from as u64 * 2, &mut out).unwrap();
                assert!(out == expected[from * 2..to * 2], "{group_size:?} {from}..{to}");
            }
        }
    }
}

#[test]
fn parameters_outside_of_the_encoding_are_refused() {
    let (packed, _) = matrix(Abq::new(2), 2, 64, 0, 1);
    let stored = raw(&packed);
    let good = Abq::new(2);
    for (abq, says) in [
        (Abq { bits: 0, ..good }, "codes of 0 bits"),
        (Abq { bits: 9, ..good }, "codes of 9 bits"),
        (Abq { bits: 255, ..good }, "codes of 255 bits"),
        (Abq { bits: 3, balanced: true, ..good }, "balanced codes of 3 bits"),
        (Abq { group_size: Some(0), ..good }, "groups of 0"),
        (Abq { group_size: Some(33), ..good }, "groups of 33"),
        (Abq { group_size: Some(u32::MAX), ..good }, "groups of 4294967295"),
        (Abq { activation_bits: Some(0), ..good }, "activations of 0 bits"),
        (Abq { activation_bits: Some(16), ..good }, "activations of 16 bits"),
    ] {
        let error = open(abq, Dtype::BF16, &[2, 64], &stored).unwrap_err().to_string();
        assert!(error.contains(says) && error.contains("abq"), "{error}");
        assert!(Packed::new(abq, 2, 64, packed.planes(), packed.scale().clone(), Zero::Symmetric).is_err());
    }
    // One group longer than a row is one group.
    let abq = Abq { group_size: Some(u32::MAX / 32 * 32), ..good };
    open(abq, Dtype::BF16, &[2, 64], &stored).unwrap();
}

#[test]
fn components_that_do_not_fit_are_refused() {
    let abq = Abq { group_size: Some(32), ..Abq::new(2) };
    let (packed, _) = matrix(abq, 3, 70, 2, 5);
    let refused = |dtype: Dtype, shape: &[u64], change: &dyn Fn(&mut BTreeMap<String, Raw>), says: &str| {
        let mut stored = raw(&packed);
        change(&mut stored);
        let error = open(abq, dtype, shape, &stored).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    };
    let none = |_: &mut BTreeMap<String, Raw>| {};
    for shape in [&[3, 97][..], &[4, 70], &[3, 103], &[3, 38]] {
        refused(Dtype::BF16, shape, &none, "its encoding needs");
    }
    for shape in [&[210][..], &[], &[0, 70], &[3, 0], &[u64::MAX, 70], &[1 << 40, 1 << 40]] {
        refused(Dtype::BF16, shape, &none, "is not a matrix that abq holds");
    }
    refused(Dtype::U8, &[3, 70], &none, "abq holds F16, BF16 and F32");
    refused(Dtype::F64, &[3, 70], &none, "abq holds F16, BF16 and F32");
    for name in ["planes", "scale"] {
        refused(
            Dtype::BF16,
            &[3, 70],
            &|stored| drop(stored.remove(name)),
            &format!("component {name} is missing"),
        );
    }
    let swap = |name: &'static str, raw: Raw| {
        move |stored: &mut BTreeMap<String, Raw>| drop(stored.insert(name.to_owned(), raw.clone()))
    };
    let shape = &[3, 70][..];
    refused(
        Dtype::BF16,
        shape,
        &swap("planes", (Dtype::U32, vec![17], vec![0; 68])),
        "needs U32 of 72 bytes",
    );
    refused(Dtype::BF16, shape, &swap("planes", (Dtype::U8, vec![72], vec![0; 72])), "needs U32");
    refused(Dtype::BF16, shape, &swap("scale", (Dtype::F32, vec![3, 1], vec![0; 12])), "of 36 bytes");
    refused(Dtype::BF16, shape, &swap("scale", (Dtype::F64, vec![3, 3], vec![0; 72])), "F16, BF16 or F32");
    refused(Dtype::BF16, shape, &swap("offset", (Dtype::U8, vec![3, 3], vec![0; 9])), "F16, BF16 or F32");
    refused(Dtype::BF16, shape, &swap("zero", (Dtype::U8, vec![3, 3], vec![0; 9])), "both offset and zero");
    refused(Dtype::BF16, shape, &swap("g_idx", (Dtype::U8, vec![3], vec![0; 3])), "component g_idx");
}

#[test]
fn contents_that_break_the_format_are_found_when_they_are_read() {
    let abq = Abq { balanced: true, group_size: Some(64), ..Abq::new(2) };
    let (packed, _) = matrix(abq, 4, 70, 2, 9);
    let words = packed.planes().len() / 3;
    let faulty = |name: &str, edits: &[(usize, &[u8])], says: &str| {
        let mut stored = raw(&packed);
        let bytes = &mut stored.get_mut(name).unwrap().2;
        edits.iter().for_each(|&(at, value)| bytes[at..at + value.len()].copy_from_slice(value));
        let reader = open(abq, Dtype::BF16, &[4, 70], &stored).unwrap();
        reader.read(0, &mut [0; 140]).expect("row 0 is sound");
        let error = reader.read(138, &mut [0; 4]).unwrap_err();
        assert_eq!(error.kind(), "corrupt");
        assert!(error.to_string().contains(&format!("u.{name}: row 1: ")), "{error}");
        assert!(error.to_string().contains(says), "{error}");
        let bytes = |name: &str| stored[name].2.clone();
        let floats = |name: &str| Floats::new(stored[name].0, bytes(name)).unwrap();
        let planes: Vec<u32> = bytemuck::allocation::pod_collect_to_vec(&bytes("planes"));
        let zero = Zero::Real(floats("offset"));
        let packed = Packed::new(abq, 4, 70, planes, floats("scale"), zero).unwrap();
        let error = packed.check().unwrap_err().to_string();
        assert!(error.contains(says) && error.contains(&format!("{name}: row 1: ")), "{error}");
    };
    let ones = [0xff; 4];
    let at = |plane: usize, word: usize| (plane * words + 3 + word) * 4;
    faulty(
        "planes",
        &[(at(1, 0), &ones), (at(2, 0), &[8, 0, 0, 0])],
        "column 3: its code is past the 5 levels",
    );
    faulty(
        "planes",
        &[(at(0, 1), &ones), (at(2, 1), &[0, 1, 0, 0])],
        "column 40: its code is past the 5 levels",
    );
    for plane in 0..3 {
        faulty("planes", &[(at(plane, 2), &[0x40, 0, 0, 0])], "bits are set past its 70 columns");
        faulty("planes", &[(at(plane, 2) + 3, &[0x80])], "bits are set past its 70 columns");
    }
    assert_eq!((packed.scale().dtype(), packed.components()[2].0.dtype), (Dtype::F16, Dtype::F32));
    faulty("scale", &[(4, &[0x00, 0x7e])], "group 0: NaN is not finite");
    faulty("scale", &[(6, &[0x00, 0xfc])], "group 1: -inf is not finite");
    faulty("offset", &[(8, &[0, 0, 0xc0, 0x7f])], "group 0: NaN is not finite");
    faulty("offset", &[(12, &[0, 0, 0x80, 0x7f])], "group 1: inf is not finite");
}

#[test]
fn codes_of_more_than_a_chunk_are_those_that_were_coded() {
    // Rows that end in the middle of a chunk, of few likely codes: frames are shorter than their chunks.
    let abq = Abq { group_size: Some(128), ..Abq::new(4) };
    let (rows, cols) = (700, 1601);
    let codes: Vec<u8> = noise(3).take(rows * cols).map(|x| 8 + (x & x >> 7 & 3) as u8).collect();
    let scale = Floats::round(Dtype::F16, &vec![0.5; rows * abq.groups(cols)]).unwrap();
    let packed = Packed::from_codes(abq, cols, &codes, scale, Zero::Symmetric).unwrap();
    let stored = with_coded(&packed);
    assert!(stored["codes"].2.len() < rows * cols * 3 / 8 && stored["code_lengths"].1 == [3, 4]);
    let reader = open(abq, Dtype::BF16, &[rows as u64, cols as u64], &stored).unwrap();
    let expected = formula(&packed, &codes, Dtype::BF16);
    let mut out = vec![0; expected.len()];
    reader.read(0, &mut out).unwrap();
    assert!(out == expected);
    assert!(reader.packed_rows(0..rows as u64).unwrap().unwrap() == packed);
}

#[test]
fn coded_codes_that_break_the_format_are_refused() {
    let abq = Abq { balanced: true, group_size: Some(64), ..Abq::new(2) };
    let (packed, _) = matrix(abq, 4, 71, 2, 9);
    let mut stored = with_coded(&packed);
    // As they are, two codes of three bits a byte.
    stored.insert("codes".to_owned(), (Dtype::U8, vec![4 * 36], joined(&packed)));
    stored.insert("code_lengths".to_owned(), (Dtype::U8, vec![1, 4], vec![144, 0, 0, 0]));
    let opened = |change: &dyn Fn(&mut BTreeMap<String, Raw>)| {
        let mut stored = stored.clone();
        change(&mut stored);
        open(abq, Dtype::BF16, &[4, 71], &stored)
    };
    for (name, says) in
        [("codes", "component codes is missing"), ("code_lengths", "component code_lengths is missing")]
    {
        let error = opened(&|stored| drop(stored.remove(name))).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
    let both = opened(&|stored| drop(stored.insert("planes".to_owned(), raw(&packed)["planes"].clone())));
    assert!(both.unwrap_err().to_string().contains("both planes and codes"));
    let lengths = |bytes: Vec<u8>| (Dtype::U8, vec![bytes.len() as u64 / 4, 4], bytes);
    for wrong in [vec![143, 0, 0, 0], vec![0xff; 4], vec![144, 0, 0, 0, 0, 0, 0, 0]] {
        let wrong = lengths(wrong);
        assert!(opened(&|stored| drop(stored.insert("code_lengths".to_owned(), wrong.clone()))).is_err());
    }
    let read = |at: usize, value: u8| {
        let reader = opened(&|stored| stored.get_mut("codes").unwrap().2[at] = value).unwrap();
        reader.read(0, &mut [0; 142]).expect("row 0 is sound");
        let error = reader.read(142, &mut [0; 142]).unwrap_err();
        assert_eq!(error.kind(), "corrupt");
        error.to_string()
    };
    assert!(read(36, 0x40).contains("u.codes: row 1: bits are set that belong to no code"));
    assert!(
        read(36 + 35, 0x08).contains("row 1: bits are set that belong to no code"),
        "past the last column"
    );
    assert!(read(36, 5).contains("u.codes: row 1: column 0: its code is past the 5 levels"));
    // A frame that is not one, or gives another number of bytes.
    let frame = |bytes: Vec<u8>| {
        let length = lengths((bytes.len() as u32).to_le_bytes().to_vec());
        let codes = (Dtype::U8, vec![bytes.len() as u64], bytes);
        let reader = opened(&|stored| {
            stored.insert("codes".to_owned(), codes.clone());
            stored.insert("code_lengths".to_owned(), length.clone());
        });
        reader.unwrap().read(0, &mut [0; 2]).unwrap_err().to_string()
    };
    assert!(frame(vec![1; 20]).contains("chunk 0: "));
    let (mut short, mut length) = (Vec::new(), Vec::new());
    Encoder::new(1).encode_chunk(1, false, &[0; 143], &mut short, &mut length).unwrap();
    assert!(frame(short).contains("143 bytes"));
}

#[test]
fn what_is_not_finite_or_past_the_levels_is_never_packed() {
    assert!(Floats::round(Dtype::F16, &[1.0, 70_000.0]).unwrap_err().to_string().contains("value 1, 70000"));
    assert!(Floats::round(Dtype::BF16, &[f32::NAN]).is_err());
    assert!(Floats::round(Dtype::U8, &[1.0]).is_err());
    assert!(Floats::new(Dtype::F16, vec![0; 3]).is_err());
    let one = || Floats::round(Dtype::F32, &[1.0]).unwrap();
    let pack = |abq, codes: &[u8]| Packed::from_codes(abq, 4, codes, one(), Zero::Symmetric);
    assert!(pack(Abq::new(2), &[0, 1, 2, 4]).unwrap_err().to_string().contains("code 4 of 4 levels"));
    let balanced = Abq { balanced: true, ..Abq::new(2) };
    pack(balanced, &[0, 1, 2, 4]).unwrap();
    assert!(pack(balanced, &[0, 1, 2, 5]).is_err());
    assert!(pack(Abq::new(2), &[0, 1, 2]).is_err());
}

#[test]
fn bits_a_weight_count_scales_and_zero_points() {
    let bits = |abq, zero| matrix(abq, 8, 256, zero, 3).0.bits_per_weight();
    let grouped = Abq { group_size: Some(128), ..Abq::new(2) };
    // Scales of 16 bits, offsets of 32.
    assert_eq!(matrix(grouped, 8, 256, 2, 3).0.scale().dtype(), Dtype::F16);
    assert_eq!(bits(grouped, 0), 2.125);
    assert_eq!(bits(grouped, 1), 2.1875);
    assert_eq!(bits(grouped, 2), 2.375);
    assert_eq!(bits(Abq { balanced: true, ..Abq::new(2) }, 0), 3.0625);
}
