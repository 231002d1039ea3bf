//! Learning over whole models: better than error feedback, resumed, on any number of threads, and where it does nothing.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use llmpress_calibrate::{Calibration, Cut, Room};
use llmpress_formats::{Checkpoint, Error, Result};
use llmpress_model::{Model, Skips, Tokenizer, Unobserved};
use llmpress_quantize::{
    Finished, FinishedBlock, Job, Lesson, Quantiser, Residuals, Sink, Spec, State, Taught, run,
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
