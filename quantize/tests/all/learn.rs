//! Learning over whole models: better than error feedback, resumed, on any number of threads, and where it does nothing.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::io::{Cursor, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use llmpress_calibrate::{Calibration, Cut, Room};
use llmpress_formats::encoding::abq::{Floats, Packed, Zero};
use llmpress_formats::{Checkpoint, Dtype, Error, Result};
use llmpress_learn::{Evaluated, Then, Watch};
use llmpress_model::{Model, Skips, Tokenizer, Unobserved};
use llmpress_quantize::{
    Finished, FinishedBlock, Job, LearnedWhole, Lesson, Quantiser, Record, Residuals, Sink, Spec, State,
    Stepped, Taught, WholeTask, check_whole, learn_whole, run,
};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn open(dir: &Path) -> Model {
    Model::open(Arc::new(Checkpoint::open(dir).unwrap())).unwrap()
}

fn golden(family: &str) -> Model {
    open(&root().join("model/tests/golden").join(family))
}

fn calibration(model: &Model, windows: usize, length: usize) -> Calibration {
    let vocab = model.vocab_size() as u32;
    let ids: Vec<u32> = (0..(windows * length) as u32).map(|i| (i * i * 7 + i * 3) % vocab).collect();
    Calibration::new(&ids, Cut { windows, length, seed: None }, None).unwrap()
}

fn specs(model: &Model, quantiser: &str) -> BTreeMap<String, Spec> {
    let Quantiser { spec, .. } = quantiser.parse().unwrap();
    let layers = 0..model.config().layers.len();
    layers.flat_map(|l| model.inputs_of(l)).flat_map(|input| input.tensors).map(|t| (t, spec)).collect()
}

/// Keeps what is finished, and the streams after each block; fails after block `end`.
#[derive(Default)]
struct Kept {
    finished: Vec<Finished>,
    saved: Vec<Option<Vec<u8>>>,
    end: Option<usize>,
    steps: u64,
    total: (u64, u64),
    lessons: Vec<Lesson>,
}

impl Sink for Kept {
    fn start(&mut self, weights: u64, work: u64, finished: u64) {
        assert!(weights <= work);
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

type Units<'a> = Vec<(&'a str, &'a llmpress_formats::encoding::PackedUnit)>;

fn units(finished: &[Finished]) -> Units<'_> {
    finished.iter().map(|done| (done.tensor.as_str(), &done.unit)).collect()
}

fn quantised(model: &mut Model, specs: &BTreeMap<String, Spec>, calibration: &Calibration) -> Kept {
    let room = Room { memory: u64::MAX, file: PathBuf::from("never written") };
    let job = Job { specs, transforms: &[], calibration: Some(calibration), room: &room, hessians: 1 << 16 };
    let mut kept = Kept::default();
    run(model, job, State::default(), &mut kept).unwrap();
    kept
}

#[test]
fn every_dense_family_is_learned_resumed_and_the_same_on_any_number_of_threads() {
    for family in ["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3"] {
        let mut model = golden(family);
        let calibration = calibration(&model, 20, 16);
        let specs = specs(&model, "gptq:w2a8,g32,learn,steps=12,seed=3");
        let whole = quantised(&mut model, &specs, &calibration);
        assert_eq!(whole.steps, whole.total.0, "{family}: all progress is told");
        assert_eq!(whole.lessons.len(), 2 * model.config().layers.len(), "{family}");
        for Lesson { learned, what, steps, .. } in &whole.lessons {
            assert!(learned.after.is_some_and(|after| after.is_finite()), "{family} {what:?}");
            assert_eq!(learned.taken, learned.after.is_some_and(|after| after < learned.before));
            assert!(*what != Taught::Matrix && *steps == 12);
        }
        assert!(whole.lessons.iter().any(|lesson| lesson.learned.taken), "{family}: {:?}", whole.lessons);
        assert!(whole.finished.iter().all(|done| done.report.learned.is_some()));
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        let others = pool.install(|| quantised(&mut model, &specs, &calibration));
        assert!(units(&others.finished) == units(&whole.finished), "{family}");
        // Killed after the first block, from streams on disk.
        let dir = tempfile::tempdir().unwrap();
        let room = Room { memory: 0, file: dir.path().join("streams") };
        let job = Job {
            specs: &specs,
            transforms: &[],
            calibration: Some(&calibration),
            room: &room,
            hessians: 1 << 16,
        };
        let mut first = Kept { end: Some(0), ..Kept::default() };
        run(&mut model, job, State::default(), &mut first).unwrap_err();
        let saved = first.saved[0].clone().unwrap();
        let residuals = job.residuals(&model, &mut &saved[..], Path::new("saved")).unwrap();
        let mut rest = Kept::default();
        run(&mut model, job, State { blocks: 1, residuals }, &mut rest).unwrap();
        assert_eq!(rest.total.1 + rest.steps, whole.total.0, "{family}: what was done counts");
        let both: Vec<Finished> = first.finished.into_iter().chain(rest.finished).collect();
        assert!(units(&both) == units(&whole.finished), "{family}");
    }
}

#[test]
fn another_seed_learns_another_way_and_no_steps_are_no_learning() {
    let mut model = golden("llama");
    let calibration = calibration(&model, 20, 16);
    let mut of = |quantiser| {
        let specs = specs(&model, quantiser);
        quantised(&mut model, &specs, &calibration)
    };
    let [one, two] = ["gptq:w2,g32,learn,steps=12", "gptq:w2,g32,learn,steps=12,seed=1"].map(&mut of);
    assert!(units(&one.finished) != units(&two.finished));
    let plain = of("gptq:w2,g32");
    assert!(plain.lessons.is_empty() && plain.finished.iter().all(|done| done.report.learned.is_none()));
}

#[test]
fn experts_are_learned_by_matrix_never_worse_and_their_attention_as_a_whole() {
    for family in ["mixtral", "qwen3_moe"] {
        let mut model = golden(family);
        let calibration = calibration(&model, 40, 16);
        let of = |model: &mut Model, quantiser: &str| {
            let specs = specs(model, quantiser);
            quantised(model, &specs, &calibration)
        };
        let kept = of(&mut model, "gptq:w2,g32,learn,steps=40");
        assert_eq!(kept.steps, kept.total.0, "{family}: all progress is told");
        let (mut before, mut after) = (0.0, 0.0);
        for done in &kept.finished {
            let learned = done.report.learned.unwrap();
            if done.tensor.contains("expert") {
                let end = learned.after.unwrap();
                assert!(end < learned.before && learned.taken, "{}: {learned:?}", done.tensor);
                let same = learned.before / done.report.relative_error - 1.0;
                assert!(same.abs() < 1e-3, "{}: {same}", done.tensor);
                (before, after) = (before + learned.before, after + end);
            }
        }
        assert!(after < 0.97 * before, "{family}: {before} {after}");
        let by_itself = |lesson: &&Lesson| lesson.tensors.iter().any(|tensor| tensor.contains("expert"));
        for lesson in kept.lessons.iter().filter(by_itself) {
            assert!(lesson.what == Taught::Matrix && lesson.tensors.len() == 1 && lesson.steps == 40);
        }
        assert!(kept.lessons.iter().any(|lesson| lesson.what == Taught::Attention), "{family}");
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        let others = pool.install(|| of(&mut model, "gptq:w2,g32,learn,steps=40"));
        assert!(units(&others.finished) == units(&kept.finished), "{family}");
        assert!(others.lessons == kept.lessons, "{family}");
    }
}

#[test]
fn matrices_that_quantise_what_they_share_to_other_bits_are_learned_by_themselves() {
    let mut model = golden("llama");
    let calibration = calibration(&model, 20, 16);
    let mut specs = specs(&model, "gptq:w2a8,g32,learn,steps=20");
    for (name, spec) in &mut specs {
        if name.contains("q_proj") {
            spec.abq.activation_bits = None;
        }
    }
    let kept = quantised(&mut model, &specs, &calibration);
    assert_eq!(kept.steps, kept.total.0);
    for lesson in &kept.lessons {
        let of_attention = lesson.tensors[0].contains("self_attn");
        assert_eq!(lesson.what, if of_attention { Taught::Matrix } else { Taught::Mlp });
        assert!(lesson.learned.after.unwrap() <= lesson.learned.before);
    }
    assert_eq!(kept.lessons.iter().filter(|lesson| lesson.what == Taught::Matrix).count(), 8);
    assert!(kept.finished.iter().all(|done| done.report.learned.is_some()));
}

#[test]
fn on_a_real_model_learning_beats_error_feedback_on_text_it_has_not_seen() {
    let dir = root().join("examples/tinylm");
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
    let mut far = |quantiser: &str| -> f64 {
        let mut specs = specs(&model, quantiser);
        // Two layers are enough to see it.
        specs.retain(|name, _| name.contains(".layers.0.") || name.contains(".layers.1."));
        let kept = quantised(&mut model, &specs, &calibration);
        for done in &kept.finished {
            let mut values = vec![0.0; done.unit.rows() * done.unit.cols()];
            for (row, values) in values.chunks_exact_mut(done.unit.cols()).enumerate() {
                done.unit.decode_row(row, values).unwrap();
            }
            model.replace(&done.tensor, values).unwrap();
        }
        let found = hidden(&model);
        specs.keys().for_each(|tensor| model.restore(tensor).unwrap());
        found.data().iter().zip(base.data()).map(|(a, b)| f64::from(a - b).powi(2)).sum()
    };
    let (fed, learned) = (far("gptq:w2"), far("gptq:w2,learn,steps=100"));
    assert!(learned < fed, "{learned} {fed}");
}

/// Follows learning a whole model; keeps the state of some step, and may stop there.
#[derive(Default)]
struct Log {
    steps: Vec<Stepped>,
    found: Vec<Evaluated>,
    keep_at: u32,
    stop: bool,
    state: Vec<u8>,
}

impl Watch<Record> for Log {
    fn tell(&mut self, record: Record) -> Result<()> {
        match record {
            Record::Stepped(step) => self.steps.push(step),
            Record::Evaluated(found) => self.found.push(found),
        }
        Ok(())
    }

    fn then(&mut self, step: u32) -> Then {
        match step == self.keep_at {
            true if self.stop => Then::Stop,
            true => Then::Keep,
            false => Then::Go,
        }
    }

    fn keep(&mut self, _: u32, write: &mut dyn FnMut(&mut dyn Write, &Path) -> Result<()>) -> Result<()> {
        self.state.clear();
        write(&mut self.state, Path::new("state"))
    }
}

/// A model as the rungs below left it, with what it was made from.
struct Begun {
    dense: Model,
    start: Model,
    specs: BTreeMap<String, Spec>,
    units: BTreeMap<String, Packed<'static>>,
}

impl Begun {
    fn new(dense: Model, quantiser: &str, calibration: &Calibration) -> Self {
        let mut start = dense.twin().unwrap();
        let Quantiser { with, .. } = quantiser.parse().unwrap();
        let transforms = with.of(&start, Some(calibration)).unwrap();
        let specs = specs(&start, quantiser);
        let room = Room { memory: u64::MAX, file: PathBuf::from("never written") };
        let calibration = Some(calibration);
        let job = Job { specs: &specs, transforms: &transforms, calibration, room: &room, hessians: 1 << 24 };
        let mut kept = Kept::default();
        run(&mut start, job, State::default(), &mut kept).unwrap();
        assert!(kept.lessons.is_empty() && kept.steps == kept.total.0, "it is learned afterwards");
        start.transform(transforms).unwrap();
        (0..start.config().layers.len()).for_each(|layer| start.fold_layer(layer).unwrap());
        let units = kept.finished.iter().map(|done| (done.tensor.clone(), done.unit.abq().unwrap().clone()));
        let mut begun = Self { dense, start, specs, units: BTreeMap::new() };
        begun.take(units.collect());
        begun
    }

    /// Puts units in the place of those that are there.
    fn take(&mut self, units: Vec<(String, Packed<'static>)>) {
        for (tensor, unit) in units {
            let mut values = vec![0.0; unit.rows() * unit.cols()];
            for (row, values) in values.chunks_exact_mut(unit.cols()).enumerate() {
                unit.decode_row(row, values).unwrap();
            }
            let bits = self.specs[&tensor].abq.activation_bits;
            self.start.replace_quantised(&tensor, values, bits).unwrap();
            self.units.insert(tensor, unit);
        }
    }

    fn learn(
        &self,
        calibration: &Calibration,
        from: Option<&[u8]>,
        log: &mut Log,
    ) -> Result<Option<LearnedWhole>> {
        let unit = |tensor: &str| Ok(self.units[tensor].clone());
        let task = WholeTask {
            dense: &self.dense,
            start: &self.start,
            specs: &self.specs,
            unit: &unit,
            calibration,
        };
        let mut from = from.map(Cursor::new);
        learn_whole(task, from.as_mut().map(|from| (from as &mut dyn Read, Path::new("state"))), log)
    }
}

/// Windows that come again, so that what is held back was seen.
fn again(model: &Model) -> Calibration {
    let vocab = model.vocab_size() as u32;
    let ids: Vec<u32> = (0..20 * 16u32).map(|i| i % (5 * 16)).map(|i| (i * i * 7 + i * 3) % vocab).collect();
    Calibration::new(&ids, Cut { windows: 20, length: 16, seed: None }, None).unwrap()
}

#[test]
fn whole_models_are_learned_resumed_and_the_same_on_any_number_of_threads() {
    let mut taken = 0;
    for (family, quantiser) in [
        ("llama", "gptq:w2a8,rotate,learn=model,steps=24"),
        ("llama", "gptq:w3a8,g32,int,learn=model,clip,steps=24"),
        ("qwen2", "gptq:w2*,smooth,learn=model,steps=24"),
        ("gemma3_text", "gptq:w2a8,g32,qkv8,learn=model,steps=24"),
        ("phi3", "gptq:w2,learn=model,round,steps=24"),
        ("mistral", "gptq:w3,symmetric,learn=model,steps=24,seed=4"),
    ] {
        let name = format!("{family} {quantiser}");
        let dense = golden(family);
        let calibration = again(&dense);
        let mut begun = Begun::new(dense, quantiser, &calibration);
        let mut log = Log { keep_at: 10, ..Log::default() };
        let whole = begun.learn(&calibration, None, &mut log).unwrap().unwrap();
        assert!(log.steps.len() == 24 && log.found.len() == 9 && whole.unlearned.is_none(), "{name}");
        let (before, after) = (whole.learned.before, whole.learned.after.unwrap());
        assert!(before.is_finite() && after <= before, "{name}: {before} {after}");
        assert!(whole.learned.taken == (after < before) && whole.learned.taken != whole.units.is_empty());
        taken += usize::from(whole.learned.taken);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        let mut other = Log { keep_at: 10, stop: true, ..Log::default() };
        assert!(pool.install(|| begun.learn(&calibration, None, &mut other)).unwrap().is_none());
        assert!(other.state == log.state && other.steps == log.steps[..10], "{name}");
        let mut rest = Log::default();
        let resumed = begun.learn(&calibration, Some(&other.state), &mut rest).unwrap().unwrap();
        assert!(resumed == whole && rest.steps == log.steps[10..], "{name}");
        assert_eq!(rest.found.last(), log.found.last(), "{name}");
        // What is stored is what was judged.
        begun.take(whole.units);
        let again = begun.learn(&calibration, None, &mut Log::default()).unwrap().unwrap();
        assert_eq!(again.learned.before, after, "{name}");
        // A state of another run is none of this one.
        let mut fresh = Log::default();
        begun.learn(&calibration, Some(&other.state), &mut fresh).unwrap().unwrap();
        assert!(fresh.steps.len() == 24 || !again.learned.taken, "{name}");
    }
    assert!(taken >= 4, "{taken} of 6 are better");
}

#[test]
fn a_state_that_was_cut_off_or_changed_is_refused() {
    let dense = golden("llama");
    let calibration = again(&dense);
    let begun = Begun::new(dense, "gptq:w2,learn=model,steps=6", &calibration);
    let mut log = Log { keep_at: 4, stop: true, ..Log::default() };
    assert!(begun.learn(&calibration, None, &mut log).unwrap().is_none());
    let mut spoilt = log.state.clone();
    *spoilt.get_mut(5000).unwrap() ^= 1;
    for bytes in [&spoilt[..], &log.state[..log.state.len() - 1], &log.state[..30], b"ABQ0....."] {
        let error = begun.learn(&calibration, Some(bytes), &mut Log::default()).unwrap_err().to_string();
        assert!(error.contains("state"), "{error}");
    }
}

#[test]
fn a_loss_that_is_no_number_keeps_the_start_and_names_its_step() {
    let dir = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(root().join("model/tests/golden/llama")).unwrap().map(|f| f.unwrap().path())
    {
        if file.is_file() {
            std::fs::copy(&file, dir.path().join(file.file_name().unwrap())).unwrap();
        }
    }
    // The embedding of the last token is NaN.
    let shard = dir.path().join("model.safetensors");
    let (model, name) = (golden("llama"), "model.embed_tokens.weight");
    let (vocab, row) = (model.vocab_size(), {
        let tensor = model.checkpoint().tensor(name).unwrap();
        tensor.bytes as usize / model.vocab_size()
    });
    let at = {
        let file = llmpress_formats::ShardFile::open(&shard).unwrap();
        file.component(file.header().get(name).unwrap()).file_offset() as usize
    };
    let mut bytes = std::fs::read(&shard).unwrap();
    bytes[at + (vocab - 1) * row..][..row].fill(0xff);
    std::fs::write(&shard, bytes).unwrap();
    let dense = open(dir.path());
    let ids = |spoilt: Option<usize>| -> Calibration {
        let ids: Vec<u32> = (0..20 * 16)
            .map(|i| if spoilt == Some(i) { vocab - 1 } else { (i * i * 7 + i * 3) % (vocab - 1) })
            .map(|id| id as u32)
            .collect();
        Calibration::new(&ids, Cut { windows: 20, length: 16, seed: None }, None).unwrap()
    };
    for quantiser in ["gptq:w2,learn=model,steps=24,seed=7", "gptq:w2a8,learn=model,steps=24,seed=7"] {
        let mut begun = Begun::new(open(dir.path()), quantiser, &ids(None));
        let mut log = Log::default();
        let found = begun.learn(&ids(Some(5 * 16 + 3)), None, &mut log).unwrap().unwrap();
        let (why, step) = (found.unlearned.unwrap(), log.steps.len() + 1);
        assert!(step <= 24 && why.contains(&format!("infinite at step {step} (steps=24, seed=7)")), "{why}");
        assert!(found.units.is_empty() && !found.learned.taken && found.learned.after.is_none());
        assert_eq!(found.tensors.len(), begun.specs.len());
        // And at the start: a matrix of numbers too large.
        let is_query = |(tensor, _): &(&String, &Packed<'static>)| tensor.contains("q_proj");
        let (tensor, unit) =
            begun.units.iter().find(is_query).map(|(tensor, unit)| (tensor.clone(), unit.clone())).unwrap();
        let (rows, cols, groups) = (unit.rows(), unit.cols(), unit.groups());
        let mut codes = vec![0; rows * cols];
        codes.chunks_exact_mut(cols).enumerate().for_each(|(row, codes)| unit.codes(row, codes));
        let floats = |x: f32| Floats::round(Dtype::F32, &vec![x; rows * groups]).unwrap();
        let large = Packed::from_codes(*unit.abq(), cols, &codes, floats(1e37), Zero::Real(floats(1e38)));
        begun.take(vec![(tensor, large.unwrap())]);
        let mut log = Log::default();
        let found = begun.learn(&ids(None), None, &mut log).unwrap().unwrap();
        assert!(found.unlearned.unwrap().contains("at the start") && log.steps.is_empty());
        assert!(found.learned.before.is_nan() && found.units.is_empty());
    }
    drop(dense);
}

#[test]
fn what_cannot_be_learned_as_a_whole_is_refused_by_name_before_any_work() {
    let refused = |family: &str, quantiser: &str, change: &dyn Fn(&mut BTreeMap<String, Spec>)| -> String {
        let mut model = golden(family);
        let mut specs = specs(&model, quantiser);
        change(&mut specs);
        let error = check_whole(&model, &specs).unwrap_err().to_string();
        let calibration = calibration(&model, 40, 16);
        let room = Room { memory: u64::MAX, file: PathBuf::from("never written") };
        let calibration = Some(&calibration);
        let job = Job { specs: &specs, transforms: &[], calibration, room: &room, hessians: 1 << 16 };
        let mut kept = Kept::default();
        let same = run(&mut model, job, State::default(), &mut kept).unwrap_err().to_string();
        assert!(same == error && kept.finished.is_empty(), "{same} {error}");
        error
    };
    let nothing = |_: &mut BTreeMap<String, Spec>| ();
    for family in ["mixtral", "qwen3_moe"] {
        let error = refused(family, "gptq:w3,g32,learn=model", &nothing);
        assert!(error.contains("layer 0 has experts") && error.contains("learn=model"), "{error}");
    }
    let error = refused("starcoder2", "gptq:w3,g32,learn=model", &nothing);
    assert!(error.contains("StarCoder2 model") && error.contains("no derivative"), "{error}");
    let other_bits = |specs: &mut BTreeMap<String, Spec>| {
        let q = specs.iter_mut().find(|(name, _)| name.contains("layers.1.self_attn.q_proj")).unwrap();
        q.1.abq.activation_bits = None;
    };
    let error = refused("llama", "gptq:w3a8,g32,learn=model", &other_bits);
    assert!(error.contains("layer 1") && error.contains("other bits"), "{error}");
    let few = calibration(&golden("llama"), 12, 64);
    let begun =
        Begun::new(golden("llama"), "gptq:w3,learn=model,steps=2", &calibration(&golden("llama"), 20, 16));
    let error = begun.learn(&few, None, &mut Log::default()).unwrap_err().to_string();
    assert!(error.contains("16 calibration windows at least"), "{error}");
}

#[test]
fn learning_a_real_model_as_a_whole_beats_error_feedback_on_text_it_has_not_seen() {
    let dir = root().join("examples/tinylm");
    let tokenizer = Tokenizer::open(&dir).unwrap();
    let ids = |file: &str| tokenizer.encode(&std::fs::read_to_string(dir.join(file)).unwrap()).unwrap();
    let cut = Cut { windows: 48, length: 64, seed: None };
    let calibration = Calibration::new(&ids("calib.txt"), cut, None).unwrap();
    let text = &ids("eval.txt")[..256];
    let logits = |model: &Model| {
        let hidden = model.hidden(text, &mut model.cache(text.len()), &Skips::new(), &mut Unobserved);
        model.logits(&hidden.unwrap()).unwrap()
    };
    let mut begun = Begun::new(open(&dir), "gptq:w2a8,rotate,learn=model,steps=40", &calibration);
    let base = logits(&begun.dense);
    let divergence = |model: &Model| -> f64 {
        let found = logits(model);
        let soft = |panels: &llmpress_model::Panels, token: usize| {
            let e: Vec<f64> = panels.token(token).map(|l| f64::from(l).exp()).collect();
            let sum: f64 = e.iter().sum();
            e.into_iter().map(move |e| e / sum).collect::<Vec<f64>>()
        };
        let of = |token| {
            let (p, q) = (soft(&base, token), soft(&found, token));
            p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum::<f64>()
        };
        (0..text.len()).map(of).sum::<f64>() / text.len() as f64
    };
    let fed = divergence(&begun.start);
    let found = begun.learn(&calibration, None, &mut Log::default()).unwrap().unwrap();
    assert!(found.learned.taken, "{:?}", found.learned);
    begun.take(found.units);
    let learned = divergence(&begun.start);
    assert!(learned < 0.95 * fed, "{learned} {fed}");
}
