//! A fine-tune as its difference from its base, and tensors with the same bytes once.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use llmpress_formats::{Checkpoint, Dtype};

use crate::support::{
    LLAMA, T, bf16, bytes, checkpoint, fails, llmpress, ok, path, random, run, same_files, t, tiny_llama,
};

/// Some of the last bits of some words are others.
fn updated(words: &[u8], seed: u64) -> Vec<u8> {
    let mut next = random(seed);
    let near = |pair: &[u8]| {
        let word = u16::from_le_bytes([pair[0], pair[1]]);
        let by = next();
        word.wrapping_add((by & by >> 8 & 7) as u16)
            .wrapping_sub((by >> 20 & by >> 30 & 7) as u16)
            .to_le_bytes()
    };
    words.chunks_exact(2).flat_map(near).collect()
}

/// A base, and a fine-tune with tensors of every kind: as they were, a little different, others, of another shape, added; in every dtype that
/// has an own way of being stored.
fn family(dir: &Path) -> (PathBuf, PathBuf) {
    let (mut base, mut tuned) = (tiny_llama(), tiny_llama());
    for (i, tensor) in tuned.iter_mut().enumerate().filter(|(i, _)| i % 3 != 0) {
        tensor.bytes = updated(&tensor.bytes, i as u64);
    }
    let halves = |seed| -> Vec<u8> { bf16(seed, 90 * 70).iter().map(|b| b ^ 0x20).collect() };
    let floats = |seed: u8| -> Vec<u8> {
        (0..90 * 99u32).flat_map(|i| (1.0 + i as f32 + f32::from(seed)).to_le_bytes()).collect()
    };
    let mut eighths = bytes(5, 100 * 128);
    let more = [
        ("a.f16", Dtype::F16, vec![90, 70], halves(1), updated(&halves(1), 9)),
        ("a.f32", Dtype::F32, vec![90, 99], floats(1), floats(2)),
        ("a.f32_same", Dtype::F32, vec![90, 99], floats(3), floats(3)),
        ("a.f8", Dtype::F8_E4M3, vec![100, 128], eighths.clone(), {
            eighths.iter_mut().step_by(7).for_each(|b| *b ^= 1);
            eighths
        }),
        ("a.unlike", Dtype::BF16, vec![100, 100], bytes(6, 20_000), bf16(8, 10_000)),
        ("a.empty", Dtype::BF16, vec![0, 7], Vec::new(), Vec::new()),
        ("a.one", Dtype::I64, vec![], vec![1; 8], vec![1; 8]),
    ];
    for (name, dtype, shape, before, after) in more {
        base.push(t(name, dtype, &shape, before));
        tuned.push(t(name, dtype, &shape, after));
    }
    base.push(t("b.shape", Dtype::BF16, &[100, 64], bf16(30, 6400)));
    tuned.push(t("b.shape", Dtype::BF16, &[64, 100], bf16(30, 6400)));
    tuned.push(t("b.added", Dtype::BF16, &[64, 100], bf16(31, 6400)));
    let (base_dir, tuned_dir) = (dir.join("base"), dir.join("tuned"));
    checkpoint(&base_dir, LLAMA, &base);
    checkpoint(&tuned_dir, LLAMA, &tuned);
    (base_dir, tuned_dir)
}

fn encoding(out: &Path, tensor: &str) -> serde_json::Value {
    let checkpoint = Checkpoint::open(out).unwrap();
    checkpoint.manifest().unwrap().units[tensor].encoding.value()
}

fn shards_bytes(out: &Path) -> u64 {
    Checkpoint::open(out).unwrap().manifest().unwrap().shards.values().map(|shard| shard.bytes).sum()
}

#[test]
fn a_fine_tune_is_restored_bit_for_bit_from_its_base() {
    let dir = tempfile::tempdir().unwrap();
    let (base, tuned) = family(dir.path());
    let at = |name: &str| dir.path().join(name);
    let (out, alone, back) = (at("out"), at("alone"), at("back"));
    ok(&["convert", path(&tuned), path(&alone), "--to", "archive"]);
    ok(&["convert", path(&tuned), path(&out), "--to", "archive", "--base", path(&base)]);
    assert!(shards_bytes(&out) * 2 < shards_bytes(&alone), "{} {}", shards_bytes(&out), shards_bytes(&alone));
    ok(&["restore", path(&out), path(&back), "--base", path(&base)]);
    assert!(ok(&["verify", path(&back), "--against", path(&tuned)]).contains("bit-identical"));
    assert!(!back.join("llmpress.json").exists());
    assert!(ok(&["verify", path(&out), "--base", path(&base)]).contains("every digest is right"));
    let against = ["verify", path(&out), "--base", path(&base), "--against", path(&tuned)];
    assert!(ok(&against).contains("bit-identical"));
    // Each tensor is stored as it is smallest.
    for (tensor, stored, coded) in [
        ("model.layers.0.self_attn.q_proj.weight", "delta", false),
        ("model.layers.0.mlp.up_proj.weight", "delta", true),
        ("a.f16", "delta", true),
        ("a.f8", "delta", true),
        ("a.f32_same", "delta", false),
        ("a.one", "delta", false),
        ("a.empty", "delta", false),
        ("a.f32", "planes", false),
        ("a.unlike", "archive", false),
        ("b.shape", "archive", false),
        ("b.added", "archive", false),
    ] {
        let found = encoding(&out, tensor);
        assert_eq!(
            (&found["name"], found.get("coded").is_some()),
            (&stored.into(), coded),
            "{tensor}: {found}"
        );
    }
    let manifest: serde_json::Value =
        serde_json::from_slice(&std::fs::read(out.join("llmpress.json")).unwrap()).unwrap();
    assert_eq!(manifest["base"]["name"], "base");
    assert!(!manifest.to_string().contains(path(dir.path())), "no path is stored");
    let inspected = ok(&["inspect", path(&out)]);
    assert!(inspected.contains("delta") && inspected.contains("base"), "{inspected}");
}

#[test]
fn a_fine_tune_that_is_its_base_takes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base");
    checkpoint(&base, LLAMA, &tiny_llama());
    let (out, back) = (dir.path().join("out"), dir.path().join("back"));
    ok(&["convert", path(&base), path(&out), "--to", "archive", "--base", path(&base)]);
    assert!(shards_bytes(&out) < 200, "{}", shards_bytes(&out));
    ok(&["verify", path(&out), "--base", path(&base)]);
    ok(&["restore", path(&out), path(&back), "--base", path(&base)]);
    assert!(ok(&["verify", path(&back), "--against", path(&base)]).contains("bit-identical"));
}

#[test]
fn bases_may_be_compressed_but_are_whole() {
    let dir = tempfile::tempdir().unwrap();
    let (base, tuned) = family(dir.path());
    let at = |name: &str| dir.path().join(name);
    ok(&["convert", path(&base), path(&at("archived")), "--to", "archive"]);
    for (out, by) in [("plain", &base), ("of-archive", &at("archived"))] {
        ok(&["convert", path(&tuned), path(&at(out)), "--to", "archive", "--base", path(by)]);
    }
    // The same tensors, whatever they lie in: either serves to restore the other.
    ok(&["restore", path(&at("of-archive")), path(&at("back")), "--base", path(&base)]);
    ok(&["restore", path(&at("plain")), path(&at("back2")), "--base", path(&at("archived"))]);
    for back in ["back", "back2"] {
        assert!(ok(&["verify", path(&at(back)), "--against", path(&tuned)]).contains("bit-identical"));
    }
    let by_difference =
        fails(&["convert", path(&base), path(&at("no")), "--to", "archive", "--base", path(&at("plain"))]);
    assert!(by_difference.contains("itself stored as its difference from base"), "{by_difference}");
    assert!(!at("no").exists());
}

#[test]
fn whatever_reads_a_difference_asks_for_its_base() {
    let dir = tempfile::tempdir().unwrap();
    let (base, tuned) = family(dir.path());
    let at = |name: &str| dir.path().join(name);
    let out = at("out");
    ok(&["convert", path(&tuned), path(&out), "--to", "archive", "--base", path(&base)]);
    let digest = encoding(&out, "a.f16")["base_blake3"].as_str().unwrap().to_owned();
    for args in [
        &["restore", path(&out), path(&at("no"))][..],
        &["verify", path(&out)],
        &["verify", path(&out), "--against", path(&tuned)],
        &["verify", path(&tuned), "--against", path(&out)],
        &["diff", path(&out), path(&tuned)],
        &["convert", path(&out), path(&at("no")), "--to", "planes"],
        &["export", path(&out), path(&at("no")), "--as", "safetensors"],
        &["inspect", path(&out), "--entropy"],
    ] {
        let error = fails(args);
        assert!(error.contains("difference from") && error.contains(" base"), "{args:?}: {error}");
        assert!(error.contains("BLAKE3") && error.contains("--base"), "{args:?}: {error}");
        assert!(!at("no").exists(), "{args:?}");
    }
    let error = fails(&["convert", path(&out), path(&at("no")), "--to", "planes"]);
    let known = Checkpoint::open(&out).unwrap();
    let first = known
        .manifest()
        .unwrap()
        .units
        .values()
        .find_map(|unit| Some(unit.encoding.value()["base_blake3"].as_str()?.to_owned()));
    assert!(error.contains(&first.unwrap()) || error.contains(&digest), "{error}");
    // What is stored can be checked without.
    ok(&["verify", path(&out), "--no-decode"]);
}

#[test]
fn another_base_is_refused_by_its_digest() {
    let dir = tempfile::tempdir().unwrap();
    let (base, tuned) = family(dir.path());
    let at = |name: &str| dir.path().join(name);
    let out = at("out");
    ok(&["convert", path(&tuned), path(&out), "--to", "archive", "--base", path(&base)]);
    // One bit of one tensor; a tensor less; another shape.
    let mut tensors: Vec<T> = Vec::new();
    let whole = Checkpoint::open(&base).unwrap();
    for (name, tensor) in whole.tensors() {
        tensors.push(t(name, tensor.dtype, &tensor.shape, whole.read_tensor(name).unwrap()));
    }
    let other = |name: &str, change: &dyn Fn(&mut Vec<T>)| {
        let mut tensors = tensors.clone();
        change(&mut tensors);
        checkpoint(&at(name), LLAMA, &tensors);
        at(name)
    };
    let found = tensors.iter().position(|tensor| tensor.name == "a.f16").unwrap();
    let bit = other("bit", &|tensors| tensors[found].bytes[900] ^= 4);
    let less = other("less", &|tensors| drop(tensors.remove(found)));
    let shape = other("shape", &|tensors| tensors[found].shape.reverse());
    for (wrong, words) in [(&bit, "instead of"), (&less, "no tensor a.f16"), (&shape, "no tensor a.f16")] {
        let error = fails(&["restore", path(&out), path(&at("back")), "--base", path(wrong)]);
        assert!(error.contains("not the base") && error.contains("base") && error.contains(words), "{error}");
        assert!(!at("back").join("config.json").exists());
        let _ = std::fs::remove_dir_all(at("back"));
    }
    let verified = run(&["verify", path(&out), "--base", path(&bit)]);
    let text = String::from_utf8_lossy(&verified.stdout).into_owned();
    assert!(
        verified.status.code() == Some(1) && text.contains("a.f16") && text.contains("instead of"),
        "{text}"
    );
    // Where there is nothing to do with a base.
    for args in [
        &["restore", path(&tuned), path(&at("back")), "--base", path(&base)][..],
        &["verify", path(&at("bit")), "--against", path(&base), "--base", path(&base)],
    ] {
        let error = fails(args);
        assert!(error.contains("leave --base out"), "{error}");
    }
    for args in [
        &["convert", path(&tuned), path(&at("x")), "--to", "planes", "--base", path(&base)][..],
        &["plan", path(&tuned), "--to", "drop:attn=1+archive", "--base", path(&base)],
    ] {
        assert!(fails(args).contains("--to archive"), "{args:?}");
    }
    checkpoint(&at("unlike"), LLAMA, &[t("other.weight", Dtype::BF16, &[64, 64], bf16(1, 4096))]);
    let unlike =
        fails(&["convert", path(&tuned), path(&at("x")), "--to", "archive", "--base", path(&at("unlike"))]);
    assert!(unlike.contains("has no tensor with the name") && !at("x").exists(), "{unlike}");
}

#[test]
fn differences_do_not_depend_on_threads_memory_plans_or_interruptions() {
    let dir = tempfile::tempdir().unwrap();
    let (base, tuned) = family(dir.path());
    let at = |name: &str| dir.path().join(name);
    let options = ["--to", "archive", "--max-shard-size", "40K", "--base", path(&base)];
    let convert = |out: &Path, more: &[&str]| {
        ok(&[&["convert", path(&tuned), path(out), "--quiet"], &options[..], more].concat());
    };
    let whole = at("whole");
    let start = Instant::now();
    convert(&whole, &["--jobs", "1"]);
    let full = start.elapsed();
    for (i, more) in [&["--jobs", "5"][..], &["--jobs", "2", "--max-memory", "64M"]].into_iter().enumerate() {
        let out = at(&format!("other-{i}"));
        convert(&out, more);
        same_files(&whole, &out);
    }
    // By a plan, at once and by workers.
    let plan = ok(&[&["plan", path(&tuned), "--json"], &options[..]].concat());
    std::fs::write(at("plan.json"), plan).unwrap();
    ok(&["convert", path(&tuned), path(&at("planned")), "--plan", path(&at("plan.json")), "--quiet"]);
    same_files(&whole, &at("planned"));
    ok(&[
        "worker",
        "--plan",
        path(&at("plan.json")),
        path(&at("worked")),
        "--num-jobs",
        "1",
        "--job-rank",
        "0",
    ]);
    ok(&["merge", "--plan", path(&at("plan.json")), path(&at("worked")), "--quiet"]);
    same_files(&whole, &at("worked"));
    for step in 0..8u32 {
        let out = at(&format!("killed-{step}"));
        let mut command = llmpress();
        command.args(["convert", path(&tuned), path(&out), "--quiet"]).args(options).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        std::thread::sleep(full.mul_f64(f64::from(step) / 8.0).max(Duration::from_millis(1)));
        child.kill().unwrap();
        child.wait().unwrap();
        convert(&out, &["--resume"]);
        convert(&out, &["--resume"]);
        same_files(&whole, &out);
    }
    // What another base made is not gone on with.
    let other = at("renamed");
    std::fs::rename(&base, &other).unwrap();
    let args = [
        "convert",
        path(&tuned),
        path(&whole),
        "--resume",
        "--quiet",
        "--to",
        "archive",
        "--max-shard-size",
        "40K",
    ];
    let refused = fails(&[&args[..], &["--base", path(&other)]].concat());
    assert!(refused.contains("made with another base (base)"), "{refused}");
    assert!(fails(&args).contains("made as its difference from base"));
}

#[test]
fn tensors_with_the_same_bytes_are_stored_once() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let (source, out, back) = (at("source"), at("out"), at("back"));
    let mut tensors = tiny_llama();
    let head = tensors.last().unwrap().bytes.clone();
    tensors.push(t("model.embed_tokens.weight", Dtype::BF16, &[128, 64], head.clone()));
    // Alike where one looks first; the same bytes in another dtype and shape; small ones; experts, each of them twice.
    let mut near = head.clone();
    near[6000] ^= 1;
    tensors.push(t("near", Dtype::BF16, &[128, 64], near));
    tensors.push(t("half", Dtype::F16, &[128, 64], head.clone()));
    tensors.push(t("turned", Dtype::BF16, &[64, 128], head));
    for name in ["small.a", "small.b"] {
        tensors.push(t(name, Dtype::F32, &[32], bytes(3, 128)));
    }
    for i in 0..6 {
        tensors.push(t(&format!("experts.{i}"), Dtype::BF16, &[96, 64], bf16(50 + i % 3, 96 * 64)));
        tensors.push(t(&format!("experts.{i}.mask"), Dtype::U8, &[2000], bytes(60 + i % 3, 2000)));
    }
    checkpoint(&source, LLAMA, &tensors);
    let args = ["--to", "archive", "--max-shard-size", "30K"];
    ok(&[&["convert", path(&source), path(&out)], &args[..]].concat());
    for (tensor, stored_as) in [
        ("model.embed_tokens.weight", Some("lm_head.weight")),
        ("experts.3", Some("experts.0")),
        ("experts.5", Some("experts.2")),
        ("experts.4.mask", Some("experts.1.mask")),
        ("lm_head.weight", None),
        ("near", None),
        ("half", None),
        ("turned", None),
        ("experts.1", None),
        ("small.b", None),
    ] {
        let found = encoding(&out, tensor);
        assert_eq!(found.get("tensor").and_then(|t| t.as_str()), stored_as, "{tensor}: {found}");
        assert_eq!(found["name"] == "same", stored_as.is_some(), "{tensor}: {found}");
    }
    ok(&["verify", path(&out)]);
    assert!(ok(&["verify", path(&out), "--against", path(&source)]).contains("bit-identical"));
    ok(&["restore", path(&out), path(&back)]);
    assert!(ok(&["verify", path(&back), "--against", path(&source)]).contains("bit-identical"));
    // They count as tensors and take nothing.
    let inspected: serde_json::Value = serde_json::from_str(&ok(&["inspect", path(&out), "--json"])).unwrap();
    let same = &inspected["by_encoding"]["same"];
    assert_eq!((&same["tensors"], &same["stored_bytes"]), (&7.into(), &0.into()), "{inspected}");
    let total: usize = tensors.iter().map(|tensor| tensor.bytes.len()).sum();
    assert_eq!(inspected["tensor_bytes"], total);
    // From archive to archive, on any number of threads and by workers, the same bytes come of it; from there to other encodings, all tensors.
    let again = at("again");
    ok(&[&["convert", path(&source), path(&again), "--jobs", "1"], &args[..]].concat());
    same_files(&out, &again);
    let plan = ok(&[&["plan", path(&source), "--json"], &args[..]].concat());
    std::fs::write(at("plan.json"), plan).unwrap();
    ok(&[
        "worker",
        "--plan",
        path(&at("plan.json")),
        path(&at("worked")),
        "--num-jobs",
        "1",
        "--job-rank",
        "0",
    ]);
    ok(&["merge", "--plan", path(&at("plan.json")), path(&at("worked")), "--quiet"]);
    same_files(&out, &at("worked"));
    ok(&["convert", path(&out), path(&at("archived")), "--to", "archive"]);
    assert_eq!(encoding(&at("archived"), "experts.3")["name"], "same");
    for (method, source_of) in [("planes", &out), ("raw", &at("archived"))] {
        ok(&["convert", path(source_of), path(&at(method)), "--to", method]);
        assert!(ok(&["verify", path(&at(method)), "--against", path(&source)]).contains("bit-identical"));
        assert_ne!(encoding(&at(method), "experts.3")["name"], "same");
    }
    // A fine-tune of it: what is the base's is that, what is twice is once.
    ok(&["convert", path(&source), path(&at("delta")), "--to", "archive", "--base", path(&out)]);
    ok(&["restore", path(&at("delta")), path(&at("undone")), "--base", path(&source)]);
    assert!(ok(&["verify", path(&at("undone")), "--against", path(&source)]).contains("bit-identical"));
}

#[test]
fn a_manifest_whose_links_lead_nowhere_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let (base, tuned) = family(dir.path());
    let (source, same, delta) = (at("source"), at("same"), at("delta"));
    let mut tensors = tiny_llama();
    for i in 0..3 {
        tensors.push(t(&format!("experts.{i}"), Dtype::BF16, &[96, 64], bf16(50, 96 * 64)));
    }
    checkpoint(&source, LLAMA, &tensors);
    ok(&["convert", path(&source), path(&same), "--to", "archive"]);
    ok(&["convert", path(&tuned), path(&delta), "--to", "archive", "--base", path(&base)]);
    let changed = |out: &Path, change: &dyn Fn(&mut llmpress_formats::Manifest)| {
        let mut manifest = Checkpoint::open(out).unwrap().manifest().unwrap().clone();
        change(&mut manifest);
        let whole = std::fs::read(out.join("llmpress.json")).unwrap();
        std::fs::write(out.join("llmpress.json"), manifest.to_bytes().unwrap()).unwrap();
        let error = Checkpoint::open(out).err().unwrap();
        std::fs::write(out.join("llmpress.json"), whole).unwrap();
        assert_eq!(error.kind(), "corrupt", "{error}");
        error.to_string()
    };
    let to = |name: &str, tensor: &str| {
        let encoding = serde_json::json!({"name": "same", "tensor": tensor});
        changed(&same, &|manifest| manifest.units.get_mut(name).unwrap().encoding = encoding.clone().into())
    };
    for (name, target, words) in [
        ("experts.1", "experts.9", "no tensor that is stored itself"),
        ("experts.1", "experts.1", "no tensor that is stored itself"),
        ("experts.1", "experts.2", "no tensor that is stored itself"),
        ("experts.2", "experts.1", "no tensor that is stored itself"),
        ("experts.1", "lm_head.weight", "another dtype or shape"),
        ("experts.0", "lm_head.weight", "components of its own"),
    ] {
        let error = to(name, target);
        assert!(error.contains(words) && error.contains(name), "{error}");
    }
    let none = changed(&delta, &|manifest| manifest.base = None);
    assert!(none.contains("names none"), "{none}");
    let other = changed(&delta, &|manifest| {
        let digest = &mut manifest.base.as_mut().unwrap().blake3;
        digest.0[0] ^= 1;
    });
    assert!(other.contains("its digest is not that"), "{other}");
    let another = changed(&delta, &|manifest| {
        let unit = manifest.units.get_mut("a.f16").unwrap();
        let mut value = unit.encoding.value();
        value["base_blake3"] = "0".repeat(64).into();
        unit.encoding = value.into();
    });
    assert!(another.contains("its digest is not that"), "{another}");
}
