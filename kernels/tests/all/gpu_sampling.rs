//! Tokens drawn on a GPU are the processor's, and near those in double precision.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use llmpress_emulator::Emulator;
use llmpress_kernels::cpu::{self, Limits};
use llmpress_kernels::gpu::sampling::{DRAW_WORKSPACE_BYTES, Draw, draw};
use llmpress_kernels::gpu::{Error, Gpu};
use proptest::prelude::*;

fn on_gpu(gpu: &Gpu, logits: &[f32], l: Limits, random: u64) -> Result<u32, Error> {
    let (buffer, random) = (gpu.upload(logits).unwrap(), gpu.upload(&[random]).unwrap());
    let workspace = gpu.upload(&vec![u8::MAX; DRAW_WORKSPACE_BYTES]).unwrap();
    let ids = gpu.upload(&[u32::MAX]).unwrap();
    draw(
        gpu,
        &Draw {
            logits: buffer.view(),
            vocab: logits.len(),
            limits: l,
            random: random.view(),
            workspace: workspace.view(),
            ids: ids.view(),
        },
    )?;
    Ok(ids.view().read::<u32>(1).unwrap()[0])
}

/// Likeliest first, NaNs last, of equals the lower id.
fn order(logits: &[f32]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| {
        let (x, y) = (logits[a], logits[b]);
        x.is_nan().cmp(&y.is_nan()).then(if x.is_nan() { a.cmp(&b) } else { y.total_cmp(&x).then(a.cmp(&b)) })
    });
    order
}

/// A logit, many of them alike.
fn logit() -> impl Strategy<Value = f32> {
    prop_oneof![
        6 => -20f32..20.0,
        3 => (-4i8..4).prop_map(f32::from),
        1 => any::<u32>().prop_map(f32::from_bits),
        1 => prop_oneof![Just(0.0), Just(-0.0), Just(f32::NEG_INFINITY), Just(f32::NAN), Just(1e-40)],
    ]
}

fn limits(vocab: usize) -> impl Strategy<Value = Limits> {
    let top_k = prop_oneof![Just(0usize), Just(1), 1..=vocab + 2];
    let top_p = prop_oneof![Just(1f32), 0.01f32..1.0, Just(1e-12f32), Just(0.999_999_94f32)];
    (prop_oneof![0.05f32..3.0, Just(100.0f32), Just(1e-3f32)], top_k, top_p)
        .prop_map(|(temperature, top_k, top_p)| Limits { temperature, top_k, top_p })
}

fn case() -> impl Strategy<Value = (Vec<f32>, Limits)> {
    let size = prop_oneof![1usize..40, 1usize..1000, 2040usize..2060, 4000usize..4500];
    size.prop_flat_map(|n| (proptest::collection::vec(logit(), n), limits(n)))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn draws_follow_the_definition(
        (logits, limits) in case(), random in prop_oneof![any::<u64>(), Just(0), Just(u64::MAX)],
    ) {
        let gpu = Gpu::new(Emulator::new());
        prop_assert_eq!(on_gpu(&gpu, &logits, limits, random).unwrap(), cpu::draw(&logits, limits, random));
        let gpu = Gpu::new(Emulator::backwards());
        prop_assert_eq!(on_gpu(&gpu, &logits, limits, random).unwrap(), cpu::draw(&logits, limits, random));
    }

    #[test]
    fn draws_are_near_those_in_double_precision(
        logits in proptest::collection::vec(-15f32..15.0, 2..800), random: u64, temperature in 0.2f32..2.0,
        top_k in 0usize..50, top_p in 0.1f32..=1.0,
    ) {
        let found = on_gpu(&Gpu::new(Emulator::new()), &logits, Limits { temperature, top_k, top_p }, random).unwrap();
        let mut order = order(&logits);
        let best = logits[order[0]];
        if top_k != 0 {
            order.truncate(top_k);
        }
        let weights: Vec<f64> =
            order.iter().map(|&i| f64::from((logits[i] - best) / temperature).exp()).collect();
        let total: f64 = weights.iter().sum();
        let at = order.iter().position(|&i| i as u32 == found).unwrap();
        // The drawn token lies where a share of the kept weight, which is anything near top-p, ends.
        let before: f64 = weights[..at].iter().sum();
        let mut kept = 0.0;
        let mut possible = false;
        for weight in &weights {
            let was = kept;
            kept += weight;
            let near = 1e-6 * total;
            let ends = was < f64::from(top_p) * total + near && kept >= f64::from(top_p) * total - near;
            let target = random as f64 / 2f64.powi(64) * kept;
            possible |= ends && target >= before - near && target <= before + weights[at] + near;
        }
        prop_assert!(possible, "{found}");
    }
}

#[test]
fn odd_logits_and_limits() {
    let gpu = Gpu::new(Emulator::new());
    let all = Limits { temperature: 1.0, top_k: 0, top_p: 1.0 };
    assert_eq!(on_gpu(&gpu, &[f32::NAN; 3], all, u64::MAX).unwrap(), 0);
    assert_eq!(on_gpu(&gpu, &[f32::NAN, f32::INFINITY, 3.0, f32::INFINITY], all, 0).unwrap(), 1);
    assert_eq!(on_gpu(&gpu, &[f32::NAN, f32::INFINITY, 3.0, f32::INFINITY], all, u64::MAX).unwrap(), 3);
    assert_eq!(on_gpu(&gpu, &[f32::NEG_INFINITY; 4], all, u64::MAX / 2 + 1).unwrap(), 2);
    // The first of equals alone.
    assert_eq!(on_gpu(&gpu, &[1.0, 2.0, 2.0], Limits { top_k: 1, ..all }, u64::MAX).unwrap(), 1);
    for bad in [
        Limits { temperature: 0.0, ..all },
        Limits { temperature: f32::NAN, ..all },
        Limits { top_p: 0.0, ..all },
        Limits { top_p: 1.1, ..all },
    ] {
        assert!(matches!(on_gpu(&gpu, &[1.0], bad, 0), Err(Error::Invalid(_))), "{bad:?}");
    }
    assert!(matches!(on_gpu(&gpu, &[], all, 0), Err(Error::Unsupported(_))));
}
