//! Matrices that are two in four are packed without loss, and only those.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::Path;

use llmpress_formats::encoding::sparse24::{Inner, positions};
use llmpress_formats::{
    Checkpoint, Digest, Dtype, Encoding, MANIFEST_FILE, Manifest, Producer, RenderEntry, render,
};
use llmpress_numbers::Numbers;
use llmpress_pipeline::{Method, Options, Plan, Progress, Recipe, convert, restore};

struct Silent;

impl Progress for Silent {
    fn start(&self, _: u64) {}
    fn advance(&self, _: u64) {}
    fn shard(&self, _: &str) {}
}

fn options(jobs: usize) -> Options {
    Options {
        jobs: Some(jobs),
        max_memory: None,
        resume: false,
        force: false,
        producer: Producer { name: "test".to_owned(), version: "0.1.0".to_owned(), revision: None },
        extra_files: BTreeMap::new(),
    }
}

/// Of every quad at most `kept` elements that are not +0, with -0, infinities and what is no number among them.
fn matrix(dtype: Dtype, count: usize, kept: usize, seed: u64) -> Vec<u8> {
    let width = dtype.bits() as usize / 8;
    let mut numbers = Numbers::new(seed);
    let mut bytes = vec![0; count * width];
    for quad in bytes.chunks_exact_mut(4 * width) {
        for _ in 0..kept {
            let at = (numbers.bits() >> 8) as usize % 4 * width;
            let x = numbers.bits() >> 8;
            let value: u32 = match (x % 241, dtype) {
                (0, Dtype::F32) => 0x8000_0000,
                (0, _) => 0x8000,
                (1, Dtype::F32) => 0x7fc0_0001,
                (1, _) => 0x7fc1,
                (2, Dtype::F32) => 0xff80_0000,
                (2, _) => 0xff80,
                // Exponents as weights have them.
                (_, Dtype::F32) => 0x3d00_0000 + (x >> 8) as u32 % 0x0100_0000,
                (_, Dtype::F16) => 0x2400 + (x >> 8) as u32 % 0x0800,
                _ => 0x3d00 + (x >> 8) as u32 % 0x0100,
            };
            quad[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
        }
    }
    bytes
}

fn tensors() -> Vec<(&'static str, Dtype, Vec<u64>, Vec<u8>)> {
    let mut one_dense = matrix(Dtype::BF16, 40 * 64, 2, 9);
    one_dense[2 * (37 * 64 + 20)..][..8].copy_from_slice(&[1, 1, 1, 1, 1, 1, 0, 0]);
    let wild = (0..64 * 64).map(|i| if i % 4 < 2 { (i * 2039) as u16 } else { 0 });
    vec![
        ("dense", Dtype::BF16, vec![64, 64], matrix(Dtype::BF16, 64 * 64, 4, 1)),
        ("late.dense", Dtype::BF16, vec![40, 64], one_dense),
        ("sparse.bf16", Dtype::BF16, vec![112, 256], matrix(Dtype::BF16, 112 * 256, 2, 2)),
        ("sparse.f16", Dtype::F16, vec![3, 20], matrix(Dtype::F16, 60, 2, 3)),
        ("sparse.f32", Dtype::F32, vec![17, 36], matrix(Dtype::F32, 17 * 36, 2, 4)),
        ("sparse.experts", Dtype::BF16, vec![3, 8, 64], matrix(Dtype::BF16, 24 * 64, 2, 5)),
        ("sparse.wild", Dtype::BF16, vec![64, 64], wild.flat_map(u16::to_le_bytes).collect()),
        ("zeros", Dtype::BF16, vec![16, 128], vec![0; 4096]),
        ("three.columns", Dtype::BF16, vec![64, 3], vec![0; 384]),
        ("vector", Dtype::BF16, vec![64], vec![0; 128]),
        ("whole.numbers", Dtype::I64, vec![8, 8], vec![0; 512]),
    ]
}

fn source(dir: &Path) {
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join("config.json"), r#"{"model_type": "llama", "hidden_size": 64}"#).unwrap();
    let mut all = tensors();
    all.sort_by_key(|(name, dtype, ..)| (std::cmp::Reverse(*dtype), *name));
    let mut entries = Vec::new();
    let mut data: Vec<u8> = Vec::new();
    for (name, dtype, shape, bytes) in all {
        let begin = data.len() as u64;
        data.extend(bytes);
        entries.push(RenderEntry { name: name.to_owned(), dtype, shape, begin, end: data.len() as u64 });
    }
    let mut file = render(&entries, &BTreeMap::new(), None).unwrap();
    file.extend(data);
    std::fs::write(dir.join("model.safetensors"), file).unwrap();
}

fn made(from: &Path, out: &Path, to: Method, jobs: usize) -> Vec<(String, String)> {
    let checkpoint = Checkpoint::open(from).unwrap();
    let plan = Plan::new(&checkpoint, &Recipe::new(to), 1 << 30).unwrap();
    convert(&checkpoint, out, &plan, &options(jobs), &Silent).unwrap().fallbacks
}

fn check_bytes(dir: &Path) {
    let checkpoint = Checkpoint::open(dir).unwrap();
    for (name, _, _, bytes) in tensors() {
        assert!(checkpoint.read_tensor(name).unwrap() == bytes, "{name}");
    }
}

/// Whether the kept values of a matrix that is 2:4 are in fixed12.
fn in_fixed12(checkpoint: &Checkpoint, name: &str) -> bool {
    match checkpoint.units()[name].encoding() {
        Encoding::Sparse24(sparse) => matches!(sparse.values, Some(Inner::Fixed12 { .. })),
        _ => panic!("{name} is not sparse24"),
    }
}

#[test]
fn what_is_two_in_four_is_packed_and_the_rest_says_why_not() {
    let dir = tempfile::tempdir().unwrap();
    let (from, plain, strips) =
        (dir.path().join("from"), dir.path().join("plain"), dir.path().join("strips"));
    source(&from);
    let fallbacks = made(&from, &plain, Method::Sparse24, 2);
    check_bytes(&plain);
    let said: BTreeMap<&str, &str> =
        fallbacks.iter().map(|(name, why)| (name.as_str(), why.as_str())).collect();
    assert_eq!(said.keys().copied().collect::<Vec<_>>(), ["dense", "late.dense"]);
    assert!(said["dense"].starts_with("is not 2:4: row 0: more than two of columns "), "{said:?}");
    assert_eq!(said["late.dense"], "is not 2:4: row 37: more than two of columns 20 to 23 are not zero");
    let checkpoint = Checkpoint::open(&plain).unwrap();
    for (name, unit) in checkpoint.units() {
        let sparse = name.starts_with("sparse") || name == "zeros";
        assert_eq!(unit.encoding().name(), if sparse { "sparse24" } else { "raw" }, "{name}");
    }
    let bits = |dir: &Path, name: &str| {
        let checkpoint = Checkpoint::open(dir).unwrap();
        let tensor = checkpoint.tensor(name).unwrap();
        let weights: u64 = tensor.shape.iter().product();
        checkpoint.unit_of(tensor).unwrap().stored_bytes() as f64 * 8.0 / weights as f64
    };
    assert_eq!(bits(&plain, "sparse.experts"), 9.0);
    assert_eq!(bits(&plain, "zeros"), 9.0);

    let fallbacks = made(&from, &strips, Method::Sparse24Fixed12, 2);
    check_bytes(&strips);
    let checkpoint = Checkpoint::open(&strips).unwrap();
    let encoded = |name: &str| in_fixed12(&checkpoint, name);
    assert!(encoded("zeros") && encoded("sparse.bf16"));
    assert!(!encoded("sparse.f16") && !encoded("sparse.f32") && !encoded("sparse.wild"));
    let why = fallbacks.iter().find(|(name, _)| name == "sparse.wild").unwrap();
    assert!(why.1.contains("kept values stay plain"), "{}", why.1);
    // Seven bits, and offsets of tiles that are not full.
    assert!(bits(&strips, "zeros") < 7.2, "{}", bits(&strips, "zeros"));
}

#[test]
fn the_same_bytes_come_of_any_number_of_threads_and_go_back() {
    let dir = tempfile::tempdir().unwrap();
    let from = dir.path().join("from");
    source(&from);
    for method in [Method::Sparse24, Method::Sparse24Fixed12] {
        let out = |jobs: usize| dir.path().join(format!("{}{jobs}", method.name()));
        made(&from, &out(1), method, 1);
        made(&from, &out(4), method, 4);
        for file in ["model-00001-of-00001.safetensors", MANIFEST_FILE] {
            assert!(std::fs::read(out(1).join(file)).unwrap() == std::fs::read(out(4).join(file)).unwrap());
        }
        let back = dir.path().join(format!("{}-back", method.name()));
        let checkpoint = Checkpoint::open(&out(1)).unwrap();
        restore(&checkpoint, &back, 1 << 30, &options(2), &Silent).unwrap();
        check_bytes(&back);
        // And on to other methods, from there.
        for to in [Method::Planes, Method::Sparse24, Method::Sparse24Fixed12, Method::Fixed12] {
            let on = dir.path().join(format!("{}-{}", method.name(), to.name()));
            made(&out(1), &on, to, 2);
            check_bytes(&on);
            // Every zero would be an escape to fixed12 alone: what is stored as 2:4 stays so.
            if to == Method::Fixed12 {
                let on = Checkpoint::open(&on).unwrap();
                assert!(in_fixed12(&on, "zeros") && in_fixed12(&on, "sparse.bf16"));
                assert!(!in_fixed12(&on, "sparse.wild"));
            }
        }
    }
}

#[test]
fn what_was_kept_stays_kept_also_where_it_is_zero() {
    let dir = tempfile::tempdir().unwrap();
    let (from, plain) = (dir.path().join("from"), dir.path().join("plain"));
    source(&from);
    made(&from, &plain, Method::Sparse24, 1);
    // Other places for what is zero anyway: as a pass may have chosen them.
    let checkpoint = Checkpoint::open(&plain).unwrap();
    let component = checkpoint.units()["zeros"].components().get("positions").unwrap();
    let (file, at) = (component.path().to_owned(), component.file_offset() as usize);
    let mut bytes = std::fs::read(&file).unwrap();
    let chosen: Vec<u8> = (0..256).map(|i| [0x4e, 0xd9, 0x8c][i % 3]).collect();
    bytes[at..at + 256].copy_from_slice(&chosen);
    std::fs::write(&file, bytes).unwrap();
    let mut manifest = Manifest::read(&plain).unwrap().unwrap();
    let unit = manifest.units.get_mut("zeros").unwrap();
    unit.components.values_mut().find(|c| c.tensor.ends_with("positions")).unwrap().blake3 =
        Digest::of(&chosen);
    std::fs::write(plain.join(MANIFEST_FILE), manifest.to_bytes().unwrap()).unwrap();
    for to in [Method::Sparse24, Method::Sparse24Fixed12] {
        let on = dir.path().join(to.name());
        made(&plain, &on, to, 2);
        check_bytes(&on);
        let packed = Checkpoint::open(&on).unwrap().sparse_rows("zeros", 0..16).unwrap();
        assert!(packed.positions() == chosen);
        assert_eq!(positions::to_mask(positions::get(packed.positions_of(0), 0)), 0b1100);
    }
}

#[test]
fn a_plan_expects_what_a_sparse_matrix_takes() {
    let dir = tempfile::tempdir().unwrap();
    source(dir.path());
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    for (method, expected) in [(Method::Sparse24, 4096 / 16 * 9), (Method::Sparse24Fixed12, 256 + 1536 + 8)] {
        let plan = Plan::new(&checkpoint, &Recipe::new(method), 1 << 30).unwrap();
        let unit = plan.units().find(|unit| unit.name == "zeros").unwrap();
        assert_eq!((unit.method, unit.expected_bytes), (method, expected));
        let other = plan.units().find(|unit| unit.name == "three.columns").unwrap();
        assert_eq!((other.method, other.expected_bytes), (Method::Raw, 384));
    }
}
