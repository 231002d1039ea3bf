//! Tiny random checkpoints of every architecture, with logits and greedy tokens that transformers computed in
//! single precision (`golden/make_golden.py`).
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use llmpress_formats::{Blueprint, Checkpoint, Error};
use llmpress_model::{
    Cache, LayerConfig, MlpConfig, Model, Observer, Panels, Skips, SubLayer, Unobserved, Weights, greedy,
};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

/// What every logit may differ by, beside this share of its value.
const TOLERANCE: f32 = 1e-4;

fn cases() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut cases: Vec<PathBuf> =
        std::fs::read_dir(root).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_dir()).collect();
    cases.sort();
    assert!(cases.len() >= 20, "{cases:?}");
    cases
}

fn open(dir: &Path) -> Model {
    Model::open(Arc::new(Checkpoint::open(dir).unwrap())).unwrap()
}

struct Golden {
    ids: Vec<u32>,
    /// A row a token.
    logits: Vec<Vec<f32>>,
    greedy: Vec<u32>,
}

fn golden(dir: &Path) -> Golden {
    let bytes = std::fs::read(dir.join("golden.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let ids = |name: &str| -> Vec<u32> {
        let data = tensors.tensor(name).unwrap();
        data.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as u32).collect()
    };
    let logits = tensors.tensor("logits").unwrap();
    let rows = logits.data().chunks_exact(4 * logits.shape()[1]);
    let row = |row: &[u8]| row.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    Golden { ids: ids("input_ids"), logits: rows.map(row).collect(), greedy: ids("greedy") }
}

fn logits(model: &Model, pieces: &[&[u32]], observer: &mut dyn Observer) -> Vec<Vec<f32>> {
    let mut cache = model.cache(pieces.iter().map(|p| p.len()).sum());
    let mut rows = Vec::new();
    for piece in pieces {
        let hidden = model.hidden(piece, &mut cache, &Skips::new(), observer).unwrap();
        let logits = model.logits(&hidden).unwrap();
        rows.extend((0..piece.len()).map(|t| logits.token(t).collect::<Vec<f32>>()));
    }
    rows
}

fn worst(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    assert_eq!(a.len(), b.len());
    let pairs = a.iter().zip(b).flat_map(|(a, b)| {
        assert_eq!(a.len(), b.len());
        a.iter().zip(b)
    });
    pairs
        .map(|(a, b)| (a - b).abs() / (1.0 + b.abs()))
        .fold(0.0, |a, b| if b > a || b.is_nan() { b } else { a })
}

#[test]
fn logits_are_those_of_transformers() {
    let mut failed = Vec::new();
    for case in cases() {
        let golden = golden(&case);
        let found = logits(&open(&case), &[&golden.ids], &mut Unobserved);
        let worst = worst(&found, &golden.logits);
        println!("{}: {worst:e}", case.file_name().unwrap().display());
        if worst.is_nan() || worst > TOLERANCE {
            failed.push((case, worst));
        }
    }
    assert!(failed.is_empty(), "{failed:?}");
}

#[test]
fn every_family_has_a_golden() {
    let run: Vec<&str> = cases().iter().map(|case| open(case).config().blueprint.name).collect();
    for blueprint in Blueprint::all() {
        assert!(run.contains(&blueprint.name), "{}", blueprint.name);
    }
    let types: Vec<&str> = Blueprint::model_types().collect();
    let twice = types.iter().enumerate().find(|(i, name)| types[..*i].contains(name));
    assert!(twice.is_none(), "{twice:?}");
}

#[test]
fn a_family_that_does_not_run_says_so_by_name_and_what_works() {
    for model_type in ["mamba", "bert", "t5", "unheard_of"] {
        let dir = tempfile::tempdir().unwrap();
        let config = format!(r#"{{"model_type": "{model_type}", "hidden_size": 8, "num_hidden_layers": 1}}"#);
        std::fs::write(dir.path().join("config.json"), config).unwrap();
        let golden = cases().into_iter().find(|case| case.ends_with("llama")).unwrap();
        std::fs::copy(golden.join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let error = Model::open(Arc::new(checkpoint)).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        let error = error.to_string();
        for part in
            ["config.json", &format!("{model_type:?} does not run here"), "gpt2", "works: inspect", "convert"]
        {
            assert!(error.contains(part), "{part}: {error}");
        }
    }
}

#[test]
fn a_switch_that_changes_what_a_model_computes_is_refused_by_its_key() {
    let golden = cases().into_iter().find(|case| case.ends_with("gpt2")).unwrap();
    let text = std::fs::read_to_string(golden.join("config.json")).unwrap();
    for (key, value) in [("scale_attn_by_inverse_layer_idx", true), ("scale_attn_weights", false)] {
        let mut config: Value = serde_json::from_str(&text).unwrap();
        config[key] = value.into();
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        std::fs::copy(golden.join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
        let error = Model::open(Arc::new(Checkpoint::open(dir.path()).unwrap())).unwrap_err().to_string();
        assert!(error.contains(&format!("{key} {value}")), "{error}");
    }
}

#[test]
fn a_token_beyond_the_learned_positions_is_refused() {
    let model = open(&cases().into_iter().find(|case| case.ends_with("gpt2")).unwrap());
    let ids = vec![3; 65];
    let mut cache = model.cache(65);
    model.hidden(&ids[..60], &mut cache, &Skips::new(), &mut Unobserved).unwrap();
    let error = model.hidden(&ids[60..], &mut cache, &Skips::new(), &mut Unobserved).unwrap_err();
    assert!(matches!(error, Error::Limit(_)) && error.to_string().contains("64 positions"), "{error}");
}

#[test]
fn greedy_tokens_are_those_of_transformers() {
    for case in cases() {
        let golden = golden(&case);
        let found = greedy(&open(&case), &golden.ids[..8], golden.greedy.len()).unwrap();
        assert_eq!(found, golden.greedy, "{}", case.display());
    }
}

#[test]
fn the_cache_changes_nothing() {
    for case in cases() {
        let golden = golden(&case);
        // Frequencies that depend on the length so far differ from those of the whole by their nature.
        if case.to_str().is_some_and(|c| c.contains("dynamic") || c.contains("longrope")) {
            continue;
        }
        let model = open(&case);
        let whole = logits(&model, &[&golden.ids], &mut Unobserved);
        let (head, tail) = golden.ids.split_at(golden.ids.len() / 2);
        let split = logits(&model, &[head, tail], &mut Unobserved);
        // A single token adds in another order, and an expert may get one of many.
        let of_experts = |layer: &LayerConfig| matches!(layer.mlp, MlpConfig::Experts { .. });
        let experts = model.config().layers.iter().any(of_experts);
        assert!(split == whole || experts && worst(&split, &whole) < TOLERANCE, "{}", case.display());
        let singly: Vec<&[u32]> = golden.ids.chunks(1).collect();
        let worst = worst(&logits(&model, &singly, &mut Unobserved), &whole);
        assert!(worst < TOLERANCE, "{}: {worst}", case.display());
    }
}

#[test]
fn configurations_of_transformers_4_mean_the_same() {
    let mut twins = 0;
    for case in cases() {
        let old = case.join("config_v4.json");
        if !old.exists() {
            continue;
        }
        twins += 1;
        let dir = tempfile::tempdir().unwrap();
        std::fs::copy(old, dir.path().join("config.json")).unwrap();
        std::fs::copy(case.join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
        let golden = golden(&case);
        let [a, b] = [&case, dir.path()].map(|dir| logits(&open(dir), &[&golden.ids], &mut Unobserved));
        assert!(a == b, "{}", case.display());
    }
    assert!(twins >= 5);
}

#[test]
fn experts_in_mxfp4_run_as_they_are_stored() {
    let case = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/mxfp4/gpt_oss");
    let golden = golden(&case);
    let open = || Model::open(Arc::new(Checkpoint::open_dequantised(&case).unwrap())).unwrap();
    let mut model = open();
    let whole = logits(&model, &[&golden.ids], &mut Unobserved);
    assert!(worst(&whole, &golden.logits) < TOLERANCE);
    assert_eq!(greedy(&model, &golden.ids[..8], golden.greedy.len()).unwrap(), golden.greedy);
    assert!(model.decoded_bytes() > 0, "they are decoded for every token");
    for weights in [Weights::Bf16, Weights::Fixed12, Weights::Dfloat11] {
        model.load(weights).unwrap();
        assert!(logits(&model, &[&golden.ids], &mut Unobserved) == whole, "{weights:?}");
        model = open();
    }
}

/// Configurations as their publishers write them, before transformers writes them anew.
#[test]
fn published_forms_of_configurations_mean_the_same() {
    let null = Value::Null;
    let yarn = json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 4.0,
        "beta_slow": 0.25, "mscale": 1.5, "mscale_all_dim": 0.8});
    let oss = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 4.0,
        "beta_slow": 0.25, "truncate": false});
    let changes = [
        (
            "gpt_oss",
            json!({"layer_types": null, "rope_parameters": null, "rope_theta": 1000.0, "rope_scaling": oss}),
        ),
        (
            "deepseek_v3",
            json!({"rope_parameters": null, "rope_theta": 1000.0, "rope_scaling": yarn, "head_dim": null,
            "topk_method": "noaux_tc", "scoring_func": "sigmoid", "rope_interleave": null}),
        ),
        (
            "qwen3_next",
            json!({"layer_types": null, "rope_parameters": null, "rope_theta": 1e4,
            "partial_rotary_factor": 0.25, "rope_scaling": null, "full_attention_interval": 4}),
        ),
        (
            "llama4",
            json!({"layer_types": null, "moe_layers": null, "no_rope_layers": [], "no_rope_layer_interval": 3,
            "attn_temperature_tuning": 4}),
        ),
    ];
    for (name, changes) in changes {
        let case = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
        let mut config: Value =
            serde_json::from_slice(&std::fs::read(case.join("config.json")).unwrap()).unwrap();
        for (key, value) in changes.as_object().unwrap() {
            match value == &null && key != "rope_scaling" {
                true => drop(config.as_object_mut().unwrap().remove(key)),
                false => config[key] = value.clone(),
            }
        }
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        std::fs::copy(case.join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
        let ids = golden(&case).ids;
        let [a, b] = [&case, dir.path()].map(|dir| logits(&open(dir), &[&ids], &mut Unobserved));
        assert!(a == b, "{name}");
    }
}

#[test]
fn layers_that_predict_further_tokens_are_passed_over() {
    let case = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/deepseek_v3");
    let bytes = std::fs::read(case.join("model.safetensors")).unwrap();
    let stored = SafeTensors::deserialize(&bytes).unwrap();
    let mut views: Vec<(String, TensorView<'_>)> = stored.iter().map(|(n, v)| (n.to_owned(), v)).collect();
    for (name, view) in stored.iter().filter(|(name, _)| name.starts_with("model.layers.2.")) {
        views.push((name.replace("layers.2.", "layers.3."), view));
    }
    let dir = tempfile::tempdir().unwrap();
    safetensors::serialize_to_file(views, None, &dir.path().join("model.safetensors")).unwrap();
    let mut config: Value =
        serde_json::from_slice(&std::fs::read(case.join("config.json")).unwrap()).unwrap();
    for (predicting, unused) in [(1, false), (0, true)] {
        config["num_nextn_predict_layers"] = predicting.into();
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        assert_eq!(!open(dir.path()).unused().is_empty(), unused);
    }
}

#[test]
fn experts_in_one_tensor_are_those_that_are_stored_apart() {
    let case = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/qwen3_5_moe");
    let bytes = std::fs::read(case.join("model.safetensors")).unwrap();
    let stored = SafeTensors::deserialize(&bytes).unwrap();
    let mut all: BTreeMap<String, (Vec<usize>, Vec<u8>)> = BTreeMap::new();
    for (name, view) in stored.iter() {
        let Some((module, rest)) = name.split_once(".experts.") else {
            all.insert(name.to_owned(), (view.shape().to_vec(), view.data().to_vec()));
            continue;
        };
        if rest != "0.down_proj.weight" {
            continue;
        }
        let (hidden, inner) = (view.shape()[0], view.shape()[1]);
        let of = |expert: usize, part: &str| {
            stored.tensor(&format!("{module}.experts.{expert}.{part}.weight")).unwrap().data().to_vec()
        };
        let gate_up = (0..4).flat_map(|e| [of(e, "gate_proj"), of(e, "up_proj")].concat()).collect();
        let down = (0..4).flat_map(|e| of(e, "down_proj")).collect();
        all.insert(format!("{module}.experts.gate_up_proj"), (vec![4, 2 * inner, hidden], gate_up));
        all.insert(format!("{module}.experts.down_proj"), (vec![4, hidden, inner], down));
    }
    let dir = tempfile::tempdir().unwrap();
    let views = all.iter().map(|(name, (shape, data))| {
        (name, TensorView::new(safetensors::Dtype::BF16, shape.clone(), data).unwrap())
    });
    safetensors::serialize_to_file(views, None, &dir.path().join("model.safetensors")).unwrap();
    std::fs::copy(case.join("config.json"), dir.path().join("config.json")).unwrap();
    let ids = golden(&case).ids;
    let [apart, stacked] = [&case, dir.path()].map(|dir| {
        let singly: Vec<&[u32]> = ids.chunks(1).collect();
        let model = open(dir);
        (logits(&model, &[&ids], &mut Unobserved), logits(&model, &singly, &mut Unobserved))
    });
    assert!(apart == stacked);
    let model = open(dir.path());
    assert!(model.decoded_bytes() == 0 && model.unused().is_empty(), "they are read where they lie");
}

/// A state is of all tokens before: what was read cannot be taken back, and a cleared cache begins anew.
#[test]
fn layers_that_remember_go_on_and_begin_anew_and_never_go_back() {
    let case = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/qwen3_next");
    let (model, ids) = (open(&case), golden(&case).ids);
    let whole = logits(&model, &[&ids], &mut Unobserved);
    let mut cache = model.cache(ids.len());
    let read = |cache: &mut Cache, ids: &[u32]| {
        let hidden = model.hidden(ids, cache, &Skips::new(), &mut Unobserved)?;
        let logits = model.logits(&hidden)?;
        Ok::<_, Error>((0..ids.len()).map(|t| logits.token(t).collect()).collect::<Vec<Vec<f32>>>())
    };
    read(&mut cache, &ids[5..]).unwrap();
    cache.clear();
    assert!(worst(&read(&mut cache, &ids[..20]).unwrap(), &whole[..20]) < TOLERANCE);
    // The same layers once more over the same tokens, as passes run them.
    let mut h = model.embed(&ids[20..24]).unwrap();
    model.run_layers(0..4, &mut h, &mut cache, &Skips::new(), &mut Unobserved).unwrap();
    assert!(worst(&read(&mut cache, &ids[20..]).unwrap(), &whole[20..]) < TOLERANCE);
    // Layers that were left out remember nothing of what came before.
    let mut cache = model.cache(ids.len());
    let skips = Skips::from([SubLayer::Attention(0)]);
    model.hidden(&ids[..4], &mut cache, &skips, &mut Unobserved).unwrap();
    let error = read(&mut cache, &ids[4..8]).unwrap_err();
    for part in ["qwen3_next", "layer 0", "0 tokens", "after 4", "from its start"] {
        assert!(error.to_string().contains(part), "{error}");
    }
}

/// Where transformers refuses a form, so may we; nothing else may become of it.
#[test]
fn every_form_of_rotary_parameters_means_what_it_does_in_transformers() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let file: Value = serde_json::from_slice(&std::fs::read(root.join("rope_forms.json")).unwrap()).unwrap();
    let forms = file["forms"].as_array().unwrap();
    assert!(forms.len() > 40);
    let mut wrong = Vec::new();
    for form in forms {
        let (case, changes) = (form["case"].as_str().unwrap(), form["changes"].as_object().unwrap());
        let text = std::fs::read(root.join(case).join("config.json")).unwrap();
        let mut config: Value = serde_json::from_slice(&text).unwrap();
        let text = if config["text_config"].is_object() { &mut config["text_config"] } else { &mut config };
        for (key, value) in changes {
            match value {
                Value::Null => drop(text.as_object_mut().unwrap().remove(key)),
                value => text[key] = value.clone(),
            }
        }
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        std::fs::copy(root.join(case).join("model.safetensors"), dir.path().join("model.safetensors"))
            .unwrap();
        let Some(expected) = form["logits"].as_array() else {
            if let Err(e) = Model::open(Arc::new(Checkpoint::open(dir.path()).unwrap())) {
                assert!(e.to_string().contains("config.json"), "{form}: {e}");
            }
            continue;
        };
        let expected: Vec<f32> = expected.iter().map(|l| l.as_f64().unwrap() as f32).collect();
        let ids = golden(&root.join(case)).ids;
        let found = logits(&open(dir.path()), &[&ids], &mut Unobserved).pop().unwrap();
        let worst = worst(&[found], &[expected]);
        if worst.is_nan() || worst > TOLERANCE {
            wrong.push(format!("{case} with {changes:?}: {worst}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    for case in cases() {
        let golden = golden(&case);
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let (head, tail) = golden.ids.split_at(golden.ids.len() - 1);
            pool.install(|| logits(&open(&case), &[head, tail], &mut Unobserved))
        };
        let one = on(1);
        assert!(one == on(2) && one == on(5), "{}", case.display());
    }
}

/// Records what taps hand out.
#[derive(Default)]
struct Record {
    inputs: BTreeMap<String, (usize, usize)>,
    sites: Vec<(SubLayer, Panels, Option<Panels>)>,
}

impl Observer for Record {
    fn before(&mut self, sub_layer: SubLayer, residual: &Panels) {
        self.sites.push((sub_layer, residual.clone(), None));
    }

    fn after(&mut self, sub_layer: SubLayer, residual: &Panels) {
        let last = self.sites.last_mut().unwrap();
        assert_eq!(last.0, sub_layer);
        last.2 = Some(residual.clone());
    }

    fn linear_input(&mut self, weight: &str, input: &Panels) {
        self.inputs.insert(weight.to_owned(), (input.features(), input.tokens()));
    }
}

#[test]
fn taps_see_every_linear_and_residual() {
    for case in cases() {
        let golden = golden(&case);
        let model = open(&case);
        let mut record = Record::default();
        let tapped = logits(&model, &[&golden.ids], &mut record);
        assert!(tapped == logits(&model, &[&golden.ids], &mut Unobserved), "taps change nothing");
        let layers = model.config().layers.len();
        let order = (0..layers).flat_map(|l| [SubLayer::Attention(l), SubLayer::Mlp(l)]);
        assert!(record.sites.iter().map(|s| s.0).eq(order));
        for pair in record.sites.windows(2) {
            assert!(pair[0].2.as_ref() == Some(&pair[1].1), "what one leaves the next one gets");
        }
        // Every matrix of the layers with its own number of columns; an expert may have got no token.
        for (name, tensor) in model.checkpoint().tensors() {
            let [_, cols] = tensor.shape[..] else { continue };
            if name.contains(".layers.") && !name.contains(".experts.") && !name.contains("vision") {
                let (features, tokens) = record.inputs[name];
                assert_eq!((features as u64, tokens), (cols, golden.ids.len()), "{name}");
            }
        }
    }
}

#[test]
fn what_is_skipped_passes_the_residual_and_has_no_cache() {
    for case in cases() {
        let golden = golden(&case);
        let model = open(&case);
        let skips = Skips::from([SubLayer::Attention(1), SubLayer::Mlp(0)]);
        let mut record = Record::default();
        let mut cache = model.cache(golden.ids.len());
        model.hidden(&golden.ids, &mut cache, &skips, &mut record).unwrap();
        for (site, before, after) in &record.sites {
            assert_eq!(after.as_ref() == Some(before), skips.contains(site), "{site:?}");
        }
        let mut full = model.cache(golden.ids.len());
        model.hidden(&golden.ids, &mut full, &Skips::new(), &mut Unobserved).unwrap();
        let layers = model.config().layers.len();
        // What the skipped layer would hold.
        let others = (0..layers).filter(|l| *l != 1).map(SubLayer::Attention);
        let mut alone = model.cache(golden.ids.len());
        model.hidden(&golden.ids, &mut alone, &others.collect(), &mut Unobserved).unwrap();
        assert!(alone.bytes() > 0 && cache.bytes() + alone.bytes() == full.bytes(), "{}", case.display());
        let all: Skips = (0..layers).flat_map(|l| [SubLayer::Attention(l), SubLayer::Mlp(l)]).collect();
        let hidden = model.hidden(&golden.ids, &mut model.cache(64), &all, &mut Unobserved).unwrap();
        assert!(hidden == model.last_norm(&model.embed(&golden.ids).unwrap()).unwrap());
    }
}
