//! A cache of codes on a GPU, in the emulator: the codes are those of the processor, and attention sees what they stand for in BF16, to the
//! bit.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use llmpress_emulator::Emulator;
use llmpress_kernels::gpu::attention::{Attend, Cache, Form, Heads, Sequences, attend_in, workspace_bytes};
use llmpress_kernels::gpu::cache_codes::Codes;
use llmpress_kernels::gpu::reference::{self, Past, round};
use llmpress_kernels::gpu::rope::{HeadNorms, Rotation, rope};
use llmpress_kernels::gpu::{Error, Gpu};
use llmpress_numbers::Numbers;
use proptest::prelude::*;

#[derive(Clone, Copy, Debug)]
struct Case {
    heads: Heads,
    half: usize,
    norms: bool,
    window: Option<usize>,
    cap: Option<f32>,
    bits: u8,
    past: usize,
    tokens: usize,
    room: usize,
}

fn numbers(seed: u64, count: usize) -> Vec<f32> {
    let mut numbers = Numbers::new(seed);
    (0..count).map(|_| 3.0 * numbers.float() + 0.25).collect()
}

/// Reads a past and then a step, and compares codes, queries and outputs with the reference.
fn check(gpu: &Gpu, c: Case, seed: u64) {
    let Heads { heads, kv_heads, head_dim: d } = c.heads;
    let (all, group, length) = (heads + 2 * kv_heads, heads / kv_heads, c.past + c.tokens);
    let (stride, capacity, ld) = (all * d, length + c.room, (heads * d).next_multiple_of(64));
    let qkv = numbers(seed, length * stride);
    let angles = numbers(seed + 1, capacity * c.half);
    let cos: Vec<f32> = angles.iter().map(|a| a.cos()).collect();
    let sin: Vec<f32> = angles.iter().map(|a| a.sin()).collect();
    let norm = [numbers(seed + 2, d), numbers(seed + 3, d)];
    let (cos_buffer, sin_buffer) = (gpu.upload(&cos).unwrap(), gpu.upload(&sin).unwrap());
    let norm_buffers = [gpu.upload(&norm[0]).unwrap(), gpu.upload(&norm[1]).unwrap()];
    let rotation =
        Rotation { cos: cos_buffer.view(), sin: sin_buffer.view(), half: c.half, neighbours: false };
    let norms = HeadNorms { query: norm_buffers[0].view(), key: norm_buffers[1].view(), eps: 1e-6 };
    let norms = c.norms.then_some(norms);
    // The last of two sequences; what nobody wrote stands for infinities.
    let bytes = Cache::bytes(c.heads, capacity, Some(c.bits));
    let (keys, values) =
        (gpu.upload(&vec![0xffu8; 2 * bytes]).unwrap(), gpu.upload(&vec![0xffu8; 2 * bytes]).unwrap());
    let fault = gpu.upload(&[0u32]).unwrap();
    let codes = Some(Codes { bits: c.bits, fault: Some((fault.view(), 7)) });
    let cache = Cache { keys: keys.view(), values: values.view(), codes, capacity, sequences: 2 };
    let place = gpu.upload(&[1u32]).unwrap();
    let run = |from: usize, tokens: usize| {
        let buffer = gpu.upload(&qkv[from * stride..(from + tokens) * stride]).unwrap();
        let position = gpu.upload(&[from as u32]).unwrap();
        let sequences =
            Sequences { count: 1, each: tokens, positions: position.view(), places: place.view() };
        rope(gpu, c.heads, buffer.view(), sequences, rotation, norms, cache).unwrap();
        let workspace = gpu.allocate(workspace_bytes(c.heads, tokens, capacity)).unwrap();
        let x = gpu.upload(&vec![u16::MAX; tokens * ld]).unwrap();
        let step = Attend {
            heads: c.heads,
            queries: buffer.view(),
            stride,
            sequences,
            length: capacity,
            window: c.window,
            scale: 0.3,
            cap: c.cap,
            cache,
            workspace: workspace.view(),
            x: x.view(),
            ld,
        };
        attend_in(gpu, &step, Form::Rows).unwrap();
        let rows: Vec<u16> = x.view().read(tokens * ld).unwrap();
        attend_in(gpu, &step, Form::Tiles).unwrap();
        assert_eq!(rows, x.view().read::<u16>(tokens * ld).unwrap(), "{c:?}");
        rows
    };
    // The past a token at a time, in pieces, or at once: codes do not depend on it.
    let piece = [1, 13, c.past.max(1)][seed as usize % 3];
    for from in (0..c.past).step_by(piece) {
        run(from, piece.min(c.past - from));
    }
    let x = run(c.past, c.tokens);

    let mut q = qkv;
    let words = kv_heads * capacity.next_multiple_of(8) * c.heads.width();
    let (mut expected_keys, mut expected_values) = (vec![u16::MAX; words], vec![u16::MAX; words]);
    let mut memory = [vec![0xffu8; 2 * bytes], vec![0xffu8; 2 * bytes]];
    for at in 0..length {
        for head in 0..all {
            let x = &mut q[at * stride + head * d..][..d];
            if head < heads + kv_heads {
                if c.norms {
                    reference::norm_head(x, &norm[usize::from(head >= heads)], 1e-6);
                }
                let angles = at * c.half..(at + 1) * c.half;
                reference::rotate(x, &cos[angles.clone()], &sin[angles], false);
            }
            let Some(number) = head.checked_sub(heads) else { continue };
            let (is_key, number) = (number < kv_heads, number % kv_heads);
            let memory = &mut memory[usize::from(!is_key)][bytes..];
            let at_head = (number, at);
            let stand =
                reference::keep_head(memory, c.heads, (capacity, c.bits), is_key, at_head, x).unwrap();
            for (i, value) in stand.iter().enumerate() {
                match is_key {
                    true => expected_keys[reference::key_place(capacity, d, number, at, i)] = round(*value),
                    false => {
                        expected_values[reference::value_place(capacity, d, number, at, i)] = round(*value)
                    }
                }
            }
        }
    }
    for (found, expected) in [&keys, &values].into_iter().zip(&memory) {
        assert!(found.view().read::<u8>(2 * bytes).unwrap() == *expected, "{c:?}");
    }
    let past = Past { keys: &expected_keys, values: &expected_values, capacity };
    for token in 0..c.tokens {
        for head in 0..heads {
            let query = &q[(c.past + token) * stride + head * d..][..d];
            let expected =
                reference::attend(c.heads, query, head / group, past, c.past + token, c.window, 0.3, c.cap);
            assert_eq!(x[token * ld + head * d..][..d], expected, "{c:?} token {token} head {head}");
        }
        assert!(x[token * ld + heads * d..(token + 1) * ld].iter().all(|&x| x == 0));
    }
    assert_eq!(fault.view().read::<u32>(1).unwrap(), [0]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn codes_are_those_of_the_processor_and_attention_sees_what_they_stand_for(
        (kv_heads, group) in (1usize..3, 1usize..4), d in prop_oneof![Just(8usize), Just(20), Just(64), Just(80), 1usize..100],
        norms in any::<bool>(), window in prop_oneof![Just(None), (1usize..100).prop_map(Some)], wide in any::<bool>(),
        past in prop_oneof![Just(0usize), 1usize..40, 60usize..68], tokens in 1usize..40, room in 0usize..100,
        rotated in 0usize..3, seed in any::<u64>(),
    ) {
        let heads = Heads { heads: kv_heads * group, kv_heads, head_dim: d };
        let half = [d / 2, d / 4, 0][rotated];
        let bits = if wide { 8 } else { 4 };
        let gpu = Gpu::new(if seed % 2 == 0 { Emulator::new() } else { Emulator::backwards() });
        let cap = [None, Some(1.5)][seed as usize / 2 % 2];
        check(&gpu, Case { heads, half, norms, window, cap, bits, past, tokens, room }, seed >> 8);
    }
}

#[test]
fn wide_heads_have_two_groups() {
    for (bits, d, past, tokens, window) in [
        (4, 128, 70, 3, None),
        (8, 96, 0, 33, None),
        (4, 256, 10, 18, None),
        (8, 251, 20, 2, Some(5)),
        (4, 160, 60, 9, Some(65)),
    ] {
        let heads = Heads { heads: 4, kv_heads: 2, head_dim: d };
        let case =
            Case { heads, half: d / 2, norms: true, window, cap: Some(2.0), bits, past, tokens, room: 3 };
        check(&Gpu::new(Emulator::new()), case, d as u64);
    }
}

#[test]
fn a_key_or_value_that_no_code_stands_for_leaves_the_label() {
    let gpu = Gpu::new(Emulator::new());
    let heads = Heads { heads: 1, kv_heads: 1, head_dim: 4 };
    let cache_bytes = Cache::bytes(heads, 8, Some(4));
    assert_eq!(cache_bytes, 8 * (8 + 5));
    let (keys, values) = (gpu.allocate(cache_bytes).unwrap(), gpu.allocate(cache_bytes).unwrap());
    let (positions, places) = (gpu.upload(&[0u32]).unwrap(), gpu.upload(&[0u32]).unwrap());
    let none = gpu.allocate(0).unwrap();
    let rotation = Rotation { cos: none.view(), sin: none.view(), half: 0, neighbours: false };
    let run = |qkv: &[f32], bits| {
        let fault = gpu.upload(&[0u32]).unwrap();
        let qkv = gpu.upload(qkv).unwrap();
        let sequences = Sequences { count: 1, each: 1, positions: positions.view(), places: places.view() };
        let codes = Some(Codes { bits, fault: Some((fault.view(), 3)) });
        let cache = Cache { keys: keys.view(), values: values.view(), codes, capacity: 8, sequences: 1 };
        rope(&gpu, heads, qkv.view(), sequences, rotation, None, cache)
            .map(|()| fault.view().read::<u32>(1).unwrap()[0])
    };
    assert_eq!(run(&[1.0; 12], 4).unwrap(), 0);
    for (at, odd) in [(4, f32::NAN), (7, f32::INFINITY), (8, f32::NEG_INFINITY), (11, f32::NAN)] {
        let mut qkv = [1.0; 12];
        qkv[at] = odd;
        assert_eq!(run(&qkv, 4).unwrap(), 3, "{at}");
        qkv[at] = 1.0;
        // Queries are not quantised.
        qkv[0] = odd;
        assert_eq!(run(&qkv, 4).unwrap(), 0);
    }
    let mut wide = [0.0; 12];
    (wide[8], wide[9]) = (f32::MAX, -f32::MAX);
    assert_eq!(run(&wide, 4).unwrap(), 3, "a range that is infinite");
    assert!(matches!(run(&[1.0; 12], 6), Err(Error::Unsupported(_))));
}
