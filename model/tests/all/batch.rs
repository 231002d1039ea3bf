//! Sequences side by side have what each has by itself: on the processor, and on a GPU in the emulator.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use llmpress_emulator::Emulator;
use llmpress_formats::{Checkpoint, Error};
use llmpress_kernels::gpu::Gpu;
use llmpress_model::{
    Engine, Finished, Generation, GpuModel, Model, Panels, Sampling, Skips, SubLayer, Weights, generate_all,
};

const DRAWN: Sampling = Sampling { temperature: 1.2, top_k: 30, top_p: 0.95, seed: 11 };

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn open(name: &str) -> Model {
    Model::open(Arc::new(Checkpoint::open(&golden(name)).unwrap())).unwrap()
}

fn on_gpu(model: &Model, weights: Weights) -> GpuModel {
    GpuModel::open(Gpu::new(Emulator::new()), model, weights, false).unwrap()
}

/// Prompts of several lengths.
fn prompts() -> Vec<Vec<u32>> {
    let lengths = [5, 1, 9, 3, 7];
    lengths
        .iter()
        .enumerate()
        .map(|(i, n)| (0..*n).map(|t| (t * 13 + i as u32 * 29 + 3) % 120).collect())
        .collect()
}

/// What each prompt gives by itself.
fn one_by_one(
    engine: &dyn Engine,
    prompts: &[Vec<u32>],
    most: usize,
    sampling: Sampling,
    ends: &[u32],
) -> Vec<Finished> {
    let one = |ids: &Vec<u32>| {
        let mut generation = Generation::start(engine, ids, most, sampling).unwrap();
        let mut finished = Finished { tokens: Vec::new(), ended: false };
        while finished.tokens.len() < most && !finished.ended {
            let id = generation.next_token().unwrap();
            finished.tokens.push(id);
            finished.ended = ends.contains(&id);
        }
        finished
    };
    prompts.iter().map(one).collect()
}

fn check(engine: &dyn Engine, name: &str) {
    let (prompts, most) = (prompts(), 6);
    for sampling in [Sampling::GREEDY, DRAWN] {
        let plain = one_by_one(engine, &prompts, most, sampling, &[]);
        // Tokens that end some of them early, so that they drop out and others take their place.
        let ends = [plain[0].tokens[1], plain[2].tokens[3]];
        let expected = one_by_one(engine, &prompts, most, sampling, &ends);
        assert!(expected.iter().any(|one| one.ended));
        for batch in [Some(1), Some(2), Some(3), Some(9), None] {
            let mut told = Vec::new();
            let found =
                generate_all(engine, &prompts, most, sampling, &ends, batch, &mut |i| told.push(i)).unwrap();
            assert_eq!(found, expected, "{name}, {batch:?} at once, {sampling:?}");
            told.sort_unstable();
            assert_eq!(told, (0..prompts.len()).collect::<Vec<_>>());
        }
    }
}

#[test]
fn prompts_at_once_get_the_tokens_that_each_gets_by_itself_on_the_processor() {
    for name in [
        "llama_bias",
        "gemma3_softcap",
        "phi3",
        "qwen3_moe",
        "mistral",
        "gpt_oss",
        "deepseek_v3",
        "qwen3_next",
        "qwen3_5",
        "llama4",
    ] {
        check(&open(name), name);
        let mut encoded = open(name);
        for weights in [Weights::Fixed12, Weights::Dfloat11] {
            encoded.load(weights).unwrap();
            check(&encoded, name);
        }
    }
}

#[test]
fn prompts_at_once_get_the_tokens_that_each_gets_by_itself_on_a_gpu() {
    for (name, weights) in
        [("llama_bias", Weights::Bf16), ("gemma3_softcap", Weights::Fixed12), ("mixtral", Weights::Dfloat11)]
    {
        check(&on_gpu(&open(name), weights), name);
    }
}

#[test]
fn lengths_are_not_mixed_where_rotary_embeddings_depend_on_them() {
    let model = open("llama_dynamic");
    assert!(!model.mixes_lengths() && open("llama").mixes_lengths());
    check(&model, "llama_dynamic");
}

/// Logits of the kept tokens of each sequence, as bits.
fn read_at_once(engine: &dyn Engine, ids: &[&[u32]], skips: &Skips) -> Vec<Vec<u32>> {
    let each = ids[0].len();
    let mut batch = engine.batch(ids.len() + 1, each).unwrap();
    // Places in another order than that of the sequences.
    let places: Vec<usize> = (0..ids.len()).rev().collect();
    batch.read(&places, &ids.concat(), skips, 1..each).unwrap();
    let mut part = Panels::default();
    (0..ids.len())
        .map(|number| {
            let mut all = Vec::new();
            for run in engine.logit_runs(each - 1) {
                batch.logits(number, run, &mut part).unwrap();
                all.extend((0..each - 1).flat_map(|t| part.token(t).map(f32::to_bits).collect::<Vec<_>>()));
            }
            all
        })
        .collect()
}

#[test]
fn windows_at_once_have_the_bits_of_one_after_the_other() {
    let ids: Vec<u32> = (0..60).map(|i| (i * 37 + 11) % 120).collect();
    let windows: Vec<&[u32]> = ids.chunks(12).collect();
    let model = open("llama");
    let gpu = on_gpu(&model, Weights::Fixed12);
    for engine in [&model as &dyn Engine, &gpu] {
        for skips in [Skips::new(), Skips::from([SubLayer::Mlp(0), SubLayer::Attention(1)])] {
            let together = read_at_once(engine, &windows, &skips);
            for (window, expected) in windows.iter().zip(&together) {
                assert!(read_at_once(engine, &[window], &skips) == [expected.clone()]);
            }
        }
    }
}

#[test]
fn wrong_sequences_are_refused() {
    let model = open("llama");
    let gpu = on_gpu(&model, Weights::Bf16);
    for engine in [&model as &dyn Engine, &gpu] {
        let mut batch = engine.batch(2, 4).unwrap();
        let none = Skips::new();
        let mut read = |places: &[usize], ids: &[u32]| batch.read(places, ids, &none, 0..1);
        assert!(matches!(read(&[], &[]), Err(Error::Invalid(_))));
        assert!(matches!(read(&[2], &[1]), Err(Error::Invalid(_))));
        assert!(matches!(read(&[1, 1], &[1, 2]), Err(Error::Invalid(_))));
        assert!(matches!(read(&[0, 1], &[1, 2, 3]), Err(Error::Invalid(_))));
        assert!(matches!(read(&[0, 1], &[1, u32::MAX]), Err(Error::Invalid(_))));
        assert!(matches!(read(&[0], &[1, 2, 3, 4, 5]), Err(Error::Limit(_))));
        read(&[0, 1], &[1, 2]).unwrap();
        assert!(batch.logits(2, 0..8, &mut Panels::default()).is_err());
        assert!(batch.prefill(0, &[]).is_err());
    }
    assert!(generate_all(&gpu, &prompts(), 2, Sampling::GREEDY, &[], Some(0), &mut |_| ()).is_err());
    assert!(gpu.batch(0, 4).is_err() && gpu.batch(1 << 20, 4).is_err());
}
