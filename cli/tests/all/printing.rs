//! What becomes of a result that cannot be printed, or of a name that is not text: the work done stays done.
#![cfg(unix)]
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use crate::support::{self, llmpress, ok, path, tinylm};
use std::ffi::{OsStr, OsString};
use std::fs::OpenOptions;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Output, Stdio};

fn full() -> Stdio {
    OpenOptions::new().write(true).open("/dev/full").unwrap().into()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_full_stdout_fails_and_the_work_stays_done() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (tinylm(), dir.path().join("out"));
    let verbs: [&[&str]; 8] = [
        &["plan", path(&model), "--to", "planes", "--json"],
        &["inspect", path(&model)],
        &["generate", path(&model), "-p", "hi", "-n", "2"],
        &["completions", "bash"],
        &["--help"],
        &["convert", "--help"],
        &["--version"],
        &["convert", path(&model), path(&out), "--to", "planes"],
    ];
    for args in verbs {
        let output = llmpress().args(args).stdout(full()).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{args:?}: {}", stderr(&output));
        assert!(!stderr(&output).contains("panicked"), "{args:?}: {}", stderr(&output));
    }
    ok(&["verify", path(&out), "--against", path(&model)]);
}

#[test]
fn a_closed_stdout_ends_quietly_and_the_work_stays_done() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (tinylm(), dir.path().join("out"));
    let verbs: [&[&str]; 4] = [
        &["inspect", path(&model), "--tensors"],
        &["generate", path(&model), "-p", "hi", "--quiet"],
        &["--help"],
        &["convert", path(&model), path(&out), "--to", "planes", "--quiet", "--json"],
    ];
    for args in verbs {
        let mut child = llmpress().args(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{args:?}: {}", stderr(&output));
        assert_eq!(stderr(&output), "", "{args:?}");
    }
    ok(&["verify", path(&out), "--against", path(&model)]);
}

#[test]
fn a_full_stderr_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let run = |args: &[&str]| llmpress().args(args).stderr(full()).output().unwrap().status.code();
    assert_eq!(run(&["inspect", "no/such/place"]), Some(1));
    assert_eq!(run(&["inspect"]), Some(2));
    assert_eq!(run(&["convert", path(&tinylm()), path(&out), "--to", "planes"]), Some(0));
}

#[test]
fn paths_need_not_be_utf8() {
    let dir = tempfile::tempdir().unwrap();
    let named = |name: &[u8]| dir.path().join(OsStr::from_bytes(name));
    let (source, out, back, text) = (named(b"s\xff"), named(b"o\xff"), named(b"b\xff"), named(b"t\xff"));
    std::fs::create_dir(&source).unwrap();
    for file in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(tinylm().join(file), source.join(file)).unwrap();
    }
    std::fs::copy(tinylm().join("eval.txt"), &text).unwrap();
    let run = |words: &[&str], paths: &[(usize, &Path)]| {
        let mut args: Vec<OsString> = words.iter().map(Into::into).collect();
        for (at, path) in paths {
            args.insert(*at, path.as_os_str().to_owned());
        }
        for json in [false, true] {
            let mut command = llmpress();
            let output = command.args(&args).args(json.then_some("--json")).output().unwrap();
            let printed = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(output.status.success(), "{args:?}: {}", stderr(&output));
            assert!(
                !json || serde_json::from_str::<serde_json::Value>(&printed).is_ok(),
                "{args:?}: {printed}"
            );
        }
    };
    run(&["convert", "--to", "planes", "--force"], &[(1, &source), (2, &out)]);
    run(&["inspect"], &[(1, &out)]);
    run(&["plan", "--to", "planes"], &[(1, &out)]);
    run(&["verify"], &[(1, &out)]);
    run(&["verify", "--against"], &[(1, &out), (3, &source)]);
    run(&["diff"], &[(1, &out), (2, &source)]);
    run(&["eval", "ppl", "--window", "32", "--limit", "1", "--text"], &[(2, &out), (8, &text)]);
    run(
        &["eval", "kld", "--window", "32", "--limit", "1", "--text"],
        &[(2, &out), (8, &text), (3, Path::new("--base")), (4, &source)],
    );
    run(&["generate", "-p", "hi", "-n", "1"], &[(1, &out)]);
    run(&["speed", "--prompt-tokens", "4", "--new-tokens", "2", "--runs", "1"], &[(1, &out)]);
    let output = llmpress().arg("restore").args([&out, &back]).arg("--json").output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
}

#[test]
fn more_shards_than_open_files_are_opened_or_the_mend_is_told() {
    use llmpress_formats::Dtype;
    let dir = tempfile::tempdir().unwrap();
    let mut map = serde_json::Map::new();
    for i in 0..120 {
        let name = format!("model.layers.{i}.w.weight");
        let file = format!("model-{:05}-of-00120.safetensors", i + 1);
        let tensor = support::t(&name, Dtype::BF16, &[4, 4], support::bf16(i, 16));
        std::fs::write(dir.path().join(&file), support::safetensors(&[tensor])).unwrap();
        map.insert(name, file.into());
    }
    let index = serde_json::json!({"metadata": {}, "weight_map": map}).to_string();
    std::fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
    let limited = |limit: &str| {
        let script = format!("ulimit {limit} 60 && exec '{}' inspect .", env!("CARGO_BIN_EXE_llmpress"));
        std::process::Command::new("sh").args(["-c", &script]).current_dir(dir.path()).output().unwrap()
    };
    let soft = limited("-S -n");
    assert!(soft.status.success(), "{}", stderr(&soft));
    let hard = limited("-n");
    assert_eq!(hard.status.code(), Some(1), "{}", stderr(&hard));
    assert!(stderr(&hard).contains("ulimit -n"), "{}", stderr(&hard));
}
