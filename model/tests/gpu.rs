//! The decoder of the GPU, on the emulator: every architecture, every encoding of the weights, step by step.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use llmpress_emulator::Emulator;
use llmpress_formats::{Checkpoint, Error};
use llmpress_kernels::cpu::{self, Limits};
use llmpress_kernels::gpu::Gpu;
use llmpress_model::{
    Engine, Generation, GpuModel, GpuNeeds, Model, Panels, Sampling, Skips, SubLayer, Weights, greedy,
};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// What activations in BF16 may move a logit by, as a share of the largest one.
const TOLERANCE: f32 = 0.05;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn open(dir: &Path) -> Model {
    Model::open(Arc::new(Checkpoint::open(dir).unwrap())).unwrap()
}

fn on_gpu(model: &Model, weights: Weights) -> Result<GpuModel, Error> {
    GpuModel::open(Gpu::new(Emulator::new()), model, weights, false)
}

/// Rows of logits of all tokens, read in pieces.
fn logits(engine: &dyn Engine, pieces: &[&[u32]], skips: &Skips) -> Vec<Vec<f32>> {
    let mut session = engine.session(pieces.iter().map(|p| p.len()).sum()).unwrap();
    session.announce(pieces.iter().map(|p| p.len()).sum());
    let mut rows = Vec::new();
    let mut part = Panels::default();
    for piece in pieces {
        session.read(piece, skips, 0..piece.len()).unwrap();
        let mut of_piece = vec![Vec::new(); piece.len()];
        for run in engine.logit_runs(piece.len()) {
            session.logits(run, &mut part).unwrap();
            of_piece.iter_mut().enumerate().for_each(|(t, row)| row.extend(part.token(t)));
        }
        rows.extend(of_piece);
    }
    rows
}

/// The largest difference, as a share of the largest logit.
fn worst(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    assert_eq!(a.len(), b.len());
    let largest = b.iter().flatten().fold(0f32, |a, b| a.max(b.abs()));
    let pairs = a.iter().zip(b).flat_map(|(a, b)| a.iter().zip(b));
    pairs.map(|(a, b)| (a - b).abs() / largest).fold(0.0, |a, b| if b > a || b.is_nan() { b } else { a })
}

fn bits(rows: &[Vec<f32>]) -> Vec<Vec<u32>> {
    rows.iter().map(|row| row.iter().map(|x| x.to_bits()).collect()).collect()
}

const IDS: [u32; 11] = [3, 17, 5, 60, 2, 9, 33, 41, 8, 8, 1];

#[test]
fn every_dense_architecture_runs_near_the_processors_logits() {
    let root = golden("");
    let mut ran = 0;
    for entry in std::fs::read_dir(root).unwrap() {
        let dir = entry.unwrap().path();
        if !dir.is_dir() {
            continue;
        }
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        let model = open(&dir);
        match on_gpu(&model, Weights::Stored) {
            Ok(gpu) => {
                ran += 1;
                let skips = Skips::new();
                let expected = logits(&model, &[&IDS], &skips);
                let found = logits(&gpu, &[&IDS], &skips);
                let worst = worst(&found, &expected);
                println!("{name}: {worst:.4}");
                assert!(worst < TOLERANCE, "{name}: {worst}");
            }
            Err(Error::Unsupported { .. }) => {
                println!("{name}: refused");
                assert!(name.contains("moe") || name == "mixtral", "{name}");
            }
            Err(other) => panic!("{name}: {other}"),
        }
    }
    assert!(ran >= 18, "{ran}");
}

#[test]
fn encodings_and_pieces_change_no_bit() {
    for name in ["llama_tied", "gemma3_text", "qwen3", "phi3"] {
        let model = open(&golden(name));
        let skips = Skips::new();
        let plain = on_gpu(&model, Weights::Bf16).unwrap();
        let expected = bits(&logits(&plain, &[&IDS], &skips));
        for weights in [Weights::Fixed12, Weights::Dfloat11] {
            let encoded = on_gpu(&model, weights).unwrap();
            assert!(bits(&logits(&encoded, &[&IDS], &skips)) == expected, "{name}: {weights:?}");
            assert_eq!(greedy(&encoded, &IDS, 6).unwrap(), greedy(&plain, &IDS, 6).unwrap());
        }
        // One token at a time: the first as it is, the others recorded. Products of other shapes add in one order, and
        // attention's chunks count from the first token.
        let pieces: Vec<&[u32]> = IDS.chunks(1).collect();
        assert!(bits(&logits(&plain, &pieces, &skips)) == expected, "{name}: step by step");
        assert!(
            bits(&logits(&plain, &[&IDS[..4], &IDS[4..5], &IDS[5..]], &skips)) == expected,
            "{name}: in pieces"
        );
    }
}

#[test]
fn sub_layers_can_be_left_out() {
    let model = open(&golden("llama"));
    let gpu = on_gpu(&model, Weights::Bf16).unwrap();
    for skips in [vec![SubLayer::Attention(0)], vec![SubLayer::Mlp(1), SubLayer::Attention(1)]] {
        let skips: Skips = skips.into_iter().collect();
        let (found, expected) = (logits(&gpu, &[&IDS], &skips), logits(&model, &[&IDS], &skips));
        assert!(worst(&found, &expected) < TOLERANCE);
        assert!(worst(&found, &logits(&gpu, &[&IDS], &Skips::new())) > TOLERANCE);
    }
}

#[test]
fn a_switch_of_frequencies_is_followed() {
    // LongRoPE reads the sequence again when it grows beyond the original length.
    let model = open(&golden("phi3_longrope_switch"));
    let gpu = on_gpu(&model, Weights::Bf16).unwrap();
    let switch = model.config().ropes[0].switches_after().unwrap();
    let prompt: Vec<u32> = IDS.iter().cycle().take(switch - 2).copied().collect();
    let mut generation = Generation::start(&gpu, &prompt, 6, Sampling::GREEDY).unwrap();
    let mut all = prompt.clone();
    for _ in 0..6 {
        all.push(generation.next_token().unwrap());
    }
    // The same tokens read at once have the successors that were picked.
    let rows = logits(&gpu, &[&all[..all.len() - 1]], &Skips::new());
    let last = rows.last().unwrap();
    let best = (0..last.len()).reduce(|a, b| if last[b] > last[a] { b } else { a }).unwrap();
    assert_eq!(best as u32, *all.last().unwrap());
}

#[test]
fn draws_are_the_processors_for_the_same_logits() {
    let model = open(&golden("llama"));
    let gpu = on_gpu(&model, Weights::Fixed12).unwrap();
    for limits in [
        Limits { temperature: 0.8, top_k: 20, top_p: 0.9 },
        Limits { temperature: 2.0, top_k: 0, top_p: 1.0 },
        Limits { temperature: 1.5, top_k: 0, top_p: 0.7 },
    ] {
        let Limits { temperature, top_k, top_p } = limits;
        let sampling = Sampling { temperature, top_k, top_p, seed: 7 };
        let mut generation = Generation::start(&gpu, &IDS, 8, sampling).unwrap();
        let found: Vec<u32> = (0..8).map(|_| generation.next_token().unwrap()).collect();
        // The same tokens from the logits themselves.
        let mut random = ChaCha8Rng::seed_from_u64(7);
        let all = [&IDS[..], &found].concat();
        let rows = logits(&gpu, &[&all], &Skips::new());
        let expected: Vec<u32> =
            rows[IDS.len() - 1..][..8].iter().map(|row| cpu::draw(row, limits, random.next_u64())).collect();
        assert_eq!(found, expected, "{limits:?}");
    }
}

#[test]
fn wrong_requests_are_refused_and_nothing_is_lost() {
    let model = open(&golden("llama"));
    let gpu = on_gpu(&model, Weights::Bf16).unwrap();
    let mut session = gpu.session(4).unwrap();
    assert!(matches!(session.read(&IDS, &Skips::new(), 0..1), Err(Error::Limit(_))));
    assert!(matches!(session.read(&[u32::MAX], &Skips::new(), 0..1), Err(Error::Invalid(_))));
    session.read(&IDS[..4], &Skips::new(), 3..4).unwrap();
    assert_eq!(session.len(), 4);
    assert!(matches!(session.read(&IDS[..1], &Skips::new(), 0..1), Err(Error::Limit(_))));
    session.clear();
    assert!(session.is_empty() && session.read(&IDS[..4], &Skips::new(), 3..4).is_ok());
    // All of a session's memory is given back.
    let before = gpu.allocated().0;
    drop(session);
    assert!(gpu.allocated().0 < before);
}

#[test]
fn weights_other_than_bf16_are_refused_by_name() {
    let source = Checkpoint::open(&golden("llama")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let widened: Vec<(String, Vec<usize>, Vec<u8>)> = source
        .tensors()
        .iter()
        .filter(|(_, tensor)| tensor.dtype.name() == "BF16")
        .map(|(name, tensor)| {
            let words: Vec<u16> = bytemuck::pod_collect_to_vec(&source.read_tensor(name).unwrap());
            let bytes = words.iter().flat_map(|w| (u32::from(*w) << 16).to_le_bytes()).collect();
            (name.clone(), tensor.shape.iter().map(|&n| n as usize).collect(), bytes)
        })
        .collect();
    let views = widened.iter().map(|(name, shape, bytes)| {
        (name, safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, &dir.path().join("model.safetensors")).unwrap();
    std::fs::copy(golden("llama").join("config.json"), dir.path().join("config.json")).unwrap();
    let model = open(dir.path());
    for weights in [Weights::Stored, Weights::Dfloat11, Weights::Fixed12] {
        let error = on_gpu(&model, weights).unwrap_err();
        assert!(
            error.to_string().contains("F32") && error.to_string().contains("proj.weight")
                || error.to_string().contains("embed_tokens"),
            "{error}"
        );
    }
}

#[test]
fn tinylm_runs_from_every_encoding() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/tinylm");
    let model = open(&dir);
    let ids: Vec<u32> = (0..24).map(|i| (i * 151 + 7) % 4000).collect();
    let skips = Skips::new();
    let expected = logits(&model, &[&ids], &skips);
    let plain = on_gpu(&model, Weights::Bf16).unwrap();
    let found = logits(&plain, &[&ids], &skips);
    assert!(worst(&found, &expected) < 0.01, "{}", worst(&found, &expected));
    for weights in [Weights::Fixed12, Weights::Dfloat11] {
        let encoded = on_gpu(&model, weights).unwrap();
        assert!(bits(&logits(&encoded, &[&ids], &skips)) == bits(&found), "{weights:?}");
        assert!(encoded.allocated().0 < plain.allocated().0 * 9 / 10);
    }
}

#[test]
fn what_a_model_takes_is_known_before_it_is_loaded() {
    let model = open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/tinylm"));
    for weights in [Weights::Bf16, Weights::Fixed12, Weights::Dfloat11] {
        for capacity in [1, 700] {
            let needs = GpuNeeds::of(&model, weights, capacity).unwrap();
            let gpu = on_gpu(&model, weights).unwrap();
            let loaded = gpu.allocated().0 as f64;
            let off = needs.weights as f64 / loaded;
            assert!((0.95..1.05).contains(&off), "{weights:?}: {needs:?}, {loaded}");
            let session = gpu.session(capacity).unwrap();
            let all = gpu.allocated().0 as f64;
            // Room for the logits is taken when they are asked for.
            let (least, most) = (needs.weights + needs.cache, needs.total());
            assert!(all > 0.95 * least as f64 && all < 1.05 * most as f64, "{weights:?}: {needs:?}, {all}");
            drop(session);
        }
    }
}
