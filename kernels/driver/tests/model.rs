//! Whole models through the driver path: the emulator's bits, recorded steps, and errors instead of panics.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

mod support;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use llmpress_driver_standin::{DRIVER_NAMES, install};
use llmpress_emulator::Emulator;
use llmpress_formats::{Checkpoint, Error, Result};
use llmpress_kernels::gpu::Gpu;
use llmpress_kernels::gpu::cuda::Cuda;
use llmpress_model::{Engine, Generation, GpuModel, Model, Panels, Sampling, Skips, Weights, greedy};
use support::{calls, child, clean, configure, lines};

const IDS: [u32; 11] = [3, 17, 5, 60, 2, 9, 33, 41, 8, 8, 1];
/// Tokens that are generated.
const COUNT: usize = 5;

fn with_driver(test: &str, body: impl FnOnce(&Path)) {
    child(test, |dir| install(dir, DRIVER_NAMES).unwrap(), "", body);
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../model/tests/golden").join(name)
}

fn open(dir: &Path) -> Model {
    Model::open(Arc::new(Checkpoint::open(dir).unwrap())).unwrap()
}

/// The GPU, if it can be opened.
fn cuda() -> Result<Gpu> {
    Cuda::open(0).map(Gpu::new).map_err(|e| Error::Invalid(e.to_string()))
}

/// Logits of all tokens.
fn logits(engine: &dyn Engine, ids: &[u32]) -> Result<Vec<u32>> {
    let mut session = engine.session(ids.len())?;
    session.announce(ids.len());
    session.read(ids, &Skips::new(), 0..ids.len())?;
    let (mut all, mut part) = (Vec::new(), Panels::default());
    for run in engine.logit_runs(ids.len()) {
        session.logits(run, &mut part)?;
        all.extend((0..ids.len()).flat_map(|t| part.token(t).map(f32::to_bits).collect::<Vec<_>>()));
    }
    Ok(all)
}

/// Logits, likeliest tokens and drawn ones.
fn run(model: &GpuModel) -> Result<(Vec<u32>, Vec<u32>, Vec<u32>)> {
    let sampling = Sampling { temperature: 0.9, top_k: 20, top_p: 0.95, seed: 3 };
    let mut drawing = Generation::start(model, &IDS, COUNT, sampling)?;
    let drawn = (0..COUNT).map(|_| drawing.next_token()).collect::<Result<_>>()?;
    drop(drawing);
    Ok((logits(model, &IDS)?, greedy(model, &IDS, COUNT)?, drawn))
}

#[test]
fn a_model_gives_the_emulators_bits_through_the_driver() {
    with_driver("a_model_gives_the_emulators_bits_through_the_driver", |dir| {
        for (name, weights) in [
            ("llama", Weights::Bf16),
            ("llama", Weights::Dfloat11),
            ("qwen3", Weights::Fixed12),
            ("gemma3_softcap", Weights::Stored),
            ("mixtral", Weights::Fixed12),
            ("qwen3_moe", Weights::Dfloat11),
        ] {
            configure(dir, "");
            let model = open(&golden(name));
            let emulated = GpuModel::open(Gpu::new(Emulator::new()), &model, weights, false).unwrap();
            let driven = GpuModel::open(cuda().unwrap(), &model, weights, false).unwrap();
            assert!(run(&driven).unwrap() == run(&emulated).unwrap(), "{name} {weights:?}");
            drop(driven);
            // Each of the two generations recorded a step, after one that was run as it is, and replayed it.
            let all = lines(dir);
            let count = |name| calls(&all).iter().filter(|call| **call == name).count();
            assert_eq!(count("cuStreamEndCapture"), 2);
            assert_eq!(count("cuGraphLaunch"), 2 * (COUNT - 2));
            assert!(all.iter().all(|line| !line.starts_with("refused")), "{name}");
            clean(dir);
        }
    });
}

#[test]
fn a_model_that_picks_its_shapes_gives_the_same_bits() {
    with_driver("a_model_that_picks_its_shapes_gives_the_same_bits", |dir| {
        let model = open(&golden("llama"));
        let picking = GpuModel::open(cuda().unwrap(), &model, Weights::Fixed12, true).unwrap();
        let first = GpuModel::open(cuda().unwrap(), &model, Weights::Fixed12, false).unwrap();
        // One token, so that shapes are picked for one number of tokens only.
        let prompt = &IDS[..1];
        assert_eq!(greedy(&picking, prompt, COUNT).unwrap(), greedy(&first, prompt, COUNT).unwrap());
        drop((picking, first));
        assert!(lines(dir).iter().all(|line| !line.starts_with("refused")));
        clean(dir);
    });
}

#[test]
fn a_model_that_does_not_fit_is_refused_with_sizes() {
    with_driver("a_model_that_does_not_fit_is_refused_with_sizes", |dir| {
        let model = open(&golden("llama"));
        // From no room at all to room for weights, but not for a session.
        let weights = GpuModel::open(cuda().unwrap(), &model, Weights::Bf16, false).unwrap().allocated().0;
        let open = |memory: usize| {
            configure(dir, &format!("memory={memory}"));
            let error = GpuModel::open(cuda().unwrap(), &model, Weights::Bf16, false)
                .and_then(|model| model.session(64).map(|_| ()))
                .unwrap_err();
            assert!(matches!(error, Error::Limit(_)), "{error:?}");
            clean(dir);
            error.to_string()
        };
        for memory in [1000, weights / 2] {
            let text = open(memory);
            assert!(text.contains("weights of") && text.contains("MB are free"), "{text}");
            // Before anything was loaded.
            assert!(!calls(&lines(dir)).contains(&"cuMemAlloc_v2"), "{memory}");
        }
        let memory = weights + 100;
        let text = open(memory);
        assert!(text.contains("bytes") && text.contains(&memory.to_string()), "{text}");
    });
}

#[test]
fn a_gpu_that_is_lost_ends_in_an_error_wherever_it_happens() {
    with_driver("a_gpu_that_is_lost_ends_in_an_error_wherever_it_happens", |dir| {
        let model = open(&golden("llama"));
        let all = || {
            let gpu = GpuModel::open(cuda()?, &model, Weights::Fixed12, false)?;
            greedy(&gpu, &IDS, COUNT)
        };
        all().unwrap();
        let names = lines(dir);
        // Up to the call that brings the last token; what comes after it gives things back.
        let end = calls(&names).iter().rposition(|call| *call == "cuMemcpyDtoHAsync_v2").unwrap() + 1;
        for part in 0..=40 {
            configure(dir, &format!("lose={}", (part * end / 40).max(1)));
            let error = all().unwrap_err().to_string();
            assert!(error.contains("CUDA_ERROR_LAUNCH_FAILED"), "{part}: {error}");
        }
        for call in ["cuGraphLaunch:1", "cuStreamEndCapture:1", "cuGraphInstantiateWithFlags:1"] {
            configure(dir, &format!("lose={call}"));
            let error = all().unwrap_err().to_string();
            assert!(error.contains("CUDA_ERROR_LAUNCH_FAILED"), "{call}: {error}");
        }
    });
}
