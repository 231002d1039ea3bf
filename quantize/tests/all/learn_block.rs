//! Learning blocks whole: every family, what is learned beside, resumed, and the model that comes of it.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use llmpress_calibrate::{Calibration, Cut, Room};
use llmpress_formats::encoding::PackedUnit;
use llmpress_formats::{Checkpoint, Error, Result, Transform};
use llmpress_model::{Model, SubLayer};
use llmpress_quantize::{
    FinishedBlock, Job, Learned, Lesson, Quantiser, Residuals, Sink, Spec, State, Taught, run,
};

const FAMILIES: [&str; 6] = ["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3"];
const EVERYTHING: &str = "gptq:w2a8,g32,learn=block,scale,compensate,correct,maps,steps=24";

fn golden(family: &str) -> Model {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/golden").join(family);
    Model::open(Arc::new(Checkpoint::open(&dir).unwrap())).unwrap()
}

/// Models of chance have nothing to say of tokens of chance that they did not see: windows come again, so that what is held back
/// was seen.
fn calibration(model: &Model) -> Calibration {
    let vocab = model.vocab_size() as u32;
    let ids: Vec<u32> = (0..20 * 16u32).map(|i| i % (5 * 16)).map(|i| (i * i * 7 + i * 3) % vocab).collect();
    Calibration::new(&ids, Cut { windows: 20, length: 16, seed: None }, None).unwrap()
}

fn specs(model: &Model, quantiser: &str) -> BTreeMap<String, Spec> {
    let Quantiser { spec, .. } = quantiser.parse().unwrap();
    let layers = 0..model.config().layers.len();
    layers.flat_map(|l| model.inputs_of(l)).flat_map(|input| input.tensors).map(|t| (t, spec)).collect()
}

/// Keeps what is finished, and the streams after each block; fails after block `end`.
#[derive(Default)]
struct Kept {
    blocks: Vec<FinishedBlock>,
    saved: Vec<Option<Vec<u8>>>,
    end: Option<usize>,
    steps: u64,
    total: (u64, u64),
    learned: Vec<(usize, Learned)>,
    by_sub_layer: usize,
}

impl Sink for Kept {
    fn start(&mut self, _weights: u64, work: u64, finished: u64) {
        self.total = (work, finished);
    }

    fn step(&mut self, weights: u64) {
        self.steps += weights;
    }

    fn learned(&mut self, lesson: &Lesson) {
        match lesson.what {
            Taught::Block => self.learned.push((lesson.layer, lesson.learned)),
            Taught::Attention | Taught::Mlp => self.by_sub_layer += 1,
            Taught::Matrix => {}
        }
    }

    fn block(
        &mut self,
        block: usize,
        finished: FinishedBlock,
        residuals: Option<&mut Residuals>,
    ) -> Result<()> {
        self.blocks.push(finished);
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

type Told<'a> = Vec<(&'a str, &'a PackedUnit, Option<&'a Learned>)>;

fn told(blocks: &[FinishedBlock]) -> (Told<'_>, Vec<&Transform>) {
    let tensors = blocks.iter().flat_map(|block| &block.tensors);
    (
        tensors.map(|done| (done.tensor.as_str(), &done.unit, done.report.learned.as_ref())).collect(),
        blocks.iter().flat_map(|block| &block.transforms).collect(),
    )
}

fn job<'a>(
    specs: &'a BTreeMap<String, Spec>,
    transforms: &'a [Transform],
    calibration: &'a Calibration,
    room: &'a Room,
) -> Job<'a> {
    Job { specs, transforms, calibration: Some(calibration), room, hessians: 1 << 16 }
}

fn roomy() -> Room {
    Room { memory: u64::MAX, file: PathBuf::from("never written") }
}

fn quantised(
    model: &mut Model,
    specs: &BTreeMap<String, Spec>,
    transforms: &[Transform],
    calibration: &Calibration,
) -> Kept {
    let mut kept = Kept::default();
    run(model, job(specs, transforms, calibration, &roomy()), State::default(), &mut kept).unwrap();
    kept
}

#[test]
fn every_dense_family_is_learned_whole_resumed_and_the_same_on_any_number_of_threads() {
    for family in FAMILIES {
        let mut model = golden(family);
        let calibration = calibration(&model);
        let specs = specs(&model, EVERYTHING);
        let whole = quantised(&mut model, &specs, &[], &calibration);
        assert_eq!(whole.steps, whole.total.0, "{family}: all progress is told");
        assert_eq!(whole.learned.len(), model.config().layers.len(), "{family}");
        for (layer, learned) in &whole.learned {
            assert!(learned.after.is_some_and(f64::is_finite), "{family} {layer}");
            assert_eq!(learned.taken, learned.after.is_some_and(|after| after < learned.before));
            // Scales come with blocks that were taken.
            assert_eq!(!whole.blocks[*layer].transforms.is_empty(), learned.taken, "{family} {layer}");
        }
        assert!(whole.learned.iter().any(|(_, learned)| learned.taken), "{family}: {:?}", whole.learned);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        let others = pool.install(|| quantised(&mut model, &specs, &[], &calibration));
        assert!(told(&others.blocks) == told(&whole.blocks), "{family}");
        // Killed after the first block, from streams on disk.
        let dir = tempfile::tempdir().unwrap();
        let room = Room { memory: 0, file: dir.path().join("streams") };
        let job = job(&specs, &[], &calibration, &room);
        let mut first = Kept { end: Some(0), ..Kept::default() };
        run(&mut model, job, State::default(), &mut first).unwrap_err();
        let saved = first.saved[0].clone().unwrap();
        let residuals = job.residuals(&model, &mut &saved[..], Path::new("saved")).unwrap();
        let mut rest = Kept::default();
        run(&mut model, job, State { blocks: 1, residuals }, &mut rest).unwrap();
        assert_eq!(rest.total.1 + rest.steps, whole.total.0, "{family}: what was done counts");
        let both: Vec<FinishedBlock> = first.blocks.into_iter().chain(rest.blocks).collect();
        assert!(told(&both) == told(&whole.blocks), "{family}");
        assert!(
            std::fs::read_dir(dir.path()).unwrap().next().is_none(),
            "{family}: streams are left on disk"
        );
    }
}

#[test]
fn a_model_made_of_what_was_learned_gives_out_what_learning_saw() {
    let mut taken: BTreeMap<&str, usize> = BTreeMap::new();
    for family in FAMILIES {
        for quantiser in [
            EVERYTHING,
            "gptq:w2,g32,learn=block,clip,scale,steps=60",
            "gptq:w2*a8,learn=block,round,steps=24",
        ] {
            let mut model = golden(family);
            let calibration = calibration(&model);
            let specs = specs(&model, quantiser);
            let kept = quantised(&mut model, &specs, &[], &calibration);
            *taken.entry(quantiser).or_default() += usize::from(kept.learned[0].1.taken);
            // As a reader makes it: folded, then units in place of matrices.
            let mut model = golden(family);
            model.transform(kept.blocks.iter().flat_map(|block| block.transforms.clone()).collect()).unwrap();
            model.fold_layer(0).unwrap();
            for done in &kept.blocks[0].tensors {
                let mut values = vec![0.0; done.unit.rows() * done.unit.cols()];
                for (row, values) in values.chunks_exact_mut(done.unit.cols()).enumerate() {
                    done.unit.decode_row(row, values).unwrap();
                }
                let bits = specs[&done.tensor].abq.activation_bits;
                model.replace_quantised(&done.tensor, values, bits).unwrap();
            }
            let mut streams =
                llmpress_calibrate::Streams::embed(&golden(family), &calibration, &roomy()).unwrap();
            for site in [SubLayer::Attention(0), SubLayer::Mlp(0)] {
                streams.advance(&model, site, &mut || ()).unwrap();
            }
            let mut found = Vec::new();
            streams.save(&mut found, Path::new("found")).unwrap();
            let saved = kept.saved[0].as_ref().unwrap();
            assert!(saved[..found.len()] == found[..], "{family} {quantiser}");
        }
    }
    assert!(taken.values().all(|families| *families > 0), "{taken:?}");
}

#[test]
fn blocks_are_learned_behind_rotations_and_smoothing() {
    for (family, quantiser) in [
        ("llama", "gptq:w4a4,rotate,learn=block,correct,compensate,steps=24"),
        ("qwen2", "gptq:w3a8,rotate=r2r4,learn=block,scale,steps=24"),
        ("qwen2", "gptq:w3a8,smooth,learn=block,scale,steps=24"),
        ("gemma3_text", "gptq:w4a4,rotate=r2,qkv4,learn=block,scale,maps,steps=24"),
    ] {
        let mut model = golden(family);
        let calibration = calibration(&model);
        let Quantiser { with, .. } = quantiser.parse().unwrap();
        let transforms = with.of(&model, Some(&calibration)).unwrap();
        let specs = specs(&model, quantiser);
        let kept = quantised(&mut model, &specs, &transforms, &calibration);
        assert!(
            kept.learned.iter().any(|(_, learned)| learned.taken),
            "{family} {quantiser}: {:?}",
            kept.learned
        );
        // What they are all together is possible.
        let learned = kept.blocks.iter().flat_map(|block| block.transforms.clone());
        model.folds(&learned.chain(transforms).collect::<Vec<_>>()).unwrap();
        assert!(model.transforms().is_empty(), "the model is as before");
    }
}

#[test]
fn a_block_is_learned_with_its_activations_quantised() {
    let mut model = golden("llama");
    let calibration = calibration(&model);
    let mut before = |quantiser: &str| {
        let specs = specs(&model, quantiser);
        quantised(&mut model, &specs, &[], &calibration).learned[0].1.before
    };
    let (weights, both) =
        (before("gptq:w8,g32,learn=block,steps=1"), before("gptq:w8a2,g32,learn=block,steps=1"));
    // Two bits of activations lose far more than eight of weights.
    assert!(both > 20.0 * weights, "{weights} {both}");
}

#[test]
fn a_block_with_experts_is_learned_by_sub_layers() {
    let mut model = golden("mixtral");
    let calibration = calibration(&model);
    let specs = specs(&model, "gptq:w3,g32,learn=block,scale,steps=5");
    let kept = quantised(&mut model, &specs, &[], &calibration);
    assert!(kept.learned.is_empty() && kept.by_sub_layer == model.config().layers.len());
    assert_eq!(kept.steps, kept.total.0);
}

#[test]
fn scales_are_refused_before_any_work_where_a_checkpoint_has_transformations() {
    let model = golden("llama");
    let Quantiser { with, .. } = "gptq:w3,rotate=r2".parse().unwrap();
    let transforms = with.of(&model, None).unwrap();
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/golden/llama");
    let rotated = llmpress_model::folded(Checkpoint::open(&dir).unwrap(), transforms).unwrap();
    let mut model = Model::open(Arc::new(rotated)).unwrap();
    let calibration = calibration(&model);
    for (quantiser, refused) in
        [("gptq:w3,learn=block,scale,steps=2", true), ("gptq:w3,learn=block,steps=2", false)]
    {
        let specs = specs(&model, quantiser);
        let mut kept = Kept::default();
        let room = roomy();
        let job = job(&specs, &[], &calibration, &room);
        match run(&mut model, job, State::default(), &mut kept) {
            Err(error) => {
                let told = error.to_string();
                assert!(refused && told.contains("leave scale out") && kept.steps == 0, "{told}");
            }
            Ok(()) => assert!(!refused, "{quantiser}"),
        }
    }
}
