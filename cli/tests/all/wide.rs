//! Rows of any length: memory and time do not depend on them where a fixed12 matrix is decoded.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::path::Path;
use std::time::{Duration, Instant};

use crate::support::{self, bf16, ok, path, random, t};
use llmpress_formats::{Checkpoint, Dtype};

/// A checkpoint with one matrix, as it is and as fixed12.
fn matrix(dir: &Path, rows: u64, cols: u64) -> (std::path::PathBuf, std::path::PathBuf) {
    let (source, out) = (dir.join("source"), dir.join("out"));
    let words = bf16(5, (rows * cols) as usize);
    support::checkpoint(&source, support::LLAMA, &[t("wide.weight", Dtype::BF16, &[rows, cols], words)]);
    ok(&["convert", path(&source), path(&out), "--to", "fixed12", "--jobs", "1"]);
    (source, out)
}

#[test]
fn every_part_of_a_wide_matrix_reads_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    // More than a scratch buffer holds of 16 rows, the last columns and rows padded.
    let (source, out) = matrix(dir.path(), 31, 70_001);
    ok(&["verify", path(&out), "--against", path(&source)]);
    let (source, out) = (Checkpoint::open(&source).unwrap(), Checkpoint::open(&out).unwrap());
    assert_eq!(out.units()["wide.weight"].encoding().name(), "fixed12");
    let whole = source.read_tensor("wide.weight").unwrap();
    let mut next = random(7);
    let total = whole.len() / 2;
    for most in [1, 64, 3000, 70_001, 200_000, total] {
        for _ in 0..8 {
            let len = next() as usize % most + 1;
            let first = next() as usize % (total - len + 1);
            let mut part = vec![0; len * 2];
            out.read("wide.weight", first as u64 * 2, &mut part).unwrap();
            assert!(part == whole[first * 2..(first + len) * 2], "{len} from {first}");
        }
    }
}

#[test]
fn restoring_wide_rows_keeps_to_the_memory_allowed_and_ends_soon() {
    let dir = tempfile::tempdir().unwrap();
    let (source, out) = matrix(dir.path(), 16, 3_000_000);
    let back = dir.path().join("back");
    let started = Instant::now();
    let summary = ok(&["restore", path(&out), path(&back), "--max-memory", "100M", "--jobs", "2", "--json"]);
    let took = started.elapsed();
    let summary: serde_json::Value = serde_json::from_str(&summary).unwrap();
    let peak = summary["peak_memory_bytes"].as_u64().unwrap();
    assert!(peak <= 100 << 20, "{} KiB", peak >> 10);
    assert!(took < Duration::from_secs(60), "{took:?}");
    ok(&["verify", path(&back), "--against", path(&source)]);
}

#[test]
fn converting_wide_rows_keeps_to_the_memory_allowed_and_gives_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    // A strip and most of another; columns that fill no tile.
    let (source, out) = matrix(dir.path(), 31, 1_000_001);
    let small = dir.path().join("small");
    let args = ["convert", path(&source), path(&small), "--to", "fixed12", "--jobs", "2", "--json"];
    let started = Instant::now();
    let summary = ok(&[&args[..], &["--max-memory", "60M"]].concat());
    assert!(started.elapsed() < Duration::from_secs(60), "{:?}", started.elapsed());
    let summary: serde_json::Value = serde_json::from_str(&summary).unwrap();
    let peak = summary["peak_memory_bytes"].as_u64().unwrap();
    assert!(peak <= 60 << 20, "{} KiB", peak >> 10);
    assert!(support::files(&out) == support::files(&small));
    ok(&["verify", path(&small), "--against", path(&source)]);
}
