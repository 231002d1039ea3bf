//! A cache of codes: what is put into it to the bit, and attention over what it stands for.

use super::numbers::Numbers;
use super::{Bf16, Court, Result};
use crate::gpu::Error;
use crate::gpu::attention::{Attend, Cache, Form, Heads, Sequences, attend_in, workspace_bytes};
use crate::gpu::cache_codes::Codes;
use crate::gpu::reference::{self, Past, key_place, round, value_place, widen};
use crate::gpu::rope::{Rotation, rope};

/// What an output, an average of values of size up to 4, may be off by: probabilities and the result are rounded to BF16.
const PRECISION: f32 = 4.0 / 128.0;

struct Case {
    heads: Heads,
    bits: u8,
    window: Option<usize>,
    tokens: usize,
    room: usize,
}

const fn case(
    (heads, kv_heads, head_dim): (usize, usize, usize),
    bits: u8,
    window: Option<usize>,
    tokens: usize,
    room: usize,
) -> Case {
    Case { heads: Heads { heads, kv_heads, head_dim }, bits, window, tokens, room }
}

const CASES: [Case; 8] = [
    case((3, 1, 1), 4, None, 2, 0),
    case((6, 2, 18), 4, Some(9), 67, 70),
    case((6, 2, 20), 8, None, 5, 3),
    case((9, 3, 64), 4, None, 70, 1),
    case((9, 3, 64), 8, Some(50), 130, 0),
    case((4, 2, 96), 4, None, 33, 5),
    case((8, 2, 128), 8, None, 65, 0),
    case((4, 2, 256), 4, None, 18, 3),
];

pub(super) fn prove(court: &mut Court<'_>) -> Result<()> {
    for (seed, case) in CASES.iter().enumerate() {
        let Heads { heads, kv_heads, head_dim } = case.heads;
        if court.too_large(case.tokens * case.tokens * heads * head_dim) {
            continue;
        }
        let shape = format!(
            "{} tokens, {heads} heads over {kv_heads} of {head_dim}, {} bits, window {:?}",
            case.tokens, case.bits, case.window
        );
        court.case("a cache of codes", &shape, |court| one(court, case, &shape, 300 + seed as u64))?;
    }
    Ok(())
}

fn one(court: &mut Court<'_>, c: &Case, shape: &str, seed: u64) -> Result<()> {
    let gpu = court.gpu;
    let mut numbers = Numbers::new(seed);
    let Heads { heads, kv_heads, head_dim: d } = c.heads;
    let (all, half, capacity) = (heads + 2 * kv_heads, d / 2, c.tokens + c.room);
    let (stride, ld) = (all * d, (heads * d).next_multiple_of(64));
    let mut q = numbers.floats(c.tokens * stride, 0);
    let angles = numbers.floats(capacity * half, 0);
    let bytes = Cache::bytes(c.heads, capacity, Some(c.bits));
    let mut memory = [vec![u8::MAX; bytes], vec![u8::MAX; bytes]];

    let (qkv, angles_buffer) = (gpu.upload(&q)?, gpu.upload(&angles)?);
    let (keys, values) = (gpu.upload(&memory[0])?, gpu.upload(&memory[1])?);
    let zero = gpu.upload(&[0u32])?;
    let sequences = Sequences { count: 1, each: c.tokens, positions: zero.view(), places: zero.view() };
    let codes = Some(Codes { bits: c.bits, fault: None });
    let cache = Cache { keys: keys.view(), values: values.view(), codes, capacity, sequences: 1 };
    let rotation = Rotation { cos: angles_buffer.view(), sin: angles_buffer.view(), half, neighbours: false };
    rope(gpu, c.heads, qkv.view(), sequences, rotation, None, cache)?;

    let words = kv_heads * capacity.next_multiple_of(8) * c.heads.width();
    let (mut of_keys, mut of_values) = (vec![0u16; words], vec![0u16; words]);
    for at in 0..c.tokens {
        let angles = &angles[at * half..(at + 1) * half];
        for head in 0..all {
            let x = &mut q[at * stride + head * d..][..d];
            if head < heads + kv_heads {
                reference::rotate(x, angles, angles, false);
            }
            let Some(number) = head.checked_sub(heads) else { continue };
            let (is_key, number) = (number < kv_heads, number % kv_heads);
            let to = &mut memory[usize::from(!is_key)];
            let stand = reference::keep_head(to, c.heads, (capacity, c.bits), is_key, (number, at), x);
            let stand = stand.ok_or_else(|| Error::Invalid("a number that no code stands for".to_owned()))?;
            for (i, value) in stand.iter().enumerate() {
                match is_key {
                    true => of_keys[key_place(capacity, d, number, at, i)] = round(*value),
                    false => of_values[value_place(capacity, d, number, at, i)] = round(*value),
                }
            }
        }
    }
    let words = |bytes: &[u8]| bytes.iter().map(|byte| u16::from(*byte)).collect::<Vec<_>>();
    for (name, buffer, expected) in [("keys", &keys, &memory[0]), ("values", &values, &memory[1])] {
        let found: Vec<u8> = buffer.view().read(bytes)?;
        court.same("keep_codes", &format!("{name}, {shape}"), &words(&found), &words(expected));
    }

    let workspace = gpu.allocate(workspace_bytes(c.heads, c.tokens, capacity))?;
    let x = gpu.allocate(2 * c.tokens * ld)?;
    let scale = 1.0 / (d as f32).sqrt();
    let step = Attend {
        heads: c.heads,
        queries: qkv.view(),
        stride,
        sequences,
        length: capacity,
        window: c.window,
        scale,
        cap: None,
        cache,
        workspace: workspace.view(),
        x: x.view(),
        ld,
    };
    let past = Past { keys: &of_keys, values: &of_values, capacity };
    let mut expected: Vec<u16> = Vec::with_capacity(c.tokens * ld);
    for token in 0..c.tokens {
        for head in 0..heads {
            let (query, kv) = (&q[token * stride + head * d..][..d], head / (heads / kv_heads));
            expected.extend(reference::attend(c.heads, query, kv, past, token, c.window, scale, None));
        }
        expected.resize((token + 1) * ld, 0);
    }
    let wide = |words: &[u16]| words.iter().map(|word| widen(*word)).collect::<Vec<f32>>();
    let bf16 = |words: &[u16]| words.iter().map(|word| Bf16(*word)).collect::<Vec<_>>();
    let mut first: Option<Vec<u16>> = None;
    for form in [Form::Rows, Form::Tiles] {
        x.view().write(&vec![u16::MAX; c.tokens * ld])?;
        attend_in(gpu, &step, form)?;
        let found: Vec<u16> = x.view().read(c.tokens * ld)?;
        let kernel = format!("attend codes {form:?}");
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
