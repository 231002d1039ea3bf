//! Passes that make matrices 2:4: kept block by block, resumed to the same bytes, planned exactly, kept by what comes after.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use llmpress_calibrate::Texts;
use llmpress_formats::encoding::lowrank::{Base, SumsEncoding};
use llmpress_formats::encoding::sparse24::{Inner, Packed};
use llmpress_formats::{Checkpoint, Encoding, Producer};
use llmpress_model::{Model, Skips, Unobserved, undone};
use llmpress_pipeline::{
    CalibrationText, Counted, Method, Options, Plan, Progress, Recipe, Request, Rule, Task, Watch,
    convert_request, restore,
};

fn tinylm() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/tinylm")
}

fn request(recipe: Recipe, texts: bool) -> Request {
    let files = if texts { vec![tinylm().join("calib.txt")] } else { Vec::new() };
    let calibration = CalibrationText { texts: Texts { files }, windows: Some(8), length: 64, seed: None };
    Request { recipe, calibration, rankings: Vec::new(), base: None }
}

fn short(chain: &str, texts: bool) -> Request {
    request(Recipe::from_short(chain).unwrap(), texts)
}

fn toml(text: &str) -> Request {
    request(Recipe::from_toml(Path::new("r.toml"), text).unwrap(), false)
}

fn options() -> Options {
    Options {
        jobs: Some(2),
        max_memory: None,
        resume: false,
        force: false,
        producer: Producer { name: "test".to_owned(), version: "0.1.0".to_owned(), revision: None },
        extra_files: BTreeMap::new(),
    }
}

/// Copies the output now and then, as it would be left if the job were killed then.
struct Copies<'a> {
    out: &'a Path,
    to: &'a Path,
    made: Mutex<Vec<PathBuf>>,
}

struct Step<'a>(Option<&'a Copies<'a>>);

impl Watch for Copies<'_> {
    fn begin(&self, task: Task) -> Box<dyn Progress + '_> {
        Box::new(Step((task.counted == Counted::Weights).then_some(self)))
    }
}

impl Progress for Step<'_> {
    fn start(&self, _total: u64) {}

    fn advance(&self, _amount: u64) {
        let Some(copies) = self.0.filter(|copies| copies.out.exists()) else { return };
        let mut made = copies.made.lock().unwrap();
        let to = copies.to.join(made.len().to_string());
        copy(copies.out, &to);
        made.push(to);
    }

    fn shard(&self, _file: &str) {}
}

/// Nobody watches.
struct Unwatched;

impl Watch for Unwatched {
    fn begin(&self, _task: Task) -> Box<dyn Progress + '_> {
        Box::new(Step(None))
    }
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy(&path, &target);
        } else {
            std::fs::copy(&path, &target).unwrap();
        }
    }
}

fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries
        .map(|p| (p.file_name().unwrap().to_str().unwrap().to_owned(), std::fs::read(&p).unwrap()))
        .collect()
}

fn convert(out: &Path, request: &Request, options: &Options) -> Result<(), String> {
    let run = convert_request(&tinylm(), out, request, 4 << 30, options, &Unwatched);
    run.map(drop).map_err(|e| e.to_string())
}

#[test]
fn killed_anywhere_a_job_goes_on_to_the_same_bytes() {
    for (chain, spared) in [
        ("sparse24:wanda+fixed12", 37),
        ("sparse24:sparsegpt,slorb+rtn:w4,g64", 67),
        ("sparse24:sparsegpt,reconstruct,steps=2", 71),
        ("sparse24:wanda,permute+rtn:w4,g64", 61),
        ("sparse24:wanda,dense=25%", 41),
        ("sparse24:wanda,ratio=0.3+rtn:w4,g64", 83),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (whole, out) = (dir.path().join("whole"), dir.path().join("out"));
        let mut request = short(chain, true);
        if chain.contains("reconstruct") {
            (request.calibration.windows, request.calibration.length) = (Some(16), 16);
        }
        if chain.contains('%') || chain.contains("ratio") {
            (request.calibration.windows, request.calibration.length) = (Some(2), 32);
        }
        convert(&whole, &request, &options()).unwrap();
        let expected = files(&whole);
        let told = ["reconstruct", "dense", "ratio"].iter().any(|option| chain.contains(option));
        assert_eq!(expected.contains_key("sparsity.jsonl"), told, "{chain}");
        assert!(!whole.join(".llmpress").exists());
        let copies = Copies { out: &out, to: &dir.path().join("copies"), made: Mutex::default() };
        convert_request(&tinylm(), &out, &request, 4 << 30, &options(), &copies).unwrap();
        assert!(files(&out) == expected, "{chain}");
        let made = copies.made.into_inner().unwrap();
        assert!(made.len() > 40, "{chain}: {}", made.len());
        for (number, copy) in made.iter().enumerate().step_by(spared) {
            convert(copy, &request, &Options { resume: true, ..options() }).unwrap();
            assert!(files(copy) == expected, "{chain}: killed at {number}");
        }
        // Done already: the same job finds nothing to do.
        convert(&out, &request, &Options { resume: true, ..options() }).unwrap();
        assert!(files(&out) == expected, "{chain}");
    }
}

/// The units of linears, and how much each weight of them takes.
fn linears(out: &Path) -> Vec<(String, Encoding, f64)> {
    let checkpoint = Checkpoint::open(out).unwrap();
    let mut found = Vec::new();
    for (name, unit) in checkpoint.units().iter().filter(|(name, _)| name.contains("_proj")) {
        let weights: u64 = checkpoint.tensor(name).unwrap().shape.iter().product();
        found.push((
            name.clone(),
            unit.encoding().clone(),
            unit.stored_bytes() as f64 * 8.0 / weights as f64,
        ));
    }
    assert_eq!(found.len(), 56, "eight layers of seven");
    found
}

#[test]
fn chains_store_what_is_two_in_four_as_they_say_and_plans_know_it() {
    let check = |chain: &str, bits: (f64, f64), right: &dyn Fn(&Encoding) -> bool| {
        let dir = tempfile::tempdir().unwrap();
        let request = short(chain, chain.contains("wanda") || chain.contains("gptq"));
        convert(dir.path().join("out").as_path(), &request, &options()).unwrap();
        let (mut stored, mut sum) = (0, 0.0);
        for (name, encoding, of_weight) in linears(&dir.path().join("out")) {
            assert!(right(&encoding), "{chain}: {name}: {encoding:?}");
            assert!(of_weight > bits.0 && of_weight < bits.1, "{chain}: {name}: {of_weight}");
            (stored, sum) = (stored + 1, sum + of_weight);
        }
        let mean = sum / f64::from(stored);
        let (plan, _) = Plan::forecast(&tinylm(), &request, 4 << 30).unwrap();
        assert!(!plan.passes.is_empty());
        let out = Checkpoint::open(&dir.path().join("out")).unwrap();
        let expected: u64 = plan.units().filter(|u| u.name.contains("_proj")).map(|u| u.expected_bytes).sum();
        let real: u64 =
            out.units().iter().filter(|(n, _)| n.contains("_proj")).map(|(_, u)| u.stored_bytes()).sum();
        let off = (expected as f64 / real as f64 - 1.0).abs();
        assert!(off < 0.01, "{chain}: {expected} bytes were planned, {real} came ({mean} bits)");
    };
    check("sparse24:magnitude", (8.99, 9.01), &|e| matches!(e, Encoding::Sparse24(s) if s.values.is_none()));
    // Padding of tiles in matrices as small as these.
    check(
        "sparse24:wanda+fixed12",
        (6.99, 7.3),
        &|e| matches!(e, Encoding::Sparse24(s) if matches!(s.values, Some(Inner::Fixed12 { .. }))),
    );
    check(
        "sparse24:magnitude,slorb+fixed12",
        (7.99, 8.3),
        &|e| matches!(e, Encoding::Lowrank(l) if l.sums.is_none() && l.block == 16 && matches!(l.base, Base::Sparse24(s) if matches!(s.values, Some(Inner::Fixed12 { .. })))),
    );
    check(
        "sparse24:magnitude+rtn:w4,g64",
        (3.2, 3.6),
        &|e| matches!(e, Encoding::Sparse24(s) if s.abq().is_some_and(|abq| abq.bits == 4)),
    );
    check(
        "sparse24:magnitude+gptq:w4,g64,symmetric",
        (3.1, 3.3),
        &|e| matches!(e, Encoding::Sparse24(s) if s.abq().is_some_and(|abq| abq.group_size == Some(64))),
    );
    check("sparse24:wanda,slorb+grid:w3,g64+dfloat11", (3.2, 3.9), &|e| {
        let Encoding::Lowrank(lowrank) = e else { return false };
        let Base::Sparse24(base) = &lowrank.base else { return false };
        let Some(SumsEncoding::Abq(sums)) = &lowrank.sums else { return false };
        base.abq().is_some_and(|abq| abq.bits == 3) && sums.bits == 8
    });
}

#[test]
fn every_linear_is_two_in_four_and_the_rest_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let (out, plain) = (dir.path().join("out"), dir.path().join("plain"));
    convert(&out, &short("sparse24:wanda", true), &options()).unwrap();
    restore(&Checkpoint::open(&out).unwrap(), &plain, 4 << 30, &options(), &Step(None)).unwrap();
    let (source, plain) = (Checkpoint::open(&tinylm()).unwrap(), Checkpoint::open(&plain).unwrap());
    let mut sparse = 0;
    for (name, tensor) in source.tensors() {
        let bytes = plain.read_tensor(name).unwrap();
        if name.contains("_proj") {
            let (rows, cols) = (tensor.shape[0] as usize, tensor.shape[1] as usize);
            Packed::from_dense(tensor.dtype, rows, cols, &bytes).expect("two in four");
            sparse += 1;
        } else {
            assert!(bytes == source.read_tensor(name).unwrap(), "{name}");
        }
    }
    assert_eq!(sparse, 56);
    // What was kept of a stored one is packed again without a pass.
    let again = dir.path().join("again");
    let recipe = Recipe::new(Method::Sparse24);
    let plan = Plan::new(&plain, &recipe, 4 << 30).unwrap();
    llmpress_pipeline::convert(&plain, &again, &plan, &options(), &Step(None)).unwrap();
    assert!(linears(&again).iter().all(|(_, encoding, _)| encoding.name() == "sparse24"));
}

#[test]
fn channels_in_another_order_lose_less_and_restore_puts_them_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let source = Checkpoint::open(&tinylm()).unwrap();
    for rule in ["magnitude", "wanda"] {
        let lost = |chain: &str| -> BTreeMap<String, f64> {
            let (out, plain) = (path(chain), path(&format!("{chain}-plain")));
            convert(&out, &short(chain, rule == "wanda"), &options()).unwrap();
            let made = Checkpoint::open(&out).unwrap();
            assert_eq!(made.transforms().is_empty(), !chain.contains("permute"));
            assert!(made.transforms().iter().all(|t| t.name().starts_with("permutation of ") && !t.online()));
            restore(&undone(made).unwrap(), &plain, 4 << 30, &options(), &Step(None)).unwrap();
            let plain = Checkpoint::open(&plain).unwrap();
            assert!(plain.transforms().is_empty());
            let of = |name: &String| {
                let values = |bytes: Vec<u8>| -> Vec<f64> {
                    let of = |b: &[u8]| f64::from(f32::from_bits(u32::from_le_bytes([0, 0, b[0], b[1]])));
                    bytes.chunks_exact(2).map(of).collect()
                };
                let dense = values(source.read_tensor(name).unwrap());
                let sparse = values(plain.read_tensor(name).unwrap());
                // Each kept weight is where it was.
                assert!(sparse.iter().zip(&dense).all(|(s, d)| s == d || *s == 0.0), "{chain}: {name}");
                sparse.iter().zip(&dense).map(|(s, d)| (s - d).powi(2)).sum::<f64>()
            };
            let names = source.tensors().keys().filter(|name| name.contains("_proj"));
            names.map(|name| (name.clone(), of(name))).collect()
        };
        let before = lost(&format!("sparse24:{rule}"));
        let after = lost(&format!("sparse24:{rule},permute"));
        let sum = |lost: &BTreeMap<String, f64>, part: &str| -> f64 {
            lost.iter().filter(|(name, _)| name.contains(part)).map(|(_, lost)| lost).sum()
        };
        for part in ["down_proj", "o_proj"] {
            assert!(sum(&after, part) < sum(&before, part), "{rule}: {part}");
        }
        // Rows in another order are the same rows.
        for part in ["gate_proj", "up_proj", "v_proj", "q_proj", "k_proj"] {
            let (after, before) = (sum(&after, part), sum(&before, part));
            assert!((after / before - 1.0).abs() < 0.02, "{rule}: {part}: {after} {before}");
        }
    }
}

#[test]
fn kept_codes_and_their_positions_take_less_room_through_the_coder_and_are_the_same_numbers() {
    let dir = tempfile::tempdir().unwrap();
    for (chain, positions, codes) in [
        ("sparse24:magnitude+rtn:w4,g64", "position_codes", "values.codes"),
        ("sparse24:magnitude,slorb+rtn:w4,g64", "base.position_codes", "base.values.codes"),
        // Values stay plain beside coded positions.
        ("sparse24:magnitude,slorb", "base.position_codes", ""),
    ] {
        let (plain, out) = (dir.path().join(chain), dir.path().join(format!("{chain}-coded")));
        let (request, mut coded) = (short(chain, false), short(chain, false));
        coded.recipe.entropy_code = true;
        convert(&plain, &request, &options()).unwrap();
        convert(&out, &coded, &options()).unwrap();
        let [before, after] = [&plain, &out].map(|path| Checkpoint::open(path).unwrap());
        let mut sizes = [0, 0];
        for (name, unit) in before.units().iter().filter(|(_, unit)| unit.encoding().is_lossy()) {
            let other = &after.units()[name];
            assert_eq!(other.encoding(), unit.encoding());
            assert!(other.components().contains_key(positions), "{chain}: {name}");
            assert_eq!(other.components().contains_key(codes), !codes.is_empty(), "{chain}: {name}");
            assert!(after.read_tensor(name).unwrap() == before.read_tensor(name).unwrap(), "{chain}: {name}");
            (sizes[0], sizes[1]) = (sizes[0] + unit.stored_bytes(), sizes[1] + other.stored_bytes());
        }
        let most = if codes.is_empty() { 97 } else { 90 };
        assert!(sizes[1] * 100 < sizes[0] * most, "{chain}: {sizes:?}");
        // Products run from them as from plain ones.
        let last = |checkpoint: Checkpoint| -> Vec<f32> {
            let model = Model::open(std::sync::Arc::new(checkpoint)).unwrap();
            let mut cache = model.cache(8);
            let hidden = model.hidden(&[5, 6, 7], &mut cache, &Skips::new(), &mut Unobserved).unwrap();
            hidden.token(2).collect()
        };
        assert!(last(before) == last(after), "{chain}");
        // What is coded already is coded no other way, and goes back.
        let again = dir.path().join("again");
        let mut recipe = Recipe::new(Method::Raw);
        recipe.entropy_code = true;
        let made = Checkpoint::open(&out).unwrap();
        let plan = Plan::new(&made, &recipe, 4 << 30).unwrap();
        let over = Options { force: true, ..options() };
        llmpress_pipeline::convert(&made, &again, &plan, &over, &Step(None)).unwrap();
        let kept = Checkpoint::open(&again).unwrap();
        for (name, unit) in made.units() {
            assert!(unit.stored_bytes() == kept.units()[name].stored_bytes(), "{chain}: {name}");
        }
    }
}

#[test]
fn a_quantiser_takes_the_kept_values_of_a_checkpoint_that_is_stored_so() {
    let dir = tempfile::tempdir().unwrap();
    let (sparse, after, at_once) =
        (dir.path().join("sparse"), dir.path().join("after"), dir.path().join("once"));
    convert(&sparse, &short("sparse24:magnitude,slorb", false), &options()).unwrap();
    let request = short("rtn:w4,g64", false);
    convert_request(&sparse, &after, &request, 4 << 30, &options(), &Unwatched).unwrap();
    convert(&at_once, &short("sparse24:magnitude,slorb+rtn:w4,g64", false), &options()).unwrap();
    assert!(linears(&after) == linears(&at_once));
    let (plan, _) = Plan::forecast(&sparse, &request, 4 << 30).unwrap();
    let expected: u64 = plan.units().filter(|u| u.name.contains("_proj")).map(|u| u.expected_bytes).sum();
    let out = Checkpoint::open(&after).unwrap();
    let real: u64 =
        out.units().iter().filter(|(n, _)| n.contains("_proj")).map(|(_, u)| u.stored_bytes()).sum();
    assert!((expected as f64 / real as f64 - 1.0).abs() < 0.01, "{expected} {real}");
    let (once, after) = (Checkpoint::open(&at_once).unwrap(), out);
    for name in after.tensors().keys() {
        assert!(after.read_tensor(name).unwrap() == once.read_tensor(name).unwrap(), "{name}");
    }
    // What would lose the pattern is refused, and so is coding what cannot be.
    let mut learned = short("gptq:w4,learn", true);
    learned.calibration.windows = Some(16);
    let error = convert_request(&sparse, &dir.path().join("x"), &learned, 4 << 30, &options(), &Unwatched);
    assert!(error.unwrap_err().to_string().contains("weights that are dropped"));
    let mut coded = Recipe::new(Method::Raw);
    coded.entropy_code = true;
    let error = Plan::new(&Checkpoint::open(&tinylm()).unwrap(), &coded, 4 << 30).unwrap_err().to_string();
    assert!(error.contains("--entropy-code"), "{error}");
}

/// A request whose matrices are measured on little text.
fn partly(chain: &str) -> Request {
    let mut request = short(chain, true);
    (request.calibration.windows, request.calibration.length) = (Some(4), 32);
    request
}

/// What the record says that became of each matrix.
fn recorded(out: &Path) -> BTreeMap<String, String> {
    let lines = std::fs::read_to_string(out.join("sparsity.jsonl")).unwrap();
    let lines = lines.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
    lines
        .inspect(|line| assert!(line["divergence"]["2:4"].as_f64().unwrap() >= 0.0, "{line}"))
        .map(|line| (text(&line["tensor"]), text(&line["becomes"])))
        .collect()
}

/// Bytes that the linears of an output take, and those that they had.
fn stored(out: &Path) -> (u64, u64) {
    let checkpoint = Checkpoint::open(out).unwrap();
    let units = checkpoint.units().iter().filter(|(name, _)| name.contains("_proj"));
    units.fold((0, 0), |(stored, was), (name, unit)| {
        (stored + unit.stored_bytes(), was + checkpoint.tensor(name).unwrap().bytes)
    })
}

#[test]
fn a_share_of_the_weights_stays_dense_and_the_record_says_which() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let request = partly("sparse24:wanda,dense=10%");
    convert(&out, &request, &options()).unwrap();
    let (done, source) = (Checkpoint::open(&out).unwrap(), Checkpoint::open(&tinylm()).unwrap());
    let recorded = recorded(&out);
    assert_eq!(recorded.len(), 56);
    let (mut dense, mut all, mut least) = (0, 0, u64::MAX);
    for (name, encoding, _) in linears(&out) {
        let weights: u64 = done.tensor(&name).unwrap().shape.iter().product();
        (all, least) = (all + weights, least.min(weights));
        if encoding.name() == "raw" {
            dense += weights;
            assert!(done.read_tensor(&name).unwrap() == source.read_tensor(&name).unwrap(), "{name}");
        }
        let expected = if encoding.name() == "raw" { "dense" } else { "2:4" };
        assert_eq!(recorded[&name], expected, "{name}: {encoding:?}");
    }
    assert!(dense * 10 <= all && (dense + least) * 10 > all, "{dense} of {all}");
    let recipe = &done.manifest().unwrap().recipe["passes"][0]["sparsify"];
    let listed: Vec<&str> = recipe["dense"].as_array().unwrap().iter().map(|n| n.as_str().unwrap()).collect();
    let of_record: Vec<&String> = recorded.iter().filter(|(_, b)| *b == "dense").map(|(n, _)| n).collect();
    assert_eq!(listed, of_record);
    let (plan, _) = Plan::forecast(&tinylm(), &request, 4 << 30).unwrap();
    let expected: u64 = plan.units().filter(|u| u.name.contains("_proj")).map(|u| u.expected_bytes).sum();
    let off = expected as f64 / stored(&out).0 as f64;
    assert!((1.0..1.02).contains(&off), "{off}");
}

#[test]
fn a_ratio_is_kept_on_disk_with_the_forms_that_the_record_says() {
    for (chain, ratio, forms) in [
        ("sparse24:magnitude,ratio=0.7", 0.7, &["dense", "2:4"][..]),
        ("sparse24:wanda,slorb,ratio=0.275+rtn:w4,g64", 0.275, &["quantised", "2:4 quantised"]),
        ("sparse24:wanda,ratio=0.6+rtn:w4,g64", 0.6, &["dense", "quantised"]),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let request = partly(chain);
        convert(&out, &request, &options()).unwrap();
        let (bytes, was) = stored(&out);
        let found = bytes as f64 / was as f64;
        // Small matrices leave little of the budget.
        assert!(found <= ratio && found > ratio - 0.02, "{chain}: {found}");
        let recorded = recorded(&out);
        for form in forms {
            assert!(recorded.values().any(|becomes| becomes == form), "{chain}: no {form}: {recorded:?}");
        }
        for (name, encoding, _) in linears(&out) {
            let quantised = encoding.is_lossy();
            let sparse = matches!(encoding.name(), "sparse24" | "lowrank");
            // A 2:4 matrix with sums is lossy by them alone.
            let expected = match (sparse, quantised) {
                (false, false) => "dense",
                (false, true) => "quantised",
                (true, false) => "2:4",
                (true, true) => "2:4 quantised",
            };
            assert_eq!(recorded[&name], expected, "{chain}: {name}");
        }
        let (plan, _) = Plan::forecast(&tinylm(), &request, 4 << 30).unwrap();
        let planned: u64 = plan.units().filter(|u| u.name.contains("_proj")).map(|u| u.expected_bytes).sum();
        assert!((planned as f64 / was as f64 - ratio).abs() < 0.001, "{chain}: {planned}");
    }
}

#[test]
fn rules_leave_tensors_dense() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let request = toml(
        "to = \"fixed12\"\npasses = [\"sparse24:magnitude\"]\n\
         [[rule]]\ntensors = '.*down_proj\\.weight'\nto = \"planes\"\n",
    );
    convert(&out, &request, &options()).unwrap();
    for (name, encoding, _) in linears(&out) {
        let expected = if name.contains("down_proj") { "planes" } else { "sparse24" };
        assert_eq!(encoding.name(), expected, "{name}");
    }
}

#[test]
fn what_makes_no_sense_is_refused_before_any_work() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let refused = |request: &Request, words: &[&str]| {
        let error = convert(&out, request, &options()).unwrap_err();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
        assert!(!out.exists(), "{error}");
    };
    refused(&short("sparse24:wanda", false), &["sparse24:wanda", "--calib"]);
    refused(&short("sparse24:magnitude", true), &["--calib is for"]);
    refused(&short("sparse24:magnitude+sparse24:wanda", true), &["two passes make matrices 2:4"]);
    refused(&short("rtn:w4+sparse24:magnitude", false), &["cannot be made 2:4"]);
    let mut learned = short("sparse24:magnitude+gptq:w4,learn", true);
    learned.calibration.windows = Some(16);
    refused(&learned, &["gptq:w4,learn", "weights that are dropped"]);
    refused(&short("sparse24:magnitude+rtn:w4,rotate", false), &["2:4"]);
    refused(&short("sparse24:magnitude+rtn:w4a8", false), &["inputs of kept values"]);
    let settled = "to = \"raw\"\npasses = [{ sparsify = { to = \"sparse24:magnitude\" } }]\n";
    refused(&toml(settled), &["ask for it by its name", "sparse24:magnitude"]);
    let mut coded = short("sparse24:magnitude", false);
    coded.recipe.entropy_code = true;
    refused(&coded, &["--entropy-code"]);
    // What cannot be reached, with what can.
    refused(&partly("sparse24:wanda,dense=0.1%"), &["dense=0.1%", "at least"]);
    refused(&partly("sparse24:wanda,ratio=0.5"), &["ratio=0.5", "give 0.5625"]);
    refused(&partly("sparse24:wanda,ratio=0.1+rtn:w4,g64"), &["ratio=0.1", "give 0.2"]);
    refused(&partly("sparse24:wanda,ratio=0.5+drop:attn=1+rtn:w4"), &["prune before"]);
    refused(&short("sparse24:magnitude,dense=10%", false), &["--calib"]);
    let mut named = partly("sparse24:wanda,ratio=0.6+rtn:w4");
    let rule = Rule { tensors: r".*_proj\.weight".to_owned(), to: "rtn:w8".parse().unwrap() };
    named.recipe.rules.push(rule);
    refused(&named, &["rules name every matrix"]);
    let mut few = short("sparse24:wanda,reconstruct", true);
    few.calibration.windows = Some(2);
    refused(&few, &["reconstruction takes", "there are 2"]);
    assert!(Recipe::from_short("sparse24:other").unwrap_err().to_string().contains("magnitude, wanda"));
    assert_eq!(Recipe::from_short("sparse24:fixed12").unwrap(), Recipe::new(Method::Sparse24Fixed12));
}
