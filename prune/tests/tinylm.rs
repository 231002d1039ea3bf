//! Pruning of the example model: rankings, searches, and what is left.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use llmpress_calibrate::{Calibration, Cut};
use llmpress_formats::{Checkpoint, Edit, Error, Removal};
use llmpress_model::{Model, Panels, Skips, SubLayer, Tokenizer, Unobserved};
use llmpress_prune::{
    DistanceKind, FinerCut, Kind, Ranking, Search, Target, drop_ranking, finercut, last_ranking,
    random_ranking, similarities, svg,
};

fn tinylm() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/tinylm")
}

fn model() -> Model {
    Model::open(Arc::new(Checkpoint::open(&tinylm()).unwrap())).unwrap()
}

fn calibration(windows: usize, length: usize) -> Calibration {
    let text = std::fs::read_to_string(tinylm().join("calib.txt")).unwrap();
    let ids = Tokenizer::open(&tinylm()).unwrap().encode(&text).unwrap();
    Calibration::new(&ids, Cut { windows, length, seed: None }, None).unwrap()
}

fn edited(removal: &Removal) -> Model {
    let checkpoint = Checkpoint::open(&tinylm()).unwrap();
    let edit = removal.edit(&checkpoint).unwrap();
    Model::open(Arc::new(checkpoint.edited(&edit).unwrap())).unwrap()
}

/// Logits of some tokens, and the bytes of keys and values.
fn logits(model: &Model, skips: &Skips) -> (Vec<u32>, usize) {
    let ids: Vec<u32> = (0..40).map(|i| (i * 97 + 5) % 4096).collect();
    let mut cache = model.cache(ids.len());
    let hidden = model.hidden(&ids, &mut cache, skips, &mut Unobserved).unwrap();
    let logits: Panels = model.logits(&hidden).unwrap();
    (logits.data().iter().map(|x| x.to_bits()).collect(), cache.bytes())
}

fn search(search: Search, distance: DistanceKind, count: usize, protect: f64) -> Ranking {
    let options = FinerCut { distance, protect, count, search };
    finercut(&model(), &options, &calibration(2, 48), None, &mut || (), &mut |_| Ok(())).unwrap()
}

#[test]
fn cached_prefixes_find_exactly_what_whole_passes_find() {
    for distance in DistanceKind::ALL {
        let plain = search(Search::Plain, distance, 4, 0.25);
        assert_eq!(search(Search::CachedPrefixes, distance, 4, 0.25), plain, "{distance:?}");
        assert_eq!(plain.removed.len(), 4);
        assert_eq!(plain.scores.len(), 12);
        assert!(plain.removed.iter().all(|s| s.layer >= 2 && s.score > 0.0));
        // Each round leaves the output at least as far as the one before it, or close to it.
        assert!(plain.scores.iter().all(|s| s.score >= plain.removed[0].score));
    }
}

#[test]
fn cached_prefixes_find_the_same_where_sub_layers_run_side_by_side() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/golden/cohere2");
    let model = Model::open(Arc::new(Checkpoint::open(&dir).unwrap())).unwrap();
    let ids: Vec<u32> = (0..60).map(|i| (i * 37 + 5) % model.vocab_size() as u32).collect();
    let calibration = Calibration::new(&ids, Cut { windows: 2, length: 30, seed: None }, None).unwrap();
    let of = |search| {
        let options = FinerCut { distance: DistanceKind::Angular, protect: 0.0, count: 3, search };
        finercut(&model, &options, &calibration, None, &mut || (), &mut |_| Ok(())).unwrap()
    };
    let plain = of(Search::Plain);
    assert_eq!(of(Search::CachedPrefixes), plain);
    assert!(plain.removed.len() == 3 && plain.removed.iter().all(|s| s.score > 0.0));
}

#[test]
fn threads_change_nothing_and_protected_layers_go_last() {
    let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    let run = || search(Search::CachedPrefixes, DistanceKind::Angular, 3, 0.9);
    let (one, three) = (pool(1).install(run), pool(3).install(run));
    assert_eq!(one, three);
    // Seven of eight layers are spared: the last one's two sub-layers go first.
    let first: BTreeSet<usize> = one.removed[..2].iter().map(|s| s.layer).collect();
    assert_eq!(first, BTreeSet::from([7]));
    assert!(one.removed[2].layer < 7);
}

#[test]
fn an_interrupted_search_goes_on_to_the_same_end() {
    let (model, calibration) = (model(), calibration(1, 32));
    let options =
        FinerCut { distance: DistanceKind::Angular, protect: 0.4, count: 4, search: Search::CachedPrefixes };
    let mut saved: Vec<Ranking> = Vec::new();
    let mut passes = 0;
    let whole = finercut(&model, &options, &calibration, None, &mut || passes += 1, &mut |r| {
        saved.push(r.clone());
        Ok(())
    })
    .unwrap();
    assert_eq!(passes, options.candidates(&model).iter().sum::<usize>(), "the total is true");
    assert_eq!(saved.iter().map(|r| r.unfinished).collect::<Vec<_>>(), [true, true, true, false]);
    let mut again = 0;
    let from =
        finercut(&model, &options, &calibration, Some(saved[1].clone()), &mut || again += 1, &mut |_| Ok(()));
    assert_eq!(from.unwrap(), whole);
    assert_eq!(again, options.candidates(&model)[2..].iter().sum::<usize>());
    // What is of another search is refused.
    let other = FinerCut { distance: DistanceKind::Euclidean, ..options };
    let refused = finercut(&model, &other, &calibration, Some(saved[1].clone()), &mut || (), &mut |_| Ok(()));
    assert!(matches!(refused, Err(Error::Invalid(_))));
    // A failure to save ends it.
    let failed =
        finercut(&model, &options, &calibration, None, &mut || (), &mut |_| Err(Error::Limit("full".into())));
    assert!(matches!(failed, Err(Error::Limit(_))));
}

#[test]
fn similarities_are_cosines_of_the_residual() {
    let (model, calibration) = (model(), calibration(1, 20));
    let found = similarities(&model, &calibration, &Skips::new(), &mut || ()).unwrap();
    // By hand, for the attention of layer 3 and for layer 3 as a whole.
    let window = &calibration.windows()[0];
    let mut h = model.embed(window).unwrap();
    let mut cache = model.cache(window.len());
    let none = Skips::new();
    model.run_layers(0..3, &mut h, &mut cache, &none, &mut Unobserved).unwrap();
    let before = h.data().to_vec();
    let only_attention = Skips::from([SubLayer::Mlp(3)]);
    model.run_layers(3..4, &mut h, &mut cache, &only_attention, &mut Unobserved).unwrap();
    let (features, tokens) = (h.features(), h.tokens());
    let mut mean = 0.0;
    for token in 0..tokens {
        let column = |data: &[f32]| -> Vec<f64> {
            (0..features).map(|f| f64::from(data[f * tokens + token])).collect()
        };
        let (a, b) = (column(&before), column(h.data()));
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        mean += dot(&a, &b) / (dot(&a, &a) * dot(&b, &b)).sqrt() / tokens as f64;
    }
    let score = found.of(Target::Attention)[3].score;
    assert!((score - mean).abs() < 1e-12, "{score} {mean}");
    assert_eq!((found.of(Target::Joint).len(), found.of(Target::Block).len()), (16, 8));
    let without =
        similarities(&model, &calibration, &Skips::from([SubLayer::Attention(3)]), &mut || ()).unwrap();
    assert_eq!((without.of(Target::Attention).len(), without.of(Target::Block).len()), (7, 7));
}

#[test]
fn rankings_order_by_similarity_and_save_whole() {
    let (model, calibration) = (model(), calibration(1, 32));
    let mut windows = 0;
    let joint = drop_ranking(&model, Target::Joint, None, &calibration, &mut || windows += 1).unwrap();
    assert_eq!((windows, joint.removed.len()), (1, 16));
    assert!(joint.removed.is_sorted_by(|a, b| a.score >= b.score));
    let iterative = drop_ranking(&model, Target::Joint, Some(3), &calibration, &mut || windows += 1).unwrap();
    assert_eq!((windows, iterative.removed.len()), (4, 3));
    assert_eq!(iterative.removed[0], joint.removed[0]);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pruning.json");
    joint.write(&path).unwrap();
    assert_eq!(Ranking::read(&path).unwrap(), joint);
    std::fs::write(&path, "{\"method\": 3}").unwrap();
    assert!(matches!(Ranking::read(&path), Err(Error::Corrupt { .. })));
    assert!(joint.removal(17, false).is_err());
    // The picture has a bar for every sub-layer, as many filled as are removed, and the axes say what they are.
    let picture = svg(&joint, 5).unwrap();
    let filled = |colour: &str| picture.matches(&format!("fill=\"{colour}\" stroke=\"none\"")).count();
    // One square of each colour is the legend's.
    assert_eq!(filled("#1F77B4") + filled("#FF7F0E"), 5 + 2, "{picture}");
    assert!(picture.contains("layer") && picture.contains("cosine") && picture.contains("5 of 16 removed"));
    assert!(!svg(&joint, 0).unwrap().contains("removed"));
}

#[test]
fn baselines_are_repeatable() {
    let model = model();
    let random = |seed| random_ranking(&model, seed).removed;
    assert_eq!(random(3), random(3));
    assert_ne!(random(3), random(4));
    let places: BTreeSet<(usize, Kind)> = random(3).iter().map(|s| (s.layer, s.kind)).collect();
    assert_eq!(places.len(), 16);
    let last = last_ranking(&model).removed;
    assert_eq!((last[0].layer, last[0].kind, last[1].kind), (7, Kind::Mlp, Kind::Attention));
}

#[test]
fn what_is_left_computes_what_the_whole_model_computes_without_it() {
    let model = model();
    let (whole, whole_cache) = logits(&model, &Skips::new());
    let cases: [(&[usize], &[usize]); 4] =
        [(&[2, 5], &[]), (&[], &[1]), (&[0, 6], &[3, 6]), (&[4, 7], &[4, 7])];
    for (attention, mlp) in cases {
        let removal = Removal {
            attention: attention.iter().copied().collect(),
            mlp: mlp.iter().copied().collect(),
            portable: false,
        };
        let skips: Skips = attention
            .iter()
            .map(|l| SubLayer::Attention(*l))
            .chain(mlp.iter().map(|l| SubLayer::Mlp(*l)))
            .collect();
        let (expected, expected_cache) = logits(&model, &skips);
        assert_ne!(expected, whole);
        let pruned = edited(&removal);
        assert_eq!(pruned.sub_layers().len(), 16 - attention.len() - mlp.len());
        let (found, cache) = logits(&pruned, &Skips::new());
        assert!(found == expected, "{removal:?}");
        // A dropped attention has no keys and values.
        assert_eq!(cache, expected_cache);
        assert_eq!(cache, whole_cache / 8 * (8 - attention.len()));
        let portable = edited(&Removal { portable: true, ..removal.clone() });
        assert!(logits(&portable, &Skips::new()).0 == expected, "portable {removal:?}");
        if removal.renumbers() {
            assert_eq!(pruned.config().layers.len(), 8 - attention.len());
        } else {
            assert_eq!(portable.sub_layers().len(), 16);
        }
    }
}

#[test]
fn wrong_removals_are_refused_by_layer() {
    let checkpoint = Checkpoint::open(&tinylm()).unwrap();
    let removal = |attention: usize| Removal { attention: BTreeSet::from([attention]), ..Removal::default() };
    let error = removal(8).edit(&checkpoint).unwrap_err();
    assert!(error.to_string().contains("no layer 8") && error.to_string().contains("has 8"), "{error}");
    let edit = removal(3).edit(&checkpoint).unwrap();
    let pruned = checkpoint.edited(&edit).unwrap();
    assert!(removal(3).edit(&pruned).unwrap_err().to_string().contains("no attention any more"));
    // Pruned once more, both are gone.
    let edit = removal(5).edit(&pruned).unwrap();
    let twice = Model::open(Arc::new(pruned.edited(&edit).unwrap())).unwrap();
    assert_eq!(twice.sub_layers().len(), 14);
    // Layers renumber after what is gone already.
    let blocks = Removal { attention: BTreeSet::from([0]), mlp: BTreeSet::from([0]), portable: false };
    let checkpoint = Checkpoint::open(&tinylm()).unwrap();
    let pruned = checkpoint.edited(&removal(3).edit(&Checkpoint::open(&tinylm()).unwrap()).unwrap()).unwrap();
    let edit = blocks.edit(&pruned).unwrap();
    let model = Model::open(Arc::new(pruned.edited(&edit).unwrap())).unwrap();
    assert!(!model.sub_layers().contains(&SubLayer::Attention(2)) && model.sub_layers().len() == 13);
    let all = Removal { attention: (0..8).collect(), mlp: (0..8).collect(), portable: false };
    let error = all.edit(&Checkpoint::open(&tinylm()).unwrap()).unwrap_err();
    assert!(error.to_string().contains("nothing would be left"), "{error}");
    // A number of layers that nobody could go through.
    let hostile = r#"{"model_type": "gemma3_text", "num_hidden_layers": 18446744073709551615}"#;
    let edit = Edit { config: Some(hostile.to_owned()), ..Edit::default() };
    let checkpoint = Checkpoint::open(&tinylm()).unwrap().edited(&edit).unwrap();
    let error = blocks.edit(&checkpoint).unwrap_err();
    assert!(error.to_string().contains("num_hidden_layers"), "{error}");
}

#[test]
fn every_architecture_can_be_pruned() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/golden");
    let ids: Vec<u32> = vec![3, 17, 5, 60, 2, 9, 33, 41, 8, 8, 1];
    let run = |model: &Model, skips: &Skips| -> Vec<u32> {
        let hidden = model.hidden(&ids, &mut model.cache(ids.len()), skips, &mut Unobserved).unwrap();
        model.logits(&hidden).unwrap().data().iter().map(|x| x.to_bits()).collect()
    };
    let mut pruned_blocks = 0;
    for entry in std::fs::read_dir(golden).unwrap() {
        let dir = entry.unwrap().path();
        if !dir.is_dir() {
            continue;
        }
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        let open = || Checkpoint::open(&dir).unwrap();
        let model = Model::open(Arc::new(open())).unwrap();
        let set = |layers: &[usize]| layers.iter().copied().collect::<BTreeSet<usize>>();
        let removals = [
            Removal { attention: set(&[1]), ..Removal::default() },
            Removal { mlp: set(&[0]), ..Removal::default() },
            Removal { attention: set(&[0]), mlp: set(&[1]), portable: true },
            Removal { attention: set(&[0]), mlp: set(&[0]), portable: false },
        ];
        for removal in removals {
            let skips: Skips = removal
                .attention
                .iter()
                .map(|l| SubLayer::Attention(*l))
                .chain(removal.mlp.iter().map(|l| SubLayer::Mlp(*l)))
                .collect();
            let checkpoint = open();
            let edit = match removal.edit(&checkpoint) {
                Ok(edit) => edit,
                Err(Error::Unsupported { .. }) => {
                    // Only where the configuration cannot say it.
                    assert!(name == "gemma3_multimodal" && removal.renumbers(), "{name} {removal:?}");
                    continue;
                }
                Err(other) => panic!("{name}: {other}"),
            };
            let pruned = Model::open(Arc::new(checkpoint.edited(&edit).unwrap())).unwrap();
            assert!(run(&pruned, &Skips::new()) == run(&model, &skips), "{name} {removal:?}");
            pruned_blocks += usize::from(removal.renumbers());
        }
    }
    assert!(pruned_blocks >= 20, "{pruned_blocks}");
}

#[test]
fn transformers_computes_the_same_from_what_is_left() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let set = |layers: &[usize]| layers.iter().copied().collect::<BTreeSet<usize>>();
    for (name, removal) in [
        ("portable", Removal { attention: set(&[2, 5]), mlp: set(&[1]), portable: true }),
        ("blocks", Removal { attention: set(&[4, 7]), mlp: set(&[4, 7]), portable: false }),
    ] {
        let bytes = std::fs::read(golden.join(format!("{name}.safetensors"))).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let data = tensors.tensor("logits").unwrap();
        let expected: Vec<f32> =
            data.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        let model = edited(&removal);
        let ids: Vec<u32> = (0..40).map(|i| (i * 97 + 5) % 4096).collect();
        let hidden = model.hidden(&ids, &mut model.cache(40), &Skips::new(), &mut Unobserved).unwrap();
        let logits = model.logits(&hidden).unwrap();
        let found: Vec<f32> = (36..40).flat_map(|token| logits.token(token).collect::<Vec<_>>()).collect();
        assert_eq!(found.len(), expected.len());
        let worst = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        println!("{name}: {worst:e}");
        assert!(worst < 1e-4, "{name}: {worst}");
    }
}
