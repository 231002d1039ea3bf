//! Rotary embedding and cache to the bit; attention near the reference, and the same bits in every form.

use super::numbers::Numbers;
use super::{Bf16, Court, Result};
use crate::gpu::attention::{Attend, Cache, Form, Heads, Sequences, attend_in, workspace_bytes};
use crate::gpu::reference::{self, Past, key_place, round, value_place, widen};
use crate::gpu::rope::{HeadNorms, Rotation, rope};

/// What an output, an average of values of size up to 4, may be off by: probabilities and the result are rounded to BF16.
const PRECISION: f32 = 4.0 / 128.0;

struct Case {
    heads: Heads,
    half: usize,
    neighbours: bool,
    cap: Option<f32>,
    norms: bool,
    window: Option<usize>,
    past: usize,
    tokens: usize,
    room: usize,
}

impl Case {
    /// The same, in which neighbouring features turn.
    const fn of_neighbours(self) -> Self {
        Self { neighbours: true, ..self }
    }

    /// The same with scores held below a number.
    const fn capped(self, cap: f32) -> Self {
        Self { cap: Some(cap), ..self }
    }
}

const fn case(
    (heads, kv_heads, head_dim): (usize, usize, usize),
    half: usize,
    norms: bool,
    window: Option<usize>,
    past: usize,
    tokens: usize,
    room: usize,
) -> Case {
    let heads = Heads { heads, kv_heads, head_dim };
    Case { heads, half, neighbours: false, cap: None, norms, window, past, tokens, room }
}

const CASES: [Case; 18] = [
    case((3, 1, 1), 0, false, None, 2, 2, 0),
    case((6, 2, 18), 9, true, None, 63, 3, 70),
    case((9, 3, 77), 38, true, Some(50), 130, 20, 3),
    case((1, 1, 8), 4, false, None, 0, 1, 0),
    case((6, 2, 24), 6, true, Some(9), 63, 3, 70),
    case((4, 4, 80), 0, false, None, 5, 17, 1),
    case((9, 3, 64), 32, false, None, 700, 1, 300),
    case((9, 3, 64), 32, false, Some(100), 130, 40, 0),
    case((4, 2, 96), 48, true, None, 0, 33, 5),
    case((32, 8, 128), 64, false, None, 511, 1, 1),
    case((32, 8, 128), 64, false, None, 60, 70, 0),
    case((4, 2, 160), 80, false, Some(65), 60, 70, 0),
    case((4, 2, 256), 128, true, None, 10, 18, 3),
    case((4, 2, 64), 16, true, None, 10, 5, 3).of_neighbours(),
    case((2, 1, 35), 17, false, None, 0, 3, 0).of_neighbours(),
    case((4, 2, 24), 12, false, Some(50), 130, 5, 3).capped(2.0),
    case((4, 2, 128), 64, false, None, 63, 40, 0).capped(0.5),
    case((4, 2, 256), 128, false, None, 300, 1, 3).capped(50.0),
];

pub(super) fn prove(court: &mut Court<'_>) -> Result<()> {
    for (seed, case) in CASES.iter().enumerate() {
        let Heads { heads, kv_heads, head_dim } = case.heads;
        if court.too_large(case.tokens * (case.past + case.tokens) * heads * head_dim) {
            continue;
        }
        let shape = format!(
            "{} tokens after {}, {heads} heads over {kv_heads} of {head_dim}, window {:?}, cap {:?}",
            case.tokens, case.past, case.window, case.cap
        );
        court.case("attention", &shape, |court| one(court, case, &shape, 100 + seed as u64))?;
    }
    Ok(())
}

fn one(court: &mut Court<'_>, c: &Case, shape: &str, seed: u64) -> Result<()> {
    let gpu = court.gpu;
    let mut numbers = Numbers::new(seed);
    let Heads { heads, kv_heads, head_dim: d } = c.heads;
    let (all, group, capacity) = (heads + 2 * kv_heads, heads / kv_heads, c.past + c.tokens + c.room);
    let (stride, ld) = (all * d, (heads * d).next_multiple_of(64));
    let cache_len = kv_heads * capacity.next_multiple_of(8) * c.heads.width();
    let qkv = numbers.floats(c.tokens * stride, 0);
    let angles = numbers.floats(capacity * c.half, 0);
    let cos: Vec<f32> = angles.iter().map(|a| a.cos()).collect();
    let sin: Vec<f32> = angles.iter().map(|a| a.sin()).collect();
    let norm = [numbers.floats(d, 0), numbers.floats(d, 0)];
    // What nobody wrote is a NaN.
    let (mut keys, mut values) = (vec![u16::MAX; cache_len], vec![u16::MAX; cache_len]);
    for head in 0..kv_heads {
        for at in 0..c.past {
            for i in 0..d {
                keys[key_place(capacity, d, head, at, i)] = round(numbers.float());
                values[value_place(capacity, d, head, at, i)] = round(numbers.float());
            }
            (d..c.heads.width()).for_each(|i| keys[key_place(capacity, d, head, at, i)] = 0);
        }
    }
    let scale = 1.0 / (d as f32).sqrt();

    let qkv_buffer = gpu.upload(&qkv)?;
    let (cos_buffer, sin_buffer) = (gpu.upload(&cos)?, gpu.upload(&sin)?);
    let norm_buffers = [gpu.upload(&norm[0])?, gpu.upload(&norm[1])?];
    let (keys_buffer, values_buffer) = (gpu.upload(&keys)?, gpu.upload(&values)?);
    let (position, place) = (gpu.upload(&[c.past as u32])?, gpu.upload(&[0u32])?);
    let sequences = Sequences { count: 1, each: c.tokens, positions: position.view(), places: place.view() };
    let cache =
        Cache { keys: keys_buffer.view(), values: values_buffer.view(), codes: None, capacity, sequences: 1 };
    let (cos_view, sin_view) = (cos_buffer.view(), sin_buffer.view());
    let rotation = Rotation { cos: cos_view, sin: sin_view, half: c.half, neighbours: c.neighbours };
    let norms = HeadNorms { query: norm_buffers[0].view(), key: norm_buffers[1].view(), eps: 1e-6 };
    let norms = c.norms.then_some(norms);
    rope(gpu, c.heads, qkv_buffer.view(), sequences, rotation, norms, cache)?;

    let mut q = qkv.clone();
    for token in 0..c.tokens {
        let row = c.past + token;
        for head in 0..all {
            let x = &mut q[token * stride + head * d..][..d];
            if head >= heads + kv_heads {
                let head = head - heads - kv_heads;
                x.iter()
                    .enumerate()
                    .for_each(|(i, x)| values[value_place(capacity, d, head, row, i)] = round(*x));
                continue;
            }
            if c.norms {
                reference::norm_head(x, &norm[usize::from(head >= heads)], 1e-6);
            }
            let angles = row * c.half..(row + 1) * c.half;
            reference::rotate(x, &cos[angles.clone()], &sin[angles], c.neighbours);
            if head >= heads {
                let head = head - heads;
                x.iter()
                    .enumerate()
                    .for_each(|(i, x)| keys[key_place(capacity, d, head, row, i)] = round(*x));
                (d..c.heads.width()).for_each(|i| keys[key_place(capacity, d, head, row, i)] = 0);
            }
        }
    }
    let bf16 = |words: &[u16]| words.iter().map(|word| Bf16(*word)).collect::<Vec<_>>();
    let found: Vec<f32> = qkv_buffer.view().read(q.len())?;
    let queries =
        |all: &[f32]| -> Vec<f32> { all.chunks(stride).flat_map(|row| row[..heads * d].to_vec()).collect() };
    court.same("rope", &format!("queries, {shape}"), &queries(&found), &queries(&q));
    let found: Vec<u16> = keys_buffer.view().read(cache_len)?;
    court.same("rope", &format!("keys, {shape}"), &bf16(&found), &bf16(&keys));
    let found: Vec<u16> = values_buffer.view().read(cache_len)?;
    court.same("rope", &format!("values, {shape}"), &bf16(&found), &bf16(&values));

    let workspace = gpu.allocate(workspace_bytes(c.heads, c.tokens, capacity))?;
    let x = gpu.allocate(2 * c.tokens * ld)?;
    let step = Attend {
        heads: c.heads,
        queries: qkv_buffer.view(),
        stride,
        sequences,
        length: capacity,
        window: c.window,
        scale,
        cap: c.cap,
        cache,
        workspace: workspace.view(),
        x: x.view(),
        ld,
    };
    let past = Past { keys: &keys, values: &values, capacity };
    let mut expected = Vec::with_capacity(c.tokens * ld);
    for token in 0..c.tokens {
        for head in 0..heads {
            let query = &q[token * stride + head * d..][..d];
            expected.extend(reference::attend(
                c.heads,
                query,
                head / group,
                past,
                c.past + token,
                c.window,
                scale,
                c.cap,
            ));
        }
        expected.resize((token + 1) * ld, 0);
    }
    let wide = |words: &[u16]| words.iter().map(|word| widen(*word)).collect::<Vec<f32>>();
    let mut first: Option<Vec<u16>> = None;
    // With the length known the grid is smaller.
    for (form, length) in [(Form::Rows, capacity), (Form::Tiles, capacity), (Form::Tiles, c.past + c.tokens)]
    {
        x.view().write(&vec![u16::MAX; c.tokens * ld])?;
        attend_in(gpu, &Attend { length, ..step }, form)?;
        let found: Vec<u16> = x.view().read(c.tokens * ld)?;
        let kernel = format!("attend {form:?}");
        match &first {
            None => {
                let allowed = vec![PRECISION; found.len()];
                court.near(&kernel, shape, &wide(&found), &wide(&expected), &allowed);
            }
            Some(first) => {
                court.same(&kernel, &format!("{shape}, as the first"), &bf16(&found), &bf16(first))
            }
        }
        first.get_or_insert(found);
    }
    Ok(())
}
