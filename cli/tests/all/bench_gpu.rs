//! Everything on a GPU in one command: what it says where there is none, and the models that it makes.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::{self, fails, ok, path, run, same_files};
use serde_json::Value;

#[test]
fn without_a_gpu_each_step_says_why_it_did_not_run() {
    let doctor: Value = serde_json::from_str(&ok(&["doctor", "--json"])).unwrap();
    let Some(why) = doctor["no_gpu"].as_str() else {
        eprintln!("there is a GPU here: not tested");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let (out, scratch) = (dir.path().join("out"), dir.path().join("scratch"));
    let arguments = ["bench", "gpu", path(&out), "--scratch", path(&scratch)];
    let output = run(&[&arguments[..], &["--json"]].concat());
    assert_eq!(output.status.code(), Some(1));
    let printed: Value = serde_json::from_slice(&output.stdout).unwrap();
    let written: Value = serde_json::from_slice(&std::fs::read(out.join("report.json")).unwrap()).unwrap();
    assert_eq!(printed, written);
    assert_eq!(written["state"], "finished");
    let steps = written["steps"].as_array().unwrap();
    assert!(steps.len() > 10);
    assert_eq!((&steps[0]["name"], &steps[0]["outcome"]), (&"doctor".into(), &"failed".into()));
    for step in &steps[1..] {
        assert_eq!(step["outcome"], "not_run", "{step}");
        assert_eq!(step["reason"], format!("no GPU: {why}"));
    }
    let page = std::fs::read_to_string(out.join("report.md")).unwrap();
    assert!(page.contains("15 did not run"), "{page}");
    assert!(page.contains("none was found") && page.contains("not measured"), "{page}");
    let again = fails(&arguments);
    assert!(again.contains("report.json is there already"), "{again}");
    let forced = fails(&[&arguments[..], &["--force", "--only", "perplexity", "--quiet"]].concat());
    assert!(forced.contains("not held: doctor, small-model, perplexity"), "{forced}");
    assert_eq!(std::fs::read_dir(&scratch).unwrap().count(), 0);
}

/// A program that `doctor`'s step asks besides, and that takes its time, stands for a step that runs long.
#[test]
fn ctrl_c_ends_what_runs_and_leaves_the_report() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let slow = dir.path().join("nvidia-smi");
    std::fs::write(&slow, "#!/bin/sh\nsleep 60\n").unwrap();
    std::fs::set_permissions(&slow, std::fs::Permissions::from_mode(0o755)).unwrap();
    let start = Instant::now();
    let mut child = support::llmpress()
        .args(["bench", "gpu", path(&out), "--scratch", path(dir.path()), "--only", "doctor", "--quiet"])
        .env("PATH", format!("{}:{}", path(dir.path()), std::env::var("PATH").unwrap()))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    while !out.join("calls/doctor-1.err").exists() {
        assert!(start.elapsed() < Duration::from_secs(60) && child.try_wait().unwrap().is_none());
        std::thread::sleep(Duration::from_millis(10));
    }
    let kill = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(kill.success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("error: interrupted"), "{output:?}");
    let report: Value = serde_json::from_slice(&std::fs::read(out.join("report.json")).unwrap()).unwrap();
    assert_eq!(report["state"], "interrupted");
    assert_eq!(report["steps"][0]["calls"][1]["fault"], "killed: everything was interrupted");
    assert!(std::fs::read_to_string(out.join("report.md")).unwrap().contains("Interrupted: "));
}

#[test]
fn what_runs_ends_with_the_program_even_where_that_is_killed() {
    let dir = tempfile::tempdir().unwrap();
    let (out, number) = (dir.path().join("out"), dir.path().join("number"));
    let slow = dir.path().join("nvidia-smi");
    let script = format!("#!/bin/sh\necho $$ > {0}.new\nmv {0}.new {0}\nexec sleep 300\n", path(&number));
    std::fs::write(&slow, script).unwrap();
    std::fs::set_permissions(&slow, std::fs::Permissions::from_mode(0o755)).unwrap();
    let start = Instant::now();
    let mut child = support::llmpress()
        .args(["bench", "gpu", path(&out), "--scratch", path(dir.path()), "--only", "doctor", "--quiet"])
        .env("PATH", format!("{}:{}", path(dir.path()), std::env::var("PATH").unwrap()))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    while !number.exists() {
        assert!(start.elapsed() < Duration::from_secs(60) && child.try_wait().unwrap().is_none());
        std::thread::sleep(Duration::from_millis(10));
    }
    let number = std::fs::read_to_string(&number).unwrap();
    // A process that ended and was not waited for is a zombie.
    let runs = || {
        let status = std::fs::read_to_string(format!("/proc/{}/stat", number.trim()));
        status.is_ok_and(|status| !status.contains(") Z "))
    };
    assert!(runs());
    child.kill().unwrap();
    child.wait().unwrap();
    let start = Instant::now();
    while runs() {
        assert!(start.elapsed() < Duration::from_secs(20), "{number} goes on");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn wrong_usage_is_refused_before_anything_runs() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    for wrong in [["--only", "nothing"], ["--budget", "0"], ["--device", "cpu"], ["--layers", "0"]] {
        let output = run(&["bench", "gpu", path(&out), wrong[0], wrong[1]]);
        assert_eq!(output.status.code(), Some(2), "{wrong:?}");
        assert!(!out.exists());
    }
}

#[test]
fn the_small_random_model_runs_and_converts() {
    let dir = tempfile::tempdir().unwrap();
    let place = |name: &str| dir.path().join(name);
    let (a, b) = (place("a"), place("b"));
    for (out, jobs) in [(&a, "1"), (&b, "4")] {
        let output = support::llmpress()
            .args(["bench", "random-model", path(out), "--like", "small"])
            .env("RAYON_NUM_THREADS", jobs)
            .output()
            .unwrap();
        assert!(output.status.success());
    }
    same_files(&a, &b);
    assert!(fails(&["bench", "random-model", path(&a), "--like", "small"]).contains("exists already"));
    let text = a.join("eval.txt");
    let protocol = ["--text", path(&text), "--window", "256"];
    let report = ok(&[&["--json", "eval", "ppl", path(&a)], &protocol[..]].concat());
    let report: Value = serde_json::from_str(&report).unwrap();
    // Its own text, far from uniform, which would be 96.
    let perplexity = report["perplexity"].as_f64().unwrap();
    assert!(perplexity > 1.5 && perplexity < 20.0, "{perplexity}");
    assert_eq!(report["windows"], 8);
    for method in ["dfloat11", "fixed12"] {
        let out = place(method);
        let summary: Value =
            serde_json::from_str(&ok(&["--json", "convert", path(&a), path(&out), "--to", method])).unwrap();
        assert!(summary.is_object());
        let logits =
            ["--json", "verify", path(&out), "--against", path(&a), "--logits", "--text", path(&text)];
        ok(&[&logits[..], &["--window", "64", "--limit", "2"]].concat());
    }
    let generate =
        ["--json", "generate", path(&a), "--prompt", "Once", "--max-new-tokens", "8", "--ignore-eos"];
    let text: Value = serde_json::from_str(&ok(&generate)).unwrap();
    assert_eq!(text["tokens"].as_array().unwrap().len(), 8);
}

#[test]
fn the_random_model_of_8b_shapes_has_the_size_of_the_real_one() {
    let bytes = llmpress_validation::RandomModel::Llama3_8b { layers: 32 }.bytes();
    assert_eq!(bytes, 16_060_522_496);
}
