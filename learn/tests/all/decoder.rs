//! The whole decoder: what it gives out is what the model gives out, and derivatives of a distilled loss are those of differences.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use llmpress_formats::{Checkpoint, Rotation, RotationSite, ScaleSite, Scales, Transform};
use llmpress_kernels::cpu::Hadamard;
use llmpress_learn::{Decoder, DecoderGradients, DecoderKept, Distillation, Given, Head, HeadRoom, Turned};
use llmpress_model::{MlpConfig, Model, Panels, Skips, Unobserved};
use llmpress_numbers::Numbers;

/// Every dense one, and each form of rotary embedding, window, norm and bias that differs in its derivative.
const FAMILIES: [&str; 18] = [
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
    "granite",
    "glm4",
    "olmo2",
    "olmo3",
    "gemma2",
];

fn open(family: &str) -> Model {
    let dir: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/golden").join(family);
    Model::open(Arc::new(Checkpoint::open(&dir).unwrap())).unwrap()
}

/// Those whose residual stream can be turned, each with every other part that an architecture may have then.
const TURNED: [&str; 5] = ["llama", "qwen2", "qwen3", "phi3", "mistral"];

/// A model with R1, R2 and R4 folded into its layers.
fn turned(family: &str) -> Model {
    let mut model = open(family);
    let rotation = |site, size: usize, seed| {
        let factors = Hadamard::new(size, None).unwrap().factors().to_vec();
        Transform::Rotation { site, rotation: Rotation { size: size as u32, factors, seed: Some(seed) } }
    };
    let mut list = Vec::new();
    for layer in 0..model.config().layers.len() {
        let sites = [ScaleSite::AttentionNorm, ScaleSite::MlpNorm].into_iter().zip(model.norms(layer));
        for (site, norm) in sites {
            list.extend(norm.map(|norm| Transform::Scale { site, layer, scales: Scales::new(norm) }));
        }
    }
    let MlpConfig::Dense { intermediate } = model.config().layers[0].mlp else {
        panic!("{family} has experts")
    };
    list.push(rotation(RotationSite::Residual, model.config().hidden_size, 1));
    list.push(rotation(RotationSite::Value, model.config().head_dim, 2));
    list.push(rotation(RotationSite::Down, intermediate, 3));
    model.transform(list).unwrap();
    (0..model.config().layers.len()).for_each(|layer| model.fold_layer(layer).unwrap());
    assert!(model.outlet().turn.is_some());
    model
}

/// Every family, and turned ones.
fn models() -> impl Iterator<Item = (String, Model)> {
    let plain = FAMILIES.into_iter().map(|family| (family.to_owned(), open(family)));
    plain.chain(TURNED.into_iter().map(|family| (format!("{family}, turned"), turned(family))))
}

fn ids(model: &Model, tokens: usize, by: usize) -> Vec<u32> {
    (0..tokens).map(|i| ((i * i * 7 + i * by) % model.vocab_size()) as u32).collect()
}

fn hidden(model: &Model, ids: &[u32]) -> Panels {
    let mut cache = model.cache(ids.len());
    cache.announce(ids.len());
    model.hidden(ids, &mut cache, &Skips::new(), &mut Unobserved).unwrap()
}

/// Weights of all matrices, norms, and the last norm.
#[derive(Clone)]
struct Weights {
    matrices: Vec<Vec<Vec<f32>>>,
    norms: Vec<Vec<f32>>,
    last: Vec<f32>,
}

impl Weights {
    fn of(model: &Model, decoder: &Decoder) -> Self {
        let of = |tensor: &String| model.weights(tensor).unwrap();
        Self {
            matrices: decoder.nets().iter().map(|net| net.tensors().iter().map(of).collect()).collect(),
            norms: decoder.nets().iter().map(|net| net.norm().to_vec()).collect(),
            last: decoder.last_norm().1.to_vec(),
        }
    }

    fn with<T>(&self, turned: Option<&[Turned]>, then: impl FnOnce(&[Given<'_>], &[f32]) -> T) -> T {
        let slices: Vec<Vec<&[f32]>> =
            self.matrices.iter().map(|all| all.iter().map(Vec::as_slice).collect()).collect();
        let given: Vec<Given<'_>> = slices
            .iter()
            .zip(&self.norms)
            .enumerate()
            .map(|(at, (matrices, norm))| Given {
                norm: Some(norm),
                turned: turned.map(|turned| &turned[at]),
                ..Given::of(matrices)
            })
            .collect();
        then(&given, &self.last)
    }
}

fn run(
    (model, decoder, head): (&Model, &Decoder, &Head),
    weights: &Weights,
    (teacher, ids, labels): (&Panels, &[u32], &[u32]),
    gradients: Option<(&mut DecoderGradients, Option<&[Turned]>)>,
) -> f64 {
    let (mut kept, mut room, mut d) = (DecoderKept::default(), HeadRoom::default(), Panels::default());
    let how = Distillation { kd: 0.6, tokens: ids.len() };
    let turned = gradients.as_ref().and_then(|(_, turned)| *turned);
    weights.with(turned, |given, last| {
        decoder.forward(model, (given, Some(last)), ids, &mut kept).unwrap();
        let loss = head.distil(Some(teacher), kept.hidden(), labels, how, &mut room, &mut d).unwrap();
        if let Some((gradients, _)) = gradients {
            decoder.backward((given, Some(last)), &d, &mut kept, gradients);
        }
        loss.mean(how.kd)
    })
}

#[test]
fn logits_of_every_family_are_those_of_the_model() {
    for (family, model) in models() {
        let decoder = Decoder::new(&model).unwrap();
        let weights = Weights::of(&model, &decoder);
        let mut kept = DecoderKept::default();
        for tokens in [1, 60, 97] {
            let ids = ids(&model, tokens, 3);
            let exact = model.logits(&hidden(&model, &ids)).unwrap();
            weights.with(None, |given, last| {
                decoder.forward(&model, (given, Some(last)), &ids, &mut kept).unwrap();
            });
            let found = model.logits(kept.hidden()).unwrap();
            let worst =
                found.data().iter().zip(exact.data()).fold(0f32, |worst, (a, b)| worst.max((a - b).abs()));
            assert!(worst <= 1e-4, "{family}: {worst}");
        }
    }
}

#[test]
fn derivatives_of_the_distilled_loss_are_those_of_differences() {
    for (family, model) in models() {
        let decoder = Decoder::new(&model).unwrap();
        let head = Head::new(&model).unwrap();
        let mut weights = Weights::of(&model, &decoder);
        let (ids, labels) = (ids(&model, 50, 3), ids(&model, 50, 5));
        let teacher = hidden(&model, &ids);
        let mut numbers = Numbers::new(3);
        // Away from the teacher, whose divergence has no slope at itself.
        for w in weights.matrices.iter_mut().flatten().flatten() {
            *w *= 1.0 + 0.3 * numbers.float();
        }
        let of = (&model, &decoder, &head);
        let text = (&teacher, &ids[..], &labels[..]);
        let mut gradients = decoder.gradients();
        run(of, &weights, text, Some((&mut gradients, None)));
        let mut turned = vec![Turned::default(); decoder.nets().len()];
        for ((net, matrices), turned) in decoder.nets().iter().zip(&weights.matrices).zip(&mut turned) {
            net.turn(&matrices.iter().map(Vec::as_slice).collect::<Vec<_>>(), turned);
        }
        let mut again = decoder.gradients();
        run(of, &weights, text, Some((&mut again, Some(&turned))));
        assert!(again == gradients, "{family}: turned beforehand it is the same");

        let mut check = |what: &str, gradient: &[f32], place: &dyn Fn(&mut Weights) -> &mut Vec<f32>| {
            assert!(gradient.iter().any(|g| *g != 0.0), "{family} {what} gets none");
            let direction: Vec<f32> = gradient.iter().map(|_| numbers.float()).collect();
            let start = place(&mut weights).clone();
            let mut at = |step: f32| {
                *place(&mut weights) = start.iter().zip(&direction).map(|(w, d)| w + step * d).collect();
                run(of, &weights, text, None)
            };
            let h = 1e-3f32;
            let found = (8.0 * (at(h) - at(-h)) - (at(2.0 * h) - at(-2.0 * h))) / (12.0 * f64::from(h));
            *place(&mut weights) = start;
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
            let (along, size) = (dot(gradient, &direction), dot(gradient, gradient).sqrt());
            assert!(
                (found - along).abs() <= 0.03 * size + 2e-5,
                "{family} {what}: {found} {along} of {size}"
            );
        };
        for (at, net) in gradients.sub_layers.iter().enumerate() {
            for (matrix, gradient) in net.matrices.iter().enumerate() {
                check(&format!("{at} {matrix}"), gradient, &|w| &mut w.matrices[at][matrix]);
            }
            if !net.norm.is_empty() {
                check(&format!("{at} norm"), &net.norm, &|w| &mut w.norms[at]);
            }
        }
        check("last norm", &gradients.norm, &|w| &mut w.last);
    }
}

#[test]
fn the_loss_is_that_of_its_definition_whatever_is_in_memory_at_a_time() {
    let model = open("llama");
    let ids = ids(&model, 110, 3);
    let labels = self::ids(&model, 110, 5);
    let teacher = hidden(&model, &ids);
    let mut student = teacher.clone();
    let mut numbers = Numbers::new(9);
    student.data_mut().iter_mut().for_each(|x| *x += 0.4 * numbers.float());
    let (p, q) = (model.logits(&teacher).unwrap(), model.logits(&student).unwrap());
    let soft = |logits: &Panels, token: usize, by: f64| {
        let e: Vec<f64> = logits.token(token).map(|l| (f64::from(l) / by).exp()).collect();
        let sum: f64 = e.iter().sum();
        e.into_iter().map(|e| e / sum).collect::<Vec<f64>>()
    };
    let kl = |token: usize, by: f64| {
        let (p, q) = (soft(&p, token, by), soft(&q, token, by));
        p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum::<f64>()
    };
    let nll = |logits: &Panels, token: usize| -soft(logits, token, 1.0)[labels[token] as usize].ln();
    let sum = |of: &dyn Fn(usize) -> f64| (0..ids.len()).map(of).sum::<f64>();
    let how = Distillation { kd: 0.6, tokens: 7 };
    let mut first: Option<(Panels, f64)> = None;
    for most in [1, 8 * model.vocab_size() * 48, 1 << 20] {
        let head = Head::new(&model).unwrap().within(most);
        let (mut room, mut d) = (HeadRoom::default(), Panels::default());
        let loss = head.distil(Some(&teacher), &student, &labels, how, &mut room, &mut d).unwrap();
        let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-3 * (1.0 + b.abs()), "{a} {b}");
        close(loss.divergence, 4.0 * sum(&|token| kl(token, 2.0)));
        close(loss.likelihood, sum(&|token| nll(&q, token)));
        let measured = head.measure(&teacher, &student, &labels, &mut room).unwrap();
        close(measured.divergence, sum(&|token| kl(token, 1.0)));
        close(measured.likelihood, sum(&|token| nll(&q, token)));
        close(measured.of_teacher, sum(&|token| nll(&p, token)));
        let (was, of) = first.get_or_insert_with(|| (d.clone(), loss.divergence));
        assert!(*was == d && *of == loss.divergence, "{most}");
        // Without a teacher it is the likelihood alone.
        let alone = Distillation { kd: 0.0, ..how };
        let mut by_labels = Panels::default();
        let plain = head.distil(None, &student, &labels, alone, &mut room, &mut by_labels).unwrap();
        assert!(plain.divergence == 0.0 && plain.likelihood == loss.likelihood);
        let mut other = Panels::default();
        head.distil(Some(&teacher), &student, &labels, alone, &mut room, &mut other).unwrap();
        let worst = other.data().iter().zip(by_labels.data()).fold(0f32, |w, (a, b)| w.max((a - b).abs()));
        assert!(worst < 1e-6, "{worst}");
    }
    let head = Head::new(&model).unwrap();
    let (mut room, mut d) = (HeadRoom::default(), Panels::default());
    let mut beyond = labels.clone();
    beyond[3] = model.vocab_size() as u32;
    let error = head.distil(None, &student, &beyond, how, &mut room, &mut d).unwrap_err().to_string();
    assert!(error.contains("beyond the vocabulary"), "{error}");
    assert!(head.distil(None, &student, &labels[1..], how, &mut room, &mut d).is_err());
}

#[test]
fn families_with_parts_without_derivatives_are_refused_by_name() {
    for family in
        ["cohere2", "starcoder2", "gpt2", "gpt_oss", "deepseek_v3", "qwen3_next", "qwen3_5", "llama4"]
    {
        let model = open(family);
        let name = model.config().blueprint.name;
        let error = Decoder::new(&model).unwrap_err().to_string();
        assert!(error.contains(&format!("a {name} model")) && error.contains("no derivative"), "{error}");
        assert!(model.sub_layers().into_iter().all(|site| llmpress_learn::Net::new(&model, site).is_none()));
    }
}

#[test]
fn what_cannot_be_trained_with_the_rest_is_refused_by_name() {
    for family in ["mixtral", "qwen3_moe"] {
        let error = Decoder::new(&open(family)).unwrap_err().to_string();
        assert!(error.contains("Mlp(0)") && error.contains("experts"), "{error}");
    }
}
