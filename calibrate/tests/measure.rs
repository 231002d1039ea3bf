//! What one matrix in another form costs.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use llmpress_calibrate::{Calibration, Cut, Measured, Probe, Room, Sensitivity, measure};
use llmpress_formats::{Checkpoint, Error, Result};
use llmpress_model::{Model, Panels, Skips, Unobserved};

fn open(family: &str) -> Model {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/golden");
    Model::open(Arc::new(Checkpoint::open(&root.join(family)).unwrap())).unwrap()
}

fn calibration(model: &Model) -> Calibration {
    let vocab = model.vocab_size() as u32;
    let ids: Vec<u32> = (0..60).map(|i| (i * i * 7 + i * 3) % vocab).collect();
    Calibration::new(&ids, Cut { windows: 3, length: 20, seed: None }, None).unwrap()
}

/// The matrix as it is, a tenth greater, and all zero.
#[derive(Default)]
struct Forms {
    total: u64,
    done: u64,
    fail: bool,
}

impl Probe for Forms {
    fn form(&mut self, matrix: Measured<'_>, number: usize) -> Result<Option<Vec<f32>>> {
        assert!(matrix.weights.len().is_multiple_of(matrix.moments.features()));
        if self.fail && number == 1 {
            return Err(Error::Invalid("enough".to_owned()));
        }
        let by = [1.0, 1.1, 0.0].get(number);
        Ok(by.map(|by| matrix.weights.iter().map(|w| w * by).collect()))
    }

    fn start(&mut self, weights: u64) {
        self.total = weights;
    }

    fn step(&mut self, weights: u64) {
        self.done += weights;
    }
}

fn found(model: &mut Model, probe: &mut Forms) -> Result<Vec<Sensitivity>> {
    let calibration = calibration(model);
    let room = Room { memory: u64::MAX, file: PathBuf::from("never written") };
    measure(model, &|tensor| !tensor.contains("k_proj"), &calibration, &room, probe)
}

fn hidden(model: &Model) -> Panels {
    let ids: Vec<u32> = (0..20).collect();
    model.hidden(&ids, &mut model.cache(20), &Skips::new(), &mut Unobserved).unwrap()
}

#[test]
fn a_matrix_as_it_is_costs_nothing_and_more_change_costs_more() {
    for family in ["llama", "qwen3_moe", "gemma3_text"] {
        let mut model = open(family);
        let before = hidden(&model);
        let mut probe = Forms::default();
        let all = found(&mut model, &mut probe).unwrap();
        assert_eq!(probe.total, probe.done);
        let layers = 0..model.config().layers.len();
        let tensors = layers.flat_map(|layer| model.inputs_of(layer)).flat_map(|input| input.tensors);
        let tensors: Vec<String> = tensors.filter(|tensor| !tensor.contains("k_proj")).collect();
        let names: Vec<&String> = all.iter().map(|matrix| &matrix.tensor).collect();
        assert!(names.iter().all(|name| tensors.contains(name)) && names.len() == tensors.len(), "{family}");
        for matrix in &all {
            let [same, more, gone] = matrix.distances[..] else { panic!("{matrix:?}") };
            assert!(same == 0.0 && more <= gone, "{matrix:?}");
            // An expert may see no token.
            assert!(more > 0.0 || matrix.tensor.contains("experts"), "{matrix:?}");
        }
        assert!(hidden(&model) == before, "the model is as before");
    }
}

#[test]
fn distances_are_the_same_bits_on_any_number_of_threads() {
    let on = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| found(&mut open("llama"), &mut Forms::default()).unwrap())
    };
    let one = on(1);
    assert!(one == on(2) && one == on(5));
}

#[test]
fn an_error_names_the_tensor_and_leaves_the_model_as_it_was() {
    let mut model = open("llama");
    let before = hidden(&model);
    let error = found(&mut model, &mut Forms { fail: true, ..Forms::default() }).unwrap_err();
    assert!(error.to_string().contains("layers.0.self_attn.q_proj.weight: enough"), "{error}");
    assert!(hidden(&model) == before);
}
