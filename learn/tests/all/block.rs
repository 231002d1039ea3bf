//! The loss of a block: its derivatives are those of differences, with every part that it can have.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use llmpress_calibrate::{Calibration, Cut, Room, Streams};
use llmpress_formats::Checkpoint;
use llmpress_learn::{
    Block, BlockStreams, Given, Gradients, Losses, Net, Rate, Settings, Variables, learn_block,
};
use llmpress_model::{Model, SubLayer};
use llmpress_numbers::Numbers;

const WINDOWS: usize = 2;

fn open(family: &str) -> Model {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/golden").join(family);
    Model::open(Arc::new(Checkpoint::open(&golden).unwrap())).unwrap()
}

/// Everything that a block computes with, free to move.
struct Free {
    weights: [Vec<Vec<f32>>; 2],
    norms: [Vec<f32>; 2],
    bias: Option<Vec<f32>>,
    /// The sums that the one step was given.
    told: Mutex<Option<[Gradients; 2]>>,
}

impl Free {
    fn of(model: &Model, block: &Block) -> Self {
        let parts = block.parts().map(|net| net.unwrap());
        let weights = parts
            .map(|net: &Net| net.tensors().iter().map(|t| model.weights(t).unwrap()).collect::<Vec<_>>());
        let bias = parts[0].value_bias().map(<[f32]>::to_vec);
        Self { weights, norms: parts.map(|net| net.norm().to_vec()), bias, told: Mutex::new(None) }
    }

    /// All values, in the order of [`flat`].
    fn values(&mut self) -> Vec<&mut f32> {
        let mut all = Vec::new();
        for (part, norm) in self.weights.iter_mut().zip(&mut self.norms) {
            all.extend(part.iter_mut().flatten());
            all.extend(norm.iter_mut());
        }
        all.extend(self.bias.iter_mut().flatten());
        all
    }
}

fn flat(gradients: &[Gradients; 2]) -> Vec<f32> {
    let of = |g: &Gradients| g.matrices.iter().flatten().chain(&g.norm).copied().collect::<Vec<f32>>();
    let mut all: Vec<f32> = gradients.iter().flat_map(of).collect();
    all.extend(&gradients[0].value_bias);
    all
}

impl Variables for Free {
    fn weights(&self) -> [Vec<&[f32]>; 2] {
        self.weights.each_ref().map(|part| part.iter().map(Vec::as_slice).collect())
    }

    fn norms(&self) -> [Option<&[f32]>; 2] {
        self.norms.each_ref().map(|norm| Some(norm.as_slice()))
    }

    fn value_bias(&self) -> Option<&[f32]> {
        self.bias.as_deref()
    }

    fn gradients(&self) -> [Gradients; 2] {
        let mut all = self.weights.each_ref().map(|part| Gradients::zeros(part.iter().map(Vec::len)));
        for (gradients, norm) in all.iter_mut().zip(&self.norms) {
            gradients.norm = vec![0.0; norm.len()];
        }
        all[0].value_bias = vec![0.0; self.bias.as_ref().map_or(0, Vec::len)];
        all
    }

    fn step(&mut self, gradients: &mut [Gradients; 2], _rate: &Rate) {
        *self.told.lock().unwrap() = Some(gradients.clone());
    }
}

/// Streams of the model, before and after its first block, and of one whose weights are off.
struct Setting {
    streams: [Streams; 4],
    _dir: tempfile::TempDir,
}

impl Setting {
    fn of(model: &Model) -> Self {
        let vocab = model.vocab_size() as u32;
        let ids: Vec<u32> = (0..WINDOWS as u32 * 52).map(|i| (i * i * 7 + i * 3) % vocab).collect();
        let calibration =
            Calibration::new(&ids, Cut { windows: WINDOWS, length: 52, seed: None }, None).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let streams = [0, 1, 2, 3].map(|at| {
            let file: PathBuf = dir.path().join(format!("{at}"));
            let mut streams = Streams::embed(model, &calibration, &Room { memory: 0, file }).unwrap();
            let mut numbers = Numbers::new(11);
            if at < 2 {
                // What a quantised prefix made of them.
                let mut window = Default::default();
                for index in 0..WINDOWS {
                    streams.get(index, &mut window).unwrap();
                    let size = window.data().iter().fold(0f32, |a, b| a.max(b.abs()));
                    window.data_mut().iter_mut().for_each(|x| *x += 0.05 * size * numbers.float());
                    streams.put(index, &window).unwrap();
                }
            }
            if at == 1 || at == 2 {
                for site in [SubLayer::Attention(0), SubLayer::Mlp(0)] {
                    streams.advance(model, site, &mut || ()).unwrap();
                }
            }
            streams
        });
        Self { streams, _dir: dir }
    }

    /// The loss over the windows, and its derivatives.
    fn loss(&mut self, model: &Model, block: &Block, free: &mut Free, losses: Losses) -> (f64, Vec<f32>) {
        let [inputs, second, targets, original] = &mut self.streams;
        let streams = BlockStreams { inputs, targets, second, original: Some(original) };
        let net = block.parts()[0].unwrap();
        let weights: Vec<Vec<f32>> = net.tensors().iter().map(|t| model.weights(t).unwrap()).collect();
        let weights: Vec<&[f32]> = weights.iter().map(Vec::as_slice).collect();
        let settings = Settings { steps: 1, batch: WINDOWS, seed: 0, rate: 1.0 };
        let dense = Some((net, Given::of(&weights)));
        let outcome = learn_block(block, free, streams, dense, (losses, settings), &mut || ()).unwrap();
        let told = free.told.lock().unwrap().take().unwrap();
        // The loss is a mean of windows, derivatives are of their sum.
        (WINDOWS as f64 * outcome.before, flat(&told))
    }
}

#[test]
fn derivatives_of_every_part_of_the_loss_are_those_of_differences() {
    let all = [
        Losses::default(),
        Losses { second: true, ..Losses::default() },
        Losses { correction: true, ..Losses::default() },
        Losses { maps: 3.0, ..Losses::default() },
        Losses { second: true, correction: true, maps: 0.5 },
    ];
    for family in ["llama", "qwen2", "qwen3", "gemma3_text", "phi3", "mistral"] {
        let model = open(family);
        let block = Block::new(&model, 0).unwrap();
        let mut setting = Setting::of(&model);
        for losses in all {
            let mut free = Free::of(&model, &block);
            let mut numbers = Numbers::new(12);
            // Off where the distances are least, in a direction of every value.
            for value in free.values() {
                *value += 0.02 * numbers.float();
            }
            let (_, gradient) = setting.loss(&model, &block, &mut free, losses);
            let start: Vec<f32> = free.values().iter().map(|v| **v).collect();
            assert_eq!(start.len(), gradient.len());
            for _ in 0..2 {
                let direction: Vec<f32> = start.iter().map(|_| numbers.float()).collect();
                let mut at = |step: f32| {
                    let moved = free.values().into_iter().zip(&start).zip(&direction);
                    moved.for_each(|((value, start), d)| *value = start + step * d);
                    setting.loss(&model, &block, &mut free, losses).0
                };
                let h = 2e-4;
                let found = (8.0 * (at(h) - at(-h)) - (at(2.0 * h) - at(-2.0 * h))) / (12.0 * f64::from(h));
                let sum = |a: &[f32], b: &[f32]| -> f64 {
                    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
                };
                let (along, size) = (sum(&gradient, &direction), sum(&gradient, &gradient).sqrt());
                assert!(
                    (found - along).abs() <= 0.02 * size + 1e-6,
                    "{family} {losses:?}: {found} {along} of {size}"
                );
            }
        }
    }
}

#[test]
fn a_block_that_is_the_original_has_no_loss_on_its_own_stream() {
    let model = open("llama");
    let block = Block::new(&model, 0).unwrap();
    let mut setting = Setting::of(&model);
    // Inputs that are the original's.
    let mut window = Default::default();
    for index in 0..WINDOWS {
        let [inputs, second, targets, original] = &mut setting.streams;
        original.get(index, &mut window).unwrap();
        inputs.put(index, &window).unwrap();
        targets.get(index, &mut window).unwrap();
        second.put(index, &window).unwrap();
    }
    let mut free = Free::of(&model, &block);
    let losses = Losses { second: true, correction: true, maps: 1.0 };
    let (loss, _) = setting.loss(&model, &block, &mut free, losses);
    assert!(loss.abs() < 1e-6, "{loss}");
    free.weights[0][0].iter_mut().for_each(|w| *w = -*w);
    let (loss, _) = setting.loss(&model, &block, &mut free, losses);
    assert!(loss > 1e-3, "{loss}");
}

#[test]
fn experts_have_no_block() {
    assert!(Block::new(&open("mixtral"), 0).is_none());
}
