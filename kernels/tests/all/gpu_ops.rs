//! The dense operations of a decoder on a GPU equal scalar references bit for bit.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use llmpress_emulator::Emulator;
use llmpress_entropy::fixed12::{Strips, StripsRef, encode_strips};
use llmpress_kernels::cpu;
use llmpress_kernels::gpu::attention::{
    Attend, Cache, Form, Heads, Sequences, TILE, attend, attend_in, workspace_bytes,
};
use llmpress_kernels::gpu::dense::{Element, padded};
use llmpress_kernels::gpu::embedding::{Gather, add_positions, embed, embed_fixed12};
use llmpress_kernels::gpu::fixed12::Matrix;
use llmpress_kernels::gpu::gate::{Activation, gate};
use llmpress_kernels::gpu::layer_norm::layer_norm;
use llmpress_kernels::gpu::reference::{self, Past, inverse_root, round, widen as wide};
use llmpress_kernels::gpu::rms_norm::{add_rms_norm, rms_norm, rms_norm_rows, round_rows};
use llmpress_kernels::gpu::rope::{HeadNorms, Rotation, rope};
use llmpress_kernels::gpu::sampling::{advance, argmax, argmax_workspace_bytes, soft_cap};
use llmpress_kernels::gpu::{Error, Gpu};
use llmpress_numbers::Numbers;
use proptest::prelude::*;

fn emulators() -> [Gpu; 2] {
    [Gpu::new(Emulator::new()), Gpu::new(Emulator::backwards())]
}

fn same(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan())
}

fn same_words(a: &[u16], b: &[u16]) -> bool {
    let nan = |x: u16| wide(x).is_nan();
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a == b || nan(*a) && nan(*b))
}

/// Any float, common ones more often.
fn float() -> impl Strategy<Value = f32> {
    prop_oneof![
        8 => -4f32..4.0,
        1 => -1e30f32..1e30,
        1 => any::<u32>().prop_map(f32::from_bits),
        1 => prop_oneof![Just(0.0), Just(-0.0), Just(f32::INFINITY), Just(f32::NEG_INFINITY), Just(1e-40)],
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn norms(hidden in 1usize..600, tokens in 1usize..4, all in proptest::collection::vec(float(), 2400),
             padding in 0usize..70) {
        let (h, rest) = all.split_at(tokens * hidden.min(600));
        let y: Vec<f32> = rest.iter().cycle().take(h.len()).copied().collect();
        let weight: Vec<f32> = all.iter().rev().take(hidden).copied().collect();
        let ld = hidden + padding;
        for gpu in emulators() {
            let (h_buffer, w) = (gpu.upload(h).unwrap(), gpu.upload(&weight).unwrap());
            let x = gpu.allocate(2 * tokens * ld).unwrap();
            rms_norm(&gpu, h_buffer.view(), w.view(), hidden, tokens, 1e-5, x.view(), ld).unwrap();
            let found: Vec<u16> = x.view().read(tokens * ld).unwrap();
            let y_buffer = gpu.upload(&y).unwrap();
            add_rms_norm(&gpu, y_buffer.view(), w.view(), hidden, tokens, 1e-6, h_buffer.view()).unwrap();
            let added: Vec<f32> = h_buffer.view().read(tokens * hidden).unwrap();
            for token in 0..tokens {
                let h = &h[token * hidden..][..hidden];
                let scale = inverse_root(h, 1e-5);
                let mut expected: Vec<u16> = h.iter().zip(&weight).map(|(x, w)| round(x * scale * w)).collect();
                expected.resize(ld, 0);
                prop_assert!(same_words(&found[token * ld..][..ld], &expected));
                let y = &y[token * hidden..][..hidden];
                let scale = inverse_root(y, 1e-6);
                let expected: Vec<f32> =
                    h.iter().zip(y).zip(&weight).map(|((h, y), w)| h + y * scale * w).collect();
                prop_assert!(same(&added[token * hidden..][..hidden], &expected));
            }
            let (h_buffer, b) = (gpu.upload(h).unwrap(), gpu.upload(&y[..hidden]).unwrap());
            for bias in [None, Some(b.view())] {
                layer_norm(&gpu, h_buffer.view(), w.view(), bias, hidden, tokens, 1e-5, x.view(), ld).unwrap();
                let found: Vec<u16> = x.view().read(tokens * ld).unwrap();
                for (h, found) in h.chunks(hidden).zip(found.chunks(ld)) {
                    let expected = reference::layer_norm(h, &weight, bias.map(|_| &y[..hidden]), 1e-5);
                    let mut expected: Vec<u16> = expected.into_iter().map(round).collect();
                    expected.resize(ld, 0);
                    prop_assert!(same_words(found, &expected));
                }
            }
            round_rows(&gpu, h_buffer.view(), hidden, tokens, x.view(), ld).unwrap();
            let found: Vec<u16> = x.view().read(tokens * ld).unwrap();
            for (h, found) in h.chunks(hidden).zip(found.chunks(ld)) {
                let mut expected: Vec<u16> = h.iter().map(|x| round(*x)).collect();
                expected.resize(ld, 0);
                prop_assert!(same_words(found, &expected));
            }
            let width = 1 + padding % hidden;
            rms_norm_rows(&gpu, h_buffer.view(), hidden, w.view(), width, tokens, 1e-5).unwrap();
            let mut expected = h.to_vec();
            for row in expected.chunks_mut(hidden) {
                let scale = inverse_root(&row[..width], 1e-5);
                row[..width].iter_mut().zip(&weight).for_each(|(x, w)| *x = *x * scale * w);
            }
            prop_assert!(same(&h_buffer.view().read::<f32>(h.len()).unwrap(), &expected));
        }
    }

    #[test]
    fn gates(inner in 1usize..1100, tokens in 1usize..3, all in proptest::collection::vec(float(), 4500),
             fused in any::<bool>(), gated in any::<bool>(), padding in 0usize..70) {
        let stride = if fused { 2 * inner } else { inner };
        let input = &all[..tokens * 2 * inner];
        let ld = inner + padding;
        for (activation, reference) in [
            (Activation::Silu, cpu::silu_gate as fn(&[f32], &mut [f32])),
            (Activation::GeluTanh, cpu::gelu_tanh_gate),
        ] {
            let gpu = Gpu::new(Emulator::new());
            let buffer = gpu.upload(input).unwrap();
            let up = if fused { 4 * inner } else { 4 * tokens * inner };
            let (gates, ups) = (buffer.view(), buffer.slice(up..buffer.bytes()).unwrap());
            let x = gpu.allocate(2 * tokens * ld).unwrap();
            let ups = Some(ups).filter(|_| gated);
            gate(&gpu, activation, gates, ups, inner, stride, tokens, x.view(), ld).unwrap();
            let found: Vec<u16> = x.view().read(tokens * ld).unwrap();
            for token in 0..tokens {
                let up = &input[up / 4 + token * stride..][..inner];
                let mut expected = if gated { up.to_vec() } else { vec![1.0; inner] };
                reference(&input[token * stride..][..inner], &mut expected);
                let mut expected: Vec<u16> = expected.into_iter().map(round).collect();
                expected.resize(ld, 0);
                prop_assert!(same_words(&found[token * ld..][..ld], &expected));
            }
        }
    }

    #[test]
    fn embeddings(words in proptest::collection::vec(any::<u16>(), 40 * 200), hidden in 1usize..200,
                  ids in proptest::collection::vec(0u32..45, 1..6), base in 0i16..=239) {
        let vocab = 40;
        let words = &words[..vocab * hidden];
        let mut strips = Strips::default();
        encode_strips(base, hidden, words, &mut strips).unwrap();
        let mut offsets = vec![0u32];
        for n in &strips.escape_counts {
            offsets.push(offsets.last().unwrap() + n);
        }
        let strips = StripsRef {
            sign_mantissa: &strips.sign_mantissa,
            codes: &strips.codes,
            escape_offsets: &offsets,
            escape_positions: &strips.escape_positions,
            escape_exponents: &strips.escape_exponents,
        };
        let gpu = Gpu::new(Emulator::new());
        let table = gpu.upload(&padded(hidden, words)).unwrap();
        let matrix = Matrix::upload(&gpu, vocab, hidden, base, &strips).unwrap();
        let (id_buffer, h) = (gpu.upload(&ids).unwrap(), gpu.allocate(4 * ids.len() * hidden).unwrap());
        let gather = Gather { ids: id_buffer.view(), tokens: ids.len(), scale: 3.3, h: h.view() };
        let expected: Vec<f32> = ids
            .iter()
            .flat_map(|id| &words[(*id as usize).min(vocab - 1) * hidden..][..hidden])
            .map(|word| wide(*word) * 3.3)
            .collect();
        embed(&gpu, table.view(), Element::Bf16, vocab, hidden, &gather).unwrap();
        prop_assert!(same(&h.view().read::<f32>(expected.len()).unwrap(), &expected));
        // The same words as numbers of half precision, and in single precision.
        let of = |widen: fn(u16) -> f32| -> Vec<f32> {
            let rows = ids.iter().flat_map(|id| &words[(*id as usize).min(vocab - 1) * hidden..][..hidden]);
            rows.map(|word| widen(*word) * 3.3).collect()
        };
        let half = |word: u16| half::f16::from_bits(word).to_f32();
        embed(&gpu, table.view(), Element::F16, vocab, hidden, &gather).unwrap();
        prop_assert!(same(&h.view().read::<f32>(expected.len()).unwrap(), &of(half)));
        let halves: Vec<f32> = words.iter().map(|word| half(*word)).collect();
        let table = gpu.upload(&padded(hidden, &halves)).unwrap();
        embed(&gpu, table.view(), Element::F32, vocab, hidden, &gather).unwrap();
        prop_assert!(same(&h.view().read::<f32>(expected.len()).unwrap(), &of(half)));
        let h = gpu.allocate(h.bytes()).unwrap();
        embed_fixed12(&gpu, &matrix, &Gather { h: h.view(), ..gather }).unwrap();
        prop_assert!(same(&h.view().read::<f32>(expected.len()).unwrap(), &expected));
        // Learned positions, for tokens of one sequence.
        let (rows, first) = (3, ids[0] % 4);
        let (learned, start) = (gpu.upload(&halves[..rows * hidden]).unwrap(), gpu.upload(&[first]).unwrap());
        let sequences = Sequences { count: 1, each: ids.len(), positions: start.view(), places: start.view() };
        add_positions(&gpu, learned.view(), rows, hidden, sequences, h.view()).unwrap();
        let at = |token: usize| &halves[(first as usize + token).min(rows - 1) * hidden..][..hidden];
        let positions = (0..ids.len()).flat_map(at);
        let expected: Vec<f32> = expected.iter().zip(positions).map(|(x, p)| x + p).collect();
        prop_assert!(same(&h.view().read::<f32>(expected.len()).unwrap(), &expected));
    }

    #[test]
    fn the_largest_logit_wins(logits in proptest::collection::vec(prop_oneof![float(), (-3i8..3).prop_map(f32::from)], 1..6000),
                              cap in 1f32..50.0) {
        let gpu = Gpu::new(Emulator::new());
        let (buffer, id) = (gpu.upload(&logits).unwrap(), gpu.upload(&[u32::MAX]).unwrap());
        let parts = gpu.allocate(argmax_workspace_bytes(1, logits.len())).unwrap();
        argmax(&gpu, buffer.view(), 1, logits.len(), parts.view(), id.view()).unwrap();
        let best_of = |logits: &[f32]| {
            (0..logits.len()).reduce(|a, b| if logits[b] > logits[a] { b } else { a }).unwrap()
        };
        let best = best_of(&logits);
        prop_assert_eq!(id.view().read::<u32>(1).unwrap()[0] as usize, best);
        if logits.len() > 1 {
            // From an address that is no multiple of 16.
            let unaligned = buffer.slice(4..buffer.bytes()).unwrap();
            argmax(&gpu, unaligned, 1, logits.len() - 1, parts.view(), id.view()).unwrap();
            prop_assert_eq!(id.view().read::<u32>(1).unwrap()[0] as usize, best_of(&logits[1..]));
            id.view().write(&[best as u32]).unwrap();
        }
        soft_cap(&gpu, buffer.view(), logits.len(), cap).unwrap();
        let expected: Vec<f32> =
            logits.iter().map(|l| reference::soft_capped(*l, cap)).collect();
        prop_assert!(same(&buffer.view().read::<f32>(logits.len()).unwrap(), &expected));
        advance(&gpu, id.view(), 1, 5).unwrap();
        prop_assert_eq!(id.view().read::<u32>(1).unwrap()[0] as usize, best + 5);
    }
}

/// A layer's heads and what attention sees of them.
#[derive(Clone, Copy, Debug)]
struct Case {
    heads: Heads,
    half: usize,
    neighbours: bool,
    cap: Option<f32>,
    norms: bool,
    window: Option<usize>,
    /// Whether some features of queries are NaNs, infinities and other extremes.
    odd: bool,
    /// Tokens before, and of this step.
    past: usize,
    tokens: usize,
    capacity: usize,
}

fn numbers(seed: u64, count: usize) -> Vec<f32> {
    let mut numbers = Numbers::new(seed);
    (0..count).map(|_| numbers.float()).collect()
}

/// Runs a step of attention on the device and by the stated orders, and compares cache, queries and outputs.
fn check_attention(gpu: &Gpu, c: Case, seed: u64) {
    let Heads { heads, kv_heads, head_dim: d } = c.heads;
    let (all, group) = (heads + 2 * kv_heads, heads / kv_heads);
    let stride = all * d;
    let width = c.heads.width();
    let cache_len = kv_heads * c.capacity.next_multiple_of(8) * width;
    let mut qkv: Vec<f32> = numbers(seed, c.tokens * stride).iter().map(|x| 3.0 * x).collect();
    let odd = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e38, -1e38, 1e-40, -0.0];
    if c.odd {
        let of_queries = qkv.iter_mut().enumerate().filter(|(i, _)| i % stride < heads * d);
        of_queries.step_by(37).for_each(|(i, x)| *x = odd[i / 37 % odd.len()]);
    }
    let angles = numbers(seed + 1, c.capacity * c.half.max(1));
    let cos: Vec<f32> = angles[..c.capacity * c.half].iter().map(|a| a.cos()).collect();
    let sin: Vec<f32> = angles[..c.capacity * c.half].iter().map(|a| a.sin()).collect();
    let norm = [numbers(seed + 2, d), numbers(seed + 3, d)];
    let key_place = |head, at, i| reference::key_place(c.capacity, d, head, at, i);
    let value_place = |head, at, i| reference::value_place(c.capacity, d, head, at, i);
    // What nobody wrote is a NaN.
    let (mut keys, mut values) = (vec![u16::MAX; cache_len], vec![u16::MAX; cache_len]);
    let past = numbers(seed + 4, 2 * kv_heads * c.past * d);
    for (n, pair) in past.chunks(2).enumerate() {
        let (head, at, i) = (n / (c.past * d), n / d % c.past, n % d);
        keys[key_place(head, at, i)] = round(pair[0]);
        values[value_place(head, at, i)] = round(pair[1]);
        (d..width).for_each(|i| keys[key_place(head, at, i)] = 0);
    }
    let scale = 1.0 / (d as f32).sqrt();
    let ld = (heads * d).next_multiple_of(64);

    let qkv_buffer = gpu.upload(&qkv).unwrap();
    let (cos_buffer, sin_buffer) = (gpu.upload(&cos).unwrap(), gpu.upload(&sin).unwrap());
    let norm_buffers = [gpu.upload(&norm[0]).unwrap(), gpu.upload(&norm[1]).unwrap()];
    let (keys_buffer, values_buffer) = (gpu.upload(&keys).unwrap(), gpu.upload(&values).unwrap());
    let (position, place) = (gpu.upload(&[c.past as u32]).unwrap(), gpu.upload(&[0u32]).unwrap());
    let sequences = Sequences { count: 1, each: c.tokens, positions: position.view(), places: place.view() };
    let cache = Cache {
        keys: keys_buffer.view(),
        values: values_buffer.view(),
        codes: None,
        capacity: c.capacity,
        sequences: 1,
    };
    let (cos_view, sin_view) = (cos_buffer.view(), sin_buffer.view());
    let rotation = Rotation { cos: cos_view, sin: sin_view, half: c.half, neighbours: c.neighbours };
    let norms = HeadNorms { query: norm_buffers[0].view(), key: norm_buffers[1].view(), eps: 1e-6 };
    let norms = c.norms.then_some(norms);
    rope(gpu, c.heads, qkv_buffer.view(), sequences, rotation, norms, cache).unwrap();
    let workspace = gpu.allocate(workspace_bytes(c.heads, c.tokens, c.capacity)).unwrap();
    let x = gpu.allocate(2 * c.tokens * ld).unwrap();
    let step = Attend {
        heads: c.heads,
        queries: qkv_buffer.view(),
        stride,
        sequences,
        length: c.capacity,
        window: c.window,
        scale,
        cap: c.cap,
        cache,
        workspace: workspace.view(),
        x: x.view(),
        ld,
    };
    let run = |start: &dyn Fn() -> llmpress_kernels::gpu::Result<()>| -> Vec<u16> {
        x.view().write(&vec![u16::MAX; c.tokens * ld]).unwrap();
        start().unwrap();
        x.view().read(c.tokens * ld).unwrap()
    };
    let found = run(&|| attend_in(gpu, &step, Form::Rows));
    // With the length known the grid is smaller; the bits are the same in every form.
    let known = Attend { length: c.past + c.tokens, ..step };
    assert_eq!(run(&|| attend_in(gpu, &step, Form::Tiles)), found, "{c:?}");
    assert_eq!(run(&|| attend_in(gpu, &known, Form::Tiles)), found, "{c:?}");
    let cramped = Attend { workspace: workspace.slice(0..0).unwrap(), ..step };
    assert_eq!(run(&|| attend(gpu, &cramped)), found, "{c:?}");

    // The reference: heads first.
    let (mut keys, mut values, mut q) = (keys, values, qkv.clone());
    for token in 0..c.tokens {
        for head in 0..all {
            let x = &mut q[token * stride + head * d..][..d];
            let row = c.past + token;
            if head >= heads + kv_heads {
                let head = head - heads - kv_heads;
                x.iter().enumerate().for_each(|(i, x)| values[value_place(head, row, i)] = round(*x));
                continue;
            }
            if c.norms {
                reference::norm_head(x, &norm[usize::from(head >= heads)], 1e-6);
            }
            let angles = row * c.half..(row + 1) * c.half;
            reference::rotate(x, &cos[angles.clone()], &sin[angles], c.neighbours);
            if head >= heads {
                x.iter().enumerate().for_each(|(i, x)| keys[key_place(head - heads, row, i)] = round(*x));
                (d..width).for_each(|i| keys[key_place(head - heads, row, i)] = 0);
            }
        }
    }
    assert!(same_words(&keys_buffer.view().read::<u16>(cache_len).unwrap(), &keys), "{c:?}");
    assert!(same_words(&values_buffer.view().read::<u16>(cache_len).unwrap(), &values), "{c:?}");
    let queries: Vec<f32> = qkv_buffer.view().read(q.len()).unwrap();
    for (found, expected) in queries.chunks(stride).zip(q.chunks(stride)) {
        assert!(same(&found[..heads * d], &expected[..heads * d]), "{c:?}");
    }
    // Then attention.
    let past = Past { keys: &keys, values: &values, capacity: c.capacity };
    for token in 0..c.tokens {
        for head in 0..heads {
            let query = &q[token * stride + head * d..][..d];
            let expected =
                reference::attend(c.heads, query, head / group, past, c.past + token, c.window, scale, c.cap);
            assert!(
                same_words(&found[token * ld + head * d..][..d], &expected),
                "{c:?} token {token} head {head}"
            );
        }
        assert!(found[token * ld + heads * d..(token + 1) * ld].iter().all(|&x| x == 0));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10))]

    #[test]
    fn attention(
        (kv_heads, group) in (1usize..3, 1usize..4), d in prop_oneof![Just(8usize), Just(24), Just(64), Just(80), 1usize..100],
        norms in any::<bool>(), window in prop_oneof![Just(None), (1usize..100).prop_map(Some)],
        past in prop_oneof![Just(0usize), 1usize..40, 60usize..68, 120usize..200], tokens in 1usize..40,
        room in 0usize..300, rotated in 0usize..3, seed in any::<u64>(),
    ) {
        let heads = Heads { heads: kv_heads * group, kv_heads, head_dim: d };
        let half = [d / 2, d / 4, 0][rotated];
        let neighbours = seed % 5 == 0;
        let cap = [None, Some(1.5), Some(50.0)][seed as usize % 7 % 3];
        let case = Case { heads, half, neighbours, cap, norms, window, odd: seed % 3 == 0, past, tokens, capacity: past + tokens + room };
        check_attention(&emulators()[seed as usize % 2], case, seed >> 8);
    }
}

#[test]
fn sequences_side_by_side_have_the_bits_that_each_has_by_itself() {
    let heads = Heads { heads: 6, kv_heads: 2, head_dim: 20 };
    let (capacity, all, half) = (150, 5, 10);
    let stride = 10 * 20;
    let width = Cache::bytes(heads, capacity, None) / 2;
    let ld = 128;
    for (each, starts, places, gpu) in [
        (1, vec![0u32, 149, 63, 70], vec![3u32, 0, 4, 1], Gpu::new(Emulator::new())),
        (7, vec![10, 60, 10], vec![1, 4, 2], Gpu::new(Emulator::backwards())),
    ] {
        let count = starts.len();
        let qkv = numbers(each as u64, count * each * stride);
        let cache = |seed| -> Vec<u16> { numbers(seed, all * width).iter().map(|x| round(*x)).collect() };
        let (keys, values) = (cache(5), cache(6));
        let angles = numbers(7, capacity * half);
        let angles = gpu.upload(&angles).unwrap();
        let rotation = Rotation { cos: angles.view(), sin: angles.view(), half, neighbours: false };
        let workspace = gpu.allocate(workspace_bytes(heads, count * each, capacity)).unwrap();
        let run = |qkv: &[f32], starts: &[u32], places: &[u32], form| {
            let (positions, places) = (gpu.upload(starts).unwrap(), gpu.upload(places).unwrap());
            let sequences =
                Sequences { count: starts.len(), each, positions: positions.view(), places: places.view() };
            let tokens = sequences.tokens();
            let (keys, values) = (gpu.upload(&keys).unwrap(), gpu.upload(&values).unwrap());
            let cache =
                Cache { keys: keys.view(), values: values.view(), codes: None, capacity, sequences: all };
            let (qkv, x) = (gpu.upload(qkv).unwrap(), gpu.allocate(2 * tokens * ld).unwrap());
            rope(&gpu, heads, qkv.view(), sequences, rotation, None, cache).unwrap();
            let step = Attend {
                heads,
                queries: qkv.view(),
                stride,
                sequences,
                length: capacity,
                window: Some(40),
                scale: 0.3,
                cap: None,
                cache,
                workspace: workspace.view(),
                x: x.view(),
                ld,
            };
            attend_in(&gpu, &step, form).unwrap();
            let keys: Vec<u16> = keys.view().read(all * width).unwrap();
            let values: Vec<u16> = values.view().read(all * width).unwrap();
            (x.view().read::<u16>(tokens * ld).unwrap(), keys, values)
        };
        let together = run(&qkv, &starts, &places, Form::Rows);
        assert!(run(&qkv, &starts, &places, Form::Tiles) == together);
        for (i, (start, place)) in starts.iter().zip(&places).enumerate() {
            let own = &qkv[i * each * stride..][..each * stride];
            for form in [Form::Rows, Form::Tiles] {
                let (x, keys, values) = run(own, &[*start], &[*place], form);
                assert_eq!(x, together.0[i * each * ld..][..each * ld], "sequence {i}, {form:?}");
                let place = *place as usize * width..(*place as usize + 1) * width;
                assert_eq!(keys[place.clone()], together.1[place.clone()]);
                assert_eq!(values[place.clone()], together.2[place]);
            }
        }
        // A place that nobody has stays as it was.
        let free = (0..all as u32).find(|place| !places.contains(place)).unwrap() as usize;
        assert_eq!(keys[free * width..][..width], together.1[free * width..][..width]);
    }
}

#[test]
fn wide_heads_attend() {
    for (d, past, tokens, window) in [
        (128, 300, 5, None),
        (256, 10, 18, None),
        (96, 0, 33, None),
        (160, 60, 70, Some(65)),
        (251, 60, 9, None),
    ] {
        let heads = Heads { heads: 4, kv_heads: 2, head_dim: d };
        let case = Case {
            heads,
            half: d / 2,
            neighbours: d == 160,
            cap: (d > 128).then_some(3.0),
            norms: true,
            window,
            odd: false,
            past,
            tokens,
            capacity: past + tokens,
        };
        check_attention(&Gpu::new(Emulator::new()), case, d as u64);
    }
}

#[test]
fn long_pasts_are_joined_in_several_rounds() {
    let heads = Heads { heads: 3, kv_heads: 1, head_dim: 8 };
    for (past, window) in [(128 * TILE + 70, None), (130 * TILE + 70, Some(128 * TILE + 3))] {
        let case = Case {
            heads,
            half: 4,
            neighbours: false,
            cap: None,
            norms: false,
            window,
            odd: false,
            past,
            tokens: 2,
            capacity: past + 90,
        };
        check_attention(&Gpu::new(Emulator::new()), case, past as u64);
    }
}

#[test]
fn heads_that_no_kernel_does_are_refused() {
    let heads = |heads, kv_heads, head_dim| Heads { heads, kv_heads, head_dim };
    for bad in [heads(4, 3, 64), heads(4, 0, 64), heads(4, 2, 0), heads(4, 2, 257)] {
        assert!(matches!(bad.check(), Err(Error::Unsupported(_))), "{bad:?}");
    }
    heads(8, 8, 256).check().unwrap();
}
