//! `--device cuda` from the command line, on a stand-in for the driver: the program finds it as it finds a driver.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::path::Path;
use std::process::{Command, Output};

use crate::support::{llmpress, ok, path, run, tinylm};
use llmpress_driver_standin::{CUBLAS_NAMES, DRIVER_NAMES, SETTINGS, hide, install};
use serde_json::Value;

/// A directory in which the loader finds the stand-in.
struct Machine(tempfile::TempDir);

impl Machine {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        install(dir.path(), DRIVER_NAMES).unwrap();
        Self(dir)
    }

    /// One without a driver.
    fn bare() -> Self {
        let dir = tempfile::tempdir().unwrap();
        hide(dir.path(), DRIVER_NAMES).unwrap();
        Self(dir)
    }

    fn run(&self, settings: &str, args: &[&str]) -> Output {
        let mut command: Command = llmpress();
        command.env("LD_LIBRARY_PATH", self.0.path()).env(SETTINGS, settings).args(args);
        command.output().unwrap()
    }

    fn ok(&self, settings: &str, args: &[&str]) -> String {
        let output = self.run(settings, args);
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{args:?}\n{out}\n{err}");
        out.into_owned()
    }

    /// One line of error and code 1.
    fn fails(&self, settings: &str, args: &[&str]) -> String {
        let output = self.run(settings, args);
        let err = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{args:?}\n{err}");
        assert!(!err.contains("panicked"), "{err}");
        let lines: Vec<&str> = err.lines().filter(|line| line.starts_with("error: ")).collect();
        assert_eq!(lines.len(), 1, "{err}");
        lines[0].to_owned()
    }

    fn json(&self, settings: &str, args: &[&str]) -> Value {
        let args: Vec<&str> = args.iter().copied().chain(["--json"]).collect();
        serde_json::from_str(&self.ok(settings, &args)).unwrap()
    }
}

fn generate<'a>(model: &'a Path, weights: &'a str) -> Vec<&'a str> {
    let model = path(model);
    vec![
        "generate",
        model,
        "--device",
        "cuda",
        "--weights",
        weights,
        "-p",
        "Once",
        "-n",
        "4",
        "--temperature",
        "0",
    ]
}

#[test]
fn doctor_says_what_the_driver_says() {
    let machine = Machine::new();
    let report = machine.json("devices=2;multiprocessors=132;memory=85899345920", &["doctor"]);
    let gpus = report["gpus"].as_array().unwrap();
    assert_eq!(gpus.len(), 2);
    assert_eq!((&gpus[1]["ordinal"], &gpus[1]["multiprocessors"]), (&1.into(), &132.into()));
    assert_eq!((&gpus[0]["compute_capability"], &gpus[0]["driver_cuda"]), (&"9.0".into(), &"12.4".into()));
    assert!(gpus.iter().all(|gpu| gpu["kernels_loaded_s"].is_f64() && gpu["fault"].is_null()), "{gpus:?}");
    let text = machine.ok("", &["doctor"]);
    assert!(text.contains("Stand-in") && text.contains("every kernel loads"), "{text}");
    for (settings, wanted) in [
        ("driver=12020", "CUDA 12.2"),
        ("capability=7.0", "7.0"),
        ("refuse=decode_dfloat11", "dfloat11"),
        ("lose=cuDevicePrimaryCtxRetain:1", "cuDevicePrimaryCtxRetain"),
    ] {
        let report = machine.json(settings, &["doctor"]);
        let fault = report["gpus"][0]["fault"].as_str().unwrap();
        assert!(fault.contains(wanted), "{settings}: {fault}");
    }
    for (machine, settings, wanted) in [
        (&machine, "devices=0", "NO_DEVICE"),
        (&machine, "init=34", "STUB"),
        (&Machine::bare(), "", "libcuda.so.1"),
    ] {
        let report = machine.json(settings, &["doctor"]);
        assert!(report["no_gpu"].as_str().unwrap().contains(wanted), "{settings}: {report}");
    }
}

#[test]
fn text_is_generated_alike_from_encoded_weights() {
    let machine = Machine::new();
    let plain = machine.ok("", &generate(&tinylm(), "bf16"));
    assert!(plain.len() > 4, "{plain}");
    assert_eq!(machine.ok("", &generate(&tinylm(), "fixed12")), plain);
    // The same text beside another one.
    let model = tinylm();
    let two = [&generate(&model, "fixed12")[..], &["-p", "It is a"]].concat();
    let two = machine.json("", &two);
    assert_eq!(two["prompts"][0]["text"].as_str().unwrap().trim_end(), plain.trim_end());
}

#[test]
fn fp8_runs_from_its_stream_to_the_numbers_of_plain_weights_in_less_memory() {
    let machine = Machine::new();
    let dir = tempfile::tempdir().unwrap();
    let (fp8, out) = (dir.path().join("fp8"), dir.path().join("out"));
    crate::small_floats::fp8_model(&fp8);
    ok(&["convert", path(&fp8), path(&out), "--to", "dfloat8"]);
    let text = tinylm().join("eval.txt");
    let of = |model: &Path, weights: &str| {
        let args = ["eval", "ppl", path(model), "--text", path(&text), "--window", "8", "--limit", "1"];
        let told = machine.json("", &[&args[..], &["--device", "cuda", "--weights", weights]].concat());
        told["perplexity"].clone()
    };
    let (stored, plain) = (of(&out, "stored"), of(&out, "bf16"));
    assert!(stored.is_number() && stored == plain, "{stored} {plain}");
    let needs = machine.json("", &["doctor", "--model", path(&out)])["model"]["forms"].clone();
    let weights = |form: usize| needs[form]["weights"].as_f64().unwrap();
    // Of 15 MB 12.6 are the linears, which take less than half as FP8; embedding and norms stay.
    assert!(weights(0) < 0.55 * weights(1), "{needs}");
}

#[test]
fn perplexity_is_near_the_processors() {
    let machine = Machine::new();
    let (model, text) = (tinylm(), tinylm().join("eval.txt"));
    let args = |device| {
        [
            "eval",
            "ppl",
            path(&model),
            "--text",
            path(&text),
            "--window",
            "16",
            "--limit",
            "3",
            "--device",
            device,
        ]
        .map(str::to_owned)
    };
    let of = |device, more: &[&'static str]| {
        let args = args(device);
        let args: Vec<&str> = args.iter().map(String::as_str).chain(more.iter().copied()).collect();
        machine.json("", &args)["perplexity"].as_f64().unwrap()
    };
    let (gpu, cpu) = (of("cuda", &[]), of("cpu", &[]));
    assert!(gpu != cpu && (gpu / cpu - 1.0).abs() < 5e-3, "{gpu} {cpu}");
    // All three windows at once, and one after the other.
    assert_eq!(of("cuda", &["--batch", "1"]).to_bits(), gpu.to_bits());
}

#[test]
fn a_gpu_that_cannot_be_used_is_said_before_the_model_is_read() {
    let machine = Machine::new();
    let nowhere = Path::new("no such directory");
    for (settings, wanted) in [
        ("driver=11080", "driver 550"),
        ("capability=7.5", "Ampere"),
        ("devices=0", "NO_DEVICE"),
        ("init=803", "DRIVER_MISMATCH"),
    ] {
        let error = machine.fails(settings, &generate(nowhere, "bf16"));
        assert!(error.contains(wanted), "{settings}: {error}");
    }
    let error = Machine::bare().fails("", &generate(nowhere, "bf16"));
    assert!(error.contains("libcuda.so.1"), "{error}");
}

#[test]
fn what_goes_wrong_on_the_way_is_one_error() {
    let machine = Machine::new();
    for (settings, wanted) in [
        ("memory=4000000", "of 4.0 MB are free"),
        // Room for the weights, but not for a sequence.
        ("memory=15000000", "of 15000000 are free"),
        ("refuse=rms_norm", "rms_norm"),
        ("lose=cuMemcpyHtoDAsync_v2:5", "CUDA_ERROR_LAUNCH_FAILED"),
        ("lose=cuGraphLaunch:2;lost=46", "CUDA_ERROR_DEVICE_UNAVAILABLE"),
    ] {
        let error = machine.fails(settings, &generate(&tinylm(), "bf16"));
        assert!(error.contains(wanted), "{settings}: {error}");
    }
}

/// A line of a bench's report: the kernel, and whether it was right.
fn rows(report: &Value) -> Vec<(String, bool)> {
    let rows = report["rows"].as_array().unwrap();
    rows.iter().map(|row| (row["kernel"].as_str().unwrap().to_owned(), row["correct"] == true)).collect()
}

#[test]
fn kernels_are_measured_beside_cublas_and_recordings_hold_launches_only() {
    let machine = Machine::new();
    let log = machine.0.path().join("log");
    let settings = format!("log={}", log.display());
    let args = [
        "bench",
        "kernels",
        "--shape",
        "272x64",
        "--tokens",
        "1,17",
        "--runs",
        "1",
        "--working-set",
        "100000",
    ];
    hide(machine.0.path(), CUBLAS_NAMES).unwrap();
    let report = machine.json("", &args);
    assert!(report["no_cublas"].as_str().unwrap().contains("libcublas.so.13"), "{report}");
    assert!(rows(&report).iter().all(|(kernel, right)| *right && kernel != "cublas"), "{report}");
    let machine = Machine::new();
    install(machine.0.path(), &CUBLAS_NAMES[..1]).unwrap();
    let report = machine.json(&settings, &args);
    let rows = rows(&report);
    assert!(
        rows.iter().all(|(_, right)| *right) && rows.iter().any(|(kernel, _)| kernel == "cublas"),
        "{report}"
    );
    // Modules are loaded, memory is taken and results are read before and after, never in a recording.
    let log = std::fs::read_to_string(log).unwrap();
    let mut recordings = 0;
    for recording in log.split("call cuStreamBeginCapture_v2").skip(1) {
        let (inside, _) = recording.split_once("call cuStreamEndCapture").unwrap();
        let names = inside.lines().skip(1).map(|line| line.split('(').next().unwrap());
        for name in names {
            let allowed = [
                "cuLaunchKernel",
                "cuLaunchKernelEx",
                "cuMemcpyDtoDAsync_v2",
                "cublasGemmEx",
                "cuCtxGetCurrent",
            ];
            assert!(allowed.iter().any(|call| name == format!("call {call}")), "{name} in a recording");
        }
        recordings += 1;
    }
    assert!(recordings > 10, "{recordings}");
    assert!(!log.lines().any(|line| line.starts_with("fault") || line.starts_with("refused")));
}

#[test]
fn a_proof_on_a_gpu_that_is_lost_is_a_failure() {
    let machine = Machine::new();
    for (machine, settings) in
        [(&machine, "lose=cuModuleGetFunction:2"), (&machine, "driver=12030"), (&Machine::bare(), "")]
    {
        let error = machine.fails(settings, &["doctor", "--prove"]);
        assert!(error.contains("nothing is proven"), "{settings}: {error}");
    }
}

#[test]
fn a_plan_says_what_its_output_will_take_of_a_gpu() {
    let dir = tempfile::tempdir().unwrap();
    let model = tinylm();
    let json = |args: &[&str]| -> serde_json::Value { serde_json::from_str(&ok(args)).unwrap() };
    let needs = |model: &Path| {
        json(&["doctor", "--json", "--model", path(model), "--context", "300"])["model"]["forms"].clone()
    };
    let gpu = ["--device", "cuda", "--context", "300", "--json"];
    // Of a checkpoint as it is, the same as doctor says.
    let now = json(&[&["plan", path(&model)], &gpu[..]].concat());
    assert_eq!((&now["forms"], &now["context"]), (&needs(&model), &300.into()));
    let fp8 = dir.path().join("fp8");
    crate::small_floats::fp8_model(&fp8);
    let (quantised, packed) = (dir.path().join("quantised"), dir.path().join("packed"));
    ok(&["convert", path(&model), path(&quantised), "--to", "rtn:w4,g64,symmetric", "--quiet"]);
    ok(&["export", path(&quantised), path(&packed), "--as", "compressed-tensors", "--quiet"]);
    for (model, to) in [
        (&model, "fixed12"),
        (&model, "dfloat11"),
        (&model, "planes"),
        (&model, "raw"),
        (&model, "rtn:w4"),
        (&model, "rtn:w4,g64"),
        (&model, "rtn:w2a8"),
        (&model, "sparse24:magnitude"),
        (&model, "sparse24:magnitude+fixed12"),
        (&model, "sparse24:magnitude,slorb"),
        (&model, "sparse24:magnitude,slorb+fixed12"),
        (&model, "sparse24:magnitude+rtn:w4,g64"),
        (&fp8, "dfloat8"),
        (&fp8, "archive"),
        (&packed, "abq"),
    ] {
        let planned = json(&[&["plan", path(model), "--to", to], &gpu[..]].concat());
        let planned = planned["gpu"]["forms"].as_array().unwrap().last().unwrap().clone();
        assert_eq!(planned["weights_form"], "as planned");
        let out = dir.path().join(to);
        ok(&["convert", path(model), path(&out), "--to", to, "--quiet"]);
        let made = &needs(&out)[0];
        for part in ["weights", "cache", "workspace"] {
            let (planned, made) = (planned[part].as_f64().unwrap(), made[part].as_f64().unwrap());
            assert!((planned / made - 1.0).abs() < 0.05, "{to}, {part}: {planned} planned, {made} made");
        }
    }
    // A plan with it is carried out like any other.
    let (plan, out) = (dir.path().join("plan.json"), dir.path().join("out"));
    std::fs::write(&plan, ok(&[&["plan", path(&model), "--to", "fixed12"], &gpu[..]].concat())).unwrap();
    ok(&["convert", path(&model), path(&out), "--plan", path(&plan), "--quiet"]);
    let text = ok(&["plan", path(&model), "--to", "fixed12", "--device", "cuda:1"]);
    assert!(text.contains("a sequence of 4096 tokens") && text.contains("as planned"), "{text}");
    let usage = run(&["plan", path(&model), "--to", "raw", "--device", "cpu"]);
    assert_eq!(usage.status.code(), Some(2));
}
