//! The whole sequence on a GPU that a script plays: what a program prints becomes the report.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use llmpress_validation::gpu_bench::{Options, Outcome, REPORT_PAGE, STEPS, run};

/// Answers as the program would, with right results for everything but what `but` changes.
fn program(dir: &Path, but: &str) -> PathBuf {
    let rate = r#"{"median": 3000, "min": 2900, "max": 3100}"#;
    let row = r#"{"shape": "given", "n": '$n', "k": '$k', "m": 1, "kernel": "fixed12", "microseconds": RATE, "gbps": 1,
        "share_of_read_ceiling": 0.5, "speed_against_cublas": 1.6, "correct": true}"#;
    let script = r#"#!/bin/sh
echo "$@" >> DIR/commands
BUT
case "$*" in
*doctor) echo '{"gpus": [{"ordinal": 0, "name": "A GPU", "compute_capability": "9.0", "multiprocessors": 132,
    "memory_bytes": 85899345920, "driver_cuda": "12.4", "kernels_loaded_s": 3.5}]}' ;;
*proofs*) echo '{"kernel": "fixed12", "shape": "1 x 8", "exact": true, "worst": 0, "fault": null}' ;;
*random-model*8b*) echo '{"layers": 8, "bytes": 5600000000}' ;;
*"eval ppl"*) echo '{"perplexity": 29.25}' ;;
*verify*) echo '{"logits": {"logits": 5, "differing": 0, "generated": 32, "first_generated": null}}' ;;
*generate*) echo '{"tokens": [1, 2]}' ;;
*"bench kernels"*)
    shape=$(echo "$*" | sed 's/.*--shape \([0-9x]*\).*/\1/'); n=${shape%x*}; k=${shape#*x}
    echo '{"ceilings": {"read_gbps": RATE, "copy_gbps": RATE}, "rows": [ROW]}' ;;
*speed*) echo '[{"name": "x", "prefill_tokens_per_s": RATE, "decode_tokens_per_s": RATE, "time_to_first_token_s": 0.1,
    "gpu_bytes": 5000000000, "gpu_peak_bytes": 6000000000}]' ;;
esac
"#;
    let script = script
        .replace("ROW", row)
        .replace("RATE", rate)
        .replace("BUT", but)
        .replace("DIR", &dir.display().to_string());
    let path = dir.join("program");
    std::fs::write(&path, script).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

fn options(dir: &Path, but: &str) -> Options {
    Options {
        program: program(dir, but),
        version: "llmpress test".to_owned(),
        out: dir.join("out"),
        scratch: dir.join("scratch"),
        scratch_bytes: Some(100 << 30),
        ordinal: 0,
        model: None,
        text: None,
        budget: Duration::from_secs(120),
        layers: 8,
        only: Vec::new(),
        stop_after: None,
        force: false,
    }
}

#[test]
fn a_run_where_everything_holds() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path(), "");
    let mut said = Vec::new();
    let report = run(&options, &AtomicBool::new(false), &mut |line| said.push(line.to_owned())).unwrap();
    let room = report.steps.iter().all(|s| s.outcome == Outcome::Held);
    assert!(room && report.all_held(), "{:#?}", report.steps);
    assert!(STEPS.iter().all(|step| said.iter().any(|line| line.starts_with(step))), "{said:?}");
    assert_eq!(
        report.speeds.iter().map(|s| &*s.weights).collect::<Vec<_>>(),
        ["bf16", "fixed12", "dfloat11"]
    );
    // Four matrices, measured once for the first numbers of tokens, some again.
    let reached = report.goals.iter().filter(|g| g.reached == Some(true)).count();
    assert_eq!(reached, 4, "{:#?}", report.goals);
    let page = std::fs::read_to_string(options.out.join(REPORT_PAGE)).unwrap();
    for line in [
        "| GPU | A GPU, compute capability 9.0, 132 multiprocessors, 85.90 GB |",
        "| kernels | all compiled by the driver in 3.5 s |",
        "| fixed12 | 8 | 3000 (2900-3100) | 1.00 | 3000.0 (2900.0-3100.0) | 1.00 | 100.0 ms | 5.00 GB | 6.00 GB |",
        "| fixed12 | 1 | 0 | - | none |",
    ] {
        assert!(page.contains(line), "{line}\nis not in\n{page}");
    }
    // What was made for it is gone; what the calls printed stays.
    assert_eq!(std::fs::read_dir(&options.scratch).unwrap().count(), 0);
    assert!(options.out.join("calls/doctor-0.out").is_file());
    let commands = std::fs::read_to_string(dir.path().join("commands")).unwrap();
    assert!(commands.contains("speed") && commands.contains("--weights dfloat11"), "{commands}");
    // A report is not overwritten unasked.
    let again = run(&options, &AtomicBool::new(false), &mut |_| ()).unwrap_err().to_string();
    assert!(again.contains("report.json is there already") && again.contains("--force"), "{again}");
}

#[test]
fn a_run_where_some_things_do_not_hold() {
    let dir = tempfile::tempdir().unwrap();
    let but = r#"case "$*" in
*proofs*) echo '{"kernel": "dense", "shape": "1 x 8", "exact": true, "worst": 1, "fault": "row 0"}'; exit 1 ;;
*"eval ppl"*dfloat11*) echo '{"perplexity": 29.26}'; exit ;;
*fixed12*speed*|*speed*fixed12*) echo 'error: not so much memory' >&2; exit 1 ;;
esac"#;
    let report = run(&options(dir.path(), but), &AtomicBool::new(false), &mut |_| ()).unwrap();
    let failed: Vec<(&str, &str)> = report
        .steps
        .iter()
        .filter(|s| s.outcome != Outcome::Held)
        .map(|s| (&*s.name, s.reason.as_deref().unwrap()))
        .collect();
    let [proofs, perplexity, speed] = &failed[..] else { panic!("{failed:#?}") };
    assert_eq!((proofs.0, perplexity.0, speed.0), ("proofs", "perplexity", "speed-fixed12"));
    assert!(proofs.1.contains("1 of 1 proofs fail: dense 1 x 8: row 0"), "{proofs:?}");
    assert!(perplexity.1.contains("dfloat11 29.26"), "{perplexity:?}");
    assert!(speed.1.contains("error: not so much memory"), "{speed:?}");
    assert!(!report.all_held());
}

#[test]
fn steps_that_do_not_exist_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let options = Options { only: vec!["kernels".to_owned()], ..options(dir.path(), "") };
    let error = run(&options, &AtomicBool::new(false), &mut |_| ()).unwrap_err().to_string();
    assert!(error.contains("no step \"kernels\"") && error.contains("kernels-o"), "{error}");
    assert!(!options.out.exists());
}
