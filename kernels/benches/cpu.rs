//! Speed of the processor's kernels on one thread, beside what the processor can do: `cargo bench -p llmpress-kernels`.

#![allow(clippy::expect_used)]

use std::hint::black_box;
use std::time::Instant;

use llmpress_entropy::fixed12::{Histogram, Strips, StripsRef, encode_strips};
use llmpress_kernels::cpu::{Elements, PANEL, dot_fixed12, dot_rows, multiply, silu_gate, softmax};

/// Rounds; the median counts.
const ROUNDS: usize = 7;
/// Weights that no cache holds.
const STREAMED: usize = 256 << 20;

fn main() {
    let peak = median(fma_peak);
    println!("fused multiply-adds in registers: {peak:.0} GFLOP/s\n");
    println!("multiply, {PANEL} tokens, share of that peak");
    for (rows, cols) in [(576, 576), (1536, 576), (576, 1536), (4864, 896), (896, 4864), (512, 64), (64, 512)]
    {
        let (weights, x) = (vec![0.5f32; rows * cols], vec![0.25f32; cols * PANEL]);
        let mut out = vec![0.0f32; rows * PANEL];
        let repeats = (2usize << 30) / (2 * rows * cols * PANEL) + 1;
        let speed = median(|| {
            let start = Instant::now();
            for _ in 0..repeats {
                for (weights, out) in weights.chunks(64 * cols).zip(out.chunks_mut(64 * PANEL)) {
                    multiply(black_box(weights), cols, &x, PANEL, out);
                }
            }
            (2 * rows * cols * PANEL * repeats) as f64 / start.elapsed().as_secs_f64() / 1e9
        });
        println!("  {rows:5} x {cols:5}  {speed:6.0} GFLOP/s  {:3.0} %", speed / peak * 100.0);
    }
    println!("\none token, weights from memory, GB/s of what is stored and 10^9 weights/s");
    // Exponents as trained weights have them, and one escape in so many.
    let words: Vec<u16> = (0..STREAMED as u64)
        .map(|i| {
            let r = (i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let step = ((r << 8) | 1 << 20).leading_zeros() as u16;
            (r >> 48) as u16 & 0x807f | (124 - step.min(14)) << 7
        })
        .collect();
    let report = |name: &str, bytes: f64, seconds: f64| {
        println!("  {name:24} {:5.1} GB/s  {:5.2}", bytes / seconds / 1e9, STREAMED as f64 / seconds / 1e9);
    };
    let seconds = |mut f: Box<dyn FnMut() + '_>| {
        median(|| {
            let start = Instant::now();
            f();
            start.elapsed().as_secs_f64()
        })
    };
    let longs: &[u64] = bytemuck::cast_slice(&words);
    let read = seconds(Box::new(|| {
        black_box(longs.iter().fold(0u64, |a, b| a ^ b));
    }));
    report("read", 2.0 * STREAMED as f64, read);
    let cols = 1024;
    let x = vec![0.01f32; cols];
    let mut out = vec![0.0f32; STREAMED / cols];
    let plain = seconds(Box::new(|| dot_rows(Elements::Bf16(&words), cols, &x, &mut out)));
    report("bf16", 2.0 * STREAMED as f64, plain);
    for (name, one_in) in [("fixed12", 0usize), ("fixed12, 0.3 % escapes", 333), ("fixed12, 5 % escapes", 20)]
    {
        let mut words = words.clone();
        if one_in > 0 {
            words.iter_mut().step_by(one_in).for_each(|w| *w = 0);
        }
        let histogram = {
            let mut h = Histogram::new();
            h.add(&words);
            h
        };
        let base = histogram.best_window().base;
        let mut encoded = Strips::default();
        encode_strips(base, cols, &words, &mut encoded).expect("whole rows");
        let mut offsets = vec![0u32];
        offsets.extend(encoded.escape_counts.iter().scan(0, |sum, n| {
            *sum += n;
            Some(*sum)
        }));
        let strips = StripsRef {
            sign_mantissa: &encoded.sign_mantissa,
            codes: &encoded.codes,
            escape_offsets: &offsets,
            escape_positions: &encoded.escape_positions,
            escape_exponents: &encoded.escape_exponents,
        };
        let fused = seconds(Box::new(|| dot_fixed12(base, &strips, &x, &mut out).expect("valid strips")));
        report(name, 1.5 * STREAMED as f64, fused);
    }
    println!("\nelementwise, 10^9 values/s");
    let mut up = vec![0.5f32; 1 << 20];
    let gate: Vec<f32> = (0..1 << 20).map(|i| i as f32 / 1e5 - 5.0).collect();
    let silu = seconds(Box::new(|| silu_gate(&gate, &mut up)));
    println!("  silu_gate  {:.2}", gate.len() as f64 / silu / 1e9);
    let mut scores = vec![0.5f32; 48 << 14];
    let count = scores.len() as f64;
    let soft = seconds(Box::new(|| softmax(&mut scores, PANEL)));
    println!("  softmax    {:.2}", count / soft / 1e9);
}

/// The median of some rounds, after one that is not counted.
fn median(mut round: impl FnMut() -> f64) -> f64 {
    round();
    let mut rounds: Vec<f64> = (0..ROUNDS).map(|_| round()).collect();
    rounds.sort_by(f64::total_cmp);
    rounds[ROUNDS / 2]
}

/// `multiply` of a matrix that stays in the first cache, eight rows deep: nothing but fused multiply-adds.
fn fma_peak() -> f64 {
    let (cols, repeats) = (64, 20_000);
    let (weights, x) = (vec![0.5f32; 8 * cols], vec![0.25f32; cols * PANEL]);
    let mut out = vec![0.0f32; 8 * PANEL];
    let start = Instant::now();
    for _ in 0..repeats {
        multiply(black_box(&weights), cols, &x, PANEL, &mut out);
    }
    (2 * 8 * cols * PANEL * repeats) as f64 / start.elapsed().as_secs_f64() / 1e9
}
