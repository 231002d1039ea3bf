//! Checkpoints that other tools quantised, written by those tools (`foreign/make_foreign.py`).
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use llmpress_formats::foreign::Layout;
use llmpress_formats::{Checkpoint, Dtype, Encoding};

const WEIGHT: &str = "model.layers.0.self_attn.q_proj.weight";

fn directory(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/foreign").join(name)
}

/// A copy of a checkpoint, whose configuration is changed.
fn changed(name: &str, from: &str, to: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(directory(name).join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
    let config = std::fs::read_to_string(directory(name).join("config.json")).unwrap();
    assert!(config.contains(from), "{config}");
    std::fs::write(dir.path().join("config.json"), config.replace(from, to)).unwrap();
    dir
}

fn names() -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(directory(""))
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.path().is_dir())
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert!(names.len() >= 10, "{names:?}");
    names
}

#[test]
fn matrices_are_the_numbers_that_their_own_tools_make_of_them() {
    for name in names() {
        let checkpoint = Checkpoint::open_dequantised(&directory(&name)).unwrap();
        let expected = std::fs::read(directory(&name).join("expected.safetensors")).unwrap();
        let expected = safetensors::SafeTensors::deserialize(&expected).unwrap();
        let expected = expected.tensor(WEIGHT).unwrap();
        let tensor = checkpoint.tensor(WEIGHT).unwrap();
        assert_eq!(tensor.shape, [64, 96], "{name}");
        assert_eq!(tensor.dtype.name(), expected.dtype().to_string(), "{name}");
        assert!(checkpoint.read_tensor(WEIGHT).unwrap() == expected.data(), "{name}");
        // Any part of it, and what is not quantised.
        for (first, count) in [(0, 0), (1, 1), (95, 2), (97, 200), (6143, 1), (960, 5184)] {
            let mut part = vec![0; count * 2];
            checkpoint.read(WEIGHT, first as u64 * 2, &mut part).unwrap();
            assert!(part == expected.data()[first * 2..][..count * 2], "{name} {first} {count}");
        }
        assert_eq!(checkpoint.tensor("model.norm.weight").unwrap().dtype, Dtype::BF16);
        assert_eq!(checkpoint.tensors().len(), 2, "{name}");
        // Without being asked for numbers, the tensors are those of the file.
        assert!(Checkpoint::open(&directory(&name)).unwrap().tensors().len() > 2, "{name}");
    }
}

#[test]
fn their_codes_fit_abq_where_groups_are_of_neighbours() {
    for name in names() {
        let checkpoint = Checkpoint::open_dequantised(&directory(&name)).unwrap();
        let codes = checkpoint.codes(WEIGHT).unwrap().unwrap();
        let abq = codes.foreign().abq();
        if name == "gptq-act-order" {
            assert!(abq.unwrap_err().to_string().contains("act-order"));
            continue;
        }
        let abq = abq.unwrap();
        let encoding = checkpoint.unit_of(checkpoint.tensor(WEIGHT).unwrap()).unwrap().encoding();
        assert_eq!(*encoding, Encoding::Foreign(*codes.foreign()));
        assert!(encoding.is_lossy());
        assert_eq!(abq.activation_bits, name.ends_with("a8").then_some(8), "{name}");
        let (mut zeros, mut all) = (vec![0; 64 * codes.groups()], vec![0; 64 * 96]);
        codes.read_zeros(0..64, &mut zeros).unwrap();
        codes.read_codes(0..64, &mut all).unwrap();
        assert!(all.iter().all(|code| u32::from(*code) < abq.levels()), "{name}");
        if !codes.foreign().zeros {
            assert!(zeros.iter().all(|zero| *zero == abq.centre()), "{name}");
        }
        // Some rows are those rows.
        for rows in [0..0, 3..4, 5..17, 63..64] {
            let count = (rows.end - rows.start) as usize;
            let (mut some, mut some_zeros) = (vec![0; count * 96], vec![0; count * codes.groups()]);
            codes.read_codes(rows.clone(), &mut some).unwrap();
            codes.read_zeros(rows.clone(), &mut some_zeros).unwrap();
            let start = rows.start as usize;
            assert!(some == all[start * 96..][..count * 96], "{name} {rows:?}");
            assert!(
                some_zeros == zeros[start * codes.groups()..][..count * codes.groups()],
                "{name} {rows:?}"
            );
        }
    }
}

#[test]
fn codes_in_memory_decode_to_the_bytes_of_the_tensor() {
    for name in names() {
        let checkpoint = Checkpoint::open_dequantised(&directory(&name)).unwrap();
        let expected = checkpoint.read_tensor(WEIGHT).unwrap();
        let held = checkpoint.codes(WEIGHT).unwrap().unwrap().held().unwrap();
        for rows in [0..64, 0..0, 5..6, 31..64] {
            let mut out = vec![0; rows.len() * 96 * 2];
            held.read_rows(rows.clone(), &mut out).unwrap();
            assert!(out == expected[rows.start * 192..rows.end * 192], "{name} {rows:?}");
        }
        assert!(
            held.read_rows(63..65, &mut [0; 384]).is_err() && held.read_rows(0..1, &mut [0; 191]).is_err()
        );
        // As abq it decodes to the numbers before they are rounded.
        let Ok(packed) = held.packed() else {
            assert_eq!(name, "gptq-act-order");
            continue;
        };
        let mut row = vec![0.0; 96];
        packed.decode_row(7, &mut row).unwrap();
        let rounded = |value: f32| match checkpoint.tensor(WEIGHT).unwrap().dtype {
            Dtype::F16 => half::f16::from_f32(value).to_bits(),
            _ => half::bf16::from_f32(value).to_bits(),
        };
        let bytes: Vec<u8> = row.iter().flat_map(|value| rounded(*value).to_le_bytes()).collect();
        assert!(bytes == expected[7 * 192..8 * 192], "{name}");
    }
}

#[test]
fn layouts_and_settings_that_are_not_read_are_refused_by_name() {
    for (name, from, to, expected) in [
        ("gptq-w4", "\"gptq\"", "\"exl2\"", "there is no tensor"),
        ("gptq-w4", "\"bits\": 4", "\"bits\": 5", "5 bits"),
        ("gptq-w4", "\"bits\": 4", "\"bits\": 8", "model.layers.0.self_attn.q_proj"),
        ("gptq-w4", "\"group_size\": 32", "\"group_size\": 64", "3 groups"),
        ("gptq-w4", "\"group_size\": 32", "\"group_size\": 0", "group_size 0"),
        ("gptq-w4", "\"sym\": false", "\"checkpoint_format\": \"marlin\"", "marlin"),
        ("awq-g32", "\"gemm\"", "\"gemv\"", "gemv"),
        ("awq-g32", "\"bits\": 4", "\"bits\": 3", "3 bits"),
        ("pack-w4-g32", "\"num_bits\": 4", "\"num_bits\": 7", "words a row"),
        ("pack-w4-g32", "\"num_bits\": 4", "\"num_bits\": 200", "200 bits"),
        ("pack-w4-g32", "\"type\": \"int\"", "\"type\": \"float\"", "of float"),
        ("pack-w4-g32", "\"Linear\"", "\"Conv2d\"", "config_groups"),
        ("pack-w4-g32", "\"strategy\": \"group\"", "\"strategy\": \"block\"", "scales by block"),
        ("int-w8-a8", "\"num_bits\": 8,\n", "\"num_bits\": 3,\n", "where 3 bits hold"),
    ] {
        let dir = changed(name, from, to);
        let opened = Checkpoint::open_dequantised(dir.path());
        let read = opened.and_then(|checkpoint| checkpoint.read_tensor(WEIGHT));
        let error = read.unwrap_err().to_string();
        assert!(error.contains(expected), "{name} {to}: {error}");
    }
}

#[test]
fn the_second_version_of_gptq_stores_zero_points_as_they_are() {
    let dir = changed("gptq-w4", "\"sym\": false", "\"checkpoint_format\": \"gptq_v2\"");
    let second = Checkpoint::open_dequantised(dir.path()).unwrap();
    let first = Checkpoint::open_dequantised(&directory("gptq-w4")).unwrap();
    let zeros = |checkpoint: &Checkpoint| {
        let codes = checkpoint.codes(WEIGHT).unwrap().unwrap();
        let mut zeros = vec![0; 64 * 3];
        codes.read_zeros(0..64, &mut zeros).unwrap();
        (codes.foreign().layout, zeros)
    };
    let ((one, a), (two, b)) = (zeros(&first), zeros(&second));
    assert_eq!((one, two), (Layout::Gptq { plain_zeros: false }, Layout::Gptq { plain_zeros: true }));
    assert!(a.iter().zip(&b).all(|(a, b)| *a == *b + 1));
}

#[test]
fn groups_are_found_by_name_or_pattern_before_class() {
    for (from, to, read) in [
        ("\"Linear\"", "\"re:.*q_proj\"", true),
        ("\"Linear\"", "\"re:q_proj\"", false),
        ("\"Linear\"", "\"model.layers.0.self_attn.q_proj\"", true),
        ("\"Linear\"", "\"re:(((a{99}){99}){99}){99}\"", false),
        ("\"Linear\"", "\"re:(\"", false),
    ] {
        let dir = changed("pack-w4-g32", from, to);
        assert_eq!(Checkpoint::open_dequantised(dir.path()).is_ok(), read, "{to}");
    }
}
