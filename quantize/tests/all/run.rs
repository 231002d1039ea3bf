//! The pass over whole models: every family, resumed, on any number of threads, and what it refuses.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use llmpress_calibrate::{Calibration, Cut, Room};
use llmpress_formats::encoding::abq::Abq;
use llmpress_formats::{Checkpoint, Error, Removal, Result, ScaleSite, Transform};
use llmpress_model::{Model, Panels, Skips, Tokenizer, Unobserved};
use llmpress_quantize::{
    Finished, FinishedBlock, Job, Quantiser, Residuals, Rotate, Rung, Sink, Spec, State, Transformations,
    ZeroPoint, run,
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

fn spec(bits: u8, rung: Rung) -> Spec {
    Spec { abq: Abq { group_size: Some(32), ..Abq::new(bits) }, zero: ZeroPoint::Real, rung, learn: None }
}

fn specs(model: &Model, spec: Spec) -> BTreeMap<String, Spec> {
    let layers = 0..model.config().layers.len();
    layers.flat_map(|l| model.inputs_of(l)).flat_map(|input| input.tensors).map(|t| (t, spec)).collect()
}

fn in_memory() -> Room {
    Room { memory: u64::MAX, file: PathBuf::from("never written") }
}

/// Keeps what is finished, and the streams after each block; fails after block `end`.
#[derive(Default)]
struct Kept {
    finished: Vec<Finished>,
    saved: Vec<Option<Vec<u8>>>,
    end: Option<usize>,
    steps: u64,
    total: (u64, u64),
    transforms: Vec<Transform>,
}

impl Sink for Kept {
    fn start(&mut self, _weights: u64, work: u64, finished: u64) {
        self.total = (work, finished);
    }

    fn step(&mut self, weights: u64) {
        self.steps += weights;
    }

    fn block(
        &mut self,
        block: usize,
        finished: FinishedBlock,
        residuals: Option<&mut Residuals>,
    ) -> Result<()> {
        self.finished.extend(finished.tensors);
        self.transforms.extend(finished.transforms);
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

fn units(finished: &[Finished]) -> Vec<(&str, &llmpress_formats::encoding::PackedUnit)> {
    finished.iter().map(|done| (done.tensor.as_str(), &done.unit)).collect()
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

fn put(model: &mut Model, finished: &[Finished]) {
    for done in finished {
        let cols = done.unit.cols();
        let mut values = vec![0.0; done.unit.rows() * cols];
        for (row, values) in values.chunks_exact_mut(cols).enumerate() {
            done.unit.decode_row(row, values).unwrap();
        }
        model.replace(&done.tensor, values).unwrap();
    }
}

/// A job over all linears of a model.
fn quantised(model: &mut Model, spec: Spec, calibration: Option<&Calibration>) -> Result<Kept> {
    let specs = specs(model, spec);
    let room = in_memory();
    let job = Job { specs: &specs, transforms: &[], calibration, room: &room, hessians: 1 << 16 };
    let mut kept = Kept::default();
    run(model, job, State::default(), &mut kept).map(|()| kept)
}

#[test]
fn families_with_parts_of_their_own_are_quantised_or_refused_by_name() {
    // Whether by weights alone, by error feedback.
    for (family, expected) in [
        ("smollm3", [true, true]),
        ("granite", [true, true]),
        ("olmo2", [true, true]),
        ("olmo3", [true, true]),
        ("gemma2", [true, true]),
        ("cohere2", [true, false]),
        ("glm4", [true, true]),
        ("starcoder2", [true, true]),
        ("gpt2", [false, false]),
        ("gpt_oss", [true, true]),
        ("deepseek_v3", [true, true]),
        ("qwen3_next", [true, true]),
        ("qwen3_5", [true, true]),
        ("llama4", [true, true]),
    ] {
        let mut model = open(&golden(family));
        let calibration = calibration(&model, 16, 20);
        let before = hidden(&model);
        let learned = Some("gptq:w4,g32,learn,steps=2".parse::<Quantiser>().unwrap().spec);
        let asked = [
            (Rung::Rtn, None, expected[0]),
            (Rung::Gptq, None, expected[1]),
            (Rung::Gptq, learned, expected[1]),
        ];
        for (rung, learned, works) in asked {
            let text = (rung == Rung::Gptq).then_some(&calibration);
            let spec = learned.unwrap_or(spec(8, rung));
            match quantised(&mut model, spec, text) {
                Ok(kept) => {
                    assert!(works, "{family} {rung}");
                    assert!(hidden(&model) == before, "{family}: the model is as it was");
                    assert_eq!(kept.finished.len(), specs(&model, spec).len(), "{family}");
                    put(&mut model, &kept.finished);
                    let far = relative(&hidden(&model), &before);
                    assert!(
                        far > 0.0 && far < if learned.is_some() { 0.7 } else { 0.2 },
                        "{family} {rung}: {far}"
                    );
                    kept.finished.iter().for_each(|done| model.restore(&done.tensor).unwrap());
                }
                Err(error) => {
                    assert!(!works && matches!(error, Error::Unsupported { .. }), "{family} {rung}: {error}");
                    let name = model.config().blueprint.name;
                    assert!(error.to_string().contains(&format!("{name} models")), "{family}: {error}");
                }
            }
        }
    }
}

#[test]
fn blocks_are_learned_with_the_scales_that_a_family_can_have() {
    use ScaleSite::{AttentionNorm, MlpNorm, Up, Value};
    let mut taken = 0;
    let spec = "gptq:w2,g32,learn=block,scale,steps=60".parse::<Quantiser>().unwrap().spec;
    for (family, expected) in [
        ("granite", &[AttentionNorm, Value, MlpNorm, Up][..]),
        ("glm4", &[AttentionNorm, Value, MlpNorm, Up]),
        ("gemma2", &[AttentionNorm, Value, MlpNorm, Up]),
        ("olmo2", &[Value, Up]),
        ("starcoder2", &[]),
    ] {
        let mut model = open(&golden(family));
        let calibration = calibration(&model, 16, 20);
        let kept = quantised(&mut model, spec, Some(&calibration)).unwrap();
        let sites: Vec<ScaleSite> = kept
            .transforms
            .iter()
            .map(|t| match t {
                Transform::Scale { site, .. } => *site,
                other => panic!("{family}: {other:?}"),
            })
            .collect();
        assert!(sites.iter().all(|site| expected.contains(site)), "{family}: {sites:?}");
        model.folds(&kept.transforms).unwrap();
        println!("{family}: {sites:?}");
        taken += sites.len();
    }
    // Where a block is better with them.
    assert!(taken > 0);
}

#[test]
fn models_with_parts_of_their_own_are_not_smoothed_and_say_so_by_name() {
    for family in ["gpt_oss", "deepseek_v3", "qwen3_next", "qwen3_5", "llama4"] {
        let model = open(&golden(family));
        let smooth = Transformations { smooth: true, ..Transformations::default() };
        let error = smooth.of(&model, Some(&calibration(&model, 2, 20))).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{family}: {error}");
        assert!(error.to_string().contains(model.config().blueprint.name), "{family}: {error}");
    }
}

#[test]
fn every_family_is_quantised_and_computes_nearly_the_same() {
    for family in
        ["llama", "llama_bias", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3", "mixtral", "qwen3_moe"]
    {
        let mut model = open(&golden(family));
        let calibration = calibration(&model, 12, 20);
        let before = hidden(&model);
        for rung in [Rung::Rtn, Rung::Grid, Rung::Gptq] {
            let specs = specs(&model, spec(8, rung));
            let room = in_memory();
            let job = Job {
                specs: &specs,
                transforms: &[],
                calibration: Some(&calibration),
                room: &room,
                hessians: 1 << 16,
            };
            let mut kept = Kept::default();
            run(&mut model, job, State::default(), &mut kept).unwrap();
            assert!(hidden(&model) == before, "{family}: the model is as it was");
            let names: BTreeMap<&str, _> = units(&kept.finished).into_iter().collect();
            assert!(names.keys().copied().eq(specs.keys().map(String::as_str)), "{family} {rung}");
            assert_eq!(kept.steps, kept.total.0, "{family}: all progress is told");
            for done in &kept.finished {
                assert!(done.report.relative_error < 0.05, "{family} {rung}: {:?}", done.report);
                let lowered = done.report.rung != rung;
                assert_eq!(lowered, done.report.instead.is_some());
                assert!(!lowered || done.tensor.contains("expert"), "{:?}", done.report);
            }
            put(&mut model, &kept.finished);
            let far = relative(&hidden(&model), &before);
            assert!(far > 0.0 && far < 0.1, "{family} {rung}: {far}");
            specs.keys().for_each(|tensor| model.restore(tensor).unwrap());
        }
    }
}

#[test]
fn transformed_models_of_every_family_are_quantised_and_go_back() {
    for family in
        ["llama", "llama_bias", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3", "mixtral", "qwen3_moe"]
    {
        let mut model = open(&golden(family));
        let calibration = calibration(&model, 12, 20);
        let before = hidden(&model);
        let turned = if family == "gemma3_text" { "r2r4" } else { "r1r2r4" };
        let smooth = Transformations { smooth: true, ..Transformations::default() };
        let rotate = Transformations {
            rotate: turned.parse().ok(),
            smooth: false,
            qkv_bits: Some(8),
            cache_bits: Some(8),
        };
        for with in [smooth, rotate] {
            let transforms = with.of(&model, Some(&calibration)).unwrap();
            let mut specs = specs(&model, spec(8, Rung::Gptq));
            specs.values_mut().for_each(|spec| spec.abq.activation_bits = Some(8));
            let room = in_memory();
            let job = Job {
                specs: &specs,
                transforms: &transforms,
                calibration: Some(&calibration),
                room: &room,
                hessians: 1 << 16,
            };
            let mut kept = Kept::default();
            run(&mut model, job, State::default(), &mut kept).unwrap();
            assert!(
                hidden(&model) == before && model.transforms().is_empty(),
                "{family}: the model is as it was"
            );
            model.transform(transforms).unwrap();
            (0..model.config().layers.len()).for_each(|layer| model.fold_layer(layer).unwrap());
            put(&mut model, &kept.finished);
            let far = relative(&hidden(&model), &before);
            assert!(far > 0.0 && far < 0.15, "{family}: {far}");
            (0..model.config().layers.len()).for_each(|layer| model.unfold_layer(layer).unwrap());
            model.transform(Vec::new()).unwrap();
        }
    }
}

/// Error feedback knows what activations lose: it leaves less of it than codes that were chosen for exact ones.
#[test]
fn codes_are_chosen_for_the_activations_that_they_multiply() {
    let mut model = open(&tinylm());
    let text = std::fs::read_to_string(tinylm().join("calib.txt")).unwrap();
    let ids = Tokenizer::open(&tinylm()).unwrap().encode(&text).unwrap();
    let calibration = Calibration::new(&ids, Cut { windows: 12, length: 128, seed: None }, None).unwrap();
    let before = hidden(&model);
    let mut far = |chosen_for: Option<u8>| {
        let mut specs = specs(&model, spec(4, Rung::Gptq));
        specs.values_mut().for_each(|spec| spec.abq.activation_bits = chosen_for);
        let room = in_memory();
        let job = Job {
            specs: &specs,
            transforms: &[],
            calibration: Some(&calibration),
            room: &room,
            hessians: 1 << 24,
        };
        let mut kept = Kept::default();
        run(&mut model, job, State::default(), &mut kept).unwrap();
        for done in &kept.finished {
            let cols = done.unit.cols();
            let mut values = vec![0.0; done.unit.rows() * cols];
            for (row, values) in values.chunks_exact_mut(cols).enumerate() {
                done.unit.decode_row(row, values).unwrap();
            }
            model.replace_quantised(&done.tensor, values, Some(4)).unwrap();
        }
        let far = relative(&hidden(&model), &before);
        specs.keys().for_each(|tensor| model.restore(tensor).unwrap());
        far
    };
    let (exact, rounded) = (far(None), far(Some(4)));
    assert!(rounded < exact, "{rounded} {exact}");
}

#[test]
fn experts_that_saw_too_few_tokens_are_rounded_to_nearest_and_it_is_said() {
    for family in ["mixtral", "qwen3_moe"] {
        let mut model = open(&golden(family));
        let calibration = calibration(&model, 1, 9);
        let specs = specs(&model, spec(4, Rung::Gptq));
        let room = in_memory();
        let job =
            Job { specs: &specs, transforms: &[], calibration: Some(&calibration), room: &room, hessians: 0 };
        let mut kept = Kept::default();
        run(&mut model, job, State::default(), &mut kept).unwrap();
        let lowered: Vec<_> = kept.finished.iter().filter(|done| done.report.instead.is_some()).collect();
        assert!(!lowered.is_empty() && lowered.len() < kept.finished.len(), "{family}");
        for done in lowered {
            assert!(done.tensor.contains("experts") && done.report.rung == Rung::Grid);
            assert!(done.report.instead.as_deref().unwrap().contains("tokens"), "{:?}", done.report);
        }
    }
}

#[test]
fn a_killed_job_goes_on_after_the_last_finished_block_to_the_same_bytes() {
    let rotated = Transformations {
        rotate: Some(Rotate::ALL),
        qkv_bits: Some(8),
        cache_bits: Some(4),
        ..Transformations::default()
    };
    let none = Transformations::default();
    for (family, rung, with) in [
        ("llama", Rung::Gptq, none),
        ("llama", Rung::Gptq, rotated),
        ("mixtral", Rung::Gptq, none),
        ("qwen3", Rung::Grid, none),
    ] {
        let mut model = open(&golden(family));
        // Enough tokens that drift is made up for.
        let calibration = calibration(&model, 60, 20);
        let transforms = with.of(&model, None).unwrap();
        let specs = specs(&model, spec(3, rung));
        let dir = tempfile::tempdir().unwrap();
        let rooms = [in_memory(), Room { memory: 0, file: dir.path().join("streams") }];
        let job = |room| Job {
            specs: &specs,
            transforms: &transforms,
            calibration: Some(&calibration),
            room,
            hessians: 1 << 20,
        };
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
            assert!(both == units(&whole.finished), "{family} {rung}");
        }
        let nothing =
            run(&mut model, job(&rooms[0]), State { blocks: 1, residuals: None }, &mut Kept::default());
        assert!(nothing.unwrap_err().to_string().contains("no streams"));
    }
}

#[test]
fn any_number_of_threads_gives_the_same_units() {
    let on = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let mut model = open(&golden("llama"));
            let (calibration, specs) = (calibration(&model, 60, 20), specs(&model, spec(3, Rung::Gptq)));
            let room = in_memory();
            let with =
                Transformations { smooth: true, rotate: "r4".parse().ok(), qkv_bits: None, cache_bits: None };
            let transforms = with.of(&model, Some(&calibration)).unwrap();
            let job = Job {
                specs: &specs,
                transforms: &transforms,
                calibration: Some(&calibration),
                room: &room,
                hessians: 1 << 20,
            };
            let mut kept = Kept::default();
            run(&mut model, job, State::default(), &mut kept).unwrap();
            kept.finished
        })
    };
    let one = on(1);
    for threads in [2, 5] {
        assert!(units(&one) == units(&on(threads)));
    }
}

#[test]
fn blocks_whose_sub_layers_were_pruned_are_quantised_as_they_are() {
    let checkpoint = Checkpoint::open(&tinylm()).unwrap();
    let removal = Removal { attention: [1, 3].into(), mlp: [0, 3].into(), ..Removal::default() };
    let edit = removal.edit(&checkpoint).unwrap();
    let mut model = Model::open(Arc::new(checkpoint.edited(&edit).unwrap())).unwrap();
    let specs = specs(&model, spec(4, Rung::Gptq));
    let calibration = calibration(&model, 4, 64);
    let room = in_memory();
    let job = Job {
        specs: &specs,
        transforms: &[],
        calibration: Some(&calibration),
        room: &room,
        hessians: 1 << 20,
    };
    let mut kept = Kept::default();
    run(&mut model, job, State::default(), &mut kept).unwrap();
    assert_eq!(kept.finished.len(), specs.len());
}

#[test]
fn what_cannot_go_by_the_text_is_refused_or_runs_without() {
    let mut model = open(&tinylm());
    let room = in_memory();
    let long = calibration(&model, 2, 64);
    let short = calibration(&model, 1, 20);
    let mut say = |specs: &BTreeMap<String, Spec>, calibration: Option<&Calibration>| {
        let job = Job { specs, transforms: &[], calibration, room: &room, hessians: 1 << 20 };
        let mut kept = Kept::default();
        run(&mut model, job, State::default(), &mut kept).map(|()| kept.finished)
    };
    let name = "model.layers.2.mlp.down_proj.weight";
    let one = |spec| BTreeMap::from([(name.to_owned(), spec)]);
    let error = say(&one(spec(4, Rung::Gptq)), None).unwrap_err().to_string();
    assert!(error.contains(name) && error.contains("goes by a text"), "{error}");
    let error = say(&one(spec(4, Rung::Gptq)), Some(&short)).unwrap_err().to_string();
    assert!(error.contains("20 calibration tokens") && error.contains("96"), "{error}");
    let error = say(&one(spec(9, Rung::Rtn)), None).unwrap_err().to_string();
    assert!(error.contains(name) && error.contains("9 bits"), "{error}");
    let no_such = BTreeMap::from([("model.layers.2.mlp.down.weight".to_owned(), spec(4, Rung::Rtn))]);
    assert!(say(&no_such, None).unwrap_err().to_string().contains("mlp.down.weight"));
    let norm = BTreeMap::from([("model.norm.weight".to_owned(), spec(4, Rung::Rtn))]);
    assert!(say(&norm, None).unwrap_err().to_string().contains("no matrix"));
    // Without a text, and of what is no linear of a layer.
    for rung in [Rung::Rtn, Rung::Grid] {
        assert_eq!(say(&one(spec(4, rung)), None).unwrap().len(), 1);
    }
    let embedding = BTreeMap::from([("model.embed_tokens.weight".to_owned(), spec(8, Rung::Gptq))]);
    let done = say(&embedding, None).unwrap();
    assert!(done[0].report.rung == Rung::Grid && done[0].report.instead.is_some());
    assert!(done[0].report.relative_error < 1e-3);
    // One tensor of one layer, with the text.
    let done = say(&one(spec(4, Rung::Gptq)), Some(&long)).unwrap();
    assert!(done.len() == 1 && done[0].report.tokens == 128);
    // Weights that are not finite, by name.
    let mut weights = model.weights(name).unwrap();
    weights[7] = f32::NAN;
    model.replace(name, weights).unwrap();
    let specs = one(spec(4, Rung::Rtn));
    let job = Job { specs: &specs, transforms: &[], calibration: None, room: &room, hessians: 0 };
    let error = run(&mut model, job, State::default(), &mut Kept::default()).unwrap_err().to_string();
    assert!(error.contains(name) && error.contains("column 7"), "{error}");
}

#[test]
fn each_rung_is_better_than_the_one_before() {
    let mut model = open(&tinylm());
    let text = std::fs::read_to_string(tinylm().join("calib.txt")).unwrap();
    let ids = Tokenizer::open(&tinylm()).unwrap().encode(&text[..60_000]).unwrap();
    let calibration = Calibration::new(&ids, Cut { windows: 24, length: 128, seed: None }, None).unwrap();
    let held_out = &ids[4000..4400];
    let states = |model: &Model| {
        model.hidden(held_out, &mut model.cache(held_out.len()), &Skips::new(), &mut Unobserved).unwrap()
    };
    let base = states(&model);
    let errors = [Rung::Rtn, Rung::Grid, Rung::Gptq].map(|rung| {
        let spec = Spec { abq: Abq::new(3), zero: ZeroPoint::Real, rung, learn: None };
        let specs = specs(&model, spec);
        let room = in_memory();
        let job = Job {
            specs: &specs,
            transforms: &[],
            calibration: Some(&calibration),
            room: &room,
            hessians: 1 << 24,
        };
        let mut kept = Kept::default();
        run(&mut model, job, State::default(), &mut kept).unwrap();
        put(&mut model, &kept.finished);
        let error = relative(&states(&model), &base);
        specs.keys().for_each(|tensor| model.restore(tensor).unwrap());
        error
    });
    assert!(errors[1] < 0.9 * errors[0] && errors[2] < 0.9 * errors[1], "{errors:?}");
}
