//! The pass over whole models: every family, resumed, on any number of threads, and what it refuses.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use llmpress_calibrate::{Calibration, Cut, Extent, Room, Streams};
use llmpress_formats::{Checkpoint, Error, QuantizeSite, Removal, Result, Transform};
use llmpress_model::{Model, Panels, Skips, SubLayer, Tokenizer, Unobserved};
use llmpress_sparsify::{
    Finished, FinishedBlock, Job, Lesson, Permuted, Residuals, Rule, Sink, Sparse, Sparsifier, State,
    permutations, run, wanda,
};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn golden(family: &str) -> PathBuf {
    root().join("model/tests/golden").join(family)
}

fn tinylm() -> PathBuf {
    root().join("examples/tinylm")
}

fn open(dir: &Path) -> Model {
    Model::open(Arc::new(Checkpoint::open(dir).unwrap())).unwrap()
}

fn calibration(model: &Model, windows: usize, length: usize) -> Calibration {
    let vocab = model.vocab_size() as u32;
    let ids: Vec<u32> = (0..(windows * length) as u32).map(|i| (i * i * 7 + i * 3) % vocab).collect();
    Calibration::new(&ids, Cut { windows, length, seed: None }, None).unwrap()
}

fn hows(model: &Model, how: &str) -> BTreeMap<String, Sparsifier> {
    let how = how.parse().unwrap();
    let layers = 0..model.config().layers.len();
    layers.flat_map(|l| model.inputs_of(l)).flat_map(|input| input.tensors).map(|t| (t, how)).collect()
}

fn in_memory() -> Room {
    Room { memory: u64::MAX, file: PathBuf::from("never written") }
}

/// Keeps what is finished, and the streams after each block; fails after block `end`.
#[derive(Default)]
struct Kept {
    finished: Vec<Finished>,
    lessons: Vec<Lesson>,
    dense: Vec<String>,
    saved: Vec<Option<Vec<u8>>>,
    end: Option<usize>,
    steps: u64,
    total: (u64, u64),
}

impl Sink for Kept {
    fn start(&mut self, _weights: u64, work: u64, finished: u64) {
        self.total = (work, finished);
    }

    fn step(&mut self, work: u64) {
        self.steps += work;
    }

    fn learned(&mut self, lesson: &Lesson) {
        self.lessons.push(lesson.clone());
    }

    fn block(
        &mut self,
        block: usize,
        finished: FinishedBlock,
        residuals: Option<&mut Residuals>,
    ) -> Result<()> {
        self.finished.extend(finished.tensors);
        self.dense.extend(finished.dense.into_iter().map(|dense| format!("{}: {}", dense.tensor, dense.why)));
        let save = |residuals: &mut Residuals| {
            let mut bytes = Vec::new();
            residuals.save(&mut bytes, Path::new("saved")).map(|()| bytes)
        };
        self.saved.push(residuals.map(save).transpose()?);
        match self.end {
            Some(end) if end == block => Err(Error::Invalid("killed".to_owned())),
            _ => Ok(()),
        }
    }
}

fn sparse(model: &mut Model, hows: &BTreeMap<String, Sparsifier>, calibration: Option<&Calibration>) -> Kept {
    let room = in_memory();
    let job = Job { hows, calibration, room: &room, hessians: 1 << 16 };
    let mut kept = Kept::default();
    run(model, job, State::default(), &mut kept).unwrap();
    kept
}

/// All that is stored.
fn units(finished: &[Finished]) -> Vec<(&str, &Sparse, Option<&Vec<f32>>)> {
    finished.iter().map(|done| (done.tensor.as_str(), &done.sparse, done.sums.as_ref())).collect()
}

fn hidden(model: &Model) -> Panels {
    let ids: Vec<u32> = (0..20).collect();
    model.hidden(&ids, &mut model.cache(20), &Skips::new(), &mut Unobserved).unwrap()
}

fn relative(a: &Panels, b: &Panels) -> f64 {
    let squares = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>();
    let difference = squares(&mut a.data().iter().zip(b.data()).map(|(a, b)| f64::from(a - b)));
    (difference / squares(&mut b.data().iter().map(|b| f64::from(*b)))).sqrt()
}

#[test]
fn families_with_parts_of_their_own_become_two_in_four_or_are_refused_by_name() {
    // Whether by weights alone, by a text; and whether what is left is reconstructed.
    for (family, [alone, by_text, reconstructed]) in [
        ("smollm3", [true, true, true]),
        ("granite", [true, true, true]),
        ("olmo2", [true, true, true]),
        ("olmo3", [true, true, true]),
        ("gemma2", [true, true, true]),
        ("cohere2", [true, false, false]),
        ("glm4", [true, true, true]),
        ("starcoder2", [true, true, false]),
        ("gpt2", [false, false, false]),
        ("gpt_oss", [true, true, false]),
        ("deepseek_v3", [true, true, false]),
        ("qwen3_next", [true, true, false]),
        ("qwen3_5", [true, true, false]),
        ("llama4", [true, true, false]),
    ] {
        let mut model = open(&golden(family));
        let calibration = calibration(&model, 16, 20);
        let before = hidden(&model);
        let room = in_memory();
        for (how, works) in [("magnitude", alone), ("sparsegpt,reconstruct,steps=2", by_text)] {
            let hows = hows(&model, how);
            let text = (how != "magnitude").then_some(&calibration);
            let job = Job { hows: &hows, calibration: text, room: &room, hessians: 1 << 16 };
            let mut kept = Kept::default();
            let result = run(&mut model, job, State::default(), &mut kept);
            let name = model.config().blueprint.name;
            if let Err(error) = result {
                assert!(!works && matches!(error, Error::Unsupported { .. }), "{family} {how}: {error}");
                assert!(error.to_string().contains(&format!("{name} models")), "{family}: {error}");
                continue;
            }
            assert!(works && kept.finished.len() == hows.len(), "{family} {how}");
            assert!(hidden(&model) == before, "{family}: the model is as it was");
            if text.is_some() {
                assert_eq!(!kept.lessons.is_empty(), reconstructed, "{family}");
                let why = |done: &Finished| done.report.unlearned.clone().unwrap_or_default();
                let told = |done: &Finished| {
                    why(done).contains(&format!("{name} models"))
                        || done.tensor.contains("expert") && why(done).contains("experts see other tokens")
                };
                assert!(
                    reconstructed || kept.finished.iter().all(told),
                    "{family}: {:?}",
                    why(&kept.finished[0])
                );
            }
        }
    }
}

/// Nobody watches.
struct Unwatched;

impl Permuted for Unwatched {}

#[test]
fn channels_of_models_with_parts_of_their_own_keep_their_order_and_say_so_by_name() {
    for family in ["gpt_oss", "deepseek_v3", "qwen3_next", "qwen3_5", "llama4"] {
        let model = open(&golden(family));
        let hows = hows(&model, "magnitude,permute");
        let error = permutations(&model, &hows, None, &mut Unwatched).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{family}: {error}");
        assert!(error.to_string().contains(model.config().blueprint.name), "{family}: {error}");
    }
}

#[test]
fn every_family_becomes_two_in_four_and_computes_something_near() {
    for family in
        ["llama", "llama_bias", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3", "mixtral", "qwen3_moe"]
    {
        let mut model = open(&golden(family));
        let calibration = calibration(&model, 20, 20);
        let before = hidden(&model);
        for how in ["magnitude", "wanda", "sparsegpt", "sparsegpt,slorb", "wanda,reconstruct,steps=3,slorb"] {
            let hows = hows(&model, how);
            let kept = sparse(&mut model, &hows, Some(&calibration));
            assert!(hidden(&model) == before, "{family}: the model is as it was");
            let names: BTreeMap<&str, &Finished> =
                kept.finished.iter().map(|done| (done.tensor.as_str(), done)).collect();
            assert!(names.keys().copied().eq(hows.keys().map(String::as_str)), "{family} {how}");
            assert_eq!(kept.steps, kept.total.0, "{family} {how}: all progress is told");
            for done in &kept.finished {
                let report = &done.report;
                assert!(done.sparse.masks().iter().all(|mask| mask.count_ones() == 2));
                assert!(
                    report.relative_error < 0.6 && report.relative_error > 0.0,
                    "{family} {how}: {report:?}"
                );
                let lowered = report.rule != how.parse::<Sparsifier>().unwrap().rule;
                assert_eq!(lowered, report.instead.is_some());
                assert!(!lowered || done.tensor.contains("expert"), "{report:?}");
                assert_eq!(done.sums.is_some(), how.contains("slorb"));
            }
            kept.finished.iter().for_each(|done| model.replace(&done.tensor, done.product()).unwrap());
            let far = relative(&hidden(&model), &before);
            // Of weights by chance half the outputs go with half the weights.
            assert!(far > 0.0 && far < 2.0, "{family} {how}: {far}");
            hows.keys().for_each(|tensor| model.restore(tensor).unwrap());
        }
    }
}

#[test]
fn stored_values_are_of_the_tensors_dtype_and_dropped_ones_plus_zero() {
    let mut model = open(&tinylm());
    let calibration = calibration(&model, 16, 32);
    for how in ["magnitude", "sparsegpt,slorb", "sparsegpt,reconstruct,steps=2,slorb"] {
        let mut hows = hows(&model, how);
        hows.retain(|name, _| name.contains("layers.0."));
        let kept = sparse(&mut model, &hows, Some(&calibration));
        for done in &kept.finished {
            let bf16 = |w: &f32| w.to_bits() & 0xffff == 0;
            assert_eq!(done.dtype.name(), "BF16");
            assert!(done.sparse.values().iter().all(bf16), "{how}");
            assert!(done.sums.iter().flatten().all(bf16), "{how}");
            let dense = done.sparse.dense();
            let dropped = dense.iter().filter(|w| w.to_bits() == 0).count();
            assert!(dropped >= dense.len() / 2);
        }
    }
}

#[test]
fn experts_that_saw_too_few_tokens_go_by_what_there_is_and_it_is_said() {
    for family in ["mixtral", "qwen3_moe"] {
        let mut model = open(&golden(family));
        let calibration = calibration(&model, 1, 9);
        let hows = hows(&model, "sparsegpt");
        let kept = sparse(&mut model, &hows, Some(&calibration));
        let lowered: Vec<_> = kept.finished.iter().filter(|done| done.report.instead.is_some()).collect();
        assert!(!lowered.is_empty() && lowered.len() < kept.finished.len(), "{family}");
        for done in lowered {
            let rule = if done.report.tokens == 0 { Rule::Magnitude } else { Rule::Wanda };
            assert!(done.tensor.contains("experts") && done.report.rule == rule, "{:?}", done.report);
            assert!(done.report.instead.as_deref().unwrap().contains("tokens"), "{:?}", done.report);
        }
    }
}

#[test]
fn experts_are_not_reconstructed_and_it_is_said_while_their_attention_is() {
    for family in ["mixtral", "qwen3_moe"] {
        let mut model = open(&golden(family));
        let calibration = calibration(&model, 20, 16);
        let hows = hows(&model, "wanda,reconstruct,steps=4");
        let kept = sparse(&mut model, &hows, Some(&calibration));
        assert_eq!(kept.steps, kept.total.0, "{family}: all progress is told");
        for done in &kept.finished {
            let of_expert = done.tensor.contains("experts");
            assert_eq!(done.report.reconstructed.is_none(), of_expert, "{:?}", done.report);
            assert_eq!(done.report.unlearned.is_some(), of_expert, "{:?}", done.report);
        }
    }
}

#[test]
fn a_killed_job_goes_on_after_the_last_finished_block_to_the_same_bytes() {
    for (family, how) in [
        ("llama", "sparsegpt"),
        ("llama", "sparsegpt,reconstruct,steps=6,seed=3,slorb"),
        ("mixtral", "sparsegpt"),
        ("mixtral", "wanda,reconstruct,steps=3"),
        ("qwen3", "wanda"),
    ] {
        let mut model = open(&golden(family));
        // Enough tokens that drift is made up for.
        let calibration = calibration(&model, 60, 20);
        let hows = hows(&model, how);
        let dir = tempfile::tempdir().unwrap();
        let rooms = [in_memory(), Room { memory: 0, file: dir.path().join("streams") }];
        let job = |room| Job { hows: &hows, calibration: Some(&calibration), room, hessians: 1 << 20 };
        let mut whole = Kept::default();
        run(&mut model, job(&rooms[0]), State::default(), &mut whole).unwrap();
        for room in &rooms {
            let mut first = Kept { end: Some(0), ..Kept::default() };
            let error = run(&mut model, job(room), State::default(), &mut first).unwrap_err();
            assert!(error.to_string().contains("killed"));
            let saved = first.saved[0].clone().expect("streams go on after the first block");
            let mut bytes = &saved[..];
            let residuals = job(room).residuals(&model, &mut bytes, Path::new("saved")).unwrap();
            assert!(bytes.is_empty());
            let mut rest = Kept::default();
            run(&mut model, job(room), State { blocks: 1, residuals }, &mut rest).unwrap();
            assert_eq!(rest.total.1 + rest.steps, rest.total.0);
            let both: Vec<_> = units(&first.finished).into_iter().chain(units(&rest.finished)).collect();
            assert!(both == units(&whole.finished), "{family} {how}");
            let lessons: Vec<Lesson> = first.lessons.into_iter().chain(rest.lessons).collect();
            assert!(lessons == whole.lessons, "{family} {how}");
        }
        let nothing =
            run(&mut model, job(&rooms[0]), State { blocks: 1, residuals: None }, &mut Kept::default());
        assert!(nothing.unwrap_err().to_string().contains("no streams"));
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bytes() {
    for how in ["sparsegpt,slorb", "sparsegpt,reconstruct,steps=5,slorb"] {
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let mut model = open(&golden("llama"));
                let (calibration, hows) = (calibration(&model, 60, 20), hows(&model, how));
                sparse(&mut model, &hows, Some(&calibration)).finished
            })
        };
        let one = on(1);
        for threads in [2, 5] {
            assert!(units(&one) == units(&on(threads)), "{how}");
        }
    }
}

#[test]
fn another_seed_learns_another_way() {
    let mut model = open(&golden("llama"));
    let calibration = calibration(&model, 20, 16);
    let mut of = |how| {
        let hows = hows(&model, how);
        sparse(&mut model, &hows, Some(&calibration))
    };
    let [one, two] = ["wanda,reconstruct,steps=9", "wanda,reconstruct,steps=9,seed=1"].map(&mut of);
    assert!(units(&one.finished) != units(&two.finished));
    assert!(of("wanda").lessons.is_empty());
}

#[test]
fn reconstruction_is_never_worse_and_on_a_real_model_better_on_text_it_has_not_seen() {
    let dir = tinylm();
    let tokenizer = Tokenizer::open(&dir).unwrap();
    let ids = |file: &str| tokenizer.encode(&std::fs::read_to_string(dir.join(file)).unwrap()).unwrap();
    let cut = Cut { windows: 32, length: 128, seed: None };
    let calibration = Calibration::new(&ids("calib.txt"), cut, None).unwrap();
    let mut model = open(&dir);
    let text = &ids("eval.txt")[..256];
    let hidden = |model: &Model| {
        model.hidden(text, &mut model.cache(text.len()), &Skips::new(), &mut Unobserved).unwrap()
    };
    let base = hidden(&model);
    let mut far = |how: &str| -> f64 {
        let mut hows = hows(&model, how);
        // Two layers are enough to see it.
        hows.retain(|name, _| name.contains(".layers.0.") || name.contains(".layers.1."));
        let kept = sparse(&mut model, &hows, Some(&calibration));
        for lesson in &kept.lessons {
            let (before, after) = (lesson.reconstructed.before.unwrap(), lesson.reconstructed.after.unwrap());
            assert_eq!(lesson.reconstructed.taken, after < before, "{lesson:?}");
        }
        kept.finished.iter().for_each(|done| model.replace(&done.tensor, done.product()).unwrap());
        let found = relative(&hidden(&model), &base);
        hows.keys().for_each(|tensor| model.restore(tensor).unwrap());
        found
    };
    let [magnitude, wanda, sparsegpt] = ["magnitude", "wanda", "sparsegpt"].map(&mut far);
    assert!(sparsegpt < wanda && sparsegpt < magnitude, "{magnitude} {wanda} {sparsegpt}");
    let [learned, with_sums] =
        ["sparsegpt,reconstruct,steps=100", "sparsegpt,reconstruct,steps=100,slorb"].map(&mut far);
    assert!(learned < sparsegpt && with_sums < learned, "{sparsegpt} {learned} {with_sums}");
}

#[test]
fn blocks_whose_sub_layers_were_pruned_become_sparse_as_they_are() {
    let checkpoint = Checkpoint::open(&tinylm()).unwrap();
    let removal = Removal { attention: [1, 3].into(), mlp: [0, 3].into(), ..Removal::default() };
    let edit = removal.edit(&checkpoint).unwrap();
    let mut model = Model::open(Arc::new(checkpoint.edited(&edit).unwrap())).unwrap();
    let calibration = calibration(&model, 16, 32);
    let hows = hows(&model, "sparsegpt,reconstruct,steps=2");
    let kept = sparse(&mut model, &hows, Some(&calibration));
    assert_eq!(kept.finished.len(), hows.len());
}

#[test]
fn what_cannot_be_is_refused_by_name_and_what_needs_no_text_runs_without() {
    let mut model = open(&tinylm());
    let room = in_memory();
    let long = calibration(&model, 2, 64);
    let mut say = |hows: &BTreeMap<String, Sparsifier>, calibration: Option<&Calibration>| {
        let job = Job { hows, calibration, room: &room, hessians: 1 << 20 };
        let mut kept = Kept::default();
        run(&mut model, job, State::default(), &mut kept).map(|()| kept.finished)
    };
    let one = |tensor: &str, how: &str| BTreeMap::from([(tensor.to_owned(), how.parse().unwrap())]);
    let linear = "model.layers.1.mlp.down_proj.weight";
    for (hows, calibration, what) in [
        (one("model.embed_tokens.weight", "magnitude"), None, "stays dense"),
        (one("model.norm.weight", "magnitude"), None, "is no matrix"),
        (one("model.layers.99.mlp.down_proj.weight", "magnitude"), None, "model.layers.99"),
        (one(linear, "wanda"), None, "goes by a text"),
        (one(linear, "magnitude,reconstruct"), None, "goes by a text"),
        (one(linear, "wanda,reconstruct"), Some(&long), "windows at least"),
    ] {
        let error = say(&hows, calibration).unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    }
    let short = Calibration::new(&[1, 2, 3, 4], Cut { windows: 1, length: 4, seed: None }, None).unwrap();
    let error = say(&one(linear, "sparsegpt"), Some(&short)).unwrap_err().to_string();
    assert!(error.contains(linear) && error.contains("say too little"), "{error}");
    let done = say(&one(linear, "magnitude,slorb"), None).unwrap();
    assert!(done.len() == 1 && done[0].report.tokens == 0 && done[0].sums.is_some());
}

#[test]
fn a_model_with_transformations_of_its_own_is_refused_and_stays_as_it_was() {
    let mut model = open(&golden("llama"));
    let hows = hows(&model, "magnitude");
    model.transform(vec![Transform::Quantize { site: QuantizeSite::Cache, bits: 8 }]).unwrap();
    let room = in_memory();
    let job = Job { hows: &hows, calibration: None, room: &room, hessians: 1 << 20 };
    let error = run(&mut model, job, State::default(), &mut Kept::default()).unwrap_err().to_string();
    assert!(error.contains("transformations"), "{error}");
    assert_eq!(model.transforms().len(), 1);
    model.transform(Vec::new()).unwrap();
    run(&mut model, job, State::default(), &mut Kept::default()).unwrap();
}

#[test]
fn wanda_goes_by_what_each_block_reads_before_any_of_it_is_sparse() {
    for how in ["wanda", "wanda,slorb"] {
        let mut model = open(&golden("mixtral"));
        let (calibration, hows) = (calibration(&model, 8, 40), hows(&model, how));
        let made = sparse(&mut model, &hows, Some(&calibration));
        let mut streams = Streams::embed(&model, &calibration, &in_memory()).unwrap();
        for layer in 0..model.config().layers.len() {
            let inputs = model.inputs_of(layer);
            let taps: Vec<_> = inputs.iter().map(|input| (input.into(), Extent::Diagonal)).collect();
            let moments = streams.moments(&model, &taps, &mut || ()).unwrap();
            let mut done = Vec::new();
            for (input, moments) in inputs.iter().zip(&moments) {
                for tensor in &input.tensors {
                    let of_tensor = made.finished.iter().find(|done| done.tensor == *tensor).unwrap();
                    let masks = wanda(&model.weights(tensor).unwrap(), moments.diagonal());
                    assert!(of_tensor.sparse.masks() == masks, "{how}: {tensor}");
                    done.push(of_tensor);
                }
            }
            assert!(done.len() > 10 && moments.iter().all(|moments| moments.tokens() > 0));
            for done in done {
                model.replace(&done.tensor, done.product()).unwrap();
            }
            streams.advance(&model, SubLayer::Attention(layer), &mut || ()).unwrap();
            streams.advance(&model, SubLayer::Mlp(layer), &mut || ()).unwrap();
        }
    }
}
