//! Streams of every family: what passes layer by layer is what passes in one go.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use llmpress_calibrate::{Calibration, Cut, Extent, Moments, Room, Streams};
use llmpress_formats::Checkpoint;
use llmpress_model::{Model, Observer, Panels, Skips, SubLayer, Unobserved};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/golden")
}

fn families() -> Vec<PathBuf> {
    let mut dirs: Vec<PathBuf> = std::fs::read_dir(golden()).unwrap().map(|e| e.unwrap().path()).collect();
    dirs.retain(|dir| dir.join("model.safetensors").exists());
    // Calibrated passes refuse the others by name.
    dirs.retain(|dir| {
        let blueprint = open(dir).config().blueprint;
        !blueprint.parallel && !blueprint.transposed
    });
    dirs.sort();
    assert!(dirs.len() > 10, "{dirs:?}");
    dirs
}

fn open(dir: &Path) -> Model {
    Model::open(Arc::new(Checkpoint::open(dir).unwrap())).unwrap()
}

fn calibration(model: &Model) -> Calibration {
    let ids: Vec<u32> = (0..60).map(|i| (i * i * 7 + i) % model.vocab_size() as u32).collect();
    Calibration::new(&ids, Cut { windows: 3, length: 20, seed: None }, None).unwrap()
}

fn in_memory() -> Room {
    Room { memory: u64::MAX, file: PathBuf::from("never written") }
}

/// Gathers what every linear sees of a whole pass.
#[derive(Default)]
struct All(BTreeMap<String, Moments>);

impl Observer for All {
    fn linear_input(&mut self, weight: &str, input: &Panels) {
        let new = || Moments::new(input.features(), Extent::Full).unwrap();
        self.0.entry(weight.to_owned()).or_insert_with(new).add(input).unwrap();
    }
}

#[test]
fn layers_one_by_one_give_what_a_whole_pass_gives() {
    for dir in families() {
        let model = open(&dir);
        let calibration = calibration(&model);
        let mut all = All::default();
        let mut expected = Vec::new();
        for ids in calibration.windows() {
            let mut cache = model.cache(ids.len());
            cache.announce(ids.len());
            expected.push(model.hidden(ids, &mut cache, &Skips::new(), &mut all).unwrap());
        }
        let mut streams = Streams::embed(&model, &calibration, &in_memory()).unwrap();
        let mut seen = 0;
        for site in model.sub_layers() {
            let (SubLayer::Attention(layer) | SubLayer::Mlp(layer)) = site;
            for input in model.inputs_of(layer).iter().filter(|input| input.sub_layer == site) {
                let extents = [(input.into(), Extent::Full)];
                let moments = streams.moments(&model, &extents, &mut || ()).unwrap().pop().unwrap();
                for tensor in &input.tensors {
                    // An expert may have seen none.
                    let Some(of_all) = all.0.get(tensor) else {
                        assert_eq!(moments.tokens(), 0, "{tensor}");
                        continue;
                    };
                    assert_eq!(moments, of_all.clone().close(), "{}: {tensor}", dir.display());
                    seen += 1;
                }
            }
            streams.advance(&model, site, &mut || ()).unwrap();
        }
        assert!(seen >= 4 * model.config().layers.len(), "{}", dir.display());
        let mut stream = Panels::default();
        for (window, expected) in expected.iter().enumerate() {
            streams.get(window, &mut stream).unwrap();
            assert!(model.last_norm(&stream).unwrap() == *expected, "{}", dir.display());
        }
    }
}

#[test]
fn streams_in_a_file_and_saved_ones_are_those_in_memory() {
    let model = open(&golden().join("llama"));
    let calibration = calibration(&model);
    let dir = tempfile::tempdir().unwrap();
    let on_disk = Room { memory: 0, file: dir.path().join("streams") };
    let mut memory = Streams::embed(&model, &calibration, &in_memory()).unwrap();
    let mut file = Streams::embed(&model, &calibration, &on_disk).unwrap();
    assert!(memory.memory() > 0 && file.memory() == 0 && on_disk.file.exists());
    for site in [SubLayer::Attention(0), SubLayer::Mlp(0)] {
        memory.advance(&model, site, &mut || ()).unwrap();
        file.advance(&model, site, &mut || ()).unwrap();
    }
    let (mut a, mut b) = (Vec::new(), Vec::new());
    memory.save(&mut a, Path::new("a")).unwrap();
    file.save(&mut b, Path::new("b")).unwrap();
    assert!(a == b && a.len() as u64 == memory.memory());
    let load = |bytes: &[u8], room| {
        let mut from = bytes;
        Streams::load(&model, &calibration, room, &mut from, Path::new("saved"))
    };
    drop(file);
    assert!(!on_disk.file.exists(), "the file goes with the streams");
    let in_memory = in_memory();
    for room in [&in_memory, &on_disk] {
        let mut again = Vec::new();
        load(&a, room).unwrap().save(&mut again, Path::new("c")).unwrap();
        assert!(again == a);
    }
    let short = load(&a[..a.len() - 1], &in_memory).unwrap_err();
    assert!(short.to_string().contains("saved"), "{short}");
    let missing = Room { memory: 0, file: dir.path().join("none/streams") };
    assert!(Streams::embed(&model, &calibration, &missing).unwrap_err().to_string().contains("none"));
}

#[test]
fn activations_that_are_not_finite_name_the_linear_and_the_window() {
    let mut model = open(&golden().join("llama"));
    let calibration = calibration(&model);
    let mut streams = Streams::embed(&model, &calibration, &in_memory()).unwrap();
    let inputs = model.inputs_of(0);
    let heads = &inputs[1];
    let values = &inputs[0].tensors[2];
    let mut weights = model.weights(values).unwrap();
    weights[5] = f32::INFINITY;
    model.replace(values, weights).unwrap();
    let error =
        streams.moments(&model, &[(heads.into(), Extent::Diagonal)], &mut || ()).unwrap_err().to_string();
    assert!(error.contains("layers.0.self_attn.o_proj.weight") && error.contains("window 0"), "{error}");
    model.restore(values).unwrap();
    streams.moments(&model, &[(heads.into(), Extent::Diagonal)], &mut || ()).unwrap();
}

#[test]
fn replaced_weights_are_those_of_the_product_and_go_again() {
    for dir in families() {
        let mut model = open(&dir);
        let ids: Vec<u32> = (0..9).collect();
        let hidden =
            |model: &Model| model.hidden(&ids, &mut model.cache(9), &Skips::new(), &mut Unobserved).unwrap();
        let before = hidden(&model);
        let tensors: Vec<String> = (0..model.config().layers.len())
            .flat_map(|l| model.inputs_of(l))
            .flat_map(|i| i.tensors)
            .collect();
        for tensor in &tensors {
            let own = model.weights(tensor).unwrap();
            model.replace(tensor, own.clone()).unwrap();
            assert!(model.weights(tensor).unwrap() == own, "{tensor}");
        }
        assert!(hidden(&model) == before, "{}", dir.display());
        let first = &tensors[0];
        let zeros = vec![0.0; model.weights(first).unwrap().len()];
        model.replace(first, zeros.clone()).unwrap();
        assert!(hidden(&model) != before, "{}", dir.display());
        assert!(model.replace(first, vec![0.0; 3]).is_err());
        assert!(model.replace("lm_head.nothing", zeros).unwrap_err().to_string().contains("lm_head.nothing"));
        tensors.iter().for_each(|tensor| model.restore(tensor).unwrap());
        assert!(hidden(&model) == before);
    }
}

#[test]
fn moments_of_a_whole_layer_are_those_of_its_sub_layers() {
    for family in ["llama", "mixtral", "gemma3_text"] {
        let model = open(&golden().join(family));
        let mut streams = Streams::embed(&model, &calibration(&model), &in_memory()).unwrap();
        let inputs = model.inputs_of(0);
        let taps: Vec<_> = inputs.iter().map(|input| (input.into(), Extent::Full)).collect();
        let whole = streams.moments(&model, &taps, &mut || ()).unwrap();
        let mut singly = Vec::new();
        for site in [SubLayer::Attention(0), SubLayer::Mlp(0)] {
            let of_site = inputs.iter().filter(|input| input.sub_layer == site);
            let taps: Vec<_> = of_site.map(|input| (input.into(), Extent::Full)).collect();
            singly.extend(streams.moments(&model, &taps, &mut || ()).unwrap());
            streams.advance(&model, site, &mut || ()).unwrap();
        }
        assert!(whole == singly, "{family}");
        let other = model.inputs_of(1);
        let mixed = [(&inputs[0]).into(), (&other[0]).into()].map(|tap| (tap, Extent::Full));
        assert!(streams.moments(&model, &mixed, &mut || ()).unwrap_err().to_string().contains("one layer"));
    }
}
