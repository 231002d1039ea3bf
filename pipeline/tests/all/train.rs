//! Passes that train what is 2:4: stopped and resumed to the same bytes, planned exactly, kept by what comes after.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use llmpress_calibrate::Texts;
use llmpress_formats::encoding::lowrank::Base;
use llmpress_formats::{Checkpoint, Encoding, Producer};
use llmpress_pipeline::{
    CalibrationText, Counted, Options, PassForecast, Plan, Progress, Recipe, Request, Task, Watch,
    convert_request,
};

fn tinylm() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/tinylm")
}

fn request(chain: &str, texts: bool) -> Request {
    let files = if texts { vec![tinylm().join("calib.txt")] } else { Vec::new() };
    let calibration = CalibrationText { texts: Texts { files }, windows: Some(16), length: 16, seed: None };
    Request { recipe: Recipe::from_short(chain).unwrap(), calibration, rankings: Vec::new(), base: None }
}

fn options(resume: bool) -> Options {
    Options {
        jobs: Some(2),
        max_memory: None,
        resume,
        force: false,
        producer: Producer { name: "test".to_owned(), version: "0.1.0".to_owned(), revision: None },
        extra_files: BTreeMap::new(),
    }
}

/// Wants it to stop after so many units of work of training.
struct Stopping {
    after: u64,
    done: AtomicU64,
}

struct Told<'a>(Option<&'a Stopping>);

impl Watch for Stopping {
    fn begin(&self, task: Task) -> Box<dyn Progress + '_> {
        Box::new(Told((task.counted == Counted::Tokens).then_some(self)))
    }

    fn is_stopped(&self) -> bool {
        self.done.load(Ordering::SeqCst) >= self.after
    }
}

impl Progress for Told<'_> {
    fn start(&self, _total: u64) {}

    fn advance(&self, amount: u64) {
        if let Some(stopping) = self.0 {
            stopping.done.fetch_add(amount, Ordering::SeqCst);
        }
    }

    fn shard(&self, _file: &str) {}
}

fn after(tokens: u64) -> Stopping {
    Stopping { after: tokens, done: AtomicU64::new(0) }
}

fn convert(out: &Path, request: &Request, resume: bool, watch: &Stopping) -> Result<(), String> {
    let run = convert_request(&tinylm(), out, request, 4 << 30, &options(resume), watch);
    run.map(drop).map_err(|e| e.to_string())
}

fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries
        .map(|p| (p.file_name().unwrap().to_str().unwrap().to_owned(), std::fs::read(&p).unwrap()))
        .collect()
}

const SHORT: &str = "steps=4,batch=1,window=24,every=2,lr=0.01";

#[test]
fn stopped_it_keeps_a_state_and_goes_on_to_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, out) = (dir.path().join("whole"), dir.path().join("out"));
    let request = request(&format!("sparse24:magnitude,permute+ast:{SHORT},slorb+rtn:w4,g64"), true);
    convert(&whole, &request, false, &after(u64::MAX)).unwrap();
    let expected = files(&whole);
    for name in ["training.jsonl", "training-loss.svg", "training-flips.svg", "training-perplexity.svg"] {
        assert!(expected.contains_key(name), "{name}");
    }
    let lines = String::from_utf8(expected["training.jsonl"].clone()).unwrap();
    assert_eq!(lines.lines().filter(|line| line.contains("\"loss\"")).count(), 4);
    let error = convert(&out, &request, false, &after(2 * 24)).unwrap_err();
    assert!(error.contains("--resume"), "{error}");
    assert!(out.join(".llmpress/passes/2/training.state").exists() && !out.join("llmpress.json").exists());
    // Of two steps, and one more.
    let more = after(3 * 24);
    assert!(convert(&out, &request, true, &more).is_err());
    assert_eq!(more.done.load(Ordering::SeqCst), 3 * 24, "the first two were not made again");
    convert(&out, &request, true, &after(u64::MAX)).unwrap();
    assert!(files(&out) == expected);
    // Done already: the same job finds nothing to do.
    convert(&out, &request, true, &after(u64::MAX)).unwrap();
    assert!(files(&out) == expected);
}

#[test]
fn a_whole_quantised_model_is_learned_stopped_and_resumed_to_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, out, start) = (dir.path().join("whole"), dir.path().join("out"), dir.path().join("start"));
    let request = request("gptq:w2a8,rotate,learn=model,steps=5", true);
    convert(&whole, &request, false, &after(u64::MAX)).unwrap();
    let expected = files(&whole);
    for name in ["learning.jsonl", "learning-loss.svg", "learning-divergence.svg"] {
        assert!(expected.contains_key(name), "{name}");
    }
    let lines = String::from_utf8(expected["learning.jsonl"].clone()).unwrap();
    assert_eq!(lines.lines().filter(|line| line.contains("\"loss\"")).count(), 5);
    assert_eq!(lines.lines().filter(|line| line.contains("\"perplexity\"")).count(), 6);
    let error = convert(&out, &request, false, &after(2 * 4 * 15)).unwrap_err();
    assert!(error.contains("--resume"), "{error}");
    assert!(out.join(".llmpress/passes/1/training.state").exists() && !out.join("llmpress.json").exists());
    let more = after(3 * 4 * 15);
    assert!(convert(&out, &request, true, &more).is_err());
    assert_eq!(more.done.load(Ordering::SeqCst), 3 * 4 * 15, "the first two were not made again");
    convert(&out, &request, true, &after(u64::MAX)).unwrap();
    assert!(files(&out) == expected);
    convert(&out, &request, true, &after(u64::MAX)).unwrap();
    assert!(files(&out) == expected);
    // The rungs below left it in the same form, with other codes where learning was better.
    let plain = self::request("gptq:w2a8,rotate", true);
    convert(&start, &plain, false, &after(u64::MAX)).unwrap();
    let open = |path: &Path| Checkpoint::open(path).unwrap();
    let (start, out) = (open(&start), open(&out));
    let mut others = 0;
    for (name, unit) in start.units().iter().filter(|(name, _)| name.contains("_proj")) {
        let now = &out.units()[name];
        assert!(unit.encoding() == now.encoding() && unit.stored_bytes() == now.stored_bytes(), "{name}");
        others += usize::from(out.read_tensor(name).unwrap() != start.read_tensor(name).unwrap());
    }
    let told = lines.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let held: Vec<f64> =
        told.filter_map(|line| line["divergence"].as_f64().filter(|_| line["dense"].is_f64())).collect();
    assert_eq!(held.len(), 6);
    assert!(others == 0 || others > 28, "{others}");
}

#[test]
fn a_whole_model_that_does_not_fit_the_memory_is_refused_with_what_it_takes() {
    let dir = tempfile::tempdir().unwrap();
    let request = request("gptq:w2,learn=model,steps=2", true);
    let (plan, _) = Plan::forecast(&tinylm(), &request, 4 << 30).unwrap();
    let take = |memory: u64| {
        let out = dir.path().join(memory.to_string());
        let options = Options { max_memory: Some(memory), ..options(false) };
        let run = convert_request(&tinylm(), &out, &request, 4 << 30, &options, &after(u64::MAX));
        run.map(drop).map_err(|e| e.to_string())
    };
    let error = take(128 << 20).unwrap_err();
    assert!(
        error.contains("learn=model") && error.contains("128 MiB") && error.contains("learn=block"),
        "{error}"
    );
    let needed = plan.passes.iter().find_map(|pass| match &pass.forecast {
        PassForecast::Finish(found) => Some(found.memory_bytes),
        PassForecast::Prune(_) => None,
    });
    take(needed.unwrap()).unwrap();
}

#[test]
fn matrices_stay_two_in_four_norms_are_trained_and_the_rest_is_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let (out, start) = (dir.path().join("out"), dir.path().join("start"));
    convert(&out, &request(&format!("sparse24:wanda+ast:{SHORT}"), true), false, &after(u64::MAX)).unwrap();
    convert(&start, &request("sparse24:wanda", true), false, &after(u64::MAX)).unwrap();
    let open = |path: &Path| Checkpoint::open(path).unwrap();
    let (source, start, out) = (open(&tinylm()), open(&start), open(&out));
    let mut trained = 0;
    for name in source.tensors().keys() {
        let read = |checkpoint: &Checkpoint| checkpoint.read_tensor(name).unwrap();
        let unit = out.unit_of(out.tensor(name).unwrap()).unwrap();
        if name.contains("_proj") {
            assert!(matches!(unit.encoding(), Encoding::Sparse24(s) if s.values.is_none()), "{name}");
            assert!(read(&out) != read(&start), "{name}");
        } else if name.ends_with("norm.weight") {
            trained += usize::from(read(&out) != read(&source));
        } else {
            assert!(read(&out) == read(&source), "{name}");
        }
    }
    assert_eq!(trained, 17, "two of each layer, and the last");
}

#[test]
fn what_is_trained_of_reordered_channels_began_as_the_dense_model_in_the_same_order() {
    let dir = tempfile::tempdir().unwrap();
    let losses = |chain: &str| -> Vec<f64> {
        let out = dir.path().join(chain);
        convert(&out, &request(&format!("{chain}+ast:{SHORT}"), true), false, &after(u64::MAX)).unwrap();
        let text = std::fs::read_to_string(out.join("training.jsonl")).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        lines.filter_map(|line| line["divergence"].as_f64()).collect()
    };
    let (plain, permuted) = (losses("sparse24:magnitude"), losses("sparse24:magnitude,permute"));
    assert!(!plain.is_empty() && plain.len() == permuted.len());
    // Of a dense model in another order the divergence would be that of any two models: several times as much.
    assert!(permuted[0] < 1.3 * plain[0], "{plain:?} {permuted:?}");
}

#[test]
fn plans_know_what_training_leaves() {
    for (chain, lowrank, bits) in [
        (format!("sparse24:magnitude+ast:{SHORT}"), false, 9.0),
        (format!("sparse24:magnitude+ast:{SHORT},slorb"), true, 10.0),
        (format!("sparse24:magnitude,slorb+ast:{SHORT}"), true, 10.0),
        (format!("sparse24:magnitude+ast:{SHORT}+rtn:w4,g64+dfloat11"), false, 3.5),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let request = request(&chain, true);
        let (plan, _) = Plan::forecast(&tinylm(), &request, 4 << 30).unwrap();
        assert!(plan.passes.len() >= 2, "{chain}");
        convert(&out, &request, false, &after(u64::MAX)).unwrap();
        let out = Checkpoint::open(&out).unwrap();
        let (mut real, mut weights) = (0, 0);
        for (name, unit) in out.units().iter().filter(|(name, _)| name.contains("_proj")) {
            let is_lowrank =
                matches!(unit.encoding(), Encoding::Lowrank(l) if matches!(l.base, Base::Sparse24(_)));
            assert_eq!(is_lowrank, lowrank, "{chain} {name}");
            real += unit.stored_bytes();
            weights += out.tensor(name).unwrap().shape.iter().product::<u64>();
        }
        let expected: u64 =
            plan.units().filter(|unit| unit.name.contains("_proj")).map(|unit| unit.expected_bytes).sum();
        assert!((expected as f64 / real as f64 - 1.0).abs() < 0.01, "{chain}: {expected} {real}");
        assert!((real as f64 * 8.0 / weights as f64 - bits).abs() < 0.3, "{chain}: {real}");
    }
}

#[test]
fn a_sub_layer_at_a_time_it_is_the_same_job_with_the_norms_as_they_were() {
    let dir = tempfile::tempdir().unwrap();
    let (out, start) = (dir.path().join("out"), dir.path().join("start"));
    let chain = "sparse24:magnitude+ast:steps=30,batch=2,window=24,slorb,blockwise";
    convert(&out, &request(chain, true), false, &after(u64::MAX)).unwrap();
    convert(&start, &request("sparse24:magnitude,slorb", false), false, &after(u64::MAX)).unwrap();
    let lines = String::from_utf8(files(&out)["training.jsonl"].clone()).unwrap();
    assert_eq!(lines.lines().count(), 16, "a line a sub-layer");
    assert!(lines.lines().filter(|line| line.contains("\"taken\":true")).count() > 8, "{lines}");
    let open = |path: &Path| Checkpoint::open(path).unwrap();
    let (source, start, out) = (open(&tinylm()), open(&start), open(&out));
    let mut others = 0;
    for name in source.tensors().keys() {
        let read = |checkpoint: &Checkpoint| checkpoint.read_tensor(name).unwrap();
        match name.contains("_proj") {
            true => others += usize::from(read(&out) != read(&start)),
            false => assert!(read(&out) == read(&source), "{name}"),
        }
    }
    assert!(others > 28, "{others}");
}

#[test]
fn what_makes_no_sense_is_refused_before_any_work() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let refused = |request: &Request, words: &[&str]| {
        let error = convert(&out, request, false, &after(u64::MAX)).unwrap_err();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
        assert!(!out.exists(), "{error}");
    };
    refused(
        &request("ast:steps=3", true),
        &["right before it made 2:4", "sparse24:sparsegpt,reconstruct+ast:steps=3"],
    );
    refused(&request("sparse24:magnitude+rtn:w4,g64+ast:steps=3", true), &["right before it"]);
    refused(&request("sparse24:magnitude+ast:steps=3", false), &["ast:steps=3", "--calib"]);
    assert!(
        Recipe::from_short("sparse24:magnitude+ast:step=3").unwrap_err().to_string().contains("steps=2000")
    );
    let mut short = request("sparse24:magnitude+ast:steps=3,window=1024,batch=200", true);
    short.calibration.windows = None;
    refused(&short, &["longer text", "window="]);
}
