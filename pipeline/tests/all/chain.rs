//! Chains of passes: resumed where they were, and forecast from headers alone.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use llmpress_calibrate::Texts;
use llmpress_formats::{Checkpoint, Producer};
use llmpress_pipeline::{
    CalibrationText, Counted, Options, Plan, Progress, Recipe, Request, Task, Watch, convert_request,
};

fn tinylm() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/tinylm")
}

fn request(chain: &str, windows: usize, length: usize) -> Request {
    let texts = Texts { files: vec![tinylm().join("calib.txt")] };
    let calibration = CalibrationText { texts, windows: Some(windows), length, seed: None };
    Request { recipe: Recipe::from_short(chain).unwrap(), calibration, rankings: Vec::new(), base: None }
}

fn options(resume: bool) -> Options {
    Options {
        jobs: Some(2),
        max_memory: None,
        resume,
        force: false,
        producer: Producer {
            name: "test".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            revision: None,
        },
        extra_files: BTreeMap::new(),
    }
}

/// Counts the forward passes, and does something before one of them.
struct Counting<'a> {
    passes: AtomicU64,
    begun: Mutex<Vec<Task>>,
    at: u64,
    event: &'a (dyn Fn() + Sync),
}

struct Step<'a>(&'a Counting<'a>, Counted);

impl Watch for Counting<'_> {
    fn begin(&self, task: Task) -> Box<dyn Progress + '_> {
        self.begun.lock().unwrap().push(task);
        Box::new(Step(self, task.counted))
    }
}

impl Progress for Step<'_> {
    fn start(&self, _total: u64) {}

    fn advance(&self, amount: u64) {
        if self.1 != Counted::Bytes && self.0.passes.fetch_add(amount, Ordering::SeqCst) + amount == self.0.at
        {
            (self.0.event)();
        }
    }

    fn shard(&self, _file: &str) {}
}

fn counting<'a>(at: u64, event: &'a (dyn Fn() + Sync)) -> Counting<'a> {
    Counting { passes: AtomicU64::new(0), begun: Mutex::new(Vec::new()), at, event }
}

fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries
        .map(|p| (p.file_name().unwrap().to_str().unwrap().to_owned(), std::fs::read(&p).unwrap()))
        .collect()
}

/// What a pass has kept, which can be made impossible to replace.
struct Kept(PathBuf, PathBuf);

impl Kept {
    fn new(out: &Path, pass: usize) -> Self {
        let passes = out.join(".llmpress/passes");
        Self(passes.join(format!("{pass}.json")), passes.join("aside"))
    }

    fn block(&self) {
        std::fs::rename(&self.0, &self.1).unwrap();
        std::fs::create_dir_all(self.0.join("x")).unwrap();
    }

    fn unblock(&self) {
        std::fs::remove_dir_all(&self.0).unwrap();
        std::fs::rename(&self.1, &self.0).unwrap();
    }
}

#[test]
fn an_interrupted_chain_goes_on_where_it_was_and_ends_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, out) = (dir.path().join("whole"), dir.path().join("out"));
    let request = request("drop:mlp=1+finercut:3,protect=0+dfloat11", 1, 24);
    let run = |out: &Path, resume, watch: &Counting<'_>| {
        convert_request(&tinylm(), out, &request, 1 << 30, &options(resume), watch)
    };
    let nothing = || ();
    let watched = counting(0, &nothing);
    run(&whole, false, &watched).unwrap();
    // One window for the first pass; 15, 14 and 13 candidates for the second; then the conversion.
    assert_eq!(watched.passes.load(Ordering::SeqCst), 1 + 15 + 14 + 13);
    assert_eq!(watched.begun.lock().unwrap().len(), 3);
    // Nothing can be kept any more in the second round of the second pass: the job ends there.
    let kept = Kept::new(&out, 2);
    let block = || kept.block();
    run(&out, false, &counting(1 + 15 + 2, &block)).unwrap_err();
    assert!(!out.join("llmpress.json").exists());
    kept.unblock();
    // Not without being told to.
    let refused = run(&out, false, &counting(0, &nothing)).unwrap_err().to_string();
    assert!(refused.contains("--resume"), "{refused}");
    let watched = counting(0, &nothing);
    run(&out, true, &watched).unwrap();
    assert_eq!(watched.passes.load(Ordering::SeqCst), 14 + 13, "the first pass and round are not done again");
    assert!(files(&out) == files(&whole));
    // Finished, it is found finished, and nothing is ranked again.
    let watched = counting(0, &nothing);
    let summary = run(&out, true, &watched).unwrap();
    assert_eq!((summary.resumed, summary.shards), (1, 1));
    assert_eq!(watched.passes.load(Ordering::SeqCst), 0);
    assert!(files(&out) == files(&whole));
}

#[test]
fn what_a_kept_ranking_is_not_of_is_ranked_again() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let run = |request: &Request, resume, watch: &Counting<'_>| {
        convert_request(&tinylm(), &out, request, 1 << 30, &options(resume), watch)
    };
    let kept = Kept::new(&out, 1);
    let block = || kept.block();
    run(&request("finercut:2,protect=0", 1, 24), false, &counting(16 + 2, &block)).unwrap_err();
    kept.unblock();
    // Another text: from the beginning.
    let nothing = || ();
    let watched = counting(0, &nothing);
    run(&request("finercut:2,protect=0", 1, 32), true, &watched).unwrap();
    assert_eq!(watched.passes.load(Ordering::SeqCst), 16 + 15);
}

/// A checkpoint with the headers of another and no data.
fn headers_of(source: &Path, dir: &Path) {
    std::fs::create_dir_all(dir).unwrap();
    std::fs::copy(source.join("config.json"), dir.join("config.json")).unwrap();
    let bytes = std::fs::read(source.join("model.safetensors")).unwrap();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let file = std::fs::File::create(dir.join("model.safetensors")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &bytes[..header], 0).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
}

#[test]
fn every_chain_is_forecast_from_headers_alone() {
    let dir = tempfile::tempdir().unwrap();
    let (empty, out) = (dir.path().join("empty"), dir.path().join("out"));
    // Neither weights nor tokenizer nor text.
    headers_of(&tinylm(), &empty);
    let source: u64 = Checkpoint::open(&empty).unwrap().tensors().values().map(|t| t.bytes).sum();
    for (chain, open, exact) in [
        ("dfloat11", 0, true),
        ("drop:attn=3+raw", 1, true),
        ("drop:joint=4", 1, false),
        ("drop:block=2+drop:mlp=1,iterative+fixed12", 2, true),
        ("finercut:25%", 1, false),
        ("drop:random=3,seed=1+drop:last=2", 0, true),
        ("drop:attn=2,portable", 1, true),
        // What chance takes depends on what is left.
        ("drop:mlp=1+drop:random=2", 2, false),
    ] {
        let (length, windows) = (24, 1);
        let asked = request(chain, windows, length);
        let headers = Request {
            calibration: CalibrationText { texts: Texts { files: Vec::new() }, ..asked.calibration.clone() },
            ..asked.clone()
        };
        let (plan, _) = Plan::forecast(&empty, &headers, 1 << 30).unwrap();
        assert_eq!(plan.passes.len(), open, "{chain}");
        let nothing = || ();
        let watched = counting(0, &nothing);
        let out = out.join(chain.replace(['/', ',', ':', '%'], "_"));
        let mut asked = asked;
        if open == 0 {
            asked.calibration.texts.files.clear();
        }
        convert_request(&tinylm(), &out, &asked, 1 << 30, &options(false), &watched).unwrap();
        let found: u64 = Checkpoint::open(&out).unwrap().tensors().values().map(|t| t.bytes).sum();
        let least: u64 = plan.passes.iter().map(|p| p.forecast.pruning().unwrap().dropped_bytes_least).sum();
        let most: u64 = plan.passes.iter().map(|p| p.forecast.pruning().unwrap().dropped_bytes_most).sum();
        if open > 0 {
            assert!((source - most..=source - least).contains(&found), "{chain}: {found} {least} {most}");
        }
        if exact {
            assert_eq!(plan.source_bytes, found, "{chain}");
        }
        let passes: u64 = plan.passes.iter().map(|p| p.forecast.pruning().unwrap().forward_passes).sum();
        assert_eq!(watched.passes.load(Ordering::SeqCst), passes, "{chain}");
        for pass in &plan.passes {
            let judged = pass.forecast.pruning().unwrap().windows > 0;
            assert_eq!(pass.forecast.pruning().unwrap().million_products > 0, judged, "{chain}");
            assert_eq!(pass.forecast.pruning().unwrap().memory_bytes > 0, judged, "{chain}");
        }
    }
    // A later pass finds the layers that it names, whatever the earlier one will choose.
    let toml = "passes = [\"drop:attn=2\", { prune = { attention = [7], mlp = [7] } }]\nto = \"raw\"\n";
    let named = Request::new(Recipe::from_toml(Path::new("r.toml"), toml).unwrap());
    let (plan, view) = Plan::forecast(&empty, &named, 1 << 30).unwrap();
    assert_eq!(plan.passes.len(), 1);
    assert!(!view.tensors().keys().any(|name| name.contains(".layers.7.")));
    for (chain, words) in [
        ("drop:attn=9", "9 attentions cannot be removed: there are 8"),
        ("drop:attn=5+drop:joint=12", "12 sub-layers cannot be removed: there are 11"),
        ("finercut:17", "17 sub-layers cannot be removed"),
    ] {
        let request = Request::new(Recipe::from_short(chain).unwrap());
        let error = Plan::forecast(&empty, &request, 1 << 30).unwrap_err().to_string();
        assert!(error.contains(words), "{chain}: {error}");
    }
}
