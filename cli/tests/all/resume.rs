//! Interruption at any moment: what `--resume` makes of it is what an undisturbed run makes.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use crate::support::{self, fails, files, llmpress, ok, path, same_files, tinylm};
use std::process::Stdio;
use std::time::{Duration, Instant};

#[test]
fn killed_at_many_points_the_resumed_result_is_identical() {
    let dir = tempfile::tempdir().unwrap();
    let source = tinylm();
    for method in ["dfloat11", "fixed12", "planes", "archive"] {
        let whole = dir.path().join(format!("{method}-whole"));
        let options = ["--to", method, "--max-shard-size", "1M", "--jobs", "2", "--quiet"];
        let command = |out: &std::path::Path| {
            let mut command = llmpress();
            command.args(["convert", path(&source), path(out)]).args(options);
            command
        };
        let start = Instant::now();
        assert!(command(&whole).status().unwrap().success());
        let full = start.elapsed();
        let (mut interrupted, mut early) = (0, 0);
        for step in 0..24u32 {
            let out = dir.path().join(format!("{method}-{step}"));
            let mut child = command(&out).stderr(Stdio::null()).spawn().unwrap();
            std::thread::sleep(full.mul_f64(f64::from(step) / 24.0).max(Duration::from_millis(1)));
            child.kill().unwrap();
            child.wait().unwrap();
            if !out.join("llmpress.json").exists() {
                interrupted += 1;
                early += u32::from(!out.join(".llmpress").exists());
            }
            // Twice: the second finds everything done.
            for _ in 0..2 {
                assert!(command(&out).arg("--resume").status().unwrap().success());
            }
            same_files(&whole, &out);
        }
        assert!(interrupted > early, "at least one run was interrupted at work");
    }
}

#[test]
fn a_resumed_run_keeps_finished_shards_and_repeats_damaged_ones() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, out) = (dir.path().join("whole"), dir.path().join("out"));
    let convert = |out: &std::path::Path, more: &[&str]| {
        let mut args =
            vec!["convert", "SOURCE", path(out), "--to", "dfloat11", "--max-shard-size", "2M", "--json"];
        let source = tinylm();
        args[1] = path(&source);
        args.extend(more);
        serde_json::from_str::<serde_json::Value>(&ok(&args)).unwrap()
    };
    convert(&whole, &[]);
    // The state of a run that was killed after its shards: no manifest, receipts there.
    let mut child = llmpress()
        .args([
            "convert",
            path(&tinylm()),
            path(&out),
            "--to",
            "dfloat11",
            "--max-shard-size",
            "2M",
            "--quiet",
        ])
        .spawn()
        .unwrap();
    while !out.join(".llmpress/model-00003-of-00008.safetensors.json").exists() {
        if child.try_wait().unwrap().is_some() {
            return; // Too fast to be caught here; the test above covers it.
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    if out.join("llmpress.json").exists() {
        return;
    }
    let finished = out.join("model-00002-of-00008.safetensors");
    if finished.exists() {
        let len = std::fs::metadata(&finished).unwrap().len();
        std::fs::File::options().write(true).open(&finished).unwrap().set_len(len - 1).unwrap();
    }
    let summary = convert(&out, &["--resume"]);
    assert!(summary["resumed_shards"].as_u64().unwrap() >= 2, "{summary}");
    same_files(&whole, &out);
}

#[test]
fn restore_resumes_too() {
    let dir = tempfile::tempdir().unwrap();
    let (compressed, whole, out) = (dir.path().join("c"), dir.path().join("whole"), dir.path().join("out"));
    ok(&["convert", path(&tinylm()), path(&compressed), "--to", "dfloat11"]);
    let restore = |out: &std::path::Path| {
        let mut command = llmpress();
        command.args(["restore", path(&compressed), path(out), "--max-shard-size", "2M", "--quiet"]);
        command
    };
    let start = Instant::now();
    assert!(restore(&whole).status().unwrap().success());
    let full = start.elapsed();
    for step in 0..8u32 {
        let _ = std::fs::remove_dir_all(&out);
        let mut child = restore(&out).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(full.mul_f64(f64::from(step) / 8.0));
        child.kill().unwrap();
        child.wait().unwrap();
        if out.exists() && !out.join(".llmpress").exists() && !files(&out).is_empty() {
            continue; // It was complete already.
        }
        assert!(restore(&out).arg("--resume").status().unwrap().success());
        same_files(&whole, &out);
    }
}

#[test]
fn an_output_in_the_way_is_never_touched() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    support::checkpoint(&source, support::LLAMA, &support::tiny_llama());
    let out = dir.path().join("out");
    let convert = |out: &std::path::Path, more: &[&str]| {
        let mut args = vec!["convert", path(&source), path(out), "--to", "planes"];
        args.extend(more);
        fails(&args)
    };
    ok(&["convert", path(&source), path(&out), "--to", "planes"]);
    let before = files(&out);
    assert!(convert(&out, &[]).contains("already holds a checkpoint"));
    let other = fails(&["convert", path(&source), path(&out), "--to", "fixed12", "--resume"]);
    assert!(other.contains("already holds a checkpoint"), "{other}");
    assert!(convert(&source, &[]).contains("source"));
    assert!(convert(dir.path(), &["--force"]).contains("contains the source"));
    assert_eq!(files(&out), before);
    let foreign = dir.path().join("foreign");
    std::fs::create_dir(&foreign).unwrap();
    std::fs::write(foreign.join("thesis.txt"), "years of work").unwrap();
    assert!(convert(&foreign, &["--force"]).contains("was not made by llmpress"));
    assert!(foreign.join("thesis.txt").exists());
    let file = dir.path().join("file");
    std::fs::write(&file, "x").unwrap();
    assert!(convert(&file, &[]).contains("is a file"));
    std::fs::write(out.join("notes.txt"), "mine").unwrap();
    ok(&["convert", path(&source), path(&out), "--to", "fixed12", "--force"]);
    assert!(out.join("notes.txt").exists(), "only what a conversion made is replaced");
    ok(&["verify", path(&out), "--against", path(&source)]);
    // An unfinished conversion by another recipe.
    let half = dir.path().join("half");
    std::fs::create_dir_all(half.join(".llmpress")).unwrap();
    std::fs::copy(out.join("llmpress.json"), half.join("llmpress.json")).unwrap();
    let plan = ok(&["plan", path(&source), "--to", "dfloat11", "--json"]);
    std::fs::write(half.join(".llmpress/plan.json"), plan).unwrap();
    assert!(convert(&half, &[]).contains("unfinished"));
    assert!(convert(&half, &["--resume"]).contains("cannot resume"));
}

#[test]
fn killed_while_it_replaces_an_earlier_job_it_goes_on_or_starts_over() {
    let dir = tempfile::tempdir().unwrap();
    let (first, whole) = (dir.path().join("first"), dir.path().join("whole"));
    let source = dir.path().join("source");
    support::checkpoint(&source, support::LLAMA, &support::tiny_llama());
    std::fs::write(source.join("chat_template.jinja"), "of the first").unwrap();
    ok(&["convert", path(&source), path(&first), "--to", "planes", "--max-shard-size", "20K"]);
    let options = ["--to", "fixed12", "--max-shard-size", "60K", "--jobs", "2", "--quiet"];
    let command = |out: &std::path::Path| {
        let mut command = llmpress();
        command.args(["convert", path(&tinylm()), path(out)]).args(options);
        command
    };
    let start = Instant::now();
    assert!(command(&whole).status().unwrap().success());
    let full = start.elapsed();
    let mut interrupted = 0;
    for step in 0..40u32 {
        let out = dir.path().join(format!("out{step}"));
        std::fs::create_dir(&out).unwrap();
        for (name, content) in files(&first) {
            std::fs::write(out.join(name), content).unwrap();
        }
        std::fs::write(out.join("notes.txt"), "mine").unwrap();
        let mut child = command(&out).arg("--force").stderr(Stdio::null()).spawn().unwrap();
        // Most of them early, where files are removed.
        let share = (f64::from(step) / 40.0).powi(2);
        std::thread::sleep(full.mul_f64(share).max(Duration::from_millis(1)));
        child.kill().unwrap();
        child.wait().unwrap();
        interrupted += u32::from(out.join(".llmpress").exists());
        if out.join(".llmpress/files.json").exists() && !out.join("llmpress.json").exists() {
            // Half of something is no source.
            assert!(fails(&["inspect", path(&out)]).contains("unfinished"));
        }
        // Killed before it began, the first job is still complete, and only --force may go over it.
        let begun = out.join(".llmpress/files.json").exists();
        let way = if begun && step % 2 == 0 { "--resume" } else { "--force" };
        let output = command(&out).arg(way).output().unwrap();
        assert!(output.status.success(), "{step} {way}: {}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(std::fs::read(out.join("notes.txt")).unwrap(), b"mine");
        std::fs::remove_file(out.join("notes.txt")).unwrap();
        same_files(&whole, &out);
        std::fs::remove_dir_all(&out).unwrap();
    }
    assert!(interrupted > 0, "at least one run was interrupted at work");
}
