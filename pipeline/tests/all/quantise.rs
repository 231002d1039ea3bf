//! Quantising passes: kept block by block, resumed to the same bytes, planned exactly, kept by what comes after.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use llmpress_calibrate::Texts;
use llmpress_formats::{Checkpoint, Encoding, Producer};
use llmpress_pipeline::{
    CalibrationText, Counted, Method, Options, Plan, Progress, Recipe, Request, Task, Watch, convert_request,
    restore,
};

fn tinylm() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/tinylm")
}

fn request(recipe: Recipe, texts: bool) -> Request {
    let files = if texts { vec![tinylm().join("calib.txt")] } else { Vec::new() };
    let calibration = CalibrationText { texts: Texts { files }, windows: Some(4), length: 64, seed: None };
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
        producer: Producer {
            name: "test".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            revision: None,
        },
        extra_files: BTreeMap::new(),
    }
}

/// Copies the output whenever another tensor is quantised, as it would be left if the job were killed then.
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
    for (chain, texts, spared) in [
        ("rtn:w4,g128+planes", false, 9),
        ("gptq:w2a8", true, 5),
        ("gptq:w4a4,rotate=r2r4,smooth,qkv4,kv8+planes", true, 11),
        ("gptq:w2a8,rotate=r4,learn,steps=2", true, 23),
        ("gptq:w2a8,rotate=r4,learn=block,scale,maps,steps=9", true, 61),
        ("gptq:w3.25,g128", true, 19),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (whole, out) = (dir.path().join("whole"), dir.path().join("out"));
        let mut request = short(chain, texts);
        if chain.contains("learn") {
            (request.calibration.windows, request.calibration.length) = (Some(16), 16);
        }
        convert(&whole, &request, &options()).unwrap();
        let expected = files(&whole);
        let record = ["learning.jsonl", "learning-loss.svg", "learning-error.svg"];
        assert!(record.iter().all(|file| expected.contains_key(*file) == chain.contains("learn")), "{chain}");
        if let Some(lines) = expected.get("learning.jsonl") {
            let lines = std::str::from_utf8(lines).unwrap().lines();
            let lines: Vec<serde_json::Value> =
                lines.map(|line| serde_json::from_str(line).unwrap()).collect();
            // Of eight layers attention and MLP, or both at once.
            let (each, steps) = if chain.contains("=block") { (1, 9) } else { (2, 2) };
            assert_eq!(lines.len(), 8 * each);
            let mut lines = lines.iter().enumerate();
            assert!(lines.clone().all(|(at, line)| line["layer"] == at / each && line["steps"] == steps));
            let (_, last) = lines.next_back().unwrap();
            let (what, tensors) = if each == 1 { ("block", 7) } else { ("mlp", 3) };
            assert!(last["what"] == what && last["tensors"].as_array().unwrap().len() == tensors, "{last}");
        }
        assert!(!whole.join(".llmpress").exists());
        let copies = Copies { out: &out, to: &dir.path().join("copies"), made: Mutex::default() };
        convert_request(&tinylm(), &out, &request, 4 << 30, &options(), &copies).unwrap();
        assert!(files(&out) == expected, "{chain}");
        let made = copies.made.into_inner().unwrap();
        assert!(made.len() > 40, "{}", made.len());
        for (number, copy) in made.iter().enumerate().step_by(spared) {
            let error = convert(copy, &request, &options()).unwrap_err();
            assert!(error.contains("use --resume"), "{error}");
            convert(copy, &request, &Options { resume: true, ..options() }).unwrap();
            assert!(files(copy) == expected, "{chain}: killed at {number}");
        }
    }
}

#[test]
fn what_is_damaged_in_a_stage_is_made_again() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let request = short("gptq:w3,smooth", true);
    let copies = Copies { out: &out, to: &dir.path().join("copies"), made: Mutex::default() };
    convert_request(&tinylm(), &out, &request, 4 << 30, &options(), &copies).unwrap();
    let expected = files(&out);
    let made = copies.made.into_inner().unwrap();
    let resume = Options { resume: true, ..options() };
    let stage = |copy: &Path| copy.join(".llmpress/passes/1");
    let change = |path: &Path| {
        let mut bytes = std::fs::read(path).unwrap();
        let at = bytes.len() - 3;
        bytes[at] ^= 1;
        std::fs::write(path, bytes).unwrap();
    };
    // In the middle, with a few blocks finished.
    let copies = made.iter().filter(|copy| stage(copy).join("block-00002.json").exists());
    for (copy, name) in copies.zip([
        "transforms.json",
        "block-00001.safetensors",
        "block-00001.json",
        "pass.json",
        ".streams",
    ]) {
        let found = std::fs::read_dir(stage(copy)).unwrap().map(|entry| entry.unwrap().path());
        let found: Vec<PathBuf> = found.filter(|path| path.to_str().unwrap().ends_with(name)).collect();
        assert_eq!(found.len(), 1, "{name}: {found:?}");
        change(&found[0]);
        convert(copy, &request, &resume).unwrap();
        assert!(files(copy) == expected, "{name}");
    }
}

#[test]
fn rules_give_widths_and_what_is_planned_is_what_is_stored() {
    let request = toml(
        "to = \"planes\"\npasses = [\"rtn:w3,g64\"]\n\
         [[rule]]\ntensors = '.*down_proj\\.weight'\nto = \"rtn:w8,symmetric\"\n\
         [[rule]]\ntensors = '.*layers\\.0\\.self_attn.*_proj\\.weight'\nto = \"raw\"\n\
         [[rule]]\ntensors = 'model\\.embed_tokens\\.weight'\nto = \"grid:w6a8,g128,int\"\n",
    );
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let (plan, _) = Plan::forecast(&tinylm(), &request, 4 << 30).unwrap();
    convert(&out, &request, &options()).unwrap();
    let done = Checkpoint::open(&out).unwrap();
    let mut widths: BTreeMap<String, usize> = BTreeMap::new();
    let mut planned = 0;
    for unit in plan.units() {
        let stored = &done.units()[&unit.name];
        let Encoding::Abq(abq) = stored.encoding() else {
            assert_ne!(unit.method, Method::Kept, "{}", unit.name);
            continue;
        };
        *widths.entry(abq.widths()).or_default() += 1;
        assert_eq!(
            (unit.method, unit.expected_bytes),
            (Method::Kept, stored.stored_bytes()),
            "{}",
            unit.name
        );
        planned += 1;
    }
    // Eight layers of seven linears; the attention of one stays.
    let expected = [("w3,g64", 44), ("w6a8,g128", 1), ("w8", 8)].map(|(w, n)| (w.to_owned(), n));
    assert_eq!(widths, BTreeMap::from(expected));
    assert_eq!(planned, 53);
    assert_eq!(done.units()["model.layers.0.self_attn.q_proj.weight"].encoding(), &Encoding::Raw);
    assert!(done.units()["model.embed_tokens.weight"].components().contains_key("zero"));
    let json = serde_json::to_value(&plan).unwrap();
    assert_eq!(json["passes"][0]["pass"], "rtn:w3,g64");
    assert_eq!(json["passes"][0]["tensors"], 53);
    let manifest = done.manifest().unwrap();
    assert_eq!(manifest.recipe["passes"][0]["quantise"]["to"], "rtn:w3,g64");
    assert_eq!(manifest.recipe["rule"][0]["to"], "rtn:w8,symmetric");
}

#[test]
fn recipes_that_cannot_be_carried_out_are_refused_before_any_work() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let refused = |request: &Request, words: &[&str]| {
        let error = convert(&out, request, &options()).unwrap_err();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
        assert!(!out.exists(), "{error}");
    };
    let rule = |tensors: &str, to: &str| format!("[[rule]]\ntensors = '{tensors}'\nto = \"{to}\"\n");
    refused(
        &toml(&format!("to = \"raw\"\n{}", rule(".*q_proj.*", "rtn:w4"))),
        &["no pass quantises", "rtn:w4"],
    );
    refused(&toml("to = \"raw\"\npasses = [\"rtn:w4\", \"rtn:w8\"]\n"), &["two passes quantise"]);
    let norms = toml(&format!("to = \"raw\"\npasses = [\"rtn:w4\"]\n{}", rule(".*norm.*", "rtn:w4")));
    refused(&norms, &["norm", "matrices"]);
    let nothing = toml(&format!("to = \"raw\"\npasses = [\"rtn:w4\"]\n{}", rule(".*", "raw")));
    refused(&nothing, &["none of its tensors"]);
    refused(&short("gptq:w4", false), &["gptq:w4", "--calib"]);
    refused(&short("rtn:w4,smooth", false), &["smooth", "--calib"]);
    refused(&short("rtn:w4", true), &["--calib is for"]);
    let settled = "to = \"raw\"\npasses = [{ quantise = { to = \"rtn:w4\" } }]\n";
    refused(&toml(settled), &["ask for it by its name", "rtn:w4"]);
    let too_short = Request {
        calibration: CalibrationText { windows: Some(1), length: 8, ..short("gptq:w4", true).calibration },
        ..short("gptq:w4", true)
    };
    let error = convert(&out, &too_short, &options()).unwrap_err();
    assert!(error.contains("calibration tokens"), "{error}");
}

#[test]
fn a_text_too_short_to_learn_from_is_refused_before_any_work() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let rule =
        "to = \"raw\"\npasses = [\"gptq:w4\"]\n[[rule]]\ntensors = '.*q_proj.*'\nto = \"gptq:w4,learn\"\n";
    let mut by_rule = toml(rule);
    by_rule.calibration = request(Recipe::new(Method::Raw), true).calibration;
    for request in [short("gptq:w2,learn", true), by_rule] {
        let error = convert(&out, &request, &options()).unwrap_err();
        for words in [",learn: learning takes 16 calibration windows", "there are 4", "raise --calib-windows"]
        {
            assert!(error.contains(words), "{error}");
        }
        assert!(!out.exists());
        assert!(Plan::forecast(&tinylm(), &request, 4 << 30).unwrap_err().to_string().contains("16"));
    }
}

#[test]
fn an_architecture_that_does_not_run_is_refused_with_the_rungs_that_work() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (dir.path().join("model"), dir.path().join("out"));
    copy(&tinylm(), &model);
    let config = std::fs::read_to_string(model.join("config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_str(&config).unwrap();
    let mut other = config.clone();
    other["model_type"] = "unheard_of".into();
    std::fs::write(model.join("config.json"), other.to_string()).unwrap();
    let convert = |request: &Request| {
        convert_request(&model, &out, request, 4 << 30, &options(), &Unwatched).map_err(|e| e.to_string())
    };
    let mut learning = short("gptq:w2,learn", true);
    (learning.calibration.windows, learning.calibration.length) = (Some(16), 16);
    let error = convert(&learning).unwrap_err();
    for words in
        ["unheard_of", "these do: ", "gptq:w2,learn goes by what the model reads", "rtn:... quantises any"]
    {
        assert!(error.contains(words), "{error}");
    }
    assert!(!out.exists());
    // And so it is.
    convert(&short("grid:w4", false)).unwrap();
}

#[test]
fn what_is_quantised_is_kept_unless_a_rule_names_it() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b, c, plain) =
        (dir.path().join("a"), dir.path().join("b"), dir.path().join("c"), dir.path().join("plain"));
    convert(&a, &short("rtn:w4a8,g128,symmetric", false), &options()).unwrap();
    let again = |out: &Path, request: &Request| {
        convert_request(&a, out, request, 4 << 30, &options(), &Unwatched).map_err(|e| e.to_string())
    };
    again(&b, &short("fixed12", false)).unwrap();
    let (first, second) = (Checkpoint::open(&a).unwrap(), Checkpoint::open(&b).unwrap());
    let mut kept = 0;
    for (name, unit) in first.units().iter().filter(|(_, unit)| unit.encoding().is_lossy()) {
        let other = &second.units()[name];
        assert_eq!(other.encoding(), unit.encoding());
        for component in unit.components().keys() {
            assert!(first.view(name, component).unwrap() == second.view(name, component).unwrap(), "{name}");
        }
        kept += 1;
    }
    assert_eq!(kept, 56);
    assert_eq!(second.units()["model.embed_tokens.weight"].encoding().name(), "fixed12");
    let rule = "to = \"raw\"\n[[rule]]\ntensors = '.*q_proj.*'\nto = \"dfloat11\"\n";
    again(&c, &toml(rule)).unwrap();
    let third = Checkpoint::open(&c).unwrap();
    let q = "model.layers.3.self_attn.q_proj.weight";
    assert_eq!(third.unit_of(third.tensor(q).unwrap()).unwrap().encoding().name(), "dfloat11");
    assert!(third.read_tensor(q).unwrap() == first.read_tensor(q).unwrap());
    let before = files(&a);
    let force = Options { force: true, ..options() };
    let onto = convert_request(&a, &a, &short("rtn:w4", false), 4 << 30, &force, &Unwatched);
    assert!(onto.unwrap_err().to_string().contains("contains the source"));
    assert!(files(&a) == before && !a.join(".llmpress").exists());
    let error = again(&dir.path().join("d"), &short("rtn:w4", false)).unwrap_err();
    assert!(error.contains("is quantised already"), "{error}");
    // Back to plain tensors of what the codes stand for.
    restore(&second, &plain, 4 << 30, &options(), &Step(None)).unwrap();
    let dense = Checkpoint::open(&plain).unwrap();
    for name in first.tensors().keys() {
        assert!(dense.read_tensor(name).unwrap() == first.read_tensor(name).unwrap(), "{name}");
        assert!(!dense.unit_of(dense.tensor(name).unwrap()).unwrap().encoding().is_lossy());
    }
    // A component whose bytes do not show in what it decodes to is compared all the same.
    let shard = first.units()[q].components().get("planes").unwrap().clone();
    let mut bytes = std::fs::read(shard.path()).unwrap();
    bytes[shard.file_offset() as usize] ^= 1;
    std::fs::write(shard.path(), bytes).unwrap();
    let error = again(&dir.path().join("e"), &short("planes", false)).unwrap_err();
    assert!(error.contains("planes") && error.contains("good copy"), "{error}");
}

#[test]
fn a_finished_output_is_checked_and_never_mistaken_for_another() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let request = short("grid:w3,rotate", true);
    convert(&out, &request, &options()).unwrap();
    let expected = files(&out);
    let resume = Options { resume: true, ..options() };
    convert(&out, &request, &resume).unwrap();
    assert!(files(&out) == expected);
    for other in [
        short("grid:w4,rotate", true),
        short("grid:w3", true),
        short("rtn:w3", false),
        short("grid:w3", false),
    ] {
        let error = convert(&out, &other, &resume).unwrap_err();
        assert!(error.contains("made by another recipe"), "{error}");
        assert!(files(&out) == expected);
    }
    // Replaced when all is done, not before.
    convert(&out, &short("rtn:w2", false), &Options { force: true, ..options() }).unwrap();
    assert!(files(&out) != expected && !out.join(".llmpress").exists());
    convert(&out, &request, &Options { force: true, ..options() }).unwrap();
    assert!(files(&out) == expected);
}

#[test]
fn quantising_and_pruning_go_in_any_order() {
    let dir = tempfile::tempdir().unwrap();
    for (number, chain) in
        ["drop:last=2+rtn:w4", "rtn:w4+drop:last=2", "rtn:w4+drop:block=1"].iter().enumerate()
    {
        let out = dir.path().join(number.to_string());
        let calibrated = chain.contains("block");
        let request = short(chain, calibrated);
        let (plan, _) = Plan::forecast(&tinylm(), &request, 4 << 30).unwrap();
        convert(&out, &request, &options()).unwrap();
        let done = Checkpoint::open(&out).unwrap();
        let lossy: Vec<_> = done.units().values().filter(|u| u.encoding().is_lossy()).collect();
        let planned: Vec<_> = plan.units().filter(|u| u.method == Method::Kept).collect();
        assert_eq!(lossy.len(), planned.len(), "{chain}");
        let stored: u64 = lossy.iter().map(|u| u.stored_bytes()).sum();
        assert_eq!(stored, planned.iter().map(|u| u.expected_bytes).sum::<u64>(), "{chain}");
    }
}

#[test]
fn transformations_need_no_text_are_stored_and_come_after_prunings() {
    let dir = tempfile::tempdir().unwrap();
    let (out, pruned) = (dir.path().join("out"), dir.path().join("pruned"));
    convert(&out, &short("rtn:w4,rotate", false), &options()).unwrap();
    let done = Checkpoint::open(&out).unwrap();
    assert_eq!(done.manifest().unwrap().requires, ["transforms"]);
    let sites: Vec<String> = llmpress_formats::Transform::summary(done.transforms());
    assert!(sites.iter().any(|site| site == "rotation of down"), "{sites:?}");
    // Norms are folded into what reads them: they are stored as ones.
    let norm = done.read_tensor("model.layers.0.input_layernorm.weight").unwrap();
    let ones: Vec<u8> = std::iter::repeat_n(half_one(&done), norm.len() / 2).flatten().collect();
    assert!(norm == ones);
    convert(&pruned, &short("drop:block=2+rtn:w4,rotate=r2r4", true), &options()).unwrap();
    assert_eq!(
        Checkpoint::open(&pruned).unwrap().config().unwrap().get("num_hidden_layers"),
        Some(&6.into())
    );
    // Scales stand by layer.
    let late = short("rtn:w4,rotate+drop:block=2", true);
    let error = convert(&dir.path().join("late"), &late, &options()).unwrap_err();
    assert!(error.contains("renumbered"), "{error}");
}

/// One in BF16, as it is stored.
fn half_one(checkpoint: &Checkpoint) -> [u8; 2] {
    let dtype = checkpoint.tensor("model.layers.0.input_layernorm.weight").unwrap().dtype;
    assert_eq!(dtype.name(), "BF16");
    0x3f80u16.to_le_bytes()
}

#[test]
fn coded_codes_take_less_room_and_stand_for_the_same_numbers() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let coded = |chain: &str| {
        let mut request = short(chain, false);
        request.recipe.entropy_code = true;
        request
    };
    convert(&at("planes"), &short("rtn:w4,g128", false), &options()).unwrap();
    convert(&at("coded"), &coded("rtn:w4,g128"), &options()).unwrap();
    let [planes, once] = ["planes", "coded"].map(|name| Checkpoint::open(&at(name)).unwrap());
    let mut sizes = [0, 0];
    for (name, unit) in planes.units().iter().filter(|(_, unit)| unit.encoding().is_lossy()) {
        let other = &once.units()[name];
        assert_eq!(other.encoding(), unit.encoding());
        assert!(
            other.components().contains_key("codes") && !other.components().contains_key("planes"),
            "{name}"
        );
        let rows = 0..unit.parts()[0].shape[0];
        assert!(
            once.packed_rows(name, rows.clone()).unwrap() == planes.packed_rows(name, rows).unwrap(),
            "{name}"
        );
        sizes[0] += unit.stored_bytes();
        sizes[1] += other.stored_bytes();
    }
    assert!(sizes[1] * 100 < sizes[0] * 92, "{sizes:?}");
    for name in planes.tensors().keys() {
        assert!(planes.read_tensor(name).unwrap() == once.read_tensor(name).unwrap(), "{name}");
    }
    assert_eq!(once.manifest().unwrap().recipe["entropy_code"], true);
    // Whatever the threads and the memory.
    let tight = Options { jobs: Some(1), max_memory: Some(96 << 20), ..options() };
    convert(&at("again"), &coded("rtn:w4,g128"), &tight).unwrap();
    assert!(files(&at("again")) == files(&at("coded")));
    // From planes that are there already; and what is coded stays so.
    let from = |source: &str, out: &str, request: &Request| {
        convert_request(&at(source), &at(out), request, 4 << 30, &options(), &Unwatched).unwrap();
        Checkpoint::open(&at(out)).unwrap()
    };
    for (source, request) in
        [("planes", coded("raw")), ("coded", short("raw", false)), ("coded", coded("planes"))]
    {
        let other = from(source, "other", &request);
        for (name, unit) in once.units().iter().filter(|(_, unit)| unit.encoding().is_lossy()) {
            let [a, b] = [unit, &other.units()[name]].map(|unit| unit.components());
            assert!(a.keys().eq(b.keys()) && a.values().map(|c| c.bytes()).eq(b.values().map(|c| c.bytes())));
        }
        assert!(
            once.tensors()
                .keys()
                .all(|name| once.read_tensor(name).unwrap() == other.read_tensor(name).unwrap())
        );
        std::fs::remove_dir_all(at("other")).unwrap();
    }
    restore(&once, &at("back"), 4 << 30, &options(), &Step(None)).unwrap();
    let back = Checkpoint::open(&at("back")).unwrap();
    assert!(
        once.tensors().keys().all(|name| once.read_tensor(name).unwrap() == back.read_tensor(name).unwrap())
    );
}

/// A llama of one BF16 matrix, of which the file has the beginning.
fn one_matrix(dir: &Path, side: u64, start: &[u8]) -> std::io::Result<()> {
    std::fs::create_dir(dir)?;
    let config = format!(r#"{{"model_type": "llama", "hidden_size": {side}}}"#);
    std::fs::write(dir.join("config.json"), config)?;
    let bytes = side * side * 2;
    let name = "model.layers.0.self_attn.q_proj.weight";
    let mut header =
        format!(r#"{{"{name}":{{"dtype":"BF16","shape":[{side},{side}],"data_offsets":[0,{bytes}]}}}}"#);
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    let file = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), start].concat();
    std::fs::write(dir.join("model.safetensors"), &file)?;
    let opened = std::fs::OpenOptions::new().write(true).open(dir.join("model.safetensors"))?;
    opened.set_len((8 + header.len()) as u64 + bytes)
}

#[test]
fn codes_that_a_coder_would_not_shrink_stay_in_planes() {
    // Sixteen values that are equally likely: so are their codes.
    let dir = tempfile::tempdir().unwrap();
    let (source, out) = (dir.path().join("source"), dir.path().join("out"));
    let mut state = 1u64;
    let weights = (0..256 * 256u32).flat_map(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let value = (state >> 40 & 15) as f32;
        ((value.to_bits() >> 16) as u16).to_le_bytes()
    });
    one_matrix(&source, 256, &weights.collect::<Vec<u8>>()).unwrap();
    let mut request = short("rtn:w4", false);
    request.recipe.entropy_code = true;
    convert_request(&source, &out, &request, 4 << 30, &options(), &Unwatched).unwrap();
    let done = Checkpoint::open(&out).unwrap();
    let unit = done.units().values().find(|unit| unit.encoding().is_lossy()).unwrap();
    assert!(unit.components().contains_key("planes") && !unit.components().contains_key("codes"));
}

#[test]
fn coding_without_codes_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let request = toml("to = \"fixed12\"\nentropy_code = true\n");
    let error = convert(&out, &request, &options()).unwrap_err();
    assert!(error.contains("--entropy-code") && error.contains("quantised") && !out.exists(), "{error}");
}

#[test]
fn a_job_that_the_disk_cannot_hold_is_refused_before_any_work() {
    // A file with a hole of nine terabytes.
    let dir = tempfile::tempdir().unwrap();
    let (source, out) = (dir.path().join("source"), dir.path().join("out"));
    if one_matrix(&source, 1 << 21, &[]).is_err() {
        // No file of this size can be here: nothing to be refused.
        return;
    }
    let error =
        convert_request(&source, &out, &short("rtn:w8", false), 1 << 60, &options(), &Unwatched).unwrap_err();
    assert_eq!(error.kind(), "limit");
    // What is staged, and the output beside it.
    assert!(
        error.to_string().contains("about 8796") && error.to_string().contains("free some space"),
        "{error}"
    );
    assert!(!out.exists());
}

#[test]
fn a_forecast_counts_the_text_and_the_block_that_transformations_take() {
    let memory = |chain: &str| {
        let (plan, _) = Plan::forecast(&tinylm(), &short(chain, true), 4 << 30).unwrap();
        let json = serde_json::to_value(&plan).unwrap();
        let number = |key: &str| json["passes"][0][key].as_u64().unwrap();
        (number("memory_bytes"), number("windows"))
    };
    let (plain, turned) = (memory("gptq:w4"), memory("gptq:w4,rotate"));
    // A block of tinylm has 786,432 weights.
    assert_eq!(turned.0 - plain.0, 8 * 786_432);
    assert_eq!(memory("rtn:w4,smooth").1, 4);
}

#[test]
fn a_forecast_counts_the_streams_that_a_stage_holds() {
    let streams = |chain: &str| {
        let mut request = short(chain, true);
        request.calibration.windows = Some(16);
        let (plan, _) = Plan::forecast(&tinylm(), &request, 4 << 30).unwrap();
        serde_json::to_value(&plan).unwrap()["passes"][0]["stream_bytes"].as_u64().unwrap()
    };
    // Of 16 x 64 tokens of 256 features: after two blocks and in work.
    let one = 3 * 16 * 64 * 256 * 4;
    assert_eq!(streams("grid:w4"), one);
    assert_eq!(streams("gptq:w4"), one);
    assert_eq!(streams("gptq:w4,learn"), 2 * one);
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let copies = Copies { out: &out, to: &dir.path().join("copies"), made: Mutex::default() };
    let mut request = short("gptq:w4,learn,steps=1", true);
    request.calibration.windows = Some(16);
    convert_request(&tinylm(), &out, &request, 4 << 30, &options(), &copies).unwrap();
    let held = |copy: &PathBuf| -> u64 {
        let files = std::fs::read_dir(copy.join(".llmpress/passes/1")).unwrap().map(|file| file.unwrap());
        let streams = files.filter(|file| file.path().extension().is_some_and(|e| e == "streams"));
        streams.map(|file| file.metadata().unwrap().len()).sum()
    };
    let most = copies.made.into_inner().unwrap().iter().map(held).max().unwrap();
    // Both streams of the last block.
    assert!(most >= 2 * one / 3 && most <= 2 * one, "{most} {one}");
}

#[test]
fn assigned_widths_keep_to_their_mean_and_leave_alone_what_rules_name() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let mut request = toml(
        "to = \"raw\"\npasses = [\"grid:w3.25,g128\"]\n\
         [[rule]]\ntensors = '.*layers\\.0\\..*v_proj\\.weight'\nto = \"rtn:w8,symmetric\"\n",
    );
    request.calibration = short("grid:w3", true).calibration;
    let (plan, _) = Plan::forecast(&tinylm(), &request, 4 << 30).unwrap();
    convert(&out, &request, &options()).unwrap();
    let done = Checkpoint::open(&out).unwrap();
    let (mut bytes, mut weights, mut widths) = (0, 0, std::collections::BTreeSet::new());
    for (name, unit) in done.units() {
        let Encoding::Abq(abq) = unit.encoding() else { continue };
        if name == "model.layers.0.self_attn.v_proj.weight" {
            assert_eq!(abq.widths(), "w8");
            continue;
        }
        assert_eq!(abq.group_size, Some(128));
        widths.insert(abq.bits);
        bytes += unit.stored_bytes();
        weights += unit.parts()[0].shape.iter().product::<u64>();
    }
    let mean = bytes as f64 * 8.0 / weights as f64;
    assert!(mean <= 3.25 && mean > 3.2 && widths.len() > 1, "{mean} {widths:?}");
    let planned: u64 = plan.units().filter(|u| u.method == Method::Kept).map(|u| u.expected_bytes).sum();
    let stored: u64 =
        done.units().values().filter(|u| u.encoding().is_lossy()).map(|u| u.stored_bytes()).sum();
    assert!(stored <= planned && stored * 100 > planned * 98, "{stored} {planned}");
    // Too few bits for any width, and no text to go by.
    let little = short("grid:w1.5,g128", true);
    let error = convert(&dir.path().join("little"), &little, &options()).unwrap_err();
    assert!(error.contains("take 2.25") && error.contains("at least"), "{error}");
    let error = convert(&dir.path().join("blind"), &short("grid:w3.25", false), &options()).unwrap_err();
    assert!(error.contains("mean of bits") && error.contains("--calib"), "{error}");
}
