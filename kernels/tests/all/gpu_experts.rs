//! Experts on a GPU: choices are the processor's, and every slot gets what it would get by itself.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use llmpress_emulator::Emulator;
use llmpress_entropy::dfloat11;
use llmpress_kernels::cpu;
use llmpress_kernels::gpu::dfloat11::{Components, Unit};
use llmpress_kernels::gpu::experts::{Plan, Routing, Width, group, route};
use llmpress_kernels::gpu::fixed12::{Encoded, ExpertPile};
use llmpress_kernels::gpu::{Buffer, Error, Gpu, reference};
use proptest::prelude::*;

struct Buffers(Vec<Buffer>);

impl Buffers {
    fn new(gpu: &Gpu, routing: Routing, tokens: usize) -> Self {
        Self(routing.bytes(tokens).into_iter().map(|bytes| gpu.allocate(bytes).unwrap()).collect())
    }

    fn plan(&self) -> Plan<'_> {
        let view = |i: usize| self.0[i].view();
        Plan { chosen: view(0), weights: view(1), slots: view(2), jobs: view(3), counts: view(4) }
    }
}

/// Logits, many of them alike, some of them extreme.
fn logit() -> impl Strategy<Value = f32> {
    prop_oneof![
        6 => (-4i8..4).prop_map(f32::from),
        4 => -8f32..8.0,
        1 => prop_oneof![Just(f32::INFINITY), Just(f32::NEG_INFINITY), Just(f32::NAN), Just(-0.0), Just(1e30)],
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn tokens_find_the_experts_of_the_reference_and_are_grouped_by_them(
        experts in 1usize..140, share in 0usize..32, tokens in 1usize..40, normalise in any::<bool>(),
        all in proptest::collection::vec(logit(), 40 * 140), backwards in any::<bool>(),
    ) {
        let routing = Routing { experts, top_k: 1 + share % experts.min(32), normalise };
        let gpu = Gpu::new(if backwards { Emulator::backwards() } else { Emulator::new() });
        let logits = &all[..tokens * experts];
        let buffers = Buffers::new(&gpu, routing, tokens);
        let plan = buffers.plan();
        route(&gpu, routing, gpu.upload(logits).unwrap().view(), tokens, &plan).unwrap();
        let expected: Vec<(usize, f32)> =
            logits.chunks(experts).flat_map(|row| reference::route(row, routing.top_k, normalise)).collect();
        let slots = routing.slots(tokens);
        let chosen: Vec<u32> = plan.chosen.read(slots).unwrap();
        let weights: Vec<f32> = plan.weights.read(slots).unwrap();
        for (slot, (expert, weight)) in expected.iter().enumerate() {
            // Where all are NaNs any are as good; they must be experts all the same.
            prop_assert!((chosen[slot] as usize) < experts);
            prop_assert!(weight.is_nan() || chosen[slot] as usize == *expert, "{chosen:?} {expected:?}");
            prop_assert!(weights[slot].to_bits() == weight.to_bits() || weight.is_nan() && weights[slot].is_nan());
        }
        let mut order: Vec<u32> = (0..slots as u32).collect();
        order.sort_by_key(|slot| chosen[*slot as usize]);
        for width in Width::ALL {
            group(&gpu, routing, tokens, width, &plan).unwrap();
            prop_assert_eq!(&plan.slots.read::<u32>(slots).unwrap(), &order);
            let counts: Vec<u32> = plan.counts.read(experts).unwrap();
            for (expert, count) in counts.iter().enumerate() {
                prop_assert_eq!(*count as usize, chosen.iter().filter(|c| **c as usize == expert).count());
            }
            // Jobs are the slots in order, none twice, each of one expert.
            let jobs: Vec<[u32; 4]> = plan.jobs.read(routing.jobs(tokens, width)).unwrap();
            let mut at = 0;
            for [expert, first, count, _] in jobs.into_iter().filter(|job| job[2] > 0) {
                prop_assert_eq!(first, at);
                prop_assert!(count as usize <= width.slots());
                at += count;
                prop_assert!(order[first as usize..at as usize].iter().all(|slot| chosen[*slot as usize] == expert));
            }
            prop_assert_eq!(at as usize, slots);
        }
    }
}

#[test]
fn weights_are_the_processors_softmax() {
    let logits = [0.5f32, -1.25, 3.0, 2.75, 0.0];
    // Of several tokens, whose sums the processor adds in ascending order.
    let mut columns: Vec<f32> = logits.iter().flat_map(|l| [*l, *l]).collect();
    cpu::softmax(&mut columns, 2);
    let found = reference::route(&logits, 2, false);
    assert_eq!(found, [(2, columns[4]), (3, columns[6])]);
    let sum = columns[4] + columns[6];
    assert_eq!(reference::route(&logits, 2, true), [(2, columns[4] / sum), (3, columns[6] / sum)]);
}

#[test]
fn only_what_belongs_to_the_wanted_experts_is_decoded() {
    let gpu = Gpu::new(Emulator::new());
    let mut state = 5u64;
    let words: Vec<u16> = (0..60_000)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            half::bf16::from_f32(((state >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * 0.1).to_bits()
        })
        .collect();
    let encoded = dfloat11::encode(&words).unwrap();
    let positions: Vec<u32> = bytemuck::pod_collect_to_vec(&encoded.output_positions);
    let mut unit = Unit::upload(
        &gpu,
        &Components {
            luts: &encoded.luts,
            encoded_exponent: &encoded.encoded_exponent,
            sign_mantissa: &encoded.sign_mantissa,
            output_positions: &positions,
            gaps: &encoded.gaps,
        },
    )
    .unwrap();
    // Two large experts, three that lie in one block together, and what belongs to none before, between and after.
    let ranges = [
        (1000..20_000, 0),
        (20_000..40_000, 1),
        (41_000..41_020, 2),
        (41_020..41_030, 3),
        (41_030..41_100, 4),
    ];
    unit.own(&gpu, 5, &ranges).unwrap();
    let nothing = vec![0xabcd_u16; words.len()];
    let out = gpu.upload(&nothing).unwrap();
    let decoded = |expert: Option<usize>| {
        let found: Vec<u16> = out.view().read(words.len()).unwrap();
        let inside = |range: &std::ops::Range<usize>| found[range.clone()] == words[range.clone()];
        let common = [0..1000, 40_000..41_000, 41_100..60_000].iter().all(inside);
        let whole: Vec<bool> = ranges.iter().map(|(range, _)| inside(range)).collect();
        assert!(expert.is_none_or(|expert| whole[expert]), "{expert:?}");
        (common, whole, found.iter().filter(|word| **word == 0xabcd).count())
    };
    unit.decode_common(&gpu, out.view()).unwrap();
    let (common, whole, untouched) = decoded(None);
    assert!(common && !whole[0] && !whole[1] && untouched > 10_000);
    for expert in 0..5 {
        out.view().write(&nothing).unwrap();
        let mut wanted = [0u32; 5];
        wanted[expert] = 3;
        unit.decode_wanted(&gpu, gpu.upload(&wanted).unwrap().view(), out.view()).unwrap();
        let (_, _, untouched) = decoded(Some(expert));
        assert!(untouched > 10_000, "{expert}: {untouched}");
    }
    out.view().write(&nothing).unwrap();
    unit.decode(&gpu, out.view()).unwrap();
    assert_eq!(out.view().read::<u16>(words.len()).unwrap(), words);
    for bad in [
        vec![(0..10, 5)],
        vec![(5..10, 0), (0..5, 1)],
        vec![(0..words.len() + 1, 0)],
        vec![(0..10, 0), (9..20, 1)],
    ] {
        assert!(matches!(unit.own(&gpu, 5, &bad), Err(Error::Invalid(_))), "{bad:?}");
    }
}

#[test]
fn what_no_kernel_does_is_refused() {
    let routing = |experts, top_k| Routing { experts, top_k, normalise: true };
    for bad in [routing(0, 0), routing(4, 5), routing(4, 0), routing(1025, 2), routing(64, 33)] {
        assert!(matches!(bad.check(), Err(Error::Unsupported(_))), "{bad:?}");
    }
    routing(1024, 32).check().unwrap();
    let gpu = Gpu::new(Emulator::new());
    let part = |rows: usize| Encoded::new(rows, 8, &vec![0; rows * 8]).unwrap();
    let mut pile = ExpertPile::new(&gpu, 1, 20, 8).unwrap();
    assert!(pile.add(&part(21).part()).is_err(), "more rows than an expert has");
    let mut pile = ExpertPile::new(&gpu, 2, 20, 8).unwrap();
    pile.add(&part(16).part()).unwrap();
    assert!(pile.finish(&gpu).is_err(), "an expert without its last rows");
    let mut pile = ExpertPile::new(&gpu, 1, 20, 8).unwrap();
    pile.add(&part(10).part()).unwrap();
    assert!(pile.add(&part(10).part()).is_err(), "a part that ends inside a strip");
}
