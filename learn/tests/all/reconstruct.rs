//! The loop: it finds back what was spoilt, with the same bits everywhere, and says when a loss is no number.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use llmpress_calibrate::{Calibration, Cut, Room, Streams};
use llmpress_formats::Checkpoint;
use llmpress_learn::{Adam, Net, Outcome, Rate, Settings, Variable, reconstruct};
use llmpress_model::{Model, SubLayer};
use llmpress_numbers::Numbers;

fn open() -> Model {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/golden/llama");
    Model::open(Arc::new(Checkpoint::open(&golden).unwrap())).unwrap()
}

/// Weights that are learned as they are.
struct Plain {
    weights: Vec<f32>,
    adam: Adam,
    rate: f32,
}

impl Variable for Plain {
    fn weights(&self) -> &[f32] {
        &self.weights
    }

    fn step(&mut self, gradient: &[f32], rate: &Rate) {
        for (i, w) in self.weights.iter_mut().enumerate() {
            *w -= self.rate * rate.step(&mut self.adam.first[i], &mut self.adam.second[i], gradient[i]);
        }
    }
}

/// Learns a sub-layer from weights that are off by chance; what it came to, and the weights.
fn learn(site: SubLayer, room: &Room, steps: u32, rate: f32) -> (Outcome, Vec<Vec<f32>>, u32) {
    let model = open();
    let vocab = model.vocab_size() as u32;
    let ids: Vec<u32> = (0..20 * 24).map(|i| (i * i * 7 + i * 3) % vocab).collect();
    let calibration = Calibration::new(&ids, Cut { windows: 20, length: 24, seed: None }, None).unwrap();
    let second = Room { memory: room.memory, file: room.file.with_extension("targets") };
    let mut inputs = Streams::embed(&model, &calibration, room).unwrap();
    let mut targets = Streams::embed(&model, &calibration, &second).unwrap();
    targets.advance(&model, site, &mut || ()).unwrap();
    let net = Net::new(&model, site).unwrap();
    let mut numbers = Numbers::new(3);
    let mut variables: Vec<Plain> = net
        .tensors()
        .iter()
        .map(|tensor| {
            let mut weights = model.weights(tensor).unwrap();
            let size = weights.iter().fold(0f32, |a, b| a.max(b.abs()));
            weights.iter_mut().for_each(|w| *w += 0.2 * size * numbers.float());
            Plain { adam: Adam::new(weights.len()), weights, rate: rate * size }
        })
        .collect();
    let mut all: Vec<&mut dyn Variable> = variables.iter_mut().map(|v| v as &mut dyn Variable).collect();
    let mut told = 0;
    let settings = Settings { steps, batch: 2, seed: 5, rate: 1.0 };
    let outcome =
        reconstruct(&net, &mut all, (&mut inputs, &mut targets), settings, &mut || told += 1).unwrap();
    (outcome, variables.into_iter().map(|v| v.weights).collect(), told)
}

fn in_memory() -> Room {
    Room { memory: u64::MAX, file: PathBuf::from("never written") }
}

#[test]
fn what_was_spoilt_is_found_back() {
    for site in [SubLayer::Attention(0), SubLayer::Mlp(0)] {
        let (outcome, _, told) = learn(site, &in_memory(), 120, 0.02);
        assert!(outcome.is_better() && outcome.after < 0.3 * outcome.before, "{site:?} {outcome:?}");
        assert_eq!(told, 120);
    }
}

#[test]
fn any_number_of_threads_and_streams_on_disk_give_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    for site in [SubLayer::Attention(0), SubLayer::Mlp(0)] {
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| learn(site, &in_memory(), 10, 0.02))
        };
        let one = on(1);
        assert!(one == on(2) && one == on(5), "{site:?}");
        let disk = Room { memory: 0, file: dir.path().join("streams") };
        assert!(one == learn(site, &disk, 10, 0.02), "{site:?}");
    }
}

#[test]
fn a_loss_that_is_no_number_ends_learning_and_is_no_better() {
    let (outcome, _, told) = learn(SubLayer::Mlp(0), &in_memory(), 50, 1e30);
    assert!(outcome.after.is_nan() && !outcome.is_better() && outcome.before.is_finite(), "{outcome:?}");
    assert!(told < 50);
}
