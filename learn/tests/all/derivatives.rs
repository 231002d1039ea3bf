//! Sub-layers of every family: what they give out is what the decoder gives out, and derivatives are those of differences.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use llmpress_formats::{Checkpoint, QuantizeSite, Transform};
use llmpress_learn::{Block, Given, Gradients, Kept, Net};
use llmpress_model::{Model, Observer, Panels, Skips, SubLayer};
use llmpress_numbers::Numbers;

/// Every dense one, and each form of rotary embedding, window, norm and bias that differs in its derivative.
const FAMILIES: [&str; 19] = [
    "llama",
    "llama_bias",
    "llama_head_dim",
    "llama_yarn",
    "mistral",
    "qwen2",
    "qwen2_sliding",
    "qwen3",
    "gemma3_text",
    "phi3",
    "phi3_longrope",
    "llama3_rope",
    "smollm3",
    "smollm3_sliding",
    "granite",
    "glm4",
    "olmo2",
    "olmo3",
    "gemma2",
];

fn golden(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/golden").join(family)
}

fn open(family: &str) -> Model {
    Model::open(Arc::new(Checkpoint::open(&golden(family)).unwrap())).unwrap()
}

/// What comes in and out of each sub-layer, and what was added.
#[derive(Default)]
struct Record(Vec<(SubLayer, Panels, Panels)>);

impl Observer for Record {
    fn before(&mut self, site: SubLayer, residual: &Panels) {
        self.0.push((site, residual.clone(), Panels::default()));
    }

    fn after(&mut self, _site: SubLayer, residual: &Panels) {
        let (_, before, added) = self.0.last_mut().unwrap();
        *added = residual.clone();
        added.data_mut().iter_mut().zip(before.data()).for_each(|(y, x)| *y -= x);
    }
}

fn record(model: &Model, tokens: usize) -> Record {
    let vocab = model.vocab_size();
    let ids: Vec<u32> = (0..tokens).map(|i| ((i * i * 7 + i * 3) % vocab) as u32).collect();
    let mut record = Record::default();
    let mut cache = model.cache(tokens);
    cache.announce(tokens);
    model.hidden(&ids, &mut cache, &Skips::new(), &mut record).unwrap();
    record
}

fn weights(model: &Model, net: &Net) -> Vec<Vec<f32>> {
    net.tensors().iter().map(|tensor| model.weights(tensor).unwrap()).collect()
}

fn slices(weights: &[Vec<f32>]) -> Vec<&[f32]> {
    weights.iter().map(Vec::as_slice).collect()
}

#[test]
fn sub_layers_of_every_family_give_out_what_the_decoder_does() {
    for family in FAMILIES {
        let model = open(family);
        // Two panels, and three: the last of a single token.
        for tokens in [60, 97] {
            let mut kept = Kept::default();
            for (site, residual, added) in record(&model, tokens).0 {
                let net = Net::new(&model, site).unwrap();
                let weights = weights(&model, &net);
                let mut y = Panels::default();
                net.forward(Given::of(&slices(&weights)), &residual, &mut kept, &mut y).unwrap();
                let largest = added.data().iter().fold(0f32, |a, b| a.max(b.abs()));
                let worst = y.data().iter().zip(added.data()).fold(0f32, |w, (a, b)| w.max((a - b).abs()));
                // What was added was taken from a difference of streams, which rounds.
                let rounded = residual.data().iter().fold(0f32, |a, b| a.max(b.abs())) * f32::EPSILON;
                assert!(worst <= 1e-5 * largest + rounded, "{family} {site:?}: {worst} of {largest}");
            }
        }
    }
}

#[test]
fn inputs_that_are_quantised_are_what_the_decoder_multiplies() {
    for (family, bits) in [("llama", 8), ("phi3", 4), ("gemma3_text", 6)] {
        let mut model = open(family);
        for tensor in model.inputs_of(0).into_iter().flat_map(|input| input.tensors) {
            let weights = model.weights(&tensor).unwrap();
            model.replace_quantised(&tensor, weights, Some(bits)).unwrap();
        }
        for (site, residual, added) in record(&model, 60).0.into_iter().take(2) {
            let net = Net::new(&model, site).unwrap();
            let (mut kept, mut y) = (Kept::default(), Panels::default());
            let weights = weights(&model, &net);
            net.forward(Given::of(&slices(&weights)), &residual, &mut kept, &mut y).unwrap();
            let largest = added.data().iter().fold(0f32, |a, b| a.max(b.abs()));
            let worst = y.data().iter().zip(added.data()).fold(0f32, |w, (a, b)| w.max((a - b).abs()));
            let rounded = residual.data().iter().fold(0f32, |a, b| a.max(b.abs())) * f32::EPSILON;
            assert!(worst <= 1e-5 * largest + rounded, "{family} {site:?}: {worst} of {largest}");
            let mut spoilt = residual.clone();
            spoilt.set(0, 3, f32::NAN);
            let error = net
                .forward(Given::of(&slices(&weights)), &spoilt, &mut kept, &mut y)
                .unwrap_err()
                .to_string();
            assert!(error.contains(&net.tensors()[0]), "{error}");
        }
    }
}

#[test]
fn quantised_heads_and_caches_are_what_the_decoder_attends_to() {
    let of = |site, bits| Transform::Quantize { site, bits };
    let (qkv, cache) = (|bits| of(QuantizeSite::Qkv, bits), |bits| of(QuantizeSite::Cache, bits));
    for (family, list) in [
        ("llama", vec![cache(4)]),
        ("phi3", vec![qkv(6)]),
        ("qwen3", vec![qkv(8), cache(4)]),
        ("gemma3_text", vec![cache(8)]),
    ] {
        let mut model = open(family);
        model.transform(list).unwrap();
        let attentions =
            record(&model, 60).0.into_iter().filter(|(site, ..)| matches!(site, SubLayer::Attention(_)));
        for (site, residual, added) in attentions {
            let net = Net::new(&model, site).unwrap();
            let (mut kept, mut y) = (Kept::default(), Panels::default());
            let weights = weights(&model, &net);
            net.forward(Given::of(&slices(&weights)), &residual, &mut kept, &mut y).unwrap();
            let largest = added.data().iter().fold(0f32, |a, b| a.max(b.abs()));
            let worst = y.data().iter().zip(added.data()).fold(0f32, |w, (a, b)| w.max((a - b).abs()));
            let rounded = residual.data().iter().fold(0f32, |a, b| a.max(b.abs())) * f32::EPSILON;
            assert!(worst <= 1e-5 * largest + rounded, "{family} {site:?}: {worst} of {largest}");
        }
    }
}

#[test]
fn experts_have_no_net_and_their_attention_has() {
    for family in ["mixtral", "qwen3_moe"] {
        let model = open(family);
        assert!(Net::new(&model, SubLayer::Mlp(0)).is_none());
        assert!(Net::new(&model, SubLayer::Attention(0)).is_some());
    }
}

fn zeros(weights: &[Vec<f32>]) -> Gradients {
    Gradients::zeros(weights.iter().map(Vec::len))
}

/// A loss that weighs every value that comes out differently, in double precision.
fn loss(net: &Net, weights: &[Vec<f32>], residual: &Panels, by: &Panels) -> f64 {
    let (mut kept, mut y) = (Kept::default(), Panels::default());
    net.forward(Given::of(&slices(weights)), residual, &mut kept, &mut y).unwrap();
    y.data().iter().zip(by.data()).map(|(y, by)| f64::from(*y) * f64::from(*by)).sum()
}

#[test]
fn derivatives_by_every_matrix_are_those_of_differences() {
    for family in FAMILIES {
        let model = open(family);
        for (site, residual, added) in record(&model, 52).0.into_iter().take(2) {
            let net = Net::new(&model, site).unwrap();
            let mut weights = weights(&model, &net);
            let mut numbers = Numbers::new(5);
            let mut by = added.clone();
            by.data_mut().iter_mut().for_each(|x| *x = numbers.float());
            let (mut kept, mut y) = (Kept::default(), Panels::default());
            net.forward(Given::of(&slices(&weights)), &residual, &mut kept, &mut y).unwrap();
            let mut gradients = zeros(&weights);
            let back = (&mut by.clone(), &[][..]);
            net.backward(Given::of(&slices(&weights)), &residual, &mut kept, back, &mut gradients, None);
            for (matrix, gradient) in gradients.matrices.iter().enumerate() {
                let name = &net.tensors()[matrix];
                assert!(gradient.iter().any(|g| *g != 0.0), "{family} {name} gets none");
                // Along directions by chance, each over all weights of the matrix.
                for _ in 0..3 {
                    let direction: Vec<f32> = gradient.iter().map(|_| numbers.float()).collect();
                    let along: f64 =
                        gradient.iter().zip(&direction).map(|(g, d)| f64::from(*g) * f64::from(*d)).sum();
                    let size: f64 =
                        gradient.iter().map(|g| f64::from(*g) * f64::from(*g)).sum::<f64>().sqrt();
                    let start = weights[matrix].clone();
                    let mut at = |step: f32| {
                        let moved = start.iter().zip(&direction).map(|(w, d)| w + step * d);
                        weights[matrix] = moved.collect();
                        loss(&net, &weights, &residual, &by)
                    };
                    let h = 2e-4;
                    // Of the fourth order in the step.
                    let found =
                        (8.0 * (at(h) - at(-h)) - (at(2.0 * h) - at(-2.0 * h))) / (12.0 * f64::from(h));
                    weights[matrix] = start;
                    assert!(
                        (found - along).abs() <= 0.02 * size + 1e-6,
                        "{family} {name}: {found} {along} of {size}"
                    );
                }
            }
        }
    }
}

#[test]
fn derivatives_have_the_same_bits_on_any_number_of_threads() {
    for family in ["llama", "gemma3_text"] {
        let model = open(family);
        for (site, residual, added) in record(&model, 110).0.into_iter().take(2) {
            let net = Net::new(&model, site).unwrap();
            let weights = weights(&model, &net);
            let weights_of = slices(&weights);
            let on = |threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| {
                    let (mut kept, mut y) = (Kept::default(), Panels::default());
                    net.forward(Given::of(&slices(&weights)), &residual, &mut kept, &mut y).unwrap();
                    let (mut gradients, mut dx) = (zeros(&weights), Panels::default());
                    gradients.norm = vec![0.0; net.norm().len()];
                    gradients.value_bias = vec![0.0; net.value_bias().map_or(0, <[f32]>::len)];
                    let back = (&mut added.clone(), &[][..]);
                    let given = Given::of(&weights_of);
                    net.backward(given, &residual, &mut kept, back, &mut gradients, Some(&mut dx));
                    (y, gradients, dx)
                })
            };
            let one = on(1);
            assert!(one == on(2) && one == on(5), "{family}");
        }
    }
}

/// The slope of a function along a direction, of the fourth order in the step.
fn slope(at: &mut dyn FnMut(f32) -> f64) -> f64 {
    let h = 2e-4;
    (8.0 * (at(h) - at(-h)) - (at(2.0 * h) - at(-2.0 * h))) / (12.0 * f64::from(h))
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

fn moved(x: &[f32], by: &[f32], step: f32) -> Vec<f32> {
    x.iter().zip(by).map(|(x, by)| x + step * by).collect()
}

#[test]
fn derivatives_by_norm_bias_and_stream_are_those_of_differences() {
    for family in FAMILIES {
        let model = open(family);
        for (site, residual, added) in record(&model, 52).0.into_iter().take(2) {
            let net = Net::new(&model, site).unwrap();
            let weights = weights(&model, &net);
            let weights = slices(&weights);
            let mut numbers = Numbers::new(6);
            let mut by = added.clone();
            by.data_mut().iter_mut().for_each(|x| *x = numbers.float());
            let of = |norm: &[f32], bias: Option<&[f32]>, residual: &Panels| -> f64 {
                let (mut kept, mut y) = (Kept::default(), Panels::default());
                let given = Given { norm: Some(norm), value_bias: bias, ..Given::of(&weights) };
                net.forward(given, residual, &mut kept, &mut y).unwrap();
                dot(y.data(), by.data())
            };
            let (mut kept, mut y, mut dx) = (Kept::default(), Panels::default(), Panels::default());
            net.forward(Given::of(&weights), &residual, &mut kept, &mut y).unwrap();
            let mut gradients = Gradients::zeros(weights.iter().map(|w| w.len()));
            gradients.norm = vec![0.0; net.norm().len()];
            let bias = net.value_bias().map(<[f32]>::to_vec);
            gradients.value_bias = vec![0.0; bias.as_ref().map_or(0, Vec::len)];
            let back = (&mut by.clone(), &[][..]);
            net.backward(Given::of(&weights), &residual, &mut kept, back, &mut gradients, Some(&mut dx));
            let mut check = |what: &str, gradient: &[f32], at: &dyn Fn(&[f32], f32) -> f64| {
                assert!(gradient.iter().any(|g| *g != 0.0), "{family} {site:?} {what} gets none");
                let direction: Vec<f32> = gradient.iter().map(|_| numbers.float()).collect();
                let found = slope(&mut |step| at(&direction, step));
                let (along, size) = (dot(gradient, &direction), dot(gradient, gradient).sqrt());
                assert!(
                    (found - along).abs() <= 0.02 * size + 1e-6,
                    "{family} {site:?} {what}: {found} {along} of {size}"
                );
            };
            if !net.norm().is_empty() {
                check("norm", &gradients.norm, &|d, h| {
                    of(&moved(net.norm(), d, h), bias.as_deref(), &residual)
                });
            }
            check("stream", dx.data(), &|d, h| {
                let mut stream = residual.clone();
                stream.data_mut().copy_from_slice(&moved(residual.data(), d, h));
                of(net.norm(), bias.as_deref(), &stream)
            });
            if let Some(bias) = &bias {
                check("bias", &gradients.value_bias, &|d, h| {
                    of(net.norm(), Some(&moved(bias, d, h)), &residual)
                });
            }
        }
    }
}

#[test]
fn a_block_gives_out_what_the_decoder_does() {
    for family in FAMILIES {
        let model = open(family);
        let record = record(&model, 60).0;
        let block = Block::new(&model, 0).unwrap();
        let weights = block.parts().map(|net| weights(&model, net.unwrap()));
        let weights = weights.each_ref().map(|all| slices(all));
        let given = weights.each_ref().map(|all| Given::of(all));
        let (mut room, mut y) = (Default::default(), Panels::default());
        block.forward(given, &record[0].1, &mut room, &mut y).unwrap();
        let largest = y.data().iter().fold(0f32, |a, b| a.max(b.abs()));
        let after = &record[2].1;
        let worst = y.data().iter().zip(after.data()).fold(0f32, |w, (a, b)| w.max((a - b).abs()));
        assert!(worst <= 1e-5 * largest, "{family}: {worst} of {largest}");
    }
}
