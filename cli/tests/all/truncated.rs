//! A file that is cut short while a model runs from it: an error that names it, never the system's signal.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::io::Read;
use std::path::Path;
use std::process::Stdio;

use crate::support::{llmpress, path, tinylm};

fn copy(to: &Path) {
    std::fs::create_dir(to).unwrap();
    for entry in std::fs::read_dir(tinylm()).unwrap() {
        let file = entry.unwrap().path();
        if file.is_file() {
            std::fs::copy(&file, to.join(file.file_name().unwrap())).unwrap();
        }
    }
}

#[test]
fn a_model_cut_short_while_it_runs_is_named() {
    let dir = tempfile::tempdir().unwrap();
    for json in [false, true] {
        let model = dir.path().join(format!("a \"model\" {json}"));
        copy(&model);
        let mut command = llmpress();
        command.args([
            "generate",
            path(&model),
            "--prompt",
            "Once upon a time",
            "--ignore-eos",
            "-n",
            "100000",
        ]);
        command.args(json.then_some("--json"));
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        if json {
            std::thread::sleep(std::time::Duration::from_millis(1500));
        } else {
            // It runs as soon as the first text is there.
            child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        }
        let shard = model.join("model.safetensors");
        std::fs::File::options().write(true).open(&shard).unwrap().set_len(8192).unwrap();
        let output = child.wait_with_output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{:?} {error}", output.status);
        assert!(error.contains("cut short"), "{error}");
        if json {
            // Warnings come before it, a line each.
            let last = error.lines().last().unwrap();
            let value: serde_json::Value = serde_json::from_str(last).unwrap();
            assert!(value["error"]["message"].as_str().unwrap().contains(path(&shard)), "{error}");
        } else {
            assert!(error.contains(&format!("error: {}", path(&shard))), "{error}");
        }
    }
}
