//! `lowrank` against its formula, whatever the base, the sums and the range that is read, and what its reader refuses.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::collections::BTreeMap;

use crate::by_hand::{Raw, open, raw};
use half::{bf16, f16};
use llmpress_formats::encoding::abq::{self, Abq, Floats, Zero};
use llmpress_formats::encoding::lowrank::{Base, BaseRows, Lowrank, Packed, Sums, SumsEncoding};
use llmpress_formats::encoding::sparse24::{self, Inner, Kept, Sparse24, positions};
use llmpress_formats::{Dtype, Encoding};
use llmpress_numbers::Numbers;
use proptest::prelude::*;

fn noise(seed: u64) -> impl Iterator<Item = u64> {
    let mut numbers = Numbers::new(seed);
    std::iter::repeat_with(move || numbers.bits() >> 8)
}

fn values(count: usize, seed: u64) -> Vec<f32> {
    noise(seed).take(count).map(|x| (x % 20_001) as f32 / 10_000.0 - 1.0).collect()
}

fn codes(abq: Abq, rows: usize, cols: usize, seed: u64) -> abq::Packed<'static> {
    let codes: Vec<u8> = noise(seed).take(rows * cols).map(|x| (x % u64::from(abq.levels())) as u8).collect();
    let scale = Floats::round(Dtype::F16, &values(rows * abq.groups(cols), seed + 1)).unwrap();
    abq::Packed::from_codes(abq, cols, &codes, scale, Zero::Symmetric).unwrap()
}

/// The base (0: raw, 1: two in four, 2: with quantised values) and the sums (0: plain, 1: quantised).
fn matrix(
    dtype: Dtype,
    (rows, cols): (usize, usize),
    block: u32,
    form: (u8, u8),
    seed: u64,
) -> Packed<'static> {
    let blocks = cols.div_ceil(block as usize);
    let sparse = || {
        let mut at = vec![0; rows * positions::row_bytes(cols)];
        for (row, at) in at.chunks_exact_mut(positions::row_bytes(cols)).enumerate() {
            let nibbles = noise(seed + row as u64).map(|x| [4, 8, 9, 12, 13, 14][(x % 6) as usize]);
            positions::pack_row(nibbles.take(cols / 4), at);
        }
        sparse24::Packed::round(dtype, rows, cols, &values(rows * cols, seed), at).unwrap()
    };
    let base = match form.0 {
        0 => BaseRows::Raw(Floats::round(dtype, &values(rows * cols, seed)).unwrap()),
        1 => BaseRows::Sparse24(sparse()),
        _ => {
            let kept = Kept::Abq(codes(Abq::new(4), rows, cols / 2, seed + 2));
            BaseRows::Sparse24(sparse().with_values(kept).unwrap())
        }
    };
    let sums = match form.1 {
        0 => Sums::Plain(Floats::round(Dtype::F16, &values(rows * blocks, seed + 5)).unwrap()),
        _ => Sums::Abq(codes(Abq { group_size: Some(32), ..Abq::new(8) }, rows, blocks, seed + 5)),
    };
    Packed::new(block, rows, cols, base, sums).unwrap()
}

/// The formula of the specification, one element at a time.
fn formula(packed: &Packed<'_>, dtype: Dtype) -> Vec<u8> {
    let (cols, blocks) = (packed.cols(), packed.cols().div_ceil(packed.block()));
    let (mut base, mut sums) = (vec![0.0; cols], vec![0.0; blocks]);
    let mut out = Vec::new();
    for row in 0..packed.rows() {
        match packed.base() {
            BaseRows::Raw(all) => base.iter_mut().enumerate().for_each(|(i, b)| *b = all.get(row * cols + i)),
            BaseRows::Sparse24(all) => all.decode_row(row, &mut base).unwrap(),
        }
        match packed.sums() {
            Sums::Plain(all) => sums.iter_mut().enumerate().for_each(|(i, s)| *s = all.get(row * blocks + i)),
            Sums::Abq(all) => all.decode_row(row, &mut sums).unwrap(),
        }
        for (column, base) in base.iter().enumerate() {
            let weight = base + sums[column / packed.block()];
            match dtype {
                Dtype::F16 => out.extend(f16::from_f32(weight).to_le_bytes()),
                Dtype::BF16 => out.extend(bf16::from_f32(weight).to_le_bytes()),
                _ => out.extend(weight.to_le_bytes()),
            }
        }
    }
    out
}

const DTYPES: [Dtype; 3] = [Dtype::BF16, Dtype::F16, Dtype::F32];

proptest! {
    #[test]
    fn any_range_decodes_to_base_and_sum_rounded_once(
        rows in 1usize..20, quads in 1usize..40, block in 1u32..70, form in (0u8..3, 0u8..2), dtype in 0usize..3,
        seed in any::<u32>(), ends in (0usize..4001, 0usize..4001),
    ) {
        let (dtype, cols) = (DTYPES[dtype], quads * 4);
        let packed = matrix(dtype, (rows, cols), block, form, u64::from(seed));
        packed.check().unwrap();
        prop_assert!(packed.encoding().is_lossy());
        let json = serde_json::to_string(&packed.encoding()).unwrap();
        prop_assert_eq!(&serde_json::from_str::<Encoding>(&json).unwrap(), &packed.encoding());
        let expected = formula(&packed, dtype);
        let shape = [rows as u64, cols as u64];
        let reader = open(&packed.encoding(), dtype, &shape, &raw(packed.components())).unwrap();
        let width = dtype.bits() as usize / 8;
        let (a, b) = (ends.0 % (rows * cols + 1), ends.1 % (rows * cols + 1));
        for (from, to) in [(0, rows * cols), (a.min(b), a.max(b))] {
            let mut out = vec![0xaa; (to - from) * width];
            reader.read((from * width) as u64, &mut out).unwrap();
            prop_assert!(out == expected[from * width..to * width]);
        }
        let all = reader.lowrank_rows(0..rows as u64).unwrap().unwrap();
        prop_assert!(all == packed);
        let mut row = vec![0.0; cols];
        for (at, expected) in formula(&packed, Dtype::F32).chunks_exact(4 * cols).enumerate() {
            packed.decode_row(at, &mut row).unwrap();
            prop_assert!(bytemuck::cast_slice::<f32, u8>(&row) == expected);
        }
    }
}

#[test]
fn rows_of_any_length_are_read_in_parts() {
    let cols = (1 << 18) + 1028;
    for block in [1, 16, 96, 1 << 20] {
        let packed = matrix(Dtype::BF16, (2, cols), block, (1, 0), 3);
        let expected = formula(&packed, Dtype::BF16);
        let shape = [2, cols as u64];
        let reader = open(&packed.encoding(), Dtype::BF16, &shape, &raw(packed.components())).unwrap();
        for (from, to) in [(0, 2 * cols), (1, 2), (cols - 41, cols + 263_001), (262_140, 262_150)] {
            let mut out = vec![0; (to - from) * 2];
            reader.read(from as u64 * 2, &mut out).unwrap();
            assert!(out == expected[from * 2..to * 2], "{block} {from}..{to}");
        }
    }
}

#[test]
fn what_is_no_number_stays_so_and_what_is_infinite_stays_infinite() {
    let base: Vec<u8> = [0x7fc3u16, 0xffc1, 0x7f80, 0xff80].into_iter().flat_map(u16::to_le_bytes).collect();
    let sums = Floats::round(Dtype::F32, &[3.0]).unwrap();
    let base = BaseRows::Raw(Floats::new(Dtype::BF16, base.clone()).unwrap());
    let packed = Packed::new(4, 1, 4, base, Sums::Plain(sums)).unwrap();
    let reader = open(&packed.encoding(), Dtype::BF16, &[1, 4], &raw(packed.components())).unwrap();
    let mut out = [0; 8];
    reader.read(0, &mut out).unwrap();
    assert_eq!(bytemuck::pod_collect_to_vec::<u8, u16>(&out), [0x7fc3, 0xffc1, 0x7f80, 0xff80]);
}

#[test]
fn bits_a_weight_are_those_that_the_encoding_says() {
    let bits = |form| matrix(Dtype::BF16, (32, 1024), 16, form, 3).bits_per_weight();
    assert_eq!(bits((1, 0)), 10.0);
    // Half a bit for sums of eight bits, and a scale of 16 bits for each 32 of them.
    assert_eq!(bits((1, 1)), 9.5 + 16.0 / 512.0);
}

#[test]
fn nothing_is_nested_deeper_than_the_grammar_says() {
    let parse = |base: &str, sums: &str| {
        serde_json::from_str::<Encoding>(&format!(
            r#"{{"name":"lowrank","block":16,"base":{{"name":{base}}},"sums":{{"name":{sums}}}}}"#
        ))
    };
    let full = r#""sparse24","values":{"name":"fixed12","base":100}"#;
    let expected = Lowrank {
        block: 16,
        base: Base::Sparse24(Sparse24 { values: Some(Inner::Fixed12 { base: 100 }) }),
        sums: Some(SumsEncoding::Abq(Abq::new(8))),
    };
    assert_eq!(parse(full, r#""abq","bits":8"#).unwrap(), Encoding::Lowrank(expected));
    for base in [
        r#""lowrank","block":16,"base":{"name":"raw"}"#,
        r#""abq","bits":4"#,
        r#""fixed12","base":100"#,
        r#""sparse24","values":{"name":"sparse24"}"#,
        r#""sparse24","values":{"name":"lowrank","block":16,"base":{"name":"raw"}}"#,
    ] {
        assert!(parse(base, r#""abq","bits":8"#).is_err(), "{base}");
    }
    for sums in [r#""raw""#, r#""sparse24""#, r#""fixed12","base":100"#] {
        assert!(parse(full, sums).is_err(), "{sums}");
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    for form in [(0, 0), (1, 0), (2, 1), (1, 1)] {
        let packed = matrix(Dtype::BF16, (3, 68), 16, form, 3);
        let stored = raw(packed.components());
        let refused = |dtype: Dtype, shape: &[u64], stored: &BTreeMap<String, Raw>, says: &str| {
            let error = open(&packed.encoding(), dtype, shape, stored).unwrap_err().to_string();
            assert!(error.contains(says), "{form:?}: {error}");
        };
        open(&packed.encoding(), Dtype::BF16, &[3, 68], &stored).unwrap();
        for shape in [&[3, 132][..], &[4, 68], &[3, 60]] {
            refused(Dtype::BF16, shape, &stored, "needs");
        }
        for shape in [&[204][..], &[], &[0, 68], &[3, 0], &[1 << 40, 1 << 40]] {
            refused(Dtype::BF16, shape, &stored, "is not a matrix that lowrank holds");
        }
        refused(Dtype::U8, &[3, 68], &stored, "lowrank holds F16, BF16 and F32");
        for name in stored.keys() {
            let mut less = stored.clone();
            less.remove(name);
            refused(Dtype::BF16, &[3, 68], &less, &format!("component {name} is missing"));
        }
        for name in ["other", "base.other", "sums.other", "positions", "base.base.data"] {
            let mut more = stored.clone();
            more.insert(name.to_owned(), (Dtype::U8, vec![1], vec![0]));
            refused(Dtype::BF16, &[3, 68], &more, "does not know");
        }
        for (change, says) in [
            (Lowrank { block: 0, ..*packed.parameters() }, "blocks of 0 columns"),
            (Lowrank { block: 1, ..*packed.parameters() }, "needs"),
        ] {
            let opened = open(&Encoding::Lowrank(change), Dtype::BF16, &[3, 68], &stored);
            assert!(opened.unwrap_err().to_string().contains(says));
        }
        let sums = Lowrank {
            sums: Some(SumsEncoding::Abq(Abq { activation_bits: Some(8), ..Abq::new(8) })),
            ..*packed.parameters()
        };
        let error = open(&Encoding::Lowrank(sums), Dtype::BF16, &[3, 68], &stored).unwrap_err().to_string();
        assert!(error.contains("activations of 8 bits"), "{error}");
    }
}

#[test]
fn contents_that_break_the_format_are_found_when_they_are_read() {
    let packed = matrix(Dtype::BF16, (3, 68), 16, (1, 0), 3);
    for (name, at, bytes, says) in [
        ("sums", 2 * 6, &[0x00, 0x7c][..], "u.sums: row 1: block 1: inf is not finite"),
        ("sums", 2 * 9, &[0x00, 0x7e], "u.sums: row 1: block 4: NaN is not finite"),
        ("base.positions", 9, &[0x45], "u.base.positions: row 1: columns 0 to 3"),
    ] {
        let mut stored = raw(packed.components());
        stored.get_mut(name).unwrap().2[at..at + bytes.len()].copy_from_slice(bytes);
        let reader = open(&packed.encoding(), Dtype::BF16, &[3, 68], &stored).unwrap();
        reader.read(0, &mut [0; 136]).expect("row 0 is sound");
        let error = reader.read(136, &mut [0; 136]).unwrap_err();
        assert_eq!(error.kind(), "corrupt");
        assert!(error.to_string().contains(says), "{error}");
        assert_eq!(reader.lowrank_rows(0..3).unwrap().unwrap_err().kind(), "corrupt");
    }
}
