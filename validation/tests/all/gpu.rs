//! Proofs run on a GPU as they do on the processor; here on the emulator.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::path::Path;
use std::sync::Arc;

use llmpress_emulator::Emulator;
use llmpress_formats::Checkpoint;
use llmpress_kernels::gpu::Gpu;
use llmpress_model::{GpuModel, Model, Skips, SubLayer, Tokenizer, Weights};
use llmpress_validation::{Protocol, RandomModel, kl_divergence, logits_exact, perplexity};

fn tinylm() -> (Model, Vec<u32>, usize) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/tinylm");
    let model = Model::open(Arc::new(Checkpoint::open(&dir).unwrap())).unwrap();
    let text = std::fs::read_to_string(dir.join("eval.txt")).unwrap();
    (model, Tokenizer::open(&dir).unwrap().encode(&text).unwrap(), text.len())
}

fn on_gpu(model: &Model, weights: Weights) -> GpuModel {
    GpuModel::open(Gpu::new(Emulator::new()), model, weights, false).unwrap()
}

#[test]
fn encodings_are_proven_exact_and_bf16_activations_near() {
    let (model, ids, bytes) = tinylm();
    let protocol = Protocol { window: 24, stride: None, limit: Some(2), bos: None };
    let plain = on_gpu(&model, Weights::Bf16);
    let encoded = on_gpu(&model, Weights::Fixed12);
    let comparison = logits_exact(&plain, &encoded, &ids, protocol, 3, &mut |_| ()).unwrap();
    assert!(comparison.is_exact(), "{comparison:?}");
    assert_eq!(comparison.logits, 2 * 23 * 4096);
    // Activations in BF16 move the distribution a little, and something.
    let found = kl_divergence(&model, &encoded, &Skips::new(), &ids, protocol, None, &mut |_| ()).unwrap();
    assert!(found.kl.mean > 0.0 && found.kl.mean < 1e-4, "{found:?}");
    let of = |engine: &dyn llmpress_model::Engine| {
        perplexity(engine, &Skips::new(), &ids, bytes, protocol, None, &mut |_| ()).unwrap().perplexity
    };
    let (cpu, gpu) = (of(&model), of(&plain));
    assert!((gpu / cpu - 1.0).abs() < 5e-3, "{cpu} {gpu}");
}

#[test]
fn windows_at_once_give_the_figures_of_one_after_the_other_to_the_bit() {
    let (model, ids, bytes) = tinylm();
    let gpu = on_gpu(&model, Weights::Fixed12);
    let none = Skips::new();
    for (stride, limit) in [(None, 5), (Some(7), 4)] {
        let protocol = Protocol { window: 12, stride, limit: Some(limit), bos: Some(1) };
        let ppl = |batch| perplexity(&gpu, &none, &ids, bytes, protocol, batch, &mut |_| ()).unwrap();
        let one = ppl(Some(1));
        let mut told = Vec::new();
        let three =
            perplexity(&gpu, &none, &ids, bytes, protocol, Some(3), &mut |done| told.push(done)).unwrap();
        assert_eq!(told, (1..=limit).collect::<Vec<_>>());
        for other in [three, ppl(None)] {
            assert_eq!(other.nats_per_token.to_bits(), one.nats_per_token.to_bits());
            assert_eq!(
                other.nats_per_token_standard_error.to_bits(),
                one.nats_per_token_standard_error.to_bits()
            );
            assert_eq!(other.scored_tokens, one.scored_tokens);
        }
        let kld = |batch| kl_divergence(&model, &gpu, &none, &ids, protocol, batch, &mut |_| ()).unwrap();
        assert_eq!(kld(Some(1)), kld(Some(2)));
    }
}

/// Minutes of emulation: `cargo test -p llmpress-validation --test all gpu:: -- --ignored --nocapture`.
#[test]
#[ignore = "minutes of emulation"]
fn perplexity_is_the_processors_to_a_thousandth() {
    let (model, ids, bytes) = tinylm();
    let protocol = Protocol { window: 512, stride: None, limit: Some(8), bos: None };
    let of = |engine: &dyn llmpress_model::Engine| {
        perplexity(engine, &Skips::new(), &ids, bytes, protocol, None, &mut |_| ()).unwrap()
    };
    let (cpu, gpu) = (of(&model), of(&on_gpu(&model, Weights::Fixed12)));
    println!(
        "{} tokens: {:.5} on the processor, {:.5} emulated",
        gpu.scored_tokens, cpu.perplexity, gpu.perplexity
    );
    assert!((gpu.perplexity / cpu.perplexity - 1.0).abs() < 1e-3);
}

/// What `bench gpu` compares processor and GPU on where it is given no model: near where it is right, and far where any
/// part is wrong.
#[test]
fn the_small_random_model_tells_right_from_wrong() {
    let dir = tempfile::tempdir().unwrap();
    RandomModel::Small.write(dir.path()).unwrap();
    let model = Model::open(Arc::new(Checkpoint::open(dir.path()).unwrap())).unwrap();
    let text = std::fs::read_to_string(dir.path().join("eval.txt")).unwrap();
    let ids = Tokenizer::open(dir.path()).unwrap().encode(&text).unwrap();
    assert_eq!(ids.len(), 8 * 256, "a token a character");
    let of = |engine: &dyn llmpress_model::Engine, skips: &Skips, window, limit| {
        let protocol = Protocol { window, stride: None, limit: Some(limit), bos: None };
        perplexity(engine, skips, &ids, text.len(), protocol, None, &mut |_| ()).unwrap().perplexity
    };
    let none = Skips::new();
    let right = of(&model, &none, 64, 3);
    let gpu = of(&on_gpu(&model, Weights::Bf16), &none, 64, 3);
    assert!((gpu / right - 1.0).abs() < 2.5e-3, "{right} {gpu}");
    assert_eq!(gpu.to_bits(), of(&on_gpu(&model, Weights::Dfloat11), &none, 64, 3).to_bits());
    // Ten times what is called near, for every part.
    let right = of(&model, &none, 256, 8);
    for layer in 0..4 {
        for part in [SubLayer::Attention(layer), SubLayer::Mlp(layer)] {
            let wrong = of(&model, &Skips::from([part]), 256, 8);
            assert!(wrong / right - 1.0 > 5e-2, "{part:?}: {right} {wrong}");
        }
    }
}
