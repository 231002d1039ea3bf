//! Transformed models: folds of every kind in every architecture leave what the model computes, whether they are folded in memory or
//! stored under a manifest, and can be undone.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::sync::Arc;

use crate::support::{all_goldens, goldens, logits, open, single, tensors, worst, write};
use llmpress_emulator::Emulator;
use llmpress_formats::{
    Checkpoint, Error, MANIFEST_FILE, Order, PermutationSite, QuantizeSite, Rotation, RotationSite,
    ScaleSite, Scales, Transform,
};
use llmpress_kernels::cpu::Hadamard;
use llmpress_kernels::gpu::Gpu;
use llmpress_model::{GpuModel, MlpConfig, Model, Skips, Unobserved, Weights, folded, undone};

/// What a logit may differ by, as a share of the largest one.
const TOLERANCE: f32 = 1e-4;
/// Versions of the format that keep a transformed checkpoint.
const GOLDEN_VERSIONS: [&str; 1] = ["1.2"];

fn rotation(site: RotationSite, size: usize, seed: Option<u32>) -> Transform {
    let factors = Hadamard::new(size, None).unwrap().factors().to_vec();
    Transform::Rotation { site, rotation: Rotation { size: size as u32, factors, seed } }
}

fn value(model: &Model) -> Transform {
    rotation(RotationSite::Value, model.config().head_dim, Some(5))
}

/// The inner sizes of its MLPs.
fn inner(model: &Model) -> Vec<usize> {
    let size = |mlp| match mlp {
        MlpConfig::Dense { intermediate }
        | MlpConfig::Plain { intermediate }
        | MlpConfig::Experts { intermediate, .. } => intermediate,
    };
    let mut sizes: Vec<usize> = model.config().layers.iter().map(|layer| size(layer.mlp)).collect();
    sizes.sort_unstable();
    sizes.dedup();
    sizes
}

fn down(model: &Model) -> Vec<Transform> {
    inner(model).into_iter().map(|size| rotation(RotationSite::Down, size, Some(3))).collect()
}

/// R1, after the norms' weights.
fn residual(model: &Model) -> Vec<Transform> {
    let mut list = Vec::new();
    for layer in 0..model.config().layers.len() {
        let [attention, mlp] = model.norms(layer);
        for (site, norm) in [(ScaleSite::AttentionNorm, attention), (ScaleSite::MlpNorm, mlp)] {
            list.extend(norm.map(|norm| Transform::Scale { site, layer, scales: Scales::new(norm) }));
        }
    }
    list.push(rotation(RotationSite::Residual, model.config().hidden_size, Some(1)));
    list
}

/// Scales from 1/4 to 4 in every layer.
fn scales(model: &Model, site: ScaleSite) -> Vec<Transform> {
    let c = model.config();
    let len = |layer: usize| match (site, c.layers[layer].mlp) {
        (ScaleSite::AttentionNorm | ScaleSite::MlpNorm, _) => c.hidden_size,
        (ScaleSite::Value, _) => c.kv_heads * c.head_dim,
        (ScaleSite::Up, MlpConfig::Dense { intermediate } | MlpConfig::Plain { intermediate }) => {
            intermediate
        }
        (ScaleSite::Up, MlpConfig::Experts { intermediate, count, .. }) => intermediate * count,
    };
    let scale = |layer: usize, i: usize| 2f32.powf(((i * 37 + layer * 11) % 17) as f32 / 4.0 - 2.0);
    let of = |layer| {
        let values: Vec<f32> = (0..len(layer)).map(|i| scale(layer, i)).collect();
        Transform::Scale { site, layer, scales: Scales::new(&values) }
    };
    (0..c.layers.len()).map(of).collect()
}

/// Another order in every layer; of experts each its own.
fn orders(model: &Model, site: PermutationSite) -> Vec<Transform> {
    let c = model.config();
    // Any stride that shares no factor with the size.
    let stirred = |n: usize, first: usize| {
        let stride =
            (n / 2..).find(|s| (2..=*s).all(|f| !s.is_multiple_of(f) || !n.is_multiple_of(f))).unwrap();
        (0..n).map(move |i| (first + (i * stride + 3) % n) as u32)
    };
    let of = |layer: usize| {
        let places: Vec<u32> = match (site, c.layers[layer].mlp) {
            (PermutationSite::Value, _) => {
                (0..c.kv_heads).flat_map(|head| stirred(c.head_dim, head * c.head_dim)).collect()
            }
            (
                PermutationSite::Down,
                MlpConfig::Dense { intermediate } | MlpConfig::Plain { intermediate },
            ) => stirred(intermediate, 0).collect(),
            (PermutationSite::Down, MlpConfig::Experts { intermediate, count, .. }) => {
                (0..count).flat_map(|_| stirred(intermediate, 0)).collect()
            }
        };
        Transform::Permutation { site, layer, order: Order::new(places) }
    };
    (0..c.layers.len()).map(of).collect()
}

/// Every kind alone.
fn kinds(model: &Model) -> Vec<(&'static str, Vec<Transform>)> {
    vec![
        ("attention_norm", scales(model, ScaleSite::AttentionNorm)),
        ("mlp_norm", scales(model, ScaleSite::MlpNorm)),
        ("value scales", scales(model, ScaleSite::Value)),
        ("up scales", scales(model, ScaleSite::Up)),
        ("order of values", orders(model, PermutationSite::Value)),
        ("order of inner features", orders(model, PermutationSite::Down)),
        ("R2", vec![value(model)]),
        ("R4", down(model)),
        ("R1", residual(model)),
    ]
}

/// Every kind alone that its family has, and all of them together.
fn lists(model: &Model) -> Vec<(&'static str, Vec<Transform>)> {
    let mut lists = kinds(model);
    lists.retain(|(_, list)| model.folds(list).is_ok());
    // R1 folds the norms' weights itself.
    let by_norms = |name: &str| ["attention_norm", "mlp_norm"].contains(&name);
    let all = lists.iter().filter(|(name, _)| !by_norms(name));
    let all: Vec<Transform> = all.flat_map(|(_, list)| list.clone()).collect();
    if !all.is_empty() {
        lists.push(("all", all));
    }
    lists
}

/// What a family does not have, by the beginning of its cases' names; all others have every kind.
const REFUSED: [(&str, &[&str]); 8] = [
    ("cohere2", &["attention_norm", "mlp_norm", "R1"]),
    ("gemma2", &["R1"]),
    ("gemma3", &["R1"]),
    ("glm4", &["R1"]),
    (
        "gpt2",
        &[
            "attention_norm",
            "mlp_norm",
            "value scales",
            "up scales",
            "order of values",
            "order of inner features",
            "R2",
            "R4",
            "R1",
        ],
    ),
    ("olmo2", &["attention_norm", "mlp_norm", "R1"]),
    ("olmo3", &["attention_norm", "mlp_norm", "R1"]),
    ("starcoder2", &["attention_norm", "mlp_norm", "up scales", "R1"]),
];

#[test]
fn what_a_family_cannot_fold_is_refused_by_its_name() {
    for golden in goldens() {
        let model = open(&golden);
        let case = golden.file_name().unwrap().to_string_lossy().into_owned();
        let expected =
            REFUSED.iter().find(|(family, _)| case.starts_with(family)).map_or(&[][..], |(_, all)| all);
        let mut refused = Vec::new();
        for (name, list) in kinds(&model) {
            let Err(error) = model.folds(&list) else { continue };
            assert!(matches!(error, Error::Unsupported { .. }), "{case} {name}: {error}");
            assert!(error.to_string().contains(model.config().blueprint.name), "{case} {name}: {error}");
            refused.push(name);
        }
        assert_eq!(refused, expected, "{case}");
    }
}

#[test]
fn every_fold_in_every_architecture_leaves_the_logits() {
    let (mut largest, mut runs) = (0f32, 0);
    for golden in goldens() {
        let dir = tempfile::tempdir().unwrap();
        let (plain, turned) = (dir.path().join("plain"), dir.path().join("turned"));
        let ids = single(&golden, &plain);
        let model = open(&plain);
        let expected = logits(&model, &ids);
        let originals = tensors(model.checkpoint());
        for (name, list) in lists(&model) {
            let case = format!("{} {name}", golden.file_name().unwrap().display());
            let close = |model: &Model, how: &str| {
                let worst = worst(&logits(model, &ids), &expected);
                assert!(worst <= TOLERANCE, "{case} {how}: {worst}");
                worst
            };
            // In memory, layer by layer.
            let mut in_memory = open(&plain);
            in_memory.transform(list.clone()).unwrap();
            (0..in_memory.config().layers.len()).for_each(|layer| in_memory.fold_layer(layer).unwrap());
            largest = largest.max(close(&in_memory, "in memory"));
            // Stored under a manifest.
            let folds = model.folds(&list).unwrap();
            let mut changed = originals.clone();
            for name in folds.tensors() {
                folds.apply(name, &mut changed.get_mut(name).unwrap().1).unwrap();
            }
            write(&turned, &plain, &changed, &list);
            let stored = open(&turned);
            assert_eq!(stored.transforms(), list);
            largest = largest.max(close(&stored, "stored"));
            assert!(logits(&stored, &ids) == logits(&in_memory, &ids), "{case}: the same bits either way");
            // Seen folded, with nothing written.
            let view = folded(Checkpoint::open(&plain).unwrap(), list.clone()).unwrap();
            assert_eq!(view.transforms(), list);
            assert!(tensors(&view) == changed, "{case}: the same bits in a view");
            let view = Model::open(Arc::new(view)).unwrap();
            assert!(logits(&view, &ids) == logits(&in_memory, &ids), "{case}: and from it");
            // Without the online operations it is another model.
            let online = list.iter().any(Transform::online);
            std::fs::remove_file(turned.join(MANIFEST_FILE)).unwrap();
            assert_eq!(
                worst(&logits(&open(&turned), &ids), &expected) > 0.01,
                online,
                "{case}: is what it does needed?"
            );
            // And back.
            write(&turned, &plain, &changed, &list);
            let back = undone(Checkpoint::open(&turned).unwrap()).unwrap();
            assert!(back.transforms().is_empty());
            let mut moved = 0;
            // Rounding errors of a turned row are divided by the least scale, which norms make small.
            let least = list.iter().filter_map(|t| match t {
                Transform::Scale { scales, .. } => Some(scales.values()),
                _ => None,
            });
            let least = least.flatten().map(f32::abs).filter(|s| *s > 0.0).fold(1.0, f32::min);
            let limit = 2e-6 / least;
            for (name, (_, values)) in tensors(&back) {
                let original = &originals[&name].1;
                let off = worst(&values, original);
                assert!(off < limit, "{case}: {name}: {off}");
                moved += usize::from(worst(&changed[&name].1, original) > 1e-3);
            }
            assert!(moved >= folds.tensors().count() / 2 && moved > 0, "{case}: the fold did something");
            let bits = logits(&Model::open(Arc::new(back)).unwrap(), &ids);
            assert!(worst(&bits, &expected) <= TOLERANCE, "{case} undone");
            runs += 1;
        }
    }
    println!("{runs} folds; the largest difference is {largest:e} of the largest logit");
    assert!(runs > 150);
}

#[test]
fn models_that_norm_their_outputs_refuse_a_turned_residual_stream_by_name() {
    let mut refused = 0;
    for golden in goldens() {
        let mut model = open(&golden);
        let list = vec![rotation(RotationSite::Residual, model.config().hidden_size, None)];
        if !model.config().post_norms() {
            continue;
        }
        let error = model.transform(list).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        for part in ["rotation of residual", model.config().blueprint.name, "value and down"] {
            assert!(error.to_string().contains(part), "{error}");
        }
        refused += 1;
    }
    assert_eq!(refused, 7);
}

#[test]
fn models_with_parts_of_their_own_refuse_transformations_by_name() {
    let mut refused = 0;
    for golden in all_goldens() {
        let mut model = open(&golden);
        let blueprint = model.config().blueprint;
        let Some(part) = blueprint.special() else { continue };
        for list in [vec![value(&model)], vec![cache(8)], vec![rotation(RotationSite::Residual, 32, None)]] {
            let error = model.transform(list).unwrap_err();
            assert!(matches!(error, Error::Unsupported { .. }), "{error}");
            for wanted in [blueprint.name, part, "without transformations"] {
                assert!(error.to_string().contains(wanted), "{error}");
            }
        }
        refused += 1;
    }
    assert!(refused > 0);
}

#[test]
fn a_turned_residual_stream_wants_norms_without_weights() {
    let golden = goldens().into_iter().find(|dir| dir.ends_with("llama")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    single(&golden, dir.path());
    let mut model = open(dir.path());
    let list = vec![rotation(RotationSite::Residual, model.config().hidden_size, None)];
    model.transform(list.clone()).unwrap();
    let in_memory = model.fold_layer(0).unwrap_err().to_string();
    let all = tensors(model.checkpoint());
    write(dir.path(), &golden, &all, &list);
    let stored = Model::open(Arc::new(Checkpoint::open(dir.path()).unwrap())).unwrap_err().to_string();
    for error in [in_memory, stored] {
        assert!(
            error.contains("layers.0.input_layernorm.weight") && error.contains("weights other than 1"),
            "{error}"
        );
    }
}

#[test]
fn transformations_of_another_model_are_refused() {
    let golden = goldens().into_iter().find(|dir| dir.ends_with("llama")).unwrap();
    let mut model = open(&golden);
    let scale = |site, layer, values: &[f32]| Transform::Scale { site, layer, scales: Scales::new(values) };
    let order =
        |site, layer, places: Vec<u32>| Transform::Permutation { site, layer, order: Order::new(places) };
    let value_order = |at: usize, place: u32| {
        let mut places: Vec<u32> = (0..16).collect();
        places[at] = place;
        order(PermutationSite::Value, 0, places)
    };
    for (transform, part) in [
        (order(PermutationSite::Value, 0, (0..15).collect()), "where value has 16"),
        (order(PermutationSite::Down, 0, (0..81).collect()), "where down has 80"),
        (order(PermutationSite::Down, 99, (0..80).collect()), "layer 99 is none of"),
        (order(PermutationSite::Down, 0, (1..81).collect()), "names each of 0 to 79 once"),
        (value_order(3, 2), "place 3 is filled from 2"),
        (value_order(3, u32::MAX), "names each of 0 to 7 once"),
        // Of another head.
        (value_order(3, 11), "place 3 is filled from 11"),
        (value_order(11, 3), "names each of 8 to 15 once"),
        (rotation(RotationSite::Residual, 64, None), "has 64 features where the residual stream has 48"),
        (rotation(RotationSite::Value, 16, None), "where a head has 8"),
        (rotation(RotationSite::Down, 96, None), "96 features, which no down projection has"),
        (scale(ScaleSite::AttentionNorm, 0, &[1.0; 47]), "47 features where the norm has 48"),
        (scale(ScaleSite::Value, 0, &[1.0; 48]), "where value has 16"),
        (scale(ScaleSite::Value, 0, &[0.0; 16]), "scale 0 is 0"),
        (scale(ScaleSite::Up, 0, &[1.0; 1]), "where up has 80"),
        (scale(ScaleSite::Up, 99, &[1.0; 80]), "layer 99 is none of"),
        (
            Transform::Rotation {
                site: RotationSite::Down,
                rotation: Rotation { size: 80, factors: vec![10], seed: None },
            },
            "order 10",
        ),
    ] {
        let error = model.transform(vec![transform.clone()]).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, Error::Corrupt { .. }), "{text}");
        assert!(text.contains(part) && text.contains(&transform.name()), "{text}");
        // In a manifest too.
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &golden, &tensors(model.checkpoint()), &[transform]);
        let stored = Model::open(Arc::new(Checkpoint::open(dir.path()).unwrap())).unwrap_err().to_string();
        assert!(stored.contains(part), "{stored}");
    }
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &golden, &tensors(model.checkpoint()), &[value(&model)]);
    let again = open(dir.path()).transform(vec![value(&model)]).unwrap_err().to_string();
    assert!(again.contains("has a rotation of value already"), "{again}");
}

#[test]
fn moments_of_the_plain_basis_serve_the_turned_one() {
    let golden = goldens().into_iter().find(|dir| dir.ends_with("llama_bias")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let ids = single(&golden, dir.path());
    let model = open(dir.path());
    let mut list = scales(&model, ScaleSite::Value);
    list.extend(scales(&model, ScaleSite::Up));
    list.extend(orders(&model, PermutationSite::Value));
    list.extend(orders(&model, PermutationSite::Down));
    list.push(value(&model));
    list.extend(down(&model));
    list.extend(residual(&model));
    let plain = moments(&model, &ids);
    let mut turned = open(dir.path());
    turned.transform(list.clone()).unwrap();
    (0..turned.config().layers.len()).for_each(|layer| turned.fold_layer(layer).unwrap());
    let after = moments(&turned, &ids);
    let folds = model.folds(&list).unwrap();
    let mut moved = 0;
    for (tensor, mut h) in plain {
        moved += usize::from(worst(&h, &after[&tensor]) > 0.1);
        folds.turn_moments(&tensor, &mut h).unwrap();
        assert!(worst(&h, &after[&tensor]) < 1e-4, "{tensor}: {}", worst(&h, &after[&tensor]));
    }
    assert_eq!(moved, after.len());
    assert!(folds.turn_moments("model.layers.0.mlp.down_proj.weight", &mut [0.0; 3]).is_err());
}

/// `sum of x x^T` of every linear's inputs.
fn moments(model: &Model, ids: &[u32]) -> std::collections::BTreeMap<String, Vec<f32>> {
    #[derive(Default)]
    struct All(std::collections::BTreeMap<String, Vec<f32>>);
    impl llmpress_model::Observer for All {
        fn linear_input(&mut self, weight: &str, x: &llmpress_model::Panels) {
            let n = x.features();
            let sums = self.0.entry(weight.to_owned()).or_insert_with(|| vec![0.0; n * n]);
            for token in 0..x.tokens() {
                let x: Vec<f32> = x.token(token).collect();
                for (i, a) in x.iter().enumerate() {
                    x.iter().enumerate().for_each(|(j, b)| sums[i * n + j] += a * b);
                }
            }
        }
    }
    let mut all = All::default();
    model.hidden(ids, &mut model.cache(ids.len()), &Skips::new(), &mut all).unwrap();
    all.0
}

#[test]
fn quantised_heads_come_nearer_with_more_bits_and_name_a_layer_that_goes_wrong() {
    for golden in goldens() {
        let dir = tempfile::tempdir().unwrap();
        let ids = single(&golden, dir.path());
        let mut model = open(dir.path());
        let expected = logits(&model, &ids);
        let mut errors = Vec::new();
        for bits in [2, 4, 8] {
            model.transform(vec![Transform::Quantize { site: QuantizeSite::Qkv, bits }]).unwrap();
            errors.push(worst(&logits(&model, &ids), &expected));
        }
        assert!(errors[2] > 0.0 && errors[2] < 0.1, "{}: {errors:?}", golden.display());
        assert!(errors[1] > errors[2] && errors[0] > errors[2], "{}: {errors:?}", golden.display());
    }
    let golden = goldens().into_iter().find(|dir| dir.ends_with("llama")).unwrap();
    let mut model = open(&golden);
    let tensor = "model.layers.1.self_attn.v_proj.weight";
    let mut weights = model.weights(tensor).unwrap();
    weights[0] = f32::NAN;
    model.replace(tensor, weights).unwrap();
    model.transform(vec![Transform::Quantize { site: QuantizeSite::Qkv, bits: 8 }]).unwrap();
    let mut cache = model.cache(4);
    let error = model.hidden(&[1, 2, 3], &mut cache, &Skips::new(), &mut Unobserved).unwrap_err().to_string();
    assert!(error.contains("value of layer 1") && error.contains("8 bits"), "{error}");
}

/// A list that has the cache hold so many bits, after others.
fn cache(bits: u8) -> Transform {
    Transform::Quantize { site: QuantizeSite::Cache, bits }
}

/// The last norm's states of some pieces, which follow each other.
fn states(model: &Model, pieces: &[&[u32]]) -> Vec<u32> {
    let length = pieces.iter().map(|piece| piece.len()).sum();
    let mut cache = model.cache(length);
    cache.announce(length);
    let mut all = Vec::new();
    for piece in pieces {
        let states = model.hidden(piece, &mut cache, &Skips::new(), &mut Unobserved).unwrap();
        all.extend(
            (0..piece.len()).flat_map(|token| states.token(token).map(f32::to_bits).collect::<Vec<_>>()),
        );
    }
    all
}

#[test]
fn a_quantised_cache_comes_near_in_every_architecture_however_a_sequence_is_cut() {
    for golden in goldens() {
        let dir = tempfile::tempdir().unwrap();
        let ids = single(&golden, dir.path());
        let mut model = open(dir.path());
        let expected = logits(&model, &ids);
        let mut errors = Vec::new();
        for bits in [4, 8] {
            model.transform(vec![cache(bits)]).unwrap();
            errors.push(worst(&logits(&model, &ids), &expected));
            // Products with one token add in another order than those with several, which an expert may get either of.
            let whole = states(&model, &[&ids]);
            let experts =
                model.config().layers.iter().any(|layer| matches!(layer.mlp, MlpConfig::Experts { .. }));
            for at in [3, ids.len() - 2] {
                let (first, rest) = ids.split_at(at);
                assert!(experts || states(&model, &[first, rest]) == whole, "{} {at}", golden.display());
            }
        }
        assert!(
            errors[1] > 0.0 && errors[1] < 0.1 && errors[0] > errors[1],
            "{}: {errors:?}",
            golden.display()
        );
    }
}

#[test]
fn a_quantised_cache_is_a_quarter_and_an_eighth_of_a_plain_one() {
    let golden = goldens().into_iter().find(|dir| dir.ends_with("llama")).unwrap();
    let mut model = open(&golden);
    let mut bytes = |transforms: Vec<Transform>| {
        model.transform(transforms).unwrap();
        let mut cache = model.cache(10);
        model.hidden(&[1, 2, 3], &mut cache, &Skips::new(), &mut Unobserved).unwrap();
        let c = model.config();
        let heads = 2 * c.kv_heads * c.layers.len();
        assert_eq!(cache.bytes(), 10 * model.cache_bytes_per_token());
        (cache.bytes() / heads / 10, c.head_dim)
    };
    let ((plain, d), (eight, _), (four, _)) = (bytes(vec![]), bytes(vec![cache(8)]), bytes(vec![cache(4)]));
    assert_eq!((plain, eight, four), (4 * d, d + 5, d / 2 + 5));
}

#[test]
fn with_a_quantised_cache_heads_quantised_besides_are_queries_alone() {
    let golden = goldens().into_iter().find(|dir| dir.ends_with("llama")).unwrap();
    let mut model = open(&golden);
    let ids = [5, 1, 2, 3, 9, 8];
    let qkv = |bits| Transform::Quantize { site: QuantizeSite::Qkv, bits };
    let mut of = |list| {
        model.transform(list).unwrap();
        states(&model, &[&ids])
    };
    // The same bits: the same codes, held or not.
    let both = of(vec![qkv(8), cache(8)]);
    assert!(both == of(vec![qkv(8)]) && both == of(vec![cache(8), qkv(8)]) && both != of(vec![cache(8)]));
    // Keys and values are rounded once, to the bits of the cache.
    assert!(
        of(vec![qkv(2), cache(4)]) != of(vec![qkv(2)]) && of(vec![qkv(2), cache(4)]) != of(vec![cache(4)])
    );
}

#[test]
fn a_cache_that_cannot_hold_a_value_names_the_layer_and_other_widths_are_refused() {
    let golden = goldens().into_iter().find(|dir| dir.ends_with("llama")).unwrap();
    for (part, name) in [("k_proj", "key"), ("v_proj", "value")] {
        let mut model = open(&golden);
        let tensor = format!("model.layers.1.self_attn.{part}.weight");
        let mut weights = model.weights(&tensor).unwrap();
        weights[0] = f32::NAN;
        model.replace(&tensor, weights).unwrap();
        model.transform(vec![cache(4)]).unwrap();
        for ids in [&[1][..], &[1, 2, 3]] {
            let error = model.hidden(ids, &mut model.cache(4), &Skips::new(), &mut Unobserved).unwrap_err();
            let error = error.to_string();
            assert!(error.contains(&format!("{name} of layer 1")) && error.contains("4 bits"), "{error}");
        }
    }
    let error = open(&golden).transform(vec![cache(5)]).unwrap_err().to_string();
    assert!(error.contains("a cache of 5 bits"), "{error}");
}

#[test]
fn online_transformations_do_not_run_on_a_gpu_and_folded_ones_do() {
    let golden = goldens().into_iter().find(|dir| dir.ends_with("llama")).unwrap();
    let on_gpu = |model: &Model| GpuModel::open(Gpu::new(Emulator::new()), model, Weights::Stored, false);
    let mut model = open(&golden);
    for transform in down(&model) {
        model.transform(vec![transform]).unwrap();
        let error = on_gpu(&model).unwrap_err().to_string();
        assert!(error.contains("rotation of down") && error.contains("--device cuda"), "{error}");
    }
    // A cache of codes is, and takes nothing away from what else is refused.
    model.transform(vec![cache(8)]).unwrap();
    on_gpu(&model).unwrap();
    model.transform(vec![cache(8), Transform::Quantize { site: QuantizeSite::Qkv, bits: 8 }]).unwrap();
    assert!(on_gpu(&model).unwrap_err().to_string().contains("quantize of qkv"));
    // What is folded into the weights of a checkpoint is of no concern.
    model.transform(vec![value(&model)]).unwrap();
    on_gpu(&model).unwrap();
}

#[test]
fn undoing_needs_the_architecture_and_leaves_what_has_no_transformations() {
    let golden = goldens().into_iter().find(|dir| dir.ends_with("llama")).unwrap();
    let same = undone(Checkpoint::open(&golden).unwrap()).unwrap();
    assert!(!same.is_edited() && same.tensors().values().all(|t| t.is_stored()));
    // Rows and runs of bytes are those of the whole.
    let dir = tempfile::tempdir().unwrap();
    let model = open(&golden);
    let list = [residual(&model), vec![value(&model)], down(&model)].concat();
    let mut all = tensors(model.checkpoint());
    let folds = model.folds(&list).unwrap();
    all.iter_mut().for_each(|(name, (_, values))| folds.apply(name, values).unwrap());
    write(dir.path(), &golden, &all, &list);
    let back = undone(Checkpoint::open(dir.path()).unwrap()).unwrap();
    for (name, tensor) in back.tensors() {
        let whole = back.read_tensor(name).unwrap();
        for (from, to) in [(0, 4), (tensor.bytes / 8 * 4, tensor.bytes), (4, tensor.bytes.min(404)), (8, 8)] {
            let mut part = vec![0; (to - from) as usize];
            back.read(name, from, &mut part).unwrap();
            assert!(part == whole[from as usize..to as usize], "{name} {from}..{to}");
        }
        assert!(back.read(name, tensor.bytes, &mut [0; 4]).is_err());
    }
}

#[test]
fn golden_files_of_transformed_checkpoints_compute_what_they_were_made_from() {
    let source = goldens().into_iter().find(|dir| dir.ends_with("llama")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let ids = single(&source, &dir.path().join("single"));
    let expected = logits(&open(&source), &ids);
    for version in GOLDEN_VERSIONS {
        let stored = format!("{}/../formats/tests/golden/{version}/transformed", env!("CARGO_MANIFEST_DIR"));
        let stored = std::path::Path::new(&stored);
        let opened = || Checkpoint::open(stored).unwrap();
        let far = |checkpoint: Checkpoint| {
            worst(&logits(&Model::open(Arc::new(checkpoint)).unwrap(), &ids), &expected)
        };
        // Weights and heads of eight bits.
        let (turned, back) = (far(opened()), far(undone(opened()).unwrap()));
        assert!(turned > 0.0 && turned < 0.1 && back > 0.0 && back < 0.1, "{version}: {turned} {back}");
        let cached = std::path::Path::new(&stored).with_file_name("cached");
        let held = |checkpoint: Checkpoint| {
            let model = Model::open(Arc::new(checkpoint)).unwrap();
            (model.cache_bits(), worst(&logits(&model, &ids), &expected))
        };
        let (bits, cached_far) = held(Checkpoint::open(&cached).unwrap());
        let (none, plain_far) = held(Checkpoint::open(&cached).unwrap().with_transforms(Vec::new()));
        assert!(bits == Some(8) && none.is_none() && cached_far != plain_far, "{cached_far} {plain_far}");
        assert!(cached_far > 0.0 && cached_far < 0.1, "{version}: {cached_far}");
        // Without what is to be done online it is another model.
        let forgotten = far(opened().with_transforms(Vec::new()));
        assert!(forgotten > 0.5, "{version}: {forgotten}");
    }
}
